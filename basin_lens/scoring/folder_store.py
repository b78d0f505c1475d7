"""What pieces find, kept in a folder: a file each, whole or not there, sealed, so that a run goes on where it was interrupted.

    pieces/plan.json                        what the run is
    pieces/states/border-018/00003.safetensors   states of the third piece of reading at a border
    pieces/read/00003.safetensors           its rows and its values of token analyzers; written last, it says that the piece is done
    pieces/shards/layer-018/search-003.safetensors   of a layer that is cut: what a piece of it gave
    pieces/scores/layer-018.safetensors     the scores of a layer

Files of one plan are the same, byte by byte, whoever writes them, on one kind of machine.
"""

import json
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from basin_lens.capture.columns import Columns
from basin_lens.capture.disk_states import StatesOnDisk, place_of, read_states_of, write_states_of, write_tensors
from basin_lens.capture.pieces import ReadPiece, fill, put_columns
from basin_lens.errors import PieceWarning, StoreError
from basin_lens.records import Kind
from basin_lens.scoring.job import Job, LayerPiece
from basin_lens.scoring.results import LayerNeighbors, LayerScores, Part
from basin_lens.values import Facts

KIND = Kind("a piece of a run", "basin_lens piece 1", "Give the same command again: what is damaged is made anew.")
_OF_SCORES = ("reliability", "reference_error", "left_out", "facts", "search")


