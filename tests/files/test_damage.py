"""What is stored and then damaged is refused, or read as it was: never anything else, and never with somebody else's error.

BASIN_LENS_DAMAGES=300 damages each kind so often; without it, as often as fits into CI.
"""

import hashlib
import importlib
import io
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import basin_lens as bl
from basin_lens import model as door
from basin_lens import records, tables
from basin_lens.capture import reference_capture
from basin_lens.errors import CaptureError, MergeError, ModelError, StoreError, TableError
from basin_lens.memorize import Recipe
from basin_lens.merging import TokenMerger, Training, Windows
from basin_lens.merging.training_run import TrainingRun
from basin_lens.studies.framework import storage
from tests.conftest import TEXTS, make_bridge, random_tokens

REFUSALS = StoreError, ModelError, TableError, MergeError
DAMAGES_OF_EACH = int(os.environ.get("BASIN_LENS_DAMAGES", "0"))
FORGERIES = 75
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


# -- what is stored -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer)


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


@pytest.fixture(scope="module")
def subjects(base, tmp_path_factory):
    """Each made once, when it is first asked for."""
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            made[name] = SUBJECTS[name](base, tmp_path_factory.mktemp("valid"))
        return made[name]

    return get


@pytest.mark.damage
@pytest.mark.parametrize("name", SUBJECTS)
def test_what_was_damaged_is_refused_or_equal(subjects, name, tmp_path):
    subject = subjects(name)
    good, other = subject.folders
    expected = subject.read(good)
    assert expected != subject.read(other)
    counts: Counter[str] = Counter()
    wrong = []
    damages = [damage for damage in DAMAGES if not (subject.may_be_missing and damage in (deleted, renamed))]
    cases = DAMAGES_OF_EACH or subject.cases
    for case in range(cases):
        rng = random.Random(f"{name} {case}")
        damage, folder = damages[case % len(damages)], tmp_path / str(case)
        shutil.copytree(good, folder)
        file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
        damage(rng, file, other)
        try:
            found = subject.read(folder)
        except REFUSALS as error:
            in_words = str(error).startswith("expected ") and ", got " in str(error)
            counts["refused" if in_words else "refused without words"] += 1
            wrong += [] if in_words else [(case, damage.__name__, file.name, str(error))]
        except Exception as error:
            wrong.append((case, damage.__name__, file.name, f"{type(error).__name__}: {error}"))
            counts["bare exception"] += 1
        else:
            counts["equal" if found == expected else "wrong"] += 1
            if found != expected:
                wrong.append((case, damage.__name__, file.name, "loaded wrong"))
        shutil.rmtree(folder)
    print(f"{name}: {cases} damaged: {dict(counts)}")
    assert not wrong, wrong
    assert counts["refused"] > 0.8 * cases  # the damages do damage


FORGED = {"captures": "capture.json", "mergers": "merger.json", "tuned models": "tuned.json", "studies": "results.json"}


@pytest.mark.damage
@pytest.mark.parametrize("name", FORGED)
def test_fields_of_a_record_that_was_sealed_anew_are_checked(subjects, name, tmp_path):
    """A digest is no signature: what is read is checked for what it is, so that a refusal comes in our own words."""
    subject = subjects(name)
    counts: Counter[str] = Counter()
    for case in range(FORGERIES):
        rng, folder = random.Random(f"{name} forged {case}"), tmp_path / str(case)
        shutil.copytree(subject.folders[0], folder)
        resealed(folder / FORGED[name], lambda record, rng=rng: change(rng, record))
        try:
            subject.read(folder)
        except REFUSALS:
            counts["refused"] += 1
        else:
            counts["read"] += 1
        shutil.rmtree(folder)
    print(f"{name}: {FORGERIES} forged: {dict(counts)}")
    assert counts["refused"] and counts["read"]


