"""The rest of the family against known answers, plain-numpy references, and DADApy's and scikit-dimension's numbers."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import basin_lens as bl
from basin_lens import model as door
from basin_lens.analyzers import RunOn, Surroundings
from basin_lens.errors import NeighborError, TransportError
from basin_lens.transport import PatchedBlock, Probe
from tests.conftest import PACKED, TEXTS, make_bridge, make_tokenizer, random_tokens
from tests.fixtures import make_dimensions
from tests.scoring.test_scores import Oracle, facts_of, identity_bridge, make_cloud, near, orthogonal, run, some_rows, variance

A = bl.analyzers
D, Q = 12, 7
FIXTURE = json.loads((Path(make_dimensions.__file__).parent / "dimensions.json").read_text())


def family_cloud(f, *, q=Q, k=15, d=D, seed=0, **given):
    """A cloud with everything that any of them needs; `f` is the block."""
    g = torch.Generator().manual_seed(seed + 100)
    others = 2 + 3 * torch.randn(200, d, generator=g)
    cloud = make_cloud(f, q=q, k=k, d=d, seed=seed)
    chosen_after = cloud.neighbors + 0.3 * torch.randn(q, k, d, generator=g)
    values = {
        "output_preimages": chosen_after,
        "output_neighbors": f(chosen_after),
        "bank": Surroundings(others, f(others[:, None])[:, 0]),
        "output_rows": cloud.rows.roll(5, 0),
        "candidates": torch.full((q,), 60),
        "block": f,
        "query": cloud.neighbors.mean(1) + 0.2 * torch.randn(q, d, generator=g),
        "run_on": fake_run(f),
        "query_token": torch.arange(q) * 3 % 11,
    }
    return replace(cloud, **values | given)


def fake_run(f):
    """Divergence and loss as some function of the block's image alone."""
    return lambda points: RunOn(f(points).square().mean(2), f(points).sum(2))


def values(analyzer, cloud):
    return {name: answer.numpy() for name, answer in analyzer.measure(cloud).items()}


def some(cloud, index):
    """The cloud with some of its queries, in another order."""
    q = len(cloud.query)
    held = {field.name: getattr(cloud, field.name) for field in fields(cloud)}
    return replace(cloud, **{name: v[index] for name, v in held.items() if isinstance(v, torch.Tensor) and len(v) == q})


FAMILY = [
    A.SymmetricContraction(),
    A.AngularContraction(),
    A.EffectiveRankChange(k=15),
    A.NeighborOverlap(),
    A.LocalDimension(k=15),
    A.JacobianGain(),
    A.CentroidEffect(),
]
each = pytest.mark.parametrize("analyzer", FAMILY, ids=lambda a: type(a).__name__)


# -- laws that all of them obey -------------------------------------------------------------------------------------------------


@each
def test_permuting_queries_permutes_the_answer(analyzer):
    """And a query's answer does not depend on which others are measured beside it."""
    cloud = family_cloud(torch.tanh)
    whole = values(analyzer, cloud)
    index = torch.tensor([4, 0, 6])
    for name, part in values(analyzer, some(cloud, index)).items():
        assert part == near(whole[name][index.numpy()], rel=1e-4)
        assert np.isfinite(part).all()


@each
def test_order_of_neighbors_does_not_matter(analyzer):
    """At their full number: the curve of the local dimension starts with the nearest."""
    cloud = family_cloud(torch.tanh)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    if isinstance(analyzer, A.LocalDimension):
        analyzer = A.LocalDimension(k=15, curve=(15,))
    assert {n: near(v, rel=1e-4) for n, v in values(analyzer, cloud.take(order)).items()} == values(analyzer, cloud)


@pytest.mark.parametrize(
    "analyzer",
    [A.SymmetricContraction(), A.EffectiveRankChange(k=15), A.LocalDimension(k=15), A.NeighborOverlap()],
    ids=lambda a: type(a).__name__,
)
def test_rotating_and_moving_all_states_changes_nothing(analyzer):
    """Before the block and after it, each in its own way."""
    cloud = family_cloud(torch.tanh)
    before, after = (lambda x: x @ orthogonal(seed=5) - 2), (lambda x: x @ orthogonal(seed=6) + 3)
    moved = replace(
        cloud,
        query=before(cloud.query),
        neighbors=before(cloud.neighbors),
        images=after(cloud.images),
        output_preimages=before(cloud.output_preimages),
        output_neighbors=after(cloud.output_neighbors),
    )
    assert {n: near(v, rel=1e-3) for n, v in values(analyzer, moved).items()} == values(analyzer, cloud)


@each
def test_two_neighbors_are_the_fewest(analyzer):
    """k=2 (3 for a rank) gives numbers or NaN, never an error, an infinity, or a number out of range."""
    least = 3 if isinstance(analyzer, A.EffectiveRankChange) else 2
    analyzer = replace(analyzer, k=least)
    analyzer.check()
    got = values(analyzer, family_cloud(torch.tanh, k=least))
    for column in analyzer.columns:
        there = got[column.name][~np.isnan(got[column.name])]
        assert np.isfinite(there).all()
        assert ((there >= column.low - 1e-6) & (there <= column.high + 1e-6)).all()


@each
def test_halves_have_a_value_too(analyzer):
    """Those that say that half of the neighbors will do."""
    assert ("halves" in analyzer.needs) == (type(analyzer).__name__ not in ("LocalDimension", "JacobianGain", "CentroidEffect"))
    if "halves" in analyzer.needs:
        for half in family_cloud(torch.tanh).split_half:
            assert all(np.isfinite(v).all() for v in values(analyzer, half).values())


