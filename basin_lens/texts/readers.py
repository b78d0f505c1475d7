"""Texts from what a caller has: strings, files (one reader per type, one list of them), tables, data sets."""

import codecs
import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from basin_lens.errors import TextError
from basin_lens.texts.marked import read_marks, skeleton_of
from basin_lens.texts.passages import Passage, Texts, with_documents
from basin_lens.texts.records import items_of, passage_of
from basin_lens.values import check_alike, is_missing

# Longest name of a file that a text is taken for.
_LONGEST_NAME = 1024
# What a file in another encoding begins with. UTF-32's first: it begins as UTF-16's does.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_passages(data: Texts) -> list[Passage]:
    """Passages from a text, a `Passage`, a `pathlib.Path`, lists of these, or a table with a column `text`.

    | given | passages |
    | --- | --- |
    | a text, a `Passage` | itself; a list, an iterator, a column or an array of them: each |
    | a `Path`, also in a list | those of the file, as `read_texts` reads it |
    | a DataFrame, an Arrow table, a data set of `datasets`, a list of dicts | one of each row, as in a `.jsonl` file |

    Columns other than `text`, `doc` (or `document`), `labels` and `spans` become labels if their values are plain. A passage
    without a document becomes a document of its own; what kind of passage it is (such as `TaggedPassage`) stays.

    Raises:
        TextError: nothing there, an empty text, a missing or unreadable file, a file twice, a string that names a file, something
            that is not text, one label with values of several kinds. The message names the row.
    """
    if isinstance(data, str | Passage | os.PathLike):
        data = [data]
    passages: list[Passage] = []
    files: dict[tuple[int, int], str] = {}
    for where, item in items_of(data):
        if isinstance(item, os.PathLike):
            _refuse_again(Path(item), files)
            passages.extend(read_texts(item))
            continue
        passages.append(passage_of(item, where) if isinstance(item, dict) else _passage(item, where))
    if not passages:
        raise TextError("expected at least one text, got an empty list.")
    check_alike([passage.labels for passage in passages])
    return with_documents(passages)


def _refuse_again(path: Path, files: dict[tuple[int, int], str]) -> None:
    """Refuse a file that was read already, by whatever name: its text would count as two documents."""
    try:
        facts = path.stat()
    except (OSError, ValueError):  # a missing one is refused by its reader
        return
    key = facts.st_dev, facts.st_ino
    if key in files:
        raise TextError(f"expected each file once, got {str(path)!r} again (before as {files[key]!r}). Leave one out.")
    files[key] = str(path)


def _passage(item: object, where: str) -> Passage:
    if isinstance(item, Passage):
        return item
    if not isinstance(item, str):
        shown = f" ({item!r})" if item is not None and is_missing(item) else ""
        raise TextError(f"expected a text or a Passage at {where}, got {type(item).__name__}{shown}. {_cure(item)}")
    if _names_a_file(item):
        raise TextError(
            f"expected a text at {where}, got the name of a file that exists, {str(item)!r}. Pass Path({str(item)!r}) to read it, "
            f"or Passage({str(item)!r}) if this is the text itself."
        )
    try:
        return Passage(item)
    except TextError as error:
        raise error if where == "index 0" else TextError(f"{error} It is at {where}.") from error


def _cure(item: object) -> str:
    """What to do about an item that is no text."""
    if is_missing(item):
        return "Leave out rows without a text."
    if isinstance(item, bytes | bytearray):
        return "Decode it first."
    if hasattr(item, "to_list"):
        return "Of a table, pass its rows: frame.to_dicts()."
    return "Token ids are for analyze and Capture, as a list of ids for each sequence: [[5, 6, 7], [8, 9]]."


def _names_a_file(text: str) -> bool:
    try:
        return 0 < len(text) <= _LONGEST_NAME and "\n" not in text and Path(text).is_file()
    except (OSError, ValueError):  # too long for the system, or with characters that no name has
        return False


def read_texts(path: str | os.PathLike[str]) -> list[Passage]:
    r"""The passages of a file, by the end of its name: the one list of readers, for every command.

    | ends in | passages |
    | --- | --- |
    | `.jsonl`, `.ndjson` | one for each line, see `read_jsonl` |
    | `.json` | one for each item of an array: texts, or objects as in `.jsonl`; JSON lines are read too |
    | `.csv`, `.tsv` | one for each line, by the names in the first; all cells are text, an empty one is none |
    | `.parquet` | one for each row |
    | anything else | the whole file as one |

    Of tables and objects: `text`, `doc` (or `document`), `labels` and `spans` as `Passage` has them (not in CSV); other keys with
    plain values are labels.

    Raises:
        TextError: a missing, empty or unreadable file; a line or row that gives no passage, named by its number.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from basin_lens.texts import read_texts
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "texts.csv"
        ...     _ = path.write_text('doc,text,kind\n001,"Paris, of course.",NA\n')
        ...     passage = read_texts(path)[0]
        >>> passage.doc, passage.text, passage.labels
        ('001', 'Paris, of course.', {'kind': 'NA'})
    """
    path = Path(path)
    passages = _READERS.get(path.suffix.lower(), _whole)(path)
    check_alike([passage.labels for passage in passages])
    return passages


