"""Studies: effects planted into real measurements are found or refused as they should be; folders hold what they say.

One tiny model reads made-up sentences once; the tests plant effects into copies of its table.
"""

import json
import re
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import basin_lens as bl
from basin_lens import tables
from basin_lens.analyzers.control import controls_of
from basin_lens.errors import BasinLensError, CaptureError, ModelError, NeighborError, StoreError, StudyError, TextError
from basin_lens.studies import Contrast, codelength, importance, neighbor_composition
from basin_lens.studies.framework import contrast_report, registry, sequences, words
from basin_lens.studies.framework import measurement as room
from basin_lens.studies.framework.attempts import checked_red_flags
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
from basin_lens.studies.framework.measured_texts import study_provenance
from basin_lens.studies.framework.storage import KIND, refuse_folder
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.framework.wording import about_measured, as_sentence, sentence
from basin_lens.studies.robustness import stability, variants
from basin_lens.studies.robustness import study as robustness
from basin_lens.texts import TaggedPassage, Word
from tests.analyzers.test_importance import counting
from tests.conftest import make_bridge, make_tokenizer, random_tokens

S = bl.studies
QUIET = {"k": 5, "progress": False}

# -- texts --------------------------------------------------------------------------------------------------------------------------

LEXICON = {
    "DET": ["the", "a", "this", "every"],
    "ADP": ["of", "in", "on", "with", "by", "from"],
    "PRON": ["she", "he", "it", "they"],
    "CONJ": ["and", "but", "or"],
    "NOUN": [
        "ferry",
        "lamp",
        "voice",
        "steps",
        "tea",
        "jar",
        "glass",
        "blade",
        "water",
        "crystal",
        "piano",
        "clock",
        "boy",
        "man",
        "rain",
    ],
    "VERB": ["stopped", "running", "climbed", "sat", "plunge", "trapped", "stays", "came", "took", "reads", "said"],
    "ADJ": ["cold", "slow", "own", "steel"],
    ".": [",", "."],
}
WEIGHTS = {"DET": 0.16, "ADP": 0.14, "PRON": 0.1, "CONJ": 0.06, "NOUN": 0.26, "VERB": 0.18, "ADJ": 0.06, ".": 0.04}
TAG_OF = {word: tag for tag, held in LEXICON.items() for word in held}


def made_text(n_words: int, seed: int, doc: str, tags: dict[str, float] = WEIGHTS, **more) -> TaggedPassage:
    """Words of a few kinds in any order, some far more frequent than others, whatever their kind."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(list(tags), n_words, p=np.array(list(tags.values())) / sum(tags.values()))
    text, made = "", []
    for kind in kinds:
        rank = min(int(rng.geometric(0.4)), len(LEXICON[kind])) - 1
        word = LEXICON[kind][rank]
        made.append(Word(len(text), len(text) + len(word), word, TAG_OF[word]))
        text += word + " "
    return TaggedPassage(text.strip(), doc=doc, words=tuple(made), **more)


def short_texts(count: int, n_words: int = 16, **more) -> list[TaggedPassage]:
    """A document each, of one sequence."""
    return [made_text(n_words, seed, f"d{seed}", **more) for seed in range(count)]


NAMES = ["Mary", "John", "Anna", "Peter", "Clara", "Oscar"]
TEMPLATES = [
    "When {a} and {b} went to the shop in the rain, {a} gave the lamp to {b}.",
    "After {a} and {b} had tea by the glass, {a} sold the piano to {b}.",
    "Then {a} and {b} read the clock at four, and {a} took the jar from {b}.",
    "While {a} and {b} ran along the water, {a} lent the steel blade to {b}.",
    "Because {a} and {b} met on the steps, {a} sent the ferry home with {b}.",
    "Today {a} and {b} heat the blade in water, and {a} wedged it for {b}.",
    "Once {a} and {b} sat down in the cold, {a} told the story to {b}.",
]


def prompts(per_template: int = 3) -> list[bl.Passage]:
    """Prompts of templates: the subject is named twice, the indirect object once more at the end."""
    answer = []
    for at, template in enumerate(TEMPLATES):
        for turn in range(per_template):
            a, b = np.random.default_rng([at, turn]).choice(NAMES, 2, replace=False)
            text = template.format(a=a, b=b)
            second = text.index(a, text.index(a) + 1)
            spans = {"IO": (text.rindex(b), text.rindex(b) + len(b)), "S": (second, second + len(a))}
            answer.append(bl.Passage(text, doc=f"{at}-{turn}", labels={"template": f"t{at}", "early": at < 3}, spans=spans))
    return answer


# -- one measurement for all --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def texts():
    return [made_text(48, seed, f"doc-{seed}") for seed in range(18)]


@pytest.fixture(scope="session")
def measured(llama, texts):
    return S.measure(llama, texts, max_length=44, max_sequences=32, integrated=8, **QUIET)


def plant(measured, table=None, **columns):
    """A copy with other columns in its table."""
    held = (measured.table if table is None else table).copy()
    for name, values in columns.items():
        held[name] = np.asarray(values, float)
    held.attrs = dict(measured.table.attrs)
    return replace(measured, table=held)


def noise(table, seed=0, size=1.0):
    return size * np.random.default_rng(seed).normal(size=len(table))


def flag(study, name, question=None):
    chosen = study.flags[study.flags.flag == name]
    return chosen[chosen.question == question].raised if question is not None else chosen.raised


def standard(values):
    return (values - np.nanmean(values)) / np.nanstd(values)


def with_importance(measured, sign, seed=0):
    """Compression that goes with importance, and one cheap measure that is nearly erasure."""
    table = measured.table
    truth = standard(table["erasure"].rank().to_numpy())
    cheap = np.where(np.isnan(truth), noise(table, seed), truth + noise(table, seed + 1, 0.2))
    return plant(measured, attention_received=cheap, compression=sign * cheap + noise(table, seed + 2, 0.5))


@pytest.fixture(scope="session")
def important(llama, measured):
    return S.study_importance(llama, with_importance(measured, 1), progress=False)


@pytest.fixture(scope="session")
def deep(llama, measured):
    """Compression above both controls at every layer, most at layer 1."""
    table = measured.table
    control = table[["compression_random", "compression_radius_matched"]].max(axis=1)
    more = 0.2 + 0.3 * (table["layer"] == 1) + noise(table, 5, 0.1)
    return S.study_layers(llama, plant(measured, compression=control + more), progress=False)


@pytest.fixture(scope="session")
def spoken(llama, measured):
    """Function words above content words, nouns like verbs."""
    tokens, _ = words.tagged_tokens(measured, "auto")
    values = 1.0 * tokens["tag"].isin(words.FUNCTION) + noise(tokens, 6, 0.3)
    return S.study_linguistic(llama, plant(measured, compression=values), progress=False)


# -- importance ---------------------------------------------------------------------------------------------------------------------


def test_importance_that_is_planted_is_found(important):
    assert important.decision.startswith("yes")
    assert important.findings.holds.all()
    assert (important.findings.estimate > 0.4).all()
    assert important.tables["ranking"].score.iloc[0] == "attention_received"
    assert important.findings.finding.tolist() == ["compression goes with erasure", "compression goes with attention_received"]
    assert (important.findings.n_units == 8).all()  # the half that did not choose
    assert not flag(important, "vanishes under controls").fillna(True).any()
    partial = important.tables["partial_correlation"]
    mine = partial[(partial.score == "compression") & (partial.against == "erasure")]
    assert sorted(mine.control_set.unique()) == ["with surprisal", "without surprisal"]
    assert (mine.p_corrected <= 0.05).all() and (mine.estimate > 0).all()
    assert partial.n_tests.nunique() == 1 and partial.n_tests.iloc[0] == partial.p.notna().sum()
    assert "surprisal" in mine[mine.control_set == "with surprisal"].controls.iloc[0]
    assert "surprisal" not in mine[mine.control_set == "without surprisal"].controls.iloc[0]


def test_the_ranking_wants_agreement_not_its_opposite(measured):
    """At layer 2 a measure says the opposite of erasure, and surely so; at layer 1 it agrees, less surely."""
    table = measured.table
    truth = standard(table["erasure"].rank().to_numpy())
    turned = np.where(
        table["layer"] == 2,
        noise(table, 6, 0.1) - truth,
        np.where(table["layer"] == 1, truth + noise(table, 3, 1.0), noise(table, 4)),
    )
    known = plant(measured, attention_received=turned).table
    known = known[known.erasure.notna()]
    options = {"controls": ["position"], "min_tokens": importance.FEWEST_SCORED}
    beyond = bl.stats.partial_correlation(known, ["attention_received"], "erasure", **options)
    (row,) = named_rows(importance._ranking(known, ["attention_received"], beyond, measured))
    assert row.layer == 1 and row.estimate > 0.4
    fixed = beyond[beyond.layer == 1].iloc[0]
    assert (row.given_position, row.given_position_low) == (fixed.estimate, fixed.low)
    plain = bl.stats.within_sequence_correlation(known, "attention_received", "erasure")
    assert plain.sort_values("p").layer.iloc[0] == 2  # the smallest p of all
    few = known[known.doc.isin(known.doc.unique()[:10])]
    (small,) = named_rows(importance._ranking(few, ["attention_received"], beyond, measured))
    assert small.layer == 1 and "too few documents to halve (10)" in small.how


def test_red_flags_are_of_the_layers_that_can_be_chosen(measured):
    """All of it at layer 0, where a state is its token alone."""
    table = measured.table
    level = standard(table["surprisal"].to_numpy())
    planted = plant(measured, compression=np.where(table["layer"] == 0, level, 0) + noise(table, 2))
    flags = checked_red_flags(planted.table, "compression", "surprisal", controls=["position"])
    assert 0 not in flags.layer.dropna().tolist()
    assert flags.set_index("flag").raised["nothing survives correction"]
    whole = bl.stats.red_flags(planted.table, "compression", "surprisal", controls=["position"])
    assert not whole.set_index("flag").raised["nothing survives correction"]


def test_a_report_says_which_figures_show_the_documents_that_chose(important):
    html = unescape(important.report().html)
    said = [
        section.title
        for section in important.sections
        if "All documents are shown, those that chose" in section.text + section.caption
    ]
    assert [title.split()[0] for title in said] == ["Scores", "attention_received", "Joint", "What"]
    assert "given_position" in html and any("at fixed position, over all documents" in line for line in important.verdict)
    (facts,) = tables.provenance(bl.studies.importance._with_sizes(important.tokens)).values()
    assert facts["columns"]["gradient_times_activation_size"]["unit"] == facts["columns"]["gradient_times_activation"]["unit"]


def test_every_red_flag_of_importance_can_be_checked(important):
    """Erasure is known at 16 positions of a sequence, which is few for six controls."""
    assert "could not be checked" not in set(important.flags.flag)
    assert important.flags.raised.notna().all(), important.flags[important.flags.raised.isna()].why.tolist()


def test_the_sign_of_importance_is_the_data_s(measured):
    planted = with_importance(measured, -1)
    rows = [
        declared_test(planted.table, bl.studies.importance._test(other, planted), planted, other, other)
        for other in ("erasure", "attention_received")
    ]
    found = settle("importance", rows)
    assert found.holds.all() and (found.estimate < -0.4).all()


def by_control(measured, source, size=1.0):
    """Importance and compression that share one control and nothing else."""
    table = measured.table
    values = table["pos"] if source == "position" else table.groupby(["layer", "seq"])["surprisal"].rank()
    level = standard(values.to_numpy(float))
    truth = np.where(table["erasure"].notna(), level + noise(table, 11, size), np.nan)
    return plant(
        measured, erasure=truth, attention_received=level + noise(table, 12, 0.4), compression=level + noise(table, 13, size)
    )


@pytest.mark.slow
def test_what_position_explains_is_no_finding(llama, measured):
    study = S.study_importance(llama, by_control(measured, "position"), progress=False)
    assert study.decision == "no"
    assert study.verdict[0].startswith("No.")
    for question in study.findings.question:
        assert flag(study, "vanishes under controls", question).all(), study.flags.why.tolist()
    # The guide would have called both strong.
    assert (study.findings.guide_p < 1e-6).all()
    assert set(study.findings.guide_reading) == {"strong"}


def test_what_surprisal_explains_is_no_finding(measured):
    planted = by_control(measured, "surprisal")
    found = declared_importance(planted)
    assert not found.holds.any()
    flags = checked_red_flags(planted.table, "compression", "erasure", frequency=measured.frequency)
    assert flags[flags.flag == "vanishes under controls"].raised.all()


@pytest.mark.parametrize("bend", [np.log, lambda pos: (pos - pos.mean()) ** 2], ids=["logarithm", "parabola"])
def test_what_a_bent_function_of_position_explains_is_no_finding(bend):
    """Both columns are functions of position and noise: 30 layers, each a data set of its own."""
    layer, doc, pos = (part.ravel() for part in np.indices((30, 20, 100)))
    level = standard(bend(pos + 1.0))
    table = pd.DataFrame({"layer": layer, "doc": doc, "seq": doc, "pos": pos + 1})
    table["compression"], table["erasure"] = level + noise(table, 0), level + noise(table, 1)
    answer = bl.stats.partial_correlation(table, "compression", "erasure", controls=["position"])
    assert (answer.p <= 0.05).mean() <= stats.binom.isf(1e-3, 30, 0.05) / 30


@pytest.mark.slow
def test_signed_attributions_can_be_the_best_measure(llama, measured):
    """They are ranked by size, under a name that the token view does not know of."""
    table = measured.table
    truth = standard(table["erasure"].rank().to_numpy())
    values = np.exp(np.where(np.isnan(truth), noise(table), truth)) * np.sign(noise(table, 1))
    study = S.study_importance(llama, plant(measured, gradient_times_activation=values), progress=False)
    assert study.tables["ranking"].score.iloc[0] == "gradient_times_activation_size"


def declared_importance(held):
    rows = [
        declared_test(held.table, bl.studies.importance._test(other, held), held, other, other)
        for other in ("erasure", "attention_received")
    ]
    return settle("importance", rows)


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


@pytest.fixture
def quick(monkeypatch):
    """statsmodels collects all garbage in every call of its `multipletests`, a third of a second."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_false_positives_of_a_whole_family_are_five_percent(measured):
    """Six layers to choose from, two declared tests: the chance that any holds."""
    assert measured.n_units == 16
    runs = 120
    wrong = sum(bool(declared_differences(simulated(measured, seed)).holds.any()) for seed in range(runs))
    assert stats.binom.isf(0.999, runs, 0.05) <= wrong <= stats.binom.isf(0.001, runs, 0.05)


