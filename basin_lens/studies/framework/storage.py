"""A study's folder: whose it is, and what was written to it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from basin_lens import records as kept
from basin_lens.errors import StoreError
from basin_lens.files import check_folder, check_name, check_no_inputs, clear_leavings
from basin_lens.locks import is_own
from basin_lens.values import Facts

KIND = kept.Kind("a study's folder with results.json", "basin_lens study 1", "Run the study first, or again into another folder.")
_FIELDS: dict[str, kept.Expected] = {
    "study": str,
    "title": str,
    "about": [str],
    "hypothesis": str,
    "decision": str,
    "verdict": [str],
    "findings": [dict],
    "red_flags": (list, None),
    "not_tested": [str],
    "tables": [str],
    "figures": [str],
    "provenance": dict,
}
# Of the findings; null where there is none.
_NUMBERS = (
    "layer",
    "n_units",
    "n_sequences",
    "n_documents",
    "n_tokens",
    "estimate",
    "low",
    "high",
    "null",
    "p",
    "p_corrected",
    "n_tests",
    "p_floor",
    "guide_statistic",
    "guide_r",
    "guide_p",
)


def refuse_folder(target: Path, name: str, inputs: Sequence[Path] = (), *, heal: bool = True) -> None:
    """Refuse a folder that holds anything but an earlier run of this study, or an input. To be called before any long work, too.

    `heal`: first clear away and put back what a run that was killed left there; else nothing is touched.

    Raises:
        StoreError: see there.
    """
    check_name(target)
    target = target.resolve()
    check_folder(target)
    check_no_inputs(target, inputs)
    for folder in (target.parent, target) if heal else ():
        clear_leavings(folder)
    if not target.exists():
        return
    if target == Path.cwd():
        raise StoreError(f"expected a folder for the study, got {str(target)!r}, in which you stand. Name one in it.")
    try:
        held = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        held = {name for name in held if not is_own(name)}
        before = read_results(target) if "results.json" in held else None
    except OSError as error:
        raise StoreError(f"expected a folder for the study, got {str(target)!r}: {error}. Choose another.") from error
    if before is not None and before["study"] == name:
        held -= {"results.json", "report.html", "tables/tokens.parquet"}
        held -= {f"tables/{table}{end}" for table in before["tables"] for end in (".parquet", ".csv")}
        held -= {f"figures/{figure}{end}" for figure in before["figures"] for end in (".png", ".pdf")}
    if held:
        raise StoreError(f"expected an empty folder or an earlier {name} study, got {str(target)!r} with {min(held)!r} in it.")


def read_results(folder: Path) -> Facts:
    """What `Study.save` wrote to `results.json`.

    Raises:
        StoreError: no such file, not a study's, not as it was written, or of an earlier version.
    """
    found = KIND.read(folder / "results.json", _FIELDS)
    with KIND.reading(folder):
        kept.fields({"flags": found["red_flags"] or []}, {"flags": [dict]})
        for row in found["findings"]:
            kept.fields(row, {name: (int, float, None) for name in _NUMBERS if name in row})
        if not found["verdict"]:
            raise ValueError("a study without a verdict")
    del found["files"]
    return found


def records(table: pd.DataFrame) -> list[Facts]:
    """Rows as plain JSON, every digit kept; what is missing is null."""
    return [{str(name): _plain(value) for name, value in row.items()} for row in table.astype(object).to_dict("records")]


def _plain(value: object) -> object:
    if value is None or value is pd.NA or (isinstance(value, float | np.floating) and not np.isfinite(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value
