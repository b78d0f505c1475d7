"""No hook is left, and any state of the model is measured alike."""

import pytest
import torch

import basin_lens as bl
from basin_lens.errors import AnalyzerError
from tests.capture.readers import BOTH, BrokenError, assert_columns, assert_states, token_analyzers
from tests.conftest import TEXTS, make_bridge, make_hooked, random_tokens


def hooks_on(model) -> dict[str, int]:
    """Every hook on every module, by name."""
    roots = [model, getattr(model, "original_model", None)]
    modules = {id(m): m for root in roots if root is not None for m in root.modules()}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {f"{key}.{kind}": len(getattr(module, kind)) for key, module in modules.items() for kind in kinds}


# -- hooks -----------------------------------------------------------------------------------------------------------------------------


def test_no_hook_is_left(reader):
    reader(random_tokens())  # a bridge hooks itself up at its first pass
    before = hooks_on(reader)
    bl.Capture.from_texts(reader, TEXTS, analyzers=token_analyzers(), progress=False)
    assert hooks_on(reader) == before


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_no_hook_is_left_after_an_error(reader, error):
    """The user's own hook raises in the middle of a pass: it stays, ours go, and the next pass works."""
    rounds = [0]

    def users_own(tensor, hook):  # noqa: ARG001 - the names are TransformerLens's
        rounds[0] += 1
        if rounds[0] == 2:
            raise error("on purpose")

    reader(random_tokens())
    reader.hook_dict["blocks.1.hook_resid_pre"].add_hook(users_own)
    reader.train()
    before = hooks_on(reader)
    with pytest.raises(error):
        bl.Capture.from_texts(reader, TEXTS, analyzers=token_analyzers(), batch_size=2, progress=False)
    assert hooks_on(reader) == before
    assert all(module.training for module in reader.modules())
    assert torch.is_grad_enabled()
    bl.Capture.from_texts(reader, TEXTS, batch_size=2, progress=False)
    assert rounds[0] == 2 + 3


def test_an_error_in_an_analyzer_leaves_no_hook(llama):
    class Breaks(bl.analyzers.StateNorm):
        def measure(self, _batch):
            raise BrokenError

    bl.Capture.from_texts(llama, TEXTS, progress=False)  # transformers hooks into its blocks at the first pass, for good
    before = hooks_on(llama)
    with pytest.raises(AnalyzerError, match="Breaks") as raised:
        bl.Capture.from_texts(llama, TEXTS, analyzers=[Breaks()], progress=False)
    assert isinstance(raised.value.__cause__, BrokenError)
    assert hooks_on(llama) == before


# -- the state of the model ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=BOTH)
def plain(request):
    """A tiny model of either class, and what it gives in its plainest state."""
    # GPT-2 drops 10 % of its states in train mode.
    model = make_bridge("gpt2") if request.param is None else make_hooked()
    return model, bl.Capture.from_texts(model, random_tokens(), analyzers=token_analyzers(), progress=False)


def assert_measures_as(model, expected: bl.Capture) -> None:
    got = bl.Capture.from_texts(model, random_tokens(), analyzers=token_analyzers(), progress=False)
    assert_states(got, [expected.resid_pre(layer) for layer in range(3)] + [expected.resid_post(2)])
    assert_columns(got, expected)
    assert got.model["fingerprint"] == expected.model["fingerprint"]


def test_train_mode(plain):
    model, expected = plain
    model.train()
    # One part in another mode than the rest stays so.
    next(iter(model.blocks)).eval()
    flags = [module.training for module in model.modules()]
    assert {True, False} == set(flags)
    assert_measures_as(model, expected)
    assert [module.training for module in model.modules()] == flags


def test_frozen_parameters(plain):
    model, expected = plain
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert_measures_as(model, expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_gradients_off(plain):
    model, expected = plain
    torch.set_grad_enabled(False)
    try:
        assert_measures_as(model, expected)
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_or_inference_mode(plain, mode):
    model, expected = plain
    with mode():
        assert_measures_as(model, expected)
        capture = bl.Capture.from_texts(model, random_tokens(), progress=False)
        assert torch.is_inference_mode_enabled() is (mode is torch.inference_mode)
    assert not capture.resid_pre(0).is_inference()


def test_cache_made_in_inference_mode(plain):
    model, expected = plain
    with torch.inference_mode():
        tokens = random_tokens()
        _, cache = model.run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, cache)
    assert_states(capture, [expected.resid_pre(layer) for layer in range(3)] + [expected.resid_post(2)])


@pytest.mark.many
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_sdpa_attention(name):
    model = make_bridge(name)
    expected = bl.Capture.from_texts(model, random_tokens(), analyzers=token_analyzers(), progress=False)
    model.original_model.set_attn_implementation("sdpa")
    assert_measures_as(model, expected)
    assert model.original_model.config._attn_implementation == "sdpa"


def test_bfloat16_model_states():
    """A bfloat16 model's own states, widened, not recomputed."""
    model = make_bridge("llama").to(torch.bfloat16)
    tokens = random_tokens(2, 9)
    _, cache = model.run_with_cache(tokens)
    capture = bl.Capture.from_texts(model, tokens, progress=False)
    assert torch.equal(capture.resid_post(2), cache["blocks.2.hook_resid_post"].float().flatten(0, 1))
