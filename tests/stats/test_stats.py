"""Statistics: false positives and power on simulated clustered tokens, agreement with scipy, statsmodels and scikit-learn, refusals.

In the simulations every layer is a data set of its own, so that one call runs hundreds of them.
"""

import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

import basin_lens as bl
from basin_lens.errors import StudyError, TableError
from basin_lens.stats import added, auroc, mixed, projection, results
from basin_lens.stats.design import split

S = bl.stats
ALWAYS = ["layer", "score", "unit", "n_units", "n_sequences", "n_documents", "n_tokens", "test", "effect", "estimate", "low", "high", "null", "p",
          "p_corrected", "correction", "n_tests", "note"]  # fmt: skip
TAGS = np.array(["ADJ", "ADV", "NOUN", "PRON", "VERB"])


def simulate(layers=1, columns=("a", "b"), *, sequences=40, tokens=50, icc=0.3, seed=0, per_doc=1):
    """Columns without any relation, each with this share of its variance between sequences."""
    rng = np.random.default_rng(seed)
    rows = layers * sequences * tokens
    seq = np.tile(np.repeat(np.arange(sequences), tokens), layers)
    table = pd.DataFrame({"layer": np.repeat(np.arange(layers), sequences * tokens), "doc": seq // per_doc, "seq": seq})
    table["pos"] = np.tile(np.arange(tokens), layers * sequences)
    for name in columns:
        level = np.repeat(rng.normal(size=layers * sequences), tokens)
        table[name] = np.sqrt(icc) * level + np.sqrt(1 - icc) * rng.normal(size=rows)
    table["member"] = (table["doc"] % 2).astype(bool)
    table["token_id"] = rng.integers(0, 60, rows)
    table["tag"] = TAGS[table["token_id"] % 5]
    return table


@pytest.fixture(scope="module")
def null():
    return simulate(400, ("a", "b", "c"), seed=2)


def rate(answer):
    """Share of p-values up to 0.05."""
    assert answer.p.notna().all()
    return float((answer.p <= 0.05).mean())


HONEST = pytest.approx(0.05, abs=0.02)


# -- false positives ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_test_over_tokens_rejects_most_of_the_time_without_any_effect(null):
    """The reason for this room: the same data, tested over tokens and over sequences."""
    a = null["a"].to_numpy().reshape(400, 40, 50)
    over_tokens = stats.ttest_ind(a[:, ::2].reshape(400, -1), a[:, 1::2].reshape(400, -1), axis=1).pvalue
    assert (over_tokens <= 0.05).mean() > 0.55
    correlation = [stats.spearmanr(*null.loc[null.layer == layer, ["a", "b"]].to_numpy().T).pvalue for layer in range(100)]
    assert np.mean(np.array(correlation) <= 0.05) > 0.2
    assert rate(S.compare_groups(null, "a", "member", n_resamples=499)) == HONEST


CHEAP = {
    "within_sequence_correlation": lambda t: S.within_sequence_correlation(t, "a", "b"),
    "pearson": lambda t: S.within_sequence_correlation(t, "a", "b", method="pearson"),
    "partial_correlation": lambda t: S.partial_correlation(t, "a", "b", controls=["c", "position"]),
    "rank_regression": lambda t: S.rank_regression(t, "a", "b"),
    "rank_regression_between": lambda t: S.rank_regression(t, "a", "b", controls=["c"], within=False),
    "mixed_model": lambda t: S.mixed_model(t, "a", "b", controls=["c"]),
    "groups_with_controls": lambda t: S.compare_groups(t, "a", "member", controls=["b", "c"], n_resamples=499),
    "groups_paired": lambda t: S.compare_groups(t, "a", "tag", groups=("NOUN", "VERB"), paired=True, n_resamples=499),
    "groups_paired_with_controls": lambda t: S.compare_groups(
        t[t.layer < 200], "a", "tag", groups=("NOUN", "VERB"), paired=True, controls=["b", "position"], n_resamples=499
    ),
    "before_after": lambda t: S.before_after(t, "a", n_resamples=499),
    "quartiles": lambda t: S.quartile_table(t[t.layer < 200], "a", "b").query("quartile == '4 - 1'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEAP)
def test_false_positives_are_five_percent(null, name):
    assert rate(CHEAP[name](null)) == HONEST


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


# -- controls leave jointly -----------------------------------------------------------------------------------------------------


def shared(draws, noise=0.5, level=0.0, draw="lognormal", *, documents=20, tokens=40, seed=0):
    """x and y have a control in common and nothing else."""
    table = simulate(draws, (), sequences=documents, tokens=tokens, seed=seed)
    rng = np.random.default_rng(seed + 1)
    z = {"normal": rng.normal, "lognormal": rng.lognormal}[draw](size=len(table))
    z = z + level * np.repeat(rng.normal(size=draws * documents), tokens)
    return table.assign(z=z, x=z + noise * rng.normal(size=len(z)), y=z + noise * rng.normal(size=len(z)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("test", "options", "made"),
    [
        (S.partial_correlation, {"method": "pearson"}, {}),
        (S.partial_correlation, {}, {"draw": "normal", "level": 1.0}),
        (S.partial_correlation, {}, {}),
        (S.rank_regression, {}, {"draw": "normal", "level": 1.0}),
        (S.rank_regression, {"within": False}, {"draw": "normal"}),
        (S.mixed_model, {}, {}),
    ],
    ids=["pearson", "level", "lognormal", "rank", "rank-between", "mixed"],
)
def test_a_shared_control_makes_no_finding(test, options, made):
    """Taken out in steps, it made +.36 of Pearson's r (all of 80 draws below .05), and +.07 of Spearman's (38 %)."""
    answer = test(shared(160, **made), "x", "y", controls=["z"], **options)
    assert rate(answer) == pytest.approx(0.05, abs=0.04)
    assert abs(answer.estimate.mean()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("documents", [10, 40])
def test_many_terms_in_few_tokens_keep_their_size(documents):
    """As many terms as the budget allows: a tenth of what tokens leave beyond levels and slopes."""
    names = [f"c{index}" for index in range(6)]
    table = simulate(200, ("x", "y", *names), sequences=documents, tokens=60 if documents == 10 else 20, icc=0.0, seed=9)
    for method in ("spearman", "pearson"):
        assert rate(S.partial_correlation(table, "x", "y", controls=names, method=method)) == pytest.approx(0.05, abs=0.035)


def regressed(y, x, terms):
    """Slope of y on x in one least-squares fit with all terms at once."""
    design = np.column_stack([x, *terms])
    return np.linalg.lstsq(design / np.abs(design).max(0), y, rcond=1e-13)[0][0] / np.abs(x).max()


def dummies(codes):
    return np.eye(int(codes.max()) + 1)[codes]


def _curves(*args, **options):
    return np.column_stack(projection.curves(*args, **options))


def test_estimates_are_those_of_one_regression_on_all_terms():
    """Frisch and Waugh, for each test that takes controls."""
    table = shared(1, draw="normal", level=1.0).assign(w=lambda t: np.random.default_rng(5).gamma(1, size=len(t)))
    table["x"] += table.w**2
    table["g"] = table.y + table.w > table.groupby("seq").y.transform("median")
    names, seq, levels = ["z", "w"], table.seq.to_numpy(), dummies(table.seq.to_numpy())
    controls = table[names].to_numpy()
    of_values = [levels, controls, _curves(list(controls.T), len(table) - 22)]
    paired = S.compare_groups(table, "x", "g", controls=names, paired=True, n_resamples=9).iloc[0]
    assert paired.estimate == pytest.approx(regressed(table.x, table.g.astype(float), of_values), abs=1e-8)
    left = S.residuals(table, "x", controls=names).x - table.groupby("seq").x.transform("mean")
    assert abs(np.column_stack(of_values[1:]).T @ left).max() < 1e-6
    # Ranks within sequences, with curves of the controls beside.
    ranks = table.groupby("seq")[["x", "y", *names]].rank().to_numpy() / 41
    # What the controls say of a column at once is a control too.
    given = projection.with_indexes(next(iter(split(table, ["x", "y", *names]))), ["x", "y", *names], seq)
    of_ranks = [levels, ranks[:, 2:], _curves(given, len(table) - 22, ranked=seq)]
    slope = regressed(ranks[:, 0], ranks[:, 1], of_ranks)
    inside = ranks[:, :2] - levels @ (levels.T @ ranks[:, :2] / 40)
    answer = S.rank_regression(table, "x", "y", controls=names).iloc[0]
    assert answer.estimate == pytest.approx(slope * inside[:, 1].std() / inside[:, 0].std(), abs=1e-8)
    # Correlations: a slope in each sequence for each control.
    for method, held, bent in (
        ("spearman", ranks, _curves(given, len(table) - 60, ranked=seq)),
        ("pearson", table[["x", "y", *names]].to_numpy(), _curves(list(controls.T), len(table) - 60)),
    ):
        design = np.column_stack([levels, *(levels * held[:, [c]] for c in (2, 3)), bent])
        design = design / np.abs(design).max(0)
        rest = held[:, :2] - design @ np.linalg.lstsq(design, held[:, :2], rcond=1e-13)[0]
        z = [np.arctanh(stats.pearsonr(*rest[seq == code].T).statistic) for code in range(20)]
        answer = S.partial_correlation(table, "x", "y", controls=names, method=method).iloc[0]
        assert np.arctanh(answer.estimate) == pytest.approx(np.mean(z), abs=1e-8)
    # Mixed: generalized least squares at its own ratio of variances.
    pair = ((table[["x", "y"]] - table[["x", "y"]].mean()) / table[["x", "y"]].std(ddof=0)).to_numpy()
    terms = np.column_stack([np.ones(800), controls, _curves(list(controls.T), 798)])
    answer = S.mixed_model(table, "x", "y", controls=names).iloc[0]
    y, x = mixed.freed(pair[:, 0], np.column_stack([pair[:, 1], terms]), seq, answer.icc / (1 - answer.icc))
    assert answer.estimate == pytest.approx(regressed(y, x[:, 0], [x[:, 1:]]), abs=1e-8)


def test_slope_and_error_are_statsmodels_joint_ones():
    rng = np.random.default_rng(0)
    terms, units = rng.normal(size=(300, 5)), np.repeat(np.arange(15), 20)
    x = terms.sum(1) + rng.normal(size=300)
    y = x + terms[:, 0] + rng.normal(size=15)[units] + rng.normal(size=300)
    fit = sm.OLS(y, np.column_stack([x, np.ones(300), terms])).fit(cov_type="cluster", cov_kwds={"groups": units}, use_t=True)
    left = projection.project(np.stack([y, x], 1), terms, np.zeros(300, int))
    found = results.clustered_slope(*left.values.T, units, 6)
    expected = [fit.params[0], *fit.conf_int()[0], fit.pvalues[0]]
    assert [found.estimate, found.low, found.high, found.p] == pytest.approx(expected, rel=1e-8)


GIVEN = {
    "spearman": lambda t, x, y, c: S.partial_correlation(t, x, y, controls=c),
    "pearson": lambda t, x, y, c: S.partial_correlation(t, x, y, controls=c, method="pearson"),
    "rank": lambda t, x, y, c: S.rank_regression(t, x, y, controls=c),
    "rank-between": lambda t, x, y, c: S.rank_regression(t, x, y, controls=c, within=False),
    "mixed": lambda t, x, y, c: S.mixed_model(t, x, y, controls=c),
}
COPIES = {
    "itself": ["one"], "affine": ["affine"], "monotone": ["bent"], "falling": ["falling"], "sum": ["part", "rest"],
    "with-constant": ["affine", "flat"], "float32": ["short"],
}  # fmt: skip


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("name", GIVEN)
def test_what_the_controls_explain_in_full_is_no_finding(name, copies):
    """Without full rank, a least-squares fit gave half of the slope and p 5e-15, or an r2 of -173."""
    table = simulate(1, ("x", "part"), sequences=20, tokens=30, seed=4)
    table["y"] = 0.5 * table.x + np.random.default_rng(0).normal(size=600)
    table = table.assign(
        one=table.x, affine=2 * table.x + 5, bent=np.exp(table.x), falling=-(table.x**3), rest=table.x - table.part, flat=3.0,
        short=(2 * table.x + 5).astype(np.float32),
    )  # fmt: skip
    for pair in (("y", "x"), ("x", "y")):
        answer = GIVEN[name](table, *pair, COPIES[copies]).iloc[0]
        assert (
            answer[["estimate", "low", "high", "p", "p_corrected"]].isna().all()
            and "x: the controls explain it in full" in answer.note
        )
    assert GIVEN[name](table, "y", "x", ["flat", "part"]).p.item() < 1e-6  # a control that says nothing takes nothing away


def test_groups_and_added_values_that_controls_explain_in_full():
    table = simulate(1, ("a", "b", "c"), seed=4)
    table["twice"], table["copy"], table["first"] = 2 * table.a + 5, np.exp(table.a), table.tag == "NOUN"
    for controls in (["twice"], ["copy"], ["copy", "b"]):
        for options in ({"group": "member"}, {"group": "first", "paired": True}):
            answer = S.compare_groups(table, "a", controls=controls, n_resamples=9, **options).iloc[0]
            assert np.isnan(answer.p) and np.isnan(answer.estimate) and "in full" in answer.note, (controls, options)
    for baselines in (["twice"], ["b", "twice"]):
        answer = S.added_value(table, "a", "member", baselines, n_splits=2, n_resamples=9)
        assert (
            answer.p.isna().all()
            and answer.estimate.isna().all()
            and answer.note.str.contains("baselines explain it in full").all()
        )
    answer = S.tag_effect(table, "a", "tag", controls=["twice"], n_resamples=9)
    assert answer.p.isna().all() and answer.note.str.contains("in full").all()
    answer = S.tag_means(table, "a", "tag", controls=["twice"])
    assert answer.p.isna().all() and answer.estimate.isna().all() and answer.note.str.contains("in full").all()


def test_groups_of_texts_that_differ_in_a_bent_control_are_warned_of():
    """Over 20 texts no curve can be fitted; the tokens tell that one is needed, and the mixed model has enough of them."""
    table = shared(24, draw="normal", level=1.0).assign(z=lambda t: np.exp(t.z))
    level = table.groupby(["layer", "seq"]).y.transform("mean")
    table["member"] = level > level.groupby(table.layer).transform("median")
    answer = S.compare_groups(table[table.layer < 3], "x", "member", controls=["z"], n_resamples=99)
    assert answer.note.str.contains("too few units for curves; the score bends with the controls").all()
    found = S.mixed_model(table.assign(m=table.member * 1.0), "x", "m", controls=["z"])
    assert abs(found.estimate.mean()) < 0.05 and (found.p <= 0.05).mean() <= 0.2
    level = shared(1, draw="normal").assign(member=lambda t: t.seq < 10)
    assert "bends" not in S.compare_groups(level, "x", "member", controls=["z"], n_resamples=99).note.item()


def test_little_left_by_the_controls_is_said_with_the_other_answers():
    answer = S.partial_correlation(shared(1, 0.2, draw="normal"), "x", "y", controls=["z"]).iloc[0]
    assert 0.03 < answer.left < 0.1
    assert (
        f"leave {100 * answer.left:.2g} %" in answer.note and "partial Pearson" in answer.note and "joint regression" in answer.note
    )
    answer = S.partial_correlation(shared(1, 1.0, draw="normal"), "x", "y", controls=["z"]).iloc[0]
    assert answer.left == pytest.approx(0.5, abs=0.07) and "leave" not in answer.note


# -- every number that is missing is explained ----------------------------------------------------------------------------------


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


# -- power ----------------------------------------------------------------------------------------------------------------------


def planted(layers=12, seed=4):
    """b goes with a within sequences; members stand 1 higher in c; nouns 0.4 higher in a."""
    table = simulate(layers, ("a", "b", "c"), seed=seed)
    table["b"] += 0.25 * table["a"]
    table["c"] += 1.0 * table["member"]
    table["a"] += 0.4 * (table["tag"] == "NOUN")
    return table


POWER = {
    "within_sequence_correlation": lambda t: S.within_sequence_correlation(t, "a", "b"),
    "partial_correlation": lambda t: S.partial_correlation(t, "a", "b", controls=["c", "position"]),
    "rank_regression": lambda t: S.rank_regression(t, "a", "b"),
    "mixed_model": lambda t: S.mixed_model(t, "a", "b", controls=["c"]),
    "groups": lambda t: S.compare_groups(t, "c", "member", n_resamples=999),
    "groups_with_controls": lambda t: S.compare_groups(t, "c", "member", controls=["b"], n_resamples=999),
    "groups_paired": lambda t: S.compare_groups(t, "a", "tag", groups=("NOUN", "VERB"), paired=True, n_resamples=999),
    "before_after": lambda t: S.before_after(t.assign(d=t.c + 0.5), "d", n_resamples=999),
    "detect": lambda t: S.detect(t, "c", "member", rates=(), n_resamples=199),
    "better_than": lambda t: S.detect(t, "c", "member", versus="b", rates=(), n_resamples=499).dropna(subset="versus"),
    "added_value": lambda t: S.added_value(t, "c", "member", "b", n_splits=2, n_resamples=99),
    "tags": lambda t: S.tag_effect(t, "a", "tag", n_resamples=99),
    "quartiles": lambda t: S.quartile_table(t, "a", "b").dropna(subset="p"),
}  # fmt: skip


@pytest.mark.parametrize("name", POWER)
def test_a_planted_effect_is_found(name):
    answer = POWER[name](planted())
    assert rate(answer) > 0.8
    assert ((answer.low <= answer.estimate) & (answer.estimate <= answer.high)).all()


@pytest.mark.slow
def test_intervals_hold_the_truth():
    """95 % of them, of a difference and of a correlation known in advance."""
    table = simulate(200, ("a", "b"), seed=7)
    table["a"] += 0.5 * table["member"]
    answer = S.compare_groups(table, "a", "member", n_resamples=9)
    assert ((answer.low < 0.5) & (answer.high > 0.5)).mean() == pytest.approx(0.95, abs=0.025)
    answer = S.within_sequence_correlation(table, "a", "b")
    assert ((answer.low < 0) & (answer.high > 0)).mean() == pytest.approx(0.95, abs=0.025)


def test_best_layer_is_found_and_reported_on_other_documents():
    table = simulate(6, ("a", "b"), seed=1)
    table.loc[table.layer == 4, "b"] += 0.5 * table.a
    answer = S.best_layer(table, lambda t: S.within_sequence_correlation(t, ["a"], "b"), seed=3)
    assert answer.layer.tolist() == [4]
    assert answer.p.item() < 0.001
    assert answer.n_documents.item() + answer.chosen_documents.item() == 40
    table = simulate(3, seed=2)
    answer = S.best_layer(table, lambda t: S.detect(t, ["a", "b"], "member", rates=(), n_resamples=99), stratify="member")
    assert len(answer) == 2 and set(answer.correction) == {"Holm"}


# -- agreement with scipy, statsmodels, scikit-learn ----------------------------------------------------------------------------


def test_correlation_is_scipys_spearman_by_sequence():
    table = planted(1).sample(frac=0.7, random_state=0)
    table.loc[table.index[::17], "b"] = np.nan
    answer = S.within_sequence_correlation(table, "a", "b").iloc[0]
    z = [np.arctanh(stats.spearmanr(part.a, part.b).statistic) for _, part in table.dropna().groupby("seq")]
    test = stats.ttest_1samp(z, 0)
    assert answer.estimate == pytest.approx(np.tanh(np.mean(z)))
    assert answer.p == pytest.approx(test.pvalue)
    assert (answer.low, answer.high) == pytest.approx(np.tanh(test.confidence_interval()))
    assert answer.n_tokens == len(table.dropna())


def test_correlation_over_documents_averages_their_sequences():
    table = simulate(1, per_doc=4)
    z = [np.arctanh(stats.spearmanr(part.a, part.b).statistic) for _, part in table.groupby("seq")]
    answer = S.within_sequence_correlation(table, "a", "b").iloc[0]
    assert answer.p == pytest.approx(stats.ttest_1samp(np.reshape(z, (10, 4)).mean(1), 0).pvalue)
    assert (answer.n_units, answer.n_sequences, answer.n_documents, answer.unit) == (10, 40, 10, "document")
    table["template"] = [f"t{s % 8}" for s in table.seq]
    assert S.within_sequence_correlation(table, "a", "b", unit="template").n_units.item() == 8


def test_partial_correlation_is_the_correlation_of_residuals():
    table = planted(1)
    table["flat"] = 1.0  # a control that does not vary changes nothing
    answer = S.partial_correlation(table, "a", "b", controls=["c", "pos", "flat"], smooth=False).iloc[0]
    z = []
    for _, part in table.groupby("seq"):
        ranks = part[["a", "b", "c", "pos"]].rank()
        design = sm.add_constant(ranks[["c", "pos"]])
        rest = [sm.OLS(ranks[name], design).fit().resid for name in "ab"]
        z.append(np.arctanh(stats.pearsonr(*rest).statistic))
    assert answer.estimate == pytest.approx(np.tanh(np.mean(z)))
    assert answer.p == pytest.approx(stats.ttest_1samp(z, 0).pvalue)
    assert answer.uncontrolled == pytest.approx(S.within_sequence_correlation(table, "a", "b").estimate.item())


def test_rank_regression_is_statsmodels():
    table = planted(1)
    answer = S.rank_regression(table, "a", "b", controls=["c"], within=False, smooth=False).iloc[0]
    ranks = table[["a", "b", "c"]].rank()
    ranks = ranks / ranks.std()
    fit = smf.ols("a ~ b + c", ranks).fit()
    assert answer.estimate == pytest.approx(fit.params["b"])
    # The jackknife over texts.
    texts = table.doc.unique()
    without = np.array([smf.ols("a ~ b + c", ranks[table.doc != text]).fit().params["b"] for text in texts])
    error = np.sqrt((len(texts) - 1) / len(texts) * ((without - without.mean()) ** 2).sum())
    assert answer.p == pytest.approx(2 * stats.t.sf(answer.estimate / error, len(texts) - 1))
    assert answer.high - answer.estimate == pytest.approx(stats.t.ppf(0.975, len(texts) - 1) * error)
    assert answer.partial_r2 == pytest.approx(1 - fit.ssr / smf.ols("a ~ c", ranks).fit().ssr)


@pytest.mark.parametrize("level", [0.0, 0.3, 2.0])
def test_mixed_model_is_statsmodels_mixedlm(level):
    table = simulate(1, icc=0.0, seed=3)[::3].iloc[:-7]
    table["a"] += level * np.random.default_rng(0).normal(size=40)[table.seq] + 0.1 * table.b
    held = (table[["a", "b", "pos"]] - table[["a", "b", "pos"]].mean()) / table[["a", "b", "pos"]].std(ddof=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = smf.mixedlm("a ~ b + pos", held, groups=table.seq).fit(reml=True, method="powell")  # the others stop early
    answer = S.mixed_model(table, "a", "b", controls=["position"], all_terms=True, smooth=False).set_index("term")
    assert answer.estimate.tolist() == pytest.approx([fit.params["b"], fit.params["pos"]], abs=1e-5)
    ratio = fit.cov_re.iloc[0, 0] / fit.scale
    assert answer.icc.iloc[0] == pytest.approx(ratio / (1 + ratio), abs=1e-3)
    y, x = held["a"].to_numpy(), sm.add_constant(held[["b", "pos"]].to_numpy())
    own = sm.OLS(*mixed.freed(y, x, table.seq.to_numpy(), mixed.level_ratio(y, x, table.seq.to_numpy()))).fit()
    assert own.bse[1:] == pytest.approx(fit.bse[["b", "pos"]].to_numpy(), rel=0.02)  # MixedLM's are from the observed information


def test_group_comparison_is_scipys():
    table = planted(1)
    answer = S.compare_groups(table, "c", "member", n_resamples=999, seed=5).iloc[0]
    means = table.groupby("doc").c.mean()
    one, other = means[1::2].to_numpy(), means[::2].to_numpy()
    test = stats.permutation_test(
        (one, other),
        lambda x, y, axis: stats.ttest_ind(x, y, axis=axis, equal_var=False).statistic,
        n_resamples=999,
        rng=5,
        vectorized=True,
    )
    assert answer.p == pytest.approx(test.pvalue)
    assert (answer.low, answer.high) == pytest.approx(stats.ttest_ind(one, other, equal_var=False).confidence_interval())
    assert answer.cliff_delta == pytest.approx(2 * stats.mannwhitneyu(one, other).statistic / 400 - 1)
    pooled = np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2)
    assert answer.hedges_g == pytest.approx((one.mean() - other.mean()) / pooled * (1 - 3 / (4 * 38 - 1)))
    assert answer.group == "True - False"
    # Regression on the controls' means: statsmodels' slope and, nearly, its p. With three controls, units are too few for curves.
    table["d"], table["e"] = np.random.default_rng(0).normal(size=(2, len(table)))
    answer = S.compare_groups(table, "c", "member", controls=["b", "d", "e"], seed=5).iloc[0]
    assert answer.note == "controls as straight lines: too few units for curves"
    columns = ["c", "b", "d", "e", "member"]
    frame = table.groupby("doc")[columns].mean()
    fit = smf.ols("c ~ member + b + d + e", frame).fit()
    assert (answer.estimate, answer.low, answer.high) == pytest.approx((fit.params["member"], *fit.conf_int().loc["member"]))
    less = table.assign(c=table.c - 0.7 * table.member)
    weaker = S.compare_groups(less, "c", "member", controls=["b", "d", "e"]).iloc[0]
    fit = smf.ols("c ~ member + b + d + e", less.groupby("doc")[columns].mean()).fit()
    assert weaker.p == pytest.approx(fit.pvalues["member"], abs=0.02)


def test_before_after_takes_the_differences_of_compare():
    """On the columns that `compare` gives, and as scipy flips signs."""
    table = simulate(2, ("score_a", "score_b"), sequences=8)
    pairs = table.assign(difference=table.score_b - table.score_a)
    answer = S.before_after(pairs)
    means = pairs[pairs.layer == 1].groupby("doc").difference.mean().to_numpy()
    test = stats.permutation_test((means,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True)
    assert answer.p[1] == pytest.approx(test.pvalue)  # 2^8 sign flips: all of them
    assert (answer.low[1], answer.high[1]) == pytest.approx(stats.ttest_1samp(means, 0).confidence_interval())
    pairs = pairs[pairs.layer == 1].drop(columns="layer").assign(layer_a=4, layer_b=5)
    again = S.before_after(pairs)
    assert again.layer.isna().all() and again.p.item() == answer.p[1]


def test_detection_is_scikit_learns_and_its_interval_scipys():
    table = planted(1)
    table["loss"] = -table["c"]
    answer = S.detect(table, ["c", "loss"], "member", versus="b", lower=["loss"], rates=(0.05,), n_resamples=4000).set_index(
        ["score", "metric"]
    )
    means, label = table.groupby("doc").c.mean().to_numpy(), np.arange(40) % 2 == 1
    first = answer[answer.versus.isna()]
    assert first.loc[("c", "auroc"), "estimate"] == pytest.approx(roc_auc_score(label, means))
    assert first.loc[("loss", "auroc"), "estimate"] == first.loc[("c", "auroc"), "estimate"]
    boot = stats.bootstrap((means[label], means[~label]), lambda x, y, axis: (x[..., :, None] > y[..., None, :]).mean((axis, axis - 1)),
                           method="percentile", n_resamples=4000, rng=0, vectorized=True)  # fmt: skip
    assert first.loc[("c", "auroc"), ["low", "high"]].tolist() == pytest.approx(tuple(boot.confidence_interval), abs=0.015)
    false = (means[~label][None] >= np.sort(means)[:, None]).mean(1)
    true = (means[label][None] >= np.sort(means)[:, None]).mean(1)
    assert first.loc[("c", "tpr at 5% fpr"), "estimate"] == true[false <= 0.05].max()
    gap = answer[answer.versus == "b"].loc[("c", "auroc"), "estimate"]
    assert gap == pytest.approx(roc_auc_score(label, means) - roc_auc_score(label, table.groupby("doc").b.mean()))


def test_true_positives_at_one_percent_need_a_hundred_negatives():
    few = S.detect(simulate(1, sequences=198, tokens=2), "a", "member", n_resamples=50).set_index("metric")
    assert np.isnan(few.estimate["tpr at 1% fpr"]) and np.isfinite(few.estimate["tpr at 5% fpr"])
    enough = S.detect(simulate(1, sequences=200, tokens=2), "a", "member", n_resamples=50).set_index("metric")
    assert np.isfinite(enough.estimate["tpr at 1% fpr"])


def test_resampled_detection_is_that_of_repeated_texts():
    rng = np.random.default_rng(0)
    truth, score = rng.random(30) < 0.5, rng.normal(size=30).round(1)
    weights = rng.integers(0, 4, (5, 30)).astype(float)
    for row, (area, rate_5) in zip(weights.astype(int), auroc.resampled_metrics(truth, score, (0.05,), weights), strict=True):
        expected = auroc.curve_metrics(np.repeat(truth, row), np.repeat(score, row), (0.05,))
        assert area == pytest.approx(expected[0])
        assert np.isnan(expected[1]) or rate_5 == pytest.approx(expected[1])


def test_labels_within_documents_are_exchanged_within_them():
    """Original and paraphrase in one document: the document's own level plays no part."""
    table = simulate(1, ("a",), sequences=40, per_doc=2, seed=3)
    table["member"] = table.seq % 2 == 0
    table["a"] += 5 * np.random.default_rng(0).normal(size=20)[table.doc] + 3 * table.member
    answer = S.detect(table, "a", "member", rates=(), n_resamples=999).iloc[0]
    assert "within units" in answer.test and answer.p <= 0.002
    assert S.detect(table, "a", "member", rates=(), unit="sequence", n_resamples=999).p.item() > 0.01
    with pytest.raises(StudyError, match="paired=True"):
        S.compare_groups(table, "a", "member")


def test_added_value_is_scikit_learns_cross_fit():
    table = planted(1)
    answer = S.added_value(table, "c", "member", ["a", "b"], n_splits=4, n_resamples=99, seed=2).set_index("metric")
    means = table.groupby("doc")[["a", "b", "c"]].mean().to_numpy()
    label = np.arange(40) % 2 == 1
    order = np.r_[np.flatnonzero(~label), np.flatnonzero(label)]
    x, y = means[order], label[order]
    folds = list(StratifiedGroupKFold(4, shuffle=True, random_state=2).split(x, y, order))
    predicted = np.zeros((2, 40))
    for which, columns in enumerate(([0, 1], [0, 1, 2])):
        for fitted, held in folds:
            scaler = StandardScaler().fit(x[fitted][:, columns])
            model = LogisticRegression(tol=1e-8).fit(scaler.transform(x[fitted][:, columns]), y[fitted])
            predicted[which, held] = model.predict_proba(scaler.transform(x[held][:, columns]))[:, 1]
    assert answer.estimate["delta log-loss"] == pytest.approx(log_loss(y, predicted[0]) - log_loss(y, predicted[1]))
    assert answer.estimate["delta auroc"] == pytest.approx(roc_auc_score(y, predicted[1]) - roc_auc_score(y, predicted[0]))
    batched = added.batched_predictions(x[None, :, :2], x[None, :, 2], y, folds)
    assert batched[0] == pytest.approx(predicted[1], abs=1e-5)


def test_tag_means_and_omega_squared_are_those_of_the_textbook():
    table = simulate(1, ("a",), icc=0.0, seed=2)
    table["a"] += 0.5 * (table.tag == "NOUN")
    answer = S.tag_effect(table, "a", "tag", n_resamples=9, tests=("sequence",)).iloc[0]
    centered = table.a - table.groupby("seq").a.transform("mean")
    f = stats.f_oneway(*[part for _, part in centered.groupby(table.tag)]).statistic
    assert answer.estimate == pytest.approx(4 * (f - 1) / (4 * (f - 1) + 2000), rel=0.03)
    means = S.tag_means(table, "a", "tag").set_index("tag")
    by_document = (centered[table.tag == "NOUN"]).groupby(table.doc).mean()
    assert means.estimate["NOUN"] == pytest.approx(by_document.mean())
    assert means.p["NOUN"] == pytest.approx(stats.ttest_1samp(by_document, 0).pvalue)
    # Tokens of one word count once.
    twice = pd.concat([table.assign(word=table.pos), table.assign(word=table.pos)])
    assert S.tag_effect(twice, "a", "tag", word="word", n_resamples=9, tests=("sequence",)).estimate.item() == pytest.approx(
        answer.estimate
    )


def test_corrections_are_those_of_the_libraries():
    p = np.array([0.001, 0.02, 0.03, 0.5, np.nan, 0.04])
    frame = pd.DataFrame({"score": list("aabbcc"), "layer": [1, 2] * 3, "p": p})
    kept = p[np.isfinite(p)]
    assert S.correct(frame).p_corrected.dropna().to_numpy() == pytest.approx(stats.false_discovery_control(kept))
    holm = S.correct(frame, "holm")
    assert holm.p_corrected.tolist() == pytest.approx([0.005, 0.08, 0.09, 0.5, np.nan, 0.09], nan_ok=True)
    both = S.correct(frame, primary=[{"score": "a", "layer": 2}, {"score": "b", "layer": 1}])
    assert both.p_corrected[[1, 2]].tolist() == pytest.approx([0.04, 0.04])
    assert both.correction[1] == "Holm (declared primary)" and both.n_tests.tolist() == [3, 2, 2, 3, 3, 3]
    assert both.p_corrected[[0, 3, 5]].tolist() == pytest.approx(stats.false_discovery_control([0.001, 0.5, 0.04]).tolist())
    with pytest.raises(TableError, match="no row matches"):
        S.correct(frame, primary={"score": "z"})


def test_max_t_is_between_no_correction_and_holm_for_dependent_tests():
    table = simulate(1, ("a", "b"), seed=12)
    table["a"] += 0.3 * table.member
    table["b"] += 0.06 * table.a
    copies = [f"a{index}" for index in range(10)]
    for index, name in enumerate(copies):
        table[name] = table.a + 0.05 * np.random.default_rng(index).normal(size=len(table))
    answer = S.within_sequence_correlation(table, copies, "b", correction="max-t")
    holm = S.correct(answer, "holm").p_corrected
    assert (answer.p_corrected >= answer.p * 0.8).all() and (answer.p_corrected < holm).all()
    groups = S.compare_groups(table, copies, "member", correction="max-t", n_resamples=999)
    assert (groups.p_corrected < S.correct(groups, "holm").p_corrected).all()
    assert set(groups.correction) == {"max-|t| permutation"}


# -- controls, bounds, quartiles ------------------------------------------------------------------------------------------------


def confounded(layers=1, seed=8):
    """a and b go together through the radius and the norm alone; the table has every standard control."""
    table = simulate(layers, ("a", "b", "log_r", "log_n", "noise"), seed=seed)
    table["a"] += 1.5 * table.log_r + table.log_n
    table["b"] += 1.5 * table.log_r - 0.5 * table.log_n
    table["radius"], table["state_norm"] = np.exp(table.log_r), np.exp(table.log_n)
    table["surprisal"] = np.random.default_rng(0).gamma(2, size=len(table))
    table["same_token_share"] = np.random.default_rng(1).random(len(table))
    return table.drop(columns=["log_r", "log_n"])


def test_standard_controls_are_those_that_the_table_has_and_the_result_says_so():
    table = confounded()
    full = S.partial_correlation(table, "a", "b").iloc[0]
    assert full.controls == ", ".join(S.CONTROLS) and "not controlled" not in full.note
    assert full.uncontrolled > 0.3 and abs(full.estimate) < 0.1
    less = S.partial_correlation(table.drop(columns=["radius", "surprisal"]), "a", "b").iloc[0]
    assert less.controls == "log_norm, log_frequency, position, same_token_share"
    assert "not in the table, so not controlled: log_radius, surprisal" in less.note
    own = S.partial_correlation(table, "radius", "b").iloc[0]
    assert "log_radius" not in own.controls and "tested itself, so not controlled: log_radius" in own.note
    mixed_answer = S.mixed_model(table, "a")
    assert mixed_answer.term.tolist() == list(S.CONTROLS)
    assert (mixed_answer.set_index("term").partial_r2[["log_radius", "log_norm"]] > 0.3).all()
    assert (mixed_answer.set_index("term").partial_r2[["position", "surprisal"]] < 0.01).all()


def test_token_frequency_is_of_the_table_or_given():
    table = pd.concat([simulate(1).assign(layer=layer) for layer in range(2)], ignore_index=True)
    own = S.add_controls(table).log_frequency
    expected = np.log(table.token_id.map(table[table.layer == 0].token_id.value_counts() / 2000))
    assert own.to_numpy() == pytest.approx(expected.to_numpy())
    given = S.add_controls(table, frequency={0: 4.0, 1: 0.0}).log_frequency
    assert given[table.token_id == 0].to_numpy() == pytest.approx(np.log(4))
    assert given[table.token_id != 0].isna().all()
    table["token"] = table.token_id.astype(str)
    assert S.add_controls(table, frequency={"0": 4.0}).log_frequency.notna().sum() == (table.token_id == 0).sum()


def test_residuals_leave_nothing_of_the_controls():
    table = confounded(2)
    left = S.residuals(table, "a", controls=["log_radius", "log_norm"])
    assert left.attrs["controls"] == {"a": ["log_radius", "log_norm"]}
    for within in (True, False):
        left = S.residuals(table, "a", controls=["log_radius"], within=within)
        a = left.a - (left.groupby(["layer", "seq"]).a.transform("mean") if within else left.groupby("layer").a.transform("mean"))
        r = np.log(table.radius)
        r = r - (r.groupby([table.layer, table.seq]).transform("mean") if within else r.groupby(table.layer).transform("mean"))
        assert abs(np.corrcoef(a[table.layer == 1], r[table.layer == 1])[0, 1]) < 1e-9
    assert left.index.equals(table.index)


def test_reliability_bounds_a_correlation():
    table = simulate(2).assign(run="r")
    table.attrs["provenance"] = {"r": {"reliability": {"a": {"0": 0.6, "1": None}, "b": {"0": 0.5}}}}
    answer = S.reliability_bound(table, "a", "b")
    assert answer.reliability.tolist() == pytest.approx([0.75, np.nan], nan_ok=True)
    assert answer.bound.tolist() == pytest.approx([np.sqrt(0.75 * 2 / 3), np.nan], nan_ok=True)
    assert S.within_sequence_correlation(table, "a", "b").bound[0] == pytest.approx(np.sqrt(0.75 * 2 / 3))
    with pytest.raises(TableError, match="provenance"):
        S.reliability_bound(simulate(), "a")


@pytest.mark.slow
def test_a_correlation_is_attenuated_as_the_bound_says():
    rng = np.random.default_rng(0)
    table = simulate(1, (), sequences=30, tokens=400)
    truth = rng.normal(size=len(table))
    table["half_1"], table["half_2"] = (truth + 1.4 * rng.normal(size=len(table)) for _ in range(2))
    table["a"], table["truth"] = (table.half_1 + table.half_2) / 2, truth
    table["run"] = "r"
    table.attrs["provenance"] = {"r": {"reliability": {"a": {"0": stats.spearmanr(table.half_1, table.half_2).statistic}}}}
    answer = S.within_sequence_correlation(table, "a", "truth").iloc[0]
    assert answer.estimate == pytest.approx(answer.bound, abs=0.03)


def test_quartiles_are_within_sequences():
    table = simulate(1, tokens=40)
    table["b"] = table.pos + 1000.0 * table.seq
    table["a"] = table.pos // 10 + 7.0 * table.seq
    answer = S.quartile_table(table, "a", "b").set_index("quartile")
    base = 7 * np.arange(40).mean()
    assert answer.estimate.tolist() == pytest.approx([base, base + 1, base + 2, base + 3, 3.0])
    assert S.quartile_table(table, "a", "b", parts=10).quartile.iloc[-1] == "10 - 1"


# -- red flags ------------------------------------------------------------------------------------------------------------------


def raised(flags):
    return {
        f"{row.flag}/{row.score}" if row.flag != "nothing survives correction" else row.flag: row.raised
        for row in flags.itertuples()
    }


def test_no_red_flag_on_a_sound_finding():
    table = confounded(3)
    table["b"] += 0.5 * table.noise
    flags = S.red_flags(table, "noise", "b")
    assert flags.raised.tolist() == [False] * 5, flags.why.tolist()
    flags = S.red_flags(planted(3), "c", group="member", controls=["position", "b"], n_resamples=999)
    assert flags.raised.tolist() == [False] * 5, flags.why.tolist()
    flags = S.red_flags(planted(3), "a", tag="tag", controls=["position", "b"], n_resamples=199)
    assert flags.raised.tolist() == [False] * 5, flags.why.tolist()


def test_red_flag_for_a_score_that_does_not_vary():
    table = planted(2)
    table["rare"] = (np.arange(len(table)) % 50 == 0).astype(float)
    table["by_text"] = table.seq + 0.0
    table["flat"] = 3.0
    flags = S.red_flags(table, ["a", "rare", "by_text", "flat"], "b", controls=["c"])
    found = raised(flags)
    assert [found[f"no variance/{name}"] for name in ("a", "rare", "by_text", "flat")] == [False, True, True, True]
    assert flags.loc[flags.score == "flat", "raised"].isna().sum() == 2
    assert flags.set_index(["flag", "score"]).value["no variance", "rare"] == pytest.approx(0.98)
    assert not raised(S.red_flags(table, "by_text", group="member", controls=["c"], n_resamples=199))["no variance/by_text"]


def test_red_flag_when_nothing_survives_correction():
    flags = S.red_flags(simulate(12, seed=3), ["a"], "b")
    row = flags[flags.flag == "nothing survives correction"].iloc[0]
    assert row.raised and row.value > row.limit == 0.05 and row.n_tests == 12
    assert "0 of 12" in row.why


def test_red_flag_when_the_effect_does_not_replicate():
    """Only the documents of one half have it."""
    table = simulate(3, seed=5)
    chosen = S.halves(table, seed=0)
    table.loc[chosen, "b"] += 0.8 * table.a[chosen]
    flags = S.red_flags(table, "a", "b", seed=0, controls=["position"]).set_index("flag")
    assert flags.raised["does not replicate"] and not flags.raised["nothing survives correction"]
    assert flags.estimate["does not replicate"] > 0.4 and abs(flags.compared_estimate["does not replicate"]) < 0.1
    table = simulate(3, seed=5)
    table.loc[chosen, "b"] += 0.8 * table.a[chosen]
    table.loc[~chosen, "b"] -= 0.4 * table.a[~chosen]  # significant, but the other way
    assert S.red_flags(table, "a", "b", seed=0, controls=["position"]).set_index("flag").raised["does not replicate"]


def test_red_flag_when_controls_explain_the_effect():
    flags = S.red_flags(confounded(3), ["a", "noise"], "b").set_index(["flag", "score"])
    row = flags.loc[("vanishes under controls", "a")]
    assert row.raised and row.estimate > 0.3 and abs(row.compared_estimate) < 0.1 and row.compared_p > 0.05
    assert "log_radius, log_norm" in row.why
    assert not flags.raised["does not replicate", "a"] and not flags.raised["no variance", "a"]
    # Groups that differ in surprisal alone.
    table = planted(2)
    table["surprisal"] = table.c
    table["a"] = 0.1 * table.a + table.surprisal
    flags = S.red_flags(table, "a", group="member", controls=["surprisal"], n_resamples=999).set_index("flag")
    assert flags.raised["vanishes under controls"] and not flags.raised["nothing survives correction"]


def test_red_flags_that_cannot_be_checked_say_so():
    table = planted(1).drop(columns=["layer", "token_id", "pos"])
    flags = S.red_flags(table.assign(difference=table.c), "difference", n_resamples=199).set_index("flag")
    assert flags.raised.isna().tolist() == [False, False, False, True, False]
    few = S.red_flags(table[table.seq < 9], "a", "b").set_index("flag")
    assert few.raised[["does not replicate", "vanishes under controls"]].isna().all()
    assert "at least 6 units" in few.why["does not replicate"] and "none of the controls" in few.why["vanishes under controls"]
    with pytest.raises(TableError, match="one question"):
        S.red_flags(table, "a", "b", group="member")


# -- what every result says, and what is refused --------------------------------------------------------------------------------


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
