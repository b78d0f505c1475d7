"""Sizes and ranks as a codec has them: compressors side by side, sizes along a text, shares of ranks."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from basin_lens.errors import TableError
from basin_lens.views import marks
from basin_lens.views.canvas import Canvas, drawn

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_INCHES = (8, 2.8)
_NAME, _SMALL = 9, 8  # points


@drawn
def size_bars(
    table: pd.DataFrame,
    *,
    column: str = "bits_per_byte",
    title: str | None = "Bits per byte",
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """Sizes of one text under several coders, smallest first; those of the model in another color and hatched.

    Args:
        table: one row per coder: `coder`, `kind` ("model" or "general") and `column`; as from `basin_lens.codec.bench`.
        column: what is drawn.
        title: above the figure; None: none.
        labels: words to show in place of names of coders and of the column.
        ax: matplotlib Axes to draw in; None: a new figure.

    Raises:
        TableError: a column is missing, or nothing to draw.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> sizes = pd.DataFrame({"coder": ["direct", "xz -9e"], "kind": ["model", "general"], "bits_per_byte": [1.0, 2.5]})
        >>> type(bl.views.size_bars(sizes)).__name__
        'Figure'
    """
    missing = [name for name in ("coder", "kind", column) if name not in table]
    if missing:
        raise TableError(f"expected columns coder, kind and {column}, got none of {missing}. Use basin_lens.codec.bench.")
    shown = table.dropna(subset=[column]).sort_values(column, kind="stable", ascending=False)
    if shown.empty:
        raise TableError(f"expected a size to draw, got no value in {column}.")
    canvas = Canvas.of(ax, (7, 0.34 * len(shown) + 1.2))
    axes = canvas.axes()
    own = (shown["kind"] == "model").tolist()
    bars = axes.barh(
        [marks.named(name, labels) for name in shown["coder"]],
        shown[column],
        color=[marks.COLORS[0] if mine else "#c8ccd0" for mine in own],
        hatch=["//" if mine else "" for mine in own],
        edgecolor="#ffffff",
    )
    axes.bar_label(bars, [f"{value:.3f}" for value in shown[column]], padding=3, fontsize=8)
    axes.set_xlabel(marks.plain((labels or {}).get(column, column.replace("_", " "))))
    axes.margins(x=0.12)
    marks.bare(axes)
    return canvas.finish(title or "", "blue and hatched: with the model; gray: general compressors")


@drawn
def growth_lines(growth: pd.DataFrame) -> Figure:
    """Bytes of the compressed prefix against bytes of the prefix, a line for each coder, named at its end.

    Args:
        growth: sizes of prefixes in bytes: `original`, and a column for each coder.
    """
    coders = [str(name) for name in growth if name != "original"]
    figure = Canvas.of(None, _INCHES).figure
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.085, 0.17, 0.68, 0.75))
    top = float(growth[coders].to_numpy().max()) or 1.0
    axes.set_xlim(0, float(growth["original"].max()) or 1.0)
    axes.set_ylim(0, top)
    height = 72 * _INCHES[1] * 0.75
    ends = _apart([height * (1 - float(growth[name].iloc[-1]) / top) for name in coders], 1.3 * _NAME)
    for index, (name, end) in enumerate(zip(coders, ends, strict=True)):
        look = marks.Look.at(index)
        style = ("-", "--", ":")[index % 3]
        axes.plot(growth["original"], growth[name], color=look.color, linestyle=style, linewidth=1.8, clip_on=False)
        axes.annotate(
            f"{marks.plain(name, 24)} {growth[name].iloc[-1]:,.0f}",
            (1, 1),
            (5, -end),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=_NAME,
            color=look.color,
        )
    axes.set_xlabel("bytes of text", fontsize=_NAME)
    axes.set_ylabel("bytes compressed", fontsize=_NAME)
    _finish(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    return figure


@drawn
def rank_bars(ranks: Int[np.ndarray, " tokens"], law: Float[np.ndarray, " ranks"] | None = None) -> Figure:
    """Share of tokens with a rank in each range, of doubling width; a law's shares as a line.

    Args:
        ranks: of each token; 0 is the model's first choice.
        law: probability of each rank; None: no line.
    """
    names, shares, expected = rank_shares(ranks, law)
    canvas = Canvas.of(None, _INCHES)
    axes = canvas.axes()
    bars = axes.bar(range(len(shares)), shares, color=marks.COLORS[0], width=0.88)
    halo = withStroke(linewidth=2.5, foreground="white")  # readable over the line
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2, fontsize=_SMALL, path_effects=[halo], zorder=3)
    if expected:
        axes.plot(range(len(expected)), expected, color=marks.COLORS[1], linewidth=1.8)
    axes.set_xticks(range(len(names)), names)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("rank", fontsize=_NAME)
    axes.set_ylabel("share of tokens", fontsize=_NAME)
    _finish(axes)
    return canvas.figure


def rank_shares(
    ranks: Int[np.ndarray, " tokens"], law: Float[np.ndarray, " ranks"] | None = None
) -> tuple[list[str], list[float], list[float]]:
    """Names of the ranges of ranks (0, 1, 2 to 3, 4 to 7 and so on), the share of tokens in each, and the law's share.

    The last is empty without a law.
    """
    most = max(int(ranks.max()), 1)
    edges = [0, *(2**power for power in range(most.bit_length() + 1))]
    shares = np.histogram(ranks, edges)[0] / len(ranks)
    names = []
    for low, above in itertools.pairwise(edges):
        power = str(low.bit_length() - 1).translate(_RAISED)
        names.append(str(low) if above == low + 1 else f"{low}+" if low < 1024 else f"2{power}+")
    expected = [] if law is None else [float(law[low:above].sum()) for low, above in itertools.pairwise(edges)]
    return names, shares.tolist(), expected


def _finish(axes: Axes) -> None:
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _apart(places: Sequence[float], least: float) -> list[float]:
    """Distances of labels from the top in the same order, no two closer than `least`; the highest stays where it is."""
    moved, above = list(places), -float("inf")
    for index in sorted(range(len(moved)), key=moved.__getitem__):
        moved[index] = above = max(moved[index], above + least)
    return moved
