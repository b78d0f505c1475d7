"""The fields of a `Capture` by name: for what makes one, and must not know the class."""

from pathlib import Path
from typing import NotRequired, TypedDict

from torch import Tensor

from basin_lens.capture.disk_states import StatesOnDisk
from basin_lens.texts import Passage, TokenSequence
from basin_lens.values import Facts, Plain


class CaptureFields(TypedDict):
    """What a capture is made of; states, readings and columns are there when it is read."""

    sequences: list[TokenSequence]
    passages: list[Passage] | None
    docs: list[str]
    labels: list[dict[str, Plain]]
    strings: dict[int, str]
    layers: tuple[int, ...]
    model: Facts
    settings: Facts
    columns: NotRequired[dict[str, dict[str, Tensor]]]
    _states: NotRequired[dict[int, Tensor] | StatesOnDisk]
    _readings: NotRequired[dict[str, Tensor]]
    _store: NotRequired[Path | None]
    _shards: NotRequired[dict[str, Facts]]
