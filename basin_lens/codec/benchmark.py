"""The codec's sizes and speeds beside general compressors, on one text."""

import bz2
import gzip
import lzma
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import numpy as np
import pandas as pd
import zstandard
from jaxtyping import Float, Int

from basin_lens.codec.container import Setting, read
from basin_lens.codec.lockstep import TokenWriter, encode_tokens, token_coder
from basin_lens.codec.rank_coders import RANK_CODERS
from basin_lens.codec.text import TextCodec
from basin_lens.errors import CodecError
from basin_lens.model import HookedModel, vocabulary_size
from basin_lens.values import whole_numbers

COLUMNS = (
    "coder",
    "kind",
    "original_bytes",
    "bytes",
    "header_bytes",
    "bits_per_byte",
    "payload_bits_per_byte",
    "gap_to_ideal",
    "tokens",
    "streams",
    "context",
    "encode_tokens_per_second",
    "decode_tokens_per_second",
    "plain_tokens_per_second",
    "note",
)


def general_compressors() -> dict[str, Callable[[bytes], bytes] | str]:
    """Compressors at their strongest usual setting, by name; in place of one that is not installed, what to do about it."""
    return {
        "gzip -9": lambda data: gzip.compress(data, 9, mtime=0),
        "bzip2 -9": lambda data: bz2.compress(data, 9),
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "zstd -19": lambda data: zstandard.ZstdCompressor(level=19).compress(data),
        "zstd --ultra -22": lambda data: zstandard.ZstdCompressor(level=22).compress(data),
        "brotli -11": _optional("brotli", lambda module, data: module.compress(data, quality=11)),
        "PPMd -o16": _optional("pyppmd", lambda module, data: module.compress(data, max_order=16, mem_size=64 << 20)),
    }


@whole_numbers(CodecError)
def bench(model: HookedModel, data: bytes | str, *, streams: int = 16, context: int = 512, progress: bool = False) -> pd.DataFrame:
    """Every back end and every general compressor on one text.

    The direct method is encoded, decoded and compared. All rank back ends see one further pass; their sizes are those of their
    files, and each is told to 1 byte. The plain speed is that of a batched pass over the same tokens, in windows, without coding.

    Args:
        model: a hooked model with a fast tokenizer.
        data: UTF-8 bytes or a text.
        streams, context: see `TextCodec`.
        progress: show bars.

    Returns:
        one row per coder: `coder`, `kind` ("model" or "general"), `original_bytes`, `bytes` (of the file), `header_bytes`,
        `bits_per_byte`, `payload_bits_per_byte` (without header), `gap_to_ideal` (payload over sum -log2 p under the same streams,
        minus 1), `tokens`, `streams`, `context`, `encode_tokens_per_second`, `decode_tokens_per_second`, `plain_tokens_per_second`,
        `note` (a compressor that is not installed, with NaN for its sizes). The weights are not counted.

    Raises:
        CodecError: bytes that the model cannot code, or an empty text.

    Example:
        >>> import basin_lens as bl
        >>> table = bl.codec.bench(bl.load_model(), "The cat sat on the mat. " * 20, streams=1)
        >>> bool(table.set_index("coder").bytes["direct"] < table.set_index("coder").bytes["ranks, zlib"])
        True
    """
    codec = TextCodec(model, streams=streams, context=context, progress=progress)
    plain, tokens = codec.prepared(data)
    if not len(tokens):
        raise CodecError("expected a text, got an empty one.")
    with _clock() as encoding:
        blob = codec.encode_text(plain, tokens)
    with _clock() as decoding:
        if codec.decode(blob) != plain:
            raise CodecError("expected the file to decode to its text, got another. Please report it.")
    file = read(blob)
    assert file.setting is not None
    with _clock() as passing:
        ideal = codec.estimate(plain, streams=file.setting.streams).total_bits
    header, count = len(file.header()), len(tokens)
    shared = {"original_bytes": len(plain), "tokens": count, "streams": file.setting.streams, "context": codec.context}
    rows: list[dict[str, object]] = []

    def add(coder: str, kind: str, size: int, head: int = 0, **more: float) -> None:
        payload = size - head
        gap = {"gap_to_ideal": 8 * payload / ideal - 1} if kind == "model" else {}
        rates = {"bits_per_byte": 8 * size / len(plain), "payload_bits_per_byte": 8 * payload / len(plain)}
        row: dict[str, object] = {"coder": coder, "kind": kind, "bytes": size, "header_bytes": head, "note": ""}
        rows.append({**row, **rates, **gap, **shared, **more})

    speeds = {
        "encode_tokens_per_second": count / encoding[0],
        "decode_tokens_per_second": count / decoding[0],
        "plain_tokens_per_second": count / passing[0],
    }
    add("direct", "model", len(blob), header, **speeds)
    for name, size in _rank_sizes(codec, tokens, file.setting).items():
        add(f"ranks, {name}", "model", header + size, header)
    for name, compress in general_compressors().items():
        if isinstance(compress, str):
            rows.append({"coder": name, "kind": "general", "note": compress, **shared})
        else:
            add(name, "general", len(compress(plain)))
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS))


