"""What the block's derivative at a token does in all directions at once: the singular values of its whole Jacobian."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role
from basin_lens.analyzers.jacobian_gain import derivative
from basin_lens.errors import NeighborError
from basin_lens.values import Whole, whole_or_none

_ROWS = 1024  # derivatives in one call of the block
_ROUNDING = 1e-6  # a singular value below this share of the largest is rounding


@dataclass(frozen=True)
class JacobianSpectrum(CloudScore):
    """Singular values of the block's Jacobian J = dF/dh at the query's state in its context, d x d, and where they lie.

    jacobian_log_volume = mean of log s, the change of volume per dimension
    jacobian_stable_rank = sum s^2 / max s^2
    jacobian_participation_ratio = (sum s^2)^2 / sum s^4
    jacobian_nonnormality = sqrt(1 - sum |eigenvalue|^2 / sum s^2), Henrici's departure from normality
    jacobian_neighborhood_share = ||J Q||^2 / ||J||^2, Q: an orthonormal basis of the neighbors' displacements from their centroid

    Exact derivatives in forward mode, one for each of the d directions: a token costs d rows through the block. With `blocks=n`, J
    is the product along the path. A share of (k - 1) / d is that of generic directions. Units: nats for the volume, dimensions,
    ratio and share. Range: all real numbers; 1 to d; 1 to d; 0 to 1; 0 to 1. An isometry has volume 0, ranks d and departure 0; a
    scaling by a has volume log |a|. NaN: the volume where a singular value is rounding beside the largest, the share where the
    neighbors are one point.

    Options and errors: see `Compression`. `name` becomes a prefix of the columns.

    Args:
        queries: at most so many tokens per layer, a seeded sample.

    Shapes: query `[q, d]`, neighbors `[q, k, d]`, block `[q, m, d]` -> the same -> `[q]`.

    Raises:
        NeighborError: queries below 1.
        TransportError: the block holds an operation without a forward-mode derivative (Bloom's own GeLU); it is named.

    Source: to be set beside "Dynamics of the transformer residual stream" (arXiv 2605.14258); the departure is Henrici 1962.

    Example:
        >>> import basin_lens as bl
        >>> [column.name for column in bl.analyzers.JacobianSpectrum(queries=2).columns][:2]
        ['jacobian_log_volume', 'jacobian_stable_rank']
    """

    role: ClassVar[Role] = "score"
    queries: Whole = 4
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "block"})

    @property
    def max_queries(self) -> int:
        """Tokens measured per layer."""
        return int(self.queries)

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        return (
            Column(f"{prefix}jacobian_log_volume", "nats"),
            Column(f"{prefix}jacobian_stable_rank", "dimensions", 1),
            Column(f"{prefix}jacobian_participation_ratio", "dimensions", 1),
            Column(f"{prefix}jacobian_nonnormality", "ratio", 0, 1),
            Column(f"{prefix}jacobian_neighborhood_share", "share", 0, 1),
        )

    def check(self) -> None:
        super().check()
        if (whole_or_none(self.queries) or 0) < 1:
            raise NeighborError(f"expected queries of at least 1 for JacobianSpectrum, got {self.queries!r}.")

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        matrices = jacobian(neighborhoods)
        sizes = torch.linalg.svdvals(matrices)
        squares = sizes.square()
        total = squares.sum(1)
        normal = torch.linalg.eigvals(matrices).abs().square().sum(1)
        values = (
            torch.where(sizes > _ROUNDING * sizes[:, :1], sizes, torch.nan).log().mean(1),
            total / squares[:, 0],
            total.square() / squares.square().sum(1),
            (1 - normal / total).clamp_min(0).sqrt(),
            share_on_span(matrices, neighborhoods.neighbors),
        )
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}


def jacobian(neighborhoods: Neighborhoods) -> Float[Tensor, "q d d"]:
    """The derivative of the block at each query, `[q, out, in]`, in as many calls as its columns need."""
    assert neighborhoods.block is not None
    count, width = neighborhoods.query.shape
    axes = torch.eye(width, dtype=neighborhoods.query.dtype, device=neighborhoods.query.device)
    columns = []
    for part in axes.split(max(1, _ROWS // count)):
        moves = part.expand(count, -1, -1)
        points = neighborhoods.query[:, None].expand_as(moves)
        columns.append(derivative(neighborhoods.block, points, moves, analyzer="JacobianSpectrum"))
    return torch.cat(columns, dim=1).transpose(1, 2)


def share_on_span(matrices: Float[Tensor, "q d d"], neighbors: Float[Tensor, "q k d"]) -> Float[Tensor, " q"]:
    """Share of a matrix's squared length that acts on the span of the neighbors' displacements; NaN where that is rounding."""
    moves = neighbors - neighbors.mean(1, keepdim=True)
    _, sizes, axes = torch.linalg.svd(moves, full_matrices=False)
    # Beside the states' own length: displacements of equal states are rounding.
    there = sizes > _ROUNDING * neighbors.norm(dim=2).mean(1, keepdim=True)
    there &= sizes > 1e-5 * sizes[:, :1]  # one dimension fewer than neighbors, as the centroid is taken out
    along = (matrices @ axes.transpose(1, 2)).square().sum(1) * there
    share = along.sum(1) / matrices.square().sum((1, 2))
    return torch.where(there.any(1), share, torch.nan)
