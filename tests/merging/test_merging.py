"""Token merging: causality first, then the same numbers by another way, then options."""

import inspect
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from basin_lens import merging, records
from basin_lens import model as door
from basin_lens.errors import MergeError, ModelError, StoreError
from basin_lens.merging import Assigned, Clusters, TokenMerger, attention, cache, merge_pass
from basin_lens.merging.assignment import assign
from basin_lens.merging.parameters import Parameters
from basin_lens.merging.similarity import cosines
from tests.conftest import VOCAB, hooked_lane, make_bridge, make_hooked, random_tokens

# Other families in the quick tests: `test_nothing_knows_its_future_in_other_families`, `test_other_bridges`.
FAMILIES = ("llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2")))
LENGTH = 24
KINDS = {
    "leader": {"threshold": 0.3},
    "strict": {"threshold": 0.7},
    "mean": {"threshold": 0.3, "representative": "mean"},
    "rows": {"threshold": 0.4, "attention_weight": 0.5},
    "residual": {"threshold": 0.3, "residual": "gated", "residual_width": 3},
    "adaptive": {"threshold": 0.4, "adaptive": True},
    "projected": {"threshold": 0.4, "projection": 6},
    "preserved": {"threshold": 0.3, "preserve": "norm", "preserve_share": 0.3},
    "dropped": {"threshold": 0.3, "drop": True},
    "random": {"threshold": 0.5, "rule": "random"},
    "stride": {"threshold": 0.5, "rule": "stride"},
    "adjacent": {"threshold": 0.2, "rule": "adjacent"},
    "recent": {"rule": "all", "drop": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def wide(request):
    """A tiny random model in float64."""
    return door.in_dtype(make_bridge(request.param), torch.float64)


@pytest.fixture(scope="module")
def tiny():
    return door.in_dtype(make_bridge("llama"), torch.float64)


def make_merger(model, kind: str, **changes) -> merging.TokenMerger:
    merger = merging.TokenMerger([0, 1, 2], **{"recent": 2} | KINDS[kind] | changes)
    merger.calibrate(model, random_tokens(4, LENGTH, seed=9))
    if merger.weights.slope is not None:
        with torch.no_grad():
            merger.weights.slope += 0.4
    return merger


def merged_logits(merger, model, tokens, **given):
    with merger.attached(model, **given), torch.no_grad():
        return door.forward_pass(model, tokens, {})


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_after_changes_nothing_before(wide, kind):
    merger, tokens = make_merger(wide, kind), random_tokens(2, LENGTH)
    full = merged_logits(merger, wide, tokens)
    assert merger.statistics().merged.sum() > 0
    for cut in (5, 11, 17):
        assert (merged_logits(merger, wide, tokens[:, :cut]) - full[:, :cut]).abs().max() < 1e-5
        changed = torch.cat([tokens[:, :cut], random_tokens(2, LENGTH - cut, seed=cut)], 1)
        assert torch.equal(merged_logits(merger, wide, changed)[:, :cut], full[:, :cut])


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_equals_whole_sequences(wide, kind):
    merger, tokens = make_merger(wide, kind), random_tokens(2, LENGTH)
    full = merged_logits(merger, wide, tokens)
    with merging.streaming(merger, wide, 2) as stream, torch.no_grad():
        steps = torch.stack([stream.step(tokens[:, place]) for place in range(LENGTH)], 1)
    assert (steps - full).abs().max() < 1e-5


@pytest.fixture(scope="module")
def gpt2():
    return door.in_dtype(make_bridge("gpt2"), torch.float64)


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


# ---- causality -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("kind", "changes"), CAUSAL.values(), ids=CAUSAL)
@pytest.mark.parametrize("soft", [False, True])
def test_nothing_knows_its_future(tiny, kind, changes, soft):
    merger = make_merger(tiny, kind, **changes)
    found = leaks(merger, tiny, random_tokens(2, LENGTH), soft=soft)
    assert found["prefix"] < 1e-5 and found["changed"] == 0 and found["gradient"] == 0, found


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


@pytest.mark.parametrize(("leaky", "kind", "changes"), LEAKY.values(), ids=LEAKY)
def test_a_leaky_variant_is_found_out(tiny, monkeypatch, leaky, kind, changes):
    merger = make_merger(tiny, kind, **changes)
    assert max(leaks(merger, tiny, random_tokens(2, LENGTH)).values()) < 1e-5
    leaky(monkeypatch)
    found = leaks(merger, tiny, random_tokens(2, LENGTH))
    assert found["prefix"] > 1e-3 and found["changed"] > 1e-3, found
    if leaky is not levels_of_the_whole:  # a hard comparison has no gradient
        assert found["gradient"] > 1e-6, found


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


# ---- independent references ------------------------------------------------------------------------------------------


def reference_z(q, k, v, found, merger, *, mean: bool) -> np.ndarray:
    """Attention of every query over its own list of rows, one after another."""
    batch, length, heads, d = q.shape
    made = np.zeros_like(q)
    for b in range(batch):
        for t in range(length):
            rows: dict[int, list[int]] = {}
            for p in range(t + 1):
                if found.joined[b, p] and found.since[b, p] <= t:
                    if not merger.options.drop:
                        rows[int(found.leader[b, p])].append(p)
                else:
                    rows[p] = [p]
            for h in range(heads):
                logits = np.array(
                    [q[b, t, h] @ k[b, leader, h] / math.sqrt(d) + math.log(len(members)) for leader, members in rows.items()]
                )
                weights = np.exp(logits - logits.max())
                values = []
                for leader, members in rows.items():
                    value = v[b, members, h].mean(0) if mean else v[b, leader, h]
                    if merger.weights.down is not None:
                        down, up = (x.detach().double().numpy()[0] for x in (merger.weights.down, merger.weights.up))
                        kept = np.mean([down @ (v[b, m] - v[b, leader]).reshape(-1) for m in members], 0)
                        value = (
                            value + 1 / (1 + math.exp(-float(merger.weights.gate.detach()[0]))) * (up @ kept).reshape(heads, d)[h]
                        )
                    values.append(value)
                made[b, t, h] = weights / weights.sum() @ np.array(values)
    return made


@pytest.mark.parametrize("kind", ["leader", "mean", "residual", "dropped", "random", "rows"])
def test_attention_over_clusters_as_a_plain_loop_computes_it(gpt2, kind):
    merger = TokenMerger([1], **{"recent": 2} | KINDS[kind])
    merger.calibrate(gpt2, random_tokens(4, LENGTH, seed=9))
    if merger.weights.gate is not None:
        merger.weights.gate.data += 0.7
    held = {}
    readers = {
        door.point_name(f"attn.hook_{x}", 1): lambda t, x=x: held.__setitem__(x, t.double().reshape(2, LENGTH, 4, 8).numpy())
        for x in "qkvz"
    }
    with merger.attached(gpt2), torch.no_grad():
        door.forward_pass(gpt2, random_tokens(2, LENGTH), readers)
        found = merger.pass_.assigned[1]
    assert found.joined.sum() > 5
    expected = reference_z(held["q"], held["k"], held["v"], found, merger, mean=kind == "mean")
    assert np.abs(held["z"] - expected).max() < 1e-6


def brute(descriptors, level, places, rule, *, mean=False, seed=(0,), scores=None):
    """Leader clustering in plain Python: place -> (leader or -1, joined)."""
    clusters, made = [], {}
    for offered, p in enumerate(places, 1):
        d = [float(x) for x in descriptors[p]]
        cosine = [sum(a * b for a, b in zip(c["d"], d, strict=True)) / math.hypot(*c["d"]) / math.hypot(*d) for c in clusters]
        best, joins = len(clusters) - 1, False
        if clusters:
            if rule in ("cosine", "score"):
                best = max(range(len(clusters)), key=lambda i: cosine[i])
                joins = scores[p] > level if rule == "score" else cosine[best] >= level
            elif rule == "adjacent":
                joins = cosine[best] >= level
            elif rule == "random":
                draw = np.random.default_rng((*seed, p))
                best, joins = int(draw.integers(len(clusters))), draw.random() < level
            else:
                joins = math.floor(offered * (1 - level)) == math.floor((offered - 1) * (1 - level))
        made[p] = (clusters[best]["leader"] if clusters else -1, bool(joins))
        if joins:
            c = clusters[best]
            c["size"] += 1
            if mean:
                c["d"] = [float(np.float16(a + (b - a) / c["size"])) for a, b in zip(c["d"], d, strict=True)]
        else:
            clusters.append({"d": d, "leader": p, "size": 1})
    return made, clusters


def some_descriptors(batch: int = 2, length: int = 30, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, length, width)).astype(np.float16)


@pytest.mark.parametrize("rule", ["cosine", "adjacent", "stride", "random", "score"])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("level", "recent", "context"), [(0.4, 3, None), (0.8, 1, None), (0.3, 2, 17), (0.5, 40, None)])
def test_clusters_as_plain_python_makes_them(rule, mean, level, recent, context):
    descriptors = some_descriptors()
    eligible = np.random.default_rng(1).random((2, 30)) < 0.8
    scores = np.random.default_rng(2).normal(size=(2, 30))
    options = {"rule": rule, "recent": recent, "context": context, "mean": mean, "seed": (3, 1)}
    found = assign(descriptors, np.full((2, 30), level), eligible, scores=scores, **options)
    for b in range(2):
        places = [p for p in range(1, 30 - recent if context is None else context) if eligible[b, p]]
        made, clusters = brute(descriptors[b], level, places, rule, mean=mean, seed=(3, 1), scores=scores[b])
        for p in range(30):
            assert (int(found.leader[b, p]), bool(found.joined[b, p])) == made.get(p, (-1, False))
            assert int(found.since[b, p]) == ((p + recent if context is None else context) if p in made else 30)
        alone = assign(descriptors[b : b + 1], np.full((1, 30), level), eligible[b : b + 1], scores=scores[b : b + 1], **options)
        assert torch.equal(alone.leader[0], found.leader[b]) and torch.equal(alone.joined[0], found.joined[b])
        for room in (0, 4):
            stepping = Clusters(rule, 5, room=room, mean=mean, seed=(3, 1))
            for p in places:
                assert stepping.offer(p, descriptors[b, p], level, score=scores[b, p]) == made[p]
            assert stepping.sizes[: stepping.count].tolist() == [c["size"] for c in clusters]
            kept = min(1, len(clusters)) if rule == "adjacent" else len(clusters)
            assert stepping.nbytes == kept * 10 + len(clusters) * 8