@pytest.mark.usefixtures("quick")
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
    assert found.note[0].startswith("16 units not halved, for a half would be too few for the test (expected at least 6 units")
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


@pytest.mark.usefixtures("quick")
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


# -- layers -------------------------------------------------------------------------------------------------------------------------


def test_compression_above_its_controls_is_found(deep):
    assert deep.decision.startswith("yes")
    assert deep.findings.holds.all()
    assert deep.findings.layer.tolist() == [1, 1]
    assert (deep.findings.estimate > 0.3).all()
    controls = deep.tables["controls"]
    assert (controls.p_corrected <= 0.05).all()
    assert any("more at layers [0, 1, 2]" in line for line in deep.verdict)


@pytest.mark.slow
def test_compression_below_its_controls_is_the_other_way(llama, measured):
    table = measured.table
    control = table[["compression_random", "compression_radius_matched"]].min(axis=1)
    study = S.study_layers(llama, plant(measured, compression=control - 0.3 + noise(table, 4, 0.1)), progress=False)
    assert study.decision == "no"
    assert any("the other way" in line for line in study.verdict)
    assert (study.findings.p > 0.9).all()


def test_above_random_points_alone_is_half_of_the_declared_hypothesis(llama, measured):
    """The hypothesis has two parts, joined by 'and'."""
    table = measured.table
    low = table["compression_radius_matched"] - 0.3 + noise(table, 4, 0.1)
    study = S.study_layers(
        llama, plant(measured, compression=low, compression_random=low - 0.3 + noise(table, 5, 0.1)), progress=False
    )
    assert study.findings.holds.tolist() == [True, False]
    assert study.decision.startswith("in part")
    assert study.verdict[0].startswith("In part")


def test_halves_agree_on_a_curve_without_noise(measured):
    table = measured.table
    curve = plant(measured, compression=np.array([0.3, -0.1, 0.2])[table["layer"]], contraction=noise(table)).table
    answer = linguistic_free_halves(curve, measured)
    assert answer.loc["compression", ["estimate", "low", "high"]].tolist() == [1.0, 1.0, 1.0]
    assert answer.loc["compression", "largest_difference"] == pytest.approx(0, abs=1e-12)
    assert (answer.n_units == measured.n_units).all()
    assert answer.loc["contraction", "low"] < 0.9


def linguistic_free_halves(table, measured):
    return bl.studies.layers.halves_agree(table, ["compression", "contraction"], measured).set_index("score")


def test_halves_of_a_constant_curve_say_nothing(measured):
    flat = plant(measured, compression=np.zeros(len(measured.table))).table
    assert np.isnan(linguistic_free_halves(flat, measured).loc["compression", "estimate"])


# -- words --------------------------------------------------------------------------------------------------------------------------


def test_rows_of_words_against_all_pairs(measured):
    tokens, source = words.tagged_tokens(measured, "auto")
    assert source == "gold"
    for row in tokens[tokens.layer == 1].sample(150, random_state=0).itertuples():
        held = measured.capture.passages[row.passage].words
        shared = [min(row.end, w.end) - max(row.start, w.start) for w in held]
        best = int(np.argmax(shared))
        if shared[best] <= 0:
            assert np.isnan(row.word) and pd.isna(row.tag) and pd.isna(row.word_text)
        else:
            assert (row.word, row.tag, row.word_text) == (best, held[best].tag, held[best].text.lower())
    for layer in measured.layers:  # the same at every layer
        part = tokens[tokens.layer == layer]
        assert part.word.equals(part.word) and np.array_equal(part.word, tokens[tokens.layer == 0].word, equal_nan=True)
    pd.testing.assert_frame_equal(tokens[measured.table.columns], measured.table)


def token_rows(*rows, layers=(0, 1)):
    names = ["doc", "seq", "pos", "word", "word_text", "tag", "score", "token_id"]
    one = pd.DataFrame(rows, columns=names).astype({"word": float, "score": float})
    table = pd.concat([one.assign(layer=layer, run="r", score=one.score + 10 * layer) for layer in layers], ignore_index=True)
    table.attrs = {"provenance": {"r": {}}}
    return table


WORDS = token_rows(
    ("d", 0, 0, np.nan, None, None, np.nan, 0),  # BOS
    ("d", 0, 1, 0, "the", "DET", 1.0, 1),
    ("d", 0, 2, 1, "ferry", "NOUN", 2.0, 2),
    ("d", 0, 3, 1, "ferry", "NOUN", 6.0, 3),
    ("d", 0, 4, 2, "the", "DET", np.nan, 1),
    ("d", 0, 5, 3, "lamp", "NOUN", 3.0, 4),  # cut by the end of the sequence
    ("d", 1, 1, 3, "lamp", "NOUN", 9.0, 5),
    ("d", 1, 2, 4, "the", "DET", 4.0, 1),
    ("e", 2, 1, 0, "ferry", "NOUN", np.nan, 2),
    ("e", 2, 2, 0, "ferry", "NOUN", 8.0, 3),
)


@pytest.mark.parametrize(
    ("part", "scores"),
    [
        ("mean", [1, 4, np.nan, 3, 9, 4, 8]),
        ("first", [1, 2, np.nan, 3, 9, 4, np.nan]),
        ("last", [1, 6, np.nan, 3, 9, 4, 8]),
    ],
)
def test_word_table(part, scores):
    for shuffled in (False, True):
        given = WORDS.sample(frac=1, random_state=0) if shuffled else WORDS
        given.attrs = WORDS.attrs
        table = words.word_table(given, part)
        assert table.attrs == WORDS.attrs
        for layer in (0, 1):
            one = table[table.layer == layer].sort_values(["seq", "word"])
            assert one.word_text.tolist() == ["the", "ferry", "the", "lamp", "lamp", "the", "ferry"]
            np.testing.assert_array_equal(one.score, np.array(scores) + 10 * layer)
            # Shares among the seven words of a layer.
            assert np.exp(one.log_frequency).to_numpy() * 7 == pytest.approx([3, 2, 3, 2, 2, 3, 2])
            assert one.groupby("word_text").token_id.nunique().eq(1).all() and one.token_id.nunique() == 3


def test_word_table_of_a_measurement(measured):
    tokens, _ = words.tagged_tokens(measured, "auto")
    mean, first, last = (words.word_table(tokens, part) for part in ("mean", "first", "last"))
    keys = ["layer", "doc", "seq", "word"]
    own = tokens.groupby(keys)
    assert len(mean) == len(first) == len(last) == own.ngroups
    for table, expected in (
        (mean, own.mean(numeric_only=True)),
        (first, own.nth(0).set_index(keys)),
        (last, own.nth(-1).set_index(keys)),
    ):
        one = table.set_index(keys).sort_index()
        for column in ("compression", "surprisal", "erasure"):
            np.testing.assert_allclose(one[column].to_numpy(float), expected.sort_index()[column].to_numpy(float))
    whole = {(p, i) for p, passage in enumerate(measured.capture.passages) for i in range(len(passage.words))}
    assert set(zip(mean.passage, mean.word.astype(int), strict=True)) <= whole


