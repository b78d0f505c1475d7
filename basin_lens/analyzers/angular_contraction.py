"""How much a block shrinks a neighborhood's spread of directions, whatever it does to lengths."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role, log_or_nan, total_variance


@dataclass(frozen=True)
class AngularContraction(CloudScore):
    """Contraction of a neighborhood on the unit sphere.

    angular_contraction = log(U_in / U_out), U: total variance of the states x / ||x||;
    angular_contraction_centered: the same of y / ||y||, y = (x - mean of the layer's states) * (1 - massive), before and after the
    block with that side's own mean and massive dimensions (those with over 20 times the median dimension's variance)

    A state's length, and a few massive dimensions of it, can carry most of the variance; the two columns say what is left without
    them. Unit: nats. Range: all real numbers; 0 for a scaling or a rotation about the origin (the centered one: about the mean).
    NaN where U is below 1e-12, which is rounding on the unit sphere, or where a state is zero.

    Options and errors: see `Compression`. `metric` only changes how neighbors are chosen; to choose them by angle as well, take
    `metric="cosine"`. `name` becomes a prefix of the columns.

    Shapes: neighbors `[q, k, d]`, images `[q, k, d]` -> `[q]`.

    Source: design of basin_lens; for massive dimensions, Sun et al. 2024, "Massive activations".

    Example:
        >>> import basin_lens as bl
        >>> [column.name for column in bl.analyzers.AngularContraction(metric="cosine").columns]
        ['angular_contraction', 'angular_contraction_centered']
    """

    role: ClassVar[Role] = "score"
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "images", "bank", "halves"})

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        return (Column(f"{prefix}angular_contraction", "nats"), Column(f"{prefix}angular_contraction_centered", "nats"))

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.images is not None and neighborhoods.bank is not None
        (mean_before, kept_before), (mean_after, kept_after) = (
            neighborhoods.bank.directions_before,
            neighborhoods.bank.directions_after,
        )
        values = (
            log_angular_variance(neighborhoods.neighbors) - log_angular_variance(neighborhoods.images),
            log_angular_variance((neighborhoods.neighbors - mean_before) * kept_before)
            - log_angular_variance((neighborhoods.images - mean_after) * kept_after),
        )
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}


def log_angular_variance(states: Float[Tensor, "q k d"]) -> Float[Tensor, " q"]:
    """Log of the total variance of states scaled to unit length; NaN where it is rounding, or a state is zero."""
    return log_or_nan(total_variance(states / states.norm(dim=-1, keepdim=True)), 1.0)
