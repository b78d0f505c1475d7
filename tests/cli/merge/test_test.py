"""`basin-lens merge test` from end to end."""

import json
import random
import re
from functools import partial

import pandas as pd
import pytest

from basin_lens import merging, studies
from basin_lens import model as door
from basin_lens.cli import merge as cli_merge
from basin_lens.errors import MergeError, StoreError
from basin_lens.merging import TokenMerger
from basin_lens.texts import read_texts
from tests.cli.merge.merges import PROMPT, QUICK, SMALL, forbidden, merge, texts_of_training
from tests.conftest import TEXTS


def report(out):
    held = json.loads((out / "results.json").read_text())
    assert held["study"] == "merging" and (out / "report.html").is_file() and (out / "figures" / "pareto.png").is_file()
    return held, pd.read_csv(out / "tables" / "pareto.csv")


@pytest.mark.slow
@pytest.mark.usefixtures("short_report")
def test_test_sets_a_run_beside_the_baselines_on_other_texts(run, folder, texts, tmp_path):
    before = {path.name: path.read_bytes() for path in run[0].iterdir()}
    out = tmp_path / "out"
    said = merge("test", str(run[0]), "--data", texts["other"], "--model", folder, *QUICK, "--out", str(out)).output
    held, pareto = report(out)
    assert held["verdict"][0] in said and str(out / "report.html") in said
    assert set(pareto["policy"]) == set(merging.Setting((0,)).policies) and (pareto["budget"] == 0.85).all()
    assert pareto.loc[pareto["policy"] == "trained", "bytes_share"].item() == pytest.approx(0.85, abs=0.1)
    facts = held["provenance"]["merging"]
    assert facts["windows"]["length"] == 32 and facts["setting"]["seeds"] == 1  # as long as in training
    assert (facts["setting"]["projection"], facts["setting"]["recent"], facts["setting"]["layers"]) == (6, 4, [0, 1, 2])
    assert facts["merger"]["training"]["steps"] == 3
    # Its training is shown, and it is left as it was.
    log = [json.loads(line)["loss"] for line in (run[0] / "log.jsonl").read_text().splitlines()]
    assert pd.read_csv(out / "tables" / "training.csv")["loss"].tolist() == pytest.approx(log) and "generation" in held["tables"]
    assert {path.name: path.read_bytes() for path in run[0].iterdir()} == before


@pytest.mark.slow
@pytest.mark.usefixtures("short_report")
def test_test_without_a_run_compares_the_baselines(folder, texts, tmp_path, monkeypatch):
    out, policies = tmp_path / "out", ("trained", "cosine", "random", "recent")  # all of them are compared above
    monkeypatch.setattr(merging, "Setting", partial(merging.Setting, policies=policies))
    merge("test", "-", texts["other"], "--model", folder, "--layers", "0-1", "--length", "40", *QUICK, "--out", str(out))
    held, pareto = report(out)
    assert set(pareto["policy"]) == {"cosine", "random", "recent"}
    facts = held["provenance"]["merging"]
    assert facts["merger"] is None and facts["windows"]["length"] == 40 and facts["setting"]["layers"] == [0, 1]
    assert "training" not in held["tables"]


@pytest.mark.slow
def test_one_file_is_enough_and_its_windows_are_said_to_be_no_texts(folder, tmp_path, monkeypatch):
    book, other = tmp_path / "book.txt", tmp_path / "other.txt"
    for path, seed in ((book, 3), (other, 4)):
        words = " ".join(TEXTS).split()
        path.write_text(" ".join(random.Random(seed).choices(words, k=600)))
    out, made = tmp_path / "run", tmp_path / "report"
    said = merge("train", "--data", str(book), "--model", folder, *SMALL, "--out", str(out))
    assert "one text: its first windows are set apart" in said.stderr
    monkeypatch.setattr(merging, "Setting", partial(merging.Setting, policies=("trained", "random")))
    monkeypatch.setattr(studies, "study_merging", partial(studies.study_merging, prompts=0))
    merge("test", str(out), "--data", str(other), "--model", folder, *QUICK, "--out", str(made))
    held, pareto = report(made)
    about = " ".join(held["about"])
    assert "every window counts as a document of its own" in about and "earlier windows of the same text" in about
    assert pareto["low"].notna().all() and "none was asked for" in " ".join(held["not_tested"])


