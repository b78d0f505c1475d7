"""The table of a run in a folder: rows, labels and columns that are loaded, and what is refused."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens import tables
from basin_lens.errors import BasinLensError, StoreError, TableError
from tests.conftest import TEXTS, make_bridge
from tests.scoring.folder_runs import CUT, DAMAGES, analyzers, run

A = bl.analyzers


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def whole(model):
    """The same run in memory."""
    return bl.analyze(model, TEXTS, analyzers(), **CUT)


@pytest.fixture(scope="module")
def opened(model, tmp_path_factory):
    return run(model, tmp_path_factory.mktemp("runs") / "run")


def test_parts_of_the_table_are_loaded(opened, whole):
    some = opened.load(layers=[2], columns=["surprisal"], queries=[1, 3])
    assert some["layer"].unique().tolist() == [2] and sorted(some["pos"].unique()) == [1, 3]
    assert "surprisal" in some and "contraction" not in some and "doc" in some
    assert tables.provenance(some) == tables.provenance(opened.load())
    assert opened.load(layers=0)["layer"].unique().tolist() == [0]
    with pytest.raises(StoreError, match=r"tables\.open"):
        tables.load(opened.folder.parent)
    assert opened.scores == tuple(tables.scores(whole))


def test_a_summary_is_that_of_the_whole_table(opened, whole):
    pd.testing.assert_frame_equal(tables.layer_summary(opened), tables.layer_summary(whole))


def test_arrow_reads_it(opened, whole):
    scanned = opened.scan().to_table(columns=["layer", "surprisal"]).to_pandas()
    np.testing.assert_array_equal(scanned["surprisal"], whole["surprisal"])


def test_rows_of_a_span_and_of_a_label(model, tmp_path):
    passages = [bl.Passage(text, doc=str(i), labels={"odd": bool(i % 2)}, spans={"start": (0, 8)}) for i, text in enumerate(TEXTS)]
    made = bl.analyze(model, passages, [A.Surprisal()], out=tmp_path / "run", **CUT)
    assert made.load(queries="odd")["doc"].unique().tolist() == ["1", "3", "5"]
    started = made.load(queries="start")
    assert set(started["span"]) == {"start"} and len(started)
    with pytest.raises(TableError, match="marks no token"):
        made.load(queries="")
    with pytest.raises(TableError, match="marks no token"):
        made.load(queries="end")


@pytest.mark.many
@pytest.mark.parametrize("values", [(True, False), (1, 0), (2.5, 0.0), (1, None)], ids=str)
def test_a_label_chooses_the_same_rows_as_in_analyze(model, tmp_path, values):
    passages = [bl.Passage(text, doc=str(i), labels={"kind": values[i % 2]}) for i, text in enumerate(TEXTS)]
    made = bl.analyze(model, passages, [A.Surprisal()], out=tmp_path / "run", **CUT)
    chosen = bl.analyze(model, passages, [A.Contraction(k=4)], queries="kind", layers=[0], progress=False)
    assert made.load([0], queries="kind")["doc"].unique().tolist() == chosen[chosen["contraction"].notna()]["doc"].unique().tolist()


@pytest.mark.many
@pytest.mark.parametrize("values", [("True", "False"), ("1", "0"), (0, 0), (False, None)], ids=str)
def test_a_label_that_chooses_nothing_is_refused_as_in_analyze(model, tmp_path, values):
    passages = [bl.Passage(text, doc=str(i), labels={"kind": values[i % 2]}) for i, text in enumerate(TEXTS)]
    made = bl.analyze(model, passages, [A.Surprisal()], out=tmp_path / "run", **CUT)
    with pytest.raises(BasinLensError) as there:
        bl.analyze(model, passages, [A.StateNorm()], queries="kind", layers=[0], progress=False)
    said = "with text such as" if isinstance(values[0], str) else "which marks no token"
    assert said in str(there.value)
    with pytest.raises(TableError, match=said):
        made.load(queries="kind")


TAKES = """
import sys
import basin_lens as bl
from basin_lens import tables
run, out = tables.open(sys.argv[1]), sys.argv[2]
for take in (
    lambda: tables.save(run, out + "/t.parquet"),
    lambda: tables.save_csv(run, out + "/t.csv"),
    lambda: tables.bundle(run, out + "/t.zip"),
    lambda: bl.views.make_report(run),
    lambda: tables.provenance(run),
    lambda: bl.views.layer_curve(run, "surprisal"),
    lambda: bl.compare(run, run, on="surprisal"),
):
    try:
        take()
    except bl.errors.TableError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_table_in_a_folder_is_loaded_first(opened, tmp_path):
    """In a process of its own: here, types are checked before the package can say anything."""
    done = subprocess.run([sys.executable, "-c", TAKES, opened.folder, tmp_path], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and all("got RunTable" in line for line in lines), done.stdout
    assert all("Load what you need of it: run.load(" in line for line in lines[:6])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers": [1]}, r"layers of the run \[0, 2\]"),
        ({"layers": []}, "layers of the run"),
        ({"columns": ["surprisl"]}, "Did you mean 'surprisal'"),
        ({"columns": "surprisal"}, "a list of columns"),
        ({"queries": [1.5]}, "positions"),
        ({"queries": [999]}, r"positions below \d+, got \[999\]"),
        ({"queries": [-1]}, "positions from 0 on"),
    ],
)
def test_what_the_table_does_not_have_is_refused(opened, wrong, said):
    with pytest.raises(TableError, match=said):
        opened.load(**wrong)


@pytest.mark.many
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "more"])
def test_a_damaged_table_is_refused(model, tmp_path, damage):
    made = run(model, tmp_path / "run")
    path = made.folder / "layer-002.parquet"
    if damage == "gone":
        path.unlink()
    elif damage == "more":
        (made.folder / "record.json").write_bytes((made.folder / "record.json").read_bytes().replace(b'"rows": ', b'"rows": 1'))
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(StoreError, match="Give the command"):
        tables.open(tmp_path / "run").load()
    if damage == "flipped":
        with pytest.raises(StoreError, match="changed after"):
            made.check()


def test_it_shows_itself(opened):
    assert "RunTable(" in repr(opened) and "surprisal" in opened._repr_html_()


def test_a_folder_opened_from_elsewhere_is_found(opened, monkeypatch, tmp_path):
    monkeypatch.chdir(opened.folder.parents[1])
    held = tables.open("run")
    monkeypatch.chdir(tmp_path)
    assert len(held.load(layers=[0]))
