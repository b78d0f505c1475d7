"""Tokens in groups of one size: alike in one value, of different units, no two of them with a neighbor in common.

A matching, not a greedy pass. A greedy one in order of the value leaves most tokens over where a few points are everyone's
neighbor.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.optimize import linear_sum_assignment

_GROUPS_AT_ONCE = 256
_ROUNDS = 24  # tries to place those left over by taking groups apart
_APART = 3.0  # groups taken apart, as a multiple of the groups that those left over would make
_NEAR = 64  # points near in value among which partners are drawn
_FORBIDDEN = 1e6  # beside differences of a logarithm


def matched_groups(
    values: Float[np.ndarray, " n"],
    units: Int[np.ndarray, " n"],
    neighbors: Int[np.ndarray, "n k"],
    keys: Int[np.ndarray, " n"],
    *,
    size: int,
    seed: int,
) -> Int[np.ndarray, "groups size"]:
    """Groups of points with nearly equal values; a point is in one group at most, and few are left over where few must be.

    The order of the points changes nothing: they are put in order of value and key first, and every draw is made in that order.

    Args:
        values: what is to be nearly equal within a group.
        units: no two points of a group have the same unit.
        neighbors: ids of each point's neighbors; no two points of a group have one in common.
        keys: tell points of equal value apart.
        size: points in a group.
        seed: which points meet, where several could.

    Returns:
        indices of the points, one row per group.
    """
    order = np.lexsort((keys, values))
    pool = _Pool(values[order], units[order], _incidence(neighbors[order]), size, np.random.default_rng(seed))
    groups = np.empty((0, size), np.int64)
    left = np.empty(0, np.int64)
    for window in np.array_split(np.arange(len(order)), max(1, -(-len(order) // (_GROUPS_AT_ONCE * size)))):
        made, over = pool.solve(window, pool.side_by_side(window), pool.conflicts(window))
        groups, left = np.concatenate([groups, made]), np.concatenate([left, over])
    for _ in range(_ROUNDS):
        if len(left) < size:
            break
        groups, left = pool.place_left(groups, left)
    # Places within a group are drawn, so that nothing follows from the order in which its members were found.
    return order[pool.rng.permuted(groups, axis=1)] if len(groups) else groups


def nearest_partners(
    own: tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, "n k"]],
    others: tuple[Float[np.ndarray, " m"], Int[np.ndarray, " m"], Int[np.ndarray, "m k"]],
    *,
    count: int,
    draws: Sequence[Sequence[int]] | None = None,
) -> Int[np.ndarray, "n count"]:
    """For each point, other points near in value, all of them of different units and no two with a neighbor in common.

    Several points may have the same partners: nobody is left over because another was served first.

    Args:
        own: values, units and ids of neighbors of the points that get partners.
        others: the same of those among whom partners are sought; units and ids are comparable with `own`'s.
        count: partners of each.
        draws: a seed for each point, with which its partners are drawn among the 64 nearest: what points have in common for having
            the same partners, no interval over them would hold. None: the nearest.

    Returns:
        indices of `others`, as they were taken; a row of -1 where there are too few.
    """
    chosen = np.full((len(own[0]), count), -1, np.int64)
    sets = [frozenset(ids) for ids in others[2].tolist()]
    for index, (value, unit, ids) in enumerate(zip(own[0], own[1].tolist(), own[2].tolist(), strict=True)):
        units, taken, partners = {unit}, set(ids), []
        order = np.argsort(np.abs(others[0] - value), kind="stable")
        if draws is not None:
            order[:_NEAR] = np.random.default_rng(draws[index]).permutation(order[:_NEAR])
        for other in order.tolist():
            if others[1][other] in units or not taken.isdisjoint(sets[other]):
                continue
            partners.append(other)
            if len(partners) == count:
                chosen[index] = partners
                break
            units.add(int(others[1][other]))
            taken |= sets[other]
    return chosen


def _incidence(neighbors: Int[np.ndarray, "n k"]) -> sparse.csr_array:
    """One row per point, one column per neighbor that any of them has."""
    n, k = neighbors.shape
    _, columns = np.unique(neighbors, return_inverse=True)
    ones = np.ones(n * k, np.float32)
    return sparse.csr_array((ones, columns.reshape(-1), np.arange(0, n * k + 1, k)), shape=(n, int(columns.max(initial=-1)) + 1))


class _Pool:
    """Points in order of their values, and how some of them are put into groups."""

    def __init__(
        self,
        values: Float[np.ndarray, " n"],
        units: Int[np.ndarray, " n"],
        incidence: sparse.csr_array,
        size: int,
        rng: np.random.Generator,
    ) -> None:
        self.values, self.units, self.incidence, self.size, self.rng = values, units, incidence, size, rng

    def side_by_side(self, points: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        """An order in which points that follow one another in value stand at the same place of different places of groups."""
        count = len(points) // self.size
        rows = np.arange(count * self.size).reshape(count, self.size)
        return np.concatenate([self.rng.permuted(rows, axis=1).T.reshape(-1), np.arange(count * self.size, len(points))])

    def most_conflicts_first(self, conflicts: Bool[np.ndarray, "m m"]) -> Int[np.ndarray, " m"]:
        """An order that begins with the points that fit in fewest groups; a factor lets chance have its say."""
        return np.argsort(-conflicts.sum(1) * self.rng.uniform(0.5, 1, len(conflicts)), kind="stable")

    def solve(
        self, points: Int[np.ndarray, " m"], waiting: Int[np.ndarray, " m"], conflicts: Bool[np.ndarray, "m m"]
    ) -> tuple[Int[np.ndarray, "groups size"], Int[np.ndarray, " left"]]:
        """Full groups of some points, and those left over: one place of every group after the other, each an assignment problem.

        `waiting`: the order in which points are offered; the first found the groups. `conflicts`: which of them may not meet.
        """
        count = len(points) // self.size
        values = self.values[points]
        first, waiting, width = waiting[:count], waiting[count:], count
        members, filled = np.full((count, self.size), -1), np.ones(count, np.int64)
        members[:, 0] = first
        sums, barred = values[first], conflicts[first]
        kept = np.arange(count)
        while len(open_ := kept[filled[kept] < self.size]):
            offered = waiting[:width]
            blocked = barred[np.ix_(open_, offered)]
            far = np.abs((sums[open_] / filled[open_])[:, None] - values[offered]) + _FORBIDDEN * blocked
            at, to = linear_sum_assignment(far)
            fits = ~blocked[at, to]
            at, to = open_[at[fits]], offered[to[fits]]
            members[at, filled[at]] = to
            filled[at] += 1
            sums[at] += values[to]
            barred[at] |= conflicts[to]
            waiting = waiting[~np.isin(waiting, to)]
            if not len(to) and len(offered) < len(waiting):
                width = len(waiting)
            elif not len(to):
                # Fewer groups can be filled: half of those that lack most give their points back.
                given_up = open_[np.argsort(filled[open_], kind="stable")][: -(-len(open_) // 2)]
                kept = kept[~np.isin(kept, given_up)]
                waiting = np.concatenate([waiting, *(members[group, : filled[group]] for group in given_up)])
        full = members[kept]
        return points[full], np.setdiff1d(points, points[full])

    def place_left(
        self, groups: Int[np.ndarray, "groups size"], left: Int[np.ndarray, " left"]
    ) -> tuple[Int[np.ndarray, "new size"], Int[np.ndarray, " rest"]]:
        """Take some groups apart, solve again for their members and those left over, and keep the outcome if it is no worse."""
        some = left[: _GROUPS_AT_ONCE * self.size // 4] if len(left) <= _GROUPS_AT_ONCE * self.size // 4 else self._stretch(left)
        wanted = min(len(groups), int(_APART * len(some)) // self.size + self.size)
        # The nearer a group is in value the sooner it is taken; the draw lets other groups be tried in the next round.
        far = np.abs(self.values[groups].mean(1)[:, None] - self.values[some]).min(1) if len(groups) else np.empty(0)
        taken = np.argsort((far + 1e-3) * self.rng.uniform(0.1, 1, len(groups)), kind="stable")[:wanted]
        pool = np.sort(np.concatenate([some, groups[taken].reshape(-1)]))
        conflicts = self.conflicts(pool)
        made, over = self.solve(pool, self.most_conflicts_first(conflicts), conflicts)
        if len(made) < wanted:
            return groups, left
        return np.concatenate([np.delete(groups, taken, 0), made]), np.sort(np.concatenate([np.setdiff1d(left, some), over]))

    def _stretch(self, left: Int[np.ndarray, " left"]) -> Int[np.ndarray, " some"]:
        """A stretch of those left over, next to one another in value."""
        length = _GROUPS_AT_ONCE * self.size // 4
        first = int(self.rng.integers(len(left) - length + 1))
        return np.sort(left)[first : first + length]

    def conflicts(self, points: Int[np.ndarray, " m"]) -> Bool[np.ndarray, "m m"]:
        """Which points may not meet: those of one unit, or with a neighbor in common; a point conflicts with itself."""
        rows = self.incidence[points]
        return ((rows @ rows.T).toarray() > 0) | (self.units[points][:, None] == self.units[points])
