"""Red flags."""

import numpy as np
import pytest

from basin_lens.errors import TableError
from tests.stats.simulated import S, confounded, planted, simulate


def raised(flags):
    return {
        f"{row.flag}/{row.score}" if row.flag != "nothing survives correction" else row.flag: row.raised
        for row in flags.itertuples()
    }


def test_no_red_flag_on_a_sound_finding():
    table = confounded(3)
    table["b"] += 0.5 * table.noise
    flags = S.red_flags(table, "noise", "b")
    assert flags.raised.tolist() == [False] * 5, flags.why.tolist()
    flags = S.red_flags(planted(3), "c", group="member", controls=["position", "b"], n_resamples=999)
    assert flags.raised.tolist() == [False] * 5, flags.why.tolist()
    flags = S.red_flags(planted(3), "a", tag="tag", controls=["position", "b"], n_resamples=199)
    assert flags.raised.tolist() == [False] * 5, flags.why.tolist()


def test_red_flag_for_a_score_that_does_not_vary():
    table = planted(2)
    table["rare"] = (np.arange(len(table)) % 50 == 0).astype(float)
    table["by_text"] = table.seq + 0.0
    table["flat"] = 3.0
    flags = S.red_flags(table, ["a", "rare", "by_text", "flat"], "b", controls=["c"])
    found = raised(flags)
    assert [found[f"no variance/{name}"] for name in ("a", "rare", "by_text", "flat")] == [False, True, True, True]
    assert flags.loc[flags.score == "flat", "raised"].isna().sum() == 2
    assert flags.set_index(["flag", "score"]).value["no variance", "rare"] == pytest.approx(0.98)
    assert not raised(S.red_flags(table, "by_text", group="member", controls=["c"], n_resamples=199))["no variance/by_text"]


def test_red_flag_when_nothing_survives_correction():
    flags = S.red_flags(simulate(12, seed=3), ["a"], "b")
    row = flags[flags.flag == "nothing survives correction"].iloc[0]
    assert row.raised and row.value > row.limit == 0.05 and row.n_tests == 12
    assert "0 of 12" in row.why


def test_red_flag_when_the_effect_does_not_replicate():
    """Only the documents of one half have it."""
    table = simulate(3, seed=5)
    chosen = S.halves(table, seed=0)
    table.loc[chosen, "b"] += 0.8 * table.a[chosen]
    flags = S.red_flags(table, "a", "b", seed=0, controls=["position"]).set_index("flag")
    assert flags.raised["does not replicate"] and not flags.raised["nothing survives correction"]
    assert flags.estimate["does not replicate"] > 0.4 and abs(flags.compared_estimate["does not replicate"]) < 0.1
    table = simulate(3, seed=5)
    table.loc[chosen, "b"] += 0.8 * table.a[chosen]
    table.loc[~chosen, "b"] -= 0.4 * table.a[~chosen]  # significant, but the other way
    assert S.red_flags(table, "a", "b", seed=0, controls=["position"]).set_index("flag").raised["does not replicate"]


def test_red_flag_when_controls_explain_the_effect():
    flags = S.red_flags(confounded(3), ["a", "noise"], "b").set_index(["flag", "score"])
    row = flags.loc[("vanishes under controls", "a")]
    assert row.raised and row.estimate > 0.3 and abs(row.compared_estimate) < 0.1 and row.compared_p > 0.05
    assert "log_radius, log_norm" in row.why
    assert not flags.raised["does not replicate", "a"] and not flags.raised["no variance", "a"]
    # Groups that differ in surprisal alone.
    table = planted(2)
    table["surprisal"] = table.c
    table["a"] = 0.1 * table.a + table.surprisal
    flags = S.red_flags(table, "a", group="member", controls=["surprisal"], n_resamples=999).set_index("flag")
    assert flags.raised["vanishes under controls"] and not flags.raised["nothing survives correction"]


def test_red_flags_that_cannot_be_checked_say_so():
    table = planted(1).drop(columns=["layer", "token_id", "pos"])
    flags = S.red_flags(table.assign(difference=table.c), "difference", n_resamples=199).set_index("flag")
    assert flags.raised.isna().tolist() == [False, False, False, True, False]
    few = S.red_flags(table[table.seq < 9], "a", "b").set_index("flag")
    assert few.raised[["does not replicate", "vanishes under controls"]].isna().all()
    assert "at least 6 units" in few.why["does not replicate"] and "none of the controls" in few.why["vanishes under controls"]
    with pytest.raises(TableError, match="one question"):
        S.red_flags(table, "a", "b", group="member")
