"""Captures hold the model's own states, read in one pass, and leave model, cache and disk as they found them."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

import basin_lens as bl
from basin_lens.capture import fill_columns, read_states, reference_capture, subset
from basin_lens.errors import CaptureError, StoreError, TextError
from basin_lens.texts import TaggedPassage, Word, reference_passages, tokenize
from tests.conftest import TEXTS, TINY, hooked_lane, make_bridge, make_hooked, random_tokens

MAKERS = [
    *(pytest.param(lambda name=name: make_bridge(name), id=name) for name in TINY),
    pytest.param(make_hooked, id="hooked", marks=hooked_lane),
]
# Unequal lengths, each alone in no batch: the reference below never pads.
RAGGED = [[5, 9, 3, 17, 40, 8, 90, 11, 2, 33], [7, 7, 12], [100, 20, 30, 4, 5, 6], [3, 4], [55, 3, 100, 9, 8, 7]]


def with_tokenizer(maker, tokenizer):
    """A model of either class that can read texts."""
    if maker is make_hooked:
        model = make_hooked(d_vocab=len(tokenizer))
        model.tokenizer = tokenizer
        return model
    return make_bridge("llama", tokenizer=tokenizer)


BOTH = [pytest.param(None, id="bridge"), pytest.param(make_hooked, id="hooked", marks=hooked_lane)]


@pytest.fixture(params=BOTH)
def reader(request, tokenizer):
    """A tiny model with a tokenizer, of either class, to do anything to."""
    return with_tokenizer(request.param, tokenizer)


def padded(sequences, side: str = "right"):
    """Token ids and attention mask `[batch, pos]`."""
    longest = max(map(len, sequences))
    tokens, mask = torch.zeros(2, len(sequences), longest, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        tokens[row, place], mask[row, place] = torch.tensor(sequence), 1
    return tokens, mask


def own_states(model, sequences) -> list[torch.Tensor]:
    """States at every block border from the model's own run_with_cache, one sequence at a time: `[rows, d]` each."""
    count = len(model.blocks)
    pieces = []
    for sequence in sequences:
        _, cache = model.run_with_cache(torch.tensor([list(sequence)]))
        borders = [cache[f"blocks.{layer}.hook_resid_pre"][0] for layer in range(count)]
        pieces.append([*borders, cache[f"blocks.{count - 1}.hook_resid_post"][0]])
        for layer in range(count - 1):
            torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_post"][0], borders[layer + 1])
    return [torch.cat([piece[border] for piece in pieces]) for border in range(count + 1)]


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the states' scale: another batch shape rounds differently."""
    assert got.shape == expected.shape
    scale = float(expected.square().mean().sqrt())
    assert float((got - expected).abs().max()) <= 1e-5 * scale


def assert_states(capture: bl.Capture, expected: list[torch.Tensor]) -> None:
    for layer in capture.layers:
        assert_same(capture.resid_pre(layer), expected[layer])
        assert_same(capture.resid_post(layer), expected[layer + 1])


def assert_same_capture(got: bl.Capture, expected: bl.Capture) -> None:
    for name in ("sequences", "passages", "docs", "labels", "layers", "model", "strings", "settings"):
        assert getattr(got, name) == getattr(expected, name)
    for layer in expected.layers:
        assert torch.equal(got.resid_pre(layer), expected.resid_pre(layer))
        assert torch.equal(got.resid_post(layer), expected.resid_post(layer))
    assert got.columns.keys() == expected.columns.keys()
    for key, columns in expected.columns.items():
        assert got.columns[key].keys() == columns.keys()
        for name, values in columns.items():
            assert torch.equal(got.columns[key][name].nan_to_num(-1), values.nan_to_num(-1))


