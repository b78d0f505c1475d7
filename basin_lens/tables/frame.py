"""Tables that keep their provenance: it is made, read and carried here, and nowhere else.

Provenance is plain JSON by run in `table.attrs["provenance"]`, where notebooks read it and files keep it; `runs` reads it as
`Provenance`. Pandas drops `attrs` on concat, on merge and on much else, so a table that is made of another one is made by
`select`, `assign`, `merge` or `concat`, or passed through `with_provenance`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from operator import methodcaller
from typing import NoReturn, cast

import numpy as np
import pandas as pd
from jaxtyping import Bool

from basin_lens.errors import TableError
from basin_lens.tables.schema import Column, Provenance
from basin_lens.values import KEYS, Facts, did_you_mean, whole_numbers

_NAME = "provenance"


def _refused(*_: object, **__: object) -> NoReturn:
    raise TypeError(
        "expected provenance to stay as it is, got a change: tables share it. Put a changed copy in its place: "
        'table.attrs["provenance"] = {**table.attrs["provenance"], ...}.'
    )


class _Record(dict[str, object]):
    """JSON that is only read. Pandas copies `attrs` deeply at every `table[column]`, half of a study's time; this, never."""

    typed: Provenance | None = None  # what `runs` has read in it
    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = _refused
    __ior__ = dict.__or__  # type: ignore[assignment] # `attrs[...] |= ...` makes a plain dict, as `attrs[...] = ... | ...` does

    def __deepcopy__(self, memo: dict[int, object]) -> "_Record":
        return self

    def __reduce__(self) -> tuple[type, tuple[dict[str, object]]]:
        return dict, (dict(self),)  # a copy that is stored is read without this package, too, and can be changed


class _Entries(list[object]):
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refused
    append = extend = insert = remove = pop = clear = sort = reverse = _refused

    def __deepcopy__(self, memo: dict[int, object]) -> "_Entries":
        return self

    def __reduce__(self) -> tuple[type, tuple[list[object]]]:
        return list, (list(self),)


def _read_only(fact: object) -> object:
    """The same JSON, which nobody can change."""
    if isinstance(fact, _Record | _Entries):
        return fact
    if isinstance(fact, dict):
        return _Record({name: _read_only(part) for name, part in fact.items()})
    if isinstance(fact, list | tuple):
        return _Entries([_read_only(part) for part in fact])
    return deepcopy(fact)


def build(
    rows: Mapping[str, Sequence[object] | np.ndarray],
    labels: Mapping[str, Sequence[object]],
    layers: Sequence[int],
    values: Mapping[str, np.ndarray],
    provenance: Provenance,
) -> pd.DataFrame:
    """The table of one run.

    Args:
        rows: what is known of each token, by the names in `KEYS` except `run` and `layer`, and `span`; `n` entries each.
        labels: label columns, `n` entries each.
        layers: the layers measured.
        values: analyzer columns, `[len(layers), n]`.
        provenance: of the run; the run's name is its hash, without `made`.

    Raises:
        TableError: two columns of one name.
    """
    check_names([*labels, *values])
    named = {name: fact for name, fact in provenance.as_json().items() if name != "made"}  # one thing has one name on any day
    run = hashlib.blake2b(json.dumps(named, sort_keys=True).encode(), digest_size=5).hexdigest()
    count = len(rows["token"])
    named_run = pd.Series([run]).repeat(len(layers) * count).reset_index(drop=True)  # one text, and not one for each row
    data: dict[str, object] = {"run": named_run, "layer": np.repeat(np.asarray(layers), count)}
    for name in KEYS[2:]:
        data[name] = _tiled(rows[name], len(layers))
    for name, column in labels.items():
        data[name] = _tiled(column, len(layers))
    data["span"] = _tiled(rows["span"], len(layers))
    for name, value in values.items():
        data[name] = value.reshape(-1).astype(np.float64)
    return described(pd.DataFrame(data), {run: provenance})


def check_names(names: Sequence[str]) -> None:
    """Refuse labels and analyzer columns that would share a name, or take one of the table's own.

    Raises:
        TableError: a name used twice.
    """
    every = [*KEYS, "span", *names]
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise TableError(
            f"expected different column names, got {twice[0]!r} twice. Rename the label, or give the analyzer a name=."
        )


