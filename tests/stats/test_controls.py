"""Controls leave jointly, and what is left over is said; bounds and quartiles."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats

from basin_lens.errors import TableError
from basin_lens.stats import mixed, projection, results
from basin_lens.stats.design import split
from tests.stats.simulated import S, confounded, rate, simulate

# -- controls leave jointly ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.many
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


# -- controls, bounds, quartiles -------------------------------------------------------------------------------------------------------


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
