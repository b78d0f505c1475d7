"""A run in a folder that others share, damage or may only read."""

import os
import shutil
import threading
from dataclasses import replace

import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import locks
from basin_lens.errors import PieceWarning, StoreError
from basin_lens.records import Kind, Unfinished
from basin_lens.scoring import folder_run
from basin_lens.scoring.folder_run import FolderRequest, FolderRun, work, work_on_part
from basin_lens.scoring.folder_store import FolderStore
from basin_lens.scoring.job import Job
from basin_lens.scoring.ray_engine import RayOptions, _found_anywhere
from basin_lens.scoring.run_folder import PLAN, RunFolder
from tests.conftest import TEXTS, make_bridge
from tests.scoring.folder_runs import CUT, DAMAGES, SMALL, StoppedError, analyzers, files_of, part, run, stop_after

A = bl.analyzers


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer)


def request(out, **changes) -> FolderRequest:
    return FolderRequest(analyzers(), out=out, **CUT | SMALL | changes)


# ---- parts at one time -----------------------------------------------------------------------------------------------------------


def test_two_parts_that_end_at_one_time(model, tmp_path, monkeypatch):
    """One writes the table, shows it and deletes the pieces; the other finds it finished, whatever moment it comes at."""
    run(model, tmp_path / "straight")
    out = tmp_path / "run"
    for number in (1, 2):
        part(model, out, number, 2)
    part(model, out, 1, 2)
    second: list[object] = []
    begun, inside = threading.Event(), []
    waited = RunFolder.finishing

    def finishing(self):
        begun.set()
        return waited(self)

    def other():
        with RunFolder(out).held(shared=True):
            second.append(work_on_part(RunFolder(out), model, TEXTS, request(out), (1, 2), lambda _: inside.append("second")))

    thread = threading.Thread(target=other)

    def show(done):
        monkeypatch.setattr(RunFolder, "finishing", finishing)
        thread.start()
        assert begun.wait(30)
        inside.append("first")
        assert done.store.scores_place(0).exists()  # nobody took the pieces away
        done.store.clear()

    with RunFolder(out).held(shared=True):
        first = work_on_part(RunFolder(out), model, TEXTS, request(out), (2, 2), show)
    thread.join(60)
    assert isinstance(first, FolderRun) and isinstance(second[0], FolderRun) and inside == ["first", "second"]
    assert files_of(out) == files_of(tmp_path / "straight")
    assert sorted(path.name for path in (out / "pieces").iterdir()) == ["plan.json"]


@pytest.mark.many
@pytest.mark.parametrize("moment", ["unread", "all_read", "score_all"])
def test_a_part_that_starts_while_another_clears_does_nothing_again(model, tmp_path, monkeypatch, moment):
    """Whatever it has looked for by then, the other ones write the table and delete all pieces."""
    run(model, tmp_path / "straight")
    out = tmp_path / "run"
    for number in (1, 2):
        part(model, out, number, 2)
    owner = folder_run if moment == "score_all" else FolderStore
    real = getattr(owner, moment)

    def meanwhile(*given, **options):
        monkeypatch.setattr(owner, moment, real)
        done = part(model, out, 1, 2)
        assert isinstance(done, FolderRun)
        done.store.clear()
        return real(*given, **options)

    monkeypatch.setattr(owner, moment, meanwhile)
    monkeypatch.setattr(Job, "read", None)
    assert isinstance(part(model, out, 2, 2), FolderRun)
    assert files_of(out) == files_of(tmp_path / "straight")
    assert sorted(path.name for path in (out / "pieces").iterdir()) == ["plan.json"]


def test_the_status_of_a_run_that_ends_meanwhile_is_the_next_one(model, tmp_path, monkeypatch):
    """Pieces go after they were listed and before they are looked at."""
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        with pytest.raises(StoppedError):
            run(model, tmp_path / "run")
    real = os.walk

    def walk(top):
        found = list(real(top))
        shutil.rmtree(top, ignore_errors=True)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(os, "walk", walk)
        told = RunFolder(tmp_path / "run").status()
    assert (told.read, told.scored, told.shards, told.finished) == (0, 0, 0, False)
    real_plan = RunFolder._told

    def gone(self):
        self.plan.unlink()
        return real_plan(self)

    monkeypatch.setattr(RunFolder, "_told", gone)
    with pytest.raises(StoreError, match="without a plan"):
        RunFolder(tmp_path / "run").status()


