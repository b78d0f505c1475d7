"""Results over two or three things that vary at once: maps of cells, and curves side by side."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from basin_lens.errors import TableError
from basin_lens.views import marks
from basin_lens.views.canvas import Canvas, drawn

_MOST_PANELS = 16
_ACROSS = 4  # panels in a row
_APART = 1.6  # ratio of neighboring ticks


@drawn
def grid_map(
    results: pd.DataFrame,
    down: str,
    across: str,
    *,
    marked: str | None = None,
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """Estimates as a map of two things that vary: blue above 0, red below, white at 0.

    Args:
        results: from `basin_lens.stats`, or any table with `estimate`: a row for each cell.
        down: column of the rows of the map.
        across: column of its columns.
        marked: column of texts to write into the cells; empty: nothing.
        title: above the figure; None: none.
        labels: words to show in place of names of columns and scores.
        ax: matplotlib Axes to draw in; None: a new figure.

    Returns:
        a matplotlib Figure. The scale is symmetric about 0. Cells without an estimate are hatched.

    Raises:
        TableError: missing columns, no rows, or two rows for one cell.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> results = pd.DataFrame({"layer": [1, 2], "scale": 1.0, "estimate": [0.1, -0.3], "low": 0.0, "high": 0.0})
        >>> bl.views.grid_map(results, "layer", "scale").axes[0].get_xlabel()
        'scale'
    """
    results = marks.checked(results, down, across, *([marked] if marked else []))
    if results.duplicated([down, across]).any():
        raise TableError(f"expected one row for each {down} and {across}, got several. Choose rows first.")
    held = results.pivot(index=down, columns=across, values="estimate").sort_index()
    cells = np.ma.masked_invalid(held.to_numpy(float))
    bound = float(np.abs(cells.compressed()).max(initial=0.0)) or 1.0
    canvas = Canvas.of(ax, (2.8 + 0.75 * cells.shape[1], float(np.clip(1.5 + 0.36 * len(held), 2.6, 9))))
    axes = canvas.axes()
    axes.patch.set(facecolor="#e6e6e6", edgecolor="#b5b5b5", hatch="////", linewidth=0)
    image = axes.pcolormesh(cells, cmap="RdBu", vmin=-bound, vmax=bound, edgecolors="white", linewidth=1)
    bar = canvas.part.colorbar(image, ax=axes, pad=0.03)
    bar.set_label(marks.effect_label(results, labels), fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if marked:
        texts = results.pivot(index=down, columns=across, values=marked).reindex(held.index)
        for (row, column), text in np.ndenumerate(texts.to_numpy(object)):
            if isinstance(text, str) and text:
                dark = abs(float(held.to_numpy(float)[row, column])) > 0.6 * bound
                words, color = marks.plain(text), "white" if dark else "black"
                axes.text(column + 0.5, row + 0.5, words, color=color, ha="center", va="center", size=11, weight="bold", gid="mark")
    axes.set_xticks(np.arange(cells.shape[1]) + 0.5, [f"{value:g}" for value in held.columns])
    axes.set_yticks(np.arange(len(held)) + 0.5, [f"{value:g}" for value in held.index])
    axes.set_xlabel(marks.named(across, labels))
    axes.set_ylabel(marks.named(down, labels))
    marks.bare(axes)
    sample = marks.sample(results.assign(low=np.nan, high=np.nan))  # a map has no bars to explain
    return canvas.finish(title or "", sample.replace("; no intervals", ""))


@drawn
def curve_panels(
    results: pd.DataFrame,
    across: str,
    *,
    by: str | None = None,
    panel: str | None = None,
    flat: bool = False,
    title: str | None = None,
    alpha: float = 0.05,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """Estimates with their intervals over a quantity on a logarithmic axis: a line for each value of `by`, side by side.

    Args:
        results: from `basin_lens.stats`, or any table with `estimate`, `low`, `high`.
        across: column of the quantity, above 0.
        by: column with one line for each value; None: one line.
        panel: column with axes of its own for each value; None: one.
        flat: draw each line's first estimate as a dotted level, too: what it would be if the quantity did nothing.
        title: above the figure; None: none.
        labels: words to show in place of names of columns and scores.
        ax: matplotlib Axes of a grid, whose place several panels take; None: a new figure.
        alpha: level of the corrected p, where the results have one: filled markers are at most that.

    Returns:
        a matplotlib Figure; all panels have one scale.

    Raises:
        TableError: missing columns, no rows, several rows for one point, a quantity that is not above 0, or over 16 panels.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> results = pd.DataFrame({"scale": [0.1, 1.0], "estimate": [0.1, 0.3], "low": [0.0, 0.2], "high": [0.2, 0.4]})
        >>> bl.views.curve_panels(results, "scale").axes[0].get_xlabel()
        'scale'
    """
    names = [name for name in (by, panel) if name is not None]
    results = marks.checked(results, across, *names)
    if not (results[across] > 0).all():
        raise TableError(f"expected values of {across} above 0 for a logarithmic axis, got {results[across].min():g}.")
    if results.duplicated([across, *names]).any():
        raise TableError(f"expected one row for each of {', '.join([across, *names])}, got several. Choose rows first.")
    shown = [("", results)] if panel is None else list(results.groupby(panel, sort=False))
    if len(shown) > _MOST_PANELS:
        raise TableError(f"expected at most {_MOST_PANELS} values of {panel}, got {len(shown)}. Choose some first.")
    lines = list(dict.fromkeys(results[by])) if by is not None else [None]
    looks = {line: marks.Look.at(index) for index, line in enumerate(lines)}
    columns = min(_ACROSS, len(shown))
    rows = -(-len(shown) // columns)
    size = (7.6, 3.9) if len(shown) == 1 else (1.2 + 2.3 * columns, 1.0 + 2.1 * rows)
    canvas = Canvas.of(ax, size, panels=True)
    every = canvas.part.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    steps = _ticks(np.sort(results[across].unique()).astype(float).tolist())
    for axes, (name, part) in zip(every, shown, strict=False):
        _panel(axes, part, across, by, looks, alpha, flat)
        if panel is not None:
            axes.set_title(marks.plain(marks.described({panel: name}, labels)), fontsize=9)
        axes.set_xscale("log")
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        marks.bare(axes)
    for axes in every[len(shown) :]:
        axes.remove()
    for axes in every[max(0, len(shown) - columns) : len(shown)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(marks.named(across, labels), fontsize=9)
    canvas.part.supylabel(marks.effect_label(results, labels), fontsize=9)
    _panel_legend(canvas.part, results, by, looks, alpha, flat, labels)
    return canvas.finish(title or "", marks.sample(results))


def _ticks(steps: list[float]) -> list[float]:
    """Those of the steps that have room beside one another on a logarithmic axis."""
    kept = steps[:1]
    for step in steps[1:]:
        if step >= _APART * kept[-1]:
            kept.append(step)
    return kept


def _panel(
    axes: Axes, part: pd.DataFrame, across: str, by: str | None, looks: Mapping[object, marks.Look], alpha: float, flat: bool
) -> None:
    """The lines of one panel, moved a little sideways so that intervals do not hide one another."""
    axes.axhline(0, color=marks.GRAY, linewidth=0.8, zorder=1)
    there = [line for line in looks if by is None or (part[by] == line).any()]
    for index, line in enumerate(there):
        mine = part if by is None else part[part[by] == line]
        drawn = mine.sort_values(across).reset_index(drop=True)
        shift = 1 + 0.06 * (index - (len(there) - 1) / 2)
        marks.draw(axes, drawn[across].to_numpy(float) * shift, drawn, looks[line], alpha, size=4.0)
        known = drawn["estimate"].dropna()
        if flat and len(known):
            axes.axhline(float(known.iloc[0]), color=looks[line].color, linestyle=":", linewidth=1.0, zorder=1, gid="flat")
    if not part["estimate"].notna().any():
        marks.say_nothing(axes)


def _panel_legend(
    figure: FigureBase,
    results: pd.DataFrame,
    by: str | None,
    looks: Mapping[object, marks.Look],
    alpha: float,
    flat: bool,
    labels: marks.Words,
) -> None:
    """Beside the panels: what each line is."""
    handles = [
        Line2D(
            [],
            [],
            color=look.color,
            linestyle=look.style,
            marker=look.shape,
            markersize=5,
            label=marks.plain(marks.described({by: line}, labels)),
        )
        for line, look in looks.items()
        if by is not None
    ]
    if marks.survived(results, alpha) is not None:
        for face, words in (("#444444", f"corrected p ≤ {alpha:g}"), ("white", f"corrected p > {alpha:g},\nor not tested")):
            handles.append(
                Line2D([], [], linestyle="none", marker="o", markersize=5, color="#444444", markerfacecolor=face, label=words)
            )
    if flat:
        handles.append(Line2D([], [], color=marks.GRAY, linestyle=":", label="linear part"))
    if handles:
        figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside right upper")
