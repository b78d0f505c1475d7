"""Two groups of texts, two kinds of tokens in the same texts, or the same texts before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats
from statsmodels.stats.meta_analysis import effectsize_smd
from statsmodels.stats.nonparametric import rank_compare_2indep

from basin_lens.errors import StudyError, TableError
from basin_lens.stats.covariates import chosen, varied
from basin_lens.stats.design import (
    FEWEST,
    FEWEST_PER_GROUP,
    Rows,
    constant,
    enough,
    names_of,
    refuse_constant,
    split,
    without_rounding,
)
from basin_lens.stats.projection import level, told_in_full, unexplained
from basin_lens.stats.results import (
    Correction,
    assemble,
    constant_line,
    constant_values,
    interval_and_p,
    joined,
    line,
    max_t_labels,
    max_t_signs,
    toned,
)
from basin_lens.values import whole_numbers

_SIZES = ("hedges_g", "hedges_g_low", "hedges_g_high", "cliff_delta", "cliff_delta_low", "cliff_delta_high")
# A unit counts where the controls leave at least this share of the variation of the groups: else they explain the groups there, but for rounding.
_LEAST = 1e-3
_BEND = 0.05
_IN_FULL = "the controls explain the groups or the score in full"


@whole_numbers(TableError)
def compare_groups(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    group: str,
    *,
    groups: Sequence[Any] | None = None,
    paired: bool = False,
    controls: Sequence[str] = (),
    frequency: Mapping[Any, float] | None = None,
    layers: Any = None,
    unit: str = "document",
    correction: Correction = "bh",
    n_resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Do two groups differ in a score? By permutation of whole units.

    Tokens are averaged within a sequence, sequences within a unit. Unpaired (memorized against novel texts): labels are exchanged between
    units; statistic: Welch's t. Paired (function against content words, or two spans, in the same texts): the difference within each
    sequence; signs of units are flipped.

    Args:
        table: from `analyze`, of one run, or from `compare` (score `difference`) with a label.
        scores: columns to test.
        group: label column; rows without a label are passed over.
        groups: two of its values, (first, second); None: its only two, True before False, else in order.
        paired: whether both groups are compared within each sequence.
        controls: standard controls (those that the table lacks are passed over) or columns of the table; the answer is the difference where
            they are equal. Unpaired: regression on the controls' unit means (curves where units suffice, 30 per control; else the note says so, and
            warns where the score bends with a control within texts), residuals permuted. Paired: regression of the score on the group,
            the controls, straight and smooth (as for `residuals`), and the sequences, over the tokens of both groups; the signs of
            the units' parts of the slope are flipped.
        frequency: as for `add_controls`.
        layers: which; None: all.
        unit: what is independent: `"sequence"`, `"document"` or a label.
        correction: over all rows of the answer; `"max-t"` permutes whole units for all rows at once.
        n_resamples: permutations; all of them if there are no more.
        seed: of the permutations.

    Returns:
        one row per (layer, score): mean difference first - second, in the score's unit, with Student's 95 % interval over units (Welch's if
        unpaired, cluster-robust if paired with controls) and the permutation p; `hedges_g` and `cliff_delta` with intervals, `n_first`,
        `n_second` (units). Unpaired, Hedges g is the standardized difference and Cliff's delta P(first > second) - P(first < second), both
        without controls; paired, g is the mean difference over the standard deviation of differences (its error times the root of the number of
        units), and delta the share of units above 0 less that below. Intervals that cannot be had, as Cliff's of groups that do not overlap,
        are NaN.

    Raises:
        TableError: several runs, missing columns, not two groups, constant columns, or none of the controls (paired). StudyError: fewer than 4
            units in a group (6 pairs), or unpaired groups that share a unit.

    Source: Chung and Romano 2013 (permutation of Welch's t, scipy); Freedman and Lane 1983 (with controls); paired with controls: Frisch and Waugh
        1933 (slope), Hemerik, Goeman and Finos 2020 (flipped scores), Bell and McCaffrey 2002 (interval); Hedges 1981, Cliff 1993 (statsmodels).

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> table = pd.DataFrame({"doc": np.repeat(range(20), 30), "seq": np.repeat(range(20), 30)})
        >>> table["member"] = table.doc < 10
        >>> table["a"] = 1.0 * table.member + rng.normal(size=600)
        >>> bool(bl.stats.compare_groups(table, "a", "member").p[0] < 0.001)
        True
    """
    names = names_of(scores)
    lines, columns = [], []
    label: dict[int, bool] = {}
    for score in names:
        with_them, there, note = chosen(table, controls, [score], frequency)
        if paired and len(controls) and not there:
            raise TableError(f"expected a table with at least one control, got none ({note}). Measure them, or name columns.")
        for every in split(with_them, [score, *there], layers=layers, unit=unit, labels=[group]):
            first, second, wording = two_groups(every, group, groups)
            rows = every.where(first | second).finite(score, *there)
            is_first = _is(rows.labels[group], first_value(every, group, groups))
            given = {"group": wording, "controls": ", ".join(there), **dict.fromkeys(_SIZES, np.nan)}
            test = "sign-flip permutation of paired differences" if paired else "permutation of labels (Welch t)"
            if paired and there:
                test = "sign-flip permutation of paired differences given the controls"
            if constant(rows.values[score]):
                lines.append(constant_line(rows, score, unit, test, "mean difference", score, **given))
                columns.append((np.empty(0, int), np.empty(0)))
                continue
            here, flat = varied(rows, there)
            said = [note, flat]
            if paired:
                rows, is_first = _shared(rows, is_first)
                enough(rows.counts()["n_units"], FEWEST, f"units ({unit}) with both {wording.replace(' - ', ' and ')}")
                parts = _slopes(rows, score, is_first, here) if here else _differences(rows, score, is_first)
                codes, values = parts.codes, toned(parts.values, parts.inflation)
                found = _paired(parts, n_resamples, seed)
                rows = rows.where(np.isin(rows.unit, codes)) if len(codes) else rows
                said.append(parts.note)
            else:
                codes, values = rows.unit_means(score)
                chosen_units = _labels_of(rows, codes, is_first, unit, group)
                label |= dict(zip(codes.tolist(), chosen_units.tolist(), strict=True))
                for many, name in ((chosen_units.sum(), 0), ((~chosen_units).sum(), 1)):
                    enough(int(many), FEWEST_PER_GROUP, f"units ({unit}) with {group} = {wording.split(' - ')[name]}")
                found = _unpaired(values, chosen_units, n_resamples, seed)
                if here:
                    test = "permutation of residuals (Freedman-Lane)"
                    whole = _nothing(_IN_FULL) if told_in_full(rows, score, here) else None
                    found |= whole or _controlled(values, chosen_units, [rows.unit_means(c)[1] for c in here], n_resamples, seed)
                    if "straight" in found["note"]:
                        found["note"] = joined(found["note"], _bends(rows, score, here))
            said.append(found.pop("note", ""))
            lines.append(line(rows, score, unit, test, "mean difference", **given | found, note=joined(*said)))
            columns.append((codes, values))
    refuse_constant(lines, names)
    if not len(controls):
        for one in lines:
            del one["controls"]
    adjusted = None
    if correction == "max-t":
        if len(controls) and not paired:
            raise StudyError("expected max-t without controls, got both. Test bl.stats.residuals(...), or choose bh or holm.")
        matrix, codes = side_by_side(columns)
        if paired:
            adjusted = max_t_signs(matrix, n_resamples, seed)
        else:
            adjusted = max_t_labels(matrix, np.array([label[code] for code in codes.tolist()]), n_resamples, seed)
    return assemble(table, lines, correction, adjusted)


