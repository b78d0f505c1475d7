"""The work at a layer in shards: the numbers of one piece, bit for bit, whoever does them, however often interrupted."""

import gc
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens.capture.disk_states import StatesOnDisk
from basin_lens.errors import PieceWarning, StoreError
from basin_lens.scoring import conducting
from basin_lens.scoring.folder_run import FolderRequest, FolderRun, work_on_part
from basin_lens.scoring.job import Job, prepare
from basin_lens.scoring.memory_store import MemoryStore
from basin_lens.scoring.request import Request
from basin_lens.scoring.results import Part
from basin_lens.scoring.run_folder import RunFolder
from tests.conftest import TEXTS, make_bridge
from tests.scoring.folder_runs import DAMAGES, StoppedError, facts_of, files_of, stop_after

A = bl.analyzers
CUT = {"layers": [0, 2], "batch_size": 1, "progress": False, "piece_tokens": 60}
SHARDS = {"shard_tokens": 50}


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def bank(model):
    texts = [*TEXTS[::-1], " ".join(TEXTS)[::-1]]  # the joined texts as they are would be one document with each of them
    return bl.Capture.from_texts(model, texts, layers=[0, 1, 2], max_length=40, progress=False)


def several():
    """Every step of the work: crossed tables, hubness, samples, candidates, random sets, paths, halves, cosines."""
    return [
        A.Compression(k=4),
        A.Compression(k=4, queries=30, name="sampled"),
        A.Contraction(k=4),
        A.Contraction(k=3, context="native", name="native"),
        A.Contraction(k=4, metric="cosine", name="cosine"),
        A.Contraction(k=4, blocks=2, name="path"),
        A.Contraction(k=4, choice="random", name="random"),
        A.Contraction(k=4, choice="radius_matched", name="matched"),
        A.NeighborOverlap(k=4),
        A.Neighborhood(k=4),
        A.RelativeContraction(k=4),
        A.DirectionalContraction(k=4),
        A.StateNorm(),
    ]


def few():
    return [A.Compression(k=4), A.Contraction(k=4), A.Neighborhood(k=4), A.Surprisal()]


def run(model, out, what=None, **changes):
    return bl.analyze(model, TEXTS, few() if what is None else what, out=out, **CUT | SHARDS | changes)


CASES = {
    "the texts": lambda _: {},
    "a bank": lambda bank: {"bank": bank},
    "partners": lambda bank: {"bank": bank, "what": [A.Compression(k=4, partners="bank"), A.Compression(k=4, name="plain")]},
    "some queries": lambda bank: {"bank": bank, "queries": 40, "seed": 3},
    "positions of few": lambda _: {"queries": [3, 4], "what": [A.Contraction(k=4), A.Neighborhood(k=4)]},
    "faiss": lambda _: {"backend": "faiss", "what": few()},
}


