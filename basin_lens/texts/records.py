"""Rows of a table, objects of JSON, lines of CSV: one rule by which a record becomes a passage."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

from basin_lens.errors import TextError
from basin_lens.texts.passages import Passage
from basin_lens.values import document, is_missing, labels, plain, whole_or_none

_OWN = ("text", "doc", "document", "labels", "spans")
# What people write when they mean one of ours, letters and digits only.
_MEANT = {
    **dict.fromkeys(("docs", "docid", "docname", "documents", "documentid", "documentname"), "doc"),
    **dict.fromkeys(("content", "contents", "texts", "body", "sentence", "sentences", "prompt", "passage", "string"), "text"),
}


# Of a table as it comes; what is no text is refused.
Key = TypeVar("Key")


def passage_of(record: Mapping[Key, object], where: str, doc: str | None = None, *, ask: str = "") -> Passage:
    """The passage that a record describes.

    `text` is the text; `doc` (or `document`) its document; `labels` and `spans` as `Passage` has them. Every other key whose value
    is plain (text, a number, a truth value) is a label of that name; what is not plain (lists, objects) is passed over.

    Args:
        record: by key.
        where: file and line, or row: what an error begins with.
        doc: the document where the record names none.
        ask: what a message advises when there is no text.

    Raises:
        TextError: no text; a key that looks like one of these but is none (`docid`, `Text`, ...); one thing said twice; values that
            a passage refuses.
    """
    try:
        check_keys(record, ask)
        return _passage_of(cast("Mapping[str, object]", record), doc)
    except TextError as error:
        raise TextError(f"{where}: {error}") from error


def _passage_of(record: Mapping[str, object], doc: str | None) -> Passage:
    text = record["text"]
    if not isinstance(text, str):
        raise TextError(f'expected a "text" that is a string, got {_shown(text)}. Leave out rows that have none.')
    named = [record[key] for key in ("doc", "document") if key in record and not is_missing(record[key])]
    if len(named) > 1:
        raise TextError(f'expected "doc" or "document", got both: {named[0]!r} and {named[1]!r}. Leave one out.')
    given, spans = ({} if is_missing(record.get(name)) else record[name] for name in ("labels", "spans"))
    if not isinstance(given, Mapping):
        raise TextError(f'expected "labels" as an object of plain values, got {_shown(given)}. Such as {{"memorized": true}}.')
    for key, meant, kinds in (("label", "labels", (Mapping,)), ("span", "spans", (Mapping, list, tuple))):
        if isinstance(record.get(key), kinds):
            raise TextError(
                f"expected the keys text, doc, labels and spans, got {key!r} with {_shown(record[key])}. Rename it to {meant!r}."
            )
    columns = {key: value for key, value in record.items() if key not in _OWN and not is_missing(value) and _is_plain(value)}
    if twice := sorted(columns.keys() & given.keys()):
        raise TextError(f"expected each label once, got {twice[0]!r} among the labels and beside them. Leave one out.")
    return Passage(text, document(named[0]) if named else doc, labels({**columns, **given}), _spans(spans))


def check_keys(keys: Iterable[object], ask: str = "") -> None:
    """Refuse keys without a text, and keys that look like one of ours but are none.

    Raises:
        TextError: naming the keys there, and the one that was meant.
    """
    names: list[str] = []
    for key in keys:
        if not isinstance(key, str):
            raise TextError(f"expected names of columns as text, got {key!r}. Rename it; the texts are the column 'text'.")
        names.append(key)
    near = {key: meant for key in names if key not in _OWN and (meant := _meant(key)) is not None}
    if "text" not in names:
        hint = next((f" Did you mean {key!r}?" for key, meant in near.items() if meant == "text"), "")
        raise TextError(f"expected a column 'text' (a key \"text\" that is a string), got keys {sorted(names)}.{hint}{ask}")
    for key, meant in near.items():
        if meant != "text" or key.casefold() == "text":
            raise TextError(f"expected the keys text, doc, labels and spans, got {key!r}. Rename it to {meant!r}, or leave it out.")


def _meant(key: str) -> str | None:
    """Which of our keys was meant by another, if any."""
    letters = "".join(c for c in key.casefold() if c.isalnum())
    return letters if letters in _OWN else _MEANT.get(letters)


def _is_plain(value: object) -> bool:
    """Whether it can be a label: what is too large or broken is refused later, not passed over."""
    if isinstance(value, str) or whole_or_none(value) is not None:
        return True
    try:
        plain(value, "value")
    except TextError:
        return False
    return True


def _spans(given: object) -> dict[str, tuple[int, int]]:
    found = {}
    # A column of a data set has all names in every row, and nothing behind those that a text lacks.
    held = {name: ends for name, ends in given.items() if ends is not None} if isinstance(given, Mapping) else None
    if held is None or not all(_is_range(ends) for ends in held.values()):
        raise TextError(f'expected "spans" as names with [start, end], got {_shown(given)}. Such as {{"city": [0, 5]}}.')
    for name, (start, end) in held.items():
        found[name] = (start, end)
    return found


def _is_range(ends: object) -> bool:
    return isinstance(ends, list | tuple) and len(ends) == 2 and all(whole_or_none(end) is not None for end in ends)


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def items_of(data: object) -> Iterator[tuple[str, object]]:
    """What is in a table, a data set or a list: each item with the name by which an error calls it.

    Tables give their rows as mappings, whatever form they would show: pandas, Arrow, `datasets` in any format. Blank rows of a data
    set are separators (WikiText's), and are left out.

    Raises:
        TextError: something that holds no texts.
    """
    kind = type(data).__module__.partition(".")[0]
    if isinstance(data, Mapping):  # also a DatasetDict
        parts = ", ".join(map(repr, list(data)[:6]))
        raise TextError(
            f"expected a text, a Passage, a list of them or a dataset, got {type(data).__name__} with {parts}. Choose one of its "
            "parts, or pass a list of records: [{'text': ...}]."
        )
    elif hasattr(data, "with_format"):
        yield from _of_dataset(data)
    elif kind == "pandas" and hasattr(data, "columns"):
        yield from _of_frame(data)
    elif kind == "pyarrow" and hasattr(data, "to_pylist"):
        yield from _of_arrow(data)
    elif kind == "numpy" and getattr(data, "ndim", 1) != 1:
        shape = getattr(data, "shape", ())
        raise TextError(f"expected texts in one dimension, got an array of shape {shape}. Pass a list of texts.")
    elif isinstance(data, set | frozenset):
        raise TextError("expected texts in an order, got a set, which has none. Pass a list, such as sorted(texts).")
    elif not isinstance(data, Iterable) or isinstance(data, bytes | bytearray):
        cure = "Decode it first." if isinstance(data, bytes | bytearray) else "Pass texts."
        raise TextError(f"expected a text, a Passage, a list of them or a dataset, got {type(data).__name__}. {cure}")
    else:
        yield from ((f"index {n}", item) for n, item in enumerate(data))


def _of_frame(frame: Any) -> Iterator[tuple[str, object]]:
    if not frame.columns.is_unique:
        raise TextError(f"expected columns of different names, got {list(frame.columns)}. Rename one.")
    check_keys(frame.columns, " Rename one: frame.rename(columns=...).")
    yield from ((f"row {n}", row) for n, row in enumerate(frame.to_dict("records")))


def _of_arrow(table: Any) -> Iterator[tuple[str, object]]:
    rows = table.to_pylist()
    if hasattr(table, "column_names") or hasattr(table, "schema"):
        check_keys(table.schema.names, " Rename one: table.rename_columns(...).")
    yield from ((f"row {n}", row) for n, row in enumerate(rows))


def _of_dataset(data: Any) -> Iterator[tuple[str, object]]:
    held = getattr(data, "format", None) or {}
    # A transform of the user's own makes the rows; any other format is only the form in which they show.
    if held.get("type") != "custom":
        data = data.with_format(None)
    asked = " Rename one: dataset.rename_column(...)."
    if data.column_names:
        check_keys(data.column_names, asked)
    columns = held.get("columns")
    for index, row in enumerate(data):
        if not isinstance(row, Mapping):
            raise TextError(
                f"expected rows of a data set, got {type(row).__name__}. Leave out the transform: dataset.with_format(None)."
            )
        check_keys(row, asked)
        if not is_blank(row["text"]):
            yield f"row {index}", row if columns is None else {key: row[key] for key in row if key in {"text", *columns}}


def is_blank(text: object) -> bool:
    """Whether a row of a data set is a separator, as the empty lines of WikiText are."""
    return is_missing(text) or (isinstance(text, str) and not text.strip())
