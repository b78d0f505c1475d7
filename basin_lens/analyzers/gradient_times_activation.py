"""What each state adds to what comes later, to first order."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.analyzers.gradient import check_target, target_ending, target_unit, without_last
from basin_lens.capture import Target, TokenBatch


@dataclass(frozen=True)
class GradientTimesActivation(TokenAnalyzer):
    """Gradient of the later tokens' summed loss (or another target) times the state itself.

    gradient_times_activation_i = g_i . h_i, with g_i as for `GradientNorm`, h = resid_pre

    To first order, what the target loses when the state is scaled towards zero: negative for a state that lowers the later tokens'
    loss. As importance, take its size. Unit: nats (for a logit: logits). Range: (-inf, inf). With `"future_loss"` the last position
    is NaN.

    Args:
        target: as for `GradientNorm`.
        name: column name.

    Shapes: gradient and resid_pre `[batch, pos, d]` -> `[batch, pos]`.

    Raises:
        CaptureError: as for `GradientNorm`.

    Source: Shrikumar et al. 2016, "Not just a black box" (gradient times input).

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.GradientTimesActivation(target="last_logit").columns[0].name
        'gradient_times_activation_last_logit'
    """

    role: ClassVar[Role] = "importance"
    target: Target = "future_loss"
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "resid_pre"})

    @property
    def columns(self) -> tuple[Column, ...]:
        name = self.name or f"gradient_times_activation{target_ending(self.target)}"
        return (Column(name, target_unit(self.target)),)

    def check(self) -> None:
        check_target(self.target)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        product = (batch.values["gradient"] * batch.values["resid_pre"]).sum(-1)
        return {self.columns[0].name: without_last(product, batch.valid, self.target)}
