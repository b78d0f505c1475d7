"""How fast neighbors are found, beside FAISS's flat search on the same states, and what the approximate search misses.

    NLTK_DATA=... python tests/benchmarks/neighbors.py [STATES.safetensors]

20,000 and 100,000 states that enter block 12 of SmolLM2-135M, from the inaugural, genesis and brown corpora of NLTK; position 0 is
left out. With a path, the states are kept there for the next run. The reference is FAISS's flat search without any exclusions; ours
leave out the query's own sequence and duplicates. Prints what it measures; the last line is JSON. Contestants take turns, and ratios
are medians over rounds of the ratio within a round, because these machines are noisy. Where others use the machine at the same time,
look at processor time, with OMP_NUM_THREADS=1: waiting for one another, threads burn it.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

# FAISS's wheel brings an OpenBLAS that takes newer processors for a Pentium 4 and runs four times slower than it can. A reference
# slowed down like that would flatter us. Must be set before numpy or FAISS is imported.
_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
if "avx512f" in _FLAGS:
    os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
elif "avx2" in _FLAGS:
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")

import faiss  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transport import PeakMemory  # noqa: E402

import basin_lens as bl  # noqa: E402
from basin_lens.neighbors import Points, count_candidates, find, prefix_keys  # noqa: E402

K, LENGTH, LAYER = 15, 128, 12
# Points, queries (a sample of them, the same for all), rounds.
SIZES = ((20_000, 20_000, 5), (100_000, 32_768, 3))


def states(path):
    """Token ids and states of 788 sequences, `[sequences, pos]` and `[rows, d]`."""
    if path is not None and path.exists():
        return load_file(path)
    from nltk.corpus import brown, genesis, inaugural

    texts = [inaugural.raw()[:160_000], genesis.raw("english-web.txt")[:160_000], " ".join(brown.words()[:40_000])]
    model = bl.load_model()
    tokens = torch.tensor(model.tokenizer("\n".join(texts))["input_ids"])[: 788 * LENGTH].reshape(-1, LENGTH)
    capture = bl.Capture.from_texts(model, tokens, layers=[LAYER])
    answer = {"tokens": tokens, "states": capture.resid_pre(LAYER).contiguous(), "pos": capture.row_pos, "seq": capture.row_seq}
    if path is not None:
        save_file(answer, path)
    return answer


def timed(run):
    """Seconds by the clock and of the processor."""
    before = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - before[0], time.process_time() - before[1]


def share(found, exact):
    """Share of the exact neighbors that were found."""
    return float((found[:, None] == exact[:, :, None]).any(2).float().mean())


def measure(points, queries, rounds):
    bank_array, query_array = points.states.numpy(), queries.states.numpy()

    def flat():
        index = faiss.IndexFlatL2(bank_array.shape[1])
        index.add(bank_array)
        index.search(query_array, K)

    ours = {name: (lambda name=name: find(queries, points, K, backend=name)) for name in ("torch", "faiss", "approximate")}
    peaks, found = {}, {}
    for name, run in ours.items():
        with PeakMemory() as memory:
            found[name] = run()
        peaks[name] = round(memory.peak)
    assert torch.equal(found["torch"].rows, found["faiss"].rows)
    extras = {
        "other token": lambda: find(queries, points, K, same_token="exclude"),
        "same token": lambda: find(queries, points, K, same_token="only"),
        "candidates counted": lambda: count_candidates(queries, points),
    }
    reference = "FAISS flat, no exclusions"
    contestants = {reference: flat} | ours | (extras if rounds > 3 else {})
    for run in (flat, *extras.values()) if rounds > 3 else (flat,):  # ours have run already
        run()
    times = [{name: timed(run) for name, run in contestants.items()} for _ in range(rounds)]

    def ratio(name, other, clock):
        return round(statistics.median(row[name][clock] / row[other][clock] for row in times), 3)

    recall = share(found["approximate"].rows, found["torch"].rows)
    print(f"{len(points.key):,} points, {len(queries.key):,} queries, k={K}, {rounds} rounds; us per query, times FAISS flat:")
    print(f"    {'':28s}{'clock':>10s}{'':8s}{'processor':>12s}")
    for name in contestants:
        each = [statistics.median(row[name][clock] for row in times) / len(queries.key) * 1e6 for clock in (0, 1)]
        peak = f"{peaks[name]:8d} MB beyond the points" if name in peaks else ""
        print(f"    {name:28s}{each[0]:10.1f}{ratio(name, reference, 0):8.2f}{each[1]:12.1f}{ratio(name, reference, 1):8.2f}{peak}")
    print(f"    approximate recall: stated {found['approximate'].recall:.4f}, over all queries {recall:.4f}", flush=True)
    answer = {"queries": len(queries.key), "stated_recall": round(found["approximate"].recall, 4), "recall": round(recall, 4)}
    for clock, suffix in enumerate(("", "_processor")):
        answer |= {
            f"flat_us_per_query{suffix}": round(statistics.median(r[reference][clock] for r in times) / len(queries.key) * 1e6, 1),
            f"torch_over_flat{suffix}": ratio("torch", reference, clock),
            f"faiss_over_flat{suffix}": ratio("faiss", reference, clock),
            f"exact_over_approximate{suffix}": ratio("torch", "approximate", clock),
        }
    return answer | {"peak_mb": peaks}


def main():
    torch.manual_seed(0)
    held = states(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    keep = torch.nonzero(held["pos"] > 0).squeeze(1)
    keys = prefix_keys(held["tokens"].tolist())[0]
    everything = Points(held["states"], keys, held["tokens"].flatten(), held["seq"], torch.ones(len(keys)).bool())
    faiss.omp_set_num_threads(torch.get_num_threads())
    answers = {}
    for size, n_queries, rounds in SIZES:
        whole = len(keep) // size  # every so many sequences, so that each size has all corpora
        points = everything.some(keep[held["seq"][keep] % whole == 0][:size])
        sample = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:n_queries].sort().values
        answers[size] = measure(points, points.some(sample), rounds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(json.dumps({
        "benchmark": "neighbors", "commit": commit, "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "faiss": faiss.__version__,
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"), "model": "smollm2-135m", "layer": LAYER, "k": K, "sizes": answers,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
