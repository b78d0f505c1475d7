"""The slope of a score's ranks on another column's, with errors that know texts."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from basin_lens.stats.association import NEARLY, nearly
from basin_lens.stats.covariates import Frequency, Selection, by_layer, varied
from basin_lens.stats.design import FEWEST_CLUSTERS, Rows, WhichLayers, enough, names_of, pairs_of, refuse_constant
from basin_lens.stats.projection import (
    EXPLAINED,
    IN_FULL_OF_RANKS,
    beside,
    curves_of_ranks,
    grouped,
    in_full,
    left_of_values,
    levels,
    places,
    project,
    ranks_within,
    with_indexes,
)
from basin_lens.stats.remembering import sharing
from basin_lens.stats.results import Correction, Line, Procedure, assemble, clustered_slope, joined

_UNITS_PER_INDEX = 5  # beyond the controls; with fewer texts, what the controls say at once is not held fixed besides


@sharing()
def rank_regression(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    against: str | Sequence[str],
    *,
    controls: Sequence[str] = (),
    frequency: Frequency | None = None,
    layers: WhichLayers = None,
    unit: str = "document",
    within: bool = True,
    smooth: bool = True,
    correction: Correction = "bh",
) -> pd.DataFrame:
    """Regression of a score's ranks on another column's ranks, with errors that allow any dependence within a unit.

    rank(score) = a + b rank(against) + c rank(controls) + s(controls)

    Cluster-robust covariance, Student's t with units - 1 degrees of freedom.

    Against `within_sequence_correlation`, long sequences weigh more, and short ones are not lost. Where controls leave little,
    ranks have the excess that `partial_correlation` tells of (here 11 % at .08, 27 % at .03, 51 % at .02), and the note says so.

    Between texts (`within=False`), errors are the jackknife's. Of 48 texts with nothing in common but a control, 5 to 12 % passed
    with two controls, 9 to 10 % with one that bends, 27 % where two leave of a score what differs within texts alone; of 12 texts,
    12 %. The note says where curves are coarse, or lines straight.

    Args:
        table, scores, against, controls, frequency, layers, unit, correction: as for `within_sequence_correlation`; no max-t.
        within: rank within each sequence, less the sequence mean, so that differences between texts play no part; False: rank over
            all tokens.
        smooth: a smooth function s of each control besides (see `basin_lens.stats.projection.curves`); where tokens are too few,
            straight lines alone, and the note says so.

    Returns:
        one row per (layer, score, against): the standardized slope b, its interval, p, and `partial_r2`, the share of the variance
        left by the controls that `against` explains; `left` as for `within_sequence_correlation`. Where the controls explain a
        column in full: NaN and a note.

    Raises:
        TableError: several runs, missing columns, a column that is constant at every layer. StudyError: fewer than 10 units.

    Source: Iman and Conover 1979 (ranks); Liang and Zeger 1986 (errors), by statsmodels.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> table = pd.DataFrame({"doc": np.repeat(range(20), 30), "seq": np.repeat(range(20), 30), "a": rng.normal(size=600)})
        >>> table["b"] = table.a + rng.normal(size=600)
        >>> bool(0.5 < bl.stats.rank_regression(table, "b", "a").estimate[0] < 0.9)
        True
    """
    procedure = Procedure(unit, "rank regression, cluster-robust t-test", "standardized slope of ranks")

    def of(rows: Rows, pair: tuple[str, str], there: list[str], note: str) -> Line:
        enough(rows.counts()["n_units"], FEWEST_CLUSTERS, f"units ({unit}) for cluster-robust errors")
        given: Line = {"against": pair[1], "controls": ", ".join(there), "partial_r2": np.nan, "left": np.nan}
        flat = rows.constant_column(*pair)
        ranks = _ranks(rows, [*pair, *there], within)
        if flat is None and not (ranks[:, :2].std(0) > 0).all():
            flat = pair[int(np.argmin(ranks[:, :2].std(0)))]
        if flat is not None:
            return procedure.constant_line(rows, pair[0], flat, **given)
        here, said = varied(rows, there)
        kept = [0, 1, *(2 + there.index(name) for name in here)]
        found = _rank_slope(rows, ranks[:, kept], [*pair, *here], within, smooth)
        return procedure.line(rows, pair[0], **given | found | {"note": joined(note, said, str(found["note"]))})

    lines = by_layer(table, pairs_of(scores, against), Selection(controls, frequency, layers, unit), of)
    refuse_constant(lines, [*names_of(scores), *names_of(against)])
    return assemble(table, lines, correction)


def _ranks(rows: Rows, names: Sequence[str], within: bool) -> Float[np.ndarray, "rows columns"]:
    if not within:
        return np.stack([ranks_within(rows.values[name], np.zeros(len(rows.sequence), int)) for name in names], 1)
    # As shares of the sequence: in a long one, a rank is worth less.
    sizes = np.unique(rows.sequence, return_inverse=True, return_counts=True)
    held = np.stack([ranks_within(rows.values[name], rows.sequence) for name in names], 1) / (sizes[2][sizes[1]] + 1.0)[:, None]
    return held - levels(rows.sequence, held)


def _rank_slope(rows: Rows, ranks: Float[np.ndarray, "rows columns"], names: Sequence[str], within: bool, smooth: bool) -> Line:
    """The standardized slope of the first column's ranks on the second's, given the others."""
    codes = rows.sequence if within else np.zeros(len(ranks), int)
    there = names[2:]
    notes, bent, straight = [], None, np.empty((len(ranks), 0))
    if there:
        given = np.stack([rows.values[name] for name in there], 1)
        told = in_full(np.stack([rows.values[name] for name in names[:2]], 1), given, codes, copies=True)
        # Between texts, each text says one thing of a curve, however many tokens it has.
        free = len(ranks) - len(np.unique(codes)) - len(there) if within else len(np.unique(rows.unit)) - len(there)
        held = with_indexes(rows, names, codes, smooth=smooth and within)
        bent, said = curves_of_ranks(held, free, rows.sequence if within else None) if smooth else (None, "")
        notes.append(said)
        if bent is None and len(held) > len(there) and free >= 2 * _UNITS_PER_INDEX:
            straight = places(held[-2:], codes)
        if any(told):
            return {"left": 0.0, "note": f"{names[told.index(True)]}: {EXPLAINED}"}
    own, *more = [straight] if bent is None else grouped(bent, len(there))
    left = project(ranks[:, :2], beside(ranks[:, 2:], own), codes, None, *more)
    if there and left.share.min() <= IN_FULL_OF_RANKS:
        return {"left": float(left.share.min()), "note": f"{names[int(left.share.argmin())]}: {EXPLAINED}"}
    # Between texts there are few of them for each term.
    whole = None if within else np.column_stack([left.basis, np.full(len(ranks), 1 / np.sqrt(len(ranks)))])
    found = clustered_slope(left.values[:, 0], left.values[:, 1], rows.unit, left.basis.shape[1] + 1, whole)
    size = ranks[:, 1].std() / ranks[:, 0].std()
    answer = found.columns() | {"estimate": found.estimate * size, "low": found.low * size, "high": found.high * size}
    if there:
        share = min(float(left.share.min()), left_of_values(rows, names, codes, smooth))
        answer["left"] = share
        notes += [nearly(share) + ": see partial_correlation"] if share < NEARLY else []
    return answer | {"note": joined(*notes, found.note)}
