"""Known answers: on clouds made by hand and through analyze(). Those of crossed tables are in test_crossed_pass.py."""

import math

import numpy as np
import pytest
import torch

import basin_lens as bl
from tests.conftest import PACKED, random_tokens
from tests.scoring.oracle import (
    LAYERS,
    A,
    Oracle,
    column,
    facts_of,
    identity_bridge,
    make_cloud,
    near,
    orthogonal,
    run,
    some_rows,
    variance,
)

# -- known answers on clouds made by hand ----------------------------------------------------------------------------------------------


def value(analyzer, cloud):
    (answer,) = analyzer.measure(cloud).values()
    return answer.numpy()


def test_isometry_contracts_nothing():
    cloud = make_cloud(lambda x: x @ orthogonal() + 5)
    assert value(A.Contraction(), cloud) == near(np.zeros(7))


@pytest.mark.parametrize("a", [0.1, 0.5, 3.0, -2.0])
def test_scaling_contracts(a):
    """The sign: positive where the neighborhood shrinks."""
    cloud = make_cloud(lambda x: a * x)
    assert value(A.Contraction(), cloud) == near(np.full(7, -2 * math.log(abs(a))))


def test_a_context_vector_contracts_nothing():
    """Each query adds another vector, to all its neighbors."""
    context = 4 * torch.randn(7, 1, 12, generator=torch.Generator().manual_seed(1))
    assert value(A.Contraction(), make_cloud(lambda x: x + context)) == near(np.zeros(7))


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_projection_removes_the_variance_across_it(rank):
    basis = orthogonal()[:, :rank]
    projector = basis @ basis.T
    cloud = make_cloud(lambda x: x @ projector)
    p, expected = projector.double().numpy(), []
    for points in cloud.neighbors.double().numpy():
        s = np.cov(points.T, bias=True)
        expected.append(math.log(np.trace(s) / np.trace(p @ s @ p)))
    assert min(expected) > 0
    assert value(A.Contraction(), cloud) == near(np.array(expected))


def test_identity_leaves_the_raw_score_at_the_input_density():
    cloud = make_cloud(lambda x: x)
    assert value(A.RawCompression(), cloud) == near(-np.log(variance(cloud.neighbors)))
    assert value(A.SeedCompression(), cloud) == near(-np.log(variance(cloud.neighbors)))


@pytest.mark.parametrize("constant", [0.5, 0.1, 1234.567], ids=["exact", "rounded", "large"])
@pytest.mark.parametrize("analyzer", [A.Contraction(), A.RawCompression()], ids=lambda a: a.columns[0].name)
def test_a_constant_map_is_not_a_number(analyzer, constant):
    """Also where the mean of equal numbers is rounded, for a neighborhood and the bank alike."""
    cloud = make_cloud(lambda x: torch.full_like(x, constant))
    assert np.isnan(value(analyzer, cloud)).all()


def test_equal_neighbors_are_not_a_number():
    cloud = make_cloud(lambda x: x)
    neighbors = cloud.neighbors.clone()
    neighbors[2] = neighbors[2, :1]
    answer = value(A.Contraction(), make_cloud(lambda x: x, neighbors=neighbors))
    assert np.isnan(answer).tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize("analyzer", [A.Contraction(), A.RawCompression(), A.SeedCompression()], ids=lambda a: a.columns[0].name)
def test_order_of_neighbors_does_not_matter(analyzer):
    cloud = make_cloud(torch.tanh)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    assert value(analyzer, cloud.take(order)) == near(value(analyzer, cloud))


def test_rotating_and_moving_all_states_changes_nothing():
    """Before the block and after it, each in its own way."""
    cloud = make_cloud(torch.tanh)
    moved = make_cloud(torch.tanh, neighbors=cloud.neighbors @ orthogonal(seed=5) - 2, images=cloud.images @ orthogonal(seed=6) + 3)
    assert value(A.Contraction(), moved) == near(value(A.Contraction(), cloud))


def test_contraction_is_the_log_ratio_of_variances():
    cloud = make_cloud(torch.tanh)
    assert value(A.Contraction(), cloud) == near(np.log(variance(cloud.neighbors) / variance(cloud.images)))


def test_seed_score_by_layer():
    """Row 0 has no counterpart in the guide; the last row sees the final norm."""
    norm = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    first, middle, last = (make_cloud(torch.tanh, layer=layer, final_norm=norm) for layer in LAYERS)
    assert np.isnan(value(A.SeedCompression(), first)).all()
    assert value(A.SeedCompression(), middle) == near(-np.log(variance(middle.images)))
    assert value(A.SeedCompression(), last) == near(-np.log(variance(norm(last.images))))


