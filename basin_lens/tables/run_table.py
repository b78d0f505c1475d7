"""The table of a run in a folder: a parquet file for each layer, opened without being read."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from basin_lens import records
from basin_lens.errors import TableError
from basin_lens.files import Place, new_folder, write_file
from basin_lens.tables.files import save
from basin_lens.tables.frame import concat, described_by_json, select
from basin_lens.values import KEYS, Facts, Layers, card, did_you_mean, several, truths_of, whole_or_none

if TYPE_CHECKING:
    import pyarrow.dataset

_KIND = records.Kind(
    "the table of a run",
    "basin_lens run table 1",
    "Give the command or the call that made it again, with --fresh (fresh=True): it starts over.",
)
_RECORD = "record.json"
_LAYER = re.compile(r"layer-\d{3,}\.parquet")
_SAYS = re.compile(rb'"format":\s*"basin_lens run table \d+"')  # of any version
_FIELDS: dict[str, records.Expected] = {"run": str, "provenance": dict, "layers": [int], "rows": int, "columns": [str]}


def write_layers(folder: Place, layers: Iterator[tuple[int, pd.DataFrame]], provenance: Facts) -> None:
    """Write a table layer by layer, all of it or nothing.

    Args:
        folder: a new one, or one that holds a table without its record.
        layers: each with its rows, all of one run.
        provenance: of the run, with `made`, which the files of layers do not bear: they are the same, byte by byte, on any day.

    Raises:
        StoreError: the folder holds something else, or cannot be written.
    """
    facts = {name: fact for name, fact in provenance.items() if name != "made"}
    with new_folder(folder, replace=holds_layers_only(folder)) as new:
        files: dict[str, Facts] = {}
        told: Facts = {"layers": []}
        for layer, table in layers:
            run = str(table["run"].iloc[0])
            path = new / f"layer-{layer:03d}.parquet"
            save(table, path, by_run={run: facts})
            files[path.name] = records.digest(path)
            told["layers"].append(layer)
            told |= {"run": run, "rows": len(table), "columns": list(table.columns)}
        write_file(new / _RECORD, _KIND.record({**told, "provenance": dict(provenance)}, files))


def is_table(folder: Place) -> bool:
    """Whether a folder is the finished table of a run."""
    return (Path(folder) / _RECORD).is_file()


def is_own(folder: Place, *, damaged: bool = False) -> bool:
    """Whether a folder holds nothing but the table of a run: the files of its layers, and a record that says so.

    `damaged`: also beside a record that is no JSON, so that it says nothing.
    """
    place = Path(folder)
    try:
        names = {path.name for path in place.iterdir()} - {_RECORD}
        record = (place / _RECORD).read_bytes()
    except OSError:  # not there, no folder, or not to be read
        return False
    says = _SAYS.search(record) is not None or (damaged and bool(names) and not _is_json(record))
    return says and all(_LAYER.fullmatch(name) for name in names)


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def holds_layers_only(folder: Place) -> bool:
    """Whether a folder holds nothing but the files of a table's layers: somebody took its record away."""
    place = Path(folder)
    return place.is_dir() and all(_LAYER.fullmatch(path.name) for path in place.iterdir())


def _place_of(folder: Place) -> Path | None:
    places = [Path(folder).absolute() / "table", Path(folder).absolute()]
    return next((place for place in places if is_table(place)), None)