@pytest.mark.parametrize("kind", [A.SymmetricContraction, A.NeighborOverlap, A.CentroidEffect])
@pytest.mark.parametrize("context", ["patched", "solo", "mlp"])
def test_contexts_without_meaning_are_refused(kind, context):
    with pytest.raises(NeighborError, match="native"):
        kind(context=context).check()


@pytest.mark.parametrize(
    ("analyzer", "word"),
    [
        (A.JacobianGain(queries=0), "queries"),
        (A.JacobianGain(directions=0), "directions"),
        (A.JacobianGain(seed=-1), "seed"),
        (A.CentroidEffect(queries=0), "queries"),
        (A.CentroidEffect(seed=-1), "seed"),
        (A.EffectiveRankChange(k=2), "3"),
        (A.LocalDimension(curve=()), "curve"),
        (A.LocalDimension(curve=(10, 5)), "curve"),
        (A.LocalDimension(curve=(1, 5)), "curve"),
        (A.LocalDimension(k=10, curve=(5, 11)), "curve"),
        (A.NeighborOverlap(choice="random"), "nearest"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_options_without_meaning_are_refused(analyzer, word):
    with pytest.raises(NeighborError, match=word):
        analyzer.check()


@pytest.mark.parametrize(("kind", "queries"), [(A.JacobianGain, 64), (A.CentroidEffect, 16)])
def test_costly_ones_are_measured_on_a_sample(kind, queries):
    assert kind().max_queries == queries
    assert kind(queries=5).max_queries == 5
    assert A.Compression().max_queries is None


# -- symmetric contraction ------------------------------------------------------------------------------------------------------


def test_symmetric_contraction_of_an_isometry_is_0():
    for answer in values(A.SymmetricContraction(), family_cloud(lambda x: x @ orthogonal() + 5)).values():
        assert answer == near(np.zeros(Q))


@pytest.mark.parametrize("a", [0.1, 3.0, -2.0])
def test_symmetric_contraction_of_a_scaling(a):
    for answer in values(A.SymmetricContraction(), family_cloud(lambda x: a * x)).values():
        assert answer == near(np.full(Q, -2 * math.log(abs(a))))


def test_symmetric_contraction_by_its_formula():
    cloud = family_cloud(torch.tanh)
    got = values(A.SymmetricContraction(), cloud)
    at_input = np.log(variance(cloud.neighbors) / variance(cloud.images))
    at_output = np.log(variance(cloud.output_preimages) / variance(cloud.output_neighbors))
    assert got["contraction_input_chosen"] == near(at_input)
    assert got["contraction_output_chosen"] == near(at_output)
    assert got["symmetric_contraction"] == near((at_input + at_output) / 2)
    assert values(A.Contraction(), cloud)["contraction"] == near(at_input)


def test_a_block_and_its_reverse_have_opposite_symmetric_contractions():
    cloud = family_cloud(torch.tanh)
    reverse = replace(
        cloud,
        neighbors=cloud.output_neighbors,
        images=cloud.output_preimages,
        output_preimages=cloud.images,
        output_neighbors=cloud.neighbors,
        spread_in=cloud.spread_out,
        spread_out=cloud.spread_in,
    )
    there, back = values(A.SymmetricContraction(), cloud), values(A.SymmetricContraction(), reverse)
    assert back["symmetric_contraction"] == near(-there["symmetric_contraction"])
    assert back["contraction_input_chosen"] == near(-there["contraction_output_chosen"])


def test_choosing_on_one_side_is_biased_and_the_mean_is_not():
    """Two noisy views of the same points: neither contracts the other, but neighbors chosen in one are farther in the other."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal((300, 6))
    one, other = (torch.tensor(base + 0.7 * rng.standard_normal((300, 6)), dtype=torch.float32) for _ in range(2))
    rows = [torch.tensor(np.argsort(cdist(x, x), axis=1)[:, 1:11]) for x in (one, other)]
    cloud = make_cloud(lambda x: x, q=300, k=10, d=6)
    cloud = replace(
        cloud, neighbors=one[rows[0]], images=other[rows[0]], output_preimages=one[rows[1]], output_neighbors=other[rows[1]]
    )
    got = {name: answer.mean() for name, answer in values(A.SymmetricContraction(), cloud).items()}
    assert got["contraction_input_chosen"] < -0.2
    assert got["contraction_output_chosen"] > 0.2
    assert abs(got["symmetric_contraction"]) < 0.05


@pytest.mark.parametrize("constant", [0.5, 1234.567])
def test_symmetric_contraction_of_a_constant_map_is_not_a_number(constant):
    for answer in values(A.SymmetricContraction(), family_cloud(lambda x: torch.full_like(x, constant))).values():
        assert np.isnan(answer).all()


def test_one_degenerate_side_leaves_the_other():
    cloud = family_cloud(torch.tanh)
    got = values(A.SymmetricContraction(), replace(cloud, output_neighbors=torch.ones_like(cloud.output_neighbors)))
    assert np.isfinite(got["contraction_input_chosen"]).all()
    assert np.isnan(got["contraction_output_chosen"]).all()
    assert np.isnan(got["symmetric_contraction"]).all()


# -- angular contraction --------------------------------------------------------------------------------------------------------


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def without_the_common(x, states):
    """Minus the mean, massive dimensions dropped."""
    spread = states.var(0)
    return (x - states.mean(0))[..., spread <= 20 * np.median(spread)]


def angular_reference(cloud):
    inside, outside, before, after = (
        np.asarray(x, np.float64) for x in (cloud.neighbors, cloud.images, cloud.bank.before, cloud.bank.after)
    )
    plain = np.log(variance(unit(inside)) / variance(unit(outside)))
    centered = np.log(variance(unit(without_the_common(inside, before))) / variance(unit(without_the_common(outside, after))))
    return {"angular_contraction": near(plain), "angular_contraction_centered": near(centered)}


@pytest.mark.parametrize(
    "f", [torch.tanh, lambda x: x * torch.linspace(0.1, 40, D), lambda x: x + 4], ids=["tanh", "massive", "shift"]
)
def test_angular_contraction_by_its_formula(f):
    cloud = family_cloud(f)
    assert values(A.AngularContraction(), cloud) == angular_reference(cloud)


def test_massive_dimensions_leave_the_centered_angles():
    """Dimension 3 is 200 times as wide behind the block: all that the plain angles see, nothing to the centered ones."""
    wide = torch.ones(D)
    wide[3] = 200
    massive, without = family_cloud(lambda x: x * wide), family_cloud(lambda x: x * (wide < 2))
    assert int(massive.bank.directions_after[1].sum()) == D - 1
    one, other = values(A.AngularContraction(), massive), values(A.AngularContraction(), without)
    assert one["angular_contraction_centered"] == near(other["angular_contraction_centered"])
    assert np.abs(one["angular_contraction"] - other["angular_contraction"]).min() > 0.5


@pytest.mark.parametrize(
    "f",
    [lambda x: 3 * x, lambda x: x @ orthogonal(), lambda x: x * (1 + x.norm(dim=-1, keepdim=True))],
    ids=["scale", "turn", "lengths"],
)
def test_lengths_and_turns_do_not_change_angles(f):
    got = values(A.AngularContraction(), family_cloud(f))
    assert got["angular_contraction"] == near(np.zeros(Q))


@pytest.mark.parametrize("f", [lambda x: 3 * x + 7, lambda x: x @ orthogonal() - 5], ids=["scale", "turn"])
def test_a_shift_of_the_layer_leaves_the_centered_angles(f):
    got = values(A.AngularContraction(), family_cloud(f))
    assert got["angular_contraction_centered"] == near(np.zeros(Q))
    assert np.abs(got["angular_contraction"]).min() > 0.05


def test_one_direction_is_not_a_number():
    """All images on a ray: no angles, only rounding; and a zero state has no direction."""
    ray = torch.randn(D, generator=torch.Generator().manual_seed(3))
    cloud = family_cloud(lambda x: x.norm(dim=-1, keepdim=True) * ray)
    assert np.isnan(values(A.AngularContraction(), cloud)["angular_contraction"]).all()
    neighbors = cloud.neighbors.clone()
    neighbors[2, 4] = 0
    got = values(A.AngularContraction(), family_cloud(lambda x: x, neighbors=neighbors))["angular_contraction"]
    assert np.isnan(got).tolist() == [row == 2 for row in range(Q)]


@pytest.mark.parametrize("constant", [0.0, 0.5, 1234.567])
def test_angular_contraction_of_a_constant_map_is_not_a_number(constant):
    for answer in values(A.AngularContraction(), family_cloud(lambda x: torch.full_like(x, constant))).values():
        assert np.isnan(answer).all()


# -- effective rank -------------------------------------------------------------------------------------------------------------


def rank_reference(points):
    """From the eigenvalues."""
    answer = []
    for cloud in np.asarray(points, np.float64):
        spectrum = np.linalg.eigvalsh(np.cov(cloud.T, bias=True))
        share = (spectrum**2).sum() / spectrum.sum() ** 2 - 1 / (len(cloud) - 1)
        answer.append(1 / share if share > 1e-6 else math.nan)
    return np.array(answer)


@pytest.mark.parametrize("f", [torch.tanh, lambda x: x**3, lambda x: x * torch.linspace(0, 5, D)], ids=["tanh", "cube", "stretch"])
@pytest.mark.parametrize("k", [3, 10, 50])
def test_effective_rank_by_eigenvalues(f, k):
    cloud = family_cloud(f, k=k)
    got = values(A.EffectiveRankChange(k=k), cloud)
    before, after = rank_reference(cloud.neighbors), rank_reference(cloud.images)
    assert got["effective_rank_before"] == near(before, rel=1e-3)
    assert got["effective_rank_after"] == near(after, rel=1e-3)
    assert got["effective_rank_change"] == near(np.log(after / before), abs=1e-3)


@pytest.mark.parametrize("f", [lambda x: x @ orthogonal() + 5, lambda x: 1e9 * x, lambda x: -1e-9 * x], ids=["turn", "up", "down"])
def test_isometries_and_scalings_keep_the_effective_rank(f):
    assert values(A.EffectiveRankChange(), family_cloud(f, k=50))["effective_rank_change"] == near(np.zeros(Q))


def test_a_projection_on_a_line_leaves_rank_1():
    cloud = family_cloud(lambda x: x * (torch.arange(D) == 5), k=50)
    got = values(A.EffectiveRankChange(), cloud)
    assert got["effective_rank_after"] == near(np.full(Q, 49 / 48))  # the correction assumes many dimensions
    assert (got["effective_rank_change"] < -1).all()


def test_the_cap_of_few_points_is_taken_out():
    """20 dimensions, 50 points: 14 before the correction, 20 after, but for the last few percent."""
    g = torch.Generator().manual_seed(0)
    cloud = make_cloud(
        lambda x: x, q=400, k=50, d=20, neighbors=torch.randn(400, 50, 20, generator=g), images=torch.randn(400, 50, 20)
    )
    rank = values(A.EffectiveRankChange(), cloud)["effective_rank_before"]
    assert 1 / np.mean(1 / rank) == pytest.approx(20, rel=0.06)
    naive = 1 / np.mean(1 / rank + 1 / 49)
    assert naive < 15


def test_as_round_as_k_points_can_be_is_not_a_number():
    """Corners of a simplex: nothing is left of 1/PR, so more neighbors are needed to say."""
    corners = 7 * torch.eye(D).expand(Q, D, D)
    got = values(A.EffectiveRankChange(k=D), family_cloud(lambda x: x, k=D, neighbors=corners))
    assert np.isnan(got["effective_rank_before"]).all()
    assert np.isnan(got["effective_rank_change"]).all()
    assert np.isfinite(got["effective_rank_after"]).all()


def test_effective_rank_far_from_the_origin():
    """States 10,000 times as far away as they are apart: what float32 holds of their differences is used in full."""
    cloud = family_cloud(torch.tanh, k=50)
    far = cloud.neighbors + 1e4
    got = values(A.EffectiveRankChange(), replace(cloud, neighbors=far, images=far))
    assert got["effective_rank_before"] == near(rank_reference(far), rel=1e-3)
    assert got["effective_rank_change"] == near(np.zeros(Q))


@pytest.mark.parametrize("constant", [0.5, 1234.567])
def test_effective_rank_of_a_constant_map_is_not_a_number(constant):
    got = values(A.EffectiveRankChange(), family_cloud(lambda x: torch.full_like(x, constant), k=50))
    assert np.isnan(got["effective_rank_change"]).all()
    assert np.isnan(got["effective_rank_after"]).all()
    assert np.isfinite(got["effective_rank_before"]).all()


# -- neighbor overlap -----------------------------------------------------------------------------------------------------------


def overlap_cloud(rows, output_rows, candidates):
    q, k = rows.shape
    return replace(
        make_cloud(lambda x: x, q=q, k=k),
        rows=torch.as_tensor(rows),
        output_rows=torch.as_tensor(output_rows),
        candidates=torch.full((q,), candidates),
    )


def nearest_rows(points, k):
    distances = cdist(points, points)
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1)[:, :k]


def test_overlap_with_itself_is_1():
    rows = nearest_rows(make_dimensions.pair()[0], 15)
    got = values(A.NeighborOverlap(), overlap_cloud(rows, rows[:, ::-1].copy(), 119))
    assert got["neighbor_overlap"] == near(np.ones(120))
    assert got["neighbor_overlap_raw"] == near(np.ones(120))


@pytest.mark.parametrize("k", [5, 30, 80])
def test_overlap_with_a_permuted_layer_is_chance(k):
    one, _ = make_dimensions.pair()
    other = one[np.random.default_rng(5).permutation(120)]
    got = values(A.NeighborOverlap(k=k), overlap_cloud(nearest_rows(one, k), nearest_rows(other, k), 119))
    assert got["neighbor_overlap"].mean() == near(0, abs=0.03)
    assert got["neighbor_overlap_raw"].mean() == near(k / 119, abs=0.03)


@pytest.mark.parametrize(("k", "m"), [(4, 30), (10, 20), (10, 15), (19, 20)])
def test_overlap_is_never_below_minus_1(k, m):
    """As different as two choices of k among m can be."""
    rows, other = torch.arange(k)[None], torch.arange(m - k, m)[None]
    got = values(A.NeighborOverlap(k=k), overlap_cloud(rows, other, m))
    kept = max(0, 2 * k - m) / k
    assert got["neighbor_overlap_raw"] == near([kept])
    assert got["neighbor_overlap"] == near([(kept - k / m) / (1 - k / m)])
    assert got["neighbor_overlap"][0] >= -1 - 1e-6


@pytest.mark.parametrize("m", [15, 12])
def test_overlap_without_a_choice_is_not_a_number(m):
    rows = torch.arange(15)[None]
    for answer in values(A.NeighborOverlap(), overlap_cloud(rows, rows, m)).values():
        assert np.isnan(answer).all()


def test_half_of_the_neighbors_are_sought_among_all_output_neighbors():
    rows = np.tile(np.arange(10), (120, 1))
    first, second = overlap_cloud(rows, rows[:, ::-1].copy(), 100).split_half
    for half in (first, second):
        got = values(A.NeighborOverlap(k=10), half)
        assert got["neighbor_overlap"] == near(np.ones(120))


@pytest.mark.parametrize("k", make_dimensions.KEPT)
def test_overlap_equals_dadapy(k):
    one, other = make_dimensions.pair()
    got = values(A.NeighborOverlap(k=k), overlap_cloud(nearest_rows(one, k), nearest_rows(other, k), 119))
    assert got["neighbor_overlap_raw"] == near(FIXTURE["overlap"][str(k)])
    assert 0.2 < got["neighbor_overlap_raw"].mean() < 0.9


# -- local dimension ------------------------------------------------------------------------------------------------------------


def dimension_cloud(points):
    """Query first, then its neighbors."""
    points = torch.as_tensor(points)
    q = points.shape[0]
    base = make_cloud(lambda x: x, q=q, k=points.shape[1] - 1, d=points.shape[2])
    return replace(base, query=points[:, 0], neighbors=points[:, 1:])


@pytest.mark.parametrize("name", make_dimensions.clouds())
@pytest.mark.parametrize("kind", ["mle", "two_nn"])
def test_dimensions_equal_dadapy_and_scikit_dimension(name, kind):
    """On the same points: scikit-dimension's MLE at the query, DADApy's TwoNN over the query and its neighbors."""
    points = make_dimensions.clouds()[name]
    got = values(A.LocalDimension(k=30, curve=make_dimensions.SIZES), dimension_cloud(points[None]))
    for n, expected in zip(FIXTURE["sizes"], FIXTURE[kind][name], strict=True):
        assert got[f"dimension_{kind}_k{n}"] == near([expected], rel=1e-3)


def test_dimensions_by_loops():
    points = np.random.default_rng(4).standard_normal((5, 31, 8)).astype(np.float32)
    got = values(A.LocalDimension(), dimension_cloud(points))
    for q, cloud in enumerate(points.astype(np.float64)):
        for n in (5, 10, 15, 30):
            distances = cdist(cloud[: n + 1], cloud[: n + 1])
            radii = np.sort(distances[0, 1:])
            logs = [math.log(radii[-1] / r) for r in radii[:-1]]
            assert got[f"dimension_mle_k{n}"][q] == near(len(logs) / sum(logs))
            ratios = [np.sort(row)[2] / np.sort(row)[1] for row in distances]
            assert got[f"dimension_two_nn_k{n}"][q] == near(n / sum(map(math.log, ratios)))


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_dimension_of_a_ball_is_its_dimension(dimension):
    """Uniform around the query, in 16 dimensions. TwoNN knows no points beyond the cloud, so its estimate is loose."""
    rng = np.random.default_rng(dimension)
    ball = unit(rng.standard_normal((400, 30, dimension))) * rng.random((400, 30, 1)) ** (1 / dimension)
    points = np.concatenate([np.zeros((400, 1, dimension)), ball], axis=1) @ orthogonal(16).numpy()[:dimension]
    got = values(A.LocalDimension(curve=(30,)), dimension_cloud(points.astype(np.float32)))
    assert 1 / np.mean(1 / got["dimension_mle_k30"]) == pytest.approx(dimension, rel=0.05)
    assert 1 / np.mean(1 / got["dimension_two_nn_k30"]) == pytest.approx(dimension, rel=0.15)


@pytest.mark.parametrize("f", [lambda x: 1e-3 * x, lambda x: 1e3 * x, lambda x: x + 1000], ids=["down", "up", "far"])
def test_dimension_has_no_scale(f):
    cloud = family_cloud(torch.tanh, k=30)
    moved = replace(cloud, query=f(cloud.query), neighbors=f(cloud.neighbors))
    assert {n: near(v, rel=5e-3) for n, v in values(A.LocalDimension(), moved).items()} == values(A.LocalDimension(), cloud)


def test_dimension_uses_euclidean_distances_whatever_chose_the_neighbors():
    cloud = family_cloud(torch.tanh, k=30)
    other = replace(cloud, distances=torch.rand(Q, 30))
    assert {n: near(v) for n, v in values(A.LocalDimension(metric="cosine"), other).items()} == values(A.LocalDimension(), cloud)


@pytest.mark.parametrize(
    ("k", "expected"), [(2, (2,)), (5, (5,)), (12, (5, 10, 12)), (30, (5, 10, 15, 30)), (50, (5, 10, 15, 30, 50))]
)
def test_the_curve_ends_at_k(k, expected):
    names = [column.name for column in A.LocalDimension(k=k).columns]
    assert names == [f"dimension_{kind}_k{n}" for kind in ("mle", "two_nn") for n in expected]


def test_points_that_coincide_have_no_dimension():
    points = np.random.default_rng(4).standard_normal((3, 31, 8)).astype(np.float32)
    points[0, 7] = points[0, 0]  # a neighbor equals the query
    points[1, 7] = points[1, 20]  # two neighbors are equal, one of them beyond the first 15
    got = values(A.LocalDimension(), dimension_cloud(points))
    assert np.isnan(got["dimension_mle_k30"]).tolist() == [True, False, False]
    assert np.isnan(got["dimension_two_nn_k30"]).tolist() == [True, True, False]
    assert np.isnan(got["dimension_two_nn_k15"]).tolist() == [True, False, False]
    corners = torch.cat([torch.zeros(1, 30), torch.eye(30)])[None]
    assert np.isnan(values(A.LocalDimension(), dimension_cloud(corners))["dimension_mle_k30"]).all()


# -- jacobian gain --------------------------------------------------------------------------------------------------------------


def gains(cloud, **options):
    return values(A.JacobianGain(**options), cloud)


@pytest.mark.parametrize("a", [1.0, -1.0, 0.1, 30.0])
def test_gain_of_a_scaled_isometry(a):
    got = gains(family_cloud(lambda x: a * (x @ orthogonal()) + 5))
    assert got["jacobian_gain_random"] == near(np.full(Q, a * a), rel=1e-5)
    assert got["jacobian_gain_neighborhood"] == near(np.full(Q, a * a), rel=1e-5)
    assert got["jacobian_contrast"] == near(np.zeros(Q))


def test_gain_of_a_linear_block_is_its_contraction():
    """On the data exactly; off it, on average over directions, the mean squared singular value."""
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(8))
    cloud = family_cloud(lambda x: x @ matrix - 1)
    got = gains(cloud, directions=3000)
    assert -np.log(got["jacobian_gain_neighborhood"]) == near(values(A.Contraction(), cloud)["contraction"])
    assert got["jacobian_gain_random"] == near(np.full(Q, float(matrix.square().sum()) / D), rel=0.05)
    assert got["jacobian_contrast"] == near(np.log(got["jacobian_gain_random"] / got["jacobian_gain_neighborhood"]))


def test_shrinking_along_the_data_alone_is_a_basin():
    """A neighborhood in 3 of 12 dimensions, which the block halves: the contrast's sign and size."""
    cloud = family_cloud(lambda x: x)
    inside = torch.arange(D) < 3
    flat = cloud.neighbors.mean(1, keepdim=True) + (cloud.neighbors - cloud.neighbors.mean(1, keepdim=True)) * inside
    basin = replace(cloud, neighbors=flat, block=lambda x: x * torch.where(inside, 0.5, 1.0))
    got = gains(basin, directions=3000)
    assert got["jacobian_gain_neighborhood"] == near(np.full(Q, 0.25))
    assert got["jacobian_contrast"] == near(np.full(Q, math.log((9 + 3 / 4) / 12 / 0.25)), abs=0.05)


def test_gain_of_a_curved_block_is_its_slope():
    cloud = family_cloud(lambda x: torch.tanh(x).cumsum(-1))
    jacobian = [torch.autograd.functional.jacobian(lambda x: torch.tanh(x).cumsum(-1), h).double().numpy() for h in cloud.query]
    got = gains(cloud)["jacobian_gain_neighborhood"]
    for q in range(Q):
        s = np.cov(cloud.neighbors[q].double().numpy().T, bias=True)
        assert got[q] == near(np.trace(jacobian[q] @ s @ jacobian[q].T) / np.trace(s), rel=1e-4)


def test_random_directions_are_seeded_by_token_and_place():
    cloud = family_cloud(torch.tanh)
    first, again, other = gains(cloud), gains(cloud), gains(cloud, seed=1)
    assert first["jacobian_gain_random"].tolist() == again["jacobian_gain_random"].tolist()
    assert np.abs(first["jacobian_gain_random"] - other["jacobian_gain_random"]).min() > 0
    assert first["jacobian_gain_neighborhood"].tolist() == other["jacobian_gain_neighborhood"].tolist()
    same = replace(cloud, query=cloud.query[:1].expand(Q, -1))
    assert len(set(gains(same)["jacobian_gain_random"].tolist())) == Q


def test_gain_of_a_constant_map_is_0_and_has_no_contrast():
    got = gains(family_cloud(lambda x: x * 0 + 3))
    assert got["jacobian_gain_random"].tolist() == [0] * Q
    assert got["jacobian_gain_neighborhood"].tolist() == [0] * Q
    assert np.isnan(got["jacobian_contrast"]).all()


def test_a_block_blind_along_the_data_has_no_contrast():
    """The log of a number that is only rounding is not taken."""
    cloud = family_cloud(lambda x: x)
    inside = torch.arange(D) < 3
    flat = torch.zeros_like(cloud.neighbors) + cloud.neighbors * inside
    got = gains(replace(cloud, neighbors=flat, block=lambda x: x * ~inside))
    assert got["jacobian_gain_neighborhood"] == near(np.zeros(Q))
    assert np.isnan(got["jacobian_contrast"]).all()


def test_equal_neighbors_have_no_directions():
    cloud = family_cloud(torch.tanh)
    neighbors = cloud.neighbors.clone()
    neighbors[2] = neighbors[2, :1]
    got = gains(replace(cloud, neighbors=neighbors))
    for name in ("jacobian_gain_neighborhood", "jacobian_contrast"):
        assert np.isnan(got[name]).tolist() == [row == 2 for row in range(Q)]
    assert np.isfinite(got["jacobian_gain_random"]).all()


class Opaque(torch.autograd.Function):
    """A function with a backward rule and no forward one."""

    @staticmethod
    def forward(ctx, x):  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx, slope):  # noqa: ARG004
        return slope


def opaque_block(x):
    return x + Opaque.apply(x)


def test_an_operation_without_a_forward_derivative_is_named():
    with pytest.raises(TransportError, match="opaque_block"):
        gains(family_cloud(opaque_block))


def test_blooms_own_gelu_has_no_forward_derivative():
    """Said, not worked around."""
    model = make_bridge("bloom", tokenizer=make_tokenizer())
    capture = bl.Capture.from_texts(model, TEXTS[:2], progress=False)
    with pytest.raises(TransportError, match="BloomGelu"):
        run(model, capture, A.JacobianGain(k=4, queries=2), layers=[1])


def test_a_block_that_detaches_is_refused():
    with pytest.raises(TransportError, match="detaches"):
        gains(family_cloud(lambda x: x.detach() * 2))


def test_other_errors_of_the_block_are_its_own():
    def broken(_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        gains(replace(family_cloud(torch.tanh), block=broken))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gain_in_any_state_of_gradients(mode):
    expected = gains(family_cloud(torch.tanh))
    with mode():
        got = {name: answer.detach().numpy() for name, answer in A.JacobianGain().measure(family_cloud(torch.tanh)).items()}
    assert got == {name: near(answer) for name, answer in expected.items()}


def block_at(model, capture, layer, route):
    return PatchedBlock(model, capture, layer, Probe(model, int(capture.lengths.max())), capture.resid_pre(layer), route)


@pytest.mark.parametrize("route", ["R1", "R2"])
@pytest.mark.parametrize("name", PACKED)
def test_gain_of_a_real_block_by_reverse_mode(name, route):
    """Forward mode through the packed and the plain call, against the Jacobian by backward passes over the whole sequence."""
    model = make_bridge(name, tokenizer=make_tokenizer())
    capture = bl.Capture.from_texts(model, TEXTS[:3], progress=False)
    layer, rows = 1, torch.tensor([5, 60, 41, 100])
    block = block_at(model, capture, layer, route)
    states = capture.resid_pre(layer)
    near_by = states[torch.tensor([[q + j + 1 for j in range(6)] for q in rows.tolist()])]
    cloud = replace(
        make_cloud(lambda x: x, q=4, k=6, d=32),
        layer=layer,
        query=states[rows],
        neighbors=near_by,
        query_token=capture.row_token[rows],
        query_pos=capture.row_pos[rows],
        block=lambda points: block(rows, points),
    )
    got = gains(cloud)
    for index, row in enumerate(rows.tolist()):
        seq, pos = int(capture.row_seq[row]), int(capture.row_pos[row])
        first, count = int(capture.offsets[seq]), int(capture.lengths[seq])
        call = Probe(model, count).call(layer)

        def image(state, first=first, count=count, pos=pos, call=call):
            sequence = states[first : first + count].clone()
            sequence[pos] = state
            return door.call_block(model, layer, call, sequence[None])[0, pos]

        with door.measuring(model, gradients=True):
            jacobian = torch.autograd.functional.jacobian(image, states[row]).double().numpy()
        s = np.cov(near_by[index].double().numpy().T, bias=True)
        assert got["jacobian_gain_neighborhood"][index] == near(np.trace(jacobian @ s @ jacobian.T) / np.trace(s), rel=1e-3)
        v = np.random.default_rng([0, layer, int(capture.row_token[row]), pos]).standard_normal((8, 32), dtype=np.float32)
        assert got["jacobian_gain_random"][index] == near(np.sum((v @ jacobian.T) ** 2) / np.sum(v**2.0), rel=1e-3)


# -- centroid effect ------------------------------------------------------------------------------------------------------------


def test_centroid_and_displacement_are_equally_far():
    cloud = family_cloud(torch.tanh)
    seen = []

    def run_on(points):
        seen.append(points)
        return RunOn(torch.arange(2.0 * Q).view(Q, 2), -torch.arange(2.0 * Q).view(Q, 2))

    got = values(A.CentroidEffect(), replace(cloud, run_on=run_on))
    (points,) = seen
    assert points.shape == (Q, 2, D)
    assert points[:, 0].numpy() == near(cloud.neighbors.mean(1).numpy())
    lengths = (points - cloud.query[:, None]).norm(dim=2)
    assert lengths[:, 1].numpy() == near(lengths[:, 0].numpy())
    directions = unit((points[:, 1] - cloud.query).numpy())
    assert np.abs(directions @ directions.T - np.eye(Q)).max() < 0.99  # each query has its own
    even = np.arange(0, 2 * Q, 2.0)
    expected = dict(zip(got, (even, -even, even + 1, -even - 1), strict=True))
    assert list(got) == ["centroid_divergence", "centroid_later_loss", "displacement_divergence", "displacement_later_loss"]
    assert {name: near(answer) for name, answer in expected.items()} == got


def test_a_token_at_its_centroid_changes_nothing():
    cloud = family_cloud(lambda x: x)
    cloud = replace(
        cloud,
        query=cloud.neighbors.mean(1),
        run_on=lambda points: RunOn(
            (points - cloud.neighbors.mean(1)[:, None]).norm(dim=2), (points - cloud.neighbors.mean(1)[:, None]).sum(2)
        ),
    )
    for answer in values(A.CentroidEffect(), cloud).values():
        assert answer == near(np.zeros(Q))


def test_random_displacements_are_seeded():
    cloud = family_cloud(torch.tanh)
    one, other = values(A.CentroidEffect(), cloud), values(A.CentroidEffect(seed=3), cloud)
    assert one["centroid_divergence"].tolist() == other["centroid_divergence"].tolist()
    assert np.abs(one["displacement_divergence"] - other["displacement_divergence"]).min() > 0


# -- through analyze() ----------------------------------------------------------------------------------------------------------


def scored(table, name, layer):
    return table.loc[table.layer == layer, name].to_numpy()


def test_blocks_that_write_nothing_have_the_known_answers():
    """Every token keeps its state: nothing contracts, turns, flattens or moves; neighbors stay; the derivative is the identity."""
    model = identity_bridge("llama")
    capture = bl.Capture.from_texts(model, random_tokens(8, 14), progress=False)
    analyzers = [
        A.SymmetricContraction(k=6),
        A.AngularContraction(k=6),
        A.EffectiveRankChange(k=12),
        A.NeighborOverlap(k=6),
        A.JacobianGain(k=6, queries=9),
        A.CentroidEffect(k=6, queries=9),
    ]
    table = run(model, capture, *analyzers, layers=[1, 2])
    expected = {
        "symmetric_contraction": 0,
        "contraction_input_chosen": 0,
        "contraction_output_chosen": 0,
        "angular_contraction": 0,
        "angular_contraction_centered": 0,
        "effective_rank_change": 0,
        "neighbor_overlap": 1,
        "neighbor_overlap_raw": 1,
        "jacobian_gain_random": 1,
        "jacobian_gain_neighborhood": 1,
        "jacobian_contrast": 0,
    }
    for name, value in expected.items():
        got = table[name].dropna().to_numpy()
        assert len(got) == 2 * (9 if name.startswith("jacobian") else 8 * 13)
        assert got == near(np.full(len(got), float(value)), abs=1e-3)
    # No token sees another: what replaces a state changes its own prediction, and none after the next.
    assert table.centroid_divergence.min() > 1e-4


@pytest.fixture(scope="module")
def family_table(llama, capture):
    return run(
        llama,
        capture,
        A.SymmetricContraction(k=6),
        A.AngularContraction(k=6),
        A.EffectiveRankChange(k=12, context="native"),
        A.NeighborOverlap(k=6),
        A.LocalDimension(k=12),
        A.JacobianGain(k=6, queries=10),
        A.CentroidEffect(k=6, queries=10),
    )


def candidates(oracle, row):
    """How many bank rows the oracle could have chosen from."""
    low, high = 1, len(oracle.bank_items)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if oracle.neighbors(row, middle) else (low, middle - 1)
    return low


@pytest.mark.parametrize("layer", [0, 1])
def test_the_family_equals_the_oracle(family_table, llama, capture, layer):
    """Native scores from the oracle's neighbors before the block, and after it: what leaves a block enters the next."""
    before, after = Oracle(llama, capture, layer), Oracle(llama, capture, layer + 1)
    inner = np.flatnonzero(capture.row_pos.numpy() > 0)
    for row in some_rows(capture, 4):
        got = family_table[family_table.layer == layer].iloc[row]
        rows, out = before.neighbors(row, 6)[0], after.neighbors(row, 6)[0]
        at_input = math.log(variance(before.pre[rows]) / variance(before.post[rows]))
        at_output = math.log(variance(before.pre[out]) / variance(before.post[out]))
        assert got.contraction_input_chosen == near(at_input)
        assert got.contraction_output_chosen == near(at_output)
        assert got.symmetric_contraction == near((at_input + at_output) / 2)
        assert got.neighbor_overlap_raw == near(len(set(rows) & set(out)) / 6)
        images = before.images(row, rows, "patched")
        assert got.angular_contraction == near(math.log(variance(unit(before.pre[rows])) / variance(unit(images))))
        centered = [
            variance(unit(without_the_common(x, states[inner])))
            for x, states in ((before.pre[rows], before.pre), (images, before.post))
        ]
        assert got.angular_contraction_centered == near(math.log(centered[0] / centered[1]))
        wide, radii = before.neighbors(row, 12)
        ranks = [rank_reference(x[wide][None])[0] for x in (before.pre, before.post)]
        assert got.effective_rank_change == near(math.log(ranks[1] / ranks[0]), abs=1e-3, nan_ok=True)
        assert got.dimension_mle_k12 == near(11 / np.log(radii[-1] / radii).sum(), rel=1e-3)


@pytest.mark.parametrize("layer", [0, 1])
def test_chance_is_what_a_random_choice_at_the_output_would_keep(family_table, llama, capture, layer):
    """At layer 0 tokens of one id are one point before the block and many behind it: chance is k of the many."""
    after = Oracle(llama, capture, layer + 1)
    for row in some_rows(capture, 4):
        got = family_table[family_table.layer == layer].iloc[row]
        chance = 6 / candidates(after, row)
        assert got.neighbor_overlap == near((got.neighbor_overlap_raw - chance) / (1 - chance))


def replaced(model, tokens, layer, pos, state):
    """Logits with a state put before a block, through public hooks alone."""

    def put(states, hook):  # noqa: ARG001
        states = states.clone()
        states[:, pos] = state
        return states

    with torch.no_grad():
        return model.run_with_hooks(tokens[None], fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", put)], return_type="logits")[
            0
        ].double()


def test_centroid_effect_by_rerunning_the_model(family_table, llama, capture):
    for layer in range(3):
        oracle = Oracle(llama, capture, layer)
        some_of_it = np.flatnonzero(~np.isnan(scored(family_table, "centroid_divergence", layer)))
        assert len(some_of_it) == 10
        for row in some_of_it[::3]:
            sequence, pos = capture.sequences[int(capture.row_seq[row])], int(capture.row_pos[row])
            tokens, h = torch.tensor(sequence.tokens), capture.resid_pre(layer)[row]
            center = torch.tensor(oracle.pre[oracle.neighbors(row, 6)[0]].mean(0), dtype=torch.float32)
            drawn = np.random.default_rng([0, layer, int(tokens[pos]), pos]).standard_normal((1, 32), dtype=np.float32)[0]
            away = h + (center - h).norm() * torch.tensor(unit(drawn))
            plain = replaced(llama, tokens, layer, pos, h).log_softmax(-1)
            for kind, state in (("centroid", center), ("displacement", away)):
                other = replaced(llama, tokens, layer, pos, state).log_softmax(-1)
                divergence = float((plain[pos].exp() * (plain[pos] - other[pos])).sum())
                assert scored(family_table, f"{kind}_divergence", layer)[row] == near(divergence, abs=1e-4, rel=1e-3)
                if pos + 1 == len(tokens):
                    expected = math.nan
                else:
                    rise = (plain - other)[pos:-1].gather(1, tokens[pos + 1 :, None])
                    expected = float(rise.mean())
                assert scored(family_table, f"{kind}_later_loss", layer)[row] == near(expected, abs=1e-4, rel=1e-3, nan_ok=True)


def test_reliability_comes_with_those_that_can_be_halved(family_table):
    reliability = facts_of(family_table)["reliability"]
    for name in ("symmetric_contraction", "angular_contraction", "effective_rank_change", "neighbor_overlap"):
        assert set(reliability[name]) == {"0", "1", "2"}
    assert not {"jacobian_contrast", "centroid_divergence", "dimension_mle_k12"} & set(reliability)
