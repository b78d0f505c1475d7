"""What is searched and what is found: `Points`, `Neighbors`, and the keys that tell duplicates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Metric = Literal["l2", "cosine"]
SameToken = Literal["any", "only", "exclude"]
Backend = Literal["auto", "torch", "faiss", "approximate"]


_NO_LENGTH = 1e-18  # of a state: below, the square is no normal float32, and its direction is lost


def has_direction(states: Float[Tensor, "rows d"]) -> Bool[Tensor, " rows"]:
    """Whether a state has a direction; a zero state has none, and so no cosine with any other."""
    return states.norm(dim=1) > _NO_LENGTH


@dataclass(frozen=True)
class Points:
    """States at one layer, with what the exclusion rules need to know about each row.

    `key`: rows with equal keys have equal states by construction (equal token prefixes in a causal model), and so equal tokens.
    `group`: rows of the query's own group are never its neighbors (sequence, document or label); -1: of no group.
    `pool`: rows that may be neighbors.
    """

    states: Float[Tensor, "rows d"]
    key: Int[Tensor, " rows"]
    token: Int[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    pool: Bool[Tensor, " rows"]

    def some(self, at: Int[Tensor, " some"]) -> "Points":
        """These rows only."""
        return Points(self.states[at], self.key[at], self.token[at], self.group[at], self.pool[at])

    def under(self, metric: Metric) -> "Points":
        """The same, with those out of the pool that have no distance to others under the metric: with cosine, of length 0."""
        return Points(self.states, self.key, self.token, self.group, self.pool & self.defined(metric))

    def defined(self, metric: Metric) -> Bool[Tensor, " rows"]:
        """Which rows have distances under the metric."""
        return has_direction(self.states) if metric == "cosine" else torch.ones_like(self.pool)


@dataclass(frozen=True)
class Neighbors:
    """The k nearest rows of each query, nearest first, ties to the lower row; -1 and NaN where there are fewer.

    `distances` are Euclidean, recomputed from exact differences; with the cosine metric, 1 - cosine, which a state of length 0 has
    with no other: it has no neighbors and is nobody's.
    `recall`: None from an exact search. From the approximate one: the share of the exact k nearest that it found, measured in this
    run on a sample of the queries (NaN if they have no neighbors).
    """

    rows: Int[Tensor, "queries k"]
    distances: Float[Tensor, "queries k"]
    recall: float | None = None

    @property
    def complete(self) -> Bool[Tensor, " queries"]:
        """Whether all k were found."""
        return self.rows[:, -1] >= 0

    def first(self, k: int) -> "Neighbors":
        """The k nearest of these. `recall` stays that of the search."""
        return Neighbors(self.rows[:, :k], self.distances[:, :k], self.recall)


def prefix_keys(*captures: Sequence[Sequence[int]]) -> list[Int[Tensor, " rows"]]:
    """One id per token prefix, shared by all captures: equal ids exactly where the tokens up to and with a row are equal.

    Args:
        captures: each a list of token sequences, flattened row by row in the answer.
    """
    known: dict[tuple[int, int], int] = {}
    answers = []
    for sequences in captures:
        keys = []
        for tokens in sequences:
            parent = -1
            for token in tokens:
                parent = known.setdefault((parent, int(token)), len(known))
                keys.append(parent)
        answers.append(torch.tensor(keys, dtype=torch.int64, device="cpu"))
    return answers
