"""Mergers set beside baselines at equal budgets, and the study of it."""

import numpy as np
import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import merging
from basin_lens import model as door
from basin_lens.errors import MergeError
from basin_lens.merging import Setting, TokenMerger, Training, Windows, train_merger
from basin_lens.merging.probes import repetition
from basin_lens.studies import merging_report
from tests.conftest import make_bridge, random_tokens, replace_in_all_rooms
from tests.merging.mergers import SHORT, different, made_merger, windows


@pytest.fixture(scope="module")
def tiny():
    return make_bridge("llama")


def test_excess_is_the_paired_loss_and_nothing_where_nothing_merges(tiny):
    held = windows(4)
    plain = merging.plain_pass(tiny, held)
    off = merging.excess(TokenMerger([0, 1], threshold=1.0).prepare(tiny), tiny, held, plain)
    assert (off["excess"] == 0).all() and (off["agreement"] == 1).all() and off["kl"].abs().max() < 1e-2
    merger = made_merger(tiny)
    found = merging.excess(merger, tiny, held, plain)
    with merger.attached(tiny), torch.no_grad():
        logits = door.forward_pass(tiny, held.tokens, {})
    losses = -logits[:, :-1].log_softmax(-1).gather(2, held.tokens[:, 1:, None])[..., 0]
    assert np.allclose(found["excess"], (losses - plain.losses).mean(1), atol=1e-5)
    assert np.allclose(found["excess"], (found["excess_easy"] * 12 + found["excess_hard"] * 11) / 23, atol=1e-5)
    assert (found["kl"] > 0).all() and found["bytes_share"].between(0.3, 1).all()


def test_fit_budget_moves_all_thresholds_together(tiny):
    merger = made_merger(tiny)
    before = merger.weights.raw.detach().clone()
    reached = merging.fit_budget(merger, tiny, windows(), 0.8, tolerance=0.02)
    assert abs(reached - 0.8) <= 0.02
    moved = merger.weights.raw - before
    assert torch.allclose(moved, moved[0].expand_as(moved), atol=1e-5)
    with pytest.raises(MergeError, match="at best"):
        merging.fit_budget(merger, tiny, windows(), 0.01)


@pytest.mark.slow(everywhere=True)
def test_policies_meet_their_budget(tiny):
    setting = Setting((0, 1, 2), budgets=(0.8,), projection=6, recent=2, seeds=2)
    merger = made_merger(tiny)
    raw = merger.weights.raw.detach().clone()
    found = merging.compare_policies(
        tiny, windows(8, seed=5), Windows(windows(8).tokens, tuple("abcdefgh")), setting, merger=merger, progress=False
    ).windows
    assert set(found["policy"]) == set(Setting((0,)).policies) and found.loc[found["policy"] == "random", "seed"].nunique() == 2
    assert torch.equal(merger.weights.raw, raw)
    shares = found.groupby("policy")["bytes_share"].mean()
    assert ((shares - 0.8).abs() < 0.06).all(), shares
    # What does not look at the text gets the bytes that the trained merger left on it.
    for policy in ("random", "stride"):
        assert shares[policy] == pytest.approx(shares["trained"], abs=0.015), shares
    assert found["excess"].notna().all() and (found["flops"] > 0).all()
    # Clusters are read by weights on the full pattern: more memory than plain, in a whole pass.
    assert (found["peak_bytes"] > found["plain_peak_bytes"]).all() and found["plain_peak_bytes"].nunique() == 1
    with pytest.raises(MergeError, match="in both"):
        merging.compare_policies(tiny, windows(), windows(), setting, progress=False)


@pytest.mark.slow(everywhere=True)
def test_what_was_compared_is_handed_over_as_it_was_set(tiny):
    setting = Setting((0, 1, 2), budgets=(0.85, 0.7), projection=6, recent=2, seeds=2, policies=("trained", "cosine", "random"))
    merger = made_merger(tiny)
    raw, held_out = merger.weights.raw.detach().clone(), Windows(windows(8).tokens, tuple("abcdefgh"))
    compared = merging.compare_policies(tiny, windows(8, seed=5), held_out, setting, merger=merger, progress=False)
    found, kept, layers = compared.windows, compared.mergers, compared.layers
    assert set(kept) == {(p, b) for p in setting.policies for b in setting.budgets}
    assert len(layers) == 3 * 2 * (1 + 1 + 2) and (layers["tokens"] == 8 * 24).all()
    # All layers merge here, so that the layers' bytes are those of the windows.
    mean = layers.groupby(["policy", "budget", "seed"])[["bytes_share", "rate"]].mean()
    assert np.allclose(mean, found.groupby(["policy", "budget", "seed"])[["bytes_share", "rate"]].mean())
    assert np.allclose(layers["tokens_kept"], 1 - layers["rate"])
    assert torch.equal(merger.weights.raw, raw)  # while those handed over stay where they were moved
    plain = merging.plain_pass(tiny, held_out)
    for (policy, budget), made in kept.items():
        was = found[(found["policy"] == policy) & (found["budget"] == budget) & (found["seed"] == 0)]
        again = merging.excess(made, tiny, held_out, plain)
        assert np.array_equal(was["excess"], again["excess"]) and np.array_equal(was["bytes_share"], again["bytes_share"])


