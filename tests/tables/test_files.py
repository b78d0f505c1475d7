"""Tables come back from files as they were, with their provenance."""

import json

import pandas as pd
import pytest

from basin_lens import tables
from basin_lens.errors import StoreError, TableError
from tests.tables.test_frame import made


@pytest.mark.parametrize("runs", [1, 2])
def test_round_trip(runs, tmp_path):
    table = tables.concat([made(seed) for seed in range(runs)])
    tables.save(tables.noted(table, seen="twice"), tmp_path / "table.parquet")
    again = tables.load(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(again, table)
    assert json.dumps(again.attrs) == json.dumps(table.attrs)
    assert tables.runs(again) == tables.runs(table)
    assert tables.is_saved(tmp_path / "table.parquet")


def test_selected_and_assigned_tables_round_trip(tmp_path):
    table = made()
    for number, one in enumerate((tables.select(table, table["layer"] == 1), tables.assign(table, more=1))):
        path = tmp_path / f"{number}.parquet"
        tables.save(one, path)
        pd.testing.assert_frame_equal(tables.load(path), one.reset_index(drop=True))
        assert tables.provenance(tables.load(path)) == tables.provenance(table)


def test_other_provenance_can_be_kept_in_its_place(tmp_path):
    facts = {"merging": {"setting": {"k": 1}, "seed": 3, "model": {"name": "tiny"}}}
    for number, table in enumerate((made(), pd.DataFrame({"a": [1.0]}))):
        before = json.dumps(table.attrs)
        tables.save(table, tmp_path / f"{number}.parquet", by_run=facts)
        assert json.dumps(tables.provenance(tables.load(tmp_path / f"{number}.parquet"))) == json.dumps(facts)
        assert json.dumps(table.attrs) == before


def test_tables_without_provenance_are_not_saved(tmp_path):
    bare = pd.DataFrame({"a": [1.0]})
    with pytest.raises(TableError, match="expected a table with provenance"):
        tables.save(bare, tmp_path / "table.parquet")
    with pytest.raises(StoreError, match=r"ending in \.parquet"):
        tables.save(made(), tmp_path / "table.csv")
    assert list(tmp_path.iterdir()) == []
    assert not tables.is_saved(tmp_path / "table.parquet")
