"""Statistics on tables that are not as a run makes them: rounding, few texts, odd types of columns, missing labels, texts known by other names."""

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.errors import TableError
from basin_lens.stats import flags, results

S = bl.stats


def drawn(texts=20, tokens=31, layers=1, seed=0):
    """Columns that share nothing, and `level`, the same throughout a text."""
    rng = np.random.default_rng(seed)
    doc = np.tile(np.repeat(np.arange(texts), tokens), layers)
    table = pd.DataFrame({"layer": np.repeat(np.arange(layers), texts * tokens), "doc": doc, "seq": doc})
    table["pos"] = np.tile(np.arange(tokens), texts * layers)
    table["token_id"] = rng.integers(0, 60, len(table))
    for name in ("a", "b", "c0", "c1", "c2", "c3"):
        table[name] = rng.normal(size=len(table))
    table["level"] = rng.normal(size=(layers, texts))[table["layer"], table["doc"]] * 3.3 + 0.1
    table["first"] = rng.random(len(table)) < 0.4
    table["member"] = table["doc"] % 2 == 0
    table["tag"] = np.where(table["token_id"] < 30, "N", "V")
    return table


def copied(**columns):
    """8 texts, each five times."""
    rng = np.random.default_rng(1)
    table = drawn(40, 33)
    table["token_id"] = np.tile(rng.integers(0, 5000, (8, 33)), (5, 1)).ravel()
    return table.assign(**columns)


@pytest.mark.parametrize(
    "test",
    [
        lambda t: S.compare_groups(t, "level", "first", paired=True, n_resamples=99),
        lambda t: S.quartile_table(t, "level", "a").query("quartile == '4 - 1'"),
        lambda t: S.tag_means(t, "level", "tag"),
        lambda t: S.tag_effect(t, "level", "tag", n_resamples=99),
        lambda t: S.tag_means(t.assign(tag=t["doc"] % 2), "a", "tag"),
    ],
)
def test_rounding_within_texts_is_no_finding(test):
    """A score that is the same throughout a text, or a tag that is: what is left within texts is rounding, which had p-values down to .01."""
    found = test(drawn())
    assert found["p"].isna().all()
    assert (found["note"] != "").all()


@pytest.mark.parametrize("unit", ["doc", "seq", "passage", "document", "sequence"])
def test_names_of_texts_are_no_kinds_of_texts(unit):
    """Copies under other names are copies, also where the unit is given as the column that holds the names."""
    table = copied()
    table["passage"] = table["doc"]
    found = S.within_sequence_correlation(table, "a", "b", unit=unit).iloc[0]
    assert found.n_units == 8
    assert found.note == "32 of 40 texts are copies of others and left out"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.assign(token_id=t["token_id"].astype(float), pos=t["pos"].astype(float)),
        lambda t: t.assign(token_id=t["token_id"].astype("Int64"), layer=t["layer"].astype("Int64")),
        lambda t: t.assign(token_id=t["token_id"].astype("category"), doc=t["doc"].astype("category")),
        lambda t: t[t["pos"] >= 1].assign(pos=t["pos"] + 3),
        lambda t: t.set_axis(np.zeros(len(t), int)).sample(frac=1, random_state=0),
    ],
)
def test_copies_are_found_whatever_the_columns_types(change):
    assert S.before_after(change(copied()), "a", n_resamples=99).n_units.item() == 8


def test_old_tests_say_that_copies_are_left_out():
    assert S.guide_tests(copied(), "a", "b").note.item() == "32 of 40 texts are copies of others and left out"


@pytest.mark.parametrize("kind", ["boolean", "string", object])
def test_missing_labels_of_every_kind_are_passed_over(kind):
    table = drawn()
    values = [None if doc > 17 else doc % 2 == 0 if kind == "boolean" else "xy"[doc % 2] for doc in table["doc"]]
    table["group"] = (
        pd.array(values, dtype=kind) if isinstance(kind, str) else pd.Series([pd.NA if v is None else v for v in values])
    )
    expected = S.compare_groups(
        table[table["doc"] < 18].assign(group=lambda t: t["group"].astype(str)), "a", "group", groups=_two(kind)
    )
    found = S.compare_groups(table, "a", "group")
    assert found.n_units.item() == 18
    assert found.estimate.item() == pytest.approx(expected.estimate.item())
    assert S.guide_tests(table, "a", group="group").guide_r.notna().all()