@pytest.mark.parametrize("rule", ["cosine", "adjacent", "score"])
@pytest.mark.parametrize("width", [1, 3, 32, 576])
def test_all_at_once_is_one_by_one_to_the_last_bit(rule, width):
    """Also where a level is some pair's cosine itself, and where descriptors are equal."""
    draw = np.random.default_rng(width)
    for trial in range(20):
        rows = draw.normal(size=(20, width))[draw.integers(0, 20, 40)] + draw.choice([0, 0.1]) * draw.normal(size=(40, width))
        descriptors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
        levels = cosines(descriptors, descriptors).ravel()[draw.integers(0, 1600, 40)] if trial % 2 else draw.uniform(-0.5, 1.1, 40)
        scores = draw.normal(size=40)
        found = assign(descriptors[None], levels[None], np.ones((1, 40), bool), rule=rule, recent=0, scores=scores[None])
        for room in (0, 40):
            stepping = Clusters(rule, width, room=room)
            made = [stepping.offer(p, descriptors[p], levels[p], score=scores[p]) for p in range(1, 40)]
            assert made == list(zip(found.leader[0, 1:].tolist(), found.joined[0, 1:].tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_member_has_a_leader_before_it(data):
    length, width = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 4))
    number = st.floats(-3, 3, width=16)
    descriptors = np.array(
        data.draw(st.lists(st.lists(number, min_size=width, max_size=width), min_size=length, max_size=length)), np.float16
    )
    rule = data.draw(st.sampled_from(["cosine", "adjacent", "stride", "random"]))
    level, recent = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 5))
    eligible = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    found = assign(
        descriptors[None], np.full((1, length), level), eligible[None], rule=rule, recent=recent, mean=data.draw(st.booleans())
    )
    leader, joined, since = (x[0].numpy() for x in (found.leader, found.joined, found.since))
    offered = np.flatnonzero(since < length)
    assert set(offered) == {p for p in range(1, length) if eligible[p] and p + recent < length}
    for p in np.flatnonzero(joined):
        assert 0 < leader[p] < p and not joined[leader[p]] and leader[p] in offered
    weights = attention.read_weights(found, found.joined.double(), drop=False)[0]
    sizes = weights[-1].numpy()
    assert sizes[offered].sum() == len(offered) and (sizes[joined] == 0).all() and sizes.min() >= 0
    assert (weights.tril().sum(1) == torch.arange(1, length + 1)).all()


