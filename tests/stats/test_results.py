"""What every result says, what explains a missing number, what is refused."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from basin_lens.errors import StudyError, TableError
from basin_lens.stats import results
from tests.stats.simulated import CHEAP, POWER, S, simulate

ALWAYS = ["layer", "score", "unit", "n_units", "n_sequences", "n_documents", "n_tokens", "test", "effect", "estimate", "low", "high", "null", "p",
          "p_corrected", "correction", "n_tests", "note"]  # fmt: skip


# -- every number that is missing is explained -----------------------------------------------------------------------------------------


def odd(kind):
    table = simulate(2, ("a", "b", "c"), sequences=24, tokens=12, seed=1)
    one = table.layer == 0
    if kind == "infinite":
        table.loc[table.index[::50], "a"] = np.inf
    elif kind == "constant":
        table.loc[one, "a"] = 1.0
    elif kind == "constant within texts":
        table.loc[one, "a"] = table.seq[one] * 1.0
    elif kind == "perfect":
        table.loc[one, ["b", "c"]] = np.stack([table.a[one], -table.a[one]], 1)
    elif kind == "few":
        table.loc[one & (table.seq > 12), "a"] = np.nan
    elif kind == "not a number":
        table.loc[one, "a"] = np.nan
    elif kind == "nearly nothing":
        table.loc[one, "a"] = 1e9 + table.a[one] * 1e-6
    return table


ANSWERS = {
    "correlation": lambda t: S.within_sequence_correlation(t, "a", "b"),
    "max-t": lambda t: S.within_sequence_correlation(t, ["a", "c"], "b", correction="max-t", n_resamples=99),
    "partial": lambda t: S.partial_correlation(t, "a", "b", controls=["c", "position"]),
    "rank": lambda t: S.rank_regression(t, "a", "b", controls=["c"]),
    "mixed": lambda t: S.mixed_model(t, "a", "b", controls=["c"], all_terms=True),
    "groups": lambda t: S.compare_groups(t, "a", "member", n_resamples=99),
    "groups-given": lambda t: S.compare_groups(t, "a", "member", controls=["b"], n_resamples=99),
    "paired": lambda t: S.compare_groups(t, "a", "tag", groups=("NOUN", "VERB"), paired=True, n_resamples=99, correction="max-t"),
    "paired-given": lambda t: S.compare_groups(t, "a", "tag", groups=("NOUN", "VERB"), paired=True, controls=["b"], n_resamples=99),
    "before": lambda t: S.before_after(t, ["a", "b"], n_resamples=99, correction="max-t"),
    "detect": lambda t: S.detect(t, "a", "member", versus="b", n_resamples=99),
    "added": lambda t: S.added_value(t, "a", "member", "b", n_splits=2, n_resamples=9),
    "tags": lambda t: S.tag_effect(t, "a", "tag", controls=["b"], fewest=5, n_resamples=9),
    "tag-means": lambda t: S.tag_means(t, "a", "tag", controls=["b"]),
    "quartiles": lambda t: S.quartile_table(t, "a", "b", parts=2),
    "slope": lambda t: S.unit_slope(t.assign(dose=t.seq % 3), "a", "dose", n_resamples=99),
    "best": lambda t: S.best_layer(t, lambda u: S.within_sequence_correlation(u, "a", "b")),
    "mean": lambda t: S.mean_interval(t, "a", "layer", n_resamples=99),
    "guide": lambda t: S.guide_tests(t, "a", "b").rename(columns={"guide_p": "p"}),
}  # fmt: skip


KINDS = ["plain", "infinite", "constant", "constant within texts", "perfect", "few", "not a number", "nearly nothing"]


@pytest.mark.many
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ANSWERS)
def test_every_missing_number_has_a_note(name, kind):
    try:
        answer = ANSWERS[name](odd(kind))
    except (StudyError, TableError):
        return  # refused, with what was expected
    columns = [column for column in ("estimate", "low", "high", "p", "p_corrected") if column in answer]
    missing = answer[answer[columns].isna().any(axis=1)]
    assert (missing.note != "").all(), missing
    if kind == "infinite":
        answer = answer[answer.score == "a"] if "score" in answer else answer
        assert answer.note.str.contains("infinite").all(), answer.note.tolist()


def test_a_large_mean_keeps_its_place_in_the_family():
    """Sums of squares would round a spread of 1 beside a mean of 1e9 away."""
    rng = np.random.default_rng(0)
    doc = np.repeat(range(20), 5)
    table = pd.DataFrame({"doc": doc, "seq": doc, "large": 1e9 + rng.normal(size=100), "small": rng.normal(size=100)})
    answer = S.before_after(table, ["large", "small"], correction="max-t").set_index("score")
    assert answer.p["large"] < 0.001 and answer.p_corrected["large"] < 0.001 and answer.p_corrected["small"] > 0.05
    # The same as one by one: of t by scipy on the same flips.
    values = np.stack([rng.normal(0.5, 1, 12), rng.normal(0.3, 1, 12)], 1)
    signs = np.random.default_rng(5).choice([-1.0, 1.0], (99, 12))
    drawn = np.abs(stats.ttest_1samp(signs[:, :, None] * values, 0, axis=1).statistic).max(1)
    seen = np.abs(stats.ttest_1samp(values, 0).statistic)
    assert results.max_t_signs(values, 99, 5) == pytest.approx((1 + (drawn[:, None] >= seen).sum(0)) / 100)
    groups = table.assign(member=table.doc < 10, large=table.large + 3 * (table.doc < 10))
    answer = S.compare_groups(groups, ["large", "small"], "member", correction="max-t").set_index("score")
    assert answer.p_corrected["large"] < 0.001 and np.isfinite(answer.p_corrected["small"])
    given = S.compare_groups(groups.assign(x=rng.normal(size=100)), "large", "member", controls=["x"], n_resamples=999).iloc[0]
    assert given.p < 0.01 and given.estimate == pytest.approx(3, abs=1)


@pytest.mark.slow
def test_the_tags_flag_is_not_fooled_by_words_with_scores_of_their_own():
    """Tags permuted within sequences find something in every second such data set; min F' does not."""
    table = simulate(24, ("a",), tokens=30, seed=7)
    table["a"] += 2 * np.random.default_rng(8).normal(size=(24, 60))[table.layer, table.token_id]
    told = [S.red_flags(table[table.layer == layer].assign(layer=0), "a", tag="tag", controls=["position"]) for layer in range(24)]
    survived = [not flags.set_index("flag").raised["nothing survives correction"] for flags in told]
    assert np.mean(survived) <= 0.15
    with pytest.raises(TableError, match="token_id"):
        S.red_flags(table.drop(columns="token_id"), "a", tag="tag")


