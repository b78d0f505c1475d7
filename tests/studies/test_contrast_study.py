"""Two kinds of tokens compared: found where planted, quiet where not, and flagged where the bank, the template or a control says it."""

import itertools
import os
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens import stats, tables
from basin_lens.errors import BankWarning, NeighborError, StudyError
from basin_lens.scoring.bank_overlap import WARN
from basin_lens.studies import Contrast, contrast_study
from basin_lens.studies.framework import another_bank, contrast_flags
from basin_lens.studies.framework.another_bank import OWN_BANK
from basin_lens.studies.framework.contrast import contrasted_first
from basin_lens.studies.framework.declared_tests import ALPHA, declared_test, settle
from basin_lens.studies.framework.measured_texts import HEADLINE
from tests.simulation.battery import limit
from tests.studies.planted import noise, plant_compression

DRAWS = int(os.environ.get("BASIN_LENS_DRAWS", "200"))  # 400 take a minute more
NAMES = ["Ann", "Bob", "Eve", "Tom", "Kim", "Sam", "Joe"]
TEMPLATES = (
    "When [IO:{0}] and [S1:{1}] went to the old glass house, [S2:{1}] gave a lamp to",
    "Then [S2:{1}] said that the tea was cold, and so [IO:{0}] had a cup of water with",
)
SPANS = Contrast("span", "IO", "S2")


def prompts(*templates: str, count: int = 24) -> list[bl.Passage]:
    """Pairs of names in each template, in turn; each prompt is a document."""
    pairs = list(itertools.permutations(NAMES, 2))[:count]
    return [bl.Passage.marked(templates[i % len(templates)].format(*pair), doc=f"prompt-{i}") for i, pair in enumerate(pairs)]


def measure(model, *templates, count: int = 24, **options):
    given = {"studies": ["contrast"], "contrast": SPANS, "bank": "reference", "k": 6, "progress": False}
    return bl.studies.measure(model, prompts(*templates, count=count), **given | options)


@pytest.fixture(scope="module")
def varied(trained):
    return measure(trained, *TEMPLATES, layers=[1, 3])  # two to choose from


def planted(measured, size: float, seed: int = 0):
    """Compression of IO above that of S2 by `size` nats at the last layer, and noise."""
    table = measured.table
    last = table["layer"] == table["layer"].max()
    return plant_compression(measured, size * ((table["contrast"] == "IO") & last) + noise(table, seed, 0.2))


def run(model, measured, monkeypatch, other=None):
    """The study; with `other`, as if the other bank had given that table."""
    if other is None:
        return bl.contrast(model, measured, other_bank=False, progress=False)
    monkeypatch.setattr(contrast_study, "under_another_bank", lambda *_: (other.table, "the texts themselves", ""))
    return bl.contrast(model, measured, progress=False)


def flag(study, name):
    (row,) = study.flags[(study.flags["flag"] == name) & (study.flags["question"] == "difference")].to_dict("records")
    return row


def test_a_planted_difference_is_found_under_both_banks(trained, varied, monkeypatch):
    study = run(trained, planted(varied, 1.0), monkeypatch, planted(varied, 0.8, seed=1))
    first = study.findings.iloc[0]
    assert study.decision.startswith("yes") and first["finding"] == "IO differs from S2" and first["holds"]
    assert first["layer"] == varied.layers[-1] and first["estimate"] == pytest.approx(1.0, abs=0.2)
    assert not flag(study, "sign depends on the bank")["raised"]
    assert any("the same sign" in line for line in study.verdict)
    assert set(study.tables["by_bank"]["bank"]) == {OWN_BANK, "the texts themselves"}
    assert next(iter(study.figures)) == "difference-by-layer"


@pytest.mark.slow
def test_a_difference_that_another_bank_turns_round_is_flagged(trained, varied, monkeypatch):
    study = run(trained, planted(varied, 1.0), monkeypatch, planted(varied, -1.0, seed=1))
    assert flag(study, "sign depends on the bank")["raised"] and study.decision.endswith("with red flags")
    assert any("the sign depends on the bank" in line for line in study.verdict)
    html = study._repr_html_()
    assert "sign depends on the bank" in html and "data:image/png" in html and repr(study).count("\n") == 2


