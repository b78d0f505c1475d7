"""What an analyzer is: it declares its columns and what it needs, and turns that into numbers.

Two kinds. A `CloudAnalyzer` sees the neighbors of some queries and their images under one block (`Neighborhoods`). A
`TokenAnalyzer` sees one batch of the forward pass at one layer (`basin_lens.capture.TokenBatch`). Write your own as a frozen
dataclass and pass an instance to `analyze`; nothing needs to be registered.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.analyzers.crossed_table import CrossedTable, Crossing, Displaced
from basin_lens.analyzers.declaration import (
    Column,
    check_count,
    check_description,
    check_needs,
    check_one_of,
    check_values,
    declared,
)
from basin_lens.capture import Target, TokenBatch
from basin_lens.errors import AnalyzerError, NeighborError
from basin_lens.neighbors import ChoiceFunction, Metric, SameToken, check_choice, name_of_choice
from basin_lens.transport import CONTEXTS, Context
from basin_lens.values import Whole, whole_fields, whole_or_none

NamedChoice = Literal["nearest", "random", "radius_matched"]
CHOICES: tuple[NamedChoice, ...] = ("nearest", "random", "radius_matched")
# Who the neighbors are: by a rule with a name, or by the caller's own (see `basin_lens.neighbors.choices`).
Choice = NamedChoice | ChoiceFunction
Role = Literal["score", "importance", "confound", "control"]
MASSIVE = 20  # times the median: a dimension's variance, or a state's squared distance from the median state
DEGENERATE = 1e-12  # a variance below this share of the layer's own is rounding, not geometry


@dataclass(frozen=True)
class Surroundings:
    """The bank's states around the map, position 0 left out: what a layer's axes and means are measured on.

    `before`, `after`: states that enter the map, and the same tokens' own cached states behind it.
    """

    before: Float[Tensor, "points d"]
    after: Float[Tensor, "points d"]

    @cached_property
    def directions_before(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Mean of the states before, and a mask that is 0 on their massive dimensions."""
        return mean_and_mask(self.before)

    @cached_property
    def directions_after(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Mean of the states after, and a mask that is 0 on their massive dimensions."""
        return mean_and_mask(self.after)

    @cached_property
    def ordinary(self) -> Bool[Tensor, " d"]:
        """Dimensions that are massive on neither side of the map."""
        return (self.directions_before[1] * self.directions_after[1]).bool()


@dataclass(frozen=True)
class RandomContraction:
    """Contraction of random sets of the bank through the map, in its ordinary dimensions: mean over tokens, its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class RunOn:
    """What the model makes of states put in the queries' places and run on to the logits.

    `divergence`: Kullback-Leibler divergence at the token, KL(as it is || with the state), in nats.
    `later_loss`: rise of the mean loss of the sequence's later tokens, in nats per token; NaN for the last token.
    """

    divergence: Float[Tensor, "q m"]
    later_loss: Float[Tensor, "q m"]


@dataclass(frozen=True)
class Neighborhoods:
    """The neighborhoods of some queries at one layer. All tensors are on the model's device, float32.

    `query`, `neighbors`: states that enter the map (`resid_pre`; `resid_mid` in the `mlp` context). `query_image`: what the query's
    own state becomes. `images`: what the map makes of the neighbors, in the analyzer's context.
    `spread_in`, `spread_out`: the bank's own spread before and behind the map, beside which a variance is told to be rounding.
    `output_rows`, `output_distances`: neighbors chosen among the states that leave the map (only if needed); `output_neighbors`:
    their states behind it, `output_preimages`: before it.
    `candidates`: how many rows each query could have chosen from (only if needed).
    `block(points [q, m, d]) -> [q, m, d]`: any states through the map in the queries' contexts (only if needed).
    `run_on(points [q, m, d]) -> RunOn`: any states in the queries' places, run on to the logits (only if needed).
    `bank`: the bank's states around the map (only if needed).
    `random_contraction`: what the map does to random sets of the bank (only if needed).
    `crossed`: for an analyzer with a `crossing`, whose queries come group after group: the groups' tables, by whose displacements
    were passed.
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
    output_rows: Int[Tensor, "q k_all"] | None = None
    output_distances: Float[Tensor, "q k_all"] | None = None
    output_neighbors: Float[Tensor, "q k d"] | None = None
    output_preimages: Float[Tensor, "q k d"] | None = None
    candidates: Int[Tensor, " q"] | None = None
    block: Callable[[Tensor], Tensor] | None = None
    run_on: Callable[[Tensor], RunOn] | None = None
    bank: Surroundings | None = None
    random_contraction: RandomContraction | None = None
    crossed: Mapping[Displaced, CrossedTable] | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def log_variance_in(self) -> Float[Tensor, " q"]:
        """log V_in per query; NaN where it is rounding beside the layer's own. Computed once for all that share the object."""
        return log_or_nan(total_variance(self.neighbors), self.spread_in)

    @cached_property
    def log_variance_out(self) -> Float[Tensor, " q"]:
        """log V_out per query; NaN where it is rounding beside the layer's own."""
        assert self.images is not None
        return log_or_nan(total_variance(self.images), self.spread_out)

    @cached_property
    def split_half(self) -> "tuple[Neighborhoods, Neighborhoods]":
        """The neighborhoods with every other neighbor, and with those between: disjoint halves of one size, equally near."""
        k = self.rows.shape[1]
        return self.take(torch.arange(0, k - k % 2, 2, device=self.rows.device)), self.take(
            torch.arange(1, k, 2, device=self.rows.device)
        )

    def take(self, ranks: Tensor) -> "Neighborhoods":
        """The same queries with some of their neighbors (by rank). `output_rows` stay whole: shares are taken of all of them."""
        held = {name: value for name in _BY_NEIGHBOR if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value[:, ranks.to(value.device)] for name, value in held.items()})


