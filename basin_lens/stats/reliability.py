"""How large a correlation can be at most, given how reliable a score is."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.stats.design import WhichLayers, asked_layers, check_run, names_of


def reliability_bound(
    table: pd.DataFrame, scores: str | Sequence[str], against: str | None = None, *, layers: WhichLayers = None
) -> pd.DataFrame:
    """The largest correlation that a score of this reliability can show: an attenuated bound.

    r = 2 h / (1 + h), h = split-half Spearman over disjoint halves of the neighbors;  |rho| <= sqrt(r_score r_against)

    Halves have half the neighbors; 2 h / (1 + h) is what the whole set makes of it (Spearman-Brown). A column without a known
    reliability (surprisal, norms) counts as measured without error. Reliability is over all tokens of a layer: within sequences, it
    may be less.

    Args:
        table: from `analyze`, of one run, with provenance.
        scores: columns.
        against: the other column of the correlation; None: any, measured without error.
        layers: which; None: all.

    Returns:
        one row per (layer, score): `layer, score, against, split_half, reliability, bound`. NaN where provenance has no
        reliability; 0 where the halves do not agree at all.

    Raises:
        TableError: several runs, no provenance, missing columns.

    Source: Spearman 1904; Spearman 1910 and Brown 1910.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"run": "r", "layer": [5, 5], "compression": [0.1, 0.2]})
        >>> table = bl.tables.described(table, {"r": bl.tables.Provenance(reliability={"compression": {"5": 0.6}})})
        >>> bl.stats.reliability_bound(table, "compression").bound.round(3).tolist()
        [0.866]
    """
    check_run(table)
    names = names_of(scores)
    tables.require(table, "layer", *names, *([] if against is None else [against]))
    tables.provenance(table)
    lines = []
    for layer in sorted(table["layer"].unique().tolist()) if layers is None else asked_layers(table, layers):
        for score in names:
            known = {"split_half": _half(table, score, layer), **bounds(table, score, against, layer)}
            lines.append({"layer": layer, "score": score, "against": against, **known})
    return pd.DataFrame(lines)


def bounds(table: pd.DataFrame, score: str, against: str | None, layer: object) -> dict[str, float]:
    """`reliability` of the score and `bound` of its correlation with the other column; NaN where unknown."""
    first = _whole(_half(table, score, layer))
    second = np.nan if against is None else _whole(_half(table, against, layer))
    known = [value for value in (first, second) if not np.isnan(value)]
    return {"reliability": first, "bound": float(np.sqrt(np.prod(known))) if known else float("nan")}


def _half(table: pd.DataFrame, score: str, layer: object) -> float:
    found = [run.half_reliability(score, layer) for run in tables.runs(table).values()]
    return found[0] if len(found) == 1 else float("nan")


def _whole(half: float) -> float:
    """Spearman-Brown; halves that disagree say nothing: 0."""
    if np.isnan(half):
        return half
    return 2 * half / (1 + half) if half > 0 else 0.0
