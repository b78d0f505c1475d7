"""What an analyzer is: it declares its columns and what it needs, and turns that into numbers.

Two kinds. A `CloudAnalyzer` sees a query's neighbors and their images under one block (`Cloud`). A `TokenAnalyzer` sees one batch
of the forward pass at one layer (`basin_lens.capture.TokenBatch`). Write your own as a frozen dataclass and pass an instance to
`analyze`; nothing needs to be registered.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.capture import TokenBatch
from basin_lens.errors import NeighborError
from basin_lens.neighbors import Metric, SameToken
from basin_lens.transport import CONTEXTS, Context

DEGENERATE = 1e-12  # a variance below this share of the layer's own is rounding, not geometry


@dataclass(frozen=True)
class Column:
    """A column of the table: its name, unit, and the range of values it can take."""

    name: str
    unit: str
    low: float | int = -float("inf")
    high: float | int = float("inf")


@dataclass(frozen=True)
class Cloud:
    """The neighborhoods of some queries at one layer. All tensors are on the model's device, float32.

    `spread_in`, `spread_out`: mean total variance of random bank points before and after the same block in the same context.
    `images`: what the block makes of the neighbors, in the analyzer's context. `query_image`: the query's own `resid_post`.
    `output_*`: neighbors chosen among the states that leave the block (only if needed).
    `block(points [q, m, d]) -> [q, m, d]`: any states through the block in the queries' contexts (only if needed).
    """

    layer: int
    n_layers: int
    query: Float[Tensor, "q d"]
    query_image: Float[Tensor, "q d"]
    query_token: Int[Tensor, " q"]
    query_pos: Int[Tensor, " q"]
    rows: Int[Tensor, "q k"]
    distances: Float[Tensor, "q k"]
    neighbors: Float[Tensor, "q k d"]
    neighbor_token: Int[Tensor, "q k"]
    neighbor_pos: Int[Tensor, "q k"]
    hubness: Float[Tensor, " q"]
    spread_in: float
    spread_out: float
    images: Float[Tensor, "q k d"] | None = None
    output_rows: Int[Tensor, "q k"] | None = None
    output_distances: Float[Tensor, "q k"] | None = None
    block: Callable[[Tensor], Tensor] | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def log_variance_in(self) -> Float[Tensor, " q"]:
        """log V_in per query; NaN where it is rounding beside G_in. Computed once for all analyzers that share the cloud."""
        return log_or_nan(total_variance(self.neighbors), self.spread_in)

    @cached_property
    def log_variance_out(self) -> Float[Tensor, " q"]:
        """log V_out per query; NaN where it is rounding beside G_out."""
        assert self.images is not None
        return log_or_nan(total_variance(self.images), self.spread_out)

    @cached_property
    def halves(self) -> "tuple[Cloud, Cloud]":
        """The cloud with every other neighbor, and with those between: disjoint halves of one size, equally near."""
        k = self.rows.shape[1]
        return self.take(torch.arange(0, k - k % 2, 2)), self.take(torch.arange(1, k, 2))

    def take(self, ranks: Tensor) -> "Cloud":
        """The same queries with some of their neighbors (by rank)."""

        def part(value: Any) -> Any:
            return None if value is None else value[:, ranks.to(value.device)]

        changed = {
            name: part(getattr(self, name))
            for name in ("rows", "distances", "neighbors", "neighbor_token", "neighbor_pos", "images")
        }
        return Cloud(**{f.name: changed.get(f.name, getattr(self, f.name)) for f in fields(self)})


class Analyzer(ABC):
    """Common to both kinds: columns, rows, needs, direction."""

    rows: ClassVar[Literal["token", "sequence"]] = "token"
    needs: ClassVar[frozenset[str]] = frozenset()
    source: ClassVar[str] = ""

    @property
    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """The columns that `measure` fills."""

    @property
    def key(self) -> str:
        """The analyzer with its options, as text: equal keys measure the same thing."""
        return repr(self)


class CloudAnalyzer(Analyzer):
    """A measurement on neighborhoods.

    `needs` may hold `"input_neighbors"`, `"output_neighbors"`, `"images"`, `"block"`, `"final_norm"`, and `"halves"` for a score that
    can be computed on half of the neighbors: its split-half reliability then comes with it.
    """

    k: int
    context: Context
    metric: Metric
    exclude: str
    same_token: SameToken

    @abstractmethod
    def measure(self, cloud: Cloud) -> dict[str, Float[Tensor, " q"]]:
        """Values by column name for each query; NaN where the measurement is not defined."""

    def check(self) -> None:
        """Refuse options that make no sense, before any work.

        Raises:
            NeighborError: an unknown option value, or k below 2.
        """
        if not isinstance(self.k, int) or self.k < 2:
            raise NeighborError(f"expected k of at least 2 for {type(self).__name__}, got {self.k!r}.")
        for option, allowed in {
            "context": CONTEXTS, "metric": ("l2", "cosine"), "same_token": ("any", "only", "exclude")
        }.items():  # fmt: skip
            if getattr(self, option) not in allowed:
                raise NeighborError(f"expected {option} in {allowed} for {type(self).__name__}, got {getattr(self, option)!r}.")
        if not isinstance(self.exclude, str):
            raise NeighborError(f'expected exclude "self", "sequence", "document" or a label name, got {self.exclude!r}.')


class TokenAnalyzer(Analyzer):
    """A measurement on the forward pass itself.

    `needs` may hold `"resid_pre"`, `"resid_post"`, `"pattern"`, `"logits"`, `"gradient"`, or any hook name below a block, such as
    `"mlp.hook_post"`. With `per_layer = False` it is measured once and holds for every layer. `target` says what the gradient is
    of: `"future_loss"`, or `"cache"` for the user's own backward pass; None without gradients.
    """

    per_layer: ClassVar[bool] = True
    target: str | None = None

    @abstractmethod
    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Values by column name, `[batch, pos]` (or `[batch]` for one number per sequence); NaN where not defined."""

    def check(self) -> None:
        """Refuse options that make no sense, before any work."""


def column_name(analyzer: Any, default: str) -> str:
    """The user's `name`, or the default."""
    return analyzer.name or default


def total_variance(points: Float[Tensor, "*batch k d"]) -> Float[Tensor, "*batch"]:
    """Total population variance of k points: (1/k) * sum ||x - mean||^2."""
    return (points - points.mean(-2, keepdim=True)).square().sum(-1).mean(-1)


def log_or_nan(value: Tensor, reference: float) -> Tensor:
    """Natural logarithm; NaN where the value is rounding beside `reference`."""
    return torch.where(value > DEGENERATE * reference, value, torch.nan).log()
