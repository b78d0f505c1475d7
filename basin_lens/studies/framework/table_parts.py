"""Rows and columns of a study's tables."""

from typing import Any, TypeAlias, cast

import pandas as pd

from basin_lens import tables

# A row as a named tuple: which names it has is known where its table is made.
Row: TypeAlias = Any


def named_rows(table: pd.DataFrame) -> list[Row]:
    """The rows as named tuples."""
    return list(table.itertuples())


def above_layer_0(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of layers above 0, if there are any."""
    if "layer" not in table.columns or not (table["layer"] > 0).any():
        return table
    return tables.select(table, table["layer"] > 0)


def sequence_shown(table: pd.DataFrame, column: str) -> int:
    """The sequence to show as text: the first of those with most values of a column, which may be of a sample of the tokens."""
    return int(cast("int", table.groupby("seq")[column].count().idxmax()))
