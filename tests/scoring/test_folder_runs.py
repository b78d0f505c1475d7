"""A run in a folder: the numbers of a run in memory, bit for bit, however often it was interrupted, and whoever did its pieces."""

import random
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import locks, tables
from basin_lens.capture import with_states
from basin_lens.capture.disk_states import StatesOnDisk
from basin_lens.errors import BasinLensError, PieceWarning, StoreError
from basin_lens.scoring import bank_overlap
from basin_lens.scoring.folder_run import FolderRun, part_of
from basin_lens.scoring.folder_store import FolderStore
from basin_lens.scoring.job import Job
from basin_lens.scoring.run_folder import RunFolder
from tests.conftest import TEXTS, make_bridge
from tests.scoring.folder_runs import CUT, DAMAGES, SMALL, StoppedError, analyzers, facts_of, files_of, part, run, stop_after

A = bl.analyzers
DIGEST = re.compile("[0-9a-f]{12}")


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def whole(model):
    """The same run in memory."""
    return bl.analyze(model, TEXTS, analyzers(), **CUT)


def counted(monkeypatch) -> dict[str, int]:
    """How many pieces are done from now on."""
    done = {"read": 0, "score": 0}
    for name in done:
        real = getattr(Job, name)

        def do(self, *given, name=name, real=real):
            done[name] += 1
            return real(self, *given)

        monkeypatch.setattr(Job, name, do)
    return done


def test_numbers_and_provenance_are_those_of_a_run_in_memory(model, whole, tmp_path):
    made = run(model, tmp_path / "run").load()
    pd.testing.assert_frame_equal(made, whole, check_exact=True)
    assert facts_of(made) == facts_of(whole)  # and so its name


@pytest.mark.many
@pytest.mark.parametrize("pieces", range(1, 5))
def test_an_interrupted_run_goes_on_where_it_was(model, tmp_path, monkeypatch, pieces):
    run(model, tmp_path / "straight")
    with monkeypatch.context() as patched:
        stop_after(patched, pieces)
        with pytest.raises(StoppedError):
            run(model, tmp_path / "run")
    with pytest.raises(StoreError, match="give the same command again"):
        tables.open(tmp_path / "run")
    told = RunFolder(tmp_path / "run").status()
    assert not told.finished and told.holder is None
    done = counted(monkeypatch)
    run(model, tmp_path / "run")
    assert done == {"read": told.read_of - told.read, "score": told.scored_of - told.scored}
    assert told.read + told.scored == pieces and told.read_of >= 3
    assert files_of(tmp_path / "run") == files_of(tmp_path / "straight")


def test_a_finished_run_is_opened_and_nothing_is_done_again(model, tmp_path, monkeypatch):
    first = run(model, tmp_path / "run")
    done = counted(monkeypatch)
    again = run(model, tmp_path / "run")
    assert done == {"read": 0, "score": 0} and again.files == first.files
    assert RunFolder(tmp_path / "run").status().finished


@pytest.mark.many
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", ["read", "states", "scores"])
def test_a_damaged_piece_is_made_again(model, tmp_path, monkeypatch, which, damage):
    run(model, tmp_path / "straight")
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        with pytest.raises(StoppedError):
            run(model, tmp_path / "run")
    pieces = sorted((tmp_path / "run" / "pieces" / which).rglob("*.safetensors"))
    chosen = random.Random(damage).choice(pieces)
    chosen.write_bytes(DAMAGES[damage](chosen.read_bytes()))
    with pytest.warns(PieceWarning, match="made again"):
        run(model, tmp_path / "run")
    assert files_of(tmp_path / "run") == files_of(tmp_path / "straight")


@pytest.mark.slow
def test_a_piece_of_another_run_is_made_again(model, tmp_path, monkeypatch):
    """Whole, sealed, and not of this plan: copied there by hand."""
    run(model, tmp_path / "straight")
    for name, seed in (("run", 0), ("other", 1)):
        with monkeypatch.context() as patched:
            stop_after(patched, 4)
            with pytest.raises(StoppedError):
                run(model, tmp_path / name, seed=seed)
    there, here = (tmp_path / name / "pieces" / "scores" for name in ("other", "run"))
    for path in there.iterdir():
        (here / path.name).write_bytes(path.read_bytes())
    with pytest.warns(PieceWarning, match="another run"):
        run(model, tmp_path / "run")
    assert files_of(tmp_path / "run") == files_of(tmp_path / "straight")


