"""Are the states of a user's own cache the model's? All of its sequences are asked, before anything is computed from them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.capture.caches import ENTRY, right_padded
from basin_lens.capture.passes import TOKENS_PER_PASS
from basin_lens.capture.states import CapturedStates
from basin_lens.errors import CaptureError, TransportError
from basin_lens.model import HookedModel, call_block, device_of, entering, measuring, one_side, point_name, reading, record_calls

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_OTHER = 0.5  # relative error from which a state is another token's, however many blocks have rounded it
_OF_PATTERNS = 10  # a pattern's numbers are shares: their absolute error may be so much larger than that of states
_TOKENS = -1  # whether the states are those of the tokens, among the layers that were checked


def tolerance_of(model: HookedModel, capture: CapturedStates) -> float:
    """Largest relative error at which states count as the model's own: that of its type, or of their stored type."""
    stored = getattr(torch, str(capture.settings.get("dtype", "float32")), torch.float32)
    return max(_TOLERANCE.get(dtype, 1e-5) for dtype in (next(model.parameters()).dtype, stored))


def check_cache(model: HookedModel, capture: CapturedStates, layers: Iterable[int]) -> None:
    """Prove that the states of a capture made from the user's cache are what this model computes from these tokens.

    Of every sequence: the state that enters block 0 is that of its tokens (a cache without it: the first state that it holds, by a
    pass up to there); block L maps each `resid_pre(L)` to its `resid_post(L)`, in one pass of that block per layer; and the
    attention patterns are those of that pass. What was checked once is not checked again. Captures that basin_lens made itself need
    no such proof.

    Args:
        model: the model that made the cache.
        capture: any capture.
        layers: layers that will be looked at.

    Raises:
        TransportError: states that the block does not map to one another, relative to the states' scale: beyond 1e-5 (float32),
            4e-3 (float16) or 2e-2 (bfloat16), the type being the coarser one of model and cache.
        CaptureError: states of other tokens or places, or attention patterns of another pass.
    """
    if capture.settings["source"] != "cache" or not capture.states_of_model:
        return
    open_ = sorted({layer for layer in layers if layer in capture.layers} - capture._checked)
    if not open_:
        return
    with measuring(model):
        sides = _sides(model, capture)
        blocks = [_Blocks(model, capture, seqs) for seqs in sides]
        for layer in open_:
            for some in blocks:
                some.check(layer)
        # Last, because of another model's states the blocks say more.
        if _TOKENS not in capture._checked:
            _check_tokens(model, capture, sides)
            capture._checked.add(_TOKENS)
        capture._checked.update(open_)


def _sides(model: HookedModel, capture: CapturedStates) -> list[list[int]]:
    """Sequences that one set of block arguments serves, longest first."""
    order = sorted(range(len(capture.sequences)), key=lambda seq: -int(capture.lengths[seq]))
    boundary = one_side(model, capture.lengths.tolist())
    if boundary is None:
        return [order]
    return [[s for s in order if (int(capture.lengths[s]) > boundary) is beyond] for beyond in (True, False)]


def _parts(
    capture: CapturedStates, seqs: Sequence[int], length: int, copies: int
) -> Iterator[tuple[list[int], Bool[Tensor, "n pos"]]]:
    for first in range(0, len(seqs), copies):
        part = list(seqs[first : first + copies])
        yield part, torch.arange(length, device="cpu")[None] < capture.lengths[part][:, None]


def _rows(capture: CapturedStates, seqs: Sequence[int]) -> Int[Tensor, " rows"]:
    return torch.cat([torch.arange(int(capture.lengths[seq]), device="cpu") + capture.offsets[seq] for seq in seqs])


def _errors(got: Float[Tensor, "rows d"], expected: Float[Tensor, "rows d"], scale: float) -> Float[Tensor, " rows"]:
    """Of each row relative to the scale of the layer, or to its own where that is larger (massive states round more coarsely)."""
    size = expected.square().mean(1).sqrt().clamp_min(scale)
    return torch.nan_to_num((got - expected).square().mean(1).sqrt() / size, nan=torch.inf)


def _scale(capture: CapturedStates, states: Float[Tensor, "rows d"]) -> float:
    return float(states[capture.row_pos > 0].square().mean().sqrt().clamp_min(1e-12))


