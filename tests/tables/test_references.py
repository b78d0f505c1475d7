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


def test_layers_that_pandas_made_floats_of():
    """A merge with a missing row turns a column of layers into floats."""
    table = made()
    floats = tables.assign(table, layer=table["layer"].astype(float))
    assert tables.reference_error(floats, "score").tolist() == [0.5, 0.1, 0.1]
    (facts,) = tables.runs(tables.described(table, {"r": tables.Provenance(reliability={"score": {"1": 0.7}})})).values()
    assert facts.half_reliability("score", 1.0) == 0.7 and np.isnan(facts.half_reliability("score", 0.5))


def test_records_of_one_run_put_together_lose_no_error():
    """Pairs of two runs have errors of their own, layer by layer and column by column, under the same runs' names."""
    table = made().drop(columns="run")
    five, six, none = (
        tables.described(table.assign(layer=layer), {"r": tables.Provenance(reference_error=held)})
        for layer, held in ((5, {"score": {"5": 0.5}}), (6, {"score": {"6": 0.2}}), (7, None))
    )
    for parts in ([five, six], [six, five]):
        errors = tables.reference_error(tables.concat(parts), "score")
        assert errors.tolist() == [0.5 if layer == 5 else 0.2 for layer in tables.concat(parts)["layer"]]
    assert tables.reference_error(tables.concat([five, none]), "score")[0] == 0.5
    assert tables.provenance(six)["r"]["reference_error"] == {"score": {"6": 0.2}}
    for one, other, larger in ((0.5, 0.9, 0.9), (0.9, 0.5, 0.9), (0.5, None, np.nan), (None, 0.5, np.nan)):
        both = [
            tables.described(table.assign(layer=5), {"r": tables.Provenance(reference_error={"score": {"5": e}})})
            for e in (one, other)
        ]
        assert tables.reference_error(tables.concat(both), "score")[0] == pytest.approx(larger, nan_ok=True)


def test_a_record_of_another_kind_is_none():
    """Provenance written by hand: nothing is known, and nothing breaks."""
    table = pd.DataFrame({"score": [1.0, 2.0], "layer": 0})
    table.attrs["provenance"] = {"r": {"reference_error": {"score": 0.5}, "reliability": {"score": 0.5}}}
    assert tables.reference_error(table, "score").tolist() == [0, 0]
    both = tables.with_provenance(table, made(), table, made())
    assert tables.reference_error(both, "score").tolist() == [0.5, 0.5]
