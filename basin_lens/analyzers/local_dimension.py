"""How many dimensions a neighborhood has, seen through 5, 10, 15 or 30 neighbors."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role
from basin_lens.errors import NeighborError
from basin_lens.transport import Context
from basin_lens.values import Whole, whole_or_none

_CURVE = (5, 10, 15, 30)


@dataclass(frozen=True)
class LocalDimension(CloudScore):
    """Intrinsic dimension of the states around a token, by two estimators, as a curve over the number of neighbors.

    dimension_mle_k{n} = 1 / mean_{j<n} log(r_n / r_j), r_j: distance to the j-th of the n nearest neighbors;
    dimension_two_nn_k{n} = n / sum_{i=0..n} log mu_i, over the n + 1 points of the query and its n nearest neighbors, mu_i:
    distance to a point's second nearest divided by that to its nearest, both within these n + 1 points

    Never "the dimension": the number depends on the scale, so look at the curve. Few neighbors are noisy and biased up; many are
    biased down in high dimension, where most of a neighborhood is edge. Distances are Euclidean whatever `metric` chose the
    neighbors, and all from the states before the block. Unit: dimensions. Range: (0, inf). NaN where two of the points coincide, or
    where all are equally far.

    Options and errors: see `Compression`; k is 30 by default. `name` becomes a prefix of the columns.

    Args:
        curve: numbers of neighbors n, each from 2 to k, ascending; None: those of 5, 10, 15, 30 below k, and k.

    Shapes: query `[q, d]`, neighbors `[q, k, d]` -> `[q]`.

    Raises:
        NeighborError: a curve that is empty, does not ascend, or leaves the range from 2 to k.

    Source: Levina and Bickel 2004 (maximum likelihood, the plain form with n - 1, as scikit-dimension's `MLE` by default); Facco et
    al. 2017 (TwoNN, its unbiased maximum likelihood: N - 1 = n over the sum for N points, as DADApy's `algorithm="ml"` and
    scikit-dimension's `method="mle"` without discarding).

    Example:
        >>> import basin_lens as bl
        >>> [column.name for column in bl.analyzers.LocalDimension(k=20, curve=(10, 20)).columns]
        ['dimension_mle_k10', 'dimension_mle_k20', 'dimension_two_nn_k10', 'dimension_two_nn_k20']
    """

    role: ClassVar[Role] = "score"
    k: Whole = 30
    context: Context = "native"
    curve: tuple[Whole, ...] | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors"})

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of neighbors on the curve."""
        return self.curve if self.curve is not None else (*(n for n in _CURVE if n < self.k), self.k)

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        kinds = ("dimension_mle", "dimension_two_nn")
        return tuple(Column(f"{prefix}{kind}_k{n}", "dimensions", 0) for kind in kinds for n in self.sizes)

    def check(self) -> None:
        super().check()
        ascending = list(self.sizes) == sorted(set(self.sizes)) and None not in map(whole_or_none, self.sizes)
        if not (self.sizes and ascending and self.sizes[0] >= 2 and self.sizes[-1] <= self.k):
            raise NeighborError(f"expected a curve of ascending numbers from 2 to k={self.k}, got {self.curve}.")

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        points = torch.cat([neighborhoods.query[:, None], neighborhoods.neighbors], dim=1)
        # By differences: the matrix-product form loses the digits of near points that lie far from the origin.
        distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        values = [maximum_likelihood(distances[:, 0, 1 : n + 1]) for n in self.sizes]
        values += [two_nn(distances[:, : n + 1, : n + 1]) for n in self.sizes]
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}


def maximum_likelihood(radii: Float[Tensor, "q n"]) -> Float[Tensor, " q"]:
    """Levina and Bickel's estimate from each query's distances to its n neighbors, in any order."""
    logs = (radii.amax(1, keepdim=True) / radii).log()
    # The farthest adds log 1 = 0 to the sum, so this is the mean over the others.
    return positive((radii.shape[1] - 1) / logs.sum(1))


def two_nn(distances: Float[Tensor, "q points points"]) -> Float[Tensor, " q"]:
    """Facco's estimate from the distances within each cloud of points."""
    itself = torch.eye(distances.shape[1], dtype=torch.bool, device=distances.device)
    first, second = distances.masked_fill(itself, torch.inf).topk(2, dim=2, largest=False).values.unbind(2)
    return positive((distances.shape[1] - 1) / (second / first).log().sum(1))


def positive(dimension: Tensor) -> Tensor:
    """NaN in place of 0 (two points coincide) and of infinity (all are equally far)."""
    return torch.where((dimension > 0) & dimension.isfinite(), dimension, torch.nan)
