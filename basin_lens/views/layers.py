"""How scores and results move over depth, and over depth and position."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.values import Layers
from basin_lens.views import marks
from basin_lens.views.canvas import Canvas, drawn
from basin_lens.views.limits import Line, bound, chosen_layers, layer_ticks, near

_MOST_COLUMNS = 64  # of a position map: more would be thinner than a reader can see
_MOST_LINES = 28  # look different
# Pointed ends of a color bar, by whether there are values below and above it.
_ENDS = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
_ASIDE = 0.32  # of the way to the next layer, that all lines of one take


@drawn
def layer_curve(
    table: pd.DataFrame,
    column: str | Sequence[str] | None = None,
    *,
    layers: Layers = None,
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """Mean of one or more scores at each layer, with the 95 % interval over documents; a line for each score and run.

    Where few layers are so far from the others that they would flatten the curve (often layer 0), the axis ends before them: arrows
    at its edge and the line below say which and how far.

    Args:
        table: from `analyze`, or several of them from `tables.concat`; or from `compare`, of runs with the same layers.
        column: a score, or several of one unit; None: `difference`, of a table from `compare`.
        layers: which layers; None: all of the table.
        title: above the figure; None: none.
        labels: words to show in place of names of columns and runs.
        ax: matplotlib Axes to draw in; None: a new figure.

    Returns:
        a matplotlib Figure. The band is Student's t over document means; it is absent with fewer than two documents, and the
        legend says so. Layers without a value are gaps.

    Raises:
        TableError: no such column or layer, or more than 28 lines.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, ["The cat sat.", "The dog ran."], [bl.analyzers.StateNorm()], layers=[0, 1], progress=False)
        >>> bl.views.layer_curve(table, "state_norm").axes[0].get_xlabel()
        'layer'
    """
    names = _columns(table, column)
    table = chosen_layers(table, layers)
    tables.require(table, *names)
    canvas = Canvas.of(ax, (7, 3.8))
    axes = canvas.axes()
    curves = _curves(table, names, labels)
    for index, curve in enumerate(curves):
        look = marks.Look.at(index)
        at = curve.summary["layer"]
        axes.plot(
            at, curve.of("mean"), look.style, color=look.color, marker=look.shape, markersize=3.5, label=curve.label, gid="mean"
        )
        if curve.banded:
            axes.fill_between(at, curve.of("low"), curve.of("high"), color=look.color, alpha=0.2, linewidth=0)
    beyond = bound(axes, [curve.line(marks.Look.at(i).color, len(curves) > 1) for i, curve in enumerate(curves)])
    means = np.concatenate([curve.of("mean") for curve in curves])
    if np.isfinite(means).any() and np.nanmin(means) < 0 < np.nanmax(means):
        axes.axhline(0, color=marks.GRAY, linewidth=0.8, zorder=0)
    if not np.isfinite(means).any():
        marks.say_nothing(axes)
    axes.set_xlabel("layer")
    units = list(dict.fromkeys(unit for name in names if (unit := _unit(table, name))))
    words = marks.named(names[0], labels) if len(names) == 1 else "score"
    axes.set_ylabel(words + (f" [{marks.plain(', '.join(units))}]" if units else ""))
    layer_ticks(axes, table["layer"].tolist())
    marks.bare(axes)
    if len(curves) > 1 or not curves[0].banded:
        axes.legend(frameon=False, fontsize=8)
    return canvas.finish(title or "", "; ".join(part for part in (_counted(curves), beyond) if part))


@dataclass(frozen=True)
class _Curve:
    """One score of one run, by layer."""

    name: str
    label: str
    banded: bool
    summary: pd.DataFrame
    documents: int
    sequences: int

    def of(self, what: str) -> Float[np.ndarray, " layers"]:
        return self.summary[f"{self.name}_{what}"].to_numpy(float)

    def line(self, color: str, is_named: bool) -> Line:
        """As what may lie beyond the axis."""
        at = self.summary["layer"].to_numpy()
        return Line(self.label if is_named else "", at, at, self.of("mean"), self.of("low"), self.of("high"), color)


def _columns(table: pd.DataFrame, column: str | Sequence[str] | None) -> list[str]:
    if column is not None and (names := marks.names_of(column)):
        return names
    if column is None and marks.compared(table):
        return ["difference"]
    raise TableError(f"expected the name of a score, got {column!r}; the table has {list(tables.columns(table))}. Name one.")


def _unit(table: pd.DataFrame, name: str) -> str:
    base = marks.compared(table)
    return marks.unit_of(table, base if base and name in ("difference", f"{base}_a", f"{base}_b") else name)


def _curves(table: pd.DataFrame, names: Sequence[str], labels: marks.Words) -> list[_Curve]:
    """A curve for each score of each run."""
    parts = [("", table)]
    if "run" in table and table["run"].nunique() != 1:
        called = _run_names(table, labels)
        parts = [(called[run], tables.select(table, table["run"] == run)) for run in dict.fromkeys(table["run"])]
    if len(parts) * len(names) > _MOST_LINES:
        raise TableError(f"expected at most {_MOST_LINES} lines, got {len(parts) * len(names)}. Choose some scores or runs.")
    found = []
    for run, part in parts:
        summary = tables.layer_summary(part, names)
        # Of a sample of the tokens, not every text has one.
        there = part[list(names)].notna().any(axis=1)
        counted = tables.layer_summary(tables.select(part, there), names) if there.any() and not there.all() else summary
        sizes = int(counted["n_documents"].max()), int(counted["n_sequences"].max())
        for name in names:
            banded = bool(summary[f"{name}_low"].notna().any())
            words = [marks.named(name, labels)] if len(names) > 1 or not run else []
            label = ", ".join([*words, *([run] if run else [])])
            found.append(_Curve(name, label if banded else f"{label} (one document: no interval)", banded, summary, *sizes))
    return found


def _run_names(table: pd.DataFrame, labels: marks.Words) -> dict[str, str]:
    """Runs in the caller's words, else by their models where these differ, else by model and run."""
    known = tables.runs(table)
    every = list(dict.fromkeys(table["run"]))
    models = {run: str((known[run].model or {}).get("name", "")) if run in known else "" for run in every}
    apart = len(set(models.values())) == len(every) and all(models.values())
    own = {run: models[run] if apart else f"{models[run]}, run {run}".removeprefix(", ") for run in every}
    return {run: marks.named(run, labels) if str(run) in (labels or {}) else marks.plain(own[run]) for run in every}


