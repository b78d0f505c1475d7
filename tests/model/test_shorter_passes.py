"""Passes that leave out what nobody looks at: the numbers of whole ones, of every family, and whole where a model needs it."""

import pytest
import torch

from basin_lens import model as door
from basin_lens.capture import Passes, passes
from basin_lens.model import shorter_passes
from tests.conftest import has_hooked_transformer, make_bridge, random_tokens
from tests.families import FAMILIES, model_of

HERE = [f for f in FAMILIES if (f.kind == "hooked") == has_hooked_transformer() and f.name not in ("T5", "Mamba")]


def slopes(model, tokens, layer=1):
    """Targets and gradients with other states than the model's own put before a block."""
    passes = Passes(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return passes.slopes(layer, torch.tensor([0, 1, 1]), 0.9 * passes.states(layer)[[0, 1, 1]], "future_loss")


def seen(model, layer):
    """How many tokens each pass of a block is over, as a list that grows."""
    found = []
    point = model.hook_dict[door.point_name("resid_post", layer)]
    getattr(point, "_target", point).register_forward_hook(lambda _module, _given, states: found.append(states.shape[1]))
    return found


@pytest.mark.many
@pytest.mark.parametrize("family", HERE, ids=lambda f: f"{f.kind}: {f.name}")
def test_slopes_are_those_of_whole_passes(family, monkeypatch):
    model, tokens = model_of(family.name, family.kind), random_tokens(2, 12)
    shorter_passes._begins.pop(model, None)
    short = slopes(model, tokens)
    monkeypatch.setitem(shorter_passes._begins, model, {1: (shorter_passes._hooks_on(model), None)})
    for got, expected in zip(short, slopes(model, tokens), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_blocks_below_states_that_are_put_in_do_not_run():
    model, tokens = make_bridge("llama"), random_tokens(2, 12)
    below, above = seen(model, 0), seen(model, 1)
    for _ in range(2):  # proved with whole passes; a bridge hooks itself up at its first pass
        slopes(model, tokens)
    below.clear(), above.clear()
    slopes(model, tokens)
    assert below.count(12) == 1  # for the states alone; one token shows the form of a block's answers
    assert above.count(12) == 1
    assert "forward" not in vars(model.blocks[0])


def test_a_model_that_needs_its_lower_blocks_is_passed_whole():
    """Something that the first block makes beside its states, and another reads."""
    model, tokens = make_bridge("llama"), random_tokens(2, 12)
    made = []
    model.blocks[0].mlp.register_forward_hook(lambda _module, _given, output: made.append(output))
    model.blocks[1].mlp.register_forward_hook(lambda _module, _given, output: output + made.pop())
    found = slopes(model, tokens)
    assert shorter_passes._begins[model][1][1] is None
    below = seen(model, 0)
    slopes(model, tokens)  # other hooks: proved anew
    below.clear()
    again = slopes(model, tokens)
    assert len(below) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("later", [False, True], ids=["from the start", "put on after a proof"])
def test_what_a_lower_block_left_lying_is_no_proof(later):
    """States kept for an upper block, as in patching across layers: the whole pass before would have made them right by chance."""
    model, tokens, store = make_bridge("llama"), random_tokens(2, 12), {}
    if later:
        slopes(model, tokens, 2)
    model.blocks[1].mlp.register_forward_hook(lambda _module, _given, output: store.update(x=output))
    model.blocks[2].mlp.register_forward_hook(lambda _module, _given, output: output + store["x"])
    found = slopes(model, tokens, 2)
    assert shorter_passes._begins[model][2][1] is None
    again = slopes(model, tokens, 2)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


ROWS, COLUMNS = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([7, 2, 10, 1, 11])


def losses(model, tokens):
    return Passes(model, tokens, torch.ones_like(tokens, dtype=torch.bool)).losses_without(ROWS, COLUMNS)


@pytest.mark.many
@pytest.mark.parametrize("family", HERE, ids=lambda f: f"{f.kind}: {f.name}")
def test_losses_from_the_column_on_are_those_of_whole_passes(family, monkeypatch):
    model, tokens = model_of(family.name, family.kind), random_tokens(2, 12)
    short = losses(model, tokens)
    monkeypatch.setattr(door.Prefixes, "can", lambda _model: False)
    torch.testing.assert_close(short, losses(model, tokens), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.many
@pytest.mark.parametrize("family", [f for f in HERE if f.kind == "bridge"], ids=lambda f: f.name)
def test_rounding_is_far_below_the_difference_that_is_refused(family, monkeypatch):
    """The proof holds in every family that takes a cache, and by a factor of ten or more."""
    model, tokens, apart = model_of(family.name, family.kind), random_tokens(2, 12), []
    real = torch.allclose

    def watched(one, other, **limits):
        apart.append(float(((one - other).abs() / (1 + other.abs())).max()))
        return real(one, other, **limits)

    monkeypatch.setattr(passes.torch, "allclose", watched)
    losses(model, tokens)
    assert all(each < passes._SAME / 10 for each in apart)


def test_tokens_before_the_column_are_computed_once():
    model, tokens = make_bridge("llama"), random_tokens(2, 12)
    losses(model, tokens)
    lengths = seen(model, 1)
    losses(model, tokens)
    # The proof's whole pass, the one that keeps keys and values, the proof, and all five from the first column on.
    assert lengths[-4:] == [12, 12, 11, 11]


@pytest.mark.parametrize("place", [5, 11])
def test_a_model_that_counts_places_by_itself_is_passed_whole(place):
    """A hook of the user's that changes one place of whole sequences: in passes over the rest it would change another, or fail."""
    model, tokens = make_bridge("llama"), random_tokens(2, 12)

    def steer(_module, _given, states):
        changed = states.clone()
        changed[:, place] += 1
        return changed

    point = model.hook_dict[door.point_name("resid_post", 0)]
    getattr(point, "_target", point).register_forward_hook(steer)
    found = losses(model, tokens)
    passes = Passes(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    with door.measuring(model):
        assert torch.equal(found[:, 1:], passes._whole_without(ROWS, COLUMNS))


@pytest.mark.parametrize("error", shorter_passes.CANNOT)
def test_whatever_a_model_raises_its_passes_are_whole(error, monkeypatch):
    """Of both kinds of shorter passes: a block that is not there, and a cache that it does not take."""
    model, tokens = make_bridge("llama"), random_tokens(2, 12)
    expected, whole = slopes(model, tokens), losses(model, tokens)

    def refused(*_args, **_options):
        raise error("no")

    shorter_passes._begins.pop(model, None)
    monkeypatch.setattr(shorter_passes, "form_of_answers", refused)
    monkeypatch.setattr(door.Prefixes, "go_on", refused)
    for got, wanted in zip((*slopes(model, tokens), losses(model, tokens)), (*expected, whole), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_coarse_formats_are_passed_whole():
    model = make_bridge("llama")
    assert door.Prefixes.can(model)
    assert not door.Prefixes.can(model.to(torch.bfloat16))
