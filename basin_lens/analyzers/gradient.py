"""How strongly the loss of later tokens depends on each state."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from basin_lens.analyzers.base import Column, TokenAnalyzer
from basin_lens.capture import TokenBatch
from basin_lens.errors import CaptureError


@dataclass(frozen=True)
class GradientNorm(TokenAnalyzer):
    """Norm of the gradient of the later tokens' summed loss with respect to the state that enters the block.

    gradient_norm = ||g||, gradient_norm_scaled = ||g|| * ||h||, with g_i = d(sum_{t>i} -log p(x_t | x_<t)) / dh_i, h = resid_pre

    `gradient_norm` falls about as 1/||h||, so it correlates with anything that knows the norm; the scaled one does not.
    Units: nats per state unit, and nats. Range: [0, inf). The last position is NaN: no later token.

    Args:
        target: `"future_loss"`, or `"cache"` for the gradients of the user's own backward pass, of whatever it was
            (`Capture.from_cache` on a cache with `*_grad`).
        name: prefix of the columns.

    Shapes: gradient and resid_pre `[batch, pos, d]` -> `[batch, pos]`.

    Raises:
        CaptureError: an unknown target, or `"cache"` without gradients in the cache.

    Source: Simonyan et al. 2013 (saliency).

    Example:
        >>> import basin_lens as bl
        >>> [column.name for column in bl.analyzers.GradientNorm().columns]
        ['gradient_norm', 'gradient_norm_scaled']
    """

    target: Literal["future_loss", "cache"] = "future_loss"
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "resid_pre"})

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        return (
            Column(f"{prefix}gradient_norm", "nats per state unit", 0),
            Column(f"{prefix}gradient_norm_scaled", "nats", 0),
        )

    def check(self) -> None:
        if self.target not in ("future_loss", "cache"):
            raise CaptureError(f'expected the gradient of "future_loss" or "cache", got {self.target!r}.')

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        slope = batch.values["gradient"].norm(dim=-1)
        if self.target == "future_loss":
            last = batch.valid.to(slope.device).sum(1) - 1
            slope[torch.arange(len(slope), device=slope.device), last] = torch.nan
        scaled = slope * batch.values["resid_pre"].norm(dim=-1)
        return {column.name: value for column, value in zip(self.columns, (slope, scaled), strict=True)}
