"""Files that are refused rather than misread; the format is frozen."""

import hashlib
import random
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard

from basin_lens import codec
from basin_lens.codec import container, lockstep
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
from tests.codec.coded import METHODS, TEXT, coded, resealed
from tests.conftest import make_bridge

GOLDEN = Path(__file__).parents[1] / "fixtures" / "codec_v1.blz"


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


# -- what is refused -------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow(everywhere=True)
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(("method", "backend"), METHODS)
def test_stopping_early_changes_no_file(llama, method, backend):
    """At every bound: the file as without one, or none where it is not below."""
    coder = codec.TextCodec(llama, method, backend, streams=2, context=10)
    plain, tokens = coder.prepared(TEXT[:80])
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


# -- the format is frozen --------------------------------------------------------------------------------------------------------------


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
