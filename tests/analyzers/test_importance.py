"""Token importance: known answers, independent recomputation, Captum on the same model, and what it costs in passes and memory."""

import dataclasses
import gc
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.analyzers import Column, TokenAnalyzer, integrated_gradients
from basin_lens.capture import Passes, fill_columns, passes
from basin_lens.errors import CaptureError, ModelError
from tests.conftest import (
    TEXTS,
    TINY,
    hooked_lane,
    make_bridge,
    make_hf,
    make_hooked,
    make_tokenizer,
    random_tokens,
    replace_in_all_rooms,
)
from tests.families import families

A = bl.analyzers
LAYERS = range(3)
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


def near(x, **kwargs):
    return pytest.approx(x, **({"rel": 1e-4, "abs": 1e-5, "nan_ok": True} | kwargs))


def measured(model, data, *analyzers, **options):
    """Values by column, `[n_layers or 1, rows]`, and the capture."""
    capture = bl.Capture.from_texts(model, data, analyzers=list(analyzers), progress=False, **options)
    return {name: v.numpy() for a in analyzers for name, v in capture.columns[a.key].items()}, capture


def one(model, data, analyzer, **options):
    values, capture = measured(model, data, analyzer, **options)
    return values[analyzer.columns[0].name], capture


def cached(model, tokens, point, layer):
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.as_tensor(tokens)[None])
    return cache[f"blocks.{layer}.{point}"][0].double()


@contextmanager
def counting(monkeypatch):
    """Forward passes as their batch shapes, and backward passes."""
    forward, backward = [], []
    run, slope = door.forward_pass, torch.autograd.grad

    def counted_run(model, tokens, *rest, **options):
        forward.append(tuple(tokens.shape))
        return run(model, tokens, *rest, **options)

    def counted_slope(*given, **options):
        backward.append(1)
        return slope(*given, **options)

    with monkeypatch.context() as patch:
        replace_in_all_rooms(patch, "forward_pass", counted_run)
        patch.setattr(torch.autograd, "grad", counted_slope)
        yield forward, backward


@pytest.fixture
def as_is(monkeypatch):
    """Integrated gradients are taken as they come after the first steps, complete or not: tiny wild models need hundreds."""
    monkeypatch.setattr(integrated_gradients, "COMPLETE", math.inf)


# -- passes and memory ----------------------------------------------------------------------------------------------------------


def test_one_forward_and_one_backward_pass_serve_all(llama, monkeypatch):
    with counting(monkeypatch) as (forward, backward):
        _, capture = measured(llama, TEXTS, *SHARED, A.Surprisal(), A.StateNorm())
    assert len(forward) == len(backward) == 1
    assert capture.columns.keys() == {a.key for a in [*SHARED, A.Surprisal(), A.StateNorm()]}


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
    assert (forward, backward) == ([(2, 12), (6, 12)], [])


@pytest.mark.usefixtures("as_is")
def test_passes_of_its_own_stay_small(llama, monkeypatch):
    whole, _ = measured(llama, TEXTS[:2], *OWN)
    monkeypatch.setattr(passes, "TOKENS_PER_PASS", 40)
    with counting(monkeypatch) as (forward, _):
        small, _ = measured(llama, TEXTS[:2], *OWN, batch_size=2)
    assert [batch for batch, _ in forward].count(2) == 2  # the capture, and the states that integrated gradients begin with
    assert max(batch for batch, _ in forward) == 2
    for name, values in whole.items():
        assert small[name] == near(values, rel=1e-3)


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


# -- attention ------------------------------------------------------------------------------------------------------------------


