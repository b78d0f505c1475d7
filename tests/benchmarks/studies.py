"""What `basin-lens study all` costs beside another version of the package, such as the last release.

    NLTK_DATA=... python tests/benchmarks/studies.py OTHER_CHECKOUT [ROUNDS] [-- OPTIONS OF STUDY ALL]

Both checkouts run the same command in processes of their own, one thread each, taking turns; the first of a round alternates. Ratios are
medians over rounds of the ratio within a round, because these machines are noisy; where others use the machine at the same time, look at
processor time. Without options: 24 sequences of the Penn Treebank sample at layers 3 and 18, about 4 minutes a run. Where the
processor has no arithmetic in bfloat16 (a gradient in it then takes longer than all the rest), both use float64 as the other format.
Prints what it measures; the last line is JSON.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIONS = ["--dataset", "nltk:treebank", "--max-sequences", "24", "--layers", "3,18"]
# The command stood in a module of its own before it got a folder.
COMMAND = """
import torch
from pathlib import Path
if "bf16" not in Path("/proc/cpuinfo").read_text():
    torch.bfloat16 = torch.float64
try:
    from basin_lens.cli.app import main
except ImportError:
    from basin_lens.cli import main
main()
"""
HERE = Path(__file__).resolve().parents[2]


def run(checkout: Path, options: list[str]) -> tuple[float, float]:
    """Seconds by the clock and of the processor that one run takes."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", COMMAND, "study", "all", *options, "--out", str(Path(folder) / "out")]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        spent, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commit_of(checkout: Path) -> str:
    """Short name of the commit that a checkout stands at."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=checkout)
    return told.stdout.strip()


def main() -> None:
    """Measure, and print."""
    given, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    other, *rounds = given.split()
    checkouts = {"this": HERE, "other": Path(other).resolve()}
    chosen = options.split() or OPTIONS
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    for index in range(int(rounds[0]) if rounds else 3):
        for name in sorted(checkouts, reverse=bool(index % 2)):
            times[name].append(run(checkouts[name], chosen))
            print(
                f"round {index}: {name:5s} {times[name][-1][0]:.0f} s by the clock, {times[name][-1][1]:.0f} s of the processor",
                flush=True,
            )
    clock, processor = (
        statistics.median(this[at] / that[at] for this, that in zip(times["this"], times["other"], strict=True)) for at in (0, 1)
    )
    print(f"this / other: {clock:.2f} by the clock, {processor:.2f} of the processor")
    print(json.dumps({
        "benchmark": "studies", "commit": commit_of(HERE), "other": commit_of(checkouts["other"]), "options": chosen,
        "device": platform.processor() or platform.machine(), "threads": 1, "load": round(os.getloadavg()[0], 1),
        "rounds": len(times["this"]), "over_other": round(clock, 3), "over_other_processor": round(processor, 3),
        "seconds": {name: [round(seconds[0], 1) for seconds in found] for name, found in times.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
