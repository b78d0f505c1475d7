"""What a user's own cache holds is checked: all sequences, every axis."""

import pytest
import torch

import basin_lens as bl
from basin_lens.capture import check_cache, fill_columns
from basin_lens.errors import BasinLensError, CaptureError, TransportError
from tests.capture.caches import A, either, scores
from tests.capture.readers import BOTH, counting
from tests.conftest import make_bridge, random_tokens

# -- all sequences are checked --------------------------------------------------------------------------------------------------


def padded_in_front(model, *, mask_in_the_run: bool):
    """20 sequences of 16, 3 of them with 4 tokens of padding in front."""
    tokens, mask = random_tokens(20, 16), torch.ones(20, 16, dtype=torch.int64)
    mask[[4, 9, 17], :4] = 0
    options = {"attention_mask": mask} if mask_in_the_run else {}
    _, cache = model.run_with_cache(tokens, **options)
    return bl.Capture.from_cache(model, tokens, cache, attention_mask=mask)


@pytest.mark.many
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", BOTH)
def test_padding_that_the_run_did_not_know_of_is_refused(kind, seed):
    model = either(kind)
    capture = padded_in_front(model, mask_in_the_run=False)
    with pytest.raises(TransportError, match=r"resid_post at block 0 .*\(sequence (4|9|17), .*attention_mask"):
        bl.analyze(model, capture, [A.Compression(k=5)], seed=seed, progress=False)


@pytest.mark.many
@pytest.mark.parametrize("analyzer", [A.Surprisal(), A.StateNorm(), A.AttentionReceived(), A.MatrixEntropy()], ids=lambda a: a.key)
def test_also_when_only_tokens_are_measured(analyzer):
    model = make_bridge("llama")
    capture = padded_in_front(model, mask_in_the_run=False)
    with pytest.raises(BasinLensError, match="attention_mask"):
        bl.analyze(model, capture, [analyzer], progress=False)
    with pytest.raises(BasinLensError, match="attention_mask"):
        fill_columns(model, capture, [analyzer], progress=False)
    assert capture.columns == {}


@pytest.mark.slow(everywhere=True)
def test_padding_that_the_run_knew_of_is_served():
    model = make_bridge("llama")
    capture = padded_in_front(model, mask_in_the_run=True)
    assert scores(model, capture).compression.notna().any()


@pytest.mark.many
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", BOTH)
def test_one_wrong_state_in_the_last_of_many_sequences(kind, layer):
    model, tokens = either(kind), random_tokens(30, 10)
    _, cache = model.run_with_cache(tokens)
    states = {name: value.clone() for name, value in cache.items()}
    for name in (
        f"blocks.{layer}.hook_resid_post",
        f"blocks.{layer}.hook_out",
        f"blocks.{layer + 1}.hook_resid_pre",
        f"blocks.{layer + 1}.hook_in",
    ):
        if name in states:
            states[name][29, 9] += 0.1
    capture = bl.Capture.from_cache(model, tokens, states)
    with pytest.raises(TransportError, match=rf"block {layer} .*sequence 29, position 9"):
        fill_columns(model, capture, [A.StateNorm()], progress=False)


def test_tokens_of_another_run_are_refused():
    """Every block maps its states rightly; only the embedding shows that these are other tokens."""
    model, tokens = make_bridge("llama"), random_tokens(6, 14)
    _, cache = model.run_with_cache(tokens)
    tokens[5, 13] = (tokens[5, 13] + 1) % 200
    capture = bl.Capture.from_cache(model, tokens, cache)
    with pytest.raises(CaptureError, match=r"state that enters block 0 .*sequence 5, position 13"):
        bl.analyze(model, capture, [A.Surprisal()], progress=False)


def test_learned_positions_that_began_in_the_padding_are_refused():
    model, tokens = make_bridge("gpt2"), random_tokens(4, 10)
    mask = torch.ones(4, 10, dtype=torch.int64)
    mask[2, :3] = 0
    _, cache = model.run_with_cache(tokens, attention_mask=mask, position_ids=torch.arange(10).expand(4, -1))
    capture = bl.Capture.from_cache(model, tokens, cache, attention_mask=mask)
    with pytest.raises(CaptureError, match=r"learned positions"):
        bl.analyze(model, capture, [A.StateNorm()], progress=False)


