"""Two groups of texts, two kinds of tokens in the same texts, or the same texts before and after."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from basin_lens.errors import StudyError, TableError
from basin_lens.stats.covariates import Controlled, Frequency, Selection, varied
from basin_lens.stats.design import (
    FEWEST,
    FEWEST_PER_GROUP,
    Rows,
    WhichLayers,
    constant,
    enough,
    names_of,
    refuse_constant,
    split,
)
from basin_lens.stats.paired import SIZES, Parts, differences, in_both, paired_test, slopes
from basin_lens.stats.remembering import sharing
from basin_lens.stats.results import (
    Correction,
    Line,
    Procedure,
    assemble,
    constant_values,
    joined,
    max_t_labels,
    max_t_signs,
    shared_error,
    side_by_side,
    toned,
)
from basin_lens.stats.unpaired import controlled_test, labels_of, unpaired_test
from basin_lens.values import whole_numbers


@whole_numbers(TableError)
@sharing()
def compare_groups(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    group: str,
    *,
    groups: Sequence[object] | None = None,
    paired: bool = False,
    controls: Sequence[str] = (),
    frequency: Frequency | None = None,
    layers: WhichLayers = None,
    unit: str = "document",
    correction: Correction = "bh",
    n_resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Do two groups differ in a score? By permutation of whole units.

    Tokens are averaged within a sequence, sequences within a unit. Unpaired (memorized against novel texts): labels are exchanged
    between units; statistic: Welch's t. Paired (function against content words, or two spans, in the same texts): the difference
    within each sequence; signs of units are flipped. The error of a score's reference is the same in both groups, and cancels.

    Args:
        table: from `analyze`, of one run, or from `compare` (score `difference`) with a label.
        scores: columns to test.
        group: label column; rows without a label are passed over.
        groups: two of its values, (first, second); None: its only two, True before False, else in order.
        paired: whether both groups are compared within each sequence.
        controls: standard controls (those that the table lacks are passed over) or columns of the table; the answer is the
            difference where they are equal. Unpaired: regression on the controls' unit means (curves where units suffice, 30 per
            control; else the note says so, and warns where the score bends with a control within texts), residuals permuted.
            Paired: regression of the score on the group, the controls, straight and smooth (as for `residuals`), and the sequences,
            over the tokens of both groups; the signs of the units' parts of the slope are flipped.
        frequency: as for `add_controls`.
        layers: which; None: all.
        unit: what is independent: `"sequence"`, `"document"` or a label.
        correction: over all rows of the answer; `"max-t"` permutes whole units for all rows at once.
        n_resamples: permutations; all of them if there are no more.
        seed: of the permutations.

    Returns:
        one row per (layer, score): mean difference first - second, in the score's unit, with Student's 95 % interval over units
        (Welch's if unpaired, cluster-robust if paired with controls) and the permutation p; `hedges_g` and `cliff_delta` with
        intervals, `n_first`, `n_second` (units). Unpaired, Hedges g is the standardized difference and Cliff's delta P(first >
        second) - P(first < second), both without controls; paired, g is the mean difference over the standard deviation of
        differences (its error times the root of the number of units), and delta the share of units above 0 less that below.
        Intervals that cannot be had, as Cliff's of groups that do not overlap, are NaN.

    Raises:
        TableError: several runs, missing columns, not two groups, constant columns, or none of the controls (paired). StudyError:
            fewer than 4 units in a group (6 pairs), or unpaired groups that share a unit.

    Source: Chung and Romano 2013 (permutation of Welch's t, scipy); Freedman and Lane 1983 (with controls); paired with controls:
        Frisch and Waugh 1933 (slope), Hemerik, Goeman and Finos 2020 (flipped scores), Bell and McCaffrey 2002 (interval); Hedges
        1981, Cliff 1993 (statsmodels).

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> table = pd.DataFrame({"doc": np.repeat(range(20), 30), "seq": np.repeat(range(20), 30)})
        >>> table["member"] = table.doc < 10
        >>> table["a"] = 1.0 * table.member + rng.normal(size=600)
        >>> bool(bl.stats.compare_groups(table, "a", "member").p[0] < 0.001)
        True
    """
    names = names_of(scores)
    test = _GroupTest(group, groups, paired, unit, n_resamples, seed)
    selection = Selection(controls, frequency, layers, unit)
    found = []
    for score in names:
        given = selection.given(table, [score])
        if paired and len(controls) and not given.names:
            raise TableError(f"expected a table with at least one control, got none ({given.note}). Measure them, or name columns.")
        for every in selection.split(given.table, [score, *given.names], [group]):
            found.append(test.of(every, score, given))
    lines = [one.line for one in found]
    refuse_constant(lines, names)
    if not len(controls):
        for one in lines:
            del one["controls"]
    if correction == "max-t" and len(controls) and not paired:
        raise StudyError("expected max-t without controls, got both. Test bl.stats.residuals(...), or choose bh or holm.")
    return assemble(table, lines, correction, test.max_t(found) if correction == "max-t" else None)


