"""Reading a user's own activation cache: whatever holds it, every tensor as it should be on every axis."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from basin_lens import texts
from basin_lens.errors import BasinLensError, CaptureError, TextError
from basin_lens.model import HookedModel, StateCache, cache_entry, n_layers, point_name, width
from basin_lens.texts import Passage, TokenSequence, tokenize

# Name of the reading that says whose tokens the states are: what enters block 0, of a cache that holds no whole layer 0.
ENTRY = "entry"


def check_is_cache(cache: object) -> None:
    """Refuse what is no mapping of names to tensors.

    Raises:
        CaptureError: a stack of states, a list, nothing.
    """
    if not hasattr(cache, "keys") or not hasattr(cache, "__getitem__"):
        shape = f" of shape {tuple(cache.shape)}" if isinstance(cache, Tensor | np.ndarray) else ""
        raise CaptureError(
            "expected a cache that names its tensors (ActivationCache, or a dict of hook names), got "
            f"{type(cache).__name__}{shape}. Pass what run_with_cache returned second; a stack (accumulated_resid, "
            "apply_ln_to_stack) no longer says which states it holds."
        )


def as_batch(tokens: object) -> Shaped[Tensor, "batch pos"]:
    """The ids that were given to the model, on the CPU.

    Raises:
        CaptureError: no tensor `[batch, pos]` or `[pos]`.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim not in (1, 2):
        got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise CaptureError(
            f"expected tokens as a LongTensor [batch, pos] or [pos], got {got}. Pass the ids that were given to run_with_cache."
        )
    return tokens.detach().cpu().reshape(1 if tokens.ndim == 1 else len(tokens), -1 if tokens.numel() else tokens.shape[-1])


def layers_between(model: HookedModel, borders: Mapping[int, Tensor], missing: list[str]) -> tuple[int, ...]:
    """The layers of which the states before and after are there.

    Raises:
        CaptureError: none; the missing hook points are named.
    """
    layers = tuple(layer for layer in range(n_layers(model)) if layer in borders and layer + 1 in borders)
    if not layers:
        raise CaptureError(
            f"expected a cache with residual states around at least one block, got none; missing: {', '.join(missing[:6])}"
            f"{', ...' if len(missing) > 6 else ''}. Cache them: run_with_cache(tokens, names_filter=lambda name: "
            '"resid_pre" in name or "resid_post" in name).'
        )
    return layers


def real_tokens(mask: object, shape: tuple[int, int]) -> Bool[Tensor, "batch pos"]:
    """Which tokens of a cache are real, from an attention mask of 1 and 0, or an additive one.

    Raises:
        CaptureError: no such mask (`texts.real_tokens`).
    """
    try:
        return texts.real_tokens(mask, shape, additive=True)
    except TextError as error:
        raise CaptureError(str(error)) from error


def borders_in(model: HookedModel, cache: StateCache, shape: tuple[int, int]) -> tuple[dict[int, Tensor], list[str]]:
    """Residual states at each border that the cache holds, `[batch, pos, d]`, and the names of those it does not."""
    count, found, missing = n_layers(model), {}, []
    for border in range(count + 1):
        point, layer = ("resid_pre", border) if border < count else ("resid_post", count - 1)
        state = cache_entry(cache, point, layer)
        if state is None:
            missing.append(point_name(point, layer))
        else:
            found[border] = _checked(state, point_name(point, layer), (*shape, width(model)), "(batch, pos, d_model)")
    return found, missing


