"""The file format, version 1, frozen by a golden file in the tests. Whole numbers are little-endian.

    at   bytes
    0    4      magic: 8F 42 4C 5A
    4    1      version: 1
    5    1      method: 0 raw, 1 zstd, 2 direct, 3 ranks
    6    1      back end: 0 none, 1 range, 2 zlib, 3 huffman, 4 adaptive, 5 zipf, 6 entropy
    7    1      flags: why the file is raw or zstd. 0 not told, 1 not UTF-8, 2 the tokenizer does not give the text back,
                3 the model's file would be no smaller, 4 too long for the model
    8    4      bytes of the header, its checksum included
    12   8      bytes of the original
    20   32     SHA-256 of the original

    direct and ranks only:
    52   16     model fingerprint: weights and settings as they compute, not the name (`basin_lens.model.fingerprint`)
    68   8      tokenizer hash: the first half of `basin_lens.model.tokenizer_fingerprint`
    76   8      probe hash: what the model computes on a fixed prompt (`basin_lens.codec.lockstep.probe`)
    84   2      streams that advance together
    86   4      window: tokens after which every stream starts anew
    90   2      threads of torch
    92   1      dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64
    93   4      id of the token that opens every stream and every window
    97   8      tokens
    105  2      windows in a chunk
    107  2      bytes of the next field, n
    109  n      environment, ASCII, between spaces: versions of torch, transformer-lens, transformers, tokenizers, numpy and
                constriction, the processor's capability as torch names it, the device

    every method:
         4      number of chunks
         12     for each chunk: bytes, tokens (0 in raw and zstd), CRC-32
         4      CRC-32 of all of the above
         ...    the chunks, one behind the other

In direct and ranks, the tokens are cut into streams of equal length, the first ones longer by one where it does not divide; all
streams advance together, and what they code at one place is coded in the order of the streams. A chunk holds the tokens of some
windows of all streams, no more windows than make 4,096 tokens (and at least one), the last chunk what is left: a decoder needs the
memory of one chunk, whatever the header declares. Raw and zstd have one chunk, and none for an empty original.
"""

import hashlib
import itertools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import zstandard

from basin_lens.codec.rank_coders import RANK_CODERS
from basin_lens.errors import CodecError, CorruptFileError, FileVersionError, TruncatedFileError, UnknownFileError

MAGIC = b"\x8fBLZ"
VERSION = 1
METHODS = ("raw", "zstd", "direct", "ranks")
BACKENDS = ("none", "range", *RANK_CODERS)  # a file holds the place: a new one goes to the end
WHY_STORED = (
    "not told",
    "not UTF-8",
    "the tokenizer does not give the text back",
    "no smaller with the model",
    "too long for the model",
)
DTYPES = ("float32", "bfloat16", "float16", "float64")

MOST_BYTES = 1 << 30  # of the original
MOST_STREAMS = 256
MOST_WINDOW = 1 << 20
MOST_THREADS = 256
MOST_CHUNKS = 1 << 20
CHUNK_TOKENS = 4096  # a chunk ends with the window that brings it there: shorter ones would cost their 12 bytes too often
_MOST_GROWTH = 1 << 15  # of zstd: a block of 4 bytes gives at most 128 KiB
_MOST_ZSTD_WINDOW = 1 << 23  # bytes that a frame of level 19 keeps behind it at most
_PIECE = 1 << 16  # bytes of text read at once

_FIXED = struct.Struct("<4sBBBBIQ32s")
_MODEL = struct.Struct("<16s8s8sHIHBIQHH")
_COUNT = struct.Struct("<I")
_CHUNK = struct.Struct("<III")


