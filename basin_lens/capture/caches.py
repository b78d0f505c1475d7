"""Reading a user's own activation cache."""

from typing import Any

import torch
from torch import Tensor

from basin_lens import model as door
from basin_lens.errors import BasinLensError, CaptureError
from basin_lens.texts import Passage, TokenSequence, tokenize


def borders_in(model: Any, cache: Any, shape: tuple[int, ...]) -> tuple[dict[int, Tensor], list[str]]:
    """Residual states at each border that the cache holds, `[batch, pos, d]`, and the names of those it does not."""
    count, found, missing = door.n_layers(model), {}, []
    for border in range(count + 1):
        point, layer = ("resid_pre", border) if border < count else ("resid_post", count - 1)
        state = door.cache_entry(cache, point, layer)
        if state is None:
            missing.append(door.point_name(point, layer))
            continue
        state = _batched(state, 3)
        if tuple(state.shape) != (*shape, door.width(model)):
            raise CaptureError(
                f"expected {door.point_name(point, layer)} of shape {(*shape, door.width(model))} (batch, pos, d_model), got "
                f"{tuple(state.shape)}. Are tokens, cache and model of the same run?"
            )
        found[border] = state
    return found, missing


def other_readings(model: Any, cache: Any, shape: tuple[int, ...], layers: tuple[int, ...]) -> dict[str, Tensor]:
    found = {}
    logits = door.cache_entry(cache, "logits", 0)
    if logits is not None and logits.shape[-1] >= door.vocabulary_size(model):
        found["logits"] = _batched(logits, 3)
    for layer in layers:
        pattern = door.cache_entry(cache, "pattern", layer)
        if pattern is not None:
            found[f"pattern.{layer}"] = _batched(pattern, 4)
        gradient = door.cache_entry(cache, "resid_pre", layer, suffix="_grad")
        if gradient is not None:
            found[f"gradient.{layer}"] = _batched(gradient, 3)
    for name, value in found.items():
        if value.shape[0] != shape[0] or value.shape[-2] != shape[1]:
            raise CaptureError(f"expected {name} for {shape} tokens, got shape {tuple(value.shape)}.")
    return found


def _batched(value: Tensor, dims: int) -> Tensor:
    return value[None] if value.ndim == dims - 1 else value


def align(model: Any, passages: list[Passage], sequences: list[TokenSequence]) -> list[TokenSequence]:
    """Give the user's token sequences the offsets of their texts, which must tokenize to them."""
    if len(passages) != len(sequences):
        raise CaptureError(f"expected one text for each of {len(sequences)} sequences, got {len(passages)}.")
    aligned = []
    for index, (passage, sequence) in enumerate(zip(passages, sequences, strict=True)):
        for bos in (False, True):
            try:
                (own,) = tokenize(model, [passage], max_length=len(sequence.tokens), prepend_bos=bos)
            except (BasinLensError, ValueError):
                continue
            if own.tokens == sequence.tokens:
                aligned.append(TokenSequence(sequence.tokens, index, own.starts, own.ends))
                break
        else:
            raise CaptureError(
                f"expected text {index} to tokenize to the tokens given, got other tokens from {passage.text[:40]!r}. "
                "Leave texts out, or tokenize with the model's own tokenizer."
            )
    return aligned


def right_padded(value: Tensor, valid: Tensor, longest: int, *, square: bool) -> Tensor:
    """A reading `[batch, pos, ...]` (`square`: `[batch, head, pos, pos]`) with any left padding brought to the right, and cut.

    Every analyzer counts positions from 0.
    """
    first = valid.int().argmax(1).tolist()
    rolled = [torch.roll(row, (-f, -f), (1, 2)) if square else torch.roll(row, -f, 0) for row, f in zip(value, first, strict=True)]
    grid = torch.stack(rolled)
    return grid[:, :, :longest, :longest] if square else grid[:, :longest]
