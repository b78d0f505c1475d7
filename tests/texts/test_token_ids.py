"""Token ids given as data: padding never counts as text. And what texts may not become: a double BOS, a token without embedding, no offsets."""

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import StateNorm, Surprisal
from basin_lens.errors import CaptureError, TextError
from basin_lens.texts import from_token_ids, given_ids, tokenize
from tests.conftest import TEXTS, make_bridge, make_tokenizer, random_tokens

PAD = 1  # of the tokenizer made in conftest: <|end|>, also EOS; BOS is 0


def analyze(model, data, **more):
    return bl.analyze(model, data, [StateNorm(), Surprisal()], progress=False, **more).drop(columns="run")


@pytest.fixture(scope="module")
def encoded(tokenizer):
    """Three texts, padded on the right."""
    tokenizer.padding_side = "right"
    return tokenizer(TEXTS[:3], return_tensors="pt", padding=True)


@pytest.fixture(scope="module")
def wanted(llama):
    """The table of the same texts, one after the other, without padding."""
    rows = [llama.tokenizer(text)["input_ids"] for text in TEXTS[:3]]
    assert len({len(row) for row in rows}) > 1
    return rows, [analyze(llama, torch.tensor([row])) for row in rows]


GIVEN = {
    "BatchEncoding": lambda e, _: e,
    "mapping": lambda e, _: dict(e),
    "mask beside": lambda e, _: (e["input_ids"], e["attention_mask"]),
    "mask of truth values": lambda e, _: (e["input_ids"], e["attention_mask"].bool()),
    "mask of fractions": lambda e, _: (e["input_ids"], e["attention_mask"].float()),
    "numpy": lambda e, _: (e["input_ids"].numpy(), e["attention_mask"].numpy()),
    "unsigned": lambda e, _: (e["input_ids"].numpy().astype(np.uint16), e["attention_mask"]),
    "lists": lambda e, _: (e["input_ids"].tolist(), e["attention_mask"].tolist()),
    "ragged lists": lambda _, rows: rows,
    "ragged tuples": lambda _, rows: tuple(map(tuple, rows)),
    "ragged tensors": lambda _, rows: [torch.tensor(row) for row in rows],
    "ragged arrays": lambda _, rows: [np.array(row) for row in rows],
    "unpadded mapping": lambda _, rows: {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]},
    "padded in front": lambda e, _: tuple(torch.flip(e[name], [1]) for name in ("input_ids", "attention_mask")),
}


@pytest.mark.many
@pytest.mark.parametrize("kind", GIVEN)
def test_padding_is_no_text(llama, encoded, wanted, kind):
    rows, tables = wanted
    given = GIVEN[kind](encoded, rows)
    mask = None
    if isinstance(given, tuple) and len(given) == 2:
        given, mask = given
    if kind == "padded in front":
        rows = [row[::-1] for row in rows]
        tables = [analyze(llama, torch.tensor([row])) for row in rows]
    table = analyze(llama, given, attention_mask=mask)
    for seq, own in enumerate(tables):
        found = table[table["seq"] == seq]
        assert found["token_id"].tolist() == own["token_id"].tolist()
        assert found["pos"].tolist() == own["pos"].tolist()
        np.testing.assert_allclose(found["state_norm"], own["state_norm"], rtol=1e-5)
        np.testing.assert_allclose(found["surprisal"], own["surprisal"], rtol=1e-4, atol=1e-5)


def test_one_encoded_text(llama):
    given = llama.tokenizer(TEXTS[0])
    (sequence,) = given_ids(llama, given)
    assert list(sequence.tokens) == given["input_ids"]


