"""Captures on disk: safetensors and JSON, in folders that are whole or not there, and read as they were written or not at all."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from basin_lens import records
from basin_lens.capture.fields import CaptureFields
from basin_lens.errors import StoreError
from basin_lens.records import Unfinished
from basin_lens.texts import Passage, TaggedPassage, TokenSequence, Word
from basin_lens.texts.passages import NumberedDocument, digest_of, is_numbered
from basin_lens.values import Facts

FORMAT = "basin_lens capture 2"
_KIND = records.Kind("a saved capture", FORMAT, "Capture the texts again.")
_RECORD, _VALUES = "capture.json", "values.safetensors"
_FIELDS: dict[str, type | tuple[type | None, ...] | list[type]] = {
    "sequences": [dict],
    "passages": (list, None),
    "docs": [str],
    "labels": [dict],
    "strings": [list],
    "layers": [int],
    "model": dict,
    "settings": dict,
}

# Size and SHA-256 of each file of states, by name.
Shards = Mapping[str, Facts]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say what failed when a disk is full or a folder is gone."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"expected a folder that can be written, got {str(folder.parent)!r}: {error}. Free space, or choose another."
        ) from error


def write_borders(
    folder: Unfinished, index: int, rows: Int[Tensor, " n"], borders: Mapping[int, Float[Tensor, "n d"]]
) -> dict[str, Facts]:
    """Write the states of some rows at several block borders, one file per batch; the file, to be listed in the record."""
    tensors = {f"border.{border}": states.contiguous() for border, states in borders.items()}
    path = folder / f"states-{index:05d}.safetensors"
    with _writing(folder):
        save_file({"rows": rows, **tensors}, path)
        return {path.name: records.digest(path)}


def copy_borders(source: Path, target: Unfinished, shards: Shards) -> None:
    """Copy all states to another folder.

    Raises:
        StoreError: a file that is not as it was written.
    """
    for name, facts in shards.items():
        path = _KIND.check(source, name, facts)
        with _writing(target):
            shutil.copy2(path, target)


def check_shards(folder: Path, shards: Shards) -> None:
    """Read all states and refuse what is not as it was written.

    Raises:
        StoreError: see there.
    """
    for name, facts in shards.items():
        _KIND.check(folder, name, facts)


def read_border(folder: Path, shards: Shards, border: int, shape: tuple[int, int]) -> Float[Tensor, "rows d"]:
    """States at one border in row order; each file is proven whole when it is first read.

    Raises:
        StoreError: a file that is not as it was written, or files that do not hold every row exactly once.
    """
    n_rows, width = shape
    seen = torch.zeros(n_rows, dtype=torch.int64, device="cpu")
    states = torch.full(shape, torch.nan, dtype=torch.float32, device="cpu")
    for name, facts in shards.items():
        with _KIND.reading(folder), safe_open(_KIND.check(folder, name, facts), framework="pt") as file:
            rows, values = file.get_tensor("rows"), file.get_tensor(f"border.{border}")
            _check_tensor("rows", rows, torch.int64, (len(rows),))
            _check_tensor(f"border.{border}", values, torch.float32, (len(rows), width))
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < n_rows:
                raise ValueError(f"rows {int(rows.min())} to {int(rows.max())} of {n_rows} in {name}")
            seen += torch.bincount(rows, minlength=n_rows)
            states[rows] = values
    if bool((seen != 1).any()):
        row = int((seen != 1).nonzero()[0])
        raise _KIND.refusal(folder, f"states that hold row {row} {int(seen[row])} times ({int((seen != 1).sum())} rows not once)")
    return states


def model_of(folder: Path) -> str | None:
    """The name of the model whose states a folder holds, as its record says, unproven; None if that cannot be read."""
    try:
        return str(json.loads((folder / _RECORD).read_text(encoding="utf-8"))["model"]["name"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_record(
    folder: Unfinished,
    record: Mapping[str, object],
    columns: Mapping[str, Mapping[str, Tensor]],
    readings: Mapping[str, Tensor],
    shards: Shards,
) -> None:
    """Write everything but the states.

    Raises:
        StoreError: a label that JSON cannot hold.
    """
    values = {f"column|{key}|{_escaped(name)}": value for key, held in columns.items() for name, value in held.items()}
    values |= {f"reading|{name}": value for name, value in readings.items()}
    files = dict(shards)
    with _writing(folder):
        if values:
            save_file({name: value.contiguous() for name, value in values.items()}, folder / _VALUES)
            files[_VALUES] = records.digest(folder / _VALUES)
        try:
            content = _KIND.record(record, files)
        except TypeError as error:
            raise StoreError(f"expected labels that JSON can hold (text, numbers, booleans), got: {error}.") from error
        (folder / _RECORD).write_bytes(content)


def read_capture(folder: Path) -> CaptureFields:
    """The fields of a `Capture`, whose files of states are proven when they are read.

    Raises:
        StoreError: no capture there, a damaged one, or one of an earlier version.
    """
    record = _KIND.read(folder / _RECORD, _FIELDS)
    shards = record.pop("files")
    facts = shards.pop(_VALUES, None)
    with _KIND.reading(folder):
        for name, shard in shards.items():
            _KIND.check(folder, name, shard, content=False)
        others = {path.name for path in folder.glob("*.safetensors")} - {*shards, _VALUES if facts else ""}
        if others or not shards:
            raise ValueError(
                f"the file {min(others)}, which its record does not list" if others else "no file of states in the record"
            )
        values = {} if facts is None else load_file(_KIND.check(folder, _VALUES, facts))
        _check_record(record, values)
        return {
            "sequences": [
                TokenSequence(tuple(s["tokens"]), s["passage"], tuple(s["starts"]), tuple(s["ends"])) for s in record["sequences"]
            ],
            "passages": _passages(record["passages"], record["settings"]),
            "docs": record["docs"],
            "labels": record["labels"],
            "strings": dict(record["strings"]),
            "layers": tuple(record["layers"]),
            "model": record["model"],
            "settings": record["settings"],
            "columns": _columns(values),
            "_readings": {name.split("|", 1)[1]: value for name, value in values.items() if name.startswith("reading|")},
            "_store": folder,
            "_shards": shards,
        }


def _columns(values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    columns: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        if name.startswith("column|"):
            key, column = name.split("|", 1)[1].rsplit("|", 1)
            columns.setdefault(key, {})[column.replace("%7C", "|").replace("%25", "%")] = value
    return columns


def _escaped(column: str) -> str:
    """A column's name without the sign that parts it from its analyzer's key."""
    return column.replace("%", "%25").replace("|", "%7C")


def _check_record(record: Facts, values: Mapping[str, Tensor]) -> None:
    """Whether the parts of a record go together.

    Raises:
        ValueError, KeyError, TypeError: they do not.
    """
    model, sequences = record["model"], record["sequences"]
    records.fields(model, {"name": str, "fingerprint": str, "layers": int, "width": int})
    records.fields(record["settings"], {"source": str, "max_length": int})
    for sequence in sequences:
        records.fields(sequence, {"tokens": [int], "passage": int, "starts": [int], "ends": [int]})
        if not len(sequence["tokens"]) == len(sequence["starts"]) == len(sequence["ends"]) > 0:
            raise ValueError("a sequence whose tokens and offsets differ in number")
        if record["passages"] is not None and not 0 <= sequence["passage"] < len(record["passages"]):
            raise ValueError(f"a sequence of passage {sequence['passage']}, which is not there")
    if not len(sequences) == len(record["docs"]) == len(record["labels"]) > 0:
        raise ValueError(f"{len(sequences)} sequences, {len(record['docs'])} documents, {len(record['labels'])} labels")
    if not all(isinstance(token, int) and isinstance(text, str) for token, text in record["strings"]):
        raise ValueError("texts of tokens that are none")
    if missing := {token for s in sequences for token in s["tokens"]} - dict(record["strings"]).keys():
        raise ValueError(f"no text of the token {min(missing)}")
    layers = record["layers"]
    if not layers or len(set(layers)) < len(layers) or not 0 <= min(layers) <= max(layers) < model["layers"]:
        raise ValueError(f"layers {layers} of {model['layers']}")
    _check_values(values, [len(s["tokens"]) for s in sequences], model["layers"])


def _check_values(values: Mapping[str, Tensor], lengths: list[int], n_layers: int) -> None:
    """Whether columns and readings fit sequences of these lengths.

    Raises:
        ValueError: they do not.
    """
    for name, value in values.items():
        kind, rest = name.split("|", 1)
        if kind == "column" and "|" in rest:
            _check_tensor(name, value, torch.float32, (value.shape[0], sum(lengths)))
            if value.shape[0] not in (1, n_layers):
                raise ValueError(f"{name} of {value.shape[0]} layers")
        elif kind != "reading" or value.ndim < 2 or len(value) != len(lengths) or "reading|valid" not in values:
            raise ValueError(f"the values {name} of shape {tuple(value.shape)}")


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or tuple(value.shape) != shape:
        raise ValueError(f"{name} as {value.dtype} {tuple(value.shape)}, not {dtype} {shape}")


def _passages(records: Sequence[object] | None, settings: Facts) -> list[Passage] | None:
    """The passages of a capture; a document that was not given is again the number of its text."""
    if records is None:
        return None
    named = frozenset(settings.get("named_documents", ()))
    digests: dict[str, str] = {}
    found = []
    for passage in map(_passage, records):
        doc = str(passage.doc)
        if is_numbered(doc) and doc not in named:
            passage = replace(passage, doc=NumberedDocument(doc, digests.setdefault(doc, digest_of(passage.text))))
        found.append(passage)
    return found


def _passage(record: object) -> Passage:
    """A passage, with its gold words if it has some, from JSON that has no tuples."""
    if not isinstance(record, dict):
        raise TypeError("a passage that is no record")
    spans = {name: (start, end) for name, (start, end) in record["spans"].items()}
    words = {"words": tuple(Word(**word) for word in record["words"])} if "words" in record else {}
    return (TaggedPassage if words else Passage)(**record | {"spans": spans, **words})
