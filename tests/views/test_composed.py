"""Figures in a caller's axes, under a caller's words and settings: what stands where, and what is said of what is not shown."""

import inspect
import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import basin_lens as bl
from basin_lens import stats, tables, views
from basin_lens.views import marks
from basin_lens.views.limits import near
from tests.views.drawn import caption, legend, lines, painted, tokens


def results(layers=range(30), scores=("a", "b")) -> pd.DataFrame:
    frame = pd.DataFrame([{"layer": layer, "score": score} for score in scores for layer in layers])
    frame["estimate"] = np.sin(np.arange(len(frame)))
    return frame.assign(low=frame.estimate - 0.3, high=frame.estimate + 0.2)


TABLE = tokens()
STEP = {"loss": 3.1, "plain_loss": 3.0, "excess": 0.1, "rate": 0.4, "target": 0.5, "level": 0.7, "offset": 0.0, "event": None}
HISTORY = pd.DataFrame([{"step": i, **STEP} for i in (1, 2)])
ROC = pd.DataFrame({"member": [True, True, False, False], "compression": [4.0, 2.0, 3.0, 1.0]})
COSTS = pd.DataFrame({"policy": ["trained", "mean"], "bytes_share": 0.5, "estimate": [0.1, 0.2], "low": 0.05, "high": 0.3})
CELLS = results(range(1, 3), ("compression",)).assign(scale=[1.0, 2.0])
SIZES = pd.DataFrame({"coder": ["direct", "xz"], "kind": ["model", "general"], "bits_per_byte": [1.0, 2.5]})
QUARTILES = stats.quartile_table(TABLE, "compression", "importance", layers=[0, 2])
TAGS = stats.tag_means(TABLE, "compression", "tag")
# Each public figure, and a name that it shows.
FIGURES = {
    "curve_panels": (lambda **o: views.curve_panels(CELLS, "scale", panel="layer", **o), "scale"),
    "distributions": (lambda **o: views.distributions(TABLE, "compression", "tag", 1, **o), "compression"),
    "dose_curve": (lambda **o: views.dose_curve(TABLE[TABLE.layer == 0], ["compression", "importance"], "pos", **o), "compression"),
    "forest": (lambda **o: views.forest(results(range(3), ("compression",)), ["score", "layer"], **o), "compression"),
    "grid_map": (lambda **o: views.grid_map(CELLS, "layer", "scale", **o), "scale"),
    "joint_density": (lambda **o: views.joint_density(TABLE, "importance", "compression", 1, **o), "compression"),
    "layer_curve": (lambda **o: views.layer_curve(TABLE, "compression", **o), "compression"),
    "pareto": (lambda **o: views.pareto(COSTS, **o), "trained"),
    "position_map": (lambda **o: views.position_map(TABLE, "compression", **o), "compression"),
    "quartile_bars": (lambda **o: views.quartile_bars(QUARTILES, **o), "compression"),
    "result_curve": (lambda **o: views.result_curve(results(scores=("compression", "b")), **o), "compression"),
    "roc": (lambda **o: views.roc(ROC, ["compression"], "member", **o), "compression"),
    "scatter": (lambda **o: views.scatter(TABLE, "importance", "compression", 1, n_resamples=20, **o), "compression"),
    "size_bars": (lambda **o: views.size_bars(SIZES, **o), "direct"),
    "tag_intervals": (lambda **o: views.tag_intervals(TAGS, TAGS, layer=1, **o), "compression"),
    "training_curves": (lambda **o: views.training_curves(HISTORY, **o), "merged"),
}


def written(figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(
        text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_visible())
    )


def test_every_public_figure_is_here_and_takes_the_same_words():
    found = {
        name
        for name in views.__all__
        if inspect.isfunction(one := getattr(views, name)) and "Figure" in str(inspect.signature(one).return_annotation)
    }
    assert found == set(FIGURES)
    for name in FIGURES:
        assert {"ax", "title", "labels"} <= set(inspect.signature(getattr(views, name)).parameters), name
    for name in ("layer_curve", "result_curve", "position_map", "quartile_bars"):
        assert "layers" in inspect.signature(getattr(views, name)).parameters


