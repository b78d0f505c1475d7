"""Which tokens a sample has: several of one text, of every document before a second text of one."""

import itertools

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers.drawing import drawing_order
from basin_lens.errors import NeighborError
from basin_lens.scoring.crossed_pass import unit_of_rows
from basin_lens.scoring.sampling import drawn_in_turns
from tests.conftest import random_tokens

PER_SEQUENCE = 4


@pytest.fixture(scope="module")
def texts(llama):
    """Nine sequences, and the six documents that they are said to be of, in no order."""
    ids = random_tokens(9, 14).tolist()
    docs = ["a", "b", "a", "c", "d", "e", "f", "b", "a"]
    lengths = [14, 9, 12, 3, 14, 8, 10, 14, 14]
    capture = bl.Capture.from_texts(llama, [row[:n] for row, n in zip(ids, lengths, strict=True)], layers=[1], progress=False)
    return capture, docs


def order_of(capture, docs, able=None, seed=0):
    able = capture.row_pos > 0 if able is None else able
    codes = torch.from_numpy(np.unique(docs, return_inverse=True)[1])
    return drawn_in_turns(capture, able, codes[capture.row_seq], PER_SEQUENCE, seed)


def test_every_row_that_is_able_comes_once(texts):
    capture, docs = texts
    able = (capture.row_pos > 0) & (torch.arange(capture.n_rows) % 5 != 0)
    found = order_of(capture, docs, able)
    assert sorted(found.tolist()) == torch.nonzero(able).squeeze(1).tolist()


def test_a_turn_is_some_tokens_of_each_text_every_document_first(texts):
    capture, docs = texts
    found = order_of(capture, docs)
    seqs = capture.row_seq[found].tolist()
    runs = [seqs[0]] + [b for a, b in itertools.pairwise(seqs) if a != b]
    first = runs[: len(docs)]
    assert sorted(first) == list(range(len(docs)))
    assert [docs[seq] for seq in first[:6]] == list(dict.fromkeys(docs[seq] for seq in first))  # each document once, then again
    assert sorted(docs[seq] for seq in first[6:8]) == ["a", "b"] and docs[first[8]] == "a"
    turn = seqs[: sum(min(PER_SEQUENCE, int(n) - 1) for n in capture.lengths)]
    assert all(turn.count(seq) == min(PER_SEQUENCE, int(capture.lengths[seq]) - 1) for seq in range(len(docs)))


def test_the_seed_draws_the_texts_and_the_text_draws_its_tokens(texts):
    capture, docs = texts
    one, same, other = (order_of(capture, docs, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    for seq in range(len(docs)):
        first, then = ([row for row in found.tolist() if capture.row_seq[row] == seq] for found in (one, other))
        assert first == then


def test_erasure_and_the_sample_take_the_same_tokens():
    tokens = random_tokens(1, 40)[0].tolist()
    order = drawing_order(tokens)
    assert sorted(order.tolist()) == list(range(40))
    assert sorted(order[-3:].tolist()) == [0, 38, 39] and order[-1] == 0
    for count in (1, 7, 16):
        assert bl.analyzers.Erasure(positions=count)._draw(tokens) == sorted(order[:count].tolist())
    assert bl.analyzers.Erasure(positions=None)._draw(tokens) == list(range(1, 38))
    assert not np.array_equal(order, drawing_order(tokens, seed=1))
    for length in (0, 1, 2, 3, 4):
        assert sorted(drawing_order(tokens[:length]).tolist()) == list(range(length))
        assert bl.analyzers.Erasure()._draw(tokens[:length]) == list(range(1, length - 2))


def test_compression_of_few_tokens_of_few_texts(llama, capture):
    """The units of a sample are those of the groups: what `exclude` names."""
    analyzer = bl.analyzers.Compression(k=4, queries=16, per_sequence=PER_SEQUENCE, nulls=False)
    table = bl.analyze(llama, capture, [analyzer], layers=[1], progress=False)
    expected = drawn_in_turns(capture, capture.row_pos > 0, unit_of_rows(capture, "sequence"), PER_SEQUENCE, 0)[:16]
    scored = np.flatnonzero(table.compression.notna())
    assert set(scored) <= set(expected.tolist()) and len(scored) >= 8
    assert table[table.compression.notna()].groupby("seq").size().max() <= PER_SEQUENCE
    (facts,) = table.attrs["provenance"].values()
    assert facts["left_out"]["compression"]["not sampled"] == int((capture.row_pos > 0).sum()) - 16


@pytest.mark.parametrize("wrong", [{"per_sequence": 0, "queries": 40}, {"per_sequence": 4}])
def test_turns_are_of_a_sample(wrong):
    with pytest.raises(NeighborError, match="per_sequence of at least 1, together with queries"):
        bl.analyzers.Compression(**wrong).check()
