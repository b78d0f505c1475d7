"""Passages by name: built in, of the Hugging Face Hub, of files; JSON lines."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, IterableDataset, Value

import basin_lens as bl
from basin_lens import texts
from basin_lens.errors import TextError
from basin_lens.texts import (
    read_dataset,
    read_jsonl,
    read_passages,
    read_texts,
    reference_passages,
)

# -- documentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Word", "TaggedPassage", "word_of_tokens", "words_of", "read_dataset", "read_jsonl"])
def test_docstrings_have_their_parts(name):
    for part in ("Args:", "Raises:", "Example:"):
        assert part in inspect.getdoc(getattr(texts, name))


# -- built in ---------------------------------------------------------------------------------------------------------


def test_built_in():
    assert read_dataset("built-in") == list(reference_passages())
    assert read_dataset("built-in", max_passages=3) == list(reference_passages()[:3])


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("name", ["built-in", "nltk:treebank", "wikitext"])
def test_no_passages_asked_for(name, count):
    with pytest.raises(TextError, match=f"max_passages of at least 1, got {count}"):
        read_dataset(name, max_passages=count)


def test_no_name():
    with pytest.raises(TextError, match="got an empty one"):
        read_dataset("")


# -- Hugging Face -----------------------------------------------------------------------------------------------------

WIKITEXT = [
    "", " = Robert Boulter = \n", "", " Robert Boulter is an English actor . \n", "", " = = Career = = \n", "", " = = = 2000 = = = \n",
    " He starred in = Mercury Fur = . \n", "", " = Du Fu = \n", "", " Du Fu was a poet . \n", " = Robert Boulter = \n", " Another one . \n",
    " = X = \n", " Last . \n",
]  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: one data set, streamed; notes what was asked, and how many rows were read."""

    class Hub:
        def __init__(self):
            self.asked, self.read, self.rows = [], 0, []

        def stream(self):
            for row in self.rows:
                self.read += 1
                yield row

        def load_dataset(self, *args, **options):
            self.asked.append((args, options))
            return IterableDataset.from_generator(self.stream)

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


@pytest.mark.parametrize("config", [None, "wikitext-103-raw-v1"])
def test_wikitext_by_article(hub, config):
    hub.rows = [{"text": line} for line in WIKITEXT]
    passages = read_dataset("wikitext", config=config, split="validation")
    assert hub.asked == [(("Salesforce/wikitext", config or "wikitext-2-raw-v1"), {"split": "validation", "streaming": True})]
    assert [p.doc for p in passages] == ["Robert Boulter", "Du Fu", "Robert Boulter (2)", "X"]
    assert passages[0].text == (
        "= Robert Boulter = \n\n Robert Boulter is an English actor . \n\n = = Career = = \n\n = = = 2000 = = = \n"
        " He starred in = Mercury Fur = ."
    )
    assert passages[1].text == "= Du Fu = \n\n Du Fu was a poet ."


def test_wikitext_reads_no_more_than_it_needs(hub):
    hub.rows = [{"text": line} for line in WIKITEXT]
    assert [p.doc for p in read_dataset("Salesforce/wikitext", max_passages=2)] == ["Robert Boulter", "Du Fu"]
    assert hub.read <= WIKITEXT.index(" Du Fu was a poet . \n") + 3


def test_wikitext_before_the_first_heading(hub):
    hub.rows = [{"text": " the end of something \n"}, {"text": None}, *({"text": line} for line in WIKITEXT)]
    passages = read_dataset("wikitext")
    assert (passages[0].doc, passages[0].text) == ("untitled", "the end of something")
    assert len(passages) == 5


def test_other_data_sets_by_row(hub):
    hub.rows = [
        {"text": "one", "n": 1},
        {"text": " \n", "n": 2},
        {"text": None, "n": 3},
        {"text": "two", "n": 4},
        {"text": "three", "n": 5},
    ]
    passages = read_dataset("ag_news", config="default")
    assert hub.asked == [(("ag_news", "default"), {"split": "test", "streaming": True})]
    assert [(p.text, p.doc) for p in passages] == [
        ("one", "ag_news/test/0"),
        ("two", "ag_news/test/3"),
        ("three", "ag_news/test/4"),
    ]
    hub.read = 0
    assert len(read_dataset("ag_news", max_passages=2)) == 2
    assert hub.read <= 5


