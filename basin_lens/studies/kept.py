"""A study's folder: whose it is, and what was written to it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from basin_lens.errors import StoreError
from basin_lens.files import clear_leavings, is_lock


def refuse_folder(target: Path, name: str) -> None:
    """Refuse a folder that holds anything but an earlier run of this study. To be called before any long work, too.

    Raises:
        StoreError: see there.
    """
    target = target.resolve()
    for folder in (target.parent, target):
        clear_leavings(folder)
    if not target.exists():
        return
    if target == Path.cwd():
        raise StoreError(f"expected a folder for the study, got {str(target)!r}, in which you stand. Name one in it.")
    try:
        held = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        held = {name for name in held if not is_lock(name)}
        before = read_results(target) if "results.json" in held else None
    except OSError as error:
        raise StoreError(f"expected a folder for the study, got {str(target)!r}: {error}. Choose another.") from error
    if before is not None and before["study"] == name:
        held -= {"results.json", "report.html", "tables/tokens.parquet"}
        held -= {f"tables/{table}{end}" for table in before.get("tables", []) for end in (".parquet", ".csv")}
        held -= {f"figures/{figure}{end}" for figure in before.get("figures", []) for end in (".png", ".pdf")}
    if held:
        raise StoreError(f"expected an empty folder or an earlier {name} study, got {str(target)!r} with {min(held)!r} in it.")


def read_results(folder: Path) -> dict[str, Any]:
    """What `Study.save` wrote to `results.json`.

    Raises:
        StoreError: no such file, or not a study's.
    """
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"expected a study's folder with results.json, got {str(folder)!r}: {error}. Run the study first."
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("study"), str):
        raise StoreError(f"expected a study's results.json in {str(folder)!r}, got another file of that name. Run the study first.")
    return found


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain JSON, every digit kept; what is missing is null."""
    return [{str(name): _plain(value) for name, value in row.items()} for row in table.astype(object).to_dict("records")]


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float | np.floating) and not np.isfinite(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value
