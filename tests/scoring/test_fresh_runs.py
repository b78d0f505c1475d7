"""Starting over in a folder: what a run has written goes, however it looks, and nothing else."""

import pytest

import basin_lens as bl
from basin_lens.errors import StoreError
from tests.conftest import make_bridge
from tests.scoring.folder_runs import StoppedError, files_of, run, stop_after

A = bl.analyzers


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer)


def test_fresh_starts_over(model, tmp_path):
    run(model, tmp_path / "run")
    made = run(model, tmp_path / "run", layers=[1], fresh=True)
    assert made.layers == (1,) and made.load()["layer"].unique().tolist() == [1]


@pytest.mark.parametrize("place", ["pieces", "table"])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_somebody_elses_is_refused_and_never_deleted(model, tmp_path, place, fresh):
    (tmp_path / "run" / place).mkdir(parents=True)
    (tmp_path / "run" / place / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match=f"an earlier run's, got .* with '{place}.*' in it"):
        run(model, tmp_path / "run", fresh=fresh)
    assert (tmp_path / "run" / place / "thesis.tex").read_text() == "mine"


OTHERS = {  # files of somebody else's, and what is said to be in the way
    "table/record.json": ('{"format": "my own"}', "table"),
    "table/notes.txt": ("mine", "table"),
    "pieces/read/thesis.tex": ("mine", "pieces/read/thesis.tex"),
    "pieces/shards/layer-000/notes.txt": ("mine", "pieces/shards/layer-000/notes.txt"),
}


@pytest.mark.many
@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize("path", OTHERS)
def test_fresh_deletes_only_what_a_run_has_written(model, tmp_path, path, plan):
    """A record of another program, a file beside ours: all stays as it was, with the plan of a run there or without."""
    content, said = OTHERS[path]
    run(model, tmp_path / "run", layers=[0])
    if path == "table/record.json":
        for own in (tmp_path / "run" / "table").iterdir():
            own.unlink()
    if not plan:
        (tmp_path / "run" / "pieces" / "plan.json").unlink()
    there = tmp_path / "run" / path
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_text(content)
    before = sorted(one for one in (tmp_path / "run").rglob("*") if one.is_file())
    with pytest.raises(StoreError, match=f"with '{said}' in it"):
        run(model, tmp_path / "run", fresh=True)
    assert there.read_text() == content
    assert sorted(one for one in (tmp_path / "run").rglob("*") if one.is_file()) == before


@pytest.mark.many
@pytest.mark.parametrize("damage", ["record", "empty", "no plan", "another version", "killed"])
def test_fresh_deletes_what_a_run_has_written_however_it_looks(model, tmp_path, damage, monkeypatch):
    if damage == "killed":
        with monkeypatch.context() as patched:
            stop_after(patched, 4)
            with pytest.raises(StoppedError):
                run(model, tmp_path / "run", shard_tokens=50)
        (tmp_path / "run" / "pieces" / "read" / ".00001.safetensors.basin-lens-abc").mkdir()
    else:
        run(model, tmp_path / "run")
    record = tmp_path / "run" / "table" / "record.json"
    if damage == "empty":
        record.write_bytes(b"")
    elif damage == "record":
        record.write_bytes(record.read_bytes()[:-9])
    elif damage == "another version":
        record.write_bytes(record.read_bytes().replace(b"run table 1", b"run table 9"))
    elif damage == "no plan":
        (tmp_path / "run" / "pieces" / "plan.json").unlink()
    assert run(model, tmp_path / "run", layers=[1], fresh=True).layers == (1,)


@pytest.mark.many
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("left", ["an empty folder", "scratch", "pieces without a plan"])
def test_every_moment_of_a_death_has_a_way_out(model, tmp_path, monkeypatch, left, fresh):
    """Killed between making the folder and the plan, or in the middle of starting over."""
    run(model, tmp_path / "straight")
    pieces = tmp_path / "run" / "pieces"
    pieces.mkdir(parents=True)
    if left == "scratch":
        (pieces / ".plan.json.basin-lens-abc").mkdir()
    elif left == "pieces without a plan":
        with monkeypatch.context() as patched:
            stop_after(patched, 4)
            with pytest.raises(StoppedError):
                run(model, tmp_path / "run")
        (pieces / "plan.json").unlink()
    run(model, tmp_path / "run", fresh=fresh)
    assert files_of(tmp_path / "run") == files_of(tmp_path / "straight")
