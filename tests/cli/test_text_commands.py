"""Commands read texts by one list of readers, and refuse before a model is loaded."""

import json

import pandas as pd
import pytest

from basin_lens import tables
from basin_lens.cli import merge as cli_merge
from basin_lens.cli import options as cli_options
from tests.cli.calls import call
from tests.conftest import TEXTS


@pytest.fixture
def no_model(monkeypatch):
    """No model may be loaded."""

    def load(name):
        raise AssertionError(f"loaded {name}")

    monkeypatch.setattr(cli_options, "load", load)
    monkeypatch.setattr(cli_merge, "_load", load)


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "in"
    path.mkdir()
    rows = [{"text": text, "doc": f"00{i}", "kind": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    (path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_csv(path / "texts.csv", index=False)
    (path / "text.txt").write_text(TEXTS[0])
    (path / "mixed.jsonl").write_text('{"text": "a b", "n": 1}\n{"text": "c d", "n": "unknown"}')
    (path / "rows").mkdir()  # a data set of one split
    pd.DataFrame(rows).to_parquet(path / "rows" / "train.parquet")
    (path / "near.jsonl").write_text('{"text": "a b", "docid": 1}')
    (path / "many.jsonl").write_text('{"text": "a b", "doc": "x"}\n{"text": "c d", "doc": "x"}')
    return path


@pytest.mark.many
@pytest.mark.parametrize("name", ["texts.jsonl", "texts.csv"])
def test_analyze_reads_rows_not_their_syntax(folder, files, tmp_path, capsys, name):
    out = tmp_path / "out"
    given = ("analyze", str(files / name), "--model", str(folder), "--layers", "0", "--k", "5", "--out", str(out))
    code, _, err = call(*given, capsys=capsys)
    assert code == 0, err
    table = tables.open(out).load()
    assert table["doc"].unique().tolist() == [f"00{i}" for i in range(len(TEXTS))]
    assert table.groupby("passage")["kind"].first().tolist() == ["a", "b"] * 3
    first = table[(table["passage"] == 0) & (table["start"] >= 0)]
    assert "".join(first["token"]) == TEXTS[0]


TEXT = "{files}/text.txt"
REFUSED = {
    "twice": (["analyze", TEXT, TEXT], "each file once"),
    "twice in a study": (["study", "layers", TEXT, "{files}/../in/text.txt"], "each file once"),
    "twice in training": (["merge", "train", TEXT, "--data", TEXT], "each file once"),
    "twice in a test": (["merge", "test", "-", TEXT, "--data", TEXT], "each file once"),
    "own and unrelated": (["study", "memorization", TEXT, "--design", "author", "--unrelated", TEXT], "each file once"),
    "paraphrases": (["study", "memorization", "--paraphrases", "{files}/many.jsonl"], "one text of each document"),
    "mixed": (["analyze", "{files}/mixed.jsonl"], "one kind of value for label 'n'"),
    "mixed in a study": (["study", "layers", "{files}/mixed.jsonl"], "one kind of value for label 'n'"),
    "mixed in training": (["merge", "train", "{files}/mixed.jsonl"], "one kind of value for label 'n'"),
    "near": (["analyze", "{files}/near.jsonl"], "got 'docid'. Rename it to 'doc'"),
    "split of files": (["study", "layers", TEXT, "--split", "train"], "expected --dataset with --split"),
    "config of files": (["study", "layers", TEXT, "--config", "x"], "expected --dataset with --split or --config"),
    "split of nothing": (["study", "layers", "--split", "test"], "expected --dataset with --split"),
    "split of the built-in": (["study", "layers", "--dataset", "built-in", "--split", "test"], "expected no split for 'built-in'"),
    "split of memorization": (["study", "memorization", "--split", "test"], "expected --dataset with --split"),
    "split in training": (["merge", "train", TEXT, "--split", "train"], "expected --dataset with --split"),
    "split in a test": (["merge", "test", "-", TEXT, "--split", "test"], "expected --dataset with --split"),
    "split of a corpus": (["merge", "train", "--dataset", "nltk:brown", "--split", "train"], "expected no split for 'nltk:brown'"),
    "split of a file": (["merge", "test", "-", "--dataset", TEXT, "--split", "test"], "expected no split for"),
    "no texts": (["analyze"], "expected files or --dataset, got neither. Name some."),
    "file and data set": (["analyze", TEXT, "--dataset", "built-in"], "expected files or --dataset, got both. Leave one"),
    "unknown data set": (["analyze", "--dataset", "no/such-data-set"], "'no/such-data-set'"),
    "unknown corpus": (["analyze", "--dataset", "nltk:nonsense"], "nonsense"),
    "data set without a name": (["analyze", "--dataset", ""], "expected the name of a data set, got an empty one. Such as"),
    "data set that is no file": (["analyze", "--dataset", "{files}/no.txt"], "which does not exist. Check the path"),
    "split that is not there": (["analyze", "--dataset", "{files}/rows", "--split", "validation"], "split that exist, got"),
    "split left out": (["analyze", "--dataset", "{files}/rows"], "split that exist, got"),  # then it is test
    "unknown configuration": (["analyze", "--dataset", "{files}/rows", "--config", "x", "--split", "train"], "got"),
    "configuration of the built-in": (["analyze", "--dataset", "built-in", "--config", "x"], "expected no configuration for"),
    "split of files to analyze": (["analyze", TEXT, "--split", "test"], "expected --dataset with --split"),
    "batch of none": (["analyze", TEXT, "--batch-size", "0"], "expected --batch-size from 1 to 4096, got 0. Leave it out"),
    "batch below none": (["analyze", TEXT, "--batch-size", "-1"], "expected --batch-size from 1 to 4096, got -1. Leave it out"),
    "huge batch": (["analyze", TEXT, "--batch-size", "1000000"], "expected --batch-size from 1 to 4096, got 1000000"),
    "huger batch": (["analyze", TEXT, "--batch-size", "9" * 30], "expected --batch-size from 1 to 4096, got 999"),
    "batch that is no number": (["analyze", TEXT, "--batch-size", "many"], "--batch-size"),
    "batch in a demo": (["demo", "--batch-size", "0"], "expected --batch-size from 1 to 4096, got 0"),
    "unknown bank": (["analyze", TEXT, "--bank", "nonsense"], "expected --bank reference, got 'nonsense'. Leave it out"),
    "layers to analyze": (["analyze", TEXT, "--layers", "0-"], "expected layers such as"),
    "layers that run down": (["analyze", TEXT, "--layers", "9-0"], "expected layers such as 0,5,10 or 0-9, got '9-0'"),
}


@pytest.mark.many
@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_a_model_is_loaded(files, tmp_path, capsys, name):
    arguments, said = REFUSED[name]
    out = tmp_path / "out"
    code, _, err = call(*(argument.format(files=files) for argument in arguments), "--out", str(out), capsys=capsys)
    assert code in (1, 2), err
    (line,) = [line for line in err.splitlines() if line.startswith("basin-lens:")]
    assert said in line
    assert not out.exists()
