"""A table as a supplement: one zip file with all that a colleague needs to read it and to run it again."""

import hashlib
import io
import json
import os
import re
import shlex
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from basin_lens import records
from basin_lens.errors import StoreError, TableError
from basin_lens.files import write_file
from basin_lens.tables.files import csv_text, load, save
from basin_lens.tables.frame import provenance
from basin_lens.tables.making import PACKAGES, package_version
from basin_lens.values import KEYS, Facts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = object  # matplotlib is not imported for a table without figures

_KIND = records.Kind("a supplement written by bl.tables.bundle", "basin_lens supplement 1", "Ask for it again.")
_WHEN = (1980, 1, 1, 0, 0, 0)  # of every file: the same table is the same zip
_RECORD, _TABLE, _STUDY = "rerun.json", "table.parquet", "study.json"
# A supplement is a stranger's file: what it may unpack to, in all, and how many files.
_MOST_BYTES, _MOST_FILES, _MOST_RATIO = 4 << 30, 10_000, 200
_OF_BANK = [
    "                  Also those of the bank: the other texts that neighbors came from. Token ids can be turned back into them;",
    "                  documents are named without their folders, and so are labels that are paths.",
]
_NAME = re.compile(r"(?:(?:figures|texts)/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}")


@dataclass(frozen=True)
class Bundle:
    """What a supplement holds.

    `table`: with its provenance. `runs`: for each run, `sequences` (its token ids, documents and labels, or None), `why` there
    are none, and those of its `bank` if it was given (`bank_settings`: how that was read). `figures`, `texts`: names of these
    files in the zip. `study`: what a study declared and found, or None.
    """

    table: pd.DataFrame
    runs: dict[str, Facts]
    figures: tuple[str, ...]
    texts: tuple[str, ...]
    study: Facts | None = None


@runtime_checkable
class Finished(Protocol):
    """What a supplement takes of a study."""

    @property
    def figures(self) -> Mapping[str, Figure]: ...
    @property
    def provenance(self) -> Facts: ...
    def as_json(self) -> Facts: ...


