"""Measures of importance: passes and memory, any state of the model, erasure."""

import dataclasses
import gc
import math

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import Column, TokenAnalyzer
from basin_lens.capture import Passes, passes
from basin_lens.errors import ModelError
from tests.analyzers.passes import A, counting, measured, near, one
from tests.conftest import (
    TEXTS,
    hooked_lane,
    make_bridge,
    make_hf,
    make_hooked,
    make_tokenizer,
    random_tokens,
)
from tests.families import families

# What one forward and one backward pass give.
SHARED = [
    A.AttentionReceived(),
    A.AttentionReceived(sink=False),
    A.AttentionRollout(),
    A.ValueWeightedAttention(),
    A.GradientNorm(),
    A.GradientTimesActivation(),
]


OWN = [A.IntegratedGradients(steps=8), A.Erasure(positions=5)]


OTHER_TARGETS = [A.GradientNorm(target="last_logit"), A.GradientTimesActivation(target="last_logit"), A.GradientNorm(target=17)]


# -- passes and memory -----------------------------------------------------------------------------------------------------------------


def test_one_forward_and_one_backward_pass_serve_all(llama, monkeypatch):
    with counting(monkeypatch) as (forward, backward):
        _, capture = measured(llama, TEXTS, *SHARED, A.Surprisal(), A.StateNorm())
    assert len(forward) == len(backward) == 1
    assert capture.columns.keys() == {a.key for a in [*SHARED, A.Surprisal(), A.StateNorm()]}


@pytest.mark.slow(everywhere=True)
def test_compression_scores_beside_them_cost_no_other_pass(llama, monkeypatch):
    """The scores' own passes (probe and check) are the same with and without the importance analyzers."""
    scores = [A.Compression(k=5), A.Contraction(k=5)]
    with counting(monkeypatch) as (alone, none):
        bl.analyze(llama, TEXTS, scores, progress=False)
    with counting(monkeypatch) as (together, backward):
        bl.analyze(llama, TEXTS, [*scores, *SHARED], progress=False)
    assert together == alone
    assert (len(none), len(backward)) == (0, 1)


def test_each_different_target_costs_a_backward_pass(llama, monkeypatch):
    with counting(monkeypatch) as (forward, backward):
        together, _ = measured(llama, TEXTS, *SHARED, *OTHER_TARGETS)
    assert (len(forward), len(backward)) == (1, 3)
    for analyzer in (SHARED[-2], *OTHER_TARGETS):
        alone, _ = measured(llama, TEXTS, analyzer)
        for name, values in alone.items():
            assert together[name] == near(values)


@pytest.mark.usefixtures("as_is")
def test_own_passes_are_counted(llama, monkeypatch):
    tokens = random_tokens(2, 12)
    with counting(monkeypatch) as (forward, backward):
        measured(llama, tokens, A.IntegratedGradients(steps=8))
    # The capture, the states, both ends, and the steps.
    assert (len(forward), len(backward)) == (1 + 1 + 2 + 8, 2 + 8)
    with counting(monkeypatch) as (forward, backward):
        measured(llama, tokens, A.Erasure(positions=3))
    # The capture, the proof on one copy, whole and from its column on, and all six from the first column on.
    (capture, whole, proof, all_six), first = forward, 12 - forward[-1][1]
    assert (capture, whole, proof, all_six) == ((2, 12), (1, 12), (1, 12 - first), (6, 12 - first))
    assert 1 <= first < 10
    assert not backward


@pytest.mark.usefixtures("as_is")
def test_passes_of_its_own_stay_small(llama, monkeypatch):
    whole, _ = measured(llama, TEXTS[:2], *OWN)
    monkeypatch.setattr(passes, "TOKENS_PER_PASS", 40)
    with counting(monkeypatch) as (forward, _):
        small, _ = measured(llama, TEXTS[:2], *OWN, batch_size=2)
    large = [(batch, length) for batch, length in forward if batch > 1 and batch * length > 40]
    assert len(large) == 2  # the capture, and the states that integrated gradients begin with
    assert max(batch for batch, _ in large) == 2
    for name, values in whole.items():
        assert small[name] == near(values, rel=1e-3)