@pytest.mark.slow
def test_who_writes_the_table_for_long_is_said(model, tmp_path, monkeypatch):
    monkeypatch.setattr("basin_lens.scoring.run_folder._WAITS", 1)
    part(model, tmp_path / "run", 1, 1)
    with RunFolder(tmp_path / "run").finishing() as other:
        assert other is None
        said = part(model, tmp_path / "run", 1, 1)
    assert isinstance(said, str) and f"process {os.getpid()}" in said


@pytest.mark.slow
def test_states_that_go_while_they_are_proven_are_not_read_again(model, tmp_path, monkeypatch):
    """Another part scores the layer that needed them in that moment."""
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        with pytest.raises(StoppedError):
            run(model, tmp_path / "run", keep_states=False)
    held = tmp_path / "run" / "pieces"
    states = {path: path.read_bytes() for path in (held / "states").rglob("*.safetensors")}
    scores = next((held / "scores").glob("*.safetensors"))
    kept = scores.read_bytes()
    scores.unlink()
    for border in (0, 1):  # as they were before the layer was scored
        for path, content in states.items():
            there = held / "states" / f"border-{border:03d}" / path.name
            there.parent.mkdir(exist_ok=True)
            there.write_bytes(content)
    real = FolderStore._read_columns

    def meanwhile(self, index):
        if not scores.exists():
            scores.write_bytes(kept)
            self.forget_states()
        return real(self, index)

    monkeypatch.setattr(FolderStore, "_read_columns", meanwhile)
    seen: list[list[int]] = []
    ask = FolderStore.unread
    monkeypatch.setattr(FolderStore, "unread", lambda self: seen.append(ask(self)) or seen[-1])
    run(model, tmp_path / "run")
    assert seen == [[]]


def test_a_part_proves_every_file_once(model, tmp_path, monkeypatch):
    part(model, tmp_path / "run", 1, 2)
    seen: list[str] = []
    real = Kind.tensors

    def tensors(self, path):
        seen.append(str(path))
        return real(self, path)

    monkeypatch.setattr(Kind, "tensors", tensors)
    assert isinstance(part(model, tmp_path / "run", 1, 2), str)
    assert seen and len(seen) == len(set(seen))


# ---- damage ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("damage", ["cut", "gone", "record"])
def test_the_cure_of_a_damaged_table_works(model, tmp_path, damage):
    expected = files_of(run(model, tmp_path / "run").folder.parent)
    path = tmp_path / "run" / "table" / ("record.json" if damage == "record" else "layer-002.parquet")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30])
    for _ in range(2):
        with pytest.raises(StoreError, match=r"with --fresh \(fresh=True\)"):
            run(model, tmp_path / "run")
    assert files_of(run(model, tmp_path / "run", fresh=True).folder.parent) == expected


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True])
def test_a_table_without_its_record_is_made_again(model, tmp_path, fresh):
    expected = files_of(run(model, tmp_path / "run").folder.parent)
    (tmp_path / "run" / "table" / "record.json").unlink()
    if fresh:
        run(model, tmp_path / "run", fresh=True)
    else:
        with pytest.warns(PieceWarning, match="its record is not there"):
            run(model, tmp_path / "run")
    assert files_of(tmp_path / "run") == expected


@pytest.mark.slow
def test_somebody_elses_file_among_those_of_a_table_is_refused_before_any_work(model, tmp_path, monkeypatch):
    run(model, tmp_path / "run")
    (tmp_path / "run" / "table" / "record.json").unlink()
    (tmp_path / "run" / "table" / "thesis.tex").write_text("mine")
    monkeypatch.setattr(FolderStore, "unread", lambda _: pytest.fail("it began"))
    with pytest.raises(StoreError, match="with 'table' in it"):
        run(model, tmp_path / "run")
    assert (tmp_path / "run" / "table" / "thesis.tex").exists()


@pytest.mark.slow
def test_scores_damaged_behind_the_table_cost_the_neighbors_and_it_is_said(model, tmp_path):
    what = analyzers()
    asked = replace(request(tmp_path / "run"), analyzers=what)
    with RunFolder(tmp_path / "run").held():
        done = work(RunFolder(tmp_path / "run"), model, TEXTS, asked, keep=what[1])
        assert done.neighbors() is not None
        path = done.store.scores_place(2)
        path.write_bytes(DAMAGES["flipped"](path.read_bytes()))
        with pytest.warns(PieceWarning, match=r"no neighbors can be shown.*With --fresh"):
            assert done.neighbors() is None
        assert len(done.table.load())


