"""What is interrupted never passes for whole, what is read is never replaced, and what cannot be written is refused before any work."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import files, tables
from basin_lens import model as door
from basin_lens.capture import fill_columns, read_states, token_columns
from basin_lens.capture.reading import run_model
from basin_lens.cli import app as cli
from basin_lens.cli import codec as cli_codec
from basin_lens.cli import options as cli_options
from basin_lens.errors import CaptureError, MergeError, StoreError, TableError
from basin_lens.merging import TokenMerger, Training, train_merger, training_log, windows_of
from basin_lens.studies.framework import storage
from tests.conftest import TEXTS, make_bridge, random_tokens


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer)


@pytest.fixture
def interrupted(model):
    """Run something that reads the model batch by batch; Ctrl-C comes at the third."""

    def act(read) -> None:
        count = [0]

        def stop(*_):
            count[0] += 1
            if count[0] == 3:
                raise KeyboardInterrupt

        handle = model.blocks[1].register_forward_pre_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                read()
        finally:
            handle.remove()

    return act


# -- captures -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [None, "store"])
def test_an_interrupted_reading_leaves_a_plan(model, interrupted, tmp_path, store):
    """It held rows of freed memory, or looked for its states in a folder that is gone, and said that it was read."""
    place = None if store is None else tmp_path / store
    planned = bl.Capture.plan(model, TEXTS[:4])
    interrupted(lambda: read_states(model, planned, [bl.analyzers.Surprisal()], batch_size=1, store=place, progress=False))
    assert not planned.is_read and not planned.columns and list(tmp_path.iterdir()) == []
    with pytest.raises(CaptureError, match="only planned"):
        planned.save(tmp_path / "copy")
    whole = bl.Capture.from_texts(model, TEXTS[:4], batch_size=1, progress=False)
    read_states(model, planned, batch_size=1, progress=False)
    assert all(torch.equal(planned.resid_pre(layer), whole.resid_pre(layer)) for layer in whole.layers)


def test_an_interrupted_column_is_none(model, interrupted):
    """Half of its values were NaN, and it was never filled again."""
    analyzer = bl.analyzers.GradientNorm()
    held = bl.Capture.from_texts(model, TEXTS[:4], batch_size=1, progress=False)
    interrupted(lambda: run_model(model, held, [analyzer], batch_size=1, progress=False, keep_states=False))
    assert held.columns == {} and fill_columns(model, held, [analyzer], progress=False) == [analyzer.key]
    full = bl.Capture.from_texts(model, TEXTS[:4], analyzers=[analyzer], progress=False)
    for name, values in full.columns[analyzer.key].items():
        assert torch.allclose(held.columns[analyzer.key][name], values, rtol=1e-4, equal_nan=True)


def test_an_interrupted_column_of_states_is_none(model, monkeypatch):
    held = bl.Capture.from_texts(model, TEXTS[:2], batch_size=1, progress=False)
    real, count = token_columns.keep_values, [0]

    def keep(*given):
        real(*given)
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(token_columns, "keep_values", keep)
    with pytest.raises(KeyboardInterrupt):
        fill_columns(model, held, [bl.analyzers.StateNorm()], progress=False)
    assert held.columns == {}


def test_a_capture_is_read_once(model, tmp_path):
    """Reading one from disk anew wrote other states into its folder."""
    bl.Capture.from_texts(model, TEXTS[:2], store=tmp_path / "store", progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    with pytest.raises(CaptureError, match="only planned, got one that was read"):
        read_states(model, bl.Capture.load(tmp_path / "store"), progress=False)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}


def test_a_capture_on_disk_is_found_from_another_working_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    made = bl.Capture.from_texts(model, TEXTS[:2], store="store", progress=False)
    loaded = bl.Capture.load("store")
    monkeypatch.chdir(tmp_path / "sub")
    assert torch.equal(made.resid_pre(1), loaded.resid_pre(1))


# -- inputs -------------------------------------------------------------------------------------------------------------------------


def forbidden(*_, **__):
    raise AssertionError("ran")


@pytest.fixture
def table(model):
    return bl.analyze(model, random_tokens(4, 12, seed=1), [bl.analyzers.StateNorm()], progress=False)


@pytest.fixture
def command(monkeypatch, capsys):
    """A call that must be refused before a model is loaded; what it says."""
    monkeypatch.setattr(cli_options, "load", forbidden)
    monkeypatch.setattr(cli_codec, "_load", forbidden)

    def call(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["basin-lens", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        return capsys.readouterr().err

    return call


def test_analyze_never_replaces_a_table_of_somebody_else(tmp_path, command):
    """A user's own texts may be called table.parquet, and stand alone in their folder."""
    (tmp_path / "data").mkdir()
    own, other = tmp_path / "data" / "table.parquet", tmp_path / "text.txt"
    pd.DataFrame({"text": TEXTS[:3]}).to_parquet(own)
    other.write_text(TEXTS[0], encoding="utf-8")
    for read in (own, other):
        assert "in it. Choose --out" in command("analyze", str(read), "--out", str(own.parent))
    assert pd.read_parquet(own)["text"].tolist() == TEXTS[:3]


