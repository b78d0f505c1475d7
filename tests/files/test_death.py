"""Killed at any moment, a command works again, has nothing half under a final name, and its leavings go with the next run.

BASIN_LENS_KILLS=30 kills each command so often with each signal; without it, as often as fits into CI.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.death

KILLS = int(os.environ.get("BASIN_LENS_KILLS", "8"))  # of each command with each signal
# Else pyarrow's allocator has a thread of its own, which a fork would not have.
ONE_THREAD = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
COMMANDS = ("capture", "finetune", "analyze", "study", "merge train")


@pytest.fixture(scope="module")
def killings(tmp_path_factory) -> list[dict]:
    """All of them, in a helper process that imports everything once, without run-time type checks, and forks for each."""
    folder = tmp_path_factory.mktemp("death")
    done = subprocess.run(
        [sys.executable, "-m", "tests.files.dying", str(folder), str(KILLS)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "false"} | ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "killings.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sign", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_moment(killings, command, sign):
    """Half of the moments are drawn over the run's duration, half are write steps, which are met whatever the machine's pace."""
    own = [one for one in killings if (one["command"], one["signal"]) == (command, sign)]
    failed = [one for one in own if one["error"]]
    assert len(own) == KILLS and not failed, "\n".join(f"at {one['moment']}, code {one['code']}: {one['error']}" for one in failed)
    steps = [one for one in own if isinstance(one["moment"], int)]
    # The plain API has no handler of SIGTERM, a command has.
    expected = -9 if sign == "SIGKILL" else -15 if command in ("capture", "finetune") else 143
    assert [one["code"] for one in steps] == [expected] * ((KILLS + 1) // 2)
