"""Exact search with candidates from FAISS: its flat search knows no exclusions, so more are fetched and filtered.

Queries that are not settled by that are searched in torch, which need not fetch what is excluded.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.errors import NeighborError
from basin_lens.neighbors.eligible import Rules
from basin_lens.neighbors.exact import SPARE, Product, Side, by_product, settle

_CHUNK = 4096  # queries per call, as many as FAISS takes at once
_OVER = 6  # fetched beyond what is re-ranked: a query's own sequence is seldom more than that of its nearest
_MOST = 1024  # candidates per query: FAISS slows down beyond, and torch takes over


def installed() -> bool:
    """Whether the module `faiss` is there (`faiss-cpu` or `faiss-gpu`)."""
    return importlib.util.find_spec("faiss") is not None


def load() -> ModuleType:
    """The module `faiss`.

    Raises:
        NeighborError: it is not installed.
    """
    if not installed():
        raise NeighborError(
            "expected the module faiss for backend=\"faiss\", got none. Run pip install 'basin-lens[faiss]', or take "
            'backend="torch".'
        )
    return importlib.import_module("faiss")


def by_faiss(
    rules: Rules, far: Side, near: Side, product: Product, k: int
) -> tuple[Int[Tensor, "queries k"], Float[Tensor, "queries k"]]:
    """Rows and distances of the k nearest of each query, the same as `by_product` gives. FAISS runs on the CPU."""
    faiss, columns = load(), rules.columns
    # Of the columns, a query sees the leads or their stand-ins: fetch in proportion.
    fetch = min(len(columns.rows), int((k + SPARE + _OVER) * len(columns.rows) / max(1, columns.leads)))
    if fetch > _MOST or near.states.dtype != torch.float32:
        return by_product(rules, far, near, product, k, product.bank(near, columns.rows), fetch=k + SPARE)
    rows = torch.full((len(rules.group), k), -1, dtype=torch.int64, device=columns.rows.device)
    distances = near.states.new_full((len(rules.group), k), torch.nan)
    factors_of_bank = product.bank(near, columns.rows)
    bank = factors_of_bank[: len(columns.rows)].cpu().numpy()
    left = []
    with _threads(faiss):
        for at in torch.arange(len(rules.group), device=columns.rows.device).split(_CHUNK):
            states = far.at(at)
            factors, squared = product.queries(states)
            # The largest inner products with the negated factors are the smallest scores.
            factors = factors.neg_()

            def candidates(some: Tensor, count: int, at: Tensor = at, factors: Tensor = factors) -> tuple[Tensor, Tensor, Tensor]:
                inner, found = faiss.knn(factors[some].cpu().numpy(), bank, fetch, metric=faiss.METRIC_INNER_PRODUCT)
                scores, places = torch.from_numpy(inner).to(at.device).neg_(), torch.from_numpy(found).to(at.device)
                rest = scores[:, -1].clone() if fetch < len(bank) else torch.full_like(scores[:, -1], torch.inf)
                scores.masked_fill_(rules.excluded(at[some], places), torch.inf)
                if count < fetch:
                    scores, best = scores.topk(count + 1, largest=False)
                    rest = torch.minimum(rest, scores[:, -1])
                    scores, places = scores[:, :-1], places.gather(1, best[:, :-1])
                return scores, places, rest

            # Once only: to fetch what was excluded again, and more, is slower than to search the few that are left in torch.
            answer = settle(candidates, rules, states, squared, near, k, fetch=k + SPARE, attempts=1)
            rows[at], distances[at] = answer[:2]
            left.append(at[answer[2]])
    again = torch.cat(left) if left else rows.new_empty(0)
    if len(again):
        some, some_far = rules.some(again), far.some(again)
        rows[again], distances[again] = by_product(some, some_far, near, product, k, factors_of_bank, fetch=4 * k + SPARE)
    return rows, distances


@contextmanager
def _threads(faiss: ModuleType) -> Iterator[None]:
    """As many threads as torch has: FAISS counts its own."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