def resealed(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change a record as if it had been written so."""
    record = json.loads(path.read_text())
    edit(record)
    record["seal"] = records.OPEN_SEAL
    path.write_bytes(records.seal(json.dumps(record).encode()))


# -- the seal -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, (1 << 20) - 40, (1 << 20) - 87, (1 << 20) - 1, 1 << 20, 3 << 20])
def test_a_seal_is_found_wherever_it_lies_and_covers_every_byte(at, tmp_path):
    """Also across the blocks in which a file is read."""
    content = bytes(at) + records.OPEN_SEAL.encode() + b"the end"
    (tmp_path / "file").write_bytes(content)
    records.seal_file(tmp_path / "file")
    held = (tmp_path / "file").read_bytes()
    assert held == records.seal(content) and len(held) == len(content)
    digits = held.index(b"sha256:") + 7
    assert held[digits : digits + 64].decode() == hashlib.sha256(content).hexdigest()
    assert records.is_sealed(io.BytesIO(held)) is True
    assert records.is_sealed(io.BytesIO(content)) is False  # never closed
    assert records.is_sealed(io.BytesIO(held[:-1])) is False
    assert records.is_sealed(io.BytesIO(b"no seal")) is None
    for place in {0, at, digits, digits + 63, len(held) - 1}:
        damaged = bytearray(held)
        damaged[place] ^= 1
        assert not records.is_sealed(io.BytesIO(damaged))


def test_texts_that_look_like_a_seal_do_no_harm():
    closed = records.seal(records.OPEN_SEAL.encode() + b"other")
    for content in (closed + records.OPEN_SEAL.encode(), records.OPEN_SEAL.encode() + closed, records.OPEN_SEAL.encode() * 3):
        held = records.seal(content)
        assert records.is_sealed(io.BytesIO(held))
        assert not records.is_sealed(io.BytesIO(held + b"x"))


def test_a_file_changed_after_it_was_proven_is_proven_again(base, tmp_path, monkeypatch):
    """Kept in mind by size and times, but not while the clock could miss a change."""
    read = []
    digest = records.digest
    monkeypatch.setattr(records, "digest", lambda content: (read.append(content), digest(content))[1])
    held = bl.Capture.from_texts(base, TEXTS[:2], store=tmp_path / "one", progress=False)
    (path,) = (tmp_path / "one").glob("*.safetensors")
    read.clear()
    held.resid_pre(0), held.resid_pre(1)
    assert len(read) == 2  # fresh: read again and again
    monkeypatch.setattr(records, "_SETTLED", -1e9)
    held.resid_pre(0), held.resid_pre(1), bl.Capture.load(tmp_path / "one").resid_pre(2)
    assert len(read) == 3
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="changed after it was written"):
        held.resid_pre(0)


# -- captures -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(base, tmp_path):
    """A capture of four texts on disk, a file for each."""
    return bl.Capture.from_texts(base, TEXTS[:4], batch_size=1, store=tmp_path / "store", progress=False), tmp_path / "store"


def test_a_missing_file_of_states_is_told_and_no_memory_shown(stored):
    held, folder = stored
    sorted(folder.glob("states-*.safetensors"))[2].unlink()
    for read in (lambda: held.resid_pre(1), lambda: held.save(folder.parent / "copy"), lambda: bl.Capture.load(folder)):
        with pytest.raises(
            StoreError, match=r"expected a saved capture at .*, got one without its file states-00002.safetensors. Capture the"
        ):
            read()
    assert [path.name for path in folder.parent.iterdir()] == ["store"]


def change_shard(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the second file of states as if it had been written so."""
    path = sorted(folder.glob("states-*.safetensors"))[1]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    resealed(folder / "capture.json", lambda record: record["files"].update({path.name: records.digest(path)}))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.update(rows=t["rows"] - 1), "row [0-9]+ 2 times"),
        (lambda t: t.update(rows=torch.zeros_like(t["rows"])), "row 0 [0-9]+ times"),
        (lambda t: t.update(rows=t["rows"] + 1000), "rows 1[0-9]+ to 1[0-9]+ of"),
        (lambda t: t.update(rows=t["rows"] - 1000), "rows -"),
        (lambda t: t.update(rows=t["rows"].float()), "rows as torch.float32"),
        (lambda t: t.update({"border.1": t["border.1"].double()}), "border.1 as torch.float64"),
        (lambda t: t.update({"border.1": t["border.1"][:, :-1].contiguous()}), "border.1 as"),
        (lambda t: t.update({"border.1": t["border.1"][:-1].contiguous()}), "border.1 as"),
        (lambda t: t.pop("border.1"), "border.1"),
        (lambda t: t.pop("rows"), "rows"),
        (lambda t: [t.update({name: value[:0].contiguous()}) for name, value in list(t.items())], "0 times"),
    ],
)
def test_states_must_be_there_for_every_row_once(stored, edit, match):
    _, folder = stored
    change_shard(folder, edit)
    with pytest.raises(StoreError, match=rf"expected a saved capture at .*, got .*{match}"):
        bl.Capture.load(folder).resid_pre(1)


def test_files_that_the_record_does_not_list_are_refused(stored):
    _, folder = stored
    shutil.copy(folder / "states-00000.safetensors", folder / "states-00009.safetensors")
    with pytest.raises(StoreError, match=r"states-00009.safetensors, which its record does not list"):
        bl.Capture.load(folder)


