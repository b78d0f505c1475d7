"""`basin-lens analyze` in a folder: interrupted, in parts, and how far it is."""

import pandas as pd
import pytest

from basin_lens import tables
from basin_lens.cli import runs
from basin_lens.scoring.folder_store import FolderStore
from tests.cli.calls import call


@pytest.fixture
def given(folder, tmp_path):
    """The command, without its options."""
    text = str(folder.parent / "text.txt")
    return ("analyze", text, "--model", str(folder), "--layers", "0,2", "--k", "5", "--out", str(tmp_path / "run"))


def files_of(folder):
    return {name: facts["sha256"] for name, facts in tables.open(folder).files.items()}


def test_an_interrupted_command_goes_on_and_status_says_how_far(given, tmp_path, capsys, monkeypatch):
    real = FolderStore.put_scores

    def stop(self, scores):
        if scores.layer == 2:
            raise KeyboardInterrupt
        real(self, scores)

    with monkeypatch.context() as patched:
        patched.setattr(FolderStore, "put_scores", stop)
        code, _, err = call(*given, capsys=capsys)
    assert code == 130 and "interrupted" in err
    code, said, _ = call("status", str(tmp_path / "run"), capsys=capsys)
    assert code == 0 and "scoring   1 of 2 layers" in said and "nobody works on it" in said
    assert call(*given, capsys=capsys)[0] == 0
    code, said, _ = call("status", str(tmp_path / "run"), capsys=capsys)
    assert code == 0 and "finished" in said and "scoring   2 of 2 layers" in said
    assert pd.read_csv(tmp_path / "run" / "summary.csv")["layer"].tolist() == [0, 2]


@pytest.mark.slow
def test_a_death_before_the_report_leaves_its_neighbors(given, tmp_path, capsys, monkeypatch):
    """The table is there; the page still comes with the neighbors of every token."""
    with monkeypatch.context() as patched:
        patched.setattr(tables, "layer_summary", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call(*given, capsys=capsys)[0] == 130
    assert tables.open(tmp_path / "run").layers == (0, 2) and not (tmp_path / "run" / "report.html").exists()
    assert call(*given, capsys=capsys)[0] == 0
    assert "neighbors" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "run" / "pieces").iterdir()) == ["plan.json"]


@pytest.mark.slow
def test_parts(given, tmp_path, capsys):
    assert call(*given, capsys=capsys)[0] == 0
    parts = (*given[:-1], str(tmp_path / "parts"))
    said = [call(*parts, "--part", f"{number}/2", capsys=capsys) for number in (1, 2, 1)]
    assert [code for code, *_ in said] == [0, 0, 0]
    assert "left to other parts" in said[0][1] + said[1][1] and "report.html" in said[-1][1]
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "run")


def test_shards_of_a_layer(given, tmp_path, capsys, monkeypatch):
    """Cut as asked for, with the numbers of one piece."""
    cut = []
    real = FolderStore.put
    monkeypatch.setattr(FolderStore, "put", lambda self, piece, part: cut.append(self.job.shards) or real(self, piece, part))
    assert call(*given, capsys=capsys)[0] == 0 and not cut
    code, *_ = call(*given[:-1], str(tmp_path / "cut"), "--shard-tokens", "40", capsys=capsys)
    assert code == 0 and min(cut) > 1
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--part", "3/2"), "expected a part such as 3/16"),
        (("--part", "1/2", "--fresh"), "expected --part without --fresh"),
        (("--workers", "2"), "expected --workers with --engine ray"),
        (("--engine", "dask"), "dask"),
        (("--store-dtype", "int8"), "int8"),
        (("--shard-tokens", "0"), "--shard-tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused(given, options, said, capsys, tmp_path):
    code, _, err = call(*given, *options, capsys=capsys)
    assert code != 0 and said in err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_large_table_has_no_report_and_says_so(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "MOST_REPORTED", 10)
    code, said, _ = call(*given, capsys=capsys)
    assert code == 0 and "No report:" in said and not (tmp_path / "run" / "report.html").exists()


def test_status_of_no_run_is_refused(tmp_path, capsys):
    code, _, err = call("status", str(tmp_path), capsys=capsys)
    assert code == 1 and "expected the folder of a run" in err


@pytest.mark.parametrize(("seconds", "said"), [(12.2, "12 s"), (600.0, "10 min"), (7200.0, "2.0 h")])
def test_durations(seconds, said):
    assert runs._duration(seconds) == said
