"""A bank in shards: each is searched by itself, and the best of all are kept, so that no more than one is copied at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.neighbors.approximate import SAMPLE, approximately, share_found
from basin_lens.neighbors.eligible import Rules
from basin_lens.neighbors.exact import SPARE, Product, Side, by_product
from basin_lens.neighbors.flat import by_faiss
from basin_lens.neighbors.points import Backend

SHARD_ROWS = 1 << 15  # of the bank: 75 MB at 576 dimensions

_Found = tuple[Int[Tensor, "queries k"], Float[Tensor, "queries k"]]


def over_shards(rules: Rules, far: Side, near: Side, k: int, backend: Backend) -> tuple[Tensor, Tensor, float | None]:
    """Rows and distances of the k nearest of each query, and the recall of an approximate search.

    Exact distances are of one query and one row each, so that an exact search has the same answer bit for bit, however bank and
    queries are cut: who may be whose neighbor is decided before. The approximate one takes its subspace from a shard of the bank
    and the number of candidates from the queries of a call: its answer depends on both cuts, and its recall is measured on what
    this call found, all shards together.

    Args:
        rules: who may be whose neighbor, over all columns.
        far: the queries.
        near: the bank.
        k: how many.
        backend: see `find`.
    """
    columns = rules.columns
    shards = torch.arange(len(columns.rows)).split(SHARD_ROWS)
    product = Product.around(near, columns.rows)
    if len(shards) == 1:
        return _in_one(rules, far, near, product, k, backend)
    best = _merged(rules, far, near, product, k, backend)
    if backend != "approximate":
        return *best, None
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(rules.group), generator=generator, device="cpu")[:SAMPLE].to(rules.group.device)
    exact = _merged(rules.some(sample), far.some(sample), near, product, k, "torch")
    return *best, share_found(best[0][sample], exact[0])


def _merged(rules: Rules, far: Side, near: Side, product: Product, k: int, backend: Backend) -> _Found:
    """The k best of all shards."""
    best: _Found | None = None
    for first in range(0, len(rules.columns.rows), SHARD_ROWS):
        part = rules.part(first, min(first + SHARD_ROWS, len(rules.columns.rows)))
        found = _in_one(part, far, near, product, k, backend)[:2]
        best = found if best is None else merge_nearest(best, found)
    assert best is not None
    return best


def merge_nearest(first: _Found, second: _Found) -> _Found:
    """Of two answers on different rows the k nearest, ties to the lower row; -1 and NaN where there are fewer."""
    k = first[0].shape[1]
    rows, distances = (torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
    rows, by_row = rows.sort(dim=1)
    distances = distances.gather(1, by_row).masked_fill(rows < 0, torch.inf)
    distances, order = distances.sort(dim=1, stable=True)
    rows, distances = rows.gather(1, order)[:, :k], distances[:, :k]
    return rows, distances.masked_fill(rows < 0, torch.nan)


def _in_one(rules: Rules, far: Side, near: Side, product: Product, k: int, backend: Backend) -> tuple[Tensor, Tensor, float | None]:
    """The same among columns that are searched at once."""
    if backend == "approximate":
        return approximately(rules, far, near, product, k)
    if backend == "faiss" and rules.same_token != "only":  # with "only", a query has few candidates, and nothing is gained
        return *by_faiss(rules, far, near, product, k), None
    return *by_product(rules, far, near, product, k, product.bank(near, rules.columns.rows), fetch=k + SPARE), None
