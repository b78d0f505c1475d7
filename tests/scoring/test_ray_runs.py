"""The same pieces on a Ray cluster of three nodes on one machine: the same files, also when actors and nodes die."""

import os
import random
import sys
from pathlib import Path

import pytest

import basin_lens as bl
from basin_lens import tables
from basin_lens.errors import AnalyzerError, BasinLensError, StoreError
from basin_lens.scoring import ray_engine
from basin_lens.scoring.run_folder import RunFolder
from tests.conftest import TEXTS, make_bridge
from tests.scoring.ray_faults import Killings, PausingWorker, node_killer, worker_killer

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
A = bl.analyzers
CUT = {"layers": [0, 1, 2], "batch_size": 1, "progress": False, "piece_tokens": 40}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """Three nodes, of one core each."""
    pytest.importorskip("ray")
    # Without niceness of their own: else actors starve beside whatever else this machine does.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
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


WORKERS, NODES = 10, 5  # kills, five in a run


@pytest.fixture
def driver(cluster, monkeypatch):
    """A connection to the cluster; actors pause where they write. Gives the socket of the node that it speaks to."""
    import ray

    monkeypatch.setattr(ray_engine, "Worker", PausingWorker)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield ray._private.worker._global_node.raylet_socket_name
    ray.shutdown()


@pytest.mark.parametrize(
    ("what", "seed"), [*(("worker", seed) for seed in range(WORKERS // 5)), *(("node", seed) for seed in range(NODES // 5))]
)
def test_kills_lose_nothing(model, straight, cluster, driver, tmp_path, what, seed):
    """Five kills, in as many runs as they take: who takes a killed one's place may come too late to be killed in the same run."""
    draw = random.Random(f"{what} {seed}")
    killed: list[object] = []
    for number in range(4):
        out = tmp_path / f"run{number}"
        kill = worker_killer(cluster, draw) if what == "worker" else node_killer(cluster, driver, draw)
        killings = Killings(out, draw.sample(range(1, 21), 5 - len(killed)), kill)
        given = {"workers": 2 if what == "worker" else 3, "retries": 10}
        bl.analyze(model, TEXTS, analyzers(), out=out, engine="ray", engine_options=given, shard_tokens=60, **CUT)
        killings.end()
        tables.open(out).check()
        assert killings.half == [] and files_of(out) == straight
        assert [path.name for path in out.rglob("*") if path.name.startswith(".")] == []
        killed += killings.killed
        if len(killed) >= 5:
            break
    print(f"{len(killed)} killed in {number + 1} runs")
    assert killed


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
