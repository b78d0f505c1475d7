"""Reading in pieces: some batches of a planned capture, each piece by itself, in any order and in any process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.capture.batches import TokenMeasure, token_batches
from basin_lens.capture.columns import Columns, keep_values
from basin_lens.capture.disk_states import StatesOnDisk
from basin_lens.capture.forward_reader import ForwardReader
from basin_lens.capture.schedule import PassSchedule
from basin_lens.capture.states import CapturedStates
from basin_lens.model import HookedModel, n_layers, one_side
from basin_lens.values import Whole

# Rows, right-padded tokens and validity of one batch; see `token_batches`.
Batch = tuple[Int[Tensor, " n"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]


@dataclass(frozen=True)
class ReadPiece:
    """What the model gave for some rows of a capture.

    Attributes:
        rows: of the capture.
        states: by block border, float32.
        columns: values of token analyzers on these rows, as a capture has them: by key, then column, `[n_layers or 1, n]`.
    """

    rows: Int[Tensor, " n"]
    states: Mapping[int, Float[Tensor, "n d"]]
    columns: Columns


def batches_of(model: HookedModel, capture: CapturedStates, batch_size: Whole | None) -> list[Batch]:
    """The batches in which the model reads a capture: the same in every process."""
    return list(token_batches(capture, batch_size, one_side(model, capture.lengths.tolist())))


def piece_sizes(batches: Sequence[Batch], tokens: int) -> list[range]:
    """Which batches make a piece: so many, one after the other, that they hold at least this many tokens; 0: each is one."""
    pieces: list[range] = []
    first, held = 0, 0
    for index, (rows, _, _) in enumerate(batches):
        held += len(rows)
        if held >= tokens or index + 1 == len(batches):
            pieces.append(range(first, index + 1))
            first, held = index + 1, 0
    return pieces


def schedule_of(
    model: HookedModel, capture: CapturedStates, analyzers: Sequence[TokenMeasure], *, keep_states: bool = True
) -> PassSchedule:
    """What a pass over any batch of a capture must collect."""
    borders = sorted({border for layer in capture.layers for border in (layer, layer + 1)}) if keep_states else []
    return PassSchedule(n_layers(model), capture.layers, tuple(borders), tuple(analyzers))


def read_piece(
    model: HookedModel,
    capture: CapturedStates,
    schedule: PassSchedule,
    batches: Sequence[Batch],
    passed: Callable[[int], object] = lambda _: None,
) -> ReadPiece:
    """Run the model over some batches of a capture, which is not changed.

    Args:
        model: the model that planned the capture.
        capture: whose rows they are.
        schedule: what to collect.
        batches: which rows.
        passed: called with the number of tokens of each batch when it is done.

    Raises:
        CaptureError: NaN or infinite states. AnalyzerError: an analyzer's own code failed.
    """
    columns: Columns = {}
    rows = torch.cat([rows for rows, _, _ in batches])
    states: dict[int, list[Tensor]] = {border: [] for border in schedule.borders}
    begun = 0
    for there, tokens, valid in batches:
        places = torch.arange(begun, begun + len(there), device="cpu")
        keep = partial(keep_values, columns, (schedule.n_layers, len(rows)), places, valid)
        found = ForwardReader(model, schedule, tokens, valid, keep, partial(capture.refuse_nonfinite, there)).read()
        for border, read in found.items():
            states[border].append(read)
        begun += len(there)
        passed(len(there))
    return ReadPiece(rows, {border: held[0] if len(held) == 1 else torch.cat(held) for border, held in states.items()}, columns)


def put_columns(columns: Columns, piece: ReadPiece, n_rows: int) -> None:
    """Put a piece's values where the whole capture has them."""
    for key, held in piece.columns.items():
        for name, values in held.items():
            whole = columns.setdefault(key, {})
            if name not in whole:
                whole[name] = torch.full((len(values), n_rows), torch.nan, dtype=torch.float32, device="cpu")
            whole[name][:, piece.rows] = values


def fill(capture: CapturedStates, states: dict[int, Tensor] | StatesOnDisk, columns: Columns) -> None:
    """Make a planned capture one that was read: its states by border (in memory, or on a disk until asked for), and columns."""
    capture._states = states
    capture.columns.update(columns)
