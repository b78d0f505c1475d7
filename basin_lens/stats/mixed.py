"""A score explained by another column and the standard controls at once, with a random level for each sequence."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import optimize

from basin_lens.stats.covariates import CONTROLS, Frequency, Selection, varied
from basin_lens.stats.design import FEWEST_CLUSTERS, Rows, WhichLayers, enough, names_of, refuse_constant
from basin_lens.stats.projection import EXPLAINED, IN_FULL, STRAIGHT, curves, in_full, project
from basin_lens.stats.remembering import sharing
from basin_lens.stats.results import Correction, Line, Procedure, assemble, clustered_slope, joined

_FEW_ROWS = 5  # for each term; with fewer, the jackknife's errors


@sharing()
def mixed_model(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    against: str | None = None,
    *,
    controls: Sequence[str] = CONTROLS,
    frequency: Frequency | None = None,
    layers: WhichLayers = None,
    unit: str = "document",
    all_terms: bool = False,
    smooth: bool = True,
    correction: Correction = "bh",
) -> pd.DataFrame:
    """What explains a score: another column, or what it is confounded with?

    score_si = a + u_s + b against_si + c controls_si + s(controls_si) + e_si, all columns standardized, u_s a random level of
    sequence s

    Variance components by restricted maximum likelihood. Errors are cluster-robust by unit, with Student's t on units - 1 degrees
    of freedom: an effect that differs from text to text does not make them too small, as the model's own would be. With fewer than
    5 rows for each term, the jackknife's over units.

    Args:
        table: from `analyze`, of one run.
        scores: columns to explain.
        against: the column of interest; None: the controls are.
        controls: standard controls (those that the table lacks are passed over, and the note says so), or columns of the table.
        frequency: as for `add_controls`.
        layers: which; None: all.
        unit: what is independent: `"sequence"`, `"document"` or a label.
        all_terms: rows for the controls too, each at fixed other columns.
        smooth: a smooth function s of each column that is held fixed, besides a straight line (see
            `basin_lens.stats.projection.curves`); where tokens are too few, straight lines alone, and the note says so.
        correction: over all rows of the answer, `"bh"`, `"holm"` or `"none"`.

    Returns:
        one row per (layer, score, term): the standardized beta with its 95 % interval and p; `partial_r2`, the share of the
        variance left by the other terms that this one explains; `icc`, the share of the variance left by all terms that is between
        sequences; `left`, the share of the variance that the other terms leave of the score or of the term, whichever is less.
        Where they explain one in full: NaN and a note.

    Raises:
        TableError: several runs, missing columns, a column that is constant at every layer, nothing to explain the score with.
        StudyError: fewer than 10 units.

    Source: Laird and Ware 1982 (as MixedLM of statsmodels); errors after Liang and Zeger 1986; partial R2 after Edwards et al.
        2008.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> table = pd.DataFrame({"doc": np.repeat(range(20), 30), "seq": np.repeat(range(20), 30), "pos": np.tile(range(30), 20)})
        >>> table["a"] = 0.1 * table.pos + rng.normal(size=600)
        >>> bl.stats.mixed_model(table, "a", controls=["position"]).term.tolist()
        ['position']
    """
    names = names_of(scores)
    procedure = Procedure(unit, "mixed model, cluster-robust t-test", "standardized beta")
    selection = Selection(controls, frequency, layers, unit)
    lines = []
    for score in names:
        own = [score] if against is None else [score, against]
        held = selection.given(table, own)
        terms = names_of([*own[1:], *held.names], "explaining columns")
        for every in selection.split(held.table, [score, *terms]):
            rows = every.finite(score, *terms)
            enough(rows.counts()["n_units"], FEWEST_CLUSTERS, f"units ({unit}) for cluster-robust errors")
            given: Line = {"against": against, "controls": ", ".join(held.names)}
            given |= dict.fromkeys(("partial_r2", "icc", "left"), np.nan)
            flat = rows.constant_column(*own)
            if flat is not None:
                lines.append(procedure.constant_line(rows, score, flat, **given, term=against))
                continue
            here, said = varied(rows, terms)
            for name in here if all_terms or against is None else [against]:
                found = _fit(rows, score, name, [c for c in here if c != name], smooth)
                note = joined(held.note, said, str(found["note"]))
                lines.append(procedure.line(rows, score, **given | found | {"note": note}))
    refuse_constant(lines, [*names, *([] if against is None else [against])])
    return assemble(table, lines, correction)


def _fit(rows: Rows, score: str, term: str, others: Sequence[str], smooth: bool) -> Line:
    """The beta of one term, others held fixed."""
    pair = np.stack([rows.values[name] for name in (score, term)], 1)
    pair = (pair - pair.mean(0)) / pair.std(0)
    whole, told, notes, terms = np.zeros(len(pair), int), [False, False], "", np.empty((len(pair), 0))
    if others:
        straight = np.stack([rows.values[name] for name in others], 1)
        told = in_full(pair, straight, whole, copies=smooth)
        bent = curves(list(straight.T), len(pair) - len(others)) if smooth else None
        terms = straight if bent is None else np.column_stack([straight, *bent])
        notes = STRAIGHT if smooth and bent is None else ""
    left = project(pair, terms, whole)
    for column, name in enumerate((score, term)):
        if told[column] or not left.of(column):
            return {"term": term, "left": 0.0, "note": f"{name}: {EXPLAINED}"}
    one, other = left.values.T
    if 1 - (one @ other) ** 2 / (one @ one) / (other @ other) <= IN_FULL:
        perfect = {"term": term, "estimate": float(one @ other / (other @ other)), "partial_r2": 1.0}
        note = joined(notes, "a perfect fit: no interval and no p")
        return perfect | {"left": float(left.share.min()), "note": note}
    y, x = pair[:, 0], np.column_stack([np.ones(len(pair)), pair[:, 1], left.basis * np.sqrt(len(pair))])
    ratio = level_ratio(y, x, rows.sequence)
    y, x = freed(y, x, rows.sequence, ratio)
    left = project(np.column_stack([y, x[:, 1]]), np.delete(x, 1, 1), None)
    few = len(pair) < _FEW_ROWS * (left.basis.shape[1] + 1)
    found = clustered_slope(left.values[:, 0], left.values[:, 1], rows.unit, left.basis.shape[1], left.basis if few else None)
    answer = {"term": term, "icc": ratio / (1 + ratio), "left": float(left.share.min())}
    return answer | found.columns() | {"note": joined(notes, found.note)}


def level_ratio(y: Float[np.ndarray, " rows"], x: Float[np.ndarray, "rows terms"], groups: np.ndarray) -> float:
    """Variance between groups, in units of the variance within, given the terms; by restricted maximum likelihood.

    statsmodels' MixedLM has this too. But it takes 0.2 s where this takes a millisecond, and on data with little variance between
    groups its default optimizers stop short of the maximum or fall to 0; only its slowest (Powell) agrees, which a test checks.
    With one random level, the likelihood has one parameter left to search.
    """
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    held = np.column_stack([x, y])
    means = np.stack([np.bincount(inverse, weights=column) / sizes for column in held.T], 1)
    rest = held - means[inverse]
    within, freedom = rest.T @ rest, len(y) - x.shape[1]
    within[-1, -1] += 1e-12 * (y @ y)  # where the terms leave nothing of y, its logarithm must end somewhere

    def loss(ratio: float) -> float:
        products = within + (means * (sizes / (1 + sizes * ratio))[:, None]).T @ means
        size = np.diag(np.linalg.cholesky(products))  # its last: the root of what the terms leave of y
        return float(2 * freedom * np.log(size[-1]) + np.log1p(sizes * ratio).sum() + 2 * np.log(size[:-1]).sum())

    ratios = np.r_[0.0, np.logspace(-6, 4, 21)]
    losses = [loss(ratio) for ratio in ratios]
    best = int(np.argmin(losses))
    bounds = ratios[max(0, best - 1)], ratios[min(len(ratios) - 1, best + 1)]
    found = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9 + 1e-6 * bounds[1]})
    return float(found.x if found.fun < losses[best] else ratios[best])


def freed(
    y: Float[np.ndarray, " rows"], x: Float[np.ndarray, "rows terms"], groups: np.ndarray, ratio: float
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, "rows terms"]]:
    """Both sides less a share of their group means, so that ordinary least squares gives the mixed model's estimates."""
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    share = (1 - 1 / np.sqrt(1 + sizes * ratio))[inverse]

    def less(column: np.ndarray) -> np.ndarray:
        return np.asarray(column - share * (np.bincount(inverse, weights=column) / sizes)[inverse])

    return less(y), np.stack([less(column) for column in x.T], 1)
