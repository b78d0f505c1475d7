"""The check of transport, and models in any state."""

import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import TransportError
from basin_lens.transport import PatchedBlock, Probe, check, proof, solo_images
from tests.conftest import (
    TEXTS,
    TINY,
    hooked_lane,
    make_bridge,
    make_hooked,
    make_tokenizer,
    random_tokens,
    replace_in_all_rooms,
)
from tests.transport.routes import EXACT, LAYERS, World, build, queries_of, rows_for, world

A = bl.analyzers


# -- the check -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("layer", LAYERS)
def test_check_passes_and_reports_its_error(any_world, layer):
    assert 0 <= any_world.check(layer) < EXACT


@pytest.mark.many
@pytest.mark.parametrize("name", TINY)
def test_check_of_the_shortest_sequences(name):
    """Two tokens: one place to put a state, and nothing but position 0 before it."""
    model = make_bridge(name)
    capture = bl.Capture.from_texts(model, random_tokens(3, 2), progress=False)
    w = World(model, capture, Probe(model, 2))
    assert w.check(1) < EXACT


def test_errors_are_held_against_states_beyond_position_0(any_world, monkeypatch):
    """However many sequences of one token come first: as many states as are wanted, and never none."""
    monkeypatch.setattr(proof, "_SCALE_ROWS", 1)
    assert 0 <= any_world.check(1) < 100 * EXACT


@pytest.mark.many
@pytest.mark.parametrize("patched", [True, False])
def test_check_refuses_a_capture_of_another_model(any_world, patched):
    w = any_world
    other = make_bridge(w.model.original_model.config.model_type.replace("gpt_", ""), seed=1, tokenizer=w.model.tokenizer)
    block = PatchedBlock(other, w.capture, 1, Probe(other, w.probe.length), w.capture.resid_pre(1))
    with pytest.raises(TransportError, match="same model"):
        check(other, w.capture, block, w.capture.resid_post(1), others=w.inner(1), patched=patched)


def take_the_querys_own_key(monkeypatch):
    """A wrong route: a row attends to the query's cached key and value in place of its own."""
    prefix = PatchedBlock._prefix

    def one_more(self, seqs, seen, rows):
        return prefix(self, seqs, seen + 1, rows)

    def mask_own_row(self, mask, positions, seen):  # noqa: ARG001
        lowest = torch.finfo(mask.dtype).min
        own = torch.full((positions.shape[1],) * 2, lowest).expand(len(positions), -1, -1)
        return torch.cat([mask[0, 0][positions][..., : seen + 1], own], dim=2)[:, None]

    monkeypatch.setattr(PatchedBlock, "_prefix", one_more)
    monkeypatch.setattr(PatchedBlock, "_pack_mask", mask_own_row)


def leave_the_own_column(monkeypatch):
    """A wrong route: a row attends to its own key, and to that of the token whose place it takes."""

    def unmasked(self, mask, positions, seen):  # noqa: ARG001
        own = torch.full((positions.shape[1],) * 2, torch.finfo(mask.dtype).min).fill_diagonal_(0)
        return torch.cat([mask[0, 0][positions][..., :seen], own.expand(len(positions), -1, -1)], dim=2)[:, None]

    monkeypatch.setattr(PatchedBlock, "_pack_mask", unmasked)


def see_each_other(monkeypatch):
    """A wrong route: the rows of a call attend to one another."""
    pack_mask = PatchedBlock._pack_mask

    def open_(self, mask, positions, seen):
        packed = pack_mask(self, mask, positions, seen).clone()
        packed[..., seen:] = 0
        return packed

    monkeypatch.setattr(PatchedBlock, "_pack_mask", open_)


@pytest.mark.many
@pytest.mark.parametrize("layer", LAYERS)
def test_the_self_pass_alone_would_not_see_a_wrong_key(packed_world, monkeypatch, layer):
    w = packed_world
    query = torch.tensor([w.capture.row_of(0, 9)])
    own, foreign = w.capture.resid_pre(layer)[query][:, None], w.inner(layer)[None, 60:61]
    expected = w.block(layer, "R1")(query, foreign)
    take_the_querys_own_key(monkeypatch)
    block = w.block(layer)
    assert w.error(layer, block(query, own)[0], w.capture.resid_post(layer)[query]) < EXACT
    assert w.error(layer, block(query, foreign), expected) > 100 * EXACT
    with pytest.raises(TransportError, match="agree with R1"):
        w.check(layer)


