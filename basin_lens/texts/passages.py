"""A text with its document, labels and spans; read from strings, files, JSON lines, and tables of the `datasets` library."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from basin_lens.errors import TextError


@dataclass(frozen=True)
class Passage:
    """A text with its document, its labels and named character spans.

    Args:
        text: the text itself, never empty.
        doc: the document it belongs to; statistics treat documents as independent. None: a document of its own.
        labels: facts about the whole passage, one table column each: `{"memorized": True}`.
        spans: named character ranges `[start, end)`: `{"IO": (10, 14)}`.

    Raises:
        TextError: empty text, or a span outside of it.

    Example:
        >>> import basin_lens as bl
        >>> bl.Passage("Paris is in France.", doc="geography", spans={"city": (0, 5)}).doc
        'geography'
    """

    text: str
    doc: str | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TextError(f"expected a text (str), got {type(self.text).__name__}. Decode bytes first.")
        if not self.text:
            raise TextError("expected a text with at least one character, got an empty one. Leave empty texts out.")
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError(
                f"expected Unicode text, got a lone surrogate at character {error.start}. Decode it properly."
            ) from error
        # None is how api.md spells "nothing given".
        object.__setattr__(self, "labels", dict(self.labels or {}))
        object.__setattr__(self, "spans", {name: (int(a), int(b)) for name, (a, b) in (self.spans or {}).items()})
        for name, (start, end) in self.spans.items():
            if not 0 <= start < end <= len(self.text):
                raise TextError(
                    f"expected span {name!r} inside the text's {len(self.text)} characters, got ({start}, {end}). "
                    "Spans are [start, end) in characters."
                )


def read_passages(data: Any) -> list[Passage]:
    """Passages from a text, a `Passage`, a `pathlib.Path`, lists of these, or a dataset with a `text` column.

    A path is read as UTF-8: JSON lines if it ends in `.jsonl`, plain text otherwise. A passage without a document becomes a document
    of its own; what kind of passage it is (such as `TaggedPassage`) stays.

    Raises:
        TextError: nothing there, an empty text, a missing or unreadable file, something that is not text.
    """
    if isinstance(data, str | Passage | os.PathLike):
        data = [data]
    if hasattr(data, "column_names") or hasattr(data, "features"):
        data = _from_dataset(data)
    if not isinstance(data, Iterable) or isinstance(data, bytes | Mapping):
        raise TextError(f"expected a text, a Passage, a list of them or a dataset, got {type(data).__name__}.")
    passages: list[Passage] = []
    for index, item in enumerate(data):
        if isinstance(item, os.PathLike):
            passages.extend(read_texts(item))
        else:
            passages.append(_passage(item, index, f"text-{len(passages)}"))
    if not passages:
        raise TextError("expected at least one text, got an empty list.")
    return passages


def read_texts(path: str | os.PathLike[str]) -> list[Passage]:
    """The passages of a file: those of its lines if it ends in `.jsonl`, else the whole file as one.

    Raises:
        TextError: as `read_jsonl` and `read_file`.
    """
    return read_jsonl(path) if Path(path).suffix.lower() == ".jsonl" else [read_file(path)]


def read_file(path: str | os.PathLike[str]) -> Passage:
    """One file as one passage, its document named after it, line ends kept so that offsets are the file's own.

    Raises:
        TextError: missing, empty, or not UTF-8.
    """
    return Passage(_content(Path(path)), doc=str(path))


def read_jsonl(path: str | os.PathLike[str]) -> list[Passage]:
    """Passages from JSON lines: an object with a `text` each, and perhaps `doc`, `labels` and `spans` as `Passage` has them.

    A line without `doc` is a document of its own, named after file and line. Other keys are passed over, and so are empty lines.

    Args:
        path: a UTF-8 file.

    Raises:
        TextError: a missing, empty or unreadable file; a line that is not such an object, named by its number.

    Source: https://jsonlines.org

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from basin_lens.texts import read_jsonl
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "texts.jsonl"
        ...     _ = path.write_text('{"text": "Paris is in France.", "doc": "geography", "spans": {"city": [0, 5]}}')
        ...     read_jsonl(path)[0].spans
        {'city': (0, 5)}
    """
    path = Path(path)
    # Not splitlines(): JSON strings may hold U+2028 and others that it takes for line ends.
    lines = _content(path).removeprefix("\ufeff").split("\n")
    passages = [_from_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not passages:
        raise TextError(f"expected JSON lines in {str(path)!r}, got empty lines only.")
    return passages


@cache
def reference_passages() -> tuple[Passage, ...]:
    """The built-in passages: prose of our own, one document per register.

    Each is 60-200 tokens long. They are the demo's texts and the bank behind `bank="reference"`.
    """
    folder = resources.files("basin_lens") / "data" / "passages"
    documents = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".txt")), key=lambda entry: entry.name)
    return tuple(
        Passage(text, doc=entry.name.removesuffix(".txt"))
        for entry in documents
        for text in entry.read_text(encoding="utf-8").strip().split("\n\n")
    )


def _content(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise TextError(f"expected a text file, got {str(path)!r}, which does not exist. Check the path.") from error
    except UnicodeDecodeError as error:
        raise TextError(f"expected UTF-8 text in {str(path)!r}, got byte {error.start} that is not. Convert the file.") from error
    except OSError as error:
        raise TextError(f"expected a readable text file, got {str(path)!r}: {error.strerror}.") from error
    if not text:
        raise TextError(f"expected text in {str(path)!r}, got an empty file.")
    return text


def _passage(item: Any, index: int, doc: str) -> Passage:
    passage = Passage(item) if isinstance(item, str) else item
    if not isinstance(passage, Passage):
        raise TextError(f"expected a text or a Passage at index {index}, got {type(item).__name__}.")
    return passage if passage.doc is not None else replace(passage, doc=doc)


def _from_line(line: str, where: str) -> Passage:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TextError(f"{where}: expected a JSON object, got {line.strip()[:40]!r} ({error}). One object per line.") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        got = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
        raise TextError(f'{where}: expected an object with a "text" that is a string, got {got}. Such as {{"text": "Once ..."}}.')
    doc, labels, spans = (record.get(name) for name in ("doc", "labels", "spans"))
    labels, spans = ({} if given is None else given for given in (labels, spans))
    if not isinstance(doc, str | int | None):
        raise TextError(f'{where}: expected "doc" to be a name, got {doc!r}. Write a string.')
    if not isinstance(labels, dict) or not all(isinstance(value, str | int | float | bool | None) for value in labels.values()):
        raise TextError(f'{where}: expected "labels" as an object of plain values, got {labels!r}. Such as {{"memorized": true}}.')
    if not isinstance(spans, dict) or not all(_is_range(value) for value in spans.values()):
        raise TextError(f'{where}: expected "spans" as names with [start, end], got {spans!r}. Such as {{"city": [0, 5]}}.')
    spans = {name: (start, end) for name, (start, end) in spans.items()}
    try:
        return Passage(record["text"], doc=where if doc is None else str(doc), labels=labels, spans=spans)
    except TextError as error:
        raise TextError(f"{where}: {error}") from error


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)


def _from_dataset(data: Any) -> list[Passage | str]:
    columns = data.column_names or list(next(iter(data), {}))
    if "text" not in columns:
        raise TextError(
            f"expected a dataset with a 'text' column, got columns {sorted(columns)}. Rename one: dataset.rename_column(...)."
        )
    # Data sets such as WikiText hold empty lines between their paragraphs: they are separators, not texts.
    rows = [row for row in data if isinstance(row["text"], str) and row["text"].strip()]
    return [Passage(row["text"], doc=None if row.get("doc") is None else str(row["doc"])) for row in rows]
