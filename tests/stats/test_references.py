"""Agreement with scipy, statsmodels and scikit-learn."""

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
from statsmodels.stats.multitest import multipletests

from basin_lens.errors import StudyError, TableError
from basin_lens.stats import added, auroc, mixed
from basin_lens.stats.results import adjust
from tests.stats.simulated import S, planted, simulate


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


@pytest.mark.many
@pytest.mark.parametrize("count", [2, 3, 10, 200])
def test_holm_is_statsmodels_to_the_last_bit(count):
    """With equal ones, and some that come to 1."""
    p = np.random.default_rng(count).beta(0.3, 1, count)
    for values in (p, p.round(1), np.ones(count)):
        assert np.array_equal(adjust(values, "holm"), multipletests(values, method="holm")[1])


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
