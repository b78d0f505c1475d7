"""Points -> their nearest distinct neighbors, exactly, in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.errors import NeighborError

Metric = Literal["l2", "cosine"]
SameToken = Literal["any", "only", "exclude"]

_CHUNK_VALUES = 1 << 24  # distances held at once: 64 MiB in float32


@dataclass(frozen=True)
class Points:
    """States at one layer, with what the exclusion rules need to know about each row.

    `key`: rows with equal keys have equal states by construction (equal token prefixes in a causal model).
    `group`: rows of the query's own group are never its neighbors (sequence, document or label); -1: of no group.
    `pool`: rows that may be neighbors.
    """

    states: Float[Tensor, "rows d"]
    key: Int[Tensor, " rows"]
    token: Int[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    pool: Bool[Tensor, " rows"]


@dataclass(frozen=True)
class Neighbors:
    """The k nearest rows of each query, nearest first, ties to the lower row; -1 and NaN where there are fewer.

    `distances` are Euclidean, recomputed from exact differences; with the cosine metric, 1 - cosine.
    """

    rows: Int[Tensor, "queries k"]
    distances: Float[Tensor, "queries k"]

    @property
    def complete(self) -> Bool[Tensor, " queries"]:
        """Whether all k were found."""
        return self.rows[:, -1] >= 0

    def first(self, k: int) -> "Neighbors":
        """The k nearest of these."""
        return Neighbors(self.rows[:, :k], self.distances[:, :k])


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
        answers.append(torch.tensor(keys, dtype=torch.int64))
    return answers


def find(
    queries: Points,
    bank: Points,
    k: int,
    *,
    metric: Metric = "l2",
    same_token: SameToken = "any",
    distinct: bool = True,
) -> Neighbors:
    """The k nearest neighbors in the bank of each query, exactly.

    A row of the bank is eligible if it is in the bank's pool, of another group than the query's, and, with `distinct`, of
    another key than the query's and than every nearer neighbor's.

    Args:
        queries: the points to find neighbors of (their `pool` is not read).
        bank: where neighbors are looked for.
        k: how many.
        metric: Euclidean distance, or 1 - cosine.
        same_token: whether neighbors may, must, or must not have the query's token id.
        distinct: False only for scores that count duplicates and the query itself (`SeedCompression`).

    Raises:
        NeighborError: k below 1, or above the number of points in the bank.
    """
    eligible = int(bank.pool.sum())
    if k < 1 or k > eligible:
        raise NeighborError(
            f"expected k between 1 and the bank's {eligible} points (position 0 left out), got {k}. "
            'Lower k, add texts, or pass bank="reference".'
        )
    kept = _representatives(bank) if distinct else torch.nonzero(bank.pool).squeeze(1)
    near, far = _prepare(bank.states[kept], metric), _prepare(queries.states, metric)
    # Centered, the matrix-product distance loses the fewest digits. The median, because a massive state would move the mean away.
    center = near[:: max(1, len(near) // 1024)].median(0).values
    chunk = max(1, min(len(far), _CHUNK_VALUES // max(1, len(near))))
    parts = []
    for first in range(0, len(far), chunk):
        part = slice(first, first + chunk)
        excluded = queries.group[part, None] == bank.group[None, kept]
        excluded &= queries.group[part, None] >= 0
        if distinct:
            excluded |= queries.key[part, None] == bank.key[None, kept]
        if same_token != "any":
            same = queries.token[part, None] == bank.token[None, kept]
            excluded |= ~same if same_token == "only" else same
        parts.append(_search(far[part], near, center, bank.key[kept], excluded, k, distinct))
    if not parts:
        return Neighbors(torch.empty(0, k, dtype=torch.int64, device=near.device), near.new_empty(0, k))
    rows = torch.cat([rows for rows, _ in parts])
    distances = torch.cat([distance for _, distance in parts])
    rows = torch.where(rows >= 0, kept[rows.clamp_min(0)], rows)
    return Neighbors(rows, distances.square() / 2 if metric == "cosine" else distances)


def _representatives(bank: Points) -> Int[Tensor, " kept"]:
    """Rows of the pool that can ever be chosen: per key, the first one and the first one of another group.

    A query shuts out one group only, so one of the two is always left, and equal keys mean equal states. This keeps the
    over-fetch small where thousands of rows share a state (the layer of bare embeddings).
    """
    pool = torch.nonzero(bank.pool).squeeze(1)
    order = pool[torch.argsort(bank.key[pool], stable=True)]
    key, group = bank.key[order], bank.group[order]
    leads = torch.ones_like(key, dtype=torch.bool)
    leads[1:] = key[1:] != key[:-1]
    lead_index = torch.cummax(torch.where(leads, torch.arange(len(key), device=key.device), 0), 0).values
    other = group != group[lead_index]
    # The first of another group: no earlier row of the same key is of another group than the lead.
    count = other.long().cumsum(0)
    before_key = (count - other.long())[lead_index]
    second = other & (count - before_key == 1)
    return order[leads | second].sort().values


def _prepare(states: Tensor, metric: Metric) -> Tensor:
    return torch.nn.functional.normalize(states, dim=1) if metric == "cosine" else states


def _search(
    queries: Tensor, points: Tensor, center: Tensor, keys: Tensor, excluded: Tensor, k: int, distinct: bool
) -> tuple[Tensor, Tensor]:
    """Candidates by matrix product, re-ranked by exact differences, refetched until the answer is certain."""
    rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=points.device)
    distances = torch.full((len(queries), k), torch.nan, device=points.device)
    far, near = queries - center, points - center
    # The product form errs by about eps * (|q|^2 + |b|^2). Taking that off, with room to spare, leaves a lower bound of the true
    # squared distance: a row whose bound is above the k-th exact distance cannot be a neighbor.
    shrink = 1 - 64 * torch.finfo(points.dtype).eps
    bound = shrink * (far.square().sum(1)[:, None] + near.square().sum(1)[None]) - 2 * far @ near.T
    bound.masked_fill_(excluded, torch.inf)
    open_rows = torch.arange(len(queries), device=points.device)
    fetch = min(len(points), 2 * k + 32)
    while len(open_rows):
        found_rows, found, certain = [], [], []
        # Differences are d times larger than distances: a slice of queries at a time.
        step = max(1, _CHUNK_VALUES // (fetch * points.shape[1]))
        for part in open_rows.split(step):
            lower, candidates = bound[part].topk(fetch, largest=False)
            exact = (points[candidates] - queries[part, None]).norm(dim=2).masked_fill(lower.isinf(), torch.inf)
            candidates, order = candidates.sort(dim=1)
            exact, by_distance = exact.gather(1, order).sort(dim=1, stable=True)
            candidates = candidates.gather(1, by_distance)
            if distinct:
                # A key's second row stands in only where the first is shut out; where both are in, the farther must go.
                by_key, order = keys[candidates].sort(dim=1, stable=True)
                again = torch.zeros_like(by_key, dtype=torch.bool)
                again[:, 1:] = by_key[:, 1:] == by_key[:, :-1]
                repeated = torch.empty_like(again).scatter_(1, order, again)
                exact, by_distance = exact.masked_fill(repeated, torch.inf).sort(dim=1, stable=True)
                candidates = candidates.gather(1, by_distance)
            short = max(0, k - fetch)  # fewer points than k: the rest stays empty
            found_rows.append(torch.nn.functional.pad(candidates[:, :k], (0, short)))
            found.append(torch.nn.functional.pad(exact[:, :k], (0, short), value=torch.inf))
            certain.append((found[-1][:, -1].square() < lower[:, -1]) | lower[:, -1].isinf())
        kept_rows, kept, done = torch.cat(found_rows), torch.cat(found), torch.cat(certain)
        if fetch == len(points):
            done = torch.ones_like(done)
        closed = open_rows[done]
        rows[closed] = torch.where(kept[done].isfinite(), kept_rows[done], -1)
        distances[closed] = torch.where(kept[done].isfinite(), kept[done], torch.nan)
        open_rows = open_rows[~done]
        fetch = min(len(points), 4 * fetch)
    return rows, distances