@pytest.mark.many
@pytest.mark.parametrize("wrong", [leave_the_own_column, see_each_other])
def test_check_sees_every_wrong_mask(packed_world, monkeypatch, wrong):
    """Whatever the seed, for a mistake that shows when queries of different positions are packed together."""
    w, layer = packed_world, 1
    queries = torch.tensor([w.capture.row_of(0, 3), w.capture.row_of(0, 9)])
    points = w.inner(layer)[None, 60:62].expand(2, -1, -1)
    expected = w.block(layer, "R1")(queries, points)
    wrong(monkeypatch)
    assert w.error(layer, w.block(layer)(queries, points), expected) > 100 * EXACT
    for seed in range(3):
        with pytest.raises(TransportError):
            w.check(layer, seed=seed)


def test_check_sees_wrong_positions(monkeypatch):
    """Rotary tables taken at another place than the query's."""
    w = world("llama")
    pack_call = PatchedBlock._pack_call

    def one_earlier(self, seqs, positions, points):
        return pack_call(self, seqs, (positions - 1).clamp_min(0), points)

    monkeypatch.setattr(PatchedBlock, "_pack_call", one_earlier)
    with pytest.raises(TransportError):
        w.check(1)


def test_check_holds_the_whole_route_against_the_rerun(monkeypatch):
    w = world("bloom")
    rerun = door.rerun_with_state
    replace_in_all_rooms(monkeypatch, "rerun_with_state", lambda *given, **options: rerun(*given, **options) * 1.01)
    with pytest.raises(TransportError, match="agree with R0"):
        w.check(1)


def test_analyze_checks_every_layer_it_uses(capture, llama):
    table = bl.analyze(llama, capture, [A.Contraction(k=4)], layers=[0, 2], progress=False)
    (facts,) = table.attrs["provenance"].values()
    assert facts["routes"] == {"0": "R2", "2": "R2"}
    assert set(facts["check_error"]) == {"0", "2"}
    assert max(facts["check_error"].values()) < EXACT


# -- models in any state ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half():
    return build(make_bridge("llama", tokenizer=make_tokenizer()).to(torch.bfloat16))


@pytest.mark.parametrize("layer", LAYERS)
def test_bfloat16_passes_the_check(half, layer):
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert half.capture.resid_pre(layer).dtype == half.capture.resid_post(layer).dtype == torch.float32
    assert max(half.check(layer, seed=seed) for seed in range(3)) < 2e-2


def test_bfloat16_still_refuses_another_model(half):
    other = make_bridge("llama", seed=1, tokenizer=half.model.tokenizer).to(torch.bfloat16)
    block = PatchedBlock(other, half.capture, 1, Probe(other, half.probe.length), half.capture.resid_pre(1))
    with pytest.raises(TransportError, match="same model"):
        check(other, half.capture, block, half.capture.resid_post(1), others=half.inner(1))


@pytest.mark.many
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_training_mode_and_sdpa_attention(name):
    """Dropout and the other attention kernels are off for the measurement and on again after it."""
    model = make_bridge(name, tokenizer=make_tokenizer())
    model.original_model.set_attn_implementation("sdpa")
    model.train()
    w = build(model)
    assert w.block(1).route == "R2"
    assert w.check(1) < EXACT
    reference = world(name).capture.resid_post(1)
    assert w.error(1, w.capture.resid_post(1), reference) < EXACT
    assert all(module.training for module in model.modules())
    assert model.original_model.config._attn_implementation == "sdpa"


@pytest.mark.many
@pytest.mark.parametrize("name", TINY)
def test_user_hooks_stay_and_act(name):
    """What the user attached is part of the model: every route runs with it, and it is still there afterwards."""
    model = make_bridge(name, tokenizer=make_tokenizer())
    plain = build(model)
    seen = []

    def ablate(value, hook):  # noqa: ARG001
        seen.append(value.shape)
        return value * 0.25

    model.add_hook("blocks.1.hook_mlp_out", ablate)
    w = build(model)
    queries = queries_of(w.capture).clamp_max(w.capture.n_rows - 1)
    points = w.capture.resid_pre(1)[rows_for(w.capture, queries, 3)]
    images_ = w.block(1)(queries, points)
    assert w.error(1, images_, w.oracle(1, queries, points)) < EXACT
    assert w.check(1) < EXACT
    model.reset_hooks()
    assert plain.error(1, images_, plain.block(1)(queries, points)) > 100 * EXACT
    assert seen
    with pytest.raises(TransportError, match="same hooks"):
        w.check(1)


def hooks_on(model):
    modules = {id(m): m for root in (model, model.original_model) for m in root.modules()}.values()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)