@contextmanager
def counting(model):
    """Number of passes through block 0 so far, as a list of batch shapes."""
    passes = []
    handle = model.blocks[0].register_forward_hook(
        lambda _module, args, kwargs, _output: passes.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    try:
        yield passes
    finally:
        handle.remove()


def assert_checked_only(seen, tokens) -> None:
    """Through block 0 went what the check of a foreign cache costs, and no more: each token once, one sequence to record the
    block's arguments, and one token before the head."""
    count, length = tokens.shape
    assert sum(batch * pos for batch, pos in seen) <= count * length + length + 1


def hooks_on(model) -> dict[str, int]:
    """Every hook on every module, by name."""
    roots = [model, getattr(model, "original_model", None)]
    modules = {id(m): m for root in roots if root is not None for m in root.modules()}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {f"{key}.{kind}": len(getattr(module, kind)) for key, module in modules.items() for kind in kinds}


class BrokenError(RuntimeError):
    """Raised on purpose in the middle of a pass."""


@contextmanager
def breaking(model, at_pass: int, error: type[BaseException] = BrokenError):
    """The last block raises at the given pass, counted from 1."""
    count = [0]

    def fail(*_):
        count[0] += 1
        if count[0] == at_pass:
            raise error("on purpose")

    handle = model.blocks[-1].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
def test_states_are_the_models_own(maker):
    model, tokens = maker(), random_tokens(5, 11)
    capture = bl.Capture.from_texts(model, tokens, batch_size=2, progress=False)
    assert capture.layers == (0, 1, 2)
    assert_states(capture, own_states(model, tokens.tolist()))


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


# -- rows -------------------------------------------------------------------------------------------------------------


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


# -- one pass ---------------------------------------------------------------------------------------------------------


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


def token_analyzers():
    a = bl.analyzers
    return [a.Surprisal(), a.StateNorm(), a.MatrixEntropy(), a.AttentionReceived(), a.GradientNorm()]


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


def assert_columns(got: bl.Capture, expected: bl.Capture, *keys: str) -> None:
    for key in keys or expected.columns:
        assert got.columns[key].keys() == expected.columns[key].keys()
        for name, values in expected.columns[key].items():
            assert bool(values.isfinite().any())
            torch.testing.assert_close(got.columns[key][name], values, rtol=1e-4, atol=1e-5, equal_nan=True)


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


# -- the user's own cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
def test_from_cache_equals_from_texts(maker):
    model, tokens = maker(), random_tokens(4, 9)
    _, cache = model.run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, cache)
    expected = bl.Capture.from_texts(model, tokens, progress=False)
    assert capture.sequences == expected.sequences
    assert_states(capture, [expected.resid_pre(layer) for layer in range(3)] + [expected.resid_post(2)])


@pytest.mark.parametrize("batched_tokens", [True, False])
@pytest.mark.parametrize("maker", MAKERS)
def test_cache_without_batch_dimension(maker, batched_tokens):
    model, tokens = maker(), random_tokens(1, 9)
    _, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    assert cache["blocks.0.hook_resid_pre"].ndim == 2
    capture = bl.Capture.from_cache(model, tokens if batched_tokens else tokens[0], cache)
    assert_states(capture, own_states(model, tokens.tolist()))
    later = [bl.analyzers.AttentionReceived()]
    fill_columns(model, capture, later, progress=False)
    assert_columns(capture, bl.Capture.from_texts(model, tokens, analyzers=later, progress=False))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side):
    """States and readings of padded runs are those of the sequences alone."""
    model = make_bridge("llama")
    tokens, mask = padded(RAGGED, side)
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    capture = bl.Capture.from_cache(model, tokens, cache, attention_mask=mask)
    assert [list(s.tokens) for s in capture.sequences] == RAGGED
    expected = own_states(model, RAGGED)
    assert_states(capture, expected)
    measured = [bl.analyzers.Surprisal(), bl.analyzers.AttentionReceived(), bl.analyzers.MatrixEntropy()]
    with counting(model) as seen:
        assert fill_columns(model, capture, measured, progress=False) == []
    assert_checked_only(seen, tokens)
    first = 0
    for sequence in RAGGED:
        alone = bl.Capture.from_texts(model, torch.tensor([sequence]), analyzers=measured, progress=False)
        for key, columns in alone.columns.items():
            for name, values in columns.items():
                got = capture.columns[key][name][:, first : first + len(sequence)]
                torch.testing.assert_close(got, values, rtol=1e-4, atol=1e-5, equal_nan=True)
        first += len(sequence)


