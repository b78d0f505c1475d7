"""Merging on tiny models: whole sequences equal steps, nothing knows its future, padding and company do not matter."""

import pytest
import torch

from basin_lens import merging
from basin_lens import model as door
from basin_lens.errors import MergeError, ModelError
from basin_lens.merging import Assigned, TokenMerger, attention, merge_pass
from basin_lens.merging.parameters import Parameters
from tests.conftest import hooked_lane, make_bridge, make_hooked, random_tokens
from tests.merging.mergers import KINDS, LENGTH, count_hooks, make_merger, merged_logits

# Other families in the quick tests: `test_nothing_knows_its_future_in_other_families`, `test_other_bridges`.
FAMILIES = ("llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2")))


@pytest.fixture(scope="module", params=FAMILIES)
def wide(request):
    """A tiny random model in float64."""
    return door.in_dtype(make_bridge(request.param), torch.float64)


@pytest.mark.many
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_after_changes_nothing_before(wide, kind):
    merger, tokens = make_merger(wide, kind), random_tokens(2, LENGTH)
    full = merged_logits(merger, wide, tokens)
    assert merger.statistics().merged.sum() > 0
    for cut in (5, 11, 17):
        assert (merged_logits(merger, wide, tokens[:, :cut]) - full[:, :cut]).abs().max() < 5e-5
        changed = torch.cat([tokens[:, :cut], random_tokens(2, LENGTH - cut, seed=cut)], 1)
        assert torch.equal(merged_logits(merger, wide, changed)[:, :cut], full[:, :cut])


@pytest.mark.many
@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_equals_whole_sequences(wide, kind):
    merger, tokens = make_merger(wide, kind), random_tokens(2, LENGTH)
    full = merged_logits(merger, wide, tokens)
    with merging.streaming(merger, wide, 2) as stream, torch.no_grad():
        steps = torch.stack([stream.step(tokens[:, place]) for place in range(LENGTH)], 1)
    assert (steps - full).abs().max() < 5e-5


def test_two_mergers_share_no_layer(tiny):
    one, two, apart = (TokenMerger(layers, threshold=0.5, recent=2) for layers in ([0, 1], [1, 2], [2]))
    tokens = random_tokens(1, LENGTH)
    alone = merged_logits(one, tiny, tokens)
    with one.attached(tiny):
        with pytest.raises(MergeError, match=r"attached in \[1\]"), two.attached(tiny):
            pass
        with apart.attached(tiny):
            door.forward_pass(tiny, tokens, {})
    assert torch.equal(merged_logits(one, tiny, tokens), alone)
    merged_logits(two, tiny, tokens)


# -- causality -------------------------------------------------------------------------------------------------------------------------


def leaks(merger, model, tokens, *, soft: bool = False, places=(5, 13)) -> dict[str, float]:
    """What a position knows of its future: by prefixes, by changed later tokens, by gradients with respect to later embeddings."""
    length, held = tokens.shape[1], []
    full = merged_logits(merger, model, tokens, soft=soft)
    found = {"prefix": 0.0, "changed": 0.0, "gradient": 0.0}
    with merger.attached(model, soft=soft):
        logits = door.forward_pass(model, tokens, {"hook_embed": held.append}, gradients=True)
    for t in places:
        found["prefix"] = max(
            found["prefix"], float((merged_logits(merger, model, tokens[:, : t + 1], soft=soft)[:, t] - full[:, t]).abs().max())
        )
        other = torch.cat([tokens[:, : t + 1], random_tokens(len(tokens), length - t - 1, seed=t)], 1)
        found["changed"] = max(
            found["changed"], float((merged_logits(merger, model, other, soft=soft) - full)[:, : t + 1].abs().max())
        )
        (slope,) = torch.autograd.grad(logits[:, t].sin().sum(), held[0], retain_graph=True)
        assert slope[:, t].abs().max() > 0
        found["gradient"] = max(found["gradient"], float(slope[:, t + 1 :].abs().max()))
    return found


CAUSAL = {
    **{kind: (kind, {}) for kind in ("leader", "strict", "mean", "rows", "residual", "adaptive", "projected", "dropped", "random")},
    "simulated": ("leader", {"simulate": True}), "simulated mean": ("leader", {"simulate": True, "representative": "mean"}),
    "low": ("leader", {"threshold": 0.05}), "adjacent": ("adjacent", {"representative": "mean"}),
}  # fmt: skip


