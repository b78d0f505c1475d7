"""What a merging policy is made of: a rule (who joins whom) and the options of the merger that carries it out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from basin_lens.errors import MergeError


@dataclass(frozen=True)
class Offer:
    """A token that is offered to the clusters before it, and what a rule may know of both.

    Attributes:
        place: position of the token in its sequence.
        number: how many tokens of the sequence were offered so far, this one counted.
        level: threshold, probability or share, as the rule says.
        score: of the token, for rules that choose by a score.
        clusters: how many clusters stand, in the order in which they were opened.
        seed: of rules that draw.
        similarity: computes the similarity of the token with each cluster; with the last one alone for rules that look at no other.
    """

    place: int
    number: int
    level: float
    score: float
    clusters: int
    seed: tuple[int, ...]
    similarity: Callable[[], Float[np.ndarray, " compared"]]


class Choice(NamedTuple):
    """What a rule decided: the number of the best cluster (-1: none), and whether the token joins it."""

    cluster: int
    joins: bool


@runtime_checkable
class Keys(Protocol):
    """A tensor of torch by what a rule does with it: the command line reads options from here, and must not wait for torch."""

    def double(self) -> "Keys": ...
    def norm(self, *, dim: int) -> "Keys": ...
    def mean(self, dim: int) -> "Keys": ...
    def cpu(self) -> "Keys": ...
    def numpy(self) -> np.ndarray: ...


class Decision:
    """Who joins whom: what every rule states. A rule decides token by token (`Rule`) or about a context at once (`ContextRule`).

    A rule has no state of its own. It states what has to be kept for it (`compares`, `last_only`, `needs_keys`), what its level is
    (`learned`, `scored`), and when it can run (`sees_future`). Memory, calibration, generation and checks of options follow from
    these.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    # Tokens are compared by descriptors, which have to be kept.
    compares: ClassVar[bool] = True
    # Only the cluster that was opened last is compared with, so that no other descriptor is kept.
    last_only: ClassVar[bool] = False
    # A token is compared with tokens, not with what became of them, so that a whole sequence can be compared at once.
    fixed: ClassVar[bool] = False
    # The similarity may be mixed with that of attention rows.
    takes_rows: ClassVar[bool] = False
    # The level is a cosine, a threshold that can be learned.
    learned: ClassVar[bool] = False
    # Tokens are chosen by a score: of the caller, or of the rule's own, made from the layer's keys (`KeyRule`).
    scored: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False
    # Tokens that would join can only be dropped: there is no cluster to read.
    drops: ClassVar[bool] = False
    # There is a level to set; without one, a merger needs neither a threshold nor a target.
    has_level: ClassVar[bool] = True
    # The level says which tokens join, so that a target is met to the token; otherwise it is met on average.
    exact: ClassVar[bool] = True
    # Decides about a whole context at once, and so has a place in that protocol only.
    sees_future: ClassVar[bool] = False

    def level_at(self, strictness: float, floor: float, scores: Float[np.ndarray, " offered"] | None, /) -> float:
        """The level at a strictness from 0 (most tokens join) to 1 (fewest), by which calibration searches.

        Args:
            strictness: see above.
            floor: lowest threshold.
            scores: of the tokens that are offered, if tokens are chosen by a score.
        """
        if scores is not None:
            return float(np.quantile(scores, strictness)) if len(scores) else 0.0
        return floor + (1 - floor) * strictness

    def level_for(self, _wanted: int, _offered: int, _sequences: int, /) -> float | None:
        """The level at which so many of the tokens join that so many sequences offer; None: it has to be searched."""
        return None


class Rule(Decision, ABC):
    """A rule that decides about one token after another. `join` decides; what it may know of the token is in the `Offer`."""

    def decide(self, offer: Offer, /) -> Choice:
        """The rule's choice, where there is one: without clusters, and at a threshold of 1, nothing joins."""
        # A cosine of 1 may come out a hair above it.
        if not offer.clusters or (offer.level >= 1 and self.learned):
            return Choice(offer.clusters - 1, False)
        return self.join(offer)

    @abstractmethod
    def join(self, offer: Offer) -> Choice:
        """The choice among one cluster or more."""


class KeyRule(Rule):
    """A rule that chooses by a score of its own, made from the layer's keys."""

    scored = True
    needs_keys = True

    @abstractmethod
    def key_scores(self, keys: Keys) -> Float[np.ndarray, "batch pos"]:
        """A score of each token, from keys `[batch, pos, key/value head, d_head]`."""


class ContextRule(Decision, ABC):
    """A rule that decides about a whole context at once."""

    sees_future = True

    @abstractmethod
    def pair(
        self, similarity: Float[np.ndarray, "proposing staying"], places: Int[np.ndarray, " tokens"], level: float
    ) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        """Leader's place and whether it joins, for each token of a context."""


@dataclass(frozen=True)
class Budget:
    """What a policy is given to spend, and where.

    Attributes:
        share: of the full cache, to be left.
        n_merged: layers that merge.
        n_layers: all layers.
        row_bytes: a key and a value of one token in one layer.
        length: tokens of the sequences that the budget is meant for.
        projection: numbers that tokens are compared by.
        recent: tokens that stay raw.
        seed: of policies that draw.
    """

    share: float
    n_merged: int
    n_layers: int
    row_bytes: int
    length: int
    projection: int
    recent: int
    seed: int


@dataclass(frozen=True)
class Policy:
    """A way to spend a budget, as comparisons name it.

    Attributes:
        name: in tables.
        description: in one line.
        rule: who joins whom.
        options: of the `TokenMerger` that carries it out, besides the rule and what follows from the budget.
        trained: carried out by a merger that the caller trained.
        seeded: draws, so that several seeds are tried.
        blind: does not depend on the text, so that it can be given the bytes that another policy left on it.
        turn: in a comparison, those of a lower number come first.
        compared: can be compared in the streaming protocol: it needs nothing that a comparison does not give.
    """

    name: str
    description: str
    rule: Decision
    options: Mapping[str, object] = field(default_factory=dict)
    trained: bool = False
    seeded: bool = False
    blind: bool = False
    turn: int = 2
    compared: bool = True

    @property
    def calibrated(self) -> bool:
        """Whether its levels are set on calibration texts; else its options say all."""
        return not self.trained and self.rule.has_level

    def options_for(self, budget: Budget) -> dict[str, object]:
        """Options of a `TokenMerger`."""
        common = {"recent": budget.recent, "target_bytes": budget.share, "seed": budget.seed}
        found: dict[str, object] = {"rule": self.rule.name, **common, **self.options}
        if self.rule.compares:
            # No floor: it is there for training, and would put budgets out of a baseline's reach.
            found |= {"projection": budget.projection, "floor": -1.0}
        return found

    def __post_init__(self) -> None:
        if not self.name or not self.description:
            raise MergeError(f"expected a policy with a name and a description, got {self.name!r} and {self.description!r}.")