@pytest.mark.many
@pytest.mark.parametrize("gradients", [False, True])
def test_attention_patterns_are_dropped_layer_by_layer(llama, gradients):
    """When a layer closes, no pattern of an earlier one is held; with gradients, only the one that the graph itself needs."""
    tokens = random_tokens(3, 23)
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watch(TokenAnalyzer):
        needs = frozenset({"pattern"})

        @property
        def columns(self):
            return (Column("watch", "count"),)

        def measure(self, batch):
            gc.collect()
            seen.append(sum(1 for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.shape == (3, 4, 23, 23)))
            return {"watch": torch.zeros(batch.tokens.shape)}

    attention = [a for a in SHARED if "pattern" in a.needs]
    measured(llama, tokens, *attention, Watch(), *([A.GradientNorm()] if gradients else []))
    assert [n - seen[0] for n in seen] == ([0, 1, 2] if gradients else [0, 0, 0])


@pytest.mark.many
@pytest.mark.usefixtures("as_is")
@pytest.mark.parametrize("analyzer", [*SHARED, *OWN, *OTHER_TARGETS], ids=lambda a: a.key)
def test_padding_and_batching_change_nothing(llama, analyzer):
    texts = ["a short one", *TEXTS[:3]]
    whole, _ = measured(llama, texts, analyzer)
    for size in (1, 3):
        parts, _ = measured(llama, texts, analyzer, batch_size=size)
        for name, values in whole.items():
            assert np.isfinite(values).any()
            assert parts[name] == near(values, rel=1e-3, abs=1e-4)


def make(kind):
    return make_bridge("gpt2") if kind == "bridge" else make_hooked()


KINDS = ["bridge", pytest.param("hooked", marks=hooked_lane)]