def test_texts_are_no_ids(llama):
    for data in (TEXTS[0], TEXTS, [bl.Passage("a b")], [], np.array(TEXTS)):
        assert given_ids(llama, data) is None
        with pytest.raises(TextError, match="expected token ids with attention_mask, got texts"):
            given_ids(llama, data, torch.ones(1, 3))


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[5, 6, 7, PAD, PAD], [5, 6, 7, 8, 9]], f"sequence 0 that ends with 2 of the padding token {PAD}.*attention_mask="),
        ([[5, 6, 7, 8, 9], [5, 6, 7, 8, PAD]], "sequence 1 that ends with 1 of"),
        ([[PAD, PAD, 7, 8, 9], [5, 6, 7, 8, 9]], "sequence 0 that begins with 2 of"),
        ([[PAD, 6, 7, 8, 9]], "sequence 0 that begins with 1 of"),
        ([[5, 6, PAD, PAD]], "sequence 0 that ends with 2 of"),
        ([[PAD, PAD, PAD]], "sequence 0 that begins with 3"),
    ],
)
@pytest.mark.parametrize("form", [list, torch.tensor, np.array])
def test_ids_with_padding_and_no_mask_are_refused(llama, ids, said, form):
    with pytest.raises(TextError, match=said):
        analyze(llama, form(ids))
    # All ones say that these are real.
    assert len(given_ids(llama, form(ids), torch.ones(len(ids), len(ids[0])))[0].tokens) == len(ids[0])


def test_an_end_of_text_in_every_sequence_is_no_padding(llama):
    ids = torch.tensor([[0, 5, 6, PAD], [0, 7, 8, PAD]])
    assert [list(s.tokens) for s in given_ids(llama, ids)] == ids.tolist()
    # Inside, it is the border of two documents.
    assert len(given_ids(llama, torch.tensor([[5, PAD, PAD, 6]]))) == 1


def test_a_bos_that_is_also_the_padding_may_begin_a_sequence():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.bos_token
    model = make_bridge("llama", tokenizer=tokenizer)
    assert len(given_ids(model, torch.tensor([[0, 5, 6], [0, 7, 8]]))) == 2
    for ids in ([[0, 0, 5, 6], [0, 7, 8, 9]], [[0, 5, 6], [7, 8, 9]], [[0, 5, 6, 0], [0, 5, 6, 7]]):
        with pytest.raises(TextError, match="of the padding token 0"):
            given_ids(model, torch.tensor(ids))


def test_without_a_tokenizer_nothing_is_known_of_padding():
    assert len(given_ids(make_bridge("llama"), torch.tensor([[5, 6, 1, 1]]))[0].tokens) == 4


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 4), r"attention mask of shape \(2, 5\), got \(2, 4\)"),
        (torch.ones(5), "attention mask of shape"),
        (torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]), "hole in sequence 0"),
        (torch.tensor([[0.0] * 5, [-1e9] * 5]), "1 .real. and 0 .padding."),
        (torch.full((2, 5), 2), "1 .real. and 0 .padding."),
        (torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]), "at least two tokens, got 1 in sequence 0"),
        (torch.zeros(2, 5), "a real token in every sequence, got an attention mask that leaves sequence 0 none"),
    ],
)
def test_masks_that_do_not_fit(llama, mask, said):
    with pytest.raises(TextError, match=said):
        given_ids(llama, random_tokens(2, 5), mask)
    if mask.ndim == 2:
        with pytest.raises(TextError, match=said):
            given_ids(llama, random_tokens(2, 5).tolist(), mask.tolist())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([[1.5, 2.5]], "token ids as whole numbers, got .* in sequence 0"),
        ([[5, 6], ["a", "b"]], "in sequence 1"),
        (np.array([[0.5, 0.5]]), "LongTensor"),
        ([[5, 6, 7], [5]], "at least two tokens, got 1 in sequence 1"),
        ([[5, 6, 7], []], "at least two tokens, got 0 in sequence 1"),
        ([[5, 10_000]], "another model"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "attention mask of shape"),
        ({"input_ids": []}, "at least two tokens"),
    ],
)
def test_ids_that_are_none(llama, data, said):
    with pytest.raises(TextError, match=said):
        given_ids(llama, data)


def test_two_masks(llama, encoded):
    with pytest.raises(TextError, match="one attention mask"):
        given_ids(llama, encoded, encoded["attention_mask"])


def test_a_mask_for_a_capture(llama, capture):
    with pytest.raises(CaptureError, match="got a Capture"):
        analyze(llama, capture, attention_mask=torch.ones(1, 1))


def test_ids_where_only_texts_are_read(llama):
    with pytest.raises(TextError, match="Token ids are for analyze and Capture"):
        bl.merging.windows_of(llama, [[5, 6, 7, 8]], 4)


