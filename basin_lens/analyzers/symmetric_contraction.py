"""Contraction without the bias of choosing the neighbors on one side."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role, log_or_nan, total_variance
from basin_lens.errors import NeighborError
from basin_lens.transport import Context


@dataclass(frozen=True)
class SymmetricContraction(CloudScore):
    """Contraction of neighborhoods chosen before the block, of neighborhoods chosen after it, and the mean of the two.

    contraction_input_chosen = log(V(N) / V(F N)), N the k nearest before the block;
    contraction_output_chosen = log(V(F^-1 M) / V(M)), M the k nearest after it, F^-1 M the same tokens' states before;
    symmetric_contraction = mean of the two

    The nearest points of one side are partly near by chance and are farther apart on the other side, so that choosing at the input
    biases contraction down, and at the output up. The mean is free of that where both sides are alike: a block and its reverse
    give opposite numbers. Unit: nats. Range: all real numbers; 0 for an isometry, -2 log a for a scaling by a.

    Options and errors: see `Compression`. `name` becomes a prefix of the columns.

    Shapes: neighbors, images, output_neighbors, output_preimages `[q, k, d]` -> `[q]`.

    Raises:
        NeighborError: a context other than `"native"`: only tokens' own states can be chosen at the output.

    Source: design of basin_lens.

    Example:
        >>> import basin_lens as bl
        >>> [column.name for column in bl.analyzers.SymmetricContraction(k=15).columns]
        ['symmetric_contraction', 'contraction_input_chosen', 'contraction_output_chosen']
    """

    role: ClassVar[Role] = "score"
    context: Context = "native"
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "output_neighbors", "images", "halves"})

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        names = ("symmetric_contraction", "contraction_input_chosen", "contraction_output_chosen")
        return tuple(Column(prefix + name, "nats") for name in names)

    def check(self) -> None:
        super().check()
        if self.context != "native":
            raise NeighborError(
                f'expected context="native" for SymmetricContraction, got {self.context!r}: only tokens\' own states can be chosen '
                "at the output. Leave the context out."
            )

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.output_neighbors is not None and neighborhoods.output_preimages is not None
        at_input = neighborhoods.log_variance_in - neighborhoods.log_variance_out
        before = log_or_nan(total_variance(neighborhoods.output_preimages), neighborhoods.spread_in)
        at_output = before - log_or_nan(total_variance(neighborhoods.output_neighbors), neighborhoods.spread_out)
        values = ((at_input + at_output) / 2, at_input, at_output)
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}