# -- what every result says, and what is refused ---------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("name", [*CHEAP, *POWER])
def test_every_result_row_says_what_it_is(name):
    table = simulate(2, ("a", "b", "c"))
    table.attrs["provenance"] = {"r": {"model": {}}}
    answer = (CHEAP | POWER)[name](table)
    assert [column for column in ALWAYS if column not in answer] == []
    assert answer.attrs["provenance"] == table.attrs["provenance"]
    assert (answer.n_documents == 40).all() and answer.layer.isin([0, 1]).all()
    assert (answer.p_corrected.isna() | (answer.p_corrected >= answer.p - 1e-12)).all()


ALL = {
    "correlation": lambda t, **o: S.within_sequence_correlation(t, "a", "b", **o),
    "rank": lambda t, **o: S.rank_regression(t, "a", "b", **o),
    "mixed": lambda t, **o: S.mixed_model(t, "a", "b", controls=["pos"], **o),
    "groups": lambda t, **o: S.compare_groups(t, "a", "member", n_resamples=99, **o),
    "before": lambda t, **o: S.before_after(t, "a", n_resamples=99, **o),
    "detect": lambda t, **o: S.detect(t, "a", "member", n_resamples=99, **o),
    "added": lambda t, **o: S.added_value(t, "a", "member", "b", n_splits=2, n_resamples=19, **o),
    "tags": lambda t, **o: S.tag_effect(t, "a", "tag", n_resamples=19, **o),
    "quartiles": lambda t, **o: S.quartile_table(t, "a", "b", **o),
}


