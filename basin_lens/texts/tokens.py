"""How passages become token sequences, with exact character offsets."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsInt, TypeGuard, cast

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from basin_lens.errors import TextError
from basin_lens.model import HookedModel, n_context, padding_of, tokenizer_of, uses_bos, vocabulary_size
from basin_lens.texts.passages import Passage, Texts
from basin_lens.values import Whole, whole_or_none

# An additive mask has 0 where a token is real, and this or less (a type's lowest number, or -inf) where it is padding.
_MASKED = -1e3


@dataclass(frozen=True)
class TokenSequence:
    """What the model reads in one piece: a passage, or one chunk of it.

    `starts`/`ends` are character offsets in the passage (-1 for a token that is not text, as BOS).
    """

    tokens: tuple[int, ...]
    passage: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]


def tokenize(
    model: HookedModel, passages: list[Passage], *, max_length: Whole = 128, prepend_bos: bool | None = None
) -> list[TokenSequence]:
    """Token sequences of at most `max_length` tokens (and the model's context), BOS counted.

    Longer passages become several, cut at token borders.

    The tokenizer is called by itself, because the model's own `to_tokens` may reload it and hides the offsets. Strings that
    spell a special token become that token, as in the model's own `to_tokens`. A tokenizer that says of no token where it stands
    (all its offsets are empty) gives sequences without offsets (-1).

    Raises:
        TextError: the model has no tokenizer with offsets, a text gives fewer than two tokens in all, `max_length` is below 2, a
            text spells the BOS token that is put before it anyway, a token that the embedding lacks, or spans where the tokenizer
            gives no offsets.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise TextError(
            "expected a model with a fast tokenizer (one that gives character offsets), got "
            f"{type(tokenizer).__name__ if tokenizer is not None else 'none'}. Pass token ids as a LongTensor instead."
        )
    max_length = longest_sequence(model, max_length)
    bos = uses_bos(model, prepend_bos)
    room = max_length - (bos is not None)
    sequences = []
    for index, passage in enumerate(passages):
        # Longer than the tokenizer's own limit is fine: we cut it ourselves.
        encoded = tokenizer(passage.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        if len(ids) + (bos is not None) < 2:
            raise TextError(
                f"expected a text of at least two tokens, got {len(ids) + (bos is not None)} from {passage.text[:40]!r} (text "
                f"{index}): position 0 is never scored. Use a longer text."
            )
        _check_ids(model, passage, index, ids, bos)
        offsets = _offsets(passage, index, encoded["offset_mapping"])
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


def _check_ids(model: HookedModel, passage: Passage, index: int, ids: Sequence[int], bos: int | None) -> None:
    if bos is not None and ids[:1] == [bos]:
        raise TextError(
            f"expected a text without the BOS token, which is put before it, got text {index} that begins with it: "
            f"{passage.text[:40]!r}. Take it off, or pass prepend_bos=False."
        )
    size = vocabulary_size(model)
    beyond = next((token for token in ids if token >= size), None)
    if beyond is not None:
        raise TextError(
            f"expected tokens below {size} (the model's embedding), got token {beyond} in text {index}, {passage.text[:40]!r}. "
            "Tokenizer and model do not fit: use the model's own, or resize the embedding."
        )


def _offsets(passage: Passage, index: int, offsets: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Offsets, or (-1, -1) for each token of a tokenizer that has none."""
    if any(start < end for start, end in offsets):
        return offsets
    if passage.spans or getattr(passage, "words", None):
        raise TextError(
            f"expected a tokenizer that says where each token stands, got empty offsets for text {index}, which has spans or "
            f"words: {passage.text[:40]!r}. Leave spans out, or use another tokenizer."
        )
    return [(-1, -1)] * len(offsets)


def given_ids(model: HookedModel, data: Texts, attention_mask: object = None) -> list[TokenSequence] | None:
    """Sequences of the token ids among what was given to be measured, or None if it is texts.

    Args:
        model: a hooked model.
        data: ids as a LongTensor or an array `[batch, pos]` or `[pos]`, a list of lists of their own lengths, or what a tokenizer
            returns (a mapping with `input_ids`, and perhaps `attention_mask`).
        attention_mask: 1 for real tokens, 0 for padding on either side, in the shape of the ids; None: that of the mapping, or all
            real.

    Raises:
        TextError: not token ids, a mask that does not fit, ids without a mask that end or begin in padding, or a mask for texts.
    """
    ids: object = data
    if isinstance(data, Mapping) and "input_ids" in data:
        ids, own = data["input_ids"], data.get("attention_mask")
        if attention_mask is not None and own is not None:
            raise TextError("expected one attention mask, got one with the ids and attention_mask= beside it. Leave one out.")
        attention_mask = own if attention_mask is None else attention_mask
        if isinstance(ids, list | tuple) and ids and whole_or_none(ids[0]) is not None:
            ids = [ids]
            attention_mask = attention_mask if attention_mask is None else [attention_mask]
    elif not _are_ids(data):
        if attention_mask is not None:
            raise TextError("expected token ids with attention_mask, got texts. Texts are never padded: leave the mask out.")
        return None
    tokens, valid = _padded(ids, "token ids as whole numbers", whole_or_none)
    if attention_mask is not None:
        mask, given = _padded(attention_mask, "an attention mask of 1 (real) and 0 (padding)", _zero_or_one)
        if mask.shape == tokens.shape and bool((given != valid).any()):
            index = int((given != valid).any(1).nonzero()[0])
            raise TextError(
                f"expected an attention mask as long as the ids of each sequence, got {int(given[index].sum())} numbers for the "
                f"{int(valid[index].sum())} ids of sequence {index}. Pass that of these ids."
            )
        valid &= real_tokens(mask, tuple(tokens.shape))
    sequences = from_token_ids(model, tokens, valid)
    if attention_mask is None:
        refuse_padding(model, [s.tokens for s in sequences])
    return sequences


def _are_ids(data: object) -> bool:
    if isinstance(data, Tensor):
        return True
    if isinstance(data, np.ndarray):
        return data.dtype.kind in "iufb"
    if not isinstance(data, list | tuple) or not data:
        return False
    return all(isinstance(row, list | tuple | Tensor | np.ndarray) for row in data)


def _padded(given: object, what: str, number: Callable[[object], int | None]) -> tuple[Tensor, Tensor]:
    """One tensor of rows of any lengths, and where they are (truth values of the same shape); `number` reads what is in a list."""
    if isinstance(given, Tensor) and (given.device.type == "meta" or given.layout != torch.strided):
        raise TextError(f"expected {what}, got a tensor without them ({given.device.type}, {given.layout}). Pass a plain tensor.")
    if isinstance(given, Tensor) or (isinstance(given, np.ndarray) and given.dtype.kind in "iufb"):
        tokens = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(_signed(given))
        return tokens, torch.ones(tokens.shape, dtype=torch.bool, device="cpu")
    given_rows: Iterable[object] = given if _is_row(given) else [given]
    rows: list[list[int]] = []
    for index, row in enumerate(given_rows):
        held = list(row) if _is_row(row) else None
        numbers = [found for found in map(number, held or []) if found is not None]
        if held is None or len(numbers) < len(held):
            raise TextError(
                f"expected {what}, got {(row if held is None else held[:6])!r} in sequence {index}. Pass what the tokenizer "
                "returns: a list for each sequence."
            )
        rows.append(numbers)
    longest = max(map(len, rows), default=0)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64, device="cpu")
    valid = torch.zeros(len(rows), longest, dtype=torch.bool, device="cpu")
    for index, numbers in enumerate(rows):
        tokens[index, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        valid[index, : len(numbers)] = True
    return tokens, valid


def _is_row(value: object) -> TypeGuard[Iterable[object]]:
    # A 0-d tensor says that it can be iterated, and cannot.
    return isinstance(value, Iterable) and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0


def _zero_or_one(value: object) -> int | None:
    """What a mask holds: 0 and 1 of any type; other whole numbers are refused later."""
    kind = str(getattr(value, "dtype", ""))
    truth = isinstance(value, bool | float) or (("bool" in kind or "float" in kind) and not getattr(value, "ndim", 0))
    return int(cast("SupportsInt", value)) if truth and value in (0, 1) else whole_or_none(value)


def _signed(array: np.ndarray) -> np.ndarray:
    """Types that torch has."""
    return np.ascontiguousarray(array.astype(np.int64) if array.dtype.kind in "iu" else array)


def real_tokens(mask: object, shape: tuple[int, ...], *, additive: bool = False) -> Bool[Tensor, "..."]:
    """An attention mask as truth values: 1 (or True) for real tokens, 0 for padding at either end.

    Args:
        mask: tensor, array or nested list.
        shape: that of the ids.
        additive: serve masks of 0 for real tokens and -inf, or a type's lowest number, for padding too: what is added to attention
            scores.

    Raises:
        TextError: another shape than that of the ids, other numbers, a sequence without a token, or padding between real tokens.
    """
    try:
        given = mask.detach().cpu() if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
        numbers = given.double()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise TextError(
            f"expected an attention mask of shape {shape} as tensor, array or list of numbers, got {type(mask).__name__}: {error}."
        ) from error
    if tuple(numbers.shape) not in (shape, *([shape[1:]] if len(shape) == 2 and shape[0] == 1 else [])):
        raise TextError(f"expected an attention mask of shape {shape}, got {tuple(numbers.shape)}. Pass that of these ids.")
    numbers = numbers.reshape(shape)
    if bool(((numbers == 0) | (numbers == 1)).all()):
        valid = numbers == 1
    elif additive and bool(((numbers == 0) | (numbers <= _MASKED)).all()):
        valid = numbers == 0
    else:
        other = numbers[(numbers != 0) & (numbers != 1) & ~((numbers <= _MASKED) & additive)]
        got = f"{float(other[0])!r}" if len(other) else "both 1 and -inf"
        served = " (or 0 and -inf, an additive one)" if additive else ""
        raise TextError(f"expected an attention mask of 1 (real) and 0 (padding){served}, got {got} in it.")
    rows = valid.reshape(-1, shape[-1]) if valid.numel() else valid.reshape(-1, 1)
    if not bool(rows.any(1).all()):
        say = ", in an additive mask 0 real and -inf padding: one of zeros only says both" if additive else ""
        raise TextError(
            "expected a real token in every sequence, got an attention mask that leaves sequence "
            f"{int((~rows.any(1)).nonzero()[0])} none. 1 means real and 0 padding{say}. Leave it out if all are real."
        )
    # One run of real tokens: a hole inside would shift the positions that the model used.
    starts = rows[:, 0].long() + (rows.long().diff(dim=1) == 1).sum(1)
    if bool((starts > 1).any()):
        raise TextError(
            "expected padding at one end of each sequence, got an attention mask with a hole in sequence "
            f"{int((starts > 1).int().argmax())}. Cut the text there."
        )
    return valid


def refuse_padding(model: HookedModel, rows: Sequence[Sequence[int]]) -> None:
    """Refuse ids that begin or end in the tokenizer's padding: it would be measured as text.

    Raises:
        TextError: naming the first such sequence.
    """
    found = padding_of(model)
    if found is None:
        return
    pad, opens, closes = found
    for side, may, turn in (("begins", opens, 1), ("ends", closes, -1)):
        runs = [next((n for n, token in enumerate(row[::turn]) if token != pad), len(row)) for row in rows]
        # One BOS or EOS is no padding, if it is the same in all sequences of one length.
        uneven = len(set(map(len, rows))) == 1 and len(set(runs)) > 1
        least = 1 if uneven or not may else 2
        wrong = next((index for index, run in enumerate(runs) if run >= least), None)
        if wrong is not None:
            raise TextError(
                f"expected token ids without padding, got sequence {wrong} that {side} with {runs[wrong]} of the padding token "
                f"{pad}. Pass attention_mask= (1 for real tokens, 0 for padding; all 1 if these are real), or lists of the real "
                "ids alone."
            )


def from_token_ids(model: HookedModel, tokens: Tensor, valid: Tensor | None = None) -> list[TokenSequence]:
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
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary_size(model):
        raise TextError(
            f"expected token ids in [0, {vocabulary_size(model)}), got {int(tokens.min())} to {int(tokens.max())}. "
            "Are these tokens of another model?"
        )
    keep = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid.detach().cpu().bool().reshape(tokens.shape)
    rows = [tuple(row[mask].tolist()) for row, mask in zip(tokens, keep, strict=True)]
    short = next((index for index, row in enumerate(rows) if len(row) < 2), None)
    if not rows or short is not None:
        raise TextError(
            f"expected sequences of at least two tokens, got {len(rows[short]) if rows and short is not None else 0} in sequence "
            f"{short}."
        )
    longest = max(len(row) for row in rows)
    if longest > n_context(model):
        raise TextError(f"expected sequences of at most {n_context(model)} tokens (the model's context), got {longest}.")
    return [TokenSequence(row, index, (-1,) * len(row), (-1,) * len(row)) for index, row in enumerate(rows)]


def longest_sequence(model: HookedModel, max_length: Whole) -> int:
    """`max_length`, or the model's context if that is shorter.

    Raises:
        TextError: below 2, where no token could be scored.
    """
    found = whole_or_none(max_length)
    if found is None or found < 2:
        raise TextError(f"expected max_length of at least 2 tokens, got {max_length!r}: position 0 is never scored.")
    return min(found, n_context(model))


def token_strings(model: HookedModel, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token id by itself, leading space kept; `<id>` when the model has no tokenizer.

    A token that is only part of a character (emoji, rare scripts) shows as U+FFFD.
    """
    tokenizer = tokenizer_of(model)
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