def test_neighborhood_describes_who_is_near():
    cloud = make_cloud(lambda x: x)
    got = {name: column.numpy() for name, column in A.Neighborhood().measure(cloud).items()}
    tokens, positions = cloud.neighbor_token.numpy(), cloud.neighbor_pos.numpy()
    assert got["radius"] == near(cloud.distances.numpy().max(1))
    assert got["nearest"] == near(cloud.distances.numpy().min(1))
    assert got["same_token_share"] == near(
        [np.mean(row == own) for row, own in zip(tokens, cloud.query_token.numpy(), strict=True)]
    )
    assert got["same_position_share"] == near(
        [np.mean(row == own) for row, own in zip(positions, cloud.query_pos.numpy(), strict=True)]
    )
    assert got["distinct_tokens"].tolist() == [len(set(row)) for row in tokens.tolist()]


# -- known answers through analyze() ---------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("context", ["native", "patched", "solo"])
@pytest.mark.parametrize("name", PACKED)
def test_a_block_that_writes_nothing_contracts_nothing(name, context):
    """Nor does it compress: test_compression.py of the analyzers."""
    model, k = identity_bridge(name), 5
    capture = bl.Capture.from_texts(model, random_tokens(8, 14), progress=False)
    table = run(model, capture, *(kind(k=k, context=context) for kind in (A.Contraction, A.RawCompression)))
    scored = table[table.pos > 0]
    assert scored.contraction.to_numpy() == near(np.zeros(len(scored)))
    for layer in LAYERS:
        oracle = Oracle(model, capture, layer)
        for row in some_rows(capture):
            rows, _ = oracle.neighbors(row, k)
            assert column(table, "raw_compression", layer)[row] == near(-math.log(variance(oracle.pre[rows])))


def kinds_in(context, *kinds):
    """These scores in a context, and the crossed one where that passes states."""
    crossed = () if context == "native" else (A.Compression(k=5, context=context),)
    return [kind(k=5, context=context) for kind in kinds] + list(crossed)


def with_output(f):
    """The identity bridge with f on what block 1 puts out."""
    model = identity_bridge("llama")
    model.add_hook("blocks.1.hook_resid_post", lambda states, hook: f(states))  # noqa: ARG005
    return model


@pytest.mark.many
@pytest.mark.parametrize("context", ["native", "patched", "solo"])
@pytest.mark.parametrize(
    ("f", "contraction"),
    [
        (lambda x: 3 * x, -2 * math.log(3)),
        (lambda x: x / 4, 2 * math.log(4)),
        (lambda x: x @ orthogonal(32), 0),
        (lambda x: x + 7, 0),
    ],
    ids=["longer", "shorter", "turned", "shifted"],
)
def test_a_block_that_scales_turns_or_shifts(f, contraction, context):
    table = run(with_output(f), random_tokens(8, 14), *kinds_in(context, A.Contraction), layers=[1])
    scored = table[table.pos > 0]
    assert scored.contraction.to_numpy() == near(np.full(len(scored), contraction))
    if context == "native":
        return
    crossed = scored.dropna(subset=["compression"])
    assert len(crossed) > 0.8 * len(scored)
    for name in ("compression", "compression_random_sets", "compression_isotropic", "compression_above_random_sets"):
        assert crossed[name].to_numpy() == near(np.zeros(len(crossed))), name
    for part in ("place", "directions"):
        assert crossed[f"compression_{part}"].to_numpy() == near(np.full(len(crossed), contraction)), part


@pytest.mark.many
@pytest.mark.parametrize("context", ["native", "patched"])
@pytest.mark.parametrize("constant", [0.5, 0.1], ids=["exact", "rounded"])
def test_a_block_that_forgets_everything_is_counted_as_degenerate(constant, context):
    tokens = random_tokens(8, 14)
    chosen = kinds_in(context, A.Contraction, A.RawCompression)
    model = with_output(lambda x: torch.full_like(x, constant))
    table = run(model, tokens, *chosen, layers=[1])
    for name in (one.name for a in chosen for one in a.columns):
        assert table[name].isna().all()
        counts = facts_of(table)["left_out"][name]
        alone = counts.get("no group", 0)
        assert alone < 0.2 * len(table) and (alone == 0 or name.startswith("compression"))
        assert counts["degenerate or undefined"] == int((table.pos > 0).sum()) - alone
        assert counts["position 0"] == len(tokens)
