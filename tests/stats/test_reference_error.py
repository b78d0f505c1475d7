"""The error of what a score is held against: in every interval of a layer's mean, and in nothing where it cancels."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from basin_lens import stats, tables
from basin_lens.errors import TableError

ERRORS = {0: 0.5, 1: 0.02}
DOCUMENTS, TOKENS = 12, 20
T = scipy_stats.t.ppf(0.975, DOCUMENTS - 1)


def made(errors=ERRORS, documents=DOCUMENTS):
    """Two layers of documents with levels of their own; the score of a layer has this error of its reference."""
    rng = np.random.default_rng(0)
    parts = []
    for layer in (0, 1):
        doc = np.repeat(np.arange(documents), TOKENS)
        values = 0.4 + rng.normal(0, 0.3, documents)[doc] + rng.normal(size=len(doc))
        importance = rng.normal(size=len(doc))
        tag = np.tile(["A", "B"], len(doc) // 2)
        parts.append(pd.DataFrame({"layer": layer, "doc": doc, "seq": doc, "score": values, "by": importance, "tag": tag}))
    held = {} if errors is None else {"reference_error": {"score": {str(layer): e for layer, e in errors.items()}}}
    return tables.described(pd.concat(parts, ignore_index=True).assign(run="r"), {"r": tables.Provenance(**held)})


def means_of(table, layer):
    return table[table["layer"] == layer].groupby("doc")["score"].mean().to_numpy()


def half(row, low="low", high="high"):
    return (row[high] - row[low]) / 2


@pytest.mark.parametrize("layer", ERRORS)
def test_layer_summary_and_before_after_add_it_in_quadrature(layer):
    table = made()
    means = means_of(table, layer)
    expected = T * math.hypot(means.std(ddof=1) / math.sqrt(DOCUMENTS), ERRORS[layer])
    summary = tables.layer_summary(table, ["score"]).set_index("layer").loc[layer]
    assert half(summary, "score_low", "score_high") == pytest.approx(expected)
    assert summary["score_mean"] == pytest.approx(means.mean())
    assert summary["score_reference_error"] == ERRORS[layer]
    tested = stats.before_after(table, "score", layers=layer).iloc[0]
    assert half(tested) == pytest.approx(expected)
    assert tested["estimate"] == pytest.approx(means.mean())
    by_t = 2 * scipy_stats.t.sf(abs(means.mean()) / (expected / T), DOCUMENTS - 1)
    assert tested["p"] == pytest.approx(by_t, rel=0.3, abs=0.003)
    g = tested["hedges_g_high"] - tested["hedges_g_low"]
    without = stats.before_after(made(None), "score", layers=layer).iloc[0]
    assert g**2 - (without["hedges_g_high"] - without["hedges_g_low"]) ** 2 == pytest.approx(
        (2 * 1.959964 * ERRORS[layer] / means.std(ddof=1)) ** 2, rel=1e-4
    )
    assert tested["p"] > without["p"] or layer == 1


def test_the_family_of_all_layers_counts_it():
    with_it, without = (stats.before_after(table, "score", correction="max-t").set_index("layer") for table in (made(), made(None)))
    assert (without["p_corrected"] < 0.05).all()
    assert with_it.loc[0, "p_corrected"] > 0.2 and with_it.loc[1, "p_corrected"] < 0.05


@pytest.mark.parametrize("layer", ERRORS)
def test_bootstrap_intervals_add_it_to_either_arm(layer):
    found, plain = (stats.mean_interval(t, "score", "layer").set_index("layer").loc[layer] for t in (made(), made(None)))
    for end in ("low", "high"):
        expected = math.hypot(plain[end] - plain["estimate"], T * ERRORS[layer])
        assert abs(found[end] - found["estimate"]) == pytest.approx(expected)


def test_groups_of_several_layers_have_the_mean_of_their_errors():
    found, plain = (stats.mean_interval(t, "score", "run").iloc[0] for t in (made(), made(None)))
    expected = math.hypot(plain["high"] - plain["estimate"], T * (0.5 + 0.02) / 2)
    assert found["high"] - found["estimate"] == pytest.approx(expected)


def test_quartiles_and_tags_have_it_in_their_means_and_not_in_their_differences():
    with_it, without = (stats.quartile_table(t, "score", "by", layers=0) for t in (made(), made(None)))
    for index in range(4):
        own = half(without.iloc[index]) / T
        assert half(with_it.iloc[index]) == pytest.approx(T * math.hypot(own, 0.5))
    assert with_it.iloc[4][["low", "high", "p"]].tolist() == without.iloc[4][["low", "high", "p"]].tolist()
    with_it, without = (stats.tag_means(t, "score", "tag", layers=0).iloc[0] for t in (made(), made(None)))
    own = half(without, "mean_low", "mean_high") / T
    assert half(with_it, "mean_low", "mean_high") == pytest.approx(T * math.hypot(own, 0.5))
    assert with_it[["low", "high", "p"]].tolist() == without[["low", "high", "p"]].tolist()


def test_it_cancels_where_rows_of_a_layer_are_compared():
    tests = (
        lambda t: stats.compare_groups(t, "score", "tag", paired=True),
        lambda t: stats.compare_groups(t.assign(first=t["doc"] < 6), "score", "first"),
        lambda t: stats.within_sequence_correlation(t, "score", "by"),
        lambda t: stats.rank_regression(t, "score", "by"),
    )
    for test in tests:
        pd.testing.assert_frame_equal(*(tables.without_provenance(test(t)) for t in (made(), made(None))))


def test_an_error_that_was_not_measured_leaves_no_interval():
    table = made({0: None, 1: 0.02})
    summary = tables.layer_summary(table, ["score"]).set_index("layer")
    assert np.isnan(summary.loc[0, ["score_low", "score_high"]].astype(float)).all()
    assert np.isfinite(summary.loc[1, ["score_low", "score_high"]].astype(float)).all()
    for correction in ("bh", "max-t"):
        tested = stats.before_after(table, "score", correction=correction)
        assert np.isnan(tested.loc[0, ["low", "high", "p", "p_corrected"]].astype(float)).all()
        assert "was not measured" in tested["note"].iloc[0] and np.isfinite(tested["p"].iloc[1])
    found = stats.mean_interval(table, "score", "layer")
    assert np.isnan(found["low"].iloc[0]) and "was not measured" in found["note"].iloc[0]
    assert "was not measured" in stats.quartile_table(table, "score", "by")["note"].iloc[0]


def test_a_difference_that_is_the_same_in_every_unit_has_the_error_of_its_references():
    """Two runs that differ in the seed alone."""
    table = tables.assign(made(), score=0.3)
    for correction in ("bh", "max-t"):
        tested = stats.before_after(table, "score", correction=correction)
        assert half(tested.iloc[0]) == pytest.approx(T * 0.5) and half(tested.iloc[1]) == pytest.approx(T * 0.02)
        assert tested["p"].tolist() == pytest.approx([2 * scipy_stats.t.sf(0.3 / e, DOCUMENTS - 1) for e in (0.5, 0.02)])
        assert tested["note"].str.contains("reference's alone").all()
    assert half(stats.mean_interval(table, "score", "layer").iloc[0]) == pytest.approx(T * 0.5)
    with pytest.raises(TableError, match="varies"):
        stats.before_after(tables.without_provenance(table), "score")


@pytest.mark.slow
def test_intervals_hold_what_they_promise():
    """Documents around a truth, and a reference with as large an error as their mean: 95 of 100 intervals hold the truth."""
    rng, n, error = np.random.default_rng(0), 16, 0.25
    held, plain = 0, 0
    for _ in range(2000):
        values = rng.normal(0, 1, n) - rng.normal(0, error)
        (low, high), (low_plain, high_plain) = tables.interval(values, error=error), tables.interval(values)
        held, plain = held + (low <= 0 <= high), plain + (low_plain <= 0 <= high_plain)
    assert 0.94 < held / 2000 < 0.975
    assert plain / 2000 < 0.87


def test_red_flags_of_a_table_without_layers_count_it():
    """Two layers of one run beside one another: the table of pairs has no layer of its own."""
    flags = {}
    for name, errors in (("small", {0: 0.001, 1: 0.001}), ("large", {0: 0.001, 1: 0.5})):
        pairs = made(errors)
        pairs = tables.select(pairs, pairs["layer"] == 0).drop(columns=["layer", "run"]).assign(pos=1)
        found = stats.red_flags(tables.with_provenance(pairs, made(errors)), "score", n_resamples=999).set_index("flag")
        flags[name] = found.loc["nothing survives correction"]
    assert flags["small"].value < 0.05 and not flags["small"].raised
    assert flags["large"].value > 0.05 and flags["large"].raised
