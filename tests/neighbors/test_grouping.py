"""Groups by matching: valid, near in value, the same whatever the order, and hardly anyone left over."""

import numpy as np
import pytest

from basin_lens.neighbors.grouping import matched_groups, nearest_partners

SIZE = 4


def world(n=240, k=5, units=30, hubs=0.0, seed=0):
    """Values, units, neighbors and keys of points; a share of them has one of three neighbors that are everyone's."""
    rng = np.random.default_rng(seed)
    neighbors = np.stack([1000 + rng.choice(20 * n, k, replace=False) for _ in range(n)])
    for hub in range(3):
        neighbors[rng.random(n) < hubs, hub] = hub
    return rng.normal(size=n), rng.permutation(np.arange(n) % units), neighbors, rng.permutation(n)


def grouped(values, units, neighbors, keys, size=SIZE, seed=0):
    return matched_groups(values, units, neighbors, keys, size=size, seed=seed)


def check(groups, units, neighbors):
    assert len(set(groups.flatten().tolist())) == groups.size
    for group in groups:
        assert len(set(units[group].tolist())) == len(group)
        held = neighbors[group].flatten().tolist()
        assert len(set(held)) == len(held)


@pytest.mark.parametrize("hubs", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("size", [3, 4, 5])
def test_groups_are_valid_and_few_points_are_left_over(size, hubs):
    """A neighbor of a fifth of all points leaves room for everyone up to groups of five; a greedy pass leaves many over."""
    values, units, neighbors, keys = world(hubs=hubs if size < 5 else hubs / 2)
    groups = grouped(values, units, neighbors, keys, size)
    check(groups, units, neighbors)
    assert groups.shape[1] == size
    assert groups.size > 0.95 * len(values)


def test_a_greedy_pass_would_leave_many_over():
    """The case that the matching is for: hubs that belong to a stretch of values."""
    values, units, neighbors, keys = world()
    order = np.argsort(values)
    neighbors[order[:40], 0] = 1
    neighbors[order[20:70], 1] = 2
    groups = grouped(values, units, neighbors, keys)
    check(groups, units, neighbors)
    assert groups.size > 0.95 * len(values)
    assert greedy(order, units, neighbors) < 0.9 * len(values)


def greedy(order, units, neighbors):
    """How many points a pass in order of value places, which fills one group after the other with what fits next."""
    placed, group = 0, []
    for point in order:
        if any(units[point] == units[q] or set(neighbors[point]) & set(neighbors[q]) for q in group):
            continue
        group.append(point)
        if len(group) == SIZE:
            placed, group = placed + SIZE, []
    return placed


def test_a_planted_matching_is_found():
    """Only as many units as a group has points: each group must take one of each."""
    values, _, neighbors, keys = world(n=120)
    units = np.repeat(np.arange(SIZE), 30)
    groups = grouped(values, units, neighbors, keys)
    check(groups, units, neighbors)
    assert groups.size == 120


def test_values_are_nearly_equal_within_groups():
    values, units, neighbors, keys = world(n=1200, units=60)
    groups = grouped(values, units, neighbors, keys)
    spread = np.ptp(values[groups], axis=1)
    assert np.median(spread) < 0.05 * values.std()
    assert np.quantile(spread, 0.95) < values.std()


def as_sets(groups, names):
    return {frozenset(names[group].tolist()) for group in groups}


def test_the_order_of_the_points_does_not_matter():
    values, units, neighbors, keys = world(hubs=0.15)
    order = np.random.default_rng(3).permutation(len(values))
    mixed = grouped(values[order], units[order], neighbors[order][:, ::-1], keys[order])
    plain = grouped(values, units, neighbors, keys)
    assert as_sets(mixed, keys[order]) == as_sets(plain, keys)
    assert keys[order][mixed].tolist() == keys[plain].tolist()


def test_points_of_equal_value_are_told_apart_by_their_keys():
    values, units, neighbors, keys = world()
    values = np.round(values)
    order = np.random.default_rng(3).permutation(len(values))
    assert as_sets(grouped(values[order], units[order], neighbors[order], keys[order]), keys[order]) == as_sets(
        grouped(values, units, neighbors, keys), keys
    )


def test_a_seed_decides_who_meets():
    given = world()
    assert grouped(*given, seed=1).tolist() == grouped(*given, seed=1).tolist()
    assert as_sets(grouped(*given, seed=1), given[3]) != as_sets(grouped(*given, seed=2), given[3])


def test_names_of_units_and_neighbors_do_not_matter():
    values, units, neighbors, keys = world(hubs=0.1)
    rng = np.random.default_rng(5)
    renamed = rng.permutation(units.max() + 1)[units]
    names = np.unique(neighbors)
    others = rng.permutation(len(names))[np.searchsorted(names, neighbors)]
    assert grouped(values, renamed, others, keys).tolist() == grouped(values, units, neighbors, keys).tolist()


def test_where_no_matching_exists_as_many_as_can_be_are_placed():
    """Three points of five have a neighbor in common, and no group holds two of them."""
    values, units, neighbors, keys = world()
    neighbors[np.random.default_rng(1).random(len(values)) < 0.6, 0] = 7
    groups = grouped(values, units, neighbors, keys)
    check(groups, units, neighbors)
    assert len(groups) > 0.9 * ((neighbors[:, 0] != 7).sum() // (SIZE - 1))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_too_few_points_make_no_group(n):
    values, units, neighbors, keys = (each[:n] for each in world())
    assert grouped(values, units, neighbors, keys).shape == (0, SIZE)


def test_one_unit_makes_no_group():
    values, units, neighbors, keys = world()
    assert grouped(values, np.zeros_like(units), neighbors, keys).shape == (0, SIZE)


@pytest.mark.slow
def test_many_points_take_no_matrix_of_all_of_them():
    values, units, neighbors, keys = world(n=20_000, units=300, hubs=0.1)
    groups = grouped(values, units, neighbors, keys)
    check(groups, units, neighbors)
    assert groups.size > 0.97 * len(values)


def test_partners_are_the_nearest_that_may_meet():
    """Against a loop over all points in order of distance."""
    rng = np.random.default_rng(3)
    own, others = ((rng.normal(size=n), rng.integers(0, 9, n), rng.integers(0, 60, (n, 3))) for n in (12, 80))
    chosen = nearest_partners(own, others, count=3)
    assert (chosen >= 0).all()
    for index, row in enumerate(chosen.tolist()):
        units, taken, expected = {own[1][index]}, set(own[2][index]), []
        for other in sorted(range(80), key=lambda o: abs(others[0][o] - own[0][index])):
            if len(expected) < 3 and others[1][other] not in units and not taken & set(others[2][other]):
                expected.append(other)
                units.add(others[1][other])
                taken |= set(others[2][other])
        assert row == expected
    assert (nearest_partners(own, tuple(each[:2] for each in others), count=3) == -1).all()