def _tiled(column: Sequence[object] | np.ndarray, times: int) -> object:
    if isinstance(column, np.ndarray):
        return np.tile(column, times)
    return pd.concat([pd.Series(list(column))] * times, ignore_index=True)


def provenance(table: pd.DataFrame) -> dict[str, Facts]:
    """Provenance by run, as plain JSON.

    Raises:
        TableError: the table has none (pandas drops it on merge: use `basin_lens.tables`).
    """
    found = _held(table)
    if not found:
        raise TableError("expected a table with provenance, got one without. Keep it through basin_lens.tables.save/load/concat.")
    return found


def in_memory(table: object) -> None:
    """Refuse what is no table in memory, such as a run's table in its folder.

    Raises:
        TableError: it is none.
    """
    if not isinstance(table, pd.DataFrame | pd.Series):
        load = (
            "Load what you need of it: run.load(layers=[...], columns=[...])."
            if hasattr(table, "load")
            else "Pass a table of analyze."
        )
        raise TableError(f"expected a table in memory (a DataFrame), got {type(table).__name__}. {load}")


def _held(table: pd.DataFrame) -> dict[str, Facts]:
    """Provenance by run, as plain JSON; empty if the table has none."""
    in_memory(table)
    found = table.attrs.get(_NAME)
    return {run: facts for run, facts in found.items() if isinstance(facts, dict)} if isinstance(found, dict) else {}


def runs(table: pd.DataFrame) -> dict[str, Provenance]:
    """Provenance by run; empty if the table has none.

    Example:
        >>> import pandas as pd
        >>> from basin_lens import tables
        >>> table = tables.described(pd.DataFrame({"run": ["r"]}), {"r": tables.Provenance(seed=3)})
        >>> tables.runs(table)["r"].seed
        3
    """
    return {run: _typed(facts) for run, facts in _held(table).items()}


def _typed(facts: Facts) -> Provenance:
    """Read once where nobody can change it: tests ask for the same record a thousand times in a study."""
    if not isinstance(facts, _Record):
        return Provenance.from_json(facts)
    if facts.typed is None:
        read = Provenance.from_json(facts)
        columns = None if read.columns is None else cast("Mapping[str, Column]", _Record(read.columns))
        facts.typed = replace(read, columns=columns, others=_Record(read.others))
    return facts.typed


def scores(table: pd.DataFrame) -> dict[str, Facts]:
    """The analyzers' columns in the table: unit, range and rows by name, in table order."""
    known: dict[str, Facts] = {}
    for facts in provenance(table).values():
        known |= facts["columns"]
    return {name: known[name] for name in table.columns if name in known}


def columns(table: pd.DataFrame) -> dict[str, Column]:
    """The columns in the table that its provenance describes, in table order; none if it has no provenance."""
    known: dict[str, Column] = {}
    for run in runs(table).values():
        known |= run.columns or {}
    return {name: known[name] for name in table.columns if name in known}


def described(table: pd.DataFrame, by_run: Mapping[str, Provenance]) -> pd.DataFrame:
    """The table with this provenance in place of its own."""
    return described_by_json(table, {run: facts.as_json() for run, facts in by_run.items()})


def described_by_json(table: pd.DataFrame, held: Mapping[str, Facts]) -> pd.DataFrame:
    """The table with plain JSON by run as its provenance."""
    answer = table.copy(deep=False)
    answer.attrs = {name: note for name, note in table.attrs.items() if name != _NAME}
    if held:
        answer.attrs[_NAME] = _read_only(held)
    return answer


