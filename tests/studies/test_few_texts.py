"""Studies of few texts and of odd ones."""

import numpy as np
import pytest

from basin_lens.studies import Contrast
from basin_lens.studies.framework import words
from basin_lens.studies.framework.measured_texts import HEADLINE
from tests.studies.planted import QUIET, S, made_text, noise, plant_compression, short_texts


@pytest.mark.slow
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
        # An error's text stays in the note: the verdict says in words that the finding could not be tested.
        untested = row.note.startswith("not tested: ")
        assert (f"{row.finding}: could not be tested" if untested else row.note).lower() in told
        assert row.n_units in (0, 6)
    if study == "layers":  # six documents by sign flips: 2 / 2^6, of two tests, at one layer
        assert made.findings.p_floor.tolist() == [2 / 64, 2 / 64]
        assert not made.findings.within_reach.any() and made.decision == "undecided"


@pytest.mark.slow
@pytest.mark.parametrize("effect", [pytest.param(0.0, marks=pytest.mark.slow), 3.0])
def test_parts_of_speech_in_the_fewest_documents(llama, effect):
    """Sign flips of 6 units reach 2 / 64, too much for a family; min F' has no such bound and is as large as the effect."""
    held = S.measure(llama, short_texts(6, n_words=40), studies=["linguistic"], layers=[0, 1], max_length=60, **QUIET)
    tokens, _ = words.tagged_tokens(held, "auto")
    values = effect * tokens["tag"].isin(words.FUNCTION) + noise(tokens, 3, 0.5)
    made = S.study_linguistic(llama, plant_compression(held, values), progress=False)
    rows = made.findings.set_index("question")
    assert rows.note[:3].str.contains("too few units to halve").all() and "not tested" in rows.note.iloc[3]
    assert rows.within_reach.tolist() == [False, False, True, False]
    assert rows.holds.tolist() == [False, False, effect > 0, False]
    assert made.decision.startswith("in part" if effect else "no")


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("study", ["layers", pytest.param("robustness", marks=pytest.mark.slow)])
def test_a_contrast_with_too_few_texts_on_one_side(llama, study):
    data = [made_text(16, i, f"d{i}", labels={"g": i < 3}) for i in range(12)]
    more = {"dtype": None} if study == "robustness" else {}
    made = getattr(S, f"study_{study}")(
        llama, data, layers=[1], max_length=30, contrast=Contrast("g", "True", "False"), **QUIET, **more
    )
    side = made.tables["contrast"] if study == "layers" else made.tables["settings"].query("question == 'contrast'")
    assert len(side) and side.p.isna().all()
    few = side.note.str.contains("expected at least 4 units (document) with contrast = True", regex=False)
    if study == "layers":
        assert few.all()
    else:  # an affine map leaves nothing to compare
        assert side[~few].setting.tolist() == ["context affine"] and "0 but for rounding" in side[~few].note.iloc[0]
        row = made.findings.set_index("question").loc["contrast"]
        assert np.isnan(row.p) and not row.holds and not row.within_reach
        assert any(line.startswith("contrast g: True - False: could not be tested") for line in made.verdict)


@pytest.mark.slow
def test_one_sequence_a_document_has_no_neighbors_of_its_document(llama):
    made = S.study_linguistic(llama, short_texts(12, n_words=12), layers=[0, 1], max_length=64, **QUIET)
    row = made.findings[made.findings.question == "same tag - same document"].iloc[0]
    assert np.isnan(row.p) and "not tested" in row.note and not row.holds
    assert "same_document_excess" not in set(made.tables["neighbor_shares"].score)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [12, pytest.param(24, marks=pytest.mark.slow)])
def test_sentences_by_sentiment(llama, documents):
    data = [made_text(16, i, f"d{i}", labels={"mood": ("good", "bad")[i % 2]}) for i in range(documents)]
    held = S.measure(llama, data, studies=["linguistic"], layers=[1], max_length=64, **QUIET)
    table = held.table
    study = S.study_linguistic(
        llama, plant_compression(held, (table.mood == "bad") + noise(table, 0, 0.2)), sentiment="mood", progress=False
    )
    found = study.tables["sentiment"]
    row = found[(found.score == HEADLINE) & (found.control_set == "none")].iloc[0]
    assert row.estimate == pytest.approx(1, abs=0.15) and row.p < 0.01 and row.n_units == documents
    assert "sentiment-by-layer" in study.figures
