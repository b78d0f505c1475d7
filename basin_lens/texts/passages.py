"""Where text comes from: passages, files, datasets; and how it becomes token sequences with exact offsets."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from basin_lens import model as door
from basin_lens.errors import TextError


@dataclass(frozen=True)
class Passage:
    """A text with its document, its labels and named character spans.

    Args:
        text: the text itself, never empty.
        doc: the document it belongs to; statistics treat documents as independent. None: a document of its own.
        labels: facts about the whole passage, one table column each: `{"memorized": True}`.
        spans: named character ranges `[start, end)`: `{"IO": (10, 14)}`.

    Raises:
        TextError: empty text, or a span outside of it.

    Example:
        >>> import basin_lens as bl
        >>> bl.Passage("Paris is in France.", doc="geography", spans={"city": (0, 5)}).doc
        'geography'
    """

    text: str
    doc: str | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TextError(f"expected a text (str), got {type(self.text).__name__}. Decode bytes first.")
        if not self.text:
            raise TextError("expected a text with at least one character, got an empty one. Leave empty texts out.")
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError(
                f"expected Unicode text, got a lone surrogate at character {error.start}. Decode it properly."
            ) from error
        # None is how api.md spells "nothing given".
        object.__setattr__(self, "labels", dict(self.labels or {}))
        object.__setattr__(self, "spans", {name: (int(a), int(b)) for name, (a, b) in (self.spans or {}).items()})
        for name, (start, end) in self.spans.items():
            if not 0 <= start < end <= len(self.text):
                raise TextError(
                    f"expected span {name!r} inside the text's {len(self.text)} characters, got ({start}, {end}). "
                    "Spans are [start, end) in characters."
                )


@dataclass(frozen=True)
class TokenSequence:
    """What the model reads in one piece: a passage, or one chunk of it.

    `starts`/`ends` are character offsets in the passage (-1 for a token that is not text, as BOS).
    """

    tokens: tuple[int, ...]
    passage: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]


def read_passages(data: Any) -> list[Passage]:
    """Passages from a text, a `Passage`, a `pathlib.Path` (read as UTF-8), lists of these, or a dataset with a `text` column.

    Raises:
        TextError: nothing there, an empty text, a missing or unreadable file, something that is not text.
    """
    if isinstance(data, str | Passage | os.PathLike):
        data = [data]
    if hasattr(data, "column_names") or hasattr(data, "features"):
        data = _from_dataset(data)
    if not isinstance(data, Iterable) or isinstance(data, bytes | Mapping):
        raise TextError(f"expected a text, a Passage, a list of them or a dataset, got {type(data).__name__}.")
    passages = [_passage(item, index) for index, item in enumerate(data)]
    if not passages:
        raise TextError("expected at least one text, got an empty list.")
    return passages


def read_file(path: str | os.PathLike[str]) -> Passage:
    """One file as one passage, its document named after it, line ends kept so that offsets are the file's own.

    Raises:
        TextError: missing, empty, or not UTF-8.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise TextError(f"expected a text file, got {str(path)!r}, which does not exist. Check the path.") from error
    except UnicodeDecodeError as error:
        raise TextError(f"expected UTF-8 text in {str(path)!r}, got byte {error.start} that is not. Convert the file.") from error
    except OSError as error:
        raise TextError(f"expected a readable text file, got {str(path)!r}: {error.strerror}.") from error
    if not text:
        raise TextError(f"expected text in {str(path)!r}, got an empty file.")
    return Passage(text, doc=str(path))


@cache
def reference_passages() -> tuple[Passage, ...]:
    """The built-in passages: prose of our own, one document per register.

    Each is 60-200 tokens long. They are the demo's texts and the bank behind `bank="reference"`.
    """
    folder = resources.files("basin_lens") / "data" / "passages"
    documents = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".txt")), key=lambda entry: entry.name)
    return tuple(
        Passage(text, doc=entry.name.removesuffix(".txt"))
        for entry in documents
        for text in entry.read_text(encoding="utf-8").strip().split("\n\n")
    )


