"""What is read from a user's own cache is what the model computes, or it is refused: every family, number format and kind of entry."""

import warnings

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.capture import fill_columns
from basin_lens.errors import CaptureError, TransportError
from tests.capture.caches import SERVED, A, assert_same_scores, columns_of, either, facts_of, scores
from tests.capture.readers import BOTH
from tests.conftest import hooked_lane, make_bridge, make_hooked, random_tokens
from tests.families import model_of

# -- the cache gives what the ids give ------------------------------------------------------------------------------------------


@pytest.mark.many
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


@pytest.mark.slow(everywhere=True)
def test_gradients_of_the_cache_stand_beside_all_scores():
    model, tokens = make_bridge("gemma2"), random_tokens(6, 14)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TransformerLens, about its own backward hooks
        _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    capture = bl.Capture.from_cache(model, tokens, cache)
    got = scores(model, capture, A.GradientNorm(target="cache"))
    expected = scores(model, tokens, A.GradientNorm())
    # Who is grouped with whom can turn on the last digits of a state, which the backward pass's run has otherwise.
    columns = [name for name in columns_of(scores(model, tokens)) if not name.startswith("compression")]
    assert len(columns) > 8
    assert_same_scores(got, expected, columns)
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
    with pytest.warns(UserWarning, match="reads the tokens once more"):  # logits are behind the last block
        got = scores(model, capture, layers=[0, 1])
    assert_same_scores(got, expected)


@pytest.mark.parametrize("kind", BOTH)
def test_a_cache_of_one_sequence_without_batch_dimension(kind):
    model, tokens = either(kind), random_tokens(1, 14)
    bank = bl.Capture.from_texts(model, random_tokens(6, 14, seed=2), progress=False)
    _, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    got = scores(model, bl.Capture.from_cache(model, tokens, cache), bank=bank)
    assert_same_scores(got, scores(model, tokens, bank=bank))


# -- number formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cache_in_another_number_format_is_held_to_its_own_tolerance(dtype):
    model, tokens = make_bridge("llama"), random_tokens(6, 14)
    _, cache = model.run_with_cache(tokens)
    held = {name: value.to(dtype) for name, value in cache.items() if "resid" in name or "pattern" in name}
    table = scores(model, bl.Capture.from_cache(model, tokens, held))
    facts = facts_of(table)
    assert facts["capture"]["dtype"] == str(dtype).removeprefix("torch.")
    assert_same_scores(table, scores(model, tokens), ["surprisal", "contraction", "state_norm"], atol=0.2)


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


@pytest.mark.many
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
