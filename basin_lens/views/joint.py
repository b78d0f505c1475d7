"""Two columns against each other at one layer."""

from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from basin_lens.errors import TableError
from basin_lens.values import whole_numbers
from basin_lens.views import marks
from basin_lens.views.canvas import Canvas, drawn
from basin_lens.views.columns import BEFORE_UNIT, axis_words, is_flat, layer_of, numbers_of

Scale = Literal["linear", "log", "rank"]

_MOST_POINTS = 20_000  # drawn; lines and counts are of all
_FEWEST = 6  # documents, for an interval over them


@drawn
@whole_numbers(TableError)
def scatter(
    table: pd.DataFrame,
    x: str,
    y: str,
    layer: int,
    *,
    controls_note: str = "",
    x_scale: Scale = "linear",
    y_scale: Scale = "linear",
    n_resamples: int = 1000,
    seed: int = 0,
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """Two columns token by token at one layer, each less its sequence's mean: what goes together within texts.

    The line is ordinary least squares; its band is the 95 % percentile bootstrap of whole documents, because tokens of one text are
    not independent.

    Args:
        table: from `analyze`, of one run; any table with columns `layer`, `doc` and `seq`.
        x, y: numeric columns.
        layer: block index.
        controls_note: what was done to the columns before, for the line below the figure.
        x_scale, y_scale: `"linear"`; `"log"`: log10 of the column, positive values only; `"rank"`: share of the sequence's tokens
            below.
        n_resamples: draws of documents.
        seed: of the bootstrap, and of the choice of points drawn where there are more than 20,000.
        title: above the figure; None: both columns and the layer; empty: none.
        labels: words to show in place of names of columns and scores.
        ax: matplotlib Axes to draw in; None: a new figure.

    Returns:
        a matplotlib Figure. Tokens without both values are left out and counted. No band with fewer than 6 documents; no line where
        a column does not vary.

    Raises:
        TableError: missing or not numeric columns, no such layer, several runs, an unknown scale.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> table = pd.DataFrame({"layer": 3, "doc": np.repeat(range(9), 20), "a": rng.normal(size=180)})
        >>> table = table.assign(seq=table.doc, b=table.a + rng.normal(size=180))
        >>> bl.views.scatter(table, "a", "b", layer=3).axes[0].get_xlabel()
        "a\\ndeviation from its sequence's mean"
    """
    shown = tuple((labels or {}).get(name, name) for name in (x, y))
    rows, names, left_out = _pairs(table, x, y, layer, x_scale, y_scale, labels)
    for name, scale in (("x", x_scale), ("y", y_scale)):
        if scale != "rank":
            rows[name] -= rows.groupby("seq")[name].transform("mean")
    canvas = Canvas.of(ax, (5.6, 4.6))
    axes = canvas.axes()
    drawn = rows
    if len(rows) > _MOST_POINTS:
        drawn = rows.iloc[np.sort(np.random.default_rng(seed).choice(len(rows), _MOST_POINTS, replace=False))]
    alpha = float(np.clip(150 / np.sqrt(len(drawn) + 1) / 10, 0.06, 0.5))
    dots = axes.scatter(drawn["x"], drawn["y"], s=7, color=marks.COLORS[0], alpha=alpha, linewidths=0, rasterized=True)
    dots.set_gid("tokens")
    documents = rows["doc"].nunique()
    words = [f"{len(rows):,} tokens in {rows['seq'].nunique():,} sequences of {documents:,} documents"]
    if len(drawn) < len(rows):
        words.append(f"{len(drawn):,} of them drawn")
    if not len(rows):
        marks.say_nothing(axes)
    elif is_flat(rows["x"]) or is_flat(rows["y"]):
        words.append(f"no line: {shown[0] if is_flat(rows['x']) else shown[1]} does not vary within sequences")
    else:
        grid = np.linspace(rows["x"].min(), rows["x"].max(), 60)
        slope, intercept, slopes, intercepts = _lines(rows, n_resamples, seed)
        axes.plot(grid, intercept + slope * grid, color=marks.COLORS[1], linewidth=1.8, zorder=4, gid="line")
        sentence = f"line: least squares, slope {marks.number(slope)}"
        if documents >= _FEWEST:
            low, high = np.percentile(intercepts[:, None] + slopes[:, None] * grid, (2.5, 97.5), axis=0)
            axes.fill_between(grid, low, high, color=marks.COLORS[1], alpha=0.3, linewidth=0, zorder=3, gid="band")
            ends = np.percentile(slopes, (2.5, 97.5))
            sentence += f" [{marks.number(ends[0])}, {marks.number(ends[1])}]; band and brackets: 95 % bootstrap of documents"
        else:
            sentence += f"; no band with fewer than {_FEWEST} documents"
        words.append(sentence)
    axes.axhline(0.5 if y_scale == "rank" else 0, color=marks.GRAY, linewidth=0.7, zorder=1)
    axes.axvline(0.5 if x_scale == "rank" else 0, color=marks.GRAY, linewidth=0.7, zorder=1)
    for setter, name, scale in ((axes.set_xlabel, names[0], x_scale), (axes.set_ylabel, names[1], y_scale)):
        setter(name if scale == "rank" else name.replace(BEFORE_UNIT, "\ndeviation from its sequence's mean"))
    marks.bare(axes)
    words += [note for note in (left_out, controls_note) if note]
    return canvas.finish(f"{shown[1]} and {shown[0]} within sequences, layer {layer}" if title is None else title, "; ".join(words))


@drawn
@whole_numbers(TableError)
def joint_density(
    table: pd.DataFrame,
    x: str,
    y: str,
    layer: int,
    *,
    x_scale: Scale = "linear",
    y_scale: Scale = "linear",
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """How two columns are distributed together at one layer: counts in hexagons, with the distribution of each beside.

    Args:
        table: from `analyze`, of one run; any table with columns `layer`, `doc` and `seq`.
        x, y: numeric columns, as they are: differences between texts are in them (`scatter` takes them out).
        layer: block index.
        x_scale, y_scale: as for `scatter`.
        title: above the figure; None: both columns and the layer; empty: none.
        labels: words to show in place of names of columns and scores.
        ax: matplotlib Axes of a grid, whose place several panels take; None: a new figure.

    Returns:
        a matplotlib Figure; colors count tokens on a logarithmic scale.

    Raises:
        TableError: missing or not numeric columns, no such layer, several runs, an unknown scale.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"layer": 3, "doc": 0, "seq": 0, "a": np.arange(9.0), "b": np.arange(9.0) ** 2})
        >>> bl.views.joint_density(table, "a", "b", layer=3).axes[0].get_xlabel()
        'a'
    """
    shown = tuple((labels or {}).get(name, name) for name in (x, y))
    rows, names, left_out = _pairs(table, x, y, layer, x_scale, y_scale, labels)
    canvas = Canvas.of(ax, (6.2, 5.2), panels=True)
    figure = canvas.part
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(1, 4), hspace=0.02, wspace=0.02)
    axes = figure.add_subplot(grid[1, 0])
    above, beside = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
    spans = [_span(rows["x"]), _span(rows["y"])]
    if len(rows):
        image = axes.hexbin(
            rows["x"], rows["y"], gridsize=38, extent=(*spans[0], *spans[1]), mincnt=1, cmap="cividis", linewidths=0.1
        )
        most = float(np.max(np.asarray(image.get_array())))
        image.set_norm(LogNorm(1, max(10.0, most)))
        bar = figure.colorbar(image, ax=[above, axes, beside], pad=0.015, fraction=0.05)
        bar.set_label("tokens in a hexagon (logarithmic)", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        above.hist(rows["x"], bins=40, range=spans[0], color=marks.COLORS[0], gid="x")
        beside.hist(rows["y"], bins=40, range=spans[1], color=marks.COLORS[0], orientation="horizontal")
    else:
        marks.say_nothing(axes)
    axes.set(xlabel=names[0].replace(BEFORE_UNIT, ""), ylabel=names[1].replace(BEFORE_UNIT, ""), xlim=spans[0], ylim=spans[1])
    marks.bare(axes)
    for side, hidden, label in ((above, "x", "y"), (beside, "y", "x")):
        marks.bare(side)
        side.tick_params(axis="x" if hidden == "x" else "y", labelbottom=hidden != "x", labelleft=hidden != "y")
        (side.set_ylabel if label == "y" else side.set_xlabel)("tokens", fontsize=8)
    words = [f"{len(rows):,} tokens in {rows['seq'].nunique():,} sequences of {rows['doc'].nunique():,} documents"]
    words += [left_out] if left_out else []
    return canvas.finish(f"{shown[1]} and {shown[0]}, layer {layer}" if title is None else title, "; ".join(words))


def _pairs(
    table: pd.DataFrame, x: str, y: str, layer: int, x_scale: str, y_scale: str, labels: marks.Words
) -> tuple[pd.DataFrame, tuple[str, str], str]:
    """Rows `x, y, seq, doc` with both values, the words for the axes, and what was left out."""
    held = layer_of(table, [x, y, "seq", "doc"], layer)
    rows = pd.DataFrame({"x": numbers_of(held, x), "y": numbers_of(held, y), "seq": held["seq"], "doc": held["doc"]})
    names, notes = [], []
    for name, column, scale in (("x", x, x_scale), ("y", y, y_scale)):
        if scale not in ("linear", "log", "rank"):
            raise TableError(f'expected a scale "linear", "log" or "rank", got {scale!r}.')
        title = axis_words(table, column, labels)
        if scale == "log":
            negative = int((rows[name] <= 0).sum())
            rows[name] = np.log10(rows[name].where(rows[name] > 0))
            notes += [f"{negative:,} values of {column} at or below 0 have no logarithm"] if negative else []
            title = f"log10 {title}"
        names.append(f"{marks.named(column, labels)}\nrank within its sequence [share]" if scale == "rank" else title)
    there = np.isfinite(rows["x"]) & np.isfinite(rows["y"])
    if (~there).any():
        notes.insert(0, f"{int((~there).sum()):,} tokens without both values left out")
    rows = rows[there].reset_index(drop=True)
    for name, scale in (("x", x_scale), ("y", y_scale)):
        if scale == "rank":
            grouped = rows.groupby("seq")[name]
            rows[name] = grouped.rank() / (grouped.transform("size") + 1)
    return rows, (names[0], names[1]), "; ".join(notes)


def _span(values: pd.Series) -> tuple[float, float]:
    """Ends of an axis; never of no width."""
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    wide = (high - low) * 0.03 or abs(low) * 0.5 or 0.5
    return low - wide, high + wide


def _lines(
    rows: pd.DataFrame, n_resamples: int, seed: int
) -> tuple[float, float, Float[np.ndarray, " resamples"], Float[np.ndarray, " resamples"]]:
    """Slope and intercept of least squares, and those of resampled documents, from each document's sums."""
    codes, _ = pd.factorize(rows["doc"])
    x, y = rows["x"].to_numpy(), rows["y"].to_numpy()
    scale = np.abs(x).max()
    x = x / scale
    sums = np.stack([np.bincount(codes, weights=part) for part in (np.ones_like(x), x, y, x * x, x * y)], 1)
    documents = len(sums)
    weights = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), n_resamples)

    def fit(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, sx, sy, sxx, sxy = total.T
        spread = n * sxx - sx * sx
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where(spread > 1e-12 * n * sxx, (n * sxy - sx * sy) / spread, np.nan)
        return slope, (sy - slope * sx) / n

    slope, intercept = fit(sums.sum(0)[None])
    slopes, intercepts = fit(weights @ sums)
    known = np.isfinite(slopes)
    return float(slope[0] / scale), float(intercept[0]), slopes[known] / scale, intercepts[known]
