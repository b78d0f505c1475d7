"""Who may be whose neighbor: the exclusion rules, over the rows of the bank that can ever be chosen."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.neighbors.points import Points, SameToken

_MASK_SHARE = 32  # above 1/32 of a matrix, a mask is cheaper than a list of its entries


@dataclass(frozen=True)
class Columns:
    """Rows of the bank that can ever be chosen, in the order in which they are searched.

    First the leads, sorted by group: the first row of each key (of distinct search; else all rows). Then the seconds: per key, the
    first row of another group than its lead's, which stands in for queries that the lead's group is shut out for. A query shuts out
    one group only, so one of the two is always left, and equal keys mean equal states. This keeps the search small where thousands
    of rows share a state (the layer of bare embeddings).

    `home`: a lead's own group; for a second, its lead's. A query is shut out from leads at home in its group, and from seconds at
    home in any other. `by_token`: the columns in the order of their tokens.
    """

    rows: Int[Tensor, " columns"]
    home: Int[Tensor, " columns"]
    key: Int[Tensor, " columns"]
    token: Int[Tensor, " columns"]
    by_token: Int[Tensor, " columns"]
    leads: int
    distinct: bool

    @classmethod
    def of(cls, bank: Points, distinct: bool) -> "Columns":
        """The columns of a bank."""
        pool = torch.nonzero(bank.pool).squeeze(1)
        if not distinct:
            leads, seconds, home = pool, pool[:0], pool[:0]
        else:
            order = pool[torch.argsort(bank.key[pool], stable=True)]
            key, group = bank.key[order], bank.group[order]
            is_lead = torch.ones_like(key, dtype=torch.bool)
            is_lead[1:] = key[1:] != key[:-1]
            lead_of = torch.cummax(torch.where(is_lead, torch.arange(len(key), device=key.device), 0), 0).values
            other = group != group[lead_of]
            # The first of another group: no earlier row of the same key is of another group than the lead.
            count = other.long().cumsum(0)
            before_key = (count - other.long())[lead_of]
            # A lead of no group is never shut out.
            is_second = other & (count - before_key == 1) & (group[lead_of] >= 0)
            leads, seconds, home = order[is_lead], order[is_second], group[lead_of[is_second]]
        leads = leads[torch.argsort(bank.group[leads], stable=True)]
        by_home = torch.argsort(home, stable=True)
        rows = torch.cat([leads, seconds[by_home]])
        home = torch.cat([bank.group[leads], home[by_home].to(bank.group.dtype)])
        token = bank.token[rows]
        return cls(rows, home, bank.key[rows], token, torch.argsort(token, stable=True), len(leads), distinct)

    def part(self, first: int, last: int) -> "Columns":
        """The columns from `first` to before `last`: a shard of the bank, in the same order."""
        here = slice(first, last)
        token, leads = self.token[here], min(max(self.leads - first, 0), last - first)
        return Columns(
            self.rows[here], self.home[here], self.key[here], token, torch.argsort(token, stable=True), leads, self.distinct
        )


@dataclass(frozen=True)
class Rules:
    """Columns, and the queries they are searched for. `own`: columns with the query's own key, lead and second; -1: none."""

    columns: Columns
    group: Int[Tensor, " queries"]
    token: Int[Tensor, " queries"]
    own: Int[Tensor, "queries 2"]
    same_token: SameToken

    @classmethod
    def of(cls, queries: Points, columns: Columns, same_token: SameToken) -> "Rules":
        """The rules of these queries."""
        own = torch.full((len(queries.key), 2), -1, dtype=torch.int64, device=queries.key.device)
        if columns.distinct:
            own[:, 0] = _places(columns.key[: columns.leads], queries.key)
            second = _places(columns.key[columns.leads :], queries.key)
            own[:, 1] = torch.where(second >= 0, second + columns.leads, second)
        return cls(columns, queries.group, queries.token, own, same_token)

    def some(self, at: Int[Tensor, " some"]) -> "Rules":
        """The rules of these queries only."""
        return Rules(self.columns, self.group[at], self.token[at], self.own[at], self.same_token)

    def part(self, first: int, last: int) -> "Rules":
        """The rules of the same queries for the columns from `first` to before `last`."""
        own = torch.where((self.own >= first) & (self.own < last), self.own - first, -1)
        return Rules(self.columns.part(first, last), self.group, self.token, own, self.same_token)

    def excluded(self, at: Int[Tensor, " some"], columns: Int[Tensor, "#some m"]) -> Bool[Tensor, "some m"]:
        """Which of these columns these queries may not choose."""
        group = self.group[at, None]
        at_home = (self.columns.home[columns] == group) & (group >= 0)
        answer = at_home ^ (columns >= self.columns.leads)
        if self.columns.distinct:
            answer |= columns == self.own[at, :1]
            answer |= columns == self.own[at, 1:]
        if self.same_token != "any":
            same = self.columns.token[columns] == self.token[at, None]
            answer |= ~same if self.same_token == "only" else same
        return answer

    def forbid(self, matrix: Float[Tensor, "some width"], at: Int[Tensor, " some"]) -> None:
        """Set to infinity, in a matrix of scores of all columns, what these queries may not choose.

        Queries must be sorted by group. As columns are, what a group is shut out from are a few slices, and no mask the size of the
        matrix is made. Not for `same_token="only"`, where hardly any column is left.
        """
        leads, width = self.columns.leads, len(self.columns.rows)
        groups, counts = torch.unique_consecutive(self.group[at], return_counts=True)
        bounds = []
        for part in (self.columns.home[:leads], self.columns.home[leads:]):
            part = part.contiguous()
            for right in (False, True):
                bounds.append(torch.where(groups >= 0, torch.searchsorted(part, groups, right=right), 0).tolist())
        first = 0
        for count, low, high, second_low, second_high in zip(counts.tolist(), *bounds, strict=True):
            here = matrix[first : first + count]
            here[:, low:high] = torch.inf
            if width > leads:
                here[:, leads : leads + second_low] = torch.inf
                here[:, leads + second_high : width] = torch.inf
            first += count
        if self.columns.distinct:
            for own in self.own[at].unbind(1):
                known = torch.nonzero(own >= 0).squeeze(1)
                matrix[known, own[known]] = torch.inf
        if self.same_token == "exclude":
            self._forbid_own_token(matrix[:, :width], at)

    def _forbid_own_token(self, matrix: Tensor, at: Tensor) -> None:
        wanted, by_token = self.token[at], self.columns.by_token
        tokens = self.columns.token[by_token]
        low = torch.searchsorted(tokens, wanted)
        counts = torch.searchsorted(tokens, wanted, right=True) - low
        if int(counts.sum()) * _MASK_SHARE > matrix.numel():
            matrix.masked_fill_(self.columns.token[None] == wanted[:, None], torch.inf)
            return
        query = torch.arange(len(at), device=at.device).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        place = torch.arange(len(query), device=at.device) - before[query] + low[query]
        matrix[query, by_token[place]] = torch.inf