@dataclass(frozen=True)
class _Compared:
    """The row of results of a score at a layer, and what max-t draws from: units' values and, unpaired, their groups."""

    line: Line
    codes: Int[np.ndarray, " units"] = field(default_factory=lambda: np.empty(0, int))
    values: Float[np.ndarray, " units"] = field(default_factory=lambda: np.empty(0))
    first: Bool[np.ndarray, " units"] | None = None


@dataclass(frozen=True)
class _GroupTest:
    """How groups are compared."""

    group: str
    groups: Sequence[object] | None
    paired: bool
    unit: str
    n_resamples: int
    seed: int

    def of(self, every: Rows, score: str, given: Controlled) -> _Compared:
        """What comes of a score at one layer."""
        first, second, wording = two_groups(every, self.group, self.groups)
        rows = every.where(first | second).finite(score, *given.names)
        is_first = _is(rows.labels[self.group], _values(every, self.group, self.groups)[0])
        own: Line = {"group": wording, "controls": ", ".join(given.names), **dict.fromkeys(SIZES, np.nan)}
        if constant(rows.values[score]):
            return _Compared(self._procedure(self.paired and bool(given.names)).constant_line(rows, score, score, **own))
        here, flat = varied(rows, given.names)
        notes = [given.note, flat]
        procedure = self._procedure(bool(given.names if self.paired else here))
        if self.paired:
            rows, is_first = in_both(rows, is_first)
            enough(rows.counts()["n_units"], FEWEST, f"units ({self.unit}) with both {wording.replace(' - ', ' and ')}")
            parts = slopes(rows, score, is_first, here) if here else differences(rows, score, is_first)
            codes, values, side = parts.codes, toned(parts.values, parts.inflation), None
            found = paired_test(parts, self.n_resamples, self.seed)
            rows = rows.where(np.isin(rows.unit, codes)) if len(codes) else rows
            notes.append(parts.note)
        else:
            codes, values = rows.unit_means(score)
            side = labels_of(rows, codes, is_first, self.unit, self.group)
            for many, name in zip((side.sum(), (~side).sum()), wording.split(" - "), strict=False):
                enough(int(many), FEWEST_PER_GROUP, f"units ({self.unit}) with {self.group} = {name}")
            found = unpaired_test(values, side, self.n_resamples, self.seed)
            if here:
                found |= controlled_test(rows, score, here, side, self.n_resamples, self.seed).columns()
        note = joined(*notes, str(found.pop("note", "")))
        return _Compared(procedure.line(rows, score, **own | found, note=note), codes, values, side)

    def _procedure(self, controlled: bool) -> Procedure:
        paired = "sign-flip permutation of paired differences"
        if self.paired:
            return Procedure(self.unit, f"{paired} given the controls" if controlled else paired, "mean difference")
        test = "permutation of residuals (Freedman-Lane)" if controlled else "permutation of labels (Welch t)"
        return Procedure(self.unit, test, "mean difference")

    def max_t(self, found: Sequence[_Compared]) -> Float[np.ndarray, " rows"]:
        """P-values corrected for the largest |t|, by permuting whole units."""
        matrix, codes = side_by_side([(one.codes, one.values) for one in found])
        if self.paired:
            return max_t_signs(matrix, self.n_resamples, self.seed)
        label: dict[int, bool] = {}
        for one in found:
            if one.first is not None:
                label |= dict(zip(one.codes.tolist(), one.first.tolist(), strict=True))
        return max_t_labels(matrix, np.array([label[code] for code in codes.tolist()]), self.n_resamples, self.seed)


