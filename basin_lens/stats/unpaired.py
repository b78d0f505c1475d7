"""Two groups of texts: the test by exchanging labels of whole units, also at fixed controls."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats
from statsmodels.stats.meta_analysis import effectsize_smd
from statsmodels.stats.nonparametric import rank_compare_2indep

from basin_lens.errors import StudyError
from basin_lens.stats.design import FEWEST, Rows, enough
from basin_lens.stats.projection import EXPLAINED_GROUPS, told_in_full, unexplained
from basin_lens.stats.results import Estimate, Line, constant_values, joined

_BEND = 0.05  # of what straight lines leave: from there on, what curves take more is said


def labels_of(rows: Rows, codes: np.ndarray, is_first: np.ndarray, unit: str, group: str) -> Bool[np.ndarray, " units"]:
    """Which units are of the first group.

    Raises:
        StudyError: units of both.
    """
    share = np.bincount(np.searchsorted(codes, rows.unit), weights=is_first) / np.bincount(np.searchsorted(codes, rows.unit))
    if ((share > 0) & (share < 1)).any():
        raise StudyError(
            f"expected units ({unit}) of one group each, got {int(((share > 0) & (share < 1)).sum())} that hold both values of "
            f"{group!r}. Compare within them: paired=True."
        )
    return share == 1


def _welch(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(x.var(axis, ddof=1) / x.shape[axis] + y.var(axis, ddof=1) / y.shape[axis])
        return np.asarray((x.mean(axis) - y.mean(axis)) / error)


def unpaired_test(values: Float[np.ndarray, " units"], first: Bool[np.ndarray, " units"], n_resamples: int, seed: int) -> Line:
    """The difference of the units' means, Welch's interval, permutation p and effect sizes."""
    one, other = values[first], values[~first]
    answer: Line = {"estimate": one.mean() - other.mean(), "n_first": len(one), "n_second": len(other)}
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
        "low": bounds.low,
        "high": bounds.high,
        "p": float(test.pvalue),
        "hedges_g": g,
        "hedges_g_low": g - wide,
        "hedges_g_high": g + wide,
        "cliff_delta": 2 * above - 1,
        "cliff_delta_low": np.clip(2 * low - 1, -1.0, 1.0),
        "cliff_delta_high": np.clip(2 * high - 1, -1.0, 1.0),
    }


def controlled_test(
    rows: Rows, score: str, controls: Sequence[str], first: Bool[np.ndarray, " units"], n_resamples: int, seed: int
) -> Estimate:
    """The difference of the units' means at fixed means of the controls."""
    if told_in_full(rows, score, controls):
        return Estimate(note=EXPLAINED_GROUPS)
    given = [rows.unit_means(name)[1] for name in controls]
    found = _controlled(rows.unit_means(score)[1], first, given, n_resamples, seed)
    return replace(found, note=joined(found.note, _bends(rows, score, controls))) if "straight" in found.note else found


def _bends(rows: Rows, score: str, controls: Sequence[str]) -> str:
    """A note where straight lines over units cannot hold controls fixed, because the score bends with them within texts."""
    held, there = rows.values[score][:, None], [rows.values[c] for c in controls]
    straight, smooth = (unexplained(held, there, rows.sequence, smooth=bent)[0].share[0] for bent in (False, True))
    share = 1 - smooth / straight if straight > 0 else 0.0
    if share < _BEND:
        return ""
    return (
        f"the score bends with the controls: within texts, curves take {100 * share:.0f} % of what straight lines leave, and units "
        "are too few to hold that fixed. Test the group as a column of 0 and 1 with mixed_model"
    )


def _controlled(
    values: np.ndarray, first: np.ndarray, controls: Sequence[Float[np.ndarray, " units"]], n_resamples: int, seed: int
) -> Estimate:
    """The difference given the controls' unit means, by permuting what the controls leave of the score.

    scipy permutes data, not residuals. Of a permuted outcome, only its part orthogonal to the controls matters for the partial
    correlation.
    """
    n = len(values)
    held, note = unexplained(np.stack([values, first], 1), controls, np.zeros(n, int))
    degrees = n - held.basis.shape[1] - 2
    enough(degrees, FEWEST, "units beyond the number of controls")
    if not (held.of(0) and held.of(1)):
        return Estimate(note=EXPLAINED_GROUPS)
    rest, side = held.values.T
    slope = rest @ side / (side @ side)
    error = np.sqrt(((rest - slope * side) ** 2).sum() / degrees / (side @ side))
    wide = stats.t.ppf(0.975, degrees) * error
    drawn = np.random.default_rng(seed).permuted(np.broadcast_to(rest, (n_resamples, n)), axis=1)
    drawn = drawn - (drawn @ held.basis) @ held.basis.T
    partial = np.abs(drawn @ side) / np.sqrt((drawn**2).sum(1))
    reached = (partial >= abs(rest @ side) / np.sqrt(rest @ rest) * (1 - 1e-9)).sum()
    p = (reached + 1) / (n_resamples + 1)
    return Estimate(slope, slope - wide, slope + wide, p, note.replace("tokens", "units"))