@hooked_lane
def test_hooked_left_padding():
    model = make_hooked()
    tokens, mask = padded(RAGGED, "left")
    _, cache = model.run_with_cache(tokens, attention_mask=mask, padding_side="left")
    capture = bl.Capture.from_cache(model, tokens, cache, attention_mask=mask)
    assert_states(capture, own_states(model, RAGGED))


@pytest.mark.parametrize(
    ("kept", "layers"),
    [
        (["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"], (1,)),
        (["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"], (0, 1)),
        (["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"], (1, 2)),
        (["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"], (0,)),
    ],
)
@pytest.mark.parametrize("kind", BOTH)
def test_partial_cache(kind, kept, layers):
    model, tokens = (kind or (lambda: make_bridge("llama")))(), random_tokens(3, 8)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in kept)
    capture = bl.Capture.from_cache(model, tokens, cache)
    assert capture.layers == layers
    assert_states(capture, own_states(model, tokens.tolist()))


@pytest.mark.parametrize("kind", BOTH)
def test_partial_readings_are_read_again(kind):
    """A pattern of one layer out of three is not enough: the model runs once more, and the answer is whole."""
    model, tokens = (kind or (lambda: make_bridge("llama")))(), random_tokens(3, 9)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: "resid" in name or name == "blocks.1.attn.hook_pattern")
    capture = bl.Capture.from_cache(model, tokens, cache)
    analyzer = bl.analyzers.AttentionReceived()
    with counting(model) as seen:
        assert fill_columns(model, capture, [analyzer], progress=False) == [analyzer.key]
    assert len(seen) == 1
    assert_columns(capture, bl.Capture.from_texts(model, tokens, analyzers=[analyzer], progress=False))


def test_canonical_names():
    model, tokens = make_bridge("llama"), random_tokens(3, 8)
    _, cache = model.run_with_cache(tokens)
    names = [f"blocks.{layer}.{end}" for layer in range(3) for end in ("hook_in", "hook_out")]
    capture = bl.Capture.from_cache(model, tokens, {name: cache[name] for name in names})
    assert capture.layers == (0, 1, 2)
    assert_states(capture, own_states(model, tokens.tolist()))


def test_texts_give_offsets(reader):
    expected = bl.Capture.from_texts(reader, TEXTS, progress=False)
    tokens, mask = padded([s.tokens for s in expected.sequences])
    _, cache = reader.run_with_cache(tokens)
    capture = bl.Capture.from_cache(reader, tokens, cache, attention_mask=mask, texts=TEXTS)
    assert capture.sequences == expected.sequences
    assert capture.passages == expected.passages
    assert capture.docs == expected.docs


def test_texts_without_bos_give_offsets(llama):
    (sequence,) = tokenize(llama, [bl.Passage(TEXTS[0])], prepend_bos=False)
    tokens = torch.tensor(sequence.tokens)
    _, cache = llama.run_with_cache(tokens[None])
    assert bl.Capture.from_cache(llama, tokens, cache, texts=TEXTS[0]).sequences == [sequence]


def test_texts_as_passages_bring_docs_and_labels(llama):
    passage = bl.Passage(TEXTS[0], doc="ferry", labels={"memorized": True}, spans={"what": (4, 9)})
    (sequence,) = tokenize(llama, [passage])
    _, cache = llama.run_with_cache(torch.tensor([sequence.tokens]))
    capture = bl.Capture.from_cache(llama, torch.tensor([sequence.tokens]), cache, texts=[passage])
    assert (capture.docs, capture.labels, capture.passages) == (["ferry"], [{"memorized": True}], [passage])


def test_docs_and_labels_of_a_cache(llama):
    tokens = random_tokens(2, 6)
    _, cache = llama.run_with_cache(tokens)
    capture = bl.Capture.from_cache(llama, tokens, cache, docs=["x", "x"], labels=[{"a": 1}, {"a": 2}])
    assert (capture.docs, capture.labels) == (["x", "x"], [{"a": 1}, {"a": 2}])