def loop_received(patterns, *, sink):
    """The formula, one number at a time, `[query, key]` -> `[key]`."""
    count = len(patterns)
    answer = np.full(count, np.nan)
    for i in range(0 if sink else 1, count - 5):
        answer[i] = sum(float(patterns[t, i]) for t in range(i + 1, count)) / sum(
            1 / (t + 1) if sink else 1 / t for t in range(i + 1, count)
        )
    return answer


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_rollout_is_the_matrix_product(name, sink):
    model, tokens = make_bridge(name), random_tokens(3, 13)
    analyzer = A.AttentionRollout(sink=sink)
    values, _ = one(model, tokens, analyzer, batch_size=2)
    for seq, ids in enumerate(tokens.tolist()):
        rolled = np.eye(13)
        for layer in LAYERS:
            attention = cached(model, ids, "attn.hook_pattern", layer).mean(0).numpy()
            if not sink:
                attention[:, 0] = 0
                attention[0, 0] = 1  # position 0 has only itself
                attention /= attention.sum(1, keepdims=True)
            rolled = (attention + np.eye(13)) / 2 @ rolled
            assert values[layer].reshape(3, 13)[seq] == near(loop_received(rolled, sink=sink))


@pytest.mark.parametrize("sink", [True, False])
def test_rollout_by_head_takes_the_last_step_alone(sink):
    model, tokens = make_bridge("llama"), random_tokens(2, 13)
    values, _ = measured(model, tokens, A.AttentionRollout(per_head=4, sink=sink))
    column = "attention_rollout" + ("" if sink else "_without_sink")
    for seq, ids in enumerate(tokens.tolist()):
        below = np.eye(13)
        for layer in LAYERS:
            pattern = cached(model, ids, "attn.hook_pattern", layer).numpy()
            steps = []
            for attention in (*pattern, pattern.mean(0)):
                held = attention.copy()
                if not sink:
                    held[:, 0] = 0
                    held[0, 0] = 1
                    held /= held.sum(1, keepdims=True)
                steps.append((held + np.eye(13)) / 2 @ below)
            got = [values[f"{column}_head{head}"][layer].reshape(2, 13)[seq] for head in range(4)]
            for head in range(4):
                assert got[head] == near(loop_received(steps[head], sink=sink))
            whole = values[column][layer].reshape(2, 13)[seq]
            assert whole == near(loop_received(steps[-1], sink=sink))
            if sink:
                assert np.mean(got, 0) == near(whole)
            below = steps[-1]


def test_rollout_at_some_layers_reads_all_below(llama):
    whole, _ = one(llama, TEXTS, A.AttentionRollout())
    some, capture = one(llama, TEXTS, A.AttentionRollout(), layers=[1])
    assert some[1] == near(whole[1])
    assert np.isnan(some[[0, 2]]).all()
    assert capture.layers == (1,)
    assert fill_columns(llama, capture, [A.AttentionRollout()], progress=False) == []


def test_rollout_needs_no_pass_if_the_cache_has_all_patterns(monkeypatch):
    model, tokens = make_bridge("llama"), random_tokens(3, 12)
    expected, _ = one(model, tokens, A.AttentionRollout())
    _, cache = model.run_with_cache(tokens)
    for lowest, passes_ in ((0, 0), (1, 1)):
        kept = {name: value for name, value in cache.items() if lowest == 0 or not name.startswith("blocks.0.")}
        capture = bl.Capture.from_cache(model, tokens, kept)
        with counting(monkeypatch) as (forward, _):
            fill_columns(model, capture, [A.AttentionRollout()], progress=False)
        assert len(forward) == passes_
        got = capture.columns[A.AttentionRollout().key]["attention_rollout"].numpy()
        assert got[list(capture.layers)] == near(expected[list(capture.layers)])


def test_uniform_attention_rolls_out_by_hand():
    """One layer: half a token's own, half uniform over those before: every token gets half of uniform attention."""
    uniform = (torch.ones(12, 12).tril() / torch.arange(1, 13)[:, None]).expand(1, 2, -1, -1)
    valid = torch.ones(1, 12, dtype=torch.bool)
    batch = A.TokenBatch(0, 1, torch.zeros(1, 12, dtype=torch.int64), valid, {"pattern": uniform}, {})
    (got,) = A.AttentionRollout().measure(batch).values()
    assert got[0, :7].numpy() == near(np.full(7, 0.5))


