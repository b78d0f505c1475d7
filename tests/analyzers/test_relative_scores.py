"""Contraction relative to random sets and to generic directions: known answers, formulas, and what provenance says of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import RandomContraction, Surroundings
from basin_lens.errors import NeighborError
from tests.analyzers.clouds import family_cloud
from tests.analyzers.test_family_laws import some
from tests.conftest import PACKED, random_tokens
from tests.scoring.oracle import Oracle, facts_of, identity_bridge, near, orthogonal, run, variance

A = bl.analyzers
Q, D = 7, 12


def cloud_of(f, **given):
    """A cloud with what both need; the random sets' contraction is that of f on unrelated points."""
    others = 3 * torch.randn(64, 40, D, generator=torch.Generator().manual_seed(7))
    after = variance(f(others))
    ratio = np.log(variance(others) / after).mean() if after.all() else np.nan
    return family_cloud(f, random_contraction=RandomContraction(float(ratio), 0.0), **given)


def value(analyzer, cloud):
    (answer,) = analyzer.measure(cloud).values()
    return answer.numpy()


MAPS = {
    "isometry": lambda x: x @ orthogonal() + 5,
    "scaling": lambda x: -0.3 * x,
    "shift": lambda x: x + 4,
}
both = pytest.mark.parametrize("analyzer", [A.RelativeContraction(), A.DirectionalContraction()], ids=lambda a: type(a).__name__)


@both
@pytest.mark.parametrize("name", MAPS)
def test_maps_without_favorites_are_0(analyzer, name):
    assert value(analyzer, cloud_of(MAPS[name])) == near(np.zeros(Q))


@both
def test_permuting_queries_and_neighbors(analyzer):
    cloud = cloud_of(torch.tanh)
    whole = value(analyzer, cloud)
    index = torch.tensor([4, 0, 6])
    assert value(analyzer, some(cloud, index)) == near(whole[index.numpy()], rel=1e-4)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    assert value(analyzer, cloud.take(order)) == near(whole, rel=1e-4)
    assert np.isfinite(whole).all() and np.ptp(whole) > 0.01
    for half in cloud.split_half:
        assert np.isfinite(value(analyzer, half)).all()


@both
def test_a_constant_map_is_not_a_number(analyzer):
    assert np.isnan(value(analyzer, cloud_of(lambda x: torch.full_like(x, 0.1)))).all()


def blown(factor):
    """A cloud of tanh with one dimension in other units, before the block and behind it."""
    cloud, units = cloud_of(torch.tanh), torch.ones(D)
    units[3] = factor
    return replace(
        cloud,
        neighbors=cloud.neighbors * units,
        images=cloud.images * units,
        block=lambda x: torch.tanh(x / units) * units,
        bank=Surroundings(cloud.bank.before * units, cloud.bank.after * units),
    )


@both
def test_massive_dimensions_are_left_out(analyzer):
    assert blown(1000).bank.ordinary.tolist() == [dimension != 3 for dimension in range(D)]
    answer = value(analyzer, blown(1000))
    assert answer == near(value(analyzer, blown(5000)), rel=1e-3)
    assert answer != near(value(analyzer, blown(1)), rel=1e-3)


def test_relative_contraction_is_of_the_ordinary_dimensions():
    cloud, kept = blown(1000), torch.arange(D) != 3
    expected = np.log(variance(cloud.neighbors[..., kept]) / variance(cloud.images[..., kept])) - cloud.random_contraction.mean
    assert value(A.RelativeContraction(), cloud) == near(expected)


def test_relative_contraction_by_its_formula():
    cloud = cloud_of(torch.tanh)
    expected = np.log(variance(cloud.neighbors) / variance(cloud.images)) - cloud.random_contraction.mean
    assert value(A.RelativeContraction(), cloud) == near(expected)


@pytest.mark.parametrize(("along", "across"), [(0.2, 1.0), (1.0, 0.2)], ids=["own directions", "all others"])
def test_a_map_that_shrinks_certain_directions(along, across):
    """Neighborhoods on a line: a map that shrinks that line has a positive score, one that shrinks the rest a negative one."""
    line = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(1)), dim=0)

    def f(x):
        on = (x @ line)[..., None] * line
        return along * on + across * (x - on)

    steps = torch.randn(Q, 15, 1, generator=torch.Generator().manual_seed(2))
    neighbors = 3 + steps * line
    cloud = cloud_of(f)
    cloud = replace(cloud, neighbors=neighbors, images=f(neighbors))
    got = value(A.DirectionalContraction(), cloud)
    assert (np.sign(got) == np.sign(across - along)).all()
    assert (np.abs(got) > 1).all()


def test_generic_displacements_have_the_neighbors_lengths_and_their_own_draws():
    cloud, analyzer = cloud_of(torch.tanh), A.DirectionalContraction()
    moves = cloud.neighbors - cloud.neighbors.mean(1, keepdim=True)
    generic = analyzer._generic(cloud, moves)
    assert generic.norm(dim=2).sort(1).values.numpy() == pytest.approx(moves.norm(dim=2).sort(1).values.numpy(), rel=1e-4)
    again = analyzer._generic(cloud, moves)
    assert torch.equal(again, generic)
    assert not torch.allclose(A.DirectionalContraction(seed=1)._generic(cloud, moves), generic)
    first, second = (analyzer._generic(half, half.neighbors - half.neighbors.mean(1, keepdim=True)) for half in cloud.split_half)
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=2)
    assert cosine.abs().mean() < 0.5


