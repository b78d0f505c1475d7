"""Tidy tables: one row per (layer, token), column names, provenance, and files that keep both."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from basin_lens import records
from basin_lens.distinct import documents_once
from basin_lens.errors import StoreError, TableError
from basin_lens.files import write_file
from basin_lens.values import KEYS, whole_numbers

_METADATA, _SEAL = b"basin_lens.provenance", b"basin_lens.seal"
_KIND = records.Kind("a table saved by basin_lens", "basin_lens table 1", "Make the table again.")


def build(
    rows: Mapping[str, Sequence[Any] | np.ndarray],
    labels: Mapping[str, Sequence[Any]],
    layers: Sequence[int],
    values: Mapping[str, np.ndarray],
    provenance: Mapping[str, Any],
) -> pd.DataFrame:
    """The table of one run.

    Args:
        rows: what is known of each token, by the names in `KEYS` except `run` and `layer`, and `span`; `n` entries each.
        labels: label columns, `n` entries each.
        layers: the layers measured.
        values: analyzer columns, `[len(layers), n]`.
        provenance: plain JSON; the run's name is its hash.

    Raises:
        TableError: two columns of one name.
    """
    check_names([*labels, *values])
    run = hashlib.blake2b(json.dumps(provenance, sort_keys=True).encode(), digest_size=5).hexdigest()
    count = len(rows["token"])
    data: dict[str, Any] = {"run": np.full(len(layers) * count, run), "layer": np.repeat(np.asarray(layers), count)}
    for name in KEYS[2:]:
        data[name] = _tiled(rows[name], len(layers))
    for name, column in labels.items():
        data[name] = _tiled(column, len(layers))
    data["span"] = _tiled(rows["span"], len(layers))
    for name, value in values.items():
        data[name] = value.reshape(-1).astype(np.float64)
    table = pd.DataFrame(data)
    table.attrs["provenance"] = {run: dict(provenance)}
    return table


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


def _tiled(column: Sequence[Any] | np.ndarray, times: int) -> Any:
    if isinstance(column, np.ndarray):
        return np.tile(column, times)
    return pd.concat([pd.Series(list(column))] * times, ignore_index=True)


def provenance(table: pd.DataFrame) -> dict[str, Any]:
    """Provenance by run.

    Raises:
        TableError: the table has none (pandas drops it on merge: use `basin_lens.tables`).
    """
    found = table.attrs.get("provenance")
    if not isinstance(found, dict) or not found:
        raise TableError("expected a table with provenance, got one without. Keep it through basin_lens.tables.save/load/concat.")
    return found


def scores(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The analyzers' columns in the table: unit, range and rows by name, in table order."""
    known: dict[str, dict[str, Any]] = {}
    for facts in provenance(table).values():
        known |= facts["columns"]
    return {name: known[name] for name in table.columns if name in known}