def read_marked(paths: Sequence[str | os.PathLike[str]]) -> list[Passage]:
    r"""Prompts with marked spans, from files: each line of a text file is one, each row of the others, as `read_texts` has them.

    `[NAME:words]` marks a span, `[[` is a bracket of the text; see `Passage.marked`. Unless a file has labels of that name, each
    prompt gets the label `template`: a number for each skeleton, that is, text with its spans taken out, in order of appearance.

    Raises:
        TextError: as `read_texts` and `read_passages`, a mark that cannot be read, named by its line, or rows with spans besides.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from basin_lens.texts import read_marked
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "prompts.txt"
        ...     _ = path.write_text("[A:Ann] met [B:Bob].\n[A:Eve] met [B:Tom].\nHere is [B:Bob].\n")
        ...     prompts = read_marked([path])
        >>> [(prompt.text, prompt.labels["template"]) for prompt in prompts]
        [('Ann met Bob.', 1), ('Eve met Tom.', 1), ('Here is Bob.', 2)]
    """
    files: dict[tuple[int, int], str] = {}
    prompts: list[Passage] = []
    for path in map(Path, paths):
        _refuse_again(path, files)
        held = read_texts(path) if has_rows(path) else _marked_lines(path)
        for number, passage in enumerate(held, 1):
            where = str(passage.doc) if not has_rows(path) else f"{path}, text {number}"
            if passage.spans:
                raise TextError(f"{where}: expected spans marked in the text or as offsets, got both. Leave the offsets out.")
            try:
                read = read_marks(passage.text)
                prompts.append(replace(passage, text=read.text, spans=read.spans))
            except TextError as error:
                raise TextError(f"{where}: {error}") from error
    if not any(passage.spans for passage in prompts):
        raise TextError(
            f"expected marked spans, such as [IO:Mary], got none in {len(prompts)} prompts. Mark some, or do not ask for it."
        )
    if not any("template" in passage.labels for passage in prompts):
        skeletons = [skeleton_of(passage.text, passage.spans) for passage in prompts]
        number_of = {skeleton: number for number, skeleton in enumerate(dict.fromkeys(skeletons), 1)}
        numbered = zip(prompts, skeletons, strict=True)
        prompts = [replace(one, labels={**one.labels, "template": number_of[skeleton]}) for one, skeleton in numbered]
    check_alike([passage.labels for passage in prompts])
    return prompts


