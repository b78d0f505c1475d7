"""One column by category of tokens at one layer."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.artist import setp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basin_lens.errors import TableError
from basin_lens.values import whole_numbers
from basin_lens.views import marks
from basin_lens.views.canvas import Canvas, drawn
from basin_lens.views.columns import BEFORE_UNIT, axis_words, is_flat, layer_of, numbers_of

_MOST_CATEGORIES = 24


@drawn
@whole_numbers(TableError)
def distributions(
    table: pd.DataFrame,
    column: str,
    by: str,
    layer: int,
    *,
    order: Sequence[object] | None = None,
    y_scale: Literal["linear", "log"] = "linear",
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """How a score is distributed in each category of tokens at one layer: violins with median and quartiles.

    Args:
        table: from `analyze`, of one run; any table with a column `layer`.
        column: numeric column.
        by: label column; tokens without a label are left out and counted.
        layer: block index.
        order: which categories, from left to right; None: all, numbers by size, others from frequent to rare.
        y_scale: `"linear"`, or `"log"`: log10 of the column, positive values only.
        title: above the figure; None: both columns and the layer; empty: none.
        labels: words to show in place of names of columns and categories.
        ax: matplotlib Axes to draw in; None: a new figure.

    Returns:
        a matplotlib Figure, with the number of tokens under each category. Categories with fewer than 5 tokens, or with one value,
        have no violin. The axis ends at the 0.5th and 99.5th percentile of all values, and the line below counts what lies beyond.

    Raises:
        TableError: missing or not numeric columns, no such layer, several runs, unknown categories or more than 24.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"layer": 3, "tag": ["A", "B"] * 20, "a": np.random.default_rng(0).normal(size=40)})
        >>> [text.get_text() for text in bl.views.distributions(table, "a", "tag", layer=3).axes[0].get_xticklabels()]
        ['A\\nn = 20', 'B\\nn = 20']
    """
    rows = layer_of(table, [column, by], layer)
    values, tags = numbers_of(rows, column), rows[by]
    if y_scale not in ("linear", "log"):
        raise TableError(f'expected a scale "linear" or "log", got {y_scale!r}.')
    if y_scale == "log":
        values = np.log10(values.where(values > 0))
    there = np.isfinite(values) & tags.notna()
    values, tags = values[there], tags[there]
    kinds = _order(tags, by, order)
    inside = tags.isin(kinds)
    known = values[inside].to_numpy()
    canvas = Canvas.of(ax, (max(4.6, 0.72 * len(kinds) + 1.4), 4.0))
    axes = canvas.axes()
    low, high = np.percentile(known, (0.5, 99.5)) if len(known) else (0.0, 1.0)
    for place, kind in enumerate(kinds):
        _violin(axes, place, values[tags == kind].to_numpy(), float(low), float(high))
    if not len(known):
        marks.say_nothing(axes)
    counts = [int((tags == kind).sum()) for kind in kinds]
    called = [marks.plain((labels or {}).get(str(kind), kind), 14) for kind in kinds]
    axes.set_xticks(range(len(kinds)), [f"{kind}\nn = {count:,}" for kind, count in zip(called, counts, strict=True)])
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    margin = 0.04 * (high - low) or 0.5 * abs(low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel(marks.named(by, labels))
    name = axis_words(table, column, labels).replace(BEFORE_UNIT, "")
    axes.set_ylabel(f"log10 {name}" if y_scale == "log" else name)
    marks.bare(axes)
    beyond = int(((known < low - margin) | (known > high + margin)).sum())
    words = [f"{len(known):,} tokens" + (f" of {rows['doc'].nunique():,} documents" if "doc" in rows else "")]
    words.append("white dot: median; thick line: quartiles; shape: density, as wide for each")
    if beyond:
        words.append(f"{beyond:,} values beyond the axis")
    if (~there).any():
        words.append(f"{int((~there).sum()):,} tokens without a {'positive ' * (y_scale == 'log')}value or label left out")
    said = [(labels or {}).get(name, name) for name in (column, by)]
    return canvas.finish(f"{said[0]} by {said[1]}, layer {layer}" if title is None else title, "; ".join(words))


def _violin(axes: Axes, place: int, values: np.ndarray, low: float, high: float) -> None:
    """One category. The density is of the values on the axis only: a far one would smooth all others away."""
    if not len(values):
        axes.text(place, 0.5, "no values", transform=axes.get_xaxis_transform(), rotation=90, ha="center", va="center", fontsize=8)
        return
    near = values[(values >= low) & (values <= high)]
    if len(near) >= 5 and not is_flat(pd.Series(near)):
        bodies = axes.violinplot([near], [place], widths=0.8, showextrema=False)["bodies"]
        setp(bodies, facecolor=marks.COLORS[5], edgecolor=marks.COLORS[0], alpha=0.65, linewidth=0.8)
    else:
        axes.plot(np.full(len(values), place), values, "_", color=marks.COLORS[0], markersize=9, gid="values")
    first, median, last = np.percentile(values, (25, 50, 75))
    axes.vlines([place], [first], [last], color="#1a1a1a", linewidth=3.5, zorder=3).set_gid("quartiles")
    axes.plot([place], [median], "o", color="#1a1a1a", markerfacecolor="white", markersize=5, zorder=4, gid="median")


def _order(labels: pd.Series, by: str, order: Sequence[object] | None) -> list[object]:
    there = labels.value_counts()
    if order is not None:
        unknown = [kind for kind in order if kind not in there.index]
        if unknown or not len(order):
            raise TableError(f"expected values of {by!r} as order, got {list(order)}; it has {there.index.tolist()[:30]}.")
        kinds = list(order)
    elif pd.api.types.is_numeric_dtype(labels):
        kinds = sorted(there.index.tolist())
    else:
        kinds = there.index.tolist()
    if len(kinds) > _MOST_CATEGORIES:
        raise TableError(f"expected at most {_MOST_CATEGORIES} categories, got {len(kinds)} of {by!r}. Choose some: order=[...].")
    return kinds