def test_budgets_are_set_on_other_texts_than_the_test_also_if_texts_are_few(folder, texts, tmp_path, monkeypatch):
    class ReachedError(Exception):
        pass

    def study(_, calibration, held_out, *__, **___):
        assert not calibration.pieces and held_out.pieces and not set(calibration.source) & set(held_out.source)
        # At most 0.4 of them set budgets, whatever the preset wants.
        assert len(calibration) <= 0.4 * (len(calibration) + len(held_out)) + 3
        raise ReachedError

    monkeypatch.setattr(studies, "study_merging", study)
    with pytest.raises(ReachedError):
        merge("test", "-", texts["other"], "--model", folder, "--length", "32", *QUICK, "--out", str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.usefixtures("short_report")
def test_texts_of_the_training_are_left_out_and_said(run, folder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "Setting", partial(merging.Setting, policies=("trained", "random")))
    out = tmp_path / "out"
    said = merge("test", str(run[0]), texts["train"], texts["other"], "--model", folder, *QUICK, "--out", str(out))
    trained = [p.doc for p in read_texts(texts["train"]) if p.text in texts_of_training(run, folder, texts)]
    assert f"left out {len(trained)} texts that the merger was trained on" in said.stderr
    held, _ = report(out)
    tested = {name.split(",")[0] for name in held["provenance"]["merging"]["windows"]["held_out_documents"]}
    assert trained and tested and not tested & set(trained)


@pytest.mark.slow
@pytest.mark.usefixtures("short_report")
def test_near_copies_of_the_training_are_left_out_and_said(run, folder, texts, tmp_path, monkeypatch):
    """A title line in front, a word at the end: no digest of a text or a window is the same."""
    monkeypatch.setattr(merging, "Setting", partial(merging.Setting, policies=("trained", "random")))
    own = [f"Chapter {n}\n{text} lamp" for n, text in enumerate(sorted(texts_of_training(run, folder, texts)))]
    near = tmp_path / "near.jsonl"
    near.write_text("".join(json.dumps({"text": text, "doc": f"near-{n}"}) + "\n" for n, text in enumerate(own)))
    out = tmp_path / "out"
    said = merge("test", str(run[0]), str(near), texts["other"], "--model", folder, *QUICK, "--out", str(out))
    assert re.search(r"left out \d+ windows that are copies of what the merger was trained on", said.stderr)
    held, _ = report(out)
    windows = held["provenance"]["merging"]["windows"]
    assert windows["held_out_documents"] and not any("near" in name for name in windows["held_out_documents"])
    assert windows["held_out_copies"] == 0 and "seen_runs" not in json.dumps(held["provenance"])
    with pytest.raises(MergeError, match="was not trained on"):
        merge("test", str(run[0]), str(near), "--model", folder, *QUICK, "--out", str(tmp_path / "none"))


@pytest.mark.slow
def test_held_out_copies_are_left_out_of_training_and_said(folder, texts, tmp_path):
    twice = tmp_path / "twice.jsonl"
    held = [p.text for p in read_texts(texts["train"])]
    lines = [*held, *(f"Again\n{text}" for text in held[:1])]
    twice.write_text("".join(json.dumps({"text": text, "doc": f"doc-{n}"}) + "\n" for n, text in enumerate(lines)))
    said = merge("train", str(twice), "--model", folder, *SMALL, "--out", str(tmp_path / "run"))
    assert re.search(r"left out [1-9]\d* of \d+ held-out windows: copies of windows to train on", said.stderr)
    assert json.loads((tmp_path / "run" / "merger.json").read_text())["facts"]["training"]["held_out_copies"] > 0


@pytest.mark.many
@pytest.mark.parametrize("length", [(), ("--length", "24")])
def test_texts_of_the_training_are_refused(run, folder, texts, tmp_path, monkeypatch, length):
    """Also where they are cut into windows of another length: it is the text that was trained on."""
    monkeypatch.setattr(studies, "study_merging", forbidden)
    seen = tmp_path / "seen.jsonl"
    seen.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_of_training(run, folder, texts)))
    with pytest.raises(MergeError, match="was not trained on"):
        merge("test", str(run[0]), str(seen), "--model", folder, *length, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused_before_any_work(run, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_merge, "_load", forbidden)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"'notes.txt' in it"):
        merge("test", str(run[0]), texts["other"], "--out", str(tmp_path))
    # The merger's own folder is no place for a report either.
    with pytest.raises(StoreError, match="empty folder"):
        merge("test", str(run[0]), texts["other"], "--out", str(run[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ---- surprising tokens -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_surprising_tokens_are_preserved_by_train_and_test_and_refused_by_generate(folder, texts, tmp_path, monkeypatch):
    out, made = tmp_path / "run", tmp_path / "report"
    merge("train", texts["train"], "--model", folder, *SMALL, "--preserve", "surprisal", "--out", str(out))
    merger = TokenMerger.load(out, door.load_model(folder))
    assert merger.options.preserve == "surprisal" and 0 < float(merger.weights.surprisal_cutoff) < float("inf")
    monkeypatch.setattr(merging, "Setting", partial(merging.Setting, policies=("trained", "random")))
    merge("test", str(out), texts["other"], "--model", folder, *QUICK, "--out", str(made))
    held, pareto = report(made)
    assert "trained" in set(pareto["policy"]) and "generation" not in held["tables"]
    for budget in ((), ("--budget", "0.8")):
        with pytest.raises(MergeError, match=r"token by token.*'surprisal'.*preserve='norm'"):
            merge("generate", str(out), "--prompt", PROMPT, "--tokens", "4", "--model", folder, *budget)