# -- linguistic ---------------------------------------------------------------------------------------------------------------------


def test_a_planted_difference_between_kinds_of_words_is_found(spoken):
    rows = spoken.findings.set_index("question")
    assert spoken.decision.startswith("in part")
    row = rows.loc["function - content"]
    assert row.holds and row.low < 1 < row.high and row.estimate == pytest.approx(1, abs=0.15)  # at fixed controls, too
    assert not rows.loc["noun - verb", "holds"] and abs(rows.loc["noun - verb", "estimate"]) < 0.15
    row = rows.loc["tag"]
    assert row.holds and row.test.startswith("min F'") and row.estimate > 0.1 and row.layer > 0
    assert row.n_units == row.n_documents == 8 and row.p_corrected > row.p
    groups = spoken.tables["groups"]
    mine = groups[(groups.score == "compression") & (groups.group == "function - content") & (groups.control_set == "none")]
    assert mine.estimate.to_numpy() == pytest.approx(1, abs=0.1)
    assert (mine.p_corrected < 0.05).all()
    guide = spoken.findings.set_index("question").loc["function - content"]
    assert guide.guide_reading == "strong" and "t-test over tokens" in guide.guide_test
    means = spoken.tables["tag_means"]
    mine = means[(means.score == "compression") & (means.control_set == "none") & (means.layer == 1)].set_index("tag")["mean"]
    assert mine[["DET", "ADP", "PRON"]].min() > mine[["NOUN", "VERB", "ADJ"]].max()


def test_a_difference_that_is_all_frequency_is_no_finding(measured):
    """Without controls it is there."""
    tokens, _ = words.tagged_tokens(measured, "auto")
    table = words.word_table(tokens, "mean")
    # Frequency made unequal between the kinds, as it is in English.
    kind = table["tag"].map({**dict.fromkeys(words.FUNCTION, "function"), **dict.fromkeys(words.CONTENT, "content")})
    table["kind"] = kind
    table["log_frequency"] += 1.5 * (kind == "function")
    table["compression"] = standard(table["log_frequency"].to_numpy()) + noise(table, 3, 0.1)
    table.attrs = dict(measured.table.attrs)

    def test(controls):
        return lambda part: bl.stats.compare_groups(
            part, "compression", "kind", groups=("function", "content"), paired=True, controls=controls, n_resamples=499
        )

    before = settle("linguistic", [declared_test(table, test(()), measured, "x", "function - content")])
    after = settle("linguistic", [declared_test(table, test(bl.stats.CONTROLS), measured, "x", "function - content")])
    assert before.holds.all() and before.estimate.iloc[0] > 0.5
    assert not after.holds.any() and abs(after.estimate.iloc[0]) < 0.1
    # Another 1 on top of it is found whole: the controls do not take their share of it.
    table["compression"] += 1.0 * (kind == "function")
    (row,) = named_rows(declared_test(table, test(bl.stats.CONTROLS), measured, "x", "function - content"))
    assert row.low < 1 < row.high and row.estimate == pytest.approx(1, abs=0.1)


# -- who the neighbors are ----------------------------------------------------------------------------------------------------------


def with_neighbors(measured, draw):
    """Neighbors by our own rule: from (row, eligible rows) to rows."""
    kept = measured.neighbors
    first = measured.table[measured.table.layer == measured.layers[0]].reset_index(drop=True)
    rows = np.full_like(kept.rows, -1)
    seq, later = first.seq.to_numpy(), first.pos.to_numpy() > 0
    for layer in range(len(rows)):
        for row in np.flatnonzero(later):
            rows[layer, row] = draw(layer, row, np.flatnonzero(later & (seq != seq[row])))
    return replace(measured, neighbors=replace(kept, rows=rows)), first


def test_the_bank_s_rows_are_the_tokens(measured):
    bank = measured.neighbors.bank
    first = measured.table[measured.table.layer == 0]
    assert measured.neighbors.own
    assert bank["seq"].tolist() == first["seq"].tolist() and bank["pos"].tolist() == first["pos"].tolist()


def test_shares_and_chance_by_hand(measured):
    tokens, _ = words.tagged_tokens(measured, "auto")
    shares, curves = neighbor_composition.neighbor_shares(tokens, measured)
    n = len(tokens) // len(measured.layers)
    bank = tokens[:n].reset_index(drop=True)
    rng, compared = np.random.default_rng(0), 0
    columns = {"same_tag": "tag", "same_word": "word_text", "same_document": "doc"}
    for row in rng.choice(np.flatnonzero(bank.pos > 0), 25, replace=False):
        for layer in (0, 2):
            mine, near = bank.loc[row], bank.loc[measured.neighbors.rows[layer][row]]
            others = bank[(bank.pos > 0) & (bank.seq != mine.seq)]
            got = shares.iloc[layer * n + row]
            assert (got.seq, got.pos, got.layer) == (mine.seq, mine.pos, layer)
            for name, column in columns.items():
                if pd.isna(mine[column]):
                    assert np.isnan(got[name]) and np.isnan(got[f"{name}_chance"])
                    continue
                assert got[name] == pytest.approx((near[column] == mine[column]).mean())
                assert got[f"{name}_chance"] == pytest.approx((others[column] == mine[column]).mean())
                assert got[f"{name}_excess"] == pytest.approx(got[name] - got[f"{name}_chance"])
            # Among other words: of the neighbors that are words, but not this one.
            near, others = (part[part.word_text.notna() & (part.word_text != mine.word_text)] for part in (near, others))
            if pd.isna(mine.tag) or not len(near):
                assert np.isnan(got.same_tag_other_word) and np.isnan(got.same_tag_other_word_chance)
                continue
            assert got.same_tag_other_word == pytest.approx((near.tag == mine.tag).mean())
            assert got.same_tag_other_word_chance == pytest.approx((others.tag == mine.tag).mean())
            compared += 1
    assert compared > 25
    assert set(curves.score) == {f"{name}_excess" for name in (*columns, "same_tag_other_word")}
    assert np.allclose(curves.estimate, curves.share - curves.chance, atol=0.05)


def test_chance_of_the_same_tag_among_other_words_by_hand():
    """Words of several tags, tokens without a word or tag, tokens of no group, groups larger than sequences."""
    rng = np.random.default_rng(0)
    word, tag, group = rng.integers(-1, 6, 80), rng.integers(-1, 3, 80), rng.integers(-1, 5, 80)
    eligible = rng.random(80) < 0.8
    found = neighbor_composition._chance_of_other_words(tag, word, group, eligible)
    for row in range(80):
        outside = (group != group[row]) | ((group[row] < 0) & (np.arange(80) != row))
        others = eligible & outside & (word >= 0) & (word != word[row])
        expected = (tag[others] == tag[row]).mean() if tag[row] >= 0 and word[row] >= 0 else np.nan
        assert found[row] == pytest.approx(expected, nan_ok=True)


def test_neighbors_at_random_have_no_excess(measured):
    tokens, _ = words.tagged_tokens(measured, "auto")
    rng = np.random.default_rng(0)
    planted, _ = with_neighbors(measured, lambda _layer, _row, able: rng.choice(able, measured.settings["k"]))
    _, curves = neighbor_composition.neighbor_shares(tokens, planted)
    assert curves.estimate.abs().max() < 0.02
    assert (curves.p_corrected > 0.01).all()


@pytest.fixture
def drawn(measured):
    """Neighbors as told layer by layer, what the declared test makes of them, and the shares."""
    tokens, _ = words.tagged_tokens(measured, "auto")
    first = tokens[tokens.layer == 0].reset_index(drop=True)
    tag, doc, word = (first[name].to_numpy(object) for name in ("tag", "doc", "word_text"))
    alike = {
        "tag": lambda row, able: (tag[able] == tag[row]) & (word[able] != word[row]),
        "word": lambda row, able: word[able] == word[row],
        "document": lambda row, able: doc[able] == doc[row],
        "any": lambda _, able: np.ones(len(able), bool),
    }

    def make(*kinds):
        rng = np.random.default_rng(0)

        def draw(layer, row, able):
            chosen = able[alike[kinds[layer]](row, able)]
            return rng.choice(chosen if len(chosen) and rng.random() < 0.8 else able, measured.settings["k"])

        planted, _ = with_neighbors(measured, draw)
        shares, curves = neighbor_composition.neighbor_shares(tokens, planted)
        return neighbor_composition.syntax_first(shares, planted).iloc[0], curves.set_index(["score", "layer"])

    return make


def test_neighbors_of_the_same_tag_first_and_of_the_same_document_last(drawn):
    earlier, by = drawn("any", "tag", "document")
    assert by.loc[("same_tag_other_word_excess", 1), "share"] > 0.75
    assert by.loc[("same_tag_other_word_excess", 2), "p_corrected"] > 0.01
    assert by.loc[("same_document_excess", 2), "p_corrected"] < 0.05
    assert -1 < earlier.estimate < -0.7 and earlier.p < 0.001 and earlier.effect_unit == "layers"
    later, _ = drawn("any", "document", "tag")
    assert 0.7 < later.estimate < 1 and later.p > 0.99


def test_the_same_word_first_is_no_early_syntax(drawn):
    """Its tag is the same, of course."""
    earlier, by = drawn("word", "word", "document")
    assert by.loc[("same_tag_excess", 1), "estimate"] > 0.4
    assert abs(by.loc[("same_tag_other_word_excess", 1), "estimate"]) < 0.05
    assert earlier.p > 0.05


def test_a_share_that_is_chance_has_no_late_center(measured):
    """Noise that moves together over layers: where it is below chance there is no center, and those count, too."""
    rng, n = np.random.default_rng(3), 40
    keys = pd.DataFrame({"doc": [f"d{i}" for i in range(n)], "seq": range(n), "run": "r"})
    level, tag = rng.normal(0, 0.05, n), rng.normal(0.2, 0.01, n)
    parts = [
        keys.assign(layer=layer, same_tag_other_word_excess=tag if layer == 1 else 0.02, same_document_excess=level + 0.002 * layer)
        for layer in (1, 2, 3)
    ]  # fmt: skip
    shares = pd.concat(parts, ignore_index=True)
    found = neighbor_composition.syntax_first(shares, measured).iloc[0]
    below = int((level + 0.006 <= 0).sum())
    assert found.estimate < -0.5 and found.p > 0.05 and 10 < below < 30
    assert f"{below} sequences have no center" in found.note and 0 < found.p_floor < 1e-3
    above = neighbor_composition.syntax_first(shares.assign(same_document_excess=shares.same_document_excess.abs()), measured).iloc[
        0
    ]
    assert above.p < 0.001