def count_candidates(
    queries: Points, bank: Points, *, same_token: SameToken = "any", distinct: bool = True
) -> Int[Tensor, " queries"]:
    """How many neighbors each query could have: eligible rows of the bank, or with `distinct` their different keys.

    The rules are those of `find`. This is the m of the chance level k/m of a neighborhood overlap. From sorted tables, without a
    matrix of queries by rows.

    Args:
        queries: the points to find neighbors of (their `pool` is not read).
        bank: where neighbors are looked for.
        same_token: whether neighbors may, must, or must not have the query's token id.
        distinct: whether rows of one key count once, and the query's own key not at all.

    Returns:
        counts, from 0 to the number of points in the bank.

    Example:
        >>> import torch
        >>> from basin_lens.neighbors import Points, count_candidates
        >>> points = Points(torch.eye(4), torch.arange(4), torch.zeros(4).long(), torch.tensor([0, 0, 1, -1]), torch.ones(4).bool())
        >>> count_candidates(points, points).tolist()
        [2, 2, 3, 3]
    """
    columns = Columns.of(bank, distinct)
    rules = Rules.of(queries, columns, same_token)
    everyone = torch.zeros_like(queries.group)
    if same_token == "any":
        return _count(rules, everyone, torch.zeros_like(columns.token))
    same = _count(rules, queries.token, columns.token)
    return same if same_token == "only" else _count(rules, everyone, torch.zeros_like(columns.token)) - same


def _count(rules: Rules, kind: Tensor, column_kind: Tensor) -> Tensor:
    """Eligible columns of the query's kind, whatever the tokens."""
    columns, grouped = rules.columns, rules.group >= 0
    kinds = torch.unique(torch.cat([kind, column_kind]), return_inverse=True)[1]
    homes = torch.unique(torch.cat([rules.group, columns.home]), return_inverse=True)[1]
    both = homes * (len(kinds) + 1) + kinds
    n = len(kind)
    lead, second = slice(n, n + columns.leads), slice(n + columns.leads, None)
    answer = _occurrences(kinds[lead], kinds[:n])
    answer = answer - torch.where(grouped, _occurrences(both[lead], both[:n]) - _occurrences(both[second], both[:n]), 0)
    for own, stand_in in zip(rules.own.unbind(1), (False, True), strict=True):
        there = own.clamp_min(0)
        open_to = ((columns.home[there] == rules.group) & grouped) == stand_in
        answer = answer - ((own >= 0) & open_to & (column_kind[there] == kind)).long()
    return answer


def _occurrences(values: Tensor, wanted: Tensor) -> Tensor:
    ordered = values.sort().values
    return torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)


def _places(values: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted value is among these different values; -1: nowhere."""
    if not len(values):
        return torch.full_like(wanted, -1, dtype=torch.int64)
    ordered, order = values.sort()
    at = torch.searchsorted(ordered, wanted.to(values.dtype)).clamp_max(len(values) - 1)
    return torch.where(ordered[at] == wanted, order[at], -1)
