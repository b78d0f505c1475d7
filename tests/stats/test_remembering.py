"""What is kept between the tests of many pairs changes no number, does not grow, and goes with the call that made it."""

import gc
import weakref

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.stats import remembering
from basin_lens.stats.remembering import remembered, sharing


@pytest.fixture
def calls():
    """A remembered function, within a call that shares its work, and how often it was computed."""
    made: list[int] = []

    @remembered
    def double(values, factor=2):
        made.append(1)
        return values * factor

    with sharing():
        yield double, made


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
    memory = remembering._memory.get()
    assert memory.bytes <= 3 * 800 and len(memory.kept) == 3 == len(memory.numbers)
    made.clear()
    assert np.array_equal(double(arrays[0]), arrays[0] * 2) and made == [1]


def test_what_is_kept_goes_with_the_outermost_call():
    made: list[int] = []

    @remembered
    def double(values):
        made.append(1)
        return values * 2

    @sharing()
    def work():
        kept.append(weakref.ref(double(first)))
        return double(first)

    first, kept = np.arange(6.0), []
    with sharing():
        work()
        work()
        assert made == [1]  # a call within a call shares its work
    assert remembering._memory.get() is None
    assert work()[0] == 0 and len(made) == 2
    gc.collect()
    assert [one() for one in kept] == [None] * 3, "nothing holds what was computed"
    # Outside of any, nothing is kept, and what is given may be changed.
    double(first)[0] = 7
    assert double(first)[0] == 0 and len(made) == 4
    with pytest.raises(ZeroDivisionError), sharing():
        raise ZeroDivisionError
    assert remembering._memory.get() is None


S = bl.stats
CONTROLLED = {
    "within": lambda t: S.within_sequence_correlation(t, "a", "b", controls=["c1"]),
    "partial": lambda t: S.partial_correlation(t, "a", "b", controls=["c1"]),
    "rank": lambda t: S.rank_regression(t, "a", "b", controls=["c1"]),
    "mixed": lambda t: S.mixed_model(t, "a", "b", controls=["c1"]),
    "flags": lambda t: S.red_flags(t, "a", "b", controls=["c1"], n_resamples=99),
    "groups": lambda t: S.compare_groups(t, "a", "kind", paired=True, controls=["c1"], n_resamples=99),
    "tags": lambda t: S.tag_effect(t, "a", "kind", tests=["sequence"], controls=["c1"], n_resamples=99),
    "tag means": lambda t: S.tag_means(t, "a", "kind", controls=["c1"]),
    "residuals": lambda t: S.residuals(t, "a", controls=["c1"]),
    "added": lambda t: S.added_value(t, "a", "half", "c1", n_splits=3, n_resamples=9),
}


@pytest.mark.parametrize("test", CONTROLLED.values(), ids=CONTROLLED)
def test_every_statistic_with_controls_shares_its_work_and_keeps_nothing(test, monkeypatch):
    memories: list[remembering._Memory] = []

    class Watched(remembering._Memory):
        def __init__(self):
            super().__init__()
            memories.append(self)

    monkeypatch.setattr(remembering, "_Memory", Watched)
    rng = np.random.default_rng(4)
    table = pd.DataFrame({"doc": np.repeat(range(24), 40), "seq": np.repeat(range(24), 40)})
    table[["a", "b", "c1"]] = rng.normal(size=(len(table), 3))
    table["kind"], table["half"] = np.where(rng.random(len(table)) < 0.5, "x", "y"), table.doc % 2 == 0
    test(table)
    assert len(memories) == 1 and memories[0].kept, "one memory for the whole call"
    assert remembering._memory.get() is None


@pytest.mark.many
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
            alone.append(test(table, score, against, controls=["c1", "c2"], correction="none"))
    for name in ("estimate", "low", "high", "p", "left"):
        assert together[name].to_numpy() == pytest.approx(pd.concat(alone)[name].to_numpy(), rel=1e-9, abs=1e-12)
    assert (
        together[["score", "against", "layer"]].to_numpy().tolist()
        == pd.concat(alone)[["score", "against", "layer"]].to_numpy().tolist()
    )
