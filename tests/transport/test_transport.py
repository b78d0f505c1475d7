"""Three routes give one answer; work is split without a trace; the other contexts."""

import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import TransportError
from basin_lens.transport import PatchedBlock, maps, patched, query_chunks, solo_images
from tests.conftest import (
    TEXTS,
)
from tests.transport.routes import EXACT, LAYERS, WINDOW, queries_of, rows_for, world

# -- three routes, one answer ----------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("layer", LAYERS)
def test_packed_is_whole_is_rerun(packed_world, layer):
    w = packed_world
    assert len(set(w.capture.lengths.tolist())) > 3
    queries = queries_of(w.capture)
    points = w.capture.resid_pre(layer)[rows_for(w.capture, queries, 3)]
    rerun = w.oracle(layer, queries, points)
    assert w.error(layer, w.block(layer, "R2")(queries, points), rerun) < EXACT
    assert w.error(layer, w.block(layer, "R1")(queries, points), rerun) < EXACT


@pytest.mark.parametrize("layer", LAYERS)
def test_alibi_takes_the_whole_route_and_equals_the_rerun(layer):
    w = world("bloom")
    queries = queries_of(w.capture).clamp_max(w.capture.n_rows - 1)
    points = w.capture.resid_pre(layer)[rows_for(w.capture, queries, 3)]
    block = w.block(layer)
    assert block.route == "R1"
    assert w.error(layer, block(queries, points), w.oracle(layer, queries, points)) < EXACT


@pytest.mark.parametrize("layer", LAYERS)
def test_the_fastest_route_is_taken(packed_world, layer):
    assert packed_world.block(layer).route == "R2"
    assert packed_world.probe.reason(layer) == ""


def test_a_block_that_cannot_be_packed_says_why():
    w = world("bloom")
    reason = w.probe.reason(1)
    assert "tensor of shape" in reason
    with pytest.raises(TransportError) as caught:
        w.block(1, "R2")
    assert reason in str(caught.value)
    assert "R1" in str(caught.value)


def test_the_rerun_is_the_models_own_run_with_hooks(any_world):
    """The oracle itself, beside TransformerLens's public functions alone."""
    w, layer, pos = any_world, 1, 4
    tokens, states = w.tokens(0), w.inner(layer)[5:8]
    read = []

    def put(state, hook):  # noqa: ARG001 - TransformerLens's signature
        return torch.cat([state[:, :pos], states[:, None], state[:, pos + 1 :]], dim=1)

    def take(state, hook):  # noqa: ARG001 - TransformerLens's signature
        read.append(state[:, pos])

    hooks = [(f"blocks.{layer}.hook_resid_pre", put), (f"blocks.{layer}.hook_resid_post", take)]
    with torch.no_grad():
        w.model.run_with_hooks(tokens.expand(3, -1), fwd_hooks=hooks)
    torch.testing.assert_close(door.rerun_with_state(w.model, tokens, layer, pos, states), read[0])


def test_the_window_matters():
    """Outside the window the first tokens are out of sight: the routes must agree on that too, not only where nothing is cut."""
    w, layer = world("gemma2"), 0
    query = torch.tensor([w.capture.row_of(0, WINDOW + 3)])
    points = w.inner(layer)[None, 40:43]
    changed = bl.Capture.from_texts(w.model, TEXTS, max_length=20, layers=[layer], progress=False)
    changed._states = {border: states.clone() for border, states in changed._states.items()}
    changed._states[layer][changed.row_of(0, 2)] += 1.0
    block = PatchedBlock(w.model, changed, layer, w.probe, changed.resid_pre(layer))
    assert w.error(layer, block(query, points), w.block(layer)(query, points)) < EXACT
    inside = torch.tensor([w.capture.row_of(0, WINDOW + 1)])
    assert w.error(layer, block(inside, points), w.block(layer)(inside, points)) > 100 * EXACT