@pytest.mark.many
@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_figure_is_drawn_into_the_axes_given_under_the_caller_s_words(name):
    draw, shown = FIGURES[name]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([0, 1], [0, 1])
    assert draw(ax=right, title="A heading of mine", labels={shown: "words of mine"}) is figure
    plt.close(figure)
    text = written(figure)
    assert "A heading of mine" in text and "words of mine" in text.replace("\n", " ")
    assert len(left.lines) == 1 and not left.get_title(loc="left"), "the neighbor stays as it was"
    parts = figure.subfigs
    drawn = (
        [*right.lines, *right.collections, *right.patches]
        if not parts
        else [one for axes in parts[0].axes for one in axes.get_children()]
    )
    assert drawn
    assert bool(parts) == (not right.axison), "panels take the place of the axes"


@pytest.mark.many
@pytest.mark.parametrize("name", sorted(FIGURES))
def test_letters_in_a_pdf_are_truetype_and_settings_stay(name):
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"pdf.compression": 0}):
        FIGURES[name][0]().savefig(saved := io.BytesIO(), format="pdf")
    content = saved.getvalue()
    assert b"/CIDFontType2" in content and b"/Type3" not in content
    assert dict(matplotlib.rcParams) == before


def test_a_caller_s_own_figure_is_saved_with_truetype_by_save(tmp_path):
    figure = Figure()
    views.layer_curve(TABLE, "compression", ax=figure.add_subplot())
    with matplotlib.rc_context({"pdf.compression": 0}):
        views.save(figure, tmp_path / "a.pdf")
        figure.savefig(plain := io.BytesIO(), format="pdf")
    assert b"/Type3" not in (tmp_path / "a.pdf").read_bytes()
    assert b"/Type3" in plain.getvalue(), "otherwise this test would see nothing"
    with pytest.raises(bl.errors.StoreError, match="ending in one of"):
        views.save(figure, tmp_path / "a.docx")


def test_a_style_for_dark_screens_does_not_reach_figures_of_their_own():
    with plt.style.context("dark_background"):
        figure = views.layer_curve(TABLE, "compression")
    axes = figure.axes[0]
    assert to_rgba(figure.get_facecolor()) == to_rgba(axes.get_facecolor()) == to_rgba("white")
    assert to_rgba(axes.xaxis.label.get_color()) == to_rgba(axes.get_xticklabels()[0].get_color()) == to_rgba("black")


def test_axes_that_cannot_be_drawn_in_are_refused():
    gone = Figure().add_subplot()
    gone.remove()
    with pytest.raises(bl.errors.TableError, match="removed from its figure"):
        views.layer_curve(TABLE, "compression", ax=gone)
    with pytest.raises(bl.errors.TableError, match="placed by hand"):
        views.quartile_bars(QUARTILES, ax=Figure().add_axes((0, 0, 1, 1)))


# --- over depth


def test_layers_can_be_chosen_and_ticks_stand_at_them():
    axes = views.layer_curve(TABLE, "compression", layers=[0, np.int64(3)]).axes[0]
    assert lines(axes, "mean")[0].get_xdata().tolist() == [0, 3]
    assert axes.get_xticks().tolist() == [0, 3] and [t.get_text() for t in axes.get_xticklabels()] == ["0", "3"]
    for layers in ([7], [], 5, "01"):
        with pytest.raises(bl.errors.TableError, match="layers of the table"):
            views.layer_curve(TABLE, "compression", layers=layers)


def test_of_many_layers_some_have_numbers_and_all_a_tick():
    axes = views.result_curve(results(range(0, 120, 2)), layers=range(0, 100, 2)).axes[0]
    named, others = axes.get_xticks().tolist(), axes.get_xticks(minor=True).tolist()
    assert sorted(named + others) == list(range(0, 100, 2))
    assert named[0] == 0 and named[-1] == 98 and 5 <= len(named) <= 25


