"""Verdicts are words: no text of an error, no number that is not there."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from basin_lens import stats
from basin_lens.errors import BasinLensError, StudyError, TableError
from basin_lens.studies.framework import declared_tests, wording
from basin_lens.studies.framework.attempts import attempt, empty_finding
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.robustness.stability import verdict_of

OF_AN_ERROR = re.compile(r"\bexpected\b.*\bgot\b")


def untested(error: BasinLensError) -> pd.DataFrame:
    """A declared test that could not be made, as a study's findings have it."""

    def test(*_, **__):
        raise error

    row = attempt(test, pd.DataFrame({"layer": [1]}), "compression", unit="document")
    return declared_tests.settle("layers", [row.assign(finding="above 0", question="random", p_floor=math.nan, effect_unit="")])


@pytest.mark.parametrize("error", [StudyError("expected at least 6 units, got 2. Give more."), TableError("expected x, got y.")])
def test_what_an_error_said_stays_in_the_table(error):
    findings = untested(error)
    assert str(error) in findings["note"].iloc[0]
    (row,) = named_rows(findings)
    said = wording.sentence(row)
    assert said.startswith("above 0: could not be tested (too few texts") and not OF_AN_ERROR.search(said)
    survival = pd.DataFrame(
        [{"finding": "above 0", "layer": 1, "holds_as_run": False, "settings": 0, "survives": 0, "lost_under": "none",
          "not_testable": "none", "in_random_twin": None, "how": row.note}]
    )  # fmt: skip
    told = verdict_of("undecided", findings, survival)
    assert any("could not be tested (too few" in line for line in told)
    assert not any(OF_AN_ERROR.search(line) for line in told)


def test_reasons_in_words_are_told_as_they_are():
    assert wording.why_untested("no layer was tested.") == "no layer was tested"
    for none in (math.nan, None, pd.NA, "", " "):
        assert wording.why_untested(none) == "no reason is on record"


def test_numbers_that_are_not_there():
    assert wording.in_words(math.nan) == "not known" and wording.in_words(0.03) == "0.03"
    assert wording.without_nan(f"from {math.nan:+.3f} to {math.nan:.2f} nats, {math.nan:.0%}.") == (
        "from (not known) to (not known) nats, (not known)%."
    )
    for kept in ("The word 'nan' and the banana.", "nanosecond", "finance"):
        assert wording.without_nan(kept) == kept


def test_a_finding_without_a_note():
    row = empty_finding("compression", "document").assign(
        finding="above 0", p_floor=np.nan, n_tests=1, holds=False, within_reach=False
    )
    row["note"] = np.nan
    (one,) = named_rows(row)
    assert wording.sentence(one) == "above 0: could not be tested (no reason is on record)."


def test_a_half_too_few_is_told_without_the_error(monkeypatch):
    def refuses(*_, **__):
        raise StudyError("expected at least 6 units in each half, got 3. Give more texts.")

    monkeypatch.setattr(stats, "best_layer", refuses)
    frame = pd.DataFrame({"layer": [1, 2], "compression": [0.1, 0.2]})

    def test(_part):
        rows = empty_finding("compression", "document")
        return rows.assign(layer=1, estimate=0.2, p=0.01, p_corrected=0.01, n_units=16, effect="mean", note="")

    class Sixteen:
        n_units, unit, seed = 16, "document", 0

    found = declared_tests.declared_test(frame, test, Sixteen(), "above 0", "random", "compression")
    note = found["note"].iloc[0]
    assert note.startswith("16 units not halved, for a half would be too few") and not OF_AN_ERROR.search(note)
