"""Which token joins which cluster: decided once per token, from what came before it, never revised."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RULES = {
    "cosine": "the most similar cluster, if the similarity reaches the level",
    "adjacent": "the cluster that was opened last, if the similarity reaches the level",
    "random": "any cluster, with the level as probability",
    "stride": "the cluster that was opened last, but for a fixed share of tokens: 1 - level, evenly spaced",
    "score": "the most similar cluster, if the token's score is above the level",
    "all": "every token that leaves the recent window (to be dropped: first tokens plus recent window)",
    "bipartite": "token merging of vision models: every other token of a context may join one of the rest; needs the whole context",
}


class Clusters:
    """The clusters of one sequence in one layer, as they stand after the tokens offered so far.

    One step for both ways of running: training offers all tokens of a sequence in turn, generation one at each step, and both get the
    same answers. A cluster is compared through its representative's descriptor, kept in float16, by which alone it is known.

    Args:
        rule: one of `RULES`, but for "bipartite".
        width: numbers per descriptor.
        room: clusters to set memory aside for, also for what makes comparing fast; 0: only what is needed is held, grown one by one.
        mean: the representative is the running mean of the members, not the first of them.
        seed: of the rule "random"; the draw depends on the token's place only, not on what else is in the batch.
    """

    def __init__(self, rule: str, width: int, *, room: int = 0, mean: bool = False, seed: tuple[int, ...] = (0,)) -> None:
        self.rule, self.mean, self.seed = rule, mean, seed
        self.count, self.offered = 0, 0
        # The rule "adjacent" compares with the last cluster only, so it keeps no other's descriptor.
        self.descriptors = np.zeros((min(room, 1) if rule == "adjacent" else room, width), np.float16)
        self._units = np.zeros(self.descriptors.shape) if room else None
        self.leaders = np.zeros(room, np.int32)
        self.sizes = np.zeros(room, np.int32)

    @property
    def nbytes(self) -> int:
        """Memory that has to be kept to go on: descriptors, leaders' places and sizes, in bytes."""
        return self._compared * self.descriptors.shape[1] * 2 + self.count * 8

    def offer(
        self, place: int, descriptor: Float[np.ndarray, " width"], level: float, *, score: float = 0.0,
        likeness: Float[np.ndarray, " clusters"] | None = None, weight: float = 0.0,
    ) -> tuple[int, bool]:  # fmt: skip
        """Let the token at `place` join a cluster, or open one.

        Args:
            place: its position in the sequence.
            descriptor: float16.
            level: threshold, probability or share, as the rule says.
            score: of the token, for the rule "score".
            likeness: similarity of its attention row with each leader's, -1 to 1.
            weight: share of `likeness` in the similarity.

        Returns:
            leader's place of the cluster that it would join best (-1: there is none), and whether it joined.
        """
        self.offered += 1
        unit = _unit(descriptor)
        best, joins = self._best(place, unit, level, score, likeness, weight)
        if joins and best < 0:
            return -1, True
        if joins:
            self.sizes[best] += 1
            if self.mean:
                held = self.descriptors[self._row(best)].astype(float)
                self._put(best, held + (descriptor.astype(float) - held) / self.sizes[best])
            return int(self.leaders[best]), True
        leader = int(self.leaders[best]) if best >= 0 else -1
        self.open(place, descriptor)
        return leader, False

    def open(self, place: int, descriptor: Float[np.ndarray, " width"]) -> None:
        """A cluster of one token."""
        if self.count == len(self.sizes):
            # By one only: what generation holds is what it needs.
            for name in ("descriptors", "_units", "leaders", "sizes"):
                held = getattr(self, name)
                if held is None or (self.rule == "adjacent" and held.ndim == 2 and len(held)):
                    continue
                setattr(self, name, np.concatenate([held, np.zeros((1, *held.shape[1:]), held.dtype)]))
        self.leaders[self.count], self.sizes[self.count] = place, 1
        self._put(self.count, descriptor)
        self.count += 1

    def _put(self, index: int, descriptor: Float[np.ndarray, " width"]) -> None:
        row = self._row(index)
        self.descriptors[row] = descriptor
        if self._units is not None:
            self._units[row] = _unit(self.descriptors[row])

    @property
    def _compared(self) -> int:
        return min(self.count, 1) if self.rule == "adjacent" else self.count

    def _row(self, index: int) -> int:
        return 0 if self.rule == "adjacent" else index

    def _known(self) -> Float[np.ndarray, "clusters width"]:
        return _unit(self.descriptors[: self._compared]) if self._units is None else self._units[: self._compared]

    def _best(
        self, place: int, unit: Float[np.ndarray, " width"], level: float, score: float,
        likeness: Float[np.ndarray, " clusters"] | None, weight: float,
    ) -> tuple[int, bool]:  # fmt: skip
        n = self.count
        if self.rule == "all":
            return -1, True
        if not n or (level >= 1 and self.rule in {"cosine", "adjacent"}):
            return n - 1, False  # a cosine of 1 may come out a hair above it
        if self.rule == "stride":
            kept = math.floor(self.offered * (1 - level)) > math.floor((self.offered - 1) * (1 - level))
            return n - 1, not kept
        if self.rule == "random":
            draw = np.random.default_rng((*self.seed, place))
            return int(draw.integers(n)), bool(draw.random() < level)
        if self.rule == "adjacent":
            return n - 1, bool(self._known()[0] @ unit >= level)
        similarity = self._known() @ unit
        if likeness is not None:
            similarity = (1 - weight) * similarity + weight * likeness
        best = int(similarity.argmax())
        return best, bool(score > level) if self.rule == "score" else bool(similarity[best] >= level)