@pytest.mark.many
@pytest.mark.parametrize(
    "use",
    [
        lambda w: door.record_calls(w.model, w.tokens(0)[None]),
        lambda w: door.record_calls(w.model, w.tokens(0)[None], only_first=True),
        lambda w: door.rerun_with_state(w.model, w.tokens(0), 1, 2, w.inner(1)[:2]),
        lambda w: w.check(1),
        lambda w: bl.analyze(w.model, TEXTS, [A.Contraction(k=4), A.GradientNorm()], progress=False),
        lambda w: bl.analyze(w.model, w.capture, [A.Contraction(k=4)], progress=False),
    ],
    ids=["record", "record by the first block", "rerun", "check", "texts", "capture"],
)
def test_nothing_is_left_after_an_error_inside_a_block(use):
    w = build(make_bridge("gpt2", tokenizer=make_tokenizer()))
    w.model.train()
    before = hooks_on(w.model)

    def stumble(*_):
        raise FloatingPointError("inside the block")

    handle = w.model.blocks[1].register_forward_hook(stumble)
    with pytest.raises(FloatingPointError, match="inside the block"):
        use(w)
    handle.remove()
    assert hooks_on(w.model) == before and not any("forward" in vars(block) for block in w.model.blocks)
    assert all(module.training for module in w.model.modules())
    # Dropout would show if the next measurement believed itself inside the broken one.
    assert w.check(1) < EXACT


@pytest.mark.parametrize("times", [0, 2])
def test_a_block_that_does_not_run_once_is_refused(monkeypatch, times):
    """Recurrent depth, or skipped blocks: the map from layer to layer is not defined."""
    run = door.forward_pass
    monkeypatch.setattr(door.blocks, "forward_pass", lambda *given: [run(*given) for _ in range(times)])
    with pytest.raises(TransportError, match=f"got {times} times"):
        door.record_calls(world("llama").model, random_tokens(1, 6))


# -- HookedTransformer (TransformerLens 3.9) -------------------------------------------------------------------------------------------


def hooked_world(positions):
    """Right-padded sequences of unequal length, through the user's own cache."""
    model = make_hooked(positional_embedding_type=positions)
    tokens = random_tokens(20, 20)
    mask = torch.arange(20)[None] < torch.tensor([20, 20, 6] + [20, 12] * 8 + [9])[:, None]
    _, cache_ = model.run_with_cache(tokens, return_cache_object=False)
    capture = bl.Capture.from_cache(model, tokens, cache_, attention_mask=mask)
    return World(model, capture, Probe(model, int(capture.lengths.max())))


@hooked_lane
@pytest.mark.parametrize("positions", ["rotary", "standard", "alibi"])
class TestHookedTransformer:
    def test_both_routes_are_the_rerun(self, positions):
        w = hooked_world(positions)
        queries = torch.tensor([w.capture.row_of(*at) for at in [(0, 12), (2, 5), (3, 6), (0, 0), (4, 11), (3, 19), (0, 1)]])
        for layer in LAYERS:
            points = w.capture.resid_pre(layer)[rows_for(w.capture, queries, 3)]
            rerun = w.oracle(layer, queries, points)
            assert w.block(layer).route == "R2"
            assert w.error(layer, w.block(layer)(queries, points), rerun) < EXACT
            assert w.error(layer, w.block(layer, "R1")(queries, points), rerun) < EXACT
            assert w.check(layer) < EXACT

    def test_solo_is_a_run_of_one_token(self, positions):
        w = hooked_world(positions)
        states = w.capture.resid_pre(1)[3:9]
        expected = door.rerun_with_state(w.model, w.tokens(0)[:1], 1, 0, states)
        assert w.error(1, solo_images(w.probe, 1, states), expected) < EXACT

    def test_check_refuses_another_model(self, positions):
        w = hooked_world(positions)
        other = make_hooked(seed=1, positional_embedding_type=positions)
        block = PatchedBlock(other, w.capture, 1, Probe(other, w.probe.length), w.capture.resid_pre(1))
        with pytest.raises(TransportError, match="same model"):
            check(other, w.capture, block, w.capture.resid_post(1), others=w.inner(1))

    def test_analyze_works(self, positions):
        model = make_hooked(positional_embedding_type=positions)
        chosen = [
            A.Compression(k=5),
            A.Contraction(k=5, context="solo", name="solo"),
            A.SeedCompression(k=5),
            A.Neighborhood(k=5),
            A.Surprisal(),
            A.StateNorm(),
            A.AttentionReceived(),
            A.GradientNorm(),
            A.MatrixEntropy(),
        ]
        tokens = random_tokens(8, 14)
        table = bl.analyze(model, tokens, chosen, progress=False)
        assert len(table) == 3 * tokens.numel()
        assert table.solo[table.pos > 0].notna().all()
        assert table.compression[table.pos > 0].notna().mean() > 0.5
        (facts,) = table.attrs["provenance"].values()
        assert set(facts["routes"].values()) == {"R2"}
        with torch.no_grad():
            losses = -model(tokens).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        expected = losses.reshape(-1).numpy()
        assert table[(table.layer == 0) & (table.pos > 0)].surprisal.to_numpy() == pytest.approx(expected, abs=1e-4)
