"""Tidy tables: one row per (layer, token), and where it came from.

`schema.py` has what a table's provenance says, `frame.py` the functions that keep it while tables are made of tables, `files.py`
the files that keep both, `run_table.py` a run's table in a folder, `making.py` what is said of a run's making, `bundles.py` the
archive for a colleague. `distinct.py` finds the rows of copied texts, `references.py` the error of what scores are held against,
`summary.py` has means by layer.
"""

from basin_lens.tables.bundles import Bundle, bundle, read_bundle
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
from basin_lens.tables.making import made_now, package_version
from basin_lens.tables.references import reference_error, with_reference_error
from basin_lens.tables.run_table import RunTable, open
from basin_lens.tables.schema import Column, Provenance
from basin_lens.tables.summary import interval, layer_summary
from basin_lens.values import KEYS, Facts

__all__ = [
    "KEYS",
    "Bundle",
    "Column",
    "Facts",
    "Provenance",
    "RunTable",
    "assign",
    "at_layer",
    "build",
    "bundle",
    "check_names",
    "columns",
    "concat",
    "csv_text",
    "described",
    "interval",
    "is_saved",
    "layer_summary",
    "load",
    "made_now",
    "merge",
    "noted",
    "open",
    "package_version",
    "provenance",
    "read_bundle",
    "reference_error",
    "require",
    "runs",
    "save",
    "save_csv",
    "scores",
    "select",
    "with_columns",
    "with_provenance",
    "with_reference_error",
    "without_provenance",
]