@pytest.mark.slow
def test_the_other_bank_is_measured_as_analyze_measures_it(trained):
    with pytest.warns(BankWarning):
        held = measure(trained, TEMPLATES[0], bank=None, layers=[1])
    study = bl.contrast(trained, held, progress=False)
    by_bank = study.tables["by_bank"].set_index("bank")
    score = bl.analyzers.Compression(k=6, nulls=("random_sets",), partners="bank")
    mask = held.table["contrast"].notna().to_numpy()
    made = bl.analyze(trained, held.capture, [score], layers=[1], bank="reference", queries=mask, progress=False)
    made["contrast"] = SPANS.values(made)
    expected = stats.compare_groups(made, HEADLINE, "contrast", groups=("IO", "S2"), paired=True)
    assert by_bank.loc["the built-in passages", "estimate"] == pytest.approx(expected.estimate[0], abs=1e-6)
    (facts,) = tables.provenance(held.table).values()
    share = facts["search"]["same_skeleton"]["1"]
    assert flag(study, "neighbors on the skeleton of their query")["value"] == share > WARN
    assert flag(study, "one template")["raised"]


def cure(bank, *, alone=True) -> str:
    """What the report advises for spans."""
    changes = ['bank="reference"'] * (bank == "the texts themselves") + ["the study contrast measured by itself"] * (not alone)
    return f" share theirs: {' and '.join(changes)} give{'s' * (len(changes) == 1)} each partners of its own"


@pytest.mark.slow
def test_what_gives_tokens_a_score_is_said_where_it_does(trained):
    """Not for labels, whose partners are the texts' own tokens under any bank; in other studies, not the bank alone."""
    held = measure(trained, TEMPLATES[0], bank=None, layers=[1], compression_tokens=130)
    labels = Contrast("kind", SPANS.first, SPANS.second)

    def said(bank="the texts themselves", partners="texts", contrast=SPANS, studies=("contrast",)) -> str:
        settings = {**held.settings, "bank": bank, "partners": partners}
        (line,) = contrast_flags.without_scores(replace(held, settings=settings, contrast=contrast, studies=studies), 1)
        assert "okens of a group may share no neighbor" in line
        return line

    assert cure("the texts themselves") in said()
    assert cure("the texts themselves", alone=False) in said(studies=("layers", "contrast"))
    assert cure("another capture", alone=False) in said(bank="another capture", studies=("layers", "contrast"))
    for nothing in (said(contrast=labels), said("another capture", contrast=labels), said("another capture", partners="bank")):
        assert " share theirs (" in nothing and "bank=" not in nothing and "gives each" not in nothing
    some = [bl.Passage(p.text, doc=p.doc, labels={"kind": "ab"[i % 2]}) for i, p in enumerate(prompts(*TEMPLATES, count=12))]
    given = {"studies": ["contrast"], "contrast": Contrast("kind", "a", "b"), "layers": [1], "k": 4, "progress": False}
    assert bl.studies.measure(trained, some, bank="reference", **given).settings["partners"] == "texts"


@pytest.mark.slow
def test_every_marked_token_has_a_score_with_partners_from_the_bank(trained):
    """Tokens at one place of a template have the same neighbors: among themselves, most find no group."""
    texts = measure(trained, TEMPLATES[0], bank=None, layers=[1], compression_tokens=130)
    bank = measure(trained, TEMPLATES[0], layers=[1])
    assert (texts.settings["partners"], bank.settings["partners"]) == ("texts", "bank")
    marked = {name: held.table[held.table["contrast"].notna()][HEADLINE].notna() for name, held in (("t", texts), ("b", bank))}
    assert marked["b"].all() and 0 < marked["t"].sum() < len(marked["t"])
    (said,) = contrast_flags.without_scores(bank, 1)
    assert said == f"All {len(marked['b'])} tokens of the two kinds have a score at layer 1."
    (said,) = contrast_flags.without_scores(texts, 1)
    missing = int((~marked["t"]).sum())
    counted = [int(number) for number in re.findall(r"(\d+) of \d+ of", said)]
    assert sum(counted) == missing and "okens of a group may share no neighbor" in said and cure("the texts themselves") in said
    other, _, why = another_bank.under_another_bank(trained, texts)
    assert not why and other[other["contrast"].notna()][HEADLINE].notna().all()


@pytest.mark.simulation
def test_false_positives_with_partners_from_the_bank(trained, monkeypatch):
    """Prompts drawn from many, each scored once (its score does not depend on the others), and which name is called IO drawn for
    each, from the choice of a layer to the verdict."""
    held = measure(trained, *TEMPLATES, count=42)
    assert held.settings["partners"] == "bank"
    monkeypatch.setattr(contrast_study.stats, "compare_groups", partial(stats.compare_groups, n_resamples=999))
    rows = held.table[(held.table["layer"] > 0) & held.table["contrast"].notna()]
    plain, rng, found, draws = pd.DataFrame(rows.to_dict("series")), np.random.default_rng(0), 0, DRAWS
    for _ in range(draws):
        some = rng.choice(42, 24, replace=False)
        here = plain[plain["seq"].isin(some)]
        swapped = (rng.random(42) < 0.5)[here["seq"].to_numpy()]
        other = np.where(here["contrast"] == "IO", "S2", "IO")
        drawn = replace(held, table=here.assign(contrast=np.where(swapped, other, here["contrast"])))
        row = declared_test(drawn.table, partial(contrast_study._difference, measured=drawn, paired=True), drawn, "", "difference")
        found += bool(settle("contrast", [row])["holds"].any())
    rate = found / draws
    print(f"{rate:.3f} +- {np.sqrt(rate * (1 - rate) / draws):.3f} ({found} of {draws} draws)")
    assert rate <= limit(draws)


