"""`basin-lens merge train | test | generate` from end to end, on a tiny model in a folder, as a user's own would be."""

import dataclasses
import json
import random
import re
import shutil
from functools import partial

import pandas as pd
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from basin_lens import merging, studies
from basin_lens import model as door
from basin_lens.cli import merge as cli_merge
from basin_lens.cli.app import app
from basin_lens.errors import MergeError, StoreError
from basin_lens.merging import Options, TokenMerger, Training
from basin_lens.merging.training_run import TrainingRun
from basin_lens.merging.windows import text_digest
from basin_lens.texts import read_texts
from tests.conftest import TEXTS, make_hf, make_tokenizer, replace_in_all_rooms

SMALL = ("--length", "32", "--projection", "6", "--recent", "4", "--target-rate", "0.3", "--steps", "3")
QUICK = ("--budgets", "0.85", "--seeds", "1")
PROMPT = "The ferry had stopped running in October, and the lamp had a voice of its own, and the lamp had"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model as Hugging Face keeps it. Its context has room for a prompt and what is written, its cache for descriptors beside it."""
    path, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    make_hf("llama", vocab_size=len(tokenizer), num_key_value_heads=4, max_position_embeddings=256).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def written(path, seed: int, count: int, words: int = 45) -> str:
    """JSON lines of `count` documents, whose words come in another order for each seed."""
    draw, known = random.Random(seed), " ".join(TEXTS).split()
    with path.open("w", encoding="utf-8") as out:
        for i in range(count):
            out.write(json.dumps({"text": " ".join(draw.choices(known, k=words)), "doc": f"{seed}-{i}"}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    return {
        name: written(path / f"{name}.jsonl", seed, count) for seed, (name, count) in enumerate({"train": 8, "other": 5}.items())
    }


def merge(*words: str):
    """The command; what it raised is raised."""
    found = CliRunner().invoke(app, ["merge", *words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found


@pytest.fixture(scope="module")
def run(folder, texts, tmp_path_factory):
    """A trained merger, and what was said."""
    out = tmp_path_factory.mktemp("run")
    said = merge("train", "--data", texts["train"], "--model", folder, *SMALL, "--out", str(out)).output
    return out, said


@pytest.fixture(scope="module")
def based(folder, texts, tmp_path_factory):
    """One whose base was trained, too."""
    out = tmp_path_factory.mktemp("based")
    return out, merge("train", texts["train"], "--model", folder, *SMALL, "--train-base", "--out", str(out)).output


def forbidden(*_, **__):
    raise AssertionError("ran")


# ---- train -----------------------------------------------------------------------------------------------------------


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


def test_train_reads_a_data_set_by_name_and_layers(folder, tmp_path):
    out = tmp_path / "run"
    merge(
        "train", "--dataset", "built-in", "--model", folder, *SMALL, "--layers", "0,2", "--fixed", "--seed", "3", "--out", str(out)
    )
    options = TokenMerger.load(out, door.load_model(folder)).options
    assert options.layers == (0, 2) and not options.adaptive and options.seed == 3
    with pytest.raises(MergeError, match="got both"):
        merge("train", "--dataset", "built-in", "--data", "some.txt", "--model", folder, "--out", str(out))


def test_train_again_gives_the_same(run, folder, texts, tmp_path):
    """From the same command; a file may come as an argument."""
    merge("train", texts["train"], "--model", folder, *SMALL, "--out", str(tmp_path))
    (one,), (two,) = (list(out.glob("merger-*.safetensors")) for out in (run[0], tmp_path))
    assert one.name == two.name  # named by what is in it
    assert (tmp_path / "log.jsonl").read_text() == (run[0] / "log.jsonl").read_text()


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


# ---- test ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_report(monkeypatch):
    """Less text written for the report than a user would get, for time."""
    monkeypatch.setattr(studies, "study_merging", partial(studies.study_merging, prompt=8, written=4, prompts=2))


def report(out):
    held = json.loads((out / "results.json").read_text())
    assert held["study"] == "merging" and (out / "report.html").is_file() and (out / "figures" / "pareto.png").is_file()
    return held, pd.read_csv(out / "tables" / "pareto.csv")


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


def test_held_out_copies_are_left_out_of_training_and_said(folder, texts, tmp_path):
    twice = tmp_path / "twice.jsonl"
    held = [p.text for p in read_texts(texts["train"])]
    lines = [*held, *(f"Again\n{text}" for text in held[:1])]
    twice.write_text("".join(json.dumps({"text": text, "doc": f"doc-{n}"}) + "\n" for n, text in enumerate(lines)))
    said = merge("train", str(twice), "--model", folder, *SMALL, "--out", str(tmp_path / "run"))
    assert re.search(r"left out [1-9]\d* of \d+ held-out windows: copies of windows to train on", said.stderr)
    assert json.loads((tmp_path / "run" / "merger.json").read_text())["facts"]["training"]["held_out_copies"] > 0


def texts_of_training(run, folder, texts) -> set[str]:
    facts = TokenMerger.load(run[0], door.load_model(folder)).facts["training"]
    return {p.text for p in read_texts(texts["train"]) if text_digest(p.text) in facts["seen_texts"]}


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


# ---- generate --------------------------------------------------------------------------------------------------------


def cache_of(said: str) -> tuple[int, int, float]:
    held, full, share = re.search(r"cache: ([\d,]+) of ([\d,]+) bytes \(([\d.]+)\)", said).groups()
    return int(held.replace(",", "")), int(full.replace(",", "")), float(share)


def test_generate_writes_what_the_package_writes_and_says_how_large_its_cache_is(run, folder):
    said = merge("generate", str(run[0]), "--prompt", PROMPT, "--tokens", "12", "--model", folder).output
    model = door.load_model(folder)
    tokenizer = door.tokenizer_of(model)
    first = door.uses_bos(model, None)
    begun = [*([] if first is None else [first]), *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    tokens, table = merging.generate(TokenMerger.load(run[0], model), model, torch.tensor([begun]), 12)
    assert PROMPT + tokenizer.decode(tokens[0].tolist()) in said
    held, full, share = cache_of(said)
    assert (
        (held, full) == (table["bytes"].sum(), table["full_bytes"].sum())
        and held < full
        and share == pytest.approx(held / full, abs=0.006)
    )
    assert f"{table.rows.sum():,} of {table.full_rows.sum():,} rows in 3 layers" in said


def test_generate_prints_what_reads_behind_the_prompt():
    """Tokens by themselves lose the space before them: "The red" and "sides" for "The red sides"."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {"\u2581The": 0, "\u2581red": 1, "\u2581sides": 2, "<0xC3>": 3, "<0xA9>": 4, "<unk>": 5}
    pieces = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    assert "The red" + tokenizer.decode([2]) == "The redsides"
    assert "The red" + cli_merge._behind(tokenizer, [0, 1], [2]) == "The red sides"
    assert cli_merge._behind(tokenizer, [0, 1, 3], [4, 2]) == "\u00e9 sides"
    assert cli_merge._behind(tokenizer, [0, 1], []) == ""


