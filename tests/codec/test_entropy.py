"""From logits to whole numbers to bytes: an oracle for the range coder, codes that turn back."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basin_lens.codec import entropy, rank_coders
from basin_lens.codec.probabilities import TOTAL, frequencies, quantize, uncertainty
from basin_lens.codec.ranks import rank_of, token_of
from basin_lens.errors import (
    CodecError,
    CorruptFileError,
)

# -- from logits to whole numbers ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(2, 400), st.floats(0, 50))
@settings(deadline=None)
def test_frequencies_are_whole_positive_and_of_exact_sum(seed, vocab, scale):
    logits = (np.random.default_rng(seed).normal(size=(3, vocab)) * scale).astype(np.float32)
    table = frequencies(logits)
    assert table.dtype == np.int32 and table.min() >= 1
    assert (table.astype(np.int64).sum(1) == TOTAL).all()
    p = torch.softmax(torch.from_numpy(logits).double(), -1).numpy()
    assert np.abs(table / TOTAL - p).max() < (vocab + 2) / TOTAL
    assert np.allclose(uncertainty(logits), -(p * np.log2(np.maximum(p, 1e-300))).sum(1), atol=1e-9)


@pytest.mark.parametrize("row", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_frequencies_refuse_what_is_no_prediction(row):
    with pytest.raises(CodecError, match="expected finite logits"):
        frequencies(np.array([row], np.float32))
    assert frequencies(np.array([[0.0, -np.inf]], np.float32)).tolist() == [[TOTAL - 1, 1]]


@given(st.integers(0, 2**32 - 1), st.integers(2, 60))
@settings(deadline=None)
def test_ranks_count_the_better_tokens_and_turn_back(seed, vocab):
    logits = np.random.default_rng(seed).integers(0, 6, (1, vocab)).astype(np.float32)  # many ties
    order = sorted(range(vocab), key=lambda token: (-logits[0, token], token))
    every = np.repeat(logits, vocab, axis=0)
    assert token_of(every, np.arange(vocab)).tolist() == order
    assert rank_of(every, np.array(order)).tolist() == list(range(vocab))
    with pytest.raises(CodecError, match="expected a rank"):
        token_of(logits, np.array([vocab]))


# -- from whole numbers to bytes -------------------------------------------------------------------------------------------------------


class Oracle:
    """The range coder in exact whole numbers: no words, no carries."""

    def __init__(self):
        self.low, self.range, self.words = 0, 2**64 - 1, 1

    def put(self, below: int, own: int):
        unit = self.range >> 24
        self.low, self.range = self.low + unit * below, unit * own
        if self.range < 2**32:
            self.low, self.range, self.words = self.low << 32, self.range << 32, self.words + 1

    def finish(self) -> bytes:
        point, above = (self.low + 2**32 - 1) >> 32, (self.low + self.range) >> 32
        words = [point >> 32 * (self.words - 1 - i) & 0xFFFFFFFF for i in range(self.words)]
        return struct.pack(f"<{len(words)}I", *words) + (b"\0\0\0\0" if above & 0xFFFFFFFF == words[-1] else b"")


@given(st.integers(0, 2**32 - 1), st.integers(2, 700), st.integers(1, 80), st.floats(0, 8))
@settings(deadline=None, max_examples=60)
def test_range_coder_equals_the_oracle_bit_by_bit(seed, vocab, count, scale):
    rng = np.random.default_rng(seed)
    table = frequencies((rng.normal(size=(count, vocab)) * scale).astype(np.float32))
    symbols = np.array([rng.choice(vocab, p=row / TOTAL) for row in table])
    encoder, oracle = entropy.RangeEncoder(), Oracle()
    for row, symbol in zip(table, symbols, strict=True):
        encoder.put(symbols[:0], table[:0])  # nothing to put is nothing
        encoder.put(np.array([symbol]), row[None])
        oracle.put(int(row[:symbol].sum()), int(row[symbol]))
        bits = int(rng.integers(0, 20))
        value = int(rng.integers(0, 1 << bits))
        encoder.put_bits(value, bits)
        if bits:
            oracle.put(value << (24 - bits), 1 << (24 - bits))
    assert encoder.finish() == oracle.finish()


def test_range_coder_takes_rows_at_once_or_one_by_one():
    rng = np.random.default_rng(0)
    table = frequencies(rng.normal(size=(50, 30)).astype(np.float32))
    symbols = rng.integers(0, 30, 50)
    one, other = entropy.RangeEncoder(), entropy.RangeEncoder()
    one.put(symbols, table)
    for symbol, row in zip(symbols, table, strict=True):
        other.put(np.array([symbol]), row[None])
    data = one.finish()
    assert data == other.finish()
    assert entropy.RangeDecoder(data).get(table).tolist() == symbols.tolist()
    with pytest.raises(CorruptFileError, match="whole words"):
        entropy.RangeDecoder(data[:-1])


@given(st.lists(st.integers(0, 55), min_size=1, max_size=200))
@settings(deadline=None)
def test_huffman_is_optimal_and_turns_back(symbols):
    given_ = np.array(symbols, np.int64)
    data = entropy.huffman_encode(given_)
    assert entropy.huffman_decode(data, len(symbols)).tolist() == symbols
    counts = np.bincount(given_)
    shares = counts[counts > 0] / len(symbols)
    ideal = -(shares * np.log2(shares)).sum()
    bits = 8 * len(data) - 6 * (1 + len(counts))
    assert ideal * len(symbols) - 1e-6 <= bits <= (ideal + 1) * len(symbols) + 7


def test_split_numbers_every_rank():
    assert [rank_coders.joined(*rank_coders.split(rank)[:2]) for rank in range(70_000)] == list(range(70_000))


@pytest.mark.many
@pytest.mark.parametrize("name", rank_coders.RANK_CODERS)
@pytest.mark.parametrize("vocab", [2, 211, 49_152])
def test_rank_coders_turn_back_over_chunks(name, vocab):
    rng = np.random.default_rng(3)
    writer, reader = (rank_coders.RANK_CODERS[name](vocab) for _ in range(2))
    for count in (1, 150, 90):
        bits = rng.uniform(0, 12, count)
        ranks = np.minimum(rng.pareto(0.6, count).astype(np.int64), vocab - 1)
        data = writer.encode(ranks, bits)
        reader.open(data, count)
        assert np.concatenate([reader.next(bits[at : at + 7]) for at in range(0, count, 7)]).tolist() == ranks.tolist()


def test_zipf_finds_its_own_exponent_and_beats_no_other_by_less():
    p = quantize(rank_coders.zipf(np.array([1.4, 2.0]), 5000)) / TOTAL
    ranks = np.random.default_rng(0).choice(5000, size=20_000, p=p)
    s, q = rank_coders.fit_zipf(ranks, 5000).tolist()
    assert abs(s - 1.4) < 0.05 and abs(q - 2.0) < 0.3
    assert 8 * len(rank_coders.ZipfRanks(5000).encode(ranks, ranks * 0.0)) < 1.01 * -np.log2(p[ranks]).sum()
