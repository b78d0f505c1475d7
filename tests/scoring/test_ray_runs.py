"""The same pieces on a Ray cluster of three nodes on one machine: the same files, also when actors and nodes die."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import basin_lens as bl
from basin_lens import tables
from basin_lens.errors import AnalyzerError, BasinLensError, StoreError
from basin_lens.scoring import ray_engine
from basin_lens.scoring.run_folder import RunFolder
from tests.conftest import TEXTS, make_bridge

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
A = bl.analyzers
CUT = {"layers": [0, 1, 2], "batch_size": 1, "progress": False, "piece_tokens": 40}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """Three nodes, of one core each."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    import ray

    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer)


def analyzers():
    return [A.Compression(k=4), A.Contraction(k=4), A.Surprisal(), A.StateNorm()]


def files_of(folder) -> dict[str, str]:
    return {name: facts["sha256"] for name, facts in tables.open(folder).files.items()}


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory):
    """What one process makes."""
    out = tmp_path_factory.mktemp("straight") / "run"
    bl.analyze(model, TEXTS, analyzers(), out=out, **CUT)
    return files_of(out)


def on_ray(model, out, cluster, what=None, **options):
    given = {"address": cluster.address, "workers": 2} | options
    return bl.analyze(model, TEXTS, what or analyzers(), out=out, engine="ray", engine_options=given, **CUT)


def test_the_same_files_as_in_one_process(model, straight, cluster, tmp_path):
    on_ray(model, tmp_path / "run", cluster)
    assert files_of(tmp_path / "run") == straight


def test_the_pieces_of_layers_in_shards(model, straight, cluster, tmp_path):
    given = {"address": cluster.address, "workers": 2}
    bl.analyze(model, TEXTS, analyzers(), out=tmp_path / "run", engine="ray", engine_options=given, shard_tokens=60, **CUT)
    assert files_of(tmp_path / "run") == straight


def test_a_run_begun_here_is_finished_there(model, straight, cluster, tmp_path, monkeypatch):
    from tests.scoring.folder_runs import StoppedError, stop_after

    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(StoppedError):
            bl.analyze(model, TEXTS, analyzers(), out=tmp_path / "run", **CUT)
    on_ray(model, tmp_path / "run", cluster)
    assert files_of(tmp_path / "run") == straight


class Slowly(A.StateNorm):
    """Takes its time, so that there is some to kill."""

    def measure(self, batch):
        time.sleep(0.4)
        return super().measure(batch)


def killing(folder: Path, count: int, kill) -> threading.Thread:
    """Call `kill` each time that another piece is there, so often."""

    def watch():
        seen, left = 0, count
        while left and not (folder / "table").exists():
            there = len(list((folder / "pieces" / "read").glob("*.safetensors")))
            if there > seen:
                seen, left = there, left - 1
                kill()
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def children() -> list[int]:
    """Processes of actors of this class, found in the system's own list."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(b"ray::Worker"):
                found.append(int(entry.name))
    return found


def test_actors_that_are_killed_lose_nothing(model, cluster, tmp_path):
    what = [A.Compression(k=4), A.Contraction(k=4), A.Surprisal(), Slowly()]
    bl.analyze(model, TEXTS, what, out=tmp_path / "straight", **CUT)
    killed = []

    def kill():
        for pid in children()[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    thread = killing(tmp_path / "run", 3, kill)
    on_ray(model, tmp_path / "run", cluster, what, retries=10)
    thread.join(5)
    assert killed and files_of(tmp_path / "run") == files_of(tmp_path / "straight")


def test_a_node_that_dies_loses_nothing(model, cluster, tmp_path):
    what = [A.Compression(k=4), A.Contraction(k=4), A.Surprisal(), Slowly()]
    bl.analyze(model, TEXTS, what, out=tmp_path / "straight", **CUT)
    node = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    thread = killing(tmp_path / "run", 1, lambda: cluster.remove_node(node, allow_graceful=False))
    on_ray(model, tmp_path / "run", cluster, what, workers=3, retries=10)
    thread.join(30)
    assert files_of(tmp_path / "run") == files_of(tmp_path / "straight")


class Broken(A.StateNorm):
    """Its own code fails."""

    def measure(self, batch):  # noqa: ARG002
        raise ValueError("on purpose")


def test_what_a_piece_raises_is_raised_here(model, cluster, tmp_path):
    with pytest.raises(AnalyzerError, match="on purpose"):
        on_ray(model, tmp_path / "run", cluster, [A.Surprisal(), Broken()])
    assert not RunFolder(tmp_path / "run").status().finished


def test_actors_that_die_again_and_again_are_said(model, cluster, tmp_path):
    class Deadly(A.StateNorm):
        def measure(self, batch):  # noqa: ARG002
            os._exit(1)

    with pytest.raises(StoreError, match="died each time"):
        on_ray(model, tmp_path / "run", cluster, [A.Surprisal(), Deadly()], retries=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"worker": 2}, "engine_options among workers"),
        ({"workers": 0}, "workers in engine_options"),
        ({"num_cpus": -1}, "num_cpus"),
        ({"num_gpus": True}, "num_gpus"),
        ({"retries": -1}, "retries"),
        ({"address": 5}, "address"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(BasinLensError, match=said):
        ray_engine.RayOptions.of(options)


def test_an_address_without_a_cluster_is_said(model, tmp_path):
    import ray

    ray.shutdown()
    with pytest.raises(BasinLensError, match="expected a Ray cluster at"):
        bl.analyze(model, TEXTS, analyzers(), out=tmp_path / "run", engine="ray", engine_options={"address": "127.0.0.1:1"}, **CUT)


def test_without_ray_it_is_said_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BasinLensError, match=r"basin-lens\[ray\]"):
        bl.analyze(model, TEXTS, analyzers(), out=tmp_path / "run", engine="ray", **CUT)