def test_layer_0_is_not_counted_in_what_comes_first(drawn):
    late, _ = drawn("tag", "document", "tag")
    assert late.estimate > 0.5 and late.p > 0.99


def test_one_tag_for_all_is_no_excess(measured):
    tokens, _ = words.tagged_tokens(measured, "auto")
    tokens["tag"], tokens["word"] = "X", 1.0
    shares, curves = neighbor_composition.neighbor_shares(tokens, measured)
    later = shares[(shares.pos > 0)]
    assert (later.same_tag == 1).all() and (later.same_tag_chance == 1).all() and (later.same_tag_excess == 0).all()
    assert "same_tag_excess" not in set(curves.score)
    assert np.isnan(neighbor_composition.syntax_first(shares, measured).p.iloc[0])


def test_shares_are_not_made_where_they_would_mean_nothing(measured):
    tokens, _ = words.tagged_tokens(measured, "auto")
    for other in (
        replace(measured, neighbors=None),
        replace(measured, neighbors=replace(measured.neighbors, own=False)),
    ):
        assert neighbor_composition.neighbor_shares(tokens, other) == (None, None)


def test_chance_knows_which_neighbors_are_excluded(measured):
    """Neighbors of one's own topic are never allowed, and drawn at random from all that are: no excess, more or less."""
    docs = measured.table.doc.str.removeprefix("doc-").astype(int)
    table = measured.table.assign(topic="t" + (docs % 3).astype(str))
    held = plant(replace(measured, settings={**measured.settings, "exclude": "topic"}), table)
    tokens = held.table.assign(word=1.0, tag=held.table.topic, word_text=held.table.topic)  # tags go with topics
    tokens.attrs = dict(measured.table.attrs)
    topic = tokens[tokens.layer == 0].topic.to_numpy()
    rng = np.random.default_rng(0)
    planted, _ = with_neighbors(held, lambda _layer, row, able: rng.choice(able[topic[able] != topic[row]], 5))
    _, curves = neighbor_composition.neighbor_shares(tokens, planted)
    assert curves is None or curves.estimate.abs().max() < 0.05


# -- contrasts ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prompted(llama):
    return S.measure(
        llama, prompts(), studies=["layers"], layers=[1], max_length=64, unit="template", exclude="template", bank="reference",
        contrast=Contrast("span", "IO", "S"), **QUIET,
    )  # fmt: skip


def test_spans_are_contrasted_within_prompts(llama, prompted):
    assert prompted.n_units == len(TEMPLATES)
    assert contrast_report.is_paired(prompted.table)
    one = prompted.table[prompted.table.layer == 1]
    for side in ("IO", "S"):
        for passage, part in one[one.contrast == side].groupby("passage"):
            start, end = prompted.capture.passages[passage].spans[side]
            assert ((part.start < end) & (part.end > start)).all()
    # Planted: IO above S by 1, in every prompt.
    level = one.contrast.map({"IO": 1.0, "S": 0.0}).fillna(5.0).to_numpy()
    study = S.study_layers(llama, plant(prompted, compression=level + noise(one, 0, 0.1)), progress=False)
    found = study.tables["contrast"]
    row = found[(found.score == "compression") & (found.control_set == "none")].iloc[0]
    assert row.estimate == pytest.approx(1, abs=0.2) and row.n_units == len(TEMPLATES) and row.unit == "template"
    assert row.p == pytest.approx(2 / 2 ** len(TEMPLATES))
    assert any("Contrast: span: IO - S" in line for line in study.about)
    assert "contrast-by-layer" in study.figures
    assert not any("Any contrast" in line for line in study.not_tested)


def test_labels_are_contrasted_between_texts(prompted):
    """A truth value is given as text."""
    contrast = Contrast("early", "True", "False")
    table = prompted.table.assign(contrast=contrast.values(prompted.table))
    assert (table.contrast == np.where(table.early, "True", "False")).all()
    assert not contrast_report.is_paired(table)
    side = table.contrast.eq("True").to_numpy()
    held = plant(replace(prompted, contrast=contrast, settings={**prompted.settings, "unit": "document"}), table)
    held = plant(held, compression=2.0 * side + noise(table, 0, 0.5))
    section, found, _ = contrast_report.contrast_section(held.table, ["compression"], held)
    row = found[found.control_set == "none"].iloc[0]
    assert row.estimate == pytest.approx(2, abs=0.2) and row.p <= 0.001 and row.n_units == 3 * len(TEMPLATES)
    assert "between whole units" in section.text


def test_sides_of_spans(llama):
    text = "Mary and John went to the shop, and then they went home again in the rain."
    where = {"IO": (0, 13), "S": (9, 18), "other": (26, 30)}
    passages = [bl.Passage(text, doc=f"d{i}", spans=where) for i in range(7)]
    table = bl.analyze(llama, passages, [bl.analyzers.StateNorm()], layers=[0], progress=False)
    side = Contrast("span", "IO", "S").values(table)
    for row, got in zip(table.itertuples(), side, strict=True):
        io, s = (row.start < b and row.end > a and row.start >= 0 for a, b in (where["IO"], where["S"]))
        assert got == (None if io == s else "IO" if io else "S")
    assert (table.span.str.split("+").map(len) == 2).any()  # some tokens are in both
    with pytest.raises(StudyError, match="expected a label of the texts or span as contrast, got 'topic'"):
        Contrast("topic", "a", "b").values(table)


def refused(llama, monkeypatch, data, match, error=StudyError, study=None, **options):
    """Before any token went through the model."""
    run = S.measure if study is None else getattr(S, f"study_{study}")
    with counting(monkeypatch) as (forward, _), pytest.raises(error, match=match):
        run(llama, data, **QUIET | {"max_length": 40} | options)
    assert forward == []


@pytest.mark.parametrize(
    ("contrast", "match"),
    [
        (Contrast("span", "IO", "X"), "expected tokens with span"),
        (Contrast("span", "IO", "IO"), "two different values"),
        (Contrast("early", "True", "maybe"), "'False', 'True'"),
        (Contrast("token", "a", "b"), "two different values"),
    ],
)
def test_contrasts_that_the_texts_do_not_have(llama, monkeypatch, contrast, match):
    refused(llama, monkeypatch, prompts(1), match, contrast=contrast)


@pytest.mark.parametrize(
    ("passages", "contrast"),
    [
        pytest.param(
            [*short_texts(8, spans={"S": (2, 9)}), bl.Passage("short one", spans={"IO": (0, 3)})],
            Contrast("span", "IO", "S"), id="span of a text that is passed over",
        ),
        pytest.param(
            [made_text(16, i, f"d{i}", labels={} if i == 9 else {"g": i % 2}) for i in range(10)],
            Contrast("g", "1", "0"), id="whole numbers, and one text without",
        ),
        pytest.param(
            short_texts(8, spans={"a+b": (2, 9), "S": (12, 20)}), Contrast("span", "a+b", "S"), id="plus in a name",
        ),
    ],
)  # fmt: skip
def test_contrasts_are_refused_early_or_not_at_all(llama, monkeypatch, passages, contrast):
    with counting(monkeypatch) as (forward, _):
        try:
            S.measure(llama, passages, studies=["linguistic"], contrast=contrast, layers=[0], max_length=40, **QUIET)
        except StudyError:
            assert forward == []


# -- measure ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def planned(llama):
    """Documents of 1 to 6 sequences, and some short ends."""
    made = [made_text(20 + 19 * (seed % 6), seed, f"doc-{seed}") for seed in range(12)]
    return bl.Capture.plan(llama, made, max_length=40)


def test_chosen_sequences(planned):
    every, short = sequences.choose_sequences(planned, None, 2, 0)
    lengths = planned.lengths.tolist()
    assert every == [seq for seq, length in enumerate(lengths) if length >= sequences.FEWEST_TOKENS]
    assert short == len(lengths) - len(every) > 0
    for most in (1, 5, 12, 17, len(every), 999):
        chosen, same = sequences.choose_sequences(planned, most, 2, 0)
        assert len(chosen) == min(most, len(every)) and same == short
        assert chosen == sorted(set(chosen)) and set(chosen) <= set(every)


@pytest.mark.parametrize("per_document", [1, 2, 3])
def test_sequences_are_spread_over_documents(planned, per_document):
    docs = planned.docs
    every, _ = sequences.choose_sequences(planned, None, per_document, 0)
    able = pd.Series([docs[seq] for seq in every]).value_counts()
    before: set[int] = set()
    for most in range(1, len(every) + 1):
        chosen, _ = sequences.choose_sequences(planned, most, per_document, 3)
        assert before < set(chosen)  # more sequences are the same and others
        before = set(chosen)
        held = pd.Series([docs[seq] for seq in chosen]).value_counts().reindex(able.index, fill_value=0)
        rounds = np.ceil(held / per_document)
        # Nobody gets a second round before everyone who has more texts has had a first.
        waiting = held[held < able]
        assert waiting.empty or rounds.max() <= np.floor(waiting / per_document).min() + 1
        for doc in held[held > 0].index:  # a document's first sequences come first
            mine = [seq for seq in every if docs[seq] == doc]
            assert [seq for seq in chosen if docs[seq] == doc] == mine[: held[doc]]


def test_the_choice_is_seeded(planned):
    one, same, other = (sequences.choose_sequences(planned, 6, 1, seed)[0] for seed in (0, 0, 1))
    assert one == same != other


def test_what_is_measured_is_said(measured, texts):
    made = measured.settings
    assert made["sequences_given"] == len(measured.planned.sequences)
    assert len(measured.capture.sequences) == 32
    assert measured.n_units == 16 and measured.layers == [0, 1, 2]
    assert not measured.planned.is_read
    rows = measured.planned.row_token
    ids, counts = rows.unique(return_counts=True)
    assert measured.frequency == pytest.approx(dict(zip(ids.tolist(), (counts / len(rows)).tolist(), strict=True)))
    assert sum(measured.frequency.values()) == pytest.approx(1)
    assert len(measured.planned.row_token) > len(measured.capture.row_token)
    json.dumps(made, allow_nan=False)
    (facts,) = study_provenance(measured).values()
    assert facts["study"] == made
    assert any("32 sequences of 16 documents" in line for line in about_measured(measured))
    assert len(texts) == 18


