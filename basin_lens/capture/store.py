"""Captures on disk: safetensors and JSON, in folders that are there as a whole or not at all."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from basin_lens.errors import StoreError
from basin_lens.texts import Passage, TaggedPassage, Word

_FORMAT = 1


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say what failed when a disk is full or a folder is gone."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"expected a folder that can be written, got {str(folder.parent)!r}: {error}. Free space, or choose another."
        ) from error


def write_borders(folder: Path, index: int, rows: Int[Tensor, " n"], borders: Mapping[int, Float[Tensor, "n d"]]) -> None:
    """Write the states of some rows at several block borders, one file per batch."""
    tensors = {f"border.{border}": states.contiguous() for border, states in borders.items()}
    with _writing(folder):
        save_file({"rows": rows, **tensors}, folder / f"states-{index:05d}.safetensors")


def copy_borders(source: Path, target: Path) -> None:
    """Copy all states to another folder."""
    with _writing(target):
        for shard in source.glob("states-*.safetensors"):
            shutil.copy2(shard, target)


def read_border(folder: Path, border: int, n_rows: int) -> Float[Tensor, "rows d"] | None:
    """States at one border in row order, or None if the folder does not hold it."""
    states: Tensor | None = None
    for shard in sorted(folder.glob("states-*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            if f"border.{border}" not in file.keys():  # noqa: SIM118 - safe_open is no mapping
                return None
            values = file.get_tensor(f"border.{border}")
            states = torch.empty(n_rows, values.shape[1], dtype=torch.float32, device="cpu") if states is None else states
            states[file.get_tensor("rows")] = values
    return states


def write_record(folder: Path, record: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Write everything but the states.

    Raises:
        StoreError: a label that JSON cannot hold.
    """
    try:
        text = json.dumps({"format": _FORMAT, **record})
    except TypeError as error:
        raise StoreError(f"expected labels that JSON can hold (text, numbers, booleans), got: {error}.") from error
    with _writing(folder):
        if values:
            save_file({name: value.contiguous() for name, value in values.items()}, folder / "values.safetensors")
        (folder / "capture.json").write_text(text, encoding="utf-8")


def read_record(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_record` wrote.

    Raises:
        StoreError: no capture there, or one of an unknown format.
    """
    try:
        record = json.loads((folder / "capture.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StoreError(f"expected a saved capture (a folder with capture.json) at {str(folder)!r}, got: {error}.") from error
    if record.pop("format", None) != _FORMAT:
        raise StoreError(f"expected capture format {_FORMAT} at {str(folder)!r}, got another. Use the version that wrote it.")
    values = {}
    if (folder / "values.safetensors").is_file():
        with safe_open(folder / "values.safetensors", framework="pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    return record, values


def passage_from_json(record: dict[str, Any]) -> Passage:
    """A passage, with its gold words if it has some, from JSON that has no tuples."""
    spans = {name: (start, end) for name, (start, end) in record["spans"].items()}
    if "words" not in record:
        return Passage(**record | {"spans": spans})
    return TaggedPassage(**record | {"spans": spans, "words": tuple(Word(**word) for word in record["words"])})
