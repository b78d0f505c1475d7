"""Whose tokens a user's own cache is of: shown by what enters block 0, or by a pass up to the first state that the cache holds."""

import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import AttentionReceived, Compression, StateNorm, Surprisal
from basin_lens.capture import subset
from basin_lens.errors import CaptureError, TextError
from tests.capture.caches import either
from tests.capture.readers import BOTH
from tests.conftest import TEXTS, make_bridge, random_tokens


def late(name: str) -> bool:
    """States around block 2 alone."""
    return name in [f"blocks.2.{point}" for point in ("hook_resid_pre", "hook_in", "hook_resid_post", "hook_out")]


def first(name: str) -> bool:
    """Those, and what enters block 0."""
    return late(name) or name in ("blocks.0.hook_resid_pre", "blocks.0.hook_in")


OTHERS = {
    "another order": lambda t: t.flip(0),
    "one place later": lambda t: t.roll(1, 1),
    "one token of one sequence": lambda t: torch.cat([t[:, :-1], torch.cat([t[:-1, -1:], (t[-1:, -1:] + 1) % 200])], 1),
}


@pytest.mark.many
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("names", [late, first], ids=["late", "first"])
@pytest.mark.parametrize("kind", BOTH)
def test_tokens_of_another_run_beside_a_cache_of_late_layers(kind, names, other):
    """The blocks map these states rightly, and nothing of layer 0 is asked for: all scores would stand beside other tokens."""
    model, tokens = either(kind), random_tokens(6, 14)
    _, cache = model.run_with_cache(tokens, names_filter=names)
    capture = bl.Capture.from_cache(model, OTHERS[other](tokens), cache)
    assert capture.layers == (2,)
    for chosen in ([Compression(k=5)], [Surprisal()], [StateNorm()]):
        with pytest.raises(CaptureError, match=r"enters block [02] to be that of each token"):
            bl.analyze(model, capture, chosen, layers=[2], progress=False)


@pytest.mark.parametrize("names", [late, first], ids=["late", "first"])
@pytest.mark.parametrize("kind", BOTH)
def test_a_cache_of_late_layers_is_served(kind, names, tmp_path):
    model, tokens = either(kind), random_tokens(6, 14)
    mask = torch.ones(6, 14, dtype=torch.int64)
    mask[2, :5], mask[4, :3] = 0, 0
    _, cache = model.run_with_cache(tokens, names_filter=names, attention_mask=mask)
    capture = bl.Capture.from_cache(model, tokens, cache, attention_mask=mask)
    capture.save(tmp_path / "saved")
    expected = bl.analyze(model, tokens, [StateNorm()], attention_mask=mask, layers=[2], progress=False).state_norm.to_numpy()
    for one in (capture, bl.Capture.load(tmp_path / "saved")):
        got = bl.analyze(model, one, [StateNorm()], layers=[2], progress=False)
        assert got.state_norm.to_numpy() == pytest.approx(expected, rel=1e-4)
    part = subset(bl.Capture.load(tmp_path / "saved"), [4, 2])
    assert len(bl.analyze(model, part, [StateNorm()], layers=[2], progress=False)) == 11 + 9


def test_states_that_hooks_changed_below_need_what_enters_block_0():
    """Steered states are measured on purpose; they are served where the cache shows whose tokens they are."""
    model, tokens = make_bridge("llama"), random_tokens(6, 14)

    def steer(state, hook):
        return state + hook.layer() + 1

    answers = []
    for names in (first, late):
        with model.hooks(fwd_hooks=[("blocks.0.hook_out", steer)]):
            _, cache = model.run_with_cache(tokens, names_filter=names)
        answers.append(bl.Capture.from_cache(model, tokens, cache))
    assert bl.analyze(model, answers[0], [StateNorm()], layers=[2], progress=False).state_norm.notna().all()
    with pytest.raises(CaptureError, match=r"block 2 .*cache blocks\.0\.hook_resid_pre too"):
        bl.analyze(model, answers[1], [StateNorm()], layers=[2], progress=False)


def test_padded_ids_beside_a_cache_need_their_mask(llama):
    """A run without a mask saw the pads as text; the table would hold them as tokens."""
    encoded = llama.tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    _, cache = llama.run_with_cache(encoded["input_ids"])
    with pytest.raises(TextError, match=r"without padding, got sequence \d that ends .*attention_mask="):
        bl.Capture.from_cache(llama, encoded["input_ids"], cache)
    capture = bl.Capture.from_cache(llama, encoded["input_ids"], cache, attention_mask=encoded["attention_mask"])
    assert capture.lengths.tolist() == encoded["attention_mask"].sum(1).tolist()
    assert bl.analyze(llama, capture, [StateNorm()], progress=False).state_norm.notna().all()
    every = torch.ones_like(encoded["input_ids"])
    assert bl.Capture.from_cache(llama, encoded["input_ids"], cache, attention_mask=every).n_rows == every.numel()


def test_documents_and_labels_of_a_cache_are_lists(llama):
    tokens = random_tokens(3, 8)
    _, cache = llama.run_with_cache(tokens)
    with pytest.raises(CaptureError, match="one document for each of 3 sequences, got str"):
        bl.Capture.from_cache(llama, tokens, cache, docs="abc")
    with pytest.raises(CaptureError, match="one document for each of 3 sequences, got 2"):
        bl.Capture.from_cache(llama, tokens, cache, docs=["a", "b"])
    with pytest.raises(CaptureError, match="labels for each of 3 sequences, got 1"):
        bl.Capture.from_cache(llama, tokens, cache, labels=[{"a": 1}])


@pytest.mark.parametrize("point", ["pattern", "gradient"])
def test_readings_without_numbers_are_refused(point):
    """NaN is no share and no slope; it would pass every comparison and empty a column without a word."""
    model, tokens = make_bridge("llama"), random_tokens(3, 8)
    _, cache = model.run_with_cache(tokens)
    held = {name: value.clone() for name, value in cache.items()}
    if point == "gradient":
        held["blocks.1.hook_resid_pre_grad"] = torch.full_like(held["blocks.1.hook_resid_pre"], torch.nan)
        with pytest.raises(CaptureError, match="finite gradients, got NaN or infinity at block 1"):
            bl.Capture.from_cache(model, tokens, held)
        return
    held["blocks.1.attn.hook_pattern"][2, 1, 5, 3] = torch.nan
    capture = bl.Capture.from_cache(model, tokens, held)
    with pytest.raises(CaptureError, match=r"pattern of block 1 .*sequence 2"):
        bl.analyze(model, capture, [AttentionReceived()], progress=False)