def test_bipartite_takes_the_most_similar_pairs():
    descriptors = np.eye(6, dtype=np.float16)[None, [0, 1, 2, 1, 3, 4, 5, 2]]
    found = assign(descriptors, np.full((1, 8), 0.25), np.ones((1, 8), bool), rule="bipartite", recent=2, context=8)
    # Places 1, 3, 5, 7 stay, 2, 4, 6 propose: none is like another; the two best proposals of round(0.25 * 7) are taken.
    assert found.joined.sum() == 2 and not found.joined[0, [0, 1, 3, 5, 7]].any()
    descriptors = np.eye(6, dtype=np.float16)[None, [0, 1, 3, 2, 1, 4, 5, 3]]
    found = assign(descriptors, np.full((1, 8), 0.15), np.ones((1, 8), bool), rule="bipartite", recent=2, context=8)
    assert found.joined[0].nonzero().ravel().tolist() in ([2], [4]) and found.leader[0, 2] == 7 and found.leader[0, 4] == 1


@pytest.mark.parametrize("rule", ["bipartite", "cosine", "random"])
def test_in_the_context_protocol_nothing_changes_before_the_end(tiny, rule):
    merger, tokens = TokenMerger([0, 1, 2], threshold=0.3, rule=rule, recent=2), random_tokens(2, LENGTH)
    with door.measuring(tiny):
        plain = door.forward_pass(tiny, tokens, {})
    full = merged_logits(merger, tiny, tokens, context=14)
    assert torch.equal(full[:, :14], plain[:, :14]) and not torch.equal(full[:, 14:], plain[:, 14:])
    stats = merger.statistics()
    assert (stats.eligible == 2 * 13).all() and (stats.merged > 0).all()
    # Nothing more is compared: rows, their places, leaders and sizes.
    assert (stats.bytes == stats.rows * (merger.weights.shape.row_bytes + 4) + stats.clusters * 8).all()
    # Causal behind the context, given the context.
    assert (merged_logits(merger, tiny, tokens[:, :19], context=14)[:, 14:] - full[:, 14:19]).abs().max() < 1e-9


def test_bipartite_needs_its_protocol(tiny):
    merger = TokenMerger([0], threshold=0.3, rule="bipartite")
    with pytest.raises(MergeError, match="sees the future"), merger.attached(tiny):
        pass
    aimed = TokenMerger([0], target_rate=0.3, rule="bipartite")
    with pytest.raises(MergeError, match="sees the future"):
        aimed.calibrate(tiny, random_tokens())
    with pytest.raises(MergeError, match="context of 1"), merger.attached(tiny, context=0):
        pass


# ---- gradients -------------------------------------------------------------------------------------------------------


def loss_of(merger, model, tokens, *, soft: bool):
    with merger.attached(model, soft=soft):
        logits = door.forward_pass(model, tokens, {})
        kept = {layer: a.joined for layer, a in merger.pass_.assigned.items()}
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), kept


GRADED = {
    "leader": ("leader", ["raw"]), "mean": ("mean", ["raw"]), "dropped": ("dropped", ["raw"]), "adjacent": ("adjacent", ["raw"]),
    "rows": ("rows", ["raw"]), "adaptive": ("adaptive", ["raw", "slope"]), "projected": ("projected", ["raw", "head"]),
    "residual": ("residual", ["raw", "gate", "down", "up"]),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "names"), GRADED.values(), ids=GRADED)
@pytest.mark.parametrize("changes", [{}, {"simulate": True}])
def test_what_is_trained_has_a_gradient(tiny, kind, names, changes):
    if changes and kind in ("rows", "residual", "dropped"):
        return
    merger = make_merger(tiny, kind, **changes)
    loss_of(merger, tiny, random_tokens(2, LENGTH), soft=False)[0].backward()
    for name in names:
        grad = getattr(merger.weights, name).grad
        assert torch.isfinite(grad).all() and (grad.flatten(1) if grad.ndim > 1 else grad[:, None]).abs().amax(1).min() > 0, name


