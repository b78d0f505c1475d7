"""Columns of a table as figures take them: at one layer, as numbers, with words for an axis."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.views import marks

BEFORE_UNIT = "\x00"  # in the words for an axis: where more words may come


def layer_of(table: pd.DataFrame, columns: Sequence[str], layer: int) -> pd.DataFrame:
    """The rows of one layer of a table of one run.

    Raises:
        TableError: a column is missing, no such layer, several runs.
    """
    tables.require(table, *columns)
    if "run" in table and table["run"].nunique() != 1:
        raise TableError(f"expected a table of one run, got {table['run'].nunique()}. Choose one: table[table.run == ...].")
    return tables.at_layer(table, layer)


def numbers_of(rows: pd.DataFrame, column: str) -> pd.Series:
    """A column as floats.

    Raises:
        TableError: it is not numeric.
    """
    if not pd.api.types.is_numeric_dtype(rows[column]):
        raise TableError(
            f"expected a numeric column, got {column!r} of {rows[column].dtype}. Pass it as by=, or turn it into numbers."
        )
    return rows[column].astype(float)


def axis_words(table: pd.DataFrame, column: str, labels: marks.Words = None) -> str:
    """A column's name, or the caller's words for it, and unit for an axis, with `BEFORE_UNIT` between them."""
    unit = marks.unit_of(table, column)
    return f"{marks.named(column, labels)}{BEFORE_UNIT}{f' [{marks.plain(unit)}]' if unit else ''}"


def is_flat(values: pd.Series) -> bool:
    """Whether values do not vary, but for rounding."""
    return bool(np.ptp(values.to_numpy()) <= 1e-10 * max(1e-300, float(np.abs(values).max())))
