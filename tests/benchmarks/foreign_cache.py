"""What it costs to check a user's own cache, beside one pass of the blocks that are asked for.

    python tests/benchmarks/foreign_cache.py [SEQUENCES]

For one, five and all layers of SmolLM2-135M: processor time of `check_cache`, and of a score of tokens (`StateNorm`, check and
values), over that which the same blocks take in the model's own pass over the same sequences, median over rounds of the ratio within
a round, one thread; and tokens that go through blocks (their feed-forwards) meanwhile, over those of one pass of each block that is
asked for. Prints what it measures; the last line is JSON.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import basin_lens as bl
from basin_lens.capture import check_cache, fill_columns
from basin_lens.texts import reference_passages

LENGTH, ROUNDS, PER_PASS = 128, 3, 8


@contextmanager
def watched(model) -> Iterator[tuple[Counter, Counter]]:
    """Tokens through each block, and processor seconds that each takes."""
    tokens, seconds, begun = Counter(), Counter(), {}

    def enter(layer):
        def hook(*_):
            begun[layer] = time.process_time()

        return hook

    def count(layer):
        def hook(_module, args, kwargs, _output):
            tokens[layer] += next(iter([*args, *kwargs.values()])).shape[:2].numel()

        return hook

    def leave(layer):
        def hook(*_):
            seconds[layer] += time.process_time() - begun[layer]

        return hook

    handles = []
    for layer, block in enumerate(model.blocks):
        handles += [block.register_forward_pre_hook(enter(layer)), block.register_forward_hook(leave(layer))]
        handles.append(block.mlp.register_forward_hook(count(layer), with_kwargs=True))
    try:
        yield tokens, seconds
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    """Measure, and print."""
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    model = bl.load_model()
    text = "\n".join(p.text for p in reference_passages())
    tokens = torch.tensor(model.tokenizer(text)["input_ids"])[: count * LENGTH].reshape(count, LENGTH)
    depth = len(model.blocks)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: "hook_resid" in name)
    asked = {"1": [12], "5": [0, 7, 15, 22, depth - 1], str(depth): list(range(depth))}
    ways = {
        "check": check_cache,
        "state norm": lambda model, capture, layers: fill_columns(
            model, capture, [bl.analyzers.StateNorm()], layers=layers, progress=False
        ),
    }
    ratios: dict[str, dict[str, list[float]]] = {way: {name: [] for name in asked} for way in ways}
    shares: dict[str, dict[str, float]] = {way: {} for way in ways}
    for _ in range(ROUNDS):
        with torch.no_grad(), watched(model) as (_seen, own):
            for part in tokens.split(PER_PASS):
                model(part, return_type="logits")
        for way, run in ways.items():
            for name, layers in asked.items():
                capture = bl.Capture.from_cache(model, tokens, cache)
                start = time.process_time()
                run(model, capture, layers)
                ratios[way][name].append((time.process_time() - start) / sum(own[layer] for layer in layers))
                if name not in shares[way]:
                    capture = bl.Capture.from_cache(model, tokens, cache)
                    with watched(model) as (seen, _):
                        run(model, capture, layers)
                    shares[way][name] = round(seen.total() / (len(layers) * tokens.numel()), 3)
    found = {way: {name: round(statistics.median(every), 3) for name, every in held.items()} for way, held in ratios.items()}
    for way in ways:
        for name in asked:
            print(
                f"{way}, layers asked: {name:>2}; time over one pass of these: {found[way][name]:.2f}; tokens: {shares[way][name]:.2f}"
            )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(json.dumps({
        "benchmark": "foreign_cache", "commit": commit, "device": platform.processor() or platform.machine(), "threads": 1,
        "load": round(os.getloadavg()[0], 1), "model": "smollm2-135m", "sequences": count, "length": LENGTH, "rounds": ROUNDS,
        "over_block_passes": found, "tokens_over_block_passes": shares,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
