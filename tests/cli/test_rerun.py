"""`basin-lens rerun`: a run from its supplement alone, and how far the numbers are apart."""

import zipfile

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens import analyzers as every
from basin_lens import model as door
from basin_lens import tables
from basin_lens.capture import with_states
from basin_lens.cli.bundle import _say
from basin_lens.errors import ModelError, TableError
from basin_lens.scoring import rerun
from basin_lens.scoring.rerun import analyzer_of, differences, planned, run_again
from tests.cli.calls import call

WORDS = [
    ("dog", "river", "mill"),
    ("cat", "moon", "barn"),
    ("man", "house", "road"),
    ("fox", "tree", "gate"),
    ("owl", "hill", "wall"),
]
TEXTS = [
    bl.Passage(f"The {a} saw the {b} near the old {c} and ran away.", doc=f"doc-{i % 4}", labels={"kind": a})
    for i, (a, b, c) in enumerate(WORDS)
]

MANY = [bl.Passage(f"The {a} saw the {b} near the old {c} and ran.") for a, b, _ in WORDS[:3] for _, _, c in WORDS[:3]]


@pytest.fixture(scope="module")
def measured(llama):
    chosen = [
        bl.analyzers.Contraction(k=4, exclude="document"),
        bl.analyzers.Compression(k=4, group=3, queries=9),
        bl.analyzers.StateNorm(),
    ]
    return bl.analyze(llama, TEXTS, chosen, layers=[0, 1], seed=3, progress=False)


def test_a_run_is_repeated_from_its_tokens(llama, measured, tmp_path, capsys, monkeypatch):
    tables.bundle(measured, tmp_path / "s.zip")
    name = measured["run"].iloc[0]
    again = run_again(llama, planned(tables.read_bundle(tmp_path / "s.zip"), name), progress=False)
    found = differences(measured, again).set_index("column")
    assert found["compared"].min() > 0 and (found["only_one"] == 0).all()
    assert (found["largest_difference"] <= 1e-5 * found["scale"].clip(lower=1)).all(), found
    monkeypatch.setattr(door, "load_model", lambda *_, **__: llama)
    code, said, _ = call("rerun", str(tmp_path / "s.zip"), "--yes", "--model", "mine", capsys=capsys)
    assert code == 0 and "The same numbers" in said and "loading mine" in said


