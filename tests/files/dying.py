"""Commands that are killed at random moments and at their write steps, each in a fork of one process that has imported everything.

python -m tests.files.dying FOLDER KILLS        # of each command with each signal; used by tests/files/test_death.py

Writes FOLDER/killings.jsonl, a line for each. Half of the killings are at write steps.
"""

import faulthandler
import gc
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import basin_lens as bl
from basin_lens import files, studies, tables
from basin_lens import model as door
from basin_lens.cli import app as cli
from basin_lens.cli import merge as cli_merge
from basin_lens.cli import options as cli_options
from basin_lens.memorize import finetune, load_tuned
from basin_lens.merging import TokenMerger
from basin_lens.studies.framework import runner, storage
from tests.conftest import TEXTS, make_bridge, make_tokenizer

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
LONGEST = 90.0  # seconds of a fork, which takes a few: one that waits for ever says where, and fails
STEPS = ("replace", "rename", "fsync", "mkdir", "rmdir", "unlink", "chmod", "open", "ftruncate")


@dataclass(frozen=True)
class Doomed:
    """A command, and what may stand under its name at any moment.

    `run(out)` gives an exit code. `whole(out)` raises unless what is there is all of one run.
    """

    name: str
    run: Callable[[Path], int]
    whole: Callable[[Path], None]
    done: Callable[[Path], bool]
    earlier: Callable[[Path], object] | None = None
    again: int = 0  # exit code if it was done already