@pytest.mark.many
@pytest.mark.parametrize("route", ["R1", "R2"])
def test_many_points_per_query(packed_world, route):
    w, layer = packed_world, 1
    queries = queries_of(w.capture)[:3]
    rows = rows_for(w.capture, queries, 3 * patched._ROWS_PER_GROUP // 2)
    states = w.capture.resid_pre(layer)
    assert w.error(layer, w.block(layer, route).of_rows(states, queries, rows), w.oracle(layer, queries, states[rows])) < EXACT


@pytest.mark.parametrize("route", ["R1", "R2"])
def test_ragged_rows(packed_world, route):
    """-1 stands for no point: its image is zero, and the others' do not change."""
    w, layer = packed_world, 2
    queries = queries_of(w.capture)
    rows = rows_for(w.capture, queries, 7)
    states, block = w.capture.resid_pre(layer), w.block(layer, route)
    full = block.of_rows(states, queries, rows)
    gone = torch.rand(rows.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    gone[2] = True
    ragged = block.of_rows(states, queries, rows.masked_fill(gone, -1))
    assert bool((ragged[gone] == 0).all())
    assert w.error(layer, ragged[~gone], full[~gone]) < EXACT
    assert not block.of_rows(states, queries, torch.full_like(rows, -1)).any()


def test_points_need_not_be_rows(packed_world):
    w, layer = packed_world, 1
    queries = queries_of(w.capture)
    points = torch.randn(len(queries), 4, 32, generator=torch.Generator().manual_seed(5))
    assert w.error(layer, w.block(layer)(queries, points), w.oracle(layer, queries, points)) < EXACT


@pytest.mark.many
@pytest.mark.parametrize("layer", LAYERS)
def test_own_state_comes_back(any_world, layer):
    w = any_world
    queries = torch.arange(w.capture.n_rows)
    images_ = w.block(layer)(queries, w.capture.resid_pre(layer)[:, None])[:, 0]
    assert w.error(layer, images_, w.capture.resid_post(layer)) < EXACT


def test_images_in_context_are_not_native(packed_world):
    """The patched image depends on the query; otherwise every law above could be kept by the native one."""
    w, layer = packed_world, 1
    queries = queries_of(w.capture)
    rows = torch.full((len(queries), 1), w.capture.row_of(3, 9))
    patched = w.block(layer).of_rows(w.capture.resid_pre(layer), queries, rows)[:, 0]
    apart = torch.cdist(patched, patched)[~torch.eye(len(queries), dtype=torch.bool)]
    assert float(apart.min()) > 1e-3


# -- how the work is split -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["R1", "R2"])
def test_order_of_queries_does_not_matter(packed_world, route):
    w, layer = packed_world, 1
    queries = queries_of(w.capture)
    points = w.capture.resid_pre(layer)[rows_for(w.capture, queries, 4)]
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(7))
    block = w.block(layer, route)
    assert w.error(layer, block(queries[order], points[order]), block(queries, points)[order]) < EXACT


@pytest.mark.parametrize("route", ["R1", "R2"])
def test_repeated_queries_get_the_same_answer(packed_world, route):
    w, layer = packed_world, 1
    queries = queries_of(w.capture)[[0, 1, 0, 2, 0]]
    points = w.inner(layer)[None, 10:12].expand(5, -1, -1)
    answers = w.block(layer, route)(queries, points)
    assert w.error(layer, answers[[2, 4]], answers[[0, 0]]) < EXACT


@pytest.mark.many
@pytest.mark.parametrize("route", ["R1", "R2"])
@pytest.mark.parametrize(("rows", "group", "sequences"), [(1, 1, 1), (5, 3, 1), (50, 64, 2)])
def test_splitting_does_not_matter(packed_world, monkeypatch, route, rows, group, sequences):
    w, layer = packed_world, 1
    queries = queries_of(w.capture)
    points = w.capture.resid_pre(layer)[rows_for(w.capture, queries, 5)]
    expected = w.block(layer, route)(queries, points)
    monkeypatch.setattr(patched, "_ROWS_PER_CALL", {"cpu": rows})
    monkeypatch.setattr(patched, "_ROWS_PER_GROUP", group)
    monkeypatch.setattr(patched, "_SEQUENCES_AT_ONCE", sequences)
    assert w.error(layer, w.block(layer, route)(queries, points), expected) < EXACT


@pytest.mark.parametrize(("points", "rows"), [(15, 1024), (15, 4), (1000, 64), (1, 7)])
def test_chunks_hold_every_query_once(points, rows):
    capture = world("llama").capture
    queries = torch.nonzero(capture.row_pos > 0).squeeze(1)
    parts = list(query_chunks(capture, queries, points, rows))
    assert torch.equal(torch.cat(parts).sort().values, queries)
    assert max(len(part) for part in parts) <= max(1, rows // points)


# -- the other contexts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_solo_is_a_run_of_one_token(any_world, layer):
    w = any_world
    states = w.capture.resid_pre(layer)[3:9]
    expected = door.rerun_with_state(w.model, w.tokens(0)[:1], layer, 0, states)
    assert w.error(layer, solo_images(w.probe, layer, states), expected) < EXACT


def test_solo_does_not_depend_on_the_query_or_the_split(monkeypatch):
    w, layer = world("llama"), 1
    queries = queries_of(w.capture)
    rows = rows_for(w.capture, queries, 4)
    expected = solo_images(w.probe, layer, w.capture.resid_pre(layer))
    monkeypatch.setattr(maps, "_SOLO_ROWS", 7)
    assert w.error(layer, w.maps(layer).map("solo").of_rows(queries, rows), expected[rows]) < EXACT


def test_native_is_the_banks_own_output():
    w, layer = world("gpt2"), 1
    post = w.capture.resid_post(layer)
    queries = queries_of(w.capture)
    rows = rows_for(w.capture, queries, 4)
    rows[1, 2] = rows[3, 0] = -1
    got = w.maps(layer).map("native").of_rows(queries, rows)
    assert torch.equal(got[rows >= 0], post[rows[rows >= 0]])
    assert not got[rows < 0].any()


def test_patched_images_are_the_blocks():
    w, layer = world("gpt2"), 1
    queries = queries_of(w.capture)
    rows = rows_for(w.capture, queries, 4)
    expected = w.oracle(layer, queries, w.capture.resid_pre(layer)[rows])
    assert w.error(layer, w.maps(layer).map("patched").of_rows(queries, rows), expected) < EXACT
