"""States of pieces of reading in files: written a piece and a border at a time, read a border at a time.

Of many rows, a border is laid out in row order in one more file, of which only the rows that are looked at come into memory.
"""

import json
import mmap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from basin_lens.errors import PieceWarning, StoreError
from basin_lens.files import write_file
from basin_lens.records import OPEN_SEAL, Kind, Unfinished, seal_file

_WINDOW = 1 << 14  # rows that are laid out together


@dataclass(frozen=True)
class StatesOnDisk:
    """States by border, as a mapping has them: float32 in row order, read and proven each time that one is asked for.

    Attributes:
        folder: holds a folder for each border.
        kind: of the files.
        mark: the facts that every file must bear: of which run it is.
        held: the borders.
        rows: of the capture, of each piece.
        width: of a state.
        mapped: a border is a file in row order that is looked into; else it is read whole.
    """

    folder: Path
    kind: Kind
    mark: Mapping[str, str]
    held: Sequence[int]
    rows: Sequence[Int[Tensor, "_"]]
    width: int
    mapped: bool = False
    _looked_into: "WeakSet[mmap.mmap]" = field(default_factory=WeakSet, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.held)

    def __contains__(self, border: object) -> bool:
        return border in self.held

    def __getitem__(self, border: int) -> Float[Tensor, "rows d"]:
        if border not in self.held:
            raise KeyError(border)
        if self.mapped:
            return self._look_into(border)
        states = torch.empty(sum(len(rows) for rows in self.rows), self.width, dtype=torch.float32, device="cpu")
        for index, rows in enumerate(self.rows):
            states[rows] = read_states_of(self.folder, self.kind, self.mark, border, index, (len(rows), self.width)).float()
        return states

    def _look_into(self, border: int) -> Float[Tensor, "rows d"]:
        """The file of a border in row order, made if it is not there or not whole."""
        path = place_of(self.folder, border, 0).with_name("rows.safetensors")
        for attempt in (1, 2):
            if not path.exists():
                self._lay(border, path)
            try:
                with self.kind.tensors(path) as (file, facts):
                    wanted = {**self.mark, "border": str(border)}
                    held = file.get_slice("states")
                    if {name: facts.get(name) for name in wanted} != wanted or tuple(held.get_shape()) != self._shape:
                        raise ValueError("the file of another run or border")
                    return self._map(path)
            except StoreError as error:
                if attempt == 2:
                    raise
                warnings.warn(f"States in row order are laid out again: {error}", PieceWarning, stacklevel=2)
                path.unlink(missing_ok=True)
        raise AssertionError

    def _map(self, path: Path) -> Float[Tensor, "rows d"]:
        """The states in a file in row order, which come into memory where they are looked at."""
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(size))["states"]["data_offsets"]
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._looked_into.add(mapped)
        return torch.frombuffer(mapped, dtype=torch.float32, count=(end - begin) // 4, offset=8 + size + begin).view(self._shape)

    def forget_pages(self) -> None:
        """Give back the memory of what was looked into: it is read again when it is looked at again.

        The system would do so when it needs the memory; until then it counts as the process's.
        """
        for mapped in list(self._looked_into):
            if hasattr(mmap, "MADV_DONTNEED"):  # not on every system
                mapped.madvise(mmap.MADV_DONTNEED)

    @property
    def _shape(self) -> torch.Size:
        return torch.Size([sum(len(rows) for rows in self.rows), self.width])

    def _lay(self, border: int, path: Path) -> None:
        """Write the states of all pieces at a border in row order, a window of rows at a time."""
        count, width = self._shape
        for index, rows in enumerate(self.rows):  # proven once, before rows are taken from them
            read_states_of(self.folder, self.kind, self.mark, border, index, (len(rows), width))
        about = {"states": {"dtype": "F32", "shape": [count, width], "data_offsets": [0, 4 * count * width]}}
        facts = {**self.mark, "border": str(border), "format": self.kind.format, "seal": OPEN_SEAL}
        header = json.dumps({"__metadata__": facts, **about}).encode()
        header += b" " * (-len(header) % 8)

        def write(new: Unfinished) -> None:
            with new.open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for first in range(0, count, _WINDOW):
                    file.write(self._window(border, first, min(first + _WINDOW, count)).numpy().tobytes())
            seal_file(new)

        write_file(path, write)

    def _window(self, border: int, first: int, last: int) -> Float[Tensor, "window d"]:
        """States of some rows that follow one another, from the pieces that hold them."""
        states = torch.empty(last - first, self.width, dtype=torch.float32, device="cpu")
        for index, rows in enumerate(self.rows):
            there = (rows >= first) & (rows < last)
            if bool(there.any()):
                with safe_open(place_of(self.folder, border, index), framework="pt") as file:
                    states[rows[there] - first] = file.get_tensor("states")[there].float()
        return states


def place_of(folder: Path, border: int, index: int) -> Path:
    """Where the states of a piece at a border lie."""
    return folder / f"border-{border:03d}" / f"{index:05d}.safetensors"


def write_states_of(
    folder: Path, kind: Kind, mark: Mapping[str, str], border: int, index: int, states: Float[Tensor, "n d"], dtype: torch.dtype
) -> None:
    """Write the states of a piece at a border, whole or not at all.

    Raises:
        StoreError: the place cannot be written, or the number format cannot hold the states.
    """
    kept = states.to(dtype)
    if not bool(torch.isfinite(kept).all()):
        most, held = float(states.abs().max()), str(dtype).removeprefix("torch.")
        raise StoreError(
            f"expected states up to {torch.finfo(dtype).max:.0f}, as {held} holds them, got {most:.0f} in front of block {border}. "
            'Start over (--fresh, fresh=True) with store_dtype="bfloat16" or "float32".'
        )
    facts = {**mark, "border": str(border), "piece": str(index)}
    write_tensors(place_of(folder, border, index), kind, {"states": kept.contiguous()}, facts)


def write_tensors(path: Path, kind: Kind, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write a sealed file of tensors, whole or not at all; its folder is made.

    Raises:
        StoreError: the place cannot be written.
    """

    def write(new: Unfinished) -> None:
        try:
            kind.write_tensors(new, tensors, facts)
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"expected a folder that can be written, got {str(path.parent)!r}: {error.strerror}. Free space."
        ) from error
    write_file(path, write)


def read_states_of(folder: Path, kind: Kind, mark: Mapping[str, str], border: int, index: int, shape: tuple[int, int]) -> Tensor:
    """The states of a piece at a border, as they were written.

    Raises:
        StoreError: not there, changed since, or of another run.
    """
    path = place_of(folder, border, index)
    with kind.tensors(path) as (file, facts):
        wanted = {**mark, "border": str(border), "piece": str(index)}
        if {name: facts.get(name) for name in wanted} != wanted:
            raise ValueError(f"the file of another run or piece ({facts.get('plan')}, {facts.get('border')}, {facts.get('piece')})")
        states = file.get_tensor("states")
        if tuple(states.shape) != shape:
            raise ValueError(f"states of shape {tuple(states.shape)}, not {shape}")
        return states
