"""Means of scores by layer, with their intervals over documents."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from basin_lens.errors import TableError
from basin_lens.tables.distinct import documents_once
from basin_lens.tables.frame import assign, provenance, require, scores, select
from basin_lens.tables.references import reference_error
from basin_lens.tables.run_table import RunTable
from basin_lens.tables.schema import Provenance


def layer_summary(table: pd.DataFrame | RunTable, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """One row per layer: mean of each score with its 95 % interval over documents, how much is NaN, and the reliability.

    Tokens are averaged within a sequence, sequences within a document; the interval is Student's t over document means, and NaN
    with fewer than two documents. Of texts that are copies of one another, one counts. The error of a score's reference (see
    `tables.reference_error`) is in its interval.
    `<score>_reliability` is the Spearman correlation of the score over disjoint halves of the neighbors (only for scores that have
    one). `<score>_local`, of a score that crosses groups of tokens, is the median variance of its neighborhoods over that of random
    sets: how local a "neighborhood" is.

    Args:
        table: from `analyze`, of one run, in memory or in a folder (then a layer at a time is read); or from `compare`, of runs
            with the same layers.
        columns: scores; None: all that provenance describes. Of a table from `compare`: `difference`, `<score>_a`, `<score>_b`.

    Returns:
        columns `layer`, `n_documents`, `n_sequences`, `n_tokens`, then per score `_mean`, `_low`, `_high`, `_nan` (share of tokens)
        and `_reliability`; `_reference_error` of a score that has a reference; `_local` (ratio) of one that crosses groups.

    Raises:
        TableError: several runs, or an unknown column.
    """
    if isinstance(table, RunTable):
        return pd.concat([layer_summary(part, columns) for part in table.by_layer(columns)], ignore_index=True)
    names = list(scores(table)) if columns is None else list(columns)
    require(table, *names, "layer", "doc", "seq")
    facts = _facts(table)
    # One text several times is one document: its copies would narrow the interval.
    found = documents_once(table)
    table = select(assign(table, _document=found.documents), found.keep)
    of_reference = {name: reference_error(table, name) for name in names if name in (facts.reference_error or {})}
    by_sequence = table.groupby(["layer", "_document", "doc", "seq"], sort=True)[names].mean()
    by_document = by_sequence.groupby(level=["layer", "_document"]).mean()
    lines = []
    for layer, group in table.groupby("layer", sort=True):
        line: dict[str, object] = {
            "layer": layer,
            "n_documents": group["_document"].nunique(),
            "n_sequences": group["seq"].nunique(),
            "n_tokens": len(group),
        }
        for name in names:
            means = by_document[name].xs(layer, level="layer").dropna()
            error = of_reference[name][(table["layer"] == layer).to_numpy()].max() if name in of_reference else 0.0
            low, high = interval(means.to_numpy(), error=error)
            line |= {
                f"{name}_mean": means.mean() if len(means) else np.nan,
                f"{name}_low": low,
                f"{name}_high": high,
                f"{name}_nan": float(group[name].isna().mean()),
            }
            if name in (facts.reliability or {}):
                line[f"{name}_reliability"] = facts.half_reliability(name, layer)
            if np.isfinite(local := facts.local(name, layer)):
                line[f"{name}_local"] = local
            if name in of_reference:
                line[f"{name}_reference_error"] = float(error)
        lines.append(line)
    return pd.DataFrame(lines)


def _facts(table: pd.DataFrame) -> Provenance:
    """What is known of the one run; of the pairs of two runs, only the errors of references, which both records have alike."""
    held = {run: Provenance.from_json(facts) for run, facts in provenance(table).items()}
    if "run" not in table.columns:
        return Provenance(reference_error=next(iter(held.values())).reference_error)
    runs = table["run"].unique().tolist()
    if len(runs) != 1:
        raise TableError(f"expected a table of one run, got {len(runs)}. Summarize each: table[table.run == ...].")
    return held[runs[0]]


def interval(values: np.ndarray, level: float = 0.95, error: float = 0.0) -> tuple[float, float]:
    """Student's t interval of the mean of independent values; NaN with fewer than two.

    `error`: a standard error that all values share (see `tables.reference_error`), added in quadrature to that of their mean.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    wide = float(np.hypot(stats.sem(values), error) * stats.t.isf((1 - level) / 2, len(values) - 1))
    return float(values.mean()) - wide, float(values.mean()) + wide
