"""How much more a block shrinks a neighborhood than it shrinks random sets of the bank, on average over them."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role, log_variance_ratio


@dataclass(frozen=True)
class RelativeContraction(CloudScore):
    """Contraction of a neighborhood less the mean contraction of random sets, both in the layer's ordinary dimensions.

    relative_contraction = log(V_in / V_out) - mean over random sets of log(V_in / V_out)

    V: total variance over the dimensions whose variance in the bank is at most 20 times the median, before and behind the block.
    The mean is over 64 tokens, each with 64 random points of the bank in its own place and context, in sets of k: a mean of
    logarithms, so that no single set decides it, and of sets as large as neighborhoods, because the logarithm of a variance of few
    points is too low on average. Its standard error over documents is in provenance (`random_contraction` and `reference_error`, by
    layer), and in every interval of a layer's mean (see `tables.reference_error`): an offset of that size is chance. Holds what
    the layer does to the directions that neighborhoods span; `Compression` takes that out. Unit: nats. Range: all real
    numbers; 0 for an isometry, scaling or shift.
    Options and errors: see `Compression`.

    Shapes: neighbors `[q, k, d]`, images `[q, k, d]` -> `[q]`.

    Source: design of basin_lens.

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.RelativeContraction(k=15).columns[0].name
        'relative_contraction'
    """

    role: ClassVar[Role] = "score"
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "images", "bank", "random_contraction", "halves"})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "relative_contraction", "nats"),)

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.images is not None and neighborhoods.bank is not None
        assert neighborhoods.random_contraction is not None
        contraction = log_variance_ratio(neighborhoods.neighbors, neighborhoods.images, neighborhoods.bank)
        return {self.columns[0].name: contraction - neighborhoods.random_contraction.mean}
