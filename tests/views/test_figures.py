"""Figures: what is drawn are the table's own numbers, what is missing is not drawn, and the words say what it is."""

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.views import marks
from tests.views.drawn import caption, intervals, legend, lines, painted, tokens


@pytest.fixture(scope="module")
def table():
    return tokens()


# --- layer by position


def test_position_map_is_the_mean_over_documents_of_means_over_sequences():
    table = tokens()
    table = table[~((table.doc == "doc-0") & (table.seq == 1) & (table.pos > 5))]  # documents of unequal size
    figure = bl.views.position_map(table, "compression")
    drawn = figure.axes[0].collections[0].get_array()
    by_sequence = table.groupby(["layer", "doc", "seq", "pos"]).compression.mean()
    expected = by_sequence.groupby(level=["layer", "doc", "pos"]).mean().groupby(level=["layer", "pos"]).mean().unstack()
    np.testing.assert_allclose(drawn.filled(np.nan), expected)
    assert drawn.mask[:, 0].all(), "position 0 has no value"
    assert not drawn.mask[:, 1:].any()
    assert figure.axes[0].patch.get_hatch() == "////"
    assert "hatched: no value" in caption(figure)
    assert figure.axes[1].get_ylabel() == "compression [nats]"
    painted(figure)


def test_position_map_centers_two_signs_at_0_and_only_them(table):
    low, high = bl.views.position_map(table, "compression").axes[0].collections[0].get_clim()
    assert low == -high
    image = bl.views.position_map(table, "state_norm").axes[0].collections[0]
    assert image.cmap.name == "cividis"
    assert image.get_clim()[0] > 0
    assert image.get_clim()[1] < image.get_array().max(), "position 0 does not bleach the others"
    assert image.colorbar.extend == "both"


def test_position_map_bins_long_texts():
    figure = bl.views.position_map(tokens(layers=2, docs=2, length=150), "state_norm")
    assert figure.axes[0].collections[0].get_array().shape == (2, 50)
    assert "bins of 3" in caption(figure)
    assert figure.axes[0].get_xlim()[1] == pytest.approx(149.5)


@pytest.mark.many
@pytest.mark.parametrize("value", [3.0, 0.0, np.nan])
def test_position_map_of_a_score_that_does_not_vary(table, value):
    flat = table.assign(compression=value)
    flat.attrs = table.attrs
    figure = bl.views.position_map(flat, "compression")
    painted(figure)
    low, high = figure.axes[0].collections[0].get_clim()
    assert low < high
    assert [text.get_text() for text in figure.axes[0].texts] == (["no values"] if np.isnan(value) else [])


def test_position_map_refuses_several_runs_and_unknown_columns(table):
    with pytest.raises(bl.errors.TableError, match="one run"):
        bl.views.position_map(pd.concat([table, table.assign(run="s")]), "compression")
    with pytest.raises(bl.errors.TableError, match="nope"):
        bl.views.position_map(table, "nope")


# --- intervals


def test_quartile_bars_are_the_table(table):
    found = bl.stats.quartile_table(table, ["compression", "state_norm"], "importance", layers=[0, 2])
    figure = bl.views.quartile_bars(found)
    assert len(figure.axes) == 4
    for axes, (_, part) in zip(figure.axes, found.groupby(["score", "layer"]), strict=True):
        bars = part[part.quartile != "4 - 1"]
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], bars.estimate)
        np.testing.assert_allclose(intervals(axes)[:, :, 1], bars[["low", "high"]])
        difference = part[part.quartile == "4 - 1"].iloc[0]
        assert marks.number(difference.estimate) in axes.get_title(loc="left")
        assert marks.probability(difference.p_corrected) in axes.get_title(loc="left")
        assert axes.get_xlabel() == "quartile of importance"
        assert axes.get_ylim()[0] <= 0, "bars begin at 0"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim(), "one scale for a score"
    assert figure.axes[0].get_ylabel() == "compression [nats]"
    painted(figure)


def test_quartile_bars_say_what_they_leave_out(table):
    found = bl.stats.quartile_table(table, ["compression", "state_norm"], "importance")
    many = pd.concat([found.assign(layer=found.layer + 4 * i) for i in range(4)])
    figure = bl.views.quartile_bars(many)
    assert len(figure.axes) == 12
    assert "first 12 of 32" in caption(figure)
    flat = table.assign(compression=np.where(table.layer == 1, 2.0, table.compression))
    flat.attrs = table.attrs
    figure = bl.views.quartile_bars(bl.stats.quartile_table(flat, "compression", "importance", layers=[0, 1]))
    assert [text.get_text() for text in figure.axes[1].texts] == ["compression is constant at this layer"]
    assert not figure.axes[1].patches