@pytest.mark.parametrize("changes", [{}, {"representative": "mean"}, {"simulate": True}])
def test_a_threshold_above_everything_still_has_a_gradient(tiny, changes):
    merger = make_merger(tiny, "leader", threshold=0.99, temperature=0.3, **changes)
    tokens = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))[None, :LENGTH]  # nothing twice
    loss, joined = loss_of(merger, tiny, tokens, soft=False)
    assert not any(bool(j.any()) for j in joined.values())
    loss.backward()
    assert merger.weights.raw.grad.abs().min() > 0


@pytest.mark.parametrize(("kind", "names"), GRADED.values(), ids=GRADED)
def test_soft_gradients_equal_finite_differences(gpt2, monkeypatch, kind, names):
    # Without rounding to float16, which has no slope.
    monkeypatch.setattr(torch.Tensor, "half", lambda self: self)
    merger = TokenMerger([1], **{"recent": 2, "temperature": 0.2} | KINDS[kind])
    merger.calibrate(gpt2, random_tokens(4, LENGTH, seed=9))
    merger.double()
    tokens = random_tokens(2, LENGTH)
    loss, joined = loss_of(merger, gpt2, tokens, soft=True)
    loss.backward()
    draw = torch.Generator().manual_seed(0)
    for name in names:
        parameter = getattr(merger.weights, name)
        way = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        said = float((parameter.grad * way).sum())
        sides = []
        for step in (1e-5, -1e-5):
            parameter.data += step * way
            value, now = loss_of(merger, gpt2, tokens, soft=True)
            assert torch.equal(now[1], joined[1])
            sides.append(float(value.detach()))
            parameter.data -= step * way
        assert said != 0 and said == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=2e-3, abs=1e-8), name


# ---- what it says happened -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_that_are_held(tiny, kind):
    merger, tokens = make_merger(tiny, kind), random_tokens(1, LENGTH)
    for length in (2, 9, LENGTH):
        merger.forget()
        merged_logits(merger, tiny, tokens[:, :length])
        with merging.streaming(merger, tiny, 1) as stream:
            for token in tokens[0, :length]:
                stream.step(token[None])
            told = merger.statistics()
            assert told.bytes.tolist() == stream.nbytes()
            assert told.rows.tolist() == stream.rows()
            for layer in stream.layers:
                (held,) = layer.sequences
                assert held.keys.shape == held.values.shape == (2, len(held.places), 8)
    assert (told.full_bytes == LENGTH * 2 * 2 * 8 * 8).all()


def test_statistics_against_counts_by_hand(tiny):
    merger, tokens = make_merger(tiny, "leader"), random_tokens(2, LENGTH)
    merger.forget()
    for _ in range(2):
        with merger.attached(tiny), torch.no_grad():
            door.forward_pass(tiny, tokens, {})
            found, units = merger.pass_.assigned, merger.pass_.units
    told = merger.statistics()
    assert told["pass"].tolist() == [0, 0, 0, 1, 1, 1] and told.layer.tolist() == [0, 1, 2] * 2
    for row in told.iloc[3:].itertuples():
        f, u = found[row.layer], units[row.layer]
        merged = [(b, p, int(f.leader[b, p])) for b in range(2) for p in range(LENGTH) if f.joined[b, p]]
        assert (row.sequences, row.tokens, row.eligible, row.merged) == (2, 48, 2 * (LENGTH - 3), len(merged))
        assert row.rate == pytest.approx(len(merged) / 48) and row.rows == 48 - len(merged)
        assert row.clusters == row.eligible - len(merged)
        sizes = {}
        for b, _, leader in merged:
            sizes[b, leader] = sizes.get((b, leader), 1) + 1
        assert row.largest == max(sizes.values())
        cosine = [float(u[b, p] @ u[b, at] / u[b, p].norm() / u[b, at].norm()) for b, p, at in merged]
        assert row.similarity == pytest.approx(np.mean(cosine), abs=1e-6)
        assert row.level == pytest.approx(0.3, abs=1e-6)
    merger.forget()
    assert merger.statistics().empty


def test_layers_in_any_order(tiny):
    one, other = (
        make_merger(tiny, "leader"),
        TokenMerger([2, 0, 1], recent=2, threshold=0.3).calibrate(tiny, random_tokens(4, LENGTH, seed=9)),
    )
    tokens = random_tokens(2, LENGTH)
    assert torch.equal(merged_logits(one, tiny, tokens), merged_logits(other, tiny, tokens))
    assert other.statistics()["pass"].tolist() == [0, 0, 0]


# ---- calibration -----------------------------------------------------------------------------------------------------

