"""False positives: rates without any effect."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from scipy import stats

from basin_lens.errors import TableError
from basin_lens.stats import results
from tests.stats.simulated import CHEAP, TAGS, S, rate, simulate

HONEST = pytest.approx(0.05, abs=0.02)


# -- false positives -------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_test_over_tokens_rejects_most_of_the_time_without_any_effect(null):
    """The reason for this room: the same data, tested over tokens and over sequences."""
    a = null["a"].to_numpy().reshape(400, 40, 50)
    over_tokens = stats.ttest_ind(a[:, ::2].reshape(400, -1), a[:, 1::2].reshape(400, -1), axis=1).pvalue
    assert (over_tokens <= 0.05).mean() > 0.55
    correlation = [stats.spearmanr(*null.loc[null.layer == layer, ["a", "b"]].to_numpy().T).pvalue for layer in range(100)]
    assert np.mean(np.array(correlation) <= 0.05) > 0.2
    assert rate(S.compare_groups(null, "a", "member", n_resamples=499)) == HONEST


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEAP)
def test_false_positives_are_five_percent(null, name):
    assert rate(CHEAP[name](null)) == HONEST


@pytest.mark.slow
def test_false_positives_with_several_sequences_per_document():
    """Sequences of one document share a level too: documents are the unit, and sequences alone would be too sure of themselves."""
    table = simulate(200, ("a",), sequences=60, tokens=10, icc=0.0, per_doc=3, seed=3)
    table["a"] += np.repeat(np.random.default_rng(0).normal(size=200 * 20), 30)
    assert rate(S.compare_groups(table, "a", "member", n_resamples=499)) == HONEST
    assert rate(S.compare_groups(table, "a", "member", n_resamples=499, unit="sequence")) > 0.15


@pytest.mark.slow
def test_false_positives_of_detection(null):
    answer = S.detect(null[null.layer >= 200], "a", "member", versus="b", rates=(), n_resamples=499)
    assert rate(answer[answer.versus.isna()]) == HONEST
    assert rate(answer[answer.versus == "b"]) == HONEST


@pytest.mark.slow
def test_false_positives_of_added_value(null):
    answer = S.added_value(null[null.layer < 200], "a", "member", "b", n_splits=2, n_resamples=39)
    for metric in ("delta log-loss", "delta auroc"):
        assert rate(answer[answer.metric == metric]) == pytest.approx(0.05, abs=0.03)  # two standard errors of 200 data sets


@pytest.mark.slow
def test_false_positives_of_tags(null):
    for name, layers in (("sequence", 150), ("type", 250)):
        answer = S.tag_effect(null[null.layer < layers], "a", "tag", tests=(name,), n_resamples=199 if name == "type" else 99)
        assert rate(answer) == HONEST, name
        assert abs(answer.estimate.mean()) < 0.005
    # Neither words nor texts have differences of their own: min F' is half of either F, and careful.
    assert rate(S.tag_effect(null[null.layer < 60], "a", "tag", tests=("mixed",))) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "texts", "passed"), [(2, 0, {"sequence"}), (0, 1, {"sequence", "type"}), (0.5, 0.5, {"sequence"})]
)
def test_tags_that_mean_nothing_in_other_words_or_texts(words, texts, passed):
    """Every word has a score of its own, or every text its own differences between tags: these tokens do differ by tag, others would not."""
    table = simulate(400, ("a",), tokens=30, seed=7)
    rng = np.random.default_rng(8)
    table["a"] += words * rng.normal(size=(400, 60))[table.layer, table.token_id]
    table["a"] += texts * rng.normal(size=(400, 40, 5))[table.layer, table.seq, np.searchsorted(TAGS, table.tag)]
    found = rate(S.tag_effect(table, "a", "tag", tests=("mixed",)))
    # Over 2000 such data sets: 4 % where words differ, 2.5 % where texts or both do.
    assert found == (HONEST if words == 2 else pytest.approx(0.03, abs=0.025))
    for test in passed:
        assert rate(S.tag_effect(table[table.layer < 30], "a", "tag", tests=(test,), n_resamples=99)) > 0.5
    if not texts:
        assert rate(S.tag_effect(table, "a", "tag", tests=("type",), n_resamples=999)) == HONEST


def test_min_f_is_clarks():
    """F over texts and F over words by scipy, where every word stands once in every text; then Clark's own numbers."""
    table = simulate(1, ("a",), sequences=12, tokens=20, icc=0.5, seed=3)
    # In another order in each text, or it would be one text 12 times.
    table["token_id"] = np.random.default_rng(0).permuted(np.tile(np.arange(20), (12, 1)), axis=1).ravel()
    table["tag"] = TAGS[table.token_id % 2]
    table["a"] += 0.5 * (table.tag == TAGS[0])
    answer = S.tag_effect(table, "a", "tag", tests=("mixed",)).iloc[0]
    cells = table.groupby(["doc", "tag"]).a.mean().unstack()
    by_word = (table.a - table.groupby("seq").a.transform("mean")).groupby(table.token_id).mean().to_numpy()
    one = stats.ttest_rel(cells[TAGS[0]], cells[TAGS[1]]).statistic ** 2
    welch = stats.ttest_ind(by_word[::2], by_word[1::2], equal_var=False)
    two = welch.statistic**2
    f, rest = one * two / (one + two), (one + two) ** 2 / (one**2 / welch.df + two**2 / 11)
    assert answer.p == pytest.approx(stats.f.sf(f, 1, rest), rel=1e-3)
    assert answer.estimate == pytest.approx((f - 1) / (f + rest + 1), rel=1e-3)
    assert answer.low <= answer.estimate <= answer.high