@dataclass(frozen=True, repr=False)
class RunTable:
    """A table that lies in a folder and is read in parts. `bl.tables.open` makes it.

    Attributes:
        folder: where the files are.
        run: name of the run.
        layers: the layers measured, ascending.
        n_rows: tokens, each a row at every layer.
        columns: names of the columns, in order.
        provenance: of the run, as plain JSON.
        files: size and SHA-256 of each file, by name.
    """

    folder: Path
    run: str
    layers: tuple[int, ...]
    n_rows: int
    columns: tuple[str, ...]
    provenance: Facts
    files: Mapping[str, Facts]

    def __repr__(self) -> str:
        return (
            f"RunTable({self.n_rows} tokens at {len(self.layers)} layers, {len(self.scores)} scores, in {self.folder}; "
            ".load(layers=...) reads it)"
        )

    def _repr_html_(self) -> str:
        told = {
            "tokens": f"{self.n_rows:,}",
            "layers": ", ".join(map(str, self.layers)),
            "scores": ", ".join(self.scores),
            "model": (self.provenance.get("model") or {}).get("name", "?"),
            "in": str(self.folder),
            "read it with": ".load(layers=[...], columns=[...]); .scan() for DuckDB and polars; bl.tables.layer_summary(run)",
        }
        return card("Table of a run", told)

    @cached_property
    def scores(self) -> tuple[str, ...]:
        """The analyzers' columns."""
        known = self.provenance.get("columns") or {}
        return tuple(name for name in self.columns if name in known)

    def check(self) -> None:
        """Prove every file, which else happens when it is loaded.

        Raises:
            StoreError: a file that is missing or was changed.
        """
        for name, facts in self.files.items():
            _KIND.check(self.folder, name, facts)

    def scan(self) -> "pyarrow.dataset.Dataset":
        """The files as a dataset of Arrow, nothing read yet: `duckdb.from_arrow(run.scan())`, `polars.scan_pyarrow_dataset(...)`.

        Raises:
            StoreError: a file that is missing or has another size; `check` proves their content.
        """
        import pyarrow.dataset

        return pyarrow.dataset.dataset([_KIND.check(self.folder, name, facts, content=False) for name, facts in self.files.items()])

    def load(
        self, layers: Layers = None, columns: Sequence[str] | None = None, queries: str | Sequence[object] | None = None
    ) -> pd.DataFrame:
        """A part of the table in memory, with provenance.

        Args:
            layers: of the run; None: all.
            columns: scores to read; None: all. Key columns, labels and `span` are always there.
            queries: rows to take, as for `analyze`: the name of a span, or of a label of True and False (or 1 and 0), or positions;
                None: all.

        Raises:
            TableError: a layer, column, name or position that the run does not have. StoreError: a file that was changed.

        Example:
            >>> import tempfile
            >>> import basin_lens as bl
            >>> model = bl.load_model()
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     run = bl.analyze(model, "The cat sat.", layers=[5], bank="reference", out=folder + "/run", progress=False)
            ...     len(bl.tables.open(folder + "/run").load(columns=["surprisal"], queries=[1, 2]))
            2
        """
        asked = self._asked(layers)
        names = self._names(columns)
        parts = []
        for layer in asked:
            table = self._file(layer, names)
            parts.append(table if queries is None else select(table, _rows_of(table, queries)))
        return concat(parts)

    def by_layer(self, columns: Sequence[str] | None = None) -> Iterator[pd.DataFrame]:
        """The table one layer at a time, for what does not fit into memory; arguments and errors as for `load`."""
        for layer in self.layers:
            yield self.load([layer], columns)

    def _file(self, layer: int, names: list[str]) -> pd.DataFrame:
        import pyarrow.parquet

        name = f"layer-{layer:03d}.parquet"
        with _KIND.reading(self.folder):
            path = _KIND.check(self.folder, name, self.files[name])
            table = pyarrow.parquet.read_table(path, columns=names).to_pandas()
        table.attrs = {}
        return described_by_json(table, {self.run: self.provenance})

    def _asked(self, layers: Layers) -> list[int]:
        if layers is None:
            return list(self.layers)
        found = [whole_or_none(layer) for layer in several(layers) or [layers]]
        if not found or not set(found) <= set(self.layers):
            raise TableError(f"expected layers of the run {list(self.layers)}, got {layers!r}.")
        return sorted({layer for layer in found if layer is not None})

    def _names(self, columns: Sequence[str] | None) -> list[str]:
        if columns is None:
            return list(self.columns)
        if isinstance(columns, str) or not all(name in self.columns for name in columns):
            wrong = columns if isinstance(columns, str) else next(name for name in columns if name not in self.columns)
            raise TableError(
                f"expected a list of columns of the run, got {wrong!r}. {did_you_mean(str(wrong), self.columns)}It has "
                f"{', '.join(self.columns)}."
            )
        return [name for name in self.columns if name not in self.scores or name in columns]


def open(folder: str | os.PathLike[str]) -> RunTable:
    """The table of a run that `analyze(..., out=folder)` or `basin-lens analyze --out` made; nothing is read but its record.

    Raises:
        StoreError: no finished table there, or a damaged one.

    Example:
        >>> import tempfile
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = bl.analyze(model, "The cat sat.", layers=[5], bank="reference", out=folder + "/run", progress=False)
        ...     bl.tables.open(folder + "/run").layers
        (5,)
    """
    place = _place_of(folder)
    if place is None:
        cure = "give the same command again: it goes on where it was" if (Path(folder) / "pieces").is_dir() else "name its folder"
        raise _KIND.error(f"expected the finished table of a run in {str(folder)!r}, got none. If it was interrupted, {cure}.")
    facts = _KIND.read(place / _RECORD, _FIELDS)
    with _KIND.reading(place):
        names = {f"layer-{layer:03d}.parquet" for layer in facts["layers"]}
        if set(facts["files"]) != names or not names:
            raise ValueError("other files than its layers")
        for name, file in facts["files"].items():
            _KIND.check(place, name, file, content=False)
    return RunTable(
        place, facts["run"], tuple(facts["layers"]), facts["rows"], tuple(facts["columns"]), facts["provenance"], facts["files"]
    )


def _rows_of(table: pd.DataFrame, queries: str | Sequence[object]) -> np.ndarray:
    """Rows of the table that a name or positions choose."""
    if isinstance(queries, str):
        if queries in table.columns and queries not in KEYS:
            chosen = np.array(truths_of(table[queries], queries, TableError), bool)
        else:
            chosen = table["span"].map(lambda names: bool(queries) and queries in (names, *str(names).split("+"))).to_numpy(bool)
        if not chosen.any():
            raise TableError(f"expected a label or span of the texts, got {queries!r}, which marks no token.")
        return chosen
    positions = [whole_or_none(one) for one in several(queries) or [queries]]
    if not positions or None in positions:
        raise TableError(f"expected queries as the name of a label or span, or positions, got {queries!r}.")
    if min(position for position in positions if position is not None) < 0:
        raise TableError(f"expected positions from 0 on, got {queries!r}. Count from the start of each sequence.")
    chosen = table["pos"].isin(positions).to_numpy()
    if not chosen.any():
        raise TableError(f"expected positions below {int(table['pos'].max()) + 1}, got {positions[:8]}.")
    return chosen
