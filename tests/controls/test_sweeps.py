"""Sweeps, and parts of a capture."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.capture import border_states, borders, fill_columns, subset
from basin_lens.errors import CaptureError, NeighborError, TableError
from tests.conftest import TEXTS, random_tokens
from tests.controls.made import C

# -- subsets ---------------------------------------------------------------------------------------------------------------------------


def test_subset_is_the_capture_of_those_texts(llama, held):
    fill_columns(llama, held, [bl.analyzers.Surprisal()], progress=False)
    part = subset(held, [4, 1])
    assert part.docs == [held.docs[4], held.docs[1]] and part.labels == [held.labels[4], held.labels[1]]
    rows = torch.cat([torch.nonzero(held.row_seq == seq).squeeze(1) for seq in (4, 1)])
    for border in borders(held):
        assert torch.equal(border_states(part, border), border_states(held, border)[rows])
    key = bl.analyzers.Surprisal().key
    torch.testing.assert_close(part.columns[key]["surprisal"], held.columns[key]["surprisal"][:, rows], equal_nan=True)


def test_subset_keeps_readings_in_place(llama):
    tokens = random_tokens(4, 12)
    _, cache = llama.run_with_cache(tokens)
    mask = torch.ones_like(tokens)
    mask[2, 8:] = 0
    capture = bl.Capture.from_cache(llama, tokens, cache, attention_mask=mask)
    part = subset(capture, [2])
    asked = [bl.analyzers.AttentionReceived(), bl.analyzers.Surprisal()]
    assert fill_columns(llama, capture, asked, progress=False) == fill_columns(llama, part, asked, progress=False) == []
    for key, columns in part.columns.items():
        for name, value in columns.items():
            torch.testing.assert_close(value, capture.columns[key][name][:, capture.row_seq == 2], equal_nan=True)


@pytest.mark.parametrize("sequences", [[], [1, 1], [6], [-1]])
def test_wrong_subsets_are_refused(capture, sequences):
    with pytest.raises(CaptureError, match="different sequences"):
        subset(capture, sequences)


# -- sweep -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(llama):
    tokens = random_tokens(14, 20, seed=3)
    capture = bl.Capture.from_texts(llama, tokens, progress=False)
    capture.docs = [f"doc-{i % 7}" for i in range(14)]
    return capture


@pytest.mark.slow
def test_sweep_gives_what_direct_calls_give(llama, texts):
    score = bl.analyzers.Compression(k=6, queries=120, nulls=("random_sets",))
    table = C.sweep(llama, texts, score, k=[4, 9], bank_sizes=[100, 180], layers=[0, 2], progress=False)
    assert list(table.columns) == [
        "run",
        "score",
        "layer",
        "k",
        "bank_size",
        "mean",
        "low",
        "high",
        "nan_share",
        "reliability",
        "spearman",
    ]
    # Banks are whole sequences of 19 points; the score as it stands is always among the settings.
    assert sorted(table.bank_size.unique()) == [114, 190, 266] and sorted(table.k.unique()) == [4, 6, 9]
    assert len(table) == 5 * 2 * 3 * 3 and not table.duplicated(["score", "layer", "k", "bank_size"]).any()
    assert set(table.score) == {column.name for column in score.columns}
    table = table[table.score.isin(["compression", "compression_above_random_sets"])]
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0)).tolist()
    banks = {266: None, 190: subset(texts, sorted(order[:10])), 114: subset(texts, sorted(order[:6]))}
    standing = bl.analyze(llama, texts, [score], layers=[0, 2], progress=False)
    for (size, k), parts in table.groupby(["bank_size", "k"]):
        direct = bl.analyze(llama, texts, [replace(score, k=k)], layers=[0, 2], bank=banks[size], progress=False)
        summary = bl.tables.layer_summary(direct)
        for name, part in parts.groupby("score"):
            for short, long in (
                ("mean", "mean"),
                ("low", "low"),
                ("high", "high"),
                ("nan_share", "nan"),
                ("reliability", "reliability"),
            ):
                np.testing.assert_allclose(part[short].astype(float), summary[f"{name}_{long}"].astype(float), rtol=1e-4, atol=1e-5)
            for layer, value in zip(part.layer, part.spearman, strict=True):
                both = [t[t.layer == layer][name] for t in (standing.reset_index(), direct.reset_index())]
                np.testing.assert_allclose(value, both[0].corr(both[1], method="spearman"), atol=1e-3)


def test_the_score_as_it_stands_agrees_with_itself(llama, texts):
    table = C.sweep(llama, texts, bl.analyzers.Contraction(k=5), k=[8], bank_sizes=[100], layers=[1], progress=False)
    own = table[(table.k == 5) & (table.bank_size == 266)]
    np.testing.assert_allclose(own.spearman, 1)
    assert (table.spearman <= 1).all() and set(table.run) == set(table.attrs["provenance"])


def test_default_settings(llama, texts):
    ks = C.sweep(llama, texts, bl.analyzers.RawCompression(k=7), layers=[1], progress=False)
    assert ks.k.tolist() == [5, 7, 10, 15, 30, 50] and set(ks.bank_size) == {266}
    banks = C.sweep(llama, texts, bl.analyzers.RawCompression(k=7), bank_sizes=[133, 266], layers=[1], progress=False)
    assert banks.k.tolist() == [7, 7] and banks.bank_size.tolist() == [133, 266]


def test_several_columns_and_a_name(llama, texts):
    table = C.sweep(llama, texts, bl.analyzers.Neighborhood(k=5, name="near"), k=[3], layers=[1], progress=False)
    assert set(table.score) == {c.name for c in bl.analyzers.Neighborhood(k=5, name="near").columns}
    radius = table[table.score == "near_radius"]
    assert radius["mean"].is_monotonic_increasing
    assert radius.reliability.isna().all()


def test_parts_of_another_bank_and_queries(llama, texts):
    bank = bl.Capture.from_texts(llama, random_tokens(9, 20, seed=4), progress=False)
    score = bl.analyzers.RawCompression(k=5)
    table = C.sweep(llama, texts, score, bank_sizes=[80], bank=bank, queries=40, layers=[1], progress=False)
    assert table.bank_size.tolist() == [95, 171]
    np.testing.assert_allclose(table.nan_share, 1 - 40 / texts.n_rows, atol=1e-6)


def test_sweep_refuses(llama, texts):
    score = bl.analyzers.Compression(k=5)
    with pytest.raises(CaptureError, match="expected a Capture"):
        C.sweep(llama, TEXTS, score, progress=False)
    with pytest.raises(TableError, match="cloud analyzer"):
        C.sweep(llama, texts, bl.analyzers.Surprisal(), progress=False)
    with pytest.raises(NeighborError, match="bank sizes between 1 and the bank's 266"):
        C.sweep(llama, texts, score, bank_sizes=[267], progress=False)
    with pytest.raises(NeighborError, match="bank_sizes"):
        C.sweep(llama, texts, score, bank_sizes=[100], bank="reference", progress=False)
    with pytest.raises(NeighborError):
        C.sweep(llama, texts, score, k=[400], progress=False)


def test_a_control_on_a_sample_has_the_values_of_the_whole(llama, capture):
    """Fewer pairs go through the block; those that do, and everything beside them, come out the same."""
    from basin_lens.analyzers.control import controls_of

    score, beside = bl.analyzers.Contraction(k=5), bl.analyzers.Neighborhood(k=5, context="patched")
    whole = bl.analyze(llama, capture, [score, beside, *controls_of([score])], layers=[1], progress=False)
    some = bl.analyze(llama, capture, [score, beside, *controls_of([score], queries=20)], layers=[1], progress=False)
    alone = bl.analyze(llama, capture, [beside, *controls_of([score], queries=20)], layers=[1], progress=False)
    for name in ("contraction_random", "contraction_radius_matched"):
        there = some[name].notna()
        assert there.sum() == 20
        np.testing.assert_allclose(some[name][there], whole[name][there], atol=1e-5)
        np.testing.assert_allclose(alone[name][there], whole[name][there], atol=1e-5)
    for name in ("contraction", "radius", "hubness"):
        np.testing.assert_allclose(some[name], whole[name], atol=1e-5)
    np.testing.assert_allclose(alone["radius"], whole["radius"], atol=1e-5)
    (facts,) = bl.tables.provenance(some).values()
    assert facts["left_out"]["contraction_random"]["not sampled"] > 0