@whole_numbers(TableError)
def before_after(
    pairs: pd.DataFrame,
    on: str | Sequence[str] = "difference",
    *,
    layers: Any = None,
    unit: str = "document",
    correction: Correction = "bh",
    n_resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Does a score change between two runs on the same texts? By flipping the signs of whole units.

    Args:
        pairs: from `basin_lens.compare`; any table with columns of differences will do.
        on: columns of differences (after less before).
        layers, unit, correction, n_resamples, seed: as for `compare_groups`.

    Returns:
        one row per (layer, column): the mean difference with Student's 95 % interval over units, and as `compare_groups(paired=True)`.

    Raises:
        TableError: runs of different weight processing, missing columns, no difference anywhere. StudyError: fewer than 6 units.

    Source: Fisher 1935, by scipy's `permutation_test`.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> doc = np.repeat(range(20), 30)
        >>> pairs = pd.DataFrame({"doc": doc, "seq": doc, "difference": np.random.default_rng(0).normal(0.5, 1, 600)})
        >>> bool(bl.stats.before_after(pairs).p[0] < 0.001)
        True
    """
    names = names_of(on, "differences")
    lines, columns = [], []
    test = "sign-flip permutation of paired differences"
    for name in names:
        for every in split(pairs, [name], layers=layers, unit=unit):
            rows = every.finite(name)
            if constant(rows.values[name]):
                lines.append(constant_line(rows, name, unit, test, "mean difference", name, **dict.fromkeys(_SIZES, np.nan)))
                columns.append((np.empty(0, int), np.empty(0)))
                continue
            codes, values = rows.unit_means(name)
            enough(len(codes), FEWEST, f"units ({unit})")
            lines.append(line(rows, name, unit, test, "mean difference", **_paired(_Parts(codes, values), n_resamples, seed)))
            columns.append((codes, values))
    refuse_constant(lines, names)
    adjusted = max_t_signs(side_by_side(columns)[0], n_resamples, seed) if correction == "max-t" else None
    return assemble(pairs, lines, correction, adjusted)


def side_by_side(columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Unit values of all results as a matrix [units, results], NaN where a result lacks a unit; and the units' codes."""
    codes = np.unique(np.concatenate([codes for codes, _ in columns]))
    matrix = np.full((len(codes), len(columns)), np.nan)
    for place, (there, values) in enumerate(columns):
        if len(there) >= FEWEST and not constant_values(values):
            matrix[np.searchsorted(codes, there), place] = values
    return matrix, codes


def first_value(rows: Rows, group: str, groups: Sequence[Any] | None) -> Any:
    """The value of the label that counts as first."""
    return _values(rows, group, groups)[0]


def _values(rows: Rows, group: str, groups: Sequence[Any] | None) -> tuple[Any, Any]:
    there = list(dict.fromkeys(rows.labels[group][~pd.isna(rows.labels[group])].tolist()))
    if groups is None:
        if len(there) != 2:
            raise TableError(
                f"expected a label with two values, got {group!r} with {there[:8]}. Choose two: groups=(first, second)."
            )
        there = sorted(there, reverse=all(isinstance(value, bool | np.bool_) for value in there))
        return there[0], there[1]
    missing = [value for value in groups if value not in there]
    if len(groups) != 2 or missing or groups[0] == groups[1]:
        raise TableError(f"expected two values of {group!r} as groups, got {groups!r}; it has {there[:8]}.")
    return groups[0], groups[1]


def two_groups(rows: Rows, group: str, groups: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Which rows are in the first group, which in the second, and the comparison in words.

    Raises:
        TableError: not two groups.
    """
    one, other = _values(rows, group, groups)
    held = rows.labels[group]
    return _is(held, one), _is(held, other), f"{one} - {other}"


def _is(held: np.ndarray, value: Any) -> Bool[np.ndarray, " rows"]:
    """Where a label has a value; a missing one, of whatever kind, has none."""
    return np.array([not missing and label == value for label, missing in zip(held, pd.isna(held), strict=True)], bool)


def _labels_of(rows: Rows, codes: np.ndarray, is_first: np.ndarray, unit: str, group: str) -> Bool[np.ndarray, " units"]:
    share = np.bincount(np.searchsorted(codes, rows.unit), weights=is_first) / np.bincount(np.searchsorted(codes, rows.unit))
    if ((share > 0) & (share < 1)).any():
        raise StudyError(
            f"expected units ({unit}) of one group each, got {int(((share > 0) & (share < 1)).sum())} that hold both values of {group!r}. "
            "Compare within them: paired=True."
        )
    return share == 1


def _shared(rows: Rows, is_first: np.ndarray) -> tuple[Rows, np.ndarray]:
    """The rows of the sequences that hold both groups."""
    both = np.isin(rows.sequence, np.intersect1d(rows.sequence[is_first], rows.sequence[~is_first]))
    return rows.where(both), is_first[both]


@dataclass(frozen=True)
class _Parts:
    """Codes of the units, their parts of an effect that is their mean, their shares in it (None: equal ones), and see `projection.Left`."""

    codes: Int[np.ndarray, " units"]
    values: Float[np.ndarray, " units"]
    shares: Float[np.ndarray, " units"] | None = None
    inflation: float = 1.0
    note: str = ""


def _differences(rows: Rows, score: str, is_first: np.ndarray) -> _Parts:
    """The mean over a unit's sequences of the difference of means."""
    codes, first = rows.where(is_first).unit_means(score)
    return _Parts(codes, without_rounding(first - rows.where(~is_first).unit_means(score)[1], rows.values[score]))


def _slopes(rows: Rows, score: str, is_first: np.ndarray, controls: Sequence[str]) -> _Parts:
    """The units' parts of the slope of score on group given the controls.

    The controls are taken out of both score y and group g (1: first, 0: second), over the same rows: taken out of the score alone, they would
    take what the group has in common with them too, and leave (1 - R2) of the difference. Then the slope in all rows, sum(gy) / sum(gg), is
    that of the regression on group, controls and sequences at once. It is the mean of the units' own slopes, each weighed by its sum(gg): by how
    much it says. Equal weights would give the answer to the units of which the controls leave next to nothing, where a slope is noise over
    almost 0. Without any difference, a unit's sum(gy) is as often above 0 as below, whatever its weight: signs can be flipped.
    """
    held = np.stack([rows.values[score], is_first.astype(float)], 1)
    left, straight = unexplained(held, [rows.values[c] for c in controls], rows.sequence)
    y, g = left.values.T
    codes, at = np.unique(rows.unit, return_inverse=True)
    products, squares = np.bincount(at, weights=g * y), np.bincount(at, weights=g * g)
    kept = squares > _LEAST * np.bincount(at, weights=(held[:, 1] - level(rows.sequence, held[:, 1])) ** 2)
    nothing = np.empty(0, int), np.empty(0)
    if not (left.of(0) and left.of(1)) or not kept.any():
        return _Parts(*nothing, note=_IN_FULL)
    if kept.sum() < FEWEST:
        return _Parts(*nothing, note=f"only {int(kept.sum())} units in which the controls do not explain the groups in full")
    total = squares[kept].sum()
    left_out = int((~kept).sum())
    why = f"left out: {left_out} units in which the controls explain the groups in full" if left_out else ""
    return _Parts(codes[kept], kept.sum() * products[kept] / total, squares[kept] / total, left.inflation, joined(straight, why))


def _mean(x: np.ndarray, axis: int = -1) -> Any:
    return x.mean(axis)


def _welch(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (x.mean(axis) - y.mean(axis)) / np.sqrt(x.var(axis, ddof=1) / x.shape[axis] + y.var(axis, ddof=1) / y.shape[axis])


def _paired(parts: _Parts, n_resamples: int, seed: int) -> dict[str, Any]:
    """The mean of the units' values; with equal shares, Student's interval."""
    values, n = parts.values, len(parts.values)
    answer: dict[str, Any] = {**interval_and_p(values), **dict.fromkeys(_SIZES, np.nan), "n_first": n, "n_second": n}
    if not n:
        return answer | {"note": ""}  # the parts' own says why
    if constant_values(values):
        return answer | {"note": "the difference is the same in every unit"}
    tested = toned(values, parts.inflation)
    test = stats.permutation_test((tested,), _mean, permutation_type="samples", vectorized=True, n_resamples=n_resamples, rng=seed)
    error, degrees = cluster_error(values, np.full(n, 1 / n) if parts.shares is None else parts.shares)
    wide = stats.t.ppf(0.975, degrees) * error * np.sqrt(parts.inflation)
    g = answer["estimate"] / (error * np.sqrt(n)) * (1 - 3 / (4 * n - 5))
    wide_g = stats.norm.ppf(0.975) * np.sqrt(1 / n + g**2 / (2 * n))
    signs = interval_and_p(np.sign(values))
    return answer | {
        "low": answer["estimate"] - wide, "high": answer["estimate"] + wide, "p": float(test.pvalue),
        "hedges_g": g, "hedges_g_low": g - wide_g, "hedges_g_high": g + wide_g,
        "cliff_delta": signs["estimate"], "cliff_delta_low": max(-1.0, signs["low"]) if signs["low"] == signs["low"] else np.nan,
        "cliff_delta_high": min(1.0, signs["high"]) if signs["high"] == signs["high"] else np.nan,
    }  # fmt: skip


def cluster_error(values: Float[np.ndarray, " units"], shares: Float[np.ndarray, " units"]) -> tuple[float, float]:
    """Standard error of a mean of units with these shares in it, and its degrees of freedom (Bell and McCaffrey 2002).

    The plain cluster-robust error is too small where few units have most of the weight: here each unit's residual is blown up by its share,
    and the degrees of freedom are those of the shares. With equal shares: the standard deviation over the root of n, and n - 1.
    """
    rest = values / len(values) - values.mean() * shares
    a = shares**2 / (1 - shares)
    # Of the matrix with shares on the diagonal and the roots of a_i a_j beside it, the sum of squares.
    squares = (shares**2).sum() + a.sum() ** 2 - (a**2).sum()
    return float(np.sqrt((rest**2 / (1 - shares)).sum())), float(1 / squares)


def _unpaired(
    values: Float[np.ndarray, " units"], first: Bool[np.ndarray, " units"], n_resamples: int, seed: int
) -> dict[str, Any]:
    one, other = values[first], values[~first]
    answer = {"estimate": one.mean() - other.mean(), "n_first": len(one), "n_second": len(other)}
    if constant_values(values):
        return answer | {"note": "all units have the same mean"}
    if constant_values(one) and constant_values(other):
        return answer | {"note": "units do not differ within either group"}
    test = stats.permutation_test(
        (one, other), _welch, permutation_type="independent", vectorized=True, n_resamples=n_resamples, rng=seed
    )
    bounds = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    g, variance = effectsize_smd(one.mean(), one.std(ddof=1), len(one), other.mean(), other.std(ddof=1), len(other))
    wide = stats.norm.ppf(0.975) * np.sqrt(variance)
    above = stats.mannwhitneyu(one, other).statistic / (len(one) * len(other))
    # Groups that do not overlap have no variance of ranks, and so no interval.
    low, high = rank_compare_2indep(one, other).conf_int() if 0 < above < 1 else (np.nan, np.nan)
    return answer | {
        "low": bounds.low, "high": bounds.high, "p": float(test.pvalue), "hedges_g": g, "hedges_g_low": g - wide, "hedges_g_high": g + wide,
        "cliff_delta": 2 * above - 1, "cliff_delta_low": max(-1.0, 2 * low - 1) if low == low else np.nan,
        "cliff_delta_high": min(1.0, 2 * high - 1) if high == high else np.nan,
    }  # fmt: skip


def _bends(rows: Rows, score: str, controls: Sequence[str]) -> str:
    """A note where straight lines over units cannot hold controls fixed, because the score bends with them within texts."""
    held, there = rows.values[score][:, None], [rows.values[c] for c in controls]
    straight, smooth = (unexplained(held, there, rows.sequence, smooth=bent)[0].share[0] for bent in (False, True))
    share = 1 - smooth / straight if straight > 0 else 0.0
    if share < _BEND:
        return ""
    return (
        f"the score bends with the controls: within texts, curves take {100 * share:.0f} % of what straight lines leave, and units are too few to "
        "hold that fixed. Test the group as a column of 0 and 1 with mixed_model"
    )


def _nothing(note: str) -> dict[str, Any]:
    return {**dict.fromkeys(("estimate", "low", "high", "p"), np.nan), "note": note}


def _controlled(
    values: np.ndarray, first: np.ndarray, controls: Sequence[Float[np.ndarray, " units"]], n_resamples: int, seed: int
) -> dict[str, Any]:
    """The difference given the controls' unit means, by permuting what the controls leave of the score.

    scipy permutes data, not residuals. Of a permuted outcome, only its part orthogonal to the controls matters for the partial correlation.
    """
    n = len(values)
    held, note = unexplained(np.stack([values, first], 1), controls, np.zeros(n, int))
    degrees = n - held.basis.shape[1] - 2
    enough(degrees, FEWEST, "units beyond the number of controls")
    if not (held.of(0) and held.of(1)):
        return _nothing(_IN_FULL)
    rest, side = held.values.T
    slope = rest @ side / (side @ side)
    error = np.sqrt(((rest - slope * side) ** 2).sum() / degrees / (side @ side))
    wide = stats.t.ppf(0.975, degrees) * error
    drawn = np.random.default_rng(seed).permuted(np.broadcast_to(rest, (n_resamples, n)), axis=1)
    drawn = drawn - (drawn @ held.basis) @ held.basis.T
    partial = np.abs(drawn @ side) / np.sqrt((drawn**2).sum(1))
    reached = (partial >= abs(rest @ side) / np.sqrt(rest @ rest) * (1 - 1e-9)).sum()
    return {
        "estimate": slope, "low": slope - wide, "high": slope + wide, "p": (reached + 1) / (n_resamples + 1),
        "note": note.replace("tokens", "units"),
    }  # fmt: skip