def _unit(descriptors: Float[np.ndarray, "*rows width"]) -> Float[np.ndarray, "*rows width"]:
    wide = descriptors.astype(float)
    return wide / np.maximum(np.sqrt(np.einsum("...i,...i->...", wide, wide)), 1e-12)[..., None]


@dataclass(frozen=True)
class Assigned:
    """What was decided about each token of a batch, in one layer.

    `leader`: place of the leader of the cluster that it would join best, -1 if there was none to join or nothing was decided.
    `joined`: whether it did. `since`: the first query that reads it through its cluster; beyond the last one if undecided.
    """

    leader: Int[Tensor, "batch pos"]
    joined: Bool[Tensor, "batch pos"]
    since: Int[Tensor, "batch pos"]


def assign(
    descriptors: Float[np.ndarray, "batch pos width"],
    levels: Float[np.ndarray, "batch pos"],
    eligible: Bool[np.ndarray, "batch pos"],
    *,
    rule: str,
    recent: int,
    context: int | None = None,
    mean: bool = False,
    seed: tuple[int, ...] = (0,),
    scores: Float[np.ndarray, "batch pos"] | None = None,
    pattern: Float[np.ndarray, "batch head query key"] | None = None,
    weight: float = 0.0,
    drop: bool = False,
) -> Assigned:
    """Offer every token to the clusters before it, sequence by sequence.

    A token is offered when `recent` more have come after it; with `context`, all tokens before that place are offered at that place, and
    none after it. Tokens that are not eligible, and position 0, stay as they are and belong to no cluster.

    Args:
        descriptors: float16.
        levels: threshold of each token, or whatever the rule calls its level.
        eligible: which tokens may be offered.
        rule: one of `RULES`.
        recent: length of the window that stays raw; 0 (a token is offered as soon as it comes) for `simulate` only.
        context: see above; None for the streaming protocol.
        mean: see `Clusters`.
        seed: of the rule "random".
        scores: of the tokens, for the rule "score".
        pattern: attention of the plain layer; needed if `weight` is above 0.
        weight: share of the attention rows in the similarity.
        drop: what joins is forgotten instead of read through its cluster.
    """
    batch, length = eligible.shape
    leader, since = np.full((batch, length), -1), np.full((batch, length), length)
    joined = np.zeros((batch, length), bool)
    last = length - recent if context is None else min(context, length)
    for row in range(batch):
        places = 1 + np.flatnonzero(eligible[row, 1 : max(1, last)])
        since[row, places] = places + recent if context is None else context
        if rule == "bipartite":
            leader[row, places], joined[row, places] = _bipartite(descriptors[row, places], places, levels[row, places])
            continue
        clusters = Clusters(rule, descriptors.shape[2], room=len(places), mean=mean, seed=seed)
        rows = _Rows(pattern[row], drop) if pattern is not None and weight else None
        for place in places.tolist():
            likeness = None if rows is None else rows.likeness(place, int(since[row, place]), clusters)
            found, joins = clusters.offer(
                place, descriptors[row, place], float(levels[row, place]), likeness=likeness, weight=weight,
                score=0.0 if scores is None else float(scores[row, place]),
            )  # fmt: skip
            leader[row, place], joined[row, place] = found, joins
            if rows is not None and joins:
                rows.join(place, found)
    return Assigned(*(torch.from_numpy(array) for array in (leader, joined, since)))


