"""How scores and results move over depth, and over depth and position."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.views import marks

_MOST_COLUMNS = 64  # of a position map: more would be thinner than a reader can see


def layer_curve(table: pd.DataFrame, column: str | Sequence[str]) -> Figure:
    """Mean of one or more scores at each layer, with the 95 % interval over documents.

    Args:
        table: from `analyze`, of one run.
        column: a score, or several of one unit.

    Returns:
        a matplotlib Figure. The band is Student's t over document means; it is absent with fewer than two documents, and the
        legend says so. Layers without a value are gaps.

    Raises:
        TableError: no such column, or several runs.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, ["The cat sat.", "The dog ran."], [bl.analyzers.StateNorm()], layers=[0, 1], progress=False)
        >>> bl.views.layer_curve(table, "state_norm").axes[0].get_xlabel()
        'layer'
    """
    columns = marks.names_of(column)
    summary = tables.layer_summary(table, columns)
    facts = tables.scores(table)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(columns):
        look = marks.Look.at(index)
        banded = bool(summary[f"{name}_low"].notna().any())
        label = name if banded else f"{name} (one document: no interval)"
        axes.plot(
            summary["layer"],
            summary[f"{name}_mean"],
            look.style,
            color=look.color,
            marker=look.shape,
            markersize=3,
            label=marks.plain(label),
        )
        if banded:
            axes.fill_between(
                summary["layer"], summary[f"{name}_low"], summary[f"{name}_high"], color=look.color, alpha=0.2, linewidth=0
            )
    lows = [float(np.nanmin(summary[f"{name}_mean"])) for name in columns if summary[f"{name}_mean"].notna().any()]
    highs = [float(np.nanmax(summary[f"{name}_mean"])) for name in columns if summary[f"{name}_mean"].notna().any()]
    if lows and min(lows) < 0 < max(highs):
        axes.axhline(0, color=marks.GRAY, linewidth=0.8, zorder=0)
    units = list(dict.fromkeys(facts[name]["unit"] for name in columns if name in facts))
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{columns[0] if len(columns) == 1 else 'score'} [{', '.join(units)}]")
    # Of a sample of the tokens, not every text has one.
    there = table[columns].notna().any(axis=1)
    counted = tables.layer_summary(tables.select(table, there), columns) if there.any() and not there.all() else summary
    documents = int(counted["n_documents"].max())
    axes.set_title(
        f"mean over {documents} document{'s' * (documents != 1)}, {int(counted['n_sequences'].max())} sequences; "
        "band: 95 % interval over documents",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    if len(columns) > 1 or not summary[f"{columns[0]}_low"].notna().any():
        axes.legend(frameon=False, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def result_curve(
    results: pd.DataFrame, *, by: str | Sequence[str] | None = None, alpha: float = 0.05, title: str | None = None
) -> Figure:
    """What a test found at each layer: estimates with their intervals, one line per score, group or set of controls.

    Markers are filled where the corrected p is at most alpha, and open elsewhere. Lines are moved a little sideways, so that
    intervals do not hide one another. Layers without an estimate are gaps; the gray line is what no effect would give.

    Args:
        results: from `basin_lens.stats`, with a layer.
        by: column or columns with one line for each value; None: those that tell rows of one layer apart.
        alpha: level of the corrected p.
        title: above the figure; None: none.

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
    groups = marks.groups_of(results, by, ["layer"])
    layers = np.sort(results["layer"].unique())
    figure = Figure(figsize=(8.2, 3.8 if len(groups) < 8 else 0.24 * len(groups) + 2), layout="constrained")
    axes = figure.add_subplot()
    # Neighboring layers stay apart: all lines of a layer within half of the way to the next.
    width = min(0.5, 0.13 * (len(groups) - 1)) * (float(np.diff(layers).min()) if len(layers) > 1 else 1.0)
    shifts = np.linspace(-width / 2, width / 2, len(groups)) if len(groups) > 1 else np.zeros(1)
    marks.nulls(axes, results)
    looks = []
    for index, ((name, part), shift) in enumerate(zip(groups, shifts, strict=True)):
        look = marks.Look.at(index)
        looks.append((name, look))
        # Every layer of the figure: a layer that this line lacks is a gap, not a shortcut.
        drawn = part.set_index("layer").reindex(layers)
        marks.draw(axes, layers + shift, drawn, look, alpha, size=4.5)
    if not results["estimate"].notna().any():
        marks.say_nothing(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel(marks.wrapped(marks.effect_label(results), 40))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    marks.bare(axes)
    marks.legend(axes, looks, results, alpha)
    marks.finish(figure, title or "", marks.sample(results))
    return figure


def position_map(table: pd.DataFrame, column: str) -> Figure:
    """Mean of a score at each layer and position, over documents.

    Tokens are averaged within a sequence, sequences within a document, and then documents. Two-signed scores are blue above 0, red
    below and white at 0; others run from dark to bright. Colors end at the 2nd and 98th percentile of what is drawn, so that one
    extreme position does not bleach the rest; pointed ends of the color bar say that there are values beyond.

    Args:
        table: from `analyze`, of one run.
        column: a score.

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
    first, last = int(table["pos"].min()), int(table["pos"].max())
    step = -(-(last - first + 1) // _MOST_COLUMNS)
    value = table[column].astype(float).where(np.isfinite(table[column].astype(float)))
    held = pd.DataFrame({name: table[name] for name in ("layer", "doc", "seq")}).assign(value=value)
    means = _means(held.assign(bin=(table["pos"] - first) // step), (last - first) // step + 1)
    cells = np.ma.masked_invalid(means.to_numpy(float))
    figure = Figure(figsize=(8.2, float(np.clip(1.9 + 0.14 * len(means), 2.6, 7))), layout="constrained")
    axes = figure.add_subplot()
    edges = first + step * np.arange(cells.shape[1] + 1) - 0.5
    edges[-1] = min(edges[-1], last + 0.5)
    known = cells.compressed()
    two_signed = bool((held["value"] < 0).any() and (held["value"] > 0).any())
    low, high = _limits(known, two_signed)
    beyond = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[
        (bool((known < low).any()), bool((known > high).any()))
    ]
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
    described = tables.columns(table).get(column)
    bar = figure.colorbar(image, ax=axes, extend=beyond, pad=0.015)
    bar.set_label(marks.wrapped(marks.plain(f"{column} [{described.unit if described else 'unit not known'}]"), 26), fontsize=8)
    bar.ax.tick_params(labelsize=8)
    axes.set_xlabel("position in the sequence [tokens]")
    axes.set_ylabel("layer")
    ticks = range(0, len(means), -(-len(means) // 12))
    axes.set_yticks(ticks, [str(means.index[tick]) for tick in ticks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    marks.bare(axes)
    counted = held[held["value"].notna()]
    words = [f"mean over {counted['doc'].nunique():,} documents, {counted['seq'].nunique():,} sequences (fewer in each cell)"]
    if step > 1:
        words.append(f"positions in bins of {step}")
    if beyond != "neither":
        words.append("colors end at the 2nd and 98th percentile")
    if cells.mask.any():
        words.append("hatched: no value")
        _explain_hatching(axes)
    marks.finish(figure, f"{column} by layer and position", "; ".join(words))
    return figure


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
    """Ends of the color scale: symmetric about 0 for two signs; never of no width."""
    if not len(known):
        return (-1.0, 1.0) if two_signed else (0.0, 1.0)
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
