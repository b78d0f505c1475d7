"""The text codec beside general compressors, and its decoding speed beside the plain batched forward pass.

    python tests/benchmarks/codec.py FILE [BYTES]
    python tests/benchmarks/codec.py --sweep FILE...

Sizes: every back end and every general compressor on the first BYTES (20,000) of FILE, encoded, decoded and compared. Speed: one decoding step of
64 streams, the integer tables and the range coder included, at places spread over a window of 64 and of 512 tokens (the cache filled up to
each), against the plain forward pass of as many tokens, 16 x 64 and 2 x 512. Ratios are of the same run: these machines are noisy. The last
line is JSON. The weights are not counted; famous text was probably seen in training.

With --sweep, sizes by `TextCodec.estimate` (sum -log2 p) and the header that a file of so many tokens has: the first FILE over streams x context
(with the speed of decoding, measured as above, beside the plain forward pass of that window) and over lengths of its beginning, then the
first 20,000 bytes of every FILE; each beside general compressors. The last line is JSON.
"""

import ctypes
import json
import math
import os
import platform
import statistics
import sys
import time

import numpy as np
import pandas as pd
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.codec.benchmark import general_compressors
from basin_lens.codec.container import CHUNK_TOKENS
from basin_lens.codec.lockstep import DirectCoder
from basin_lens.model.incremental_decoding import stepping

STREAMS, PLACES, ROUNDS = 64, 8, 3

