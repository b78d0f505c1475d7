"""What is read from a user's own cache is what the model computes, or it is refused: all sequences, every axis, every family."""

import warnings

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.capture import check_cache, fill_columns
from basin_lens.errors import BasinLensError, CaptureError, TransportError
from tests.capture.readers import BOTH, counting
from tests.conftest import hooked_lane, make_bridge, make_hooked, random_tokens
from tests.families import families, model_of

A = bl.analyzers
QUICK = {"Llama, SmolLM2", "Gemma 2", "GPT-2", "native"}
SERVED = [
    pytest.param(f, id=f"{f.kind}-{f.name}", marks=() if f.name in QUICK else pytest.mark.slow)
    for f in families()
    if f.name not in ("Mamba", "T5")
]


def either(kind):
    return kind() if kind else make_bridge("llama")


def scores(model, data, *more, **options):
    """A table of the default scores and of attention, and of `more`."""
    chosen = [*A.default_analyzers(), A.AttentionReceived(), A.AttentionRollout(), A.MatrixEntropy(), *more]
    return bl.analyze(model, data, chosen, progress=False, **options)


def columns_of(table) -> list[str]:
    (facts,) = table.attrs["provenance"].values()
    return list(facts["columns"])


def facts_of(table) -> dict:
    (facts,) = table.attrs["provenance"].values()
    return facts


def assert_same_scores(got, expected, columns=None, atol=2e-4) -> None:
    for name in columns or columns_of(expected):
        np.testing.assert_allclose(got[name].to_numpy(), expected[name].to_numpy(), rtol=1e-3, atol=atol, err_msg=name)


# -- the cache gives what the ids give ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SERVED)
def test_from_cache_equals_the_path_from_ids(family):
    """Scores of tokens and of clouds alike; what follows the head (soft cap, scale) has no hook point and must not be lost."""
    model, tokens = model_of(family.name, family.kind), random_tokens(6, 14)
    logits, cache = model.run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, cache)
    got, expected = scores(model, capture), scores(model, tokens)
    assert got.compression.notna().any() and got.attention_received.notna().any()
    assert_same_scores(got, expected)
    # The model's own word, not only our other path.
    losses = -logits.detach().float().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    own = got[(got.layer == 0) & (got.pos > 0)].surprisal.to_numpy()
    np.testing.assert_allclose(own, losses.reshape(-1).numpy(), atol=1e-4)


def test_gemma_2_surprisal_is_the_models():
    """The soft cap stands behind hook_unembed: without it, 9.69 nats where the model says 4.59."""
    model, tokens = make_bridge("gemma2", final_logit_softcapping=1.0), random_tokens(6, 14)
    _, cache = model.run_with_cache(tokens)
    raw = cache["unembed.hook_out"].float().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    losses = model(tokens, return_type="loss", loss_per_token=True).detach()
    assert float((raw + losses).abs().mean()) > 0.5  # the cap matters here
    capture = bl.Capture.from_cache(model, tokens, cache)
    fill_columns(model, capture, [A.Surprisal(), A.StandardizedLikelihood(), A.Agreement()], progress=False)
    got = capture.columns[A.Surprisal().key]["surprisal"].view(6, 14)[:, 1:]
    torch.testing.assert_close(got, losses, atol=1e-4, rtol=1e-4)
    alone = bl.Capture.from_texts(model, tokens, analyzers=[A.StandardizedLikelihood(), A.Agreement()], progress=False)
    for key, columns in alone.columns.items():
        for name, values in columns.items():
            torch.testing.assert_close(capture.columns[key][name], values, atol=1e-3, rtol=1e-3, equal_nan=True)


@hooked_lane
@pytest.mark.parametrize("changes", [{"output_logits_soft_cap": 2.0}, {"attn_scores_soft_cap": 1.0}, {"use_attn_result": True}])
def test_hooked_transformer_settings(changes):
    model, tokens = make_hooked(**changes), random_tokens(6, 14)
    _, cache = model.run_with_cache(tokens)
    assert_same_scores(scores(model, bl.Capture.from_cache(model, tokens, cache)), scores(model, tokens))


@hooked_lane
def test_hooked_transformer_with_processed_weights():
    model, tokens = make_hooked(), random_tokens(6, 14)
    model.load_and_process_state_dict(model.state_dict(), fold_ln=True, center_writing_weights=True, center_unembed=True)
    _, cache = model.run_with_cache(tokens)
    assert_same_scores(scores(model, bl.Capture.from_cache(model, tokens, cache)), scores(model, tokens))


