"""Marks that can be told apart in print and without color, and the words that stand beside them."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.values import is_missing, units_said
from basin_lens.views.canvas import SOFT, plain

# Okabe-Ito: told apart by color-blind readers; line styles and marker shapes carry the difference in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
GRAY = "#888888"

# What a caller wants shown in place of the names of columns, scores and runs; other names stay.
Words = Mapping[str, str] | None

# What tells the rows of a result table apart.
CASE = ("layer", "score", "against", "group", "tag", "quartile", "metric", "versus", "term", "controls", "effect", "test")
# Effects in the unit of the score; others (correlations, areas, standardized slopes) are pure numbers.
_IN_UNITS = ("mean", "mean difference", "deviation from the sequence mean")


@dataclass(frozen=True)
class Look:
    """How one line or group is drawn: no two of the first 28 look the same, with or without color."""

    color: str
    style: Literal["-", "--", "-.", ":"]
    shape: str

    @classmethod
    def at(cls, index: int) -> "Look":
        """The look of the index-th line."""
        # Four styles and seven colors: after seven lines the style has moved on.
        return cls(COLORS[index % len(COLORS)], STYLES[index % len(STYLES)], SHAPES[index % len(SHAPES)])


def number(value: float, digits: int = 3) -> str:
    """A number with a few significant digits; an en dash where there is none.

    Example:
        >>> from basin_lens.views.marks import number
        >>> number(1234.5), number(0.000012345), number(float("nan"))
        ('1,230', '1.23e-05', '–')
    """
    if not np.isfinite(value):
        return "–" if np.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    # Rounded first: 999.96 is 1,000 and not 1e+03.
    rounded = float(f"{value:.{digits - 1}e}")
    if 1e-4 <= abs(rounded) < 1e7:
        places = max(0, digits - 1 - int(np.floor(np.log10(abs(rounded)))))
        shown = f"{rounded:,.{places}f}"
        return (shown.rstrip("0").rstrip(".") if "." in shown else shown).replace("-", "−")
    return f"{rounded:.{digits - 1}e}".replace("-", "−", 1) if rounded < 0 else f"{rounded:.{digits - 1}e}"


def probability(p: float) -> str:
    """A p-value to read.

    Example:
        >>> from basin_lens.views.marks import probability
        >>> probability(0.03214), probability(1e-9)
        ('0.0321', '< 0.0001')
    """
    if not np.isfinite(p):
        return "–"
    return "< 0.0001" if p < 1e-4 else number(p)


def checked(results: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Result rows to draw, numbers as numbers.

    Raises:
        TableError: a column is missing, or there is no row.
    """
    tables.require(results, "estimate", "low", "high", *columns)
    if results.empty:
        raise TableError("expected results with at least one row, got none. Check the filter before this call.")
    answer = results.reset_index(drop=True)
    for name in ("estimate", "low", "high", "null", "p", "p_corrected"):
        if name in answer:
            answer[name] = pd.to_numeric(answer[name]).astype(float)
    return answer


def named(name: object, labels: Words) -> str:
    """A column, score or run in the words that the caller gave it, or its own name, as `plain` has it."""
    return plain((labels or {}).get(str(name), name))


