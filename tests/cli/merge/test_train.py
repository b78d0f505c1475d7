"""`basin-lens merge train` from end to end."""

import dataclasses
import json
import re
import shutil

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from basin_lens import merging, studies
from basin_lens import model as door
from basin_lens.cli import merge as cli_merge
from basin_lens.cli.app import app
from basin_lens.errors import MergeError, StoreError
from basin_lens.merging import Options, TokenMerger, Training
from basin_lens.merging.training_run import TrainingRun
from basin_lens.texts import read_texts
from tests.cli.merge.merges import PROMPT, QUICK, SMALL, forbidden, merge


def test_train_writes_a_merger_and_its_log(run, folder, texts):
    out, said = run
    model = door.load_model(folder)
    merger = TokenMerger.load(out, model)
    options, facts = merger.options, merger.facts["training"]
    assert (options.layers, options.target_rate, options.projection, options.recent) == ((0, 1, 2), 0.3, 6, 4)
    assert options.adaptive and facts["steps"] == 3 and facts["length"] == 32 and not facts["train_base"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert (
        [line["step"] for line in log] == [1, 2, 3] and {line["target"] for line in log} == {0.3} and "held_out_excess" in log[-1]
    )
    # What was trained on is known by its windows, all but those held out.
    windows = merging.windows_of(model, read_texts(texts["train"]), 32)
    assert set(facts["seen"]) < set(windows.digests()) and len(facts["seen"]) == facts["windows"]
    held = len(windows) - facts["windows"]
    assert f"{facts['windows']} windows of 32 tokens to train on, {held} held out; 3 steps" in said
    assert f"excess {log[-1]['excess']:+.3f} nats per token, {log[-1]['rate']:.2f} of the tokens merged (target 0.30)" in said
    assert {path.suffix for path in out.iterdir()} == {".json", ".jsonl", ".safetensors", ".png"} and f"wrote {out}" in said
    assert not (out / "base").exists() and "drift" not in said


@pytest.mark.slow
def test_train_reads_a_data_set_by_name_and_layers(folder, tmp_path):
    out = tmp_path / "run"
    merge(
        "train", "--dataset", "built-in", "--model", folder, *SMALL, "--layers", "0,2", "--fixed", "--seed", "3", "--out", str(out)
    )
    options = TokenMerger.load(out, door.load_model(folder)).options
    assert options.layers == (0, 2) and not options.adaptive and options.seed == 3
    with pytest.raises(MergeError, match="got both"):
        merge("train", "--dataset", "built-in", "--data", "some.txt", "--model", folder, "--out", str(out))


@pytest.mark.slow
def test_train_again_gives_the_same(run, folder, texts, tmp_path):
    """From the same command; a file may come as an argument."""
    merge("train", texts["train"], "--model", folder, *SMALL, "--out", str(tmp_path))
    (one,), (two,) = (list(out.glob("merger-*.safetensors")) for out in (run[0], tmp_path))
    assert one.name == two.name  # named by what is in it
    assert (tmp_path / "log.jsonl").read_text() == (run[0] / "log.jsonl").read_text()


@pytest.mark.slow
def test_train_goes_on_after_an_interruption(run, folder, texts, tmp_path, monkeypatch):
    real, seen = TrainingRun.take, []

    def stop(self):
        seen.append(self.step)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(TrainingRun, "take", stop)
    # Every step a checkpoint, for there are three.
    words = ["merge", "train", texts["train"], "--model", folder, *SMALL, "--checkpoint-every", "1", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, words).exit_code != 0
    assert (tmp_path / "checkpoint.safetensors").is_file() and not (tmp_path / "merger.json").exists()
    merge(*words[1:])
    assert seen == [0, 1, 2, 2] and not (tmp_path / "checkpoint.safetensors").exists()
    assert (tmp_path / "log.jsonl").read_text() == (run[0] / "log.jsonl").read_text()


def test_train_refuses_a_folder_with_another_training_and_leaves_it(folder, texts, tmp_path, monkeypatch):
    model = door.load_model(folder)
    windows = merging.windows_of(model, read_texts(texts["train"]), 32)
    other = TokenMerger([0], target_rate=0.2, recent=4).calibrate(model, windows.tokens)
    TrainingRun(other, model, windows, Training(seed=5)).keep(tmp_path)
    (tmp_path / "log.jsonl").write_text("the other's\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(TrainingRun, "take", forbidden)
    with pytest.raises(StoreError, match="another"):
        merge("train", texts["train"], "--model", folder, *SMALL, "--out", str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_train_refuses_a_file_for_a_folder_before_any_work(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_merge, "_load", forbidden)
    (tmp_path / "file").write_text("")
    with pytest.raises(MergeError, match="can be written"):
        merge("train", texts["train"], *SMALL, "--out", str(tmp_path / "file"))


@pytest.mark.slow
def test_a_trained_base_is_picked_up(based, run, folder, texts, tmp_path, monkeypatch):
    out, said = based
    drift = float(re.search(r"drift ([+-][\d.]+) nats", said)[1])
    assert drift != 0 and str(out / "base") in said
    # Without --model: the merger belongs to its own base, and to no other.
    asked = merge("generate", str(out), "--prompt", PROMPT, "--tokens", "4")
    assert str(out / "base") in asked.stderr
    with pytest.raises(MergeError, match="made for"):
        merge("generate", str(out), "--prompt", PROMPT, "--tokens", "4", "--model", folder)
    with pytest.raises(MergeError, match="made for"):
        merge("generate", str(run[0]), "--prompt", PROMPT, "--tokens", "4", "--model", str(out / "base"))

    class ReachedError(Exception):
        pass

    def study(model, *_, merger, **__):
        assert (
            door.fingerprint(model)
            == merger.base
            == door.fingerprint(door.load_model(out / "base"))
            != TokenMerger.load(run[0], plain).base
        )
        raise ReachedError

    plain = door.load_model(folder)
    monkeypatch.setattr(studies, "study_merging", study)
    with pytest.raises(ReachedError):
        merge("test", str(out), texts["other"], *QUICK, "--out", str(tmp_path / "report"))


def test_a_finished_merger_is_not_overwritten(based, folder, texts, monkeypatch):
    """Nor could its base be taken for that of another."""
    before = {path.name: path.read_bytes() for path in based[0].iterdir() if path.is_file()}
    monkeypatch.setattr(cli_merge, "_load", forbidden)
    with pytest.raises(MergeError, match="finished merger"):
        merge("train", texts["train"], "--model", folder, *SMALL, "--out", str(based[0]))
    assert {path.name: path.read_bytes() for path in based[0].iterdir() if path.is_file()} == before


@pytest.mark.parametrize("words", [("test",), ("generate", "--prompt", "The")], ids=lambda words: words[0])
def test_a_folder_without_a_merger_is_refused_before_any_work(words, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_merge, "_load", forbidden)
    with pytest.raises(MergeError, match=r"merger\.json"):
        merge(words[0], str(tmp_path), *words[1:])


@pytest.mark.parametrize(("record", "differ"), [(Training, {"steps"}), (Options, {"adaptive", "projection"})])
def test_options_of_train_are_those_of_the_dataclass(record, differ):
    """Name, default and text; a preset sets the steps, and a training from the command line is adaptive and projects."""
    command = get_command(app).commands["merge"].commands["train"]
    options = {one.name: one for one in command.params}
    told = [one for one in dataclasses.fields(record) if "help" in one.metadata]
    assert len(told) > 10
    for one in told:
        if one.name == "seed":  # one for all
            continue
        assert options[one.name].help == one.metadata["help"], one.name
        assert options[one.name].default == one.default or one.name in differ, one.name


@pytest.mark.slow
def test_the_merger_comes_last(folder, texts, tmp_path, monkeypatch):
    """A folder that says that it is finished has its figure, too."""
    from basin_lens import views

    words = ["train", texts["train"], "--model", folder, *SMALL, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        patched.setattr(views, "training_curves", forbidden)
        with pytest.raises(AssertionError, match="ran"):
            merge(*words)
    assert not (tmp_path / "run" / "merger.json").exists()
    merge(*words)
    assert {"merger.json", "training.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_checkpoint_left_beside_its_merger_goes_and_anothers_stays(run, folder, texts, tmp_path):
    model = door.load_model(folder)
    windows = merging.windows_of(model, read_texts(texts["train"]), 32)
    other = TokenMerger([0], target_rate=0.2, recent=4).calibrate(model, windows.tokens)
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    own = json.loads((out / "merger.json").read_text())["facts"]["training"]["key"]
    for key in ("another", own):
        made = TrainingRun(other, model, windows, Training(seed=5))
        made.key = key
        made.keep(out)
        with pytest.raises(MergeError, match="finished merger"):
            merge("train", texts["train"], "--model", folder, *SMALL, "--out", str(out))
        assert (out / "checkpoint.safetensors").exists() == (key == "another")
