"""Reading ends at the last border that is asked for: the same states bit for bit, and nothing above it runs."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import basin_lens as bl
from basin_lens.errors import ModelError
from basin_lens.model import forward_pass, n_layers, pass_until, point_name
from tests.conftest import TEXTS, has_hooked_transformer, make_bridge
from tests.families import FAMILIES, LENGTHS, model_of

IDS = [torch.arange(length).add(3 * length).remainder(199).add(5).tolist() for length in LENGTHS]
HERE = [f for f in FAMILIES if (f.kind == "hooked") == has_hooked_transformer() and f.name not in ("T5", "Mamba")]


@contextmanager
def counted(model):
    """How often each block's end was passed, and how often logits were made."""
    passed = Counter()
    points = {layer: point_name("resid_post", layer) for layer in range(n_layers(model))}
    handles = []
    for layer, name in points.items():
        point = getattr(model.hook_dict[name], "_target", model.hook_dict[name])
        handles.append(point.register_forward_hook(lambda *_, layer=layer: passed.update([layer])))
    handles.append(model.unembed.register_forward_hook(lambda *_: passed.update(["logits"])))
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.many
@pytest.mark.parametrize("family", HERE, ids=lambda f: f"{f.kind}: {f.name}")
def test_states_are_those_of_a_whole_pass(family):
    model, layer = model_of(family.name, family.kind), 1
    early = bl.Capture.from_texts(model, IDS, layers=[layer], progress=False)
    whole = bl.Capture.from_texts(model, IDS, layers=[layer], analyzers=[bl.analyzers.Surprisal()], progress=False)
    for border in (layer, layer + 1):
        assert torch.equal(early.border(border), whole.border(border))


def test_no_block_above_the_last_border_runs_and_no_logits(reader):
    model = reader
    bl.Capture.from_texts(model, IDS[:1], layers=[0], progress=False)  # a bridge hooks itself up at its first pass
    with counted(model) as passed:
        bl.Capture.from_texts(model, IDS, layers=[0], progress=False)
    # A bridge's block is done when the next one is entered, where a state is read.
    assert passed["logits"] == 0 and passed[1] == 0 and passed[0] > 0
    with counted(model) as passed:
        bl.Capture.from_texts(model, IDS, layers=[n_layers(model) - 1], progress=False)
    assert passed["logits"] == 0


@pytest.mark.parametrize("analyzer", [bl.analyzers.Surprisal(), bl.analyzers.GradientNorm()], ids=lambda a: type(a).__name__)
def test_who_asks_for_logits_or_gradients_gets_the_whole_pass(reader, analyzer):
    model = reader
    with counted(model) as passed:
        bl.Capture.from_texts(model, IDS, layers=[0], analyzers=[analyzer], progress=False)
    assert passed["logits"] == passed[n_layers(model) - 1] > 0


def test_the_model_is_as_before(reader):
    model = reader
    tokens = torch.tensor(IDS[:1])
    before = forward_pass(model, tokens, {})
    bl.Capture.from_texts(model, IDS, layers=[0], progress=False)
    assert torch.equal(forward_pass(model, tokens, {}), before)


def test_what_is_read_within_blocks_is_read(tokenizer):
    """Attention patterns and a rollout from layer 0 on, up to the border behind the layer asked for."""
    model = make_bridge("llama", tokenizer=tokenizer)
    several = [bl.analyzers.AttentionReceived(), bl.analyzers.AttentionRollout()]
    alone = bl.Capture.from_texts(model, TEXTS, layers=[1], analyzers=several, progress=False)
    beside = bl.Capture.from_texts(model, TEXTS, layers=[1], analyzers=[*several, bl.analyzers.Surprisal()], progress=False)
    for analyzer in several:
        for name, values in alone.columns[analyzer.key].items():
            assert torch.equal(values.nan_to_num(-1), beside.columns[analyzer.key][name].nan_to_num(-1))


def test_a_point_that_is_not_passed_is_refused():
    """A pass that never comes to the point is told from one that ended at it."""
    model, last = make_bridge("llama"), point_name("resid_post", 0)
    model.forward = lambda *_, **__: torch.zeros(1)
    with pytest.raises(ModelError, match="ended without it"):
        pass_until(model, torch.tensor(IDS[:1]), {last: lambda _: None}, last)
