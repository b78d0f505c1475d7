"""The headline as an analyzer: columns, nulls and options, in every context and family. Its laws are in test_crossed_pass.py."""

import math

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import CrossedTable
from basin_lens.errors import NeighborError
from tests.conftest import PACKED, hooked_lane, make_hooked, random_tokens
from tests.families import capture_of, families, model_of, served
from tests.scoring.oracle import facts_of, identity_bridge, make_cloud, run
from tests.transport.test_contract import SERVED

A = bl.analyzers
NULLS = ("compression_random_sets", "compression_isotropic")
COLUMNS = ("compression", "compression_place", "compression_directions", *NULLS, "compression_above_random_sets")


@pytest.fixture(scope="module")
def capture(llama):
    return bl.Capture.from_texts(llama, random_tokens(10, 14), progress=False)


def test_columns():
    assert tuple(c.name for c in A.Compression().columns) == COLUMNS
    assert tuple(c.name for c in A.Compression(nulls=False).columns) == COLUMNS[:3]
    assert tuple(c.name for c in A.Compression(nulls=("isotropic",)).columns) == (*COLUMNS[:3], "compression_isotropic")
    some = A.Compression(nulls=("random_sets",), contractions=True, name="a")
    parts = ("place", "directions", "random_sets", "above_random_sets", "at_home", "at_home_random_sets")
    assert tuple(c.name for c in some.columns) == ("a", *(f"a_{part}" for part in parts))


def test_it_reads_the_tables():
    """A group of three, written by hand: 1 nat at home for the first token, and nothing elsewhere."""
    near = torch.zeros(1, 3, 3)
    near[0, 0, 0] = 1
    tables = {
        "neighbors": CrossedTable(torch.zeros(1, 3), -near),
        "random_sets": CrossedTable(torch.zeros(1, 3), near),
        "isotropic": CrossedTable(torch.zeros(1, 3), torch.zeros(1, 3, 3)),
    }
    got = A.Compression(group=3).measure(make_cloud(lambda x: x, q=3, crossed=tables))
    assert {name: value.tolist() for name, value in got.items()} == {
        "compression": [1, 0, 0],
        "compression_place": [0, 0, 0],
        "compression_directions": [0, 0, 0],
        "compression_random_sets": [-1, 0, 0],
        "compression_isotropic": [0, 0, 0],
        "compression_above_random_sets": [2, 0, 0],
    }


def test_contraction_at_home_is_the_diagonal_of_the_table():
    """Of the neighbors and of each null: what is put in less what comes out."""
    before = torch.tensor([[1.0, 2.0, 3.0]])
    after = torch.arange(9.0).view(1, 3, 3)
    tables = {"neighbors": CrossedTable(before, after), "random_sets": CrossedTable(before + 1, after)}
    analyzer = A.Compression(group=3, nulls=("random_sets",), contractions=True)
    got = analyzer.measure(make_cloud(lambda x: x, q=3, crossed=tables))
    assert list(got) == [column.name for column in analyzer.columns]
    assert got["compression_at_home"].tolist() == [1.0, -2.0, -5.0]
    assert got["compression_at_home_random_sets"].tolist() == [2.0, -1.0, -4.0]


def test_contraction_at_home_is_what_place_directions_and_interaction_say(llama, capture):
    """At one scale, c(i, i) is log V_in less log V_out of the token's own displacements; the columns beside it stay as they are."""
    table = run(llama, capture, A.Compression(k=4, contractions=True), layers=[1])
    alone = run(llama, capture, A.Compression(k=4), layers=[1])
    for column in COLUMNS:
        assert table[column].equals(alone[column])
    held = table.dropna(subset=["compression"])
    assert held.compression_at_home.notna().all()
    elsewhere = held.compression_at_home - held.compression
    assert np.corrcoef(elsewhere, held.compression_place + held.compression_directions)[0, 1] > 0.5
    few = run(llama, capture, A.Compression(k=4, nulls=("isotropic",)), layers=[1])
    assert few.compression_isotropic.equals(alone.compression_isotropic) and "compression_random_sets" not in few


@pytest.mark.many
@pytest.mark.parametrize("context", ["patched", "solo"])
@pytest.mark.parametrize("name", PACKED)
def test_a_block_that_writes_nothing_has_no_interaction(name, context):
    table = run(identity_bridge(name), random_tokens(8, 14), A.Compression(k=4, context=context))
    for column in COLUMNS:
        assert table[column].notna().any()
        assert table[column].abs().max() < 1e-4, column


def test_the_linear_null_has_no_interaction(llama, capture):
    """The affine fit of a block that has some."""
    table = run(llama, capture, A.Compression(k=4, context="affine", name="fit"), A.Compression(k=4))
    assert table.fit.abs().max() < 1e-3
    assert table.compression.abs().median() > 1e-2
    assert table.fit_directions.abs().median() > 1e-2


