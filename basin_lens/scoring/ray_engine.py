"""Pieces of a run on a Ray cluster: actors hold a replica of the model and the plan, and do a piece at a time.

What they find goes to the run's folder, which all nodes must see under one name; only numbers of pieces travel. A piece whose actor
or node died is given to another one.
"""

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from tqdm.auto import tqdm

from basin_lens.analyzers import CloudAnalyzer
from basin_lens.capture import Capture
from basin_lens.errors import BasinLensError, StoreError
from basin_lens.model import EMBEDDED_NAME, HookedModel, copy_of, fingerprint, load_model, source_of
from basin_lens.scoring.conducting import do
from basin_lens.scoring.folder_store import FolderStore
from basin_lens.scoring.job import Job, LayerPiece, prepare
from basin_lens.scoring.request import Request
from basin_lens.values import Facts, hides_bars, whole

_CURE = "pip install 'basin-lens[ray]'"
_START = "Start one: ray start --head."
_PATIENCE = 5  # seconds
P = TypeVar("P", bound=Hashable)  # a piece


@dataclass(frozen=True)
class RayOptions:
    """Options of the engine.

    Attributes:
        workers: actors; None: as many as the cluster has room for.
        num_cpus, num_gpus: of each.
        address: of a cluster; None: that of `RAY_ADDRESS`, else one is started on this machine, for this call.
        retries: of a piece whose actor died.

    Raises:
        BasinLensError: an option that is none of these, or a number that makes no sense.
    """

    workers: int | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    address: str | None = None
    retries: int = 3

    @property
    def device(self) -> str:
        """The kind of device on which actors do pieces."""
        return "cuda" if self.num_gpus else "cpu"

    @classmethod
    def of(cls, given: Mapping[str, object] | None) -> "RayOptions":
        """The options that a caller gave by name."""
        known = [one.name for one in fields(cls)]
        if wrong := sorted(set(given or {}) - set(known)):
            raise BasinLensError(f"expected engine_options among {', '.join(known)}, got {wrong[0]!r}.")
        found = dict(given or {})
        for name, least in (("workers", 1), ("retries", 0)):
            if found.get(name) is not None:
                found[name] = whole(found[name], f"{name} in engine_options", least=least)
        for name in ("num_cpus", "num_gpus"):
            value = found.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise BasinLensError(f"expected {name} in engine_options as a number from 0 on, got {value!r}.")
            if name in found:
                found[name] = float(value)
        if not isinstance(found.get("address"), str | None):
            raise BasinLensError(f"expected address in engine_options as text, got {found['address']!r}.")
        return cls(**found)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Task:
    """What an actor is given: all that a job is made of, but the model if it can load it by name."""

    source: Mapping[str, str] | None
    dtype: torch.dtype
    device: str
    model: HookedModel | None
    capture: Capture
    request: Request
    keep: CloudAnalyzer | None
    piece_tokens: int
    shard_tokens: int
    folder: Path
    mark: str
    store_dtype: torch.dtype
    keep_states: bool


class Worker:
    """An actor: the model, the job, and the folder of its pieces."""

    def __init__(self, task: Task) -> None:
        if not (task.folder / "plan.json").is_file():
            raise StoreError(
                f"expected the run's folder on every node, got one that does not see {str(task.folder)!r}. Choose --out on a file "
                "system that all nodes share."
            )
        self.task = task
        self._held: FolderStore | None = None
        model = task.model
        if model is None:
            assert task.source is not None
            name, kind = task.source["name_or_path"], task.source["kind"]
            model = load_model(name, kind=kind, dtype=task.dtype, device=task.device)  # type: ignore[arg-type]
        if next(model.parameters()).device.type != task.device:
            model.to(task.device)
        self.model = model
        self._filled = False

    def fingerprint(self) -> str:
        """Of the actor's model: it must be the run's."""
        return fingerprint(self.model)

    @property
    def _store(self) -> FolderStore:
        task = self.task
        if self._held is None:
            request, capture = task.request, task.capture
            job = prepare(
                self.model, capture, request, keep=task.keep, piece_tokens=task.piece_tokens, shard_tokens=task.shard_tokens
            )
            self._held = FolderStore(job, task.folder, task.mark, dtype=task.store_dtype, keep_states=task.keep_states)
        return self._held

    def read(self, index: int) -> int:
        """Do a piece of reading, unless an actor that died had done it; how many rows it has."""
        store = self._store
        if not store.has_read(index):
            store.put_read(index, store.job.read(index))
        return len(store.rows[index])

    def score(self, piece: LayerPiece) -> int:
        """Do a piece of the work at a layer, unless an actor that died had done it; how many layers it ends."""
        store = self._store
        if not self._filled:
            store.use_states()
            self._filled = True
        if not store.has(piece):
            do(store.job, store, piece)
        return int(piece.step == "collect")


