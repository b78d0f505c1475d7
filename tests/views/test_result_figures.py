"""Figures of results: estimates, intervals and what survived are the table's own numbers."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

import basin_lens as bl
from basin_lens.views import marks
from tests.views.drawn import caption, intervals, legend, lines, painted, tokens


def results(layers=range(6), scores=("a", "b"), seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame([{"layer": layer, "score": score} for score in scores for layer in layers])
    frame["estimate"] = rng.normal(size=len(frame))
    return frame.assign(
        low=frame.estimate - 0.3, high=frame.estimate + 0.2, null=0.0, p=0.01, p_corrected=rng.choice([0.01, 0.05, 0.4], len(frame)),
        unit="document", n_documents=40, n_sequences=80, n_tokens=2400, effect="mean Spearman rho", correction="Holm", n_tests=12,
    )  # fmt: skip


@pytest.fixture(scope="module")
def table():
    return tokens()


# --- results over depth


def test_result_curve_draws_the_estimates_their_intervals_and_what_survived():
    found = results()
    axes = bl.views.result_curve(found).axes[0]
    drawn = lines(axes, "estimate")
    assert [len(drawn), len(lines(axes, "filled")), len(lines(axes, "open"))] == [2, 2, 2]
    for place, (_, part) in enumerate(found.groupby("score", sort=False)):
        np.testing.assert_array_equal(drawn[place].get_ydata(), part.estimate)
        yes = part.p_corrected <= 0.05
        np.testing.assert_array_equal(lines(axes, "filled")[place].get_ydata(), part.estimate[yes])
        np.testing.assert_array_equal(lines(axes, "open")[place].get_ydata(), part.estimate[~yes])
        assert lines(axes, "open")[place].get_markerfacecolor() == "white"
        assert to_rgba(lines(axes, "filled")[place].get_markerfacecolor()) == to_rgba(marks.COLORS[place])
    np.testing.assert_allclose(np.sort(intervals(axes)[:, :, 1].ravel()), np.sort([*found.low, *found.high]))
    assert lines(axes, "null")[0].get_ydata()[0] == 0
    assert {"a", "b", "corrected p ≤ 0.05"} < set(legend(axes))


def test_result_curve_says_what_it_shows():
    figure = bl.views.result_curve(results(), title="Of $x$ and $y$")
    assert caption(figure) == (
        "40 documents, 80 sequences, 2,400 tokens; bars: 95 % interval over documents; p corrected by Holm, 12 tests"
    )
    assert figure.axes[0].get_ylabel() == "mean Spearman rho"
    assert figure.get_suptitle() == r"Of \$x\$ and \$y\$"
    painted(figure)


def test_result_curve_leaves_gaps_and_moves_lines_aside():
    found = results()
    found.loc[2, ["estimate", "low", "high"]] = np.nan
    found = found[~((found.score == "b") & (found.layer == 4))]
    axes = bl.views.result_curve(found, by="score").axes[0]
    first, second = lines(axes, "estimate")
    assert np.isnan(first.get_ydata()[2])
    assert np.isnan(second.get_ydata()[4])
    assert len(intervals(axes)) == 10
    shift = second.get_xdata() - first.get_xdata()
    assert (shift > 0).all()
    assert (shift < 0.5).all()


def test_result_curve_of_one_line_has_a_legend_of_the_markers_only():
    found = results(scores=("a",))
    assert legend(bl.views.result_curve(found).axes[0]) == ["corrected p ≤ 0.05", "corrected p > 0.05,\nor not tested", "no effect"]
    bare = bl.views.result_curve(found.drop(columns=["p_corrected", "null"]))
    assert bare.axes[0].get_legend() is None
    np.testing.assert_array_equal(lines(bare.axes[0], "filled")[0].get_ydata(), found.estimate)


def test_result_curve_refuses_what_it_cannot_draw():
    twice = pd.concat([results(), results().assign(against="x")])
    with pytest.raises(bl.errors.TableError, match="against"):
        bl.views.result_curve(twice, by="score")
    assert len(lines(bl.views.result_curve(twice.fillna({"against": "y"})).axes[0], "estimate")) == 4
    with pytest.raises(bl.errors.TableError, match="at least one row"):
        bl.views.result_curve(results().head(0))
    with pytest.raises(bl.errors.TableError, match="without a layer"):
        bl.views.result_curve(results().assign(layer=pd.NA))
    with pytest.raises(bl.errors.TableError, match="estimate"):
        bl.views.result_curve(results().drop(columns="estimate"))


def test_a_result_without_any_value_says_so():
    empty = results().assign(estimate=np.nan, low=np.nan, high=np.nan)
    for figure in (bl.views.result_curve(empty), bl.views.forest(empty, ["score", "layer"])):
        assert [text.get_text() for text in figure.axes[0].texts] == ["no values"]
        assert "no intervals" in caption(figure)


def test_results_of_the_statistics_room_can_be_drawn(table):
    found = bl.stats.within_sequence_correlation(table, ["compression", "state_norm"], "importance")
    axes = bl.views.result_curve(found).axes[0]
    np.testing.assert_allclose(lines(axes, "estimate")[0].get_ydata(), found[found.score == "compression"].estimate)
    groups = bl.stats.tag_effect(table, "compression", "tag", n_resamples=19)
    painted(bl.views.forest(groups, "test"))
    by_layer = bl.views.result_curve(groups)
    assert len(lines(by_layer.axes[0], "estimate")) == 3
    assert "documents or token types" in caption(by_layer)


def test_twenty_eight_lines_look_different():
    looks = [marks.Look.at(index) for index in range(28)]
    assert len({(look.style, look.shape) for look in looks}) == 28, "without color"
    assert len({(look.color, look.style) for look in looks}) == 28


# --- intervals


def test_forest_has_a_row_per_label_and_a_mark_per_value_of_by():
    found = pd.concat([results(range(3)).assign(controls=c) for c in ("", "pos")], ignore_index=True)
    figure = bl.views.forest(found, ["score", "layer"], by="controls")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        f"{score}, layer {layer}" for score in "ab" for layer in range(3)
    ]
    drawn = lines(axes, "estimate")
    assert len(drawn) == 2
    for line, (_, part) in zip(drawn, found.groupby("controls", sort=False), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), part.estimate)
        assert line.get_linestyle() == "None", "rows have no order to follow"
    assert (drawn[1].get_ydata() > drawn[0].get_ydata()).all()
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "from the top down"
    assert legend(axes)[:2] == ["no controls", "given pos"]
    assert (
        bl.views.forest(found, ["score", "layer", "controls"]).get_figheight() > bl.views.forest(found[:2], "layer").get_figheight()
    )
    painted(figure)


def test_forest_refuses_rows_it_cannot_tell_apart():
    with pytest.raises(bl.errors.TableError, match="layer"):
        bl.views.forest(results(), "score", by="unit")
    with pytest.raises(bl.errors.TableError, match="at most 150 rows"):
        bl.views.forest(results(range(100)), ["score", "layer"])


def test_labels_are_never_mathematics():
    found = results(range(1), scores=("$a$", "_hidden", "b\nc"))
    figure = bl.views.forest(found, "layer", by="score")
    painted(figure)
    assert legend(figure.axes[0])[:3] == [r"\$a\$", " _hidden", "b⏎c"]


def test_captions_fit_the_figure():
    found = results().assign(
        correction="Benjamini-Hochberg, over a family with a very long name that nobody would want to read " * 2
    )
    figure = bl.views.result_curve(found, title="A title of many words " * 8)
    figure.draw_without_rendering()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in (figure._supxlabel, figure._suptitle):
        assert "\n" in text.get_text()
        assert text.get_window_extent(renderer).width <= figure.bbox.width