@pytest.mark.many
@pytest.mark.parametrize("case", CASES)
def test_the_table_is_that_of_one_piece_bit_for_bit(model, bank, tmp_path, case):
    if case == "faiss":
        pytest.importorskip("faiss")
    given = CASES[case](bank)
    what = given.pop("what", several())
    made = run(model, tmp_path / "run", what, layers=[0, 1, 2], **given)
    whole = bl.analyze(model, TEXTS, what, layers=[0, 1, 2], batch_size=1, progress=False, **given)
    pd.testing.assert_frame_equal(made.load(), whole, check_exact=True)
    assert facts_of(made.load()) == facts_of(whole)


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory):
    """The files of a run whose layers are one piece each."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run(model, out, shard_tokens=10_000)
    return files_of(out)


def stopped(model, out, pieces):
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, pieces, ("put", "put_scores"))
        with pytest.raises(StoppedError):
            run(model, out)


def counted(monkeypatch) -> list[str]:
    """The pieces that are done from now on."""
    done = []
    real = conducting.do

    def do(job, store, piece):
        done.append(str(piece))
        return real(job, store, piece)

    monkeypatch.setattr(conducting, "do", do)
    return done


@pytest.mark.many
@pytest.mark.parametrize("pieces", [7, 1, 5, 6, 11, 12, 15])
def test_an_interrupted_run_goes_on_between_any_two_pieces(model, straight, tmp_path, monkeypatch, pieces):
    stopped(model, tmp_path / "run", pieces)
    told = RunFolder(tmp_path / "run").status()
    assert told.shards == pieces and told.shards_of > 2 * 8 and not told.finished
    done = counted(monkeypatch)
    run(model, tmp_path / "run")
    assert len(done) == told.shards_of - pieces == len(set(done))
    assert files_of(tmp_path / "run") == straight
    assert RunFolder(tmp_path / "run").status().shards == told.shards_of


@pytest.mark.many
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", ["search", "join", "score", "rows"])
def test_a_damaged_piece_is_made_again(model, straight, tmp_path, which, damage):
    stopped(model, tmp_path / "run", 10)
    pieces = tmp_path / "run" / "pieces"
    held = sorted(pieces.rglob(f"{which}*.safetensors"))
    chosen = random.Random(damage).choice(held)
    chosen.write_bytes(DAMAGES[damage](chosen.read_bytes()))
    with pytest.warns(PieceWarning, match="again"):
        run(model, tmp_path / "run")
    assert files_of(tmp_path / "run") == straight


def test_another_cut_is_another_plan(model, tmp_path):
    stopped(model, tmp_path / "run", 3)
    with pytest.raises(StoreError, match="shard_tokens differ"):
        run(model, tmp_path / "run", shard_tokens=70)
    with pytest.raises(StoreError, match="expected a folder for the pieces with shard_tokens"):
        bl.analyze(model, TEXTS, few(), shard_tokens=9)


@pytest.mark.many
@pytest.mark.parametrize("of", [3, 2])
def test_parts_share_layers_or_their_shards(model, straight, tmp_path, of):
    folder = RunFolder(tmp_path / "run")
    request = FolderRequest(few(), out=tmp_path / "run", **CUT | SHARDS)
    said, calls = "", 0
    while not isinstance(said, FolderRun):
        with folder.held(shared=True):
            said = work_on_part(folder, model, TEXTS, request, (calls % of + 1, of))
        calls += 1
        assert calls < 8 * of
    assert files_of(tmp_path / "run") == straight


@pytest.mark.slow
def test_kept_neighbors_and_groups_are_the_same(model):
    from basin_lens.scoring.analysis import score
    from basin_lens.scoring.conducting import conduct, kept_neighbors

    for number in (0, 1):
        what = few()
        request = Request(what, layers=[0, 2], batch_size=1, progress=False)
        whole = score(model, TEXTS, request, keep_neighbors_of=what[number])
        job = prepare(model, TEXTS, request, keep=what[number], shard_tokens=50)
        store = MemoryStore(job)
        conduct(job, store)
        kept = kept_neighbors(job, store)
        for name in ("rows", "before", "after"):
            pd.testing.assert_frame_equal(*(pd.DataFrame(getattr(k, name)[1]) for k in (kept, whole.neighbors)), check_exact=True)
        frozen = [score(model, TEXTS, request, frozen=k).table for k in (kept, whole.neighbors)]
        pd.testing.assert_frame_equal(*frozen, check_exact=True)
        job = prepare(model, TEXTS, request, frozen=kept, shard_tokens=50)
        store = MemoryStore(job)
        conduct(job, store)
        held = conducting.values_at(job, store, [2])
        expected = frozen[0][frozen[0]["layer"] == 2]
        for name, values in held.items():
            pd.testing.assert_series_equal(
                pd.Series(values[0], name=name), expected[name].reset_index(drop=True), check_exact=True, check_dtype=False
            )


def test_a_piece_holds_states_of_its_shard_alone(model, bank, tmp_path, monkeypatch):
    """What the search copies of the texts' states is one shard of them."""
    from basin_lens.scoring import search

    sizes = []
    real = search.find

    def find(queries, *given, **options):
        sizes.append(len(queries.states))
        return real(queries, *given, **options)

    monkeypatch.setattr(search, "find", find)
    run(model, tmp_path / "run", [A.Contraction(k=4)], bank=bank)
    assert max(sizes) <= 50 and len(sizes) >= 2 * 4


