"""What a reader needs to know beside any score: how near the neighbors are, and what they are."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role
from basin_lens.transport import Context


@dataclass(frozen=True)
class Neighborhood(CloudScore):
    """Density and make-up of a token's input neighborhood.

    `radius`: distance to the k-th neighbor; `nearest`: to the first. Unit: state units (1 - cosine with that metric).
    Range: [0, inf).
    `same_token_share`, `same_position_share`: share of neighbors with the query's token id, or at its position. Range: [0, 1].
    `distinct_tokens`: number of different token ids among the neighbors. Unit: count. Range: 1 to k.
    `hubness`: how many queries of this layer have the token as a neighbor. Unit: count. Range: [0, inf); NaN with an external bank.

    Options and errors: see `Compression`. `name` becomes a prefix of the columns.

    Shapes: distances `[q, k]` -> `[q]`.

    Source: design of basin_lens; hubness after Radovanovic et al. 2010 (k-occurrence).

    Example:
        >>> import basin_lens as bl
        >>> [column.name for column in bl.analyzers.Neighborhood(k=5).columns][:2]
        ['radius', 'nearest']
    """

    role: ClassVar[Role] = "confound"
    context: Context = "native"
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors"})

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        return (
            Column(f"{prefix}radius", "state units", 0),
            Column(f"{prefix}nearest", "state units", 0),
            Column(f"{prefix}same_token_share", "share", 0, 1),
            Column(f"{prefix}same_position_share", "share", 0, 1),
            Column(f"{prefix}distinct_tokens", "count", 1, self.k),
            Column(f"{prefix}hubness", "count", 0),
        )

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        tokens = neighborhoods.neighbor_token.sort(dim=1).values
        values = (
            neighborhoods.distances[:, -1],
            neighborhoods.distances[:, 0],
            (neighborhoods.neighbor_token == neighborhoods.query_token[:, None]).float().mean(1),
            (neighborhoods.neighbor_pos == neighborhoods.query_pos[:, None]).float().mean(1),
            1 + (tokens[:, 1:] != tokens[:, :-1]).sum(1).float(),
            neighborhoods.hubness,
        )
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}
