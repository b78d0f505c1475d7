"""The linear null: one affine map fitted to what a block does to every token."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from basin_lens.capture import Capture

_RIDGES = tuple(10.0**power for power in range(-6, 2))  # as shares of the mean eigenvalue of the states' covariance
_HELD_OUT = 0.2


@dataclass(frozen=True)
class AffineFit:
    """x -> x + (x - mean) @ weight + offset, with how well it does on sequences that it was not fitted to.

    `ridge`: chosen on the held-out sequences. `held_out_r2`: share of the held-out update's variance that it explains, in
    (-inf, 1].
    """

    mean: Float[Tensor, " d"]
    weight: Float[Tensor, "d d"]
    offset: Float[Tensor, " d"]
    ridge: float
    held_out_r2: float

    def __call__(self, states: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        return states + (states - self.mean) @ self.weight + self.offset


def affine_fit(before: Float[Tensor, "rows d"], after: Float[Tensor, "rows d"], capture: Capture, seed: int = 0) -> AffineFit:
    """Ridge regression of the block's update on the state, over all tokens but position 0.

    The update and not the state is fitted, so that with few tokens the fit shrinks toward the identity. The ridge is chosen on a
    fifth of the sequences, held out; then all are used. With few tokens for its width, an affine map can imitate a block on the
    tokens it was fitted to: read `held_out_r2` before the null.

    Args:
        before, after: states around the block, of the rows of `capture`.
        capture: which rows are position 0, and which sequence each belongs to.
        seed: which sequences are held out.
    """
    seq = capture.row_seq.to(before.device)
    used = (capture.row_pos > 0).to(before.device)
    order = torch.randperm(len(capture.sequences), generator=torch.Generator().manual_seed(seed), device="cpu")
    held = torch.isin(seq, order[: max(1, round(_HELD_OUT * len(order)))].to(before.device))
    best = (-float("inf"), _RIDGES[-1])
    train, test = used & ~held, used & held
    if bool(train.any()) and bool(test.any()):
        center = before[train].mean(0)
        update = after - before
        total = (update[test] - update[train].mean(0)).square().sum()
        for ridge, weight, offset in _solutions(before[train] - center, update[train], _RIDGES):
            rest = (update[test] - (before[test] - center) @ weight - offset).square().sum()
            best = max(best, (float(1 - rest / total), ridge))
    center = before[used].mean(0)
    ((ridge, weight, offset),) = _solutions(before[used] - center, (after - before)[used], (best[1],))
    return AffineFit(center, weight, offset, ridge, best[0] if best[0] > -float("inf") else float("nan"))


def _solutions(x: Tensor, y: Tensor, ridges: tuple[float, ...]) -> list[tuple[float, Tensor, Tensor]]:
    """Ridge solutions for several strengths from one eigendecomposition, in float64."""
    x, offset = x.double(), y.double().mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    projected = vectors.T @ (x.T @ (y.double() - offset))
    scale = float(values.mean().clamp_min(torch.finfo(torch.float64).tiny))
    return [
        (ridge, (vectors @ (projected / (values.clamp_min(0) + ridge * scale)[:, None])).float(), offset.float())
        for ridge in ridges
    ]
