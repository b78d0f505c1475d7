"""Two models on the same texts: nothing between a model and itself, what is there between two, and refusals before any pass."""

import numpy as np
import pytest

import basin_lens as bl
from basin_lens import stats
from basin_lens.errors import StudyError
from basin_lens.studies.framework import registry
from tests.cli.calls import call
from tests.conftest import make_bridge, make_tokenizer
from tests.studies.planted import made_text

TEXTS = [made_text(24, seed, f"doc-{seed}") for seed in range(8)]
FEW = {"layers": [1, 2], "k": 4, "max_length": 32, "compression_tokens": None, "progress": False}


@pytest.fixture(scope="module")
def other(tokenizer):
    return make_bridge("llama", seed=5, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def study(llama, other):
    return bl.studies.compare_models(llama, other, TEXTS, names=("one", "<b>other</b>"), **FEW)


@pytest.mark.slow
def test_a_model_beside_itself_does_not_change(llama):
    """Frozen or own, the same tokens have the same score."""
    for frozen in (False, True):
        study = bl.studies.compare_models(llama, llama, TEXTS, frozen_neighbors=frozen, **FEW)
        assert np.nanmax(np.abs(study.tokens["difference"])) < 1e-5
        assert study.decision in ("no", "undecided") and not study.findings["holds"].any()


def test_the_change_is_that_of_compare_and_its_test(llama, other, study):
    sides = [(model, bl.Capture.from_texts(model, TEXTS, layers=[1, 2], max_length=32, progress=False)) for model in (llama, other)]
    pairs = bl.compare(*sides, on=bl.analyzers.Compression(k=4, nulls=False), progress=False)
    expected = stats.before_after(pairs, "difference")
    assert study.tables["change"]["estimate"].to_numpy() == pytest.approx(expected["estimate"].to_numpy(), abs=1e-6)
    assert study.findings["finding"][0] == "compression changes from one to <b>other</b>"
    assert list(study.figures) == ["both-by-layer", "difference-by-layer"]


def test_its_page_and_its_card_show_names_as_text(study):
    assert "&lt;b&gt;other&lt;/b&gt;" in study._repr_html_() and "<b>other</b>" not in study.report().html


@pytest.mark.slow
def test_frozen_neighbors_are_said(llama, other):
    study = bl.studies.compare_models(llama, other, TEXTS, frozen_neighbors=True, **FEW)
    assert any("those of the first model" in line for line in study.about)
    assert any("Where neighborhoods move" in line for line in study.not_tested)


def test_models_that_do_not_pair_are_refused(llama, trained):
    with pytest.raises(StudyError, match="same number of layers"):
        bl.studies.compare_models(llama, make_bridge("llama", tokenizer=make_tokenizer(), num_hidden_layers=2), TEXTS, **FEW)
    with pytest.raises(StudyError, match=r"same tokens|same number of layers"):
        bl.studies.compare_models(llama, trained, TEXTS, **FEW)
    with pytest.raises(StudyError, match="at least 6 units"):
        bl.studies.compare_models(llama, llama, TEXTS[:3], **FEW)


def test_it_is_declared_and_its_command_refuses_before_a_model_is_loaded(monkeypatch, capsys, tmp_path):
    from basin_lens.cli import options

    monkeypatch.setattr(options, "load", lambda name: pytest.fail(f"loaded {name}"))
    monkeypatch.chdir(tmp_path)
    assert registry.find_declaration("compare").name == "compare"
    for words, said in (
        (("a", "a"), "got 'a' twice"),
        (("a", "b", "nowhere.txt"), "nowhere.txt"),
        (("a", "b", "--layers", "x"), "expected layers"),
    ):
        code, _, err = call("compare", *words, capsys=capsys)
        assert code in (1, 2) and said in err and "Traceback" not in err


def test_its_command_writes_its_folder(llama, other, monkeypatch, capsys, tmp_path):
    from basin_lens.cli import options

    monkeypatch.setattr(options, "load", {"one": llama, "two": other}.get)
    monkeypatch.chdir(tmp_path)
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_text(text.text, encoding="utf-8")
    files = [f"{index}.txt" for index in range(len(TEXTS))]
    code, out, err = call("compare", "one", "two", *files, "--layers", "1", "--k", "4", "--out", "change", capsys=capsys)
    assert code == 0, err
    assert "compression changes from one to two" in " ".join(out.split())
    assert {"report.html", "results.json"} <= {path.name for path in (tmp_path / "change").iterdir()}