class FolderStore:
    """Keeps the pieces of a job in a folder.

    Args:
        job: whose pieces they are.
        folder: where; made if it is not there.
        plan: hash of the plan, which every file bears.
        dtype: of the states on disk.
        keep_states: keep all states; else those of a border are deleted when no layer is left that needs them.

    Warns:
        PieceWarning: a damaged piece, which is made anew.
    """

    def __init__(self, job: Job, folder: Path, plan: str, *, dtype: torch.dtype = torch.float32, keep_states: bool = False) -> None:
        self.job, self.folder, self.dtype, self.keep_states = job, folder, dtype, keep_states
        self.mark: Mapping[str, str] = {"plan": plan}
        self.states = folder / "states"
        self._proven: set[int] = set()  # layers whose scores were found whole
        self._proven_pieces: set[Path] = set()  # files of reading that were
        self._proven_parts: set[LayerPiece] = set()

    @cached_property
    def rows(self) -> list[Tensor]:
        """Rows of each piece of reading."""
        return [self.job.rows_of(index) for index in range(len(self.job.pieces))]

    def read_place(self, index: int) -> Path:
        """Where a piece of reading says that it is done."""
        return self.folder / "read" / f"{index:05d}.safetensors"

    def scores_place(self, layer: int) -> Path:
        """Where the scores of a layer lie."""
        return self.folder / "scores" / f"layer-{layer:03d}.safetensors"

    def borders_needed(self) -> list[int]:
        """Borders whose states are needed: around what the layers without scores look at; all if states are kept."""
        if self.job.was_read:
            return []
        if self.keep_states:
            return list(self.job.schedule.borders)
        open_ = set(self.unscored())
        layers = {layer + step for layer in open_ for step in range(self.job.plan.most_blocks)}
        return [border for border in self.job.schedule.borders if {border, border - 1} & layers]

    def unread(self) -> list[int]:
        borders = self.borders_needed()
        return [index for index in range(len(self.job.pieces)) if not self._is_read(index, borders)]

    def has_read(self, index: int) -> bool:
        """Whether a piece of reading is done."""
        return self._is_read(index, self.borders_needed())

    def _is_read(self, index: int, borders: list[int]) -> bool:
        rows, width = self.rows[index], self.job.capture.model["width"]
        paths = {border: place_of(self.states, border, index) for border in borders}
        try:
            if not self._is_proven(self.read_place(index)):
                if not self.read_place(index).exists():
                    return False
                self._read_columns(index)
                self._proven_pieces.add(self.read_place(index))
            for border, path in paths.items():
                if self._is_proven(path):
                    continue
                if not path.exists():
                    return self._is_read_elsewhere(index, borders)
                read_states_of(self.states, KIND, self.mark, border, index, (len(rows), width))
                self._proven_pieces.add(path)
        except StoreError as error:
            if self._is_read_elsewhere(index, borders):
                return True
            warnings.warn(f"A piece of reading is made again: {error}", PieceWarning, stacklevel=2)
            return False
        return True

    def _is_proven(self, path: Path) -> bool:
        """Whether a file was found whole, or written, by this store, and is still there."""
        return path in self._proven_pieces and path.exists()

    def _is_read_elsewhere(self, index: int, borders: list[int]) -> bool:
        """Whether states went because another part has scored their layers since: then nobody needs them."""
        needed = self.borders_needed()
        return len(needed) < len(borders) and self._is_read(index, needed)

    def put_read(self, index: int, piece: ReadPiece) -> None:
        for border in self.borders_needed():
            write_states_of(self.states, KIND, self.mark, border, index, piece.states[border], self.dtype)
        # As JSON, because keys and columns of somebody's own analyzer may hold any sign.
        values = {
            json.dumps([key, name]): value.contiguous() for key, held in piece.columns.items() for name, value in held.items()
        }
        write_tensors(self.read_place(index), KIND, {"rows": piece.rows, **values}, {**self.mark, "piece": str(index)})

    def _read_columns(self, index: int) -> ReadPiece:
        """What a piece of reading measured, without states."""
        rows = self.rows[index]
        with KIND.tensors(self.read_place(index)) as (file, facts):
            self._check_mark(facts, piece=str(index))
            if not torch.equal(file.get_tensor("rows"), rows):
                raise ValueError("other rows than the plan's")
            columns: Columns = {}
            for name in file.keys():  # noqa: SIM118 - an open file is no mapping
                if name != "rows":
                    key, column = json.loads(name)
                    columns.setdefault(key, {})[column] = file.get_tensor(name)
            return ReadPiece(rows, {}, columns)

    def all_read(self) -> None:
        self.use_states()
        for index in range(len(self.rows)):
            put_columns(self.job.capture.columns, self._read_columns(index), self.job.capture.n_rows)

    def use_states(self) -> None:
        """The capture's states are those in the folder, from now on."""
        if not self.job.was_read:
            width, borders = self.job.capture.model["width"], self.job.schedule.borders
            fill(self.job.capture, StatesOnDisk(self.states, KIND, self.mark, borders, self.rows, width, self.job.shards > 1), {})

    def unscored(self) -> list[int]:
        return [layer for layer in self.job.layers if not self._is_scored(layer)]

    def _is_scored(self, layer: int) -> bool:
        if not self.scores_place(layer).exists():
            return False
        if layer in self._proven:
            return True
        try:
            self.scores(layer)
            self._proven.add(layer)
        except StoreError as error:
            warnings.warn(f"The scores of layer {layer} are made again: {error}", PieceWarning, stacklevel=2)
            self.scores_place(layer).unlink(missing_ok=True)
            return False
        return True

    def put_scores(self, scores: LayerScores) -> None:
        tensors = {f"value|{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in scores.values.items()}
        if scores.neighbors is not None:
            near = scores.neighbors
            kept = {"rows": near.rows.astype(np.int32), "before": near.before, "after": near.after, "groups": near.groups}
            tensors |= {f"near|{name}": torch.from_numpy(value) for name, value in kept.items() if value is not None}
        facts = {name: getattr(scores, name) for name in _OF_SCORES}
        marked = {**self.mark, "layer": str(scores.layer), "found": json.dumps(facts)}
        write_tensors(self.scores_place(scores.layer), KIND, tensors, marked)
        self._proven.add(scores.layer)
        rmtree(self.part_place(LayerPiece("join", scores.layer)).parent, ignore_errors=True)
        if not self.keep_states:
            self.forget_states()

    def scores(self, layer: int) -> LayerScores:
        with KIND.tensors(self.scores_place(layer)) as (file, facts):
            self._check_mark(facts, layer=str(layer))
            told: Facts = json.loads(facts["found"])
            values = {name: file.get_tensor(f"value|{name}").numpy() for name in self._columns_of_neighbors}
            if any(value.shape != (self.job.capture.n_rows,) for value in values.values()):
                raise ValueError("values of another number of rows")
            return LayerScores(layer, values, **{name: told[name] for name in _OF_SCORES}, neighbors=_neighbors(file))

    @cached_property
    def _columns_of_neighbors(self) -> list[str]:
        return [column.name for a in self.job.plan.of_neighbors for column in a.columns]

    def _check_mark(self, facts: Mapping[str, str], **more: str) -> None:
        wanted = {**self.mark, **more}
        if {name: facts.get(name) for name in wanted} != wanted:
            raise ValueError(f"the file of another run or piece ({', '.join(f'{name} {facts.get(name)}' for name in wanted)})")

    def part_place(self, piece: LayerPiece) -> Path:
        """Where what a piece of the work at a layer gave lies."""
        return self.folder / "shards" / f"layer-{piece.layer:03d}" / f"{piece.step}-{piece.shard:03d}.safetensors"

    def has(self, piece: LayerPiece) -> bool:
        if self._is_scored(piece.layer):  # its scores stand for all its pieces, which are deleted
            return True
        if piece.step == "collect" or not self.part_place(piece).exists():
            return False
        if piece not in self._proven_parts:
            try:
                self.part(piece)
            except StoreError as error:
                warnings.warn(f"A piece ({piece}) is made again: {error}", PieceWarning, stacklevel=2)
                self.part_place(piece).unlink(missing_ok=True)
                return False
            self._proven_parts.add(piece)
        return True

    def put(self, piece: LayerPiece, part: Part) -> None:
        tensors = {name: value.cpu().contiguous() for name, value in part.tensors.items()}
        write_tensors(self.part_place(piece), KIND, tensors, {**self.mark, "piece": str(piece), "found": json.dumps(part.facts)})
        self._proven_parts.add(piece)

    def part(self, piece: LayerPiece) -> Part:
        """What a piece gave. Its tensors are read from the file when they are looked at."""
        with KIND.tensors(self.part_place(piece)) as (file, facts):
            self._check_mark(facts, piece=str(piece))
            names = list(file.keys())
            return Part({name: file.get_tensor(name) for name in names}, json.loads(facts["found"]))

    def forget_states(self) -> None:
        """Delete the states of borders that nobody needs any more."""
        needed = {place_of(self.states, border, 0).parent for border in self.borders_needed()}
        for folder in sorted(self.states.glob("border-*")):
            if folder not in needed:
                rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Delete what a finished run has no use for: the pieces, and the states unless they are kept."""
        for name in ("scores", "shards", *(() if self.keep_states else ("read", "states"))):
            rmtree(self.folder / name, ignore_errors=True)


def _neighbors(file: safe_open) -> LayerNeighbors | None:
    names = [name for name in file.keys() if name.startswith("near|")]  # noqa: SIM118 - an open file is no mapping
    held = {name.split("|", 1)[1]: file.get_tensor(name).numpy() for name in names}
    if not held:
        return None
    return LayerNeighbors(held["rows"].astype(np.int64), held["before"], held["after"], held.get("groups"))
