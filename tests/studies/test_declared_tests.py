"""Declared tests: layers chosen on one half, one family of p values, what few units can reach, decisions and sentences."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import basin_lens as bl
from basin_lens.studies.framework import registry
from basin_lens.studies.framework.declared_tests import (
    FEWEST_TO_SPLIT,
    FINDING,
    IF_FEW,
    decide,
    declared_test,
    one_sided,
    p_floor,
    settle,
    within_reach,
)
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.framework.wording import as_sentence, sentence


def simulated(measured, seed, effect=0.0, layers=6, docs=16):
    """A table of two differences by document and layer, related over layers."""
    rng = np.random.default_rng(seed)
    layer, doc = (part.ravel() for part in np.indices((layers, docs)))
    table = pd.DataFrame({"run": "r", "layer": layer, "doc": doc, "seq": doc, "pos": 1})
    for name in ("one", "other"):
        table[name] = effect + rng.normal(size=docs)[doc] + rng.normal(size=len(table))
    return replace(measured, table=table, settings={**measured.settings, "seed": seed})


def t_test(name):
    """A test of one's own: quick, and exact for these tables."""

    def test(table):
        values = table.pivot(index="layer", columns="doc", values=name)
        found = stats.ttest_1samp(values, 0, axis=1)
        rows = pd.DataFrame({"layer": values.index, "score": name, "estimate": values.mean(axis=1), "p": found.pvalue})
        return rows.reset_index(drop=True).assign(null=0.0, test="t", note="", n_documents=values.shape[1])

    return test


def declared_differences(held):
    return settle("x", [declared_test(held.table, t_test(name), held, name, name) for name in ("one", "other")])


@pytest.mark.slow
def test_false_positives_of_a_whole_family_are_five_percent(measured):
    """Six layers to choose from, two declared tests: the chance that any holds."""
    assert measured.n_units == 16
    runs = 120
    wrong = sum(bool(declared_differences(simulated(measured, seed)).holds.any()) for seed in range(runs))
    assert stats.binom.isf(0.999, runs, 0.05) <= wrong <= stats.binom.isf(0.001, runs, 0.05)


@pytest.mark.slow
def test_a_family_has_power(measured):
    found = [declared_differences(simulated(measured, seed, effect=2)) for seed in range(10)]
    assert np.mean([one.holds.all() for one in found]) > 0.6


def test_few_units_are_not_halved_and_all_layers_are_paid_for(measured):
    """No half is left to report on: the smallest p of all layers, times their number."""
    held = simulated(measured, 0, effect=1, docs=11)
    capture = bl.capture.subset(measured.capture, range(22))
    few = replace(held, capture=capture)
    assert few.n_units == 11 < FEWEST_TO_SPLIT
    p = t_test("one")(held.table).p[1:]  # layer 0 is no choice
    found = declared_test(held.table, t_test("one"), few, "x", "q")
    assert found.p.tolist() == pytest.approx([min(1.0, p.min() * 5)])
    assert found.layer.tolist() == [p.idxmin()]
    assert found.note[0] == "too few units to halve (11): the best of 5 tests, p corrected for them (Holm)"
    # The reader of the verdict is told, whatever came out.
    for holds in (True, False):
        row = settle("x", [found]).assign(holds=holds, effect="t", n_units=11).iloc[0]
        assert sentence(row).lower().count("too few units to halve (11): the best of 5 tests") == 1
    assert "fewer than 16 units" in IF_FEW
    for study in ("importance", "layers", "codelength", "robustness"):
        assert IF_FEW in registry.find_spec(study).hypothesis


def test_units_that_cannot_be_halved_for_the_test_say_why(measured):
    """Sixteen documents, of which the test can use ten: five would choose, which it refuses."""
    held = simulated(measured, 0, effect=1)
    table = held.table[held.table.doc < 10].assign(compression=lambda t: t.one)
    found = declared_test(table, lambda part: bl.stats.before_after(part, "compression"), held, "x", "q")
    assert found.note[0].startswith("16 units not halved, for a half would be too few for the test, or without")
    assert "the best of 5 tests, p corrected for them (Holm)" in found.note[0]
    assert "too few units to halve" not in found.note[0]
    assert found.p_floor[0] == pytest.approx(5 * 2 / 2**10)
    row = settle("x", [found]).iloc[0]
    assert sentence(row).endswith(f"documents. {as_sentence(found.note[0])}")


def test_notes_are_sentences_of_their_own():
    row = pd.DataFrame([
        {"finding": "x", "p": 0.01, "p_corrected": 0.02, "layer": 3, "effect": "mean difference", "effect_unit": "nats", "estimate": 0.5, "low": 0.1,
         "high": 0.9, "holds": True, "within_reach": True, "p_floor": 0.0, "n_tests": 2, "n_units": 8, "n_documents": 8,
         "note": "layer chosen on 8 documents; controls as straight lines: too few tokens for curves"},
    ]).iloc[0]  # fmt: skip
    figures = "mean difference +0.500 nats (95 % interval +0.100 to +0.900) at layer 3, corrected p 0.02, 8 units, 8 documents."
    note = "ayer chosen on 8 documents; controls as straight lines: too few tokens for curves."
    assert sentence(row) == f"x: holds. {figures} L{note}"
    denied = row.copy()
    denied["holds"] = False
    assert sentence(denied) == f"x: does not hold. {figures} Significant, but l{note}"
    for empty in ("", None, np.nan):
        bare = row.copy()
        bare["note"] = empty
        assert sentence(bare) == f"x: holds. {figures}"
    for unit, said in ((pd.NA, "+0.500 ("), (None, "+0.500 ("), ("", "+0.500 ("), ("bits", "+0.500 bits (")):
        other = row.copy()
        other["effect_unit"] = unit
        assert said in sentence(other)
    assert "+0.500 tokens (" in sentence(row, "tokens")
    counted = row.copy()
    counted["n_tokens"] = 1234
    assert "8 units, 8 documents, 1,234 tokens. L" in sentence(counted, rows="tokens")
    assert "8 units, 8 documents. L" in sentence(counted)
    out = row.copy()
    out["holds"], out["within_reach"] = False, False
    assert "x: undecided. " in sentence(out.copy())
    out["p_floor"] = 0.03
    assert "undecided, too few units for any p to reach 0.05" in sentence(out)