@whole_numbers(CodecError)
def growth(codec: TextCodec, data: bytes | str, bits: Float[np.ndarray, " tokens"], *, points: int = 40) -> pd.DataFrame:
    """How the size grows along a text.

    Args:
        codec: gives the tokens their bytes.
        data: the text.
        bits: of each of its tokens, as from `TextCodec.ranks`.
        points: prefixes to look at.

    Returns:
        one row per prefix: `original`, `model`, `gzip`, `xz`, all in bytes; a prefix ends with a token, and is compressed by
        itself.
    """
    _, tokens = codec.prepared(data)
    ends = sorted({round(end) for end in np.linspace(0, len(tokens), points + 1)})
    total = np.concatenate([[0.0], np.cumsum(bits)]) / 8
    rows = []
    for end in ends:
        prefix = codec.text_of(tokens[:end])
        rows.append(
            {
                "original": len(prefix),
                "model": total[end],
                "gzip": len(gzip.compress(prefix, 9, mtime=0)),
                "xz": len(lzma.compress(prefix, preset=9 | lzma.PRESET_EXTREME)),
            }
        )
    return pd.DataFrame(rows)


class _Every(TokenWriter):
    """All rank back ends at once."""

    def __init__(self, vocab: int) -> None:
        self.coders = {name: token_coder("ranks", name, vocab) for name in RANK_CODERS}
        self.sizes = dict.fromkeys(RANK_CODERS, 0)

    def put(self, logits: Float[np.ndarray, "rows vocab"], tokens: Int[np.ndarray, " rows"]) -> None:
        for coder in self.coders.values():
            coder.put(logits, tokens)

    def finish(self) -> bytes:
        for name, coder in self.coders.items():
            self.sizes[name] += len(coder.finish())
        return b""


def _rank_sizes(codec: TextCodec, tokens: Int[np.ndarray, " n"], setting: Setting) -> dict[str, int]:
    """Payload of each back end, from one pass in lockstep."""
    every = _Every(vocabulary_size(codec.model))
    with codec.stepping(setting.streams, min(setting.window, setting.steps), setting.threads) as stepper:
        for _ in encode_tokens(stepper, tokens, setting.start, setting.window, every, windows=setting.windows):
            pass
    return every.sizes


def _optional(module: str, compress: Callable[[ModuleType, bytes], bytes]) -> Callable[[bytes], bytes] | str:
    try:
        found = import_module(module)
    except ImportError:
        return f"{module} is not installed: pip install 'basin-lens[bench]'"
    return lambda data: compress(found, data)


@contextmanager
def _clock() -> Iterator[list[float]]:
    seconds = [0.0]
    start = time.perf_counter()
    yield seconds
    seconds[0] = time.perf_counter() - start