# Fields of `Neighborhoods` with a value for each neighbor.
_BY_NEIGHBOR = (
    "rows",
    "distances",
    "neighbors",
    "neighbor_token",
    "neighbor_pos",
    "images",
    "output_neighbors",
    "output_preimages",
)


class Analyzer(ABC):
    """Common to both kinds: columns, rows, needs, and the role of what is measured.

    `role`: `"score"`, of what a block does to a neighborhood or to the states; `"importance"`, of a token for what the model
    predicts; `"confound"`, what scores may follow, so that studies take it out or show it beside them; `"control"`, a score on
    other points.
    """

    role: ClassVar[Role] = "score"
    rows: ClassVar[Literal["token", "sequence"]] = "token"
    needs: ClassVar[frozenset[str]] = frozenset()
    source: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Called by the dataclasses below: whole numbers of numpy and 0-d tensors become ints, so that equal options
        have equal keys."""
        whole_fields(self)

    @property
    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """The columns that `measure` fills."""

    @property
    def key(self) -> str:
        """The analyzer with its options, as text: equal keys measure the same thing."""
        return repr(self)

    @property
    def called(self) -> str:
        """The class, as errors name it."""
        return type(self).__name__

    @abstractmethod
    def check_all(self) -> None:
        """Refuse, before any work, what is declared wrongly and options that make no sense: whatever takes analyzers calls it.

        Raises:
            AnalyzerError: `needs`, `columns`, `rows`, `role`, or an option that an analyzer must have.
            NeighborError: options that make no sense.
        """


# What the neighborhoods of a cloud analyzer can hold.
CLOUD_NEEDS = (
    "input_neighbors",
    "output_neighbors",
    "images",
    "candidates",
    "block",
    "run_on",
    "bank",
    "final_norm",
    "random_contraction",
    "crossed",
    "halves",
)
_OPTIONS = ("k", "context", "blocks", "metric", "exclude", "same_token", "position_0", "choice")
_NO_OPTION = "Write it as a field, such as k: int = 15, or subclass CloudScore, which has them all."


class CloudAnalyzer(Analyzer):
    """A measurement on neighborhoods.

    `needs` may hold `"input_neighbors"`, `"output_neighbors"`, `"images"`, `"candidates"`, `"block"`, `"run_on"`, `"bank"`,
    `"final_norm"`, `"random_contraction"`, `"crossed"` (with `crossing`), and `"halves"` for a score that can be computed on half
    of the neighbors: its split-half reliability then comes with it. With `max_queries` set, at most so many tokens per layer are
    measured, a seeded sample (for measurements that cost a pass each).

    The options below may be fields or class attributes; only `k` has no default. See `CloudScore`.
    """

    k: int
    context: Context = "patched"
    blocks: Whole = 1
    metric: Metric = "l2"
    exclude: str = "sequence"
    same_token: SameToken = "any"
    position_0: bool = False
    choice: Choice = "nearest"

    @property
    def max_queries(self) -> int | None:
        """At most so many tokens per layer are measured; None: all."""
        return None

    @property
    def max_per_sequence(self) -> int | None:
        """At most so many of them from a sequence before the next is taken; None: drawn from all tokens alike."""
        return None

    @property
    def crossing(self) -> Crossing | None:
        """How tokens are put into groups and crossed; None: each is measured by itself."""
        return None

    @property
    def key(self) -> str:
        """The analyzer with its options, as text; a choice of one's own by its name, without its place in memory."""
        return repr(self).replace(repr(self.choice), name_of_choice(self.choice)) if callable(self.choice) else repr(self)

    @abstractmethod
    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Float[Tensor, " q"]]:
        """Values by column name for each query; NaN where the measurement is not defined."""

    def check_all(self) -> None:
        check_description(self)
        check_needs(self, CLOUD_NEEDS, ", ".join(CLOUD_NEEDS))
        for option in _OPTIONS:
            declared(self, option, _NO_OPTION)
        CloudAnalyzer.check(self)  # also where a subclass has a check of its own alone
        self.check()
        # Only now: these may be made of the options.
        check_values(self, ("token",), get_args(Role))
        for most in ("max_queries", "max_per_sequence"):
            check_count(self, most)
        crossing, kind = declared(self, "crossing", "None: tokens are not crossed."), type(self).__name__
        if (crossing is not None) != ("crossed" in self.needs) or not isinstance(crossing, Crossing | None):
            raise AnalyzerError(
                f'expected {kind} to have both a crossing and "crossed" among its needs, or neither, got crossing {crossing!r} and '
                f"needs {sorted(self.needs)}. See Compression."
            )
        if crossing is not None and self.needs & {"images", "output_neighbors"}:
            raise AnalyzerError(
                f'expected {kind}, which crosses tokens, without "images" and "output_neighbors", which tokens of a group do not '
                "have, got both. Measure these in an analyzer of their own."
            )

    def check(self) -> None:
        """Refuse options that make no sense, before any work.

        Raises:
            NeighborError: an unknown option value, or k below 2.
        """
        kind = type(self).__name__
        if (whole_or_none(self.k) or 0) < 2:
            raise NeighborError(f"expected k of at least 2 for {kind}, got {self.k!r}.")
        same_token = ("any", "only", "exclude")
        known: dict[str, tuple[str, ...]] = {"context": CONTEXTS, "metric": ("l2", "cosine"), "same_token": same_token}
        if callable(self.choice):
            check_choice(self.choice, kind)
        else:
            known["choice"] = CHOICES
        for option, allowed in known.items():
            if getattr(self, option) not in allowed:
                raise NeighborError(f"expected {option} in {allowed} for {kind}, got {getattr(self, option)!r}.")
        if not isinstance(self.exclude, str):
            raise NeighborError(
                f'expected exclude "self", "sequence", "document" or a label name for {kind}, got {self.exclude!r}.'
            )
        if not isinstance(self.position_0, bool):
            raise NeighborError(f"expected position_0 True or False for {kind}, got {self.position_0!r}.")
        if (whole_or_none(self.blocks) or 0) < 1:
            raise NeighborError(f"expected blocks of at least 1 for {kind}, got {self.blocks!r}.")
        if self.blocks > 1 and self.context in ("attn", "mlp"):
            raise NeighborError(f"expected blocks=1 with context {self.context!r} (half a block), got {self.blocks}.")
        if self.choice != "nearest" and self.needs & {"output_neighbors", "candidates"}:
            raise NeighborError(f'expected choice="nearest" for {kind}, which is about who the neighbors are, got {self.choice!r}.')