def _off_device(model: HookedModel) -> HookedModel:
    """A model as it is sent: from a GPU a copy on the CPU, which an actor without one can take."""
    return model if next(model.parameters()).device.type == "cpu" else copy_of(model, device="cpu")


def _sent(request: Request) -> Request:
    """A request as an actor takes it: the texts, already cut, come as a capture; no tensor is on a GPU."""
    queries = request.queries.cpu() if isinstance(request.queries, torch.Tensor) else request.queries
    return replace(request, attention_mask=None, queries=queries)


def device_of(given: Mapping[str, object] | None) -> str:
    """The kind of device on which actors do pieces."""
    return RayOptions.of(given).device


def _found_anywhere(source: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Where a model was loaded from, as an actor, which stands in another folder, finds it."""
    place = None if source is None else os.path.expanduser(source["name_or_path"])
    if source is None or place is None or source["name_or_path"] == EMBEDDED_NAME or not os.path.exists(place):
        return source
    return {**source, "name_or_path": os.path.abspath(place)}


def conduct_on_ray(job: Job, store: FolderStore, given: Mapping[str, object] | None) -> None:
    """Do every piece that a store does not have on a Ray cluster.

    Args:
        job, store: of the run.
        given: see `RayOptions`.

    Raises:
        BasinLensError: ray is not installed, no cluster at the address, options that make no sense; what a piece itself raises.
        StoreError: a piece whose actors died again and again, or a folder that not all nodes see.
    """
    options, ray = RayOptions.of(given), _ray()
    pieces = store.unread()
    with _cluster(ray, options):
        crew = Crew(ray, job, store, options)
        try:
            total, asked = job.capture.n_rows, job.request.progress
            read = total - sum(len(store.rows[index]) for index in pieces)
            with tqdm(total=total, initial=read, desc="reading the model", unit="token", disable=hides_bars(asked)) as bar:
                crew.do("read", pieces, bar.update)
            store.all_read()
            job.fill()
            layers = store.unscored()
            initial = len(job.layers) - len(layers)
            with tqdm(
                total=len(job.layers), initial=initial, desc="neighbors through blocks", unit="layer", disable=hides_bars(asked)
            ) as bar:
                open_ = [piece for layer in layers for piece in job.pieces_of(layer)]
                left = [piece for piece in open_ if piece.step == "collect" or not store.has(piece)]
                crew.do("score", left, bar.update, job.needs)
        finally:
            crew.dismiss()


class Crew:
    """The actors of a run, and who of them is free."""

    def __init__(self, ray: ModuleType, job: Job, store: FolderStore, options: RayOptions) -> None:
        self.ray, self.options, self.wanted = ray, options, job.capture.model["fingerprint"]
        source = _found_anywhere(source_of(job.model))
        self._model = job.model
        dtype = next(job.model.parameters()).dtype
        self._facts: Facts = {
            "source": source,
            "dtype": dtype,
            "device": options.device,
            # As it is now: when all is read, the run's own holds states that are deleted layer by layer.
            "capture": replace(job.capture, columns=dict(job.capture.columns)),
            "request": _sent(job.request),
            "keep": job.keep,
            "piece_tokens": job.piece_tokens,
            "shard_tokens": job.shard_tokens,
            "folder": store.folder,
            "mark": store.mark["plan"],
            "store_dtype": store.dtype,
            "keep_states": store.keep_states,
        }
        self._task = self._shipped(with_model=source is None)
        self._actor = ray.remote(num_cpus=options.num_cpus, num_gpus=options.num_gpus, max_restarts=0)(Worker)
        self._lost = 0  # actors that died while they started, since one last did
        self._starting: dict[object, tuple[Any, bool]] = {}  # each with whether it was sent our model
        self._idle: list[Any] = []
        self._busy: dict[object, tuple[Any, Any]] = {}
        for _ in range(options.workers or _room(ray, options)):
            self._start()

    def _shipped(self, *, with_model: bool) -> object:
        """The task in the object store, once for all actors."""
        self._has_model = with_model
        return self.ray.put(Task(**self._facts, model=_off_device(self._model) if with_model else None))

    def _start(self) -> None:
        worker = self._actor.remote(self._task)
        self._starting[worker.fingerprint.remote()] = worker, self._has_model

    def do(
        self,
        what: Literal["read", "score"],
        pieces: Sequence[P],
        done: Callable[[int], object],
        needs: Callable[[P], Sequence[P]] = lambda _: (),
    ) -> None:
        """Have all these pieces done, each after those that it needs. `done` is called with what each says of its size."""
        waiting, tries, open_ = deque(pieces), Counter[P](), set(pieces)
        while waiting or self._busy:
            while self._idle and (piece := next((p for p in waiting if open_.isdisjoint(needs(p))), None)) is not None:
                waiting.remove(piece)
                worker = self._idle.pop()
                self._busy[getattr(worker, what).remote(piece)] = worker, piece
            ready, _ = self.ray.wait([*self._busy, *self._starting], num_returns=1)
            for ref in ready:
                if ref in self._starting:
                    self._begin(ref)
                    continue
                worker, piece = self._busy.pop(ref)
                size = self._answer(ref)
                if size is not None:
                    self._idle.append(worker)
                    open_.discard(piece)
                    done(size)
                    continue
                tries[piece] += 1
                if tries[piece] > self.options.retries:
                    raise StoreError(
                        f"expected a piece to be done in {self.options.retries + 1} tries, got actors that died each time ({what} "
                        f"{piece}): most often for want of memory. Give them more (num_cpus, fewer workers), then the same command."
                    )
                waiting.appendleft(piece)
                self._start()

    def _begin(self, ref: object) -> None:
        """An actor is there: it is free if its model is the run's; another model by the same name gives way to a copy of ours."""
        worker, with_model = self._starting.pop(ref)
        found = self._answer(ref)
        if found == self.wanted:
            self._idle.append(worker)
            self._lost = 0
            return
        if found is not None and with_model:
            raise BasinLensError(
                f"expected the run's model on every node (fingerprint {self.wanted}), got {found}. Install the same versions there."
            )
        if found is not None:
            if not self._has_model:  # else another actor has shown before that the name brings another model
                self._task = self._shipped(with_model=True)
            self.ray.kill(worker)
        else:
            self._lost += 1
            if self._lost > self.options.retries + 1:
                raise StoreError("expected actors that start, got ones that die while they load the model. Look at Ray's logs.")
        self._start()

    def _answer(self, ref: object) -> Any:
        """What an actor says; None if it, or its node, is gone. What its own work raises is raised here."""
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BasinLensError) else error
            raise cause from None
        except self.ray.exceptions.ActorDiedError as error:
            if isinstance(getattr(error, "cause", None), BasinLensError):  # in its constructor
                raise error.cause from None
            if "StoreError" in str(error) or "ModelError" in str(error):
                raise BasinLensError(_last_line(str(error))) from None
            return None
        except self.ray.exceptions.RayError:
            return None

    def dismiss(self) -> None:
        """End all actors."""
        for worker in [*self._idle, *(worker for worker, _ in [*self._starting.values(), *self._busy.values()])]:
            with suppress(Exception):
                self.ray.kill(worker)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _room(ray: ModuleType, options: RayOptions) -> int:
    """Actors that the cluster has room for, at least one."""
    held = ray.cluster_resources()
    most = [int(held.get(kind, 0) // each) for kind, each in (("CPU", options.num_cpus), ("GPU", options.num_gpus)) if each]
    return max(1, min(most, default=1))


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of a run, unless the user wants it
    try:
        import ray
    except ImportError as error:
        raise BasinLensError(f'expected ray for engine="ray", got an environment without it. {_CURE}') from error
    return ray


@contextmanager
def _cluster(ray: ModuleType, options: RayOptions) -> Iterator[None]:
    """A connection to the cluster that is named, or to one that is started here and ends with the block."""
    if ray.is_initialized():
        yield
        return
    where = options.address or os.environ.get("RAY_ADDRESS")
    if where is not None:
        _check_answers(where)
    try:
        ray.init(address=options.address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BasinLensError(
            f"expected a Ray cluster at {where or 'this machine'}, got none: {_last_line(str(error))}. {_START}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse an address of host and port at which nobody answers: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "//" in host:  # "auto", or a client's address
        return
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except OSError as error:
        raise BasinLensError(f"expected a Ray cluster at {address}, got {error.strerror or error}. {_START}") from error