def bent(layers, effect=0.0, spread=0.0, *, sequences=40, tokens=50, seed=0):
    """Two groups of tokens in every text, told apart by a control nearly, which bends the score by far more than the groups differ."""
    table = simulate(layers, ("a", "x"), sequences=sequences, tokens=tokens, seed=seed)
    rng = np.random.default_rng(seed + 1)
    table["first"] = rng.random(len(table)) < 1 / (1 + np.exp(-2 * table.x))
    of_unit = rng.normal(size=(layers, sequences))[table.layer, table.seq]
    table["a"] += 2 * np.tanh(2 * table.x) + 0.5 * table.x**2 + (effect + spread * of_unit) * table["first"]
    return table


def given(table, **options):
    return S.compare_groups(table, "a", "first", paired=True, controls=["x"], **{"n_resamples": 1999, **options})


@pytest.mark.slow
@pytest.mark.parametrize(("spread", "tokens"), [(0.0, 50), (0.5, 50), (0.0, 10)])
def test_false_positives_of_paired_groups_at_a_fixed_control(spread, tokens):
    """Without the control, the groups differ by more than 1; with it, not at all."""
    table = bent(500, spread=spread, tokens=tokens, seed=50)
    assert (S.compare_groups(table[table.layer < 5], "a", "first", paired=True, n_resamples=99).estimate > 1).all()
    answer = given(table)
    assert rate(answer) == HONEST
    assert abs(answer.estimate.mean()) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("spread", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_a_difference_at_a_fixed_control_is_recovered_whole(spread):
    """Residuals of the score alone would leave the part of it that the control does not tell, some 0.7; and small ones are found."""
    answer = given(bent(200, 1.0, spread, seed=30))
    assert answer.estimate.mean() == pytest.approx(1, abs=0.02)
    assert ((answer.low < 1) & (answer.high > 1)).mean() == pytest.approx(0.95, abs=0.03)
    assert rate(answer) > 0.99
    assert rate(given(bent(20, 0.3, seed=31))) > 0.9


def test_paired_groups_with_controls_are_the_regression_on_all_at_once():
    """Too few tokens for curves: straight lines, and statsmodels' slope and cluster-robust error, but for its small-sample correction."""
    table = bent(1, 1.0, 0.5, sequences=16, tokens=3, seed=3).sample(frac=0.95, random_state=0)
    both = table[table.groupby("seq")["first"].transform("nunique") == 2]
    fit = smf.ols("a ~ first + x + C(seq)", both.assign(first=both["first"] * 1.0)).fit()
    answer = given(table).iloc[0]
    assert answer.estimate == pytest.approx(fit.params["first"])
    # Bell and McCaffrey by matrices: residuals of a unit times (1 - H)^(-1/2), errors of independent tokens.
    design = sm.add_constant(pd.get_dummies(both.seq, drop_first=True, dtype=float).assign(x=both.x)).to_numpy()
    g, y = (v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (both["first"].to_numpy(float), both.a.to_numpy()))
    left, hat = np.eye(len(g)) - np.outer(g, g) / (g @ g), np.outer(g, g) / (g @ g)
    parts = []
    for unit in both.seq.unique():
        at = np.flatnonzero(both.seq == unit)
        values, vectors = np.linalg.eigh(np.eye(len(at)) - hat[np.ix_(at, at)])
        parts.append(left[at].T @ (vectors / np.sqrt(values)) @ vectors.T @ g[at])
    parts = np.stack(parts)
    error = np.sqrt(((parts @ y) ** 2).sum()) / (g @ g)
    roots = np.linalg.eigvalsh(parts @ parts.T)
    free = len(both) - both.seq.nunique()
    error *= np.sqrt((free - 1) / (free - 2))  # one control ties the units together
    wide = stats.t.ppf(0.975, roots.sum() ** 2 / (roots**2).sum()) * error
    assert (answer.low, answer.high) == pytest.approx((answer.estimate - wide, answer.estimate + wide))
    assert (answer.n_units, answer.n_tokens) == (both.doc.nunique(), len(both))


def test_units_in_which_the_controls_tell_the_groups():
    table = bent(2, 1.0, seed=5)
    table["b"] = np.random.default_rng(0).normal(size=len(table))
    table["a"] = table.b + table["first"]
    told = table.assign(told=table["first"] & (table.seq < 3), other=table["first"] & (table.seq >= 3))
    # In three texts one control is the group itself, and in the others it is always 0.
    answer = S.compare_groups(told, "a", "first", paired=True, controls=["told"], n_resamples=99)
    assert (answer.n_units == 37).all() and (answer.n_first == 37).all()
    assert answer.note.str.contains("left out: 3 units").all()
    assert answer.estimate.to_numpy() == pytest.approx(1, abs=0.2)
    answer = S.compare_groups(told, "a", "first", paired=True, controls=["told", "other"], n_resamples=99)
    assert answer.p.isna().all() and answer.estimate.isna().all() and answer.note.str.contains("in full").all()
    with pytest.raises(TableError, match="at least one control"):
        S.compare_groups(told, "x", "first", paired=True, controls=["x"])
    # Too few are left at a layer: that layer says so, and the others go on.
    few = S.compare_groups(told[told.seq < 7], "a", "first", paired=True, controls=["told"])
    assert few.p.isna().all() and few.note.str.contains("only 4 units in which the controls do not explain the groups").all()
    # Many at once: signs of whole units are flipped jointly. One test eight times over is one test, but to Holm.
    many = told[told.layer == 0].assign(**{f"a{i}": told.b + 0.5 * i * told.x for i in range(8)})
    joint = S.compare_groups(many, [f"a{i}" for i in range(8)], "first", paired=True, controls=["x"], correction="max-t")
    assert joint.p.min() > 0.1 and joint.p_corrected.to_numpy() == pytest.approx(joint.p.to_numpy(), abs=0.02)


@pytest.mark.slow
def test_max_t_keeps_the_chance_of_any_false_positive_at_five_percent():
    """400 families of 12 dependent tests each."""
    rng = np.random.default_rng(0)
    signs, labels = [], []
    label = np.arange(40) < 20
    for seed in range(400):
        values = rng.normal(size=(40, 1)) + rng.normal(size=(40, 12))
        signs.append(results.max_t_signs(values, 99, seed).min())
        labels.append(results.max_t_labels(values, label, 99, seed).min())
    assert np.mean(np.array(signs) <= 0.05) == HONEST
    assert np.mean(np.array(labels) <= 0.05) == HONEST


def one_sample_tests(table):
    """A test of one's own: any function from a table to results by layer will do."""
    values = table.pivot(index="layer", columns="doc", values="d")
    test = stats.ttest_1samp(values, 0, axis=1)
    return pd.DataFrame({"layer": values.index, "estimate": values.mean(axis=1), "p": test.pvalue, "n_documents": values.shape[1]})


@pytest.mark.slow
def test_the_best_layer_is_no_finding_on_the_documents_that_chose_it():
    hits = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        table = pd.DataFrame({"layer": np.repeat(range(12), 40), "doc": np.tile(range(40), 12), "seq": np.tile(range(40), 12)})
        table["d"] = rng.normal(size=480)
        answer = S.best_layer(table, one_sample_tests, seed=seed, correction="none")
        hits.append([answer.chosen_p.item() <= 0.05, answer.p.item() <= 0.05])
    chosen, held_out = np.mean(hits, 0)
    assert chosen > 0.35
    assert held_out == pytest.approx(0.05, abs=0.03)