def _marked_lines(path: Path) -> list[Passage]:
    """Each line that is not empty as a prompt, a document of its own."""
    lines = [line.strip() for line in _content(path).split("\n")]
    found = [Passage(line, doc=f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]
    if not found:
        raise TextError(f"expected a prompt in each line of {str(path)!r}, got empty lines only.")
    return found


def read_by_document(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of a file by their documents, one of each.

    Raises:
        TextError: as `read_texts`, or two texts of one document.
    """
    found: dict[str, str] = {}
    for passage in read_texts(path):
        if str(passage.doc) in found:
            raise TextError(f"expected one text of each document in {str(path)!r}, got {passage.doc!r} again. Leave one out.")
        found[str(passage.doc)] = passage.text
    return found


def has_rows(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name says that it holds several texts, with keys or columns."""
    return Path(path).suffix.lower() in _READERS


def read_file(path: str | os.PathLike[str]) -> Passage:
    """One file as one passage, its document named after it.

    Line ends are kept, so that offsets are the file's own (behind a byte order mark).

    UTF-8; UTF-16 and UTF-32 if they say so by a byte order mark, which is no part of the text.

    Raises:
        TextError: missing, empty, in another encoding, or of a type whose syntax is no text (`.jsonl`, `.csv`, ...: see
            `read_texts`).
    """
    if has_rows(path):
        raise TextError(f"expected a file that is one text, got {str(path)!r}. Read its rows: read_texts(...).")
    return _whole(Path(path))[0]


def _whole(path: Path) -> list[Passage]:
    return [Passage(_content(path), doc=str(path))]


def read_jsonl(path: str | os.PathLike[str]) -> list[Passage]:
    """Passages from JSON lines: an object with a `text` each, and perhaps `doc`, `labels` and `spans` as `Passage` has them.

    A line without `doc` is a document of its own, named after file and line; `document` says the same as `doc`. Other keys with
    plain values are labels; lists and objects are passed over, and so are empty lines. Keys that look like one of these but are
    none are refused.

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
    return _lines(Path(path), _content(Path(path)))


def _lines(path: Path, content: str) -> list[Passage]:
    # Not splitlines(): JSON strings may hold U+2028 and others that it takes for line ends.
    lines = content.split("\n")
    passages = [_from_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not passages:
        raise TextError(f"expected JSON lines in {str(path)!r}, got empty lines only.")
    return passages


def _from_json(line: str, where: str) -> Passage:
    try:
        record = json.loads(line, object_pairs_hook=_once)
    except TextError as error:
        raise TextError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise TextError(f"{where}: expected a JSON object, got {line.strip()[:40]!r} ({error}). One object per line.") from error
    return _from_object(record, where)


def _from_object(record: object, where: str) -> Passage:
    if not isinstance(record, dict):
        raise TextError(
            f'{where}: expected an object with a "text" that is a string, got {type(record).__name__}. '
            'Such as {"text": "Once ..."}.'
        )
    return passage_of(record, where, where)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise TextError(f"expected each key once, got {next(n for n in names if names.count(n) > 1)!r} again. Leave one out.")
    return found


def _json(path: Path) -> list[Passage]:
    content = _content(path)
    try:
        value = json.loads(content, object_pairs_hook=_once)
    except TextError as error:
        raise TextError(f"{path}: {error}") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one value after another: JSON lines, as `datasets` and pandas write them
            return _lines(path, content)
        raise TextError(f"expected JSON in {str(path)!r}, got {error}. Mend it, or name the file .txt if it is text.") from error
    except ValueError as error:
        raise TextError(f"expected JSON in {str(path)!r}, got a number that is too long: {error}. Write it as text.") from error
    except RecursionError as error:
        raise TextError(f"expected JSON in {str(path)!r}, got objects too deep to read. Write an array of texts.") from error
    if isinstance(value, dict):
        return [_from_object(value, str(path))]
    if not isinstance(value, list) or not value:
        raise TextError(f"expected an array of texts or objects in {str(path)!r}, got {type(value).__name__} without any.")
    passages = []
    for index, item in enumerate(value):
        where = f"{path}, item {index}"
        if not isinstance(item, str):
            passages.append(_from_object(item, where))
            continue
        try:
            passages.append(Passage(item, doc=where))
        except TextError as error:
            raise TextError(f"{where}: {error}") from error
    return passages


def _table(path: Path, delimiter: str) -> list[Passage]:
    """Every cell as the text that it is: `null`, `NA` and `001` are what they say."""
    content = _content(path)
    before = csv.field_size_limit(max(len(content), csv.field_size_limit()))
    try:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        lines, begun = [], 1
        for cells in reader:
            lines.append((begun, cells))
            begun = reader.line_num + 1
    except csv.Error as error:
        raise TextError(
            f"{path}, line {reader.line_num}: expected cells in double quotes or without any, got {error}. Write a quote in text "
            'as "".'
        ) from error
    finally:
        csv.field_size_limit(before)
    lines = [(number, cells) for number, cells in lines if cells]
    names = lines[0][1] if lines else []
    # The row numbers that pandas writes before everything else unless told not to.
    numbered = names[:1] == [""] and all(cells[:1] == [str(n)] for n, (_, cells) in enumerate(lines[1:]))
    if len(set(names)) < len(names):
        raise TextError(f"expected columns of different names in {str(path)!r}, got {names}. Rename one.")
    passages = []
    for number, cells in lines[1:]:
        where = f"{path}, line {number}"
        if len(cells) != len(names):
            raise TextError(
                f"{where}: expected {len(names)} cells ({', '.join(names)}), got {len(cells)}. Quote cells that hold the separator."
            )
        record = {name: cell if cell or name == "text" else None for name, cell in list(zip(names, cells, strict=True))[numbered:]}
        passages.append(passage_of(record, where, where))
    if not passages:
        raise TextError(f"expected a line of names and lines of cells in {str(path)!r}, got no more than {len(lines)} lines.")
    return passages


def _parquet(path: Path) -> list[Passage]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, pyarrow.ArrowException) as error:
        raise TextError(f"expected a parquet file that can be read, got {str(path)!r}: {error}. Write it again.") from error
    if not table.num_rows:
        raise TextError(f"expected rows in {str(path)!r}, got none.")
    rows = [cast("Mapping[str, object]", row) for _, row in items_of(table)]
    places = [f"{path}, row {n}" for n in range(len(rows))]
    return [passage_of(row, place, place) for row, place in zip(rows, places, strict=True)]


_READERS: dict[str, Callable[[Path], list[Passage]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": _json,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".parquet": _parquet,
}


def _missing(path: Path) -> TextError:
    return TextError(f"expected a text file, got {str(path)!r}, which does not exist. Check the path.")


def _content(path: Path) -> str:
    try:
        held = path.read_bytes()
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        said = getattr(error, "strerror", None) or error
        raise TextError(f"expected a readable text file, got {str(path)[:200]!r}: {said}. Check the path.") from error
    encoding = next((name for mark, name in _MARKS.items() if held.startswith(mark)), "utf-8")
    try:
        text = held.decode(encoding)
    except UnicodeDecodeError as error:
        said = "UTF-8" if encoding == "utf-8" else f"{encoding.upper()} (as its byte order mark says)"
        raise TextError(f"expected {said} text in {str(path)!r}, got byte {error.start} that is not. Convert the file.") from error
    if not text:
        raise TextError(f"expected text in {str(path)!r}, got an empty file.")
    if "\x00" in text:
        raise TextError(
            f"expected text in {str(path)!r}, got a NUL character at {text.index(chr(0))}: UTF-16 without a byte order mark, or no "
            "text at all. Convert it to UTF-8."
        )
    return text
