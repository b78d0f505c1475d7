"""What a training keeps in its folder on the way: a log of its steps, and the checkpoint from which it goes on."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError, safe_open

from basin_lens import records
from basin_lens.errors import StoreError
from basin_lens.files import append_line, write_file
from basin_lens.merging.merger_files import RECORD
from basin_lens.values import Facts

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
_KIND = records.Kind("the log of a training", "json lines", "Train again, or delete the log to do without its figure.")


def clear_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of the very training that the folder's merger came from: a death left it when the merger was whole."""
    try:
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))["facts"]["training"]["key"]
        with safe_open(folder / CHECKPOINT, framework="pt") as held:
            same = (held.metadata() or {}).get("training") == known
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):  # none, or of another training: not ours to judge
        return
    if same:
        (folder / CHECKPOINT).unlink(missing_ok=True)


def refuse_other(folder: Path, key: str) -> None:
    """Refuse a folder that holds the finished merger of another training, or a log that is none.

    Raises:
        StoreError: see there.
    """
    try:
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))["facts"]["training"]["key"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that was calibrated alone
        known = key
    if known != key:
        raise StoreError(
            f"expected a folder of this training ({key}), got {str(folder)!r} with the merger of another ({known}). Choose "
            "another folder, or "
            "delete it."
        )
    refuse_foreign_log(folder)


def refuse_foreign_log(folder: Path) -> None:
    """Refuse a folder in which somebody else's file bears the log's name.

    Raises:
        StoreError: see there.
    """
    try:
        with (folder / LOG).open(encoding="utf-8") as log:
            first = log.readline()
        ours = not first.endswith("\n") or {"step", "plain_loss"} <= set(json.loads(first))  # a death may have cut its first line
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise StoreError(
            f"expected a folder for a training, got {str(folder)!r} with a {LOG} of another kind. Choose another folder."
        )


def read_log(folder: Path, steps: int) -> pd.DataFrame | None:
    """The log of a finished training, a row for each of its steps; None without one.

    Raises:
        StoreError: not the log of so many steps.
    """
    path = folder / LOG
    if not path.is_file():
        return None
    with _KIND.reading(path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if [row["step"] for row in rows] != list(range(1, steps + 1)):
            raise ValueError(f"no log of {steps} steps")
        return pd.DataFrame(rows)


def rewrite_log(folder: Path, history: Sequence[Facts]) -> None:
    """The log as it was at the last checkpoint."""
    write_file(folder / LOG, "".join(json.dumps(record) + "\n" for record in history))


def append_log(folder: Path, record: Facts) -> None:
    """A line for a step."""
    append_line(folder / LOG, json.dumps(record))
