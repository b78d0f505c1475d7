"""How strongly what comes later depends on each state."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.capture import Target, TokenBatch
from basin_lens.errors import CaptureError
from basin_lens.values import whole_or_none


@dataclass(frozen=True)
class GradientNorm(TokenAnalyzer):
    """Norm of the gradient of the later tokens' summed loss (or another target) with respect to the state that enters the block.

    gradient_norm = ||g||, gradient_norm_scaled = ||g|| * ||h||, with g_i = d(sum_{t>i} -log p(x_t | x_<t)) / dh_i, h = resid_pre

    `gradient_norm` falls about as 1/||h||, so it correlates with anything that knows the norm; the scaled one does not.
    Units: nats per state unit, and nats (for a logit: logits). Range: [0, inf). With `"future_loss"` the last position is NaN: no
    later token.

    Args:
        target: `"future_loss"`; `"last_logit"`, the largest logit behind the last token, as in the original guide; a token id, the
            logit of that token behind the last token; or `"cache"` for the gradients of the user's own backward pass, of whatever
            it was (`Capture.from_cache` on a cache with `*_grad`). A logit's columns end in `_last_logit` or `_logit_<id>`. Each
            different target costs a backward pass of the same forward pass.
        name: prefix of the columns.

    Shapes: gradient and resid_pre `[batch, pos, d]` -> `[batch, pos]`.

    Raises:
        CaptureError: an unknown target, a token id that the model does not have, or `"cache"` without gradients in the cache.

    Source: Simonyan et al. 2013 (saliency).

    Example:
        >>> import basin_lens as bl
        >>> [column.name for column in bl.analyzers.GradientNorm().columns]
        ['gradient_norm', 'gradient_norm_scaled']
    """

    role: ClassVar[Role] = "importance"
    target: Target = "future_loss"
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "resid_pre"})

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        unit, ending = target_unit(self.target), target_ending(self.target)
        return (
            Column(f"{prefix}gradient_norm{ending}", f"{unit} per state unit", 0),
            Column(f"{prefix}gradient_norm_scaled{ending}", unit, 0),
        )

    def check(self) -> None:
        check_target(self.target)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        slope = without_last(batch.values["gradient"].norm(dim=-1), batch.valid, self.target)
        scaled = slope * batch.values["resid_pre"].norm(dim=-1)
        return {column.name: value for column, value in zip(self.columns, (slope, scaled), strict=True)}


def check_target(target: object, *, cache: bool = True) -> None:
    """Refuse what is no target.

    Raises:
        CaptureError: see there.
    """
    named = ("future_loss", "last_logit", "cache") if cache else ("future_loss", "last_logit")
    token = whole_or_none(target)
    if (token is None or token < 0) and target not in named:
        own = ' or "cache"' if cache else ""
        raise CaptureError(f'expected a token id, "last_logit", or the gradient of "future_loss"{own}, got {target!r}.')


def target_unit(target: Target) -> str:
    """What the target is measured in."""
    return "nats" if target in ("future_loss", "cache") else "logits"


def target_ending(target: Target) -> str:
    """What a column's name says of the target: nothing for the default one."""
    return "" if target in ("future_loss", "cache") else "_last_logit" if target == "last_logit" else f"_logit_{target}"


def without_last(
    values: Float[Tensor, "batch pos"], valid: Bool[Tensor, "batch pos"], target: Target
) -> Float[Tensor, "batch pos"]:
    """NaN at the last token of each sequence if the target is the loss of later tokens."""
    if target != "future_loss":
        return values
    places = torch.arange(values.shape[1], device=values.device)
    return values.masked_fill(places == valid.to(values.device).sum(1, keepdim=True) - 1, torch.nan)