@pytest.mark.many
@pytest.mark.parametrize(("kind", "changes"), CAUSAL.values(), ids=CAUSAL)
@pytest.mark.parametrize("soft", [False, True])
def test_nothing_knows_its_future(tiny, kind, changes, soft):
    merger = make_merger(tiny, kind, **changes)
    found = leaks(merger, tiny, random_tokens(2, LENGTH), soft=soft)
    assert found["prefix"] < 1e-5 and found["changed"] == 0 and found["gradient"] == 0, found


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("family", "threshold"), [("gpt2", 0.3), ("gpt2", 0.7), ("gemma2", 0.3), ("gemma2", 0.6)])
def test_nothing_knows_its_future_in_other_families(family, threshold, soft):
    model = door.in_dtype(make_bridge(family), torch.float64)
    found = leaks(make_merger(model, "leader", threshold=threshold), model, random_tokens(2, LENGTH), soft=soft)
    assert found["prefix"] < 1e-5 and found["changed"] == 0 and found["gradient"] == 0, found


def read_at_once(monkeypatch):
    """Members are read through their cluster by queries that came before the decision."""
    honest = attention.read_weights
    early = lambda a, share, *, drop: honest(Assigned(a.leader, a.joined, torch.zeros_like(a.since)), share, drop=drop)  # noqa: E731
    monkeypatch.setattr(attention, "read_weights", early)


def decided_at_once(monkeypatch):
    honest = merge_pass.assign

    def early(*args, **kwargs):
        found = honest(*args, **kwargs)
        return Assigned(found.leader, found.joined, torch.ones_like(found.since))

    monkeypatch.setattr(merge_pass, "assign", early)


def means_written_back(monkeypatch):
    """Members get the mean of the whole sequence's cluster."""

    def whole(values, leader):
        places = torch.arange(values.shape[1])
        cluster = torch.where(leader >= 0, leader, places)
        same = (cluster[:, :, None] == cluster[:, None]).to(values)
        return same @ values / same.sum(2, keepdim=True)

    monkeypatch.setattr(attention, "leader_rows", whole)


def levels_of_the_whole(monkeypatch):
    """Stricter or looser by the mean norm of the whole sequence."""
    honest = Parameters.level_of
    moved = lambda self, i, features: honest(self, i, features) + 0.4 * (50 * features[..., 1].mean(1, keepdim=True)).sin()  # noqa: E731
    monkeypatch.setattr(Parameters, "level_of", moved)


LEAKY = {
    "read at once": (read_at_once, "leader", {}), "decided at once": (decided_at_once, "mean", {}),
    "written back": (means_written_back, "leader", {"simulate": True, "threshold": 0.05}),
    "levels": (levels_of_the_whole, "leader", {"threshold": 0.7}),
}  # fmt: skip


@pytest.mark.many
@pytest.mark.parametrize(("leaky", "kind", "changes"), LEAKY.values(), ids=LEAKY)
def test_a_leaky_variant_is_found_out(tiny, monkeypatch, leaky, kind, changes):
    merger = make_merger(tiny, kind, **changes)
    assert max(leaks(merger, tiny, random_tokens(2, LENGTH)).values()) < 1e-5
    leaky(monkeypatch)
    found = leaks(merger, tiny, random_tokens(2, LENGTH))
    assert found["prefix"] > 1e-3 and found["changed"] > 1e-3, found
    if leaky is not levels_of_the_whole:  # a hard comparison has no gradient
        assert found["gradient"] > 1e-6, found


@pytest.mark.many
@pytest.mark.parametrize("kind", ["leader", "rows", "random", "preserved", "dropped"])
def test_padding_and_company_do_not_matter(gpt2, kind):
    merger, tokens = make_merger(gpt2, kind), random_tokens(3, LENGTH)
    ends = torch.tensor([LENGTH, 15, 9])
    valid = torch.arange(LENGTH) < ends[:, None]
    counts = ["tokens", "eligible", "merged", "clusters", "rows", "bytes"]
    merger.forget()
    together = merged_logits(merger, gpt2, tokens, valid=valid)
    told = merger.statistics()[counts]
    padded = merged_logits(merger, gpt2, torch.where(valid, tokens, 7), valid=valid)
    for i, end in enumerate(ends.tolist()):
        merger.forget()
        alone = merged_logits(merger, gpt2, tokens[i : i + 1, :end])
        assert (together[i, :end] - alone[0]).abs().max() < 1e-9
        assert (padded[i, :end] - alone[0]).abs().max() < 1e-9
        told = told - merger.statistics()[counts]
    assert (told == 0).all(axis=None)


