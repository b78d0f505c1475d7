"""Estimates with their intervals, side by side: forests, quartiles, tags."""

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.values import Layers, whole_numbers
from basin_lens.views import marks
from basin_lens.views.canvas import Canvas, drawn
from basin_lens.views.limits import chosen_layers

_MOST_ROWS = 150
_MOST_PANELS = 12


@drawn
def forest(
    results: pd.DataFrame,
    label: str | Sequence[str],
    *,
    by: str | Sequence[str] | None = None,
    alpha: float = 0.05,
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """Estimates with their intervals in rows, to compare scores, models or tests that have no order.

    Markers are filled where the corrected p is at most alpha, and open elsewhere; the gray line is what no effect would give.

    Args:
        results: from `basin_lens.stats`.
        label: column or columns that name the rows, in the order of the results.
        by: column or columns with one mark in each row for each value; None: those that tell rows of one label apart.
        alpha: level of the corrected p.
        title: above the figure; None: none.
        labels: words to show in place of names of columns and scores.
        ax: matplotlib Axes to draw in; None: a new figure.

    Returns:
        a matplotlib Figure, as high as the rows need.

    Raises:
        TableError: missing columns, no rows or more than 150, or several results for one mark.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> results = pd.DataFrame({"score": ["a", "b"], "estimate": [0.1, 0.3], "low": [0.0, 0.2], "high": [0.2, 0.4]})
        >>> [text.get_text() for text in bl.views.forest(results, "score").axes[0].get_yticklabels()]
        ['a', 'b']
    """
    names = marks.names_of(label)
    results = marks.checked(results, *names)
    results["_row"] = results[names].apply(lambda row: marks.described(dict(row), labels), axis=1)
    rows = list(dict.fromkeys(results["_row"]))
    if len(rows) > _MOST_ROWS:
        raise TableError(f"expected at most {_MOST_ROWS} rows, got {len(rows)}. Choose layers or scores first.")
    groups = marks.groups_of(results.drop(columns=names), by, ["_row"], labels)
    # Rows with one mark each need no room beside it, however many kinds of marks there are.
    beside = int(results["_row"].value_counts().max())
    shifts = _shifts(len(groups)) if beside > 1 else np.zeros(len(groups))
    axes_height = len(rows) * (0.16 + 0.11 * (len(groups) if beside > 1 else 1))
    canvas = Canvas.of(ax, (7.6, 1.3 + max(axes_height, 0.17 * (len(groups) + 3))))
    axes = canvas.axes()
    marks.nulls(axes, results, upright=False)
    looks = []
    for index, (name, part) in enumerate(groups):
        look = marks.Look.at(index)
        looks.append((name, look))
        drawn = part.set_index("_row").reindex(rows)
        place = np.arange(len(rows)) + shifts[index]
        marks.draw(axes, place, drawn, look, alpha, upright=False, joined=False)
    if not results["estimate"].notna().any():
        marks.say_nothing(axes)
    _rows(axes, rows)
    axes.set_xlabel(marks.wrapped(marks.effect_label(results, labels), 56))
    marks.bare(axes)
    marks.legend(axes, looks, results, alpha, joined=False, beside=canvas.own)
    return canvas.finish(title or "", marks.sample(results))


def _shifts(count: int) -> np.ndarray:
    """Where the marks of one row stand around its middle."""
    width = min(0.6, 0.22 * (count - 1))
    return np.linspace(-width / 2, width / 2, count)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """Rows from the top down, with faint lines to follow."""
    axes.set_yticks(range(len(labels)), [marks.plain(text) for text in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", color="#eceff1", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)


@drawn
def quartile_bars(
    results: pd.DataFrame,
    *,
    layers: Layers = None,
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """Mean of a score in each quartile of another column, and the difference between the ends, in a panel for each score and layer.

    Args:
        results: from `basin_lens.stats.quartile_table`.
        layers: which layers; None: all of the results.
        title: above the figure; None: none.
        labels: words to show in place of names of columns and scores.
        ax: matplotlib Axes of a grid, whose place several panels take; None: a new figure.

    Returns:
        a matplotlib Figure. Bars begin at 0 and carry 95 % intervals; panels of one score have one scale. Above each panel: highest
        quartile less lowest, with its interval and corrected p. At most 12 panels are drawn, the first ones, and the line below
        says so.

    Raises:
        TableError: missing columns, or no rows.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> results = pd.DataFrame({"quartile": ["1", "2", "2 - 1"], "estimate": [0.1, 0.3, 0.2], "low": 0.0, "high": 0.4})
        >>> figure = bl.views.quartile_bars(results.assign(layer=0, score="a", against="b", p_corrected=0.01))
        >>> [float(bar.get_height()) for bar in figure.axes[0].patches]
        [0.1, 0.3]
    """
    results = chosen_layers(marks.checked(results, "quartile", "score", "layer", "against"), layers)
    held = list(results.groupby(["score", "against"], sort=False, dropna=False))
    panels = [
        (score, against, layer, part) for (score, against), rows in held for layer, part in rows.groupby("layer", dropna=False)
    ]
    shown = panels[:_MOST_PANELS]
    places = _places([panel[:2] for panel in shown])
    columns, lines = max(place[1] for place in places) + 1, max(place[0] for place in places) + 1
    canvas = Canvas.of(ax, (max(4.6, 2.2 * columns + 0.4), 2.5 * lines + 0.5), panels=True)
    if ax is None:
        canvas.figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.09))
    first: dict[Hashable, Axes] = {}
    for (at, column), (score, against, layer, part) in zip(places, shown, strict=True):
        axes = canvas.part.add_subplot(lines, columns, at * columns + column + 1, sharey=first.get(score))
        _panel(axes, part)
        if part["estimate"].notna().any():
            first.setdefault(score, axes)
        unit = marks.unit_of(results, str(score))
        axes.set_ylabel(
            marks.wrapped(
                f"{marks.plain((labels or {}).get(str(score), score), 30)}{f' [{marks.plain(unit, 20)}]' if unit else ''}", 20
            )
        )
        axes.set_xlabel(marks.plain(f"{_part(len(part) - 1)} of {(labels or {}).get(str(against), against)}", 34))
        axes.set_title(f"layer {layer}\n{_difference(part)}", fontsize=8, loc="left")
        marks.bare(axes)
    caption = f"{marks.sample(results)}; parts within each sequence, 1 is lowest; "
    caption += "above each panel: highest less lowest, corrected p, [95 % interval]"
    if len(panels) > len(shown):
        caption += f"; the first {len(shown)} of {len(panels)} panels: choose layers or scores to see others"
    return canvas.finish(title or "", caption)


def _places(cases: Sequence[tuple[Hashable, ...]]) -> list[tuple[int, int]]:
    """Line and column of each panel: four in a line; a new score begins a new line, unless each has one panel only."""
    places: list[tuple[int, int]] = []
    flowing = len(set(cases)) == len(cases)
    for index, case in enumerate(cases):
        line, column = places[-1] if places else (0, -1)
        new = column == 3 or (index > 0 and not flowing and case != cases[index - 1])
        places.append((line + 1, 0) if new else (line, column + 1))
    return places


def _panel(axes: Axes, part: pd.DataFrame) -> None:
    """One score at one layer."""
    bars = part[~part["quartile"].astype(str).str.contains(" - ")]
    bars = bars.sort_values("quartile", key=lambda names: names.astype(int))
    height, low, high = (bars[name].to_numpy(float) for name in ("estimate", "low", "high"))
    place = np.arange(len(bars))
    there, known = np.isfinite(height), np.isfinite(low) & np.isfinite(high)
    if there.any():
        # From light to dark, so that the order is seen in print too.
        shades = [tuple(1 - (1 - np.array((0.0, 0.447, 0.698))) * share) for share in np.linspace(0.3, 1.0, len(bars))]
        axes.bar(place[there], height[there], 0.72, color=[shades[i] for i in place[there]], edgecolor="#1a1a1a", linewidth=0.6)
        axes.vlines(place[known], low[known], high[known], color="#1a1a1a", linewidth=1.3, zorder=3).set_gid("interval")
        axes.axhline(0, color=marks.GRAY, linewidth=0.9, zorder=1)
    else:
        notes = part["note"].dropna().tolist() if "note" in part else []
        marks.say_nothing(axes, next((note for note in notes if note), "no values"))
    axes.set_xticks(place, bars["quartile"].tolist())


def _part(count: int) -> str:
    return {4: "quartile", 10: "decile", 5: "quintile", 3: "third", 2: "half"}.get(count, "part")


def _difference(part: pd.DataFrame) -> str:
    """The difference between the ends, in words."""
    found = part[part["quartile"].astype(str).str.contains(" - ")]
    if found.empty or not np.isfinite(found["estimate"].iloc[0]):
        return "no difference known"
    row = found.iloc[0]
    sign = "+" if row["estimate"] > 0 else ""
    words = f"{str(row['quartile']).replace('-', '−')}: {sign}{marks.number(row['estimate'])}"
    if "p_corrected" in part and np.isfinite(row["p_corrected"]):
        p = marks.probability(row["p_corrected"])
        words += f", p {p if p.startswith('<') else f'= {p}'}"
    if np.isfinite(row["low"]) and np.isfinite(row["high"]):
        words += f"\n[{marks.number(row['low'])}, {marks.number(row['high'])}]"
    return words


@drawn
@whole_numbers(TableError)
def tag_intervals(
    before: pd.DataFrame,
    after: pd.DataFrame,
    *,
    layer: int,
    alpha: float = 0.05,
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """How far tokens of each kind stand from their text's mean, before and after the controls are taken out.

    Args:
        before: from `basin_lens.stats.tag_means`, of one score, without controls.
        after: the same with controls.
        layer: block index.
        alpha: level of the corrected p, for filled markers.
        title: above the figure; None: score and layer; empty: none.
        labels: words to show in place of names of columns and scores.
        ax: matplotlib Axes to draw in; None: a new figure.

    Returns:
        a matplotlib Figure: a row per tag, ordered by the estimate before, with the number of its tokens; two marks with 95 %
        intervals.

    Raises:
        TableError: missing columns, no such layer, or several scores.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"doc": [0, 0, 1, 1], "seq": [0, 0, 1, 1], "tag": ["A", "B"] * 2, "a": [1.0, 0.0, 3.0, 2.0]})
        >>> means = bl.stats.tag_means(table.assign(layer=3), "a", "tag")
        >>> [text.get_text() for text in bl.views.tag_intervals(means, means, layer=3).axes[0].get_yticklabels()]
        ['A (n = 2)', 'B (n = 2)']
    """
    parts = []
    for results in (before, after):
        held = tables.at_layer(marks.checked(results, "tag", "layer", "score", "n_tokens"), layer)
        if held["score"].nunique() != 1 or held["tag"].duplicated().any():
            raise TableError(
                f"expected one row per tag of one score, got scores {held['score'].unique().tolist()}. Choose one: "
                "results[results.score == ...]."
            )
        parts.append(held.set_index("tag"))
    if parts[0]["score"].iloc[0] != parts[1]["score"].iloc[0]:
        raise TableError(f"expected one score, got {parts[0]['score'].iloc[0]!r} before and {parts[1]['score'].iloc[0]!r} after.")
    order = parts[0].sort_values("estimate", ascending=False, na_position="last").index
    order = order.append(parts[1].index.difference(order))
    both = tables.with_provenance(pd.concat(parts), before)
    canvas = Canvas.of(ax, (7.6, 1.5 + max(0.34 * len(order), 1.0)))
    axes = canvas.axes()
    marks.nulls(axes, both, upright=False)
    looks = []
    for index, part in enumerate(parts):
        look = marks.Look.at(index)
        used = "" if "controls" not in part else next((str(c) for c in part["controls"] if isinstance(c, str) and c), "")
        name = f"given {used}" if used else "no controls" if index == 0 or "controls" in part else "after"
        looks.append((name, look))
        marks.draw(
            axes, np.arange(len(order)) + (-0.15, 0.15)[index], part.reindex(order), look, alpha, upright=False, joined=False
        )
    counts = both.groupby(level=0)["n_tokens"].max()
    _rows(axes, [f"{(labels or {}).get(str(tag), tag)} (n = {int(counts[tag]):,})" for tag in order])
    if not both["estimate"].notna().any():
        marks.say_nothing(axes)
    axes.set_xlabel(marks.wrapped(marks.effect_label(both, labels), 56))
    marks.bare(axes)
    marks.legend(axes, looks, both, alpha, joined=False, beside=canvas.own)
    score = str(both["score"].iloc[0])
    heading = f"{(labels or {}).get(score, score)} by tag at layer {layer}" if title is None else title
    return canvas.finish(heading, f"{marks.sample(both)}; n: tokens with this tag")
