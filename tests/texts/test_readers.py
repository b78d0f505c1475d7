"""What counts as texts: one reader for each kind, strings as they are, and refusals that name the row."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

import basin_lens as bl
from basin_lens.errors import TextError
from basin_lens.texts import has_splits, read_by_document, read_dataset, read_file, read_passages, read_texts
from tests.conftest import TEXTS

ROWS = {"text": TEXTS[:3], "doc": ["001", "1", "001"], "kind": ["a", "NA", "null"], "dose": [1, 2, 3], "tags": [["x"], [], ["y"]]}


def facts(passages):
    return [(p.text, p.doc, dict(p.labels)) for p in passages]


WANTED = [
    (TEXTS[0], "001", {"kind": "a", "dose": 1}),
    (TEXTS[1], "1", {"kind": "NA", "dose": 2}),
    (TEXTS[2], "001", {"kind": "null", "dose": 3}),
]
TABLES = {
    "frame": lambda: pd.DataFrame(ROWS),
    "indexed frame": lambda: pd.DataFrame(ROWS, index=[7, 7, 7]),
    "arrow table": lambda: pyarrow.table(ROWS),
    "record batch": lambda: pyarrow.table(ROWS).to_batches()[0],
    "dataset": lambda: Dataset.from_dict(ROWS),
    "as pandas": lambda: Dataset.from_dict(ROWS).with_format("pandas"),
    "as torch": lambda: Dataset.from_dict(ROWS).with_format("torch"),
    "as numpy": lambda: Dataset.from_dict(ROWS).with_format("numpy"),
    "as arrow": lambda: Dataset.from_dict(ROWS).with_format("arrow"),
    "streamed": lambda: Dataset.from_dict(ROWS).to_iterable_dataset(),
    "streamed as numpy": lambda: Dataset.from_dict(ROWS).to_iterable_dataset().with_format("numpy"),
    "records": lambda: pd.DataFrame(ROWS).to_dict("records"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_give_their_rows(kind):
    assert facts(read_passages(TABLES[kind]())) == WANTED


def test_a_frame_is_measured_by_its_rows(llama):
    table = bl.analyze(llama, pd.DataFrame(ROWS), layers=[0], bank="reference", progress=False)
    assert table["doc"].unique().tolist() == ["001", "1"]
    assert table.groupby("passage")["dose"].first().tolist() == [1, 2, 3]
    assert "".join(table[(table["passage"] == 0) & (table["start"] >= 0)]["token"]) == TEXTS[0]


COLUMNS = {
    "dataset": lambda: Dataset.from_dict(ROWS)["text"],
    "dataset as numpy": lambda: Dataset.from_dict(ROWS).with_format("numpy")["text"],
    "streamed": lambda: Dataset.from_dict(ROWS).to_iterable_dataset()["text"],
    "series": lambda: pd.Series(TEXTS[:3], index=[5, 6, 7]),
    "arrow": lambda: pyarrow.chunked_array([TEXTS[:2], TEXTS[2:3]]),
    "numpy": lambda: np.array(TEXTS[:3]),
    "numpy objects": lambda: np.array(TEXTS[:3], dtype=object),
    "generator": lambda: (text for text in TEXTS[:3]),
    "iterator": lambda: iter(TEXTS[:3]),
    "values of a dict": lambda: dict(enumerate(TEXTS[:3])).values(),
    "numpy strings": lambda: [np.str_(text) for text in TEXTS[:3]],
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_give_their_texts(kind):
    passages = read_passages(COLUMNS[kind]())
    assert [p.text for p in passages] == TEXTS[:3]
    assert {type(p.text) for p in passages} == {str}


def test_a_transform_of_the_users_own_makes_the_rows():
    data = Dataset.from_dict(ROWS).with_transform(lambda rows: {"text": [text.upper() for text in rows["text"]]})
    assert [p.text for p in read_passages(data)] == [text.upper() for text in TEXTS[:3]]


def test_columns_left_out_by_a_format_are_no_labels():
    data = Dataset.from_dict(ROWS).with_format("numpy", columns=["text", "dose"])
    assert [dict(p.labels) for p in read_passages(data)] == [{"dose": 1}, {"dose": 2}, {"dose": 3}]


def test_columns_of_labels_and_spans():
    spans = [{"city": [0, 3], "other": None}, {"city": None, "other": [4, 6]}]
    data = Dataset.from_list([{"text": TEXTS[i], "labels": {"memorized": bool(i)}, "spans": spans[i]} for i in (0, 1)])
    passages = read_passages(data)
    assert [dict(p.labels) for p in passages] == [{"memorized": False}, {"memorized": True}]
    assert [dict(p.spans) for p in passages] == [{"city": (0, 3)}, {"other": (4, 6)}]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pd.DataFrame({"body": ["a"]}), r"column 'text'.*got keys \['body'\]\. Did you mean 'body'\?.*rename"),
        (pd.DataFrame({"Text": ["a"]}), r"Did you mean 'Text'\?"),
        (pd.DataFrame({0: ["a"]}), "names of columns as text, got 0"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "different names"),
        (pd.DataFrame({"text": ["a b", None]}), 'row 1: expected a "text" that is a string, got'),
        (pd.DataFrame({"text": ["a b", ""]}), "row 1: expected a text with at least one character"),
        (pd.DataFrame({"text": ["a b"], "doc": [1.5]}), 'row 0: expected "doc" to be a name, got 1.5'),
        (pd.DataFrame({"text": ["a b"], "layer": [1]}), "row 0: expected a label with a name of its own, got 'layer'"),
        (pd.Series(["a b", None, "c"]), "index 1, got (NoneType|float)"),
        (pd.Series(["a b", ""]), "at least one character.*index 1"),
        (pd.Series([1.5, 2.5]), "text or a Passage at index 0, got float"),
        (pyarrow.table({"body": ["a"]}), r"got keys \['body'\].*rename_columns"),
        (pyarrow.table({"text": ["a b", None]}), "row 1: "),
        (Dataset.from_dict({"text": [3, 4]}), 'row 0: expected a "text" that is a string, got int 3'),
        (Dataset.from_dict({"text": ["a b", ""]})["text"], "at least one character.*index 1"),
        ({"a", "b"}, "got a set, which has none"),
        (frozenset("ab"), "got a set"),
        (b"bytes", "got bytes. Decode"),
        (bytearray(b"bytes"), "got bytearray. Decode"),
        (None, "got NoneType"),
        (3.5, "got float"),
        ({"text": ["a", "b"]}, "got dict with 'text'"),
        (datasets.DatasetDict(test=Dataset.from_dict(ROWS)), "got DatasetDict with 'test'. Choose one"),
        (np.array([["a", "b"]]), r"in one dimension, got an array of shape \(1, 2\)"),
        (np.array("a b"), "in one dimension"),
        (["fine", float("nan")], r"at index 1, got float \(nan\)"),
        (["fine", pd.NA], "at index 1, got NAType"),
        (["fine", b"bytes"], "at index 1, got bytes"),
        ([{"text": "a b", "docid": 1}], "index 0: .*got 'docid'. Rename it to 'doc'"),
    ],
)
def test_what_is_no_text_is_refused_by_its_row(data, said):
    with pytest.raises(TextError, match=said):
        read_passages(data)


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a b", "docid": "x"}, "got 'docid'. Rename it to 'doc'"),
        ({"text": "a b", "doc_id": "x"}, "got 'doc_id'. Rename it to 'doc'"),
        ({"text": "a b", "Doc": "x"}, "got 'Doc'. Rename it to 'doc'"),
        ({"text": "a b", "Labels": {}}, "got 'Labels'. Rename it to 'labels'"),
        ({"text": "a b", "label": {"a": 1}}, "got 'label' with dict.*Rename it to 'labels'"),
        ({"text": "a b", "span": {"a": [0, 1]}}, "got 'span' with dict.*Rename it to 'spans'"),
        ({"text": "a b", "TEXT": "x"}, "got 'TEXT'"),
        ({"content": "a b"}, r"got keys \['content'\]\. Did you mean 'content'\?"),
        ({"text": "a b", "doc": "x", "document": "y"}, 'expected "doc" or "document", got both'),
        ({"text": "a b", "dose": 1, "labels": {"dose": 2}}, "each label once, got 'dose'"),
        ({"text": "a b", "token": 1}, "got 'token', a column that every table has"),
        ({"text": "a b", "doc": ""}, "got ''"),
        ({"text": "a b", "doc": True}, "got True"),
        ('{"text": "a", "text": "b"}', "each key once, got 'text' again"),
        ({"text": "a b", "large": 2**70}, "64 bits"),
        ({"text": "a b", "kind": "\ud800"}, "lone surrogate"),
    ],
)
def test_keys_that_are_not_ours_are_named(tmp_path, record, said):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n' + (record if isinstance(record, str) else json.dumps(record)))
    with pytest.raises(TextError, match=said) as caught:
        read_texts(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_document_is_doc_and_plain_keys_are_labels(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        '{"text": "a b", "document": 7, "label": 1, "content": "x", "labels": {"rate": 0.5}, "words": ["a"], "none": null}\n'
    )
    (passage,) = read_texts(path)
    assert facts([passage]) == [("a b", "7", {"label": 1, "content": "x", "rate": 0.5})]


# -- files ------------------------------------------------------------------------------------------------------------


def written(folder, kind):
    path = folder / f"texts{kind}"
    frame = pd.DataFrame(ROWS).drop(columns="tags")
    if kind in (".jsonl", ".ndjson"):
        frame.to_json(path, orient="records", lines=True)
    elif kind == ".json":
        frame.to_json(path, orient="records")
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(ROWS), path)
    else:
        frame.to_csv(path, index=False, sep="\t" if kind == ".tsv" else ",")
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"])
def test_every_door_reads_a_file_by_the_same_reader(tmp_path, kind):
    path = written(tmp_path, kind)
    # A cell of CSV is text.
    wanted = [(t, d, labels | {"dose": str(labels["dose"])} if kind in (".csv", ".tsv") else labels) for t, d, labels in WANTED]
    assert facts(read_texts(path)) == wanted
    assert facts(read_passages(path)) == facts(read_passages([path])) == facts(read_dataset(str(path))) == wanted
    with pytest.raises(TextError, match="Read its rows"):
        read_file(path)


def test_cells_are_text_as_it_is(tmp_path):
    path = tmp_path / "texts.csv"
    cells = ["null", "NA", "None", "nan", "1", "001", "1e5", "True", 'a, "b"\nc', " x "]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "kind", "doc"])
        writer.writerows([cell, cell, cell] for cell in cells)
        writer.writerow(["last", "", ""])
    passages = read_texts(path)
    assert [p.text for p in passages] == [*cells, "last"]
    assert [p.labels.get("kind") for p in passages] == [*cells, None]
    assert [p.doc for p in passages] == [*cells, f"{path}, line 15"]


def test_long_cells(tmp_path):
    path = tmp_path / "texts.csv"
    before = csv.field_size_limit()
    path.write_text("text\n" + "word " * 50_000)
    assert len(read_texts(path)[0].text) == 250_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,doc\na b\n", r"line 2: expected 2 cells \(text, doc\), got 1"),
        ("text,text\na,b\n", "different names"),
        ("body\na\n", r"line 2: .*got keys \['body'\]"),
        ('text\n"a" b\n', "line 2: expected cells in double quotes"),
        ('text\n"a b\n', "in double quotes"),
        ("text\n", "lines of cells"),
        ("text,doc\n,x\n", "line 2: expected a text with at least one character"),
        ('text,spans\na b,"{}"\n', 'line 2: expected "spans" as names'),
    ],
)
def test_tables_that_are_broken(tmp_path, content, said):
    path = tmp_path / "texts.csv"
    path.write_text(content)
    with pytest.raises(TextError, match=said):
        read_texts(path)


def test_json_of_several_kinds(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(['one "quoted"', {"text": "two", "doc": "d"}]))
    assert facts(read_texts(path)) == [('one "quoted"', f"{path}, item 0", {}), ("two", "d", {})]
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [p.text for p in read_texts(path)] == ["one", "two"]
    path.write_text('{"text": "one"}')
    assert [p.text for p in read_texts(path)] == ["one"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('["a", 1]', "item 1: expected an object.*got int"),
        ('["a", null]', "item 1: .*got NoneType"),
        ('["a", ""]', "item 1: .*at least one character"),
        ("[]", "array of texts"),
        ("3", "array of texts"),
        ('{"text": ["a", "b"]}', '"text" that is a string, got list'),
        ("[1", "expected JSON"),
        ("plain prose", "expected JSON.*txt"),
        ("[" * 100_000, "too deep|expected JSON"),
    ],
)
def test_json_that_is_broken(tmp_path, content, said):
    path = tmp_path / "texts.json"
    path.write_text(content)
    with pytest.raises(TextError, match=said):
        read_texts(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_byte_order_marks_are_no_text(tmp_path, encoding, kind):
    content = {".txt": "é 漢 text", ".jsonl": '{"text": "é 漢 text"}', ".csv": "text\né 漢 text\n"}[kind]
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    path = tmp_path / f"texts{kind}"
    path.write_bytes(mark + content.encode(encoding))
    assert [p.text for p in read_texts(path)] == ["é 漢 text"]


def test_a_mark_is_not_scored(llama, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXTS[0].encode())
    marked, plain = (bl.Capture.plan(llama, data).row_token.tolist() for data in (path, TEXTS[0]))
    assert marked == plain


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a b".encode("utf-16-le"), "NUL character at 1: UTF-16 without a byte order mark"),
        (b"\xff\xfea", "UTF-16 .as its byte order mark says."),
        (b"\xef\xbb\xbf", "empty file"),
    ],
)
def test_other_encodings_are_refused(tmp_path, content, said):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=said):
        read_texts(path)


def test_broken_parquet(tmp_path):
    path = tmp_path / "texts.parquet"
    with pytest.raises(TextError, match="does not exist"):
        read_texts(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(TextError, match="parquet file that can be read"):
        read_texts(path)


def test_a_file_twice(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    (tmp_path / "b.txt").symlink_to(path)
    for other in (path, tmp_path / "b.txt", tmp_path / ".." / tmp_path.name / "a.txt"):
        with pytest.raises(TextError, match=r"each file once, got .*before as"):
            read_passages([path, other])


def test_one_text_of_each_document(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a", "doc": "x"}\n{"text": "b", "doc": "y"}')
    assert read_by_document(path) == {"x": "a", "y": "b"}
    path.write_text('{"text": "a", "doc": "x"}\n{"text": "b", "doc": "x"}')
    with pytest.raises(TextError, match=r"one text of each document.*'x' again"):
        read_by_document(path)


# -- data sets by name ------------------------------------------------------------------------------------------------


def test_what_has_no_splits_takes_none(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    for name in ("built-in", "nltk:brown", str(path)):
        assert not has_splits(name)
        with pytest.raises(TextError, match=r"expected no split.*Leave it out"):
            read_dataset(name, split="test")
    for name in ("built-in", str(path)):
        with pytest.raises(TextError, match="expected no configuration"):
            read_dataset(name, config="news")
    assert has_splits("wikitext") and has_splits(str(tmp_path))


def test_columns_of_a_folder_become_labels(tmp_path):
    Dataset.from_dict(ROWS).to_parquet(tmp_path / "test-00000.parquet")
    assert facts(read_dataset(str(tmp_path))) == WANTED
    Dataset.from_dict({"body": ["a"]}).to_parquet(tmp_path / "test-00000.parquet")
    with pytest.raises(TextError, match="Did you mean 'body'"):
        read_dataset(str(tmp_path))


def test_row_numbers_that_pandas_writes_are_no_label(tmp_path):
    frame = pd.DataFrame({"text": TEXTS[:2], "kind": ["a", "b"]})
    frame.to_csv(tmp_path / "a.csv")
    assert [dict(p.labels) for p in read_texts(tmp_path / "a.csv")] == [{"kind": "a"}, {"kind": "b"}]
    frame.set_index(pd.Index(["x", "y"])).to_csv(tmp_path / "b.csv")
    with pytest.raises(TextError, match="Give each label a name"):
        read_texts(tmp_path / "b.csv")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_numbers_of_thousands_of_digits(tmp_path, name):
    (tmp_path / name).write_text('{"text": "Paris.", "n": %s}' % ("1" * 5000))
    with pytest.raises(TextError, match=r"expected .*JSON.*got .*4300 digits"):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.txt", "a\0b.csv"], ids=["long", "nul", "nul.csv"])
def test_names_that_no_system_takes(name):
    for door in (read_texts, lambda n: read_passages([Path(n)]), *((read_dataset, has_splits) if len(name) > 99 else ())):
        with pytest.raises(TextError, match=r"expected .*, got .*Check the"):
            door(name)
