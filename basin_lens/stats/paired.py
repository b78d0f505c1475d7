"""Two kinds of tokens in the same texts: the units' differences, also at fixed controls, and their test by flipping signs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from basin_lens.stats.design import FEWEST, Rows, without_rounding
from basin_lens.stats.projection import EXPLAINED_GROUPS, level, unexplained
from basin_lens.stats.results import Line, constant_values, interval_and_p, joined, toned

SIZES = ("hedges_g", "hedges_g_low", "hedges_g_high", "cliff_delta", "cliff_delta_low", "cliff_delta_high")
# A unit counts where the controls leave at least this share of the variation of the groups: else they explain the groups there, but
# for rounding.
_LEAST = 1e-3


@dataclass(frozen=True)
class Parts:
    """Codes of units, their parts of an effect that is their mean, their shares in it (None: equal ones); see `projection.Left`.

    `shared`: an error that all values share (see `tables.reference_error`), which is in `inflation` where the values differ.
    """

    codes: Int[np.ndarray, " units"]
    values: Float[np.ndarray, " units"]
    shares: Float[np.ndarray, " units"] | None = None
    inflation: float = 1.0
    note: str = ""
    shared: float = 0.0


def in_both(rows: Rows, is_first: np.ndarray) -> tuple[Rows, np.ndarray]:
    """The rows of the sequences that hold both groups."""
    both = np.isin(rows.sequence, np.intersect1d(rows.sequence[is_first], rows.sequence[~is_first]))
    return rows.where(both), is_first[both]


def differences(rows: Rows, score: str, is_first: np.ndarray) -> Parts:
    """The mean over a unit's sequences of the difference of means."""
    codes, first = rows.where(is_first).unit_means(score)
    return Parts(codes, without_rounding(first - rows.where(~is_first).unit_means(score)[1], rows.values[score]))


def slopes(rows: Rows, score: str, is_first: np.ndarray, controls: Sequence[str]) -> Parts:
    """The units' parts of the slope of score on group given the controls.

    The controls are taken out of both score y and group g (1: first, 0: second), over the same rows: taken out of the score alone,
    they would take what the group has in common with them too, and leave (1 - R2) of the difference. Then the slope in all rows,
    sum(gy) / sum(gg), is that of the regression on group, controls and sequences at once. It is the mean of the units' own slopes,
    each weighed by its sum(gg): by how much it says. Equal weights would give the answer to the units of which the controls leave
    next to nothing, where a slope is noise over almost 0. Without any difference, a unit's sum(gy) is as often above 0 as below,
    whatever its weight: signs can be flipped.
    """
    held = np.stack([rows.values[score], is_first.astype(float)], 1)
    left, straight = unexplained(held, [rows.values[c] for c in controls], rows.sequence)
    y, g = left.values.T
    codes, at = np.unique(rows.unit, return_inverse=True)
    products, squares = np.bincount(at, weights=g * y), np.bincount(at, weights=g * g)
    kept = squares > _LEAST * np.bincount(at, weights=(held[:, 1] - level(rows.sequence, held[:, 1])) ** 2)
    nothing = np.empty(0, int), np.empty(0)
    if not (left.of(0) and left.of(1)) or not kept.any():
        return Parts(*nothing, note=EXPLAINED_GROUPS)
    if kept.sum() < FEWEST:
        return Parts(*nothing, note=f"only {int(kept.sum())} units in which the controls do not explain the groups in full")
    total = squares[kept].sum()
    left_out = int((~kept).sum())
    why = f"left out: {left_out} units in which the controls explain the groups in full" if left_out else ""
    return Parts(codes[kept], kept.sum() * products[kept] / total, squares[kept] / total, left.inflation, joined(straight, why))


def _mean(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(x.mean(axis))


def paired_test(parts: Parts, n_resamples: int, seed: int) -> Line:
    """The mean of the units' values; with equal shares, Student's interval."""
    values, n = parts.values, len(parts.values)
    plain = interval_and_p(values, parts.inflation)
    answer: Line = {**plain.columns(), **dict.fromkeys(SIZES, np.nan), "n_first": n, "n_second": n}
    if not n:
        return answer | {"note": ""}  # the parts' own says why
    if constant_values(values):
        same = "the difference is the same in every unit"
        if not parts.shared > 0:
            return answer | {"note": same}
        wide = stats.t.ppf(0.975, n - 1) * parts.shared
        p = 2 * stats.t.sf(abs(plain.estimate) / parts.shared, n - 1)
        ends = {"low": plain.estimate - wide, "high": plain.estimate + wide, "p": float(p)}
        return answer | ends | {"note": f"{same}: the error is the reference's alone (Student's t)"}
    if np.isnan(parts.inflation):
        return answer  # with its note
    tested = toned(values, parts.inflation)
    test = stats.permutation_test((tested,), _mean, permutation_type="samples", vectorized=True, n_resamples=n_resamples, rng=seed)
    error, degrees = cluster_error(values, np.full(n, 1 / n) if parts.shares is None else parts.shares)
    wide = stats.t.ppf(0.975, degrees) * error * np.sqrt(parts.inflation)
    g = plain.estimate / (error * np.sqrt(n)) * (1 - 3 / (4 * n - 5))
    wide_g = stats.norm.ppf(0.975) * np.sqrt(parts.inflation / n + g**2 / (2 * n))
    signs = interval_and_p(np.sign(values))
    return answer | {
        "low": plain.estimate - wide,
        "high": plain.estimate + wide,
        "p": float(test.pvalue),
        "hedges_g": g,
        "hedges_g_low": g - wide_g,
        "hedges_g_high": g + wide_g,
        "cliff_delta": signs.estimate,
        "cliff_delta_low": np.clip(signs.low, -1.0, 1.0),
        "cliff_delta_high": np.clip(signs.high, -1.0, 1.0),
    }


def cluster_error(values: Float[np.ndarray, " units"], shares: Float[np.ndarray, " units"]) -> tuple[float, float]:
    """Standard error of a mean of units with these shares in it, and its degrees of freedom (Bell and McCaffrey 2002).

    The plain cluster-robust error is too small where few units have most of the weight: here each unit's residual is blown up by
    its share, and the degrees of freedom are those of the shares. With equal shares: the standard deviation over the root of n, and
    n - 1.
    """
    rest = values / len(values) - values.mean() * shares
    a = shares**2 / (1 - shares)
    # Of the matrix with shares on the diagonal and the roots of a_i a_j beside it, the sum of squares.
    squares = (shares**2).sum() + a.sum() ** 2 - (a**2).sum()
    return float(np.sqrt((rest**2 / (1 - shares)).sum())), float(1 / squares)