@pytest.mark.many
@pytest.mark.usefixtures("as_is")
@pytest.mark.parametrize("state", ["frozen", "no gradients", "inference mode", "train mode", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_state_of_the_model(kind, state):
    chosen = [*SHARED, *OTHER_TARGETS, *OWN]
    expected, _ = measured(make(kind), random_tokens(2, 10), *chosen)
    model = make(kind)
    if state == "frozen":
        model.requires_grad_(False)
    if state == "train mode":
        model.train()
    if state == "sdpa" and kind == "bridge":
        model.original_model.set_attn_implementation("sdpa")
    modes = {"no gradients": torch.no_grad, "inference mode": torch.inference_mode}
    with modes.get(state, torch.enable_grad)():
        got, _ = measured(model, random_tokens(2, 10), *chosen)
    for name, values in expected.items():
        assert got[name] == near(values, rel=1e-3), name
    assert all(p.grad is None for p in model.parameters())
    assert {p.requires_grad for p in model.parameters()} == {state != "frozen"}
    assert model.training is (state == "train mode")


@hooked_lane
@pytest.mark.usefixtures("as_is")
def test_hooked_transformer_equals_bridge_on_the_same_weights(tmp_path):
    """Grouped-query attention, two implementations."""
    tokenizer = make_tokenizer()
    make_hf("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chosen = [
        *SHARED,
        *OTHER_TARGETS,
        *OWN,
        A.AttentionReceived(per_head=4, name="by"),
        A.ValueWeightedAttention(per_head=4, name="by"),
        A.AttentionRollout(per_head=4, name="by"),
    ]
    both = [measured(bl.load_model(tmp_path, kind=kind), TEXTS, *chosen)[0] for kind in ("bridge", "hooked")]
    for name, values in both[0].items():
        assert np.isfinite(values).any()
        assert both[1][name] == near(values, rel=2e-3, abs=2e-3), name


# -- erasure ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("family", [f for f in families() if f.name not in ("Mamba", "T5")], ids=lambda f: f"{f.kind} {f.name}")
def test_nothing_of_an_erased_token_reaches_later_ones(family):
    """Of every family: with the token knocked out, the later losses do not depend on which token it was; earlier ones stay."""
    model, tokens = family.make(), random_tokens(3, 12)
    columns = torch.tensor([2, 5, 7])
    other = tokens.clone()
    other[range(3), columns] = (other[range(3), columns] + 50) % 200 + 2
    rows, valid = torch.arange(3), torch.ones_like(tokens, dtype=torch.bool)
    losses, others = (Passes(model, t, valid).losses_without(rows, columns) for t in (tokens, other))
    with torch.no_grad():
        plain = passes.token_losses(model(tokens, return_type="logits"), tokens)
    for row, column in enumerate(columns.tolist()):
        assert losses[row, column + 2 :].numpy() == near(others[row, column + 2 :].numpy(), abs=1e-4)
        assert losses[row, 1 : column + 2].numpy() == near(plain[row, : column + 1].numpy(), abs=1e-4)
        assert float((losses[row, column + 2 :] - plain[row, column + 1 :]).abs().max()) > 1e-3


@pytest.mark.many
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_erasure_with_the_models_own_mask(name):
    """Hugging Face's model given a 4-D mask; every position."""
    model, tokens = make_bridge(name), random_tokens(2, 10)
    values, _ = one(model, tokens, A.Erasure(positions=None))
    plain = make_hf(name)

    def losses(ids, mask):
        with torch.no_grad():
            logits = plain(ids[None], attention_mask=mask[None, None]).logits[0]
        return -logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    causal = torch.full((10, 10), torch.finfo(torch.float32).min).triu(1)
    for seq in range(2):
        for column in range(10):
            got = values[0].reshape(2, 10)[seq, column]
            if column == 0 or column > 7:
                assert math.isnan(got)
                continue
            mask = causal.clone()
            mask[column + 1 :, column] = torch.finfo(torch.float32).min
            rise = (losses(tokens[seq], mask) - losses(tokens[seq], causal))[column + 1 :]
            assert got == near(float(rise.mean()), abs=1e-4)


def test_erased_positions_are_a_seeded_draw(llama):
    texts = [*TEXTS[:3], "a"]
    values, capture = one(llama, texts, A.Erasure())
    drawn = np.isfinite(values[0])
    for seq, length in enumerate(capture.lengths.tolist()):
        rows = capture.row_seq.numpy() == seq
        assert drawn[rows].sum() == min(16, max(0, length - 3))
        assert not drawn[rows][[0, *range(max(0, length - 2), length)]].any()
    again, _ = one(llama, texts[::-1], A.Erasure())
    mine, theirs = values[0][capture.row_seq.numpy() == 0], again[0][-int(capture.lengths[0]) :]
    assert mine == near(theirs, abs=1e-4)
    other, _ = one(llama, texts, A.Erasure(seed=1))
    assert not np.array_equal(np.isfinite(other[0]), drawn)


def test_a_model_whose_attention_cannot_be_masked_is_refused():
    model, tokens = make_bridge("llama"), random_tokens(2, 8)
    layer = model.original_model.model.layers[1]
    handle = layer.register_forward_pre_hook(lambda _m, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True)
    hooks = len(layer._forward_pre_hooks)
    with pytest.raises(ModelError, match="block 1 to get a 4-D attention mask"):
        measured(model, tokens, A.Erasure())
    assert len(layer._forward_pre_hooks) == hooks
    handle.remove()
    measured(model, tokens, A.Erasure())


def test_attention_that_does_not_obey_its_mask_is_refused():
    model, tokens = make_bridge("llama"), random_tokens(2, 8)
    causal = torch.full((1, 1, 8, 8), torch.finfo(torch.float32).min).triu(1)
    attention = model.original_model.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda _m, args, kwargs: (args, kwargs | {"attention_mask": causal}), with_kwargs=True)
    with pytest.raises(ModelError, match="block 1 to obey its attention mask"):
        measured(model, tokens, A.Erasure())
