"""Runs in folders, as tests make them: small, interrupted, damaged, in parts."""

from pathlib import Path

import basin_lens as bl
from basin_lens import tables
from basin_lens.scoring.folder_run import FolderRequest, work_on_part
from basin_lens.scoring.folder_store import FolderStore
from basin_lens.scoring.run_folder import RunFolder
from tests.conftest import TEXTS

A = bl.analyzers
# Pieces of a few sequences each: six texts in at least three pieces.
CUT = {"layers": [0, 2], "batch_size": 1, "progress": False}
SMALL = {"piece_tokens": 60}


def analyzers():
    return [A.Compression(k=4), A.Contraction(k=4), A.Neighborhood(k=4), A.Surprisal(), A.StateNorm(), A.AttentionReceived()]


def run(model, out, **changes):
    return bl.analyze(model, TEXTS, analyzers(), out=out, **CUT | SMALL | changes)


def facts_of(table) -> dict:
    (facts,) = tables.provenance(table).values()
    return {name: fact for name, fact in facts.items() if name != "made"}


def files_of(folder: Path) -> dict[str, str]:
    return {name: facts["sha256"] for name, facts in tables.open(folder).files.items()}


class StoppedError(Exception):
    """The run ends here."""


def stop_after(monkeypatch, count: int, puts=("put_read", "put_scores")) -> None:
    """Let so many pieces be kept, and then no more. `puts`: by which methods of the store."""
    left = [count]
    for name in puts:
        real = getattr(FolderStore, name)

        def put(self, *given, real=real):
            if left[0] == 0:
                raise StoppedError
            left[0] -= 1
            real(self, *given)

        monkeypatch.setattr(FolderStore, name, put)


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
    "empty": lambda _: b"",
    "other": lambda _: b"somebody else's bytes",
}


def part(model, out, number, of):
    folder = RunFolder(out)
    request = FolderRequest(analyzers(), out=out, **CUT | SMALL)
    with folder.held(shared=True):
        return work_on_part(folder, model, TEXTS, request, (number, of))