@dataclass(frozen=True, kw_only=True)
class CloudScore(CloudAnalyzer):
    """A `CloudAnalyzer` with the common options as fields, described at `Compression`. A subclass may give them other defaults."""

    k: Whole = 15
    context: Context = "patched"
    blocks: Whole = 1
    metric: Metric = "l2"
    exclude: str = "sequence"
    same_token: SameToken = "any"
    position_0: bool = False
    choice: Choice = "nearest"
    name: str | None = None


class TokenAnalyzer(Analyzer):
    """A measurement on the forward pass itself.

    `needs` may hold `"resid_pre"`, `"resid_post"`, `"pattern"`, `"logits"`, `"gradient"`, `"output_weight"` (W_O by head),
    `"passes"` (`batch.passes`: more passes of the model, for what one cannot tell), or any hook name below a block, such as
    `"mlp.hook_post"`.

    - `per_layer = False`: measured once, and holds for every layer.
    - `cumulative = True`: measured at every layer from 0 on, in order, whichever are asked for; `batch.memory` carries what it
      builds up.
    - `target`: what the gradient is of: `"future_loss"`, `"last_logit"` or a token id (see
      `basin_lens.capture.passes.target_values`; each different one costs a backward pass), or `"cache"` for the user's own backward
      pass; None without gradients.
    """

    per_layer: ClassVar[bool] = True
    cumulative: ClassVar[bool] = False
    target: Target | None = None

    @abstractmethod
    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Values by column name, `[batch, pos]`, or `[batch]` where `rows = "sequence"`; NaN where not defined."""

    def check(self) -> None:
        """Refuse options that make no sense, before any work."""

    def check_all(self) -> None:
        check_description(self)
        check_needs(self, None, "resid_pre, resid_post, pattern, logits, gradient, output_weight, passes, mlp.hook_post, ...")
        self.check()
        check_values(self, ("token", "sequence"), get_args(Role))
        for switch in ("per_layer", "cumulative"):
            check_one_of(self, switch, (True, False))
        target = declared(self, "target", "None: no gradients.")
        if target not in (None, "future_loss", "last_logit", "cache") and whole_or_none(target) is None:
            raise AnalyzerError(
                f'expected target of {type(self).__name__} as None, "future_loss", "last_logit", "cache" or a token id, got '
                f"{target!r}. None: no gradients."
            )


def total_variance(points: Float[Tensor, "*batch k d"]) -> Float[Tensor, "*batch"]:
    """Total population variance of k points: (1/k) * sum ||x - mean||^2."""
    return (points - points.mean(-2, keepdim=True)).square().sum(-1).mean(-1)


def own_spread(states: Float[Tensor, "points d"]) -> Float[Tensor, ""]:
    """Total variance of a layer's states, beside which a smaller one is rounding. Of equal states, what rounding makes of it."""
    rounding = torch.finfo(states.dtype).eps ** 2 * states.square().sum(-1).mean()
    return torch.maximum(total_variance(states), rounding / DEGENERATE)


