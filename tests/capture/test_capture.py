"""A capture's states and rows are the model's own, read in one pass."""

import gc
import weakref

import pytest
import torch

import basin_lens as bl
from basin_lens.capture import fill_columns
from basin_lens.errors import CaptureError, TextError
from basin_lens.texts import tokenize
from tests.capture.readers import (
    BOTH,
    MAKERS,
    RAGGED,
    assert_columns,
    assert_same,
    assert_states,
    counting,
    own_states,
    padded,
    token_analyzers,
)
from tests.conftest import TEXTS, make_bridge, random_tokens

# -- states ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("maker", MAKERS)
def test_states_are_the_models_own(maker):
    model, tokens = maker(), random_tokens(5, 11)
    capture = bl.Capture.from_texts(model, tokens, batch_size=2, progress=False)
    assert capture.layers == (0, 1, 2)
    assert_states(capture, own_states(model, tokens.tolist()))


@pytest.mark.many
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_states_of_texts_of_unequal_length(reader, batch_size):
    passages = [bl.Passage(text) for text in ("short", *TEXTS, "one more")]
    sequences = [s.tokens for s in tokenize(reader, passages, max_length=30)]
    assert len({len(s) for s in sequences}) > 2
    capture = bl.Capture.from_texts(reader, passages, max_length=30, batch_size=batch_size, progress=False)
    assert [s.tokens for s in capture.sequences] == sequences
    assert_states(capture, own_states(reader, sequences))


def test_states_with_learned_positions(tokenizer):
    """Padding and batching must not shift GPT-2's positions."""
    model = make_bridge("gpt2", tokenizer=tokenizer)
    capture = bl.Capture.from_texts(model, ["tiny", *TEXTS], batch_size=4, progress=False)
    assert_states(capture, own_states(model, [s.tokens for s in capture.sequences]))


@pytest.mark.many
@pytest.mark.parametrize("maker", MAKERS)
def test_right_padding_never_reaches_real_tokens(maker):
    model = maker()
    tokens, mask = padded(RAGGED)
    _, cache = model.run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, cache, attention_mask=mask)
    assert_states(capture, own_states(model, RAGGED))


def test_states_are_owned_detached_float32():
    model = make_bridge("llama").to(torch.bfloat16)
    capture = bl.Capture.from_texts(model, random_tokens(), progress=False)
    for states in (capture.resid_pre(1), capture.resid_post(1)):
        assert states.dtype == torch.float32
        assert not states.requires_grad
        assert states.device.type == "cpu"
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert capture.resid_pre(0).untyped_storage().data_ptr() not in weights


@pytest.mark.parametrize("layers", [[1], [0, 2], [2, 0, 2], [-1], (0, 1, 2)])
def test_some_layers(llama, capture, layers):
    some = bl.Capture.from_texts(llama, TEXTS, layers=layers, progress=False)
    assert some.layers == tuple(sorted({layer % 3 for layer in layers}))
    for layer in some.layers:
        assert_same(some.resid_pre(layer), capture.resid_pre(layer))
        assert_same(some.resid_post(layer), capture.resid_post(layer))


def test_layer_that_was_not_captured(llama):
    some = bl.Capture.from_texts(llama, TEXTS[:2], layers=[2], progress=False)
    with pytest.raises(CaptureError, match=r"holds layers \[2\]"):
        some.resid_pre(0)


# -- rows ------------------------------------------------------------------------------------------------------------------------------


def test_rows_follow_the_sequences():
    tokens, mask = padded(RAGGED)
    model = make_bridge("llama")
    _, cache = model.run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, cache, attention_mask=mask)
    cells = [(seq, pos) for seq, sequence in enumerate(RAGGED) for pos in range(len(sequence))]
    assert capture.n_rows == len(cells)
    assert list(zip(capture.row_seq.tolist(), capture.row_pos.tolist(), strict=True)) == cells
    assert [capture.row_of(seq, pos) for seq, pos in cells] == list(range(len(cells)))
    assert capture.row_token.tolist() == [RAGGED[seq][pos] for seq, pos in cells]
    assert torch.nonzero(capture.valid).tolist() == [list(cell) for cell in cells]
    assert capture.valid.shape == tokens.shape


