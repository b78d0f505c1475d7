"""Attention over clusters and clusters themselves, against plain loops; gradients against finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basin_lens import model as door
from basin_lens.errors import MergeError
from basin_lens.merging import Clusters, TokenMerger, attention
from basin_lens.merging.assignment import assign
from basin_lens.merging.similarity import cosines
from tests.conftest import VOCAB, random_tokens
from tests.merging.mergers import KINDS, LENGTH, loss_of, make_merger, merged_logits

# -- independent references ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.many
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


@pytest.mark.many
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


@pytest.mark.many
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


# -- gradients -------------------------------------------------------------------------------------------------------------------------


GRADED = {
    "leader": ("leader", ["raw"]), "mean": ("mean", ["raw"]), "dropped": ("dropped", ["raw"]), "adjacent": ("adjacent", ["raw"]),
    "rows": ("rows", ["raw"]), "adaptive": ("adaptive", ["raw", "slope"]), "projected": ("projected", ["raw", "head"]),
    "residual": ("residual", ["raw", "gate", "down", "up"]),
}  # fmt: skip


@pytest.mark.many
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


@pytest.mark.many
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


# -- documentation ---------------------------------------------------------------------------------------------------------------------


def test_a_descriptor_of_no_direction_has_no_likeness():
    rows = np.eye(3, 4, dtype=np.float16)[[0, 1, 0]]
    rows[1] = 0
    assert cosines(rows, rows)[1].tolist() == [0, 0, 0]