def test_documents_of_their_own_without_docs(llama):
    tokens = random_tokens(3, 6)
    _, cache = llama.run_with_cache(tokens)
    assert len(set(bl.Capture.from_cache(llama, tokens, cache).docs)) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"texts": ["another text", "of two"]}, "text 0 to tokenize to the tokens"),
        ({"texts": ["only one"]}, "one text for each of 2"),
        ({"docs": ["only one"]}, "one document for each of 2"),
        ({"labels": [{}] * 3}, "labels for each of 2"),
        ({"attention_mask": torch.ones(2, 5)}, r"mask of shape \(2, 6\)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])}, "hole"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1]])}, "hole"),
    ],
)
def test_facts_that_do_not_fit_the_cache(llama, changes, said):
    tokens = random_tokens(2, 6)
    _, cache = llama.run_with_cache(tokens)
    with pytest.raises(CaptureError, match=said):
        bl.Capture.from_cache(llama, tokens, cache, **changes)


# -- readings ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Backward hooks on hook_scale")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", BOTH)
def test_readings_need_no_other_pass(kind):
    """Patterns and gradients of run_with_cache(..., incl_bwd=True), and logits of its last state, give what our own pass would."""
    model, tokens = (kind or (lambda: make_bridge("llama")))(), random_tokens(4, 12)
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    analyzers = [bl.analyzers.AttentionReceived(), bl.analyzers.GradientNorm(target="cache"), bl.analyzers.Surprisal()]
    capture = bl.Capture.from_cache(model, tokens, cache)
    with counting(model) as seen:
        assert fill_columns(model, capture, analyzers, progress=False) == []
    assert_checked_only(seen, tokens)
    own = [bl.analyzers.AttentionReceived(), bl.analyzers.GradientNorm(), bl.analyzers.Surprisal()]
    expected = bl.Capture.from_texts(model, tokens, analyzers=own, progress=False)
    assert_columns(capture, expected, *(a.key for a in analyzers if a.target is None))
    # TransformerLens's loss is the mean over predicted tokens; ours is the sum.
    scale = tokens.shape[0] * (tokens.shape[1] - 1)
    got, sums = (c.columns[a.key] for c, a in ((capture, analyzers[1]), (expected, own[1])))
    inner = capture.row_pos < tokens.shape[1] - 1
    for name, values in sums.items():
        torch.testing.assert_close(got[name][:, inner] * scale, values[:, inner], rtol=1e-3, atol=1e-5)


def test_cache_without_gradients_has_none_to_give(llama):
    tokens = random_tokens(2, 6)
    _, cache = llama.run_with_cache(tokens)
    capture = bl.Capture.from_cache(llama, tokens, cache)
    with counting(llama) as seen, pytest.raises(CaptureError, match="incl_bwd=True"):
        fill_columns(llama, capture, [bl.analyzers.GradientNorm(target="cache")], progress=False)
    assert seen == []


# -- ownership --------------------------------------------------------------------------------------------------------


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


# -- disk -------------------------------------------------------------------------------------------------------------


PASSAGES = [
    bl.Passage(TEXTS[0], doc="ferry", labels={"memorized": True, "group": "a"}, spans={"what": (4, 9)}),
    bl.Passage(TEXTS[1] + " 👩‍👩‍👧 \r\n\x00 </script>", labels={"memorized": False}),
    bl.Passage("short one"),
]


def test_save_and_load(reader, tmp_path):
    capture = bl.Capture.from_texts(reader, PASSAGES, layers=[0, 2], analyzers=token_analyzers(), progress=False)
    capture.save(tmp_path / "one")
    loaded = bl.Capture.load(tmp_path / "one")
    assert_same_capture(loaded, capture)
    assert loaded.row_strings() == capture.row_strings()
    loaded.save(tmp_path / "two")
    assert_same_capture(bl.Capture.load(tmp_path / "two"), capture)
    loaded.check_model_is(reader)


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_store_equals_memory(reader, tmp_path, batch_size):
    capture = bl.Capture.from_texts(reader, PASSAGES, analyzers=token_analyzers(), batch_size=batch_size, progress=False)
    stored = bl.Capture.from_texts(
        reader, PASSAGES, analyzers=token_analyzers(), batch_size=batch_size, store=tmp_path / "deep" / "store", progress=False
    )
    assert_same_capture(stored, capture)
    assert_same_capture(bl.Capture.load(tmp_path / "deep" / "store"), capture)