def _two(kind):
    return ("True", "False") if kind == "boolean" else ("x", "y")


@pytest.mark.parametrize("layer", ["blocks.0", 0.5, np.nan])
def test_layers_that_are_no_whole_numbers_are_refused(layer):
    with pytest.raises(TableError, match="whole number as the layer"):
        S.within_sequence_correlation(drawn().assign(layer=layer), "a", "b")


def test_groups_far_apart_stay_in_the_family():
    """At 1e9 against 0, sums of squares have nothing left of a standard deviation of 1: p_corrected was NaN, or below what labels allow."""
    table = drawn()
    near = S.compare_groups(table.assign(a=table["a"] + 30.0 * table["member"]), "a", "member", correction="max-t", n_resamples=999)
    far = S.compare_groups(table.assign(a=table["a"] + 1e9 * table["member"]), "a", "member", correction="max-t", n_resamples=999)
    assert far.p_corrected.item() == pytest.approx(near.p_corrected.item())
    values, label = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2 == 0
    plain = results.max_t_labels(values, label, 999, 0)
    assert results.max_t_labels(values + 1e3, label, 999, 0) == pytest.approx(plain)


def test_a_constant_layer_does_not_disturb_the_family():
    table = drawn(layers=3)
    table["a"] = table["a"].where(table["layer"] != 1, 0.0)
    found = S.compare_groups(table, "a", "member", correction="max-t", n_resamples=99)
    assert found.p_corrected.notna().tolist() == [True, False, True]
    assert found.note[1] == "a is constant at this layer"


@pytest.mark.slow
@pytest.mark.parametrize(("texts", "tokens", "controls"), [(12, 1, 4), (12, 20, 2), (20, 1, 6), (12, 1, 10)])
@pytest.mark.parametrize("which", ["rank", "mixed"])
def test_few_texts_give_no_more_false_positives(texts, tokens, controls, which):
    """Errors made of residuals are too small where each text has much weight: .10 to .37 here, and a division by 0 with as many terms as texts."""
    rng = np.random.default_rng(2)
    draws, names = 200, [f"c{index}" for index in range(controls)]
    doc = np.tile(np.repeat(np.arange(texts), tokens), draws)
    table = pd.DataFrame({"layer": np.repeat(np.arange(draws), texts * tokens), "doc": doc, "seq": doc})
    for name in ("x", "y", *names):
        table[name] = rng.normal(size=len(table)) + np.repeat(rng.normal(size=draws * texts), tokens)
    options = {"controls": names, "correction": "none"}
    found = (
        S.rank_regression(table, "x", "y", within=False, **options)
        if which == "rank"
        else S.mixed_model(table, "x", "y", **options)
    )
    assert (found.note != "").all() or tokens > 1
    assert (found["p"] <= 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / draws)


def test_jackknife_error_is_that_of_leaving_texts_out():
    rng = np.random.default_rng(3)
    units, terms = np.repeat(np.arange(12), 3), np.column_stack([np.ones(36), rng.normal(size=(36, 3))])
    x = terms.sum(1) + rng.normal(size=36)
    y = x + rng.normal(size=12)[units] + rng.normal(size=36)
    design = np.column_stack([terms, x])
    slopes = [np.linalg.lstsq(design[units != u], y[units != u], rcond=None)[0][-1] for u in range(12)]
    basis = np.linalg.qr(terms)[0]
    one, other = (v - basis @ (basis.T @ v) for v in (y, x))
    found = results.clustered_slope(one, other, units, 4, basis)
    error = np.sqrt(11 / 12 * ((np.array(slopes) - np.mean(slopes)) ** 2).sum())
    assert found.high - found.estimate == pytest.approx(2.200985 * error, rel=1e-5)


