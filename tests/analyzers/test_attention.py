"""Attention's measures of importance, by loops."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.capture import fill_columns
from basin_lens.errors import CaptureError, ModelError
from tests.analyzers.passes import LAYERS, A, counting, measured, near, one
from tests.conftest import (
    TEXTS,
    TINY,
    make_bridge,
    random_tokens,
)
from tests.families import families


def cached(model, tokens, point, layer):
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.as_tensor(tokens)[None])
    return cache[f"blocks.{layer}.{point}"][0].double()


# -- attention -------------------------------------------------------------------------------------------------------------------------


def loop_received(patterns, *, sink):
    """The formula, one number at a time, `[query, key]` -> `[key]`."""
    count = len(patterns)
    answer = np.full(count, np.nan)
    for i in range(0 if sink else 1, count - 5):
        answer[i] = sum(float(patterns[t, i]) for t in range(i + 1, count)) / sum(
            1 / (t + 1) if sink else 1 / t for t in range(i + 1, count)
        )
    return answer


@pytest.mark.many
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
        said = pytest.warns(UserWarning, match="reads the tokens once more") if passes_ else nullcontext()
        # The check of the cache, which ends before block 0, is no pass.
        with counting(monkeypatch, ("forward_pass", "pass_until")) as (forward, _), said:
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


@pytest.mark.many
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


@pytest.mark.many
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