def hf_output_weight(model, name, layer):
    """W_O of a Hugging Face model, `[in, out]`, and its bias, by its own attribute names."""
    inner = model.original_model
    linear = {
        "llama": lambda: inner.model.layers[layer].self_attn.o_proj,
        "gemma2": lambda: inner.model.layers[layer].self_attn.o_proj,
        "neox": lambda: inner.gpt_neox.layers[layer].attention.dense,
        "bloom": lambda: inner.transformer.h[layer].self_attention.dense,
        "gpt2": lambda: inner.transformer.h[layer].attn.c_proj,
    }[name]()
    linear = getattr(linear, "original_component", linear)
    return (linear.weight if name == "gpt2" else linear.weight.T).detach().double().numpy()


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_value_weighted_attention_by_a_loop(name, sink):
    model, tokens = make_bridge(name), random_tokens(2, 11)
    values, _ = measured(model, tokens, A.ValueWeightedAttention(per_head=4, sink=sink))
    ending = "" if sink else "_without_sink"
    for layer in (0, 2):
        weight = hf_output_weight(model, name, layer).reshape(4, 8, 32)
        for seq, ids in enumerate(tokens.tolist()):
            pattern = cached(model, ids, "attn.hook_pattern", layer).numpy()
            value = cached(model, ids, "attn.hook_v", layer).numpy().reshape(11, -1, 8)
            shared = 4 // value.shape[1]
            assert shared == (2 if name in ("llama", "gemma2") else 1)
            total = 0
            for head in range(4):
                if not sink:
                    pattern[head, :, 0] = 0
                    pattern[head] /= np.maximum(pattern[head].sum(1, keepdims=True), 1e-30)
                carried = np.linalg.norm(pattern[head][:, :, None] * (value[:, head // shared] @ weight[head])[None], axis=-1)
                expected = loop_received(carried, sink=sink)
                got = values[f"value_weighted_attention{ending}_head{head}"][layer].reshape(2, 11)[seq]
                assert got == near(expected, rel=1e-3)
                total = total + expected
            assert values[f"value_weighted_attention{ending}"][layer].reshape(2, 11)[seq] == near(total, rel=1e-3)


@pytest.mark.parametrize("family", [f for f in families() if f.name not in ("Mamba", "T5")], ids=lambda f: f"{f.kind} {f.name}")
def test_carried_values_add_up_to_the_attention_output(family):
    """Of every family: sum over keys and heads of a v W_O, plus the bias, is what the output projection gives."""
    model, tokens = family.make(), random_tokens(1, 9)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    projected = "hook_attn_out" if family.kind == "hooked" else "attn.o.hook_out"
    for layer in (0, 1):
        weight = door.output_weight(model, layer)
        values = cache[f"blocks.{layer}.attn.hook_v"].flatten(2).unflatten(2, (-1, weight.shape[1]))
        values = values.repeat_interleave(len(weight) // values.shape[2], dim=2)
        output = torch.einsum("bhqk,bkhd,hde->bqe", cache[f"blocks.{layer}.attn.hook_pattern"], values, weight)
        rest = cache[f"blocks.{layer}.{projected}"] - output
        scale = float(output.square().mean().sqrt())
        assert scale > 0.01
        assert float((rest - rest[:, :1]).abs().max()) < 1e-4 * max(1, scale)  # the same for every token: a bias


def test_mean_of_heads():
    model, tokens = make_bridge("llama"), random_tokens(3, 12)
    values, _ = measured(model, tokens, A.AttentionReceived(per_head=4))
    heads = np.stack([values[f"attention_received_head{h}"] for h in range(4)])
    assert heads.std(0)[:, 0].max() > 0.01
    assert values["attention_received"] == near(heads.mean(0))
    some, _ = measured(model, tokens, A.AttentionReceived(per_head=(3, 1), name="mine"))
    assert list(some) == ["mine_attention_received", "mine_attention_received_head3", "mine_attention_received_head1"]
    assert some["mine_attention_received_head3"] == near(heads[3])
    table = bl.analyze(model, tokens, [A.ValueWeightedAttention(per_head=4)], progress=False)
    assert table.value_weighted_attention_head2.notna().any()


@pytest.mark.parametrize("analyzer", [A.AttentionReceived, A.AttentionRollout, A.ValueWeightedAttention])
@pytest.mark.parametrize("wrong", [3, 9, (0, 4), True, (), (1, 1), (-1,), -2])
def test_wrong_heads_are_refused(llama, analyzer, wrong):
    with pytest.raises(CaptureError, match="per_head"):
        bl.analyze(llama, TEXTS, [analyzer(per_head=wrong)], progress=False)


def test_a_block_without_output_projection_is_refused(monkeypatch):
    model = make_bridge("llama")
    monkeypatch.setattr(model.cfg, "n_heads", 5)
    with pytest.raises(ModelError, match="output projection"):
        door.output_weight(model, 0)


# -- gradients ------------------------------------------------------------------------------------------------------------------


def target_after(model, tokens, layer, states, target):
    """The target with `states` before a block, through public hooks alone."""
    given = states.reshape(-1, *states.shape[-2:])

    def put(_, hook):  # noqa: ARG001
        return given

    batch = tokens.expand(len(given), -1)
    logits = model.run_with_hooks(batch, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", put)], return_type="logits")
    if target == "future_loss":
        return -logits[:, :-1].log_softmax(-1).gather(2, batch[:, 1:, None]).sum((1, 2))
    return logits[:, -1].amax(-1) if target == "last_logit" else logits[:, -1, target]


TARGETS = ["future_loss", "last_logit", 17]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_slopes(name, target):
    """Central differences in every direction, and along the state (norms inside a Llama compute in float32: no tiny steps)."""
    model, tokens = make_bridge(name).double(), random_tokens(2, 8)
    values, capture = measured(
        model, tokens, A.GradientNorm(target=target, name="n"), A.GradientTimesActivation(target=target, name="x")
    )
    norm, scaled, product = list(values)
    for layer in LAYERS:
        states = capture.resid_pre(layer).double().view(2, 8, 32)
        for seq, pos in ((0, 0), (0, 3), (1, 6)):
            moved = states[seq].expand(65, -1, -1).clone()
            moved[:32, pos] += 3e-3 * torch.eye(32)
            moved[32:64, pos] -= 3e-3 * torch.eye(32)
            with torch.no_grad():
                found = target_after(model, tokens[seq], layer, moved, target)
            slope = ((found[:32] - found[32:64]) / 6e-3).numpy()
            row = capture.row_of(seq, pos)
            size = float(states[seq, pos].norm())
            assert values[norm][layer, row] == near(np.linalg.norm(slope), rel=5e-3)
            assert values[scaled][layer, row] == near(np.linalg.norm(slope) * size, rel=5e-3)
            assert values[product][layer, row] == near(
                slope @ states[seq, pos].numpy(), rel=5e-3, abs=2e-3 * np.linalg.norm(slope) * size
            )
        last = np.isnan(values[norm][layer].reshape(2, 8)[:, -1])
        assert last.all() == last.any() == (target == "future_loss")


def test_targets_name_their_columns_and_units():
    assert [c.name for c in A.GradientNorm(target="last_logit").columns] == [
        "gradient_norm_last_logit",
        "gradient_norm_scaled_last_logit",
    ]
    assert A.GradientTimesActivation(target=7).columns[0] == Column("gradient_times_activation_logit_7", "logits")
    assert A.IntegratedGradients(target=7).columns[0].name == "integrated_gradients_logit_7"
    assert A.GradientNorm(target="cache").columns == A.GradientNorm().columns


@pytest.mark.parametrize("analyzer", [A.GradientNorm, A.GradientTimesActivation, A.IntegratedGradients])
def test_a_token_that_the_model_does_not_have(llama, monkeypatch, analyzer):
    with counting(monkeypatch) as (forward, _), pytest.raises(CaptureError, match="token id below"):
        measured(llama, TEXTS, analyzer(target=100_000))
    assert forward == []


@pytest.mark.parametrize(
    "analyzer",
    [
        A.GradientNorm(target=True),
        A.GradientNorm(target="loss"),
        A.GradientTimesActivation(target=-1),
        A.IntegratedGradients(target="cache"),
        A.IntegratedGradients(steps=1),
        A.IntegratedGradients(layer=-1),
        A.Erasure(positions=0),
    ],
    ids=lambda a: a.key,
)
def test_wrong_options_are_refused(llama, monkeypatch, analyzer):
    with counting(monkeypatch) as (forward, _), pytest.raises(CaptureError, match="expected"):
        bl.analyze(llama, TEXTS, [analyzer], progress=False)
    assert forward == []


def test_gradients_of_a_cache_cannot_come_from_a_pass(llama, monkeypatch):
    """Not even in the pass that makes the capture."""
    with counting(monkeypatch) as (forward, _), pytest.raises(CaptureError, match="incl_bwd=True"):
        measured(llama, TEXTS, A.GradientNorm(target="cache"))
    assert forward == []


def test_gradients_without_a_target_are_refused(llama):
    with pytest.raises(CaptureError, match="target"):
        measured(llama, TEXTS, dataclasses.replace(A.GradientNorm(), target="future_loss", name="x"), NoTarget())


class NoTarget(A.StateNorm):
    needs = frozenset({"gradient"})


# -- Captum ---------------------------------------------------------------------------------------------------------------------


def captum_forward(model, tokens, layer, target):
    """Captum calls it with the two sequences in turn; `target` may be one for each."""
    each = target if isinstance(target, list) else [target] * 2
    return lambda states: torch.cat([target_after(model, tokens[i % 2], layer, s[None], each[i % 2]) for i, s in enumerate(states)])


@pytest.mark.slow
@pytest.mark.usefixtures("as_is")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_captum_agrees(name, target):
    from captum.attr import InputXGradient, IntegratedGradients, Saliency

    model, tokens = make_bridge(name), random_tokens(2, 9)
    values, capture = measured(
        model,
        tokens,
        A.GradientNorm(target=target, name="n"),
        A.GradientTimesActivation(target=target, name="x"),
        A.IntegratedGradients(target=target, layer=None, steps=12, name="i"),
    )
    norm, _, product, integral = list(values)
    for layer in LAYERS:
        states = capture.resid_pre(layer).view(2, 9, 32).requires_grad_()
        forward = captum_forward(model, tokens, layer, target)
        last = slice(0, 8 if target == "future_loss" else 9)
        slope = Saliency(forward).attribute(states, abs=False).detach()
        assert values[norm][layer].reshape(2, 9)[:, last] == near(slope.norm(dim=-1)[:, last].numpy(), rel=1e-3)
        times = InputXGradient(forward).attribute(states).detach().sum(-1)
        assert values[product][layer].reshape(2, 9)[:, last] == near(times[:, last].numpy(), rel=1e-3, abs=1e-3)
        if target == "last_logit":  # the token that is predicted at the states themselves, all along the way
            best = model(tokens, return_type="logits")[:, -1].argmax(-1)
            forward = captum_forward(model, tokens, layer, best.tolist())
        start = states.detach()[:, 1:].mean(1, keepdim=True).repeat(1, 9, 1)
        start[:, 0] = states.detach()[:, 0]
        share = IntegratedGradients(forward).attribute(
            states, baselines=start, n_steps=12, method="gausslegendre", internal_batch_size=2
        )
        expected = share.detach().sum(-1)[:, last][:, 1:].numpy()
        assert values[integral][layer].reshape(2, 9)[:, last][:, 1:] == near(expected, rel=2e-3, abs=2e-3)


# -- integrated gradients ---------------------------------------------------------------------------------------------------------


def completeness(model, tokens, capture, values, baseline, layer, target):
    """Values of the tokens that moved beside the change of the target, by sequence."""
    states = capture.resid_pre(layer).view(*tokens.shape, 32)
    start = torch.zeros_like(states)
    if baseline == "mean":  # position 0 stays
        start = torch.cat([states[:, :1], states[:, 1:].mean(1, keepdim=True).expand(-1, tokens.shape[1] - 1, -1)], 1)
        assert np.isnan(values[0].reshape(tokens.shape)[:, 0]).all()
    for seq, shares in enumerate(values[0].reshape(tokens.shape)):
        with torch.no_grad():
            both = torch.stack([states[seq], start[seq]])
            best = int(model(tokens[[seq]], return_type="logits")[0, -1].argmax())
            end, begin = target_after(model, tokens[seq], layer, both, best if target == "last_logit" else target).tolist()
        yield shares[int(baseline == "mean") : -1 if target == "future_loss" else None], end - begin


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_integrated_gradients_are_complete(name, layer, target):
    model, tokens = make_bridge(name), random_tokens(2, 10)
    values, capture = one(model, tokens, A.IntegratedGradients(target=target, layer=layer))
    assert values.shape == (1, 20)
    for shares, change in completeness(model, tokens, capture, values, "mean", layer, target):
        assert shares.sum() == pytest.approx(change, rel=0.0101)
        assert shares.std() > 0


def test_from_zero_values_are_complete_or_missing():
    """Close to zero, norms turn any state into a full-sized one: whole sequences may not be integrable."""
    model, tokens = make_bridge("llama", rms_norm_eps=1.0), random_tokens(2, 10)
    values, capture = one(model, tokens, A.IntegratedGradients(baseline="zero"))
    for shares, change in completeness(model, tokens, capture, values, "zero", 0, "future_loss"):
        assert shares.sum() == pytest.approx(change, rel=0.0101)
    sharp, _ = one(make_bridge("llama"), tokens, A.IntegratedGradients(baseline="zero", steps=2))
    assert np.isnan(sharp).all()


def test_incomplete_values_are_nan_after_more_steps(llama, monkeypatch):
    tokens = random_tokens(2, 12)
    monkeypatch.setattr(integrated_gradients, "COMPLETE", 0.0)
    with counting(monkeypatch) as (forward, _):
        values, _ = one(llama, tokens, A.IntegratedGradients(steps=4))
    assert np.isnan(values).all()
    assert len(forward) == 4 + 4 + 8 + 16 + 32


@pytest.mark.usefixtures("as_is")
def test_values_at_one_layer_hold_for_every_layer(llama):
    analyzer = A.IntegratedGradients(steps=8)
    table = bl.analyze(llama, TEXTS[:2], [analyzer, A.StateNorm()], layers=[1, 2], progress=False)
    by_layer = table.pivot(index=["seq", "pos"], columns="layer", values="integrated_gradients").to_numpy()
    assert by_layer[:, 0] == near(by_layer[:, 1])
    assert np.isfinite(by_layer).any()
    each = bl.analyze(llama, TEXTS[:2], [A.IntegratedGradients(steps=8, layer=None)], layers=[0, 2], progress=False)
    first = each[each.layer == 0].integrated_gradients.to_numpy()
    assert first == near(by_layer[:, 0])
    assert not np.allclose(each[each.layer == 2].integrated_gradients, first, equal_nan=True)


def test_a_layer_that_is_not_there(llama):
    with pytest.raises(CaptureError, match="layer below 3"):
        measured(llama, TEXTS[:1], A.IntegratedGradients(layer=3))


# -- erasure --------------------------------------------------------------------------------------------------------------------


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
