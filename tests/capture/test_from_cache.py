"""A capture of the user's own cache equals one of the texts."""

import pytest
import torch

import basin_lens as bl
from basin_lens.capture import fill_columns
from basin_lens.errors import CaptureError
from basin_lens.texts import tokenize
from tests.capture.readers import (
    BOTH,
    MAKERS,
    RAGGED,
    assert_checked_only,
    assert_columns,
    assert_states,
    counting,
    own_states,
    padded,
)
from tests.conftest import TEXTS, hooked_lane, make_bridge, make_hooked, random_tokens

# -- the user's own cache --------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("maker", MAKERS)
def test_from_cache_equals_from_texts(maker):
    model, tokens = maker(), random_tokens(4, 9)
    _, cache = model.run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, cache)
    expected = bl.Capture.from_texts(model, tokens, progress=False)
    assert capture.sequences == expected.sequences
    assert_states(capture, [expected.resid_pre(layer) for layer in range(3)] + [expected.resid_post(2)])


@pytest.mark.many
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


@pytest.mark.many
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


@pytest.mark.many
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
    with counting(model) as seen, pytest.warns(UserWarning, match="reads the tokens once more"):
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


# -- readings --------------------------------------------------------------------------------------------------------------------------


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
