"""Blocks compiled: the layer under the hook points is the same map, the check decides, and what cannot be compiled runs as it is."""

import warnings

import pytest
import torch

import basin_lens as bl
from basin_lens.errors import CompileWarning, ModelError, StoreError
from basin_lens.model import CompiledBlock, compiled
from basin_lens.transport import LayerMaps, PatchedBlock, Probe
from tests.conftest import TEXTS, has_hooked_transformer, hooked_lane, make_hooked, random_tokens
from tests.families import capture_of, families, model_of, served
from tests.transport.routes import EXACT, queries_of, world

# What runs as it is: GPT-Neo, whose blocks cannot be packed either, as the check finds out.
OTHERS = {("bridge", "GPT-Neo")}


def through(given, layer, run):
    """Images of some states in some contexts, by a block that is called in this way."""
    probe = Probe(given.model, int(given.capture.lengths.max()))
    block = PatchedBlock(given.model, given.capture, layer, probe, given.capture.resid_pre(layer))
    block.compiled = run
    queries = queries_of(given.capture)
    return block(queries, given.capture.resid_pre(layer)[queries.flip(0)][:, None].expand(-1, 4, -1).contiguous())


@pytest.mark.skipif(has_hooked_transformer(), reason="the layers of the newer bridge are compiled")
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "bloom"])
def test_the_layer_under_the_hook_points_is_the_same_map(name, monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda: compiled._forward)
    given = world(name)
    for layer in range(3):
        plain = through(given, layer, CompiledBlock(given.model, layer))
        assert given.error(layer, plain, through(given, layer, None)) <= EXACT


@pytest.mark.slow
@pytest.mark.skipif(has_hooked_transformer(), reason="the layers of the newer bridge are compiled")
def test_every_family(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda: compiled._forward)
    found = {}
    for family in families("bridge", "native"):
        if served(family.name, family.kind).refused:
            continue
        model, capture = model_of(family.name, family.kind), capture_of(family.name, family.kind)
        probe = Probe(model, int(capture.lengths.max()), compiles=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompileWarning)
            maps = LayerMaps(model, capture, capture, (probe, probe), 1)
            maps.block(1)
        found[family.kind, family.name] = maps.compiled[1]
    print(*(f"{name}: {said}" for name, said in found.items()), sep="\n")
    assert {name for name, said in found.items() if said is not True} == OTHERS


def scores(model, **options):
    return bl.analyze(model, TEXTS, [bl.analyzers.Contraction(k=4)], layers=[0, 2], max_length=20, progress=False, **options)


def provenance(table):
    return table.attrs["provenance"]["0"] if "0" in table.attrs["provenance"] else next(iter(table.attrs["provenance"].values()))


def test_what_a_compiler_gets_wrong_is_not_used(llama, monkeypatch):
    def wrong(block, states, args, kwargs):
        output = compiled._forward(block, states, args, kwargs)
        return (output[0] if isinstance(output, tuple) else output) * 1.001

    monkeypatch.setattr(compiled, "_compiled", lambda: wrong)
    with pytest.warns(CompileWarning, match="block 0 runs uncompiled: .*own state .* to come back"):
        table = scores(llama, compile=True)
    assert set(provenance(table)["compiled"]) == {"0", "2"}
    assert table["contraction"].equals(scores(llama)["contraction"])


def test_no_compiler_is_said(llama, monkeypatch):
    def none(*_):
        raise torch._dynamo.exc.TorchDynamoException("no gcc\nsecond line")

    import torch._dynamo

    monkeypatch.setattr(compiled, "_compiled", lambda: none)
    with pytest.warns(CompileWarning, match=r"torch.compile stops at this block \(TorchDynamoException: no gcc\)"):
        table = scores(llama, compile=True)
    assert table["contraction"].equals(scores(llama)["contraction"])


def test_a_hook_of_ones_own_is_run(llama):
    """A compiled block would pass it over; that the check may not see it (a hook on some tokens only) is why it is refused."""
    point = llama.blocks[2].hook_out
    point.add_hook(lambda value, hook: value * 1.0)  # noqa: ARG005
    try:
        with pytest.raises(ModelError, match="would not run the hook at hook_out"):
            CompiledBlock(llama, 2)
    finally:
        point.remove_hooks()
    handle = llama.blocks[1].register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ModelError, match="would not run the hook at its end"):
            CompiledBlock(llama, 1)
    finally:
        handle.remove()


def test_nothing_is_said_where_nobody_asked(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert provenance(scores(llama))["compiled"] == {}


def test_the_middle_of_a_block_is_not_compiled():
    given = world("llama")
    with pytest.raises(ModelError, match="read at a hook point"):
        PatchedBlock(given.model, given.capture, 0, given.probe, given.capture.resid_pre(0), until_mid=True, compiled=True)


@hooked_lane
def test_a_hooked_transformer_runs_as_it_is():
    model, tokens = make_hooked(), random_tokens(4, 20)
    given = {"layers": [0, 2], "progress": False}
    with pytest.warns(CompileWarning, match="a HookedTransformer has no layer of transformers"):
        table = bl.analyze(model, tokens, [bl.analyzers.Contraction(k=4)], compile=True, **given)
    assert table["contraction"].equals(bl.analyze(model, tokens, [bl.analyzers.Contraction(k=4)], **given)["contraction"])


@pytest.mark.slow
@pytest.mark.skipif(has_hooked_transformer(), reason="the layers of the newer bridge are compiled")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_blocks_are_exact(name):
    """By the check and beside the model rerun; every layer has what was compiled for the first."""
    from torch._dynamo.utils import counters

    given = world(name)
    probe = Probe(given.model, given.probe.length, compiles=True)
    counters.clear()
    for layer in range(3):
        maps = LayerMaps(given.model, given.capture, given.capture, (probe, probe), layer)
        block = maps.block(layer)
        assert maps.compiled == {layer: True} and block.compiled is not None and maps.errors[layer] <= EXACT
        queries = queries_of(given.capture)
        points = given.inner(layer)[:40].view(10, 4, -1)
        assert given.error(layer, block(queries, points), given.oracle(layer, queries, points)) <= EXACT
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
@pytest.mark.skipif(has_hooked_transformer(), reason="the layers of the newer bridge are compiled")
def test_a_compiled_run(llama, tmp_path):
    """In memory and in a folder; a folder of uncompiled blocks is another run."""
    table = scores(llama, compile=True)
    assert provenance(table)["compiled"] == {"0": True, "2": True}
    torch.testing.assert_close(
        torch.tensor(table["contraction"]), torch.tensor(scores(llama)["contraction"]), rtol=0, atol=1e-4, equal_nan=True
    )
    held = scores(llama, compile=True, out=tmp_path / "run").load()
    assert held["contraction"].equals(table["contraction"])
    with pytest.raises(StoreError, match="compile"):
        scores(llama, out=tmp_path / "run")
