"""The text codec beside general compressors, and its decoding speed beside the plain batched forward pass.

    python tests/benchmarks/codec.py FILE [BYTES]

Sizes: every back end and every general compressor on the first BYTES (20,000) of FILE, encoded, decoded and compared. Speed: one decoding step of
64 streams, the integer tables and the range coder included, at places spread over a window of 64 and of 512 tokens (the cache filled up to
each), against the plain forward pass of as many tokens, 16 x 64 and 2 x 512. Ratios are of the same run: these machines are noisy. The last
line is JSON. The weights are not counted; famous text was probably seen in training.
"""

import json
import platform
import statistics
import sys
import time

import numpy as np
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.codec.lockstep import DirectCoder
from basin_lens.model.stepping import stepping

STREAMS, PLACES, ROUNDS = 64, 8, 3


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


def decoding_rate(model, window: int) -> float:
    """Tokens per second of decoding, mean over places of the window."""
    tokens = torch.randint(0, 40_000, (STREAMS,))
    spent = []
    with stepping(model, STREAMS, window) as stepper:
        logits = stepper.step(tokens).numpy()
        coder = DirectCoder()
        for place in np.linspace(2, window - 1, PLACES).astype(int).tolist():
            # The true tokens do not matter to the time: what was coded is what is decoded.
            writer = DirectCoder()
            writer.put(logits, np.arange(STREAMS))
            coder.open(writer.finish(), STREAMS)
            stepper.pretend(max(place, stepper.position))
            spent.append(seconds(lambda logits=logits: coder.get(logits)) + seconds(lambda: stepper.step(tokens)))
    return STREAMS / statistics.mean(spent[1:])


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    with open(sys.argv[1], "rb") as file:
        data = file.read(size).decode("utf-8", "ignore").encode()
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
