"""Laws: whatever tables are made of tables, they say where the numbers come from; and the tables given stay as they were."""

import copy
import json
import operator
import pickle

import numpy as np
import pandas as pd
import pytest

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.tables import Column, Provenance, frame
from basin_lens.values import KEYS


def made(seed: int = 0, layers=(0, 1), n: int = 5) -> pd.DataFrame:
    """A table of one run, as `analyze` builds it."""
    rng = np.random.default_rng(seed)
    rows = {name: np.arange(n) for name in KEYS[2:] if name not in ("doc", "token")}
    rows |= {"doc": [f"doc-{i % 2}" for i in range(n)], "token": [" a"] * n, "span": [None] * n}
    facts = Provenance(seed=seed, layers=tuple(layers), columns={"score": Column("nats", 0.0, None, "token", "Score")})
    values = {"score": rng.normal(size=(len(layers), n))}
    return tables.build(rows, {"kind": ["x"] * n}, list(layers), values, facts)


OTHER = pd.DataFrame({"seq": range(5), "more": range(5)})
WAYS = {
    "select by mask": lambda t: tables.select(t, (t["layer"] == 1).to_numpy()),
    "select by series": lambda t: tables.select(t, t["layer"] == 1),
    "select nothing": lambda t: tables.select(t, t["layer"] == 9),
    "assign": lambda t: tables.assign(t, more=1, score=t["score"] * 2),
    "merge": lambda t: tables.merge(t, OTHER, on="seq", how="left"),
    "concat": lambda t: tables.concat([t]),
    "concat with itself": lambda t: tables.concat([t, t]),
    "at_layer": lambda t: tables.at_layer(t, 1),
    "noted": lambda t: tables.noted(t, seen="twice"),
    "with_provenance": lambda t: tables.with_provenance(t.groupby("doc", as_index=False)[["score"]].mean(), t),
    "described": lambda t: tables.described(pd.DataFrame({"a": [1]}), tables.runs(t)),
}


@pytest.mark.parametrize("way", WAYS)
def test_provenance_is_kept_and_the_table_given_stays(way):
    table = made()
    values, facts = table.copy(), json.dumps(table.attrs)
    answer = WAYS[way](table)
    assert tables.provenance(answer) == tables.provenance(table)
    assert list(tables.runs(answer)) == [table["run"].iloc[0]]
    answer["new"] = 0
    pd.testing.assert_frame_equal(table, values)
    assert json.dumps(table.attrs) == facts


def test_provenance_is_shared_and_cannot_be_changed():
    """Pandas copies it deeply at every column; what nobody can change need not be copied."""
    given = {"r": {"list": [1, [2, {"a": None}]], "nested": {"b": (True, 0.5)}}}
    table = frame.described_by_json(made(), given)
    held = table.attrs["provenance"]
    given["r"]["list"].append(3)
    assert held == {"r": {"list": [1, [2, {"a": None}]], "nested": {"b": [True, 0.5]}}}
    assert table["score"].attrs["provenance"] is held and copy.deepcopy(held) is held
    for change in (
        lambda: held.update(r={}), lambda: held["r"].pop("list"), lambda: held["r"]["list"].append(3), lambda: held.clear(),
        lambda: operator.setitem(held["r"]["list"][1][1], "a", 1), lambda: operator.delitem(held["r"]["nested"]["b"], 0),
        lambda: operator.iadd(held["r"]["list"], [1]), lambda: held["r"].setdefault("new", 1), lambda: held["r"]["list"].sort(),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="Put a changed copy in its place"):
            change()
    assert json.dumps(held) == json.dumps({"r": {"list": [1, [2, {"a": None}]], "nested": {"b": [True, 0.5]}}})


def test_a_record_is_read_once_and_another_one_in_its_place_anew():
    table = made()
    (run, facts) = next(iter(tables.runs(table).items()))
    assert tables.runs(table["score"].to_frame())[run] is facts
    for held in (facts.columns, facts.others):
        with pytest.raises(TypeError, match="stay as it is"):
            held["score"] = None
    assert copy.deepcopy(facts) == pickle.loads(pickle.dumps(facts)) == facts
    table.attrs["provenance"] = {run: {**table.attrs["provenance"][run], "seed": 7}}
    assert tables.runs(table)[run].seed == 7


