"""Tables as files: parquet with provenance and a seal, or CSV."""

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from basin_lens import records
from basin_lens.errors import StoreError, TableError
from basin_lens.files import write_file
from basin_lens.tables.frame import described_by_json, in_memory, provenance, without_provenance
from basin_lens.values import Facts

_METADATA, _SEAL = b"basin_lens.provenance", b"basin_lens.seal"
_OF_PANDAS = b"PANDAS_ATTRS"  # where `pandas.read_parquet` looks for a table's `attrs`, as JSON
_KIND = records.Kind("a table saved by basin_lens", "basin_lens table 1", "Make the table again.")


def save(table: pd.DataFrame, path: str | os.PathLike[str], *, by_run: Mapping[str, Facts] | None = None) -> None:
    """Write a table with its provenance to one `.parquet` file, all of it or nothing.

    `load` reads it, and refuses it if it was changed; `pandas.read_parquet` reads it too, provenance in `attrs` and all.

    Args:
        table: with provenance, unless `by_run` is given.
        path: ending in `.parquet`.
        by_run: plain JSON by run, to keep in place of the table's own provenance.

    Raises:
        StoreError: another suffix, or the place cannot be written.
        TableError: a column (added by hand) that parquet cannot hold, as text beside numbers.
    """
    import pyarrow
    import pyarrow.parquet

    target = Path(path)
    if target.suffix != ".parquet":
        raise StoreError(f"expected a file name ending in .parquet, got {target.name!r}.")
    try:
        arrow = pyarrow.Table.from_pandas(without_provenance(table), preserve_index=False)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise TableError(
            f"expected columns of one kind each (text, numbers, truth values), got: {' '.join(str(error).split())}. "
            "Convert the column."
        ) from error
    try:
        facts = json.dumps(provenance(table if by_run is None else described_by_json(table, by_run)))
    except TypeError as error:
        raise TableError(
            f"expected provenance in plain values (text, numbers, lists), got: {error}. Convert what you added."
        ) from error
    own = {_METADATA: facts.encode(), _OF_PANDAS: f'{{"provenance": {facts}}}'.encode()}
    sealed = {**own, b"basin_lens.format": _KIND.format.encode(), _SEAL: records.OPEN_SEAL.encode()}
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **sealed})

    def fill(path: records.Unfinished) -> None:
        # Page checksums are for other readers: the seal is of every byte.
        pyarrow.parquet.write_table(arrow, path, write_page_checksum=True)
        records.seal_file(path)

    write_file(target, fill)


def save_csv(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    r"""Write a table as CSV (without provenance), all of it or nothing.

    Text is quoted, numbers are not, and a missing value is an empty cell: a token that is a line end, `null` or `NA` comes back
    as it was with the reading call below (name the columns of numbers that may have gaps; without these options, pandas takes
    such tokens for missing values).

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
    in_memory(table)
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
        StoreError: no such file, a folder, one that was changed since, or one without provenance or digest (of another program, or
            an earlier version).
    """
    import pyarrow
    import pyarrow.parquet

    if Path(path).is_dir():
        raise StoreError(f"expected a .parquet file, got the folder {str(path)!r}. Of a run: bl.tables.open(folder).load().")
    with _KIND.reading(path):
        content = Path(path).read_bytes()
        _KIND.check_sealed(io.BytesIO(content), path)
        arrow = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        facts = json.loads((arrow.schema.metadata or {})[_METADATA])
        records.fields(facts, dict.fromkeys(facts, dict))
        table = arrow.to_pandas()
    return described_by_json(table, facts)
