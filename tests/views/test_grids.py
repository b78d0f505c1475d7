"""Maps of cells and curves side by side: the table's own numbers, and words that say what they are."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

import basin_lens as bl
from basin_lens.errors import TableError


def cells() -> pd.DataFrame:
    rows = [{"layer": layer, "scale": scale} for layer in (4, 12, 29) for scale in (0.02, 1.0)]
    frame = pd.DataFrame(rows).assign(score="compression", effect="mean difference", unit="document")
    frame["estimate"] = [0.1, -0.4, 0.0, 0.2, np.nan, 0.05]
    frame["p_corrected"] = [0.01, 0.9, 0.5, 0.04, np.nan, 0.2]
    frame["mark"] = ["+", "", "", "·", "", ""]
    return frame.assign(low=frame.estimate - 0.1, high=frame.estimate + 0.1)


def test_a_map_has_the_estimates_and_marks_in_their_cells():
    figure = bl.views.grid_map(cells().sample(frac=1, random_state=0), "layer", "scale", marked="mark", title="One block")
    axes = figure.axes[0]
    (image,) = axes.collections
    drawn = image.get_array()
    assert drawn.tolist() == [[0.1, -0.4], [0.0, 0.2], [None, 0.05]] and image.norm.vmin == -0.4 == -image.norm.vmax
    assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "12", "29"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.02", "1"]
    assert [(text.get_text(), *text.get_position()) for text in axes.texts] == [("+", 0.5, 0.5), ("·", 1.5, 1.5)]
    assert "compression" in figure.axes[1].get_ylabel() and axes.get_xlabel() == "scale"


def test_a_map_refuses_two_rows_for_a_cell_and_columns_it_lacks():
    with pytest.raises(TableError, match="one row for each layer and scale"):
        bl.views.grid_map(pd.concat([cells(), cells()]), "layer", "scale")
    with pytest.raises(TableError, match="'depth'"):
        bl.views.grid_map(cells(), "depth", "scale")
    with pytest.raises(TableError, match="at least one row"):
        bl.views.grid_map(cells()[:0], "layer", "scale")


def lines(axes, gid):
    return [line for line in axes.lines if line.get_gid() == gid]


def test_panels_have_their_lines_and_the_level_of_the_first_estimate():
    two = pd.concat([cells().assign(kind="a"), cells().assign(kind="b", estimate=0.3)])
    figure = bl.views.curve_panels(two, "scale", by="kind", panel="layer", flat=True)
    assert [axes.get_title() for axes in figure.axes] == ["layer 4", "layer 12", "layer 29"]
    axes = figure.axes[0]
    first, second = lines(axes, "estimate")
    assert first.get_ydata().tolist() == [0.1, -0.4] and second.get_ydata().tolist() == [0.3, 0.3]
    assert np.allclose(first.get_xdata() / [0.02, 1.0], 0.97) and axes.get_xscale() == "log"
    assert [float(line.get_ydata()[0]) for line in lines(axes, "flat")] == [0.1, 0.3]
    assert [float(line.get_ydata()[0]) for line in lines(figure.axes[2], "flat")] == [0.05, 0.3]
    (filled, *_) = lines(axes, "filled")
    assert filled.get_ydata().tolist() == [0.1] and to_rgba(filled.get_markerfacecolor()) == to_rgba(first.get_color())
    words = [text.get_text() for text in figure.legends[0].texts]
    assert words == ["a", "b", "corrected p ≤ 0.05", "corrected p > 0.05,\nor not tested", "linear part"]


def test_one_line_needs_no_legend_without_p():
    figure = bl.views.curve_panels(cells()[:2].drop(columns="p_corrected"), "scale")
    assert not figure.legends and len(figure.axes) == 1 and not lines(figure.axes[0], "flat")


def test_panels_refuse_what_they_cannot_draw():
    with pytest.raises(TableError, match="one row for each of scale"):
        bl.views.curve_panels(cells(), "scale")
    with pytest.raises(TableError, match="above 0"):
        bl.views.curve_panels(cells().assign(scale=0.0), "scale", panel="layer", by="mark")
    many = pd.concat([cells()[:1].assign(layer=layer) for layer in range(17)])
    with pytest.raises(TableError, match="at most 16"):
        bl.views.curve_panels(many, "scale", panel="layer")
