"""How scores move over depth."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from basin_lens import tables

# Okabe-Ito: told apart by color-blind readers; line styles carry the difference in print.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")


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
    columns = [column] if isinstance(column, str) else list(column)
    summary = tables.layer_summary(table, columns)
    facts = tables.scores(table)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(columns):
        color, style = _COLORS[index % len(_COLORS)], _STYLES[index % len(_STYLES)]
        banded = bool(summary[f"{name}_low"].notna().any())
        label = name if banded else f"{name} (one document: no interval)"
        axes.plot(summary["layer"], summary[f"{name}_mean"], style, color=color, marker="o", markersize=3, label=label)
        if banded:
            axes.fill_between(
                summary["layer"], summary[f"{name}_low"], summary[f"{name}_high"], color=color, alpha=0.2, linewidth=0
            )
    lows = [float(np.nanmin(summary[f"{name}_mean"])) for name in columns if summary[f"{name}_mean"].notna().any()]
    highs = [float(np.nanmax(summary[f"{name}_mean"])) for name in columns if summary[f"{name}_mean"].notna().any()]
    if lows and min(lows) < 0 < max(highs):
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
    units = list(dict.fromkeys(facts[name]["unit"] for name in columns if name in facts))
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{columns[0] if len(columns) == 1 else 'score'} [{', '.join(units)}]")
    documents = int(summary["n_documents"].max())
    axes.set_title(
        f"mean over {documents} document{'s' * (documents != 1)}, {int(summary['n_sequences'].max())} sequences; "
        "band: 95 % interval over documents",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    if len(columns) > 1 or not summary[f"{columns[0]}_low"].notna().any():
        axes.legend(frameon=False, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
