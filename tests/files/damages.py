"""What is stored, each a valid one twice, and ways to damage it."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens import records, tables
from basin_lens.errors import MergeError, ModelError, StoreError, TableError
from basin_lens.memorize import Recipe
from basin_lens.merging import TokenMerger, Training, Windows
from basin_lens.merging.training_run import TrainingRun
from basin_lens.studies.framework import storage
from tests.conftest import TEXTS, make_bridge, random_tokens

REFUSALS = StoreError, ModelError, TableError, MergeError
KEY = "0123456789abcdef"


def plain(thing: Any) -> Any:
    """Content that can be compared: tensors by type, shape and bytes."""
    if isinstance(thing, torch.Tensor):
        held = thing.detach().cpu().contiguous()
        return str(held.dtype), tuple(held.shape), held.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(thing, dict):
        return {name: plain(value) for name, value in thing.items()}
    return [plain(value) for value in thing] if isinstance(thing, list | tuple) else thing


@dataclass(frozen=True)
class Subject:
    """Something that is stored: two valid ones of the same shape in folders, and how one is read whole."""

    folders: tuple[Path, Path]
    read: Callable[[Path], Any]
    cases: int = 150
    may_be_missing: bool = False  # then all begins anew, as it should


def captures(base, tmp: Path) -> Subject:
    other = make_bridge("llama", seed=5, tokenizer=base.tokenizer)
    for name, model in (("one", base), ("two", other)):
        passages = [
            bl.Passage(text, doc=name, labels={"n": index}, spans={"start": (0, 3)}) for index, text in enumerate(TEXTS[:4])
        ]
        analyzers = [bl.analyzers.Surprisal()]
        bl.Capture.from_texts(model, passages, analyzers=analyzers, batch_size=1, store=tmp / name, progress=False)

    def read(folder: Path) -> Any:
        held = bl.Capture.load(folder)
        states = [held.resid_pre(layer) for layer in held.layers] + [held.resid_post(held.layers[-1])]
        about = repr((held.sequences, held.passages, held.docs, held.labels, held.strings, held.layers, held.model, held.settings))
        return plain([about, held.columns, states, held._readings])

    return Subject((tmp / "one", tmp / "two"), read)


def mergers(base, tmp: Path) -> Subject:
    for name, seed in (("one", 1), ("two", 2)):
        merger = TokenMerger([0, 1], target_rate=0.3, recent=2, projection=6, adaptive=True, seed=seed)
        merger.calibrate(base, random_tokens(2, 24, seed=seed)).save(tmp / name)

    def read(folder: Path) -> Any:
        held = TokenMerger.load(folder, base)
        return plain([dict(held.state_dict()), vars(held.options), held.base, held.calibrated, held.facts])

    return Subject((tmp / "one", tmp / "two"), read)


def tuned(base, tmp: Path) -> Subject:
    for name, factor in (("one", 1.01), ("two", 0.99)):
        model = door.copy_of(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        door.save_tuned(model, tmp / name, base, {"training": name, "history": [{"step": 0, "loss": 1.5}]})

    def read(folder: Path) -> Any:
        record = door.tuned_facts(folder)
        return plain([dict(door.parameters_of(door.put_tuned(base, folder))), record])

    return Subject((tmp / "one", tmp / "two"), read)


def frames(base, tmp: Path) -> Subject:
    for seed in (1, 2):
        (tmp / str(seed)).mkdir()
        table = bl.analyze(base, random_tokens(4, 12, seed=seed), [bl.analyzers.StateNorm()], progress=False)
        tables.save(table.assign(word=[f"w{n % 7}" for n in range(len(table))]), tmp / str(seed) / "table.parquet")

    def read(folder: Path) -> Any:
        held = tables.load(folder / "table.parquet")
        return [held.to_json(double_precision=15), held.dtypes.astype(str).to_dict(), tables.provenance(held)]

    return Subject((tmp / "1", tmp / "2"), read)


def studies(base, tmp: Path) -> Subject:  # noqa: ARG001 - every subject is made alike
    for name in ("layers", "words"):
        (tmp / name).mkdir()
        facts = {
            "study": name, "title": "A title", "about": ["so"], "hypothesis": "h", "decision": "yes", "verdict": ["it holds"],
            "findings": [{"finding": "f", "p": 0.012, "holds": True}], "red_flags": [{"flag": "a", "raised": False}], "not_tested": ["n"],
            "tables": ["findings"], "figures": ["a"], "provenance": {"run": {"seed": 1}},
        }  # fmt: skip
        (tmp / name / "results.json").write_bytes(storage.KIND.record(facts, {}, indent=1))
    return Subject((tmp / "layers", tmp / "words"), storage.read_results)


def tunings(base, tmp: Path) -> Subject:
    room = importlib.import_module("basin_lens.memorize.finetuning")

    def begun() -> Any:
        return room._Run(door.copy_of(base), Recipe(batch_size=2, filler=0), 8, KEY)

    for seed in (1, 2):
        run = begun()
        for _ in range(3):
            tokens = random_tokens(2, 10, seed=seed)
            run.take(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.ones(2, dtype=torch.bool).numpy(), None, 1)
        (tmp / str(seed)).mkdir()  # a training's own folder is there: it is locked
        run._keep(tmp / str(seed))

    def read(folder: Path) -> Any:
        run = begun()
        run.resume(folder)
        states = [run.optimizer.state[p] for p in run.parameters.values()]
        return plain([run.parameters, states, run.step, repr(run.history)])

    return Subject((tmp / "1", tmp / "2"), read, cases=75, may_be_missing=True)


def trainings(base, tmp: Path) -> Subject:
    texts = random_tokens(6, 16, seed=3)
    windows = Windows(texts, tuple(f"text {n}" for n in range(6)))
    calibrated = TokenMerger([0, 1], target_rate=0.3, recent=2).calibrate(base, texts)
    calibrated.save(tmp / "merger")

    def begun() -> Any:
        return TrainingRun(TokenMerger.load(tmp / "merger", base), base, windows, Training(steps=6, batch_size=2))

    for seed in (1, 2):
        run = begun()
        for _ in range(seed + 1):
            run.history.append(run.take())
        (tmp / str(seed)).mkdir()
        run.keep(tmp / str(seed))

    def read(folder: Path) -> Any:
        run = begun()
        run.resume(folder)
        (folder / "log.jsonl").unlink()  # written by resuming
        states = [run.optimizer.state[p] for p in run._named().values()]
        return plain([run._named(), states, run.step, run.target, run.history, repr(run.parachute)])

    return Subject((tmp / "1", tmp / "2"), read, cases=75, may_be_missing=True)


SUBJECTS = {
    "captures": captures, "mergers": mergers, "tuned models": tuned, "tables": frames, "studies": studies, "tuning checkpoints": tunings,
    "merge checkpoints": trainings,
}  # fmt: skip


# -- damages ------------------------------------------------------------------------------------------------------------------------


def flipped(rng, file: Path, _other: Path) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 5])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(rng, file: Path, _other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice([0, 7, 8, len(content) - 1, rng.randrange(len(content))])])


def deleted(_rng, file: Path, _other: Path) -> None:
    file.unlink()


def exchanged(rng, file: Path, other: Path) -> None:
    """Another valid record's file in its place; where the whole record is one file, its second half."""
    files = sorted(path for path in other.iterdir() if path.suffix == file.suffix)
    same = [path for path in files if path.name == file.name]
    content = (same or [rng.choice(files)])[0].read_bytes()
    if len(list(other.iterdir())) == 1:
        half = len(content) // 2
        content = file.read_bytes()[:half] + content[half:]
    file.write_bytes(content)


