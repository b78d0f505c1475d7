"""`find`: the k nearest eligible rows, by whichever backend."""

from typing import get_args

import torch

from basin_lens.errors import NeighborError
from basin_lens.neighbors.eligible import Columns, Rules
from basin_lens.neighbors.exact import Side
from basin_lens.neighbors.flat import load
from basin_lens.neighbors.points import Backend, Metric, Neighbors, Points, SameToken
from basin_lens.neighbors.shards import over_shards
from basin_lens.values import whole_numbers


@whole_numbers(NeighborError)
def find(
    queries: Points,
    bank: Points,
    k: int,
    *,
    metric: Metric = "l2",
    same_token: SameToken = "any",
    distinct: bool = True,
    backend: Backend = "auto",
) -> Neighbors:
    """The k nearest neighbors in the bank of each query.

    A row of the bank is eligible if it is in the bank's pool, of another group than the query's, and, with `distinct`, of
    another key than the query's and than every other neighbor's (of a key's rows, the first one of another group counts). Every
    backend keeps to this exactly, re-ranks its candidates by exact differences, and breaks ties to the lower row; both exact ones
    give the same.

    Args:
        queries: the points to find neighbors of (their `pool` is not read).
        bank: where neighbors are looked for.
        k: how many.
        metric: Euclidean distance, or 1 - cosine (undefined for a state of length 0: it finds nothing and is not found).
        same_token: whether neighbors may, must, or must not have the query's token id.
        distinct: False only for scores that count duplicates and the query itself (`SeedCompression`).
        backend: `"torch"`: exact, on the device of the states. `"faiss"`: exact, candidates from FAISS's flat search on the CPU.
            `"approximate"`: for large banks, candidates in a principal subspace; the answer's `recall` says how many of the exact
            neighbors it found. How many candidates it takes is decided on a sample of the queries of this call, so that the answer
            for a query depends on the others. `"auto"`: exact in torch, which was as fast as FAISS within a tenth; never
            approximate, that must be asked for.

    Returns:
        rows of the bank and distances, `[queries, k]`. Beyond the points it holds one more copy of a shard of the bank (32,768 of
        its rows) and 128 MiB of distances: of a larger bank, one shard after the other is searched, and the best of all are kept.

    Raises:
        NeighborError: k below 1, or above the number of points in the bank; an unknown backend, or one that is not installed.

    Example:
        >>> import torch
        >>> from basin_lens.neighbors import Points, find
        >>> states = torch.tensor([[0.0], [1.0], [3.0]])
        >>> points = Points(states, torch.arange(3), torch.zeros(3).long(), torch.full((3,), -1), torch.ones(3).bool())
        >>> find(points, points, 1).rows.squeeze(1).tolist()
        [1, 0, 1]
    """
    eligible = int(bank.pool.sum())
    if k < 1 or k > eligible:
        raise NeighborError(
            f"expected k between 1 and the bank's {eligible} points (position 0 left out), got {k}. "
            'Lower k, add texts, or pass bank="reference".'
        )
    if backend not in get_args(Backend):
        raise NeighborError(f"expected a backend among {', '.join(get_args(Backend))}, got {backend!r}.")
    if backend == "faiss":
        load()
    bank = bank.under(metric)
    if not bool(bank.pool.any()):  # every state of the bank has length 0
        rows = torch.full((len(queries.key), k), -1, dtype=torch.int64, device=queries.states.device)
        return Neighbors(rows, queries.states.new_full(rows.shape, torch.nan))
    columns = Columns.of(bank, distinct)
    rules = Rules.of(queries, columns, same_token)
    far, near = Side.of(queries.states, metric), Side.of(bank.states, metric)
    rows, distances, recall = over_shards(rules, far, near, k, backend)
    if metric == "cosine":
        undefined = ~queries.defined(metric)[:, None]
        rows, distances = rows.masked_fill(undefined, -1), (distances.square() / 2).masked_fill(undefined, torch.nan)
    return Neighbors(rows, distances, recall)
