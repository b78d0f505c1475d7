"""Whose document is whose, where the texts meet another capture: decided by whether a document was given, for all alike."""

import copy
from dataclasses import replace

import pytest
import torch

import basin_lens as bl
from basin_lens.scoring.analysis import score
from basin_lens.scoring.crossed_pass import units_of_both
from basin_lens.scoring.request import Request
from basin_lens.scoring.token_rows import row_groups
from basin_lens.texts import read_passages

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


LONG = "Once the old king had a ship. It went over the sea to the far land of ice. No man on it could read. So they lost it."


def unnamed(model, texts, **kwargs):
    return bl.Capture.plan(model, texts, layers=[0], **kwargs)


def pairs(capture, bank, exclude="document"):
    """Sequences of one document, which neighbors and partners agree about."""
    found = [same(capture, bank, row_groups(capture, bank, exclude))]
    if exclude == "document":
        found.append(same(capture, bank, units_of_both(capture, bank, exclude)))
    assert found[0] == found[-1]
    return found[0]


CUTS = {"length": {"max_length": 9}, "no BOS": {"prepend_bos": False}, "both": {"max_length": 7, "prepend_bos": False}}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("exclude", ["document", "sequence"])
def test_a_text_is_itself_however_it_is_cut(llama, cut, exclude):
    capture, bank = unnamed(llama, [LONG, *BACK]), unnamed(llama, [FRONT[0], BACK[2], LONG], **cut)
    texts = [[sequence.passage for sequence in source.sequences] for source in (capture, bank)]
    wanted = {(0, 2), (3, 1)}
    for one, other, expected in ((capture, bank, wanted), (bank, capture, {(b, a) for a, b in wanted})):
        sides = texts if one is capture else texts[::-1]
        assert {(sides[0][a], sides[1][b]) for a, b in pairs(one, other, exclude)} == expected
    assert len(bank.sequences) > len(bank.passages) or "max_length" not in cut


@pytest.mark.parametrize("exclude", ["document", "sequence"])
def test_a_text_is_itself_as_token_ids(llama, exclude):
    """With BOS where the other has it or not."""
    texts, other = [LONG[:40], *BACK], [BACK[1], LONG[:40], FRONT[1]]
    capture, bare = unnamed(llama, texts), unnamed(llama, texts, prepend_bos=False)
    ids = [list(sequence.tokens) for sequence in unnamed(llama, other).sequences]
    assert len(ids) == 3
    for one, two in ((capture, ids), (capture, [i[1:] for i in ids]), (bare, ids)):
        assert pairs(one, unnamed(llama, two), exclude) == {(0, 1), (2, 0)}


@pytest.mark.parametrize("exclude", ["document", "sequence"])
def test_the_own_token_is_no_neighbor_however_the_bank_is_cut(llama, exclude):
    """Its own state in the other capture would be at distance 0 in the first windows."""
    capture = bl.Capture.from_texts(llama, [LONG, *BACK], layers=[0, 1], progress=False)
    bank = bl.Capture.from_texts(llama, [LONG, *FRONT, *BACK[:2]], layers=[0, 1], max_length=24, progress=False)
    of = bl.analyzers.Contraction(k=3, exclude=exclude)
    found = score(llama, capture, Request([of], bank=bank, progress=False), keep_neighbors_of=of).neighbors
    asked = capture.row_seq == 0
    own = torch.tensor([s.passage == 0 for s in bank.sequences])[bank.row_seq]
    assert int(own.sum()) > 24 and (found.rows[0][asked][1:] >= 0).all()
    assert not own[torch.from_numpy(found.rows[0][asked][1:])].any()


def test_every_copy_counts(llama):
    """Copies on either side, and a bank's document that has texts of two of the capture's."""
    assert pairs(unnamed(llama, [FRONT[0], FRONT[1], FRONT[0]]), unnamed(llama, [FRONT[0], BACK[0], FRONT[0]])) == {
        (0, 0),
        (0, 2),
        (2, 0),
        (2, 2),
    }
    book = [bl.Passage(text, doc="book") for text in FRONT[:2]]
    assert pairs(unnamed(llama, [*FRONT, BACK[0]]), unnamed(llama, [*book, BACK[1]])) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_document_given_on_one_side_is_known_by_its_text(llama):
    named = [bl.Passage(text, doc=f"d{at}") for at, text in enumerate(FRONT)]
    assert pairs(unnamed(llama, named), unnamed(llama, [BACK[0], FRONT[2]])) == {(2, 1)}
    assert pairs(unnamed(llama, [BACK[0], FRONT[2]]), unnamed(llama, named)) == {(1, 2)}


def test_documents_given_on_both_sides_are_told_apart_by_name(llama):
    one, other = ([bl.Passage(text, doc=f"{name} {at}") for at, text in enumerate(FRONT)] for name in ("a", "b"))
    assert (
        same(unnamed(llama, one), unnamed(llama, other), row_groups(unnamed(llama, one), unnamed(llama, other), "document"))
        == set()
    )


def test_a_changed_passage_keeps_a_document_that_nobody_gave(llama):
    """`dataclasses.replace` is how passages are cut, relabelled and marked."""
    capture = unnamed(llama, FRONT)
    shorter = [replace(passage, labels={"kind": "a"}) for passage in capture.passages]
    assert pairs(unnamed(llama, shorter), unnamed(llama, BACK)) == set()


def test_passages_of_two_lists_are_documents_of_their_own(llama):
    one, other = read_passages(FRONT[:2]), read_passages(BACK)
    assert len(set(unnamed(llama, [*one, *other]).docs)) == 5
    assert unnamed(llama, [*one, bl.Passage(BACK[0], doc="text-0"), *other]).docs.count("text-0") == 1
    parts = [replace(one[0], text=one[0].text[:10]), replace(one[0], text=one[0].text[10:]), other[0]]
    assert [len(set(docs)) for docs in [unnamed(llama, parts).docs]] == [2]
    assert unnamed(llama, copy.deepcopy(parts)).docs == unnamed(llama, parts).docs  # as engines ship them
