"""The declared tests of a study: one row each, corrected as one family, and the decision that follows."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from basin_lens import stats
from basin_lens.errors import StudyError, TableError
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.table_parts import Row, above_layer_0, named_rows
from basin_lens.studies.framework.units import FEWEST_DOCUMENTS, Units
from basin_lens.values import units_said
from basin_lens.views.marks import unit_of

Decision = Literal["yes", "yes, with red flags", "in part", "in part, with red flags", "no", "undecided"]

ALPHA = 0.05
ONE_SIDED = ", one-sided"  # ends the name of a test of one direction

# With fewer units, half of them could not reach 0.05 in a family of four tests: sign flips of 8 units give 2 / 2^8 at the least.
FEWEST_TO_SPLIT = FEWEST_DOCUMENTS

# Belongs to every hypothesis that is tested by `declared_test`.
IF_FEW = (
    f"With fewer than {FEWEST_TO_SPLIT} units, or too few of those that a test can use, none are set aside to choose the layer: "
    "every layer is tested, and the smallest p is corrected for all of them (Holm)."
)

# Effects in the unit of the score; correlations, areas and standardized slopes are pure numbers.
IN_UNITS = ("mean", "mean difference")

# Columns of one finding, as the summary shows them.
FINDING = (
    "study",
    "finding",
    "question",
    "layer",
    "score",
    "unit",
    "n_units",
    "n_sequences",
    "n_documents",
    "n_tokens",
    "test",
    "effect",
    "effect_unit",
    "estimate",
    "low",
    "high",
    "null",
    "p",
    "p_corrected",
    "correction",
    "n_tests",
    "holds",
    "p_floor",
    "within_reach",
    "guide_test",
    "guide_statistic",
    "guide_r",
    "guide_p",
    "guide_reading",
    "note",
)

_NUMBERS = ("estimate", "low", "high", "null", "p", "p_corrected")


def declared_test(
    table: pd.DataFrame,
    test: Callable[[pd.DataFrame], pd.DataFrame],
    measured: Units,
    finding: str,
    question: str,
    score: str = HEADLINE,
    *,
    stratify: str | None = None,
) -> pd.DataFrame:
    """A declared test as one row: the layer is chosen on half of the units and tested on the others.

    Too few units to halve them: every layer is tested, and the one with the smallest p is shown with p corrected for all of them
    (Holm). The note says which of both was done, and why. Layer 0 is no choice where there are others: a state that enters it is
    its token alone, so what is found there is of token types.
    `p_floor`: the smallest p that any data of so many units could give; 0 where there is no such bound. `effect_unit`: of the
    estimate, from the table's provenance, if it is in the score's unit; empty if it is a pure number or the unit is not known.
    """
    table = above_layer_0(table)
    found, why = None, f"too few units to halve ({measured.n_units})"
    if measured.n_units >= FEWEST_TO_SPLIT:
        # Enough units in all, but perhaps not of those that the test can use.
        try:
            found = stats.best_layer(table, test, unit=measured.unit, stratify=stratify, correction="none", seed=measured.seed)[:1]
        except (StudyError, TableError):  # too few units, or a half without one of the groups
            why = f"{measured.n_units} units not halved, for a half would be too few for the test, or without what it compares"
        else:
            why = f"{measured.n_units} units not halved, for the layer that one half chose could not be tested on the other"
    if found is not None and len(found):
        (row,) = named_rows(found)
        of_documents = measured.unit == "document"
        chose, tested = (row.chosen_documents, row.n_documents) if of_documents else (row.chosen_units, row.n_units)
        said = (
            f"layer chosen on {int(chose)} {units_said('document' if of_documents else measured.unit)} (there "
            f"{row.chosen_estimate:+.3f}, p {row.chosen_p:.2g}), tested on {int(tested)} others"
        )
        floor = p_floor(row)
    else:
        every = stats.correct(attempt(lambda part, *_, **__: test(part), table, score, unit=measured.unit), "holm")
        found = every.sort_values("p")[:1].copy()
        found["p"] = found["p_corrected"]
        tests = int(every["p"].notna().sum())  # those that Holm counts: a layer that could not be tested is none
        untested = f"; {len(every) - tests} layers could not be tested" if tests < len(every) else ""
        said = f"{why}: the best of {tests} tests, p corrected for them (Holm){untested}"
        (row,) = named_rows(found)
        floor = min(1.0, p_floor(row) * max(tests, 1))
    note = "" if pd.isna(row.note) else str(row.note)
    unit = getattr(row, "effect_unit", None)
    if not isinstance(unit, str):
        unit = unit_of(table, score) if getattr(row, "effect", "") in IN_UNITS else ""
    return found.reset_index(drop=True).assign(
        finding=finding,
        question=question,
        score=score,
        p_floor=floor,
        effect_unit=unit,
        note="; ".join(x for x in (said, note) if x),
    )


def settle(study: str, tests: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Declared tests as one family (Holm), in the columns of `FINDING`.

    `holds`: corrected p at most 0.05. `within_reach`: see there.
    """
    family = pd.DataFrame([row for test in tests for row in test.to_dict("records")])
    for name in (*_NUMBERS, "p_floor"):
        family[name] = family[name].astype(float) if name in family else float("nan")
    family["layer"] = family["layer"].astype("Int64")
    family = stats.correct(family, "holm")
    family["study"], family["holds"] = study, family["p_corrected"] <= ALPHA
    family["within_reach"] = within_reach(family)
    for name in FINDING:
        if name not in family:
            family[name] = pd.Series([None] * len(family), dtype=object)
    return family[list(FINDING)]