def log_or_nan(value: Tensor, reference: float | Tensor) -> Tensor:
    """Natural logarithm; NaN where the value is rounding beside `reference`."""
    return torch.where(value > DEGENERATE * reference, value, torch.nan).log()


def log_variance_ratio(
    before: Float[Tensor, "*sets k d"], after: Float[Tensor, "*sets k d"], bank: Surroundings
) -> Float[Tensor, "*sets"]:
    """log(V_in / V_out) over the ordinary dimensions; NaN where either is rounding beside the bank's own variance."""
    sides = ((before, bank.before), (after, bank.after))
    first, second = (log_or_nan(total_variance(x[..., bank.ordinary]), own_spread(all_[:, bank.ordinary])) for x, all_ in sides)
    return first - second


def mean_and_mask(states: Float[Tensor, "points d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Mean state, and a mask that is 0 on massive dimensions: those whose variance is over 20 times the median dimension's."""
    variance = states.var(0, unbiased=False)
    return states.mean(0), (variance <= MASSIVE * variance.median()).to(states.dtype)


def random_directions(neighborhoods: Neighborhoods, count: int, seed: int) -> Float[Tensor, "q count d"]:
    """Standard normal vectors for each query, from the seed, the layer, and the query's token and position.

    From these alone, so that a query's vectors do not depend on which others are measured with it, nor on their order.
    """
    width = neighborhoods.query.shape[1]
    drawn = [
        np.random.default_rng([seed, neighborhoods.layer, token, pos]).standard_normal((count, width), dtype=np.float32)
        for token, pos in zip(neighborhoods.query_token.tolist(), neighborhoods.query_pos.tolist(), strict=True)
    ]
    return torch.from_numpy(np.stack(drawn)).to(neighborhoods.query)
