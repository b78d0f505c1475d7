"""Runs in folders under counted faults: 0 lost rows, 0 wrong rows, and the table of an undisturbed run, bit for bit.

20 kills of the driver at seeded write steps, three full disks, three pairs of drivers on one folder. Damaged pieces:
tests/scoring/test_folder_runs.py; workers and nodes: tests/scoring/test_ray_runs.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.files.test_death import ONE_THREAD

pytestmark = pytest.mark.death

KILLS = 20


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[dict[str, str], list[dict]]:
    """The table of an undisturbed run, and each fault."""
    folder = tmp_path_factory.mktemp("faults")
    done = subprocess.run(
        [sys.executable, "-m", "tests.files.faulty_runs", str(folder), str(KILLS)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    faults = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    return json.loads((folder / "straight.json").read_text()), faults


@pytest.mark.parametrize(("what", "count"), [("killed", KILLS), ("no file above", 3), ("two drivers", 3)])
def test_the_same_call_makes_the_same_table(told, what, count):
    straight, faults = told
    own = [one for one in faults if one["what"].startswith(what)]
    assert len(own) == count and len(straight) == 2
    for one in own:
        assert (one["again"], one["left"], one["table"]) == (0, [], straight), one
        if what == "killed":
            assert one["codes"] == [-9], one
        elif what == "no file above":
            assert one["codes"] == [4], one
        else:
            assert sorted(one["codes"]) in ([0, 0], [0, 3]), one  # the second was refused, or came after the first