@pytest.mark.parametrize(("seq", "pos"), [(-1, 0), (6, 0), (0, -1), (0, 1000)])
def test_row_of_no_token(capture, seq, pos):
    with pytest.raises(CaptureError, match=f"got seq={seq}, pos={pos}"):
        capture.row_of(seq, pos)


def test_a_padding_like_token_is_a_token(llama):
    """Validity comes from lengths and the mask, never from token ids: the tokenizer's padding id may well be in the text."""
    pad = llama.tokenizer.pad_token_id
    tokens = torch.tensor([[5, pad, pad, 7], [8, 9, pad, pad]])
    with pytest.raises(TextError, match="sequence 1 that ends with 2 of the padding token"):
        bl.Capture.from_texts(llama, tokens, progress=False)
    capture = bl.Capture.from_texts(llama, tokens, attention_mask=torch.ones_like(tokens), progress=False)
    assert bool(capture.valid.all())
    assert_states(capture, own_states(llama, tokens.tolist()))


# -- one pass --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "passes"), [(1, 6), (4, 2), (6, 1), (None, 1)])
def test_one_pass_per_batch(reader, batch_size, passes):
    with counting(reader) as seen:
        bl.Capture.from_texts(reader, TEXTS, batch_size=batch_size, progress=False)
    assert len(seen) == passes


def test_default_batches_are_about_a_thousand_tokens(llama):
    with counting(llama) as seen:
        bl.Capture.from_texts(llama, random_tokens(50, 60), progress=False)
    assert 1 < len(seen) < 50
    assert max(batch * length for batch, length in seen) <= 1024