def test_a_column_names_documents(hub):
    hub.rows = [{"text": "one", "doc": "a"}, {"text": "two", "doc": None}, {"text": "three", "doc": "a"}]
    assert [p.doc for p in read_dataset("mine", split="train")] == ["a", "mine/train/1", "a"]


def test_no_text_column(hub):
    hub.rows = [{"sentence": "one", "label": 1}]
    with pytest.raises(
        TextError,
        match=r"glue: expected a column 'text'.*got keys \['label', 'sentence'\]\. Did you mean 'sentence'\?.*rename_column",
    ):
        read_dataset("glue")


@pytest.mark.parametrize("name", ["ag_news", "wikitext"])
def test_no_text_in_any_row(hub, name):
    hub.rows = [{"text": ""}, {"text": " "}]
    with pytest.raises(TextError, match="got empty rows only"):
        read_dataset(name)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach 'x'"), "no answer.*Couldn't reach.*Check the network"),
        (TimeoutError(), r"no answer \(TimeoutError\)"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub"), "doesn't exist.*Check the name"),
        (ValueError("Config name is missing. Please pick one among: ['a', 'b']"), r"\['a', 'b'\].*Choose among those"),
        (ValueError("Unknown split \"test\". Should be one of ['train']."), r"'test'.*\['train'\]"),
        (RuntimeError("Dataset scripts are no longer supported"), "no longer supported.*Choose another"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_whatever_goes_wrong_is_one_error(monkeypatch, error, said, late):
    def fail(*_, **__):
        raise error

    def rows(*_, **__):
        yield {"text": "one"}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", rows if late else fail)
    with pytest.raises(TextError, match=said) as caught:
        read_dataset("x")
    assert "built-in" in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("name", ["wikitext", "no/such_thing", "not a name"])
def test_offline_for_real(name):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    begun = time.monotonic()
    with pytest.raises(TextError, match=r"Check the n.*--dataset built-in"):
        read_dataset(name)
    assert time.monotonic() - begun < 20


@pytest.mark.slow
def test_no_network_for_real(tmp_path):
    """Not asked for, but there is none: no minutes of retries."""
    code = """
import time
from basin_lens.texts import read_dataset
import datasets
begun = time.monotonic()
try:
    read_dataset("wikitext")
except ValueError as error:
    print(type(error).__name__, error)
print(time.monotonic() - begun)
"""
    # Port 9 discards, where anything listens at all.
    changed = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | changed, capture_output=True, text=True, check=True)
    said, seconds = done.stdout.splitlines()
    assert re.match("TextError expected to reach 'Salesforce/wikitext'.*Check the network.*--dataset built-in", said)
    assert float(seconds) < 20


# -- local data sets and files ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for split, rows in {"train": ["one", "two", ""], "test": ["three"]}.items():
        Dataset.from_dict({"text": rows}).to_parquet(tmp_path / f"{split}-00000.parquet")
    return tmp_path


def test_local_folder(folder):
    assert [p.text for p in read_dataset(str(folder))] == ["three"]
    assert [p.text for p in read_dataset(str(folder), split="train")] == ["one", "two"]
    assert [p.text for p in read_dataset(str(folder), split="train", max_passages=1)] == ["one"]
    with pytest.raises(TextError, match=r"'validation'.*train"):
        read_dataset(str(folder), split="validation")


def test_local_files(folder):
    data = Dataset.from_dict({"text": ["one, two", "three"]}, features=Features({"text": Value("string")}))
    data.to_csv(folder / "texts.csv", index=False)
    data.to_json(folder / "texts.json")
    data.to_parquet(folder / "texts.parquet")
    for name in ("texts.csv", "texts.json", "texts.parquet"):
        assert [p.text for p in read_dataset(str(folder / name))] == ["one, two", "three"]
    (folder / "texts.jsonl").write_text('{"text": "one", "doc": "d"}\n{"text": "two"}\n')
    assert read_dataset(str(folder / "texts.jsonl"), max_passages=1) == [bl.Passage("one", doc="d")]
    (folder / "plain.md").write_text("A text.\n\nAnd more.")
    assert [p.text for p in read_dataset(str(folder / "plain.md"))] == ["A text.\n\nAnd more."]


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "./gone", "/gone/away"])
def test_local_path_that_is_not_there(name):
    with pytest.raises(TextError, match=f"got '{re.escape(name)}', which does not exist"):
        read_dataset(name)