def other_readings(model: HookedModel, cache: StateCache, shape: tuple[int, int], layers: Iterable[int]) -> dict[str, Tensor]:
    """Attention patterns and gradients that the cache holds, by name and layer.

    Its logits are not read: hook_unembed stands before what some models do to them (a soft cap, a scale), so that they are computed
    from the last state instead.
    """
    heads, places = int(model.cfg.n_heads), shape[1]
    found = {}
    for layer in layers:
        pattern = cache_entry(cache, "pattern", layer)
        if pattern is not None:
            wanted = (shape[0], heads, places, places)
            found[f"pattern.{layer}"] = _checked(pattern, point_name("pattern", layer), wanted, "(batch, head, query, key)")
        gradient = cache_entry(cache, "resid_pre", layer, suffix="_grad")
        if gradient is not None:
            name = f"{point_name('resid_pre', layer)}_grad"
            found[f"gradient.{layer}"] = _checked(gradient, name, (*shape, width(model)), "(batch, pos, d_model)")
    return found


def refuse_endless(name: str, reading: Tensor, valid: Bool[Tensor, "batch pos"]) -> None:
    """Refuse gradients that are no numbers.

    Raises:
        CaptureError: NaN or infinity at a real token.
    """
    if name.startswith("gradient") and not bool(torch.isfinite(reading[valid]).all()):
        raise CaptureError(
            f"expected finite gradients, got NaN or infinity at block {name.rpartition('.')[2]}. Leave them out, or use a "
            "wider dtype."
        )


def stored_type(states: Iterable[Tensor]) -> str:
    """Name of the coarsest number format among these tensors."""
    coarsest = max({state.dtype for state in states}, key=lambda dtype: torch.finfo(dtype).eps)
    return str(coarsest).removeprefix("torch.")


def _checked(value: object, name: str, shape: tuple[int, ...], axes: str) -> Tensor:
    """An entry of the cache as a tensor of this very shape; one without batch dimension gets it.

    Raises:
        CaptureError: no numbers, numbers that are nowhere (meta), or another shape.
    """
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise CaptureError(
            f"expected {name} as a tensor or array, got {type(value).__name__}: {error}. Pass the cache of run_with_cache."
        ) from error
    if tensor.device.type == "meta" or tensor.layout != torch.strided or not tensor.dtype.is_floating_point:
        nowhere = tensor.device.type == "meta"
        kind = "a tensor on the meta device, which holds no numbers" if nowhere else f"{tensor.dtype} ({tensor.layout})"
        raise CaptureError(
            f"expected {name} as floating-point numbers, got {kind}. Run the model with its weights loaded, and cache again."
        )
    tensor = tensor[None] if tensor.ndim == len(shape) - 1 else tensor
    if tuple(tensor.shape) != shape:
        raise CaptureError(
            f"expected {name} of shape {shape} {axes}, got {tuple(tensor.shape)}. Are tokens, cache and model of the same run? "
            "Of a cache cut with pos_slice, only whole sequences can be read."
        )
    return tensor


def align(model: HookedModel, passages: list[Passage], sequences: list[TokenSequence]) -> list[TokenSequence]:
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


def one_each(given: object, count: int, what: str) -> list[object] | None:
    """What a caller gives for each sequence, as a list; None stays.

    Raises:
        CaptureError: text, a mapping, something that is no list, or another number.
    """
    if given is None:
        return None
    held = None
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping) and getattr(given, "ndim", 1) == 1:
        held = list(given)
    if held is None or len(held) != count:
        got = type(given).__name__ if held is None else f"{len(held)}"
        raise CaptureError(f"expected one {what} for each of {count} sequences, got {got}. Give a list of {count}.")
    return held


def right_padded(value: Tensor, valid: Tensor, longest: int, *, square: bool) -> Tensor:
    """A reading `[batch, pos, ...]` (`square`: `[batch, head, pos, pos]`) with any left padding brought to the right, and cut.

    Every analyzer counts positions from 0.
    """
    first = valid.int().argmax(1).tolist()
    rolled = [torch.roll(row, (-f, -f), (1, 2)) if square else torch.roll(row, -f, 0) for row, f in zip(value, first, strict=True)]
    grid = torch.stack(rolled)
    return grid[:, :, :longest, :longest] if square else grid[:, :longest]
