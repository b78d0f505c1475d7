"""Two runs on the same texts: rows pair, frozen neighbors are the first run's, and what does not pair is refused."""

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import NeighborError, TableError
from tests.conftest import TEXTS, make_bridge
from tests.scoring.oracle import Oracle

A = bl.analyzers


@pytest.fixture(scope="module")
def other(tokenizer):
    return make_bridge("llama", seed=1, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def other_capture(other):
    return bl.Capture.from_texts(other, TEXTS, progress=False)


def run(model, capture, *analyzers, **options):
    return bl.analyze(model, capture, list(analyzers), progress=False, **options)


def test_rows_pair_and_differ(llama, capture, other, other_capture):
    a, b = run(llama, capture, A.Contraction(k=5)), run(other, other_capture, A.Contraction(k=5))
    pairs = bl.compare(a, b, on="contraction")
    assert len(pairs) == len(a)
    assert pairs.contraction_a.to_numpy() == pytest.approx(a.contraction.to_numpy(), nan_ok=True)
    assert pairs.contraction_b.to_numpy() == pytest.approx(b.contraction.to_numpy(), nan_ok=True)
    assert (pairs.token == a.token).all() and (pairs.layer == a.layer).all()
    assert pairs.difference.std() > 0
    assert len(pairs.attrs["provenance"]) == 2


def test_order_of_rows_does_not_matter(llama, capture):
    a = run(llama, capture, A.StateNorm())
    attrs = dict(a.attrs)
    b = a.sample(frac=1, random_state=0)
    b.attrs = attrs
    assert (bl.compare(a, b, on="state_norm").difference == 0).all()


def test_a_run_beside_itself_is_zero_and_antisymmetric(llama, capture, other, other_capture):
    a, b = run(llama, capture, A.Compression(k=5)), run(other, other_capture, A.Compression(k=5))
    same = bl.compare(a, a)
    assert (same.difference.dropna() == 0).all() and same.difference.notna().any()
    assert bl.compare(a, b).difference.to_numpy() == pytest.approx(-bl.compare(b, a).difference.to_numpy(), nan_ok=True)


def test_two_layers(llama, capture):
    table = run(llama, capture, A.StateNorm())
    pairs = bl.compare(table[table.layer == 0], table[table.layer == 2], on="state_norm")
    assert (pairs.layer_a == 0).all() and (pairs.layer_b == 2).all()
    expected = capture.resid_pre(2).norm(dim=1) - capture.resid_pre(0).norm(dim=1)
    assert pairs.difference.to_numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-4)


def test_pairs_of_model_and_capture_are_measured(llama, capture, other, other_capture):
    got = bl.compare((llama, capture), (other, other_capture), on=A.Contraction(k=5), layers=[1], progress=False)
    a, b = (run(m, c, A.Contraction(k=5), layers=[1]) for m, c in ((llama, capture), (other, other_capture)))
    expected = bl.compare(a, b, on="contraction")
    assert got.difference.to_numpy() == pytest.approx(expected.difference.to_numpy(), nan_ok=True)


def test_frozen_neighbors_are_those_of_the_first_run(llama, capture, other, other_capture):
    """Against an oracle: the first model's neighbors by numpy, through the second model by rerunning it."""
    pairs = bl.compare(
        (llama, capture), (other, other_capture), on=A.Contraction(k=5), frozen_neighbors=True, layers=[1], progress=False
    )
    own = bl.compare((llama, capture), (other, other_capture), on=A.Contraction(k=5), layers=[1], progress=False)
    assert pairs.contraction_a.to_numpy() == pytest.approx(own.contraction_a.to_numpy(), nan_ok=True)
    first, second = Oracle(llama, capture, 1), Oracle(other, other_capture, 1)
    for row in (5, 40, 77):
        rows, _ = first.neighbors(row, 5)
        before = second.pre[rows].var(axis=0).sum()
        after = np.asarray(second.images(row, rows, "patched")).var(axis=0).sum()
        assert pairs.contraction_b[row] == pytest.approx(np.log(before / after), abs=1e-3)
    assert (pairs.contraction_b - own.contraction_b).abs().max() > 0.01
    facts = list(pairs.attrs["provenance"].values())
    assert [f["neighbors"] for f in facts] == ["its own", "frozen: those of another run"]


@pytest.mark.slow(everywhere=True)
def test_a_model_beside_itself_has_the_same_frozen_neighbors(llama, capture):
    pairs = bl.compare((llama, capture), (llama, capture), frozen_neighbors=True, progress=False)
    assert pairs.difference.abs().max() < 1e-4 and pairs.difference.notna().any()


def test_other_texts_are_refused(llama, capture):
    shorter = bl.Capture.from_texts(llama, TEXTS[:5], progress=False)
    with pytest.raises(TableError, match="same texts"):
        bl.compare(run(llama, capture, A.StateNorm()), run(llama, shorter, A.StateNorm()), on="state_norm")
    with pytest.raises(TableError, match="same texts"):
        bl.compare((llama, capture), (llama, shorter))


def test_what_does_not_pair_is_refused(llama, capture):
    table = run(llama, capture, A.StateNorm())
    with pytest.raises(TableError, match="same layers"):
        bl.compare(table[table.layer < 2], table[table.layer > 0], on="state_norm")
    with pytest.raises(TableError, match="'compression'"):
        bl.compare(table, table)
    with pytest.raises(NeighborError, match="pairs"):
        bl.compare(table, table, on="state_norm", frozen_neighbors=True)
    with pytest.raises(TableError, match="two tables or two pairs"):
        bl.compare(table, llama, on="state_norm")
    with pytest.raises(TableError, match="default score"):
        bl.compare((llama, capture), (llama, capture), on="nonsense")
    with pytest.raises(TableError, match="one run"):
        bl.compare(bl.tables.concat([table, run(llama, capture, A.StateNorm(), seed=1)]), table, on="state_norm")


def test_frozen_needs_a_score_on_neighbors(llama, capture):
    with pytest.raises(NeighborError, match="StateNorm"):
        bl.compare((llama, capture), (llama, capture), on=A.StateNorm(), frozen_neighbors=True)


def test_the_models_are_left_as_they_were(llama, capture):
    before = door.fingerprint(llama)
    bl.compare((llama, capture), (llama, capture), frozen_neighbors=True, layers=[0], progress=False)
    assert door.fingerprint(llama) == before and torch.is_grad_enabled()
