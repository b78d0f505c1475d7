"""Tables to read on a page: four digits, p-values as such, yes and no, an en dash for what is missing."""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from basin_lens.values import is_missing
from basin_lens.views import marks

_FOLDED = 30  # rows, from which a table is folded
_WIDE = 8  # columns, from which those that say the same in every row leave the table
_LONG = 40  # characters, from which a cell breaks into lines
_PROBABILITY = re.compile(r"(^|_)p(_corrected)?$|^p_|(^|_)p_value$")


@dataclass(frozen=True)
class Cell:
    """A cell's text, and how it is set: "n" at the right, "long" in lines, or "" at the left in one line."""

    text: str
    kind: str


@dataclass(frozen=True)
class ReadableTable:
    """A table as the page shows it. `same`: what every row says, in words. `summary`: of a folded table; "": it is not folded."""

    same: tuple[str, ...]
    head: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    summary: str


def readable_table(table: pd.DataFrame) -> ReadableTable:
    """A table's cells as text, with named index levels as columns.

    In a wide table, columns that are the same in every row leave it, and are said once.
    """
    if table.index.nlevels > 1 or table.index.name is not None:
        table = table.reset_index()
    columns = [table.iloc[:, place] for place in range(table.shape[1])]
    same: tuple[str, ...] = ()
    if len(table) > 2 and len(columns) > _WIDE:
        alike = [column.astype(str).nunique() == 1 for column in columns]
        if not all(alike):
            said = [column for column, is_alike in zip(columns, alike, strict=True) if is_alike]
            columns = [column for column, is_alike in zip(columns, alike, strict=True) if not is_alike]
            # One without a value, such as notes that nobody wrote, says nothing.
            there = [column for column in said if not is_missing(column.iloc[0]) and str(column.iloc[0])]
            same = tuple(f"{column.name} {cell_text(column.iloc[0], str(column.name))}" for column in there)
    at_right = [pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column) for column in columns]
    head = tuple(Cell(str(column.name), "n" if right else "") for column, right in zip(columns, at_right, strict=True))
    cells = [
        [cell(value, str(column.name), at_right=right) for value in column.astype(object)]
        for column, right in zip(columns, at_right, strict=True)
    ]
    summary = f"Table of {len(table):,} rows and {table.shape[1]} columns" if len(table) > _FOLDED else ""
    return ReadableTable(same, head, tuple(zip(*cells, strict=True)), summary)


def cell(value: object, name: str, *, at_right: bool = False) -> Cell:
    """A value of the column `name`."""
    text = cell_text(value, name)
    return Cell(text, "n" if at_right else "long" if len(text) > _LONG else "")


def cell_text(value: object, name: str) -> str:
    """A value of the column `name` in words."""
    if isinstance(value, list | tuple | dict | set | np.ndarray):
        return str(value)
    if is_missing(value):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}".replace("-", "−")
    if isinstance(value, float | np.floating):
        return marks.probability(float(value)) if _PROBABILITY.search(name) else marks.number(float(value), 4)
    return str(value) or "–"