def tokenize(model: Any, passages: list[Passage], *, max_length: int = 128, prepend_bos: bool | None = None) -> list[TokenSequence]:
    """Token sequences of at most `max_length` tokens (and the model's context), BOS counted; longer passages become several, cut at token borders.

    The tokenizer is called by itself, because the model's own `to_tokens` may reload it and hides the offsets. Strings that
    spell a special token become that token, as in the model's own `to_tokens`.

    Raises:
        TextError: the model has no tokenizer with offsets, a text gives fewer than two tokens in all, or `max_length` is
            below 2.
    """
    tokenizer = door.tokenizer_of(model)
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise TextError(
            "expected a model with a fast tokenizer (one that gives character offsets), got "
            f"{type(tokenizer).__name__ if tokenizer is not None else 'none'}. Pass token ids as a LongTensor instead."
        )
    max_length = longest_sequence(model, max_length)
    bos = door.uses_bos(model, prepend_bos)
    room = max_length - (bos is not None)
    sequences = []
    for index, passage in enumerate(passages):
        # Longer than the tokenizer's own limit is fine: we cut it ourselves.
        encoded = tokenizer(passage.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if len(ids) + (bos is not None) < 2:
            raise TextError(
                f"expected a text of at least two tokens, got {len(ids) + (bos is not None)} from {passage.text[:40]!r}: position 0 "
                "is never scored. Use a longer text."
            )
        for first in range(0, len(ids), room):
            piece, spans = ids[first : first + room], offsets[first : first + room]
            head = [] if bos is None else [bos]
            missing = [-1] * len(head)
            sequences.append(
                TokenSequence(
                    tokens=(*head, *piece),
                    passage=index,
                    starts=(*missing, *(start for start, _ in spans)),
                    ends=(*missing, *(end for _, end in spans)),
                )
            )
    return sequences


def from_token_ids(model: Any, tokens: Tensor, valid: Tensor | None = None) -> list[TokenSequence]:
    """Sequences from a LongTensor `[batch, pos]` or `[pos]` of token ids, without text.

    Args:
        model: a hooked model.
        tokens: token ids.
        valid: which of them are real (not padding), same shape; None: all.

    Raises:
        TextError: not token ids, or a sequence of fewer than two tokens.
    """
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim not in (1, 2):
        raise TextError(f"expected token ids as a LongTensor [batch, pos], got {tokens.dtype} of shape {tuple(tokens.shape)}.")
    if not tokens.numel():
        raise TextError(f"expected sequences of at least two tokens, got a tensor of shape {tuple(tokens.shape)}.")
    tokens = tokens.detach().cpu().reshape(-1, tokens.shape[-1])
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < door.vocabulary_size(model):
        raise TextError(
            f"expected token ids in [0, {door.vocabulary_size(model)}), got {int(tokens.min())} to {int(tokens.max())}. "
            "Are these tokens of another model?"
        )
    keep = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid.detach().cpu().bool().reshape(tokens.shape)
    rows = [tuple(row[mask].tolist()) for row, mask in zip(tokens, keep, strict=True)]
    short = next((index for index, row in enumerate(rows) if len(row) < 2), None)
    if not rows or short is not None:
        raise TextError(f"expected sequences of at least two tokens, got {len(rows[short]) if rows and short is not None else 0}.")
    longest = max(len(row) for row in rows)
    if longest > door.n_context(model):
        raise TextError(f"expected sequences of at most {door.n_context(model)} tokens (the model's context), got {longest}.")
    return [TokenSequence(row, index, (-1,) * len(row), (-1,) * len(row)) for index, row in enumerate(rows)]


def longest_sequence(model: Any, max_length: int) -> int:
    """`max_length`, or the model's context if that is shorter.

    Raises:
        TextError: below 2, where no token could be scored.
    """
    if max_length < 2:
        raise TextError(f"expected max_length of at least 2 tokens, got {max_length}: position 0 is never scored.")
    return min(max_length, door.n_context(model))


def token_strings(model: Any, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token id by itself, leading space kept; `<id>` when the model has no tokenizer.

    A token that is only part of a character (emoji, rare scripts) shows as U+FFFD.
    """
    tokenizer = door.tokenizer_of(model)
    strings = {}
    for token in sorted(set(ids)):
        if tokenizer is None:
            strings[token] = f"<{token}>"
            continue
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        piece = tokenizer.convert_ids_to_tokens(token)
        # SentencePiece decoders drop the space that opens a text.
        lost = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
        strings[token] = " " + text if lost else text
    return strings


def _passage(item: Any, index: int) -> Passage:
    if isinstance(item, os.PathLike):
        return read_file(item)
    passage = Passage(item) if isinstance(item, str) else item
    if not isinstance(passage, Passage):
        raise TextError(f"expected a text or a Passage at index {index}, got {type(item).__name__}.")
    if passage.doc is not None:
        return passage
    return Passage(passage.text, doc=f"text-{index}", labels=passage.labels, spans=passage.spans)


def _from_dataset(data: Any) -> list[Passage | str]:
    columns = data.column_names or list(next(iter(data), {}))
    if "text" not in columns:
        raise TextError(
            f"expected a dataset with a 'text' column, got columns {sorted(columns)}. Rename one: dataset.rename_column(...)."
        )
    # Data sets such as WikiText hold empty lines between their paragraphs: they are separators, not texts.
    rows = [row for row in data if isinstance(row["text"], str) and row["text"].strip()]
    return [Passage(row["text"], doc=None if row.get("doc") is None else str(row["doc"])) for row in rows]