class _Rows:
    """Attention rows of one sequence as they were read: a row is made with the clusters that stood at its own time."""

    def __init__(self, pattern: Float[np.ndarray, "head query key"], drop: bool) -> None:
        self.pattern, self.drop = pattern, drop
        self.weights = np.ones(pattern.shape[1])
        self.rows = np.zeros(pattern.shape[1:], np.float32)
        self.made = 0

    def likeness(self, place: int, now: int, clusters: Clusters) -> Float[np.ndarray, " clusters"]:
        """Cosine of the token's row with each leader's, over the places that both could see."""
        while self.made < now:
            self.rows[self.made] = row_read(self.pattern[:, self.made], self.weights)
            self.made += 1
        return row_likeness(self.rows[place], self.rows[clusters.leaders[: clusters.count]], clusters.leaders[: clusters.count])

    def join(self, place: int, leader: int) -> None:
        self.weights[place] = 0
        if not self.drop:
            self.weights[leader] += 1


def row_read(pattern: Float[np.ndarray, "head key"], weights: Float[np.ndarray, " key"]) -> Float[np.ndarray, " key"]:
    """Mean over heads of what a query reads, a cluster's share at its leader's place."""
    read = pattern * weights
    return (read / read.sum(1, keepdims=True)).mean(0)


def row_likeness(
    row: Float[np.ndarray, " pos"], others: Float[np.ndarray, "clusters pos"], leaders: Int[np.ndarray, " clusters"]
) -> Float[np.ndarray, " clusters"]:
    """Cosine of an attention row with earlier ones, each over the places up to that one's own."""
    row, others = row.astype(float), others.astype(float)
    norms = np.sqrt(np.cumsum(row * row)[leaders]) * np.sqrt((others * others).sum(1))
    return (others @ row) / np.maximum(norms, 1e-12)


def _bipartite(
    descriptors: Float[np.ndarray, "tokens width"], places: Int[np.ndarray, " tokens"], levels: Float[np.ndarray, " tokens"]
) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """Bolya et al. 2023, "Token merging": every other token proposes its most similar one of the rest; the best proposals are taken."""
    leader, joined = np.full(len(places), -1), np.zeros(len(places), bool)
    if len(places) < 2:
        return leader, joined
    units = _unit(descriptors)
    similarity = units[1::2] @ units[::2].T
    leader[1::2] = places[::2][similarity.argmax(1)]
    taken = round(float(levels[0]) * len(places))
    joined[1 + 2 * np.argsort(-similarity.max(1), kind="stable")[:taken]] = True
    return leader, joined
