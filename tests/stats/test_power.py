"""Power: planted effects are found, and intervals hold the truth."""

import pytest

from tests.stats.simulated import POWER, S, planted, rate, simulate


@pytest.mark.slow
@pytest.mark.parametrize("name", POWER)
def test_a_planted_effect_is_found(name):
    answer = POWER[name](planted())
    assert rate(answer) > 0.8
    assert ((answer.low <= answer.estimate) & (answer.estimate <= answer.high)).all()


@pytest.mark.slow
def test_intervals_hold_the_truth():
    """95 % of them, of a difference and of a correlation known in advance."""
    table = simulate(200, ("a", "b"), seed=7)
    table["a"] += 0.5 * table["member"]
    answer = S.compare_groups(table, "a", "member", n_resamples=9)
    assert ((answer.low < 0.5) & (answer.high > 0.5)).mean() == pytest.approx(0.95, abs=0.025)
    answer = S.within_sequence_correlation(table, "a", "b")
    assert ((answer.low < 0) & (answer.high > 0)).mean() == pytest.approx(0.95, abs=0.025)


def test_best_layer_is_found_and_reported_on_other_documents():
    table = simulate(6, ("a", "b"), seed=1)
    table.loc[table.layer == 4, "b"] += 0.5 * table.a
    answer = S.best_layer(table, lambda t: S.within_sequence_correlation(t, ["a"], "b"), seed=3)
    assert answer.layer.tolist() == [4]
    assert answer.p.item() < 0.001
    assert answer.n_documents.item() + answer.chosen_documents.item() == 40
    table = simulate(3, seed=2)
    answer = S.best_layer(table, lambda t: S.detect(t, ["a", "b"], "member", rates=(), n_resamples=99), stratify="member")
    assert len(answer) == 2 and set(answer.correction) == {"Holm"}