def test_results_never_take_the_place_of_what_is_read(tmp_path, table, command, monkeypatch):
    out = tmp_path / "out"
    (out / "tables").mkdir(parents=True)
    tables.save(table, out / "table.parquet")
    shutil.rmtree(out / "tables")
    pd.DataFrame({"text": TEXTS[:3]}).to_csv(out / "summary.csv", index=False)
    monkeypatch.chdir(tmp_path)
    for name in ("out/summary.csv", str(out / "summary.csv"), "out/../out/summary.csv"):
        assert "with the input" in command("analyze", name, "--out", "out")
    study = tmp_path / "study"
    (study / "tables").mkdir(parents=True)
    facts = {
        "study": "layers", "title": "t", "about": [], "hypothesis": "h", "decision": "yes", "verdict": ["v"], "findings": [], "red_flags": None,
        "not_tested": [], "tables": ["findings"], "figures": [], "provenance": {},
    }  # fmt: skip
    (study / "results.json").write_bytes(storage.KIND.record(facts, {}))
    read = study / "tables" / "findings.csv"
    pd.DataFrame({"text": TEXTS[:3]}).to_csv(read, index=False)
    assert "with the input" in command("study", "layers", str(read), "--out", str(study))
    assert read.is_file()


def test_a_log_of_another_kind_is_never_written_over(model, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"text": "mine"}\n')
    windows = windows_of(model, TEXTS, 16)
    merger = TokenMerger([0, 1], target_rate=0.3, recent=2).calibrate(model, windows.tokens[:2])
    with pytest.raises(StoreError, match="of another kind"):
        train_merger(merger, model, windows, training=Training(steps=1, batch_size=1), folder=tmp_path, progress=False)
    assert (tmp_path / "log.jsonl").read_text() == '{"text": "mine"}\n'


def test_a_finished_training_is_not_replaced_by_another(model, tmp_path):
    """Its log was cut at once, its merger at the end: in between, a merger stood beside the log of another."""
    windows = windows_of(model, TEXTS, 16)

    def run(seed: int, steps: int = 2):
        merger = TokenMerger([0, 1], target_rate=0.3, recent=2).calibrate(model, windows.tokens[:2])
        merger.save(tmp_path / f"begun-{seed}")
        return train_merger(
            merger, model, windows, training=Training(steps=steps, batch_size=1, seed=seed), folder=tmp_path / "run", progress=False
        )

    first = run(0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(StoreError, match="with the merger of another"):
        run(1)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    pd.testing.assert_frame_equal(run(0).history, first.history)  # the same again is the same
    pd.testing.assert_frame_equal(training_log.read_log(tmp_path / "run", 2), first.history)
    for damage in ("", '{"step": 1}\n', "no json\n", "[1]\n" * 2, '{"step": 2}\n{"step": 1}\n'):
        (tmp_path / "run" / "log.jsonl").write_text(damage)
        with pytest.raises(StoreError, match=r"expected the log of a training .*delete the log"):
            training_log.read_log(tmp_path / "run", 2)


def test_a_model_is_never_saved_in_place_of_its_base(model, tmp_path):
    """Both were lost: the one that was replaced, and the new one without its base."""

    def tuned_from(base, name: str):
        made = door.copy_of(base)
        with torch.no_grad():
            next(iter(door.parameters_of(made).values())).mul_(1.01)
        door.save_tuned(made, tmp_path / name, base, {})
        door.remember_name(made, name, {"name_or_path": str(tmp_path / name), "kind": "bridge"})
        return made

    first = tuned_from(model, "first")
    second = tuned_from(first, "second")
    before = (tmp_path / "first" / "tuned.json").read_bytes()
    for base in (first, second):
        with pytest.raises(StoreError, match="needed to load the new one"):
            door.save_tuned(door.copy_of(base), tmp_path / "second" / ".." / "first", base, {})
    assert (tmp_path / "first" / "tuned.json").read_bytes() == before
    door.save_tuned(second, tmp_path / "second", first, {})  # onto itself it may


# -- places -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_nothing_can_have_are_refused_before_any_work(tmp_path, name):
    def hold():
        with files.lock_folder(tmp_path / name, MergeError):
            forbidden()

    def fill():
        with files.new_folder(tmp_path / name):
            forbidden()

    acts = [lambda: files.write_file(tmp_path / name, "x"), fill, lambda: storage.refuse_folder(tmp_path / name, "layers")]
    for act in acts:
        with pytest.raises(StoreError, match=r"expected a place that can be written, got .*Choose another"):
            act()
    with pytest.raises(MergeError, match=r"expected a place that can be written, got .*Choose another"):
        hold()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["mount", "beside"])