def test_gradients_of_the_cache_stand_beside_all_scores():
    model, tokens = make_bridge("gemma2"), random_tokens(6, 14)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TransformerLens, about its own backward hooks
        _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    capture = bl.Capture.from_cache(model, tokens, cache)
    got = scores(model, capture, A.GradientNorm(target="cache"))
    expected = scores(model, tokens, A.GradientNorm())
    assert_same_scores(got, expected, columns_of(scores(model, tokens)))
    inner = (got.pos < 13).to_numpy()
    # TransformerLens's loss is the mean over predicted tokens; ours is the sum.
    mine = [name for name in columns_of(got) if name.startswith("gradient_norm")]
    for name in mine:
        other = name.replace("_cache", "")
        np.testing.assert_allclose(got[name][inner] * 6 * 13, expected[other][inner], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", BOTH)
def test_a_cache_that_stops_early_gives_what_it_holds(kind):
    model, tokens = either(kind), random_tokens(6, 14)
    _, cache = model.run_with_cache(tokens, stop_at_layer=2)
    capture = bl.Capture.from_cache(model, tokens, cache)
    assert set(capture.layers) >= {0, 1}
    expected = scores(model, tokens, layers=[0, 1])
    assert_same_scores(scores(model, capture, layers=[0, 1]), expected)


@pytest.mark.parametrize("kind", BOTH)
def test_a_cache_of_one_sequence_without_batch_dimension(kind):
    model, tokens = either(kind), random_tokens(1, 14)
    bank = bl.Capture.from_texts(model, random_tokens(6, 14, seed=2), progress=False)
    _, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    got = scores(model, bl.Capture.from_cache(model, tokens, cache), bank=bank)
    assert_same_scores(got, scores(model, tokens, bank=bank))


# -- all sequences are checked --------------------------------------------------------------------------------------------------


def padded_in_front(model, *, mask_in_the_run: bool):
    """20 sequences of 16, 3 of them with 4 tokens of padding in front."""
    tokens, mask = random_tokens(20, 16), torch.ones(20, 16, dtype=torch.int64)
    mask[[4, 9, 17], :4] = 0
    options = {"attention_mask": mask} if mask_in_the_run else {}
    _, cache = model.run_with_cache(tokens, **options)
    return bl.Capture.from_cache(model, tokens, cache, attention_mask=mask)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", BOTH)
def test_padding_that_the_run_did_not_know_of_is_refused(kind, seed):
    model = either(kind)
    capture = padded_in_front(model, mask_in_the_run=False)
    with pytest.raises(TransportError, match=r"resid_post at block 0 .*\(sequence (4|9|17), .*attention_mask"):
        bl.analyze(model, capture, [A.Compression(k=5)], seed=seed, progress=False)


@pytest.mark.parametrize("analyzer", [A.Surprisal(), A.StateNorm(), A.AttentionReceived(), A.MatrixEntropy()], ids=lambda a: a.key)
def test_also_when_only_tokens_are_measured(analyzer):
    model = make_bridge("llama")
    capture = padded_in_front(model, mask_in_the_run=False)
    with pytest.raises(BasinLensError, match="attention_mask"):
        bl.analyze(model, capture, [analyzer], progress=False)
    with pytest.raises(BasinLensError, match="attention_mask"):
        fill_columns(model, capture, [analyzer], progress=False)
    assert capture.columns == {}


def test_padding_that_the_run_knew_of_is_served():
    model = make_bridge("llama")
    capture = padded_in_front(model, mask_in_the_run=True)
    assert scores(model, capture).compression.notna().any()


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


# -- number formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cache_in_another_number_format_is_held_to_its_own_tolerance(dtype):
    model, tokens = make_bridge("llama"), random_tokens(6, 14)
    _, cache = model.run_with_cache(tokens)
    held = {name: value.to(dtype) for name, value in cache.items() if "resid" in name or "pattern" in name}
    table = scores(model, bl.Capture.from_cache(model, tokens, held))
    facts = facts_of(table)
    assert facts["capture"]["dtype"] == str(dtype).removeprefix("torch.")
    assert_same_scores(table, scores(model, tokens), ["surprisal", "compression", "state_norm"], atol=0.2)


def test_a_refusal_names_both_number_formats():
    model, tokens = make_bridge("llama"), random_tokens(6, 14)
    _, cache = make_bridge("llama", seed=3).run_with_cache(tokens)
    half = {name: value.half() for name, value in cache.items() if "resid" in name}
    half["blocks.0.hook_resid_pre"] = door.entering(model, tokens).half()
    with pytest.raises(TransportError, match=r"model in float32, cache in float16"):
        bl.analyze(model, bl.Capture.from_cache(model, tokens, half), [A.StateNorm()], progress=False)


# -- what holds the numbers -----------------------------------------------------------------------------------------------------


MASK = [[1] * 8, [0, 0] + [1] * 6, [1] * 5 + [0] * 3]


def additive(lowest):
    return torch.where(torch.tensor(MASK) == 1, 0.0, lowest)


MASKS = {
    "list": MASK,
    "numpy": np.array(MASK),
    "numpy bool": np.array(MASK, dtype=bool),
    "bool": torch.tensor(MASK, dtype=torch.bool),
    "float": torch.tensor(MASK, dtype=torch.float32),
    "uint8": torch.tensor(MASK, dtype=torch.uint8),
    "additive": additive(float("-inf")),
    "additive, lowest": additive(torch.finfo(torch.float32).min),
    "additive, float16": additive(torch.finfo(torch.float16).min).half(),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_kind(llama, name):
    tokens = random_tokens(3, 8)
    _, cache = llama.run_with_cache(tokens, attention_mask=torch.tensor(MASK))
    capture = bl.Capture.from_cache(llama, tokens, cache, attention_mask=MASKS[name])
    assert capture.lengths.tolist() == [8, 6, 5]
    assert [s.tokens for s in capture.sequences] == [
        tuple(row[np.array(mask) == 1].tolist()) for row, mask in zip(tokens, MASK, strict=True)
    ]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.tensor(MASK).T, r"mask of shape \(3, 8\), got \(8, 3\)"),
        (torch.tensor(MASK).flatten(), r"mask of shape \(3, 8\), got \(24,\)"),
        (torch.zeros(3, 1, 8, 8), r"mask of shape \(3, 8\), got \(3, 1, 8, 8\)"),
        (torch.zeros(3, 8), "zeros only says both"),
        (torch.tensor(MASK) * 0.5, "got 0.5 in it"),
        (torch.tensor(MASK) * torch.nan, "got nan in it"),
        (torch.tensor(MASK) * 2, "got 2.0 in it"),
        (torch.where(torch.tensor(MASK) == 1, 1.0, float("-inf")), "got both 1 and -inf|got"),
        ([[1] * 8, [1] * 7, [1] * 8], "expected an attention mask"),
        ("left", "expected an attention mask"),
        ({"mask": 1}, "expected an attention mask"),
    ],
)
def test_masks_that_say_nothing_clear(llama, mask, said):
    tokens = random_tokens(3, 8)
    _, cache = llama.run_with_cache(tokens)
    with pytest.raises(CaptureError, match=said):
        bl.Capture.from_cache(llama, tokens, cache, attention_mask=mask)


