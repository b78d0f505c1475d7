"""Passages, and how they become token sequences with exact offsets."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import basin_lens as bl
from basin_lens.errors import ModelError, TextError
from basin_lens.texts import (
    from_token_ids,
    longest_sequence,
    reference_passages,
    token_strings,
    tokenize,
)
from tests.conftest import TEXTS, make_bridge, random_tokens

AWKWARD = {
    "emoji": "tea 🍵 time",
    "combined emoji": "👩‍👩‍👧‍👦 family 👍🏽",
    "combining accents": "e\u0301te\u0301 nin\u0303o",
    "CRLF": "one\r\ntwo\r\n\r\nthree",
    "tabs": "a\tb\t\tc",
    "NUL": "before\x00after",
    "special token": "the end <|end|> is not <|start|>",
    "script end": "</script><b>bold</b>",
    "right to left": "שלום עולם and العربية",
    "outer spaces": "   spaces around   ",
    "only spaces": "     ",
    "line ends only": "\n\n\n",
    "CJK": "漢字かな交じり文",
    "byte order mark": "\ufeffstart",
    "long": " ".join(TEXTS),
}


@pytest.fixture(scope="module")
def long_text() -> bl.Passage:
    return bl.Passage(" ".join(TEXTS) * 2)


def pieces(model, passage: bl.Passage, max_length: int = 64, prepend_bos: bool = False):
    """Token ids, starts and ends of a passage over all its chunks, BOS left out."""
    rows = [
        row
        for s in tokenize(model, [passage], max_length=max_length, prepend_bos=prepend_bos)
        for row in list(zip(s.tokens, s.starts, s.ends, strict=True))[int(prepend_bos) :]
    ]
    return [list(column) for column in zip(*rows, strict=True)]


def assert_covers(text: str, starts: list[int], ends: list[int]) -> None:
    """The tokens' characters go through the text from end to end: none left out, none out of order."""
    reached, last = 0, 0
    for start, end in zip(starts, ends, strict=True):
        # Several tokens may share one character (emoji); none may start beyond what was covered.
        assert last <= start <= reached
        assert start < end
        last, reached = start, max(reached, end)
    assert reached == len(text)


# -- Passage ----------------------------------------------------------------------------------------------------------


def test_passage_defaults():
    passage = bl.Passage("Paris")
    assert (passage.text, passage.doc, dict(passage.labels), dict(passage.spans)) == ("Paris", None, {}, {})


def test_passage_owns_its_labels_and_spans():
    labels, spans = {"memorized": True}, {"city": (0, 5)}
    passage = bl.Passage("Paris", labels=labels, spans=spans)
    labels["memorized"], spans["city"] = False, (0, 1)
    assert passage.labels == {"memorized": True}
    assert passage.spans == {"city": (0, 5)}


def test_passage_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        bl.Passage("Paris").text = "London"


def test_empty_passage():
    with pytest.raises(TextError, match="at least one character"):
        bl.Passage("")


@pytest.mark.parametrize("span", [(-1, 3), (3, 3), (4, 2), (0, 6), (5, 9)])
def test_span_outside_the_text(span):
    with pytest.raises(TextError, match=r"span 'city' inside the text's 5 characters.*Spans are \[start, end\)"):
        bl.Passage("Paris", spans={"city": span})


def test_span_may_be_the_whole_text():
    assert bl.Passage("Paris", spans={"city": (0, 5)}).spans["city"] == (0, 5)


# -- offsets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_offsets_cover_the_text(llama, text):
    _, starts, ends = pieces(llama, bl.Passage(text))
    assert_covers(text, starts, ends)


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_offsets_point_at_the_token(llama, text):
    """A token that holds whole characters is found at its offsets."""
    tokens, starts, ends = pieces(llama, bl.Passage(text))
    strings = token_strings(llama, tokens)
    whole = [i for i, token in enumerate(tokens) if "\ufffd" not in strings[token]]
    assert [text[starts[i] : ends[i]] for i in whole] == [strings[tokens[i]] for i in whole]


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_tokens_decode_to_the_text(llama, text):
    tokens, _, _ = pieces(llama, bl.Passage(text))
    assert llama.tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=2, max_size=30))