def test_a_folder_that_cannot_be_replaced_in_the_end_is_refused_in_the_beginning(tmp_path, monkeypatch, command, wrong):
    """A mounted one, as in a container, or one in a folder of somebody else: hours were lost."""
    out, text = tmp_path / "out", tmp_path / "text.txt"
    out.mkdir()
    text.write_text(TEXTS[0], encoding="utf-8")
    if wrong == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    else:
        monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    for words in (["analyze"], ["study", "layers"]):
        assert "can be replaced as a whole" in command(*words, str(text), "--out", str(out))
    with pytest.raises(StoreError, match="can be replaced as a whole"), files.new_folder(out, replace=True):
        forbidden()


def test_an_output_folder_that_was_deleted_meanwhile_is_made_anew(tmp_path):
    """The check of what it holds died on it, and the results with it."""
    with files.lock_folder(tmp_path / "out") as out:
        shutil.rmtree(out)
        cli._refuse_others(out)
        with files.new_folder(out, replace=True, check=cli._refuse_others) as folder:
            (folder / "result").write_text("x")
    assert (tmp_path / "out" / "result").read_text() == "x"


def test_a_full_disk_is_said_when_a_folder_is_locked(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(StoreError, match=r"No space left on device. Free space"), files.lock_folder(tmp_path / "out"):
            forbidden()
    assert list(tmp_path.iterdir()) == []
    with files.lock_folder(tmp_path / "out"):
        pass


def test_a_lock_that_is_a_link_overwrites_nothing(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".basin-lens.lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(StoreError, match="can be written"), files.lock_folder(tmp_path / "out"):
        forbidden()
    files.clear_leavings(tmp_path / "out")
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_what_cannot_be_written_is_said_in_words(table, tmp_path):
    odd = table.copy()
    odd.attrs["provenance"] = {run: {**facts, "note": torch.tensor(1)} for run, facts in table.attrs["provenance"].items()}
    twice = pd.concat([table, table[["layer"]]], axis=1)
    twice.attrs = table.attrs
    for wrong, words in ((odd, "plain values"), (twice, "Duplicate column")):
        with pytest.raises(TableError, match=words):
            tables.save(wrong, tmp_path / "table.parquet")
    with pytest.raises(StoreError, match="lone surrogate at character 1"):
        files.write_file(tmp_path / "page.html", "a\ud800")
    assert list(tmp_path.iterdir()) == []


def test_an_output_stream_that_is_full_is_said(monkeypatch):
    class Full:
        buffer = property(lambda self: self)

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(StoreError, match="No space left"):
        cli_codec._write(b"x", None, False, "-")


def test_files_whose_names_are_no_text_are_shown():
    assert cli_codec._shown(os.fsdecode(b"caf\xe9.txt")) == "caf\ufffd.txt" and cli_codec._shown("café.txt") == "café.txt"