@pytest.mark.parametrize("form", ["numpy", "lists", "parameters"])
def test_caches_of_arrays_and_lists(llama, form):
    tokens = random_tokens(6, 14)
    _, cache = llama.run_with_cache(tokens)
    change = {"numpy": lambda t: t.numpy(), "lists": lambda t: t.tolist(), "parameters": torch.nn.Parameter}[form]
    held = {name: change(value) for name, value in cache.items() if "resid" in name or "pattern" in name}
    assert_same_scores(scores(llama, bl.Capture.from_cache(llama, tokens, held)), scores(llama, tokens))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.to("meta"), "meta device, which holds no numbers"),
        (lambda t: t.long(), "floating-point numbers, got torch.int64"),
        (lambda t: t.to(torch.complex64), "floating-point numbers, got torch.complex64"),
        (lambda t: t.to_sparse(), "floating-point numbers"),
        (lambda _: "states", "as a tensor or array, got str"),
        (lambda _: None, "missing: blocks.0.hook_resid_pre"),
        (lambda _: [[1.0], [1.0, 2.0]], "as a tensor or array, got list"),
    ],
)
def test_entries_that_hold_no_numbers(llama, change, said):
    tokens = random_tokens(6, 14)
    _, cache = llama.run_with_cache(tokens)
    held = {name: change(value) if "resid_pre" in name else value for name, value in cache.items()}
    with pytest.raises(CaptureError, match=said):
        bl.Capture.from_cache(llama, tokens, held)


@pytest.mark.parametrize("given", [None, [1, 2], "cache", torch.zeros(5, 6, 14, 32), np.zeros((5, 6, 14, 32))], ids=str)
def test_what_is_no_cache(llama, given):
    with pytest.raises(CaptureError, match="a cache that names its tensors"):
        bl.Capture.from_cache(llama, random_tokens(6, 14), given)


def test_a_stack_is_no_cache(llama):
    tokens = random_tokens(6, 14)
    _, cache = llama.run_with_cache(tokens)
    stack = cache.accumulated_resid(layer=-1, apply_ln=True)
    with pytest.raises(CaptureError, match="a stack"):
        bl.Capture.from_cache(llama, tokens, stack)
