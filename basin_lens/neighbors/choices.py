"""Neighborhoods to compare the nearest with: random points, and sets as tight as the neighborhood but elsewhere."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.neighbors.points import Neighbors, Points, SameToken, has_direction
from basin_lens.neighbors.search import find

_SPHERE = 8  # dimensions of the random points: few enough to be quick, and on a sphere none is everyone's neighbor
_TRIES = 64  # tokens of nearly the same radius that are looked at, on either side


def random_sets(
    queries: Points,
    bank: Points,
    k: int,
    *,
    same_token: SameToken,
    distinct: bool,
    seed: int,
    keys: Int[Tensor, " queries"] | None = None,
    among: tuple[int, Int[Tensor, " queries"]] | None = None,
) -> Int[Tensor, "queries k"]:
    """k random rows of the bank for each query, under the very exclusions of the nearest ones; -1 where there are fewer.

    They are the nearest of points placed at random, so that one search keeps one set of rules. `keys`: each query's sets follow
    from its key and the seed, whoever else asks; None: they follow from the order of the queries. `among`: of so many queries these
    are the ones at some places, and get the sets that they would get among all of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> Float[Tensor, "count sphere"]:
        return torch.randn(count, _SPHERE, generator=generator, dtype=torch.float32, device="cpu")

    def placed(points: Points, place: Float[Tensor, "points sphere"]) -> Points:
        states = torch.nn.functional.normalize(place.to(points.states.device), dim=1)
        return Points(states, points.key, points.token, points.group, points.pool)

    if keys is None:
        asking = drawn(len(queries.key)) if among is None else drawn(among[0])[among[1].cpu()]
    else:
        each = [np.random.default_rng([seed, key]).standard_normal(_SPHERE, dtype=np.float32) for key in keys.tolist()]
        asking = torch.from_numpy(np.stack(each)) if each else drawn(0)
    asked, there = placed(queries, asking), placed(bank, drawn(len(bank.key)))
    return find(asked, there, k, same_token=same_token, distinct=distinct).rows


def radius_matched_sets(near: Neighbors, queries: Points, bank: Points) -> Int[Tensor, "queries k"]:
    """For each query, the neighbors of another token whose neighborhood has almost the same radius; -1 where there is none.

    The other token is of another group, and none of its neighbors is of the query's group, the query itself (or its equal), or a
    neighbor of the query.

    Args:
        near: neighbors of all queries; the radius is the distance to the last one.
        queries, bank: between which they were found.
    """
    rows, found = near.rows, torch.full_like(near.rows, -1)
    order = near.distances[:, -1].argsort()  # NaN last
    order = order[: int(near.complete.sum())]
    index = torch.arange(len(order), device=rows.device)
    own = rows[order].sort(dim=1).values
    left = torch.ones_like(order, dtype=torch.bool)
    for step in (sign * offset for offset in range(1, _TRIES + 1) for sign in (1, -1)):
        if not bool(left.any()):
            break
        at = index[left & (index + step >= 0) & (index + step < len(order))]
        other = order[at + step]
        theirs, mine, key = rows[other], queries.group[order[at]], queries.key[order[at]]
        place = torch.searchsorted(own[at], theirs).clamp_max(own.shape[1] - 1)
        shared = (own[at].gather(1, place) == theirs).any(1)
        related = (mine >= 0) & ((queries.group[other] == mine) | (bank.group[theirs] == mine[:, None]).any(1))
        itself = (bank.key[theirs] == key[:, None]).any(1)
        good = at[~shared & ~related & ~itself]
        found[order[good]] = rows[order[good + step]]
        left[good] = False
    return found


def reach(queries: Points, bank: Points, rows: Int[Tensor, "queries k"], metric: str) -> Neighbors:
    """Chosen rows as neighbors, nearest first, with their exact distances."""
    missing = rows < 0
    if metric == "cosine":
        missing |= ~has_direction(bank.states)[rows.clamp_min(0)] | ~has_direction(queries.states)[:, None]
    distances = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for part in torch.arange(len(rows), device=rows.device).split(1024):
        points, own = bank.states[rows[part].clamp_min(0)], queries.states[part, None]
        if metric == "cosine":
            distances[part] = 1 - torch.nn.functional.cosine_similarity(points, own, dim=2)
        else:
            distances[part] = (points - own).norm(dim=2)
    distances, order = distances.masked_fill(missing, torch.inf).sort(dim=1, stable=True)
    rows = rows.masked_fill(missing, -1).gather(1, order)
    return Neighbors(rows, distances.masked_fill(rows < 0, torch.nan))