@pytest.mark.parametrize("again", [lambda held: pickle.loads(pickle.dumps(held)), lambda held: json.loads(json.dumps(held))])
def test_a_stored_copy_of_provenance_is_plain(again):
    held = frame.described_by_json(made(), {"r": {"list": [1, [2]], "nested": {"b": []}}}).attrs["provenance"]
    copied = again(held)
    assert copied == held and [type(x) for x in (copied, copied["r"], copied["r"]["list"])] == [dict, dict, list]
    copied["r"]["list"][1].append(9)
    assert held["r"]["list"] == [1, [2]]


def test_what_pandas_would_do_is_what_is_done():
    table = made()
    pd.testing.assert_frame_equal(tables.select(table, table["layer"] == 1), table[table["layer"] == 1])
    pd.testing.assert_frame_equal(tables.assign(table, more=2), table.assign(more=2))
    pd.testing.assert_frame_equal(tables.merge(table, OTHER, on="seq"), table.merge(OTHER, on="seq"))
    pd.testing.assert_frame_equal(tables.concat([table, table]), pd.concat([table, table], ignore_index=True))


def test_two_runs_are_both_kept():
    one, two = made(0), made(1)
    names = [one["run"].iloc[0], two["run"].iloc[0]]
    for both in (tables.concat([one, two]), tables.with_provenance(OTHER, one, two)):
        assert list(tables.runs(both)) == names
        assert [run.seed for run in tables.runs(both).values()] == [0, 1]
    assert set(tables.concat([one, two])["run"]) == set(names)
    with pytest.raises(TableError, match="one run"):
        tables.layer_summary(tables.concat([one, two]))


def test_a_run_s_name_is_that_of_its_facts():
    assert made(0)["run"].iloc[0] == made(0, n=7)["run"].iloc[0] != made(1)["run"].iloc[0]


def test_notes_are_kept_beside_provenance_and_not_by_results():
    table = tables.noted(made(), controls={"score": ["position"]})
    for way in ("select by mask", "assign", "merge", "at_layer"):
        assert WAYS[way](table).attrs["controls"] == {"score": ["position"]}
    assert list(tables.with_provenance(OTHER, table).attrs) == ["provenance"]
    assert tables.without_provenance(table).attrs == {}


def test_provenance_of_tables_without_any():
    bare = pd.DataFrame({"score": [1.0]})
    assert tables.runs(bare) == {} and tables.columns(bare) == {}
    assert tables.with_provenance(made(), bare).attrs == {}
    assert tables.with_columns(bare, {"more": Column("nats")}).attrs == {}
    for refused in (lambda: tables.provenance(bare), lambda: tables.scores(bare), lambda: tables.concat([made(), bare])):
        with pytest.raises(TableError, match="expected a table with provenance"):
            refused()
    with pytest.raises(TableError, match="at least one table"):
        tables.concat([])


def test_columns_made_later_are_described_in_every_run():
    both = tables.assign(tables.concat([made(0), made(1)]), more=1.0)
    answer = tables.with_columns(both, {"more": Column("bits", low=0.0)})
    assert tables.columns(answer) == {"score": Column("nats", 0.0, None, "token", "Score"), "more": Column("bits", low=0.0)}
    assert all(
        facts["columns"]["more"] == {"unit": "bits", "low": 0.0, "high": None} for facts in tables.provenance(answer).values()
    )
    assert list(tables.columns(both)) == ["score"]


@pytest.mark.parametrize("names", [["score", "score"], ["token"], ["span"], ["run"]])
def test_a_name_used_twice_is_refused(names):
    with pytest.raises(TableError, match=f"got {names[0]!r} twice"):
        tables.check_names(names)


def test_what_another_tool_calls_provenance_does_no_harm():
    """Pandas copies what is there at every look at a column; what is no record says nothing of a run."""
    table = pd.DataFrame({"a": [1.0, 2.0]})
    table.attrs["provenance"] = {"source": "my lab"}
    assert tables.runs(tables.with_provenance(table.assign(b=1), table)) == {}
    mine = tables.with_provenance(table.assign(b=1), made())
    mine.attrs["provenance"] |= {"source": "my lab", "files": ["x"]}
    assert mine["a"].tolist() == [1.0, 2.0] and mine["a"].attrs["provenance"] == mine.attrs["provenance"]
    assert len(tables.runs(tables.select(mine, mine["a"] > 1))) == 1
