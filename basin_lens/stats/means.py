"""Means with intervals over whole units, nothing assumed about their distribution."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from basin_lens.errors import StudyError, TableError
from basin_lens.stats.results import joined
from basin_lens.tables.distinct import documents_once
from basin_lens.values import whole_numbers

_FEW = 20  # units


@whole_numbers(TableError)
def mean_interval(
    table: pd.DataFrame, column: str, by: str | Sequence[str], *, unit: str = "doc", n_resamples: int = 9999, seed: int = 0
) -> pd.DataFrame:
    """Mean of a column in each group, with a 95 % percentile bootstrap interval over units.

    With few units such an interval is too narrow: of 20, it misses the mean in 8 to 9 % of data sets (normal, lognormal, heavy
    tails), of 12 in 10 to 12 %; below 20, the note says so.

    A unit's rows are averaged first, so that long documents count as much as short ones. Copies of a document count once, where the
    table tells.

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

    Source: Efron and Tibshirani 1993, by scipy's `bootstrap`.

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
    if unit == "doc" and {"doc", "seq", "token_id"} <= set(table):
        table = table[documents_once(table).keep]
    endless = np.isinf(table[column].to_numpy(float, na_value=np.nan))
    held = table[~endless].dropna(subset=[column])
    if held.empty:
        raise StudyError(f"expected values of {column}, got none.")
    lines = []
    for key, part in held.groupby(groups, sort=False):
        means = part.groupby(unit)[column].mean().to_numpy(float)
        low = high = float("nan")
        note = "one unit: no interval" if len(means) < 2 else "the units do not differ: no interval"
        if len(means) > 1 and np.ptp(means) > 0:
            draw = np.random.default_rng(seed)
            found = stats.bootstrap((means,), np.mean, n_resamples=n_resamples, method="percentile", rng=draw).confidence_interval
            low, high = float(found.low), float(found.high)
            note = f"{len(means)} units: a bootstrap interval of so few is too narrow" if len(means) < _FEW else ""
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
