"""The codec: any bytes back, ideal sizes, an oracle for the range coder, and files that are refused rather than misread."""

import hashlib
import io
import itertools
import lzma
import os
import random
import re
import struct
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

import basin_lens as bl
from basin_lens import codec
from basin_lens import model as door
from basin_lens.cli import app as cli
from basin_lens.cli import codec as cli_codec
from basin_lens.codec import container, entropy, lockstep, rank_coders
from basin_lens.codec.probabilities import TOTAL, frequencies, quantize, uncertainty
from basin_lens.codec.ranks import rank_of, token_of
from basin_lens.codec.reading import read_pass
from basin_lens.errors import (
    CodecError,
    CorruptFileError,
    FileVersionError,
    ModelError,
    TruncatedFileError,
    UnknownFileError,
    WrongEnvironmentError,
    WrongModelError,
)
from basin_lens.views.codec_figures import growth_lines, rank_bars, rank_shares
from tests.conftest import TEXTS, hooked_lane, make_bridge, make_hooked, make_tokenizer, random_tokens

GOLDEN = Path(__file__).parents[1] / "fixtures" / "codec_v1.blz"
METHODS = [("direct", "range"), *(("ranks", name) for name in rank_coders.RANK_CODERS)]
TEXT = " ".join(TEXTS)
SLOW = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny(request, tokenizer):
    return make_bridge(request.param, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def blob(llama) -> bytes:
    """A file that the model wrote, of several chunks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(codec.text, "CHUNK_TOKENS", 1)
        return coded(codec.TextCodec(llama, streams=2, context=40), TEXT[:330])


def coded(coder: codec.TextCodec, data: str) -> bytes:
    """The model's file, also where storing would be smaller: on tiny random models it nearly always is."""
    coder.streams_for = lambda tokens: max(1, min(coder.streams, tokens // 4))
    return coder.encode_text(*coder.prepared(data))


def resealed(blob: bytes, at: int, new: bytes) -> bytes:
    """The file with other header bytes and a right header checksum."""
    (size,) = struct.unpack_from("<I", blob, 8)
    head = blob[:at] + new + blob[at + len(new) : size - 4]
    return head + zlib.crc32(head).to_bytes(4, "little") + blob[size:]


@contextmanager
def memory_below(size: int) -> Iterator[None]:
    """What Python objects, arrays and zlib's and zstd's output take in the block stays below `size` bytes."""
    tracemalloc.start()
    try:
        yield
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < size, f"{taken} bytes"


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


# -- steps ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "neox", "bloom"])
def test_steps_equal_the_full_pass_and_repeat_to_the_bit(name):
    check_steps(make_bridge(name))


@hooked_lane
@pytest.mark.parametrize("changes", [{}, {"positional_embedding_type": "standard"}, {"n_key_value_heads": 2}], ids=str)
def test_steps_of_a_hooked_transformer(changes):
    check_steps(make_hooked(**changes))


def groups_of(model) -> list[int]:
    """How often each block repeats its keys and values for its query heads."""
    return [getattr(getattr(block.attn, "original_component", None), "num_key_value_groups", 1) for block in model.blocks]


def check_steps(model):
    tokens, groups = random_tokens(3, 20), groups_of(model)
    with door.measuring(model):
        full = door.forward_pass(model, tokens, {})
    with door.stepping(model, 3, 20) as stepper:
        first = torch.stack([stepper.step(tokens[:, place]) for place in range(20)], 1)
        with pytest.raises(ModelError, match="Reset"):
            stepper.step(tokens[:, 0])
        stepper.reset()
        again = torch.stack([stepper.step(tokens[:, place]) for place in range(20)], 1)
        stepper.reset()
        stepper.step(tokens[:, 0])
        stepper.pretend(19)
        assert stepper.step(tokens[:, 1]).isfinite().all() and stepper.position == 20
    assert groups == groups_of(model)
    assert torch.equal(first, again)
    assert (first - full).abs().max() < 1e-3


@pytest.mark.slow
def test_threads_are_those_of_the_file_and_put_back(llama, monkeypatch):
    before, used, step = torch.get_num_threads(), set(), lockstep._step
    with pytest.raises(ZeroDivisionError), door.thread_count(before + 1):
        1 / (torch.get_num_threads() - before - 1)
    assert torch.get_num_threads() == before
    data = coded(codec.TextCodec(llama, threads=2), TEXT[:60])
    assert codec.read(data).setting.threads == 2

    def watched(*given, **how):
        used.add(torch.get_num_threads())
        return step(*given, **how)

    monkeypatch.setattr(lockstep, "_step", watched)
    try:
        for outside in (1, 3):  # neither is the file's
            torch.set_num_threads(outside)
            assert codec.TextCodec(llama).decode(data).decode() == TEXT[:60]
            with pytest.raises(WrongEnvironmentError):
                codec.TextCodec(llama).decode(resealed(data, 76, bytes(8)))
            assert torch.get_num_threads() == outside
    finally:
        torch.set_num_threads(before)
    assert used == {2}


@pytest.mark.parametrize("window", [1, 5, 20, 33])
def test_the_probe_runs_to_the_last_place_and_sees_a_change_there(llama, monkeypatch, window):
    step, places = lockstep._step, []

    def watched(stepper, *given, **how):
        places.append(stepper.position)
        return step(stepper, *given, **how)

    def changed(stepper, *given, **how):
        last = stepper.position == window - 1
        logits = step(stepper, *given, **how)
        return np.nextafter(logits, np.float32(99)) if last else logits

    found = []
    for how in (watched, step, changed):
        monkeypatch.setattr(lockstep, "_step", how)
        with door.stepping(llama, 2, window) as stepper:
            found.append(lockstep.probe(stepper, lockstep.token_coder("ranks", "entropy", stepper.vocab)))
    assert places == sorted(set(places)) and (places[0], places[-1]) == (0, window - 1)
    assert found[0] == found[1] != found[2]


# -- round trips -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "backend"), METHODS, ids=lambda name: name)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), streams=st.integers(1, 5))
@SLOW
def test_text_comes_back(tiny, method, backend, text, streams):
    coder = codec.TextCodec(tiny, method, backend, streams, 9)
    tokens = coder._tokens(text.encode())
    if not isinstance(tokens, str):
        assert coder.decode(coded(coder, text)) == text.encode()
    assert coder.decode(coder.encode(text)) == text.encode()


@given(data=st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=25)
def test_bytes_come_back_and_never_grow_by_more_than_the_header(llama, data):
    coder = codec.TextCodec(llama)
    made = coder.encode(data, verify=False)
    assert len(made) <= len(data) + 72
    assert coder.decode(made) == data


@pytest.mark.parametrize(
    "data",
    [b"", b"a", b"\0", b"\0" * 50, b"line\r\nline\r\n", b"<|end|> and <|start|>", "\u00e9\U0001f600 \u4e2d".encode(), b"\xff\xfe", b" a", b"a  "],
    ids=repr,
)  # fmt: skip
def test_odd_bytes_come_back(tiny, data):
    for method in ("direct", "ranks"):
        coder = codec.TextCodec(tiny, method, streams=2, context=7)
        assert coder.decode(coder.encode(data)) == data
        if data and isinstance(coder._tokens(data), np.ndarray):
            assert coder.decode(coded(coder, data.decode())) == data


@pytest.mark.parametrize("streams", [pytest.param(1, marks=pytest.mark.slow), 16, 64])
def test_one_stream_and_many(llama, streams):
    coder = codec.TextCodec(llama, streams=streams, context=7)
    assert [coder.streams_for(n) for n in (0, 1, 511, 512, 10**9)] == [1, 1, 1, min(2, streams), streams]
    made = coded(coder, TEXT * 2)
    assert codec.read(made).setting.streams == streams
    assert coder.decode(made).decode() == TEXT * 2


def test_ten_megabytes_of_noise_are_stored(llama):
    data = random.Random(0).randbytes(10 << 20)
    made = codec.TextCodec(llama).encode(data)
    assert codec.read(made).why == "not UTF-8"
    assert codec.read(made).restored() == data


def test_long_texts_are_tokenized_in_pieces_unless_the_tokenizer_minds(llama, monkeypatch):
    text = "one line\r\nanother, \u00e9\U0001f600\n" + "x" * 70 + "\nend"
    whole = codec.TextCodec(llama)._tokens(text.encode())
    monkeypatch.setattr(codec.text, "_LONGEST_PIECE", 20)
    pieces = codec.text._pieces(text)
    assert "".join(pieces) == text and max(map(len, pieces)) == 20 and pieces[:2] == ["one line\r\n", "another, \u00e9\U0001f600\n"]
    coder, given, tokens_of = codec.TextCodec(llama), [], codec.TextCodec._tokens_of
    monkeypatch.setattr(codec.TextCodec, "_tokens_of", lambda self, piece: given.append(piece) or tokens_of(self, piece))
    assert coder.decode(coded(coder, text)) == text.encode() and given == pieces
    # One that opens every text with a token of its own, which its decoder hides only once.
    monkeypatch.setattr(codec.TextCodec, "_tokens_of", lambda self, piece: tokens_of(self, piece if piece == text else f" {piece}"))
    assert coder._tokens(text.encode()).tolist() == whole.tolist()


def test_a_text_too_long_for_the_model_is_stored(llama, monkeypatch):
    monkeypatch.setattr(codec.text, "_LONGEST", 1000)
    made = codec.TextCodec(llama).encode("word " * 201)
    assert codec.read(made).why == "too long for the model"
    assert codec.read(made).restored() == b"word " * 201


@hooked_lane
def test_a_hooked_transformer_codes_too(tokenizer):
    model = make_hooked(d_vocab=len(tokenizer))
    model.tokenizer = tokenizer
    for method in ("direct", "ranks"):
        coder = codec.TextCodec(model, method, streams=3, context=11)
        assert coder.decode(coded(coder, TEXT[:200])) == TEXT[:200].encode()


def test_a_tokenizer_that_changes_the_text_is_noticed():
    lowering = make_tokenizer()
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    model = make_bridge("llama", tokenizer=lowering)
    coder = codec.TextCodec(model)
    made = coder.encode("Upper and lower. " * 20)
    assert codec.read(made).why == "the tokenizer does not give the text back"
    assert coder.decode(made).decode() == "Upper and lower. " * 20


# -- sizes and ranks ---------------------------------------------------------------------------------------------------------------------


def test_direct_coding_is_within_one_percent_of_the_ideal(tiny):
    coder = codec.TextCodec(tiny, streams=3, context=50)
    made = codec.read(coded(coder, TEXT))
    ideal = coder.estimate(TEXT, streams=made.setting.streams).total_bits / 8
    size = sum(map(len, made.chunks))
    assert made.setting.streams == 3 and len(made.chunks) == 1
    assert ideal - 1 <= size <= 1.01 * ideal + 8 * len(made.chunks)


def test_estimate_is_surprisal_in_bits(llama):
    coder = codec.TextCodec(llama, context=30)
    table = bl.analyze(llama, TEXT, [bl.analyzers.Surprisal()], layers=[0], max_length=31, progress=False)
    expected = table.surprisal.dropna().to_numpy() / np.log(2)
    found = coder.estimate(TEXT)
    assert np.abs(found.bits - expected).max() < 1e-3
    assert found.bits_per_token == pytest.approx(expected.mean(), abs=1e-3)
    assert found.bits_per_byte == pytest.approx(expected.sum() / len(TEXT.encode()), abs=1e-3)
    assert coder.estimate("").n_tokens == 0
    with pytest.raises(CodecError, match="not UTF-8"):
        coder.estimate(b"\xff")


def test_a_cache_that_the_model_drops_is_refused_and_not_generated_with(llama, monkeypatch):
    start, groups = torch.full((1, 1), door.start_token(llama)), groups_of(llama)
    written = door.continuations(llama, start, 8)
    for block in llama.blocks:  # what TransformerLens 4.3 does with transformers 5.24
        monkeypatch.setattr(block.attn, "_update_kv_cache", lambda k, v, **_: (k, v))
    with pytest.raises(ModelError, match=r"transformers<5\.24"), door.stepping(llama, 1, 8):
        pass
    assert groups == groups_of(llama)
    assert torch.equal(door.continuations(llama, start, 8), written)


def test_what_the_model_wrote_greedily_has_rank_zero_everywhere(tiny):
    start = door.start_token(tiny)
    written = door.continuations(tiny, torch.full((2, 1), start), 30)
    for row in written:
        reading = read_pass(tiny, row.numpy(), streams=1, window=40)
        assert (reading.rank == 0).all()
    writer = lockstep.RanksCoder("huffman", door.vocabulary_size(tiny))
    with door.stepping(tiny, 2, 30) as stepper:
        chunks = list(lockstep.encode_tokens(stepper, written.flatten().numpy(), start, 30, writer))
    assert chunks == [(entropy.huffman_encode(np.zeros(60, np.int64)), 60)]


def test_ranks_table_agrees_with_its_parts(llama):
    coder = codec.TextCodec(llama, context=30)
    table = coder.ranks(TEXT, k=3)
    assert table.columns.tolist() == ["token_id", "token", "rank", "probability", "bits", "entropy", "top", "top_probability"]
    assert "".join(table.token) == TEXT
    assert np.allclose(table.bits, coder.estimate(TEXT).bits)
    assert np.allclose(-np.log2(table.probability), table.bits)
    first = table[table["rank"] == 0]
    assert len(first) and all(row.top[0] == row.token for row in first.itertuples())
    assert all(row.top_probability[0] >= row.probability - 1e-12 for row in table.itertuples())
    with pytest.raises(CodecError, match="expected k"):
        coder.ranks(TEXT, k=0)


# -- what is refused -----------------------------------------------------------------------------------------------------------------------


def test_five_hundred_damages_are_five_hundred_errors(llama, blob):
    coder, rng = codec.TextCodec(llama), random.Random(0)
    kinds = set()
    for number in range(500):
        if number % 5:
            at = rng.randrange(len(blob))
            damaged = blob[:at] + bytes([blob[at] ^ rng.randrange(1, 256)]) + blob[at + 1 :]
        else:
            damaged = blob[: rng.randrange(len(blob))]
        with pytest.raises(CodecError) as caught:
            coder.decode(damaged)
        kinds.add(type(caught.value))
    assert kinds >= {CorruptFileError, TruncatedFileError, UnknownFileError}


def test_each_damage_has_its_error(llama, blob):
    coder, found = codec.TextCodec(llama), codec.read(blob)
    head = len(found.header())
    for damaged, error, words in [
        (b"", UnknownFileError, "begins with"),
        (b"PK\3\4" + blob[4:], UnknownFileError, "begins with"),
        (blob[:4] + b"\2" + blob[5:], FileVersionError, "version 1 of the format, got 2"),
        (blob[:30], TruncatedFileError, "ends too early"),
        (blob[:-1], TruncatedFileError, f"expected {len(blob)} bytes, got {len(blob) - 1}"),
        (blob + b"x", CorruptFileError, "added to the file"),
        (blob[:60] + b"\xff\xff" + blob[62:], CorruptFileError, "header's checksum"),
        (resealed(blob, 12, struct.pack("<Q", 2**60)), CorruptFileError, "limits"),
        (resealed(blob, 97, struct.pack("<Q", 2**60)), CorruptFileError, "tokens between"),
        (resealed(blob, 97, struct.pack("<Q", 2**29)), CorruptFileError, "chunks"),
        (resealed(blob, 84, struct.pack("<H", 0)), CorruptFileError, "streams between"),
        (resealed(blob, 86, struct.pack("<I", 2**31)), CorruptFileError, "window between"),
        (resealed(blob, 90, struct.pack("<H", 60_000)), CorruptFileError, "threads between"),
        (resealed(blob, 105, struct.pack("<H", 4097)), CorruptFileError, "windows between"),
        (resealed(blob, 105, struct.pack("<H", 60)), CorruptFileError, "4096 tokens"),
        (resealed(blob, 5, b"\3"), CorruptFileError, "limits"),
        (resealed(blob, 20, bytes(32)), CorruptFileError, "SHA-256"),
        (resealed(blob, 52, bytes(16)), WrongModelError, "expected the model that wrote the file"),
        (resealed(blob, 68, bytes(8)), WrongModelError, "tokenizer"),
        (resealed(blob, 76, bytes(8)), WrongEnvironmentError, "torch|probe"),
    ]:
        with pytest.raises(error, match=words):
            coder.decode(damaged)
    place = head + len(found.chunks[0]) + 2
    with pytest.raises(CorruptFileError, match="chunk 1") as caught:
        coder.decode(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
    assert caught.value.chunk == 1


def test_forged_chunks_give_an_error_and_no_text(llama, blob):
    found, coder = codec.read(blob), codec.TextCodec(llama)
    for payload in (b"", b"\xff" * 40, bytes(40)):
        forged = replace(found, chunks=(payload, *found.chunks[1:]))
        with pytest.raises(CodecError):
            coder.decode(forged.to_bytes())
    moved = replace(found, tokens=(found.tokens[0] - 1, found.tokens[1] + 1, *found.tokens[2:]))
    with pytest.raises(CorruptFileError, match="whole windows"):
        coder.decode(moved.to_bytes())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "backend"), METHODS, ids=lambda name: name)
def test_forged_chunks_with_right_checksums_never_give_another_text(llama, method, backend):
    coder, rng, text = codec.TextCodec(llama, method, backend, context=20), random.Random(0), TEXT[:90]
    found = codec.read(coded(coder, text))
    (chunk,) = found.chunks
    forged = [b"", b"\xff" * 40, bytes(40), chunk[: len(chunk) // 2], chunk * 2]
    forged += [rng.randbytes(rng.randrange(80)) for _ in range(20)]
    for number in range(30):
        at = rng.randrange(len(chunk))
        forged += [chunk[:at] + bytes([chunk[at] ^ 1 << number % 8]) + chunk[at + 1 :]]
    refused = 0
    for payload in forged:
        try:
            again = coder.decode(replace(found, chunks=(payload,)).to_bytes())
        except CodecError:
            refused += 1
        else:  # bits that no code uses
            assert again == text.encode()
    assert refused >= 40


def test_nothing_may_follow_a_zstd_frame():
    stored = container.store(b"a" * 5000, "not told")
    with pytest.raises(CorruptFileError, match="zstd frame"):
        replace(stored, chunks=(*stored.chunks, b"more"), tokens=(0, 0)).restored()


def test_zlib_and_zstd_bombs_take_no_memory(llama):
    coder, size = codec.TextCodec(llama, "ranks", "zlib", context=20), 64 << 20
    zeros = bytes(size)
    found = codec.read(coded(coder, TEXT[:90]))
    bomb = replace(found, chunks=(zlib.compress(zeros),)).to_bytes()
    stored = container.store(zeros, "not told")
    assert stored.restored() == zeros and len(stored.chunks[0]) < 9000
    writer = zstandard.ZstdCompressor().compressobj()
    unsized = writer.compress(zeros) + writer.flush()
    (frame,) = stored.chunks
    at = frame.index(struct.pack("<I", size), 4)  # where the frame tells its length
    lying = frame[:at] + struct.pack("<I", 5000) + frame[at + 4 :]
    assert zstandard.get_frame_parameters(lying).content_size == 5000
    huge = frame[:at] + struct.pack("<I", 1 << 30) + frame[at + 4 :]
    for forged, words in [
        (replace(stored, length=5000), "length"),  # the frame is longer than the header says
        (replace(stored, length=5000, chunks=(unsized,)), "length"),  # the frame does not say
        (replace(stored, length=5000, chunks=(lying,)), "zstd frame"),  # what is in the frame is longer than both say
        (replace(stored, length=1 << 30, chunks=(huge,)), "length"),  # so few bytes cannot hold that much
    ]:
        file = forged.to_bytes()
        with memory_below(1 << 20), pytest.raises(CorruptFileError, match=words):
            codec.read(file).restored()
    with memory_below(1 << 20), pytest.raises(CorruptFileError, match="numbers"):
        coder.decode(bomb)


def test_a_hostile_zstd_file_takes_no_more_than_its_text():
    """1 GiB in 33 KB, as declared: it was set aside before anything was known of it."""
    size = 1 << 28
    packer = zstandard.ZstdCompressor(level=19).compressobj(size=size)
    frame = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    assert len(frame) < size >> 14
    forged = codec.Container("zstd", "none", size, hashlib.sha256(b"another").digest(), (frame,), (0,)).to_bytes()
    with memory_below(1 << 21), pytest.raises(CorruptFileError, match="SHA-256"):
        codec.read(forged).restored()
    text = bytes(range(250)) * 90
    wide = zstandard.ZstdCompressionParameters.from_level(19, window_log=27)
    far = zstandard.ZstdCompressor(compression_params=wide).compressobj(size=1 << 25)
    frame = b"".join(far.compress(bytes(1 << 20)) for _ in range(1 << 5)) + far.flush()
    assert zstandard.get_frame_parameters(frame).window_size > 1 << 23
    with pytest.raises(CorruptFileError, match="zstd frame"):
        codec.Container("zstd", "none", 1 << 25, hashlib.sha256(bytes(1 << 25)).digest(), (frame,), (0,)).restored()
    for cut in (container.store(text, "not told").chunks[0][:-3], b""):
        with pytest.raises(CorruptFileError, match="zstd frame"):
            codec.Container("zstd", "none", len(text), hashlib.sha256(text).digest(), (cut,), (0,)).restored()


def counting_steps(monkeypatch) -> list[int]:
    """How often the model is called, from now on: one entry per step."""
    calls, plain = [], lockstep._step
    monkeypatch.setattr(lockstep, "_step", lambda *a, **k: calls.append(1) or plain(*a, **k))
    return calls


def test_the_model_is_not_asked_where_its_header_alone_is_too_long(llama, monkeypatch):
    """A megabyte of one byte: hours of the model, and then zstd's 49 bytes."""
    calls = counting_steps(monkeypatch)
    data = b"a" * (1 << 20)
    monkeypatch.setattr(codec.TextCodec, "_tokens", lambda *_: np.full(1 << 17, 65))
    made = codec.read(codec.TextCodec(llama).encode(data))
    assert (made.method, made.why, calls) == ("zstd", "no smaller with the model", [])
    assert made.restored() == data


@pytest.mark.parametrize(("method", "backend", "times"), [("direct", "range", 15), ("ranks", "zlib", 50)])
def test_the_model_stops_as_soon_as_its_file_is_no_smaller(llama, monkeypatch, method, backend, times):
    """Repeated text: zstd takes some hundred bytes, an untrained model more than a byte for each token."""
    data = "".join(f"{TEXT[:300]} " for _ in range(times))
    coder = codec.TextCodec(llama, method, backend, streams=16, context=40)
    tokens = coder.prepared(data)[1]
    stored = container.store(data.encode(), "no smaller with the model").to_bytes()
    calls = counting_steps(monkeypatch)
    assert coder.encode(data) == stored
    stopped = len(calls)
    whole = coder.encode_text(data.encode(), tokens)
    assert len(whole) > len(stored) + 1000 and 0 < stopped < 0.75 * (len(calls) - stopped)


@pytest.mark.parametrize(("method", "backend"), METHODS)
def test_stopping_early_changes_no_file(llama, method, backend):
    """At every bound: the file as without one, or none where it is not below."""
    coder = codec.TextCodec(llama, method, backend, streams=2, context=10)
    plain, tokens = coder.prepared(TEXT[:150])
    whole = coder.encode_text(plain, tokens)
    for below in (0, len(whole) - 100, len(whole) - 1, len(whole), len(whole) + 1, len(whole) + 9, 1 << 20):
        assert coder._coded(plain, tokens, below=below) == (whole if len(whole) < below else None), below


def test_another_model_is_refused_before_anything_is_computed(tokenizer, blob, monkeypatch):
    monkeypatch.setattr(lockstep, "_step", lambda *_, **__: pytest.fail("computed"))
    for other in (make_bridge("llama", seed=1, tokenizer=tokenizer), make_bridge("gpt2", tokenizer=tokenizer)):
        with pytest.raises(WrongModelError, match="Load that model"):
            codec.TextCodec(other).decode(blob)


def test_bad_settings_are_refused(llama):
    for how, words in [
        ({"method": "magic"}, "expected method"), ({"backend": "zlib"}, "expected a back end among range"),
        ({"method": "ranks", "backend": "lzw"}, "zlib, huffman"), ({"streams": 0}, "streams"), ({"context": 0}, "context of 1"),
    ]:  # fmt: skip
        with pytest.raises(CodecError, match=words):
            codec.TextCodec(llama, **how)
    with pytest.raises(ModelError, match="fast tokenizer"):
        codec.TextCodec(make_bridge("llama"))
    with pytest.raises(CodecError, match="lone surrogate"):
        codec.TextCodec(llama).encode("\ud800")


def test_a_file_that_does_not_verify_is_not_handed_out(llama, monkeypatch):
    coder = codec.TextCodec(llama)
    text = TEXT * 3
    monkeypatch.setattr(codec.text, "store", lambda *_: SimpleNamespace(to_bytes=lambda: bytes(10**6)))
    monkeypatch.setattr(coder, "decode", lambda _: b"another")
    with pytest.raises(CodecError, match="report"):
        coder.encode(text[:80])
    assert coder.encode(text[:80], verify=False)


# -- the format is frozen ------------------------------------------------------------------------------------------------------------------


def golden() -> codec.Container:
    """A file with every field, made of known numbers; its chunks are no text."""
    setting = codec.Setting(
        model=bytes(range(16)), tokenizer=bytes(range(16, 24)), probe=bytes(range(24, 32)), streams=3, window=4, threads=2, dtype="float32",
        start=1, tokens=22, windows=1, environment="2.13.0 4.3.0 AVX2 cpu",
    )  # fmt: skip
    chunks = (b"first chunk.", b"second chunk")
    return codec.Container("ranks", "zipf", 77, hashlib.sha256(b"golden").digest(), chunks, (12, 10), setting=setting)


def test_the_format_is_the_golden_file():
    assert golden().to_bytes() == GOLDEN.read_bytes()
    assert codec.read(GOLDEN.read_bytes()) == golden()
    assert container.store(b"abc", "not UTF-8").to_bytes().hex() == (
        "8f424c5a01000001" "48000000" "0300000000000000" "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        "01000000" "0300000000000000c2412435" "51abdc93" "616263"
    )  # fmt: skip


# -- commands --------------------------------------------------------------------------------------------------------------------------------


class _Stream:
    def __init__(self, data: bytes = b""):
        self.buffer = io.BytesIO(data)

    def write(self, text: str) -> int:
        return self.buffer.write(text.encode())

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def call(monkeypatch, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, str]:
    out, err = _Stream(), io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["basin-lens", *arguments])
        patched.setattr(sys, "stdin", _Stream(stdin))
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", err)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.buffer.getvalue(), err.getvalue()


def weaken_xz(monkeypatch) -> None:
    """Its strongest setting clears hundreds of megabytes at every call; here no size of it is looked at."""
    plain = lzma.compress
    monkeypatch.setattr(lzma, "compress", lambda data, **_: plain(data, preset=0))


@pytest.fixture
def loaded(llama, monkeypatch):
    weaken_xz(monkeypatch)
    monkeypatch.setattr(cli_codec, "_load", lambda _: llama)


@pytest.mark.usefixtures("loaded")
def test_commands_go_there_and_back(tmp_path, monkeypatch):
    book, packed = tmp_path / "book.txt", tmp_path / "book.txt.blz"
    book.write_bytes(TEXT.encode())
    how = ("--streams", "2", "--context", "32", "--method", "ranks")
    assert call(monkeypatch, "compress", str(book), *how)[0] == 0
    book.rename(tmp_path / "kept")
    assert call(monkeypatch, "decompress", str(packed))[0] == 0
    assert book.read_bytes() == TEXT.encode()
    code, said, _ = call(monkeypatch, "codec-info", str(packed))
    assert code == 0 and b"bits per byte" in said and hashlib.sha256(TEXT.encode()).hexdigest().encode() in said
    # Through the streams, which carry nothing but the file.
    code, piped, err = call(monkeypatch, "compress", "-", "--no-verify", stdin=TEXT.encode())
    assert code == 0 and "bits per byte" in err
    assert call(monkeypatch, "decompress", "-", stdin=piped)[1] == TEXT.encode()


@pytest.mark.usefixtures("loaded")
def test_decompress_writes_nothing_under_another_model(tmp_path, monkeypatch, tokenizer, blob):
    packed, out = tmp_path / "book.blz", tmp_path / "book"
    packed.write_bytes(blob)
    with monkeypatch.context() as patched:
        patched.setattr(cli_codec, "_load", lambda _: make_bridge("llama", seed=1, tokenizer=tokenizer))
        code, _, err = call(patched, "decompress", str(packed))
        assert code == 1 and "expected the model that wrote the file" in err and not out.exists()
    assert call(monkeypatch, "decompress", str(packed))[0] == 0
    assert out.read_bytes() == TEXT[:330].encode()


@pytest.mark.usefixtures("loaded")
def test_commands_never_overwrite_and_fail_in_one_line(tmp_path, monkeypatch):
    book, packed = tmp_path / "book.txt", tmp_path / "book.txt.blz"
    book.write_bytes(b"text")
    packed.write_bytes(b"mine")
    for arguments, words in [
        (("compress", str(book)), "--force"),
        (("compress", str(tmp_path / "none")), "can be read"),
        (("compress", str(book), "--out", str(tmp_path / "no" / "x")), "folder"),
        (("compress", str(book), "--method", "magic", "--out", str(tmp_path / "y")), "expected method"),
        (("decompress", str(packed), "--force"), "begins with"),
        (("decompress", str(book)), "--out"),
        (("codec-info", str(book)), "begins with"),
    ]:
        code, out, err = call(monkeypatch, *arguments)
        lines = [line for line in err.splitlines() if line.startswith("basin-lens:")]
        assert code in (1, 2) and not out and len(lines) == 1 and words in lines[0], err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "book.txt.blz"]
    assert packed.read_bytes() == b"mine" and book.read_bytes() == b"text"
    assert call(monkeypatch, "compress", str(book), "--force")[0] == 0
    assert codec.read(packed.read_bytes()).restored() == b"text"


@pytest.mark.usefixtures("loaded")
def test_an_interrupted_compression_leaves_no_file(tmp_path, monkeypatch):
    book = tmp_path / "book.txt"
    book.write_bytes(TEXT.encode())

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for where in ((lockstep, "_step"), (os, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(*where, interrupt)
            assert call(patched, "compress", str(book))[0] == 130
        assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def bits(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("there", [False, True])
def test_a_secret_file_stays_one_there_and_back(tmp_path, monkeypatch, there):
    book, packed = tmp_path / "book.txt", tmp_path / "book.txt.blz"
    book.write_bytes(b"for my eyes alone")
    book.chmod(0o600)
    for made in (packed, book):
        if there:
            made.touch()
            made.chmod(0o644 if made is packed else 0o666)
        assert (
            call(monkeypatch, "compress" if made is packed else "decompress", str(book if made is packed else packed), "--force")[0]
            == 0
        )
        assert bits(made) == 0o600
        if made is packed and not there:
            book.unlink()
    assert book.read_bytes() == b"for my eyes alone"


@pytest.mark.parametrize("command", ["compress", "decompress", "codec-view"])
def test_the_output_is_never_the_input(tmp_path, monkeypatch, command):
    """By whatever name, with --force, and before a model is loaded."""
    monkeypatch.setattr(cli_codec, "_load", lambda _: pytest.fail("loaded"))
    book = tmp_path / "book.blz"
    book.write_bytes(container.store(b"text", "not told").to_bytes())
    os.link(book, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(book)
    (tmp_path / "to").symlink_to(tmp_path)
    before = book.read_bytes()
    for name in ("book.blz", "hard", "soft", "to/book.blz", "to/to/hard"):
        code, out, err = call(monkeypatch, command, str(book), "--out", str(tmp_path / name), "--force")
        assert code == 1 and not out and "other than the input" in err and err.count("\n") == 1
    assert book.read_bytes() == before and (tmp_path / "soft").is_symlink()


@pytest.mark.usefixtures("loaded")
def test_output_goes_through_pipes_and_devices_and_never_through_links(tmp_path, monkeypatch):
    book, pipe, link, got = tmp_path / "book.txt", tmp_path / "pipe", tmp_path / "link", []
    book.write_bytes(b"text")
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    assert call(monkeypatch, "compress", str(book), "--out", str(pipe))[0] == 0
    reader.join(10)
    assert codec.read(got[0]).restored() == b"text" and pipe.is_fifo()
    with (tmp_path / "log").open("ab+") as log:  # as the shell's >>
        log.write(b"first")
        log.flush()
        assert call(monkeypatch, "compress", str(book), "--out", f"/dev/fd/{log.fileno()}")[0] == 0
    assert (tmp_path / "log").read_bytes() == b"first" + got[0]
    assert call(monkeypatch, "compress", str(book), "--out", "/dev/null")[0] == 0 and Path("/dev/null").is_char_device()
    (tmp_path / "theirs").write_bytes(b"theirs")
    for to in ("theirs", "nowhere"):
        link.symlink_to(to)
        code, _, err = call(monkeypatch, "compress", str(book), "--out", str(link), "--force")
        assert code == 1 and "a link to" in err and link.is_symlink()
        link.unlink()
    assert (tmp_path / "theirs").read_bytes() == b"theirs" and not (tmp_path / "nowhere").exists()


@pytest.mark.usefixtures("loaded")
def test_a_terminal_gets_text_alone(tmp_path, monkeypatch):
    main, side = os.openpty()
    name = os.ttyname(side)
    (tmp_path / "text.txt").write_bytes(b"text")
    for kind, content in {"text": b"text", "bytes": b"\0\xff"}.items():
        (tmp_path / f"{kind}.blz").write_bytes(container.store(content, "not told").to_bytes())
    try:
        for command, file in [("compress", "text.txt"), ("decompress", "bytes.blz")]:
            code, _, err = call(monkeypatch, command, str(tmp_path / file), "--out", name)
            assert code == 1 and "got a terminal" in err
            with monkeypatch.context() as patched:
                patched.setattr(_Stream, "isatty", lambda _: True)
                code, out, err = call(patched, command, str(tmp_path / file), "--out", "-")
            assert code == 1 and "got a terminal" in err and not out
        assert call(monkeypatch, "decompress", str(tmp_path / "text.blz"), "--out", name)[0] == 0
        assert os.read(main, 100) == b"text"
    finally:
        os.close(main)
        os.close(side)


@pytest.mark.usefixtures("loaded")
def test_a_benchmark_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"\xff")
    assert call(monkeypatch, "codec-bench", str(tmp_path / "file"), "--out", str(tmp_path / "to" / "bench"))[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- benchmark and page ----------------------------------------------------------------------------------------------------------------------


def test_bench_agrees_with_files_and_names_what_is_missing(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "brotli", None)
    monkeypatch.setattr(codec.TextCodec, "streams_for", lambda *_: 8)  # a text as short as this has one, and a step for each token
    weaken_xz(monkeypatch)
    table = codec.bench(llama, TEXT, streams=2, context=50).set_index("coder")
    assert table.columns.tolist() == list(codec.benchmark.COLUMNS[1:])
    for method, backend in METHODS:
        coder = codec.TextCodec(llama, method, backend, streams=2, context=50)
        file = coder.encode_text(*coder.prepared(TEXT))
        row = table.loc["direct" if method == "direct" else f"ranks, {backend}"]
        assert (row.bytes, row.header_bytes) == (len(file), len(codec.read(file).header()))
    assert abs(table.gap_to_ideal["direct"]) < 0.03
    assert "pip install" in table.note["brotli -11"] and np.isnan(table.bytes["brotli -11"])
    assert table.bytes["zstd -19"] < len(TEXT) and table.bytes["PPMd -o16"] < len(TEXT)
    with pytest.raises(CodecError, match="not UTF-8"):
        codec.bench(llama, b"\xff")
    assert len(bl.views.size_bars(table.reset_index()).axes[0].patches) == table.bytes.notna().sum()


@pytest.mark.usefixtures("loaded")
def test_bench_and_view_commands_write_their_files(tmp_path, monkeypatch):
    text = tmp_path / "<b>.txt"
    text.write_text("<script>alert('\u00e9')</script>\r\n\0 & \"quoted\" text. " * 2, encoding="utf-8")
    page, folder = tmp_path / "page.html", tmp_path / "bench"
    assert call(monkeypatch, "codec-view", str(text), "--out", str(page))[0] == 0
    made = page.read_text(encoding="utf-8")
    assert "<script" not in made and not re.search("https?:", made) and "\0" not in made
    assert re.findall(r'(?:src|href)="(.{22})', made) == ["data:image/png;base64,"] * 2
    assert made.count('<span class="b') == len(codec.TextCodec(cli_codec._load("")).ranks(text.read_bytes()))
    code, said, _ = call(monkeypatch, "codec-bench", str(text), str(text), "--out", str(folder))
    assert code == 0 and said.count(b"xz -9e") == 2
    assert sorted(path.name for path in folder.iterdir()) == ["codec-bench.csv", "codec-bench.png"]
    several = ("--model", "one", "--model", "other", "--out", str(tmp_path / "both"))
    assert call(monkeypatch, "codec-bench", str(text), *several)[0] == 0
    both = pd.read_csv(tmp_path / "both" / "codec-bench.csv").set_index("coder")
    assert both.model["direct (one)"] == "one" and both.model["direct (other)"] == "other"
    assert both.bytes["direct (one)"] == both.bytes["direct (other)"]  # the same model here
    assert both.index.is_unique and pd.isna(both.model["xz -9e"])
    for again in (("codec-view", str(text), "--out", str(page)), ("codec-bench", str(text), "--out", str(folder))):
        code, _, err = call(monkeypatch, *again)
        assert code == 1 and "--force" in err


@pytest.mark.usefixtures("loaded")
def test_bench_goes_on_behind_a_file_that_it_cannot_measure(tmp_path, monkeypatch):
    good, bad, out = tmp_path / "good.txt", tmp_path / "bad.bin", tmp_path / "deep" / "bench"
    good.write_text(TEXT[:200], encoding="utf-8")
    bad.write_bytes(b"\xff\xfe\x00")
    code, said, err = call(monkeypatch, "codec-bench", str(bad), str(good), str(tmp_path / "none"), "--out", str(out))
    assert code == 1 and said.count(b"xz -9e") == 1
    last = next(line for line in err.splitlines() if line.startswith("basin-lens:"))
    assert "2 of 3 left out" in last and "bad.bin: " in last and "not UTF-8" in last and "none: " in last
    assert sorted(path.name for path in out.iterdir()) == ["codec-bench.csv", "codec-bench.png"]
    table = pd.read_csv(out / "codec-bench.csv")
    assert set(table.file) == {str(good)} and table.bytes.notna().any()


@pytest.mark.usefixtures("loaded")
def test_bench_leaves_no_folder_behind_where_nothing_was_measured(tmp_path, monkeypatch):
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"\xff\xfe\x00")
    for file in (bad, tmp_path / "none"):
        code, _, err = call(monkeypatch, "codec-bench", str(file), "--out", str(tmp_path / "deep" / "bench"))
        assert code == 1 and "can be measured, got none" in err
        assert [path.name for path in tmp_path.iterdir()] == ["bad.bin"]
    (tmp_path / "kept").mkdir()
    assert call(monkeypatch, "codec-bench", str(bad), "--out", str(tmp_path / "kept"))[0] == 1
    assert (tmp_path / "kept").is_dir()
    assert call(monkeypatch, "codec-bench", str(bad), "--out", str(bad / "x"))[0] == 1


def test_the_page_shows_what_has_no_shape():
    row = {"rank": 0, "probability": 0.5, "bits": 1.0, "top": ["\u202e<b>"], "top_probability": [0.5]}
    tokens = ("\u202e", "\u00a0\u200b", " \t\x07\x7f", "\u00e9")
    made = bl.views.code_page(pd.DataFrame([row | {"token": token} for token in tokens])).html
    for shown in (r"\u202e", r"\xa0</i><i>\u200b", "\u00b7</i><wbr><i>\u21e5\t</i><i>\u2407</i><i>\\x7f"):
        assert f"<i>{shown}</i></span>" in made
    assert ">\u00e9</span>" in made
    assert not {"\u202e", "\u00a0", "\u200b", "\x07", "\x7f"} & set(made) and "<b>" not in made


def test_drawings_keep_their_words_apart_and_name_their_units():
    row = {"token": "a", "probability": 0.5, "bits": 1.0, "top": ["a"], "top_probability": [0.5]}
    table = pd.DataFrame([row | {"rank": rank} for rank in (0, 1, 700, 40_000)])
    growth = pd.DataFrame({"original": [0, 900], "model": [0.0, 300.0], "gzip": [0, 302], "xz": [0, 302]})
    lines, bars = growth_lines(growth), rank_bars(table["rank"].to_numpy())
    for figure in (lines, bars):
        figure.draw_without_rendering()
        (axes,) = figure.axes
        words = [text for text in (*axes.texts, *axes.get_xticklabels(), axes.xaxis.label) if text.get_text()]
        boxes = [word.get_window_extent() for word in words]
        assert not [(one, other) for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
        assert all(0 <= box.x0 <= box.x1 <= figure.bbox.x1 and 0 <= box.y0 <= box.y1 <= figure.bbox.y1 for box in boxes)
    assert [text.get_text() for text in lines.axes[0].texts] == ["model 300", "gzip 302", "xz 302"]
    assert (lines.axes[0].get_xlabel(), lines.axes[0].get_ylabel()) == ("bytes of text", "bytes compressed")
    assert (bars.axes[0].get_xlabel(), bars.axes[0].get_ylabel()) == ("rank", "share of tokens")
    names = [label.get_text() for label in bars.axes[0].get_xticklabels()]
    assert names[:3] == ["0", "1", "2+"] and names[10:12] == ["512+", "2\u00b9\u2070+"] and names[-1] == "2\u00b9\u2075+"
    # What the pictures show can be heard, too.
    first, second = re.findall(r' alt="([^"]*)"', bl.views.code_page(table, growth=growth).html)
    assert first.endswith("Bytes compressed of 900 bytes of text: model 300, gzip 302, xz 302")
    assert "Share of tokens by rank: 0: 25.0%, 1: 25.0%, 2+: 0.0%" in second


def test_shares_of_ranks_are_those_of_their_ranges():
    ranks = np.array([0, 0, 1, 2, 3, 4, 7, 8])
    names, shares, expected = rank_shares(ranks, np.full(100, 0.01))
    assert names == ["0", "1", "2+", "4+", "8+"]
    np.testing.assert_allclose(shares, [2 / 8, 1 / 8, 2 / 8, 2 / 8, 1 / 8])
    np.testing.assert_allclose(expected, [0.01, 0.01, 0.02, 0.04, 0.08])
    assert rank_shares(ranks) == (names, shares, [])


def test_growth_ends_at_the_whole_text(llama):
    coder = codec.TextCodec(llama)
    bits = coder.ranks(TEXT)["bits"].to_numpy()
    table = codec.growth(coder, TEXT, bits, points=5)
    assert table.original.tolist()[0] == 0 and table.original.tolist()[-1] == len(TEXT.encode())
    assert table.model.iloc[-1] == pytest.approx(bits.sum() / 8)
    assert table.original.is_monotonic_increasing and table.model.is_monotonic_increasing


def test_public_docstrings_have_their_parts():
    for thing, parts in [
        (codec.TextCodec, ("Args:", "Raises:", "Source:", "Example:")), (codec.TextCodec.encode, ("Args:", "Returns:", "Raises:")),
        (codec.TextCodec.decode, ("Raises:",)), (codec.TextCodec.estimate, ("Args:", "Returns:", "Example:")),
        (codec.TextCodec.ranks, ("Args:", "Returns:", "Example:")), (codec.bench, ("Args:", "Returns:", "Raises:", "Example:")),
        (bl.views.code_page, ("Args:", "Returns:", "Raises:", "Example:")), (bl.views.size_bars, ("Args:", "Raises:", "Example:")),
        (door.stepping, ("Args:", "Raises:", "Example:")),
    ]:  # fmt: skip
        for part in parts:
            assert part in thing.__doc__, (thing, part)


@pytest.mark.real
def test_the_real_model_halves_what_xz_makes(real_model):
    text = (Path(bl.__file__).parent / "data" / "passages" / "fiction.txt").read_text(encoding="utf-8")[:1500]
    coder = codec.TextCodec(real_model)
    made = coder.encode(text)
    assert coder.decode(made).decode() == text
    assert 2 * sum(map(len, codec.read(made).chunks)) < len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
