"""`neighbors.find` against scikit-learn and against every rule written out in plain numpy."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from basin_lens.errors import NeighborError
from basin_lens.neighbors import Points, approximate, count_candidates, find, prefix_keys
from basin_lens.neighbors import exact as exact_search

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs FAISS")
EXACT = ["torch", pytest.param("faiss", marks=needs_faiss)]
each_exact = pytest.mark.parametrize("backend", EXACT)
each_backend = pytest.mark.parametrize("backend", [*EXACT, "approximate"])


def as_points(states, key=None, token=None, group=None, pool=None) -> Points:
    """Points that share nothing and are all in the pool, unless told otherwise."""
    states = torch.as_tensor(states, dtype=torch.float32)
    n = len(states)
    return Points(
        states,
        torch.arange(n) if key is None else torch.as_tensor(key),
        torch.zeros(n, dtype=torch.int64) if token is None else torch.as_tensor(token),
        torch.full((n,), -1) if group is None else torch.as_tensor(group),
        torch.ones(n, dtype=torch.bool) if pool is None else torch.as_tensor(pool),
    )


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def everywhere_else(states: torch.Tensor, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's neighbors of each point among the others, in float64: rows and distances."""
    # Without X, kneighbors leaves each point out of its own neighbors.
    known = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean" if metric == "l2" else "cosine")
    distances, rows = known.fit(states.double().numpy()).kneighbors()
    return rows, distances


def reference(queries: Points, bank: Points, k: int, metric: str, same_token: str, distinct: bool = True):
    """The rules of scores.md, one candidate at a time, in float64."""
    far, near = queries.states.double().numpy(), bank.states.double().numpy()
    if metric == "cosine":
        far, near = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (far, near))
    distances = np.linalg.norm(far[:, None] - near[None], axis=2) if metric == "l2" else 1 - far @ near.T
    rows, found = np.full((len(far), k), -1), np.full((len(far), k), np.nan)
    keys, group, token, pool = (field.numpy() for field in (bank.key, bank.group, bank.token, bank.pool))
    for i, (own, own_group, own_token) in enumerate(
        zip(queries.key.tolist(), queries.group.tolist(), queries.token.tolist(), strict=True)
    ):
        allowed = pool & ~((own_group >= 0) & (group == own_group))
        if same_token != "any":
            allowed &= (token == own_token) == (same_token == "only")
        used, count = {own}, 0
        for j in np.argsort(distances[i], kind="stable"):  # of equal ones, the lower row first
            if count == k:
                break
            if not allowed[j] or (distinct and int(keys[j]) in used):
                continue
            rows[i, count], found[i, count] = j, distances[i, j]
            used.add(int(keys[j]))
            count += 1
    return rows, found


@st.composite
def worlds(draw):
    """A small bank of few distinct states: many duplicates, many ties, any groups, tokens and pool.

    Sizes are hypothesis's, values come from a seed: drawn one by one they would take most of the time of these tests.
    """
    kinds, d = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind_states, kind_token = rng.integers(-2, 3, (kinds, d)), rng.integers(0, 3, kinds)

    def rows(least: int, most: int) -> Points:
        n, share = draw(st.integers(least, most)), draw(st.sampled_from([0.2, 0.5, 1.0]))
        key = rng.integers(0, kinds, n)
        return as_points(kind_states[key], key, kind_token[key], rng.integers(-1, 4, n), rng.random(n) <= share)

    queries, bank = rows(1, 5), rows(2, 14)
    size = int(bank.pool.sum())
    assume(size > 0)
    return queries, bank, draw(st.integers(1, min(size, 6)))


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


def low_rank(n: int, d: int, rank: int, seed: int, *, rows_per_group: int = 30) -> Points:
    """States near a subspace, in groups whose rows are near each other, with every 25th key met again."""
    states = gaussian(n, rank, seed) @ gaussian(rank, d, seed + 1) + 0.3 * rank**0.5 * gaussian(n, d, seed + 2)
    group = torch.arange(n) // rows_per_group
    states = states + (rank**0.5 * gaussian(int(group[-1]) + 1, d, seed + 3))[group]
    key = torch.arange(n)
    key[::25] = key[: len(key[::25])]
    return as_points(states[key], key=key, token=key % 7, group=group)


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