def test_integrated_gradients_of_some_sequences_only(measured):
    table = measured.table
    there = table.groupby("seq")["integrated_gradients"].apply(lambda column: column.notna().any())
    assert there.sum() == measured.settings["integrated_gradients_sequences"] == 8
    chosen = table[table.seq.isin(there[there].index)]
    assert chosen.drop_duplicates("seq").doc.nunique() == 8  # a document each
    layers = [part["integrated_gradients"].to_numpy() for _, part in table.groupby("layer")]
    for one, other in pairwise(layers):
        np.testing.assert_array_equal(one, other)


def test_integrated_gradients_are_those_of_the_sequence(llama, measured):
    table = measured.table[measured.table.layer == 0]
    seq = int(table[table["integrated_gradients"].notna()].seq.iloc[-1])
    part = bl.capture.subset(measured.capture, [seq])
    own = bl.analyze(llama, part, [bl.analyzers.IntegratedGradients(layer=1, steps=24)], layers=[0], progress=False)
    np.testing.assert_allclose(own["integrated_gradients"], table[table.seq == seq]["integrated_gradients"], rtol=1e-3, atol=1e-4)


def test_one_pass_serves_the_importance_study(llama, monkeypatch):
    """One batch: a forward pass for all, a backward pass per target, and those that erasure and transport say they need."""
    data = short_texts(8)
    options = {"layers": [1], "max_length": 40, "context": "native", **QUIET}
    with counting(monkeypatch) as (plain, none):
        S.measure(llama, data, studies=["linguistic"], **options)
    with counting(monkeypatch) as (forward, backward):
        S.measure(llama, data, studies=["importance"], integrated=0, **options)
    lengths = [
        length for length in bl.Capture.plan(llama, data, max_length=40).lengths.tolist() if length >= sequences.FEWEST_TOKENS
    ]
    reading = (len(lengths), max(lengths))
    assert plain.count(reading) == forward.count(reading) == 1
    assert none == [] and len(backward) == 2  # future loss and last logit
    erased = sum(min(16, length - 3) for length in lengths)
    assert sum(shape[0] for shape in forward) - sum(shape[0] for shape in plain) == erased


def test_refused_before_the_model_runs(llama, monkeypatch):
    few, enough = short_texts(5), short_texts(8)
    refused(llama, monkeypatch, few, r"at least 6 units \(document\).*got 5")
    refused(llama, monkeypatch, enough, "expected studies among", studies=["importance", "nonsense"])
    refused(llama, monkeypatch, enough, "expected studies among", studies=[])
    refused(llama, monkeypatch, enough, "unit", unit="nothing")
    refused(llama, monkeypatch, enough, "exclude", NeighborError, exclude="topic")
    refused(llama, monkeypatch, enough, "expected k", NeighborError, k=10_000)
    refused(llama, monkeypatch, enough, "at least 1", max_sequences=0)
    refused(llama, monkeypatch, enough, "at least 1", per_document=0)
    refused(llama, monkeypatch, enough, "layer", BasinLensError, layers=[7])


def test_texts_that_are_all_too_short(llama, monkeypatch):
    refused(llama, monkeypatch, short_texts(9, n_words=2), "sequences of 12 tokens, got 0")


def test_unknown_context(llama, monkeypatch):
    """Under pytest the type checks come first."""
    with counting(monkeypatch) as (forward, _), pytest.raises(Exception, match="nothing"):
        S.measure(llama, short_texts(8), context="nothing", **QUIET)
    assert forward == []


@pytest.mark.parametrize(
    ("study", "options"),
    [
        ("linguistic", {"tagger": "gold"}),
        ("linguistic", {"sentiment": "nothing"}),
        ("robustness", {"importance": "nothing", "dtype": None}),
    ],
)
def test_options_of_a_study_are_refused_before_the_model_runs(llama, monkeypatch, study, options):
    data = [bl.Passage(passage.text, doc=passage.doc) for passage in short_texts(8)]
    refused(llama, monkeypatch, data, "expected", (StudyError, TextError), study=study, layers=[0], **options)


def test_token_ids_have_no_words(llama, monkeypatch):
    refused(llama, monkeypatch, random_tokens(8, 24), "character offsets", study="linguistic", layers=[0])


def test_what_was_measured_is_taken_as_it_is(llama, measured):
    for study in S.STUDIES:
        run = getattr(S, f"study_{study}")
        with pytest.raises(StudyError, match=r"no options of measure.*max_sequences"):
            run(llama, measured, max_sequences=3, progress=False)
        with pytest.raises(StudyError, match=f"measured for the study '{study}'"):
            run(llama, replace(measured, studies=()), progress=False)
        with pytest.raises((ModelError, CaptureError)):
            run(make_bridge("llama", seed=1, tokenizer=make_tokenizer()), measured, progress=False)
    capture = replace(measured.capture, passages=None)
    with pytest.raises(StudyError, match="character offsets"):
        S.study_linguistic(llama, replace(measured, capture=capture), progress=False)


# -- code length -----------------------------------------------------------------------------------------------------------------


def test_code_lengths_are_bits_and_stand_beside_the_token_before(measured):
    table = codelength.with_code_lengths(measured.table)
    assert np.allclose(table.code_length * np.log(2), table.surprisal, equal_nan=True)
    for (_, _), rows in table[table.seq < 2].sort_values("pos").groupby(["layer", "seq"]):
        assert np.array_equal(rows.next_code_length.to_numpy()[:-1], rows.code_length.to_numpy()[1:], equal_nan=True)
        assert np.isnan(rows.next_code_length.iloc[-1])


def test_compression_that_goes_with_the_next_code_length_is_found_and_chance_is_not(llama, measured):
    after = codelength.with_code_lengths(measured.table).next_code_length
    drawn = plant(measured, compression=after.fillna(after.mean()) / after.std() + noise(measured.table, 8, 0.3))
    study = S.study_codelength(llama, drawn, progress=False)
    found = study.findings.set_index("question")
    assert found.holds["next_code_length"] and found.estimate["next_code_length"] > 0.5
    assert set(study.tables["partial_correlation"].against) == {"code_length", "next_code_length"}
    assert "bits per token" in study.verdict[-1] and "code length" in study.report().html
    nothing = S.study_codelength(llama, plant(measured, compression=noise(measured.table, 9, 1.0)), progress=False)
    assert not nothing.findings.holds.any() and nothing.decision in ("no", "undecided")


def test_names():
    assert registry.check_names("all") == list(S.STUDIES)
    assert registry.check_names("layers", "importance") == ["layers", "importance"]
    for wrong in ((), ("all", "layers"), ("summary",)):
        with pytest.raises(StudyError, match="expected studies among"):
            registry.check_names(*wrong)


@pytest.mark.parametrize(("n", "expected"), [(1, [0]), (3, [0, 1, 2]), (10, list(range(10))), (30, None), (12, None)])
def test_spaced_layers(n, expected):
    layers = room.spaced_layers(n)
    assert layers == (expected or layers)
    assert layers[0] == 0 and layers[-1] == n - 1 and len(layers) == min(n, 10)
    steps = np.diff(layers)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1


# -- few texts, odd texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "study", ["layers", *(pytest.param(name, marks=pytest.mark.slow) for name in ("importance", "linguistic"))]
)
def test_the_fewest_documents(llama, study):
    more = {"integrated": 0} if study == "importance" else {}
    made = getattr(S, f"study_{study}")(llama, short_texts(6), layers=[0, 1], max_length=30, **QUIET, **more)
    assert made.findings.note.str.contains(r"too few units to halve \(6\)|not tested").all() or study == "linguistic"
    assert not made.findings.holds[made.findings.p.isna()].any()
    told = " ".join(made.verdict).lower()
    for row in made.findings.itertuples():
        assert row.note.lower() in told
        assert row.n_units in (0, 6)
    if study == "layers":  # six documents by sign flips: 1 / 2^6, of two tests, at one layer
        assert made.findings.p_floor.tolist() == [1 / 64, 1 / 64]
        assert made.findings.within_reach.all() and made.decision != "undecided"


@pytest.mark.parametrize("effect", [pytest.param(0.0, marks=pytest.mark.slow), 3.0])
def test_parts_of_speech_in_the_fewest_documents(llama, effect):
    """Sign flips of 6 units reach 2 / 64, too much for a family; min F' has no such bound and is as large as the effect."""
    held = S.measure(llama, short_texts(6, n_words=40), studies=["linguistic"], layers=[0, 1], max_length=60, **QUIET)
    tokens, _ = words.tagged_tokens(held, "auto")
    values = effect * tokens["tag"].isin(words.FUNCTION) + noise(tokens, 3, 0.5)
    made = S.study_linguistic(llama, plant(held, compression=values), progress=False)
    rows = made.findings.set_index("question")
    assert rows.note[:3].str.contains("too few units to halve").all() and "not tested" in rows.note.iloc[3]
    assert rows.within_reach.tolist() == [False, False, True, False]
    assert rows.holds.tolist() == [False, False, effect > 0, False]
    assert made.decision.startswith("in part" if effect else "no")


@pytest.mark.parametrize("documents", [8, pytest.param(18, marks=pytest.mark.slow)])
def test_texts_without_content_words(llama, documents):
    only = short_texts(documents, n_words=20, tags={"DET": 1.0})
    made = S.study_linguistic(llama, only, layers=[0, 1], max_length=30, **QUIET)
    assert made.decision == "undecided" and made.findings.p.isna().all()
    assert made.findings.note.str.contains("not tested: expected").all()
    # Two kinds of function words can be told apart, or not, but from nothing else.
    only = short_texts(documents, n_words=20, tags={"DET": 0.5, "ADP": 0.5})
    made = S.study_linguistic(llama, only, layers=[0, 1], max_length=30, **QUIET)
    assert made.findings.set_index("question").p.notna().tolist() == [False, False, True, False]
    assert made.decision == "no"


@pytest.mark.parametrize("study", ["layers", pytest.param("robustness", marks=pytest.mark.slow)])
def test_a_contrast_with_too_few_texts_on_one_side(llama, study):
    data = [made_text(16, i, f"d{i}", labels={"g": i < 3}) for i in range(12)]
    more = {"dtype": None} if study == "robustness" else {}
    made = getattr(S, f"study_{study}")(
        llama, data, layers=[1], max_length=30, contrast=Contrast("g", "True", "False"), **QUIET, **more
    )
    side = made.tables["contrast"] if study == "layers" else made.tables["settings"].query("question == 'contrast'")
    assert len(side) and side.p.isna().all()
    assert side.note.str.contains("expected at least 4 units (document) with contrast = True", regex=False).all()
    if study == "robustness":
        row = made.findings.set_index("question").loc["contrast"]
        assert np.isnan(row.p) and not row.holds and not row.within_reach
        assert any(line.startswith("contrast g: True - False: could not be tested") for line in made.verdict)