def test_lines_stay_near_their_layer_however_many():
    axes = views.result_curve(results(scores=tuple("abcdefgh"))).axes[0]
    for line in lines(axes, "estimate"):
        assert np.abs(line.get_xdata() - np.arange(30)).max() <= 0.16 + 1e-9


def test_one_layer_does_not_flatten_the_curve_and_is_said():
    far = tables.assign(tokens(layers=12), compression=lambda t: t.compression + np.where(t.layer == 0, 500, 0))
    figure = views.layer_curve(far, "compression")
    axes = figure.axes[0]
    mean = tables.layer_summary(far, ["compression"])["compression_mean"]
    np.testing.assert_allclose(lines(axes, "mean")[0].get_ydata(), mean)
    low, high = axes.get_ylim()
    assert low < mean[1:].min() and mean[1:].max() < high < 10
    assert lines(axes, "beyond")[0].get_xdata().tolist() == [0]
    assert f"arrows, beyond the axis: layer 0 ({marks.number(mean[0])})" in caption(figure)
    whole = views.layer_curve(far, "compression", layers=range(4))
    assert whole.axes[0].get_ylim()[1] > mean[0] and "beyond" not in caption(whole), "of four layers none is far from the others"


def test_a_line_far_from_the_others_is_never_hidden():
    apart = (
        results(range(12)).assign(estimate=lambda f: f.estimate + np.where(f.score == "b", 900, 0)).assign(low=np.nan, high=np.nan)
    )
    figure = views.result_curve(apart)
    assert not lines(figure.axes[0], "beyond") and figure.axes[0].get_ylim()[1] > 900


def test_far_values_are_few_and_far():
    assert near(np.array([1.0, 2.0, 3.0, 4.0, 5.0, np.nan])) is None
    assert near(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0])) == (1.0, 6.0)
    assert near(np.array([0.0, 1.0, 2.0, 100.0, 101.0, 102.0])) is None, "half of the values are no exceptions"


def test_an_attention_sink_does_not_set_the_colors_and_is_said():
    figure = views.position_map(TABLE, "state_norm")
    image = figure.axes[0].collections[0]
    cells = image.get_array()
    assert image.get_clim()[1] <= cells[:, 1:].max() < cells[:, 0].min()
    assert "far beyond: 4 cells at position 0 (" in caption(figure)


def test_runs_have_a_line_each_under_their_names():
    two = tables.concat(
        [TABLE, tables.described(TABLE.assign(run="s", compression=TABLE.compression + 1), {"s": tables.runs(TABLE)["r"]})]
    )
    figure = views.layer_curve(two, "compression", labels={"s": "a twin"})
    first, second = lines(figure.axes[0], "mean")
    np.testing.assert_allclose(second.get_ydata() - first.get_ydata(), 1.0)
    assert legend(figure.axes[0]) == ["run r", "a twin"]
    both = views.layer_curve(two, ["compression", "importance"])
    assert legend(both.axes[0]) == ["compression, run r", "importance, run r", "compression, run s", "importance, run s"]
    painted(both)


def test_a_table_of_compare_is_drawn():
    keys = ["layer", "doc", "seq", "pos", "token_id", "token"]
    pairs = TABLE[keys].assign(compression_a=TABLE.compression, compression_b=TABLE.compression + 2.0, difference=2.0)
    pairs = tables.with_provenance(pairs, TABLE)
    figure = views.layer_curve(pairs)
    axes = figure.axes[0]
    np.testing.assert_allclose(lines(axes, "mean")[0].get_ydata(), 2.0)
    assert axes.get_ylabel() == "difference [nats]" and "8 documents" in caption(figure)
    sides = views.layer_curve(
        pairs, ["compression_a", "compression_b"], labels={"compression_a": "before", "compression_b": "after"}
    )
    assert legend(sides.axes[0]) == ["before", "after"]
    with pytest.raises(bl.errors.TableError, match="name of a score"):
        views.layer_curve(TABLE)