@dataclass(frozen=True)
class Setting:
    """What a decoder must have and do as the encoder had and did it; for the fields' sizes see the module.

    Raises:
        CodecError: a value beyond the format's limits.
    """

    model: bytes
    tokenizer: bytes
    probe: bytes
    streams: int
    window: int
    threads: int
    dtype: str
    start: int
    tokens: int
    windows: int  # in a chunk
    environment: str

    def __post_init__(self) -> None:
        for name, value, most in (
            ("streams", self.streams, MOST_STREAMS),
            ("window", self.window, MOST_WINDOW),
            ("threads", self.threads, MOST_THREADS),
            ("tokens", self.tokens, MOST_BYTES),
            ("windows", self.windows, CHUNK_TOKENS),
        ):
            if not 1 <= value <= most:
                raise CodecError(
                    f"expected {name} between 1 and {most}, got {value}. Choose another number, or get the file again."
                )
        if (self.windows - 1) * self.streams * self.window >= CHUNK_TOKENS:
            raise CodecError(
                f"expected chunks that end with the window that makes {CHUNK_TOKENS} tokens, got {self.windows} windows of "
                f"{self.window} tokens in {self.streams} streams. Get the file again."
            )

    @property
    def steps(self) -> int:
        """Places of the longest stream."""
        return -(-self.tokens // self.streams)

    @property
    def places(self) -> range:
        """The first place of every chunk."""
        return range(0, self.steps, self.window * self.windows)


@dataclass(frozen=True)
class Container:
    """A file of the codec, read: its header, and its chunks with their checksums proven."""

    method: str
    backend: str
    length: int
    sha256: bytes
    chunks: tuple[bytes, ...] = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)  # of each chunk
    why: str = WHY_STORED[0]
    setting: Setting | None = None

    def header(self) -> bytes:
        """The bytes before the chunks."""
        body = b""
        if self.setting is not None:
            s = self.setting
            environment = s.environment.encode("ascii")
            numbers = (s.streams, s.window, s.threads, DTYPES.index(s.dtype), s.start, s.tokens, s.windows, len(environment))
            body = _MODEL.pack(s.model, s.tokenizer, s.probe, *numbers) + environment
        table = b"".join(_CHUNK.pack(len(c), n, zlib.crc32(c)) for c, n in zip(self.chunks, self.tokens, strict=True))
        size = _FIXED.size + len(body) + _COUNT.size + len(table) + 4
        kind = (METHODS.index(self.method), BACKENDS.index(self.backend), WHY_STORED.index(self.why))
        fixed = _FIXED.pack(MAGIC, VERSION, *kind, size, self.length, self.sha256)
        head = fixed + body + _COUNT.pack(len(self.chunks)) + table
        return head + zlib.crc32(head).to_bytes(4, "little")

    def to_bytes(self) -> bytes:
        """The whole file."""
        return b"".join([self.header(), *self.chunks])

    def checked(self, original: bytes) -> bytes:
        """`original`, if it is what was put in.

        Raises:
            CorruptFileError: another length or SHA-256.
        """
        if len(original) != self.length or hashlib.sha256(original).digest() != self.sha256:
            raise CorruptFileError("expected the text whose SHA-256 is in the header, got another. Get the file again.")
        return original

    def restored(self) -> bytes:
        """The original of a raw or zstd file, which needs no model.

        Raises:
            CodecError: the method needs the model. CorruptFileError: see `checked`.
        """
        if self.method not in METHODS[:2]:
            raise CodecError(f"expected a file of method raw or zstd, got {self.method}. Decode it with TextCodec(model).decode.")
        data = b"".join(self.chunks)
        if self.method == "zstd":
            data = _unpacked(data, self.length, self.sha256)
        return self.checked(data)


def _unpacked(data: bytes, length: int, sha256: bytes) -> bytes:
    """The text of a zstd frame.

    It is read through once in small pieces first: memory is set aside for a text that is proven to be there.
    """
    wrong = CorruptFileError("expected a zstd frame of the header's length, got another. Get the file again.")
    try:
        facts = zstandard.get_frame_parameters(data)
        if facts.content_size != length or length > len(data) * _MOST_GROWTH or facts.window_size > _MOST_ZSTD_WINDOW:
            raise wrong
        digest, size = hashlib.sha256(), 0
        with zstandard.ZstdDecompressor(max_window_size=_MOST_ZSTD_WINDOW).stream_reader(data) as reader:
            while piece := reader.read(_PIECE):
                digest.update(piece)
                size += len(piece)
                if size > length:
                    raise wrong
        if size != length or digest.digest() != sha256:
            raise CorruptFileError(
                "expected a zstd frame with the text whose SHA-256 is in the header, got another. Get the file again."
            )
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptFileError(f"expected a zstd frame, got: {error}. Get the file again.") from error


def store(data: bytes, why: str) -> Container:
    """The smaller of zstd (level 19) and raw.

    Args:
        data: the original, any bytes, at most 1 GiB.
        why: one of `WHY_STORED`.

    Raises:
        CodecError: more than 1 GiB.

    Example:
        >>> from basin_lens.codec.container import read, store
        >>> file = store(b"any bytes" * 9, "not told").to_bytes()
        >>> read(file).method, read(file).restored() == b"any bytes" * 9
        ('zstd', True)
    """
    if len(data) > MOST_BYTES:
        raise CodecError(f"expected at most {MOST_BYTES} bytes, got {len(data)}. Cut the file in pieces.")
    small = zstandard.ZstdCompressor(level=19).compress(data) if data else b""
    method, chunk = ("zstd", small) if data and len(small) < len(data) else ("raw", data)
    chunks = (chunk,) if data else ()
    return Container(method, "none", len(data), hashlib.sha256(data).digest(), chunks, (0,) * len(chunks), why)


