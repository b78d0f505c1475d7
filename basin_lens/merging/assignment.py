"""Which token joins which cluster: decided once per token, from what came before it, never revised."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.errors import MergeError
from basin_lens.merging.policies import ContextRule, Decision, Offer, Rule, rule_named
from basin_lens.merging.similarity import cosines, row_likeness, row_read


class Clusters:
    """The clusters of one sequence in one layer, as they stand after the tokens offered so far.

    Training offers all tokens of a sequence in turn, generation one at each step, and both get the same answers. A cluster is
    compared through its representative's descriptor, kept in float16, by which alone it is known.

    Args:
        rule: name of a rule that does not see the future: see `RULES`.
        width: numbers per descriptor.
        room: clusters to set memory aside for, also for what makes comparing fast; 0: only what is needed is held, grown one by
            one.
        mean: the representative is the running mean of the members, not the first of them.
        seed: of the rule "random"; the draw depends on the token's place only, not on what else is in the batch.

    Raises:
        MergeError: a rule that sees the future, or none of that name.
    """

    def __init__(self, rule: str, width: int, *, room: int = 0, mean: bool = False, seed: tuple[int, ...] = (0,)) -> None:
        by = rule_named(rule)
        if not isinstance(by, Rule):
            raise MergeError(f"expected a rule that decides token by token, got {rule!r}, which needs a whole context.")
        self.rule, self.mean, self.seed = by, mean, seed
        self.count, self.offered = 0, 0
        self.descriptors = np.zeros((min(room, 1) if self.rule.last_only else room, width), np.float16)
        self._wide = np.zeros(self.descriptors.shape) if room else None
        self.leaders = np.zeros(room, np.int32)
        self.sizes = np.zeros(room, np.int32)

    @property
    def nbytes(self) -> int:
        """Memory that has to be kept to go on: descriptors, leaders' places and sizes, in bytes."""
        return self._compared * self.descriptors.shape[1] * 2 + self.count * 8

    def offer(
        self,
        place: int,
        descriptor: Float[np.ndarray, " width"],
        level: float,
        *,
        score: float = 0.0,
        likeness: Float[np.ndarray, " clusters"] | None = None,
        weight: float = 0.0,
    ) -> tuple[int, bool]:
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
        similarity = partial(self._similarity, descriptor, likeness, weight)
        best, joins = self.rule.decide(Offer(place, self.offered, level, score, self.count, self.seed, similarity))
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
                if held is None or (self.rule.last_only and held.ndim == 2 and len(held)):
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
        return min(self.count, 1) if self.rule.last_only else self.count

    def _row(self, index: int) -> int:
        return 0 if self.rule.last_only else index

    def _similarity(
        self, descriptor: Float[np.ndarray, " width"], likeness: Float[np.ndarray, " clusters"] | None, weight: float
    ) -> Float[np.ndarray, " compared"]:
        known = (self.descriptors if self._wide is None else self._wide)[: self._compared]
        found = cosines(descriptor[None], known)[0]
        return found if likeness is None else (1 - weight) * found + weight * likeness


@dataclass(frozen=True)
class Assigned:
    """What was decided about each token of a batch, in one layer.

    `leader`: place of the leader of the cluster that it would join best, -1 if there was none to join or nothing was decided.
    `joined`: whether it did. `since`: the first query that reads it through its cluster; beyond the last one if undecided.
    """

    leader: Int[Tensor, "batch pos"]
    joined: Bool[Tensor, "batch pos"]
    since: Int[Tensor, "batch pos"]