# -- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_that_spells_its_bos(llama):
    text = "<|start|>" + TEXTS[0]
    with pytest.raises(TextError, match=r"text 1 that begins with it.*Take it off, or pass prepend_bos=False"):
        bl.Capture.plan(llama, [TEXTS[1], text], prepend_bos=True)
    spelled = bl.Capture.plan(llama, text, prepend_bos=False)
    assert spelled.row_token.tolist() == bl.Capture.plan(llama, TEXTS[0], prepend_bos=True).row_token.tolist()
    # Elsewhere in the text it is what it is.
    assert bl.Capture.plan(llama, "a <|start|> b", prepend_bos=True).row_token.tolist().count(0) == 2


def test_a_token_that_the_embedding_lacks():
    tokenizer = make_tokenizer()
    model = make_bridge("llama", tokenizer=tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert len(tokenize(model, [bl.Passage("an old text")])) == 1
    with pytest.raises(TextError, match=r"tokens below 320 .*got token 320 in text 1, 'a <new> one'.*do not fit"):
        tokenize(model, [bl.Passage("an old text"), bl.Passage("a <new> one")])


def test_a_tokenizer_without_offsets(tokenizer):
    """It does not say where its tokens stand."""

    class WithoutOffsets(type(tokenizer)):
        def __call__(self, *args, **options):
            found = dict(super().__call__(*args, **options))
            return found | {"offset_mapping": [(0, 0)] * len(found["input_ids"])}

    own = make_tokenizer()
    own.__class__ = WithoutOffsets
    model = make_bridge("llama", tokenizer=own)
    table = analyze(model, TEXTS[:2], layers=[0])
    assert (table["start"] == -1).all() and (table["end"] == -1).all()
    with pytest.raises(TextError, match=r"empty offsets for text 0, which has spans or words.*Leave spans out"):
        analyze(model, bl.Passage(TEXTS[0], spans={"ferry": (4, 9)}))


def test_from_token_ids_names_the_sequence(llama):
    with pytest.raises(TextError, match="got 1 in sequence 1"):
        from_token_ids(llama, torch.tensor([[5, 6], [7, 8]]), torch.tensor([[1, 1], [1, 0]]).bool())


RAGGED = [[5, 6, 7, 8, 9], [5, 6, 7, 9]]


@pytest.mark.parametrize(
    "mask", [[[1] * 5, [1] * 3], [[1] * 5, [1] * 5], [[0, 1, 1, 1, 1], [1, 1, 1]]], ids=["short", "long", "both"]
)
def test_a_ragged_mask_is_as_long_as_its_ids(llama, mask):
    """A short one would leave real tokens out without a word."""
    with pytest.raises(TextError, match=r"as long as the ids of each sequence, got \d numbers for the 4 ids of sequence 1"):
        given_ids(llama, RAGGED, mask)


@pytest.mark.parametrize("form", [
    lambda n: torch.ones(n, dtype=torch.bool), lambda n: np.ones(n, bool), lambda n: np.ones(n, np.float32), lambda n: [np.int8(1)] * n,
    lambda n: [True] * n, lambda n: torch.ones(n),
])  # fmt: skip
def test_a_ragged_mask_of_any_type(llama, form):
    assert [len(s.tokens) for s in given_ids(llama, RAGGED, [form(5), form(4)])] == [5, 4]


@pytest.mark.parametrize(
    ("data", "mask"),
    [
        ([torch.tensor(3), torch.tensor(4)], None), ([np.array(3), np.array(4)], None), ({"input_ids": None}, None), (RAGGED, 1), (RAGGED, [1, 1]),
        (RAGGED, [None, None]), ([[5, 6, 7]], [1, 1, 1]), (torch.ones(1, 3, device="meta").long(), None),
        (torch.ones(1, 3).long().to_sparse(), None), ([[True, False, True]], None), ([[5, 1.0, 0.0]], None), (RAGGED, "11"),
        ({"input_ids": [[torch.tensor([1, 2])]]}, None),
    ],
)  # fmt: skip
def test_ids_and_masks_of_odd_forms_are_refused(llama, data, mask):
    with pytest.raises(TextError, match=r"expected .*, got .*Pass"):
        given_ids(llama, data, mask)
