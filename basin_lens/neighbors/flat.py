"""Exact search with candidates from FAISS: the flat index knows no exclusions, so more are fetched, filtered, and fetched again."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.errors import NeighborError
from basin_lens.neighbors.eligible import Rules
from basin_lens.neighbors.exact import SPARE, Product, Side, by_product, settle

_CHUNK = 4096  # queries per call, as many as FAISS takes at once
_ATTEMPTS = 2  # then torch, which need not fetch what is excluded
_MOST = 1024  # FAISS slows down beyond


def installed() -> bool:
    """Whether the module `faiss` is there (`faiss-cpu` or `faiss-gpu`)."""
    return importlib.util.find_spec("faiss") is not None


def load() -> Any:
    """The module `faiss`.

    Raises:
        NeighborError: it is not installed.
    """
    if not installed():
        raise NeighborError(
            'expected the module faiss for backend="faiss", got none. Run pip install \'basin-lens[faiss]\', or take backend="torch".'
        )
    return importlib.import_module("faiss")


def by_faiss(
    rules: Rules, far: Side, near: Side, product: Product, k: int
) -> tuple[Int[Tensor, "queries k"], Float[Tensor, "queries k"]]:
    """Rows and distances of the k nearest of each query, the same as `by_product` gives. FAISS runs on the CPU."""
    faiss = load()
    columns = rules.columns
    rows = torch.full((len(rules.group), k), -1, dtype=torch.int64, device=columns.rows.device)
    distances = near.states.new_full((len(rules.group), k), torch.nan)
    bank = product.bank(near, columns.rows)[: len(columns.rows)].cpu().numpy()
    # Of the columns, a query sees the leads or their stand-ins: fetch in proportion.
    scale = len(columns.rows) / max(1, columns.leads)
    left = []
    with _threads(faiss):
        for at in torch.arange(len(rules.group), device=columns.rows.device).split(_CHUNK):
            states = far.at(at)
            factors, squared = product.queries(states)
            # The largest inner products with the negated factors are the smallest scores.
            factors = factors.neg_()

            def candidates(some: Tensor, count: int, at: Tensor = at, factors: Tensor = factors) -> tuple[Tensor, Tensor, Tensor]:
                fetched = min(len(bank), int(count * scale))
                inner, found = faiss.knn(factors[some].cpu().numpy(), bank, fetched, metric=faiss.METRIC_INNER_PRODUCT)
                scores, places = torch.from_numpy(inner).to(at.device).neg_(), torch.from_numpy(found).to(at.device)
                rest = scores[:, -1].clone() if fetched < len(bank) else torch.full_like(scores[:, -1], torch.inf)
                return scores.masked_fill_(rules.excluded(at[some], places), torch.inf), places, rest

            attempts = _ATTEMPTS if 4 * (k + SPARE) * scale < _MOST else 1
            rows[at], distances[at], open_ = settle(candidates, rules, states, squared, near, k, fetch=k + SPARE, attempts=attempts)
            left.append(at[open_])
    rest = torch.cat(left) if left else rows.new_empty(0)
    if len(rest):
        del bank
        lengths = None if far.lengths is None else far.lengths[rest]
        again = by_product(rules.some(rest), Side(far.states[rest], lengths), near, product, k, fetch=4 * (k + SPARE))
        rows[rest], distances[rest] = again
    return rows, distances


@contextmanager
def _threads(faiss: Any) -> Iterator[None]:
    """As many threads as torch has: FAISS counts its own."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
