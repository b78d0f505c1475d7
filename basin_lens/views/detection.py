"""Telling texts apart: receiver operating characteristics, and values along a quantity of few steps, such as a dose."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_auc_score, roc_curve

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.views import marks
from basin_lens.views.canvas import Canvas, drawn

_MOST_LINES = 9


@drawn
def roc(
    table: pd.DataFrame,
    scores: Sequence[str],
    label: str,
    *,
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """True against false positives of several scores, each at every threshold.

    Scores whose area is below 0.5 are drawn as they are: below the diagonal.

    Args:
        table: one row per text.
        scores: at most 9 columns, higher for texts with the label.
        label: True and False; rows without it or without a score are left out of that score's line.
        title: above the figure; None: none.
        labels: words to show in place of names of columns and scores.
        ax: matplotlib Axes to draw in; None: a new figure.

    Returns:
        a matplotlib Figure; the legend has each score's area and the line below it the number of texts. An area has no interval
        here: see `basin_lens.stats.detect`.

    Raises:
        TableError: missing columns, more than 9 scores, a label of one value.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"member": [True, True, False, False], "a": [4.0, 2.0, 3.0, 1.0]})
        >>> [text.get_text() for text in bl.views.roc(table, ["a"], "member").axes[0].get_legend().get_texts()]
        ['a: 0.75', 'chance']
    """
    names = marks.names_of(list(scores))
    tables.require(table, label, *names)
    if len(names) > _MOST_LINES:
        raise TableError(f"expected at most {_MOST_LINES} scores, got {len(names)}. Choose some.")
    rows = table[table[label].notna()]
    truth = rows[label].astype(bool).to_numpy()
    if truth.all() or not truth.any():
        raise TableError(f"expected texts with and without {label!r}, got {int(truth.sum())} and {int((~truth).sum())}.")
    canvas = Canvas.of(ax, (7.4, 4.4))
    axes = canvas.axes()
    for index, name in enumerate(names):
        values = rows[name].to_numpy(float)
        there = np.isfinite(values)
        if truth[there].all() or not truth[there].any():
            axes.plot([], [], color=marks.Look.at(index).color, label=f"{marks.named(name, labels)}: not there for both")
            continue
        false, true, _ = roc_curve(truth[there], values[there], drop_intermediate=False)
        look = marks.Look.at(index)
        area = roc_auc_score(truth[there], values[there])
        said = f"{marks.named(name, labels)}: {area:.2f}"
        axes.plot(false, true, linestyle=look.style, color=look.color, linewidth=1.5, label=said, gid=name)
    axes.plot([0, 1], [0, 1], color=marks.GRAY, linewidth=0.9, label="chance")
    axes.set_xlabel("false positives [share]")
    axes.set_ylabel("true positives [share]")
    axes.set_aspect("equal")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    marks.bare(axes)
    marks.explain(axes, axes.get_legend_handles_labels()[0], beside=canvas.own)
    shown = (labels or {}).get(label, label)
    return canvas.finish(
        title or "",
        f"{int(truth.sum())} texts with {shown}, {int((~truth).sum())} without; the legend has areas under the curves",
    )


@drawn
def dose_curve(
    table: pd.DataFrame,
    column: str | Sequence[str],
    on: str,
    *,
    by: str | None = None,
    lines: bool = False,
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """Values at each step of a quantity: single units, and their mean with its interval.

    Args:
        table: one row per unit (`doc`) and step.
        column: the value, or several (one panel each).
        on: the quantity, of few different numbers, drawn at equal distances.
        by: column with one mean for each of its values; None: one.
        lines: whether the points of a unit are joined.
        title: above the figure; None: none.
        labels: words to show in place of names of columns and scores.
        ax: matplotlib Axes to draw in; None: a new figure.

    Returns:
        a matplotlib Figure. Bars: Student's 95 % interval of the mean over units.

    Raises:
        TableError: missing columns, no rows, more than 20 steps.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"doc": list("abab"), "dose": [1, 1, 4, 4], "a": [0.0, 1.0, 2.0, 3.0]})
        >>> bl.views.dose_curve(table, "a", "dose").axes[0].get_xlabel()
        'dose'
    """
    names = marks.names_of(column)
    tables.require(table, "doc", on, *names, *([by] if by else []))
    steps = sorted(float(step) for step in table[on].dropna().unique())
    if not steps or len(steps) > 20:
        raise TableError(f"expected between 1 and 20 different values of {on!r}, got {len(steps)}.")
    groups = (
        [("", table)]
        if by is None
        else [(f"{(labels or {}).get(by, by)} = {value}", part) for value, part in table.groupby(by, sort=True)]
    )
    canvas = Canvas.of(ax, (7.2 if len(names) == 1 else 4.4 * len(names), 3.8), panels=len(names) > 1)
    every = [canvas.axes()] if len(names) == 1 else list(canvas.part.subplots(1, len(names), squeeze=False)[0])
    for axes, name in zip(every, names, strict=True):
        for index, (_, part) in enumerate(groups):
            shift = 0.0 if len(groups) == 1 else 0.16 * (index / (len(groups) - 1) - 0.5)
            _means(axes, part, name, on, steps, shift, marks.Look.at(index), lines)
        axes.set_xticks(range(len(steps)), [f"{step:g}" for step in steps])
        axes.set_xlabel(marks.plain((labels or {}).get(on, on.replace("_", " "))))
        unit = marks.unit_of(table, name.removesuffix("_change"))
        axes.set_ylabel(marks.named(name, labels) + (f" [{unit}]" if unit else ""))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        marks.bare(axes)
    if by is not None:
        handles = [
            every[0].plot([], [], marks.Look.at(i).shape, color=marks.Look.at(i).color, label=marks.plain(n))[0]
            for i, (n, _) in enumerate(groups)
        ]
        marks.explain(every[-1], handles, beside=canvas.own)
    kind = "line" if lines else "point"
    return canvas.finish(title or "", f"{table['doc'].nunique()} units, each a {kind}; bars: 95 % interval of the mean")


def _means(
    axes: Axes, part: pd.DataFrame, name: str, on: str, steps: Sequence[float], shift: float, look: marks.Look, lines: bool
) -> None:
    """One group's units and means."""
    place = part[on].map({step: i for i, step in enumerate(steps)}).astype(float) + shift
    if lines:
        for _, one in part.assign(_at=place).sort_values(on).groupby("doc"):
            axes.plot(one["_at"], one[name], color=look.color, alpha=0.3, linewidth=0.9, gid="unit")
    else:
        axes.plot(place, part[name], look.shape, color=look.color, alpha=0.35, markersize=3, gid="unit")
    held = part.groupby(on)[name].apply(lambda values: values.dropna().to_numpy(float))
    at = np.array([steps.index(step) + shift for step in held.index])
    means = np.array([values.mean() if len(values) else np.nan for values in held])
    bounds = np.array([tables.interval(values) if len(values) > 1 else (np.nan, np.nan) for values in held])
    axes.vlines(at, bounds[:, 0], bounds[:, 1], color=look.color, linewidth=1.4)
    axes.plot(at, means, linestyle=look.style, marker=look.shape, color=look.color, markersize=6, linewidth=1.4, gid="mean")