def _check_tokens(model: HookedModel, capture: CapturedStates, sides: Sequence[list[int]]) -> None:
    """Refuse states that are not those of the tokens at their places: blocks alone would not show that these are another's."""
    held = capture._readings.get(ENTRY)
    layer = 0 if held is not None else min(capture.layers)
    if held is None:
        states = capture.resid_pre(layer)
    else:
        first = right_padded(held, capture._readings["valid"], capture.valid.shape[1], square=False)
        states = first[capture.valid]
    scale, tolerance = _scale(capture, states), min(_OTHER, (layer + 1) * tolerance_of(model, capture))
    for seqs in sides:
        length = int(capture.lengths[seqs].max())
        for part, valid in _parts(capture, seqs, length, max(1, TOKENS_PER_PASS // length)):
            rows = _rows(capture, part)
            tokens = torch.zeros(valid.shape, dtype=torch.int64, device="cpu")
            tokens[valid] = capture.row_token[rows]
            got = entering(model, tokens.to(device_of(model)), layer).cpu()[valid]
            error = _errors(got, states[rows], scale)
            if float(error.max()) > tolerance:
                entry = point_name("resid_pre", 0)
                hooks = ""
                if layer:
                    hooks = f" If hooks changed the states below on purpose, cache {entry} too: it shows whose tokens these are."
                raise CaptureError(
                    f"expected the state that enters block {layer} to be that of each token at its place, got another "
                    f"({_where(capture, rows, error)}; tolerance {tolerance:g}). Are these the tokens that were given to "
                    "run_with_cache, and is padding on the left known to both (attention_mask=...)? A model with learned "
                    "positions also needs its places to begin "
                    f"behind the padding.{hooks}"
                )


@dataclass
class _Blocks:
    """The blocks of the model by themselves, on some sequences of a capture: their arguments depend on the longest one only."""

    model: HookedModel
    capture: CapturedStates
    seqs: list[int]

    def __post_init__(self) -> None:
        self.length = int(self.capture.lengths[self.seqs].max())
        self.copies = max(1, min(len(self.seqs), TOKENS_PER_PASS // self.length))
        one = torch.zeros(1, self.length, dtype=torch.int64, device=device_of(self.model))
        self.calls = record_calls(self.model, one, only_first=True)

    def check(self, layer: int) -> None:
        """Refuse states or patterns of a layer that are not the block's."""
        before, after = self.capture.resid_pre(layer), self.capture.resid_post(layer)
        scale, tolerance = _scale(self.capture, after), tolerance_of(self.model, self.capture)
        for part, _ in _parts(self.capture, self.seqs, self.length, self.copies):
            rows = _rows(self.capture, part)
            got, pattern = self._run(layer, part, before, self.copies)
            if got is None or float(_errors(got, after[rows], scale).max()) > tolerance:
                # Some models fold heads into the batch (alibi): their blocks take a sequence at a time.
                self.copies = 1 if got is None else self.copies
                singly = [self._run(layer, [seq], before, 1) for seq in part]
                got = torch.cat([found for found, _ in singly if found is not None])
                pattern = torch.cat([share for _, share in singly])
            self._refuse(layer, part, rows, _errors(got, after[rows], scale), pattern)

    def _run(self, layer: int, part: list[int], before: Tensor, copies: int) -> tuple[Tensor | None, Tensor]:
        """What the block makes of these sequences (None: it takes no batch), and how far each one's cached pattern is off."""
        capture = self.capture
        ((_, valid),) = _parts(capture, part, self.length, len(part))
        grid = before.new_zeros(len(part), self.length, before.shape[1])
        grid[valid] = before[_rows(capture, part)]
        call = self.calls[layer].widened(len(part)) if len(part) > 1 else self.calls[layer]
        held = capture._readings.get(f"pattern.{layer}")
        seen: list[Tensor] = []
        readers = {} if held is None else {point_name("pattern", layer): lambda t: seen.append(t.detach().float().cpu())}
        try:
            with reading(self.model, readers):
                got = call_block(self.model, layer, call, grid.to(device_of(self.model))).cpu()[valid]
        except RuntimeError as error:  # torch raises it where shapes do not fit
            if copies == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            return None, torch.zeros(len(part), device="cpu")
        wrong = torch.zeros(len(part), device="cpu")
        if held is not None and seen:
            longest = int(capture.lengths[part].max())
            own = right_padded(held[part], capture._readings["valid"][part], longest, square=True)
            there = valid[:, None, :longest, None] & valid[:, None, None, :longest]
            away = torch.nan_to_num((seen[0][:, :, :longest, :longest] - own).abs(), nan=torch.inf)
            wrong = torch.where(there, away, 0).flatten(1).amax(1)
        return got, wrong

    def _refuse(self, layer: int, part: list[int], rows: Tensor, error: Tensor, pattern: Tensor) -> None:
        tolerance, dtype = tolerance_of(self.model, self.capture), str(next(self.model.parameters()).dtype).removeprefix("torch.")
        stored = self.capture.settings.get("dtype", dtype)
        if float(error.max()) > tolerance:
            raise TransportError(
                f"expected the block to map the captured resid_pre to resid_post at block {layer} within {tolerance:g} of the "
                f"states' scale (model in {dtype}, cache in {stored}), got {float(error.max()):.3g} "
                f"({_where(self.capture, rows, error)}). Is this capture (or "
                "cache) from the same model, with the same hooks and weight processing? Padding must be known to "
                "run_with_cache and to from_cache (attention_mask=...)."
            )
        if float(pattern.max()) > _OF_PATTERNS * tolerance:
            worst = int(pattern.argmax())
            raise CaptureError(
                f"expected the cached attention pattern of block {layer} to be the block's own, got one that differs by up to "
                f"{float(pattern[worst]):.3g} (sequence {part[worst]}). Are pattern and states of the same pass? Leave "
                "patterns out of the cache, and it is computed."
            )


def _where(capture: CapturedStates, rows: Tensor, error: Tensor) -> str:
    worst = int(rows[int(error.argmax())])
    return (
        f"sequence {int(capture.row_seq[worst])}, position {int(capture.row_pos[worst])}, relative error {float(error.max()):.3g}"
    )
