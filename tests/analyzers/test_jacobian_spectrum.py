"""The whole Jacobian against matrices that are known, the product rule and finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma

import basin_lens as bl
from basin_lens import model as door
from basin_lens.analyzers.jacobian_spectrum import jacobian, share_on_span
from basin_lens.errors import NeighborError, TransportError
from tests.analyzers.clouds import family_cloud
from tests.conftest import make_bridge, random_tokens
from tests.scoring.oracle import near, orthogonal, run

A = bl.analyzers
D, Q, K = 12, 7, 15
NAMES = ("log_volume", "stable_rank", "participation_ratio", "nonnormality", "neighborhood_share")


def values(f, k=5, **given):
    got = A.JacobianSpectrum().measure(family_cloud(f, k=k, **given))
    return {name.removeprefix("jacobian_"): value.numpy() for name, value in got.items()}


def linear(matrix):
    return lambda x: x @ matrix.T


@pytest.mark.parametrize("map_", [lambda x: x, lambda x: x + 3, linear(orthogonal())], ids=["identity", "shift", "rotation"])
def test_an_isometry(map_):
    got = values(map_)
    assert got["log_volume"] == near(np.zeros(Q))
    for rank in ("stable_rank", "participation_ratio"):
        assert got[rank] == near(np.full(Q, D), abs=1e-3)
    assert got["nonnormality"] == near(np.zeros(Q), abs=2e-3)
    assert got["neighborhood_share"] == near(np.full(Q, 4 / D))


def test_a_scaling():
    got = values(lambda x: -0.25 * x)
    assert got["log_volume"] == near(np.full(Q, math.log(0.25)))
    assert got["stable_rank"] == near(np.full(Q, D), abs=1e-3)


def test_a_linear_map_by_its_formulas():
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(5))
    got, m = values(linear(matrix)), matrix.double().numpy()
    s, eigenvalues = np.linalg.svd(m, compute_uv=False), np.linalg.eigvals(m)
    assert got["log_volume"] == near(np.full(Q, np.linalg.slogdet(m)[1] / D))
    assert got["stable_rank"] == near(np.full(Q, (s**2).sum() / s[0] ** 2), abs=1e-3)
    assert got["participation_ratio"] == near(np.full(Q, (s**2).sum() ** 2 / (s**4).sum()), abs=1e-3)
    departure = math.sqrt(((s**2).sum() - (np.abs(eigenvalues) ** 2).sum()) / (s**2).sum())
    assert got["nonnormality"] == near(np.full(Q, departure), abs=1e-3)


def test_random_linear_maps_have_the_spectrum_of_random_matrices():
    """Normal entries of variance 1/d. Exact: mean log|det| / d; for large d: singular values' participation d/2 (Marchenko-Pastur), departure
    from normality sqrt(1/2) (the circular law), and a span that the map does not know holds its share of the dimensions."""
    volumes, others = [], []
    for seed in range(40):
        matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(seed)) / math.sqrt(D)
        got = values(linear(matrix), seed=seed)
        volumes.append(got["log_volume"][0])
        others.append([got["participation_ratio"][0] / D, got["nonnormality"][0], got["neighborhood_share"].mean() / (4 / D)])
    exact = (digamma(np.arange(1, D + 1) / 2) + math.log(2 / D)).sum() / (2 * D)
    assert abs(np.mean(volumes) - exact) < 4 * np.std(volumes) / math.sqrt(40)
    means, errors = np.mean(others, axis=0), np.std(others, axis=0) / math.sqrt(40)
    assert (errors < 0.03).all()
    assert (abs(means - [0.5, math.sqrt(0.5), 1]) < 4 * errors + [0.06, 0.04, 0]).all()  # d is 12


def test_a_symmetric_map_is_normal_and_a_shift_of_axes_is_not():
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(5))
    assert values(linear(matrix + matrix.T))["nonnormality"] == near(np.zeros(Q), abs=3e-3)
    nilpotent = torch.diag(torch.ones(D - 1), 1)
    got = values(linear(nilpotent))
    assert got["nonnormality"] == near(np.ones(Q), abs=1e-3)
    assert np.isnan(got["log_volume"]).all()  # a direction is lost
    assert got["stable_rank"] == near(np.full(Q, D - 1), abs=1e-3)


def test_all_of_the_map_is_on_the_neighborhood_or_none_of_it():
    cloud = family_cloud(lambda x: x, k=5)
    moves = cloud.neighbors - cloud.neighbors.mean(1, keepdim=True)
    axes = torch.linalg.svd(moves, full_matrices=False).Vh[:, :4]
    on = axes.transpose(1, 2) @ axes
    assert share_on_span(on, cloud.neighbors).numpy() == near(np.ones(Q))
    assert share_on_span(torch.eye(D) - on, cloud.neighbors).numpy() == near(np.zeros(Q))
    one = cloud.neighbors[:, :1].expand(-1, 5, -1)
    assert share_on_span(on, one).isnan().all()


def test_rows_are_outputs_and_columns_inputs():
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(5))
    got = jacobian(family_cloud(linear(matrix)))
    assert got.numpy() == near(matrix.expand(Q, -1, -1).numpy())


def test_finite_differences():
    cloud = family_cloud(torch.tanh)
    got = jacobian(cloud).numpy()
    expected = np.stack([np.diag(1 - np.tanh(h) ** 2) for h in cloud.query.double().numpy()])
    assert got == near(expected)


def whole_jacobian(model, tokens, layer, pos, blocks, step=2e-3):
    """Central differences through the real blocks, by rerunning the model with the state put in."""
    state = None
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None])
        state = cache[door.point_name("resid_pre", layer)][0, pos]
    points = torch.cat([state + step * torch.eye(len(state)), state - step * torch.eye(len(state))])
    for layer_ in range(layer, layer + blocks):
        points = door.rerun_with_state(model, tokens, layer_, pos, points)
    ahead, behind = points.double().split(len(state))
    return ((ahead - behind) / (2 * step)).T.numpy()


@pytest.mark.many
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_a_models_own_blocks_by_finite_differences_and_the_product_rule(name, blocks):
    model, tokens = make_bridge(name), random_tokens(6, 12)
    capture = bl.Capture.from_texts(model, tokens, progress=False)
    table = run(model, capture, A.JacobianSpectrum(k=4, queries=3, blocks=blocks), layers=[0])
    rows = np.flatnonzero(table.jacobian_log_volume.notna())
    assert len(rows) == 3
    for row in rows:
        seq, pos = int(table.seq[row]), int(table.pos[row])
        matrix = whole_jacobian(model, tokens[seq], 0, pos, blocks)
        s = np.linalg.svd(matrix, compute_uv=False)
        assert table.jacobian_log_volume[row] == pytest.approx(np.log(s).mean(), abs=0.02)
        assert table.jacobian_stable_rank[row] == pytest.approx((s**2).sum() / s[0] ** 2, rel=0.01)


def test_an_operation_without_a_derivative_is_named():
    with pytest.raises(TransportError, match="Leave JacobianSpectrum out"):
        run(make_bridge("bloom"), random_tokens(6, 12), A.JacobianSpectrum(k=4, queries=2), layers=[1])


def test_options_without_meaning_are_refused():
    with pytest.raises(NeighborError, match="queries"):
        A.JacobianSpectrum(queries=0).check()
