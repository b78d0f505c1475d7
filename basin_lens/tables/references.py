"""The error of a mean that no number of rows makes smaller: that of a reference measured once for all rows of a layer."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float

from basin_lens.tables.frame import described_by_json, provenance, require, runs
from basin_lens.tables.schema import Provenance


def reference_error(table: pd.DataFrame, column: str) -> Float[np.ndarray, " rows"]:
    """For each row, the standard error of the reference that its layer's values of a column are held against.

    A column such as `relative_contraction` is a measurement less the mean of a random sample, one for all rows of a layer. That
    mean's error is one and the same in every row: it does not shrink with rows or documents, and is taken into every interval of a
    layer's mean (`tables.layer_summary`, `stats.mean_interval`, `stats.before_after` and what is made of them), in quadrature, as
    if the sample were another one than the documents'. Where rows of one layer are compared with one another (groups of texts or
    tokens, slopes, ranks, detection), it cancels. A column computed from another under the same name keeps the record;
    one renamed, or under a name of its own, has none until `with_reference_error` gives it one.

    Args:
        table: any table.
        column: one of its columns.

    Returns:
        an error per row, in the column's unit: 0 for a column without a reference, NaN where the error was not measured (texts of a
        single document). In a table without the column `layer`, or of several runs without the column `run`, the largest known;
        so, too, where tables put together have different errors of one column and layer of a run.

    Raises:
        TableError: no such column.

    Example:
        >>> import pandas as pd
        >>> from basin_lens import tables
        >>> facts = tables.Provenance(reference_error={"score": {"0": 0.5, "1": 0.1}})
        >>> table = tables.described(pd.DataFrame({"run": "r", "layer": [0, 1, 1], "score": 0.0}), {"r": facts})
        >>> tables.reference_error(table, "score").tolist()
        [0.5, 0.1, 0.1]
    """
    require(table, column)
    known = {run: facts for run, facts in runs(table).items() if column in (facts.reference_error or {})}
    if not known:
        return np.zeros(len(table))
    keys = [name for name in ("run", "layer") if name in table.columns]
    if not keys:
        return np.full(len(table), _largest(known.values(), column, None))
    codes, there = pd.factorize(pd.MultiIndex.from_frame(table[keys]))
    at: list[float] = []
    for key in there:
        where = dict(zip(keys, key, strict=True))
        held = [facts for run, facts in known.items() if where.get("run", run) == run]
        at.append(_largest(held, column, where.get("layer")))
    return np.array(at)[codes]


def _largest(held: Iterable[Provenance], column: str, layer: object) -> float:
    """A column's largest error at a layer (None: at all of them) in some runs; 0 in none, NaN if one is not known."""
    return float(np.max([0.0, *(facts.error_of_reference(column, layer) for facts in held)]))


def with_reference_error(table: pd.DataFrame, errors: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """The table with these errors, by column and layer, in the provenance of each of its runs; see `reference_error`."""
    held = {
        run: {**facts, "reference_error": {**facts.get("reference_error", {}), **_plain(errors)}}
        for run, facts in provenance(table).items()
    }
    return described_by_json(table, held)


def _plain(errors: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    return {name: {layer: None if np.isnan(e) else float(e) for layer, e in by.items()} for name, by in errors.items()}