def test_local_folder_without_data(tmp_path):
    with pytest.raises(TextError, match="data set that can be read"):
        read_dataset(str(tmp_path))


# -- JSON lines -------------------------------------------------------------------------------------------------------


def jsonl(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines))
    return path


def test_jsonl(tmp_path):
    labels = {"memorized": True, "dose": 4, "rate": 0.5, "kind": "salad", "none": None}
    path = jsonl(
        tmp_path,
        {"text": "Paris is in France.", "doc": "geography", "labels": labels, "spans": {"city": [0, 5]}},
        "",
        {"text": "line\u2028separator", "doc": 7, "other": [1, 2]},
        {"text": "no document", "doc": None, "labels": None, "spans": {}},
    )
    wanted = [
        bl.Passage("Paris is in France.", doc="geography", labels=labels, spans={"city": (0, 5)}),
        bl.Passage("line\u2028separator", doc="7"),
        bl.Passage("no document", doc=f"{path}, line 4"),
    ]
    assert read_jsonl(path) == read_texts(path) == read_passages(path) == read_passages([path]) == wanted


def test_jsonl_with_windows_ends_and_mark(tmp_path):
    path = tmp_path / "TEXTS.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two\\r\\n"}\r\n')
    assert [p.text for p in read_texts(path)] == ["one", "two\r\n"]


def test_files_of_several_kinds(tmp_path):
    path = jsonl(tmp_path, {"text": "one"}, {"text": "two"})
    (tmp_path / "plain.txt").write_text('{"text": "not JSON here"}')
    passages = read_passages([path, tmp_path / "plain.txt", "a string", bl.Passage("a passage")])
    assert [p.text for p in passages] == ["one", "two", '{"text": "not JSON here"}', "a string", "a passage"]
    assert len({p.doc for p in passages}) == 5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{text: 1}", "expected a JSON object"),
        ("plain text", "expected a JSON object, got 'plain text'"),
        ([1, 2], '"text" that is a string, got list'),
        ({"body": "x", "a": 1}, r"got keys \['a', 'body'\]"),
        ({"text": 3}, '"text" that is a string'),
        ({"text": ""}, "at least one character"),
        ('{"text": "broken \\ud800"}', "lone surrogate"),
        ({"text": "x", "doc": ["d"]}, '"doc" to be a name'),
        ({"text": "x", "labels": {"a": [1]}}, "label 'a' among plain values.*got \\[1\\]"),
        ({"text": "x", "labels": []}, '"labels" as an object of plain values'),
        ({"text": "x", "labels": "a"}, '"labels" as an object of plain values'),
        ({"text": "x", "spans": {"a": [0]}}, r'"spans" as names with \[start, end\]'),
        ({"text": "x", "spans": {"a": [0, 1.0]}}, '"spans" as names'),
        ({"text": "x", "spans": {"a": [False, True]}}, '"spans" as names'),
        ({"text": "x", "spans": [0, 1]}, '"spans" as names'),
        ({"text": "x", "spans": {"a": [0, 2]}}, "span 'a' inside the text's 1 characters"),
        ("[" * 100_000, "expected a JSON object"),
    ],
)
def test_jsonl_says_which_line_is_wrong(tmp_path, line, said):
    path = jsonl(tmp_path, {"text": "fine"}, "", line)
    with pytest.raises(TextError, match=said) as error:
        read_passages(path)
    assert str(error.value).startswith(f"{path}, line 3: ")


def test_jsonl_without_lines(tmp_path):
    with pytest.raises(TextError, match="got empty lines only"):
        read_jsonl(jsonl(tmp_path, "", "  ", ""))
    with pytest.raises(TextError, match="does not exist"):
        read_jsonl(tmp_path / "gone.jsonl")
