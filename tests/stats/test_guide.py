"""The original guide's tests: scipy's own numbers, the guide's thresholds, and refusals."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import basin_lens as bl
from basin_lens.errors import TableError

guide_tests = bl.stats.guide_tests
TAGS = np.array(["ADJ", "NOUN", "VERB"])


@pytest.fixture
def table():
    """Two layers of 12 documents; holes in both columns and in the labels."""
    rng = np.random.default_rng(0)
    doc = np.tile(np.repeat(np.arange(12), 15), 2)
    made = pd.DataFrame({"layer": np.repeat([3, 7], 180), "doc": doc, "seq": doc, "pos": np.tile(np.arange(15), 24)})
    made["a"] = rng.normal(size=360)
    made["b"] = made.a + rng.normal(size=360)
    made["kind"] = np.where(rng.random(360) < 0.3, "function", "content")
    made.loc[made.kind == "function", "a"] += 0.4
    made["tag"] = TAGS[rng.integers(0, 3, 360)]
    made.loc[made.tag == "VERB", "a"] -= 0.5
    made.loc[rng.random(360) < 0.1, "a"] = np.nan
    made.loc[rng.random(360) < 0.1, "b"] = np.nan
    made[["kind", "tag"]] = made[["kind", "tag"]].astype(object)
    made.loc[rng.random(360) < 0.1, ["kind", "tag"]] = None
    return made


def by_layer(table):
    return [table[table.layer == layer] for layer in (3, 7)]


def test_a_correlation_is_pearsons(table):
    answer = guide_tests(table, "a", "b")
    for row, part in zip(answer.itertuples(), by_layer(table.dropna(subset=["a", "b"])), strict=True):
        expected = stats.pearsonr(part.a, part.b)
        assert (row.question, row.score, row.n_tokens) == ("b", "a", len(part))
        assert [row.guide_statistic, row.guide_r, row.guide_p] == pytest.approx(
            [expected.statistic, expected.statistic, expected.pvalue]
        )


@pytest.mark.parametrize("groups", [("function", "content"), ("content", "function")])
def test_a_difference_is_students_t_with_the_point_biserial_r(table, groups):
    answer = guide_tests(table, "a", group="kind", groups=groups)
    assert answer.layer.tolist() == [3, 7]
    for row, part in zip(answer.itertuples(), by_layer(table.dropna(subset=["a", "kind"])), strict=True):
        first = (part.kind == groups[0]).to_numpy()
        t = stats.ttest_ind(part.a[first], part.a[~first])
        r = stats.pointbiserialr(first, part.a)
        assert row.question == " - ".join(groups)
        assert [row.guide_statistic, row.guide_p, row.guide_r] == pytest.approx([t.statistic, t.pvalue, r.statistic])
        assert row.guide_p == pytest.approx(r.pvalue)  # the same test twice
        assert row.n_tokens == len(part)


def test_tags_are_analysis_of_variance(table):
    answer = guide_tests(table, "a", tag="tag")
    for row, part in zip(answer.itertuples(), by_layer(table.dropna(subset=["a", "tag"])), strict=True):
        groups = [part.a[part.tag == tag] for tag in TAGS]
        expected = stats.f_oneway(*groups)
        # eta squared from F and its degrees of freedom
        between, within = len(TAGS) - 1, len(part) - len(TAGS)
        eta = expected.statistic * between / (expected.statistic * between + within)
        assert [row.guide_statistic, row.guide_p] == pytest.approx([expected.statistic, expected.pvalue])
        assert row.guide_r**2 == pytest.approx(eta)
        assert row.n_tokens == len(part)


def test_two_tags_are_the_two_groups(table):
    two = table[table.kind.notna()]
    tag, group = guide_tests(two, "a", tag="kind"), guide_tests(two, "a", group="kind", groups=("function", "content"))
    assert tag.guide_statistic.to_numpy() == pytest.approx(group.guide_statistic.to_numpy() ** 2)
    assert tag.guide_r.to_numpy() == pytest.approx(group.guide_r.abs().to_numpy())
    assert tag.guide_p.to_numpy() == pytest.approx(group.guide_p.to_numpy())


def test_a_tag_of_one_token_is_no_group(table):
    part = table[table.layer == 3].dropna(subset=["a", "tag"]).reset_index(drop=True)
    lonely = part.copy()
    lonely.loc[0, "tag"] = "X"
    expected = guide_tests(part.drop(index=0), "a", tag="tag")
    pd.testing.assert_frame_equal(guide_tests(lonely, "a", tag="tag").drop(columns="n_tokens"), expected.drop(columns="n_tokens"))


def exact(r: float, n: int = 200) -> pd.DataFrame:
    """Two columns whose correlation is r."""
    x, noise = np.random.default_rng(1).normal(size=(2, n))
    x = (x - x.mean()) / x.std()
    noise = noise - noise.mean() - (noise @ x) / (x @ x) * x
    y = r * x + np.sqrt(1 - r * r) * noise / noise.std()
    return pd.DataFrame({"layer": 0, "doc": np.arange(n), "seq": np.arange(n), "pos": 1, "a": x, "b": y})


@pytest.mark.parametrize(
    ("r", "reading"),
    [
        (0.41, "strong"),
        (0.39, "moderate"),
        (0.21, "moderate"),
        (0.19, "weak"),
        (0.0, "weak"),
        (-0.21, "moderate"),
        (-0.9, "strong"),
    ],
)
def test_readings(r, reading):
    answer = guide_tests(exact(r), "a", "b")
    assert answer.guide_r[0] == pytest.approx(r, abs=1e-9)
    assert answer.guide_reading[0] == reading


def test_constant_columns_have_no_numbers(table):
    table["flat"] = np.where(table.layer == 3, 0.1 + 0.2, table.a)
    for answer in (
        guide_tests(table, "flat", "b"),
        guide_tests(table, "b", "flat"),
        guide_tests(table, "flat", group="kind", groups=("function", "content")),
        guide_tests(table, "flat", tag="tag"),
    ):
        numbers = answer[["guide_statistic", "guide_r", "guide_p"]]
        assert numbers.loc[0].isna().all()
        assert numbers.loc[1].notna().all()
        assert answer.guide_reading[0] == ""


def test_a_table_that_the_guide_could_believe(table):
    """The same number as over documents where there is one token per document: the units are the tokens."""
    one = table[(table.layer == 3) & (table.pos == 4)].dropna(subset=["a", "b"])
    assert guide_tests(one, "a", "b").n_tokens[0] == one.doc.nunique()


def test_several_scores_some_layers_and_provenance(table):
    table.attrs["provenance"] = {"run": {"model": "m"}}
    answer = guide_tests(table, ["a", "b"], tag="tag", layers=[7])
    assert answer[["layer", "score"]].to_numpy().tolist() == [[7, "a"], [7, "b"]]
    assert answer.attrs["provenance"] == table.attrs["provenance"]
    before = table.copy()
    guide_tests(table, "a", "b")
    pd.testing.assert_frame_equal(table, before)


@pytest.mark.parametrize("asked", [{}, {"against": "b", "tag": "tag"}, {"group": "kind", "tag": "tag"}])
def test_exactly_one_question(table, asked):
    with pytest.raises(TableError, match="expected one question"):
        guide_tests(table, "a", **asked)


def test_refusals(table):
    with pytest.raises(TableError, match="nothing"):
        guide_tests(table, "nothing", "b")
    with pytest.raises(TableError, match="nothing"):
        guide_tests(table, "a", tag="nothing")
    with pytest.raises(TableError, match="two values of 'tag'"):
        guide_tests(table, "a", group="tag", groups=("NOUN", "DET"))
    with pytest.raises(TableError, match="expected a label with two values"):
        guide_tests(table, "a", group="tag")
    with pytest.raises(TableError, match="run"):
        guide_tests(table.assign(run=np.where(table.doc < 6, "one", "two")), "a", "b")


@pytest.mark.slow
def test_its_p_values_are_wrong_on_clustered_tokens_and_ours_are_not():
    """The reason for the warning in its docstring."""
    rng = np.random.default_rng(0)
    layer, doc, pos = (part.ravel() for part in np.indices((150, 20, 20)))
    table = pd.DataFrame({"layer": layer, "doc": doc, "seq": doc, "pos": pos})
    table["a"] = np.sqrt(0.3) * np.repeat(rng.normal(size=150 * 20), 20) + np.sqrt(0.7) * rng.normal(size=len(table))
    table["member"] = table.doc % 2 == 0
    guide = guide_tests(table, "a", group="member")
    sound = bl.stats.compare_groups(table, "a", "member", n_resamples=199)
    assert (guide.guide_p <= 0.05).mean() > 0.3
    assert (sound.p <= 0.05).mean() < 0.12
