"""Units of two groups that are alike in something, so that what else differs is not owed to it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from basin_lens import tables
from basin_lens.errors import TableError


def match_units(
    table: pd.DataFrame, label: str, on: str, *, caliper: float, within: Sequence[str] = (), unit: str = "doc"
) -> pd.DataFrame:
    """Pair units with a label and units without, each at most once, so that the pairs differ least in one quantity, in all.

    Args:
        table: with the quantity and the label, the same throughout a unit once averaged.
        label: True and False; rows without it are passed over.
        on: the quantity.
        caliper: no pair differs by more, in its unit. As many pairs as possible are made.
        within: columns whose values both of a pair share.
        unit: column that names the units.

    Returns:
        one row per pair: `with_label`, `without_label` (values of `unit`), `first`, `second` (the quantity of either). No rows
        where nothing matches.

    Raises:
        TableError: missing columns, a label that changes within a unit, a caliper that is not above 0.

    Source: Rosenbaum 1989 (optimal matching); assignment by scipy.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"doc": list("abcd"), "member": [True, True, False, False], "loss": [1.0, 3.0, 1.1, 9.0]})
        >>> bl.stats.match_units(table, "member", "loss", caliper=0.5).without_label.tolist()
        ['c']
    """
    tables.require(table, label, on, unit, *within)
    if not caliper > 0:
        raise TableError(f"expected a caliper above 0, got {caliper}.")
    held = table[table[label].notna() & table[on].notna()]
    if (held.groupby(unit)[[label, *within]].nunique() > 1).any(axis=None):
        raise TableError(
            f"expected {[label, *within]} that are the same throughout a unit, got one that changes. Choose another unit."
        )
    units = held.groupby(unit, sort=True).agg({on: "mean", label: "first", **dict.fromkeys(within, "first")})
    pairs = []
    for _, part in units.groupby(list(within), sort=True) if within else [((), units)]:
        first, second = part[part[label].astype(bool)], part[~part[label].astype(bool)]
        apart = np.abs(first[on].to_numpy()[:, None] - second[on].to_numpy()[None])
        if not apart.size:
            continue
        # A price above all others on what is too far apart: it is taken only where nothing else is left, and dropped then.
        price = np.where(apart <= caliper, apart, (1 + caliper) * (1 + min(apart.shape)))
        for row, column in zip(*linear_sum_assignment(price), strict=True):
            if apart[row, column] <= caliper:
                pairs.append((first.index[row], second.index[column], first[on].iloc[row], second[on].iloc[column]))
    return pd.DataFrame(pairs, columns=["with_label", "without_label", "first", "second"])