def test_every_token_passes_once(llama):
    with counting(llama) as seen:
        capture = bl.Capture.from_texts(llama, [" ".join(TEXTS)] * 3, max_length=16, batch_size=4, progress=False)
    assert sum(batch for batch, _ in seen) == len(capture.sequences)
    assert max(length for _, length in seen) == 16


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ([1], {"blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"}),
        ([2], {"blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"}),
        ([0, 1], {"blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"}),
    ],
)
def test_only_what_is_asked_is_read(reader, monkeypatch, layers, names):
    """Hooks go on the borders of the layers asked for, one each, and nowhere else."""
    hooked = []
    register = torch.nn.Module.register_forward_hook

    def remember(module, *args, **kwargs):
        hooked.append(module)
        return register(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", remember)
    bl.Capture.from_texts(reader, TEXTS, layers=layers, progress=False)
    expected = {id(getattr(reader.hook_dict[name], "_target", reader.hook_dict[name])) for name in names}
    assert {id(point) for point in hooked} == expected
    assert len(hooked) == len(expected)


def test_analyzers_are_filled_in_the_same_pass(reader):
    with counting(reader) as seen:
        capture = bl.Capture.from_texts(reader, TEXTS, analyzers=token_analyzers(), batch_size=2, progress=False)
        assert len(seen) == 3
        assert fill_columns(reader, capture, token_analyzers(), progress=False) == []
        assert len(seen) == 3
    assert capture.columns.keys() == {a.key for a in token_analyzers()}


def test_analyzers_asked_later_read_again_once(reader):
    together = bl.Capture.from_texts(reader, TEXTS, analyzers=token_analyzers(), progress=False)
    later = bl.Capture.from_texts(reader, TEXTS, progress=False)
    with counting(reader) as seen:
        again = fill_columns(reader, later, token_analyzers(), progress=False)
    assert len(seen) == 1
    # States are there already: their norm and entropy need no pass.
    needing = [a.key for a in token_analyzers() if not a.needs <= {"resid_pre"}]
    assert again == needing
    assert_columns(later, together)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_analyzers_do_not_see_the_batching(reader, batch_size):
    """Padding and the other texts of a batch change no measured value."""
    texts = ["a short one", *TEXTS]
    one = bl.Capture.from_texts(reader, texts, analyzers=token_analyzers(), progress=False)
    other = bl.Capture.from_texts(reader, texts, analyzers=token_analyzers(), batch_size=batch_size, progress=False)
    assert_columns(other, one)


def test_analyzers_at_some_layers_only(reader):
    full = bl.Capture.from_texts(reader, TEXTS, analyzers=token_analyzers(), progress=False)
    some = bl.Capture.from_texts(reader, TEXTS, layers=[1], analyzers=token_analyzers(), progress=False)
    for analyzer in token_analyzers():
        layer = 1 if analyzer.per_layer else 0
        for name, values in full.columns[analyzer.key].items():
            got = some.columns[analyzer.key][name]
            torch.testing.assert_close(got[layer], values[layer], rtol=1e-4, atol=1e-5, equal_nan=True)
            if analyzer.per_layer:
                assert bool(got[[0, 2]].isnan().all())


@pytest.mark.parametrize(("gradients", "analyzer"), [(False, bl.analyzers.Surprisal()), (True, bl.analyzers.GradientNorm())])
def test_a_graph_is_built_only_for_gradients(reader, gradients, analyzer):
    """Without them a pass of a large model would hold every intermediate state."""
    seen = []
    handle = reader.blocks[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        bl.Capture.from_texts(reader, TEXTS, analyzers=[analyzer], progress=False)
    finally:
        handle.remove()
    outputs = [output[0] if isinstance(output, tuple) else output for output in seen]
    assert outputs
    assert all(output.requires_grad is gradients for output in outputs)


def test_unknown_hook_point_is_named(llama):
    class NeedsMore(bl.analyzers.StateNorm):
        needs = frozenset({"mlp.hook_nowhere"})

    with counting(llama) as seen, pytest.raises(CaptureError, match=r"blocks\.0\.mlp\.hook_nowhere"):
        bl.Capture.from_texts(llama, TEXTS, analyzers=[NeedsMore()], progress=False)
    assert seen == []


# -- ownership -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_a_capture_keeps_neither_model_nor_cache_alive(kind):
    model, tokens = (kind or (lambda: make_bridge("llama")))(), random_tokens(3, 8)
    logits, cache = model.run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, cache)
    fill_columns(model, capture, [bl.analyzers.StateNorm(), bl.analyzers.AttentionReceived()], progress=False)
    kept = {name: weakref.ref(value) for name, value in cache.items()}
    gone = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    del cache, logits, model
    gc.collect()
    assert [name for name, ref in kept.items() if ref() is not None] == []
    assert all(ref() is None for ref in gone)
    assert bool(capture.resid_pre(0).isfinite().all())


@pytest.mark.parametrize("kind", BOTH)
def test_a_capture_from_texts_keeps_no_model_alive(kind):
    model = (kind or (lambda: make_bridge("llama")))()
    capture = bl.Capture.from_texts(model, random_tokens(), analyzers=token_analyzers(), progress=False)
    gone = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    del model
    gc.collect()
    assert all(ref() is None for ref in gone)
    assert capture.n_rows > 0


def test_a_changed_cache_changes_no_capture(llama):
    tokens = random_tokens(3, 8)
    _, cache = llama.run_with_cache(tokens)
    capture = bl.Capture.from_cache(llama, tokens, cache)
    analyzers = [bl.analyzers.Surprisal(), bl.analyzers.AttentionReceived()]
    before = bl.Capture.from_texts(llama, tokens, analyzers=analyzers, progress=False)
    for value in cache.values():
        value.fill_(7)
    tokens.fill_(3)
    assert_states(capture, [before.resid_pre(layer) for layer in range(3)] + [before.resid_post(2)])
    fill_columns(llama, capture, analyzers, progress=False)
    assert_columns(capture, before)
    assert capture.row_token.tolist() == before.row_token.tolist()


def test_parameters_get_no_gradients(reader):
    bl.Capture.from_texts(reader, TEXTS, analyzers=token_analyzers(), progress=False)
    assert all(p.grad is None for p in reader.parameters())


# -- the model of a capture ------------------------------------------------------------------------------------------------------------


def test_a_capture_knows_its_model(llama, capture):
    capture.check_model_is(llama)
    assert capture.model["layers"] == 3
    assert capture.model["width"] == 32


def test_changed_weights_are_another_model(tokenizer):
    model = make_bridge("llama", tokenizer=tokenizer)
    capture = bl.Capture.from_texts(model, TEXTS[:2], progress=False)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(CaptureError, match="capture again"):
        capture.check_model_is(model)
