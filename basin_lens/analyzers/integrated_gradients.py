"""How much of what comes later each state accounts for, along the whole way from a baseline."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.analyzers.gradient import check_target, target_ending, target_unit, without_last
from basin_lens.capture import Passes, Target, TokenBatch
from basin_lens.errors import CaptureError
from basin_lens.values import Whole, whole_or_none

COMPLETE = 0.01  # the shares of a sequence's tokens must add up to the change of its target within this part of it


@dataclass(frozen=True)
class IntegratedGradients(TokenAnalyzer):
    """Gradient of the target, averaged along the straight way from a baseline to the states, times the way.

    ig_i = (h_i - b_i) . integral_0^1 g_i(b + a (h - b)) da, all positions moving together, h = resid_pre

    Complete: over a sequence, the values add up to F(h) - F(b), the change of the target. Checked for each sequence: where they do
    not within 1 %, the steps are doubled, up to 8 times as many, and then all its values are NaN. Negative for a state that lowers
    the later tokens' loss. Unit: nats (for a logit: logits). Range: (-inf, inf). With `"future_loss"` the last position is NaN (it
    adds 0).

    On a trained model the way from the embeddings (layer 0) can be too rough for any number of steps; the same way begun at a
    middle layer is smooth.

    Args:
        target: `"future_loss"`, `"last_logit"` or a token id, as for `GradientNorm`. The token with the largest logit is that of
            the states themselves, all along the way.
        steps: points of the Gauss-Legendre rule. Each costs a forward and a backward pass.
        baseline: `"mean"`: every state moves from the mean of the sequence's states without position 0, and position 0, which is
            mostly the attention sink, stays as it is (moved, it breaks the model on the way); its own value is NaN. `"zero"`: from
            zero, position 0 too; norms blow up there, and more steps are needed.
        layer: the block whose incoming states are moved, the same values then holding for every layer; None: each layer's own
            states, at that many times the cost.
        name: column name.

    Shapes: states `[batch, pos, d]` -> `[batch, pos]`.

    Raises:
        CaptureError: an unknown target or baseline, fewer than 2 steps, a layer that the model does not have.

    Source: Sundararajan et al. 2017, "Axiomatic attribution for deep networks".

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.IntegratedGradients(steps=16).columns[0].name
        'integrated_gradients'
    """

    role: ClassVar[Role] = "importance"
    target: Target = "future_loss"
    steps: Whole = 16
    baseline: Literal["mean", "zero"] = "mean"
    layer: Whole | None = 0
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "passes"})

    @property
    def per_layer(self) -> bool:  # type: ignore[override]  # here an option decides
        return self.layer is None

    @property
    def columns(self) -> tuple[Column, ...]:
        name = self.name or f"integrated_gradients{target_ending(self.target)}"
        return (Column(name, target_unit(self.target)),)

    def check(self) -> None:
        check_target(self.target, cache=False)
        if (whole_or_none(self.steps) or 0) < 2:
            raise CaptureError(f"expected at least 2 steps for IntegratedGradients, got {self.steps!r}.")
        if self.baseline not in ("mean", "zero"):
            raise CaptureError(f'expected baseline "mean" or "zero" for IntegratedGradients, got {self.baseline!r}.')
        if self.layer is not None and ((layer := whole_or_none(self.layer)) is None or layer < 0):
            raise CaptureError(f"expected a layer from 0 on, or None for each, for IntegratedGradients, got {self.layer!r}.")

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        assert batch.passes is not None
        layer = batch.layer if self.layer is None else self.layer
        if layer >= batch.n_layers:
            raise CaptureError(f"expected a layer below {batch.n_layers} for IntegratedGradients, got {layer}.")
        states = batch.passes.states(layer)
        start = self._start(states, batch.valid)
        way = torch.where(batch.valid[..., None], states - start, 0)
        if self.baseline == "mean":
            way[:, 0] = 0
        answer = torch.full(batch.tokens.shape, torch.nan, device=states.device)
        rows = torch.arange(len(states), device=states.device)
        target = self._target(batch)
        ends = [batch.passes.slopes(layer, rows, end, target)[0] for end in (states, states - way)]
        change = ends[0] - ends[1]
        steps = self.steps
        while len(rows) and steps <= 8 * self.steps:
            shares = self._shares(batch.passes, layer, rows, states[rows], way[rows], target, steps)
            complete = (shares.sum(1) - change[rows]).abs() <= COMPLETE * change[rows].abs()
            answer[rows[complete]] = shares[complete]
            rows, steps = rows[~complete], 2 * steps
        if self.baseline == "mean":
            answer[:, 0] = torch.nan
        return {self.columns[0].name: without_last(answer, batch.valid, self.target)}

    def _start(self, states: Tensor, valid: Tensor) -> Tensor:
        """The baseline `[batch, 1, d]`."""
        if self.baseline == "zero":
            return torch.zeros_like(states[:, :1])
        # Position 0 is often massive: it would be most of the mean.
        counted = valid.float()
        counted[:, 0] = (valid.sum(1) == 1).float()
        return (states * counted[..., None]).sum(1, keepdim=True) / counted.sum(1)[:, None, None]

    def _target(self, batch: TokenBatch) -> Target | Tensor:
        """The target along the whole way: of the largest logit, the token that the model predicts at its end."""
        if self.target != "last_logit":
            return self.target
        logits = batch.values["logits"]
        return logits[torch.arange(len(logits), device=logits.device), batch.valid.sum(1) - 1].argmax(-1)

    def _shares(
        self, passes: Passes, layer: int, rows: Tensor, states: Tensor, way: Tensor, target: Target | Tensor, steps: int
    ) -> Tensor:
        """The integral by a Gauss-Legendre rule, `[rows, pos]`."""
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        total = torch.zeros_like(way)
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            at = states - way + (1 + node) / 2 * way  # from the baseline on: near zero, every digit counts
            total += weight / 2 * passes.slopes(layer, rows, at, target)[1]
        return (total * way).sum(-1)