@pytest.mark.many
@pytest.mark.parametrize("kind", ["leader", "mean", "rows", "residual", "adjacent", "adaptive"])
@pytest.mark.parametrize("changes", [{"threshold": 1.0}, {"threshold": 1.5, "floor": 0.3}, {"threshold": 1.0, "simulate": True}])
@pytest.mark.parametrize("gradients", [False, True])
def test_from_threshold_1_on_the_model_is_the_plain_one_bit_by_bit(tiny, kind, changes, gradients):
    if "simulate" in changes and kind in ("rows", "residual"):
        return
    merger, tokens = make_merger(tiny, kind, **changes), torch.full((1, LENGTH), 5)
    with door.measuring(tiny):
        plain = door.forward_pass(tiny, tokens, {})
    with torch.set_grad_enabled(gradients), merger.attached(tiny):
        assert torch.equal(door.forward_pass(tiny, tokens, {}), plain)
    assert merger.statistics().merged.sum() == 0


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.3, 0.7, -0.5])
def test_a_threshold_of_1_comes_back_as_1(tiny, floor):
    for threshold in (1.0, 0.8):
        merger = TokenMerger([0], threshold=threshold, floor=floor).prepare(tiny)
        level = merger.weights.level_of(0, torch.zeros(4)).detach().item()
        assert level == pytest.approx(threshold, abs=1e-6) and (level == 1) is (threshold == 1)


@pytest.mark.parametrize("recent", [1, 3, 6])
def test_the_first_token_and_the_window_stay_raw(tiny, recent):
    tokens = torch.full((1, LENGTH), 5)  # everything is like everything
    merger = TokenMerger([0], threshold=0.2, recent=recent)
    with merger.attached(tiny), torch.no_grad():
        door.forward_pass(tiny, tokens, {})
        weights, found = merger.pass_.factors[0][0], merger.pass_.assigned[0]
    for t in range(LENGTH):
        raw = range(max(0, t - recent + 1), t + 1)
        assert weights[t, 0] == 1 and not found.joined[0, 0] and not (found.leader[0] == 0).any()
        # The one cluster, opened by token 1, has all that left the window; a leader in the window has none.
        assert weights[t, 1] == max(1, t - recent)
        assert all(weights[t, r] == 1 for r in raw if r != 1)
        assert weights[t, : t + 1].sum() == t + 1


def test_nothing_is_shared_between_sequences(tiny):
    tokens = random_tokens(1, LENGTH).expand(3, -1)
    merger = make_merger(tiny, "leader")
    with merger.attached(tiny), torch.no_grad():
        door.forward_pass(tiny, tokens, {})
        for found in merger.pass_.assigned.values():
            assert (found.leader == found.leader[0]).all() and (found.joined == found.joined[0]).all()
    merger.forget()
    merged_logits(merger, tiny, random_tokens(1, LENGTH))
    assert merger.statistics().largest.max() < LENGTH


@pytest.mark.parametrize("valid", [[[False, True, True]], [[True, False, True]]])
def test_padding_elsewhere_is_refused(tiny, valid):
    with (
        pytest.raises(MergeError, match="Pad on the right"),
        TokenMerger([0], threshold=0.5).attached(tiny, valid=torch.tensor(valid)),
    ):
        pass


# -- other models ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("family", ["neox", "bloom"])
@pytest.mark.parametrize("kind", ["leader", "residual"])
def test_other_bridges(family, kind):
    model, tokens = door.in_dtype(make_bridge(family), torch.float64), random_tokens(2, LENGTH)
    merger = make_merger(model, kind)
    full = merged_logits(merger, model, tokens)
    assert merger.statistics().merged.sum() > 0
    assert (merged_logits(merger, model, tokens[:, :11]) - full[:, :11]).abs().max() < 5e-5
    with merging.streaming(merger, model, 2) as stream:
        steps = torch.stack([stream.step(tokens[:, place]) for place in range(LENGTH)], 1)
    assert (steps - full).abs().max() < 5e-5


@hooked_lane
@pytest.mark.parametrize("kind", ["leader", "mean", "rows", "residual", "projected", "dropped"])
def test_hooked_transformer_merges_whole_sequences(kind):
    model = door.in_dtype(make_hooked(), torch.float64)
    merger = make_merger(model, kind)
    found = leaks(merger, model, random_tokens(2, LENGTH))
    assert merger.statistics().merged.sum() > 0
    assert found["prefix"] < 1e-5 and found["changed"] < 1e-9 and found["gradient"] == 0, found
    before = count_hooks(model)
    with pytest.raises(ModelError, match="HookedTransformer"), merging.streaming(merger, model, 1):
        pass
    with pytest.raises(ModelError, match="HookedTransformer"):
        merging.generate(merger, model, random_tokens(1, 4), 2)
    assert count_hooks(model) == before
