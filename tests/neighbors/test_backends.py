"""Back ends against one another: exact ones agree, approximate ones say what they miss."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basin_lens.errors import NeighborError
from basin_lens.neighbors import approximate, count_candidates, find
from basin_lens.neighbors import exact as exact_search
from tests.neighbors.points import as_points, each_exact, gaussian, low_rank, needs_faiss, reference, worlds


@needs_faiss
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("same_token", ["any", "only", "exclude"])
def test_exact_backends_give_the_same(metric, same_token):
    """Bit by bit, at a size where the search goes by blocks of columns."""
    points = low_rank(5000, 40, 10, seed=0)
    queries = points.some(torch.arange(0, 5000, 7))
    one, other = (find(queries, points, 15, metric=metric, same_token=same_token, backend=b) for b in ("torch", "faiss"))
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.distances, other.distances)
    assert one.recall is None and other.recall is None
    automatic = find(queries, points, 15, metric=metric, same_token=same_token)
    assert torch.equal(automatic.rows, one.rows)


@needs_faiss
def test_faiss_keeps_its_own_number_of_threads():
    import faiss

    before = faiss.omp_get_max_threads()
    points = as_points(gaussian(50, 4, seed=0))
    find(points, points, 3, backend="faiss")
    assert faiss.omp_get_max_threads() == before


@each_exact
def test_massive_states_in_many_dimensions(backend):
    states = gaussian(2000, 32, seed=0)
    states[::250] *= 1e4
    states[:, 3] += 300
    points = as_points(states, group=torch.arange(2000) // 50)
    queries = points.some(torch.arange(0, 2000, 125))
    got = find(queries, points, 10, backend=backend)
    rows, distances = reference(queries, points, 10, "l2", "any")
    # From a massive state, all others are equally far but for the last digits of float32.
    usual = np.arange(16) % 2 == 1
    np.testing.assert_array_equal(got.rows.numpy()[usual], rows[usual])
    np.testing.assert_allclose(got.distances.numpy(), distances, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(worlds(), st.sampled_from(["any", "only", "exclude"]), st.booleans())
def test_approximate_breaks_no_rule(world, same_token, distinct):
    """What it finds is eligible, at its true distance, in order; and it finds as many as there are."""
    queries, bank, k = world
    got = find(queries, bank, k, same_token=same_token, distinct=distinct, backend="approximate")
    rows, distances = reference(queries, bank, k, "l2", same_token, distinct)
    # Fewer points than candidates: all of them are looked at.
    np.testing.assert_array_equal(got.rows.numpy(), rows)
    np.testing.assert_allclose(got.distances.numpy(), distances, rtol=1e-5, atol=1e-6)


@pytest.mark.many
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("same_token", ["any", "exclude"])
def test_approximate_is_approximate_only_in_what_it_misses(monkeypatch, metric, same_token):
    """A subspace far too small: many are missed, and everything else holds."""
    monkeypatch.setattr(approximate, "_DIMENSIONS", 4)
    points = low_rank(3000, 40, 12, seed=1)
    got = find(points, points, 10, metric=metric, same_token=same_token, backend="approximate")
    exact = find(points, points, 10, metric=metric, same_token=same_token)
    assert bool(got.complete.all())
    assert bool((got.distances[:, 1:] >= got.distances[:, :-1]).all())
    assert bool((got.distances >= exact.distances - 1e-6).all())
    assert not bool((points.group[got.rows] == points.group[:, None]).any())
    keys = torch.cat([points.key[:, None], points.key[got.rows]], dim=1).sort(dim=1).values
    assert bool((keys[:, 1:] != keys[:, :-1]).all())
    if same_token == "exclude":
        assert not bool((points.token[got.rows] == points.token[:, None]).any())
    states = torch.nn.functional.normalize(points.states) if metric == "cosine" else points.states
    far = (states[got.rows] - states[:, None]).norm(dim=2)
    torch.testing.assert_close(got.distances, far.square() / 2 if metric == "cosine" else far)
    assert got.recall is not None and 0.1 < got.recall < 1


@pytest.mark.parametrize("n_queries", [200, 900])
def test_recall_is_what_was_measured(monkeypatch, n_queries):
    """On all queries where they are few, on a sample of them where they are many."""
    monkeypatch.setattr(approximate, "_DIMENSIONS", 4)
    points = low_rank(3000, 40, 12, seed=2)
    queries = points.some(torch.arange(n_queries))
    got, exact = (find(queries, points, 10, backend=b) for b in ("approximate", "torch"))
    found = (got.rows[:, None] == exact.rows[:, :, None]).any(2).float().mean(1)
    assert got.recall is not None
    if n_queries <= approximate.SAMPLE:
        assert got.recall == pytest.approx(float(found.mean()))
    error = float(found.std()) / approximate.SAMPLE**0.5
    assert abs(got.recall - float(found.mean())) < 5 * error
    assert got.first(3).recall == got.recall


@pytest.mark.slow
def test_approximate_finds_nearly_all_of_nearly_low_rank_states():
    points = low_rank(6000, 200, 30, seed=3)
    got, exact = (find(points, points, 15, backend=b) for b in ("approximate", "torch"))
    assert got.recall is not None and got.recall >= approximate.RECALL
    assert float((got.rows[:, None] == exact.rows[:, :, None]).any(2).float().mean()) >= approximate.RECALL - 0.01


def test_more_candidates_where_recall_is_low(monkeypatch):
    points = low_rank(3000, 40, 12, seed=4)
    monkeypatch.setattr(approximate, "_DIMENSIONS", 8)
    widened = find(points, points, 10, backend="approximate").recall
    monkeypatch.setattr(approximate, "_DOUBLINGS", 0)
    narrow = find(points, points, 10, backend="approximate").recall
    assert widened is not None and narrow is not None and widened > narrow


def test_recall_without_neighbors_is_not_made_up():
    points = as_points(gaussian(6, 3, seed=0), group=torch.zeros(6, dtype=torch.int64))
    recall = find(points, points, 2, backend="approximate").recall
    assert recall is not None and np.isnan(recall)


def test_a_backend_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    points = as_points(gaussian(6, 3, seed=0))
    with pytest.raises(NeighborError, match=r"pip install 'basin-lens\[faiss\]'"):
        find(points, points, 2, backend="faiss")
    find(points, points, 2)


@settings(max_examples=100, deadline=None)
@given(worlds(), st.sampled_from(["any", "only", "exclude"]), st.booleans())
def test_candidates_are_counted(world, same_token, distinct):
    """As many as the reference finds when it is asked for everything."""
    queries, bank, _ = world
    rows, _ = reference(queries, bank, len(bank.states), "l2", same_token, distinct)
    counts = count_candidates(queries, bank, same_token=same_token, distinct=distinct)
    assert counts.tolist() == (rows >= 0).sum(1).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 40), st.integers(0, 1000), st.booleans())
def test_smallest_are_the_smallest(some, sixty_fours, count, seed, ties):
    """Through blocks or not."""
    matrix = gaussian(some, 64 * sixty_fours, seed)
    if ties:
        matrix = matrix.round()
    matrix[:, ::5] = torch.inf
    count = min(count, matrix.shape[1])
    values, columns = exact_search.smallest(matrix, count)
    assert torch.equal(values, matrix.sort(dim=1).values[:, :count])
    assert torch.equal(matrix.gather(1, columns), values)
    assert all(len(set(row)) == count for row in columns.tolist())