@pytest.mark.simulation
def test_the_draw_of_partners_is_in_the_interval(trained):
    """Prompts of one template have one another's neighbors, and would have the same partners, were these the nearest: the
    difference would move with the seed by as much again as its printed error."""
    capture = bl.Capture.from_texts(trained, prompts(TEMPLATES[0]), layers=[1, 2, 3], progress=False)
    score = bl.analyzers.Compression(k=6, nulls=("random_sets",), partners="bank")
    estimates, errors = [], []
    for seed in range(8):
        given = {"bank": "reference", "seed": seed, "layers": [1, 2, 3], "progress": False}
        sides = [bl.analyze(trained, capture, [score], **given | {"queries": name}) for name in ("IO", "S2")]
        means = [side.groupby(["layer", "doc"])[HEADLINE].mean().unstack() for side in sides]
        units = (means[0] - means[1]).to_numpy()
        estimates.append(units.mean(1))
        errors.append(units.std(1, ddof=1) / np.sqrt(units.shape[1]))
    moved, printed = np.std(estimates, axis=0, ddof=1), np.mean(errors, axis=0)
    print("by layer, moved with the seed over printed error:", (moved / printed).round(2))
    assert (moved / printed).mean() < 1


@pytest.mark.slow
def test_a_layer_without_scores_takes_none_of_the_others_with_it(trained, varied, monkeypatch):
    """A dozen prompts have too few neighbors where they enter layer 0."""
    held = planted(varied, 1.0)
    table = tables.assign(held.table, **{HEADLINE: held.table[HEADLINE].where(held.table["layer"] > 1)})
    study = run(trained, replace(held, table=table), monkeypatch, planted(varied, 0.8, seed=1))
    own = study.tables["by_bank"].query("bank == @OWN_BANK").set_index("layer")["estimate"]
    assert own.loc[[1]].isna().all() and own.loc[[3]].notna().all() and study.findings["holds"].iloc[0]
    nothing = replace(held, table=tables.assign(held.table, **{HEADLINE: np.nan}))
    study = run(trained, nothing, monkeypatch, planted(varied, 0.8, seed=1))
    assert study.decision == "undecided" and not any("the same sign" in line for line in study.verdict)
    assert any("is not known" in line for line in study.verdict)


@pytest.mark.slow
def test_why_there_is_no_other_bank_is_said(trained, varied, monkeypatch):
    def refuses(*_, **__):
        raise NeighborError("expected k of at most 3.")

    monkeypatch.setattr(another_bank, "analyze", refuses)
    study = bl.contrast(trained, varied, progress=False)
    assert set(study.tables["by_bank"]["bank"]) == {OWN_BANK}
    assert any("The other bank: the texts themselves could not serve as one: expected k" in line for line in study.not_tested)
    ids = replace(varied, bank=None, capture=bl.Capture.plan(trained, [list(s.tokens) for s in varied.capture.sequences]))
    assert another_bank.under_another_bank(trained, ids)[2] == "the built-in passages are texts, and token ids were given"


@pytest.mark.slow
def test_a_sign_that_changes_over_layers_is_flagged(trained, varied, monkeypatch):
    table = varied.table
    sign = np.where(table["layer"] == table["layer"].max(), 1.0, -1.0)
    both_ways = plant_compression(varied, sign * (table["contrast"] == "IO") + noise(table, 3, 0.2))
    assert flag(run(trained, both_ways, monkeypatch), "sign changes over layers")["raised"]
    assert not flag(run(trained, planted(varied, 1.0), monkeypatch), "sign changes over layers")["raised"]