@pytest.mark.many
@pytest.mark.parametrize(("version", "said"), [("9", "a newer basin_lens wrote.*Update"), ("0", "an earlier basin_lens wrote")])
def test_a_folder_of_another_format_version_is_said(model, tmp_path, version, said):
    run(model, tmp_path / "run")
    other = Kind(PLAN.what, PLAN.format[:-1] + version, PLAN.cure)
    told = PLAN.read(tmp_path / "run" / "pieces" / "plan.json", {})
    del told["files"]
    (tmp_path / "run" / "pieces" / "plan.json").write_bytes(other.record(told, {}))
    with pytest.raises(StoreError, match=f"format version {version}, which {said}.*--fresh"):
        run(model, tmp_path / "run")


def test_tensors_of_another_format_version_are_said(tmp_path):
    one, other = (Kind("a thing", f"thing {version}", "Do this.") for version in (1, 2))
    other.write_tensors(Unfinished(tmp_path / "thing"), {"x": torch.zeros(2)}, {})
    with pytest.raises(StoreError, match="format version 2, which a newer"), one.tensors(tmp_path / "thing"):
        pass


# ---- what is kept ----------------------------------------------------------------------------------------------------------------


class Signs(A.StateNorm):
    """Names with every sign in them."""

    key = 'own|key["a"]'

    @property
    def columns(self):
        return tuple(replace(column, name='a|b|"c"%7C') for column in super().columns)

    def measure(self, batch):
        (values,) = super().measure(batch).values()
        return {'a|b|"c"%7C': values}


def test_names_with_any_sign_in_them(model, tmp_path, monkeypatch):
    what = [A.Contraction(k=4), Signs()]
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(StoppedError):
            bl.analyze(model, TEXTS, what, out=tmp_path / "run", **CUT | SMALL)
    made = bl.analyze(model, TEXTS, what, out=tmp_path / "run", **CUT | SMALL).load()
    expected = bl.analyze(model, TEXTS, what, **CUT)
    pd.testing.assert_frame_equal(made, expected, check_exact=True)
    capture = bl.Capture.from_texts(model, TEXTS, layers=[0], analyzers=[Signs()], progress=False)
    capture.save(tmp_path / "capture")
    held = bl.Capture.load(tmp_path / "capture")
    assert {key: list(columns) for key, columns in held.columns.items()} == {k: list(c) for k, c in capture.columns.items()}


def test_states_beyond_float16_are_refused_when_they_are_written(tokenizer, tmp_path):
    model = make_bridge("llama", tokenizer=tokenizer)
    with torch.no_grad():
        model.original_model.model.embed_tokens.weight *= 1e7
    with pytest.raises(StoreError, match=r"up to 65504, as float16 holds them, got \d{6,} in front of block 0\. Start over"):
        run(model, tmp_path / "run", store_dtype="float16", layers=[0])
    assert not list((tmp_path / "run" / "pieces").rglob("*.safetensors"))


@pytest.mark.slow
def test_states_that_were_to_be_kept_are_kept_by_whoever_goes_on(model, tmp_path):
    run(model, tmp_path / "run", keep_states=True)
    held = sorted((tmp_path / "run" / "pieces" / "states").rglob("*.safetensors"))
    run(model, tmp_path / "run")
    assert held and sorted((tmp_path / "run" / "pieces" / "states").rglob("*.safetensors")) == held
    run(model, tmp_path / "run", fresh=True)
    assert not list((tmp_path / "run" / "pieces" / "states").rglob("*.safetensors"))


# ---- who may only read -----------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("holds", [True, False])
def test_the_status_of_a_folder_that_may_only_be_read(model, tmp_path, monkeypatch, holds):
    folder = RunFolder(tmp_path / "run")
    run(model, folder.path)
    (folder.path / locks.NAME).write_text("{}")  # of a process that died
    handle = locks.lock(folder.path / locks.NAME) if holds else None
    real = os.open

    def open_(path, flags, *given, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, *given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_)
        told = folder.status()
    assert told.finished and (told.holder is not None) == holds
    if handle is not None:
        os.close(handle)


# ---- Ray -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_kind_of_device_is_another_run(model, tmp_path):
    run(model, tmp_path / "run")
    with pytest.raises(StoreError, match="the kind of device differ"):
        run(model, tmp_path / "run", engine="ray", engine_options={"num_gpus": 1})


def test_a_models_folder_is_named_in_full_for_actors(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    found = _found_anywhere({"name_or_path": "mine", "kind": "bridge"})
    assert found == {"name_or_path": str(tmp_path / "mine"), "kind": "bridge"}
    for name in ("gpt2", "smollm2-135m"):  # no folder, and the embedded model whatever lies here
        assert _found_anywhere({"name_or_path": name, "kind": "bridge"})["name_or_path"] == name
    assert _found_anywhere(None) is None and RayOptions.of({"num_gpus": 0.5}).device == "cuda"