@whole_numbers(TableError)
def before_after(
    pairs: pd.DataFrame,
    on: str | Sequence[str] = "difference",
    *,
    layers: WhichLayers = None,
    unit: str = "document",
    correction: Correction = "bh",
    n_resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Does a score change between two runs on the same texts? By flipping the signs of whole units.

    The error of a column's reference (see `tables.reference_error`; of `compare`'s `difference`, that of both runs) is in the
    interval, in p and in Hedges g's interval; Cliff's delta counts units as they were measured.

    Args:
        pairs: from `basin_lens.compare`; any table with columns of differences will do.
        on: columns of differences (after less before).
        layers, unit, correction, n_resamples, seed: as for `compare_groups`.

    Returns:
        one row per (layer, column): the mean difference with Student's 95 % interval over units, and as
        `compare_groups(paired=True)`.

    Raises:
        TableError: runs of different weight processing, missing columns, no difference anywhere. StudyError: fewer than 6 units.

    Source: Fisher 1935, by scipy's `permutation_test`.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> doc = np.repeat(range(20), 30)
        >>> pairs = pd.DataFrame({"doc": doc, "seq": doc, "difference": np.random.default_rng(0).normal(0.5, 1, 600)})
        >>> bool(bl.stats.before_after(pairs).p[0] < 0.001)
        True
    """
    names = names_of(on, "differences")
    lines, columns = [], []
    procedure = Procedure(unit, "sign-flip permutation of paired differences", "mean difference")
    for name in names:
        for every in split(pairs, [name], layers=layers, unit=unit):
            rows = every.finite(name)
            error = rows.reference_error.get(name, 0.0)
            if constant(rows.values[name]) and not (error > 0 and len(rows.sequence)):
                lines.append(procedure.constant_line(rows, name, name, **dict.fromkeys(SIZES, np.nan)))
                columns.append((np.empty(0, int), np.empty(0)))
                continue
            codes, values = rows.unit_means(name)
            enough(len(codes), FEWEST, f"units ({unit})")
            parts = Parts(codes, values, inflation=shared_error(values, error), shared=error)
            lines.append(procedure.line(rows, name, **paired_test(parts, n_resamples, seed)))
            # Nobody, where the reference's error is not known, or all there is.
            known = slice(0 if np.isnan(parts.inflation) or constant_values(values) else None)
            columns.append((codes[known], toned(values, parts.inflation)[known]))
    refuse_constant(lines, names)
    adjusted = max_t_signs(side_by_side(columns)[0], n_resamples, seed) if correction == "max-t" else None
    return assemble(pairs, lines, correction, adjusted)


def _values(rows: Rows, group: str, groups: Sequence[object] | None) -> tuple[object, object]:
    there = list(dict.fromkeys(rows.labels[group][~pd.isna(rows.labels[group])].tolist()))
    if groups is None:
        if len(there) != 2:
            raise TableError(
                f"expected a label with two values, got {group!r} with {there[:8]}. Choose two: groups=(first, second)."
            )
        there = sorted(there, reverse=all(isinstance(value, bool | np.bool_) for value in there))
        return there[0], there[1]
    missing = [value for value in groups if value not in there]
    if len(groups) != 2 or missing or groups[0] == groups[1]:
        raise TableError(f"expected two values of {group!r} as groups, got {groups!r}; it has {there[:8]}.")
    return groups[0], groups[1]


def two_groups(rows: Rows, group: str, groups: Sequence[object] | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Which rows are in the first group, which in the second, and the comparison in words.

    Raises:
        TableError: not two groups.
    """
    one, other = _values(rows, group, groups)
    held = rows.labels[group]
    return _is(held, one), _is(held, other), f"{one} - {other}"


def _is(held: np.ndarray, value: object) -> Bool[np.ndarray, " rows"]:
    """Where a label has a value; a missing one, of whatever kind, has none."""
    return np.array([not missing and label == value for label, missing in zip(held, pd.isna(held), strict=True)], bool)
