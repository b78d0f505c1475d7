"""How fast the patched pass is, beside rerunning the block per query and beside the machine's own matrix rate.

    python tests/benchmarks/transport.py

Prints what it measures; the last line is JSON. Ratios are taken in one run, because these machines are noisy: each pair is timed
several times in turn and the medians are compared.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.texts import reference_passages
from basin_lens.transport import PatchedBlock, Probe, query_chunks

K, LENGTH, LAYER, ROUNDS = 15, 128, 12, 7


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(*functions, rounds=ROUNDS):
    """Median seconds of each function, taken in turn after one warm-up each."""
    for function in functions:
        function()
    times = [[timed(function) for function in functions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def multiply_adds(model, layer, positions):
    """The block's own multiply-adds for one row at each of these positions: its matrices, and attention to the tokens before it and
    itself. What packing adds (masked columns, prefixes computed again) is not counted."""
    matrices = sum(p.numel() for p in model.original_model.model.layers[layer].parameters() if p.ndim == 2)
    attention = 2 * model.cfg.n_heads * model.cfg.d_head * (positions + 1)
    return float((matrices + attention).sum())


class PeakMemory:
    """Highest resident memory inside the `with` block above what was there before, in MB, sampled every 2 ms (Linux)."""

    def __enter__(self):
        self.before, self.peak, self.stop = self.resident(), 0.0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop:
            self.peak = max(self.peak, self.resident() - self.before)
            time.sleep(0.002)

    @staticmethod
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    def __exit__(self, *_):
        self.stop = True
        self.thread.join()


def hooked_speedup(tokens):
    """On TransformerLens 3.9: the left-padded route beside R0, the model rerun per query. None without HookedTransformer."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return None
    model = bl.load_model(kind="hooked")
    capture = bl.Capture.from_texts(model, tokens[:2], layers=[LAYER], progress=False)
    states = capture.resid_pre(LAYER)
    block = PatchedBlock(model, capture, LAYER, Probe(model, LENGTH), states)
    assert block.route == "R2"
    queries = torch.nonzero(capture.row_pos > 0).squeeze(1)
    rows = torch.randint(len(states), (len(queries), K))
    query = queries[len(queries) // 2 : len(queries) // 2 + 1]

    def padded():
        for part in query_chunks(capture, queries, K, block.rows_per_call):
            block.of_rows(states, part, rows[: len(part)])

    def rerun():
        where = int(capture.row_seq[query]), int(capture.row_pos[query])
        door.rerun_with_state(model, tokens[where[0]], LAYER, where[1], states[rows[0]])

    with door.measuring(model):
        padded_s, rerun_s = in_turn(padded, rerun, rounds=2)
    print(f"HookedTransformer: left-padded batches {rerun_s / (padded_s / len(queries)):.0f} times faster than rerunning the model")
    return rerun_s / (padded_s / len(queries))


def main():
    torch.manual_seed(0)
    model = bl.load_model()
    text = "\n".join(p.text for p in reference_passages())
    tokens = torch.tensor(model.tokenizer(text)["input_ids"])[: 24 * LENGTH].reshape(24, LENGTH)

    # Memory: the states of the captured layers plus one chunk. First, while nothing else has been freed that could be used again.
    bl.Capture.from_texts(model, tokens[:1], layers=[0], progress=False)
    with PeakMemory() as reading:
        big = bl.Capture.from_texts(model, tokens, progress=False)
    with PeakMemory() as scoring:
        bl.analyze(model, big, [bl.analyzers.Contraction(k=K)], layers=[LAYER], progress=False)
    states_mb = sum(big.resid_pre(layer).numel() * 4 for layer in range(door.n_layers(model) + 1)) / 2**20
    pairs_mb = big.n_rows * K * door.width(model) * 4 / 2**20
    print(f"peak memory: {reading.peak:.0f} MB to capture {door.n_layers(model)} layers, whose states are {states_mb:.0f} MB")
    print(f"             {scoring.peak:.0f} MB more to score one of them (all N*k*d images at once would be {2 * pairs_mb:.0f} MB)")
    del big

    # Capture against the plain forward pass.
    def plain():
        with torch.no_grad():
            for part in tokens.split(8):
                model(part, return_type="logits")

    plain_s, capture_s = in_turn(plain, lambda: bl.Capture.from_texts(model, tokens, batch_size=8, progress=False), rounds=5)
    print(f"plain forward {tokens.numel() / plain_s:8.0f} tokens/s")
    print(f"capture of all residuals: {capture_s / plain_s:.3f} times the plain forward pass")

    # Patched transport of 8 sequences' tokens, 15 neighbors each, at one layer.
    capture = bl.Capture.from_texts(model, tokens, layers=[LAYER], progress=False)
    states = capture.resid_pre(LAYER)
    block = PatchedBlock(model, capture, LAYER, Probe(model, LENGTH), states)
    queries = torch.nonzero((capture.row_pos > 0) & (capture.row_seq < 8)).squeeze(1)
    rows = torch.randint(len(states), (len(queries), K))

    faster = PatchedBlock(model, capture, LAYER, block.probe, states, compiled=True)

    def patched(block=block):
        for part in query_chunks(capture, queries, K, block.rows_per_call):
            block.of_rows(states, part, rows[: len(part)])

    with door.measuring(model):
        compile_s = timed(lambda: patched(faster))
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    sample = queries[torch.randint(len(queries), (3,))].tolist()
    whole = PatchedBlock(model, capture, LAYER, block.probe, states, "R1")

    weights = [p.detach() for p in model.original_model.model.layers[LAYER].parameters() if p.ndim == 2]
    inputs = {width: torch.randn(block.rows_per_call, width) for width in {w.shape[1] for w in weights}}
    passes = -(-len(queries) * K // block.rows_per_call)

    def products():  # the block's matrices and nothing else, as often as the packed pass needs them
        for _ in range(passes):
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    def plain_block():  # the block on as many ordinary tokens
        for _ in range(passes):
            whole.sequences(list(range(block.rows_per_call // LENGTH)))

    def rerun():  # the block on the whole sequence, k copies per query
        for query in sample:
            whole(torch.tensor([query]), states[rows[:1]])

    with door.measuring(model):
        patched_s, compiled_s, matmul_s, rerun_s, products_s, plain_block_s = in_turn(
            patched, lambda: patched(faster), lambda: [a @ b for _ in range(10)], rerun, products, plain_block
        )
        r2 = block(torch.tensor(sample), states[rows[:3]])
        r1 = whole(torch.tensor(sample), states[rows[:3]])
        r0 = torch.stack([
            door.rerun_with_state(model, tokens[int(capture.row_seq[q])], LAYER, int(capture.row_pos[q]), states[rows[i]])
            for i, q in enumerate(sample)
        ])  # fmt: skip
    scale = float(capture.resid_post(LAYER)[capture.row_pos > 0].square().mean().sqrt())
    rate = 2 * multiply_adds(model, LAYER, capture.row_pos[queries]) * K / patched_s
    matrix_rate = 10 * 2 * 2048**3 / matmul_s
    speedup = (rerun_s / len(sample)) / (patched_s / len(queries))
    print(f"patched {len(queries) * K / patched_s:8.0f} pairs/s, {rate / 1e9:.0f} GFLOP/s")
    print(f"matrix product {matrix_rate / 1e9:.0f} GFLOP/s")
    print(f"share of the matrix rate {rate / matrix_rate:.2f}; faster than rerunning the block per query {speedup:.0f} times")

    compiled = patched_s / compiled_s
    print(
        f"compiled: {compiled:.2f} times faster, share of the matrix rate {rate * compiled / matrix_rate:.2f}, after {compile_s:.0f} s"
    )
    per_row = patched_s / (len(queries) * K)
    own_products, over_plain = (
        products_s / (passes * block.rows_per_call) / per_row,
        plain_block_s / (passes * block.rows_per_call) / per_row,
    )
    print(f"of its time, the block's own matrix products alone would take {own_products:.2f}")
    print(f"speed beside the same block on as many ordinary tokens: {over_plain:.2f}")
    hooked = hooked_speedup(tokens)

    started = [timed(lambda: subprocess.run([sys.executable, "-c", "import basin_lens"], check=True)) for _ in range(5)]
    bare = [timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)) for _ in range(5)]
    import_s = statistics.median(started) - statistics.median(bare)
    print(f"import basin_lens: {import_s:.3f} s")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(json.dumps({
        "benchmark": "transport", "commit": commit, "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "model": "smollm2-135m", "length": LENGTH, "k": K,
        "capture_over_forward": round(capture_s / plain_s, 3), "share_of_matrix_rate": round(rate / matrix_rate, 3),
        "share_in_own_products": round(own_products, 3), "speed_beside_plain_block": round(over_plain, 3),
        "compiled_times_faster": round(compiled, 3), "compiled_share_of_matrix_rate": round(rate * compiled / matrix_rate, 3),
        "compile_s": round(compile_s, 1),
        "times_faster_than_rerun": round(speedup, 1), "hooked_times_faster_than_r0": hooked and round(hooked, 1),
        "max_error_r2_r1": float((r2 - r1).abs().max()) / scale,
        "max_error_r2_r0": float((r2 - r0).abs().max()) / scale, "capture_peak_mb": round(reading.peak),
        "scoring_peak_mb": round(scoring.peak),
        "states_mb": round(states_mb), "import_s": round(import_s, 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
