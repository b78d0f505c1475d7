"""What token merging costs in time, beside the plain forward pass of the same tokens.

    python tests/benchmarks/merging.py [LENGTH]

Whole sequences, SmolLM2-135M, all layers merging to half of the cache, LENGTH (512) tokens, one sequence, in rounds that alternate with the plain
pass. `clustering`: comparing and deciding alone, timed inside the pass; `reading`: what attention over clusters costs besides (here weights
on the full pattern, no kernel of its own); and step by step with a compressed cache against a full one. Ratios are of the same run: these
machines are noisy. The last line is JSON.
"""

import json
import platform
import statistics
import sys
import time

import torch

import basin_lens as bl
from basin_lens import merging
from basin_lens import model as door
from basin_lens.merging import merge_pass
from basin_lens.texts import read_dataset

ROUNDS = 5


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    model = bl.load_model()
    windows = merging.windows_of(model, read_dataset("nltk:inaugural"), length, most=4)
    merger = merging.TokenMerger(range(door.n_layers(model)), target_bytes=0.5, projection=32).calibrate(model, windows.tokens[:3])
    tokens = windows.tokens[3:4]
    inside: list[float] = []

    def timed(name: str):
        plain = getattr(merge_pass.MergePass, name)

        def run(self, *args):
            begun = time.perf_counter()
            try:
                return plain(self, *args)
            finally:
                inside.append(time.perf_counter() - begun)

        return run

    plain_times, merged_times, cluster_times = [], [], []
    whole = {name: getattr(merge_pass.MergePass, name) for name in ("_decide", "_enter")}
    for _ in range(ROUNDS):
        with door.measuring(model):
            plain_times.append(seconds(lambda: door.forward_pass(model, tokens, {})))
        with merger.attached(model), torch.no_grad():
            merged_times.append(seconds(lambda: door.forward_pass(model, tokens, {})))
        inside.clear()
        for name in whole:
            setattr(merge_pass.MergePass, name, timed(name))
        with merger.attached(model), torch.no_grad():
            door.forward_pass(model, tokens, {})
        for name, method in whole.items():
            setattr(merge_pass.MergePass, name, method)
        cluster_times.append(sum(inside))
    plain = statistics.median(plain_times)
    held = merger.statistics()
    found = {
        "length": length, "plain_seconds": plain, "clustering_over_plain": statistics.median(cluster_times) / plain,
        "merged_over_plain": statistics.median(merged_times) / plain, "rate": float(held["rate"].mean()),
        "bytes_share": float(held["bytes"].sum() / held["full_bytes"].sum()),
    }  # fmt: skip
    steps = min(length, 256)
    off = merging.TokenMerger([0], threshold=1.0)
    rates = {}
    for name, each in (("full", off), ("compressed", merger)):
        with merging.streaming(each, model, 1) as stream, torch.no_grad():
            for place in range(steps - 16):
                stream.step(tokens[:, place])
            rates[name] = seconds(lambda stream=stream: [stream.step(tokens[:, steps - 16 + i]) for i in range(16)]) / 16
            found[f"{name}_cache_bytes"] = sum(stream.nbytes())
    found["step_over_full_cache"] = rates["compressed"] / rates["full"]
    print(f"plain pass of {length} tokens: {plain:.2f} s; clustering {found['clustering_over_plain']:.2f} of it")
    print(f"whole merged pass: {found['merged_over_plain']:.2f} of it")
    print(f"one step at {steps}: {rates['compressed'] * 1e3:.0f} ms compressed, {rates['full'] * 1e3:.0f} ms full")
    print(json.dumps({"benchmark": "merging", "device": platform.machine(), "threads": torch.get_num_threads(), **found}))


if __name__ == "__main__":
    main()
