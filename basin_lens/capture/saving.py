"""A capture -> a folder. See `store` for the files."""

import os
from dataclasses import asdict

import torch

from basin_lens.capture.states import CapturedStates
from basin_lens.capture.store import Shards, copy_borders, write_borders, write_record
from basin_lens.errors import CaptureError
from basin_lens.files import new_folder
from basin_lens.records import Unfinished


def save_capture(capture: CapturedStates, path: str | os.PathLike[str]) -> None:
    """Write a capture to a new folder; see `Capture.save`."""
    if not capture.is_read:
        raise CaptureError(
            "expected a capture that the model has read, got one that is only planned. Call read_states(model, capture)."
        )
    with new_folder(path) as folder:
        shards: Shards = capture._shards
        if capture._store is not None:
            copy_borders(capture._store, folder, shards)
        else:
            held = {border: capture.border(border) for layer in capture.layers for border in (layer, layer + 1)}
            shards = write_borders(folder, 0, torch.arange(capture.n_rows, device="cpu"), held)
        write_fields(capture, folder, shards)


def write_fields(capture: CapturedStates, folder: Unfinished, shards: Shards) -> None:
    """Write everything but the states, which lie in the files `shards`."""
    record = {
        "sequences": [asdict(s) for s in capture.sequences],
        "passages": None if capture.passages is None else [asdict(p) for p in capture.passages],
        "docs": capture.docs,
        "labels": capture.labels,
        "strings": list(capture.strings.items()),
        "layers": capture.layers,
        "model": capture.model,
        "settings": capture.settings,
    }
    write_record(folder, record, capture.columns, capture._readings, shards)
