"""A study costs one file and one line: command, help, list, `all` and summary take it from the registry."""

import inspect
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import basin_lens as bl
from basin_lens.cli import options
from basin_lens.studies.framework import registry
from tests.cli.test_cli import call
from tests.studies.planted import short_texts

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "position_study.py"


@pytest.fixture
def added(monkeypatch, tmp_path):
    """One file, and one line."""
    (tmp_path / "added_study.py").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.OF_TEXTS, "positions", "added_study")
    yield
    sys.modules.pop("added_study", None)


def said(capsys, *words: str) -> str:
    code, out, err = call(*words, capsys=capsys)
    assert code == 0, err
    return " ".join(out.split())


def test_the_example_is_short():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.usefixtures("added")
def test_it_is_listed_and_a_part_of_all(capsys):
    question = "Does compression go with how far into a text a token stands?"
    assert question in said(capsys, "study", "--help")
    listed = said(capsys, "study", "list")
    assert f"positions {question} --fewest" in listed and "memorization" in listed
    assert registry.check_names("all")[-1] == "positions"
    assert "--fewest" in said(capsys, "study", "all", "--help")
    shown = said(capsys, "study", "positions", "--help")
    assert question in shown and "Fewest scored tokens" in shown and "Declared before looking" in shown
    declared = said(capsys, "study", "show", "positions")
    assert "tests compression goes with position nulls no correlation within sequences" in declared
    assert "- --fewest [10]: Fewest scored tokens" in declared and "not tested Texts longer than <most> tokens." in declared


@pytest.mark.usefixtures("added")
def test_its_command_writes_its_folder_and_the_summary_takes_it(monkeypatch, capsys, tmp_path, llama):
    monkeypatch.setattr(options, "load", lambda _: llama)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": p.text, "doc": p.doc}) for p in short_texts(8)), encoding="utf-8")
    out = tmp_path / "out"
    asked = (
        "study",
        "positions",
        str(texts),
        "--layers",
        "1",
        "--k",
        "5",
        "--max-length",
        "40",
        "--fewest",
        "8",
        "--out",
        str(out),
    )
    told = said(capsys, *asked)
    held = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert held["study"] == "positions" and held["verdict"][0] in told
    assert held["tables"] == ["by_layer", "findings"] and held["figures"] == ["by-layer"]
    assert {row["finding"] for row in held["findings"]} == {"compression goes with position"}
    assert held["red_flags"] and {row["question"] for row in held["red_flags"]} == {"pos"}
    assert held["not_tested"][-1].startswith("Any contrast of spans or labels")
    assert bl.studies.summarize([out]).findings["study"].tolist() == ["positions"]


@pytest.mark.usefixtures("added")
def test_options_of_other_studies_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(options, "load", lambda _: pytest.fail("loaded"))
    for name, option in (("positions", "--tagger"), ("layers", "--fewest"), ("importance", "--window"), ("memorization", "--unit")):
        code, _, err = call("study", name, option, "8", capsys=capsys)
        assert code == 2 and f"No such option: {option}" in err


def test_every_study_has_a_command_of_its_own_options(capsys):
    own = {
        "linguistic": {"--tagger", "--sentiment"},
        "robustness": {"--second-model"},
        "mergeability": {"--tokens-per-sequence", "--window"},
        "basins": {"--tokens", "--neighbors"},
        "memorization": {"--preset", "--design", "--unrelated", "--paraphrases", "--sampled"},
    }
    every = set.union(*own.values())
    for name in registry.names():
        shown = said(capsys, "study", name, "--help")
        assert every & set(re.findall(r"--[a-z-]+", shown)) == own.get(name, set()), name
        assert {"--model", "--dataset", "--out", "--seed"} <= set(re.findall(r"--[a-z-]+", shown))
        spec = registry.find_spec(name)
        assert spec.question in shown and spec.name == name


def test_specs_and_functions_tell_the_same():
    """Options of a study stand in its function's signature with the same defaults."""
    for name in (*registry.OF_TEXTS, *registry.APART):
        parameters = inspect.signature(getattr(bl.studies, "contrast" if name == "contrast" else f"study_{name}")).parameters
        for one in fields(registry.find_spec(name).options):
            assert parameters[one.name].default == one.default, (name, one.name)
