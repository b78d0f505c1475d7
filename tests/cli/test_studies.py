"""Studies from the command line: their folder and verdict, and what is refused before a model is loaded."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import basin_lens as bl
from basin_lens import Passage
from basin_lens.analyzers import StateNorm
from basin_lens.cli import finished_studies
from basin_lens.cli import options as cli_options
from basin_lens.cli.options import MeasureOptions, TextOptions
from basin_lens.errors import StoreError
from basin_lens.studies.robustness.study import RobustnessOptions
from tests.cli.calls import call
from tests.conftest import TEXTS, TRAINED, make_bridge

# -- studies ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(folder) -> list[str]:
    """Eight text files, which share words and no sentence."""
    words = sorted({word for text in TEXTS for word in text.split()})
    paths = []
    for number in range(8):
        path = folder.parent / f"document-{number}.txt"
        path.write_text(" ".join(random.Random(number).choices(words, k=24)), encoding="utf-8")
        paths.append(str(path))
    return paths


@pytest.fixture
def no_model(monkeypatch):
    """What is refused must be refused before a model is loaded."""

    def load(name):
        raise AssertionError(f"loaded {name}")

    monkeypatch.setattr(cli_options, "load", load)


FAST = ("--layers", "1", "--k", "5", "--max-length", "40", "--max-sequences", "14")


def test_study_writes_a_folder_and_says_its_verdict(folder, documents, tmp_path, capsys):
    out = tmp_path / "layers"
    call_ = ("study", "layers", *documents, "--model", str(folder), *FAST, "--out", str(out))
    code, said, err = call(*call_, capsys=capsys)
    assert code == 0, err
    held = json.loads((out / "results.json").read_text())
    assert held["study"] == "layers"
    assert held["verdict"][0] in said and str(out / "report.html") in said
    assert f"[{held['decision']}; " in said
    (facts,) = held["provenance"].values()
    assert facts["study"]["max_sequences"] == 14 and facts["study"]["k"] == 5 and facts["study"]["max_length"] == 40
    # Into its own folder again; another study is refused, before a model is loaded.
    code, _, err = call("study", "importance", *documents, "--model", str(tmp_path / "none"), "--out", str(out), capsys=capsys)
    assert code == 1 and "earlier importance study" in err


@pytest.mark.slow
def test_study_all_measures_once_and_ends_in_a_summary(folder, documents, tmp_path, capsys, monkeypatch):
    from basin_lens import studies
    from basin_lens.studies.framework import runner

    measured, made = [], []
    measure = studies.measure

    def counted(*given, **options):
        measured.append(options["studies"])
        return measure(*given, **options)

    def stand_in(spec, model, held, _):  # their own tests run them
        made[:] = made or [studies.study_layers(model, held)]
        return replace(made[0], name=spec.name, figures={}, sections=(), findings=made[0].findings.assign(study=spec.name))

    monkeypatch.setattr(studies, "measure", counted)
    monkeypatch.setattr(runner, "run_study", stand_in)
    out = tmp_path / "all"
    code, said, err = call("study", "all", *documents, "--model", str(folder), *FAST, "--out", str(out), capsys=capsys)
    assert code == 0, err
    assert measured == [list(studies.STUDIES)]
    names = [*studies.STUDIES, "summary"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "plan.json"])
    assert all((out / name / "report.html").exists() for name in names)
    assert json.loads((out / "summary" / "results.json").read_text())["study"] == "summary"
    assert said.count("report.html") == len(names)
    # Two of the folders again.
    pair = tmp_path / "pair"
    code, said, err = call("study", "summary", str(out / "layers"), str(out / "importance"), "--out", str(pair), capsys=capsys)
    assert code == 0, err
    assert [row["study"] for row in json.loads((pair / "results.json").read_text())["findings"]] == ["layers"] * 2 + [
        "importance"
    ] * 2


@pytest.fixture
def quick_studies(monkeypatch):
    """Studies that find nothing, at once; the names of those that are run, and how often texts are measured."""
    from basin_lens import studies
    from basin_lens.cli import study_runs
    from basin_lens.studies import summary
    from basin_lens.studies.framework import runner

    ran: list[str] = []

    def stand_in(spec, *_):
        ran.append(spec.name)
        nothing = pd.DataFrame({"finding": ["it is"], "question": ["it"]})
        return studies.Study(spec.name, "T", (), "H", "no", ("No.",), nothing, None, (), (), {}, {}, {"r": {"n": len(ran)}})

    monkeypatch.setattr(study_runs, "_measured", lambda *_: ran.append("measured") or ran)
    monkeypatch.setattr(studies, "summarize", lambda folders: stand_in(summary.SPEC) if folders else None)
    monkeypatch.setattr(runner, "run_study", stand_in)
    return ran


def test_study_all_goes_on_with_the_studies_that_are_left(folder, documents, tmp_path, capsys, monkeypatch, quick_studies):
    from basin_lens import studies
    from basin_lens.studies.framework import runner

    given = ("study", "all", *documents, "--model", str(folder), *FAST, "--out", str(tmp_path / "all"))
    real = runner.run_study

    def stop(spec, *rest):
        if spec.name == "layers":
            raise KeyboardInterrupt
        return real(spec, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "run_study", stop)
        assert call(*given, capsys=capsys)[0] == 130
    first = list(quick_studies)
    assert first == ["measured", "importance", "linguistic"]
    code, said, err = call(*given, capsys=capsys)
    assert code == 0, err
    assert "importance: kept, as an earlier call finished it" in said and "layers: kept" not in said
    assert quick_studies[3:] == ["measured", "layers", "codelength", "robustness", "summary"]
    quick_studies.clear()
    assert call(*given, capsys=capsys)[0] == 0
    assert quick_studies == ["summary"]  # nothing left to measure
    code, _, err = call(*given, "--seed", "3", capsys=capsys)
    assert code == 1 and "options of measuring differ" in err and "--fresh" in err
    shutil.rmtree(tmp_path / "all" / "codelength")
    quick_studies.clear()
    assert call(*given, capsys=capsys)[0] == 0
    assert quick_studies == ["measured", "codelength", "summary"]
    quick_studies.clear()
    assert call(*given, "--seed", "3", "--fresh", capsys=capsys)[0] == 0
    assert quick_studies == ["measured", *studies.STUDIES, "summary"]


def test_a_kept_study_without_its_report_is_made_again(folder, documents, tmp_path, capsys, quick_studies):
    given = ("study", "all", *documents, "--model", str(folder), *FAST, "--out", str(tmp_path / "all"))
    assert call(*given, capsys=capsys)[0] == 0
    quick_studies.clear()
    (tmp_path / "all" / "layers" / "report.html").unlink()
    (tmp_path / "all" / "codelength" / "tables" / "findings.csv").write_text("")
    code, said, err = call(*given, capsys=capsys)
    assert code == 0, err
    assert quick_studies == ["measured", "layers", "codelength", "summary"] and said.count(": kept, ") == 3


@pytest.mark.parametrize("fresh", [(), ("--fresh",)], ids=["again", "fresh"])
@pytest.mark.usefixtures("no_model")
def test_somebody_else_s_plan_is_not_overwritten(documents, tmp_path, capsys, fresh):
    path = tmp_path / "all" / "plan.json"
    path.parent.mkdir()
    for content in ('{"plan": "mine"}', "no JSON", '{"format": "basin_lens studies 1", "plan": {}, "done": {}}'):
        path.write_text(content)
        code, _, err = call("study", "all", *documents, "--out", str(path.parent), *fresh, capsys=capsys)
        assert code == 1 and "expected the plan of" in err and "Take it away" in err, err
        assert path.read_text() == content and [one.name for one in path.parent.iterdir()] == ["plan.json"]


def test_a_plan_of_which_nothing_was_finished_holds_nobody_up(tmp_path):
    plan = dict.fromkeys(("model", "texts", "measured", "options", "versions"), 1)
    finished_studies.begin(tmp_path, plan, {}, fresh=False)
    assert finished_studies.begin(tmp_path, {**plan, "texts": 2}, {}, fresh=False) == {}
    (tmp_path / "layers").mkdir()
    finished_studies.note(tmp_path, {**plan, "texts": 2}, {}, "layers", tmp_path / "layers")
    with pytest.raises(StoreError, match="the texts differ"):
        finished_studies.begin(tmp_path, plan, {}, fresh=False)


def test_fresh_overwrites_a_plan_of_an_earlier_version(tmp_path):
    old = replace(finished_studies.PLAN, format="basin_lens studies 0")
    (tmp_path / "plan.json").write_bytes(old.record({"x": 1}, {}))
    finished_studies.refuse_foreign(tmp_path, fresh=True)
    with pytest.raises(StoreError, match="format version 0"):
        finished_studies.refuse_foreign(tmp_path, fresh=False)


def test_a_plan_tells_runs_with_other_labels_and_second_models_of_one_name_apart(llama, tmp_path):
    """Labels are in the run's files alone; a model's name says nothing of its weights."""
    passages = [Passage(text, labels={"early": True}) for text in TEXTS]
    needed = [StateNorm()]

    def plan(folder, second=None):
        own = {"robustness": RobustnessOptions(second_model=second)}
        return finished_studies.plan_of(llama, [], bl.tables.open(folder), own, TextOptions(), MeasureOptions())

    given = {"layers": [1], "progress": False}
    bl.analyze(llama, passages, needed, out=tmp_path / "one", **given)
    bl.analyze(llama, [replace(one, labels={"early": False}) for one in passages], needed, out=tmp_path / "two", **given)
    one, two = plan(tmp_path / "one"), plan(tmp_path / "two")
    assert one["texts"] != two["texts"] and {**one, "texts": 0} == {**two, "texts": 0}
    seconds = [plan(tmp_path / "one", make_bridge("llama", seed=seed))["options"] for seed in (1, 2, 1)]
    assert seconds[0] == seconds[2] != seconds[1]


@pytest.fixture(scope="module")
def spoken(folder) -> str:
    """Sixteen documents in JSON lines, of words that have kinds."""
    words = ["the", "of", "she", "and", "lamp", "voice", "rain", "piano", "stopped", "climbed", "took", "cold", "slow", "in"]
    path = folder.parent / "spoken.jsonl"
    lines = [json.dumps({"text": " ".join(random.Random(n).choices(words, k=26)), "doc": f"d{n}"}) for n in range(16)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


TINY = ("--layers", "1", "--k", "5", "--max-length", "40")


def studied(out: Path, name: str) -> dict:
    """What a study left in its folder, every file of it there."""
    held = json.loads((out / "results.json").read_text())
    assert held["study"] == name
    assert {path.name for path in (out / "figures").iterdir()} == {f"{n}.{k}" for n in held["figures"] for k in ("png", "pdf")}
    for table in held["tables"]:
        assert len(pd.read_csv(out / "tables" / f"{table}.csv"))
    report = (out / "report.html").read_text()
    for row in held["findings"]:
        # How each was tested stands in the verdict, whatever came out.
        told = [line for line in held["verdict"] if line.startswith(row["finding"])]
        assert len(told) == 1 or name == "summary", (row["finding"], held["verdict"])
        assert (
            row["p"] is None
            or "layer chosen on" in told[0].lower()
            or "p corrected for them (holm)" in told[0].lower()
            or "layers" in row["effect"]
        )
    assert held["verdict"][0][:40] in report
    return held


@pytest.mark.slow
def test_study_importance_for_real(folder, documents, tmp_path, capsys):
    """Eight documents: none are set aside, and the report says so."""
    out = tmp_path / "importance"
    call_ = ("study", "importance", *documents, "--model", str(folder), *TINY, "--max-sequences", "8", "--out", str(out))
    code, said, err = call(*call_, capsys=capsys)
    assert code == 0, err
    held = studied(out, "importance")
    assert {"ranking", "agreement", "partial_correlation", "quartiles", "findings"} <= set(held["tables"])
    assert said.lower().count("too few units to halve (8)") == 2 and "With fewer than 16 units" in held["hypothesis"]
    ranking = pd.read_csv(out / "tables" / "ranking.csv")
    assert ranking["given_position"].notna().any() and ranking["how"].str.contains("which flatters").all()


@pytest.mark.slow
def test_study_robustness_for_real(folder, spoken, tmp_path, capsys):
    """Another number format and a second model, as asked for by default and by an option."""
    out = tmp_path / "robustness"
    call_ = ("study", "robustness", spoken, "--model", str(folder), *TINY, "--second-model", str(TRAINED), "--out", str(out))
    code, _, err = call(*call_, capsys=capsys)
    assert code == 0, err
    held = studied(out, "robustness")
    settings = pd.read_csv(out / "tables" / "settings.csv")
    asked = [row["question"] for row in held["findings"]]
    assert asked[:4] == ["random", "surprisal", "gradient_norm_scaled", "attention_received"]
    for kind in ("dtype", "model", "twin"):
        rows = settings[settings["kind"] == kind]
        assert rows["question"].tolist() == asked and rows.loc[rows["question"].isin(asked[:4]), "p"].notna().all(), kind
    assert settings.loc[settings["kind"] == "dtype", "setting"].unique().tolist() == ["bfloat16"]
    assert set(settings.loc[settings["kind"] == "model", "layer"]) == {round(1 / 2 * 3)}  # the layer at the same depth of four
    survival = pd.read_csv(out / "tables" / "survival.csv").set_index("finding")
    assert survival["in_random_twin"][:4].notna().all()
    assert (survival["settings"] > 15).all()


@pytest.mark.slow
def test_study_all_for_real(folder, documents, tmp_path, capsys):
    """Every study of texts on one measurement, none replaced."""
    from basin_lens import studies

    out = tmp_path / "all"
    call_ = ("study", "all", *documents, "--model", str(folder), *TINY, "--max-sequences", "8", "--out", str(out))
    code, said, err = call(*call_, capsys=capsys)
    if code and "nltk" in err.lower():
        pytest.skip("needs NLTK's tagger")
    assert code == 0, err
    held = {name: studied(out / name, name) for name in (*studies.STUDIES, "summary")}
    rows = [row for name in studies.STUDIES for row in held[name]["findings"]]
    assert [row["finding"] for row in held["summary"]["findings"]] == [row["finding"] for row in rows]
    tested = sum(row["p"] is not None for row in rows)
    assert {row["n_tests"] for row in held["summary"]["findings"]} == {tested}
    assert said.count("report.html") == 6
    for row in held["summary"]["findings"]:
        if row["study"] != "robustness" and row["p"] is not None and (row["p_floor"] or 0) * tested <= 0.05:
            assert row["within_reach"]


@pytest.mark.slow
def test_study_of_json_lines_with_spans(folder, tmp_path, capsys):
    lines = []
    for number in range(18):
        one, other = random.Random(number).sample(["Mary", "John", "Anna", "Peter"], 2)
        text = f"{['When', 'After', 'Once'][number % 3]} {one} and {other} went out in the rain, {one} gave the lamp to {other}."
        spans = {"IO": [text.rindex(other), text.rindex(other) + len(other)], "S": [text.rindex(one), text.rindex(one) + len(one)]}
        lines.append(json.dumps({"text": text, "doc": f"p{number}", "labels": {"template": f"t{number % 6}"}, "spans": spans}))
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    code, _, err = call(
        "study", "layers", str(path), "--model", str(folder), "--layers", "1", "--k", "5", "--contrast", "span:IO,S",
        "--unit", "template", "--exclude", "template", "--bank", "reference", "--out", str(out), capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    held = json.loads((out / "results.json").read_text())
    assert "contrast" in held["tables"] and "contrast-by-layer" in held["figures"]
    assert {row["unit"] for row in held["findings"]} == {"template"}
    assert {row["n_units"] for row in held["findings"]} == {6}
    assert pd.read_csv(out / "tables" / "contrast.csv")["estimate"].notna().any()


@pytest.mark.usefixtures("no_model")
def test_bad_studies_are_refused_before_a_model_is_loaded(documents, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    (tmp_path / "all" / "layers").mkdir(parents=True)
    (tmp_path / "all" / "layers" / "thesis.tex").write_text("x")
    new = ("--out", str(tmp_path / "new"))
    for arguments, expected, code in [
        (("nonsense", *documents, *new), "expected studies among", 1),
        (("layers", str(tmp_path / "no.txt"), *new), "does not exist", 1),
        (("layers", *documents, "--dataset", "nltk:treebank", *new), "got both", 2),
        (("layers", *documents, "--contrast", "IO,S", *new), "span:IO,S", 2),
        (("layers", *documents, "--contrast", "span:IO", *new), "span:IO,S", 2),
        (("layers", "--dataset", "nltk:nonsense", *new), "nonsense", 1),
        (("layers", "--dataset", "no/such-data-set", *new), "no/such-data-set", 1),
        (("layers", *documents, "--out", str(tmp_path / "taken")), "thesis.tex", 1),
        (("all", *documents, "--out", str(tmp_path / "all")), "thesis.tex", 1),
        (("summary", *new), "at least one study", 1),
        (("summary", str(tmp_path / "nothing"), *new), "results.json", 1),
        (("layers", *documents, "--max-sequences", "many", *new), "max-sequences", 2),
    ]:
        got, _, err = call("study", *arguments, capsys=capsys)
        lines = [line for line in err.splitlines() if line.startswith("basin-lens:")]
        assert got == code, (arguments, err)
        assert len(lines) == 1, err
        assert expected in lines[0], lines
        assert "Traceback" not in err
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "taken" / "thesis.tex").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "options",
    [
        ("--layers", "x"),
        ("--context", "nonsense"),
        ("--tagger", "nonsense"),
        ("--sentiment", "nonsense"),
        ("--unit", "nonsense"),
    ],
    ids=lambda options: options[0],
)
def test_bad_options_are_refused_before_a_model_is_loaded(documents, tmp_path, capsys, options):
    code, _, err = call("study", "linguistic", *documents, *options, "--out", str(tmp_path / "new"), capsys=capsys)
    assert code in (1, 2) and len([line for line in err.splitlines() if line.startswith("basin-lens:")]) == 1


def test_bad_studies_of_a_model_are_refused_in_one_line(folder, documents, tmp_path, capsys):
    for options, expected in [
        ((*documents[:3],), "expected at least 6 units (document)"),
        ((*documents, "--exclude", "topic"), "topic"),
        ((*documents, "--unit", "topic"), "topic"),
        ((*documents, "--contrast", "topic:a,b"), "topic"),
        ((*documents, "--layers", "7"), "layers"),
        ((*documents, "--k", "100000"), "expected k"),
    ]:
        code, _, err = call("study", "layers", *options, "--model", str(folder), "--out", str(tmp_path / "new"), capsys=capsys)
        lines = [line for line in err.splitlines() if line.startswith("basin-lens:")]
        assert code in (1, 2) and len(lines) == 1 and expected in lines[0], err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_study_takes_a_finished_run_in_place_of_texts(folder, documents, tmp_path, capsys):
    lines = [json.dumps({"text": Path(path).read_text(), "labels": {"genre": f"g{i}"}}) for i, path in enumerate(documents)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    run = (
        "analyze",
        str(tmp_path / "texts.jsonl"),
        "--model",
        str(folder),
        "--layers",
        "1",
        "--k",
        "5",
        "--max-length",
        "40",
        "--out",
        str(tmp_path / "run"),
    )
    code, _, err = call(*run, "--for", "codelength", capsys=capsys)
    assert code == 0, err
    study = ("study", "codelength", "--model", str(folder), "--from", str(tmp_path / "run"), "--out", str(tmp_path / "study"))
    code, said, err = call(*study, "--dry-run", capsys=capsys)
    assert code == 0 and f"the finished run in {tmp_path / 'run'}" in " ".join(said.split())
    code, _, err = call(*study, "--unit", "topic", capsys=capsys)
    assert code == 1 and "or a label of the run, got 'topic'; labels: ['genre']" in err
    code, _, err = call(*study, "--unit", "genre", "--k", "5", capsys=capsys)
    assert code == 0, err
    (facts,) = json.loads((tmp_path / "study" / "results.json").read_text())["provenance"].values()
    assert facts["study"]["k"] == 5 and "from_run" in facts["study"]
    assert facts["study"]["unit"] == "genre"


def test_a_run_that_lacks_a_study_s_analyzers_is_refused_before_a_model_is_loaded(folder, documents, tmp_path, capsys, monkeypatch):
    run = ("analyze", *documents[:2], "--model", str(folder), "--layers", "1", "--k", "5", "--out", str(tmp_path / "run"))
    assert call(*run, "--bank", "reference", capsys=capsys)[0] == 0
    monkeypatch.setattr(cli_options, "load", lambda name: pytest.fail(f"loaded {name}"))
    code, _, err = call("study", "layers", "--from", str(tmp_path / "run"), "--out", str(tmp_path / "study"), capsys=capsys)
    assert code == 1 and "--for layers" in err
    for options, said in (
        (("--k", "15"), "--k beside --from: expected k 5, which is the run's own, got 15"),
        (("--max-length", "32"), "expected max_length 64"),
        (("--max-sequences", "9"), "expected max_sequences None"),
        (("--k", "5", "--max-length", "64", "--bank", "reference"), "--for layers"),  # equal ones change nothing
    ):
        where = ("--from", str(tmp_path / "run"), "--out", str(tmp_path / "study"))
        code, _, err = call("study", "layers", *where, *options, capsys=capsys)
        assert code in (1, 2) and said in err, err
