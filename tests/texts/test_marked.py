"""Spans marked in texts: offsets are exact, and what is no mark is refused where it stands."""

import json

import pytest
from beartype.roar import BeartypeCallHintParamViolation
from hypothesis import given
from hypothesis import strategies as st

import basin_lens as bl
from basin_lens.errors import TextError
from basin_lens.texts import read_marked, read_marks

WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
INSIDE = WORDS.map(str.strip).filter(lambda words: words and "]" not in words)


def test_the_example_of_the_field():
    passage = bl.Passage.marked("When [IO:Mary] and [S1:John] went to the store, [S2:John] gave a drink to", labels={"template": 1})
    assert passage.text == "When Mary and John went to the store, John gave a drink to"
    assert {name: passage.text[slice(*ends)] for name, ends in passage.spans.items()} == {"IO": "Mary", "S1": "John", "S2": "John"}
    assert passage.spans["S1"] != passage.spans["S2"] and passage.labels == {"template": 1}


@given(st.lists(st.tuples(WORDS, INSIDE), max_size=6), WORDS)
def test_marks_put_in_come_out(parts, tail):
    """Any text with any spans, written with marks, is read as it was."""
    text, marked, spans = "", "", {}
    for number, (before, inside) in enumerate(parts):
        text += before
        spans[f"n{number}"] = len(text), len(text) + len(inside)
        text += inside
        marked += before.replace("[", "[[") + f"[n{number}:" + inside.replace("[", "[[") + "]"
    read = read_marks(marked + tail.replace("[", "[["))
    assert read.text == text + tail and read.spans == spans


@pytest.mark.parametrize(
    ("marked", "said"),
    [
        ("a [IO:Mary", "expected ] behind the span 'IO'"),
        ("a [IO:Mary and [S:John] b]", "do not nest"),
        ("a [IO:] b", "expected words in span 'IO'"),
        ("a [IO: ] b", "expected words in span 'IO'"),
        ("a [IO: Mary] b", "spaces outside"),
        ("a [Mary] b", "character 2"),
        ("a [:Mary] b", "expected a span such as"),
        ("a [see page: Mary] b", "expected a span such as"),
        ("a [A+B:Mary] b", "expected a span such as"),
        ("a list[0] b", "write a bracket that belongs to the text twice"),
        ("[IO:Mary] and [IO:Mary]", "IO1 and IO2"),
        ("a [", "character 2"),
        ("[[[", "character 2"),
    ],
)
def test_what_is_no_mark_is_refused_where_it_stands(marked, said):
    with pytest.raises(TextError, match=r"expected") as raised:
        bl.Passage.marked(marked)
    assert said in str(raised.value)


@pytest.mark.parametrize("text", [b"[A:b]", None, 3])
def test_marked_texts_are_texts(text):
    either = (TextError, BeartypeCallHintParamViolation)  # where types are checked, they are first
    with pytest.raises(either, match=r"marked text|parameter text="):
        bl.Passage.marked(text)


def test_a_text_of_nothing_but_marks_is_empty_no_more_than_its_words():
    assert bl.Passage.marked("[A:b]").spans == {"A": (0, 1)}
    with pytest.raises(TextError, match="empty"):
        bl.Passage.marked("")


def test_lines_of_a_file_are_prompts_and_equal_skeletons_are_one_template(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("﻿[A:Ann] met [B:Bob].\r\n\n  [A:Eve] met [B:Tom].\nlist[[0] is [B:Bob].\n", encoding="utf-8")
    found = read_marked([path])
    assert [one.text for one in found] == ["Ann met Bob.", "Eve met Tom.", "list[0] is Bob."]
    assert [one.labels["template"] for one in found] == [1, 1, 2]
    assert len({one.doc for one in found}) == 3 and found[1].doc.endswith("line 3")


def test_rows_of_a_table_keep_their_labels_and_documents(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"text": "[A:Ann] met", "doc": "one", "template": "met"}, {"text": "[A:Ann] left", "doc": "two", "template": "left"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [(one.doc, one.labels, one.spans) for one in read_marked([path])] == [
        ("one", {"template": "met"}, {"A": (0, 3)}),
        ("two", {"template": "left"}, {"A": (0, 3)}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "[A:Ann] met\n[A:Ann met\n", "line 2: expected ]"),
        ("a.txt", "Ann met\n", "expected marked spans"),
        ("a.txt", "\n\n", "empty lines"),
        ("a.jsonl", '{"text": "[A:Ann] met", "spans": {"B": [0, 1]}}', "got both"),
        ("a.csv", "text\n[A:Ann\n", "text 1: expected ]"),
    ],
)
def test_files_that_are_refused_say_where(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError) as raised:
        read_marked([tmp_path / name])
    assert said in str(raised.value)


def test_a_file_twice(tmp_path):
    (tmp_path / "a.txt").write_text("[A:Ann] met")
    with pytest.raises(TextError, match="each file once"):
        read_marked([tmp_path / "a.txt", tmp_path / "a.txt"])