def test_the_order_of_rows_makes_no_difference():
    """Rounding told ties apart, as the order of the rows had it: .667 and .672."""
    table = drawn(tokens=30)
    table["b"] += table["a"]
    options = {"controls": ["position", "log_frequency"]}
    first = S.partial_correlation(table, "a", "b", **options)
    second = S.partial_correlation(table.sample(frac=1, random_state=1), "a", "b", **options)
    assert first.estimate.item() == pytest.approx(second.estimate.item(), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("test", ["spearman", "rank"])
def test_short_texts_and_a_bent_control(test):
    """10 texts of 12 tokens: where one set of curves is all that tokens suffice for, it is of the control's own value: .87 and .28 before."""
    rng = np.random.default_rng(6)
    control = rng.standard_t(3, (200, 10, 12)) + rng.normal(size=(200, 10, 1))
    bent = np.arcsinh(control) ** 2
    bent = (bent - bent.mean()) / bent.std()
    columns = {"x": bent + 0.5 * rng.normal(size=control.shape), "y": bent + 0.5 * rng.normal(size=control.shape), "c": control}
    doc = np.tile(np.repeat(np.arange(10), 12), 200)
    table = pd.DataFrame(
        {"layer": np.repeat(np.arange(200), 120), "doc": doc, "seq": doc, **{k: v.ravel() for k, v in columns.items()}}
    )
    call = S.partial_correlation if test == "spearman" else S.rank_regression
    found = call(table, "x", "y", controls=["c"], correction="none")
    assert found.note.str.contains("coarse curves").all()
    assert (found["p"] <= 0.05).mean() <= 0.11


def test_a_flag_asks_values_too_where_controls_leave_little():
    ranks = pd.DataFrame({"left": [0.1, 0.1, 0.1, 0.9], "estimate": [0.2, 0.2, 0.2, 0.2], "p_corrected": [0.01] * 4})
    values = pd.DataFrame({"estimate": [0.1, -0.1, np.nan, -0.1], "p_corrected": [0.4, 0.001, np.nan, 0.9]})
    assert flags._of_both(ranks, values).p_corrected.tolist() == [0.4, 1.0, 1.0, 0.01]


@pytest.mark.simulation
@pytest.mark.parametrize("kind", ["normal", "t"])
def test_an_interval_of_few_units_misses_no_more_than_it_says(kind):
    """2,000 data sets of 12 units: a plain percentile interval misses in 10 % (normal)."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2000, 12)) if kind == "normal" else rng.standard_t(2.5, size=(2000, 12))
    table = pd.DataFrame({"set": np.repeat(range(2000), 12), "doc": np.tile(range(12), 2000), "a": values.ravel()})
    found = S.mean_interval(table, "a", "set", n_resamples=499)
    missed = ((found.low > 0) | (found.high < 0)).mean()
    print(f"missed in {missed:.3f}")
    assert missed < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_intervals_of_few_units_say_that_they_are_narrow():
    table = drawn(7)
    assert "too narrow" in S.mean_interval(table, "a", "layer", n_resamples=99).note.item()
    assert S.mean_interval(drawn(24), "a", "layer", n_resamples=99).note.item() == ""


@pytest.mark.parametrize("controls", [[], ["c0"]])
def test_texts_of_which_a_sample_has_one_token(controls):
    """A correlation of one token is none: they are left out, and the answer is that without them."""
    table = drawn(24, 31)
    table["b"] += table["a"]
    table.loc[(table.doc >= 20) & (table.pos > 0), "a"] = np.nan
    options = {"controls": controls, "min_tokens": 6}
    found, without = (S.within_sequence_correlation(part, "a", "b", **options) for part in (table, table[table.doc < 20]))
    assert "4 sequences left out" in found.note[0] and found.n_documents[0] == 20
    assert found[["estimate", "low", "high", "p"]].to_numpy() == pytest.approx(without[["estimate", "low", "high", "p"]].to_numpy())


def test_flags_take_sequences_of_few_scored_tokens():
    """Ten tokens of a text, six controls asked for: as many as the declared tests of a sample have."""
    table = drawn(20, 31)
    table["b"] += table["a"]
    table.loc[table.pos >= 10, "a"] = np.nan
    raised = S.red_flags(table, "a", "b", controls=["c0", "c1"], min_tokens=6).set_index("flag").raised
    assert raised.notna().all() and not raised["vanishes under controls"]
    with pytest.raises(bl.errors.StudyError, match="at least 12 scored tokens"):
        S.red_flags(table, "a", "b", controls=["c0", "c1"])