def test_generate_stops_at_the_end_of_the_text_unless_told_to_go_on(run, folder, monkeypatch):
    words = ("generate", str(run[0]), "--prompt", PROMPT, "--tokens", "12", "--model", folder)
    free = merge(*words, "--past-end").stdout
    model = door.load_model(folder)
    first = door.uses_bos(model, None)
    begun = [*([] if first is None else [first]), *door.tokenizer_of(model)(PROMPT, add_special_tokens=False)["input_ids"]]
    written = merging.generate(TokenMerger.load(run[0], model), model, torch.tensor([begun]), 12, past_end=True)[0][0].tolist()
    last = written.index(written[3])
    replace_in_all_rooms(monkeypatch, "end_tokens", lambda _: frozenset({written[3]}))
    found = merge(*words)
    said = found.stdout  # not .output: how often a progress bar redraws itself depends on the clock
    decoded = door.tokenizer_of(model).decode(written[:last])
    assert PROMPT + decoded in said and f"ends after {last} tokens; --past-end goes on" in found.stderr
    assert len(PROMPT + decoded) < len(free.split("cache:")[0].strip())
    assert cache_of(said)[1] < cache_of(free)[1]


def test_generate_keeps_to_a_budget(run, folder):
    before = {path.name: path.read_bytes() for path in run[0].iterdir()}
    words = ("generate", str(run[0]), "--prompt", f"{PROMPT} {PROMPT}", "--tokens", "8", "--model", folder)
    shares = [cache_of(merge(*words, "--budget", budget).output)[2] for budget in ("0.9", "0.6")]
    # It was set on other texts, and longer ones, so the prompt's own share is near it only.
    assert shares[1] < shares[0] - 0.15 and abs(shares[1] - 0.6) < 0.15, shares
    assert {path.name: path.read_bytes() for path in run[0].iterdir()} == before
    with pytest.raises(MergeError, match="at best"):
        merge(*words, "--budget", "0.001")


def test_generate_draws_by_its_seed_and_refuses_an_empty_prompt(run, folder):
    def said(seed: str) -> str:
        words = ("--prompt", PROMPT, "--tokens", "8", "--temperature", "1", "--seed", seed, "--model", folder)
        return merge("generate", str(run[0]), *words).stdout

    assert said("1") == said("1") != said("2")
    with pytest.raises(MergeError, match="prompt of one token"):
        merge("generate", str(run[0]), "--prompt", "", "--model", folder)


# ---- surprising tokens -----------------------------------------------------------------------------------------------


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
