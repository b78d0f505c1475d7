"""What reading one border in the middle of the stack costs, beside a whole forward pass with logits.

    python tests/benchmarks/reading.py [SEQUENCES]

SmolLM2-135M on sequences of 128 tokens of the built-in passages, one thread: processor time of reading the borders of the middle
layer, over that of the model's own pass of the same batches; median over rounds of the ratio within a round. Prints what it measures;
the last line is JSON.
"""

import json
import os
import platform
import statistics
import sys
import time

import torch

import basin_lens as bl
from basin_lens.capture.batches import token_batches
from basin_lens.model import forward_pass, measuring, n_layers
from basin_lens.texts import reference_passages

ROUNDS = 5


def seconds(work) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    model = bl.load_model(device="cpu")
    middle = n_layers(model) // 2
    text = "\n\n".join(passage.text for passage in reference_passages())
    ids = model.tokenizer(text)["input_ids"]
    ids = [ids[128 * i : 128 * (i + 1)] for i in range(min(count, len(ids) // 128))]
    planned = bl.Capture.plan(model, ids, layers=[middle])
    batches = [tokens for _, tokens, _ in token_batches(planned, None)]

    def whole() -> None:
        with measuring(model):
            for tokens in batches:
                forward_pass(model, tokens, {})

    def early() -> None:
        bl.Capture.from_texts(model, ids, layers=[middle], progress=False)

    whole(), early()
    rounds = [(seconds(early), seconds(whole)) for _ in range(ROUNDS)]
    told = {
        "machine": platform.machine(), "cores": os.cpu_count(), "threads": 1, "tokens": planned.n_rows, "layer": middle,
        "layers": n_layers(model), "one_border_s": round(statistics.median(a for a, _ in rounds), 2),
        "whole_pass_s": round(statistics.median(b for _, b in rounds), 2),
        "ratio": round(statistics.median(a / b for a, b in rounds), 3),
    }  # fmt: skip
    for name, value in told.items():
        print(f"{name:>16}  {value}")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
