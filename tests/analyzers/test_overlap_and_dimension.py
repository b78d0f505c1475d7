"""Neighbor overlap, local dimension, Jacobian gain."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import TransportError
from basin_lens.transport import PatchedBlock, Probe
from tests.analyzers.clouds import A, D, Q, family_cloud, unit, values
from tests.conftest import PACKED, TEXTS, make_bridge, make_tokenizer
from tests.fixtures import make_dimensions
from tests.scoring.oracle import make_cloud, near, orthogonal, run

FIXTURE = json.loads((Path(make_dimensions.__file__).parent / "dimensions.json").read_text())


# -- neighbor overlap ------------------------------------------------------------------------------------------------------------------


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


# -- local dimension -------------------------------------------------------------------------------------------------------------------


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


# -- jacobian gain ---------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.many
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
