"""How much a block shrinks a neighborhood."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role


@dataclass(frozen=True)
class Contraction(CloudScore):
    """Log ratio of a neighborhood's total variance before and after the block.

    contraction = log(V_in / V_out)

    Unit: nats. Range: all real numbers. 0 for an isometry, -2 log a for a scaling by a. Holds what the
    place does to any neighborhood, and what any place does to these directions; `Compression` takes both out. Options and errors:
    see `Compression`; here `context="native"` too, and k from 2 on.

    Shapes: neighbors `[q, k, d]`, images `[q, k, d]` -> `[q]`.

    Source: design of basin_lens.

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.Contraction(k=15, context="native").columns[0].name
        'contraction'
    """

    role: ClassVar[Role] = "score"
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "images", "halves"})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "contraction", "nats"),)

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        return {self.columns[0].name: neighborhoods.log_variance_in - neighborhoods.log_variance_out}