def test_baselines_have_no_floor_below_which_a_budget_is_out_of_reach(tiny):
    setting = Setting((0, 1, 2), budgets=(0.45,), projection=6, recent=2, policies=("adjacent",))
    tokens = windows(8).tokens
    with pytest.raises(MergeError, match="lower the floor"):
        TokenMerger([0, 1, 2], rule="adjacent", projection=6, recent=2, target_bytes=0.45).calibrate(
            tiny, windows(8, seed=5).tokens
        )
    made = merging.compare_policies(tiny, windows(8, seed=5), Windows(tokens, tuple("abcdefgh")), setting, progress=False)
    found = made.windows
    assert found["bytes_share"].mean() == pytest.approx(0.45, abs=0.06)


@pytest.mark.slow(everywhere=True)
def test_in_the_context_protocol_the_trained_merger_is_moved_to_the_bytes_of_the_others(tiny):
    merger = made_merger(tiny)
    raw = merger.weights.raw.detach().clone()
    setting = Setting((0, 1, 2), budgets=(0.8, 0.6), projection=6, recent=2)
    found = merging.context_protocol(
        tiny, windows(8, seed=5), Windows(windows(8).tokens, tuple("abcdefgh")), setting, merger=merger
    )
    assert torch.equal(merger.weights.raw, raw) and (found.groupby(["policy", "budget"]).size() == 8).all()
    shares = found.groupby(["budget", "policy"])["bytes_share"].mean().unstack()
    assert (shares["trained"] - shares["random"]).abs().max() < 0.06, shares


def test_induction_repetition_and_map(tiny):
    merger = made_merger(tiny)
    probe = merging.induction_probe(tiny, {"ours": merger, "off": TokenMerger([0], threshold=1.0)}, length=12, sequences=3)
    assert (probe.loc[probe["policy"] == "off", "excess"].abs() < 1e-6).all() and len(probe) == 6
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    table = merging.merge_map(merger, tiny, windows(2).tokens)
    assert len(table) == 3 * 2 * 24
    merged = table[table["merged"]]
    assert (merged["leader"] < merged["pos"]).all() and (
        table.loc[~table["merged"], "leader"] == table.loc[~table["merged"], "pos"]
    ).all()
    sizes = table.groupby(["layer", "seq", "leader"])["pos"].transform("size")
    assert (sizes == table["cluster_size"]).all()
    page = bl.views.merge_view(table, 1, tokens=["<b>"] * 24).html
    assert "<b>" not in page and "&lt;b&gt;" in page and page.count("<span") == 24


@pytest.mark.slow(everywhere=True)
def test_the_study_writes_its_folder(llama, tmp_path):
    made = merging.windows_of(llama, different(12), 32, most=20)
    calibration, held_out = made.apart(0.3)
    merger = TokenMerger([0, 1, 2], target_rate=0.3, projection=6, recent=4).calibrate(llama, calibration.tokens)
    trained = train_merger(merger, llama, calibration, training=Training(**SHORT), progress=False)
    policies = ("trained", "random", "stride", "recent")  # all of them are tried above
    setting = Setting((0, 1, 2), budgets=(0.85,), projection=6, recent=4, seeds=1, policies=policies)
    study = bl.studies.study_merging(
        llama,
        calibration,
        held_out,
        setting,
        merger=merger,
        history=trained.history,
        prompt=8,
        written=6,
        prompts=2,
        progress=False,
    )
    folder = study.save(tmp_path / "out")
    assert {f.name for f in (folder / "figures").iterdir()} >= {"pareto.png", "training.png"}
    assert set(study.tables) == {"pareto", "windows", "context", "induction", "generation", "map", "layers", "training"}
    assert len(study.findings) == 2 and study.decision in ("yes", "no", "in part", "undecided")
    assert pd.read_csv(folder / "tables" / "pareto.csv")["policy"].nunique() == len(policies)
    assert "overlap" in " ".join(study.verdict)


@pytest.mark.parametrize(
    ("low", "high", "met"), [(0.3, 0.4, False), (0.15, 0.25, True), (0.0, 0.05, False), (0.0, 0.4, True), (float("nan"), 0.4, None)]
)
def test_intervals_overlap_or_lie_apart_on_either_side(low, high, met):
    curve = pd.DataFrame({"policy": ["trained", "random"], "budget": 0.5, "low": [low, 0.1], "high": [high, 0.2]})
    assert merging_report._overlap(curve, "trained", "random", 0.5) is met