def test_save_and_load_keep_words(llama, tmp_path):
    words = (Word(0, 3, "The", "DET"), Word(4, 9, "ferry", "NOUN"), Word(10, 17, "stopped", "VERB"))
    passages = [
        TaggedPassage("The ferry stopped in October.", doc="a", labels={"n": 1}, spans={"what": (4, 9)}, words=words),
        TaggedPassage("No words are known of this one."),
        bl.Passage(TEXTS[1]),
    ]
    capture = bl.Capture.from_texts(llama, passages, progress=False)
    capture.save(tmp_path / "one")
    loaded = bl.Capture.load(tmp_path / "one")
    assert_same_capture(loaded, capture)
    assert [type(passage) for passage in loaded.passages] == [TaggedPassage, TaggedPassage, bl.Passage]
    assert loaded.passages[0].words == words
    stored = bl.Capture.from_texts(llama, passages, store=tmp_path / "two", progress=False)
    assert_same_capture(stored, capture)
    assert_same_capture(bl.Capture.load(tmp_path / "two"), capture)


def test_some_of_what_is_planned(llama):
    """Sequences chosen before anything is read: still unread, then the same as chosen after."""
    data = [" ".join(TEXTS)] * 2
    planned = bl.Capture.plan(llama, data, layers=[0, 2], max_length=20)
    chosen = [3, 0, 5]
    with counting(llama) as seen:
        part = subset(planned, chosen)
        assert not part.is_read and not planned.is_read
        assert [part.sequences[i].tokens for i in range(3)] == [planned.sequences[i].tokens for i in chosen]
    assert seen == []
    read_states(llama, part, progress=False)
    assert part.is_read and not planned.is_read
    whole = bl.Capture.from_texts(llama, data, layers=[0, 2], max_length=20, progress=False)
    direct = subset(whole, chosen)
    for name in ("sequences", "passages", "docs", "labels", "layers", "model", "strings"):
        assert getattr(part, name) == getattr(direct, name)
    for layer in (0, 2):
        assert_same(part.resid_pre(layer), direct.resid_pre(layer))
        assert_same(part.resid_post(layer), direct.resid_post(layer))


def test_store_is_on_disk(llama, tmp_path):
    """The states are in the folder, one file per batch, and not in memory."""
    stored = bl.Capture.from_texts(llama, TEXTS, batch_size=2, store=tmp_path / "store", progress=False)
    files = list((tmp_path / "store").glob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) >= 4 * stored.n_rows * 32 * 4
    stored.save(tmp_path / "copy")
    for file in files:
        file.unlink()
    with pytest.raises(StoreError, match="without its file states-00000"):
        stored.resid_pre(0)
    assert bool(bl.Capture.load(tmp_path / "copy").resid_pre(0).isfinite().all())


