"""Axes that few far values do not flatten, and say what is beyond them; ticks at the layers that were measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.values import Layers, whole_or_none
from basin_lens.views import marks

_FEWEST = 5  # layers: of fewer, none can be called far from the others
_FAR = 3.0  # interquartile ranges beyond the quartiles: Tukey's "far out"
_MOST = 0.2  # share of values that may be beyond: of more, they are the curve
_GAIN = 3.0  # how many times as high the others must become
_MOST_NAMED = 4


@dataclass(frozen=True)
class Line:
    """A line over depth as it is drawn: one entry per layer, NaN for a gap; `name` is empty if it is the only one."""

    name: str
    layers: np.ndarray
    place: np.ndarray
    middle: Float[np.ndarray, " layers"]
    low: Float[np.ndarray, " layers"]
    high: Float[np.ndarray, " layers"]
    color: str


def near(values: np.ndarray) -> tuple[float, float] | None:
    """Ends of all values but few that are far out; None where none are, or too many.

    Source: Tukey, Exploratory Data Analysis (1977): far out is beyond 3 interquartile ranges from the quartiles.
    """
    known = values[np.isfinite(values)]
    if len(known) < _FEWEST:
        return None
    first, last = np.percentile(known, (25, 75))
    wide = _FAR * (last - first)
    inside = known[(known >= first - wide) & (known <= last + wide)]
    if wide == 0 or len(inside) == len(known) or len(inside) < (1 - _MOST) * len(known):
        return None
    return float(inside.min()), float(inside.max())


def bound(axes: Axes, lines: Sequence[Line]) -> str:
    """End the y axis where few layers would flatten all others, mark them at its edge, and say in words which they are.

    A line is never hidden as a whole: what is far is far from the rest of its own line.

    Returns:
        the words; empty if the axis holds all.
    """
    hulls = []
    for line in lines:
        every = np.concatenate([line.middle, line.low, line.high])
        known = every[np.isfinite(every)]
        if not len(known):
            continue
        ends = near(every) if np.isfinite(line.middle).sum() >= _FEWEST else None
        hulls.append((*(ends or (known.min(), known.max())), known.min(), known.max()))
    if not hulls:
        return ""
    low, high, least, most = (float(end) for end in (*_outer(hulls, 0), *_outer(hulls, 2)))
    if most - least < _GAIN * (high - low) or high == low:
        return ""
    margin = 0.08 * (high - low)
    low, high = low - margin, high + margin
    axes.set_ylim(low, high)
    words, cut = [], []
    for line in lines:
        for side, beyond, edge in (("v", line.middle < low, low), ("^", line.middle > high, high)):
            if beyond.any():
                axes.plot(
                    line.place[beyond],
                    np.full(int(beyond.sum()), edge),
                    side,
                    color=line.color,
                    markersize=7,
                    clip_on=False,
                    zorder=5,
                    gid="beyond",
                )
            named = f" of {line.name}" if line.name else ""
            words += [f"layer {line.layers[i]}{named} ({marks.number(line.middle[i])})" for i in np.flatnonzero(beyond)]
        held = (line.middle >= low) & (line.middle <= high) & ((line.low < low) | (line.high > high))
        cut += [f"layer {line.layers[i]}" for i in np.flatnonzero(held)]
    said = [f"arrows, beyond the axis: {_some(words)}"] if words else []
    said += [f"cut at the axis: the interval at {_some(list(dict.fromkeys(cut)))}"] if cut else []
    return "; ".join(said)


def _outer(hulls: Sequence[tuple[float, ...]], at: int) -> tuple[float, float]:
    return min(hull[at] for hull in hulls), max(hull[at + 1] for hull in hulls)


def _some(words: Sequence[str]) -> str:
    more = len(words) - _MOST_NAMED
    return ", ".join(words[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    """Ticks at the layers that were measured, as many with numbers as there is room for, with faint lines to follow."""
    held = sorted(dict.fromkeys(int(layer) for layer in layers))
    room = axes.get_window_extent().width / axes.get_figure().dpi * 72  # type: ignore[union-attr]
    least = (7.0 * max(len(str(layer)) for layer in held) + 8) * (max(held) - min(held)) / max(room, 1.0)
    shown = held[:1]
    for layer in held[1:]:
        if layer - shown[-1] >= least:
            shown.append(layer)
    if shown[-1] != held[-1]:  # first and last are always named
        shown = [*(shown[:-1] or shown), held[-1]]
    axes.set_xticks(shown, [str(layer) for layer in shown])
    axes.set_xticks([layer for layer in held if layer not in shown], minor=True)
    axes.grid(axis="x", which="both", color="#eceff1", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def chosen_layers(table: pd.DataFrame, layers: Layers) -> pd.DataFrame:
    """The rows of some layers; None: all.

    Raises:
        TableError: a layer that the table does not have, or none.
    """
    tables.require(table, "layer")
    if layers is None:
        return table
    given = list(layers) if not isinstance(layers, str) and np.iterable(layers) else [layers]
    wanted = [whole_or_none(layer) for layer in given]
    there = sorted(table["layer"].dropna().unique().tolist())
    if not wanted or any(layer not in there for layer in wanted):
        raise TableError(f"expected layers of the table, got {given}; it has {there}. Choose some of them.")
    return tables.select(table, table["layer"].isin(wanted))
