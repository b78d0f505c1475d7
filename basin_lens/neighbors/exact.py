"""Exact search in torch: candidates by matrix product, re-ranked by exact differences, and more of them until all is certain."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.neighbors.eligible import Rules
from basin_lens.neighbors.points import Metric, has_direction

SPARE = 4  # candidates beyond k: settles nearly every query at the first attempt
_CHUNK_VALUES = 1 << 25  # scores held at once: 128 MiB in float32
_SLICE_VALUES = 1 << 22  # scores or state values of one small step
_STEP_VALUES = 1 << 19  # differences held at once: they stay in the processor's cache
_BLOCK = 16  # columns whose minimum stands for them

# For these queries of a part, so many of the best columns (ascending; infinite score: none left), and the least score of all
# others.
Fetch = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Side:
    """States as the metric sees them: as they are, or divided by their length."""

    states: Float[Tensor, "rows d"]
    lengths: Float[Tensor, " rows"] | None

    @classmethod
    def of(cls, states: Float[Tensor, "rows d"], metric: Metric) -> "Side":
        """The states under a metric."""
        if metric != "cosine":
            return cls(states, None)
        return cls(states, torch.where(has_direction(states), states.norm(dim=1), 1))  # a zero state stays one, and is in no pool

    def some(self, at: Int[Tensor, " some"]) -> "Side":
        """These rows only."""
        return Side(self.states[at], None if self.lengths is None else self.lengths[at])

    def at(self, rows: Tensor) -> Tensor:
        """States of these rows, `[*rows, d]`. A copy is made of these only."""
        flat = self.states.index_select(0, rows.flatten())
        if self.lengths is not None:
            flat /= self.lengths[rows.flatten(), None]
        return flat.view(*rows.shape, self.states.shape[1])


@dataclass(frozen=True)
class Product:
    """Distances as one matrix product: |b - q|^2 = |q|^2 + score, score = [q, 1] . [-2b, |b|^2].

    `center` is taken off first: centered, the product form loses the fewest digits. With a `basis`, b and q are replaced by their
    coordinates in it and the length of what it leaves out, and |q|^2 + score is a lower bound of the squared distance.
    """

    center: Float[Tensor, " d"]
    basis: Float[Tensor, "d dims"] | None = None

    @classmethod
    def around(cls, side: Side, rows: Int[Tensor, " rows"]) -> "Product":
        """Centered on the median of some of these rows, because a massive state would move the mean away."""
        return cls(side.at(rows[:: max(1, len(rows) // 1024)]).median(0).values)

    def queries(self, states: Float[Tensor, "some d"]) -> tuple[Float[Tensor, "some w"], Float[Tensor, " some"]]:
        """Left factors, and |q|^2."""
        centered = states - self.center
        squared = centered.square().sum(1)
        return torch.cat([self._coordinates(centered, squared), torch.ones_like(squared)[:, None]], 1), squared

    def bank(self, side: Side, rows: Int[Tensor, " rows"]) -> Float[Tensor, "padded w"]:
        """Right factors of these rows without a basis, then rows of infinite score, up to blocks of blocks."""
        padded = -(-len(rows) // _BLOCK**2) * _BLOCK**2
        answer = side.states.new_empty(padded, len(self.center) + 1)
        answer[len(rows) :] = 0
        answer[len(rows) :, -1] = torch.inf
        step = max(1, _STEP_VALUES // len(self.center))
        for first in range(0, len(rows), step):
            here = slice(first, min(first + step, len(rows)))
            centered = side.at(rows[here]).sub_(self.center)
            answer[here, -1] = centered.square().sum(1)
            torch.mul(centered, -2, out=answer[here, :-1])
        return answer

    def narrow(self, bank: Float[Tensor, "padded w"]) -> Float[Tensor, "padded narrow"]:
        """The right factors in this basis, from those without one."""
        assert self.basis is not None
        inside, squared = bank[:, :-1] @ self.basis, bank[:, -1]
        left_out = (squared - inside.square().sum(1) / 4).clamp_min(0).sqrt()
        # No coordinates in the padding, where |b|^2 is infinite.
        return torch.cat([inside, -2 * left_out.masked_fill(squared.isinf(), 0)[:, None], squared[:, None]], 1)

    def _coordinates(self, centered: Tensor, squared: Tensor) -> Tensor:
        if self.basis is None:
            return centered
        inside = centered @ self.basis
        left_out = (squared - inside.square().sum(1)).clamp_min(0).sqrt()
        return torch.cat([inside, left_out[:, None]], 1)


def by_product(
    rules: Rules,
    far: Side,
    near: Side,
    product: Product,
    k: int,
    bank: Float[Tensor, "padded w"],
    *,
    fetch: int,
    certain: bool = True,
) -> tuple[Int[Tensor, "queries k"], Float[Tensor, "queries k"]]:
    """Rows and distances of the k nearest of each query. Holds one chunk of scores.

    Args:
        rules: who may be whose neighbor.
        far: the queries.
        near: the bank.
        product: how candidates are scored.
        k: how many.
        bank: `product.bank` of the columns (with a basis, made narrow).
        fetch: candidates re-ranked per query at the first attempt.
        certain: go on until no other row can be nearer; else only until there are k.
    """
    columns = rules.columns.rows
    rows = torch.full((len(rules.group), k), -1, dtype=torch.int64, device=columns.device)
    distances = near.states.new_full((len(rules.group), k), torch.nan)
    in_parts = _by_token if rules.same_token == "only" else _by_group
    for at, squared, matrix, held in in_parts(rules, far, product, bank):

        def candidates(
            some: Tensor, count: int, matrix: Tensor = matrix, held: Tensor | None = held
        ) -> tuple[Tensor, Tensor, Tensor]:
            chosen = matrix if len(some) == len(matrix) else matrix[some]
            scores, found = smallest(chosen, min(count, matrix.shape[1]))
            # A part that holds fewer columns than asked for holds every eligible one.
            rest = scores[:, -1] if count < matrix.shape[1] else torch.full_like(scores[:, -1], torch.inf)
            # Where none are left, padding may come up.
            return scores, found.clamp_max(len(columns) - 1) if held is None else held[found], rest

        settled = settle(candidates, rules, far.at(at), squared, near, k, fetch=fetch, certain=certain)
        rows[at], distances[at] = settled[:2]
    return rows, distances


_Part = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _by_group(rules: Rules, far: Side, product: Product, bank: Tensor) -> Iterator[_Part]:
    """Chunks of queries: which, their |q|^2, and the scores of all columns, infinite where excluded."""
    order = torch.argsort(rules.group, stable=True)
    chunk = max(1, min(len(order), _CHUNK_VALUES // len(bank)))
    # One buffer for all chunks: asking the system for so much memory each time costs as much as filling it.
    buffer = bank.new_empty(chunk, len(bank))
    for at in order.split(chunk):
        factors, squared = product.queries(far.at(at))
        matrix = torch.mm(factors, bank.T, out=buffer[: len(at)])
        rules.forbid(matrix, at)
        yield at, squared, matrix, None


def _by_token(rules: Rules, far: Side, product: Product, bank: Tensor) -> Iterator[_Part]:
    """The same where neighbors must share the query's token: only the columns of the chunk's own tokens, and which they are."""
    order = torch.argsort(rules.token, stable=True)
    wanted, by_token = rules.token[order], rules.columns.by_token
    tokens = rules.columns.token[by_token]
    low = torch.searchsorted(tokens, wanted).tolist()
    high = torch.searchsorted(tokens, wanted, right=True).tolist()
    first = 0
    while first < len(order):
        size = min(256, len(order) - first)
        while size > 1 and size * (high[first + size - 1] - low[first]) > _SLICE_VALUES:
            size //= 2
        at, held = order[first : first + size], by_token[low[first] : high[first + size - 1]]
        first += size
        if len(held):
            factors, squared = product.queries(far.at(at))
            matrix = factors @ bank[held].T
            yield at, squared, matrix.masked_fill_(rules.excluded(torch.as_tensor(at), held[None]), torch.inf), held


def smallest(matrix: Float[Tensor, "some width"], count: int) -> tuple[Float[Tensor, "some m"], Int[Tensor, "some m"]]:
    """The smallest values of each row, ascending, and their columns.

    Through the minima of blocks of columns: the `count` smallest values are in the `count` blocks of smallest minimum, and looking
    for these first, in the same way, touches the matrix once, at the speed of memory.
    """
    some, width = matrix.shape
    if width % _BLOCK or 2 * count * _BLOCK >= width:
        found = matrix.topk(count, largest=False)
        return found.values, found.indices
    # Columns of a block lie far apart, so that minima are taken over whole vectors.
    blocks = matrix.view(some, _BLOCK, width // _BLOCK)
    best = smallest(blocks.amin(1), count)[1]
    values, at = blocks.gather(2, best[:, None].expand(-1, _BLOCK, -1)).flatten(1).topk(count, largest=False)
    return values, at.div(count, rounding_mode="floor") * (width // _BLOCK) + best.gather(1, at % count)


def settle(
    candidates: Fetch,
    rules: Rules,
    queries: Float[Tensor, "some d"],
    squared: Float[Tensor, " some"],
    near: Side,
    k: int,
    *,
    fetch: int,
    certain: bool = True,
    attempts: int | None = None,
) -> tuple[Int[Tensor, "some k"], Float[Tensor, "some k"], Int[Tensor, " open"]]:
    """Re-rank candidates by exact differences, and fetch more of them until the answer is certain.

    Returns:
        rows of the bank, distances, and the queries that are still open after so many attempts.
    """
    columns = rules.columns.rows
    rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    distances = queries.new_full((len(queries), k), torch.nan)
    open_ = torch.arange(len(queries), device=queries.device)
    eps = torch.finfo(squared.dtype).eps
    while len(open_) and attempts != 0:
        step = max(1, _CHUNK_VALUES // (64 * min(fetch, len(columns))))  # a wide fetch: a few queries at a time
        left = []
        for part in open_.split(step):
            scores, found, rest = candidates(part, fetch)
            found_rows, exact = _ranked(queries[part], near, columns[found], scores.isinf(), k)
            farthest = exact[:, -1]
            # The product form errs by about eps * (|q|^2 + |b|^2), and a row b as near as the k-th has |b| <= |q| + distance: taken
            # with room to spare, nothing that scores above the limit can be a neighbor, nor tie with one.
            slack = 64 * eps * (squared[part] + (squared[part].sqrt() + farthest).square())
            done = rest > farthest.square() + slack - squared[part] if certain else farthest.isfinite()
            done |= rest.isinf()
            closed, there = part[done], exact[done].isfinite()
            rows[closed] = torch.where(there, found_rows[done], -1)
            distances[closed] = torch.where(there, exact[done], torch.nan).to(distances.dtype)
            left.append(part[~done])
        open_, fetch = torch.cat(left), 4 * fetch
        attempts = None if attempts is None else attempts - 1
    return rows, distances, open_


def _ranked(queries: Tensor, near: Side, rows: Tensor, none: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of these rows by exact difference, ties to the lower row; infinitely far where there are fewer."""
    exact = torch.empty(rows.shape, dtype=queries.dtype, device=queries.device)
    # Differences are d times larger than distances: a slice of queries at a time.
    step = max(1, _STEP_VALUES // max(1, rows.shape[1] * queries.shape[1]))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        exact[part] = near.at(rows[part]).sub_(queries[part, None]).norm(dim=2)
    exact.masked_fill_(none, torch.inf)
    rows, order = rows.sort(dim=1)
    exact, by_distance = exact.gather(1, order).sort(dim=1, stable=True)
    rows, short = rows.gather(1, by_distance)[:, :k], max(0, k - rows.shape[1])  # fewer columns than k: the rest stays empty
    return torch.nn.functional.pad(rows, (0, short)), torch.nn.functional.pad(exact[:, :k], (0, short), value=torch.inf)