@runtime_checkable
class TokensOf(Protocol):
    """What a supplement takes of a bank: the capture's tokens, their documents and labels, and how they were read."""

    @property
    def sequences(self) -> Sequence["OneSequence"]: ...
    @property
    def docs(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[Mapping[str, object]]: ...
    @property
    def settings(self) -> Facts: ...
    @property
    def model(self) -> Facts: ...


@runtime_checkable
class OneSequence(Protocol):
    """A sequence's token ids and the number of its passage."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def passage(self) -> int: ...


def bundle(
    table: pd.DataFrame,
    path: str | os.PathLike[str],
    *,
    figures: Mapping[str, Figure] | Sequence[Figure | str | os.PathLike[str]] = (),
    texts: Sequence[object] | None = None,
    study: Finished | None = None,
    bank: TokensOf | None = None,
) -> None:
    """Write a table with its provenance, and what is needed to run it again, to one zip file, all of it or nothing.

    In it: `table.parquet` and `table.csv`, `provenance.json`, `README.txt`, `requirements.txt` with the versions that were used,
    `rerun.json` with each run's token ids, documents and labels (`basin-lens rerun` reads it), figures, and texts if asked for.
    The same table and figures give the same bytes. Token ids of a text can be turned back into it: leave the table's rows out, too,
    where a text must not be passed on.

    Args:
        table: with provenance.
        path: ending in `.zip`.
        figures: matplotlib figures by name (or in a list), which are saved as PDF; or paths of files.
        texts: strings, or passages (with `text`), to include as files; None: none, for texts may be others' property.
        study: a finished `Study` of the table's runs: what it declared and found is put beside the table as `study.json`, with the
            study's settings, and its figures where none are given.
        bank: the capture that neighbors came from, if it was one of your own: its tokens are needed to run it again. Its documents
            and labels are put in without folders; those of the table stand in it as they are.

    Raises:
        StoreError: another suffix, a figure's file that cannot be read, or a place that cannot be written.
        TableError: no provenance, a study of other runs, a bank that is no run's or whose states are not the model's own, or a
            name of a figure that is no file name.

    Example:
        >>> import tempfile
        >>> import pandas as pd
        >>> from basin_lens import tables
        >>> table = tables.described(pd.DataFrame({"run": ["r"], "a": [1.0]}), {"r": tables.Provenance(seed=3)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tables.bundle(table, f"{folder}/supplement.zip")
        ...     tables.read_bundle(f"{folder}/supplement.zip").runs["r"]["why"]
        'the table has no column token_id'
    """
    target = Path(path)
    if target.suffix != ".zip":
        raise StoreError(f"expected a file name ending in .zip, got {target.name!r}.")
    held = provenance(table)
    with tempfile.TemporaryDirectory() as folder:
        save(table, Path(folder) / _TABLE)
        parts = {_TABLE: (Path(folder) / _TABLE).read_bytes()}
    parts["table.csv"] = csv_text(table).encode()
    parts["provenance.json"] = json.dumps(held, indent=1).encode()
    parts["requirements.txt"] = _requirements(held).encode()
    if study is not None:
        _check_study(study, held)
        parts[_STUDY] = json.dumps(study.as_json(), indent=1, allow_nan=False).encode()
        figures = figures or study.figures
    parts |= {f"figures/{name}": content for name, content in _figures(figures).items()}
    words = [] if texts is None else [str(getattr(text, "text", text)) for text in texts]
    parts |= {f"texts/{number:05d}.txt": text.encode() for number, text in enumerate(words)}
    runs = {run: _sequences(table, run, facts) for run, facts in held.items()}
    if bank is not None:
        _add_bank(runs, held, bank, table)
    parts["README.txt"] = _readme(table, held, runs, list(parts)).encode()
    for name in parts:
        if not _NAME.fullmatch(name):
            raise TableError(f"expected a file name of letters, digits, dots, - and _ for a figure, got {name!r}. Rename it.")
    digests = {name.replace("/", "."): records.digest(content) for name, content in parts.items()}
    parts[_RECORD] = _KIND.record({"runs": runs}, digests)

    def fill(place: records.Unfinished) -> None:
        with zipfile.ZipFile(place, "w") as archive:
            for name in sorted(parts):
                entry = zipfile.ZipInfo(name, _WHEN)
                entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
                archive.writestr(entry, parts[name])

    write_file(target, fill)


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read a supplement that `bundle` wrote. Nothing is unpacked beside it, and nothing in it is run.

    Raises:
        StoreError: no such file, no supplement, one that was changed, or one that would unpack to more than 4 GB.
    """
    target = Path(path)
    with _KIND.reading(target):
        try:
            archive = zipfile.ZipFile(target)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise _KIND.refusal(target, f"no zip file that can be read ({error})") from error
        with archive:
            parts = _parts(archive, target)
        with tempfile.TemporaryDirectory() as folder:  # its readers read files; only names of ours are written
            record, held = Path(folder) / _RECORD, Path(folder) / _TABLE
            write_file(record, parts[_RECORD])
            facts = _KIND.read(record, {"runs": dict})
            for name, content in parts.items():
                if name != _RECORD and records.digest(content) != facts["files"].get(name.replace("/", ".")):
                    raise _KIND.refusal(target, f"one whose {name} was changed after it was written: its digest is another")
            if missing := set(facts["files"]) - {name.replace("/", ".") for name in parts}:
                raise _KIND.refusal(target, f"one without its file {min(missing)}")
            write_file(held, parts[_TABLE])
            table = load(held)
        for run in facts["runs"].values():
            _check_run(run)
        names = sorted(parts)
        figures, texts = (tuple(name for name in names if name.startswith(f"{kind}/")) for kind in ("figures", "texts"))
        study = json.loads(parts[_STUDY]) if _STUDY in parts else None
        if study is not None:
            records.fields(study, {"study": str, "title": str, "decision": str, "verdict": [str]})
        return Bundle(table, facts["runs"], figures, texts, study)


def _parts(archive: zipfile.ZipFile, target: Path) -> dict[str, bytes]:
    """The contents by name, after names and sizes were checked."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    odd = next((name for name in names if not _NAME.fullmatch(name) or ".." in name), None)
    if odd is not None:
        raise _KIND.refusal(target, f"one with the file name {odd[:80]!r}")
    if len(set(names)) < len(names) or len(names) > _MOST_FILES:
        raise _KIND.refusal(target, f"one with {len(names)} files, {len(names) - len(set(names))} of them twice")
    for needed in (_RECORD, _TABLE):
        if needed not in names:
            raise _KIND.refusal(target, f"a zip file without {needed}")
    packed = max(1, target.stat().st_size)
    if (size := sum(entry.file_size for entry in entries)) > min(_MOST_BYTES, max(_MOST_RATIO * packed, 1 << 24)):
        raise _KIND.refusal(target, f"one of {packed:,} bytes that says it unpacks to {size:,}")
    found = {}
    for entry in entries:
        with archive.open(entry) as file:
            content = file.read(entry.file_size + 1)  # sizes in a zip are its writer's word
        if len(content) != entry.file_size:
            raise _KIND.refusal(target, f"one whose {entry.filename} is not as long as it says")
        found[entry.filename] = content
    return found


def _check_run(run: object) -> None:
    records.fields(run, {"sequences": (list, None), "why": (str, None)})
    assert isinstance(run, dict)
    bank = run.get("bank") or []
    records.fields({"bank": bank, "settings": run.get("bank_settings")}, {"bank": list, "settings": (dict, None)})
    for sequence in [*(run["sequences"] or []), *bank]:
        records.fields(sequence, {"tokens": [int], "doc": str, "labels": dict, "passage": int})


def tokens_hash(sequences: Sequence[Sequence[int]]) -> str:
    """Hash of token sequences, as `texts` in provenance has it."""
    return hashlib.blake2b(repr([tuple(map(int, tokens)) for tokens in sequences]).encode(), digest_size=8).hexdigest()


def _sequences(table: pd.DataFrame, run: str, facts: Facts) -> Facts:
    """A run's tokens, documents and labels, if the table has them all; else why it has not."""

    def none(why: str) -> Facts:
        return {"sequences": None, "why": why}

    needed = ("run", "layer", "token_id", "seq", "pos", "doc", "passage")
    if missing := [name for name in needed if name not in table.columns]:
        return none(f"the table has no column {'token_id' if 'token_id' in missing else missing[0]}")
    rows = table[table["run"] == run]
    rows = rows[rows["layer"] == rows["layer"].min()].sort_values(["seq", "pos"], kind="stable")
    if rows.empty:
        return none("the table has no row of this run")
    labels = [name for name in rows.columns if name not in (*KEYS, "span", *(facts.get("columns") or {}))]
    found = [
        {
            "tokens": part["token_id"].astype(int).tolist(),
            "doc": str(part["doc"].iloc[0]),
            "passage": int(part["passage"].iloc[0]),
            "labels": {name: _plain(part[name].iloc[0]) for name in labels},
        }
        for _, part in rows.groupby("seq", sort=True)
    ]
    if tokens_hash([one["tokens"] for one in found]) != facts.get("texts"):
        return none("the table lacks some of the run's tokens")
    return {"sequences": found, "why": None}


def _check_study(study: Finished, held: Mapping[str, Facts]) -> None:
    """Refuse a study of runs that the table has not."""
    if not study.provenance or (others := set(study.provenance) - set(held)):
        of_it = ", ".join(sorted(others if study.provenance else [])) or "none"
        raise TableError(
            f"expected a study of the table's runs ({', '.join(held)}), got one of {of_it}. Pass the study's own table "
            "(study.tokens), or leave the study out."
        )


def _add_bank(runs: dict[str, Facts], held: Mapping[str, Facts], bank: TokensOf, table: pd.DataFrame) -> None:
    """The bank's tokens, documents and labels with every run whose neighbors came from it; no name says in which folder files lay.

    Raises:
        TableError: none did, or its states are not what the model computes of its tokens.
    """
    name = tokens_hash([one.tokens for one in bank.sequences])
    outside = {run: facts.get("bank") or {} for run, facts in held.items()}
    outside = {run: facts for run, facts in outside.items() if facts.get("source") == "another capture"}
    of_it = [run for run, facts in outside.items() if facts.get("texts") == name]
    if not of_it:
        got = "another one" if outside else "one beside runs whose neighbors came from no other capture"
        raise TableError(
            f"expected the capture that a run of the table had its neighbors from, got {got}. Pass that one, or leave bank out."
        )
    if not bank.settings.get("states_of_model", True) or bank.model.get("hooks") is not None:
        raise TableError(
            "expected a bank of states that the model computes of its tokens, got one whose states were changed (by a control or "
            "by hooks), which tokens alone do not give again. Leave bank out, and say in words how it was made."
        )
    names = _without_folders([str(doc) for doc in bank.docs], _texts_in(table, "doc"))
    values: dict[str, list[str]] = {}
    for one in bank.labels:
        for label, value in one.items():
            values.setdefault(label, []).extend([value] if isinstance(value, str) else [])
    plain = {
        label: _without_folders(found, {*_texts_in(table, label), *(one for one in found if not re.search(r"[/\\\\]", one))})
        for label, found in values.items()
    }
    for run in of_it:
        runs[run]["bank_settings"] = dict(bank.settings)
        runs[run]["bank"] = [
            {
                "tokens": [int(token) for token in one.tokens],
                "doc": names[str(doc)],
                "passage": int(one.passage),
                "labels": {
                    label: plain[label][value] if isinstance(value, str) else _plain(value) for label, value in labels.items()
                },
            }
            for one, doc, labels in zip(bank.sequences, bank.docs, bank.labels, strict=True)
        ]


def _texts_in(table: pd.DataFrame, column: str) -> set[str]:
    """Texts in a column of the table; none without the column."""
    return {str(value) for value in table[column].dropna().unique()} if column in table else set()


def _without_folders(docs: Sequence[str], there: Collection[str]) -> dict[str, str]:
    """Names of documents, or values of a label, that do not say where files lay; different ones stay different.

    Those that the table has, too (`there`), keep the name that it shows: who is of one document must be known.
    """
    names = {doc: doc for doc in docs if doc in there}
    taken = set(there)
    for doc in dict.fromkeys(docs):
        if doc not in names:
            plain = re.split(r"[/\\]", doc)[-1] or "document"
            names[doc] = next(name for n in count(1) if (name := plain if n == 1 else f"{plain} ({n})") not in taken)
            taken.add(names[doc])
    return names


def _plain(value: object) -> object:
    """A label's value as JSON has it."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value if isinstance(value, str | int | float | bool) else None


def _figures(figures: Mapping[str, Figure] | Sequence[Figure | str | os.PathLike[str]]) -> dict[str, bytes]:
    named = figures.items() if isinstance(figures, Mapping) else ((f"figure-{i + 1}", figure) for i, figure in enumerate(figures))
    found: dict[str, bytes] = {}
    for name, figure in named:
        if isinstance(figure, str | os.PathLike):
            try:
                found[Path(figure).name] = Path(figure).read_bytes()
            except OSError as error:
                raise StoreError(f"expected a figure's file, got {str(figure)!r}: {error.strerror}. Check the path.") from error
        else:
            found[f"{name}.pdf"] = _pdf(figure)
    return found


def _pdf(figure: Figure) -> bytes:
    """A figure as PDF, with TrueType fonts and without the time: the same figure is the same file."""
    from matplotlib import rc_context

    drawn = io.BytesIO()
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(drawn, format="pdf", metadata={"CreationDate": None})
    return drawn.getvalue()


def _requirements(held: Mapping[str, Facts]) -> str:
    """Versions that the runs were made with, as pip takes them; the newest record of each."""
    made = [facts.get("made") or {} for facts in held.values()]
    known: dict[str, str] = {}
    for one in made:
        known |= {name: str(v) for name, v in (one.get("versions") or {}).items() if v is not None and name in PACKAGES}
        known["basin-lens"] = str(one.get("basin_lens") or package_version())
    return "".join(f"{name}=={known[name]}\n" for name in sorted(known))


def _readme(table: pd.DataFrame, held: Mapping[str, Facts], runs: Mapping[str, Facts], names: Sequence[str]) -> str:
    """What is in the zip, in plain words."""
    lines = [
        "A table measured with basin-lens, and what is needed to read it and to run it again.",
        "",
        f"table.parquet     {len(table):,} rows, {len(table.columns)} columns. pandas.read_parquet reads it, provenance and all;",
        "                  basin_lens.tables.load refuses it if it was changed.",
        "table.csv         the same as text.",
        "provenance.json   how each run was made: model, texts, settings, versions, what was left out and why.",
        "requirements.txt  the versions that were used, for pip install -r.",
        "rerun.json        token ids, documents and labels of each run, and a digest of every file here.",
        *(_OF_BANK if any(run.get("bank") for run in runs.values()) else []),
        *(f"{name:<17} a figure." for name in names if name.startswith("figures/")),
        *(["study.json        what the study declared and found: tests, verdict, red flags, settings."] if _STUDY in names else []),
        *(["texts/            the texts, in their order."] if any(name.startswith("texts/") for name in names) else []),
        "",
        "To run it again: basin-lens rerun SUPPLEMENT.zip says what would be run; with --yes it runs it and compares the numbers.",
    ]
    for run, facts in held.items():
        made, model = facts.get("made") or {}, facts.get("model") or {}
        command = made.get("command")
        lines += [
            "",
            f"Run {run}",
            f"  model     {model.get('name', 'not known')} (fingerprint {model.get('fingerprint', 'not known')})",
        ]
        lines += [f"  texts     hash {facts.get('texts', 'not known')}", f"  date      {made.get('date', 'not known')}"]
        lines += [f"  package   basin-lens {made.get('basin_lens', 'not known')}, commit {made.get('commit') or 'not known'}"]
        lines += [f"  command   {shlex.join(map(str, command)) if command else 'none: made in Python'}"]
        if why := runs[run]["why"]:
            lines += [f"  It cannot be run again from this file alone: {why}."]
    return "\n".join(lines) + "\n"