@pytest.mark.many
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": [1]}, "layers differ"),
        ({"seed": 3}, r"the seed differs \(0 there, 3 asked for\)"),
        ({"queries": [1, 2]}, r"queries differ\."),
        ({"max_length": 16}, r"the texts differ\."),
        ({"bank": "other"}, r"the bank differs \(\"the texts themselves\" there, another capture asked for\)"),
        ({"controls": True}, "analyzers differ"),
        ({"piece_tokens": 500}, r"piece_tokens differ \("),
        ({"batch_size": 2}, r"batch_size differs \(1 there, 2 asked for\)"),
        ({"store_dtype": "bfloat16"}, r"how texts are cut differs|store_dtype differs"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_another_plan_is_refused_and_what_differs_is_said(model, tmp_path, monkeypatch, change, said):
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(StoppedError):
            run(model, tmp_path / "run")
    if change.get("bank"):
        change = {"bank": bl.Capture.from_texts(model, TEXTS[::-1], layers=[0, 2], progress=False)}
    done = counted(monkeypatch)
    with pytest.raises(StoreError, match=f"{said}.*Choose another folder, or start over") as refused:
        run(model, tmp_path / "run", **change)
    assert not DIGEST.search(str(refused.value)), "a digest tells nobody anything"
    assert done == {"read": 0, "score": 0}


@pytest.mark.slow
def test_other_texts_labels_analyzers_and_models_are_refused(model, tokenizer, tmp_path):
    run(model, tmp_path / "run")
    named = [bl.Passage(text, doc=f"text-{i}") for i, text in enumerate(TEXTS)]
    labelled = [bl.Passage(text, labels={"kind": i % 2}) for i, text in enumerate(TEXTS)]
    options = {"out": tmp_path / "run", **CUT, **SMALL}
    rows = "documents, labels or spans differ"
    for data, said in ((TEXTS[:5], "the texts differ"), (named, rows), (labelled, rows)):
        with pytest.raises(StoreError, match=rf"{said}\. Choose"):
            bl.analyze(model, data, analyzers(), **options)
    with pytest.raises(StoreError, match="analyzers differ"):
        bl.analyze(model, TEXTS, analyzers()[:3], **options)
    with pytest.raises(StoreError, match=r"the model differs \(other weights or settings\)"):
        bl.analyze(make_bridge("llama", seed=1, tokenizer=tokenizer), TEXTS, analyzers(), **options)


def test_a_model_with_hooks_of_the_caller_is_refused(tokenizer, tmp_path):
    model = make_bridge("llama", tokenizer=tokenizer)
    model.add_hook("blocks.0.hook_resid_post", lambda state, hook: state * 0.5)  # noqa: ARG005
    with pytest.raises(StoreError, match="without the caller's hooks"):
        run(model, tmp_path / "run")


def doubling(factor: float):
    """An analyzer of somebody's own, whose code depends on where it was made."""

    class Own(A.StateNorm):
        def measure(self, batch):
            return {name: factor * value for name, value in super().measure(batch).items()}

    return Own()


def test_an_own_analyzer_with_other_code_is_another_run(model, tmp_path):
    options = {"out": tmp_path / "run", **CUT, **SMALL}
    bl.analyze(model, TEXTS, [doubling(1.0)], **options)
    bl.analyze(model, TEXTS, [doubling(1.0)], **options)
    with pytest.raises(StoreError, match=r"the code of analyzers differs \(of Own\)"):
        bl.analyze(model, TEXTS, [doubling(2.0)], **options)


@pytest.mark.slow
def test_banks_and_captures_of_equal_texts_and_other_states_are_others(model, tmp_path):
    def bank(docs, states=None):
        texts = [bl.Passage(text, doc=doc) for text, doc in zip(TEXTS[::-1], docs, strict=True)]
        held = bl.Capture.from_texts(model, texts, layers=[0, 2], progress=False)
        return held if states is None else with_states(held, {b: states + held.border(b) for b in (0, 1, 2, 3)}, {"name": "moved"})

    plain = bank("abcdef")
    run(model, tmp_path / "run", bank=plain)
    for other, how in ((bank("aabbcc"), "documents, labels or spans"), (bank("abcdef", states=1.0), "states; ")):
        with pytest.raises(StoreError, match=rf"the bank differs \(other {how}"):
            run(model, tmp_path / "run", bank=other)
    only = [A.Contraction(k=4, context="native")]
    given = {"out": tmp_path / "states", "progress": False}
    for shift, said in ((1.0, None), (2.0, "states of the capture differ")):
        moved = with_states(plain, {b: shift + plain.border(b) for b in (0, 1, 2, 3)}, {"name": "moved"})
        if said is None:
            bl.analyze(model, moved, only, **given)
            continue
        with pytest.raises(StoreError, match=said):
            bl.analyze(model, moved, only, **given)


@pytest.mark.slow(everywhere=True)
def test_a_planned_capture_stays_the_callers(model, whole, tmp_path):
    planned = bl.Capture.plan(model, TEXTS, layers=[0, 2])
    bl.analyze(model, planned, analyzers(), out=tmp_path / "run", batch_size=1, progress=False, store_dtype="bfloat16")
    assert not planned.is_read and not planned.columns and "dtype" not in planned.settings
    pd.testing.assert_frame_equal(bl.analyze(model, planned, analyzers(), batch_size=1, progress=False), whole, check_exact=True)


class Nothing(A.StateNorm):
    """Measures nothing at the first layer."""

    def measure(self, batch):
        values = super().measure(batch)
        return {name: value * float("nan") for name, value in values.items()} if batch.layer == 0 else values


def test_a_column_of_nothing_is_no_reason_to_read_again(model, tmp_path, monkeypatch):
    """States of its layer are gone by the time that the run goes on."""
    what = [A.Contraction(k=4), Nothing()]
    options = {"out": tmp_path / "run", **CUT, **SMALL}
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        with pytest.raises(StoppedError):
            bl.analyze(model, TEXTS, what, **options)
    assert bl.analyze(model, TEXTS, what, **options).load()["contraction"].notna().any()


def test_a_second_driver_is_refused(model, tmp_path):
    with RunFolder(tmp_path / "run").held():
        import threading

        said: list[BaseException] = []

        def second():
            try:
                run(model, tmp_path / "run")
            except StoreError as error:
                said.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert len(said) == 1 and "nobody else is writing to" in str(said[0])


def test_states_go_as_soon_as_nobody_needs_them(model, tmp_path, monkeypatch):
    seen = []
    real = FolderStore.put_scores

    def put(self, scores):
        real(self, scores)
        seen.append(sorted(path.name for path in self.states.iterdir()))

    monkeypatch.setattr(FolderStore, "put_scores", put)
    run(model, tmp_path / "run")
    assert seen == [["border-002", "border-003"], []]
    assert sorted(path.name for path in (tmp_path / "run" / "pieces").iterdir()) == ["plan.json"]


@pytest.mark.slow
def test_states_can_be_kept(model, tmp_path):
    run(model, tmp_path / "run", keep_states=True)
    assert len(list((tmp_path / "run" / "pieces" / "states").rglob("*.safetensors"))) >= 4 * 3


@pytest.mark.many
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_in_a_smaller_format_are_near(model, whole, tmp_path, dtype):
    made = run(model, tmp_path / "run", store_dtype=dtype).load()
    pd.testing.assert_series_equal(made["surprisal"], whole["surprisal"])  # no states of the disk
    both = made["contraction"].notna() & whole["contraction"].notna()
    assert np.corrcoef(made["contraction"][both], whole["contraction"][both])[0, 1] > 0.9
    assert facts_of(made)["capture"]["dtype"] == dtype


@pytest.mark.slow
def test_a_model_in_bfloat16_loses_nothing_on_the_disk(tokenizer, tmp_path):
    model = make_bridge("llama", tokenizer=tokenizer)
    model.to(torch.bfloat16)
    one, other = (run(model, tmp_path / dtype, store_dtype=dtype).load() for dtype in ("float32", "bfloat16"))
    pd.testing.assert_frame_equal(one.drop(columns="run"), other.drop(columns="run"), check_exact=True)


@pytest.mark.parametrize("read", [False, True])
def test_a_capture_as_its_own_bank_is_no_bank(model, whole, tmp_path, read):
    capture = bl.Capture.plan(model, TEXTS, layers=[0, 2])
    if read:
        capture = bl.Capture.from_texts(model, TEXTS, layers=[0, 2], batch_size=1, progress=False)
    only = [A.Contraction(k=4)]
    made = bl.analyze(model, capture, only, bank=capture, out=tmp_path / "run", progress=False)
    pd.testing.assert_series_equal(made.load()["contraction"], whole["contraction"], check_exact=True)
    assert made.provenance["bank"]["source"] == "the texts themselves"


def test_states_are_not_read_again_for_every_token_that_is_run_on(model, tmp_path, monkeypatch):
    asked = []
    real = StatesOnDisk.__getitem__
    monkeypatch.setattr(StatesOnDisk, "__getitem__", lambda self, border: asked.append(border) or real(self, border))
    only, given = [A.CentroidEffect(k=4)], CUT | {"layers": [0], "queries": 12}
    made = bl.analyze(model, TEXTS, only, out=tmp_path / "run", **given)
    pd.testing.assert_frame_equal(made.load(), bl.analyze(model, TEXTS, only, **given), check_exact=True)
    assert sorted(asked) == [0, 1]


def test_analyzers_of_tokens_alone(model, tmp_path):
    only = [A.Surprisal(), A.StateNorm()]
    made = bl.analyze(model, TEXTS, only, out=tmp_path / "run", **CUT | SMALL).load()
    expected = bl.analyze(model, TEXTS, only, **CUT)
    pd.testing.assert_frame_equal(made, expected, check_exact=True)


def test_a_capture_that_was_read(model, whole, tmp_path):
    capture = bl.Capture.from_texts(model, TEXTS, layers=[0, 2], batch_size=1, progress=False)
    made = bl.analyze(model, capture, analyzers(), out=tmp_path / "run", progress=False).load()
    pd.testing.assert_series_equal(made["compression"], whole["compression"], check_exact=True)


@pytest.mark.slow(everywhere=True)
def test_a_bank_of_another_capture(model, tmp_path):
    bank = bl.Capture.from_texts(model, [" ".join(TEXTS[::-1])], layers=[0, 2], max_length=48, progress=False)
    made = run(model, tmp_path / "run", bank=bank).load()
    expected = bl.analyze(model, TEXTS, analyzers(), bank=bank, **CUT)
    pd.testing.assert_frame_equal(made, expected, check_exact=True)


# ---- parts ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("of", [1, 2, 5])
def test_parts_come_to_the_same_files(model, tmp_path, of):
    run(model, tmp_path / "straight")
    said = [part(model, tmp_path / "run", number, of) for number in [*range(1, of + 1)] * 2]
    assert isinstance(said[-1], FolderRun)
    if of > 1:
        assert "left to other parts" in said[0] and "give every part once more" in said[0]
    assert files_of(tmp_path / "run") == files_of(tmp_path / "straight")


def test_parts_hold_a_folder_together_and_against_others(model, tmp_path):
    folder = RunFolder(tmp_path / "run")
    handles = []
    with folder.held(shared=True):
        part(model, tmp_path / "run", 1, 2)
        lock = tmp_path / "run" / locks.NAME
        handles.append(locks.lock(lock, shared=True))
        assert handles[0] is not None  # another part
        assert locks.lock(lock) is None  # a driver of the whole
    locks.unlock(handles[0], lock, shared=True)
    assert locks.holder(tmp_path / "run") is None and not lock.exists()


@pytest.mark.parametrize("text", ["3", "0/4", "5/4", "a/b", "1/0", "-1/3", "1.5/3"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(BasinLensError, match="expected a part such as 3/16"):
        part_of(text)


# ---- options ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "ray"}, "expected a folder"),
        ({"fresh": True}, "expected a folder"),
        ({"keep_states": True}, "expected a folder"),
        ({"out": "x", "engine": "dask"}, "expected engine"),
        ({"out": "x", "store_dtype": "int8"}, "expected store_dtype"),
        ({"out": "x", "piece_tokens": -1}, "piece_tokens"),
        ({"out": ""}, "empty name"),
        ({"store_dtype": "bfloat16"}, "expected a folder"),
        ({"piece_tokens": 9}, "expected a folder"),
        ({"out": "x", "engine_options": {"workers": 2}}, "engine_options"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_read(model, options, said):
    with pytest.raises(StoreError, match=said):
        bl.analyze(model, TEXTS, **options)


def test_a_bank_warning_is_said_as_in_memory(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_overlap, "WARN", 0.0)
    prompts = [
        f"When Mary and John went to the {place}, John gave a drink to" for place in ("store", "lake", "park", "shop", "sea")
    ]
    only = [A.Contraction(k=4)]
    with warnings.catch_warnings(record=True) as here:
        warnings.simplefilter("always")
        bl.analyze(model, prompts, only, **CUT)
    with warnings.catch_warnings(record=True) as there:
        warnings.simplefilter("always")
        bl.analyze(model, prompts, only, out=tmp_path / "run", **CUT)
    said = [[str(w.message) for w in each if w.category.__name__ == "BankWarning"] for each in (here, there)]
    assert said[0] == said[1] and said[0]
