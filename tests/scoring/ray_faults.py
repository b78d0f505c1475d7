"""Actors and nodes of a Ray cluster that are killed at seeded moments of a run."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from basin_lens.errors import StoreError
from basin_lens.scoring.folder_store import KIND
from basin_lens.scoring.ray_engine import Task, Worker


class PausingWorker(Worker):
    """Waits before a file is on the disk and before it takes its name, so that kills meet it there too."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        for name in ("fsync", "replace"):
            setattr(os, name, _paused(getattr(os, name)))


def _paused(act):
    def later(*given, **options):
        time.sleep(0.03)
        return act(*given, **options)

    return later


class Killings(threading.Thread):
    """Kill somebody each time that so many pieces have been seen in a run's folder, and look at what stands there then.

    Args:
        folder: the run's.
        moments: how many pieces, for each kill.
        kill: kills one that is at work, and says whom; None if nobody is at the moment: then it is asked again.
    """

    def __init__(self, folder: Path, moments: list[int], kill: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.pieces, self.moments, self.kill = folder / "pieces", sorted(moments), kill
        self.killed: list[object] = []
        self.half: list[str] = []  # files that were not whole under their final names
        self.error: BaseException | None = None
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        seen: set[Path] = set()
        while len(self.killed) < len(self.moments) and not self._ended.wait(0.01):
            seen |= {path for kind in ("read", "shards", "scores") for path in self._named(kind)}
            if len(seen) < self.moments[len(self.killed)]:
                continue
            try:
                who = self.kill()
            except BaseException as error:
                self.error = error
                return
            if who is not None:
                self.killed.append(who)
                self._look()

    def _named(self, kind: str) -> list[Path]:
        return [
            path for path in (self.pieces / kind).rglob("*.safetensors") if ".basin-lens" not in str(path.relative_to(self.pieces))
        ]

    def _look(self) -> None:
        for path in [path for kind in ("read", "states", "shards", "scores") for path in self._named(kind)]:
            try:
                with KIND.tensors(path):
                    pass
            except StoreError as error:
                if path.exists():  # else deleted meanwhile, as it should be
                    self.half.append(str(error))

    def end(self) -> "Killings":
        """Wait for it; the run is over."""
        self._ended.set()
        self.join(120)
        if self.error is not None:
            raise self.error
        return self


def at_work(node) -> list[int]:
    """Processes of a node's actors that do a piece, in the system's own list."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            line, told = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
        except OSError:
            continue
        busy = line.startswith((b"ray::PausingWorker.read", b"ray::PausingWorker.score"))
        if busy and int(told.rpartition(")")[2].split()[1]) == raylet:
            found.append(int(entry.name))
    return sorted(found)


def worker_killer(cluster, draw: random.Random) -> Callable[[], object]:
    """Kills an actor that does a piece."""

    def kill() -> object:
        held = [pid for node in cluster.list_all_nodes() for pid in at_work(node)]
        if not held:
            return None
        pid = draw.choice(held)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
        return pid

    return kill


def node_killer(cluster, own_socket: str, draw: random.Random) -> Callable[[], object]:
    """Kills a node on which a piece is done, neither the head nor the one that the driver speaks to, and adds another."""

    def kill() -> object:
        others = [
            node for node in cluster.list_all_nodes() if node is not cluster.head_node and node.raylet_socket_name != own_socket
        ]
        held = [node for node in others if at_work(node)]
        if not held:
            return None
        node = draw.choice(held)
        cluster.remove_node(node, allow_graceful=False)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(signal, "signal", lambda *_: None)  # Ray would have a handler, which the main thread alone can set
            cluster.add_node(num_cpus=1)
        return node.raylet_socket_name

    return kill