def require(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table without these columns.

    Raises:
        TableError: one is missing; the columns there are named.
    """
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise TableError(
            f"expected a column {missing[0]!r}, got {[c for c in table.columns if c not in KEYS]}. Check the spelling."
        )


@whole_numbers(TableError)
def at_layer(table: pd.DataFrame, layer: int) -> pd.DataFrame:
    """The rows of one layer.

    Raises:
        TableError: the table does not have it.
    """
    require(table, "layer")
    chosen = table[table["layer"] == layer]
    if chosen.empty:
        raise TableError(f"expected a layer of the table, got {layer}; it has {sorted(table['layer'].unique().tolist())}.")
    return chosen


def layer_summary(table: pd.DataFrame, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """One row per layer: mean of each score with its 95 % interval over documents, how much is NaN, and the reliability.

    Tokens are averaged within a sequence, sequences within a document; the interval is Student's t over document means, and NaN
    with fewer than two documents. Of texts that are copies of one another, one counts.
    `<score>_reliability` is the Spearman correlation of the score over disjoint halves of the
    neighbors (only for scores that have one).

    Args:
        table: from `analyze`, of one run.
        columns: scores; None: all.

    Returns:
        columns `layer`, `n_documents`, `n_sequences`, `n_tokens`, then per score `_mean`, `_low`, `_high`, `_nan` (share of tokens) and
        `_reliability`.

    Raises:
        TableError: several runs, or an unknown column.
    """
    names = list(scores(table)) if columns is None else list(columns)
    require(table, *names)
    runs = table["run"].unique().tolist()
    if len(runs) != 1:
        raise TableError(f"expected a table of one run, got {len(runs)}. Summarize each: table[table.run == ...].")
    reliability = provenance(table)[runs[0]].get("reliability", {})
    # One text several times is one document: its copies would narrow the interval.
    found = documents_once(table)
    attrs = table.attrs
    table = table.assign(_document=found.documents)[found.keep]
    table.attrs = attrs
    by_sequence = table.groupby(["layer", "_document", "doc", "seq"], sort=True)[names].mean()
    by_document = by_sequence.groupby(level=["layer", "_document"]).mean()
    lines = []
    for layer, group in table.groupby("layer", sort=True):
        line: dict[str, Any] = {
            "layer": layer,
            "n_documents": group["_document"].nunique(),
            "n_sequences": group["seq"].nunique(),
            "n_tokens": len(group),
        }
        for name in names:
            means = by_document[name].xs(layer, level="layer").dropna()
            low, high = interval(means.to_numpy())
            line |= {
                f"{name}_mean": means.mean() if len(means) else np.nan,
                f"{name}_low": low,
                f"{name}_high": high,
                f"{name}_nan": float(group[name].isna().mean()),
            }
            if name in reliability:
                value = reliability[name].get(str(layer))
                line[f"{name}_reliability"] = np.nan if value is None else value
        lines.append(line)
    return pd.DataFrame(lines)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of independent values; NaN with fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    error = stats.sem(values)
    if error == 0:
        return float(values.mean()), float(values.mean())
    low, high = stats.t.interval(level, len(values) - 1, loc=values.mean(), scale=error)
    return float(low), float(high)


def concat(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables under one another, with the provenance of all their runs.

    Raises:
        TableError: no tables.
    """
    if not tables:
        raise TableError("expected at least one table, got none.")
    joined: dict[str, Any] = {}
    bare = []
    for table in tables:
        joined |= provenance(table)
        copy = table.copy()
        copy.attrs = {}
        bare.append(copy)
    answer = pd.concat(bare, ignore_index=True)
    answer.attrs["provenance"] = joined
    return answer


def save(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table with its provenance to one `.parquet` file, all of it or nothing.

    Raises:
        StoreError: another suffix, or the place cannot be written.
        TableError: a column (added by hand) that parquet cannot hold, as text beside numbers.
    """
    import pyarrow
    import pyarrow.parquet

    target = Path(path)
    if target.suffix != ".parquet":
        raise StoreError(f"expected a file name ending in .parquet, got {target.name!r}.")
    bare = table.copy()
    bare.attrs = {}
    try:
        arrow = pyarrow.Table.from_pandas(bare, preserve_index=False)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise TableError(
            f"expected columns of one kind each (text, numbers, truth values), got: {' '.join(str(error).split())}. Convert the column."
        ) from error
    try:
        facts = json.dumps(provenance(table)).encode()
    except TypeError as error:
        raise TableError(
            f"expected provenance in plain values (text, numbers, lists), got: {error}. Convert what you added."
        ) from error
    sealed = {_METADATA: facts, b"basin_lens.format": _KIND.format.encode(), _SEAL: records.OPEN_SEAL.encode()}
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **sealed})

    def fill(path: Path) -> None:
        # Page checksums are for other readers: the seal is of every byte.
        pyarrow.parquet.write_table(arrow, path, write_page_checksum=True)
        records.seal_file(path)

    write_file(target, fill)


def save_csv(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    r"""Write a table as CSV (without provenance), all of it or nothing.

    Text is quoted, numbers are not, and a missing value is an empty cell: a token that is a line end, `null` or `NA` comes back as it was with the
    reading call below (name the columns of numbers that may have gaps; without these options, pandas takes such tokens for missing values).

    Raises:
        StoreError: the place cannot be written.

    Example:
        >>> import tempfile
        >>> import pandas as pd
        >>> from basin_lens import tables
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = pd.DataFrame({"token": ["\r", "null", "NA"], "surprisal": [None, 1.5, 2.0]})
        ...     tables.save_csv(table, f"{folder}/table.csv")
        ...     back = pd.read_csv(f"{folder}/table.csv", keep_default_na=False, na_values={"surprisal": [""]})
        >>> back.equals(table)
        True
    """
    write_file(path, csv_text(table))


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV, all text quoted; see `save_csv` for how to read it."""
    return str(table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"))


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a table that `save` of this or an earlier version wrote, whole or not; quick: its footer is read."""
    import pyarrow
    import pyarrow.parquet

    try:
        return _METADATA in (pyarrow.parquet.read_schema(path).metadata or {})
    except (OSError, pyarrow.ArrowException):
        return False


def load(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a table that `save` wrote, as it was written.

    Raises:
        StoreError: no such file, one that was changed since, or one without provenance or digest (of another program, or an earlier version).
    """
    import pyarrow
    import pyarrow.parquet

    with _KIND.reading(path):
        content = Path(path).read_bytes()
        _KIND.check_sealed(io.BytesIO(content), path)
        arrow = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        facts = json.loads((arrow.schema.metadata or {})[_METADATA])
        records.fields(facts, dict.fromkeys(facts, dict))
        table = arrow.to_pandas()
    table.attrs["provenance"] = facts
    return table
