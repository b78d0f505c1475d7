"""`neighbors.find` against scikit-learn and against every rule written out in plain numpy."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from basin_lens.errors import NeighborError
from basin_lens.neighbors import Points, find, prefix_keys
from basin_lens.neighbors import exact as exact_search
from tests.neighbors.points import as_points, each_backend, each_exact, everywhere_else, gaussian, reference, worlds


@pytest.mark.many
@each_exact
@settings(max_examples=60, deadline=None)
@given(worlds(), st.sampled_from(["any", "only", "exclude"]), st.booleans())
def test_every_rule_l2(backend, world, same_token, distinct):
    """States are whole numbers, so that ties are exact and must go to the lower row."""
    queries, bank, k = world
    got = find(queries, bank, k, same_token=same_token, distinct=distinct, backend=backend)
    rows, distances = reference(queries, bank, k, "l2", same_token, distinct)
    np.testing.assert_array_equal(got.rows.numpy(), rows)
    np.testing.assert_allclose(got.distances.numpy(), distances, rtol=1e-5, atol=1e-6)


@pytest.mark.many
@each_exact
@settings(max_examples=60, deadline=None)
@given(worlds(), st.sampled_from(["any", "only", "exclude"]))
def test_every_rule_cosine(backend, world, same_token):
    """Ties in angle are broken by rounding in either implementation, so distances and rules are compared, not rows."""
    queries, bank, k = world
    assume(bool((queries.states.norm(dim=1) > 0).all() & (bank.states.norm(dim=1) > 0).all()))
    got = find(queries, bank, k, metric="cosine", same_token=same_token, backend=backend)
    _, distances = reference(queries, bank, k, "cosine", same_token)
    np.testing.assert_allclose(got.distances.numpy(), distances, atol=1e-6)
    for i, rows in enumerate(got.rows):
        rows = rows[rows >= 0]
        assert bool(bank.pool[rows].all())
        assert int(queries.key[i]) not in bank.key[rows].tolist()
        assert len(set(bank.key[rows].tolist())) == len(rows)
        assert not bool(((bank.group[rows] == queries.group[i]) & (queries.group[i] >= 0)).any())
        if same_token != "any":
            assert bool(((bank.token[rows] == queries.token[i]) == (same_token == "only")).all())


@each_exact
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_scikit_learn(metric, seed, backend):
    states = gaussian(300, 24, seed)
    got = find(as_points(states), as_points(states), 15, metric=metric, backend=backend)
    rows, distances = everywhere_else(states, 15, metric)
    np.testing.assert_array_equal(got.rows.numpy(), rows)
    np.testing.assert_allclose(got.distances.numpy(), distances, rtol=2e-5, atol=1e-6)


@each_exact
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_group_exclusion_on_many_points(metric, backend):
    states = gaussian(240, 16, seed=9)
    points = as_points(states, group=torch.arange(240) // 20)
    got = find(points, points, 10, metric=metric, backend=backend)
    rows, distances = reference(points, points, 10, metric, "any")
    np.testing.assert_array_equal(got.rows.numpy(), rows)
    np.testing.assert_allclose(got.distances.numpy(), distances, rtol=2e-5, atol=1e-6)


@each_exact
def test_large_common_offset_is_exact(backend):
    states = gaussian(400, 16, seed=2) + 1e3
    got = find(as_points(states), as_points(states), 12, backend=backend)
    rows, distances = everywhere_else(states, 12, "l2")
    np.testing.assert_array_equal(got.rows.numpy(), rows)
    np.testing.assert_allclose(got.distances.numpy(), distances, rtol=1e-5)


@each_exact
def test_one_huge_state_does_not_blur_the_others(backend):
    """A massive activation in the bank moves its mean far away; distances between the others must keep their digits."""
    states = 1e-2 * gaussian(200, 8, seed=3)
    states[7, 0] = 1e5
    got = find(as_points(states), as_points(states), 10, backend=backend)
    rows, distances = everywhere_else(states, 10, "l2")
    others = np.arange(200) != 7
    np.testing.assert_array_equal(got.rows.numpy()[others], rows[others])
    np.testing.assert_allclose(got.distances.numpy()[others], distances[others], rtol=1e-4)


@each_exact
def test_near_points_far_from_the_center_are_ranked_exactly(backend):
    """Two tight clusters: the product form alone is off by more than the distances within a cluster."""
    states = torch.cat([1e-3 * gaussian(60, 6, seed=4) + 50, 1e-3 * gaussian(60, 6, seed=5) - 50])
    got = find(as_points(states), as_points(states), 8, backend=backend)
    rows, distances = everywhere_else(states, 8, "l2")
    np.testing.assert_allclose(got.distances.numpy(), distances, rtol=1e-4)
    np.testing.assert_array_equal(got.rows.numpy(), rows)


@each_exact
def test_thousands_of_rows_sharing_few_keys(backend):
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(40, (4000,), generator=generator)
    group = torch.randint(50, (4000,), generator=generator)
    kinds = gaussian(40, 12, seed=1)
    points = as_points(kinds[key], key=key, token=key % 5, group=group)
    queries = as_points(kinds[key[:30]], key=key[:30], token=key[:30] % 5, group=group[:30])
    got = find(queries, points, 15, backend=backend)
    rows, distances = reference(queries, points, 15, "l2", "any")
    np.testing.assert_array_equal(got.rows.numpy(), rows)
    np.testing.assert_allclose(got.distances.numpy(), distances, rtol=1e-5)


@each_backend
def test_fewer_distinct_keys_than_k(backend):
    """Nine rows but three states: two distinct neighbors, then nothing."""
    key = torch.arange(9) % 3
    points = as_points(gaussian(3, 4, seed=6)[key], key=key)
    got = find(points, points, 5, backend=backend)
    assert bool((got.rows[:, :2] >= 0).all())
    assert bool((got.rows[:, 2:] == -1).all())
    assert bool(got.distances[:, 2:].isnan().all())
    assert not bool(got.complete.any())


@each_backend
@pytest.mark.parametrize("k", [1, 4])
def test_group_that_shuts_out_everything(k, backend):
    points = as_points(gaussian(6, 3, seed=0), group=torch.zeros(6, dtype=torch.int64))
    got = find(points, points, k, backend=backend)
    assert bool((got.rows == -1).all())
    assert bool(got.distances.isnan().all())


@each_backend
def test_complete_says_which_queries_have_k(backend):
    points = as_points(gaussian(6, 3, seed=0), group=torch.tensor([0, 0, 0, 0, 1, 1]))
    assert find(points, points, 3, backend=backend).complete.tolist() == [False] * 4 + [True] * 2


@each_backend
def test_whole_bank_as_neighbors(backend):
    states = gaussian(12, 3, seed=8)
    got = find(as_points(gaussian(5, 3, seed=9), key=torch.arange(100, 105)), as_points(states), 12, backend=backend)
    assert bool((got.rows.sort(dim=1).values == torch.arange(12)).all())


@each_exact
def test_duplicates_and_the_query_itself_count_when_not_distinct(backend):
    key = torch.tensor([0, 0, 1, 2])
    points = as_points(torch.tensor([[0.0], [0.0], [1.0], [5.0]]), key=key)
    got = find(points, points, 3, distinct=False, backend=backend)
    assert got.rows[0].tolist() == [0, 1, 2]
    assert got.distances[0].tolist() == [0, 0, 1]


@each_exact
@pytest.mark.parametrize("seed", range(4))
def test_ties_go_to_the_lower_row(seed, backend):
    """Whole-number states, so that most distances are met several times over, exactly."""
    points = as_points((1.5 * gaussian(150, 5, seed)).round(), group=torch.arange(150) // 5)
    got = find(points, points, 10, backend=backend)
    rows, distances = reference(points, points, 10, "l2", "any")
    np.testing.assert_array_equal(got.rows.numpy(), rows)
    np.testing.assert_allclose(got.distances.numpy(), distances, rtol=1e-5)


@each_exact
def test_a_constant_map_is_all_ties(backend):
    """Different prefixes, one state: the lowest rows, whatever the search fetched first."""
    points = as_points(torch.full((300, 4), 0.3))
    got = find(points, points, 3, backend=backend)
    assert got.rows[0].tolist() == [1, 2, 3]
    assert bool((got.rows[3:] == torch.arange(3)).all())
    assert bool((got.distances == 0).all())


@pytest.mark.many
@each_exact
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("values", [1, 100, 5000])
def test_chunks_give_the_same_answer(monkeypatch, metric, values, backend):
    key = torch.arange(150) % 90
    points = as_points(gaussian(90, 8, seed=2)[key], key=key, token=key % 3, group=torch.arange(150) // 10)
    whole = find(points, points, 6, metric=metric, same_token="exclude", backend=backend)
    monkeypatch.setattr(exact_search, "_CHUNK_VALUES", values)
    pieces = find(points, points, 6, metric=metric, same_token="exclude", backend=backend)
    assert torch.equal(pieces.rows, whole.rows)
    torch.testing.assert_close(pieces.distances, whole.distances, equal_nan=True)


@pytest.mark.parametrize("seed", range(3))
def test_translation_and_rotation_change_nothing(seed):
    states = gaussian(200, 10, seed)
    rotation = torch.linalg.qr(gaussian(10, 10, seed + 50).double())[0]
    moved = (states.double() @ rotation + 20 * gaussian(1, 10, seed + 90).double()).float()
    before, after = (find(as_points(s), as_points(s), 9) for s in (states, moved))
    assert torch.equal(before.rows, after.rows)
    torch.testing.assert_close(before.distances, after.distances, rtol=1e-4, atol=1e-4)


def test_scaling_changes_nothing_in_angle():
    states = gaussian(120, 7, seed=3)
    scaled = states * (0.1 + gaussian(120, 1, seed=4).abs())
    before, after = (find(as_points(s), as_points(s), 9, metric="cosine") for s in (states, scaled))
    assert torch.equal(before.rows, after.rows)
    torch.testing.assert_close(before.distances, after.distances, rtol=1e-4, atol=1e-6)


@each_exact
def test_permuted_bank_permutes_the_answer(backend):
    states, order = gaussian(150, 6, seed=5), torch.randperm(150, generator=torch.Generator().manual_seed(1))
    token, group = torch.arange(150) % 4, torch.arange(150) // 15
    queries = as_points(states, token=token, group=group)
    bank = as_points(states[order], key=order, token=token[order], group=group[order])
    plain, shuffled = (find(queries, b, 7, same_token="exclude", backend=backend) for b in (queries, bank))
    assert torch.equal(order[shuffled.rows], plain.rows)


def test_first_k_are_the_k_nearest():
    points = as_points(gaussian(80, 5, seed=7))
    many, few = find(points, points, 12).first(4), find(points, points, 4)
    assert torch.equal(many.rows, few.rows)
    torch.testing.assert_close(many.distances, few.distances)


@each_backend
def test_no_queries_no_neighbors(backend):
    points = as_points(gaussian(8, 3, seed=0))
    nobody = Points(*(field[:0] for field in (points.states, points.key, points.token, points.group, points.pool)))
    assert find(nobody, points, 2, backend=backend).rows.shape == (0, 2)


@each_backend
@pytest.mark.parametrize("k", [-1, 0, 6])
def test_k_outside_the_pool(k, backend):
    points = as_points(gaussian(9, 3, seed=0), pool=torch.arange(9) < 5)
    with pytest.raises(NeighborError, match=rf'between 1 and the bank\'s 5 points.*got {k}.*bank="reference"'):
        find(points, points, k, backend=backend)


@each_exact
@pytest.mark.parametrize("same_token", ["any", "only", "exclude"])
def test_group_that_covers_nearly_everything(backend, same_token):
    """Whatever is fetched first is of the own group: everything must be fetched again."""
    group = torch.zeros(1500, dtype=torch.int64)
    group[::40] = 1 + torch.arange(38) // 2
    points = as_points(gaussian(1500, 6, seed=0), token=torch.arange(1500) % 3, group=group)
    queries = as_points(points.states[:45], key=torch.arange(45), token=torch.arange(45) % 3, group=group[:45])
    got = find(queries, points, 12, same_token=same_token, backend=backend)
    rows, distances = reference(queries, points, 12, "l2", same_token)
    np.testing.assert_array_equal(got.rows.numpy(), rows)
    np.testing.assert_allclose(got.distances.numpy(), distances, rtol=1e-5)


sequences_of_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(sequences_of_tokens, sequences_of_tokens)
def test_prefix_keys_are_equal_where_prefixes_are(first, second):
    """Within one capture and across two."""
    keys = torch.cat(prefix_keys(first, second)).tolist()
    prefixes = [tuple(s[: end + 1]) for sequences in (first, second) for s in sequences for end in range(len(s))]
    assert len(keys) == len(prefixes)
    for key_a, prefix_a in zip(keys, prefixes, strict=True):
        for key_b, prefix_b in zip(keys, prefixes, strict=True):
            assert (key_a == key_b) == (prefix_a == prefix_b)


def test_prefix_keys_lengths_follow_the_captures():
    one, two = prefix_keys([[5, 6], [5]], [[6]])
    assert (one.shape, two.shape) == ((3,), (1,))
    assert one[0] == one[2]
    assert two[0] not in one
