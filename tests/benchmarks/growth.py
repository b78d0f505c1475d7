"""How time and memory of a run in a folder grow with its texts.

    python -m tests.benchmarks.growth [TOKENS ...] [--width 256] [--bank fixed|texts] [--shard-tokens 16384]

A tiny random Llama of two blocks on random tokens, sequences of 128, one layer, one thread; neighbors from a bank of 4,096
other tokens (`--bank texts`: from the texts themselves). Each size in a process of its own: processor seconds of reading and of
search for each token, the highest resident memory, and the highest part of it that is no file's (pages of files that are looked
into count as resident until the system takes them back). Ratios are to the smallest size. Prints what it measures; the last line
is JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LENGTH, BANK = 128, 4096


def one(tokens: int, width: int, bank: str, shard: int) -> dict[str, float]:
    """What a run on so many tokens takes."""
    import torch

    import basin_lens as bl
    from basin_lens.scoring.job import Job
    from basin_lens.scoring.layer_work import LayerWork
    from tests.conftest import make_bridge

    torch.set_num_threads(1)
    model = make_bridge(
        "llama", hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, max_position_embeddings=LENGTH, vocab_size=500
    )
    spent = {"read": 0.0, "search": 0.0, "join": 0.0, "score": 0.0}
    for owner, name in ((Job, "read"), (LayerWork, "search"), (LayerWork, "join"), (LayerWork, "score")):
        setattr(owner, name, timed(getattr(owner, name), spent, name))
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(500, (tokens // LENGTH, LENGTH), generator=draw)
    held = None
    if bank == "fixed":
        others = torch.randint(500, (BANK // LENGTH, LENGTH), generator=draw)
        held = bl.Capture.from_texts(model, others, layers=[1], progress=False)
    every = bl.analyzers
    what = [
        every.Compression(k=15, queries=192),
        every.Contraction(k=15, context="native"),
        every.Neighborhood(k=15),
        every.Surprisal(),
    ]
    most = watched()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        bl.analyze(model, texts, what, layers=[1], bank=held, out=out, shard_tokens=shard, progress=False)
    tokens = texts.numel()
    return {
        "tokens": tokens,
        **{f"{name}_us": round(1e6 * seconds / tokens, 1) for name, seconds in spent.items()},
        "all_us": round(1e6 * time.process_time() / tokens, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_own_mb": round(most() / 1024),
    }


def timed(work, spent, name):
    """The same, its processor time noted."""

    def done(*given, **options):
        begun = time.process_time()
        try:
            return work(*given, **options)
        finally:
            spent[name] += time.process_time() - begun

    return done


def watched():
    """The most resident memory in kB that is no file's, as far as 20 looks a second see it."""
    most = [0]

    def watch() -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            most[0] = max(most[0], *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    return lambda: most[0]


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("tokens", nargs="*", type=int, default=[10_000, 30_000, 100_000, 300_000])
    given.add_argument("--width", type=int, default=256)
    given.add_argument("--bank", choices=["fixed", "texts"], default="fixed")
    given.add_argument("--shard-tokens", type=int, default=1 << 14)
    given.add_argument("--one", action="store_true")
    asked = given.parse_args()
    if asked.one:
        print(json.dumps(one(asked.tokens[0], asked.width, asked.bank, asked.shard_tokens)))
        return
    found = []
    for tokens in asked.tokens:
        options = ["--one", "--width", asked.width, "--bank", asked.bank, "--shard-tokens", asked.shard_tokens]
        command = [sys.executable, "-m", "tests.benchmarks.growth", tokens, *options]
        answer = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout
        found.append(json.loads(answer.splitlines()[-1]))
        print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    first = found[0]
    ratios = [{name: round(each[name] / first[name], 2) for name in each} for each in found]
    print(
        json.dumps({"bank": asked.bank, "width": asked.width, "shard_tokens": asked.shard_tokens, "sizes": found, "ratios": ratios})
    )


if __name__ == "__main__":
    main()
