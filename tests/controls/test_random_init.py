"""Random twins of a model."""

import random

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import ModelError
from tests.conftest import TEXTS, TINY, hooked_lane, make_bridge, make_hooked, random_tokens
from tests.controls.made import C


def make_native(**changes):
    from transformer_lens.model_bridge import TransformerBridge

    settings = {
        "n_layers": 2,
        "d_model": 16,
        "n_ctx": 32,
        "d_head": 4,
        "n_heads": 4,
        "d_mlp": 32,
        "d_vocab": 211,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "seed": 5,
        "device": "cpu",
    }
    return TransformerBridge.boot_native(settings | changes).eval()


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


# Made from another seed than any twin here: a random model and its twin of one seed are the same model.
KINDS = [
    *(pytest.param(lambda name=name: make_bridge(name, seed=7), id=name) for name in TINY),
    pytest.param(make_native, id="native"),
    pytest.param(lambda: make_hooked(seed=7), id="hooked", marks=hooked_lane),
    pytest.param(lambda: make_hooked(seed=7, normalization_type="LNPre"), id="hooked-folded", marks=hooked_lane),
]


@pytest.fixture(params=KINDS)
def original(request):
    return request.param()


@pytest.mark.many
def test_twin_is_the_same_architecture_with_other_weights(original):
    before = door.fingerprint(original)
    twin = C.random_twin(original, seed=0)
    assert type(twin) is type(original) and twin is not original
    assert door.fingerprint(original) == before != door.fingerprint(twin)
    tokens = random_tokens(2, 9)
    one, other = original(tokens, return_type="logits"), twin(tokens, return_type="logits")
    assert one.shape == other.shape and not torch.allclose(one, other)
    assert bool(torch.isfinite(other).all())
    assert (door.n_layers(twin), door.width(twin), door.n_context(twin), door.vocabulary_size(twin)) == (
        door.n_layers(original),
        door.width(original),
        door.n_context(original),
        door.vocabulary_size(original),
    )
    # Norm weights are 1 and biases 0 in any fresh model; every matrix is drawn anew.
    own, new = weights(original), weights(twin)
    assert [name for name, p in new.items() if p.ndim > 1 and p.std() > 0 and torch.equal(p, own[name])] == []
    assert not twin.training


@pytest.mark.many
def test_twin_has_the_spread_of_a_fresh_model(original):
    """Compared with the original, which is fresh itself: the same standard deviation in every matrix."""
    twin = C.random_twin(original, seed=3)
    own = weights(original)
    for name, parameter in weights(twin).items():
        if parameter.numel() >= 256 and parameter.std() > 0:
            assert 0.8 < float(parameter.std() / own[name].std()) < 1.25, name


@pytest.mark.many
def test_twin_by_seed(original):
    one, same, other = (C.random_twin(original, seed=seed) for seed in (0, 0, 1))
    assert door.fingerprint(one) == door.fingerprint(same) != door.fingerprint(other)
    tokens = random_tokens(2, 9)
    assert torch.equal(one(tokens), same(tokens))


@pytest.mark.many
def test_twin_leaves_every_random_state_alone(original):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    C.random_twin(original, seed=0)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


@pytest.mark.many
def test_twin_is_measured_like_any_model(original):
    twin = C.random_twin(original, seed=0)
    table = bl.analyze(twin, random_tokens(6, 12), [bl.analyzers.Compression(k=4)], layers=[1], progress=False)
    assert table.compression.notna().any()
    (facts,) = table.attrs["provenance"].values()
    assert facts["model"]["name"] == f"random twin of {door.full_name(original)}, seed 0"


def test_twin_keeps_the_tokenizer_and_its_bos(llama, tokenizer):
    twin = C.random_twin(llama)
    assert twin.tokenizer is tokenizer
    assert door.uses_bos(twin, None) == door.uses_bos(llama, None)
    one, other = (bl.Capture.from_texts(m, TEXTS, layers=[0], progress=False) for m in (llama, twin))
    assert [s.tokens for s in one.sequences] == [s.tokens for s in other.sequences]


@pytest.mark.parametrize("make", [lambda: make_bridge("llama"), make_native], ids=["llama", "native"])
def test_twin_has_the_dtype(make):
    twin = C.random_twin(make().to(torch.bfloat16))
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}


def test_twin_has_no_hooks_of_the_user():
    model, fired = make_bridge("llama"), []
    model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: fired.append(hook))  # noqa: ARG005
    C.random_twin(model)(random_tokens(1, 5))
    assert fired == []


def test_twin_of_a_model_in_train_mode_under_inference_mode():
    model = make_bridge("llama").train()
    with torch.inference_mode():
        twin = C.random_twin(model)
    assert not any(p.is_inference() for p in twin.parameters()) and model.training
    twin(random_tokens(1, 5)).sum().backward()


@pytest.mark.many
@pytest.mark.parametrize("no_processing", [False, True])
def test_twin_of_a_processed_model_is_processed(tokenizer, no_processing):
    model = make_bridge("llama", tokenizer=tokenizer)
    model.enable_compatibility_mode(disable_warnings=True, no_processing=no_processing)
    twin = C.random_twin(model)
    assert door.provenance(twin)["weight_processing"] == door.provenance(model)["weight_processing"]
    assert twin(random_tokens(2, 9)).shape == model(random_tokens(2, 9)).shape


def test_a_model_that_its_settings_do_not_give_is_refused(monkeypatch):
    model = make_bridge("llama")
    model.original_model.config.hidden_size = 64
    with pytest.raises(ModelError, match="rebuild"):
        C.random_twin(model)
    model.original_model.config.model_type = "nothing"
    model.original_model.config.__class__.model_type = "llama"
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match="settings alone"):
        C.random_twin(model)


def test_twin_of_something_else_is_refused():
    with pytest.raises(ModelError):
        C.random_twin(torch.nn.Linear(2, 2))
