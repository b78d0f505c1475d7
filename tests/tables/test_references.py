"""The record of a reference's error: which rows it is of, what keeps it, and what is not known."""

import numpy as np
import pandas as pd
import pytest

from basin_lens import tables
from basin_lens.errors import TableError

ERRORS = {"r": {"score": {"0": 0.5, "1": 0.1}}, "s": {"score": {"0": 0.3, "1": None}}}


def made(runs=("r",)):
    parts = [pd.DataFrame({"run": run, "layer": [0, 1, 1], "score": 1.0, "other": 2.0}) for run in runs]
    facts = {run: tables.Provenance(reference_error=ERRORS.get(run)) for run in runs}
    return tables.described(pd.concat(parts, ignore_index=True), facts)


def test_by_layer_and_run():
    assert tables.reference_error(made(), "score").tolist() == [0.5, 0.1, 0.1]
    assert tables.reference_error(made(("r", "s", "none")), "score") == pytest.approx(
        [0.5, 0.1, 0.1, 0.3, np.nan, np.nan, 0, 0, 0], nan_ok=True
    )
    assert tables.reference_error(made(), "other").tolist() == [0, 0, 0]
    assert tables.reference_error(pd.DataFrame({"score": [1.0, 2.0]}), "score").tolist() == [0, 0]


def test_without_layers_or_runs_the_largest_known():
    assert tables.reference_error(made().drop(columns="layer"), "score").tolist() == [0.5] * 3
    assert tables.reference_error(made(("r", "none")).drop(columns=["run", "layer"]), "score").tolist() == [0.5] * 6
    assert np.isnan(tables.reference_error(made(("r", "s")).drop(columns=["run", "layer"]), "score")).all()
    assert tables.reference_error(made(("r", "s")).drop(columns="run"), "score")[0] == 0.5


def test_a_layer_that_the_record_lacks_has_no_known_error():
    assert np.isnan(tables.reference_error(made().assign(layer=7), "score")).all()


def test_a_missing_column_is_refused():
    with pytest.raises(TableError, match="'nonsense'"):
        tables.reference_error(made(), "nonsense")


def test_files_and_tables_made_of_tables_keep_it(tmp_path):
    table = made(("r", "s"))
    tables.save(table, tmp_path / "t.parquet")
    answers = (tables.load(tmp_path / "t.parquet"), tables.concat([table]), tables.assign(table, more=1))
    for answer in answers:
        assert tables.reference_error(answer, "score") == pytest.approx(tables.reference_error(table, "score"), nan_ok=True)
    added = tables.with_reference_error(table, {"other": {"0": 0.2, "1": float("nan")}})
    assert tables.reference_error(added, "other")[:2] == pytest.approx([0.2, np.nan], nan_ok=True)
    assert tables.reference_error(added, "score")[0] == 0.5
    assert "other" not in tables.provenance(table)["r"]["reference_error"]
    tables.save(added, tmp_path / "u.parquet")  # NaN is no JSON
    assert tables.reference_error(tables.load(tmp_path / "u.parquet"), "other")[0] == 0.2