def read(blob: bytes) -> Container:
    """Read a file and prove its checksums, before anything of a declared size is set aside.

    Raises:
        UnknownFileError: not a file of the codec. FileVersionError: of another version. TruncatedFileError: it ends too early.
        CorruptFileError: the header or a chunk was changed, or something follows the end.
    """
    head, size = _head(blob)
    _, _, method, backend, why, _, length, sha256 = _FIXED.unpack_from(head)
    known = method < len(METHODS) and backend < len(BACKENDS) and why < len(WHY_STORED) and length <= MOST_BYTES
    if not known or (method >= 2) != (backend > 0) or (method == 2) != (backend == 1):
        raise _limits(f"method {method}, back end {backend}, flags {why}, {length} bytes")
    setting, at = _setting(head) if method >= 2 else (None, _FIXED.size)
    listed = _listed_chunks(head, at, len(setting.places) if setting else min(length, 1))
    tokens = tuple(count for _, count, _ in listed)
    if sum(tokens) != (setting.tokens if setting else 0):
        raise _limits(f"chunks of {sum(tokens)} tokens")
    chunks = _chunks(blob, size, listed)
    return Container(METHODS[method], BACKENDS[backend], length, sha256, chunks, tokens, WHY_STORED[why], setting)


def _head(blob: bytes) -> tuple[bytes, int]:
    """The header without its checksum, which is proven, and where the chunks begin."""
    if blob[: len(MAGIC)] != MAGIC[: len(blob)] or not blob:
        raise UnknownFileError(
            f"expected a file that begins with {MAGIC!r}, got {blob[:4]!r}. It was not made by basin-lens compress."
        )
    if len(blob) > len(MAGIC) and blob[4] != VERSION:
        raise FileVersionError(f"expected version {VERSION} of the format, got {blob[4]}. Use the basin_lens that wrote the file.")
    if len(blob) < _FIXED.size:
        raise _truncated(_FIXED.size, blob)
    size: int = _FIXED.unpack_from(blob)[5]
    if not _FIXED.size + _COUNT.size + 4 <= size <= len(blob):
        raise _truncated(size, blob)
    head, check = blob[: size - 4], blob[size - 4 : size]
    if zlib.crc32(head) != int.from_bytes(check, "little"):
        raise CorruptFileError("expected the header's checksum, got another: the header was changed. Get the file again.")
    return head, size


def _listed_chunks(head: bytes, at: int, expected: int) -> list[tuple[int, int, int]]:
    """Bytes, tokens and checksum of each chunk, as the header lists them from `at` on."""
    if at + _COUNT.size > len(head):
        raise _limits("a header that ends early")
    (count,) = _COUNT.unpack_from(head, at)
    table = head[at + _COUNT.size :]
    if count > MOST_CHUNKS or len(table) != count * _CHUNK.size or expected != count:
        raise _limits(f"{count} chunks")
    return [(size, tokens, check) for size, tokens, check in _CHUNK.iter_unpack(table)]


def _chunks(blob: bytes, at: int, listed: Sequence[tuple[int, int, int]]) -> tuple[bytes, ...]:
    """The chunks from `at` on, their checksums proven, and nothing behind them."""
    ends = [at, *(at + end for end in itertools.accumulate(size for size, _, _ in listed))]
    if ends[-1] > len(blob):
        raise _truncated(ends[-1], blob)
    chunks = tuple(blob[start:end] for start, end in itertools.pairwise(ends))
    for index, (chunk, (_, _, check)) in enumerate(zip(chunks, listed, strict=True)):
        if zlib.crc32(chunk) != check:
            raise CorruptFileError(
                f"expected the checksum of chunk {index}, got another: it was changed. Get the file again.", chunk=index
            )
    if ends[-1] != len(blob):
        raise CorruptFileError(f"expected the end after {ends[-1]} bytes, got {len(blob)}. Something was added to the file.")
    return chunks


def _setting(head: bytes) -> tuple[Setting, int]:
    """The model's part of the header, and where it ends."""
    end = _FIXED.size + _MODEL.size
    if end > len(head):
        raise _limits("a header that ends early")
    *values, size = _MODEL.unpack_from(head, _FIXED.size)
    model, tokenizer, probe, streams, window, threads, dtype, start, tokens, windows = values
    environment = head[end : end + size]
    if len(environment) != size or not environment.isascii() or dtype >= len(DTYPES) or start >= 1 << 24:
        raise _limits(f"dtype {dtype}, start token {start}, environment {environment!r}")
    try:
        setting = Setting(
            model, tokenizer, probe, streams, window, threads, DTYPES[dtype], start, tokens, windows, environment.decode("ascii")
        )
    except CodecError as error:
        raise CorruptFileError(str(error)) from error
    return setting, end + size


def _limits(got: str) -> CorruptFileError:
    return CorruptFileError(f"expected a header within the format's limits, got {got}. Get the file again.")


def _truncated(size: int, blob: bytes) -> TruncatedFileError:
    return TruncatedFileError(f"expected {size} bytes, got {len(blob)}: the file ends too early. Get the file again.")
