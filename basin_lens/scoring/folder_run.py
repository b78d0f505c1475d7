"""A run whose pieces lie in a folder, done by one process, by several, or by one of many parts."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, ParamSpec, Protocol, cast, get_args, overload

import pandas as pd

from basin_lens.analyzers import CloudAnalyzer
from basin_lens.capture import Capture
from basin_lens.errors import BankWarning, BasinLensError, PieceWarning, StoreError
from basin_lens.model import HookedModel
from basin_lens.scoring.bank_overlap import warning
from basin_lens.scoring.conducting import conduct, kept_neighbors, read_all, score_all
from basin_lens.scoring.folder_store import KIND as PIECE
from basin_lens.scoring.folder_store import FolderStore
from basin_lens.scoring.job import SHARD_TOKENS, Job, LayerPiece, prepare
from basin_lens.scoring.request import Request, takes_request
from basin_lens.scoring.results import KeptNeighbors
from basin_lens.scoring.run_folder import PIECE_TOKENS, RunFolder, dtype_of
from basin_lens.tables.run_table import RunTable
from basin_lens.texts import Texts
from basin_lens.values import Whole, whole

Engine = Literal["local", "ray"]


@dataclass(frozen=True, kw_only=True)
class FolderRequest(Request):
    """The options of `analyze`, also of a run whose pieces go to a folder.

    Raises:
        StoreError: options of a folder without one, or an unknown engine or number format.
    """

    out: str | os.PathLike[str] | None = None
    engine: str = "local"
    engine_options: Mapping[str, object] | None = None
    fresh: bool = False
    keep_states: bool = False
    store_dtype: str = "float32"
    piece_tokens: Whole = PIECE_TOKENS
    shard_tokens: Whole = SHARD_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        dtype_of(self.store_dtype)
        object.__setattr__(self, "piece_tokens", whole(self.piece_tokens, "piece_tokens", least=0, error=StoreError))
        object.__setattr__(self, "shard_tokens", whole(self.shard_tokens, "shard_tokens", least=1, error=StoreError))
        if self.engine not in get_args(Engine):
            raise StoreError(f"expected engine in {get_args(Engine)}, got {self.engine!r}.")
        if self.engine_options and self.engine != "ray":
            raise StoreError(f'expected engine_options with engine="ray", got them with {self.engine!r}.')
        if self.out is not None and not os.fspath(self.out):
            raise StoreError("expected a folder as out, got an empty name.")
        given = {
            "engine": self.engine != "local",
            "fresh": self.fresh,
            "keep_states": self.keep_states,
            "store_dtype": self.store_dtype != "float32",
            "piece_tokens": self.piece_tokens != PIECE_TOKENS,
            "shard_tokens": self.shard_tokens != SHARD_TOKENS,
        }
        if self.out is None and (name := next((name for name, is_given in given.items() if is_given), None)):
            raise StoreError(f"expected a folder for the pieces with {name}, got none. Name one: out=...")


P = ParamSpec("P")
Q = ParamSpec("Q")


class InMemoryOrFolder(Protocol[P, Q]):
    """A door whose answer is a table in memory, or with `out` one that lies in a folder."""

    @overload
    def __call__(self, model: HookedModel, data: Capture | Texts, *args: P.args, **kwargs: P.kwargs) -> pd.DataFrame: ...
    @overload
    def __call__(self, model: HookedModel, data: Capture | Texts, *args: Q.args, **kwargs: Q.kwargs) -> RunTable: ...


def takes_folder_request(
    _: Callable[P, Request], request: Callable[Q, FolderRequest]
) -> Callable[[Callable[[HookedModel, Capture | Texts, FolderRequest], pd.DataFrame | RunTable]], InMemoryOrFolder[P, Q]]:
    """`takes_request`, of a function whose answer depends on `out`: type checkers know which it is."""

    def decorate(
        function: Callable[[HookedModel, Capture | Texts, FolderRequest], pd.DataFrame | RunTable],
    ) -> InMemoryOrFolder[P, Q]:
        return cast("InMemoryOrFolder[P, Q]", takes_request(request)(function))

    return decorate


@dataclass(frozen=True)
class FolderRun:
    """A run that is finished, before its pieces are deleted."""

    table: RunTable
    job: Job
    store: FolderStore

    def neighbors(self) -> KeptNeighbors | None:
        """The neighbors that were to be kept, of all layers, in memory; None without pieces that hold them.

        Warns:
            PieceWarning: pieces that were damaged after the table was made.
        """
        if not all(self.store.scores_place(layer).exists() for layer in self.job.layers):
            return None
        try:
            return kept_neighbors(self.job, self.store)
        except StoreError as error:
            said = str(error).removesuffix(PIECE.cure)
            warnings.warn(
                f"The table is whole, but no neighbors can be shown: {said}With --fresh (fresh=True) all is made anew.",
                PieceWarning,
                stacklevel=2,
            )
            return None


def run_in_folder(model: HookedModel, data: Capture | Texts, request: FolderRequest) -> RunTable:
    """Do what is left of a run, and give its table.

    Raises:
        StoreError: the folder holds another run, somebody writes there, or the disk is full.
    """
    assert request.out is not None
    folder = RunFolder(Path(request.out).absolute())
    with folder.held():
        done = work(folder, model, data, request)
        done.store.clear()
    return done.table


def work(
    folder: RunFolder, model: HookedModel, data: Capture | Texts, request: FolderRequest, *, keep: CloudAnalyzer | None = None
) -> FolderRun:
    """Do what is left of a run in a folder that is held; its pieces stay until `FolderStore.clear`."""
    job, store = _begun(folder, model, data, request, keep)
    if not folder.is_finished:
        if request.engine == "ray":
            from basin_lens.scoring.ray_engine import conduct_on_ray

            conduct_on_ray(job, store, request.engine_options)
        else:
            conduct(job, store)
    return _finished(folder, job, store)


def work_on_part(
    folder: RunFolder,
    model: HookedModel,
    data: Capture | Texts,
    request: FolderRequest,
    part: tuple[int, int],
    show: Callable[[FolderRun], object] = lambda _: None,
    *,
    keep: CloudAnalyzer | None = None,
) -> FolderRun | str:
    """Do one part of a run in a folder that others hold too; the finished run, if this was the last piece, or what is left.

    A part reads its share of the pieces. When all parts have read, it scores its share of the layers, or of their shards where
    there are more parts than layers.

    Args:
        part: which, from 1, of how many.
        show: called with the finished run, while no other part does the same; its pieces are there still.
    """
    job, store = _begun(folder, model, data, request, keep)
    if not folder.is_finished and (left := _share(folder, job, store, *part)):
        return left
    with folder.finishing() as other:
        if other is not None:
            return f"Another part, which was done at the same time, writes the table: {other}."
        if not folder.is_finished and (unscored := store.unscored()):
            more = "" if job.shards == 1 else " Of layers that are cut, each call does what the others have made ready."
            return f"{len(unscored)} of {len(job.layers)} layers are left to other parts; the last one writes the table.{more}"
        done = _finished(folder, job, store)
        show(done)
        return done


def _share(folder: RunFolder, job: Job, store: FolderStore, number: int, count: int) -> str | None:
    """Do one part's pieces; what is left to others before scoring can begin. None: nothing, also where another part has finished
    meanwhile and deletes the pieces."""
    try:
        return _read_and_score(folder, job, store, number, count)
    except StoreError:
        if folder.is_finished:  # what was looked for went with what another part finished
            return None
        raise


def _read_and_score(folder: RunFolder, job: Job, store: FolderStore, number: int, count: int) -> str | None:
    mine = set(range(number - 1, len(job.pieces), count))
    unread = store.unread()
    if folder.is_finished:  # asked after pieces were looked for: they go only when the table is there
        return None
    read_all(job, store, [index for index in unread if index in mine])
    unread = store.unread()
    if folder.is_finished:
        return None
    if unread:
        return (
            f"{len(unread)} of {len(job.pieces)} pieces of reading are left to other parts. When all have read, give every part "
            "once more: scoring begins then."
        )
    store.all_read()
    job.fill()
    unscored = store.unscored()
    if not folder.is_finished:
        score_all(job, store, unscored, lambda piece: _is_of_part(job, piece, number, count))
    return None


def _is_of_part(job: Job, piece: LayerPiece, number: int, count: int) -> bool:
    """Whether a part does a piece: whole layers, as long as there is one for each part; else shards of each."""
    place = list(job.layers).index(piece.layer)
    if job.shards > 1 and len(job.layers) < count:
        place = place * job.shards + piece.shard
    return place % count == number - 1


def _begun(
    folder: RunFolder, model: HookedModel, data: Capture | Texts, request: FolderRequest, keep: CloudAnalyzer | None
) -> tuple[Job, FolderStore]:
    if request.bank is data:
        request = replace(request, bank=None)
    if isinstance(data, Capture) and not data.is_read:
        data = replace(data, columns=dict(data.columns))  # what a run keeps on a disk is not the caller's
    read, shard = int(request.piece_tokens), int(request.shard_tokens)
    job = prepare(model, data, request, keep=keep, piece_tokens=read, shard_tokens=shard)
    device = None
    if request.engine == "ray":
        from basin_lens.scoring.ray_engine import device_of

        device = device_of(request.engine_options)
    store = folder.begin(job, store_dtype=request.store_dtype, keep_states=request.keep_states, fresh=request.fresh, device=device)
    return job, store


def _finished(folder: RunFolder, job: Job, store: FolderStore) -> FolderRun:
    table = folder.finish(job, store)
    if job.run is not None and (said := warning(table.provenance["search"]["same_skeleton"])) is not None:
        warnings.warn(said, BankWarning, stacklevel=5)
    return FolderRun(table, job, store)


def part_of(text: str) -> tuple[int, int]:
    """Which part of how many: `"3/16"`.

    Raises:
        BasinLensError: no such part.

    Example:
        >>> from basin_lens.scoring.folder_run import part_of
        >>> part_of("3/16")
        (3, 16)
    """
    first, _, second = text.partition("/")
    if not (first.strip().isdecimal() and second.strip().isdecimal() and 1 <= int(first) <= int(second)):
        raise BasinLensError(f"expected a part such as 3/16, from 1/16 to 16/16, got {text!r}.")
    return int(first), int(second)
