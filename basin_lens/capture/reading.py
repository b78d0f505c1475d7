"""The model reads the rows of a capture: states at block borders, and the columns of token analyzers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from basin_lens.capture.batches import TokenMeasure, check_analyzers, check_points
from basin_lens.capture.columns import all_or_none
from basin_lens.capture.pieces import batches_of, put_columns, read_piece, schedule_of
from basin_lens.capture.saving import write_fields
from basin_lens.capture.states import CapturedStates
from basin_lens.capture.store import write_borders
from basin_lens.errors import CaptureError
from basin_lens.files import new_folder
from basin_lens.model import HookedModel, width
from basin_lens.records import Unfinished
from basin_lens.values import Facts, Whole, hides_bars

C = TypeVar("C", bound=CapturedStates)


def read_states(
    model: HookedModel,
    capture: C,
    analyzers: Sequence[TokenMeasure] | None = None,
    *,
    batch_size: Whole | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> C:
    """Run the model over the rows of a planned capture, once, and keep the states there; interrupted, it is a plan as before.

    Args:
        model: the model that planned it.
        capture: from `Capture.plan`; filled in place.
        analyzers, batch_size, store, progress: see `Capture.from_texts`.

    Returns:
        the capture.

    Raises:
        CaptureError: a capture that was read; and as for `Capture.from_texts`.
    """
    if capture.is_read:
        raise CaptureError("expected a capture that is only planned, got one that was read. Plan another: Capture.plan(...).")
    token_analyzers = list(analyzers or [])
    check_analyzers(token_analyzers)
    if store is None:
        run_model(model, capture, token_analyzers, batch_size=batch_size, progress=progress, keep_states=True)
        return capture
    place = Path(store).absolute()  # also from another working folder
    with new_folder(place) as folder:
        shards = run_model(
            model, capture, token_analyzers, batch_size=batch_size, progress=progress, keep_states=True, folder=folder
        )
        write_fields(capture, folder, shards)
    capture._store, capture._shards = place, shards
    return capture


@torch.inference_mode(False)  # what is kept must not be an inference tensor, whatever mode the caller is in
def run_model(
    model: HookedModel,
    capture: CapturedStates,
    analyzers: Sequence[TokenMeasure],
    *,
    batch_size: Whole | None,
    progress: bool,
    keep_states: bool,
    folder: Unfinished | None = None,
) -> dict[str, Facts]:
    """Run the model over all sequences, a batch at a time; keep states if asked to, and fill the columns of analyzers.

    States go to the capture, or into the folder.

    Returns:
        the files of states that the folder now holds.
    """
    check_points(model, capture.layers, analyzers)
    schedule = schedule_of(model, capture, analyzers, keep_states=keep_states)
    states: dict[int, Tensor] = {}
    shards: dict[str, Facts] = {}
    if folder is None:
        shape = capture.n_rows, width(model)
        states = {border: torch.full(shape, torch.nan, dtype=torch.float32, device="cpu") for border in schedule.borders}
    bar = tqdm(total=capture.n_rows, desc="reading the model", unit="token", disable=hides_bars(progress))
    with all_or_none(capture, analyzers), bar:
        for index, batch in enumerate(batches_of(model, capture, batch_size)):
            piece = read_piece(model, capture, schedule, [batch], bar.update)
            put_columns(capture.columns, piece, capture.n_rows)
            if folder is None:
                for border, read in piece.states.items():
                    states[border][piece.rows] = read
            else:
                shards |= write_borders(folder, index, piece.rows, piece.states)
    capture._states = states or capture._states  # only now: an interrupted reading must not pass for one
    return shards
