"""Laws that all scores of neighborhoods obey, by hand and through analyze()."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.errors import NeighborError
from tests.analyzers.clouds import A, family_cloud, rank_reference, unit, values, without_the_common
from tests.conftest import random_tokens
from tests.scoring.oracle import Oracle, facts_of, identity_bridge, near, orthogonal, run, some_rows, variance


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


# -- laws that all of them obey --------------------------------------------------------------------------------------------------------


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


# -- through analyze() -----------------------------------------------------------------------------------------------------------------


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
