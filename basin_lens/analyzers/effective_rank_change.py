"""Whether a block makes a neighborhood flatter or rounder."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from basin_lens.analyzers.contract import DEGENERATE, CloudScore, Column, Neighborhoods, Role
from basin_lens.errors import NeighborError
from basin_lens.values import Whole

_ROUNDING = 1e-6  # of 1 / PR in float32: what a cloud that is round to the last digit leaves after the correction


@dataclass(frozen=True)
class EffectiveRankChange(CloudScore):
    """Change of the effective rank (participation ratio) of a neighborhood under the block.

    effective_rank_change = log(effective_rank_after / effective_rank_before)

    effective_rank = PR with 1/PR = 1/PR_naive - 1/(k-1), PR_naive = (sum l)^2 / sum l^2, l: eigenvalues of the neighborhood's
    covariance. k points cannot show more than k - 1 dimensions; the correction takes that cap out, exactly so for Gaussian clouds
    in the limit of many dimensions. Where it leaves nothing, the neighborhood is as round as k points can be: NaN, ask for more.

    Units: nats, and dimensions for the two ranks. Range: all real numbers for the change, [1, inf) for the ranks. The change is 0
    for an isometry, a scaling or a shift. Contraction says how much a neighborhood shrinks, this in how few directions.

    Options and errors: see `Compression`; k is 50 by default. `name` becomes a prefix of the columns.

    Shapes: neighbors `[q, k, d]`, images `[q, k, d]` -> `[q]`.

    Raises:
        NeighborError: k below 3.

    Source: Gao et al. 2017 (participation ratio); the correction as in design of basin_lens.

    Example:
        >>> import basin_lens as bl
        >>> [column.unit for column in bl.analyzers.EffectiveRankChange().columns]
        ['nats', 'dimensions', 'dimensions']
    """

    role: ClassVar[Role] = "score"
    k: Whole = 50
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "images", "halves"})

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        return (
            Column(f"{prefix}effective_rank_change", "nats"),
            Column(f"{prefix}effective_rank_before", "dimensions", 1),
            Column(f"{prefix}effective_rank_after", "dimensions", 1),
        )

    def check(self) -> None:
        super().check()
        if self.k < 3:
            raise NeighborError(f"expected k of at least 3 for EffectiveRankChange (2 points are always a line), got {self.k}.")

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.images is not None
        before, after = (
            effective_rank(neighborhoods.neighbors, neighborhoods.spread_in),
            effective_rank(neighborhoods.images, neighborhoods.spread_out),
        )
        return {column.name: value for column, value in zip(self.columns, ((after / before).log(), before, after), strict=True)}


def effective_rank(points: Float[Tensor, "q k d"], spread: float) -> Float[Tensor, " q"]:
    """Corrected participation ratio per neighborhood; NaN where its variance is rounding beside `spread`, or nothing is left."""
    k = points.shape[1]
    points = points - points.mean(1, keepdim=True)
    points = points - points.mean(1, keepdim=True)  # again: where states lie far from the origin, the first mean is rounded
    # The k x k Gram matrix has the covariance's eigenvalues; trace and Frobenius norm give both sums without finding them.
    gram = points @ points.mT
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    scaled = gram / trace[:, None, None]  # first, so that squares of squares stay within float32
    share = scaled.square().sum((1, 2)) - 1 / (k - 1)
    return torch.where((trace / k > DEGENERATE * spread) & (share > _ROUNDING), 1 / share, torch.nan)