def with_provenance(table: pd.DataFrame, *sources: pd.DataFrame) -> pd.DataFrame:
    """The table with the provenance of the tables that it was made of, in place of its own; without any if they have none.

    Of a run that several of them have, the last one's is kept, with the errors of references that any of them knows.

    Example:
        >>> import pandas as pd
        >>> from basin_lens import tables
        >>> source = tables.described(pd.DataFrame({"doc": ["a"], "score": [1.0]}), {"r": tables.Provenance(seed=3)})
        >>> means = tables.with_provenance(source.groupby("doc", as_index=False).mean(), source)
        >>> list(tables.runs(means))
        ['r']
    """
    held: dict[str, Facts] = {}
    for source in sources:
        for run, facts in _held(source).items():
            held[run] = _with_errors_of(facts, held[run]) if run in held else facts
    return described_by_json(table, held)


def _with_errors_of(facts: Facts, other: Facts) -> Facts:
    """A run's record with the errors of references that another record of it knows: of two for one layer, the larger.

    Pairs of runs (`compare`) have errors of their own by column and layer under the names of both runs.
    """
    one, two = (_errors_by_layer(record) for record in (facts, other))
    if not two or one == two:
        return facts
    errors = {name: dict(by_layer) for name, by_layer in one.items()}
    for name, by_layer in two.items():
        mine = errors.setdefault(name, {})
        for layer, error in by_layer.items():
            known = mine.get(layer, error)
            mine[layer] = None if error is None or known is None else max(error, known)
    return {**facts, "reference_error": errors}


def _errors_by_layer(facts: Facts) -> Facts:
    held = facts.get("reference_error")
    return {name: each for name, each in held.items() if isinstance(each, dict)} if isinstance(held, dict) else {}


def without_provenance(table: pd.DataFrame) -> pd.DataFrame:
    """The table as pandas alone would make it: without provenance and notes."""
    in_memory(table)
    answer = table.copy(deep=False)
    answer.attrs = {}
    return answer


def with_columns(table: pd.DataFrame, described_columns: Mapping[str, Column]) -> pd.DataFrame:
    """The table with columns made later described in the provenance of every run, whence figures and findings take units."""
    added = {name: column.as_json() for name, column in described_columns.items()}
    return described_by_json(
        table, {run: {**facts, "columns": {**facts["columns"], **added}} for run, facts in _held(table).items()}
    )


def noted(table: pd.DataFrame, **notes: object) -> pd.DataFrame:
    """The table with notes for its reader in `table.attrs`, by name: `select`, `assign` and `merge` keep them, files do not."""
    answer = table.copy(deep=False)
    answer.attrs.update(notes)
    return answer


def _like(answer: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """A table just made, with all that the other one says of itself."""
    answer.attrs = dict(table.attrs)
    return answer


def select(table: pd.DataFrame, rows: "pd.Series[bool] | Bool[np.ndarray, ' rows']") -> pd.DataFrame:
    """The rows chosen, with their provenance."""
    return _like(table[rows], table)


def assign(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    """A copy with columns added or replaced, as `DataFrame.assign`, with its provenance."""
    return _like(methodcaller("assign", **values)(table), table)  # pandas says what it takes


def merge(table: pd.DataFrame, other: pd.DataFrame, **how: object) -> pd.DataFrame:
    """`table.merge(other, **how)`, with the provenance of the first table."""
    return _like(methodcaller("merge", other, **how)(table), table)


def concat(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables under one another, with the provenance of all their runs.

    Raises:
        TableError: no tables, or one without provenance.
    """
    if not tables:
        raise TableError("expected at least one table, got none.")
    for table in tables:
        provenance(table)
    return with_provenance(pd.concat([without_provenance(table) for table in tables], ignore_index=True), *tables)


def require(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table without these columns.

    Raises:
        TableError: one is missing; the columns there are named.
    """
    in_memory(table)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        meant = did_you_mean(missing[0], map(str, table.columns))
        raise TableError(
            f"expected a column {missing[0]!r}, got {[c for c in table.columns if c not in KEYS]}. {meant}Check the spelling."
        )


@whole_numbers(TableError)
def at_layer(table: pd.DataFrame, layer: int) -> pd.DataFrame:
    """The rows of one layer.

    Raises:
        TableError: the table does not have it.
    """
    require(table, "layer")
    chosen = select(table, table["layer"] == layer)
    if chosen.empty:
        raise TableError(f"expected a layer of the table, got {layer}; it has {sorted(table['layer'].unique().tolist())}.")
    return chosen
