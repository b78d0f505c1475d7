"""Result tables: the columns that every test's rows have, and corrections for many of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from basin_lens import tables
from basin_lens.errors import StudyError, TableError
from basin_lens.stats.design import FEWEST, Rows, names_of

Correction = Literal["bh", "holm", "max-t", "none"]

# First what was tested, then on how much, then what came out. A test's own columns come after these, `note` last.
_FIRST = ("layer", "score", "against", "group", "tag", "quartile", "metric", "versus", "term")
_SIZE = ("unit", "n_units", "n_sequences", "n_documents", "n_tokens")
_ANSWER = ("test", "effect", "estimate", "low", "high", "null", "p", "p_corrected", "correction", "n_tests")
_ALWAYS = (*_SIZE, *_ANSWER)
_NAN = float("nan")

NO_ERROR = "the error of the score's reference was not measured: no interval and no p"

# A row of results by column; those that begin with _ are for `assemble` and `refuse_constant` alone.
Line = dict[str, object]


@dataclass(frozen=True)
class Estimate:
    """An effect with its 95 % interval and p-value; NaN what cannot be had, and a note that says why."""

    estimate: float = _NAN
    low: float = _NAN
    high: float = _NAN
    p: float = _NAN
    note: str = ""

    def columns(self) -> Line:
        """As columns of a row of results."""
        return dict(vars(self))


@dataclass(frozen=True)
class Slope(Estimate):
    """A slope, and `partial_r2`, the share it explains of what other terms leave."""

    partial_r2: float = _NAN


@dataclass(frozen=True)
class Procedure:
    """The unit of analysis, the test, and the effect that it estimates: what all rows of one test say alike."""

    unit: str
    test: str
    effect: str

    def line(self, rows: Rows, score: str, **more: object) -> Line:
        """One result, NaN until filled in by `more`."""
        empty = {"estimate": np.nan, "low": np.nan, "high": np.nan, "null": 0.0, "p": np.nan, "note": ""}
        infinite = f"{rows.infinite} rows with an infinite value left out" if rows.infinite else ""
        given = {"layer": rows.layer, "score": score, "unit": self.unit, **rows.counts(), "test": self.test, "effect": self.effect}
        return {**given, **empty, **more, "_infinite": infinite, "_copies": rows.copies}

    def constant_line(self, rows: Rows, score: str, column: str, **more: object) -> Line:
        """A result that is not there because a column does not vary at this layer."""
        why = f"{column} is constant at this layer" if len(rows.sequence) else "no row where all columns are finite"
        return self.line(rows, score, note=why, _constant=column, **more)


def joined(*notes: str) -> str:
    """Notes as one."""
    return "; ".join(note for note in notes if note)


def assemble(
    table: pd.DataFrame,
    lines: Sequence[Mapping[str, object]],
    correction: Correction,
    max_t: Float[np.ndarray, " rows"] | None = None,
) -> pd.DataFrame:
    """Results as a table, corrected over all rows that have a p-value, with the provenance of the table tested."""
    bare = [{name: value for name, value in one.items() if not name.startswith("_")} for one in lines]
    answer = pd.DataFrame(bare)
    answer["note"] = [str(one["note"]) for one in lines]
    answer["layer"] = answer["layer"].astype("Int64")
    if correction == "max-t":
        if max_t is None:
            raise StudyError("expected a test of one effect per unit for max-t, got another. Choose bh, holm or none.")
        answer["p_corrected"], answer["correction"] = max_t, "max-|t| permutation"
        answer["n_tests"] = int(np.isfinite(max_t).sum())
    else:
        answer = _adjusted(answer, np.ones(len(answer), bool), correction)
    answer = answer[
        [*(name for name in (*_FIRST, *_ALWAYS) if name in answer), *(c for c in answer if c not in (*_FIRST, *_ALWAYS))]
    ]
    notes = _explained(answer)
    answer["note"] = [
        joined(note, *(str(one.get(name, "")) for name in ("_infinite", "_copies"))) for note, one in zip(notes, lines, strict=True)
    ]
    return tables.with_provenance(answer, table)


def _explained(answer: pd.DataFrame) -> pd.Series:
    """The notes, last; where numbers are missing and no note says why, one that says which."""
    notes = answer.pop("note")
    missing = answer[["estimate", "low", "high", "p"]].isna()
    words = [", ".join(str(column) for column in missing if row[column]) for row in missing.to_dict("records")]
    silent = missing.any(axis=1) & (notes == "")
    tested = answer["p"].notna()
    lost = answer["p_corrected"].isna() & tested
    said = [
        f"no {word}: {'too few differences between the units' if not_p else 'a description, not a test'}"
        for word, not_p in zip(words, missing["estimate"] | missing["low"], strict=True)
    ]
    notes = notes.mask(silent, pd.Series(said, index=answer.index))
    why = "not corrected: too few units, or units that do not differ"
    return notes.mask(lost, pd.Series([joined(note, why) for note in notes], index=answer.index))


def correct(
    results: pd.DataFrame,
    method: Literal["bh", "holm", "none"] = "bh",
    *,
    primary: Mapping[str, object] | Sequence[Mapping[str, object]] | None = None,
) -> pd.DataFrame:
    """Correct p-values over all rows at once: Holm for what was declared before looking, Benjamini-Hochberg for exploration.

    Every test corrects its own rows. Use this where several tests make one family: `pd.concat` their results first.

    Args:
        results: from any test here, or any table with a column `p`. Rows without a p-value are in no family.
        method: `"bh"` controls the share of false discoveries, `"holm"` the chance of any, `"none"` nothing. With `primary`: for
            the rows that were not declared.
        primary: the declared rows, as column values: `{"score": "compression", "layer": 18}`, or several such. They are a family
            of their own, corrected by Holm.

    Returns:
        a copy with columns `p_corrected`, `correction` and `n_tests` (size of the row's family) written anew.

    Raises:
        TableError: no column `p`, an unknown column, or a declared primary that no row matches.

    Source: Holm 1979; Benjamini and Hochberg 1995 (scipy).

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> results = pd.DataFrame({"score": ["a", "b", "c"], "p": [0.02, 0.03, 0.04]})
        >>> bl.stats.correct(results, primary={"score": "a"}).p_corrected.tolist()
        [0.02, 0.04, 0.04]
    """
    tables.require(results, "p")
    declared = np.zeros(len(results), bool)
    for wanted in [] if primary is None else [primary] if isinstance(primary, Mapping) else primary:
        tables.require(results, *names_of(list(wanted), "primary"))
        matched = np.logical_and.reduce([(results[name] == value).fillna(False).to_numpy(bool) for name, value in wanted.items()])
        if not matched.any():
            raise TableError(f"expected a declared primary that is among the results, got {dict(wanted)}, which no row matches.")
        declared |= matched
    answer = _adjusted(results.copy(), ~declared, method)
    return _adjusted(answer, declared, "holm", " (declared primary)")


def _adjusted(results: pd.DataFrame, family: np.ndarray, method: str, suffix: str = "") -> pd.DataFrame:
    """Write correction columns for the rows of one family."""
    for name, kind in (("p_corrected", float), ("correction", object), ("n_tests", int)):
        if name not in results:
            results[name] = pd.Series(np.nan if kind is float else "" if kind is object else 0, index=results.index, dtype=kind)
    p = results["p"].to_numpy(float)
    tested = family & np.isfinite(p)
    adjusted = np.where(tested, p, np.nan)
    adjusted[tested] = adjust(p[tested], method)
    wording = {"bh": "Benjamini-Hochberg", "holm": "Holm", "none": "none"}[method] + suffix
    for name, value in (("p_corrected", adjusted), ("correction", wording), ("n_tests", int(tested.sum()))):
        old = results[name].to_numpy(object)
        results[name] = pd.Series(np.where(family, value, old), index=results.index).astype(
            {"p_corrected": float, "correction": object, "n_tests": int}[name]
        )
    return results


def adjust(p: Float[np.ndarray, " tests"], method: str) -> Float[np.ndarray, " tests"]:
    """Corrected p-values of one family; all finite.

    Raises:
        StudyError: an unknown method.
    """
    if method not in ("bh", "holm", "none"):
        raise StudyError(f'expected a correction "bh", "holm", "max-t" or "none", got {method!r}.')
    if method == "none" or len(p) < 2:  # one test is its own family
        return p
    if method == "bh":
        return np.asarray(stats.false_discovery_control(p, method="bh"))
    # As statsmodels' multipletests, which collects all garbage at every call, a third of a second.
    order, adjusted = np.argsort(p, kind="stable"), np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def side_by_side(columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Unit values of all results as a matrix [units, results], NaN where a result lacks a unit; and the units' codes."""
    codes = np.unique(np.concatenate([codes for codes, _ in columns]))
    matrix = np.full((len(codes), len(columns)), np.nan)
    for place, (there, values) in enumerate(columns):
        if len(there) >= FEWEST and not constant_values(values):
            matrix[np.searchsorted(codes, there), place] = values
    return matrix, codes


def max_t_signs(values: Float[np.ndarray, "units tests"], n_resamples: int, seed: int) -> Float[np.ndarray, " tests"]:
    """P-values corrected for the largest |t| of all tests, by flipping the signs of whole units.

    A unit's values flip together, so the dependence between tests is that of the data. NaN: the unit has no value for a test.
    scipy's `permutation_test` permutes each test by itself, which would lose that.
    """
    there = np.isfinite(values)
    count = there.sum(0)
    # v = m + d: with m far above d, sums of squares of v would round d away.
    m = np.where(there, values, 0.0).sum(0) / np.maximum(count, 1)
    d = np.where(there, values - m, 0.0)
    d = np.where(there, d - d.sum(0) / np.maximum(count, 1), 0.0)  # the mean's own rounding
    squares = (d**2).sum(0)
    rng = np.random.default_rng(seed)

    def t(signs: np.ndarray) -> np.ndarray:
        s, sums = signs @ there, signs @ d
        # (n^2 - s^2) m^2 - 2 m s sums - sums^2, over n, is what the signs add to the spread of d.
        spread = squares + (m**2 * (count - s) * (count + s) - 2 * m * s * sums - sums**2) / count
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs((s * m + sums) / count) / np.sqrt(np.maximum(spread, 0.0) / (count - 1) / count)

    def resampled(size: int) -> np.ndarray:
        return t(rng.choice([-1.0, 1.0], (size, len(values))))

    with np.errstate(divide="ignore", invalid="ignore"):
        return _exceeding(t(np.ones((1, len(values))))[0], resampled, n_resamples)


def max_t_labels(
    values: Float[np.ndarray, "units tests"], label: np.ndarray, n_resamples: int, seed: int
) -> Float[np.ndarray, " tests"]:
    """The same for two groups of units: Welch's t, labels exchanged between whole units."""
    there = np.isfinite(values)
    one = label.astype(bool)[:, None] & there
    # v = m + gap g + d, g the true label: with groups far apart, sums of squares of v would round d away.
    means = [np.where(side, values, 0.0).sum(0) / np.maximum(side.sum(0), 1) for side in (one, there & ~one)]
    gap = means[0] - means[1]
    d = np.where(there, values - np.where(one, means[0], means[1]), 0.0)
    rng = np.random.default_rng(seed)

    def t(chosen: np.ndarray) -> np.ndarray:
        parts = []
        for group in (chosen, 1 - chosen):
            count, true, sums, among, squares = (group @ part for part in (there * 1.0, one * 1.0, d, d * one, d**2))
            with np.errstate(divide="ignore", invalid="ignore"):
                spread = (
                    gap**2 * true * (count - true) / count + 2 * gap * (among - true * sums / count) + squares - sums**2 / count
                )
                parts.append(((gap * true + sums) / count, np.maximum(spread, 0.0) / count / (count - 1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(parts[0][0] - parts[1][0]) / np.sqrt(parts[0][1] + parts[1][1])

    def resampled(size: int) -> np.ndarray:
        return t(rng.permuted(np.broadcast_to(label.astype(float), (size, len(label))), axis=1))

    return _exceeding(t(label.astype(float)[None])[0], resampled, n_resamples)


def _exceeding(observed: np.ndarray, resampled: Callable[[int], np.ndarray], n_resamples: int, chunk: int = 1000) -> np.ndarray:
    """Share of resamples whose largest statistic reaches each observed one; the observed one counts as a resample."""
    tested = np.isfinite(observed)
    reached = np.ones(len(observed))
    for first in range(0, n_resamples, chunk):
        drawn = resampled(min(chunk, n_resamples - first))[:, tested]
        largest = np.where(np.isnan(drawn), -np.inf, drawn).max(1, initial=-np.inf)
        reached += (largest[:, None] >= observed[None] * (1 - 1e-9)).sum(0)
    return np.where(tested, reached / (n_resamples + 1), np.nan)


def interval_and_p(values: Float[np.ndarray, " units"], inflation: float = 1.0) -> Estimate:
    """Mean of independent values, Student's 95 % interval and p-value against 0; NaN, and a note, where the values do not differ.

    `inflation`: of the mean's variance, where the values are not quite independent (see `projection.Left`), or share an error (see
    `shared_error`).
    """
    mean = float(np.mean(values)) if len(values) else _NAN
    if len(values) < 2:
        return Estimate(mean, note=f"{len(values)} units: no interval and no p")
    if constant_values(values):
        return Estimate(mean, note="the units do not differ: no interval and no p")
    if np.isnan(inflation):
        return Estimate(mean, note=NO_ERROR)
    test = stats.ttest_1samp(toned(values, inflation), 0.0)
    wide = stats.t.ppf(0.975, len(values) - 1) * np.sqrt(inflation * np.var(values, ddof=1) / len(values))
    return Estimate(mean, float(mean - wide), float(mean + wide), float(test.pvalue))


def shared_error(values: Float[np.ndarray, " units"], error: float) -> float:
    """Inflation of the variance of a mean whose values share an error (see `tables.reference_error`), added in quadrature."""
    variance = np.var(values, ddof=1) / len(values) if len(values) > 1 else 0.0
    return float(1 + error**2 / variance) if error and variance > 0 else 1.0


def toned(values: Float[np.ndarray, " units"], inflation: float) -> Float[np.ndarray, " units"]:
    """Values with their mean nearer to 0, so that a test of them counts an inflated variance of the mean."""
    return values if inflation == 1 or not len(values) else values - values.mean() * (1 - 1 / np.sqrt(inflation))


def clustered_slope(
    y: Float[np.ndarray, " rows"],
    x: Float[np.ndarray, " rows"],
    units: np.ndarray,
    n_terms: int,
    basis: Float[np.ndarray, "rows terms"] | None = None,
) -> Slope:
    """Slope of y on x, both less what `n_terms` other terms explain, with cluster-robust errors (as statsmodels corrects them).

    By Frisch and Waugh, the slope and error that a regression on x and all terms at once gives. With an orthonormal `basis` of the
    terms, the jackknife's error instead, over units: where a unit has much weight in a fit, its residual is too small, and errors
    made of residuals are too.
    """
    if len(y) <= n_terms + 1:
        return Slope(note=f"{len(y)} rows for {n_terms + 1} terms: too few")
    slope = float(x @ y / (x @ x))
    there, at = np.unique(units, return_inverse=True)
    rest = y - slope * x
    n, groups = len(y), len(there)
    scores = np.bincount(at, weights=x * rest)
    error = np.sqrt(groups / (groups - 1) * (n - 1) / (n - n_terms - 1) * (scores @ scores)) / (x @ x)
    if basis is not None:
        error = _jackknife_error(np.column_stack([basis, x / np.sqrt(x @ x)]), rest, at) / np.sqrt(x @ x)
    share = float(1 - rest @ rest / (y @ y))
    if rest @ rest <= 1e-20 * (y @ y):
        return Slope(slope, note="a perfect fit: no interval and no p", partial_r2=share)
    if not np.isfinite(error):
        return Slope(slope, note="without one of the units there is no fit: no interval and no p", partial_r2=share)
    wide = stats.t.ppf(0.975, groups - 1) * error
    p = float(2 * stats.t.sf(abs(slope) / error, groups - 1))
    return Slope(slope, slope - wide, slope + wide, p, partial_r2=share)


def _jackknife_error(
    basis: Float[np.ndarray, "rows terms"], rest: Float[np.ndarray, " rows"], at: Int[np.ndarray, " rows"]
) -> float:
    """Jackknife error of the coefficient of a basis' last column, each unit left out once; infinite where one cannot be."""
    changes = []
    for code in range(int(at.max()) + 1):
        q, e = basis[at == code], rest[at == code]
        left = np.eye(q.shape[1]) - q.T @ q
        if np.linalg.eigvalsh(left)[0] < 1e-9:
            return float("inf")
        changes.append(np.linalg.solve(left, q.T @ e)[-1])  # (X'X less the unit's)^-1 X'e, in the basis' own terms
    held = np.array(changes)
    return float(np.sqrt((len(held) - 1) / len(held) * ((held - held.mean()) ** 2).sum()))


def constant_values(values: np.ndarray) -> bool:
    """Whether unit values are equal but for rounding."""
    return bool(np.ptp(values) <= 1e-10 * max(1e-300, np.abs(values).max()))