def test_what_would_run_is_said_and_nothing_is_run(measured, tmp_path, capsys, monkeypatch):
    (run,) = tables.provenance(measured)
    facts = tables.provenance(measured)[run]
    facts = {
        **facts,
        "made": {**facts["made"], "versions": {**facts["made"]["versions"], "numpy": "0.1"}, "command": ["basin-lens", "\x1b[2J"]},
    }
    tables.bundle(tables.described(measured, {run: tables.Provenance.from_json(facts)}), tmp_path / "s.zip")
    monkeypatch.setattr(door, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    code, said, _ = call("rerun", str(tmp_path / "s.zip"), capsys=capsys)
    assert code == 0 and "Nothing was run" in said
    for words in (facts["model"]["fingerprint"], facts["texts"], f"numpy 0.1 then, {np.__version__} here", "Contraction(k=4"):
        assert words in said
    assert "\x1b" not in said, "a stranger's words do not steer the terminal"
    code, _, error = call("rerun", str(tmp_path / "s.zip"), "--run", "other", capsys=capsys)
    assert code and "expected a run of the supplement" in error


def repeated(model, table, path, **beside):
    """How far a run made anew from its supplement is from the table."""
    tables.bundle(table, path / "s.zip", **beside)
    again = run_again(model, planned(tables.read_bundle(path / "s.zip"), table["run"].iloc[0]), progress=False)
    found = differences(table, again).set_index("column")
    assert found["compared"].max() > 0 and (found["only_one"] == 0).all(), found
    found = found[found["compared"] > 0]  # a column without any value has no scale
    assert (found["largest_difference"] <= 1e-5 * found["scale"].clip(lower=1)).all(), found
    return again


@pytest.mark.parametrize("queries", [9, [3, 4, 8], "kind"])
def test_a_run_of_some_tokens_is_repeated(llama, tmp_path, queries):
    """A sample, places, or a label: which tokens were scored is in provenance."""
    texts = [bl.Passage(text.text, labels={"kind": at < 4}) for at, text in enumerate(TEXTS)]
    score = bl.analyzers.Contraction(k=4)
    table = bl.analyze(llama, texts, [score], layers=[1], queries=queries, seed=3, progress=False)
    assert 0 < table["contraction"].notna().sum() < len(table) - len(TEXTS)
    repeated(llama, table, tmp_path)


@pytest.mark.slow
def test_a_run_with_a_bank_of_ones_own_is_repeated_if_the_bank_is_there(llama, tmp_path, monkeypatch):
    bank = bl.Capture.from_texts(llama, [text.text + " It was late." for text in TEXTS], layers=[0, 1, 2], progress=False)
    chosen = [bl.analyzers.Compression(k=4, group=3, partners="bank"), bl.analyzers.Contraction(k=4)]
    table = bl.analyze(llama, TEXTS[:2], chosen, layers=[0, 1], bank=bank, queries=[2, 3, 9], progress=False)
    repeated(llama, table, tmp_path, bank=bank)
    tables.bundle(table, tmp_path / "without.zip")
    for name in ("score", "read_states"):
        monkeypatch.setattr(rerun, name, lambda *_, **__: pytest.fail("the model has read something"))
    with pytest.raises(TableError, match=r"not in the supplement.*bank=capture"):
        run_again(llama, planned(tables.read_bundle(tmp_path / "without.zip"), table["run"].iloc[0]), progress=False)
    with pytest.raises(TableError, match="got another one"):
        tables.bundle(table, tmp_path / "other.zip", bank=bl.Capture.plan(llama, TEXTS))


def test_the_built_in_passages_are_known_as_a_bank(llama, tmp_path):
    table = bl.analyze(llama, TEXTS[:2], [bl.analyzers.Contraction(k=4)], layers=[1], bank="reference", progress=False)
    repeated(llama, table, tmp_path)


def test_a_bank_that_is_none_of_the_runs_or_whose_states_were_changed_is_refused(llama, measured, tmp_path):
    own = bl.Capture.from_texts(llama, TEXTS, layers=[0, 1], progress=False)
    with pytest.raises(TableError, match=r"neighbors came from no other capture\. Pass"):
        tables.bundle(measured, tmp_path / "own.zip", bank=own)
    plain = bl.Capture.from_texts(llama, [text.text + " It was late." for text in TEXTS], layers=[0, 1, 2], progress=False)
    moved = with_states(plain, {border: plain.border(border) + 1.0 for border in range(4)}, {"name": "moved"})
    score = bl.analyzers.Contraction(k=4, context="native")
    table = bl.analyze(llama, TEXTS, [score], layers=[1], bank=moved, progress=False)
    with pytest.raises(TableError, match=r"got one whose states were changed.*Leave bank out"):
        tables.bundle(table, tmp_path / "moved.zip", bank=moved)
    assert not list(tmp_path.iterdir())


def test_a_bank_is_read_as_it_was(llama, tmp_path):
    """Without its beginning-of-sequence token, say: its own settings go with it, not the texts'."""
    bank = bl.Capture.from_texts(llama, [text.text + " It was late." for text in TEXTS], layers=[1], max_length=9, progress=False)
    table = bl.analyze(llama, TEXTS, [bl.analyzers.Contraction(k=4)], layers=[1], bank=bank, progress=False)
    repeated(llama, table, tmp_path, bank=bank)
    again = planned(tables.read_bundle(tmp_path / "s.zip"), table["run"].iloc[0])
    assert again.bank_settings["max_length"] == 9 and again.facts["capture"]["max_length"] != 9


def test_a_supplement_does_not_say_where_a_banks_files_lay(llama, tmp_path):
    names = [f"/home/anna/thesis/{folder}/{'abc'[i % 3]}.txt" for i, folder in enumerate(["one", "one", "two", "three", "four"])]
    texts = [bl.Passage(text.text + " It was late.", doc=doc) for text, doc in zip(TEXTS, names, strict=True)]
    texts.append(bl.Passage(TEXTS[0].text, doc=TEXTS[0].doc))
    bank = bl.Capture.from_texts(llama, texts, layers=[1], progress=False)
    table = bl.analyze(llama, TEXTS, [bl.analyzers.Contraction(k=4, exclude="document")], layers=[1], bank=bank, progress=False)
    repeated(llama, table, tmp_path, bank=bank)
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        for name in archive.namelist():
            assert b"anna" not in archive.read(name), name
        readme = archive.read("README.txt").decode()
    held = [one["doc"] for one in tables.read_bundle(tmp_path / "s.zip").runs[table["run"].iloc[0]]["bank"]]
    assert held == ["a.txt", "b.txt", "c.txt", "a.txt (2)", "b.txt (2)", TEXTS[0].doc]
    assert "Also those of the bank: the other texts that neighbors came from" in readme
    tables.bundle(table, tmp_path / "s.zip")
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert "Also those of the bank" not in archive.read("README.txt").decode()


def test_a_study_of_other_runs_is_refused(llama, measured, tmp_path):
    study = bl.studies.compare_models(llama, bl.controls.random_twin(llama), MANY, layers=[1], k=4, progress=False)
    with pytest.raises(TableError, match=r"expected a study of the table's runs \(.*\), got one of .*study\.tokens"):
        tables.bundle(measured, tmp_path / "s.zip", study=study)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked", ["", "3-", "a", "9999", "5-2", "-1"])
def test_places_that_are_none_are_refused(measured, tmp_path, asked):
    (run,) = tables.provenance(measured)
    facts = {**tables.provenance(measured)[run], "queries": "3 of 9 tokens", "asked": asked}
    tables.bundle(tables.described(measured, {run: tables.Provenance.from_json(facts)}), tmp_path / "s.zip")
    with pytest.raises(TableError, match=r"expected places|not known which"):
        planned(tables.read_bundle(tmp_path / "s.zip"), run)


@pytest.mark.slow
def test_a_study_stands_beside_its_table_and_its_run_is_repeated(llama, tmp_path, capsys):
    marked = [bl.Passage.marked(f"The [A:{a}] saw the [B:{b}] near the old {c} and ran away.") for a, b, c in WORDS]
    marked += [bl.Passage.marked(f"One [A:{b}] met a [B:{a}] at the {c} in the rain today.") for a, b, c in WORDS]
    given = {"layers": [1, 2], "k": 4, "bank": "reference", "other_bank": False, "progress": False}
    study = bl.contrast(llama, marked, "span:A,B", **given)
    repeated(llama, study.tokens, tmp_path, study=study)
    held = tables.read_bundle(tmp_path / "s.zip")
    assert held.study["study"] == "contrast" and held.study["verdict"] == list(study.verdict)
    (facts,) = held.study["provenance"].values()
    assert facts["study"]["partners"] == "bank" and "figures/difference-by-layer.pdf" in held.figures
    code, said, _ = call("rerun", str(tmp_path / "s.zip"), capsys=capsys)
    assert code == 0 and f"contrast: {study.title} {study.decision}" in said


def test_other_numbers_are_called_so(llama, measured, tmp_path, capsys, monkeypatch):
    tables.bundle(tables.assign(measured, contraction=measured["contraction"] + 0.5), tmp_path / "s.zip")
    monkeypatch.setattr(door, "load_model", lambda *_, **__: llama)
    code, said, _ = call("rerun", str(tmp_path / "s.zip"), "--yes", "--model", "mine", capsys=capsys)
    assert code == 3 and "terms cancel): contraction has values that differ, or that one of the two lacks." in said
    assert "Not the same numbers (to 0.001 of each value or, where that is more, 0.0001 of the column's median size" in said
    (line,) = [line for line in said.splitlines() if line.startswith("contraction ")]
    assert " 0.5 " in line and line.endswith(f"{int(measured['contraction'].notna().sum())} values differ")
    both = tables.assign(measured, contraction=measured["contraction"] + 0.5, state_norm=measured["state_norm"] + 1)
    tables.bundle(both, tmp_path / "s.zip")
    code, said, _ = call("rerun", str(tmp_path / "s.zip"), "--yes", "--model", "mine", capsys=capsys)
    assert code == 3 and "contraction, state_norm have values that differ, or that one of the two lacks." in said


def test_one_run_with_other_numbers_is_enough(llama, measured, tmp_path, capsys, monkeypatch):
    """The second run is the same: both are repeated, and the exit code says that not all is well."""
    second = bl.analyze(llama, TEXTS, [bl.analyzers.StateNorm()], layers=[1], progress=False)
    wrong = tables.assign(measured, contraction=measured["contraction"] + 0.5)
    tables.bundle(tables.concat([wrong, second]), tmp_path / "s.zip")
    monkeypatch.setattr(door, "load_model", lambda *_, **__: llama)
    code, said, _ = call("rerun", str(tmp_path / "s.zip"), "--yes", "--model", "mine", capsys=capsys)
    assert code == 3 and "Not the same numbers" in said and "The same numbers" in said
    code, said, _ = call(
        "rerun", str(tmp_path / "s.zip"), "--yes", "--model", "mine", "--run", second["run"].iloc[0], capsys=capsys
    )
    assert code == 0 and "Not the same numbers" not in said


def test_another_model_and_unknown_runs_are_refused(llama, measured, tmp_path):
    run = measured["run"].iloc[0]
    facts = tables.provenance(measured)[run]

    def bundled(**changed):
        table = tables.described(measured, {run: tables.Provenance.from_json({**facts, **changed})})
        tables.bundle(table, tmp_path / "s.zip")
        return tables.read_bundle(tmp_path / "s.zip")

    with pytest.raises(ModelError, match="run's model"):
        run_again(llama, planned(bundled(model={**facts["model"], "fingerprint": "0" * 32}), run))
    for changed, why in (
        ({"queries": "3 of 9 tokens"}, "only some tokens"),
        ({"neighbors": "frozen: those of another run"}, "another run"),
        ({"texts": "0" * 16}, "lacks some"),
        ({"analyzers": ["Mine(k=3)"]}, "analyzers of this package"),
    ):
        with pytest.raises(TableError, match=why):
            planned(bundled(**changed), run)


@pytest.mark.parametrize(
    "analyzer", [cls() for cls in bl.ANALYZERS if not getattr(cls, "__abstractmethods__", None)], ids=lambda a: type(a).__name__
)
def test_every_analyzer_is_read_from_its_key(analyzer):
    assert analyzer_of(analyzer.key) == analyzer and analyzer_of(analyzer.key).key == analyzer.key
    for control in every.control.controls_of([analyzer]):
        assert analyzer_of(control.key) == control


@pytest.mark.parametrize(
    "key",
    [
        "__import__('os').system('x')",
        "StateNorm(**{})",
        "StateNorm",
        "StateNorm(k=open('x'))",
        "1",
        "(" * 999,
        "bl.StateNorm()",
        "Nothing()",
    ],
)
def test_a_key_is_read_and_never_run(key):
    with pytest.raises(TableError, match="expected a"):
        analyzer_of(key)


def one_column(values, name="a"):
    rows = pd.DataFrame({"run": "r", "layer": 0, "seq": 0, "pos": range(len(values)), name: values})
    return tables.described(rows, {"r": tables.Provenance(columns={name: tables.Column("nats")})})


def test_infinite_is_like_itself_alone():
    nan, inf = float("nan"), float("inf")
    found = differences(one_column([1.0, inf, inf, nan, -inf]), one_column([1.0, inf, nan, nan, inf]))
    assert found["compared"].item() == 1 and found["only_one"].item() == 2


def test_nothing_in_common_is_not_the_same(capsys):
    with pytest.raises(TableError, match="a score of both runs"):
        differences(one_column([1.0]), one_column([1.0], name="b"))
    empty = one_column([float("nan")])
    assert not _say(differences(empty, empty), ["integrated_gradients"], [])
    said = capsys.readouterr().out
    assert "Nothing was compared" in said and "The same numbers" not in said
    assert "Not compared, for the new run does not have them: integrated_gradients." in said


def test_a_small_value_may_not_differ_wholly():
    """Each by its own size, down to what rounding leaves of the column's median where terms cancel."""
    old = [1000.0, 1.0, 1.0, 1.0, 0.01, 0.00001, 0.0]
    same = [1000.9, 1.0009, 0.9991, 1.0, 0.01005, 0.0, 0.00009]
    assert differences(one_column(old), one_column(same))["apart"].item() == 0
    for at, value in enumerate([1001.1, 1.0011, 0.9989, -1.0, 0.0102, 0.0002, 0.0002]):
        other = [*same[:at], value, *same[at + 1 :]]
        found = differences(one_column(old), one_column(other))
        assert found["apart"].item() == 1 and found["scale"].item() == 1.0, (at, value)


@pytest.mark.parametrize(("missing", "new", "words"), [(["a"], [], "the new run"), ([], ["b"], "the table")])
def test_scores_that_are_missing_on_one_side_are_other_numbers(capsys, missing, new, words):
    same = one_column([1.0, 2.0])
    assert _say(differences(same, same), [], [])
    assert "The same numbers: to 0.001 of each value" in capsys.readouterr().out
    assert not _say(differences(same, same), missing, new)
    said = capsys.readouterr().out
    assert (
        f"Not compared, for {words} does not have them: {(missing + new)[0]}." in said and "scores are missing on one side" in said
    )
    assert not _say(differences(same, one_column([1.0, float("nan")])), [], [])


def test_a_table_without_a_score_of_its_run_is_not_the_same(llama, measured, tmp_path, capsys, monkeypatch):
    tables.bundle(tables.with_provenance(measured.drop(columns="contraction"), measured), tmp_path / "s.zip")
    monkeypatch.setattr(door, "load_model", lambda *_, **__: llama)
    code, said, _ = call("rerun", str(tmp_path / "s.zip"), "--yes", "--model", "mine", capsys=capsys)
    assert code == 3 and "the table does not have them: contraction." in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in ("model", "capture", "layers", "analyzers", "seed", "texts")),
        ("model", "smollm2"),
        ("model", {}),
        ("capture", [1]),
        ("layers", "all"),
        ("layers", []),
        ("seed", "3"),
        ("analyzers", [3]),
        ("bank", "reference"),
        ("bank", {"source": 3}),
        ("made", [1]),
        ("made", {"versions": [1]}),
        ("asked", 3),
        ("queries", 9),
    ],
)
def test_a_fact_that_is_missing_or_something_else_is_refused_in_words(measured, tmp_path, capsys, monkeypatch, name, value):
    (run,) = tables.provenance(measured)
    facts = dict(tables.provenance(measured)[run])
    facts.pop(name, None)
    facts |= {} if value is None else {name: value}
    tables.bundle(measured, tmp_path / "s.zip")
    held = tables.read_bundle(tmp_path / "s.zip")
    monkeypatch.setattr(rerun.tables, "provenance", lambda _: {run: facts})
    monkeypatch.setattr(tables, "read_bundle", lambda _: held)
    monkeypatch.setattr(door, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    code, _, err = call("rerun", str(tmp_path / "s.zip"), "--yes", "--model", "mine", capsys=capsys)
    assert code == 1 and err.startswith("basin-lens: expected ") and "Traceback" not in err, err


def test_labels_of_a_bank_do_not_say_where_files_lay(llama, tmp_path):
    places = ["/home/anna/one/a.txt", "C:\\anna\\two\\a.txt", "a.txt", "", "fox"]
    texts = [
        bl.Passage(one.text + " It was late.", labels={"source": place, "n": 3}) for one, place in zip(TEXTS, places, strict=True)
    ]
    given = [bl.Passage(one.text, labels={"source": "fox"}) for one in TEXTS]
    bank = bl.Capture.from_texts(llama, texts, layers=[1], progress=False)
    score = bl.analyzers.Contraction(k=4, exclude="source")
    table = bl.analyze(llama, given, [score], layers=[1], bank=bank, progress=False)
    repeated(llama, table, tmp_path, bank=bank)
    held = [one["labels"] for one in tables.read_bundle(tmp_path / "s.zip").runs[table["run"].iloc[0]]["bank"]]
    assert [one["source"] for one in held] == ["a.txt (2)", "a.txt (3)", "a.txt", "", "fox"] and held[0]["n"] == 3