BYTES = 20_000
CHUNK_BYTES = 12  # in the header, for each chunk
SWEPT_STREAMS, SWEPT_CONTEXTS, SWEPT_BYTES = (1, 4, 16, 64), (64, 128, 512, 2048), (1_000, 5_000, 20_000, 100_000, 1_000_000)
GENERAL = ("PPMd -o16", "brotli -11", "zstd -19", "xz -9e", "gzip -9")


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def plain_rate(model, window: int) -> float:
    """Tokens per second of the forward pass, about 1,024 of them at a time, logits out."""
    tokens = torch.randint(0, 40_000, (max(1, 1024 // window), window))
    with door.measuring(model):
        door.forward_pass(model, tokens, {})
        return tokens.numel() / statistics.median(seconds(lambda: door.forward_pass(model, tokens, {})) for _ in range(ROUNDS))


def decoding_rate(model, window: int, streams: int = STREAMS) -> float:
    """Tokens per second of decoding, mean over places of the window."""
    tokens = torch.randint(0, 40_000, (streams,))
    spent = []
    with stepping(model, streams, window) as stepper:
        logits = stepper.step(tokens).numpy()
        coder = DirectCoder()
        for place in np.linspace(2, window - 1, PLACES).astype(int).tolist():
            # The true tokens do not matter to the time: what was coded is what is decoded.
            writer = DirectCoder()
            writer.put(logits, np.arange(streams))
            coder.open(writer.finish(), streams)
            stepper.pretend(max(place, stepper.position))
            spent.append(seconds(lambda logits=logits: coder.get(logits)) + seconds(lambda: stepper.step(tokens)))
    return streams / statistics.mean(spent[1:])


def beginning(file: str, size: int) -> bytes:
    """The first `size` bytes of a text, less a character that they cut."""
    with open(file, "rb") as opened:
        return opened.read(size).decode("utf-8", "ignore").encode()


def measured(codec, data: bytes, streams: int) -> dict:
    """The file that the direct method would make of a text, estimated, beside the files of general compressors."""
    _, tokens = codec.prepared(data)
    steps = math.ceil(len(tokens) / streams)
    ideal = codec.estimate(data, streams=streams).total_bits / 8
    head = len(bl.codec.read(codec.encode_text(*codec.prepared("A."))).header())
    windows = math.ceil(CHUNK_TOKENS / (streams * codec.context))
    head += CHUNK_BYTES * (math.ceil(steps / (windows * codec.context)) - 1)
    others = {name: len(compress(data)) for name, compress in general_compressors().items() if name in GENERAL}
    return {
        "bytes": len(data), "tokens": len(tokens), "streams": streams, "context": codec.context, "ideal_bytes": round(ideal, 1),
        "header_bytes": head, "file_bytes": math.ceil(ideal) + head, "bits_per_byte": round(8 * (ideal + head) / len(data), 3),
        "payload_bits_per_byte": round(8 * ideal / len(data), 3),
    } | others  # fmt: skip


def resident() -> int:
    """Bytes of memory that this process holds, less what it has freed (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def step_memory(model, streams: int, window: int) -> int:
    """Bytes that the streams hold with their windows full: keys and values."""
    before = resident()
    with stepping(model, streams, window) as stepper:
        stepper.step(torch.zeros(streams, dtype=torch.long))
        stepper.pretend(window)
        return resident() - before


def speeds(model, streams: int, window: int) -> dict:
    """Tokens per second of decoding and of the plain forward pass, medians of rounds that take turns."""
    pairs = [(decoding_rate(model, window, streams), plain_rate(model, window)) for _ in range(ROUNDS)]
    decoding, plain = (round(statistics.median(rates), 1) for rates in zip(*pairs, strict=True))
    return {"decode_tokens_per_second": decoding, "plain_tokens_per_second": plain}


def sweep(files: list[str]) -> None:
    model = bl.load_model()
    first = beginning(files[0], BYTES)
    grid, sizes, texts = [], [], []
    _, tokens = bl.codec.TextCodec(model).prepared(first)
    seen: dict[tuple[int, int], dict] = {}
    for streams in SWEPT_STREAMS:
        for context in SWEPT_CONTEXTS:
            # A window longer than its stream is the stream.
            key = streams, min(context, math.ceil(len(tokens) / streams))
            if key not in seen:
                seen[key] = measured(bl.codec.TextCodec(model, context=context), first, streams) | {
                    "memory_mib": round(step_memory(model, *key) / 2**20)
                } | speeds(model, *key)  # fmt: skip
            grid.append(seen[key] | {"context": context})
            print(f"{streams:>2} streams, context {context:>4}: {grid[-1]['payload_bits_per_byte']:.3f} bits per byte, "
                  f"{grid[-1]['decode_tokens_per_second']:.0f} tokens/s decoded", flush=True)  # fmt: skip
    codec = bl.codec.TextCodec(model)
    for file, wanted, rows in [*((files[0], size, sizes) for size in SWEPT_BYTES), *((file, BYTES, texts) for file in files)]:
        data = beginning(file, wanted)
        if rows is texts or len(data) > wanted - 4:
            rows.append({"file": file} | measured(codec, data, codec.streams_for(len(codec.prepared(data)[1]))))
            print(f"{file}, {len(data)} bytes: {rows[-1]['bits_per_byte']:.3f} bits per byte", flush=True)
    for rows in filter(None, (grid, sizes, texts)):
        print(pd.DataFrame(rows).to_string(index=False))
    print(json.dumps({
        "benchmark": "codec-sweep", "device": platform.machine(), "threads": torch.get_num_threads(), "model": "smollm2-135m", "grid": grid,
        "sizes": sizes, "texts": texts,
    }))  # fmt: skip


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--sweep":
        sweep(sys.argv[2:])
        return
    data = beginning(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else BYTES)
    model = bl.load_model()
    table = bl.codec.bench(model, data)
    print(
        table[["coder", "bytes", "header_bytes", "bits_per_byte", "payload_bits_per_byte", "gap_to_ideal", "note"]].to_string(
            index=False
        )
    )
    known = table.set_index("coder")
    direct = known.loc["direct"]
    print(
        f"{direct.encode_tokens_per_second:.0f} tokens/s encoded, {direct.decode_tokens_per_second:.0f} decoded, {int(direct.streams)} streams"
    )
    ratios = {}
    for window in (64, 512):
        pairs = [(decoding_rate(model, window), plain_rate(model, window)) for _ in range(ROUNDS)]
        ratios[window] = statistics.median(one / other for one, other in pairs)
        one, other = pairs[-1]
        print(
            f"context {window}: decoding {one:.0f} tokens/s with {STREAMS} streams, plain {other:.0f}; ratio {ratios[window]:.2f}"
        )
    print(json.dumps({
        "benchmark": "codec", "device": platform.machine(), "threads": torch.get_num_threads(), "model": "smollm2-135m", "file": sys.argv[1],
        "bytes": len(data), "direct_bytes": int(direct.bytes), "gap_to_ideal": round(float(direct.gap_to_ideal), 4),
        "xz_over_direct": round(float(known.bytes["xz -9e"] / direct.bytes), 2),
        "ppmd_over_direct": round(float(known.bytes["PPMd -o16"] / direct.bytes), 2),
        "decode_over_plain_64": round(ratios[64], 3), "decode_over_plain_512": round(ratios[512], 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