def test_one_sequence_a_document_has_no_neighbors_of_its_document(llama):
    made = S.study_linguistic(llama, short_texts(12, n_words=12), layers=[0, 1], max_length=64, **QUIET)
    row = made.findings[made.findings.question == "same tag - same document"].iloc[0]
    assert np.isnan(row.p) and "not tested" in row.note and not row.holds
    assert "same_document_excess" not in set(made.tables["neighbor_shares"].score)


@pytest.mark.parametrize("documents", [12, pytest.param(24, marks=pytest.mark.slow)])
def test_sentences_by_sentiment(llama, documents):
    data = [made_text(16, i, f"d{i}", labels={"mood": ("good", "bad")[i % 2]}) for i in range(documents)]
    held = S.measure(llama, data, studies=["linguistic"], layers=[1], max_length=64, **QUIET)
    table = held.table
    study = S.study_linguistic(
        llama, plant(held, compression=(table.mood == "bad") + noise(table, 0, 0.2)), sentiment="mood", progress=False
    )
    found = study.tables["sentiment"]
    row = found[(found.score == "compression") & (found.control_set == "none")].iloc[0]
    assert row.estimate == pytest.approx(1, abs=0.15) and row.p < 0.01 and row.n_units == documents
    assert "sentiment-by-layer" in study.figures


# -- robustness ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sturdy(llama):
    """An effect in the table only, not in the model: compression above random points, by surprisal's rank."""
    data = short_texts(20, n_words=13)
    held = S.measure(llama, data, studies=["robustness"], layers=[1], max_length=40, **QUIET)
    table = held.table
    values = table["compression_random"] + 1 + noise(table, 0, 0.2)
    return held, S.study_robustness(llama, plant(held, compression=values), dtype=None, progress=False)


def test_what_is_in_the_table_only_does_not_survive(sturdy):
    held, study = sturdy
    name = "differs from random neighbors"
    row = study.tables["survival"].set_index("finding").loc[name]
    assert row.holds_as_run
    assert row.survives < row.settings
    assert study.decision == "no"
    assert not study.findings.set_index("finding").loc[name, "holds"]
    mine = study.tables["settings"].query("finding == @name").set_index("setting")
    # Parts of the same table keep it; anything that the model measures again does not.
    for setting in ("as run", "tested tokens from position 8 on", "one half of the documents", "the other half"):
        assert mine.loc[setting, "estimate"] == pytest.approx(1, abs=0.1)
    for setting in ("k = 10", "context native", "neighbors of other tokens"):
        assert not mine.loc[setting, "survives"]
        assert setting in row.lost_under
    raised = study.flags[(study.flags.flag == "lost under another setting") & study.flags.why.str.startswith(name)]
    assert raised.raised.tolist() == [True]
    assert held.n_units == 20


def test_survival_is_counted(sturdy):
    _, study = sturdy
    for finding, mine in study.tables["settings"].groupby("finding"):
        row = study.tables["survival"].set_index("finding").loc[finding]
        twin, score = mine[mine.kind == "twin"], mine[mine.kind == "score"]
        rest = mine[~mine.kind.isin(["twin", "score"]) & (mine.setting != "as run")]
        assert len(twin) == 1 and len(score) == 1 and mine.setting.is_unique
        few = rest[rest.p.notna() & ~rest.within_reach]
        assert (few.p_floor * few.n_tests > 0.05).all() and (few.p_corrected > 0.05).all()
        assert row.settings == rest.p.notna().sum() - len(few)
        assert row.not_testable == ("; ".join(few.setting) or "none")
        assert row.survives == rest.survives.fillna(False).sum()
        assert row.not_tested == rest.p.isna().sum() + twin.p.isna().sum() + len(few)
        lost = rest[rest.survives.eq(False).fillna(False)].setting
        assert row.lost_under == ("; ".join(lost) or "none")
        # Two families: the twin's p is its own, the others pay for each other.
        assert twin.p_corrected.tolist() == pytest.approx(twin.p.tolist(), nan_ok=True)
        own = mine[~mine.kind.isin(["twin", "score"])]
        expected = bl.stats.correct(own[["p"]].reset_index(drop=True), "holm").p_corrected
        assert own.p_corrected.tolist() == pytest.approx(expected.tolist(), nan_ok=True)
        sign = np.sign(own.set_index("setting").loc["as run", "estimate"])
        assert (own[own.survives.fillna(False)].estimate * sign > 0).all()
        assert (own[own.survives.fillna(False)].p_corrected <= 0.05).all()


def test_settings_that_change_one_thing(sturdy):
    _, study = sturdy
    kinds = set(study.tables["settings"].kind)
    assert kinds == {"own", "positions", "halves", "k", "metric", "neighbors", "position 0", "context", "score", "bank", "twin"}
    names = set(study.tables["settings"].setting)
    assert {"k = 10", "k = 15", "k = 30", "k = 50", "cosine neighbors", "half of the bank", "built-in passages as bank"} <= names
    assert "k = 5" not in names and "context patched" not in names
    said = " ".join(study.not_tested)
    for line in (
        "second trained model",
        "radius-matched",
        "agreement with erasure",
        "each setting that counts",
    ):
        assert line in said
    assert study.findings.question.tolist() == [
        "random", "surprisal", "gradient_norm_scaled", "attention_received", "function-content", "noun-verb",
    ]  # fmt: skip
    twin = study.tables["settings"].query("kind == 'twin'").set_index("question")
    assert twin.p.drop(["function-content", "noun-verb"]).notna().all()
    assert study.findings.effect_unit.tolist() == ["nats", "", "", "", "nats", "nats"]


def test_position_0_is_a_setting_of_its_own(llama, sturdy):
    """Nothing but position 0 changes: the finding again, from a run with it among nearest and random points."""
    held, study = sturdy
    row = study.tables["settings"].query("kind == 'position 0' and question == 'random'").iloc[0]
    scores = [bl.analyzers.Compression(k=held.settings["k"], position_0=p, name=f"c{p}") for p in (False, True)]
    random = [c for c in controls_of(scores) if c.choice == "random"]
    first = [held.capture.docs.index(doc) for doc in dict.fromkeys(held.capture.docs)]
    asked = np.isin(held.capture.row_seq.numpy(), first)
    tested = bl.analyze(llama, held.capture, [*scores, *random], layers=[1], queries=asked, seed=held.seed, progress=False)
    without, with_it = ((tested[f"c{p}"] - tested[f"c{p}_random"]).groupby(tested.seq).mean().mean() for p in (False, True))
    assert row.estimate == pytest.approx(with_it, abs=1e-5) and row.n_units == 20
    assert abs(with_it - without) > 1e-3


def test_corrected_by_hand():
    table = pd.DataFrame({
        "finding": "f", "setting": ["as run", "a", "b", "c", "d", "twin", "other score"], "kind": ["own", "k", "k", "k", "k", "twin", "score"],
        "estimate": [1.0, 2.0, -2.0, 1.0, np.nan, 1.0, -1.0], "null": 0.0, "p": [0.001, 0.01, 0.001, 0.04, np.nan, 0.04, 0.9],
        "test": "t", "n_units": 9, "note": "",
    })  # fmt: skip
    done = stability.corrected(table).set_index("setting")
    there = ["as run", "a", "b", "c", "twin", "other score"]
    assert done.loc[there, "p_corrected"].tolist() == pytest.approx([0.004, 0.02, 0.004, 0.04, 0.04, 0.9])
    assert done.survives.loc[there].tolist() == [True, True, False, True, True, False]
    assert pd.isna(done.survives["d"])
    settled = SETTLED
    (row,) = stability.survival_of(stability.corrected(table), settled).to_dict("records")
    assert (row["settings"], row["survives"], row["lost_under"], row["not_tested"]) == (3, 2, "b", 1)
    assert row["in_random_twin"] is True
    assert survived(table).holds.tolist() == [False]
    without = stability.survival_of(stability.corrected(table[table.kind != "twin"]), settled)
    assert without.in_random_twin[0] is None


SETTLED = pd.DataFrame([
    {"finding": "f", "question": "q", "layer": 1, "holds": True, "within_reach": True, "effect": "mean difference", "effect_unit": "nats",
     "estimate": 1.0, "p": 0.01, "p_corrected": 0.01, "note": "layer chosen on 9 documents"},
])  # fmt: skip


def survived(table):
    return stability.with_survival(SETTLED, stability.survival_of(stability.corrected(table), SETTLED))


def some_settings(**twin):
    return pd.DataFrame({
        "finding": "f", "setting": ["as run", "a", "b", "twin"], "kind": ["own", "k", "halves", "twin"], "estimate": 1.0, "null": 0.0,
        "p": [0.001, 0.01, 0.01, twin.get("p", 0.5)], "test": "t", "n_units": 9, "note": "",
    })  # fmt: skip


def told(table):
    found = stability.survival_of(stability.corrected(table), SETTLED)
    settled = stability.with_survival(SETTLED, found)
    return decide(settled, None), stability.verdict_of(decide(settled, None), settled, found), found, settled


def test_a_twin_that_was_not_checked_shows_nothing_absent():
    decision, verdict, _, settled = told(some_settings())
    assert decision == "yes" and settled.within_reach.all()
    assert "absent from the random twin" in verdict[0] and "absent from the random twin" in verdict[1]
    assert verdict[1].endswith("Layer chosen on 9 documents.")
    for table in (some_settings(p=np.nan), some_settings().query("kind != 'twin'")):
        decision, verdict, found, settled = told(table)
        assert decision == "undecided"
        assert not settled.holds.any() and not settled.within_reach.any()
        assert "absent" not in " ".join(verdict)
        assert "could not be checked in the random twin" in verdict[0] and "not checked in the random twin" in verdict[1]
        assert any(line.startswith("In the random twin: f.") for line in stability.untestable(found))
        assert stability.flags_of(found).set_index("flag").raised.isna()["appears in the random twin"]
        row = named_rows(settled.assign(p_floor=0.0, n_tests=1, low=np.nan, n_units=9, n_documents=9))[0]
        assert "Significant, but survives 2 of 2 settings (lost under: none); not checked in the random twin" in sentence(row)
    decision, verdict, _, settled = told(some_settings(p=0.001))
    assert decision == "no" and "ALSO IN THE RANDOM TWIN" in verdict[1] and settled.within_reach.all()


