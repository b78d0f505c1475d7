"""Whether the block shrinks along the data more than off it: its derivative, along the neighborhood and in random directions."""

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from basin_lens.analyzers.contract import (
    DEGENERATE,
    CloudScore,
    Column,
    Neighborhoods,
    Role,
    log_or_nan,
    random_directions,
    total_variance,
)
from basin_lens.errors import NeighborError, TransportError
from basin_lens.values import Whole, whole_or_none


@dataclass(frozen=True)
class JacobianGain(CloudScore):
    """Gain of the block's derivative at a token's state, in random directions and along its neighborhood.

    gain = sum_v ||J v||^2 / sum_v ||v||^2, J = dF/dh at the query's state in its context;
    jacobian_gain_random: v standard normal (off the data), an estimate of the mean squared singular value of J;
    jacobian_gain_neighborhood: v = h_j - mean of the neighbors, all k of them (on the data): tr(J S J^T) / tr S, S: their
    covariance; jacobian_contrast = log(jacobian_gain_random / jacobian_gain_neighborhood)

    A positive contrast would be a basin's signature: the block shrinks along the data more than off it. Found was the opposite: the
    contrast is negative at all layers of SmolLM2-135M, whose blocks stretch the directions between neighbors more than random ones
    (as work on activation plateaus reports). It says which directions a neighborhood spans, not that its place is special:
    `Compression` is free of directions. For a linear block the
    neighborhood's gain is V_out / V_in exactly; elsewhere it is what `Contraction` would be for infinitely small neighborhoods of
    this shape. Exact derivatives in forward mode, no finite differences. Units: ratio, and nats for the contrast. Range: [0, inf)
    for the gains, all real numbers for the contrast; an isometry has gains of 1 and contrast 0, a scaling by a has a^2.

    Options and errors: see `Compression`. `name` becomes a prefix of the columns.

    Args:
        directions: random directions per token. Each token has its own, from the seed, the layer, its token id and its position.
        queries: at most so many tokens per layer are measured, because each costs k + directions derivatives.
        seed: of the random directions.

    Shapes: query `[q, d]`, neighbors `[q, k, d]`, block `[q, k + directions, d]` -> the same -> `[q]`.

    Raises:
        NeighborError: directions or queries below 1, or a negative seed.
        TransportError: the block holds an operation without a forward-mode derivative (Bloom's own GeLU); it is named.

    Source: design of basin_lens; for the probe by random vectors, Hutchinson 1989.

    Example:
        >>> import basin_lens as bl
        >>> [column.name for column in bl.analyzers.JacobianGain(queries=16).columns]
        ['jacobian_gain_random', 'jacobian_gain_neighborhood', 'jacobian_contrast']
    """

    role: ClassVar[Role] = "score"
    directions: Whole = 8
    queries: Whole = 64
    seed: Whole = 0
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "block"})

    @property
    def max_queries(self) -> int:
        """Tokens measured per layer."""
        return self.queries

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        return (
            Column(f"{prefix}jacobian_gain_random", "ratio", 0),
            Column(f"{prefix}jacobian_gain_neighborhood", "ratio", 0),
            Column(f"{prefix}jacobian_contrast", "nats"),
        )

    def check(self) -> None:
        super().check()
        for option, least in {"directions": 1, "queries": 1, "seed": 0}.items():
            if (found := whole_or_none(getattr(self, option))) is None or found < least:
                raise NeighborError(f"expected {option} of at least {least} for JacobianGain, got {getattr(self, option)!r}.")

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.block is not None
        along = neighborhoods.neighbors - neighborhoods.neighbors.mean(1, keepdim=True)
        # Beside the states' own length: a neighborhood of equal states has no directions, only rounding.
        spread = total_variance(neighborhoods.neighbors) > DEGENERATE * neighborhoods.neighbors.square().sum(2).mean(1)
        moves = torch.cat([random_directions(neighborhoods, self.directions, self.seed), along], dim=1)
        images = derivative(neighborhoods.block, neighborhoods.query[:, None].expand_as(moves), moves)
        sizes, before = images.square().sum(2), moves.square().sum(2)
        off = sizes[:, : self.directions].sum(1) / before[:, : self.directions].sum(1)
        on = torch.where(spread, sizes[:, self.directions :].sum(1) / before[:, self.directions :].sum(1), torch.nan)
        values = (off, on, log_or_nan(off, on) - log_or_nan(on, off))
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}


def derivative(
    function: Callable[[Tensor], Tensor],
    points: Float[Tensor, "q m d"],
    moves: Float[Tensor, "q m d"],
    *,
    analyzer: str = "JacobianGain",
) -> Float[Tensor, "q m d"]:
    """J v for each point and its move v, in one forward pass of dual numbers.

    Raises:
        TransportError: the function holds an operation without a forward-mode derivative, or cuts the derivative off.
    """
    # A caller's inference_mode would forbid dual numbers, and its tensors too: hence the copies.
    with torch.inference_mode(False), torch.no_grad(), forward_ad.dual_level():
        try:
            image = function(forward_ad.make_dual(points.clone(), moves.clone()))
        except RuntimeError as error:
            if not re.search(r"forward[ -](mode )?AD", str(error)):
                raise
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if "/torch/" not in frame.f_code.co_filename]
            raise TransportError(
                "expected a block whose every operation has a forward-mode derivative, got one in "
                f"{frames[-1].f_code.co_qualname}: {error} Leave {analyzer} out for this model."
            ) from error
        moved = forward_ad.unpack_dual(image).tangent
    if moved is None:
        raise TransportError(
            f"expected a block that can be differentiated, got one that detaches its output. Leave {analyzer} out."
        )
    return moved
