"""Points to search, and every rule written out in plain numpy."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from basin_lens.neighbors import Points

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs FAISS")
EXACT = ["torch", pytest.param("faiss", marks=needs_faiss)]
each_exact = pytest.mark.parametrize("backend", EXACT)
each_backend = pytest.mark.parametrize("backend", [*EXACT, "approximate"])


def as_points(states, key=None, token=None, group=None, pool=None) -> Points:
    """Points that share nothing and are all in the pool, unless told otherwise."""
    states = torch.as_tensor(states, dtype=torch.float32)
    n = len(states)
    return Points(
        states,
        torch.arange(n) if key is None else torch.as_tensor(key),
        torch.zeros(n, dtype=torch.int64) if token is None else torch.as_tensor(token),
        torch.full((n,), -1) if group is None else torch.as_tensor(group),
        torch.ones(n, dtype=torch.bool) if pool is None else torch.as_tensor(pool),
    )


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def everywhere_else(states: torch.Tensor, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's neighbors of each point among the others, in float64: rows and distances."""
    # Without X, kneighbors leaves each point out of its own neighbors.
    known = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean" if metric == "l2" else "cosine")
    distances, rows = known.fit(states.double().numpy()).kneighbors()
    return rows, distances


def reference(queries: Points, bank: Points, k: int, metric: str, same_token: str, distinct: bool = True):
    """The rules of scores.md, one candidate at a time, in float64."""
    far, near = queries.states.double().numpy(), bank.states.double().numpy()
    if metric == "cosine":
        far, near = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (far, near))
    distances = np.linalg.norm(far[:, None] - near[None], axis=2) if metric == "l2" else 1 - far @ near.T
    rows, found = np.full((len(far), k), -1), np.full((len(far), k), np.nan)
    keys, group, token, pool = (field.numpy() for field in (bank.key, bank.group, bank.token, bank.pool))
    for i, (own, own_group, own_token) in enumerate(
        zip(queries.key.tolist(), queries.group.tolist(), queries.token.tolist(), strict=True)
    ):
        allowed = pool & ~((own_group >= 0) & (group == own_group))
        if same_token != "any":
            allowed &= (token == own_token) == (same_token == "only")
        used, count = {own}, 0
        for j in np.argsort(distances[i], kind="stable"):  # of equal ones, the lower row first
            if count == k:
                break
            if not allowed[j] or (distinct and int(keys[j]) in used):
                continue
            rows[i, count], found[i, count] = j, distances[i, j]
            used.add(int(keys[j]))
            count += 1
    return rows, found


@st.composite
def worlds(draw):
    """A small bank of few distinct states: many duplicates, many ties, any groups, tokens and pool.

    Sizes are hypothesis's, values come from a seed: drawn one by one they would take most of the time of these tests.
    """
    kinds, d = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind_states, kind_token = rng.integers(-2, 3, (kinds, d)), rng.integers(0, 3, kinds)

    def rows(least: int, most: int) -> Points:
        n, share = draw(st.integers(least, most)), draw(st.sampled_from([0.2, 0.5, 1.0]))
        key = rng.integers(0, kinds, n)
        return as_points(kind_states[key], key, kind_token[key], rng.integers(-1, 4, n), rng.random(n) <= share)

    queries, bank = rows(1, 5), rows(2, 14)
    size = int(bank.pool.sum())
    assume(size > 0)
    return queries, bank, draw(st.integers(1, min(size, 6)))


def low_rank(n: int, d: int, rank: int, seed: int, *, rows_per_group: int = 30) -> Points:
    """States near a subspace, in groups whose rows are near each other, with every 25th key met again."""
    states = gaussian(n, rank, seed) @ gaussian(rank, d, seed + 1) + 0.3 * rank**0.5 * gaussian(n, d, seed + 2)
    group = torch.arange(n) // rows_per_group
    states = states + (rank**0.5 * gaussian(int(group[-1]) + 1, d, seed + 3))[group]
    key = torch.arange(n)
    key[::25] = key[: len(key[::25])]
    return as_points(states[key], key=key, token=key % 7, group=group)