@pytest.mark.slow
def test_what_goes_with_the_kinds_is_no_control_and_named(trained, varied, monkeypatch):
    """In one template every IO stands before every S2; in two, not."""
    one = measure(trained, TEMPLATES[0], layers=[1])
    assert "position" in contrast_flags.inseparable_controls(one.table, one, paired=True)
    assert "position" not in contrast_flags.inseparable_controls(varied.table, varied, paired=True)
    study = run(trained, planted(one, 1.0), monkeypatch)
    controls = study.tables["controls"].set_index("control")
    assert not controls.loc["position", "separable"] and "100% of pairs: higher for S2" in controls.loc["position", "note"]
    assert any("position" in line and "Vary the template" in line for line in study.verdict)
    assert "position" not in study.findings.iloc[-1]["finding"]


@pytest.mark.slow
def test_the_smallest_p_is_said(trained, varied, monkeypatch):
    study = run(trained, planted(varied, 0.0), monkeypatch)
    assert any(line.startswith("The smallest p that any data of") for line in study.verdict)


@pytest.mark.slow
def test_false_positives_with_the_kinds_swapped(varied, monkeypatch):
    """Which of a prompt's two names is called IO is drawn: no difference, in all draws, from the choice of a layer to the family."""
    held = planted(varied, 0.0)
    monkeypatch.setattr(contrast_study.stats, "compare_groups", partial(stats.compare_groups, n_resamples=999))
    # Swapping turns a control's order in the two kinds round, and no more: which can be told apart is the same in every draw.
    controls = [c for c in stats.CONTROLS if c not in contrast_flags.inseparable_controls(held.table, held, paired=True)]
    rows_tested = held.table[(held.table["layer"] > 0) & held.table["contrast"].notna()]
    plain = pd.DataFrame(rows_tested.to_dict("series"))  # its provenance would be copied at every step
    rng = np.random.default_rng(0)
    seq, sides = plain["seq"].to_numpy(), plain["contrast"].to_numpy()
    found = 0
    for _ in range(DRAWS):
        swapped = rng.random(seq.max() + 1)[seq] < 0.5
        other = np.where(sides == "IO", "S2", np.where(sides == "S2", "IO", None))
        drawn = replace(held, table=plain.assign(contrast=np.where(swapped, other, sides)))
        rows = []
        for some in ((), controls):
            test = partial(contrast_study._difference, measured=drawn, paired=True, controls=some)
            rows.append(declared_test(drawn.table, test, drawn, "differs", "difference"))
        found += bool((settle("contrast", rows)["p_corrected"] <= ALPHA).any())
    print(f"{found} of {DRAWS} draws")
    assert found / DRAWS <= limit(DRAWS)


def test_tokens_of_the_kinds_come_first(trained):
    capture = bl.Capture.plan(trained, prompts(*TEMPLATES))
    from basin_lens.scoring.token_rows import row_facts

    sides = SPANS.values(pd.DataFrame({"span": row_facts(capture)[0]["span"]})).notna().to_numpy()
    able = capture.row_pos.numpy() > 0
    assert (contrasted_first(capture, SPANS, None, 0) == able).all()
    more = int(sides.sum()) + 30
    chosen = contrasted_first(capture, SPANS, more, 0)
    assert chosen.sum() == more and (chosen >= (sides & able)).all()
    few = contrasted_first(capture, SPANS, 20, 0)
    assert few.sum() == 20 and (few <= sides).all()
    by_prompt = np.bincount(capture.row_seq.numpy()[few]), np.bincount(capture.row_seq.numpy()[sides & able])
    assert sum(0 < a < b for a, b in zip(*by_prompt, strict=False)) <= 1, "prompts whole, but for the last one"


def test_spans_that_are_no_whole_tokens_are_told(trained):
    cut = [bl.Passage.marked(f"When [IO:th]e clock and [S2:{name}] had stopped in the rain,", doc=name) for name in NAMES]
    given = {"studies": ["contrast"], "contrast": SPANS, "k": 4, "bank": "reference", "layers": [1], "progress": False}
    held = bl.studies.measure(trained, cut, **given)
    told = " ".join(contrast_flags.spans_beyond(held))
    assert "tokens of IO reach beyond the span" in told and "tokens of S2 reach" not in told


@pytest.mark.parametrize(
    ("contrast", "said"),
    [
        (None, "expected a contrast for the study"),
        (Contrast("span", "IO", "nobody"), "got none"),
        (Contrast("kind", "a", "b"), "label"),
    ],
)
def test_no_contrast_to_speak_of_is_refused(trained, contrast, said):
    with pytest.raises(StudyError, match=said):
        measure(trained, TEMPLATES[0], contrast=contrast, layers=[1])


@pytest.mark.parametrize("by", ["span", "span:IO", "span:IO,", ":IO,S2", ""])
def test_contrasts_are_named_whole(by):
    with pytest.raises(StudyError, match="such as span:IO,S"):
        Contrast.named(by)
    assert Contrast.named("span: IO, S2") == SPANS