@pytest.mark.many
@pytest.mark.parametrize("context", ["attn", "mlp", "solo", "affine"])
def test_every_context_that_passes_states(llama, capture, context):
    table = run(llama, capture, A.Compression(k=4, context=context, queries=40), layers=[1])
    assert table.compression.notna().sum() > 30
    for column in COLUMNS:
        assert np.isfinite(table[column].dropna()).all()


@pytest.mark.slow(everywhere=True)
def test_a_path_of_all_blocks(llama, capture):
    table = run(llama, capture, A.Compression(k=4, blocks=3), A.Compression(k=4, name="one"))
    assert table[table.layer == 0].compression.notna().any() and table[table.layer > 0].compression.isna().all()
    first = table[table.layer == 0]
    assert (first.compression - first.one).abs().median() > 1e-2
    assert facts_of(table)["left_out"]["compression"]["too few blocks left"] > 0


def test_parts_are_those_of_the_contraction_of_synthetic_clouds(llama, capture):
    """With nothing but linear maps in it, place and directions add up to the contraction; here they come near it."""
    table = run(llama, capture, A.Compression(k=6, nulls=False), A.Contraction(k=6), layers=[1])
    held = table.dropna(subset=["compression"])
    explained = held.compression_place + held.compression_directions
    assert np.corrcoef(explained, held.contraction)[0, 1] > 0.5


def test_reliability_reaches_the_provenance_and_the_summary(llama, capture):
    table = run(llama, capture, A.Compression(k=6))
    facts = facts_of(table)
    assert set(facts["reliability"]["compression"]) == {"0", "1", "2"}
    for layer in "012":
        groups = facts["groups"][layer]["compression"]
        for kind in ("reliability_over_displacements", "reliability_over_partners"):
            assert set(groups[kind]) == set(COLUMNS)
    assert "compression_reliability" in bl.tables.layer_summary(table)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"context": "native"}, "no cached output"),
        ({"k": 3}, "k of at least 4"),
        ({"group": 2}, "group of at least 3"),
        ({"group": True}, "group"),
        ({"scale": 0}, "positive scale"),
        ({"scale": -1.0}, "positive scale"),
        ({"scale": math.inf}, "positive scale"),
        ({"scale": math.nan}, "positive scale"),
        ({"queries": 3}, "queries of at least 4"),
        ({"context": "mlp", "blocks": 2}, "blocks=1"),
        ({"nulls": ("neighbors",)}, "expected nulls True, False or some of"),
        ({"nulls": ("isotropic", "isotropic")}, "each once"),
    ],
    ids=str,
)
def test_options_without_meaning_are_refused(options, word):
    with pytest.raises(NeighborError, match=word):
        A.Compression(**options).check()


def test_numbers_of_numpy_are_taken():
    analyzer = A.Compression(group=np.int64(5), queries=torch.tensor(20))
    analyzer.check()
    assert analyzer == A.Compression(group=5, queries=20)


@pytest.mark.slow
def test_seeds_move_no_mean_by_more_than_its_error(llama, capture):
    """What the first headline failed: with other seeds, its mean moved by many times its printed interval."""
    columns = ["compression", "compression_above_random_sets"]
    means, errors = [], []
    for seed in range(20):
        table = run(llama, capture, A.Compression(k=4, nulls=("random_sets",)), seed=seed, layers=[1])
        by_document = table.groupby("doc")[columns].mean()
        means.append(by_document.mean())
        errors.append(by_document.std() / math.sqrt(len(by_document)))
    assert (np.abs(np.array(means) - np.mean(means, axis=0)).max(0) < 2 * np.mean(errors, axis=0)).all()


# -- every family ---------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("family", SERVED)
def test_every_family_is_served(family):
    model, capture = model_of(family.name, family.kind), capture_of(family.name, family.kind)
    chosen = [A.Compression(k=4, group=3), A.RelativeContraction(k=4), A.DirectionalContraction(k=4)]
    if served(family.name, family.kind).halves:
        chosen += [A.Compression(k=4, group=3, context=half, name=half, nulls=False) for half in ("attn", "mlp")]
    table = bl.analyze(model, capture, chosen, layers=[1], progress=False)
    for column in (column.name for a in chosen for column in a.columns):
        values = table[column].dropna()
        assert len(values) > 20, column
        assert np.isfinite(values).all()
    assert table.compression.abs().max() > 1e-3


@hooked_lane
def test_a_hooked_transformer_is_served():
    assert families("hooked")
    table = run(make_hooked(), random_tokens(8, 14), A.Compression(k=4))
    assert table.compression.notna().mean() > 0.5
