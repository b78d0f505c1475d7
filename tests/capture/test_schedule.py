"""What one pass must collect is data, made before the model runs."""

import pytest

import basin_lens as bl
from basin_lens.capture.schedule import PassSchedule

A = bl.analyzers


def schedule(*analyzers, layers=(1,), borders=(1, 2)):
    return PassSchedule(4, layers, borders, analyzers)


def test_without_analyzers_only_borders_are_read():
    plain = schedule()
    assert plain.visited == (1,) and plain.read_borders == (1, 2)
    assert plain.read_points == () and plain.targets == () and not plain.needs_logits


@pytest.mark.parametrize("analyzer", [cls() for cls in bl.ANALYZERS if issubclass(cls, A.TokenAnalyzer)], ids=lambda a: a.key)
def test_every_analyzer_runs_at_one_time(analyzer):
    one = schedule(analyzer)
    assert [*one.at_layer, *one.of_gradients, *one.at_end] == [analyzer]
    assert (analyzer in one.at_layer) == (not analyzer.needs & {"logits", "gradient", "passes"} and analyzer.per_layer)


def test_what_builds_on_lower_layers_looks_at_all_of_them():
    rollout = schedule(A.AttentionRollout(), layers=(2,), borders=())
    assert rollout.visited == (0, 1, 2) and rollout.read_borders == (0, 1, 2, 3)
    assert rollout.read_points == (("pattern", 0), ("pattern", 1), ("pattern", 2))


def test_equal_targets_share_a_backward_pass():
    several = schedule(A.GradientNorm(), A.GradientTimesActivation(), A.GradientNorm(target="last_logit"))
    assert several.targets == ("future_loss", "last_logit")
    assert several.wanted_later("resid_pre", 1) and not several.wanted_later("pattern", 1)


def test_a_pattern_is_not_held_beyond_its_block():
    both = schedule(A.AttentionReceived(), A.GradientNorm())
    assert ("pattern", 1) in both.read_points and not both.wanted_later("pattern", 1)


def test_equal_schedules_are_equal():
    assert schedule(A.Surprisal()) == schedule(A.Surprisal())
    assert schedule(A.Surprisal()).needs_logits
