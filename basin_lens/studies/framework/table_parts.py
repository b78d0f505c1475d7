"""Rows and columns of a study's tables."""

from collections.abc import Mapping
from typing import Any

import pandas as pd


def named_rows(table: pd.DataFrame) -> list[Any]:
    """The rows as named tuples."""
    return list(table.itertuples())


def above_layer_0(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of layers above 0, if there are any."""
    if "layer" not in table.columns or not (table["layer"] > 0).any():
        return table
    part = table[table["layer"] > 0]
    part.attrs = dict(table.attrs)
    return part


def with_columns(table: pd.DataFrame, columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The table with columns of a study's own described in its provenance, whence figures and findings take units."""
    answer = table.copy()
    held = table.attrs.get("provenance", {})
    described = {run: {**facts, "columns": {**facts["columns"], **columns}} for run, facts in held.items()}
    answer.attrs = {**table.attrs, "provenance": described}
    return answer
