"""Tidy tables: one row per (layer, token), and where it came from.

`schema.py` has what a table's provenance says, `frame.py` the functions that keep it while tables are made of tables, `files.py`
the files that keep both. `distinct.py` finds the rows of copied texts, `summary.py` has means by layer.
"""

from basin_lens.tables.files import csv_text, is_saved, load, save, save_csv
from basin_lens.tables.frame import (
    assign,
    at_layer,
    build,
    check_names,
    columns,
    concat,
    described,
    merge,
    noted,
    provenance,
    require,
    runs,
    scores,
    select,
    with_columns,
    with_provenance,
    without_provenance,
)
from basin_lens.tables.schema import Column, Provenance
from basin_lens.tables.summary import interval, layer_summary
from basin_lens.values import KEYS, Facts

__all__ = [
    "KEYS",
    "Column",
    "Facts",
    "Provenance",
    "assign",
    "at_layer",
    "build",
    "check_names",
    "columns",
    "concat",
    "csv_text",
    "described",
    "interval",
    "is_saved",
    "layer_summary",
    "load",
    "merge",
    "noted",
    "provenance",
    "require",
    "runs",
    "save",
    "save_csv",
    "scores",
    "select",
    "with_columns",
    "with_provenance",
    "without_provenance",
]