def within_reach(family: pd.DataFrame) -> "pd.Series[bool]":
    """Whether some data of a test's units would have had a corrected p (Holm) of at most 0.05, the other tests as they are.

    What is out of reach is no evidence of absence. `p_floor`: the smallest p of each test; NaN: no bound.
    """
    p, floor = family["p"].to_numpy(float), family["p_floor"].fillna(0.0).to_numpy(float)
    reached = np.isfinite(p)
    for at in np.flatnonzero(reached):
        others = np.delete(p, at)
        first = np.append(np.sort(others[others <= floor[at]]), floor[at])
        reached[at] = (first * (reached.size - np.isnan(p).sum() - np.arange(len(first)))).max() <= ALPHA
    return pd.Series(reached, index=family.index)


def p_floor(row: Row) -> float:
    """The smallest p of a permutation of so many units; 0 for tests without such a bound."""
    sides = 1 if ONE_SIDED in row.test else 2
    if "sign-flip" in row.test and row.n_units:
        return sides / 2.0 ** int(row.n_units)
    first, second = (getattr(row, name, float("nan")) for name in ("n_first", "n_second"))
    if "permutation of labels" in row.test and first > 0 and second > 0:
        return min(1.0, sides / math.comb(int(first) + int(second), int(first)))
    return 0.0


def one_sided(test: Callable[[pd.DataFrame], pd.DataFrame], *, more: bool = True) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """The same test of "more than null" alone, or of "less"."""

    def tested(part: pd.DataFrame) -> pd.DataFrame:
        found = test(part)
        found["p"] = np.where((found["estimate"] > found["null"]) == more, found["p"] / 2, 1 - found["p"] / 2)
        found["test"] = found["test"] + ONE_SIDED
        return stats.correct(found, "bh")

    return tested


def decide(findings: pd.DataFrame, flags: pd.DataFrame | None) -> Decision:
    """The verdict on a hypothesis that says: these hold. Red flags do not turn a yes into a no, but stay beside it.

    Only flags of questions that hold count. "no" needs tests that could have said yes; where none could, it is "undecided".
    """
    if not findings["holds"].any():
        return "no" if findings["within_reach"].any() else "undecided"
    raised = False
    if flags is not None:
        up = flags["raised"].fillna(False).astype(bool)
        if "question" in flags:
            up &= flags["question"].isin([*findings[findings["holds"]]["question"], "every"])
        raised = bool(up.any())
    if findings["holds"].all():
        return "yes, with red flags" if raised else "yes"
    return "in part, with red flags" if raised else "in part"
