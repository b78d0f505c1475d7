"""What texts may come as: files, lists, data sets; and what is refused."""

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

import basin_lens as bl
from basin_lens.errors import TextError
from basin_lens.texts import (
    read_file,
    read_passages,
    tokenize,
)

# -- files ------------------------------------------------------------------------------------------------------------


def test_file_keeps_its_line_ends(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("été\r\nzwei\rdrei\n".encode())
    (passage,) = read_passages(path)
    assert passage.text == "été\r\nzwei\rdrei\n"
    assert passage.doc == str(path)


def test_several_files_are_several_documents(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"This is {name}.")
    passages = read_passages([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert [p.text for p in passages] == ["This is a.txt.", "This is b.txt."]
    assert len({p.doc for p in passages}) == 2


@pytest.mark.parametrize("listed", [False, True])
def test_a_string_that_names_a_file_is_refused(tmp_path, listed):
    path = tmp_path / "notes.txt"
    path.write_text("inside")
    with pytest.raises(TextError, match=r"name of a file that exists.*notes\.txt.*Pass Path\("):
        read_passages(["fine", str(path)] if listed else str(path))
    assert read_passages(bl.Passage(str(path)))[0].text == str(path)
    assert read_passages(str(tmp_path / "gone.txt"))[0].text == str(tmp_path / "gone.txt")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "does not exist"), (b"", "empty file"), (b"abc\xff\xfe", "UTF-8.*byte 3")],
    ids=["missing", "empty", "not UTF-8"],
)
def test_unreadable_files(tmp_path, content, said):
    path = tmp_path / "notes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=said) as error:
        read_passages(path)
    assert "notes.txt" in str(error.value)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(TextError, match="readable text file"):
        read_file(tmp_path)


# -- lists and datasets -----------------------------------------------------------------------------------------------


def test_a_list_mixes_kinds(tmp_path):
    (tmp_path / "c.txt").write_text("third")
    passages = read_passages(["first", bl.Passage("second", doc="mine", labels={"x": 1}), Path(tmp_path / "c.txt")])
    assert [p.text for p in passages] == ["first", "second", "third"]
    assert passages[1] == bl.Passage("second", doc="mine", labels={"x": 1})


def test_texts_without_document_are_documents_of_their_own():
    passages = read_passages(["same", "same", bl.Passage("same", labels={"y": 2}, spans={"s": (0, 2)})])
    assert len({p.doc for p in passages}) == 3
    assert (passages[2].labels, passages[2].spans) == ({"y": 2}, {"s": (0, 2)})


def test_one_text_is_a_list_of_one():
    assert read_passages("alone") == read_passages(["alone"])
    assert read_passages(bl.Passage("alone", doc="d")) == [bl.Passage("alone", doc="d")]


@pytest.mark.parametrize("streamed", [False, True])
def test_dataset(streamed):
    data = Dataset.from_dict({"text": ["one text", "another"], "other": [1, 2]})
    passages = read_passages(data.to_iterable_dataset() if streamed else data)
    assert [p.text for p in passages] == ["one text", "another"]
    assert len({p.doc for p in passages}) == 2


def test_dataset_with_documents():
    data = Dataset.from_dict({"text": ["a b", "c d", "e f"], "doc": ["x", "x", None]})
    docs = [p.doc for p in read_passages(data)]
    assert docs[:2] == ["x", "x"]
    assert docs[2] not in (None, "x")


def test_dataset_lines_without_text_are_left_out():
    data = Dataset.from_dict({"text": ["", "paragraph", " \n", None, "next"]})
    assert [p.text for p in read_passages(data)] == ["paragraph", "next"]


def test_dataset_without_text_column():
    with pytest.raises(TextError, match=r"column 'text'.*body.*rename_column"):
        read_passages(Dataset.from_dict({"body": ["a"], "id": [1]}))


def test_dataset_of_splits_is_refused():
    with pytest.raises(TextError, match="train"):
        read_passages(DatasetDict({"train": Dataset.from_dict({"text": ["a b"]})}))


def test_dataset_without_any_text():
    with pytest.raises(TextError, match="at least one text"):
        read_passages(Dataset.from_dict({"text": ["", " "]}))


@pytest.mark.parametrize("data", [[], (), iter([])])
def test_nothing_to_read(data):
    with pytest.raises(TextError, match="at least one text, got an empty list"):
        read_passages(data)


@pytest.mark.parametrize("data", [3, None, b"bytes", {"text": "a"}, ["fine", 3], ["fine", None], ["fine", b"bytes"]])
def test_things_that_are_no_texts(data):
    with pytest.raises(TextError, match="expected a text"):
        read_passages(data)


@pytest.mark.parametrize("data", ["", ["fine", ""]])
def test_empty_text(data):
    with pytest.raises(TextError, match="at least one character"):
        read_passages(data)


def test_text_of_one_token(llama):
    with pytest.raises(TextError, match=r"at least two tokens, got 1 from 'a'"):
        tokenize(llama, [bl.Passage("a")], prepend_bos=False)


def test_one_token_and_bos_are_two(llama):
    assert len(tokenize(llama, [bl.Passage("a")], prepend_bos=True)[0].tokens) == 2


def test_text_that_is_no_unicode(llama):
    """A lone surrogate, as Python makes it of undecodable bytes (surrogateescape)."""
    with pytest.raises(TextError):
        tokenize(llama, [bl.Passage("broken \ud800 text")])
