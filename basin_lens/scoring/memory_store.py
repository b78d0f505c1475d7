"""What pieces find, kept in memory; and what any place for it must offer."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from basin_lens.capture.columns import Columns
from basin_lens.capture.pieces import ReadPiece, fill, put_columns
from basin_lens.scoring.job import Job, LayerPiece
from basin_lens.scoring.results import LayerScores, Part


@runtime_checkable
class Store(Protocol):
    """Where the pieces of a job put what they find."""

    def unread(self) -> list[int]:
        """Pieces of reading that are not done."""
        ...

    def put_read(self, index: int, piece: ReadPiece) -> None:
        """Keep a piece of reading."""
        ...

    def all_read(self) -> None:
        """The last piece of reading is done: from here on the job's capture is one that was read."""
        ...

    def unscored(self) -> list[int]:
        """Layers whose scores are not there."""
        ...

    def put_scores(self, scores: LayerScores) -> None:
        """Keep a layer's scores."""
        ...

    def scores(self, layer: int) -> LayerScores:
        """A layer's scores."""
        ...

    def has(self, piece: LayerPiece) -> bool:
        """Whether a piece of the work at a layer is done; all are when its scores are there."""
        ...

    def put(self, piece: LayerPiece, part: Part) -> None:
        """Keep what a piece of the work at a layer gave, until its scores are there."""
        ...

    def part(self, piece: LayerPiece) -> Part:
        """What a piece of the work at a layer gave."""
        ...


class MemoryStore:
    """Keeps everything until the job's table is made. The capture is filled when the last piece is read, and not before: an
    interrupted reading must not pass for one."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._read: set[int] = set()
        self._states: dict[int, Tensor] = {}
        self._columns: Columns = {}
        self._scores: dict[int, LayerScores] = {}
        self._parts: dict[LayerPiece, Part] = {}

    def unread(self) -> list[int]:
        return [index for index in range(len(self.job.pieces)) if index not in self._read]

    def put_read(self, index: int, piece: ReadPiece) -> None:
        n_rows = self.job.capture.n_rows
        for border, states in piece.states.items():
            if border not in self._states:
                self._states[border] = torch.full((n_rows, states.shape[1]), torch.nan, dtype=torch.float32, device="cpu")
            self._states[border][piece.rows] = states
        put_columns(self._columns, piece, n_rows)
        self._read.add(index)

    def all_read(self) -> None:
        if self._read:
            fill(self.job.capture, self._states, self._columns)

    def unscored(self) -> list[int]:
        return [layer for layer in self.job.layers if layer not in self._scores]

    def put_scores(self, scores: LayerScores) -> None:
        self._scores[scores.layer] = scores
        self._parts.clear()

    def scores(self, layer: int) -> LayerScores:
        return self._scores[layer]

    def has(self, piece: LayerPiece) -> bool:
        return piece.layer in self._scores or piece in self._parts

    def put(self, piece: LayerPiece, part: Part) -> None:
        self._parts[piece] = part

    def part(self, piece: LayerPiece) -> Part:
        return self._parts[piece]