def test_measuring_later_leaves_the_store_alone(llama, tmp_path):
    """A pass for analyzers only writes no states again."""
    stored = bl.Capture.from_texts(llama, TEXTS, batch_size=2, store=tmp_path / "store", progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    fill_columns(llama, stored, token_analyzers(), progress=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    assert_columns(stored, bl.Capture.from_texts(llama, TEXTS, analyzers=token_analyzers(), progress=False))


def test_loaded_readings_need_no_pass(tmp_path):
    model, tokens = make_bridge("llama"), random_tokens(3, 9)
    _, cache = model.run_with_cache(tokens)
    bl.Capture.from_cache(model, tokens, cache).save(tmp_path / "one")
    loaded = bl.Capture.load(tmp_path / "one")
    analyzers = [bl.analyzers.Surprisal(), bl.analyzers.AttentionReceived()]
    with counting(model) as seen:
        assert fill_columns(model, loaded, analyzers, progress=False) == []
    assert_checked_only(seen, tokens)
    assert_columns(loaded, bl.Capture.from_texts(model, tokens, analyzers=analyzers, progress=False))


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize("at_pass", [1, 3])
def test_interrupted_store_leaves_nothing(llama, tmp_path, at_pass, error):
    with pytest.raises(error), breaking(llama, at_pass, error):
        bl.Capture.from_texts(llama, TEXTS, batch_size=1, store=tmp_path / "store", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_cannot_be_written_leave_nothing(llama, tmp_path):
    capture = bl.Capture.from_texts(llama, TEXTS[:1], progress=False)
    capture.labels = [{"what": object()}]
    with pytest.raises(StoreError, match="labels that JSON can hold"):
        capture.save(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_saving_never_overwrites(capture, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(StoreError, match="which exists"):
        capture.save(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("content", [None, "{}", "no json", '{"format": 99}'])
def test_loading_something_else(tmp_path, content):
    if content is not None:
        (tmp_path / "capture.json").write_text(content)
    with pytest.raises(StoreError, match="expected"):
        bl.Capture.load(tmp_path)


def test_a_loaded_capture_can_be_analyzed(llama, capture, tmp_path):
    capture.save(tmp_path / "one")
    analyzers = [bl.analyzers.Compression(k=5)]
    captures = bl.Capture.load(tmp_path / "one"), capture
    got, expected = (bl.analyze(llama, c, analyzers, layers=[1], progress=False) for c in captures)
    assert got.compression.notna().any()
    assert got.compression.equals(expected.compression)


# -- hooks ------------------------------------------------------------------------------------------------------------


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

    before = hooks_on(llama)
    with pytest.raises(BrokenError):
        bl.Capture.from_texts(llama, TEXTS, analyzers=[Breaks()], progress=False)
    assert hooks_on(llama) == before


# -- the state of the model -------------------------------------------------------------------------------------------


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


# -- the model of a capture -------------------------------------------------------------------------------------------


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


# -- the reference bank -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def few_passages(monkeypatch):
    """What is kept of the bank, and when, is the same for twelve passages as for all."""
    monkeypatch.setattr("basin_lens.capture.reference.reference_passages", lambda: reference_passages()[:12])


def test_reference_is_made_once(reader, folder):
    first = reference_capture(reader, progress=False)
    with counting(reader) as seen:
        second = reference_capture(reader, progress=False)
    assert seen == []
    assert len(list(folder.iterdir())) == 1
    assert_same_capture(second, first)
    assert second.passages == list(reference_passages())


@pytest.mark.slow
def test_reference_holds_the_models_states(llama, folder):  # noqa: ARG001 - sets the cache folder
    bank = reference_capture(llama, progress=False)
    sequences = [s.tokens for s in bank.sequences]
    expected = own_states(llama, sequences[:3])
    rows = sum(map(len, sequences[:3]))
    assert_same(bank.resid_pre(1)[:rows], expected[1])


@pytest.mark.usefixtures("few_passages")
def test_the_slower_of_two_that_make_the_reference_takes_the_others(llama, folder, monkeypatch):
    real, made = bl.Capture.from_texts, []

    def twice(*given, **options):
        made.append(real(*given, **options))
        return real(*given, **options)

    monkeypatch.setattr(bl.Capture, "from_texts", twice)
    assert_same_capture(reference_capture(llama, progress=False), made[0])
    assert len(list(folder.iterdir())) == 1


@pytest.mark.usefixtures("few_passages")
def test_another_model_has_another_reference(llama, tokenizer, folder):
    reference_capture(llama, progress=False)
    other = make_bridge("llama", seed=5, tokenizer=tokenizer)
    bank = reference_capture(other, progress=False)
    assert len(list(folder.iterdir())) == 2
    bank.check_model_is(other)


@pytest.mark.usefixtures("few_passages")
def test_reference_with_and_without_bos_are_two(llama, folder):
    banks = [reference_capture(llama, prepend_bos=bos, progress=False) for bos in (True, False)]
    assert len(list(folder.iterdir())) == 2
    assert [bank.sequences[0].tokens[0] == llama.tokenizer.bos_token_id for bank in banks] == [True, False]


@pytest.mark.usefixtures("few_passages")
def test_interrupted_reference_leaves_nothing(llama, folder):
    with pytest.raises(BrokenError), breaking(llama, 2):
        reference_capture(llama, progress=False)
    assert list(folder.iterdir()) == []
    assert reference_capture(llama, progress=False).n_rows > 0
