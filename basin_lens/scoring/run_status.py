"""How far a run in a folder is: its pieces are counted, by their names and ages."""

import os
import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from basin_lens.values import Facts


@dataclass(frozen=True)
class Status:
    """How far a run in a folder is.

    Attributes:
        read, read_of: pieces of reading done, of so many.
        scored, scored_of: layers scored, of so many.
        shards, shards_of: pieces of the work at layers done, of so many: a layer is one piece, or of many texts several.
        finished: whether its table is there.
        tokens: of the texts.
        seconds_left: at the pace of the pieces that are there; None where it cannot be told.
        holder: who works on it now, in words; None: nobody.
    """

    read: int
    read_of: int
    scored: int
    scored_of: int
    shards: int
    shards_of: int
    finished: bool
    tokens: int
    seconds_left: float | None
    holder: str | None


def status_of(pieces: Path, told: Facts, is_finished: Callable[[], bool], held_by: str | None) -> Status:
    """How far a run is; of one that goes on meanwhile, the state after.

    Args:
        pieces: the folder of its pieces.
        told: what its plan tells beside the plan itself: `pieces` (of reading), `scored` (layers), `tokens`, `shards` of a layer.
        is_finished: whether its table is there.
        held_by: who works on it, in words.
    """
    # Shards before scores, and the table last: what is deleted meanwhile is in what is looked at next.
    read, shards = (_ages(pieces / name) for name in ("read", "shards"))
    scored = _ages(pieces / "scores")
    each, finished = told.get("shards", 1), is_finished()
    known = told["pieces"], len(told["scored"])
    layers = {path.stem for path in scored}  # the scores of a layer stand for all its shards
    open_ = {path: age for path, age in shards.items() if path.parent.name not in layers}
    done = known if finished else (len(read), len(scored))
    count = done[1] * each + (0 if finished else len(open_))
    pace, rest = (open_, known[1] * each - count) if len(open_) > 1 else (scored, known[1] - len(scored))
    seconds = [_seconds_left(read, known[0] - len(read)), _seconds_left(pace, rest)]
    left = 0.0 if finished else None if None in seconds else sum(s for s in seconds if s is not None)
    return Status(done[0], known[0], done[1], known[1], count, known[1] * each, finished, told["tokens"], left, held_by)


def _ages(folder: Path) -> dict[Path, float]:
    """When each piece in a folder was written, the oldest first; one that is deleted meanwhile is not there."""
    found = {}
    for place, _, names in os.walk(folder):  # says nothing of folders that go
        for name in names:
            with suppress(FileNotFoundError):
                if name.endswith(".safetensors"):
                    found[Path(place, name)] = os.stat(os.path.join(place, name)).st_mtime
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _seconds_left(done: Mapping[Path, float], left: int) -> float | None:
    """Time that so many pieces take at the pace of those that are there; None before two are there."""
    if left <= 0:
        return 0.0
    # The median, because between two of them the run may have been interrupted for a night.
    return None if len(done) < 2 else statistics.median(b - a for a, b in pairwise(done.values())) * left