@pytest.mark.parametrize(("first", "second"), [(4, 4), (4, 7), (5, 5)])
@pytest.mark.parametrize("sided", ["two", "one"])
def test_the_smallest_p_that_labels_can_give(first, second, sided):
    """Groups as far apart as can be, all permutations."""
    doc = np.arange(first + second)
    table = pd.DataFrame({"layer": 1, "doc": doc, "seq": doc, "g": doc < first, "a": doc / 100 + 1000.0 * (doc < first)})

    def test(part):
        return bl.stats.compare_groups(part, "a", "g")

    (row,) = named_rows((test if sided == "two" else one_sided(test))(table))
    assert row.p == pytest.approx(p_floor(row))


def test_the_smallest_p_that_signs_can_give():
    doc = np.arange(7)
    table = pd.DataFrame({"layer": 1, "doc": doc, "seq": doc, "difference": 5.0 + doc})
    (row,) = named_rows(bl.stats.before_after(table))
    assert row.p == pytest.approx(p_floor(row)) == pytest.approx(2 / 2**7)


@pytest.mark.many
@pytest.mark.parametrize(("docs", "findings"), [(8, 2), (13, 4)])
def test_too_few_units_for_any_yes_is_undecided(measured, docs, findings):
    """An effect as large as can be, at ten layers, by sign flips of whole documents."""
    held = simulated(measured, 0, effect=1000, layers=10, docs=docs)
    few = replace(held, capture=bl.capture.subset(measured.capture, range(2 * docs)))
    rows = [
        declared_test(held.table, lambda part: bl.stats.before_after(part, "one"), few, str(name), "one")
        for name in range(findings)
    ]
    assert decide(settle("x", rows), None) in ("yes", "undecided")


def test_within_reach_by_brute_force():
    """Each test's p at its floor, the others as they are, Holm by statsmodels."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.choice([0.001, 0.01, 0.02, 0.03, 0.5, np.nan], 5)
        family = bl.stats.correct(pd.DataFrame({"p": p, "p_floor": np.minimum(p, rng.choice([0.0, 0.005, 0.02, 0.03], 5))}), "holm")
        for at, got in enumerate(within_reach(family)):
            best = family.p.to_numpy().copy()
            best[at] = np.where(np.isnan(best[at]), np.nan, family.p_floor[at])
            assert got == (bl.stats.correct(pd.DataFrame({"p": best}), "holm").p_corrected[at] <= 0.05)
        assert within_reach(family)[family.p_corrected <= 0.05].all()


def test_holm_over_the_declared_tests():
    one = pd.DataFrame({"p": [0.02, 0.03, 0.04], "layer": [1, 1, 1], "p_floor": [0.02, np.nan, 0.0]}).assign(score="s", note="")
    family = settle("importance", [one[:1], one[1:]])
    assert family.p_corrected.tolist() == pytest.approx([0.06, 0.06, 0.06])
    assert not family.holds.any()
    assert family.within_reach.tolist() == [False, True, True]  # three times 0.02
    alone = settle("importance", [one[:1], one[1:].assign(p=np.nan)])
    assert alone.holds.tolist() == [True, False, False]
    assert alone.within_reach.tolist() == [True, False, False]
    assert list(family.columns) == list(FINDING)


def test_decisions():
    def findings(*holds, reach=True):
        return pd.DataFrame({"holds": holds, "p_corrected": [0.01 if h else 0.5 for h in holds], "within_reach": reach})

    def flags(*raised):
        return pd.DataFrame({"raised": pd.array(raised, "boolean")})

    assert decide(findings(False, False), flags(True)) == "no"
    assert decide(findings(False, False, reach=False), flags(True)) == "undecided"
    asked = findings(True, False).assign(question=["a", "b"])
    assert decide(asked, flags(False, True).assign(question=["a", "b"])) == "in part"
    assert decide(asked, flags(True, True).assign(question=["a", "b"])) == "in part, with red flags"
    assert decide(findings(True, True), flags(False, None)) == "yes"
    assert decide(findings(True, True), None) == "yes"
    assert decide(findings(True, True), flags(False, True)) == "yes, with red flags"
    assert decide(findings(True, False), flags(False, None)) == "in part"
    assert decide(findings(True, False), flags(True)) == "in part, with red flags"


def test_one_sided():
    def test(part):
        return part.copy()

    both = pd.DataFrame({"estimate": [1.0, -1.0, np.nan], "null": 0.0, "p": [0.04, 0.04, np.nan], "test": "t"})
    assert one_sided(test)(both).p.tolist()[:2] == pytest.approx([0.02, 0.98])
    assert one_sided(test, more=False)(both).p.tolist()[:2] == pytest.approx([0.98, 0.02])
    assert np.isnan(one_sided(test)(both).p[2])