AIMED = {
    "leader": {}, "mean": {"representative": "mean"}, "rows": {"attention_weight": 0.5}, "projected": {"projection": 6},
    "adaptive": {"adaptive": True}, "adjacent": {"rule": "adjacent", "floor": -0.9}, "stride": {"rule": "stride"},
    "key_norm": {"rule": "key_norm", "drop": True}, "score": {"rule": "score"}, "residual": {"residual": "gated"},
    "preserve": {"preserve": "norm", "preserve_share": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("options", AIMED.values(), ids=AIMED)
def test_calibration_meets_its_target(tiny, options):
    tokens = random_tokens(4, LENGTH, seed=9)
    given = {"scores": {layer: torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(layer)) for layer in range(3)}}
    given = given if options.get("rule") == "score" else {}
    merger = TokenMerger([0, 1, 2], target_rate=0.35, recent=2, **options).calibrate(tiny, tokens, **given)
    assert merger.statistics().empty and merger.calibrated
    merged_logits(merger, tiny, tokens, **given)
    assert (merger.statistics().merged - 0.35 * tokens.numel()).abs().max() <= 2
    merger = TokenMerger([0, 2], target_bytes=0.85, recent=2, **options).calibrate(tiny, tokens, **given)
    merged_logits(merger, tiny, tokens, **given)
    told = merger.statistics()
    assert (told.bytes.sum() + told.full_bytes[0]) / (3 * told.full_bytes[0]) == pytest.approx(0.85, abs=0.02)


def test_progressive_merges_less_early(tiny):
    tokens = random_tokens(4, LENGTH, seed=9)
    merger = TokenMerger([0, 1, 2], target_rate=0.4, recent=2, progressive=True).calibrate(tiny, tokens)
    merged_logits(merger, tiny, tokens)
    rates = merger.statistics().rate
    assert rates[0] < rates[1] - 0.1 and rates.mean() == pytest.approx(0.4, abs=0.02)
    given = TokenMerger([0, 1, 2], threshold=0.5, progressive=True).prepare(tiny).levels.tolist()
    assert given[0] > given[1] and given[0] == pytest.approx(0.75)


@pytest.mark.parametrize(
    "options",
    [{"target_rate": 0.97}, {"target_bytes": 0.05}, {"target_rate": 0.8, "floor": 0.9}, {"target_bytes": 0.6, "recent": 20}],
)
def test_targets_out_of_reach_are_refused(tiny, options):
    with pytest.raises(MergeError, match=r"Ask for"):
        TokenMerger([0, 1, 2], **{"recent": 2} | options).calibrate(tiny, random_tokens(4, LENGTH))


def test_with_a_threshold_calibration_sets_no_level(tiny):
    merger = TokenMerger([0, 1], threshold=0.4).prepare(tiny)
    before = {name: value.clone() for name, value in merger.weights.state_dict().items()}
    merger.calibrate(tiny, random_tokens())
    changed = {name for name, value in merger.weights.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"center", "feature_mean", "feature_scale"}


def test_a_target_needs_calibration_and_enough_tokens(tiny):
    merger = TokenMerger([0], target_rate=0.4)
    for context in (merger.attached(tiny), merging.streaming(merger, tiny, 1)):
        with pytest.raises(MergeError, match="calibrate"), context:
            pass
    with pytest.raises(MergeError, match="Give more text"):
        merger.calibrate(tiny, random_tokens(1, 2))
    with pytest.raises(MergeError, match="Give more text"):
        TokenMerger([0], threshold=0.5, projection=20).calibrate(tiny, random_tokens(1, 9))
    with pytest.raises(MergeError, match="at most 32"):
        TokenMerger([0], threshold=0.5, projection=33).prepare(tiny)


@pytest.mark.parametrize("kind", ["norm", "surprisal"])
def test_important_tokens_are_never_merged(tiny, kind):
    tokens = random_tokens(4, LENGTH)
    surprisal = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(0)) if kind == "surprisal" else None
    merger = TokenMerger([0, 1], threshold=0.0, recent=2, preserve=kind, preserve_share=0.4)
    with pytest.raises(MergeError, match="calibrate"), merger.attached(tiny, surprisal=surprisal):
        pass  # nothing would be preserved, and nobody told
    merger.calibrate(tiny, tokens, surprisal=surprisal)
    held = {}
    with merger.attached(tiny, surprisal=surprisal), torch.no_grad():
        door.forward_pass(tiny, tokens, {door.point_name("resid_pre", 0): lambda t: held.setdefault("states", t)})
        found = merger.pass_.assigned[0]
    far = (
        (held["states"] - merger.weights.center[0]).norm(dim=-1) > merger.weights.norm_cutoff[0]
        if surprisal is None
        else surprisal > merger.weights.surprisal_cutoff
    )
    assert 0.3 < far[:, 1:].float().mean() < 0.5
    assert found.joined.sum() > 10 and not (found.joined & far).any()
    taken = torch.zeros_like(far).scatter_(1, found.leader.clamp(min=0), found.leader >= 0)
    assert not (taken & far).any()
    if surprisal is not None:
        with pytest.raises(MergeError, match="surprisal"), merger.attached(tiny):
            pass
        with pytest.raises(MergeError, match="surprisal"):
            TokenMerger([0], threshold=0.1, preserve=kind).calibrate(tiny, tokens)
        with pytest.raises(MergeError, match="token by token"), merging.streaming(merger, tiny, 1):
            pass


def test_simulation_overwrites_states_and_saves_nothing(tiny):
    merger, held = TokenMerger([1], threshold=0.3, simulate=True), {}
    with merger.attached(tiny), torch.no_grad():
        for name, layer in (("after", 0), ("entered", 1)):
            point = "resid_post" if name == "after" else "resid_pre"
            held[name] = []
            door.forward_pass(tiny, random_tokens(2, LENGTH), {door.point_name(point, layer): held[name].append})
        found = merger.pass_.assigned[1]
    states, changed = held["after"][0], held["entered"][0]
    assert found.joined.sum() > 5
    for b, p in found.joined.nonzero().tolist():
        assert torch.equal(changed[b, p], states[b, found.leader[b, p]])
    assert torch.equal(changed[~found.joined], states[~found.joined])
    told = merger.statistics()
    assert (told.bytes == told.full_bytes).all() and (told.rows == told.tokens).all() and (told.merged > 0).all()
    with pytest.raises(MergeError, match="saves no memory"), merging.streaming(merger, tiny, 1):
        pass


# ---- hooks -----------------------------------------------------------------------------------------------------------


def count_hooks(model) -> int:
    roots = [model, getattr(model, "original_model", None)]
    modules = {id(m): m for root in roots if root is not None for m in root.modules()}
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules.values())


@pytest.mark.parametrize("kind", ["leader", "residual"])
def test_hooks_are_gone_after_an_error(tiny, kind):
    merger, tokens = make_merger(tiny, kind), random_tokens(1, LENGTH)
    before, plain = count_hooks(tiny), tiny(tokens, return_type="logits")
    for context in (merger.attached(tiny), merging.streaming(merger, tiny, 1)):
        with pytest.raises(ZeroDivisionError), context:
            1 / (count_hooks(tiny) <= before)
        assert count_hooks(tiny) == before and merger.pass_ is None
    assert torch.equal(tiny(tokens, return_type="logits"), plain)


