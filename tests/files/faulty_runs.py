"""Runs in folders that are killed, meet a full disk, or are driven twice, each in a fork of one process that has imported everything.

python -m tests.files.faulty_runs FOLDER KILLS        # used by tests/files/test_faulty_runs.py

Writes FOLDER/faults.jsonl, a line for each fault: what it was, how the run ended, and the digests of the table that the same call
made afterwards.
"""

import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import basin_lens as bl
from basin_lens import tables
from basin_lens.errors import StoreError
from tests.conftest import TEXTS, make_bridge, make_tokenizer
from tests.files.dying import at_step, ended, forked

A = bl.analyzers
CUT = {"layers": [0, 1], "batch_size": 1, "progress": False, "piece_tokens": 30}
REFUSED, FULL = 3, 4


def run(model, out: Path) -> int:
    """Of a child: how it ended."""
    try:
        bl.analyze(model, TEXTS[:4], [A.Contraction(k=3), A.Surprisal()], out=out, **CUT)
    except StoreError as error:
        return REFUSED if "nobody else is writing" in str(error) else FULL
    return 0


def digests(out: Path) -> dict[str, str]:
    table = tables.open(out)
    table.check()
    return {name: facts["sha256"] for name, facts in table.files.items()}


def steps_of(model, place: Path) -> int:
    """How often a whole run changes the disk."""

    def act() -> int:
        with at_step(-1, lambda: None) as count:
            code = run(model, place / "straight")
        (place / "steps").write_text(str(count[0]))
        return code

    assert ended(forked(act, place / "log")) == 0
    return int((place / "steps").read_text())


def killed(model, out: Path, step: int) -> int:
    with at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        return run(model, out)


def on_a_full_disk(model, out: Path, most: int) -> int:
    """No file may become longer than this."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return run(model, out)


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    model = make_bridge("llama", tokenizer=make_tokenizer(), num_hidden_layers=2, num_key_value_heads=4)
    gc.collect()
    gc.freeze()
    steps, draw = steps_of(model, folder), random.Random("driver")
    faults: list[tuple[str, Callable[[Path], list[int]]]] = []

    def alone(act: Callable[[Path], int]) -> Callable[[Path], list[int]]:
        return lambda out: [ended(forked(lambda: act(out), folder / "log"))]

    def twice(out: Path) -> list[int]:
        children = [forked(lambda: run(model, out), folder / "log") for _ in range(2)]
        return [ended(child) for child in children]

    for step in sorted(draw.sample(range(1, steps + 1), kills)):
        faults.append((f"killed at step {step}", alone(lambda out, step=step: killed(model, out, step))))
    for most in (600, 1500, 4000):
        faults.append((f"no file above {most} bytes", alone(lambda out, most=most: on_a_full_disk(model, out, most))))
    faults += [("two drivers", twice)] * 3
    for number, (what, act) in enumerate(faults):
        out = folder / f"run-{number}"
        codes = act(out)
        again = ended(forked(lambda out=out: run(model, out), folder / "log"))
        left = [str(path) for path in out.rglob("*") if path.name.startswith(".")]
        told = {"what": what, "codes": codes, "again": again, "left": left, "table": digests(out) if again == 0 else {}}
        with (folder / "faults.jsonl").open("a") as faults_file:
            faults_file.write(json.dumps(told) + "\n")
        shutil.rmtree(out)
    (folder / "straight.json").write_text(json.dumps(digests(folder / "straight")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
