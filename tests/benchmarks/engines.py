"""What a folder and a Ray cluster cost, beside the same request in one process.

    python -m tests.benchmarks.engines [--model NAME] [--tokens 4096] [--layers 10 20] [--rounds 3] [--only folder|ray]
        [--piece-tokens 512] [--shard-tokens 1024]

SmolLM2-135M, or another model by name or folder, on sequences of 128 tokens of the built-in passages, their own bank. `folder`: a
run in a folder over one in memory, one thread. `ray`: two actors of one thread each over one process with two threads, both in
folders and in the same pieces. Elapsed time counts; rounds alternate who is first, and a ratio is the median of ratios within a
round. Start of the cluster and what passes until both actors have loaded the model are told apart and not counted (`ray_whole_s`
counts the latter). `same_files`: whether digests of the tables agree, of Ray with one thread in one process, and with two
threads, where sums may be taken in another order. Prints what it measures; the last line is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import basin_lens as bl
from basin_lens.scoring.ray_engine import Crew
from basin_lens.texts import reference_passages

LENGTH, WORKERS = 128, 2
ROOT = Path(__file__).parents[2]


def ids_of(model, tokens: int) -> list[list[int]]:
    """Sequences of the built-in passages; what is beyond their end is drawn."""
    text = "\n\n".join(passage.text for passage in reference_passages())
    drawn = torch.randint(len(model.tokenizer), (2 * tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    special = set(model.tokenizer.all_special_ids)  # padding, say, which is refused
    held = [one for one in [*model.tokenizer(text)["input_ids"], *drawn] if one not in special][:tokens]
    return [held[start : start + LENGTH] for start in range(0, len(held) // LENGTH * LENGTH, LENGTH)]


def digests(out: Path) -> dict[str, str]:
    return {name: facts["sha256"] for name, facts in bl.tables.open(out).files.items()}


def seconds(work: Callable[[], object], threads: int) -> float:
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def pairs(rounds: int, first: Callable[[], float], second: Callable[[], float]) -> list[tuple[float, float]]:
    """What both took in each round, begun by each in turn."""
    found = []
    for number in range(rounds):
        if number % 2:
            after = second()
            found.append((first(), after))
        else:
            before = first()
            found.append((before, second()))
        print(f"  round {number + 1}: {found[-1][0]:.2f} s, {found[-1][1]:.2f} s", flush=True)
    return found


def middle(values) -> float:
    return round(statistics.median(values), 3)


class Work:
    """The request, of which each run has a folder of its own."""

    def __init__(self, asked: argparse.Namespace, place: Path) -> None:
        self.model = bl.load_model(asked.model, device="cpu")
        self.ids, self.layers, self.place = ids_of(self.model, asked.tokens), asked.layers, place
        self.cut = {"piece_tokens": asked.piece_tokens, "shard_tokens": asked.shard_tokens}
        self.made = 0

    def run(self, *, in_folder: bool = True, **options) -> Path:
        every = bl.analyzers
        what = [every.Compression(), every.Contraction(), every.Neighborhood(), every.Surprisal()]
        self.made += 1
        out = self.place / f"run-{self.made}"
        given = {"out": out, **options} if in_folder else options
        bl.analyze(self.model, self.ids, what, layers=self.layers, progress=False, **given)
        self.last = out
        return out


def of_folder(work: Work, rounds: int) -> dict[str, object]:
    work.run(in_folder=False)  # what is done once in a process
    found = pairs(rounds, lambda: seconds(work.run, 1), lambda: seconds(lambda: work.run(in_folder=False), 1))
    return {
        "folder_s": middle(a for a, _ in found),
        "memory_s": middle(b for _, b in found),
        "folder_ratio": middle(a / b for a, b in found),
    }


class Loading:
    """Has a crew begin when all its actors are ready, and notes how long that takes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        begin, do = Crew.__init__, Crew.do

        def started(crew, *given) -> None:
            self._begun = time.perf_counter()
            begin(crew, *given)

        def done(crew, *given) -> None:
            if crew._starting:
                while crew._starting:
                    for ref in crew.ray.wait([*crew._starting], num_returns=1)[0]:
                        crew._begin(ref)
                self.seconds = time.perf_counter() - self._begun
            do(crew, *given)

        Crew.__init__, Crew.do = started, done  # type: ignore[method-assign]


def of_ray(work: Work, rounds: int) -> dict[str, object]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    import ray

    loading, waits, files = Loading(), [], {}
    options = {"engine": "ray", "engine_options": {"workers": WORKERS}, **work.cut}
    start = seconds(lambda: ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR"), 1)

    def on_ray() -> float:
        took = seconds(lambda: work.run(**options), 1)
        files["ray"] = digests(work.last)
        waits.append(loading.seconds)
        return took - loading.seconds

    def here(threads: int) -> float:
        took = seconds(lambda: work.run(**work.cut), threads)
        files[f"{threads}_threads"] = digests(work.last)
        return took

    here(1)
    found = pairs(rounds, on_ray, lambda: here(2))
    ray.shutdown()
    return {
        "workers": WORKERS,
        "cluster_start_s": round(start, 2),
        "loading_s": middle(waits),
        "ray_s": middle(a for a, _ in found),
        "ray_whole_s": middle(a + wait for (a, _), wait in zip(found, waits, strict=True)),
        "two_threads_s": middle(b for _, b in found),
        "ray_ratio": middle(a / b for a, b in found),
        "same_files": {name: files[name] == files["ray"] for name in ("1_threads", "2_threads")},
    }


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--model", default="smollm2-135m")
    given.add_argument("--tokens", type=int, default=4096)
    given.add_argument("--layers", type=int, nargs="+", default=[10, 20])
    given.add_argument("--rounds", type=int, default=3)
    given.add_argument("--piece-tokens", type=int, default=512)
    given.add_argument("--shard-tokens", type=int, default=1024)
    given.add_argument("--only", choices=["folder", "ray"])
    asked = given.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work = Work(asked, Path(place))
        told: dict[str, object] = {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "model": asked.model,
        }
        told |= {"tokens": sum(map(len, work.ids)), "layers": asked.layers, "rounds": asked.rounds, **work.cut}
        for name, measure in (("folder", of_folder), ("ray", of_ray)):
            if asked.only in (None, name):
                print(name, flush=True)
                told |= measure(work, asked.rounds)
    for name, value in told.items():
        print(f"{name:>16}  {value}")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