def names_of(columns: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [columns] if isinstance(columns, str) else list(columns)


def groups_of(
    results: pd.DataFrame, by: str | Sequence[str] | None, keys: Sequence[str], labels: Words = None
) -> list[tuple[str, pd.DataFrame]]:
    """Rows by line, with the words for its legend. `by=None`: the columns that tell rows of the same `keys` apart.

    Raises:
        TableError: rows that `keys` and `by` do not tell apart.
    """
    if by is None:
        repeated = results.duplicated(list(keys)).any()
        names = [c for c in CASE if repeated and c in results and c not in keys and results[c].nunique(dropna=False) > 1]
    else:
        names = names_of(by)
        tables.require(results, *names)
    twice = results.duplicated([*keys, *names], keep=False)
    if twice.any():
        first = results.loc[twice, list(keys)].iloc[0].to_dict()
        apart = [c for c in CASE if c in results and results.loc[twice, c].nunique(dropna=False) > 1 and c not in names]
        raise TableError(
            f"expected one row for each of {', '.join([*keys, *names])}, got {int(twice.sum())} rows that share theirs, the first "
            f"at {first}. Pass by={[*names, *apart]!r}, or choose rows first."
        )
    if not names:
        return [("", results)]
    found = results.groupby(names, sort=False, dropna=False)
    return [(described(dict(zip(names, key, strict=True)), labels), part) for key, part in found]


def described(values: Mapping[str, object], labels: Words = None) -> str:
    """Values of label columns in words.

    Example:
        >>> from basin_lens.views.marks import described
        >>> described({"score": "compression", "controls": ""})
        'compression, no controls'
    """
    words = []
    for name, value in values.items():
        if str(value) in (labels or {}):
            words.append((labels or {})[str(value)])
        elif name == "controls":
            words.append(f"given {value}" if isinstance(value, str) and value else "no controls")
        elif not is_missing(value):
            words.append(f"layer {value}" if name == "layer" else str(value))
    return ", ".join(words) or "–"


def survived(results: pd.DataFrame, alpha: float) -> Bool[np.ndarray, " rows"] | None:
    """Which rows have a corrected p of at most alpha; None: the results have no corrected p at all."""
    if "p_corrected" not in results:
        return None
    return np.asarray(results["p_corrected"].to_numpy(float) <= alpha)


def draw(
    axes: Axes,
    place: np.ndarray,
    results: pd.DataFrame,
    look: Look,
    alpha: float,
    *,
    upright: bool = True,
    joined: bool = True,
    size: float = 5,
) -> None:
    """Estimates with their intervals: filled where significant after correction, open elsewhere; what is missing is a gap."""
    estimate, low, high = (results[name].to_numpy(float) for name in ("estimate", "low", "high"))
    there = np.isfinite(low) & np.isfinite(high)
    if there.any():
        bars = axes.vlines if upright else axes.hlines
        bars(place[there], low[there], high[there], color=look.color, linewidth=1.1, zorder=2).set_gid("interval")
    across, along = (place, estimate) if upright else (estimate, place)
    axes.plot(across, along, linestyle=look.style if joined else "none", color=look.color, linewidth=1.1, zorder=3, gid="estimate")
    filled = survived(results, alpha)
    filled = np.ones(len(results), bool) if filled is None else filled
    for chosen, face, name in ((filled, look.color, "filled"), (~filled, "white", "open")):
        axes.plot(
            across[chosen],
            along[chosen],
            look.shape,
            markersize=size,
            color=look.color,
            markerfacecolor=face,
            markeredgewidth=1.1,
            zorder=4,
            gid=name,
        )


def nulls(axes: Axes, results: pd.DataFrame, *, upright: bool = True) -> None:
    """The values that no effect would give, as gray lines."""
    if "null" in results:
        for value in np.unique(results["null"].dropna().to_numpy(float)):
            (axes.axhline if upright else axes.axvline)(value, color=GRAY, linewidth=0.9, zorder=1, gid="null")


def legend(
    axes: Axes, looks: Sequence[tuple[str, Look]], results: pd.DataFrame, alpha: float, *, joined: bool = True, beside: bool = True
) -> None:
    """What each line is, what filled and open markers are, and the gray line: beside the axes, or in them."""
    handles = [
        Line2D(
            [], [], color=look.color, linestyle=look.style if joined else "none", marker=look.shape, markersize=5, label=plain(name)
        )
        for name, look in looks
        if name
    ]
    if survived(results, alpha) is not None:
        marker = partial(Line2D, [], [], linestyle="none", marker="o", markersize=5, color="#444444")
        handles.append(marker(label=f"corrected p ≤ {alpha:g}"))
        handles.append(marker(markerfacecolor="white", label=f"corrected p > {alpha:g},\nor not tested"))
    if "null" in results and results["null"].notna().any():
        handles.append(Line2D([], [], color=GRAY, linewidth=0.9, label="no effect"))
    if handles:
        explain(axes, handles, beside=beside)


def explain(axes: Axes, handles: Sequence[Artist], *, beside: bool) -> None:
    """A legend: beside the axes of a figure made here; in a caller's axes, where their neighbors begin, inside."""
    if beside:
        axes.legend(
            handles=handles,
            frameon=False,
            fontsize=8,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0,
            handlelength=2.4,
        )
    else:
        axes.legend(handles=handles, frameon=True, framealpha=0.8, edgecolor="none", fontsize=8, loc="best", handlelength=2.4)


def wrapped(label: str, letters: int) -> str:
    """A label in lines of so many letters, words whole: one longer than its axis would be cut off."""
    return "\n".join(textwrap.wrap(label, letters, break_long_words=False, break_on_hyphens=False))


def effect_label(results: pd.DataFrame, labels: Words = None) -> str:
    """The name of the effect, of which score, and in which unit, as far as the rows agree."""
    there = results[results["estimate"].notna()] if "estimate" in results else results  # what was not tested has no axis
    effects = list(dict.fromkeys(there["effect"].dropna())) if "effect" in results else []
    scores = list(dict.fromkeys(results["score"].dropna())) if "score" in results else []
    label = " / ".join(map(str, effects)) if 0 < len(effects) <= 2 else "estimate"
    if len(scores) == 1:
        label += f" of {(labels or {}).get(str(scores[0]), scores[0])}"
    if effects and all(effect in _IN_UNITS for effect in effects):
        units = list(dict.fromkeys(unit for name in scores if (unit := unit_of(results, str(name)))))
        if units:
            label += f" [{', '.join(units)}]"
    return plain(label, 90)


def unit_of(results: pd.DataFrame, score: str) -> str:
    """The score's unit, from the provenance that results keep; empty where it is not known."""
    name = score.removesuffix("_after").removesuffix("_before")
    described = [run.column(name) for run in tables.runs(results).values()]
    return next((column.unit for column in described if column is not None), "")


def compared(table: pd.DataFrame) -> str:
    """The score that a table of `compare` pairs; empty for other tables."""
    if "difference" not in table or "run" in table:
        return ""
    return next((name[:-2] for name in table.columns if name.endswith("_a") and f"{name[:-2]}_b" in table.columns), "")


def sample(results: pd.DataFrame) -> str:
    """How much was tested and what the bars and p-values are, in one sentence."""
    parts = []
    counts = [
        _counted(results[f"n_{noun}s"], noun) for noun in ("document", "sequence", "token") if f"n_{noun}s" in results.columns
    ]
    if counts:
        parts.append(", ".join(counts))
    units = [units_said(str(unit)) for unit in dict.fromkeys(results["unit"].dropna())] if "unit" in results else []
    if (results["low"].notna() & results["high"].notna()).any():
        parts.append("bars: 95 % interval" + (f" over {' or '.join(units)}" if units else ""))
    else:
        parts.append("no intervals")
    if "correction" in results and "n_tests" in results and "p" in results and results["p"].notna().any():
        kinds = results.loc[results["p"].notna(), ["correction", "n_tests"]].drop_duplicates()
        words = " or ".join(
            f"{'not corrected' if kind == 'none' else f'corrected by {kind}'}, {int(tests):,} test{'s' * (tests != 1)}"
            for kind, tests in kinds.itertuples(index=False)
        )
        parts.append(f"p {words}" if len(kinds) <= 2 else "p corrected in several families")
    return "; ".join(parts)


def _counted(values: pd.Series, noun: str) -> str:
    known = values.dropna()
    if known.empty:
        return f"no {units_said(noun)}"
    low, high = int(known.min()), int(known.max())
    return units_said(noun, high) if low == high else f"{low:,}–{units_said(noun, high)}"


def say_nothing(axes: Axes, why: str = "no values") -> None:
    """Say in the axes that there is nothing to see."""
    axes.text(0.5, 0.5, plain(why), transform=axes.transAxes, ha="center", va="center", fontsize=9, color=SOFT, gid="none")


def bare(axes: Axes) -> None:
    """No box around the data, small but legible letters."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
