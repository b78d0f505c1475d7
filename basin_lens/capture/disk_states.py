"""States of pieces of reading in files: written a piece and a border at a time, read a border at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from basin_lens.errors import StoreError
from basin_lens.files import write_file
from basin_lens.records import Kind, Unfinished


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
    """

    folder: Path
    kind: Kind
    mark: Mapping[str, str]
    held: Sequence[int]
    rows: Sequence[Int[Tensor, " n"]]
    width: int

    def __len__(self) -> int:
        return len(self.held)

    def __contains__(self, border: object) -> bool:
        return border in self.held

    def __getitem__(self, border: int) -> Float[Tensor, "rows d"]:
        if border not in self.held:
            raise KeyError(border)
        states = torch.empty(sum(len(rows) for rows in self.rows), self.width, dtype=torch.float32, device="cpu")
        for index, rows in enumerate(self.rows):
            states[rows] = read_states_of(self.folder, self.kind, self.mark, border, index, (len(rows), self.width)).float()
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
