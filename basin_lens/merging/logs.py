"""What a training keeps in its folder on the way: a log of its steps, and the checkpoint from which it goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from basin_lens.errors import StoreError
from basin_lens.files import write_file
from basin_lens.merging.hook import RECORD

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"


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


def rewrite_log(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """The log as it was at the last checkpoint."""
    write_file(folder / LOG, "".join(json.dumps(record) + "\n" for record in history))


def append_log(folder: Path, record: dict[str, Any]) -> None:
    """A line for a step."""
    try:
        with (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
    except OSError as error:
        raise StoreError(f"expected a folder that can be written, got {str(folder)!r}: {error}. Choose another.") from error
