"""What is stored and then damaged is refused, or read as it was: never anything else, and never with somebody else's error.

BASIN_LENS_DAMAGES=300 damages each kind so often; without it, as often as fits into CI.
"""

import hashlib
import io
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import basin_lens as bl
from basin_lens import records, tables
from basin_lens.capture import reference_capture
from basin_lens.errors import CaptureError, ModelError, StoreError
from tests.conftest import TEXTS, make_bridge, random_tokens
from tests.files.damages import DAMAGES, REFUSALS, SUBJECTS, Subject, change, deleted, renamed, resealed

DAMAGES_OF_EACH = int(os.environ.get("BASIN_LENS_DAMAGES", "0"))
FORGERIES = 75


# -- what is stored -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer)


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
