"""Studies of a finished run in a folder: the same answers, nothing measured again, and a clear word about what it lacks."""

import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.errors import StudyError
from basin_lens.studies import Contrast
from tests.analyzers.passes import counting
from tests.conftest import make_bridge
from tests.studies.planted import S, made_text

SILENT = {"progress": False}
K = 6
STUDIES = ("codelength", "linguistic")


@pytest.fixture(scope="module")
def texts():
    """Each in one sequence, of tokens enough for a study: what a run measures is what a study would."""
    return [made_text(14, seed, f"doc-{seed}") for seed in range(18)]


@pytest.fixture(scope="module")
def run(llama, texts, tmp_path_factory):
    labelled = [bl.Passage(one.text, doc=one.doc, labels={"early": i < 9}) for i, one in enumerate(texts)]
    out = tmp_path_factory.mktemp("runs") / "run"
    return bl.analyze(llama, labelled, S.analyzers_for(*STUDIES, k=K), layers=[0, 1], max_length=60, out=out, **SILENT)


@pytest.mark.slow
def test_the_answers_are_those_of_the_texts(llama, texts, run, monkeypatch):
    expected = S.study_codelength(llama, texts, layers=[0, 1], max_length=60, k=K, **SILENT)
    with counting(monkeypatch) as (forward, backward):
        found = S.study_codelength(llama, run, **SILENT)
    assert not forward and not backward
    pd.testing.assert_frame_equal(found.findings, expected.findings)
    assert found.decision == expected.decision
    (facts,) = found.provenance.values()
    assert facts["study"]["from_run"] == run.run


def test_layers_and_columns_are_read_as_far_as_they_are_needed(llama, run, monkeypatch):
    seen = []
    real = bl.tables.RunTable.load
    monkeypatch.setattr(bl.tables.RunTable, "load", lambda self, *given: seen.append(given) or real(self, *given))
    held = S.from_run(llama, run, studies=["codelength"], layers=[1], **SILENT)
    assert held.layers == [1] and seen[0][0] == [1] and held.capture.n_rows == run.n_rows
    assert held.frequency[int(held.table["token_id"].iloc[3])] > 0 and held.unit == "document"
    contrasted = S.from_run(llama, run, studies=["codelength"], contrast=Contrast("early", "True", "False"), **SILENT)
    assert set(contrasted.table["contrast"].dropna()) == {"True", "False"}


@pytest.mark.slow
def test_words_need_the_texts(llama, texts, run):
    with pytest.raises(StudyError, match="got token ids: words cannot be found"):
        S.study_linguistic(llama, run, **SILENT)
    held = S.from_run(llama, run, studies=["linguistic"], texts=texts, **SILENT)
    assert S.study_linguistic(llama, held, progress=False).name == "linguistic"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"studies": ["layers"]}, r"without .*NeighborOverlap\(.*--for layers, or bl\.analyze\(model, texts, bl\.studies\.analyzers_for\('layers'\)"),
        ({"studies": ["codelength"], "texts": ["Other words stand here, and no more."]}, "expected the texts of the run in"),
        ({"studies": ["codelength"], "contrast": Contrast("span", "IO", "S")}, "the run's texts with a contrast of spans"),
        ({"studies": ["codelength"], "unit": "template"}, "unit"),
        ({"studies": ["contrast"]}, "without|a contrast for the study"),
    ],
    ids=["analyzers", "texts", "spans", "unit", "contrast"],
)  # fmt: skip
def test_what_the_run_lacks_is_said(llama, run, options, said):
    with pytest.raises(StudyError, match=said):
        S.from_run(llama, run, **options, **SILENT)


def test_another_model_and_options_of_measuring_are_refused(run, tokenizer, llama):
    with pytest.raises(StudyError, match="expected the model of the run"):
        S.from_run(make_bridge("llama", seed=1, tokenizer=tokenizer), run, studies=["codelength"], **SILENT)
    with pytest.raises(StudyError, match="got 'max_length', which is the run's own"):
        S.study_codelength(llama, run, max_length=44, **SILENT)


@pytest.mark.slow
def test_banks(llama, texts, tmp_path):
    needed = S.analyzers_for("codelength", k=4)
    given = {"layers": [1], "max_length": 60, **SILENT}
    one = bl.analyze(llama, texts, needed, bank="reference", out=tmp_path / "reference", **given)
    assert S.from_run(llama, one, studies=["codelength"], **SILENT).bank == "reference"
    bank = bl.Capture.from_texts(llama, texts[:9], layers=[1], **SILENT)
    other = bl.analyze(llama, texts, needed, bank=bank, out=tmp_path / "other", **given)
    with pytest.raises(StudyError, match="another capture as bank"):
        S.from_run(llama, other, studies=["codelength"], **SILENT)
