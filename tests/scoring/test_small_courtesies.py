"""What was meant by a wrong name, one layer in place of a list, bars that the environment forbids, a second reading that is said."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation

import basin_lens as bl
from basin_lens.errors import BasinLensError, CaptureError, MergeError, StudyError, TableError
from basin_lens.studies.framework import registry
from basin_lens.values import did_you_mean, hides_bars, several
from tests.conftest import TEXTS, random_tokens

A = bl.analyzers
SOURCES = sorted((Path(bl.__file__).parent).rglob("*.py"))


@pytest.fixture(scope="module")
def table(llama):
    return bl.analyze(llama, TEXTS, [A.StateNorm(), A.Surprisal()], layers=1, progress=False)


def test_names_near_and_far():
    assert did_you_mean("compresion", ["compression", "surprisal"]) == "Did you mean 'compression'? "
    assert did_you_mean("Surprisal", ["surprisal"]) == "Did you mean 'surprisal'? "
    assert did_you_mean("surprisal", ["surprisal"]) == did_you_mean("weather", ["surprisal"]) == did_you_mean("x", []) == ""


@pytest.mark.parametrize(
    "use",
    [
        lambda table: bl.views.token_view(table, "surprisl", layer=1),
        lambda table: bl.views.layer_curve(table, "surprisl"),
        lambda table: bl.stats.within_sequence_correlation(table, "surprisl", "state_norm"),
        lambda table: bl.compare(table, table, on="surprisl"),
    ],
)
def test_a_column_with_a_typing_error(table, use):
    with pytest.raises(TableError, match="Did you mean 'surprisal'"):
        use(table)


def test_a_study_or_an_analyzer_with_a_typing_error():
    for find in (registry.find_spec, registry.find_declaration, registry.check_names):
        with pytest.raises(StudyError, match="Did you mean 'importance'"):
            find("importence")
    with pytest.raises(AttributeError, match=r"no attribute 'Comression'. Did you mean 'Compression' or .*\?$"):
        A.Comression  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'Weather'\.$"):
        A.Weather  # noqa: B018
    with pytest.raises(AttributeError, match="Did you mean 'analyze'"):
        bl.analyse  # noqa: B018


@pytest.mark.parametrize("layer", [1, -2, np.int64(1), torch.tensor(1)])
def test_one_layer_is_a_layer(llama, table, layer):
    got = bl.analyze(llama, TEXTS, [A.StateNorm()], layers=layer, progress=False)
    assert got["layer"].unique().tolist() == [1]
    assert np.array_equal(got["state_norm"], table["state_norm"])
    capture = bl.Capture.from_texts(llama, TEXTS, layers=layer, progress=False)
    assert capture.layers == (1,)


def test_one_layer_to_merge_in():
    assert bl.merging.TokenMerger(layers=1, threshold=0.9).options.layers == (1,)
    either = (MergeError, BeartypeCallHintParamViolation)  # where types are checked, they are first
    for wrong in (True, 1.0, "1", None):
        with pytest.raises(either, match="layers"):
            bl.merging.TokenMerger(layers=wrong, threshold=0.9)


@pytest.mark.parametrize("layer", [True, False, 1.0, 3, -4, "1", [1.0], [True], [], torch.tensor(True), torch.tensor(1.0)])
def test_what_is_no_layer_is_refused(llama, layer):
    with pytest.raises(CaptureError, match="layers between 0 and 2"):
        bl.analyze(llama, TEXTS, [A.StateNorm()], layers=layer, progress=False)


def test_several():
    assert several((1, 2)) == [1, 2] and several(np.array([3])) == [3] and several(np.int8(3)) == [3]
    assert several(True) is several(1.0) is several("12") is several(None) is several(torch.tensor(1.0)) is None


@pytest.mark.parametrize(("value", "hidden"), [("1", True), ("true", True), ("0", False), ("", False), (None, False)])
def test_bars_that_the_environment_forbids(llama, monkeypatch, capsys, value, hidden):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("TQDM_DISABLE", value)
    assert hides_bars(True) is hidden and hides_bars(False) is True
    bl.analyze(llama, TEXTS, [A.StateNorm()], layers=0, progress=True)
    assert ("reading the model" in capsys.readouterr().err) is not hidden


@pytest.mark.slow(everywhere=True)
def test_every_bar_asks_the_one_place():
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "tqdm":
                (asked,) = (word.value for word in call.keywords if word.arg == "disable")
                assert isinstance(asked, ast.Call) and asked.func.id == "hides_bars", f"{path}:{call.lineno}"


def test_a_second_reading_behind_a_cache_is_said_once(llama, recwarn):
    tokens = random_tokens(3, 9)
    _, cache = llama.run_with_cache(tokens)
    capture = bl.Capture.from_cache(llama, tokens, cache)
    bl.analyze(llama, capture, [A.StateNorm(), A.Surprisal()], layers=1, progress=False)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="cache does not hold what GradientNorm.* reads the tokens once more") as said:
        table = bl.analyze(llama, capture, [A.GradientNorm()], layers=1, progress=False)
    assert len(said) == 1
    expected = bl.analyze(llama, tokens, [A.GradientNorm()], layers=1, progress=False)
    assert np.allclose(table["gradient_norm"], expected["gradient_norm"], equal_nan=True)


def test_a_second_reading_of_texts_is_no_surprise(llama, recwarn):
    capture = bl.Capture.from_texts(llama, TEXTS, layers=1, progress=False)
    bl.analyze(llama, capture, [A.GradientNorm()], progress=False)
    assert not recwarn.list


def test_a_wrong_column_in_a_comparison_of_models(llama):
    capture = bl.Capture.from_texts(llama, TEXTS, layers=1, progress=False)
    with pytest.raises(BasinLensError, match="Did you mean 'contraction'"):
        bl.compare((llama, capture), (llama, capture), on="contractoin")