def test_offsets_of_any_text(llama, text):
    tokens, starts, ends = pieces(llama, bl.Passage(text))
    assert_covers(text, starts, ends)
    assert llama.tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


@pytest.mark.real
@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_offsets_of_the_real_tokenizer(real_model, text):
    text = text.replace("<|end|>", "<|im_end|>").replace("<|start|>", "<|endoftext|>")
    tokens, starts, ends = pieces(real_model, bl.Passage(text), max_length=500, prepend_bos=True)
    assert_covers(text, starts, ends)
    strings = token_strings(real_model, tokens)
    whole = [i for i, token in enumerate(tokens) if "\ufffd" not in strings[token]]
    assert [text[starts[i] : ends[i]] for i in whole] == [strings[tokens[i]] for i in whole]


def test_special_tokens_spelled_in_the_text_become_special(llama):
    tokens, starts, ends = pieces(llama, bl.Passage("a <|end|> b"))
    at = tokens.index(llama.tokenizer.eos_token_id)
    assert (starts[at], ends[at]) == (2, 9)


# -- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("max_length", [2, 3, 7, 10, 64])
def test_chunks_lose_and_double_nothing(llama, long_text, max_length, prepend_bos):
    tokenizer = llama.tokenizer
    encoded = tokenizer(long_text.text, add_special_tokens=False, return_offsets_mapping=True)
    assert len(encoded["input_ids"]) > 64
    tokens, starts, ends = pieces(llama, long_text, max_length, prepend_bos)
    assert tokens == encoded["input_ids"]
    assert list(zip(starts, ends, strict=True)) == encoded["offset_mapping"]


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("max_length", [2, 3, 7, 10, 64])
def test_chunks_are_as_long_as_allowed(llama, long_text, max_length, prepend_bos):
    """BOS counted; only the last may be shorter."""
    lengths = [len(s.tokens) for s in tokenize(llama, [long_text], max_length=max_length, prepend_bos=prepend_bos)]
    assert set(lengths[:-1]) == {max_length}
    assert 0 < lengths[-1] <= max_length


def test_every_chunk_starts_with_bos(llama, long_text):
    sequences = tokenize(llama, [long_text], max_length=10, prepend_bos=True)
    assert len(sequences) > 2
    for s in sequences:
        assert (s.tokens[0], s.starts[0], s.ends[0]) == (llama.tokenizer.bos_token_id, -1, -1)


def test_chunks_know_their_passage(llama, long_text):
    passages = [bl.Passage("A short one."), long_text, bl.Passage("Another short one.")]
    owners = [s.passage for s in tokenize(llama, passages, max_length=20)]
    assert owners == [0, *[1] * (len(owners) - 2), 2]
    assert len(owners) > 4


def test_a_text_does_not_depend_on_its_neighbors(llama):
    """No special treatment of the first or last text of a list."""
    passages = [bl.Passage(text) for text in TEXTS]
    together = tokenize(llama, passages)
    assert [s.tokens for s in together] == [tokenize(llama, [p])[0].tokens for p in passages]


def test_the_models_context_is_a_limit(llama, long_text):
    sequences = tokenize(llama, [long_text], max_length=10_000)
    assert max(len(s.tokens) for s in sequences) == llama.cfg.n_ctx
    assert longest_sequence(llama, 10_000) == llama.cfg.n_ctx
    assert longest_sequence(llama, 9) == 9


@pytest.mark.parametrize("max_length", [-3, 0, 1])
def test_max_length_below_two(llama, max_length):
    with pytest.raises(TextError, match=f"at least 2 tokens, got {max_length}"):
        tokenize(llama, [bl.Passage("some text")], max_length=max_length)