def call(*words: str) -> int:
    sys.argv = ["basin-lens", *words]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def names(folder: Path) -> set[str]:
    """Of all files, but for leavings."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if ".basin-lens" not in name}


def same(found: object, expected: object) -> None:
    assert found == expected, (found, expected)


# ---- the commands -----------------------------------------------------------------------------------------------------------------------


def capture(model, _: Path) -> Doomed:
    whole = bl.Capture.from_texts(model, TEXTS[:4], progress=False)

    def run(out: Path) -> int:
        try:
            bl.Capture.from_texts(model, TEXTS[:4], batch_size=1, store=out, progress=False)
        except bl.errors.StoreError:
            return 1
        return 0

    def check(out: Path) -> None:
        found = bl.Capture.load(out)
        for layer in whole.layers:
            assert torch.allclose(found.resid_post(layer), whole.resid_post(layer), atol=1e-4)

    return Doomed("capture", run, check, Path.exists, again=1)


def tune(model, _: Path) -> Doomed:
    def go(out: Path | None):
        return finetune(model, TEXTS[:2], 4, folder=out, every=1, max_length=16, progress=False)

    expected = door.fingerprint(go(None).model)

    def check(out: Path) -> None:
        same(names(out) - {"checkpoint.safetensors"}, {"tuned.json", "weights.safetensors"})
        same(door.fingerprint(load_tuned(out, model)), expected)

    return Doomed("finetune", lambda out: int(go(out) is None), check, lambda out: (out / "tuned.json").exists())


def analyze(_model, folder: Path) -> Doomed:
    text = folder / "text.txt"
    text.write_text(" ".join(TEXTS), encoding="utf-8")  # one text, cut into as many sequences as a group has tokens

    def run(out: Path) -> int:
        return call("analyze", str(text), "--layers", "1", "--k", "4", "--max-length", "24", "--out", str(out))

    def check(out: Path) -> None:
        found = {name for name in names(out) if not name.startswith(("pieces/read/", "pieces/scores/", "pieces/states/"))}
        same(found, {"pieces/plan.json", "table/record.json", "table/layer-001.parquet", "summary.csv", "report.html"})
        table = tables.open(out).load()
        (layer,) = table["layer"].unique().tolist()
        same(pd.read_csv(out / "summary.csv")["layer"].tolist(), [layer])
        assert table["run"].iloc[0] in (out / "report.html").read_text(encoding="utf-8")

    return Doomed("analyze", run, check, lambda out: (out / "report.html").exists())


def study(model, folder: Path) -> Doomed:
    """Measured once; what is killed is all that the command does besides."""
    text = folder / "documents.jsonl"
    text.write_text("".join(json.dumps({"text": t, "doc": str(i)}) + "\n" for i, t in enumerate(TEXTS)), encoding="utf-8")
    held = studies.measure(model, bl.texts.read_texts(text), studies=["layers"], layers=[0, 1], k=4, max_length=24, progress=False)
    made = studies.study_layers(model, held, progress=False)
    # Drawing takes long, and writes nothing.
    made = replace(made, figures={name: Figure(figsize=(1, 1)) for name in list(made.figures)[:1]}, sections=made.sections[:1])
    studies.measure = lambda *_, **__: held

    def run(out: Path, title: str = "new") -> int:
        runner.run_study = lambda *_, **__: replace(made, title=f"The {title} study")
        return call("study", "layers", str(text), "--out", str(out))

    def check(out: Path) -> None:
        found = storage.read_results(out)
        told = {"results.json", "report.html", "tables/tokens.parquet"}
        told |= {f"tables/{name}.{end}" for name in found["tables"] for end in ("parquet", "csv")}
        told |= {f"figures/{name}.{end}" for name in found["figures"] for end in ("png", "pdf")}
        same(names(out), told)
        assert found["title"] in (out / "report.html").read_text(encoding="utf-8")
        for name in found["tables"]:
            tables.load(out / "tables" / f"{name}.parquet")

    return Doomed("study", run, check, lambda out: (out / "results.json").exists(), earlier=partial(run, title="old"))


def train_merger(model, folder: Path) -> Doomed:
    text = folder / "train.jsonl"
    text.write_text("".join(json.dumps({"text": t, "doc": str(i)}) + "\n" for i, t in enumerate(TEXTS)), encoding="utf-8")

    def run(out: Path) -> int:
        small = (
            "--length",
            "16",
            "--projection",
            "4",
            "--recent",
            "4",
            "--target-rate",
            "0.3",
            "--steps",
            "3",
            "--batch-size",
            "1",
            "--checkpoint-every",
            "1",
        )
        return call("merge", "train", str(text), *small, "--out", str(out))

    def check(out: Path) -> None:
        found = names(out) - {"checkpoint.safetensors"}
        same({"merger.json", "log.jsonl", "training.png"}, {name for name in found if not name.endswith(".safetensors")})
        assert len(found) == 4 and (out / "training.png").stat().st_size > 1000
        same(len((out / "log.jsonl").read_text().splitlines()), 3)
        TokenMerger.load(out, model)

    return Doomed("merge train", run, check, lambda out: (out / "merger.json").exists(), again=1)


# ---- killing ----------------------------------------------------------------------------------------------------------------------------


def forked(act: Callable[[], int], log: Path) -> int:
    """Process number of a fork that does it and ends with its code."""
    # A fork keeps the locks that other threads held, and not the threads.
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/task")) == 1, [thread.name for thread in threading.enumerate()]
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        with log.open("a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        code = act()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def at_step(number: int, act: Callable[[], object]):
    """Before the call of that number of what changes the disk."""
    real, count = {name: getattr(os, name) for name in STEPS}, [0]

    def watched(name: str):
        def step(*given, **options):
            if name != "open" or (len(given) > 1 and given[1] & os.O_CREAT):
                count[0] += 1
                if count[0] == number:
                    act()
            return real[name](*given, **options)

        return step

    for name in STEPS:
        setattr(os, name, watched(name))
    try:
        yield count
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def measured_run(one: Doomed, place: Path) -> tuple[float, int]:
    """Seconds and write steps of a run that nobody kills."""

    def act() -> int:
        begun = time.perf_counter()
        with at_step(-1, lambda: None) as count:
            code = one.run(place / "out")
        (place / "told").write_text(json.dumps([time.perf_counter() - begun, count[0]]))
        return code

    place.mkdir()
    same(ended(forked(act, place.parent / "log")), 0)
    seconds, steps = json.loads((place / "told").read_text())
    return seconds, steps


def judged(one: Doomed, out: Path) -> int:
    """After the killing, and after the same command once more."""
    had = one.earlier is not None and (out.parent / "had").exists()
    (out.parent / "had").unlink(missing_ok=True)
    if one.done(out):
        one.whole(out)
    if had:  # an earlier run is never lost
        files.clear_leavings(out.parent)
        one.whole(out)
    code = one.run(out)
    assert code == 0 or code == one.again, code
    one.whole(out)
    same({path.name for path in out.parent.iterdir()}, {"out"})
    left = {str(path) for path in out.rglob("*") if path.name.startswith((".", "checkpoint"))}
    same(left, set())
    return 0


def kill(one: Doomed, place: Path, number: int, moment: float | int, sign: signal.Signals, earlier: Path | None) -> dict:
    """One killing: `moment` is a step's number, or seconds."""
    place.mkdir()
    if earlier is not None:
        shutil.copytree(earlier, place / "out")
        (place / "had").touch()

    def act() -> int:
        if isinstance(moment, float):
            return one.run(place / "out")
        with at_step(moment, lambda: os.kill(os.getpid(), sign)):
            return one.run(place / "out")

    log = place.parent / f"log-{one.name.replace(' ', '-')}-{sign.name}-{number}"
    child = forked(act, log)
    if isinstance(moment, float):
        time.sleep(moment)
        os.kill(child, sign)
    code = ended(child)
    judge = ended(forked(partial(judged, one, place / "out"), log))
    shutil.rmtree(place)
    return {
        "command": one.name,
        "signal": sign.name,
        "moment": moment,
        "code": code,
        "error": log.read_text()[-2500:] if judge else "",
    }


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    mpl.rcParams["savefig.dpi"] = 20
    # The forks of one process share tqdm's own lock, and who is killed while drawing a bar would hold it for ever.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    model = make_bridge("llama", tokenizer=make_tokenizer(), num_hidden_layers=2, num_key_value_heads=4)
    cli_options.load = cli_merge._load = lambda _: model
    for make in (capture, tune, analyze, study, train_merger):
        begun = time.perf_counter()
        one = make(model, folder)
        gc.collect()
        gc.freeze()  # else a collection in a fork copies every page
        place = folder / one.name.replace(" ", "-")
        seconds, steps = measured_run(one, place)
        earlier = place / "earlier"
        if one.earlier is not None:
            same(ended(forked(lambda one=one, earlier=earlier: int(one.earlier(earlier)), folder / "log")), 0)
        for sign in SIGNALS:
            draw = random.Random(f"{one.name} {sign}")
            for number in range(kills):
                moment = draw.uniform(0, seconds) if number % 2 else draw.randint(1, steps)
                before = earlier if one.earlier is not None and number % 4 < 2 else None
                told = kill(one, place / str(number), number, moment, sign, before)
                with (folder / "killings.jsonl").open("a") as killings:
                    killings.write(json.dumps(told) + "\n")
        print(one.name, f"{seconds:.2f} s, {steps} steps, {time.perf_counter() - begun:.0f} s in all", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