def test_tag_intervals_put_before_and_after_side_by_side(table):
    before = bl.stats.tag_means(table, "compression", "tag")
    after = bl.stats.tag_means(table, "compression", "tag", controls=["pos", "state_norm"])
    figure = bl.views.tag_intervals(before, after, layer=2)
    axes = figure.axes[0]
    expected = before[before.layer == 2].sort_values("estimate", ascending=False)
    first, second = lines(axes, "estimate")
    np.testing.assert_array_equal(first.get_xdata(), expected.estimate)
    np.testing.assert_array_equal(second.get_xdata(), after[after.layer == 2].set_index("tag").estimate[expected.tag])
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [f"{marks.plain(tag)} (n = {n:,})" for tag, n in zip(expected.tag, expected.n_tokens, strict=True)]
    assert axes.get_xlabel() == "deviation from the sequence mean of compression [nats]"
    assert legend(axes)[:2] == ["no controls", "given pos, state_norm"]
    assert len(intervals(axes)) == 6
    painted(figure)
    gap = bl.views.tag_intervals(before, after[after.tag != expected.tag.iloc[1]], layer=2).axes[0]
    assert np.isnan(lines(gap, "estimate")[1].get_xdata()[1])
    with pytest.raises(bl.errors.TableError, match="layer"):
        bl.views.tag_intervals(before, after, layer=9)
    with pytest.raises(bl.errors.TableError, match="one row per tag"):
        bl.views.tag_intervals(bl.stats.tag_means(table, ["compression", "state_norm"], "tag"), after, layer=2)


# --- two columns


def test_scatter_takes_sequence_means_out(table):
    figure = bl.views.scatter(table, "importance", "compression", 1, controls_note="nothing taken out")
    axes = figure.axes[0]
    rows = table[(table.layer == 1) & table.compression.notna()]
    columns = rows[["importance", "compression"]]
    expected = columns - columns.groupby(rows.seq).transform("mean")
    (points,) = [c for c in axes.collections if c.get_gid() == "tokens"]
    np.testing.assert_allclose(points.get_offsets(), expected)
    assert points.get_rasterized()
    line = lines(axes, "line")[0]
    slope, intercept = np.polyfit(expected.importance, expected.compression, 1)
    np.testing.assert_allclose(line.get_ydata(), intercept + slope * line.get_xdata(), atol=1e-9)
    assert axes.get_xlabel() == "importance\ndeviation from its sequence's mean [share]"
    assert f"slope {marks.number(slope)}" in caption(figure)
    assert "16 tokens without both values left out; nothing taken out" in caption(figure)
    painted(figure)


def test_scatter_bootstraps_documents_as_a_loop_would(table):
    rows = table[(table.layer == 1) & table.compression.notna()].reset_index(drop=True)
    held = rows[["importance", "compression"]] - rows[["importance", "compression"]].groupby(rows.seq).transform("mean")
    axes = bl.views.scatter(table, "importance", "compression", 1, n_resamples=50, seed=3).axes[0]
    weights = np.random.default_rng(3).multinomial(8, np.full(8, 1 / 8), 50)
    documents = [held[rows.doc == doc] for doc in rows.doc.unique()]
    grid = lines(axes, "line")[0].get_xdata()
    fits = []
    for draw in weights:
        drawn = pd.concat([part for part, times in zip(documents, draw, strict=True) for _ in range(times)])
        fits.append(np.polyval(np.polyfit(drawn.importance, drawn.compression, 1), grid))
    low, high = np.percentile(fits, (2.5, 97.5), axis=0)
    (band,) = [c for c in axes.collections if c.get_gid() == "band"]
    edge = band.get_paths()[0].vertices[:, 1]
    assert edge.min() == pytest.approx(low.min())
    assert edge.max() == pytest.approx(high.max())


@pytest.mark.parametrize("scale", ["log", "rank"])
def test_scatter_scales(table, scale):
    table = table.assign(importance=np.where(table.pos == 3, 0.0, table.importance))
    figure = bl.views.scatter(table, "importance", "compression", 1, x_scale=scale)
    (points,) = [c for c in figure.axes[0].collections if c.get_gid() == "tokens"]
    x = np.asarray(points.get_offsets())[:, 0]
    rows = table[(table.layer == 1) & table.compression.notna()]
    if scale == "log":
        rows = rows[rows.importance > 0]
        logs = np.log10(rows.importance)
        np.testing.assert_allclose(x, logs - logs.groupby(rows.seq).transform("mean"))
        assert "16 values of importance at or below 0 have no logarithm" in caption(figure)
        assert figure.axes[0].get_xlabel().startswith("log10 importance")
    else:
        np.testing.assert_allclose(x, rows.groupby("seq").importance.rank() / 20)
        assert "rank within its sequence" in figure.axes[0].get_xlabel()