@pytest.mark.parametrize("representative", ["leader", "mean"])
def test_the_error_of_merged_states_by_hand(tiny, representative):
    merger = TokenMerger([1], rule="stride", threshold=0.5, recent=2, representative=representative)
    states, tokens = {}, windows(3).tokens
    with merger.attached(tiny), torch.no_grad():
        door.forward_pass(tiny, tokens, {door.point_name("resid_pre", 1): lambda t: states.update(entering=t.clone())})
        found = merger.pass_.assigned[1]
    held, away, offered, merged = states["entering"].double(), [], [], []
    for b in range(3):
        for t in range(1, 24 - 2):  # position 0 and the recent window stay
            offered.append(held[b, t])
            if found.joined[b, t]:
                leader = int(found.leader[b, t])
                cluster = [leader, *(i for i in range(24) if found.joined[b, i] and int(found.leader[b, i]) == leader)]
                standing = held[b, leader] if representative == "leader" else held[b, cluster].mean(0)
                away.append(float((held[b, t] - standing).square().sum()))
                merged.append(held[b, t])
    spread = float((torch.stack(merged) - torch.stack(offered).mean(0)).square().sum())
    assert len(away) > 10 and merger.statistics()["eligible"].iloc[0] == len(offered)
    assert merger.statistics()["state_error"].iloc[0] == pytest.approx(sum(away) / spread, rel=1e-4)


def test_few_texts_are_cut_into_windows_that_count_as_documents():
    made = Windows(random_tokens(5, 24), ("a", "a", "b", "a", "b"), ("x", "x", "y", "x", "y"))
    pieces = made.in_pieces()
    assert pieces.pieces and not made.pieces and pieces.source == made.source and torch.equal(pieces.tokens, made.tokens)
    assert pieces.doc == ("a, window 1 of 3", "a, window 2 of 3", "b, window 1 of 2", "a, window 3 of 3", "b, window 2 of 2")
    first, rest = pieces.apart(0.4)
    assert len(first) == 2 and first.pieces and rest.source == ("y", "x", "y")


def test_shares_of_the_cache_count_all_layers_everywhere(tiny):
    merger = TokenMerger([1], target_rate=0.4, adaptive=True, projection=6, recent=2).calibrate(tiny, windows(seed=5).tokens)
    n = door.n_layers(tiny)
    with merger.attached(tiny), torch.no_grad():
        door.forward_pass(tiny, windows(2).tokens, {})
    own = merger.statistics()
    layer = float(own["bytes"].sum() / own["full_bytes"].sum())
    assert merging.share_left(merger, own) == pytest.approx((n - 1 + layer) / n)
    tokens = windows(2).tokens
    probe = merging.induction_probe(tiny, {"one": merger}, length=12, sequences=2)
    assert layer < 0.9 and (probe["bytes_share"] > (n - 1) / n).all()
    made = train_merger(merger, tiny, windows(seed=9), Windows(tokens, ("x", "y")), training=Training(**SHORT), progress=False)
    assert (made.history["bytes_share"] > (n - 1) / n).all()


def test_a_study_without_its_declared_policy_is_refused_before_any_work(tiny, monkeypatch):
    calls: list[int] = []
    replace_in_all_rooms(monkeypatch, "forward_pass", lambda *_: calls.append(1))
    setting = Setting((0, 1, 2), budgets=(0.85,), projection=6, recent=2, seeds=1, policies=("random", "stride"))
    with pytest.raises(MergeError, match="'cosine'"):
        bl.studies.study_merging(tiny, windows(8, seed=5), windows(8), setting, progress=False)
    assert not calls


def test_mean_interval_is_over_documents():
    rng = np.random.default_rng(0)
    docs = rng.normal(1.0, 1.0, 40)
    table = pd.DataFrame({"doc": np.repeat(range(40), 5), "policy": "a", "excess": np.repeat(docs, 5)})
    (row,) = bl.stats.mean_interval(table, "excess", "policy").to_dict("records")
    assert row["estimate"] == pytest.approx(docs.mean()) and row["n_units"] == 40 and row["n_rows"] == 200
    # As wide as the documents allow, not as the 200 rows would.
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * docs.std(ddof=1) / np.sqrt(40), rel=0.2)
    one = bl.stats.mean_interval(table[table["doc"] == 0], "excess", ["policy"])
    assert one["low"].isna().all() and one["n_units"].tolist() == [1]
    with pytest.raises(bl.errors.TableError, match="columns"):
        bl.stats.mean_interval(table, "cost", "policy")


def test_figures_refuse_what_they_cannot_draw():
    rows = pd.DataFrame(
        {"policy": ["trained", "random"], "bytes_share": 0.5, "estimate": [0.1, 3.0], "low": [0.05, 2.0], "high": [0.2, 4.0]}
    )
    assert bl.views.pareto(rows.assign(low=[0.0, 2.0])).axes[0].get_yscale() == "linear"  # a logarithm has no place for 0
    axes = bl.views.pareto(rows).axes[0]
    assert axes.get_yscale() == "log" and "bytes" in axes.get_xlabel() and "nats per token" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["trained", "random"]
    for draw, table in ((bl.views.pareto, rows.drop(columns="low")), (bl.views.pareto, rows[:0]), (bl.views.training_curves, rows)):
        with pytest.raises(bl.errors.TableError):
            draw(table)
    with pytest.raises(bl.errors.TableError, match="layer"):
        bl.views.merge_view(pd.DataFrame({"layer": [0], "seq": [0], "pos": [0]}), 7)
