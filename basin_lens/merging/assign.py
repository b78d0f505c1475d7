"""Which token joins which cluster: decided once per token, from what came before it, never revised."""

import math
from collections.abc import Sequence
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

# Where a token is compared with tokens, not with what became of them, so that all can be compared at once.
FIXED = ("cosine", "adjacent", "score")


class Clusters:
    """The clusters of one sequence in one layer, as they stand after the tokens offered so far.

    Training offers all tokens of a sequence in turn, generation one at each step, and both get the same answers. A cluster is compared
    through its representative's descriptor, kept in float16, by which alone it is known.

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
        self._wide = np.zeros(self.descriptors.shape) if room else None
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
        best, joins = self._best(place, descriptor, level, score, likeness, weight)
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
            for name in ("descriptors", "_wide", "leaders", "sizes"):
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
        if self._wide is not None:
            self._wide[row] = self.descriptors[row]

    @property
    def _compared(self) -> int:
        return min(self.count, 1) if self.rule == "adjacent" else self.count

    def _row(self, index: int) -> int:
        return 0 if self.rule == "adjacent" else index

    def _cosines(self, descriptor: Float[np.ndarray, " width"]) -> Float[np.ndarray, " clusters"]:
        known = (self.descriptors if self._wide is None else self._wide)[: self._compared]
        return cosines(descriptor[None], known)[0]

    def _best(
        self, place: int, descriptor: Float[np.ndarray, " width"], level: float, score: float,
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
            return n - 1, bool(self._cosines(descriptor)[0] >= level)
        similarity = self._cosines(descriptor)
        if likeness is not None:
            similarity = (1 - weight) * similarity + weight * likeness
        best = int(similarity.argmax())
        return best, bool(score > level) if self.rule == "score" else bool(similarity[best] >= level)


def cosines(some: Float[np.ndarray, "n width"], others: Float[np.ndarray, "m width"]) -> Float[np.ndarray, "n m"]:
    """Cosine of float16 descriptors, the same to the last bit one by one as all at once.

    Numbers of float16 are multiples of 2^-24, so their products are multiples of 2^-48, and in float64 a sum of them is exact, in whatever
    order, while it stays below 32: descriptors are no longer than 1. A descriptor of length 0 has no direction: its cosine is 0 with every other,
    so that at a level above 0 it joins no cluster, and none joins it.
    """
    # By torch: a second pool of threads, numpy's, would stand in the way of the model's.
    one, two = (torch.from_numpy(np.asarray(rows, float)) for rows in (some, others))
    norms = [(rows * rows).sum(1).sqrt() for rows in (one, two)]
    return ((one @ two.T) / (norms[0][:, None] * norms[1]).clamp(min=1e-12)).numpy()


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
    similarity: Sequence[Float[np.ndarray, "pos pos"]] | None = None,
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
        similarity: `cosines` of each sequence's descriptors with themselves, if they are known.
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
        if rule in FIXED and not mean and not (pattern is not None and weight):
            known = (
                cosines(descriptors[row, places], descriptors[row, places])
                if similarity is None
                else similarity[row][np.ix_(places, places)]
            )
            found, joined[row, places] = _led(rule, known, levels[row, places], None if scores is None else scores[row, places])
            leader[row, places] = np.where(found < 0, -1, places[found])
            continue
        clusters = Clusters(rule, descriptors.shape[2], room=len(places), mean=mean, seed=seed)
        rows = _Rows(pattern[row], drop) if pattern is not None and weight else None
        for place in places.tolist():
            likeness = None if rows is None else rows.likeness(place, int(since[row, place]), clusters)
            best, joins = clusters.offer(
                place, descriptors[row, place], float(levels[row, place]), likeness=likeness, weight=weight,
                score=0.0 if scores is None else float(scores[row, place]),
            )  # fmt: skip
            leader[row, place], joined[row, place] = best, joins
            if rows is not None and joins:
                rows.join(place, best)
    return Assigned(*(torch.from_numpy(array) for array in (leader, joined, since)))


def _led(
    rule: str, known: Float[np.ndarray, "tokens tokens"], levels: Float[np.ndarray, " tokens"], scores: Float[np.ndarray, " tokens"] | None
) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:  # fmt: skip
    """`Clusters.offer` for all tokens of a sequence, whose leaders never change: a leader tells all that come after it how near it is.

    That is a step of numpy for each cluster, not one for each token and all clusters before it.
    """
    count = len(levels)
    leader, joined = np.full(count, -1), np.zeros(count, bool)
    nearest = np.full(count, -np.inf)
    last, limits = -1, levels.tolist()
    for place in range(count):
        if last >= 0:
            if limits[place] >= 1 and rule != "score":
                leader[place] = last
            elif rule == "adjacent":
                leader[place], joined[place] = last, known[place, last] >= limits[place]
            elif rule == "score":
                joined[place] = (0.0 if scores is None else scores[place]) > limits[place]
            else:
                joined[place] = nearest[place] >= limits[place]
        if not joined[place]:
            last = place
            if rule != "adjacent":
                nearer = place + 1 + np.flatnonzero(known[place, place + 1 :] > nearest[place + 1 :])
                nearest[nearer] = known[place, nearer]
                leader[nearer] = place
    return leader, joined


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
    similarity = cosines(descriptors[1::2], descriptors[::2])
    leader[1::2] = places[::2][similarity.argmax(1)]
    taken = round(float(levels[0]) * len(places))
    joined[1 + 2 * np.argsort(-similarity.max(1), kind="stable")[:taken]] = True
    return leader, joined