def test_a_damaged_capture_is_not_made_whole_by_a_copy(stored):
    held, folder = stored
    path = folder / "states-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"states-00001.safetensors was changed after it was written"):
        held.save(folder.parent / "copy")
    assert [path.name for path in folder.parent.iterdir()] == ["store"]


def test_a_planned_capture_has_nothing_to_save(base, tmp_path):
    with pytest.raises(CaptureError, match="only planned"):
        bl.Capture.plan(base, TEXTS[:2]).save(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


# -- earlier versions, bases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "cure"),
    [
        ("captures", "capture.json", "Capture the texts again"), ("mergers", "merger.json", "calibrate the merger again"),
        ("tuned models", "tuned.json", "Tune the model again"), ("studies", "results.json", "Run the study"),
    ],
)  # fmt: skip
def test_folders_of_earlier_versions_are_refused_with_the_cure(subjects, name, file, cure, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(subjects(name).folders[0], folder)
    record = json.loads((folder / file).read_text())
    del record["files"], record["seal"]
    record["format"] = 1
    (folder / file).write_text(json.dumps(record))
    with pytest.raises(REFUSALS, match=f"of an earlier version, which kept no digests.*{cure}"):
        subjects(name).read(folder)


def test_tables_of_earlier_versions_are_refused_with_the_cure(base, tmp_path):
    table = bl.analyze(base, random_tokens(2, 9), [bl.analyzers.StateNorm()], progress=False)
    arrow = pyarrow.Table.from_pandas(table.rename_axis(None), preserve_index=False)
    facts = {b"basin_lens.provenance": json.dumps(table.attrs["provenance"]).encode()}
    pyarrow.parquet.write_table(arrow.replace_schema_metadata(facts), tmp_path / "old.parquet")
    with pytest.raises(StoreError, match=r"without its digest.*earlier version. Make the table again"):
        tables.load(tmp_path / "old.parquet")


def test_other_readers_of_parquet_see_what_was_written(base, tmp_path):
    table = bl.analyze(base, random_tokens(2, 9), [bl.analyzers.StateNorm()], progress=False)
    tables.save(table, tmp_path / "table.parquet")
    read = pyarrow.parquet.read_table(tmp_path / "table.parquet", page_checksum_verification=True).to_pandas()
    pd.testing.assert_frame_equal(read, table)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)


@pytest.mark.parametrize("length", [1, 2])
def test_a_tuned_model_that_is_its_own_base_is_refused(subjects, tmp_path, length):
    """Before anything is loaded; also by way of another model."""
    folders = [tmp_path / str(n) for n in range(length)]
    for n, folder in enumerate(folders):
        shutil.copytree(subjects("tuned models").folders[0], folder)
        source = {"name_or_path": str(folders[(n + 1) % length]), "kind": "bridge"}
        resealed(folder / "tuned.json", lambda record, source=source: record["base"].update(source=source))
    with pytest.raises(ModelError, match=r"expected a tuned model.*its own base"):
        bl.load_model(folders[0])


# -- the reference bank ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def test_a_damaged_reference_bank_is_read_anew(base, cache):
    expected = reference_capture(base, progress=False).resid_pre(1)
    (folder,) = cache.iterdir()
    for file in ("states-00001.safetensors", "capture.json"):
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)
        with pytest.warns(UserWarning, match="reference bank in the cache is damaged"):
            assert torch.equal(reference_capture(base, progress=False).resid_pre(1), expected)
        assert list(cache.iterdir()) == [folder]
    assert torch.equal(reference_capture(base, progress=False).resid_pre(1), expected)


def test_two_processes_that_make_the_reference_bank_at_once(base, cache, tmp_path):
    """The one that comes second takes what the first made, which stays as it is."""
    reference_capture(base, progress=False)
    (folder,) = cache.iterdir()
    made = tmp_path / "made"
    folder.rename(made)
    seen = []

    def another_process(*_):
        if not seen:
            shutil.copytree(made, folder)
            seen.append({path.name: path.stat().st_ino for path in folder.iterdir()})

    handle = base.blocks[2].register_forward_pre_hook(another_process)
    try:
        held = reference_capture(base, progress=False)
    finally:
        handle.remove()
    assert seen == [{path.name: path.stat().st_ino for path in folder.iterdir()}] and list(cache.iterdir()) == [folder]
    assert torch.equal(held.resid_pre(1), bl.Capture.load(made).resid_pre(1))