@pytest.mark.parametrize(("options", "word"), [({"seed": -1}, "seed"), ({"context": "native"}, "no cached output")], ids=str)
def test_options_without_meaning_are_refused(options, word):
    with pytest.raises(NeighborError, match=word):
        A.DirectionalContraction(**options).check()


@pytest.mark.parametrize("f", [torch.tanh, lambda x: x * x.square().sum(-1, keepdim=True) / 40], ids=["bends", "stretches"])
def test_isotropic_neighborhoods_in_an_isotropic_bank_have_no_direction(f):
    """Their displacements are as generic as the bank's pairs, whatever the block: the mean over 400 tokens is 0 within its error."""
    got = value(A.DirectionalContraction(), isotropic(f))
    error = got.std(ddof=1) / math.sqrt(len(got))
    assert 0 < error < 0.02
    assert abs(got.mean()) < 4 * error


def test_and_a_line_among_them_has_one():
    """The same places and sizes, all displacements along one axis that the block shrinks."""
    cloud = isotropic(lambda x: torch.cat([0.5 * x[..., :1], x[..., 1:]], dim=-1))
    center = cloud.neighbors.mean(1, keepdim=True)
    line = torch.zeros_like(cloud.neighbors)
    line[..., 0] = (cloud.neighbors - center)[..., 0]
    cloud = replace(cloud, neighbors=center + line, images=cloud.block(center + line))
    assert (value(A.DirectionalContraction(), cloud) > 1).all()


def isotropic(f, q=400):
    """Normal states without a favorite direction, and neighborhoods of the same shape at places drawn from them."""
    g = torch.Generator().manual_seed(11)
    states = torch.randn(600, D, generator=g)
    neighbors = states[:q, None] + 0.5 * torch.randn(q, 15, D, generator=g)
    bank = Surroundings(states, f(states))
    return replace(family_cloud(f, q=q), neighbors=neighbors, images=f(neighbors), block=f, bank=bank)


# -- through analyze ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(llama):
    return bl.Capture.from_texts(llama, random_tokens(12, 14), progress=False)


@pytest.mark.many
@pytest.mark.parametrize("name", PACKED)
def test_a_block_that_writes_nothing(name):
    table = run(identity_bridge(name), random_tokens(8, 14), A.RelativeContraction(k=4), A.DirectionalContraction(k=4))
    for column in ("relative_contraction", "directional_contraction"):
        assert table[table.pos > 0][column].notna().all()
        assert table[column].abs().max() < 2e-4


@pytest.mark.slow(everywhere=True)
def test_the_offset_and_its_error_are_in_provenance(llama, texts):
    """One mean per layer, from 16 sets of 4 points at each of 64 tokens, within four standard errors of another seed's; no lottery."""
    contexts = ("patched", "native", "mlp")
    chosen = [A.RelativeContraction(k=4, context=c, name=c) for c in contexts]
    tables = [run(llama, texts, *chosen, A.Contraction(k=4), seed=seed) for seed in (0, 1)]
    for layer in "012":
        offsets = tables[0][tables[0].layer == int(layer)]
        (offset,) = set((offsets.contraction - offsets.patched).dropna().round(4))
        held = [facts_of(table)["random_contraction"][layer] for table in tables]
        assert held[0]["patched"]["mean"] == near(offset)
        for context in contexts:
            one, other = (facts[context] for facts in held)
            assert one["sets"] == 64 * 16
            assert 0 < one["standard_error"] < 0.2
            assert abs(one["mean"] - other["mean"]) < 4 * math.hypot(one["standard_error"], other["standard_error"])


def test_the_offset_by_loops(llama, texts):
    """Another sample of random sets, passed by rerunning the model: within four standard errors."""
    table = run(llama, texts, A.RelativeContraction(k=4), layers=[1])
    facts = facts_of(table)["random_contraction"]["1"]["relative_contraction"]
    rng, oracle = np.random.default_rng(3), Oracle(llama, texts, 1)
    inner = np.flatnonzero(texts.row_pos.numpy() > 0)
    means = []
    for row in rng.choice(inner, 30, replace=False):
        rows = rng.choice(inner[texts.row_seq.numpy()[inner] != oracle.items[row]["seq"]], 64, replace=False)
        images = oracle.images(row, rows, "patched")
        sets = [slice(part, part + 4) for part in range(0, 64, 4)]  # as large as the neighborhoods
        # A token's sets share its context: the token's mean counts once.
        means.append(np.mean([math.log(variance(oracle.pre[rows[some]]) / variance(images[some])) for some in sets]))
    error = math.hypot(facts["standard_error"], np.std(means, ddof=1) / math.sqrt(len(means)))
    assert abs(facts["mean"] - np.mean(means)) < 4 * error


def test_controls_of_them_are_near_0(llama, texts):
    """Random sets contract as random sets do; their directions are generic."""
    table = run(llama, texts, A.RelativeContraction(k=8), A.DirectionalContraction(k=8), controls=True, layers=[1])
    for column in ("relative_contraction_random", "directional_contraction_random"):
        assert abs(table[column].mean()) < 0.25
