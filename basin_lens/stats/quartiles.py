"""A score in the quartiles of another column."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from basin_lens.errors import TableError
from basin_lens.stats.design import FEWEST, WhichLayers, enough, names_of, refuse_constant, split, without_rounding
from basin_lens.stats.results import Correction, Estimate, Procedure, assemble, interval_and_p, shared_error
from basin_lens.values import whole_numbers


@whole_numbers(TableError)
def quartile_table(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    by: str,
    *,
    parts: int = 4,
    layers: WhichLayers = None,
    unit: str = "document",
    correction: Correction = "bh",
) -> pd.DataFrame:
    """Mean of a score in each quartile of another column, and the highest quartile less the lowest.

    Quartiles are taken within each sequence, so that differences between texts play no part; ties go to the same quartile.

    Args:
        table: from `analyze`, of one run.
        scores: columns to average.
        by: the column that makes the quartiles, such as a token importance.
        parts: 4 for quartiles, 10 for deciles. Sequences with fewer than 2 tokens per part are left out.
        layers, unit, correction: as for `compare_groups`; no max-t.

    Returns:
        one row per (layer, score, quartile), from 1 (lowest) on, and one with quartile `4 - 1`: the mean over units, with Student's
        95 % interval, the error of the score's reference in it; p of the difference only (one-sample t-test of unit differences).

    Raises:
        TableError: several runs, missing columns, a column that is constant at every layer. StudyError: fewer than 6 units.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> doc = np.repeat(range(10), 20)
        >>> table = pd.DataFrame({"doc": doc, "seq": doc, "a": rng.normal(size=200)})
        >>> table["b"] = table.a + rng.normal(size=200)
        >>> bl.stats.quartile_table(table, "a", "b").quartile.tolist()
        ['1', '2', '3', '4', '4 - 1']
    """
    names = names_of(scores)
    if parts < 2:
        raise TableError(f"expected at least 2 parts, got {parts}.")
    label = f"{parts} - 1"
    means = Procedure(unit, "t interval of unit means", "mean")
    ends_apart = Procedure(unit, "one-sample t-test of unit differences", "mean difference")
    lines = []
    for every in split(table, [*names, by], layers=layers, unit=unit):
        for score in names:
            rows = every.finite(score, by)
            flat = rows.constant_column(score, by)
            if flat is not None:
                lines.append(means.constant_line(rows, score, flat, against=by, quartile=label))
                continue
            ranks = pd.Series(rows.values[by]).groupby(rows.sequence)
            size = ranks.transform("size").to_numpy()
            part = np.clip(np.ceil(ranks.rank().to_numpy() / (size + 1) * parts), 1, parts)
            rows = rows.with_values(_part=part).where(size >= 2 * parts)
            enough(rows.counts()["n_units"], FEWEST, f"units ({unit}) with sequences of at least {2 * parts} scored tokens")
            for index in range(1, parts + 1):
                held = rows.where(rows.values["_part"] == index)
                means_of = held.unit_means(score)[1]
                found = interval_and_p(means_of, shared_error(means_of, rows.reference_error.get(score, 0.0)))
                answer = found.columns() | {"p": np.nan, "null": np.nan, "note": found.note or "a mean, not a test"}
                lines.append(means.line(held, score, against=by, quartile=str(index), **answer))
            # Of the sequences that have both: ties can leave a quartile empty. A reference is in both, and cancels.
            ends = [rows.sequence[rows.values["_part"] == index] for index in (1, parts)]
            rows = rows.where(np.isin(rows.sequence, np.intersect1d(*ends)))
            rows = rows.where((rows.values["_part"] == 1) | (rows.values["_part"] == parts))
            found = Estimate(note=f"fewer than {FEWEST} units with both ends: ties leave quartiles empty")
            if rows.counts()["n_units"] >= FEWEST:
                last, first = (rows.where(rows.values["_part"] == index).unit_means(score)[1] for index in (parts, 1))
                found = interval_and_p(without_rounding(last - first, rows.values[score]))
            lines.append(ends_apart.line(rows, score, against=by, quartile=label, **found.columns()))
    refuse_constant(lines, [*names, by])
    return assemble(table, lines, correction)