class Asked(TypedDict):
    """What `assign` is given besides descriptors, levels and what may be offered; see there."""

    rule: str
    recent: int
    context: int | None
    mean: bool
    seed: tuple[int, ...]
    scores: Float[np.ndarray, "batch pos"] | None
    pattern: Float[np.ndarray, "batch head query key"] | None
    weight: float
    drop: bool


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

    A token is offered when `recent` more have come after it; with `context`, all tokens before that place are offered at that
    place, and none after it. Tokens that are not eligible, and position 0, stay as they are and belong to no cluster.

    Args:
        descriptors: float16.
        levels: threshold of each token, or whatever the rule calls its level.
        eligible: which tokens may be offered.
        rule: name of one of `RULES`.
        recent: length of the window that stays raw; 0 (a token is offered as soon as it comes) for `simulate` only.
        context: see above; None for the streaming protocol.
        mean: see `Clusters`.
        seed: of rules that draw.
        scores: of the tokens, for rules that choose by a score.
        pattern: attention of the plain layer; needed if `weight` is above 0.
        weight: share of the attention rows in the similarity.
        drop: what joins is forgotten instead of read through its cluster.
        similarity: `cosines` of each sequence's descriptors with themselves, if they are known.
    """
    batch, length = eligible.shape
    leader, since = np.full((batch, length), -1), np.full((batch, length), length)
    joined = np.zeros((batch, length), bool)
    by = rule_named(rule)
    last = length - recent if context is None else min(context, length)
    for row in range(batch):
        places = 1 + np.flatnonzero(eligible[row, 1 : max(1, last)])
        since[row, places] = places + recent if context is None else context
        own, limits = descriptors[row, places], levels[row, places]
        own_scores = None if scores is None else scores[row, places]
        if isinstance(by, ContextRule):
            level = float(limits[0]) if len(places) else 0.0
            leader[row, places], joined[row, places] = by.pair(cosines(own[1::2], own[::2]), places, level)
        elif by.fixed and not mean and not (pattern is not None and weight):
            known = cosines(own, own) if similarity is None else similarity[row][np.ix_(places, places)]
            first, joined[row, places] = _at_once(by, known, limits, own_scores)
            leader[row, places] = np.where(first < 0, -1, places[first])
        else:
            clusters = Clusters(rule, descriptors.shape[2], room=len(places), mean=mean, seed=seed)
            rows = _Rows(pattern[row], drop) if pattern is not None and weight else None
            made = _in_turn(clusters, places, own, limits, own_scores, rows, since[row], weight)
            leader[row, places], joined[row, places] = made
    return Assigned(*(torch.from_numpy(array) for array in (leader, joined, since)))


def _in_turn(
    clusters: Clusters,
    places: Int[np.ndarray, " tokens"],
    descriptors: Float[np.ndarray, "tokens width"],
    levels: Float[np.ndarray, " tokens"],
    scores: Float[np.ndarray, " tokens"] | None,
    rows: "_Rows | None",
    since: Int[np.ndarray, " pos"],
    weight: float,
) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """One token of a sequence after another: leader's place, and whether it joined."""
    leader, joined = np.full(len(places), -1), np.zeros(len(places), bool)
    for number, place in enumerate(places.tolist()):
        likeness = None if rows is None else rows.likeness(place, int(since[place]), clusters)
        score = 0.0 if scores is None else float(scores[number])
        best, joins = clusters.offer(
            place, descriptors[number], float(levels[number]), score=score, likeness=likeness, weight=weight
        )
        leader[number], joined[number] = best, joins
        if rows is not None and joins:
            rows.join(place, best)
    return leader, joined


def _at_once(
    rule: Decision,
    known: Float[np.ndarray, "tokens tokens"],
    levels: Float[np.ndarray, " tokens"],
    scores: Float[np.ndarray, " tokens"] | None,
) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """`Clusters.offer` for all tokens of a sequence, whose leaders never change: a leader tells all that come after it how near it
    is.

    That is a step of numpy for each cluster, not one for each token and all clusters before it.
    """
    count = len(levels)
    leader, joined = np.full(count, -1), np.zeros(count, bool)
    nearest = np.full(count, -np.inf)
    last, limits = -1, levels.tolist()
    for place in range(count):
        if last >= 0:
            if rule.scored:
                joined[place] = (0.0 if scores is None else scores[place]) > limits[place]
            elif limits[place] >= 1:
                leader[place] = last
            elif rule.last_only:
                leader[place], joined[place] = last, known[place, last] >= limits[place]
            else:
                joined[place] = nearest[place] >= limits[place]
        if not joined[place]:
            last = place
            if not rule.last_only:
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
