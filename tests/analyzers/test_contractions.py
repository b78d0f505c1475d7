"""Symmetric and angular contraction, effective rank, centroid effect."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from basin_lens.analyzers import RunOn
from tests.analyzers.clouds import A, D, Q, family_cloud, rank_reference, unit, values, without_the_common
from tests.scoring.oracle import make_cloud, near, orthogonal, variance

# -- symmetric contraction -------------------------------------------------------------------------------------------------------------


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


# -- angular contraction ---------------------------------------------------------------------------------------------------------------


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


# -- effective rank --------------------------------------------------------------------------------------------------------------------


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


# -- centroid effect -------------------------------------------------------------------------------------------------------------------


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