def test_the_users_own_hooks_stay(tiny):
    seen = []
    target = tiny.hook_dict["blocks.1.hook_resid_pre"]
    handle = getattr(target, "_target", target).register_forward_hook(lambda *_: seen.append(1))
    try:
        merged_logits(make_merger(tiny, "leader"), tiny, random_tokens(1, LENGTH))
        seen.clear()
        tiny(random_tokens(1, 5), return_type="logits")
        assert seen == [1]
    finally:
        handle.remove()


def test_attached_twice_is_refused(tiny):
    merger = make_merger(tiny, "leader")
    with merger.attached(tiny):
        for context in (merger.attached(tiny), merging.streaming(merger, tiny, 1)):
            with pytest.raises(MergeError, match="Leave its block first"), context:
                pass
        with pytest.raises(MergeError, match="Leave its block first"):
            merger.calibrate(tiny, random_tokens())
    with merger.attached(tiny):
        pass


def test_a_cache_inside_attached_is_refused(tiny):
    merger, tokens = make_merger(tiny, "leader"), random_tokens(1, 9)
    with pytest.raises(MergeError, match="key/value cache"), merger.attached(tiny):
        tiny.generate(
            tokens,
            max_new_tokens=2,
            do_sample=False,
            use_past_kv_cache=True,
            verbose=False,
            return_type="tokens",
            stop_at_eos=False,
        )


def test_another_model_and_wrong_shapes_are_refused(tiny, gpt2):
    merger, tokens = make_merger(tiny, "leader"), random_tokens(2, 9)
    with pytest.raises(MergeError, match="Make another merger"), merger.attached(gpt2):
        pass
    with pytest.raises(MergeError, match="layers below 3"):
        TokenMerger([3], threshold=0.5).prepare(tiny)
    with (
        pytest.raises(MergeError, match="expected valid of shape"),
        merger.attached(tiny, valid=torch.ones(2, 8, dtype=torch.bool)),
    ):
        door.forward_pass(tiny, tokens, {})
    scored = TokenMerger([0, 1], threshold=0.5, rule="score")
    for scores in (None, {0: torch.zeros(2, 9)}):
        with pytest.raises(MergeError, match="scores"), scored.attached(tiny, scores=scores):
            pass
    with pytest.raises(MergeError, match="of shape"), scored.attached(tiny, scores={0: torch.zeros(2, 8), 1: torch.zeros(2, 9)}):
        door.forward_pass(tiny, tokens, {})
    with pytest.raises(MergeError, match="only"), merger.attached(tiny, scores={0: torch.zeros(2, 9)}):
        pass


# ---- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adaptive", "projected", "residual", "preserved"])
def test_saved_and_loaded_it_computes_the_same(tiny, tmp_path, kind):
    merger, tokens = make_merger(tiny, kind), random_tokens(2, LENGTH)
    merger.facts["note"] = [1, "two"]
    merger.save(tmp_path)
    loaded = TokenMerger.load(tmp_path, tiny)
    assert torch.equal(merged_logits(loaded, tiny, tokens), merged_logits(merger, tiny, tokens))
    assert loaded.options == merger.options and loaded.facts == merger.facts and loaded.calibrated
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"} and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(MergeError, match="Load that model"):
        TokenMerger.load(tmp_path, make_bridge("llama", seed=5))


def test_an_interrupted_save_leaves_the_old_one(tiny, tmp_path, monkeypatch):
    merger, tokens, real = make_merger(tiny, "leader"), random_tokens(1, LENGTH), os.replace
    merger.save(tmp_path)
    old = merged_logits(merger, tiny, tokens)
    merger.weights.set_level(0, 0.9)
    for good in (0, 1):
        left = [good]

        def torn(*args, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError("no space left")
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", torn)
            with pytest.raises(StoreError, match="no space left"):
                merger.save(tmp_path)
        assert torch.equal(merged_logits(TokenMerger.load(tmp_path, tiny), tiny, tokens), old)
    merger.save(tmp_path)
    assert TokenMerger.load(tmp_path, tiny).levels[0] == merger.levels[0]
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]) == 1


def sealed_anew(path, text: str) -> None:
    """As if it had been written so: else its digest alone would tell."""
    path.write_bytes(records.seal(re.sub("(?<=sha256:)[0-9a-f]{64}", "0" * 64, text).encode()))


def rewritten(old: str, new: str):
    return lambda record: sealed_anew(record, record.read_text().replace(old, new))


def without(key: str):
    return lambda record: sealed_anew(record, json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != key}))


DAMAGES = {
    "no record": ("*.json", lambda path: path.unlink()), "no weights": ("*.safetensors", lambda path: path.unlink()),
    "cut weights": ("*.safetensors", lambda path: path.write_bytes(path.read_bytes()[:90])),
    "no JSON": ("*.json", lambda path: path.write_text("{")), "a list": ("*.json", lambda path: path.write_text("[]")),
    "newer": ("*.json", rewritten("merger 2", "merger 3")), "bad option": ("*.json", rewritten('"recent": 2', '"recent": -2')),
    "edited": ("*.json", lambda path: path.write_text(path.read_text().replace('"recent": 2', '"recent": 3'))),
    "other shape": ("*.json", rewritten('"projection": 6', '"projection": 5')),
    **{f"without {key}": ("*.json", without(key)) for key in ("base", "options", "files", "facts", "calibrated")},
}  # fmt: skip