def test_a_cut_approximate_search_says_how_it_was_cut(model, tmp_path, monkeypatch):
    """Its answer depends on the cut: provenance, and so the run's name, say which; its recall is the lowest of the shards'."""
    from basin_lens.scoring import search

    recalls, real = [], search.find

    def find(*given, **options):
        found = replace(real(*given, **options), recall=1 - 0.01 * len(recalls))
        recalls.append(found.recall)
        return found

    monkeypatch.setattr(search, "find", find)
    given = {"backend": "approximate", "layers": [2], "what": [A.Contraction(k=4)]}
    facts, names = {}, set()
    for tokens in (50, 70, 10_000):
        recalls.clear()
        made = run(model, tmp_path / str(tokens), shard_tokens=tokens, **given)
        facts[tokens] = made.provenance["search"]
        names.add(made.run)
        assert facts[tokens]["recall"]["2"] == min(recalls)
    assert [facts[tokens].get("shard_tokens") for tokens in facts] == [50, 70, None] and len(names) == 3
    exact = run(model, tmp_path / "exact", what=[A.Contraction(k=4)])
    assert "shard_tokens" not in exact.provenance["search"]


class Elsewhere(torch.Tensor):
    """A tensor on another device than the run's: it can be moved here, and goes together with nothing before."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.to:
            raise RuntimeError(f"{function} of tensors on two devices")
        first, *others = args
        with torch._C.DisableTorchFunctionSubclass():
            return first.as_subclass(torch.Tensor).to(*others, **kwargs or {})


def test_what_lay_on_a_disk_is_moved_to_the_runs_device(model, monkeypatch):
    """Parts come from a disk to the CPU, wherever the run is."""
    what = [one for one in several() if not isinstance(one, A.StateNorm)] + [
        A.Contraction(k=4, choice="radius_matched", name="more")
    ]
    request = Request(what, layers=[0, 1, 2], batch_size=1, progress=False)
    job = prepare(model, TEXTS, request, shard_tokens=50)
    real = Job.work

    def work(self, piece, found):
        self._work = None  # as of another process, which has joined nothing
        parts = {one: found(one) for one in self.needs(piece)}
        moved = {
            one: Part({name: value.as_subclass(Elsewhere) for name, value in part.tensors.items()}, part.facts)
            for one, part in parts.items()
        }
        return real(self, piece, moved.__getitem__)

    monkeypatch.setattr(Job, "work", work)
    store = MemoryStore(job)
    conducting.conduct(job, store)
    whole = bl.analyze(model, TEXTS, what, layers=[0, 1, 2], batch_size=1, progress=False)
    held = conducting.values_at(job, store, [0, 1, 2])
    assert held
    for name, values in held.items():
        np.testing.assert_array_equal(values.flatten(), whole[name])


def test_a_piece_leaves_no_pages_of_states_and_a_layer_no_states(model, tmp_path, monkeypatch):
    """What was looked into is given back after each piece, and nobody holds on to a layer's states when its scores are there."""
    given_back, left = [], []
    real_pages, real_let_go = StatesOnDisk.forget_pages, Job._let_go
    monkeypatch.setattr(StatesOnDisk, "forget_pages", lambda self: given_back.append(len(self._looked_into)) or real_pages(self))

    def let_go(self):
        held = self._work
        real_let_go(self)
        gc.collect()
        assert held is None or not vars(held)
        left.append(len(self.capture._states._looked_into))

    monkeypatch.setattr(Job, "_let_go", let_go)
    done = counted(monkeypatch)
    run(model, tmp_path / "run", [A.Compression(k=4), A.Contraction(k=4)])
    assert len(given_back) >= len(done) and max(given_back) == 2
    assert left and not any(left)


def test_one_shard_is_one_piece(model, tmp_path, monkeypatch):
    done = counted(monkeypatch)
    run(model, tmp_path / "run", shard_tokens=10_000)
    assert done == ["collect 0 of layer 0", "collect 0 of layer 2"]
    assert not any(path.name == "rows.safetensors" for path in (tmp_path / "run").rglob("*"))


def test_what_a_job_needs_comes_before(model):
    job: Job = prepare(model, TEXTS, Request(few(), layers=[0], progress=False), shard_tokens=50)
    seen = set()
    for piece in job.pieces_of(0):
        assert seen >= set(job.needs(piece))
        seen.add(piece)
    assert piece.step == "collect" and len(job.needs(piece)) == 1 + job.shards