def test_scatter_without_a_line(table):
    few = table[table.doc.isin(["doc-0", "doc-1"])]
    figure = bl.views.scatter(few, "importance", "compression", 1)
    assert "no band with fewer than 6 documents" in caption(figure)
    assert not [c for c in figure.axes[0].collections if c.get_gid() == "band"]
    flat = bl.views.scatter(table.assign(importance=2.0), "importance", "compression", 1)
    assert "importance does not vary within sequences" in caption(flat)
    assert not lines(flat.axes[0], "line")
    none = bl.views.scatter(table.assign(compression=np.nan), "importance", "compression", 1)
    assert [text.get_text() for text in none.axes[0].texts] == ["no values"]


@pytest.mark.parametrize("draw", [bl.views.scatter, bl.views.joint_density])
def test_two_columns_must_be_numbers_of_one_run_at_a_layer(table, draw):
    for x, layer, message in (("nope", 1, "nope"), ("tag", 1, "numeric"), ("importance", 9, "layer")):
        with pytest.raises(bl.errors.TableError, match=message):
            draw(table, x, "compression", layer)
    with pytest.raises(bl.errors.TableError, match="one run"):
        draw(pd.concat([table, table.assign(run="s")]), "importance", "compression", 1)


@pytest.mark.slow
def test_joint_density_counts_every_token(table):
    figure = bl.views.joint_density(table, "importance", "compression", 1, x_scale="log")
    axes, above, beside = figure.axes[:3]
    there = int(table[table.layer == 1].compression.notna().sum())
    assert np.asarray(axes.collections[0].get_array()).sum() == there
    assert sum(bar.get_height() for bar in above.patches) == there
    assert sum(bar.get_width() for bar in beside.patches) == there
    assert axes.get_xlabel() == "log10 importance [share]"
    assert figure.axes[3].get_ylabel() == "tokens in a hexagon (logarithmic)"
    painted(figure)
    for value in (2.0, np.nan):
        painted(bl.views.joint_density(table.assign(compression=value), "importance", "compression", 1))


def test_distributions_show_median_quartiles_and_counts(table):
    figure = bl.views.distributions(table, "compression", "tag", 1)
    axes = figure.axes[0]
    rows = table[(table.layer == 1) & table.compression.notna()]
    kinds = rows.tag.value_counts()
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"{marks.plain(kind)}\nn = {n}" for kind, n in kinds.items()]
    medians = [line.get_ydata()[0] for line in lines(axes, "median")]
    np.testing.assert_allclose(medians, [rows[rows.tag == kind].compression.median() for kind in kinds.index])
    quartiles = [c.get_segments()[0][:, 1] for c in axes.collections if c.get_gid() == "quartiles"]
    np.testing.assert_allclose(quartiles, [rows[rows.tag == kind].compression.quantile([0.25, 0.75]) for kind in kinds.index])
    assert axes.get_ylabel() == "compression [nats]"
    assert "16 tokens without a value or label left out" in caption(figure)
    painted(figure)


def test_distributions_in_an_order_on_a_scale_and_of_too_little(table):
    small = table.assign(tag=np.where((table.seq == 0) & (table.pos < 3), "RARE", table.tag))
    figure = bl.views.distributions(small, "state_norm", "tag", 1, order=["RARE", "NOUN"], y_scale="log")
    axes = figure.axes[0]
    assert [text.get_text().split("\n")[0] for text in axes.get_xticklabels()] == ["RARE", "NOUN"]
    assert len(lines(axes, "values")[0].get_ydata()) == 3, "three values are no density"
    assert axes.get_ylabel() == "log10 state_norm [activation units]"
    painted(bl.views.distributions(table.assign(compression=2.0), "compression", "tag", 1))
    painted(bl.views.distributions(table.assign(compression=np.nan), "compression", "tag", 1))
    with pytest.raises(bl.errors.TableError, match="order"):
        bl.views.distributions(table, "compression", "tag", 1, order=["NONE"])
    with pytest.raises(bl.errors.TableError, match="at most 24"):
        bl.views.distributions(table, "compression", "token_id", 1)


# --- words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1234.5, "1,230"),
        (0.05, "0.05"),
        (-2.0, "−2"),
        (999.96, "1,000"),
        (1e-9, "1.00e-09"),
        (np.nan, "–"),
        (np.inf, "∞"),
    ],
)
def test_numbers_read_well(value, shown):
    assert marks.number(value) == shown
