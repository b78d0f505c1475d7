"""A run in a folder: what it is (its plan), who may work on it, how far it is, and its table when all pieces are there.

run/pieces/...        see `folder_store`
run/table/            the finished table: a parquet file for each layer, and a record that lists them
"""

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from types import CodeType

import pandas as pd
import torch

from basin_lens import tables
from basin_lens.capture import Capture
from basin_lens.errors import PieceWarning, StoreError
from basin_lens.files import check_folder, clear_leavings, lock_folder, write_file
from basin_lens.locks import NAME, holder, is_own, lock, tell, unlock, who
from basin_lens.model import hooked_at, source_of
from basin_lens.records import Kind
from basin_lens.scoring.conducting import found, values_at
from basin_lens.scoring.folder_store import FolderStore
from basin_lens.scoring.job import Job
from basin_lens.scoring.run_status import Status, status_of
from basin_lens.scoring.token_rows import row_facts, texts_hash
from basin_lens.tables.run_table import RunTable, holds_layers_only, is_table, write_layers
from basin_lens.tables.run_table import is_own as is_own_table
from basin_lens.values import Facts

PLAN = Kind("the plan of a run", "basin_lens plan 1", "Start over with --fresh (fresh=True), or choose another folder.")
_PIECES = ("read", "states", "scores", "shards")
_OWN_PIECE = re.compile(  # see `folder_store`
    r"(read/\d{5,}|states/border-\d{3,}/(\d{5,}|rows)|shards/layer-\d{3,}/[a-z]+-\d{3,}|scores/layer-\d{3,})\.safetensors"
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens of a piece of reading: a few batches, some tens of megabytes of states at ten borders.
PIECE_TOKENS = 4096
# How often, and for how many seconds, one that could write the table waits for another that does: a minute.
_WAITS, _PAUSE = 300, 0.2
_NAMES = {  # each with its verb
    "model": "the model differs",
    "device": "the kind of device differs",
    "texts": "the texts differ",
    "rows": "documents, labels or spans differ",
    "capture": "how texts are cut differs",
    "states": "states of the capture differ",
    "layers": "layers differ",
    "analyzers": "analyzers differ",
    "code": "the code of analyzers differs",
    "queries": "queries differ",
    "controls": "controls differ",
    "seed": "the seed differs",
    "backend": "the back end differs",
    "compile": "compile differs",
    "bank": "the bank differs",
    "batch_size": "batch_size differs",
    "piece_tokens": "piece_tokens differ",
    "shard_tokens": "shard_tokens differ",
    "store_dtype": "store_dtype differs",
    "keep_neighbors_of": "whose neighbors are kept differs",
    "versions": "versions of the package or of torch differ",
}
# Facts of a plan that are digests: they say that two things differ, and tell a reader nothing more.
_DIGESTS = {
    "texts": "tokens",
    "rows": "documents, labels or spans",
    "states": "states",
    "queries": "",
    "fingerprint": "weights or settings",
}


def dtype_of(name: object) -> torch.dtype:
    """A number format for states on disk.

    Raises:
        StoreError: another.
    """
    if name not in _DTYPES:
        raise StoreError(f"expected store_dtype among {', '.join(map(repr, _DTYPES))}, got {name!r}.")
    return _DTYPES[str(name)]


def plan_of(job: Job, store_dtype: str, device: str) -> Facts:
    """What makes two runs the same, as plain JSON: if one of these facts differs, so may the numbers."""
    capture, request = job.capture, job.request
    cut = {name: fact for name, fact in capture.settings.items() if name != "named_documents"}
    named = capture.settings.get("named_documents")
    rows = repr([(s.passage, s.starts, s.ends) for s in capture.sequences]) + repr([capture.docs, capture.labels, named])
    spans = repr([sorted(p.spans.items()) for p in capture.passages or ()])
    bank: object = None
    if job.run is not None:
        bank = _of_capture(job, job.run.bank) if job.run.external else "the texts themselves"
    return {
        "model": {name: capture.model[name] for name in ("name", "fingerprint", "kind", "dtype")},
        "device": device,
        "texts": texts_hash(capture),
        "rows": _hash(rows + spans),
        "states": _states_of(job, capture) if job.was_read else "the model's",
        "capture": cut,
        "layers": list(job.plan.layers),
        "analyzers": [a.key for a in job.plan.analyzers],
        "code": {type(a).__name__: code_of(a) for a in job.plan.analyzers if code_of(a) is not None},
        "queries": _hash(repr(torch.nonzero(job.asked).flatten().tolist())),
        "controls": request.controls,
        "seed": request.seed,
        "backend": request.backend,
        **({"compile": True} if request.compile else {}),
        "bank": bank,
        "batch_size": None if request.batch_size is None else int(request.batch_size),
        "piece_tokens": job.piece_tokens,
        **({"shard_tokens": job.shard_tokens} if job.shards > 1 else {}),
        "store_dtype": store_dtype,
        "keep_neighbors_of": None if job.keep is None else job.keep.key,
        "versions": {"basin_lens": tables.package_version(), **capture.model["versions"]},
    }


def _of_capture(job: Job, bank: Capture) -> Facts:
    """What tells one bank from another: tokens, whose they are, how they were read, and the states themselves."""
    told = repr([bank.docs, bank.labels, [s.passage for s in bank.sequences]])
    return {"texts": texts_hash(bank), "rows": _hash(told), "capture": bank.settings, "states": _states_of(job, bank)}


def _states_of(job: Job, capture: Capture) -> str:
    """A digest of a capture's states at the borders that the plan looks at."""
    made = hashlib.blake2b(digest_size=8)
    for border in sorted({border for layer in job.plan.path & set(capture.layers) for border in (layer, layer + 1)}):
        made.update(capture.border(border).numpy().tobytes())
    return made.hexdigest()


def code_of(analyzer: object) -> str | None:
    """A digest of the code of an analyzer from outside this package, or of its own choice of neighbors; None for ours.

    A key says which options an analyzer has, and not what it does: its code may be another when a run goes on.
    """
    classes = [cls for cls in type(analyzer).__mro__ if not cls.__module__.startswith(("basin_lens.", "builtins", "abc"))]
    own = [member for cls in classes for member in vars(cls).values()]
    choice = getattr(analyzer, "choice", None)
    held = [code for member in (*own, choice) if (code := _code(member)) is not None]
    return _hash(re.sub("0x[0-9a-f]+", "", repr(held))) if held else None  # places in memory are no code


def _code(member: object) -> object:
    """What a function does, as far as it can be compared; None for what is none."""
    function = getattr(member, "__func__", getattr(member, "fget", member))
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    inner = [_code_of_constant(constant) for constant in code.co_consts]
    cells = [repr(cell.cell_contents)[:500] for cell in getattr(function, "__closure__", None) or ()]
    return code.co_code.hex(), code.co_names, inner, cells, repr(getattr(function, "__defaults__", None))


def _code_of_constant(constant: object) -> object:
    if not isinstance(constant, CodeType):
        return repr(constant)
    return constant.co_code.hex(), [_code_of_constant(one) for one in constant.co_consts]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """A folder in which a run's pieces and its table are."""

    path: Path

    @property
    def pieces(self) -> Path:
        """Where the pieces are."""
        return self.path / "pieces"

    @property
    def plan(self) -> Path:
        """Where the plan is."""
        return self.pieces / "plan.json"

    @property
    def table(self) -> Path:
        """Where the table is."""
        return self.path / "table"

    @property
    def is_finished(self) -> bool:
        """Whether its table is there."""
        return is_table(self.table)

    @contextmanager
    def held(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the folder: alone, or together with others that do other parts of the same run."""
        check_folder(self.path)
        with lock_folder(self.path, shared=shared):
            yield

    def begin(
        self,
        job: Job,
        *,
        store_dtype: str = "float32",
        keep_states: bool = False,
        fresh: bool = False,
        device: str | None = None,
    ) -> FolderStore:
        """The store of a job's pieces: what an interrupted run of the same plan left there is taken over.

        Args:
            job: what is to be done.
            store_dtype: of the states on disk.
            keep_states: see `FolderStore`. A run that was once asked to keep them does, whoever goes on with it.
            fresh: delete the pieces and the table that are there.
            device: kind of device on which pieces are done; None: the model's.

        Raises:
            StoreError: the folder holds the pieces of another plan, of which is said what differs, or somebody else's files.

        Warns:
            PieceWarning: a table without its record, which is made again.
        """
        dtype = dtype_of(store_dtype)
        if hooks := hooked_at(job.model):
            raise StoreError(
                f"expected a model without the caller's hooks for a run in a folder, got hooks at {', '.join(hooks[:3])}: who goes "
                "on with the run could not know them. Take them off, or analyze in memory (no out)."
            )
        if dtype != torch.float32 and not job.was_read:
            job.capture.settings = {**job.capture.settings, "dtype": store_dtype}  # by which the block's check allows for it
        plan = plan_of(job, store_dtype, device or next(job.model.parameters()).device.type)
        clear_leavings(self.pieces)
        if fresh:
            self.clear()
        self._refuse_foreign()
        kept = False
        if self.plan.exists():
            self._refuse_another(plan)
            kept = bool(self._told().get("keep_states"))
        if not self.plan.exists() or (keep_states and not kept):
            self.pieces.mkdir(parents=True, exist_ok=True)
            told = {"plan": plan, "pieces": len(job.pieces), "scored": list(job.layers), "tokens": job.capture.n_rows}
            told["shards"] = len(job.pieces_of(0))
            write_file(self.plan, PLAN.record({**told, "keep_states": keep_states}, {}, indent=1))
        if self.table.exists() and not self.is_finished:
            warnings.warn(f"The table in {str(self.path)!r} is made again: its record is not there.", PieceWarning, stacklevel=2)
        mark = _hash(json.dumps(plan, sort_keys=True))
        return FolderStore(job, self.pieces, mark, dtype=dtype, keep_states=keep_states or kept)

    @contextmanager
    def finishing(self) -> Iterator[str | None]:
        """Be the only one that makes the table and deletes pieces; whoever does it is waited for.

        Yields:
            None, or who does it still, after a minute: nothing may be done then.
        """
        place = self.pieces / NAME
        handle = lock(place)
        for _ in range(_WAITS):
            if handle is not None:
                break
            time.sleep(_PAUSE)
            handle = lock(place)
        if handle is None:
            yield who(place)
            return
        try:
            tell(handle, self.path.name)
            yield None
        finally:
            unlock(handle, place)

    def clear(self) -> None:
        """Delete the pieces and the table of a run, and nothing else.

        Raises:
            StoreError: somebody else's files among them, before anything is deleted.
        """
        self._refuse_foreign(to_delete=True)
        if self.table.exists():
            rmtree(self.table)
        for name in ("summary.csv", "report.html") if self.plan.exists() else ():
            (self.path / name).unlink(missing_ok=True)  # of the run that goes
        for name in _PIECES:
            rmtree(self.pieces / name, ignore_errors=True)
        self.plan.unlink(missing_ok=True)  # last: without it, the rest would be nobody's

    def _refuse_another(self, plan: Mapping[str, object]) -> None:
        held = self._told()["plan"]
        now = json.loads(json.dumps(plan))
        for name, words in _NAMES.items():
            if held.get(name) != now.get(name):
                how = "" if name in _DIGESTS else f" ({_how(name, held.get(name), now.get(name))})"
                raise StoreError(
                    f"expected the run that {str(self.path)!r} holds, got another: {words}{how}. Choose another folder, or start "
                    "over with --fresh (fresh=True)."
                )

    def _refuse_foreign(self, *, to_delete: bool = False) -> None:
        """Somebody else's files under the names of ours. What an interrupted run has begun is ours, with a plan or without.

        `to_delete`: a table without the pieces' plan is ours too, if it says so; and every file of the pieces is looked at.
        """
        ours = {"plan.json", *_PIECES}
        held = [path.name for path in self.pieces.iterdir()] if self.pieces.is_dir() else []
        foreign = next((f"pieces/{name}" for name in held if name not in ours and not is_own(name)), None)
        if to_delete and foreign is None:
            foreign = self._foreign_piece()
        if self.pieces.exists() and not self.pieces.is_dir():
            foreign = "pieces"
        begun = self.plan.exists()
        own_table = (begun or to_delete) and is_own_table(self.table, damaged=begun)
        own_table = own_table or (begun and holds_layers_only(self.table))
        if self.table.exists() and not own_table:
            foreign = "table"
        if foreign is not None:
            raise StoreError(
                f"expected an empty folder or an earlier run's, got {str(self.path)!r} with {foreign!r} in it. Choose another."
            )

    def _foreign_piece(self) -> str | None:
        """A file in the folders of the pieces that no run has written."""
        for kind in _PIECES:
            for place, _, names in os.walk(self.pieces / kind):
                inner = Path(place).relative_to(self.pieces)
                if any(is_own(part) for part in inner.parts):  # what was being written when a run died
                    continue
                for name in names:
                    path = (inner / name).as_posix()
                    if not is_own(name) and not _OWN_PIECE.fullmatch(path):
                        return f"pieces/{path}"
        return None

    def _told(self) -> Facts:
        return PLAN.read(self.plan, {"plan": dict, "pieces": int, "scored": [int], "tokens": int})

    def finish(self, job: Job, store: FolderStore) -> RunTable:
        """Write the table, whole or not at all, a layer at a time; all pieces must be there."""
        if not self.is_finished:
            facts = found(job, store)
            facts["made"] = tables.made_now(source_of(job.model))
            rows, labels = row_facts(job.capture)
            described = tables.Provenance.from_json(facts)

            def by_layer() -> Iterator[tuple[int, pd.DataFrame]]:
                for layer in job.plan.layers:
                    yield layer, tables.build(rows, labels, (layer,), values_at(job, store, [layer]), described)

            write_layers(self.table, by_layer(), facts)
        return tables.open(self.table)

    def status(self) -> Status:
        """How far the run is; quick: pieces are counted, not proven. Of a run that goes on meanwhile, the state after.

        Raises:
            StoreError: no run there.
        """
        try:
            told = self._told()
        except StoreError:
            if self.plan.exists():
                raise
            raise StoreError(
                f"expected the folder of a run, got {str(self.path)!r} without a plan. Name one that analyze --out made."
            ) from None
        return status_of(self.pieces, told, lambda: self.is_finished, holder(self.path))


def _how(name: str, there: object, asked: object) -> str:
    """How a fact of two plans differs, in words: of a record, which of its own facts do; of a digest, of what it is."""
    if not (isinstance(there, dict) and isinstance(asked, dict)):
        return f"{_plain_fact(there)} there, {_plain_fact(asked)} asked for"
    apart = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
    if name == "code":
        return f"of {', '.join(apart)}"
    others = [f"other {_DIGESTS[key]}" for key in apart if key in _DIGESTS]
    return "; ".join(
        [
            *others,
            *(f"{key}: {_short(there.get(key))} there, {_short(asked.get(key))} asked for" for key in apart if key not in _DIGESTS),
        ]
    )


def _plain_fact(value: object) -> str:
    return "another capture" if isinstance(value, dict) else _short(value)


def _short(value: object) -> str:
    text = json.dumps(value)
    return f"{text[:60]}..." if len(text) > 60 else text
