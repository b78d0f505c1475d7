"""What a request comes to, as data: which layers, which searches, which maps, and which analyzer looks at what.

A plan holds no states and runs nothing, so that any piece of it (a layer) can be run by itself, anywhere that has the states.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from basin_lens.analyzers import Analyzer, CloudAnalyzer, TokenAnalyzer
from basin_lens.analyzers.contract import Choice
from basin_lens.neighbors import Metric, SameToken
from basin_lens.transport import Context


@dataclass(frozen=True)
class SearchOptions:
    """Neighbor options: analyzers that agree on them share one search."""

    metric: Metric
    exclude: str
    same_token: SameToken
    position_0: bool
    choice: Choice
    k: int | None = None  # of any choice but the nearest: only among these are the first few those of a smaller k

    @classmethod
    def of(cls, analyzer: CloudAnalyzer) -> "SearchOptions":
        """The neighbor options of an analyzer."""
        k = None if analyzer.choice == "nearest" else int(analyzer.k)
        return cls(analyzer.metric, analyzer.exclude, analyzer.same_token, analyzer.position_0, analyzer.choice, k)


@dataclass(frozen=True)
class SearchSite:
    """One search at a layer: its options, and the states among which neighbors are sought.

    `place`: `"pre"`, the states that enter the layer; `"mid"`, those between attention and feed-forward; `"post"`, those that leave
    the map. `blocks`: blocks between the layer and the place, counting the one that is half passed.
    """

    options: SearchOptions
    place: Literal["pre", "mid", "post"]
    blocks: int = 0

    @classmethod
    def before(cls, analyzer: CloudAnalyzer) -> "SearchSite":
        """Where the analyzer's map begins."""
        return cls(SearchOptions.of(analyzer), "mid" if analyzer.context == "mlp" else "pre")

    @classmethod
    def behind(cls, analyzer: CloudAnalyzer) -> "SearchSite":
        """Where the analyzer's map ends."""
        return cls(SearchOptions.of(analyzer), "mid" if analyzer.context == "attn" else "post", int(analyzer.blocks))


@dataclass(frozen=True)
class MapPlan:
    """One map (a context, through so many blocks), and the analyzers that look through it."""

    context: Context
    blocks: int
    analyzers: tuple[CloudAnalyzer, ...]

    @cached_property
    def single(self) -> tuple[CloudAnalyzer, ...]:
        """Analyzers that measure each token by itself."""
        return tuple(a for a in self.analyzers if a.crossing is None)

    @cached_property
    def grouped(self) -> tuple[CloudAnalyzer, ...]:
        """Analyzers that cross the tokens of a group."""
        return tuple(a for a in self.analyzers if a.crossing is not None)

    @cached_property
    def of_images(self) -> tuple[CloudAnalyzer, ...]:
        """Analyzers that need their neighbors' images."""
        return tuple(a for a in self.analyzers if "images" in a.needs)

    @cached_property
    def passing(self) -> tuple[SearchSite, ...]:
        """Searches whose neighbors go through the map together, each pair once; all searches, if no analyzer needs images."""
        return tuple(dict.fromkeys(SearchSite.before(a) for a in self.of_images or self.single))


@dataclass(frozen=True)
class Piece:
    """The work at one layer: the maps that begin there, and the analyzers for which too few blocks are left."""

    layer: int
    maps: tuple[MapPlan, ...]
    beyond_the_last_block: tuple[CloudAnalyzer, ...]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        layers: layers to measure, ascending.
        n_layers: blocks of the model.
        analyzers: all analyzers, in the order of the table's columns.
        seed: of every random choice.
    """

    layers: tuple[int, ...]
    n_layers: int
    analyzers: tuple[Analyzer, ...]
    seed: int

    @cached_property
    def of_tokens(self) -> tuple[TokenAnalyzer, ...]:
        """Analyzers that read the forward pass itself."""
        return tuple(a for a in self.analyzers if isinstance(a, TokenAnalyzer))

    @cached_property
    def of_neighbors(self) -> tuple[CloudAnalyzer, ...]:
        """Analyzers that look at neighborhoods."""
        return tuple(a for a in self.analyzers if isinstance(a, CloudAnalyzer))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(column.name for a in self.analyzers for column in a.columns)

    @cached_property
    def maps(self) -> tuple[MapPlan, ...]:
        """The maps, each with its analyzers: one pass of the union of their neighbors serves them all."""
        kinds = dict.fromkeys((a.context, int(a.blocks)) for a in self.of_neighbors)
        return tuple(
            MapPlan(context, blocks, tuple(a for a in self.of_neighbors if (a.context, a.blocks) == (context, blocks)))
            for context, blocks in kinds
        )

    @cached_property
    def largest_k(self) -> dict[SearchOptions, int]:
        """The largest k asked for, by neighbor options: one search serves all smaller ones."""
        largest: dict[SearchOptions, int] = {}
        for a in self.of_neighbors:
            options = SearchOptions.of(a)
            largest[options] = max(a.k, largest.get(options, 0))
        return largest

    @cached_property
    def most_blocks(self) -> int:
        """Blocks of the longest map."""
        return max((a.blocks for a in self.of_neighbors), default=1)

    @property
    def path(self) -> set[int]:
        """Layers whose states are read, if some analyzers look through several blocks; the model may have fewer."""
        return {layer + step for layer in self.layers for step in range(self.most_blocks)}

    @property
    def layers_needed(self) -> set[int]:
        """Layers that a capture must hold: a map of several blocks reads the states at each of them."""
        return {
            layer + step
            for a in self.of_neighbors
            for layer in self.layers
            if layer + a.blocks <= self.n_layers
            for step in range(a.blocks)
        }

    @property
    def patches(self) -> bool:
        """Whether an analyzer puts states into a block in a query's context."""
        return any(a.context in ("patched", "attn") or "block" in a.needs for a in self.of_neighbors)

    def piece(self, layer: int) -> Piece:
        """The work at one layer."""
        there = tuple(some for some in self.maps if layer + some.blocks <= self.n_layers)
        beyond = tuple(a for some in self.maps if some not in there for a in some.analyzers)
        return Piece(layer, there, beyond)