def test_one_finding_without_the_twin_among_others():
    both = [SETTLED, SETTLED.assign(finding="g")]
    settings = pd.concat([some_settings(), some_settings(p=np.nan).assign(finding="g")], ignore_index=True)
    found = stability.survival_of(stability.corrected(settings), pd.concat(both, ignore_index=True))
    settled = stability.with_survival(pd.concat(both, ignore_index=True), found)
    assert settled.holds.tolist() == [True, False]
    verdict = stability.verdict_of(decide(settled, None), settled, found)
    assert verdict[1].startswith("1 of 2 findings count as holding under every setting; 1 could not be checked in the random twin")
    assert "absent" not in verdict[0] + verdict[1] + verdict[3] and "absent from the random twin" in verdict[2]


def test_a_setting_that_no_p_could_pass_is_not_lost():
    """Halves of six units by sign flips: 2 / 2^6 is too much for two tests, and here two are left after the smallest."""
    flips = "sign-flip permutation"
    table = some_settings().assign(test=[flips, flips, flips, "t"], n_units=[12, 12, 6, 12], p=[0.001, 0.04, 0.04, 0.5])
    _, verdict, found, settled = told(table)
    (row,) = named_rows(found)
    assert (row.settings, row.survives, row.lost_under, row.not_testable, row.not_tested) == (1, 0, "a", "b", 1)
    assert not settled.holds.any() and settled.within_reach.all()
    assert "not testable under: b" in verdict[1]
    assert stability.untestable(found) == ["f: too few units for any p to reach 0.05 (Holm) under b."]
    assert "not testable" in stability.corrected(table).set_index("setting").note["b"]
    # The same p with enough units is lost; six units are enough where the other setting passes, so that one test is left.
    (row,) = named_rows(told(table.assign(n_units=12))[2])
    assert (row.settings, row.survives, row.lost_under, row.not_testable) == (2, 0, "a; b", "none")
    for p, survives in ((0.04, 2), (0.06, 1)):
        (row,) = named_rows(told(table.assign(p=[0.001, 0.01, p, 0.5]))[2])
        assert (row.settings, row.survives, row.not_testable) == (2, survives, "none")
    # Nothing that could be tested: no yes by default.
    decision, verdict, _, settled = told(table.assign(n_units=4))
    assert "testable under no other setting, for too few units" in verdict[1] and "lost under" not in verdict[1]
    assert decision == "undecided" and not settled.holds.any()


@pytest.mark.slow
def test_token_ids_parallel_blocks_and_another_bank():
    """What cannot be tried is said, and nothing crashes."""
    neox = make_bridge("neox", tokenizer=make_tokenizer())
    study = S.study_robustness(neox, random_tokens(14, 22), layers=[1], bank="reference", dtype=None, **QUIET)
    said = " ".join(study.not_tested)
    for expected in ("token ids were given", "parallel blocks", "needs the texts as their own bank"):
        assert expected in said
    assert "function-content" not in set(study.findings.question)
    # The twin has the same tokens: ids will do, for every finding.
    twin = study.tables["settings"].query("kind == 'twin'")
    assert len(twin) == len(study.findings) == 4 and twin.p.notna().all()
    assert study.tables["survival"].in_random_twin.notna().all()
    assert not any("random twin" in line for line in study.not_tested)
    json.dumps(study.as_json(), allow_nan=False)


def test_the_same_tokens_read_by_the_same_model(llama, measured):
    """A copy of the model in its own number format, as if it were another: every column as in the run, documents and labels too."""
    held = replace(measured, capture=bl.capture.subset(measured.capture, range(0, 32, 2)))
    held = replace(held, table=held.table[held.table.seq % 2 == 0].assign(seq=lambda t: t.seq // 2), bank=measured.capture)
    held.table.attrs = dict(measured.table.attrs)
    untested = []
    names = ["gradient_norm_scaled", "attention_received", "gradient_norm_last_logit"]
    (made,) = variants.other_model(lambda: llama, "same", "dtype", held, [1], names, untested)
    assert untested == [] and made.at == {1: 1}
    one = held.table[held.table.layer == 1]
    asked = variants.queries(held.capture)
    assert made.table.doc.tolist() == one.doc.tolist() and made.table.token_id.tolist() == one.token_id.tolist()
    for name in ("compression", "surprisal", *names):
        got, expected = np.asarray(made.table[name])[asked], np.asarray(one[name])[asked]
        # The spread of random points, one number for all tokens, is of other points drawn.
        shift = np.nanmean(got - expected) if name == "compression" else 0.0
        assert abs(shift) < 0.05
        np.testing.assert_allclose(got - shift, expected, rtol=1e-3, atol=1e-4)
    assert made.table.tag.tolist() == words.tagged_tokens(held, "auto")[0].query("layer == 1").tag.tolist()
    assert np.allclose(made.table.log_frequency, variants.with_frequency(one, held).log_frequency)
    # Without texts: ids of ragged sequences, with the run's documents.
    bare = replace(held, capture=replace(held.capture, passages=None))
    (ids,) = variants.other_model(lambda: llama, "same", "twin", bare, [1], names, untested)
    assert untested == [] and ids.table.doc.tolist() == one.doc.tolist() and "tag" not in ids.table
    np.testing.assert_allclose(ids.table.compression, made.table.compression, rtol=1e-5)
    assert not list(variants.other_model(lambda: llama, "another", "model", bare, [1], names, untested))
    assert untested == ["another: token ids were given, not texts."]


@pytest.mark.slow
def test_a_twin_that_cannot_be_built_costs_the_findings_not_the_study(llama, sturdy, monkeypatch):
    def refused(*_, **__):
        raise ModelError("expected a model that can be built from its settings alone.")

    monkeypatch.setattr(robustness, "random_twin", refused)
    monkeypatch.setattr(robustness, "scores", lambda *_: iter(()))  # for time
    monkeypatch.setattr(robustness, "banks", lambda *_: iter(()))
    study = S.study_robustness(llama, sturdy[0], dtype=None, progress=False)
    assert study.decision == "undecided" and study.findings.p.notna().any()
    assert "absent" not in " ".join(study.verdict)
    assert any("built from its settings alone" in line for line in study.not_tested)


def test_pieces_of_text_as_passages(measured, prompted):
    made = variants.passages_of(measured.capture)
    assert [p.doc for p in made] == measured.capture.docs
    for sequence, passage in zip(measured.capture.sequences, made, strict=True):
        whole = measured.capture.passages[sequence.passage]
        start = min(s for s in sequence.starts if s >= 0)
        assert whole.text[start : start + len(passage.text)] == passage.text
        assert [w.text for w in passage.words] == [passage.text[w.start : w.end] for w in passage.words]
        inside = [w for w in whole.words if w.start >= start and w.end <= start + len(passage.text)]
        assert [(w.text, w.tag) for w in passage.words] == [(w.text, w.tag) for w in inside]
    for one, other in zip(variants.passages_of(prompted.capture), prompted.capture.passages, strict=True):
        assert (one.text, dict(one.spans), dict(one.labels)) == (other.text, dict(other.spans), dict(other.labels))
    assert variants.passages_of(replace(measured.capture, passages=None)) is None


def test_a_second_model_with_another_tokenizer_has_its_own_frequencies(sturdy):
    """The same model, its token ids permuted: every finding must come out the same as for the model itself."""
    held, _ = sturdy
    findings = robustness._findings(held, ["gradient_norm_scaled"], False)
    moved = variants.Setting("other ids", "model", plant(held, held.table.assign(token_id=9_999 - held.table.token_id)).table)
    same = variants.Setting("same", "model", held.table)
    one, other = (robustness._tested(replace(findings[2], layer=1), setting).iloc[0] for setting in (same, moved))
    assert one.n_tokens == other.n_tokens
    assert one.estimate == pytest.approx(other.estimate)


def test_a_trained_model_of_another_architecture_and_tokenizer_as_second_model(sturdy, trained):
    """Four layers for three, other tokens of the same words: every text, its documents and its words are there."""
    held, _ = sturdy
    untested = []
    (made,) = variants.other_model(lambda: trained, "trained", "model", held, [1], ["gradient_norm_scaled"], untested)
    assert untested == [] and made.at == {1: 2}
    assert set(made.table.doc) == set(held.table.doc) and len(made.table) != len(held.table)
    own, other = (words.tagged_tokens(held, "auto")[0], made.table)
    for doc in held.table.doc.unique()[:3]:
        spoken = [dict.fromkeys(table[table.doc == doc].word_text.dropna()) for table in (own, other)]
        assert list(spoken[0]) == list(spoken[1])
    assert made.table[made.table.pos > 0][["surprisal", "compression", "gradient_norm_scaled"]].notna().any().all()


# -- summary ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(deep, important, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    deep.save(folder / "layers")
    important.save(folder / "importance")
    return folder


@pytest.fixture(scope="module")
def summary(saved, spoken):
    return S.summarize([saved / "importance", saved / "layers", spoken])


def test_summary_is_one_family(summary, important, deep, spoken):
    held = [important, deep, spoken]
    p = pd.concat([study.findings for study in held], ignore_index=True)[["p"]].astype(float)
    expected = bl.stats.correct(p, "holm").p_corrected
    assert summary.findings.p_corrected.tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert summary.findings.n_tests.eq(len(p)).all()
    assert summary.findings.study.tolist() == [study.name for study in held for _ in range(len(study.findings))]
    assert summary.tables["studies"].decision.tolist() == [study.decision for study in held]
    assert summary.tables["studies"].red_flags.tolist() == [int(study.flags.raised.fillna(False).sum()) for study in held]
    assert set(summary.flags.study) == {study.name for study in held}
    for column in ("guide_test", "guide_statistic", "guide_r", "guide_p", "guide_reading"):
        assert column in summary.findings
    html = summary.report().html
    assert "guide_reading" in html and "count every token as independent" in html


def test_a_figure_of_the_summary_has_one_unit(summary):
    """Nats and layers on one axis would say nothing."""
    rows = summary.findings
    assert rows[rows.study == "layers"].effect_unit.eq("nats").all()
    assert rows[rows.study == "importance"].effect_unit.eq("").all()
    other = rows[(rows.study == "linguistic") & rows.effect_unit.eq("layers")]
    assert len(other) == 1
    labels = {name: figure.axes[0].get_xlabel() for name, figure in summary.figures.items()}
    assert "rho" in labels["summary-correlations"] and "[" not in labels["summary-correlations"]
    assert labels["summary-differences-nats"] == "mean difference [nats]"
    assert labels["summary-differences-layers"].endswith("[layers]")
    rest = set(labels) - {"summary-correlations", "summary-differences-nats", "summary-differences-layers"}
    assert {labels[name] for name in rest} <= {"omega squared"}  # not there where the words were too few
    told = [line for line in summary.verdict if "random neighbors: holds" in line]
    assert len(told) == 1 and " nats (95 %" in told[0] and "Layer chosen on" in told[0]


def numbered(rows):
    return pd.concat([row.assign(finding=f"finding {at}") for at, row in enumerate(rows)], ignore_index=True)


def test_the_price_of_all_studies_can_put_a_finding_out_of_reach(deep):
    """Eight units by sign flips, one-sided: 1 / 2^8 is enough for 12 tests, not for 13."""
    one = deep.findings[:1].assign(p_floor=1 / 2**8, p=1 / 2**8, n_units=8)
    few = replace(deep, findings=numbered([one] * 2))
    for more, reach in ((10, True), (11, False)):
        rest = replace(deep, name="importance", findings=numbered([one.assign(p_floor=0.0, study="importance")] * more))
        found = S.summarize([few, rest]).findings
        assert found.within_reach[:2].tolist() == [reach, reach] and found.within_reach[2:].all()
        assert found.p_floor[:2].tolist() == [1 / 2**8] * 2
    # What a study itself could not test stays so.
    denied = replace(few, findings=few.findings.assign(within_reach=False, holds=False))
    assert not S.summarize([denied]).findings.within_reach.any()


def test_folders_and_studies_give_the_same(summary, important, deep, spoken):
    other = S.summarize([important, deep, spoken])
    assert other.as_json() == summary.as_json()
    pd.testing.assert_frame_equal(other.findings, summary.findings)


def test_what_is_tested_and_what_not_is_what_was_declared(important, deep, spoken, summary):
    """`study show` prints the spec: a run tests no more, and leaves out nothing of what it says is not tested."""
    for study in (important, deep, spoken, summary):
        spec = registry.find_declaration(study.name)
        assert (study.title, study.hypothesis) == (spec.title, spec.hypothesis)
        layers = ", ".join(map(str, study.tokens["layer"].unique())) if study.tokens is not None else ""
        assert study is summary or set(spec.said(layers=layers)) <= set(study.not_tested)
    for study in (deep, spoken):
        declared = registry.find_declaration(study.name).tests
        assert [test.removesuffix(" (in the family, not in the verdict)") for test in declared] == study.findings[
            "finding"
        ].tolist()
    assert important.findings["finding"][0] == registry.find_declaration("importance").tests[0]


def test_summary_does_not_revive_what_a_study_denied(deep):
    denied = replace(deep, findings=deep.findings.assign(holds=False))
    assert not S.summarize([denied]).findings.holds.any()


def test_summary_refuses(saved, deep, summary, tmp_path):
    with pytest.raises(StudyError, match="at least one"):
        S.summarize([])
    with pytest.raises(StudyError, match="different studies"):
        S.summarize([deep, saved / "layers"])
    with pytest.raises(StudyError, match="no summary among them"):
        S.summarize([deep, summary])
    with pytest.raises(StoreError, match=r"results.json.*Run the study first"):
        S.summarize([tmp_path / "nothing"])


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_results_that_are_no_study(content, tmp_path, deep):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(StoreError):
        S.summarize([tmp_path])
    with pytest.raises(StoreError):
        deep.save(tmp_path)


# -- folders ------------------------------------------------------------------------------------------------------------------------


def test_what_a_folder_holds(saved, deep):
    folder = saved / "layers"
    assert sorted(path.name for path in folder.iterdir()) == ["figures", "report.html", "results.json", "tables"]
    names = {path.name for path in (folder / "tables").iterdir()}
    expected = {f"{name}.{kind}" for name in [*deep.tables, "findings"] for kind in ("parquet", "csv")}
    assert names == expected | {"tokens.parquet"}
    assert {path.name for path in (folder / "figures").iterdir()} == {f"{n}.{k}" for n in deep.figures for k in ("png", "pdf")}
    assert all(path.stat().st_size > 0 for path in folder.rglob("*"))
    assert not [path for path in saved.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]
    assert not [path for path in saved.iterdir() if path.name.startswith(".")]


def test_parquet_and_csv_hold_what_is_in_memory(saved, deep, important):
    for study in (deep, important):
        folder = saved / study.name / "tables"
        for name, table in {**study.tables, "findings": study.findings}.items():
            stored, text = tables.load(folder / f"{name}.parquet"), pd.read_csv(folder / f"{name}.csv")
            assert list(stored.columns) == list(text.columns) == list(table.columns)
            assert len(stored) == len(text) == len(table)
            assert stored.attrs["provenance"] == json.loads(json.dumps(study.provenance))
            for column in table.columns:
                values = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
                if np.isfinite(values).any() and table[column].map(type).ne(str).all():
                    for got in (stored[column], text[column]):
                        np.testing.assert_allclose(pd.to_numeric(got).to_numpy(float), values, rtol=1e-12)
                else:
                    wanted = table[column].astype(object).where(table[column].notna(), "").astype(str).tolist()
                    for got in (stored[column], text[column]):
                        assert got.astype(object).where(got.notna(), "").astype(str).tolist() == wanted, (name, column)
        pd.testing.assert_frame_equal(tables.load(folder / "tokens.parquet"), study.tokens)


def test_results_are_strict_json(saved, deep, important, spoken, sturdy, summary):
    def strict(constant):
        raise AssertionError(constant)

    held = json.loads((saved / "layers" / "results.json").read_text(), parse_constant=strict)
    assert held.pop("format") == "basin_lens study 1" and held.pop("seal") and held.pop("files") == {}
    assert held == json.loads(json.dumps(deep.as_json()))
    for study in (deep, important, spoken, sturdy[1], summary):
        made = json.loads(json.dumps(study.as_json(), allow_nan=False))
        assert made["hypothesis"].startswith("Declared before looking")
        assert made["verdict"] and made["not_tested"] and made["decision"] == study.decision
        assert [row["finding"] for row in made["findings"]] == study.findings.finding.tolist()
        assert [row["raised"] for row in made["red_flags"]] == [None if pd.isna(v) else bool(v) for v in study.flags.raised]
        assert made["provenance"]


def test_reports_end_with_what_was_declared_and_what_came_out(deep, important, spoken, sturdy, summary):
    for study in (deep, important, spoken, sturdy[1], summary):
        html = study.report().html
        titles = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
        assert titles[-4:] == ["Hypothesis, declared before looking", "Verdict", "Red flags", "What was not tested"]
        plain = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html)))
        assert study.verdict[0] in plain
        assert study.hypothesis in plain
        assert not re.search(r"(?:src|href)=[\"']https?://", html)  # offline