# -- BOS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_bos_as_asked(llama, prepend_bos):
    (sequence,) = tokenize(llama, [bl.Passage("the glass")], prepend_bos=prepend_bos)
    assert (sequence.tokens[0] == llama.tokenizer.bos_token_id) is prepend_bos


@pytest.mark.parametrize("default", [True, False])
def test_bos_is_the_models_default(llama, monkeypatch, default):
    monkeypatch.setattr(llama.cfg, "default_prepend_bos", default)
    passage = bl.Passage("the glass")
    assert tokenize(llama, [passage]) == tokenize(llama, [passage], prepend_bos=default)


def test_bos_asked_of_a_tokenizer_without(tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    model = make_bridge("llama", tokenizer=bare)
    assert tokenize(model, [bl.Passage("the glass")])[0].starts[0] == 0
    with pytest.raises(ModelError, match="prepend_bos=False"):
        tokenize(model, [bl.Passage("the glass")], prepend_bos=True)


# -- token ids --------------------------------------------------------------------------------------------------------


def test_token_ids_as_they_are(llama):
    tokens = random_tokens(3, 5)
    sequences = from_token_ids(llama, tokens)
    assert [list(s.tokens) for s in sequences] == tokens.tolist()
    assert [s.passage for s in sequences] == [0, 1, 2]
    assert {*sequences[0].starts, *sequences[0].ends} == {-1}


def test_token_ids_without_batch(llama):
    tokens = random_tokens(1, 5)
    assert from_token_ids(llama, tokens[0]) == from_token_ids(llama, tokens)


def test_token_ids_without_padding(llama):
    tokens = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4]])
    sequences = from_token_ids(llama, tokens, torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool())
    assert [s.tokens for s in sequences] == [(5, 6, 7), (8, 9, 4)]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (torch.rand(2, 3), "LongTensor"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), "LongTensor"),
        (torch.tensor([[3, 10_000]]), r"token ids in \[0, 320\).*another model"),
        (torch.tensor([[3, -1]]), r"token ids in \[0, 320\)"),
        (torch.tensor([[3]]), "at least two tokens, got 1"),
        (torch.zeros(0, 5, dtype=torch.int64), "at least two tokens"),
        (torch.zeros(2, 0, dtype=torch.int64), "at least two tokens"),
        (torch.zeros(1, 65, dtype=torch.int64), "at most 64 tokens.*got 65"),
    ],
)
def test_bad_token_ids(llama, tokens, said):
    with pytest.raises(TextError, match=said):
        from_token_ids(llama, tokens)


def test_model_without_tokenizer():
    with pytest.raises(TextError, match=r"fast tokenizer.*got none.*LongTensor"):
        tokenize(make_bridge("llama"), [bl.Passage("some text")])


# -- strings ----------------------------------------------------------------------------------------------------------


def test_token_strings_keep_the_leading_space(llama):
    tokens = llama.tokenizer(" the glass", add_special_tokens=False)["input_ids"]
    strings = token_strings(llama, tokens)
    assert "".join(strings[t] for t in tokens) == " the glass"


def test_token_strings_without_tokenizer():
    assert token_strings(make_bridge("llama"), [7, 3, 7]) == {3: "<3>", 7: "<7>"}


# -- the built-in passages --------------------------------------------------------------------------------------------


def test_reference_passages_are_many_and_different():
    passages = reference_passages()
    assert len(passages) >= 24
    assert len({p.doc for p in passages}) >= 6
    assert len({p.text for p in passages}) == len(passages)


@pytest.mark.real
def test_reference_passages_have_the_promised_length(real_model):
    lengths = [len(s.tokens) for s in tokenize(real_model, list(reference_passages()), max_length=500, prepend_bos=False)]
    assert len(lengths) == len(reference_passages())
    assert min(lengths) >= 60
    assert max(lengths) <= 200
