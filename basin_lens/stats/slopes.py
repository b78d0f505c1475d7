"""How a score rises with a quantity that is the same throughout a unit, such as how often a text was shown."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats

from basin_lens.errors import TableError
from basin_lens.stats.design import FEWEST, WhichLayers, constant, enough, names_of, refuse_constant, split
from basin_lens.stats.results import Correction, Estimate, Procedure, assemble
from basin_lens.values import whole_numbers


@whole_numbers(TableError)
def unit_slope(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    on: str,
    *,
    layers: WhichLayers = None,
    unit: str = "document",
    correction: Correction = "bh",
    n_resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """By how much does a score rise for one step of a quantity that each unit has one value of?

    Ordinary least squares over units: mean over tokens, then sequences, of the score on the quantity.

    Args:
        table: from `analyze`, of one run.
        scores: columns.
        on: numeric column, the same throughout a unit, such as log2 of a dose; rows without it are passed over.
        layers, unit, seed: as for `compare_groups`.
        correction: over all rows of the answer; no max-t.
        n_resamples: permutations of the quantity among units.

    Returns:
        one row per (layer, score): slope in the score's unit per step of `on`, with a 95 % interval by errors that allow unequal
        variances (HC3), and the permutation p of Pearson's r; `rho`: Spearman's correlation over units.

    Raises:
        TableError: several runs, missing or constant columns, a quantity that changes within a unit. StudyError: fewer than 6
            units.

    Source: MacKinnon and White 1985 (HC3, by statsmodels); permutation by scipy.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"doc": range(20), "seq": range(20), "dose": np.repeat([0.0, 1.0, 2.0, 3.0], 5)})
        >>> table["a"] = 0.5 * table.dose + np.random.default_rng(0).normal(0, 0.1, 20)
        >>> round(float(bl.stats.unit_slope(table, "a", "dose").estimate[0]), 1)
        0.5
    """
    names = names_of(scores)
    procedure = Procedure(unit, "permutation over units", f"slope per step of {on}")
    lines = []
    # Copies of a text with another quantity are kept: they may be what is compared.
    for every in split(table, [*names, on], layers=layers, unit=unit, labels=[on]):
        for score in names:
            rows = every.finite(score, on)
            flat = rows.constant_column(score, on)
            if flat is not None:
                lines.append(procedure.constant_line(rows, score, flat, against=on, rho=np.nan))
                continue
            codes, y = rows.unit_means(score)
            _, x = rows.unit_means(on)
            enough(len(codes), FEWEST, f"units ({unit})")
            if not np.allclose(x[np.searchsorted(codes, rows.unit)], rows.values[on], rtol=1e-9, atol=0):
                raise TableError(
                    f"expected a quantity that is the same throughout a unit ({unit}), got {on!r}, which changes within one."
                )
            if constant(x) or constant(y):
                lines.append(procedure.constant_line(rows, score, on if constant(x) else score, against=on, rho=np.nan))
                continue
            fitted = sm.OLS(y, sm.add_constant(x)).fit(cov_type="HC3", use_t=True)
            low, high = fitted.conf_int()[1]
            note = ""
            if np.ptp(np.delete(x, np.abs(x - np.median(x)).argmax())) == 0:
                # Its residual is 0 whatever the data: HC3 divides it by 0.
                low, high, note = np.nan, np.nan, f"all but one unit have one value of {on}: no interval"
            found = stats.permutation_test(
                (x,),
                lambda x, axis, y=y: _correlations(x, y, axis),
                permutation_type="pairings",
                vectorized=True,
                n_resamples=n_resamples,
                rng=seed,
            )
            answer = Estimate(fitted.params[1], low, high, float(found.pvalue), note).columns()
            rho = float(stats.spearmanr(x, y).statistic)
            lines.append(procedure.line(rows, score, against=on, rho=rho, **answer))
    refuse_constant(lines, [*names, on])
    return assemble(table, lines, correction)


def _correlations(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Pearson's r of every row of x with y."""
    a, b = x - x.mean(axis, keepdims=True), y - y.mean()
    return np.asarray((a * b).sum(axis) / np.sqrt((a**2).sum(axis) * (b**2).sum()))