@pytest.mark.many
@pytest.mark.parametrize("name", ALL)
def test_refusals(name):
    table, test = simulate(2), ALL[name]
    runs = table.assign(run=np.where(table.layer == 0, "r", "s"))
    runs.attrs = {}
    with pytest.raises(TableError, match="one run"):
        test(runs)
    runs.attrs["provenance"] = {r: {"model": {"weight_processing": {"layer_norm_folded": r == "r"}}} for r in "rs"}
    with pytest.raises(TableError, match="one weight processing"):
        test(runs)
    pairs = table.copy()  # as `compare` gives them: no column `run`, two runs in provenance
    pairs.attrs["provenance"] = runs.attrs["provenance"]
    with pytest.raises(TableError, match="one weight processing"):
        test(pairs)
    with pytest.raises(StudyError, match="expected at least"):
        test(table[table.seq < 5])
    with pytest.raises(TableError, match="constant"):
        test(table.assign(a=1.0))
    with pytest.raises(TableError, match="'a'"):
        test(table.drop(columns="a"))
    with pytest.raises(TableError, match="numbers"):
        test(table.assign(a="x"))
    for wrong in ([7], [], 7, 0.5, "all", True):
        with pytest.raises(TableError, match="layers"):
            test(table, layers=wrong)
    with pytest.raises(TableError, match="unit"):
        test(table, unit="nonsense")
    with pytest.raises(TableError, match="changes within"):
        test(table, unit="pos")
    with pytest.raises(TableError, match="rows"):
        test(table[:0])
    one_flat = test(table.assign(a=np.where(table.layer == 0, 1.0, table.a)))
    flat = one_flat[one_flat.layer == 0]
    assert flat.p.isna().all() and (flat.note == "a is constant at this layer").all()
    assert len(test(table, layers=1, unit="sequence")) == len(one_flat) - len(flat)


def test_other_refusals():
    table = simulate(1)
    with pytest.raises(TableError, match="two values"):
        S.compare_groups(table, "a", "tag", paired=True)
    with pytest.raises(TableError, match="two values of 'tag'"):
        S.compare_groups(table, "a", "tag", groups=("NOUN", "ETC"), paired=True)
    with pytest.raises(TableError, match="True and False"):
        S.detect(table, "a", "tag")
    with pytest.raises(TableError, match="same throughout a sequence"):
        S.detect(table.assign(member=table.pos > 9), "a", "member")
    with pytest.raises(TableError, match="'radios'"):
        S.partial_correlation(table, "a", "b", controls=["radios"])
    with pytest.raises(StudyError, match="none"):
        S.partial_correlation(table.drop(columns=["pos", "token_id"]), "a", "b")
    with pytest.raises(StudyError, match="max-t"):
        S.rank_regression(table, "a", "b", correction="max-t")
    with pytest.raises(TableError, match="two tags"):
        S.tag_effect(table, "a", "tag", fewest=5000)
    with pytest.raises(StudyError, match="each side"):
        S.halves(table[table.seq < 10])
    with pytest.raises(TableError, match="changes within one"):
        S.halves(table, stratify="tag")
    with pytest.raises(StudyError, match="bonferroni"):
        results.adjust(np.array([0.1]), "bonferroni")
    with pytest.raises(TableError, match="each once"):
        S.before_after(table, ["a", "a"])


def test_perfect_agreement_has_an_estimate_but_no_made_up_p():
    table = simulate(1)
    table["b"] = np.exp(table.a)
    answer = S.within_sequence_correlation(table, "a", "b").iloc[0]
    assert answer.estimate > 0.9999 and np.isnan(answer.p)
    for answer in (
        S.mixed_model(table.assign(b=2 * table.a), "a", "b", controls=["position"]).iloc[0],
        S.rank_regression(table, "a", "b").iloc[0],
    ):
        assert answer.estimate == pytest.approx(1) and np.isnan(answer.p) and "perfect fit" in answer.note
    apart = table.assign(c=table.a + 100 * table.member)
    answer = S.compare_groups(apart, "c", "member", n_resamples=999).iloc[0]
    assert answer.cliff_delta == 1 and np.isnan(answer.cliff_delta_low) and answer.p <= 0.002
    answer = S.added_value(apart, "c", "member", "b", n_splits=2, n_resamples=99)
    assert np.isfinite(answer.estimate).all() and (answer.p <= 0.01).all()
