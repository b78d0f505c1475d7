"""Forced merges against an independent computation; planted costs are found or refused as they should be; the study writes its folder."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import BasinLensError, StudyError
from basin_lens.studies.framework import measurement, registry
from basin_lens.studies.framework.declared_tests import decide
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.mergeability import forced_merges
from basin_lens.studies.mergeability import study as mergeability
from basin_lens.studies.mergeability.forced_merges import Setting
from tests.conftest import hooked_lane, make_bridge, make_hooked, random_tokens
from tests.studies.planted import made_text, noise, plant, standard

S = bl.studies
WINDOW = 4
LENGTH = 44
QUICK = {"window": WINDOW, "shares": (0.3,), "n_random": 1, "progress": False}


@pytest.fixture(scope="module")
def measured(llama):
    texts = [made_text(36, seed, f"doc-{seed}") for seed in range(18)]
    return S.measure(
        llama,
        texts,
        studies=["mergeability"],
        layers=[1, 2],
        max_length=LENGTH,
        max_sequences=18,
        k=5,
        compression_tokens=None,
        progress=False,
    )


def setting_of(model, tokens, layers=(1,), window=WINDOW):
    capture = bl.Capture.plan(model, tokens, layers=list(layers))
    return Setting(model, capture, list(layers), window, 0, list(range(len(capture.sequences))))


# -- the cost of one merge ----------------------------------------------------------------------------------------------------------


def losses_by_hand(model, tokens, pattern_of=None, layer=1):
    """-log p of each token, and all log-probabilities: one sequence, the attention pattern of one layer changed."""
    changes = {} if pattern_of is None else {door.point_name("pattern", layer): pattern_of}
    with torch.no_grad(), door.measuring(model):
        logits = door.forward_pass(model, tokens[None], changes)[0]
    predicted = torch.log_softmax(logits.double(), -1)
    return -predicted[:-1].gather(1, tokens[1:, None])[:, 0], predicted


def by_hand(model, tokens, place, center, layer=1):
    """Rise of each loss, leader, cosine and divergence of one merge, from their definitions."""
    read = []
    with torch.no_grad(), door.measuring(model):
        door.forward_pass(model, tokens[None], {door.point_name("resid_pre", layer): lambda t: read.append(t[0].clone())})
    states = read[0] - center
    cosines = torch.nn.functional.cosine_similarity(states[1:place], states[place][None], dim=-1)
    leader = 1 + int(cosines.argmax())

    def changed(pattern):
        pattern = pattern.clone()
        for query in range(place + WINDOW, len(tokens)):
            row = pattern[0, :, query]
            row[:, place] = 0
            row[:, leader] *= 2
            pattern[0, :, query] = row / row.sum(-1, keepdim=True)
        return pattern

    after, before = losses_by_hand(model, tokens, changed, layer), losses_by_hand(model, tokens)
    p, q = (found[place + WINDOW : -1] for found in (before[1], after[1]))
    return (
        after[0] - before[0],
        leader,
        float(cosines.max()),
        float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)),
    )


def center_of(model, tokens, layer=1):
    read = []
    with torch.no_grad(), door.measuring(model):
        door.forward_pass(model, tokens, {door.point_name("resid_pre", layer): lambda t: read.append(t.clone())})
    return read[0][:, 1:].flatten(0, 1).mean(0)


def check_costs(model):
    tokens = random_tokens(2, 30)
    places = {0: [2, 9, 13], 1: [5]}
    found = forced_merges.forced_costs(setting_of(model, tokens), places)
    assert found.table[["seq", "pos"]].to_numpy().tolist() == [[0, 2], [0, 9], [0, 13], [1, 5]]
    center = center_of(model, tokens)
    for row in found.table.itertuples():
        rise, leader, cosine, change = by_hand(model, tokens[row.seq], row.pos, center)
        # Only what comes behind the window changes, and that is all the cost is made of.
        assert rise[: row.pos + WINDOW].abs().max() < 1e-5
        assert row.merge_cost == pytest.approx(float(rise[row.pos + WINDOW :].sum()), abs=1e-4)
        assert row.merge_change == pytest.approx(change, rel=1e-2, abs=1e-6) and change > 0
        assert (row.leader_pos, row.losses_behind) == (leader, 30 - row.pos - WINDOW - 1)
        assert row.merge_similarity == pytest.approx(cosine, abs=2e-3)  # descriptors are kept in float16
    assert found.table.merge_cost.abs().max() > 1e-3
    assert found.rounding < 1e-4  # merging nothing costs nothing


def test_cost_of_a_forced_merge_is_what_its_definition_says():
    check_costs(make_bridge("llama"))


@hooked_lane
def test_cost_of_a_forced_merge_in_the_other_kind_of_model():
    check_costs(make_hooked())


def test_padding_and_company_do_not_change_a_cost(llama):
    long, short = random_tokens(1, LENGTH), random_tokens(1, 30, seed=5)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    tokens[0], tokens[1, :30] = long, short
    sequences = bl.Capture.plan(llama, short, layers=[1]).sequences
    both = bl.Capture.plan(llama, long, layers=[1])
    both = replace(both, sequences=[*both.sequences, *sequences], docs=["a", "b"], labels=[{}, {}])
    setting = Setting(llama, both, [1, 2], WINDOW, 0, [0])
    whole = forced_merges.forced_costs(setting, {0: [7, 20], 1: [6, 9]}).table
    alone = forced_merges.forced_costs(setting, {1: [6, 9]}).table
    part = whole[whole.seq == 1].reset_index(drop=True)
    assert part[["layer", "seq", "pos", "leader_pos", "losses_behind"]].equals(
        alone[["layer", "seq", "pos", "leader_pos", "losses_behind"]]
    )
    for name in ("merge_cost", "merge_change", "merge_similarity"):
        assert np.allclose(part[name], alone[name], atol=1e-4)


def test_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(forced_merges, "TOKENS_PER_PASS", 100)
    parts = list(forced_merges.in_passes([20, 50, 50, 30, 30, 30]))
    assert sorted(at for part in parts for at in part) == list(range(6))
    assert parts[0] == [1, 2] and parts[1] == [3, 4, 5]
    assert list(forced_merges.in_passes([500])) == [[0]]


def test_places_are_drawn_among_those_with_a_score(measured):
    capture = measured.capture
    scored = measured.table[measured.table.layer == 1][["seq", "pos"]]
    scored = scored[scored.pos % 2 == 0]
    able = [place for place in forced_merges.able_places(LENGTH, WINDOW) if place % 2 == 0]
    drawn = forced_merges.draw_places(capture, scored, most=6, fewest=5, window=WINDOW, seed=0)
    long = [seq for seq, length in enumerate(capture.lengths.tolist()) if length == LENGTH]
    assert set(long) <= set(drawn)
    for seq in long:
        assert len(drawn[seq]) == 6 and set(drawn[seq]) <= set(able)
    assert drawn == forced_merges.draw_places(capture, scored, most=6, fewest=5, window=WINDOW, seed=0)
    assert drawn != forced_merges.draw_places(capture, scored, most=6, fewest=5, window=WINDOW, seed=1)
    assert not forced_merges.draw_places(capture, scored, most=6, fewest=len(able) + 1, window=WINDOW, seed=0)
    last = max(able)
    assert LENGTH - (last + WINDOW) - 1 >= forced_merges.LATER


def test_calibration_fits_one_pass(measured, monkeypatch):
    monkeypatch.setattr(forced_merges, "CALIBRATION_TOKENS", 100)
    assert len(forced_merges.draw_calibration(measured.capture, range(9), 0)) == 2
    monkeypatch.setattr(forced_merges, "CALIBRATION_TOKENS", 1)
    assert len(forced_merges.draw_calibration(measured.capture, range(9), 0)) == 1


# -- policies -----------------------------------------------------------------------------------------------------------------------


def test_policies_meet_the_budget_and_tokens_without_a_score_stay(llama, measured):
    table = measured.table.copy()
    table.attrs = dict(measured.table.attrs)
    table.loc[table.pos % 3 == 0, HEADLINE] = np.nan
    grid = forced_merges.score_grid(table, measured.capture, HEADLINE)
    assert (grid[1][:, 0] == forced_merges.UNSCORED).all() and grid[1][0, 1] == table[HEADLINE][table.layer == 1].iloc[1]
    setting = Setting(llama, measured.capture, [1, 2], WINDOW, 0, list(range(6)))
    losses = forced_merges.policy_losses(setting, range(6), table, shares=[0.5, 0.25], n_random=1)
    assert len(losses) == 6 * 2 * (3 + 2)
    means = losses.groupby(["share", "policy"]).merged_share.mean()
    for (share, policy), merged in means.items():
        # The levels were set on these very sequences; the rule "random" meets them on average over places.
        assert merged == pytest.approx(share, abs=0.2 if policy == "random" else 0.03), (share, policy)
    assert losses.merge_excess.notna().all() and (losses.n_tokens == LENGTH - 1).all()
    tokens, valid = forced_merges._batch(setting, [0])
    merger = forced_merges._calibrated(setting, "score", 0.5, grid, 0)
    with merger.attached(llama, valid=valid, scores=forced_merges._rows(grid, [0], tokens)):
        losses_with = forced_merges.losses_of(llama, tokens, valid)
        joined = merger.pass_.assigned[1].joined[0]
    assert joined.any() and not joined[::3].any()
    row = losses[(losses.policy == "high compression") & (losses.share == 0.5) & (losses.seq == 0)]
    plain = forced_merges.plain_losses(setting, [0])[0]
    assert row.merge_excess.iloc[0] == pytest.approx(float((losses_with[0] - plain)[1:].mean()), abs=1e-5)


# -- planted costs ------------------------------------------------------------------------------------------------------------------


def planted_costs(score, other):
    """A cost function that knows the score of each token, by layer, sequence and place; the change is another."""

    def forced(setting, places):
        rng = np.random.default_rng(0)
        rows = [(layer, seq, pos) for layer in setting.layers for seq in places for pos in places[seq]]
        table = pd.DataFrame(rows, columns=["layer", "seq", "pos"])
        table["merge_cost"] = [score[row] for row in rows] + rng.normal(size=len(rows)) * 0.3
        table["merge_change"] = [other[row] for row in rows]
        for name in ("merge_similarity", "leader_pos", "losses_behind"):
            table[name] = rng.normal(size=len(rows))
        return forced_merges.Costs(table.assign(leader_is_same_token=0.0), 0.0)

    return forced


def planted_losses(gain):
    """Losses of every policy, less for the one that merges what is compressed."""

    def losses(_setting, tested, _table, *, shares, **_):
        rng = np.random.default_rng(1)
        rows = [(policy, share, 0, seq) for share in shares for policy in forced_merges.CHOICES for seq in tested]
        made = pd.DataFrame(rows, columns=["policy", "share", "draw", "seq"]).assign(merged_share=shares[0], n_tokens=40)
        better = gain * (made.policy == "high compression")
        return made.assign(merge_excess=1 - better + rng.normal(size=len(rows)) * 0.05)

    return losses


def planted_study(llama, measured, monkeypatch, *, shuffled=False, gain=0.5):
    held = plant(measured, **{HEADLINE: noise(measured.table, 3)})
    values = held.table[HEADLINE].to_numpy(float)
    values = np.random.default_rng(4).permutation(values) if shuffled else values
    keys = list(held.table[["layer", "seq", "pos"]].itertuples(index=False, name=None))
    # Not the norm itself: nothing would be left of it once it is controlled for.
    moved = standard(held.table.state_norm.to_numpy(float)) + 0.5 * noise(held.table, 5)
    cost, change = (dict(zip(keys, of, strict=True)) for of in (standard(values), moved))
    monkeypatch.setattr(mergeability, "forced_costs", planted_costs(cost, change))
    monkeypatch.setattr(mergeability, "policy_losses", planted_losses(gain))
    return S.study_mergeability(llama, held, **QUICK)


@pytest.mark.slow(everywhere=True)
def test_a_cost_that_goes_with_compression_is_found(llama, measured, monkeypatch):
    study = planted_study(llama, measured, monkeypatch)
    assert study.findings.holds.all(), study.findings[["finding", "p_corrected", "note"]].to_dict("records")
    assert study.decision == "yes" and study.verdict[0].startswith("Yes.")
    assert (study.findings.estimate[:2] > 0.5).all() and study.findings.estimate[2] == pytest.approx(-0.5, abs=0.1)
    assert study.findings.guide_reading[0] == "strong"
    found = study.tables["partial_correlation"]
    assert set(found.control_set) == set(mergeability.CONTROL_SETS)
    assert set(found[found.control_set == "standard"].score) == set(mergeability.SCORES)
    kept = found[found.p_corrected <= 0.01]
    assert set(zip(kept.score, kept.against, strict=True)) == {(HEADLINE, "merge_cost"), ("state_norm", "merge_change")}
    cost, change = study.verdict[5:7]
    assert f"there stay {HEADLINE} (+" in cost and "norm" not in cost and "there stay state_norm (+" in change
    assert "merge_similarity" in found[(found.control_set != "standard") & (found.score == HEADLINE)].controls.iloc[0]
    policies = study.tables["policies"]
    assert len(policies) == 5 + 4 + 3
    row = policies[(policies.policy == "high compression") & (policies.versus == "random choice")].iloc[0]
    assert row.low < row.estimate < row.high < 0 and row.p_corrected <= 0.05
    assert ": less" in study.verdict[-1] and study.verdict[-1].count("not told apart") == 2
    assert study.flags.raised.notna().all(), study.flags.why.tolist()
    json.dumps(study.as_json(), allow_nan=False)


@pytest.mark.slow
def test_a_cost_that_is_chance_is_not_found(llama, measured, monkeypatch):
    study = planted_study(llama, measured, monkeypatch, shuffled=True, gain=0)
    assert not study.findings.holds.any()
    assert study.decision == "no" and study.verdict[0].startswith("No.")
    assert "nothing stays" in study.verdict[5]


@pytest.mark.slow
def test_a_policy_that_is_worse_than_chance_does_not_hold(llama, measured, monkeypatch):
    study = planted_study(llama, measured, monkeypatch, gain=-0.5)
    assert study.findings.holds.tolist() == [True, True, False] and study.decision.startswith("in part")
    assert ": more" in study.verdict[-1]
    assert decide(study.findings[2:], None) == "no"


# -- the whole ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def documents(tmp_path):
    paths = []
    for seed in range(13):
        path = tmp_path / f"text-{seed}.txt"
        path.write_text(made_text(36, seed, "text").text, encoding="utf-8")
        paths.append(str(path))
    return paths


def command(monkeypatch, model, *arguments):
    from basin_lens.cli import app as cli
    from basin_lens.cli import options

    monkeypatch.setattr(options, "load", lambda _: model)
    monkeypatch.setattr("sys.argv", ["basin-lens", "study", "mergeability", *arguments])
    cli.main()


FAST = ("--layers", "1,2", "--k", "5", "--max-length", "40", "--max-sequences", "13", "--window", "4")


@pytest.mark.slow
def test_command_writes_the_study(llama, documents, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    real = forced_merges.policy_losses  # one share and one draw of chance, for time
    monkeypatch.setattr(mergeability, "policy_losses", lambda *given, **_: real(*given, shares=[0.5], n_random=1))
    command(monkeypatch, llama, *documents, *FAST, "--out", str(out))
    held = json.loads((out / "results.json").read_text())
    assert held["study"] == "mergeability" and held["verdict"][0] in capsys.readouterr().out
    (facts,) = held["provenance"].values()
    assert facts["mergeability"]["window"] == 4 and facts["mergeability"]["rounding_nats"] < 1e-3
    costs = bl.tables.load(out / "tables" / "costs.parquet")
    assert len(costs) == 2 * 13 * 16 == facts["mergeability"]["forced_merges"]
    assert costs[["merge_cost", "merge_similarity", HEADLINE, "radius"]].notna().all(axis=None)
    assert {"partial_correlation", "quartiles", "policies", "findings"} <= {path.stem for path in (out / "tables").iterdir()}
    report = (out / "report.html").read_text()
    for said in ("a model that merges as it reads has neither", "forced merges", "random choice", "nats"):
        assert said in report
    assert len(list((out / "figures").glob("*.png"))) == 8
    assert {HEADLINE, "merge_cost"} <= {*costs}


def forbidden(*_, **__):
    raise AssertionError("ran")


def test_refused_before_any_long_work(llama, measured, monkeypatch):
    monkeypatch.setattr(mergeability, "forced_costs", forbidden)
    monkeypatch.setattr(measurement, "score", forbidden)
    texts = [made_text(36, seed, f"doc-{seed}") for seed in range(14)]
    for wrong, match in (
        ({"tokens_per_sequence": 8}, "tokens_per_sequence of at least 16"), ({"window": 0}, "window of at least 1"),
        ({"shares": [0.5, 1.0]}, "shares"), ({"shares": []}, "shares"), ({"n_random": 0}, "n_random"), ({"window": True}, "window"),
        ({"layers": [1, 9]}, "between 0 and 2"), ({"unit": "author"}, "unit"), ({"window": 30}, "at least 60 tokens"),
    ):  # fmt: skip
        with pytest.raises(BasinLensError, match=match):
            S.study_mergeability(llama, texts, **{"max_length": LENGTH, "k": 5, "progress": False, "window": WINDOW} | wrong)
    with pytest.raises(StudyError, match="at least 12 units"):
        S.study_mergeability(llama, texts[:11], max_length=LENGTH, window=WINDOW, k=5, progress=False)
    with pytest.raises(StudyError, match="sequences of at least 38 tokens"):
        S.study_mergeability(llama, texts, max_length=30, k=5, progress=False)
    with pytest.raises(StudyError, match="no options of measure"):
        S.study_mergeability(llama, measured, layers=[1], window=WINDOW, progress=False)
    with pytest.raises(StudyError, match="for the study 'mergeability'"):
        S.study_mergeability(llama, replace(measured, studies=("layers",)), window=WINDOW, progress=False)


def test_few_tokens_with_a_score_are_refused(llama, measured):
    table = measured.table.copy()
    few = plant(measured, table, **{HEADLINE: np.where(table.pos % 2, np.nan, table[HEADLINE])})
    with pytest.raises(StudyError, match="with a score that can be merged"):
        S.study_mergeability(llama, few, **QUICK)


def test_command_refuses_before_a_model_is_loaded(monkeypatch, documents, capsys, tmp_path):
    from basin_lens.cli import app as cli
    from basin_lens.cli import options

    monkeypatch.setattr(options, "load", forbidden)
    monkeypatch.setattr(
        "sys.argv", ["basin-lens", "study", "mergeability", *documents, "--window", "0", "--out", str(tmp_path / "o")]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1 and "window of at least 1" in capsys.readouterr().err


def test_no_part_of_all_and_documented():
    assert "mergeability" not in S.STUDIES
    assert registry.check_names("all") == list(S.STUDIES)
    assert registry.check_names("mergeability") == ["mergeability"]
    for part in ("Args:", "Returns:", "Raises:", "Source:", "Example:"):
        assert part in S.study_mergeability.__doc__


@pytest.mark.slow
def test_sequences_as_units_and_a_label(llama, monkeypatch):
    """One document of many sequences; then a label."""
    monkeypatch.setattr(mergeability, "forced_costs", planted_costs(Always(), Always()))
    monkeypatch.setattr(mergeability, "policy_losses", planted_losses(0.5))
    texts = [made_text(36, seed, "one", labels={"author": f"a{seed % 12}"}) for seed in range(14)]
    for unit in ("sequence", "author"):
        study = S.study_mergeability(llama, texts, layers=[1], unit=unit, max_length=LENGTH, k=5, **QUICK)
        assert (study.findings.unit == unit).all()
        assert study.tables["policies"].n_units.max() >= 6


class Always(dict):
    """A number for every token."""

    def __missing__(self, key):
        return float(hash(key) % 97)
