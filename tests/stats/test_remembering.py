"""What is kept between tests of many pairs changes no number, and does not grow."""

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.stats import remembering
from basin_lens.stats.remembering import remembered


@pytest.fixture
def calls(monkeypatch):
    for name, empty in (("_kept", remembering.OrderedDict()), ("_numbers", {}), ("_held", [0])):
        monkeypatch.setattr(remembering, name, empty)
    made: list[int] = []

    @remembered
    def double(values, factor=2):
        made.append(1)
        return values * factor

    return double, made


def test_equal_arrays_are_computed_once_and_others_again(calls):
    double, made = calls
    first = np.arange(6.0)
    assert double(first) is double(first.copy()) and made == [1]
    # Another value, shape, type or option is another question.
    for other, options in ((first + 1e-15, {}), (first.reshape(2, 3), {}), (first.astype(np.float32), {}), (first, {"factor": 3})):
        assert np.array_equal(double(other, **options), other * options.get("factor", 2))
    assert len(made) == 5 and np.array_equal(double(first), first * 2)


def test_an_array_that_changes_is_another_array(calls):
    double, made = calls
    held = np.arange(4.0)
    double(held)
    held[0] = 7
    assert np.array_equal(double(held), held * 2) and len(made) == 2
    with pytest.raises(ValueError, match="read-only"):
        double(held)[0] = 1


def test_what_is_kept_has_a_limit(calls, monkeypatch):
    double, made = calls
    monkeypatch.setattr(remembering, "_BYTES", 3 * 800)
    arrays = [np.full(100, float(index)) for index in range(10)]
    for array in arrays:
        double(double(array))
    assert remembering._held[0] <= 3 * 800 and len(remembering._kept) == 3 == len(remembering._numbers)
    made.clear()
    assert np.array_equal(double(arrays[0]), arrays[0] * 2) and made == [1]


@pytest.mark.parametrize("test", [bl.stats.partial_correlation, bl.stats.rank_regression])
def test_pairs_together_are_as_each_by_itself(test):
    """In one call, pairs share the controls' curves; each alone, with nothing kept, gives the same numbers."""
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"doc": np.repeat(range(24), 40), "seq": np.repeat(range(24), 40)})
    table = pd.concat([table.assign(layer=layer) for layer in (1, 2)], ignore_index=True)
    for name in ("a", "b", "u", "v", "c1", "c2"):
        table[name] = rng.lognormal(size=len(table))
    table["a"] += table.c1 + table.u
    together = test(table, ["a", "b"], ["u", "v"], controls=["c1", "c2"], correction="none")
    alone = []
    for against in ("u", "v"):
        for score in ("a", "b"):
            remembering._kept.clear()
            remembering._numbers.clear()
            remembering._held[0] = 0
            alone.append(test(table, score, against, controls=["c1", "c2"], correction="none"))
    for name in ("estimate", "low", "high", "p", "left"):
        assert together[name].to_numpy() == pytest.approx(pd.concat(alone)[name].to_numpy(), rel=1e-9, abs=1e-12)
    assert (
        together[["score", "against", "layer"]].to_numpy().tolist()
        == pd.concat(alone)[["score", "against", "layer"]].to_numpy().tolist()
    )