def test_figures_are_three_to_five(deep, important, spoken, sturdy):
    """Without a contrast. Neighbors make one more where words are known."""
    for study in (deep, important, spoken, sturdy[1]):
        assert 3 <= len(study.figures) <= 5, (study.name, list(study.figures))


def test_every_finding_says_what_it_is(deep, important, spoken, sturdy, summary):
    for study in (deep, important, spoken, sturdy[1], summary):
        rows = study.findings
        assert list(rows.columns)[: len(FINDING)] == list(FINDING)
        tested = rows[rows.p.notna()]
        assert len(tested)
        for column in ("unit", "n_units", "n_sequences", "n_documents", "test", "effect", "estimate", "p", "p_corrected"):
            assert tested[column].notna().all()
        assert (tested.p_corrected >= tested.p - 1e-12).all()
        assert not (rows.holds & ~(rows.p_corrected <= 0.05)).any()


def test_guide_stands_beside_the_finding(important, spoken):
    table = important.tokens
    for row in important.findings.itertuples():
        part = table[table.layer == row.layer].dropna(subset=["compression", row.question])
        assert row.guide_r == pytest.approx(stats.pearsonr(part["compression"], part[row.question]).statistic)
    rows = spoken.findings.set_index("question")
    assert rows.loc["function - content", "guide_p"] < 1e-6
    held = words.word_table(spoken.tokens[spoken.tokens.layer == rows.loc["tag", "layer"]], "mean")
    anova = stats.f_oneway(*[part.compression for _, part in held.dropna(subset="tag").groupby("tag")])
    assert rows.loc["tag", "guide_statistic"] == pytest.approx(anova.statistic)
    assert rows.loc["tag", "guide_test"].startswith("analysis of variance over tokens")
    assert rows.loc["same tag - same document", "guide_test"] is None


def test_saving_again_replaces(summary, tmp_path):
    out = summary.save(tmp_path / "deep" / "er")
    (out / "report.html").write_text("old")
    summary.save(out)
    assert (out / "report.html").read_text() != "old"
    assert [path.name for path in out.parent.iterdir()] == ["er"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_save_leaves_the_old_folder(saved, deep, monkeypatch, error, tmp_path):
    deep = replace(deep, figures={})
    before = {path: path.read_bytes() for path in (saved / "layers").rglob("*") if path.is_file()}

    def fail(*_):
        raise error

    monkeypatch.setattr(Study, "report", fail)
    for target in (saved / "layers", tmp_path / "new"):
        with pytest.raises(StoreError if isinstance(error, OSError) else KeyboardInterrupt):
            deep.save(target)
    assert {path: path.read_bytes() for path in (saved / "layers").rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in saved.iterdir()) == ["importance", "layers"]


def test_folders_of_others_are_refused(saved, deep, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for target, match in (
        (tmp_path / "mine", "thesis.tex"),
        (saved / "importance", "earlier layers study"),
        (tmp_path / "file", "can be written"),
        (tmp_path / "file" / "below", "can be written"),
    ):
        with pytest.raises(StoreError, match=match):
            deep.save(target)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    refuse_folder(tmp_path / "nothing", "layers")
    (tmp_path / "empty").mkdir()
    refuse_folder(tmp_path / "empty", "layers")


def test_files_beside_an_earlier_study_are_kept(deep, tmp_path, monkeypatch):
    target = tmp_path / "study"
    target.mkdir()
    (target / "results.json").write_bytes(KIND.record(deep.as_json(), {}))
    (target / "notes.md").write_text("mine")
    monkeypatch.setattr(Study, "_write", lambda *_: None)
    with pytest.raises(StoreError, match=r"notes.md"):
        deep.save(target)
    assert (target / "notes.md").exists()


def test_the_folder_one_stands_in(deep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Study, "_write", lambda *_: None)
    for target in (".", tmp_path):
        with pytest.raises(StoreError, match="in which you stand"):
            refuse_folder(Path(target), "layers")
        with pytest.raises(StoreError, match="in which you stand"):
            deep.save(target)
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []
    assert deep.save("below") == tmp_path / "below"


def test_studies_leave_the_measurement_alone(llama, sturdy):
    held, _ = sturdy
    both = replace(held, studies=("linguistic",))
    before, settings_before = held.table.copy(), dict(held.settings)
    S.study_linguistic(llama, both, progress=False)
    pd.testing.assert_frame_equal(held.table, before)
    assert held.settings == settings_before
