"""Folders of studies hold what they say; their summary is one family."""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import basin_lens as bl
from basin_lens import tables
from basin_lens.errors import StoreError, StudyError
from basin_lens.studies.framework import registry, words
from basin_lens.studies.framework.declared_tests import (
    FINDING,
)
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.storage import KIND, refuse_folder
from basin_lens.studies.framework.study import Study
from tests.studies.planted import S

# -- summary ---------------------------------------------------------------------------------------------------------------------------


# One study's results under two names are enough to be stored and summed up; three studies, each with its own run, are among the slow.
RUNS = ["named", pytest.param("run", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=RUNS)
def held(request, deep):
    """Studies: importance, layers and, where each was run, linguistic."""
    if request.param == "run":
        return [request.getfixturevalue("important"), deep, request.getfixturevalue("spoken")]
    return [replace(deep, name="importance", findings=deep.findings.assign(study="importance")), deep]


@pytest.fixture(scope="module")
def saved(held, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    for study in held[:2]:
        study.save(folder / study.name)
    return folder


@pytest.fixture(scope="module")
def summary(saved, held):
    return S.summarize([saved / "importance", saved / "layers", *held[2:]])


@pytest.fixture(params=["deep", *(pytest.param(name, marks=pytest.mark.slow) for name in ("important", "spoken", "sturdy"))])
def study(request):
    found = request.getfixturevalue(request.param)
    return found[1] if request.param == "sturdy" else found


def test_summary_is_one_family(summary, held):
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


@pytest.mark.parametrize("held", RUNS[1:], indirect=True)
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
    told = [line for line in summary.verdict if "random sets: holds" in line]
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


def test_folders_and_studies_give_the_same(summary, held):
    other = S.summarize(held)
    assert other.as_json() == summary.as_json()
    pd.testing.assert_frame_equal(other.findings, summary.findings)


@pytest.mark.parametrize("held", RUNS[1:], indirect=True)
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


# -- folders ---------------------------------------------------------------------------------------------------------------------------


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


def test_parquet_and_csv_hold_what_is_in_memory(saved, held):
    for study in held[:2]:
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


def strict_json(study):
    made = json.loads(json.dumps(study.as_json(), allow_nan=False))
    assert made["hypothesis"].startswith("Declared before looking")
    assert made["verdict"] and made["not_tested"] and made["decision"] == study.decision
    assert [row["finding"] for row in made["findings"]] == study.findings.finding.tolist()
    assert [row["raised"] for row in made["red_flags"]] == [None if pd.isna(v) else bool(v) for v in study.flags.raised]
    assert made["provenance"]


def ends_with_what_came_out(study):
    html = study.report().html
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert titles[-4:] == ["Hypothesis, declared before looking", "Verdict", "Red flags", "What was not tested"]
    plain = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html)))
    assert study.verdict[0] in plain
    assert study.hypothesis in plain
    assert not re.search(r"(?:src|href)=[\"']https?://", html)  # offline


def says_what_its_findings_are(study):
    rows = study.findings
    assert list(rows.columns)[: len(FINDING)] == list(FINDING)
    tested = rows[rows.p.notna()]
    assert len(tested)
    for column in ("unit", "n_units", "n_sequences", "n_documents", "test", "effect", "estimate", "p", "p_corrected"):
        assert tested[column].notna().all()
    assert (tested.p_corrected >= tested.p - 1e-12).all()
    assert not (rows.holds & ~(rows.p_corrected <= 0.05)).any()


def test_results_in_a_folder_are_strict_json(saved, deep):
    def strict(constant):
        raise AssertionError(constant)

    stored = json.loads((saved / "layers" / "results.json").read_text(), parse_constant=strict)
    assert stored.pop("format") == "basin_lens study 1" and stored.pop("seal") and stored.pop("files") == {}
    assert stored == json.loads(json.dumps(deep.as_json()))


def test_results_are_strict_json(study):
    strict_json(study)


def test_reports_end_with_what_was_declared_and_what_came_out(study):
    ends_with_what_came_out(study)


def test_every_finding_says_what_it_is(study):
    says_what_its_findings_are(study)


@pytest.mark.parametrize("law", [strict_json, ends_with_what_came_out, says_what_its_findings_are])
def test_the_summary_keeps_the_laws_of_a_study(summary, law):
    law(summary)


def test_figures_are_three_to_five(study, deep):
    """Without a contrast. Neighbors make one more where words are known; compression has its parts and its nulls by layer."""
    assert 3 <= len(study.figures) <= (6 if study is deep else 5), (study.name, list(study.figures))


@pytest.mark.slow
def test_guide_stands_beside_the_finding(important, spoken):
    table = important.tokens
    for row in important.findings.itertuples():
        part = table[table.layer == row.layer].dropna(subset=[HEADLINE, row.question])
        assert row.guide_r == pytest.approx(stats.pearsonr(part[HEADLINE], part[row.question]).statistic)
    rows = spoken.findings.set_index("question")
    assert rows.loc["function - content", "guide_p"] < 1e-6
    held = words.word_table(spoken.tokens[spoken.tokens.layer == rows.loc["tag", "layer"]], "mean")
    anova = stats.f_oneway(*[part[HEADLINE].dropna() for _, part in held.dropna(subset="tag").groupby("tag")])
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


@pytest.mark.slow  # so do those of test_measurement.py
def test_studies_leave_the_measurement_alone(llama, sturdy):
    held, _ = sturdy
    both = replace(held, studies=("linguistic",))
    before, settings_before = held.table.copy(), dict(held.settings)
    S.study_linguistic(llama, both, progress=False)
    pd.testing.assert_frame_equal(held.table, before)
    assert held.settings == settings_before