@pytest.mark.parametrize(("which", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_refused(tiny, tmp_path, which, damage):
    make_merger(tiny, "projected").save(tmp_path)
    damage(next(tmp_path.glob(which)))
    with pytest.raises(StoreError, match="expected"):
        TokenMerger.load(tmp_path, tiny)


def test_saving_needs_a_model_and_a_folder(tiny, tmp_path):
    with pytest.raises(MergeError, match="prepare"):
        TokenMerger([0], threshold=0.5).save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Choose another"):
        make_merger(tiny, "leader").save(tmp_path / "file")


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["leader", "rows", "residual"])
def test_generation_equals_a_rollout_over_whole_sequences(tiny, kind):
    merger, prompts = make_merger(tiny, kind), random_tokens(2, 9)
    written, table = merging.generate(merger, tiny, prompts, 8)
    text = prompts
    for _ in range(8):
        text = torch.cat([text, merged_logits(merger, tiny, text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, text[:, 9:])
    each = [merging.generate(merger, tiny, prompts[i : i + 1], 8) for i in range(2)]
    assert torch.equal(written, torch.cat([e[0] for e in each]))
    assert (table["bytes"] == each[0][1]["bytes"] + each[1][1]["bytes"]).all() and (
        table.rows == each[0][1].rows + each[1][1].rows
    ).all()
    merger.forget()
    merged_logits(merger, tiny, text[:1, :16])
    assert each[0][1]["bytes"].tolist() == merger.statistics().bytes.tolist()
    assert (table.full_bytes == 2 * 16 * merger.weights.shape.row_bytes).all() and (table.full_rows == 32).all()


def test_layers_that_do_not_merge_keep_the_full_cache(tiny):
    merger = TokenMerger([1], threshold=0.5, rule="stride", recent=2)
    _, table = merging.generate(merger, tiny, random_tokens(1, 9), 4)
    assert table.rows[0] == table.rows[2] == 12 > table.rows[1]
    assert table["bytes"][0] == table.full_bytes[0] > table["bytes"][1]


def test_sampling_is_reproducible_and_bad_requests_are_refused(tiny):
    merger, prompts = make_merger(tiny, "leader"), random_tokens(2, 5)
    one, two, three = (merging.generate(merger, tiny, prompts, 6, temperature=1.0, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    for length, changes in ((60, {}), (0, {}), (3, {"temperature": -1.0}), (3, {"temperature": math.nan})):
        with pytest.raises(MergeError, match="expected"):
            merging.generate(merger, tiny, prompts, length, **changes)
    with merging.streaming(merger, tiny, 2) as stream, pytest.raises(MergeError, match="each of 2 sequences"):
        stream.step(prompts[:1, 0])


class Tokens:
    """As much of a tokenizer as says where a text ends."""

    def __init__(self, eos: int | None, **special: int) -> None:
        self.eos_token_id = eos
        self.added_tokens_decoder = {
            number: AddedToken({"endoftext": "<|endoftext|>"}.get(name, f"<{name}>"), special=name != "word")
            for name, number in special.items()
        }


def test_generation_stops_at_the_end_of_the_text_unless_told_to_go_on():
    model, prompts = make_bridge("llama"), random_tokens(2, 9)
    merger = make_merger(model, "leader")
    free, table = merging.generate(merger, model, prompts, 12)  # no tokenizer: nobody says where it ends
    ends = [int(row[4]) for row in free]
    first = [row.tolist().index(end) for row, end in zip(free, ends, strict=True)]
    assert free.shape == (2, 12) and max(first) < 11
    model.tokenizer = Tokens(ends[0], endoftext=ends[1])
    stopped, less = merging.generate(merger, model, prompts, 12)
    whole = [min(row.tolist().index(end) for end in ends if end in row) for row in free]
    assert stopped.shape[1] == max(whole) + 1
    for row, plain, last in zip(stopped, free, whole, strict=True):
        assert torch.equal(row[: last + 1], plain[: last + 1]) and set(row[last:].tolist()) == {int(plain[last])}
    assert (less.full_rows == 2 * (9 + max(whole))).all() and (less.rows <= less.full_rows).all() and (less.rows < table.rows).all()
    on, same = merging.generate(merger, model, prompts, 12, past_end=True)
    assert torch.equal(on, free) and same.equals(table)


def test_which_tokens_end_a_text(monkeypatch):
    model = make_bridge("llama")
    assert door.end_tokens(model) == frozenset()
    model.tokenizer = Tokens(None)
    assert door.end_tokens(model) == frozenset()
    model = make_bridge("llama")
    model.tokenizer = Tokens(7, endoftext=9, other=11, word=13)
    monkeypatch.setattr(model.original_model.config, "eos_token_id", 2)  # nobody chose it: a common token
    assert door.end_tokens(model) == {7, 9}
    monkeypatch.setattr(model.original_model.config, "eos_token_id", [11, 13])
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", 9)
    assert door.end_tokens(model) == {7, 9, 11}


def test_one_prompt_is_a_batch_of_one(tiny):
    merger, prompts = make_merger(tiny, "leader"), random_tokens(1, 9)
    for form in (prompts[0], prompts.int(), prompts[0].int()):
        assert torch.equal(merging.generate(merger, tiny, form, 5)[0], merging.generate(merger, tiny, prompts, 5)[0])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (torch.rand(1, 4), "LongTensor of token ids"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\)"),
        (torch.zeros(1, 0, dtype=torch.long), "one token or more"),
        (torch.tensor([[3, VOCAB]]), rf"ids in \[0, {VOCAB}\), got 3 to {VOCAB}"),
        (torch.tensor([[3, -1]]), "got -1 to 3"),
        ([[3, 4]], "got list"),
        ("text", "got str"),
    ],
    ids=["fractions", "three axes", "none", "beyond", "below", "list", "text"],
)
def test_prompts_that_are_none_are_refused(tiny, prompts, said):
    with pytest.raises(MergeError, match=said):
        cache.checked_prompts(tiny, prompts)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-12])
def test_a_tiny_temperature_takes_the_most_likely_token(tiny, temperature):
    merger, prompts = make_merger(tiny, "leader"), random_tokens(2, 6)
    greedy, drawn = (merging.generate(merger, tiny, prompts, 5, temperature=t)[0] for t in (0.0, temperature))
    assert torch.equal(greedy, drawn)


def test_logits_that_are_no_numbers_are_refused_and_no_token_is_made_of_them():
    draw = torch.Generator()
    for temperature in (0.0, 1.0):
        with pytest.raises(MergeError, match="NaN"):
            cache._next(torch.tensor([[0.0, math.nan]]), temperature, draw)


# ---- other models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["neox", "bloom"])
@pytest.mark.parametrize("kind", ["leader", "residual"])
def test_other_bridges(family, kind):
    model, tokens = door.in_dtype(make_bridge(family), torch.float64), random_tokens(2, LENGTH)
    merger = make_merger(model, kind)
    full = merged_logits(merger, model, tokens)
    assert merger.statistics().merged.sum() > 0
    assert (merged_logits(merger, model, tokens[:, :11]) - full[:, :11]).abs().max() < 1e-5
    with merging.streaming(merger, model, 2) as stream:
        steps = torch.stack([stream.step(tokens[:, place]) for place in range(LENGTH)], 1)
    assert (steps - full).abs().max() < 1e-5


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


# ---- options ---------------------------------------------------------------------------------------------------------

BAD = [
    {"layers": []}, {"layers": [0, 0]}, {"layers": [-1]},
    {"threshold": None}, {"target_rate": 0.3}, {"threshold": math.nan}, {"threshold": "high"}, {"threshold": 0.1, "floor": 0.2},
    {"threshold": None, "target_rate": 0}, {"threshold": None, "target_rate": 1}, {"threshold": None, "target_bytes": -0.5},
    {"rule": "best"}, {"representative": "median"}, {"residual": "full"}, {"preserve": "length"}, {"preserve_share": 0}, {"preserve_share": 1.5},
    {"recent": 0}, {"recent": 2.5}, {"recent": "2"}, {"floor": 1.0}, {"floor": -2}, {"temperature": 0}, {"temperature": math.nan},
    {"attention_weight": -0.1}, {"attention_weight": 1.1}, {"projection": 0}, {"projection": 2.5}, {"residual_width": 0}, {"seed": -1},
    {"contrastive_weight": 0.5}, {"contrastive_weight": -1, "projection": 4}, {"contrastive_weight": 1.0, "projection": 4, "rule": "random"},
    {"margin": 2}, {"margin": math.nan}, {"residual": "gated", "representative": "mean"}, {"residual": "gated", "drop": True},
    {"simulate": True, "drop": True}, {"simulate": True, "residual": "gated"}, {"simulate": True, "attention_weight": 0.5},
    {"simulate": True, "rule": "bipartite"}, {"simulate": True, "threshold": None, "target_bytes": 0.5}, {"rule": "all"}, {"rule": "key_norm"},
    {"adaptive": True, "rule": "random"}, {"attention_weight": 0.5, "rule": "adjacent"}, {"progressive": True, "rule": "score"}, {"nonsense": 1},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_options_are_refused(bad):
    options = {"layers": [0, 1], "threshold": 0.5} | bad
    with pytest.raises(MergeError, match=r"expected .*got"):
        TokenMerger(options.pop("layers"), **options)


# ---- documentation ---------------------------------------------------------------------------------------------------

DOCUMENTED = {
    "TokenMerger": (TokenMerger, ("Args:", "Raises:", "Source:", "Example:")), "attached": (TokenMerger.attached, ("Args:", "Raises:", "Example:")),
    "calibrate": (TokenMerger.calibrate, ("Args:", "Returns:", "Raises:", "Example:")), "save": (TokenMerger.save, ("Args:", "Returns:", "Raises:")),
    "load": (TokenMerger.load, ("Args:", "Returns:", "Raises:")), "streaming": (merging.streaming, ("Args:", "Returns:", "Raises:", "Example:")),
    "generate": (merging.generate, ("Args:", "Returns:", "Raises:", "Example:")), "Options": (merging.Options, ("Attributes:", "Raises:")),
}  # fmt: skip


@pytest.mark.parametrize(("thing", "parts"), DOCUMENTED.values(), ids=DOCUMENTED)
def test_docstrings_have_their_parts(thing, parts):
    text = inspect.getdoc(thing)
    assert all(part in text for part in parts)
    for name in set(inspect.signature(thing).parameters) - {"self", "cls"}:
        assert f"{name}:" in text, name


def test_a_descriptor_of_no_direction_has_no_likeness():
    rows = np.eye(3, 4, dtype=np.float16)[[0, 1, 0]]
    rows[1] = 0
    assert cosines(rows, rows)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{"target_rate": 0.3}, {"threshold": 0.3, "residual": "gated", "residual_width": 3}])
def test_calibrating_inside_inference_mode(options):
    """As training does: what it makes can be written to, saved and trained afterwards, and is the same."""
    model, tokens = make_bridge("llama"), random_tokens(4, LENGTH, seed=9)
    expected = TokenMerger([0, 1], recent=2, **options).calibrate(model, tokens)
    with torch.inference_mode():
        merger = TokenMerger([0, 1], recent=2, **options).calibrate(model, random_tokens(4, LENGTH, seed=9))
        assert torch.is_inference_mode_enabled()
    own = merger.weights.state_dict()
    assert not any(value.is_inference() for value in own.values())
    assert all(torch.equal(value, own[name]) for name, value in expected.weights.state_dict().items())
    merger.calibrate(model, tokens)
