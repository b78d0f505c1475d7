"""Whose document is whose, where the texts meet another capture: decided by whether a document was given, for all alike."""

import pytest
import torch

import basin_lens as bl
from basin_lens.scoring.crossed_pass import units_of_both
from basin_lens.scoring.token_rows import row_groups

BACK = ["It was late in the year.", "A dog ran to the mill.", "The barn was old."]
FRONT = ["The cat saw the moon.", "One fox met an owl.", "The man went out again."]
NUMBERED = [None, "text-1", "sequence-1", "text-7"]


def captures(model, texts, doc):
    """Both captures; the second text of each has the document (None: none was given)."""
    of_each = [[bl.Passage(text, doc=doc if at == 1 else None) for at, text in enumerate(some)] for some in texts]
    return [bl.Capture.plan(model, some, layers=[0]) for some in of_each]


def same(capture, bank, decided) -> set[tuple[int, int]]:
    """Which sequences are of one document."""
    own, other = decided
    pairs = torch.nonzero(own[capture.offsets][:, None] == other[bank.offsets][None])
    return {(int(a), int(b)) for a, b in pairs}


@pytest.mark.parametrize("doc", [*NUMBERED, "a book"])
def test_given_documents_are_one_and_numbers_are_not(llama, doc):
    capture, bank = captures(llama, (FRONT, BACK), doc)
    wanted = set() if doc is None else {(1, 1)}
    for decided in (row_groups(capture, bank, "document"), units_of_both(capture, bank, "document")):
        assert same(capture, bank, decided) == wanted


@pytest.mark.parametrize("doc", NUMBERED)
def test_a_text_of_both_is_one_document(llama, doc):
    """A capture and some of its texts, say: whatever their numbers are."""
    capture, bank = captures(llama, (FRONT, [BACK[0], FRONT[1], FRONT[0]]), doc)
    for decided in (row_groups(capture, bank, "document"), units_of_both(capture, bank, "document")):
        assert same(capture, bank, decided) == {(0, 2), (1, 1)}


def test_within_one_capture_documents_are_those_it_has(llama):
    capture, _ = captures(llama, (FRONT, BACK), None)
    for decided in (row_groups(capture, capture, "document"), units_of_both(capture, capture, "document")):
        assert same(capture, capture, decided) == {(0, 0), (1, 1), (2, 2)}


@pytest.mark.parametrize("given", ["text-0", "text-2"])
def test_no_text_is_called_by_a_given_name(llama, given):
    capture = bl.Capture.plan(llama, [FRONT[0], bl.Passage(FRONT[1], doc=given), {"text": FRONT[2]}], layers=[0])
    assert len(set(capture.docs)) == 3 and capture.docs[1] == given
    assert bl.Capture.plan(llama, FRONT, layers=[0]).docs == ["text-0", "text-1", "text-2"]


def test_a_saved_capture_knows_which_documents_were_given(llama, tmp_path):
    texts = [bl.Passage(FRONT[0], doc="text-7"), FRONT[1]]
    bl.Capture.from_texts(llama, texts, layers=[0], progress=False).save(tmp_path / "c")
    held = bl.Capture.load(tmp_path / "c")
    other = bl.Capture.plan(llama, [bl.Passage(BACK[0], doc="text-7"), BACK[1]], layers=[0])
    again = bl.Capture.plan(llama, held.passages, layers=[0])
    for capture in (held, again):
        assert same(capture, other, row_groups(capture, other, "document")) == {(0, 0)}


def test_documents_given_with_a_cache_are_given(llama):
    tokens = torch.randint(5, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    _, cache = llama.run_with_cache(tokens)
    named = bl.Capture.from_cache(llama, tokens, cache, docs=["sequence-1", None])
    assert named.docs == ["sequence-1", "sequence-3"]
    other = bl.Capture.plan(llama, [bl.Passage(BACK[0], doc="sequence-1")], layers=[0])
    assert same(named, other, row_groups(named, other, "document")) == {(0, 0)}


def test_texts_of_another_capture_are_neighbors_whatever_their_number(llama):
    """Without documents given, no text of the bank is left out for its number."""
    capture, bank = (bl.Capture.from_texts(llama, some, layers=[0, 1], progress=False) for some in (FRONT, BACK))
    tables = [
        bl.analyze(llama, capture, [bl.analyzers.Contraction(k=6, exclude=exclude)], bank=bank, progress=False)
        for exclude in ("document", "self")
    ]
    assert tables[0]["contraction"].notna().any()
    assert tables[0]["contraction"].equals(tables[1]["contraction"])
