"""Approximate search for large banks: candidates in a few principal dimensions, exact re-ranking, and the measured recall."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.neighbors.eligible import Rules
from basin_lens.neighbors.exact import SPARE, Product, Side, by_product

RECALL = 0.98  # candidates are doubled until a sample of queries reaches it
SAMPLE = 256  # queries that recall is measured on
_DIMENSIONS = 126  # with the length of the rest and |b|^2, rows of 128 values
_SUBSPACE_ROWS = 8192
_DOUBLINGS = 3


def approximately(
    rules: Rules, far: Side, near: Side, product: Product, k: int
) -> tuple[Int[Tensor, "queries k"], Float[Tensor, "queries k"], float]:
    """Rows, distances and measured recall of about the k nearest of each query.

    Candidates are the columns of the smallest lower bound of the distance: exact in the principal subspace, plus the difference of
    the lengths outside of it. All of them are re-ranked by exact differences, and exclusions hold exactly, so a found neighbor is
    one, at its true distance; a nearer one may have been missed.
    """
    bank = product.bank(near, rules.columns.rows)
    if rules.same_token == "only":  # a query's few candidates are all looked at
        rows, distances = by_product(rules, far, near, product, k, bank, fetch=k + SPARE)
        return rows, distances, 1.0
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(rules.group), generator=generator, device="cpu")[:SAMPLE].to(rules.group.device)
    few, few_far = rules.some(sample), far.some(sample)
    exact = by_product(few, few_far, near, product, k, bank, fetch=k + SPARE)[0]
    reduced = Product(product.center, subspace(near, rules.columns.rows, product.center, _DIMENSIONS))
    bank, fetch = reduced.narrow(bank), 4 * k + SPARE
    for _ in range(_DOUBLINGS):
        found = by_product(few, few_far, near, reduced, k, bank, fetch=fetch, certain=False)[0]
        if not share_found(found, exact) < RECALL:
            break
        fetch *= 2
    rows, distances = by_product(rules, far, near, reduced, k, bank, fetch=fetch, certain=False)
    return rows, distances, share_found(rows[sample], exact)


def share_found(found: Int[Tensor, "queries k"], exact: Int[Tensor, "queries k"]) -> float:
    """Share of the exact neighbors that were found; NaN if there are none."""
    there = (found[:, None] == exact[:, :, None]).any(2) & (exact >= 0)
    return float(there.sum() / (exact >= 0).sum())


def subspace(near: Side, rows: Int[Tensor, " rows"], center: Float[Tensor, " d"], dims: int) -> Float[Tensor, "d dims"]:
    """An orthonormal basis of about the most varying directions of the bank, from a fixed seed and a sample of its rows.

    Rows count with at most twice the median length: one massive state would take the precision of all others.
    """
    states = near.at(rows[:: max(1, len(rows) // _SUBSPACE_ROWS)]) - center
    lengths = states.norm(dim=1)
    states *= (2 * lengths.median() / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp_max(1)[:, None]
    generator = torch.Generator().manual_seed(0)
    width = min(dims, *states.shape)
    start = torch.randn(states.shape[1], width, generator=generator, dtype=states.dtype, device="cpu")
    basis = torch.linalg.qr(start.to(states.device)).Q
    for _ in range(3):
        basis = torch.linalg.qr(states.T @ (states @ basis)).Q
    return basis
