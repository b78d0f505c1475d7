"""Hashes of everything the package computes, by which a refactoring shows that it changes no number.

    python tests/benchmarks/numbers.py [--real] [--only PART...] [--against FILE]

Run it from the root of the tree in question, before and after the change, and keep what it prints. `--only` runs some parts;
`--real` adds SmolLM2-135M; `--against` compares with an earlier output, names each difference and ends with exit code 1.

Each line has the first 16 hexadecimal digits of a SHA-256, and the name of a result. Numbers are hashed as their bytes (a
table: its columns, whatever their names and order), sentences and names apart from them (`.words`), and what sentences say
in digits once more (`.figures`): a change of wording alone changes only `.words`. An input that the package refuses counts
as a result. Times, memory, paths and names of runs are left out.

Only public names are used, models are tiny, random and made here (`computed/`), torch has one thread: equal code gives equal
hashes on one machine. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).parent)
PARTS = {
    "analyzers": "scores",
    "calls": "scores",
    "controls": "scores",
    "compare": "scores",
    "stats": "tests_of_tables",
    "studies": "experiments",
    "memorization": "experiments",
    "codec": "files",
    "command": "files",
    "merging": "mergers",
    "real": "scores",
}


def items_of(part: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    from importlib import import_module

    return getattr(import_module(f"computed.{PARTS[part]}"), f"parts_of_{part}")()


def run(part: str) -> tuple[dict[str, str], int]:
    """Hashes by name, and how many results failed."""
    from computed.hashes import digests, of_text

    from basin_lens.errors import BasinLensError

    found: dict[str, str] = {}
    failed = 0
    items = items_of(part)
    while True:
        name = "(preparation)"
        try:
            name, make = next(items)
            answer = digests(make())
        except StopIteration:
            return found, failed
        except BasinLensError as error:
            print(f"{part}: {name}: {error}", file=sys.stderr)
            answer = {" (refused)": of_text(type(error).__name__)}
        except Exception:
            traceback.print_exc()
            answer, failed = {" (failed)": "-" * 16}, failed + 1
        for ending, digest in answer.items():
            found[f"{part}: {name}{ending}"] = digest
            print(f"{digest}  {part}: {name}{ending}", flush=True)


def hashes_in(file: Path) -> dict[str, str]:
    """What an earlier output ends with."""
    return json.loads([line for line in file.read_text().splitlines() if line.startswith("{")][-1])["hashes"]


def differences(found: dict[str, str], before: dict[str, str], parts: list[str]) -> list[str]:
    before = {name: digest for name, digest in before.items() if name.split(":")[0] in parts}
    kinds = {name: "differs" if name in before else "new" for name in found} | dict.fromkeys(before.keys() - found, "gone")
    return [f"{kinds[name]}: {name}" for name in sorted(kinds) if found.get(name) != before.get(name)]


def commit() -> str:
    """Of the tree that was run; with a plus sign if its package was changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "basin_lens") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M, too")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--against", type=Path, help="an earlier output to compare with")
    given = parser.parse_args()
    before = None if given.against is None else hashes_in(given.against)
    # The package of the tree that this runs in. This folder goes last: it has a `numbers`, which Python's library has too.
    sys.path[:] = [os.getcwd(), *(path for path in sys.path if path != HERE), HERE]
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "false"}
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts = given.only or [part for part in PARTS if part != "real" or given.real]
    found: dict[str, str] = {}
    failed = 0
    for part in parts:
        begun = time.process_time()
        more, count = run(part)
        print(f"{part}: {time.process_time() - begun:.0f} processor seconds", file=sys.stderr)
        found, failed = found | more, failed + count
    wrong = [] if before is None else differences(found, before, parts)
    compared = f", {len(wrong)} differ" if before is not None else ""
    print(*wrong, f"{len(found)} hashes, {failed} failed{compared}", sep="\n")
    print(json.dumps({"commit": commit(), "python": sys.version.split()[0], "hashes": found}))
    sys.exit(bool(wrong or failed))


if __name__ == "__main__":
    main()