def test_a_pattern_of_another_pass_is_refused():
    model, tokens = make_bridge("llama"), random_tokens(6, 14)
    _, cache = model.run_with_cache(tokens)
    _, other = model.run_with_cache(tokens.flip(0))
    mixed = dict(cache.items()) | {"blocks.1.attn.hook_pattern": other["blocks.1.attn.hook_pattern"]}
    with pytest.raises(CaptureError, match="attention pattern of block 1"):
        bl.analyze(model, bl.Capture.from_cache(model, tokens, mixed), [A.AttentionReceived()], progress=False)


def test_a_foreign_bank_is_checked_too():
    model, tokens = make_bridge("llama"), random_tokens(6, 14)
    _, cache = model.run_with_cache(tokens)
    cache["blocks.1.hook_resid_pre"][3, 5] += 1
    bank = bl.Capture.from_cache(model, tokens, dict(cache.items()))
    with pytest.raises(TransportError, match="sequence 3"):
        bl.analyze(model, random_tokens(6, 14, seed=4), [A.Compression(k=5)], bank=bank, progress=False)


@pytest.mark.parametrize("kind", BOTH)
def test_the_check_costs_one_block_pass_per_layer_asked(kind):
    """Tokens through each block's feed-forward: all of them once in the layer asked for, and a single one in the first, whose answer
    has the form of all blocks' when their arguments are recorded."""
    model, tokens = either(kind), random_tokens(30, 10)
    _, cache = model.run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, cache)
    passed = [0, 0, 0]

    def count(layer):
        def hook(_module, args, kwargs, _output):
            passed[layer] += next(iter([*args, *kwargs.values()])).shape[:2].numel()

        return hook

    handles = [block.mlp.register_forward_hook(count(layer), with_kwargs=True) for layer, block in enumerate(model.blocks)]
    check_cache(model, capture, [1])
    assert passed == [1, 300, 0]
    check_cache(model, capture, [1])
    assert passed == [1, 300, 0]  # known by now
    check_cache(model, capture, [0, 1, 2])
    assert passed == [302, 300, 300]
    for handle in handles:
        handle.remove()


def test_own_captures_are_not_checked():
    model = make_bridge("llama")
    capture = bl.Capture.from_texts(model, random_tokens(), progress=False)
    with counting(model) as seen:
        check_cache(model, capture, capture.layers)
    assert seen == []


# -- every axis -----------------------------------------------------------------------------------------------------------------


def cut(cache, name, *index):
    return dict(cache.items()) | {name: cache[name][index]}


@pytest.mark.parametrize("kind", BOTH)
def test_a_pattern_over_more_keys_is_refused(kind):
    """As run_with_cache(pos_slice=...) leaves it: [6, 4, 10, 20], attention received .54 for 1.00."""
    model, tokens = either(kind), random_tokens(6, 20)
    _, cache = model.run_with_cache(tokens, pos_slice=slice(0, 10))
    if cache["blocks.0.attn.hook_pattern"].shape[-2:] != (10, 20):
        _, whole = model.run_with_cache(tokens)
        cache = {
            n: (v[:, :, :10] if n.endswith("pattern") else v[:, :10]) for n, v in whole.items() if "resid" in n or "pattern" in n
        }
    with pytest.raises(
        CaptureError, match=r"pattern of shape \(6, 4, 10, 10\) \(batch, head, query, key\), got \(6, 4, 10, 20\).*pos_slice"
    ):
        bl.Capture.from_cache(model, tokens[:, :10], cache)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("blocks.1.attn.hook_pattern", (slice(None), slice(0, 2))),
        ("blocks.1.attn.hook_pattern", (slice(0, 5),)),
        ("blocks.1.attn.hook_pattern", (slice(None), slice(None), slice(None), slice(0, 13))),
        ("blocks.1.hook_resid_pre", (slice(None), slice(None), slice(0, 16))),
        ("blocks.1.hook_resid_pre", (slice(0, 1),)),
    ],
)
def test_other_shapes_are_refused(llama, name, index):
    tokens = random_tokens(6, 14)
    _, cache = llama.run_with_cache(tokens)
    with pytest.raises(CaptureError, match=rf"{name} of shape .* got \("):
        bl.Capture.from_cache(llama, tokens, cut(cache, name, *index))


def test_a_gradient_of_another_shape_is_refused(llama):
    tokens = random_tokens(6, 14)
    _, cache = llama.run_with_cache(tokens)
    for shape in ((6, 14, 16), (6, 13, 32), (3, 14, 32)):
        held = dict(cache.items()) | {"blocks.1.hook_resid_pre_grad": torch.zeros(shape)}
        with pytest.raises(CaptureError, match="hook_resid_pre_grad of shape"):
            bl.Capture.from_cache(llama, tokens, held)