def zeroed(rng, file: Path, _other: Path) -> None:
    content = bytearray(file.read_bytes())
    size = min(len(content), rng.choice([16, 64, 512]))
    at = rng.randrange(len(content) - size + 1)
    file.write_bytes(content[:at] + bytes(size) + content[at + size :])


def grown(rng, file: Path, _other: Path) -> None:
    more = rng.randbytes(rng.choice([1, 8, 100]))
    file.write_bytes(more + file.read_bytes() if rng.random() < 0.3 else file.read_bytes() + more)


def edited(rng, file: Path, _other: Path) -> None:
    """Another value in the record; where there is none, another digit somewhere in the file."""
    records = sorted(file.parent.glob("*.json"))
    if records:
        record = json.loads(records[0].read_text())
        change(rng, record)
        records[0].write_text(json.dumps(record, indent=1))
        return
    content = bytearray(file.read_bytes())
    digits = [at for at, byte in enumerate(content) if 48 <= byte < 58]
    at = rng.choice(digits)
    content[at] = 48 + (content[at] - 47) % 10
    file.write_bytes(content)


def renamed(rng, file: Path, _other: Path) -> None:
    """Another name, or the names of two files exchanged."""
    others = sorted(path for path in file.parent.iterdir() if path.suffix == file.suffix and path != file)
    if others and rng.random() < 0.7:
        second, aside = rng.choice(others), file.with_suffix(".aside")
        file.rename(aside), second.rename(file), aside.rename(second)
    else:
        file.rename(file.with_name(f"x{file.name}"))


DAMAGES = flipped, cut, deleted, exchanged, zeroed, grown, edited, renamed


def change(rng, record: Any) -> None:
    """Another value, another type, or nothing, at one place of a JSON record."""
    places = []

    def walk(holder: Any) -> None:
        for name in holder if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, name))
            if isinstance(holder[name], dict | list):
                walk(holder[name])

    walk(record)
    holder, name = rng.choice(places)
    old = holder[name]
    if rng.random() < 0.2:
        del holder[name]
    elif rng.random() < 0.4:
        holder[name] = rng.choice([v for v in (None, 3, -1, "x", [], {}, [None], True, 1.5, {"a": []}) if v != old])
    elif isinstance(old, bool) or old is None:
        holder[name] = not old
    elif isinstance(old, int | float):
        holder[name] = old + 1
    else:
        holder[name] = f"{old}x"


def resealed(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change a record as if it had been written so."""
    record = json.loads(path.read_text())
    edit(record)
    record["seal"] = records.OPEN_SEAL
    path.write_bytes(records.seal(json.dumps(record).encode()))
