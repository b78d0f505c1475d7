"""How passages become token sequences, with exact character offsets."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from basin_lens import model as door
from basin_lens.errors import TextError
from basin_lens.texts.passages import Passage


@dataclass(frozen=True)
class TokenSequence:
    """What the model reads in one piece: a passage, or one chunk of it.

    `starts`/`ends` are character offsets in the passage (-1 for a token that is not text, as BOS).
    """

    tokens: tuple[int, ...]
    passage: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]


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
