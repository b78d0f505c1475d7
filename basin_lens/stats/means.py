"""Means with intervals over whole units, nothing assumed about their distribution."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from basin_lens import tables
from basin_lens.errors import StudyError, TableError
from basin_lens.stats.results import NO_ERROR, joined
from basin_lens.tables.distinct import documents_once
from basin_lens.values import whole_numbers

_FEW = 8  # units
_ERROR = "_reference_error"  # of the column, by row


@whole_numbers(TableError)
def mean_interval(
    table: pd.DataFrame, column: str, by: str | Sequence[str], *, unit: str = "doc", n_resamples: int = 9999, seed: int = 0
) -> pd.DataFrame:
    """Mean of a column in each group, with a 95 % bootstrap interval over units: percentiles, expanded for few units.

    A plain percentile interval is too narrow: of 24 normal units it misses the mean in 7 % of data sets, of 8 in 12 %. Here its
    percentiles are moved out as far as Student's t is beyond the normal. Of 8, 12, 24 and 60 units the interval misses in 6, 5, 5
    and 4 % (normal), in 7, 6, 5 and 6 % (t with 2.5 degrees of freedom), but in 16, 14, 13 and 9 % where units are as skewed as a
    lognormal, as Student's own does. Below 8 the note says that it is still too narrow.

    A unit's rows are averaged first, so that long documents count as much as short ones. Copies of a document count once, where
    the table tells. The error of the column's reference (see `tables.reference_error`) is added to either arm in quadrature, as
    Student's t for so many units; in a group of several layers or runs, the mean of theirs, as if it were one draw.

    Args:
        table: one row per case.
        column: numbers; rows without one, and infinite ones (the note counts them), are passed over.
        by: columns that tell groups apart.
        unit: column of what is independent.
        n_resamples: bootstrap samples.
        seed: of the draw.

    Returns:
        a row per group: `by`, `estimate`, `low`, `high` (in the column's unit; NaN for a single unit), `n_units`, `n_rows`.

    Raises:
        TableError: a column is missing. StudyError: no rows.

    Source: Efron and Tibshirani 1993, by scipy's `bootstrap`; the expanded percentiles: Hesterberg 2015, What teachers should know
        about the bootstrap, section 6.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"policy": "a", "doc": [0, 0, 1, 2], "excess": [0.0, 2.0, 3.0, 5.0]})
        >>> float(bl.stats.mean_interval(table, "excess", "policy").estimate[0])
        3.0
    """
    groups = [by] if isinstance(by, str) else list(by)
    if missing := [name for name in (column, unit, *groups) if name not in table]:
        raise TableError(f"expected columns {column}, {unit} and {', '.join(groups)}, got none of {missing}.")
    table = tables.assign(table, **{_ERROR: tables.reference_error(table, column)})
    if unit == "doc" and {"doc", "seq", "token_id"} <= set(table):
        table = tables.select(table, documents_once(table).keep)
    endless = np.isinf(table[column].to_numpy(float, na_value=np.nan))
    held = table[~endless].dropna(subset=[column])
    if held.empty:
        raise StudyError(f"expected values of {column}, got none.")
    lines = []
    for key, part in held.groupby(groups, sort=False):
        means = part.groupby(unit)[column].mean().to_numpy(float)
        error = float(part.groupby(unit)[_ERROR].agg(lambda errors: errors.mean(skipna=False)).mean(skipna=False))
        low, high, note = _interval(means, error, n_resamples, seed)
        note = joined(note, f"{endless.sum()} rows with an infinite value left out of the table" if endless.any() else "")
        names = dict(zip(groups, key, strict=True))
        lines.append(
            {
                **names,
                "estimate": float(means.mean()),
                "low": low,
                "high": high,
                "n_units": len(means),
                "n_rows": len(part),
                "note": note,
            }
        )
    return pd.DataFrame(lines)


def _interval(means: Float[np.ndarray, " units"], error: float, n_resamples: int, seed: int) -> tuple[float, float, str]:
    """The bootstrap interval of a mean of units that share an error, and what is to be said of it."""
    units = len(means)
    if units < 2 or np.isnan(error):
        return float("nan"), float("nan"), "one unit: no interval" if units < 2 else NO_ERROR
    if np.ptp(means) == 0 and not error:
        return float("nan"), float("nan"), "the units do not differ: no interval"
    draw = np.random.default_rng(seed)
    found = stats.bootstrap(
        (means,), np.mean, n_resamples=n_resamples, method="percentile", rng=draw, confidence_level=_expanded(units)
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    if error:
        middle, also = float(means.mean()), error * stats.t.ppf(0.975, units - 1)
        low, high = middle - float(np.hypot(middle - low, also)), middle + float(np.hypot(high - middle, also))
    return low, high, f"{units} units: a bootstrap interval of so few is too narrow" if units < _FEW else ""


def _expanded(units: int, level: float = 0.95) -> float:
    """Level of the percentiles that makes a percentile interval as wide as Student's t is for so many normal units."""
    bound = np.sqrt(units / (units - 1)) * stats.t.isf((1 - level) / 2, units - 1)
    return float(1 - 2 * stats.norm.sf(bound))
