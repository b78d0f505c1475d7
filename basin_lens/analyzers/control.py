"""Any score on other neighborhoods than the nearest: its control columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basin_lens.analyzers.contract import Analyzer, CloudAnalyzer, Column, NamedChoice, Neighborhoods, Role
from basin_lens.neighbors import Metric, SameToken
from basin_lens.transport import Context
from basin_lens.values import Whole

NULLS: tuple[NamedChoice, ...] = ("random", "radius_matched")


@dataclass(frozen=True, kw_only=True)
class Control(CloudAnalyzer):
    """A score measured on random points, or on an equally tight set elsewhere, in place of the nearest neighbors.

    Columns: those of the score with the choice behind their names, such as `contraction_random` and `contraction_radius_matched`;
    unit and range as there. What a score gives there it does not owe to the neighborhood. See `controls_of`.

    Args:
        of: the score.
        choice: `"random"` or `"radius_matched"`.
        queries: at most so many tokens per layer, a seeded sample; None: as many as the score.
    """

    role: ClassVar[Role] = "control"
    of: CloudAnalyzer
    choice: NamedChoice
    k: int
    context: Context
    blocks: int
    metric: Metric
    exclude: str
    same_token: SameToken
    position_0: bool
    queries: Whole | None = None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.of.needs - {"halves"}

    @property
    def called(self) -> str:
        return f"{self.of.called} (its control, choice {self.choice!r})"

    @property
    def max_queries(self) -> int | None:
        return self.of.max_queries if self.queries is None else self.queries

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(f"{c.name}_{self.choice}", c.unit, c.low, c.high) for c in self.of.columns)

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        return {f"{name}_{self.choice}": value for name, value in self.of.measure(neighborhoods).items()}


def controls_of(analyzers: Sequence[Analyzer], *, queries: int | None = None) -> list[Control]:
    """The controls of every score on the images of its nearest neighbors; none for one that counts the token itself, nor for
    `Compression`, which passes its nulls itself.

    `queries`: at most so many tokens per layer; None: all.
    """
    return [
        Control(
            of=a,
            choice=choice,
            k=a.k,
            context=a.context,
            blocks=a.blocks,
            metric=a.metric,
            exclude=a.exclude,
            same_token=a.same_token,
            position_0=a.position_0,
            queries=queries,
        )
        for a in analyzers
        if isinstance(a, CloudAnalyzer) and a.choice == "nearest" and a.exclude != "nothing"
        if "images" in a.needs and not a.needs & {"output_neighbors", "candidates"}
        for choice in NULLS
    ]
