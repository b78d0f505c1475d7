"""What actors do and how they are started, without a cluster: a stand-in for Ray that does everything at once, in this process."""

from types import ModuleType, SimpleNamespace

import pytest
import torch

import basin_lens as bl
from basin_lens.errors import StoreError
from basin_lens.model import copy_of, fingerprint
from basin_lens.scoring import ray_engine
from basin_lens.scoring.folder_run import FolderRequest, _begun
from basin_lens.scoring.folder_store import FolderStore
from basin_lens.scoring.ray_engine import Crew, RayOptions, Worker
from basin_lens.scoring.run_folder import RunFolder
from tests.conftest import TEXTS, make_bridge
from tests.scoring.folder_runs import files_of

cloudpickle = pytest.importorskip("ray").cloudpickle
A = bl.analyzers
CUT = {"layers": [0, 2], "batch_size": 1, "progress": False, "piece_tokens": 60, "shard_tokens": 50}


def few():
    return [A.Compression(k=4), A.Contraction(k=4), A.Surprisal()]


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    bl.analyze(model, TEXTS, few(), out=out, **CUT)
    return files_of(out)


class Later:
    """What a call will answer."""

    def __init__(self, answer):
        self.answer = answer


class AtOnce(ModuleType):
    """As much of Ray as the engine uses; what is put in the store is pickled."""

    exceptions = SimpleNamespace(RayTaskError=KeyError, ActorDiedError=KeyError, RayError=KeyError)

    def __init__(self):
        super().__init__("ray")
        self.killed, self.put_in = [], []

    def put(self, given):
        self.put_in.append(given)
        return cloudpickle.dumps(given)

    def remote(self, **_):
        def actor(kind):
            return SimpleNamespace(remote=lambda task: AtOnce.Actor(kind(cloudpickle.loads(task))))

        return actor

    class Actor:
        def __init__(self, worker):
            self.worker = worker

        def __getattr__(self, name):
            method = getattr(self.worker, name)
            return SimpleNamespace(remote=lambda *given: Later(lambda: method(*given)))

    def wait(self, refs, num_returns):
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref):
        return ref.answer()

    def kill(self, worker):
        self.killed.append(worker)


def begun(model, out, **changes):
    request = FolderRequest(few(), out=out, **CUT | changes)
    return _begun(RunFolder(out), model, TEXTS, request, None)


def worker_of(model, out):
    job, store = begun(model, out)
    crew = Crew(AtOnce(), job, store, RayOptions(workers=1))
    return Worker(crew.ray.put_in[0]), store, job


def test_a_piece_that_an_actor_did_before_it_died_is_not_done_again(model, tmp_path, monkeypatch):
    """Whatever piece it was: the last one of a layer has deleted what it was made of."""
    first, store, job = worker_of(model, tmp_path / "run")
    second = Worker(first.task)
    for index in range(len(job.pieces)):
        first.read(index)
    with monkeypatch.context() as patched:
        patched.setattr(type(job), "read", None)
        assert [second.read(index) for index in range(len(job.pieces))] == [len(rows) for rows in store.rows]
    for layer in job.layers:
        for piece in job.pieces_of(layer):
            first.score(piece)
            with monkeypatch.context() as patched:
                patched.setattr(ray_engine, "do", None)
                assert second.score(piece) == (piece.step == "collect")
    for piece in job.pieces_of(0):
        assert store.has(piece)


def test_actors_that_start_late_are_given_the_capture_as_it_was(model, tmp_path, straight):
    job, store = begun(model, tmp_path / "run")
    crew = Crew(AtOnce(), job, store, RayOptions(workers=2))
    crew.do("read", store.unread(), lambda _: None)
    store.all_read()
    job.fill()
    assert not crew._facts["capture"].is_read and not crew._facts["capture"].columns
    late = Worker(cloudpickle.loads(crew._shipped(with_model=True)))
    for layer in job.layers:
        for piece in job.pieces_of(layer):
            late.score(piece)
    RunFolder(tmp_path / "run").finish(job, store)
    assert files_of(tmp_path / "run") == straight


def test_actors_that_load_another_model_by_its_name_are_sent_ours_once(model, tokenizer, tmp_path, monkeypatch):
    """Two start with the name of a model that was edited; both find it out."""
    other = make_bridge("llama", seed=1, tokenizer=tokenizer)
    monkeypatch.setattr(ray_engine, "source_of", lambda _: {"name_or_path": "edited", "kind": "bridge"})
    monkeypatch.setattr(ray_engine, "load_model", lambda *_, **__: other)
    job, store = begun(model, tmp_path / "run")
    crew = Crew(AtOnce(), job, store, RayOptions(workers=2))
    crew.do("read", store.unread(), lambda _: None)
    assert not store.unread() and len(crew.ray.put_in) == 2 and len(crew.ray.killed) == 2


@pytest.mark.parametrize(("lost", "ends"), [([True, False] * 3, False), ([True, True], True)])
def test_actors_that_die_while_they_start_count_in_a_row(model, tmp_path, monkeypatch, lost, ends):
    """A run of days loses many in all."""
    job, store = begun(model, tmp_path / "run")
    crew, real, left = Crew(AtOnce(), job, store, RayOptions(workers=3, retries=0)), Crew._answer, list(lost)
    monkeypatch.setattr(Crew, "_answer", lambda crew, ref: None if left and left.pop(0) else real(crew, ref))

    def begin_all():
        while crew._starting:
            crew._begin(next(iter(crew._starting)))

    if ends:
        with pytest.raises(StoreError, match="die while they load the model"):
            begin_all()
    else:
        begin_all()
        assert len(crew._idle) == 3 and not left


def test_a_model_on_another_device_is_sent_as_a_copy_on_the_cpu(model, monkeypatch):
    """What is pickled goes back to the device that it came from, which the actor may not have."""
    assert ray_engine._off_device(model) is model
    asked = []
    monkeypatch.setattr(ray_engine, "copy_of", lambda _, device: asked.append(device))
    ray_engine._off_device(copy_of(model, device="meta"))
    assert asked == ["cpu"]


def test_a_copy_on_another_device_takes_every_tensor_and_leaves_the_model(model):
    before = fingerprint(model)
    made = copy_of(model, device="meta")
    assert {one.device.type for one in [*made.parameters(), *made.buffers()]} == {"meta"}
    assert {one.device.type for one in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert fingerprint(model) == before and fingerprint(copy_of(model, device="cpu")) == before


def test_a_mask_that_cut_the_texts_is_not_sent(tmp_path):
    request = FolderRequest(few(), out=tmp_path, attention_mask=[[1, 1]], queries=torch.tensor([1, 2]), **CUT)
    sent = ray_engine._sent(request)
    assert sent.attention_mask is None and sent.queries.tolist() == [1, 2] and sent.chosen == request.chosen


def test_a_store_knows_pieces_of_reading_that_are_there(model, tmp_path):
    job, store = begun(model, tmp_path / "run")
    assert not store.has_read(0)
    store.put_read(0, job.read(0))
    assert store.has_read(0) and FolderStore(job, store.folder, store.mark["plan"]).has_read(0)