def _counted(curves: Sequence[_Curve]) -> str:
    """What the means are of."""
    documents, sequences = (sorted({getattr(curve, name) for curve in curves}) for name in ("documents", "sequences"))
    one, two = ("–".join(f"{count:,}" for count in dict.fromkeys((held[0], held[-1]))) for held in (documents, sequences))
    words = f"mean over {one} document{'s' * (documents != [1])}, {two} sequence{'s' * (sequences != [1])}"
    return words + ("; band: 95 % interval over documents" if any(curve.banded for curve in curves) else "")


@drawn
def result_curve(
    results: pd.DataFrame,
    *,
    by: str | Sequence[str] | None = None,
    alpha: float = 0.05,
    layers: Layers = None,
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """What a test found at each layer: estimates with their intervals, one line per score, group or set of controls.

    Markers are filled where the corrected p is at most alpha, and open elsewhere. Lines are moved a little sideways, so that
    intervals do not hide one another, by less than a sixth of the way to the next layer. Layers without an estimate are gaps; the
    gray line is what no effect would give. Few layers far from the others are marked at the edge of the axis, as in `layer_curve`.

    Args:
        results: from `basin_lens.stats`, with a layer.
        by: column or columns with one line for each value; None: those that tell rows of one layer apart.
        alpha: level of the corrected p.
        layers: which layers; None: all of the results.
        title: above the figure; None: none.
        labels: words to show in place of names of scores and groups.
        ax: matplotlib Axes to draw in; None: a new figure.

    Returns:
        a matplotlib Figure; the line below it has the sample and what the bars are.

    Raises:
        TableError: missing columns, no rows, rows without a layer, or several rows for one layer of a line.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> results = pd.DataFrame({"layer": [0, 1], "score": "a", "estimate": [0.1, 0.3], "low": [0.0, 0.2], "high": [0.2, 0.4]})
        >>> bl.views.result_curve(results).axes[0].get_xlabel()
        'layer'
    """
    results = marks.checked(results, "layer")
    if results["layer"].isna().any():
        raise TableError("expected results of layers, got rows without a layer. Draw them with basin_lens.views.forest.")
    results["layer"] = results["layer"].astype(int)
    results = chosen_layers(results, layers)
    groups = marks.groups_of(results, by, ["layer"], labels)
    there = np.sort(results["layer"].unique())
    canvas = Canvas.of(ax, (8.2, 3.8 if len(groups) < 8 else 0.24 * len(groups) + 2))
    axes = canvas.axes()
    # All lines of a layer stay nearer to it than a sixth of the way to the next: a reader can tell whose they are.
    width = min(_ASIDE, 0.08 * (len(groups) - 1)) * (float(np.diff(there).min()) if len(there) > 1 else 1.0)
    shifts = np.linspace(-width / 2, width / 2, len(groups)) if len(groups) > 1 else np.zeros(1)
    marks.nulls(axes, results)
    looks, lines = [], []
    for index, ((name, part), shift) in enumerate(zip(groups, shifts, strict=True)):
        look = marks.Look.at(index)
        looks.append((name, look))
        # Every layer of the figure: a layer that this line lacks is a gap, not a shortcut.
        rows = part.set_index("layer").reindex(there)
        marks.draw(axes, there + shift, rows, look, alpha, size=4.5)
        middle, low, high = (rows[what].to_numpy(float) for what in ("estimate", "low", "high"))
        called = marks.plain(name) if len(groups) > 1 else ""
        lines.append(Line(called, there, there + shift, middle, low, high, look.color))
    beyond = bound(axes, lines)
    if not results["estimate"].notna().any():
        marks.say_nothing(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel(marks.wrapped(marks.effect_label(results, labels), 40))
    layer_ticks(axes, there.tolist())
    marks.bare(axes)
    marks.legend(axes, looks, results, alpha, beside=canvas.own)
    return canvas.finish(title or "", "; ".join(part for part in (marks.sample(results), beyond) if part))


@drawn
def position_map(
    table: pd.DataFrame,
    column: str,
    *,
    layers: Layers = None,
    title: str | None = None,
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """Mean of a score at each layer and position, over documents.

    Tokens are averaged within a sequence, sequences within a document, and then documents. Two-signed scores are blue above 0, red
    below and white at 0; others run from dark to bright. Cells far from all others (of an attention sink at position 0, say) do not
    set the scale, and of the others the colors end at the 2nd and 98th percentile; pointed ends of the color bar and the line below
    say what is beyond.

    Args:
        table: from `analyze`, of one run.
        column: a score.
        layers: which layers; None: all of the table.
        title: above the figure; None: the column's name; empty: none.
        labels: words to show in place of the column's name.
        ax: matplotlib Axes to draw in; None: a new figure.

    Returns:
        a matplotlib Figure. Positions without a value are hatched. More than 64 positions are drawn in bins of equal width.

    Raises:
        TableError: no such column, or several runs.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, ["The cat sat.", "The dog ran."], [bl.analyzers.StateNorm()], layers=[0, 1], progress=False)
        >>> bl.views.position_map(table, "state_norm").axes[0].get_xlabel()
        'position in the sequence [tokens]'
    """
    tables.require(table, column, "layer", "doc", "seq", "pos")
    if "run" in table and table["run"].nunique() != 1:
        raise TableError(f"expected a table of one run, got {table['run'].nunique()}. Choose one: table[table.run == ...].")
    if table.empty:
        raise TableError("expected a table with rows, got none. Check the filter before this call.")
    table = chosen_layers(table, layers)
    first, last = int(table["pos"].min()), int(table["pos"].max())
    step = -(-(last - first + 1) // _MOST_COLUMNS)
    value = table[column].astype(float).where(np.isfinite(table[column].astype(float)))
    held = pd.DataFrame({name: table[name] for name in ("layer", "doc", "seq")}).assign(value=value)
    means = _means(held.assign(bin=(table["pos"] - first) // step), (last - first) // step + 1)
    cells = np.ma.masked_invalid(means.to_numpy(float))
    canvas = Canvas.of(ax, (8.2, float(np.clip(1.9 + 0.14 * len(means), 2.6, 7))))
    axes = canvas.axes()
    edges = first + step * np.arange(cells.shape[1] + 1) - 0.5
    edges[-1] = min(edges[-1], last + 0.5)
    known = cells.compressed()
    two_signed = bool((held["value"] < 0).any() and (held["value"] > 0).any())
    low, high = _limits(known, two_signed)
    beyond = _ENDS[bool((known < low).any()), bool((known > high).any())]
    axes.patch.set(facecolor="#e6e6e6", edgecolor="#b5b5b5", hatch="////", linewidth=0)
    image = axes.pcolormesh(
        edges,
        np.arange(len(means) + 1) - 0.5,
        cells,
        cmap="RdBu" if two_signed else "cividis",
        vmin=low,
        vmax=high,
        rasterized=True,
    )
    if not len(known):
        marks.say_nothing(axes)
    bar = canvas.part.colorbar(image, ax=axes, extend=beyond, pad=0.015)
    unit = marks.plain(marks.unit_of(table, column) or "unit not known")
    bar.set_label(marks.wrapped(f"{marks.named(column, labels)} [{unit}]", 26), fontsize=8)
    bar.ax.tick_params(labelsize=8)
    axes.set_xlabel("position in the sequence [tokens]")
    axes.set_ylabel("layer")
    ticks = range(0, len(means), -(-len(means) // 12))
    axes.set_yticks(ticks, [str(means.index[tick]) for tick in ticks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    marks.bare(axes)
    counted = held[held["value"].notna()]
    words = [f"mean over {counted['doc'].nunique():,} documents, {counted['seq'].nunique():,} sequences (fewer in each cell)"]
    words += [f"positions in bins of {step}"] if step > 1 else []
    if beyond != "neither":
        words.append(_beyond(cells, first, step, low, high))
    if cells.mask.any():
        words.append("hatched: no value")
        _explain_hatching(axes)
    return canvas.finish(f"{column} by layer and position" if title is None else title, "; ".join(words))


def _beyond(cells: np.ma.MaskedArray, first: int, step: int, low: float, high: float) -> str:
    """Where the colors end, and how many cells are far beyond, how far, and where, if all stand at one position."""
    words = f"colors end at {marks.number(low)} and {marks.number(high)} (2nd and 98th percentile)"
    ends = near(cells.compressed())
    if ends is None:
        return words
    values = cells.filled(np.nan)
    far = (values < ends[0]) | (values > ends[1])
    places = np.flatnonzero(far.any(axis=0))
    span = " to ".join(dict.fromkeys((marks.number(float(values[far].min())), marks.number(float(values[far].max())))))
    where = ""
    if len(places) == 1:
        at = first + step * int(places[0])
        where = f" at position{f' {at}' if step == 1 else f's {at} to {at + step - 1}'}"
    count = int(far.sum())
    return f"{words}; far beyond: {count:,} cell{'s' * (count != 1)}{where} ({span})"


def _means(held: pd.DataFrame, bins: int) -> pd.DataFrame:
    """Mean of each layer and bin, over tokens of a sequence, then sequences of a document, then documents; NaN without a value."""
    by_sequence = held.groupby(["layer", "doc", "seq", "bin"], sort=True)["value"].mean()
    means = by_sequence.groupby(level=["layer", "doc", "bin"]).mean().groupby(level=["layer", "bin"]).mean().unstack("bin")
    return means.reindex(columns=range(bins))


def _explain_hatching(axes: Axes) -> None:
    axes.legend(
        handles=[Patch(facecolor="#e6e6e6", edgecolor="#b5b5b5", hatch="////", label="no value")],
        frameon=False,
        fontsize=8,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2,
    )


def _limits(known: np.ndarray, two_signed: bool) -> tuple[float, float]:
    """Ends of the color scale, of all cells but those far out: symmetric about 0 for two signs; never of no width."""
    if not len(known):
        return (-1.0, 1.0) if two_signed else (0.0, 1.0)
    if ends := near(known):
        known = known[(known >= ends[0]) & (known <= ends[1])]
    if two_signed:
        bound = float(np.percentile(np.abs(known), 98)) or float(np.abs(known).max()) or 1.0
        return -bound, bound
    low, high = (float(end) for end in np.percentile(known, (2, 98)))
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = float(known.min()), float(known.max())
    if low == high:
        wide = abs(low) or 1.0
        return low - 0.5 * wide, high + 0.5 * wide
    return low, high
