"""Studies of a finished run in a folder: the same answers, nothing measured again, and a clear word about what it lacks."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.errors import StudyError
from basin_lens.scoring.rerun import analyzer_of
from basin_lens.studies import Contrast
from basin_lens.studies.framework.finished_runs import refuse_run
from basin_lens.studies.framework.registry import specs_of_texts
from basin_lens.studies.framework.run_terms import notes_of, refuse_other_terms
from basin_lens.studies.framework.units import count_units
from basin_lens.studies.framework.wording import about_measured
from basin_lens.studies.mergeability import study as mergeability
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
def labelled(texts):
    return [bl.Passage(one.text, doc=one.doc, labels={"early": i < 9}) for i, one in enumerate(texts)]


@pytest.fixture(scope="module")
def run(llama, labelled, tmp_path_factory):
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
def test_words_need_the_texts(llama, labelled, run):
    with pytest.raises(StudyError, match="got token ids: words cannot be found"):
        S.study_linguistic(llama, run, **SILENT)
    held = S.from_run(llama, run, studies=["linguistic"], texts=labelled, **SILENT)
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
    for given, said in (
        ({"max_length": 44}, "expected max_length 60, which is the run's own, got 44"),
        ({"k": K + 1}, f"expected k {K}"),
        ({"seed": True}, "expected seed 0"),
        ({"bank": "reference"}, "expected bank None"),
        ({"max_sequences": 9}, "expected max_sequences None"),
        ({"per_document": 2}, "expected options among .*got 'per_document'"),
    ):
        with pytest.raises(StudyError, match=said):
            S.study_codelength(llama, run, **given, **SILENT)
    refuse_other_terms(run, {"k": np.int64(K), "seed": 0, "context": "patched", "exclude": "sequence", "compression_tokens": 720})


def test_the_seed_of_mergeability_is_the_run_s(llama, run, monkeypatch):
    with pytest.raises(StudyError, match="expected seed 0, which is the run's own, got 5"):
        S.study_mergeability(llama, run, seed=5, **SILENT)

    def stop(_spec, _model, _data, own, *, measure_options, **_):
        assert own.seed is None and measure_options == {}  # that of what was measured
        raise InterruptedError

    monkeypatch.setattr(mergeability, "run_study", stop)
    with pytest.raises(InterruptedError):
        S.study_mergeability(llama, run, **SILENT)


def changed(run, **facts):
    return replace(run, provenance={**run.provenance, **facts})


def headline(run, **options):
    """The run with another headline score."""
    first, *others = run.provenance["analyzers"]
    return changed(run, analyzers=[replace(analyzer_of(first), **options).key, *others])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda run: changed(run, queries="9 of 99 tokens"), "9 of 99 tokens"),
        (
            lambda run: changed(run, capture={**run.provenance["capture"], "states_of_model": False}),
            "states or tokens were changed",
        ),
        (lambda run: changed(run, capture={**run.provenance["capture"], "controls": [{}]}), "states or tokens were changed"),
        (lambda run: changed(run, model={**run.provenance["model"], "hooks": ["x"]}), "the caller's hooks"),
        (lambda run: changed(run, neighbors="frozen: those of another run"), "neighbors of another run"),
        (lambda run: headline(run, metric="cosine"), "metric='cosine' in place of 'l2'"),
        (lambda run: headline(run, blocks=2), "blocks=2 in place of 1"),
        (lambda run: headline(run, scale=0.5), r"scale=0.5 in place of 1.0"),
        (lambda run: headline(run, group=3, per_sequence=None), "group=3 in place of 4"),
        (lambda run: headline(run, partners="bank"), "partners from the bank"),
    ],
)
def test_a_run_of_something_else_is_refused(run, other, said):
    with pytest.raises(StudyError, match=said):
        refuse_run(other(run), specs_of_texts("codelength"))


def test_texts_that_begin_otherwise_are_refused(llama, run):
    told = {**run.provenance["capture"], "bos": None if run.provenance["capture"]["bos"] is not None else 0}
    with pytest.raises(StudyError, match="begin as the model's own"):
        S.from_run(llama, changed(run, capture=told), studies=["codelength"], **SILENT)


def test_rounded_states_and_an_approximate_search_are_named(run):
    rough = changed(
        run,
        capture={**run.provenance["capture"], "dtype": "bfloat16"},
        search={"exact": False, "recall": {"0": 0.99, "1": 0.97}},
    )
    said = " ".join(notes_of(rough, specs_of_texts("contrast"), Contrast("early", "True", "False"), 0, 4))
    for words in ("kept as bfloat16", "approximately, with a recall of 0.970", "not of the two kinds first", run.run):
        assert words in said
    assert len(notes_of(run, specs_of_texts("codelength"), None, 0, 12)) == 1


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda one: replace(one, labels={}), "with the label 'early', which the run has"),
        (lambda one: replace(one, labels={"early": True, "late": 1}), r"the run's labels \['early'\], got 'late' besides"),
        (
            lambda one: replace(one, labels={"early": not one.labels["early"]}),
            "the early of passage 0 .* is True in the run and False",
        ),
        (lambda one: replace(one, doc="doc-3"), "the document of passage 0 .* is 'doc-0' in the run and 'doc-3' in the texts"),
        (lambda one: replace(one, spans={"A": (0, 9)}), "the span of passage 0 .* is '' in the run and 'A' in the texts"),
    ],
)
def test_texts_with_other_labels_documents_or_spans_are_refused(llama, run, labelled, other, said):
    with pytest.raises(StudyError, match=said):
        S.from_run(llama, run, studies=["codelength"], texts=[other(one) for one in labelled], **SILENT)


def test_short_sequences_are_left_out_as_they_are_of_texts(llama, texts, tmp_path):
    """By the texts' own rule, and it is said; with another bank, scores are those of the texts measured directly."""
    kinds = [bl.Passage(one.text, doc=one.doc, labels={"genre": f"k{i % 7}"}) for i, one in enumerate(texts[:9])]
    mixed = [*kinds[:4], bl.Passage(texts[0].text[:9], doc="short"), *kinds[4:]]
    given = {"layers": [1], "max_length": 60, "bank": "reference", **SILENT}
    table = bl.analyze(llama, mixed, S.analyzers_for("codelength", k=4), out=tmp_path / "run", **given)
    held = S.from_run(llama, table, studies=["codelength"], unit="genre", **SILENT)
    assert held.n_units == 7 and len(held.capture.sequences) == 9 and "short" not in set(held.table["doc"])
    assert held.table["seq"].tolist() == held.capture.row_seq.tolist()
    assert held.table["token_id"].tolist() == held.capture.row_token.tolist()
    (facts,) = bl.tables.provenance(held.table).values()
    assert facts["copies"]["sequences"] == 9 and held.settings["sequences_too_short"] == 1
    assert any("1 sequences of fewer than 12 tokens are left out here" in line for line in about_measured(held))
    direct = S.measure(llama, mixed, studies=["codelength"], k=4, **given)
    for name in ("seq", "contraction", "raw_compression", "surprisal", "radius"):
        np.testing.assert_array_equal(held.table[name], direct.table[name], err_msg=name)
    with pytest.raises(StudyError, match=r"got 'genre', which passage 4 \(document 'short'\) lacks"):
        count_units(held.planned, "genre")


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
