"""What provenance says: the dataclasses and plain JSON are the same thing."""

import dataclasses
import json

import pytest

import basin_lens as bl
from basin_lens.tables import Column, Provenance
from basin_lens.tables.schema import _KINDS
from tests.conftest import random_tokens

FULL = Provenance(
    model={"name": "tiny", "weight_processing": {"layer_norm_folded": False}},
    precision="full",
    texts="ab12",
    copies={"groups": []},
    capture={"max_length": 9},
    layers=(0, 2),
    analyzers=("Surprisal()",),
    columns={"surprisal": Column("nats", 0.0, None, "token", "Surprisal")},
    controls=(),
    neighbors="its own",
    queries="all",
    asked="3-7,12",
    seed=0,
    read_again_for=(),
    left_out={"surprisal": {"position 0": 2}},
    bank={"source": "the texts themselves", "points": 8},
    search={"backend": "exact"},
    routes={"0": "native"},
    route_reasons={},
    compiled={},
    check_error={"0": None, "2": 1e-6},
    affine_fit={},
    reliability={"surprisal": {"0": 0.5, "2": None}},
    reference_error={"surprisal": {"0": 0.01, "2": None}},
    groups={"0": {"compression": {"groups": 3, "local": 0.4}}},
    study={"k": 15},
    made={"date": "2026-01-02T03:04:05Z", "command": None},
    others={"note": "by hand"},
)


def test_json_round_trip_is_exact():
    facts = FULL.as_json()
    again = Provenance.from_json(json.loads(json.dumps(facts)))
    assert again == FULL
    assert json.dumps(again.as_json()) == json.dumps(facts)
    assert list(facts) == [*[each.name for each in dataclasses.fields(Provenance)][:-1], "note"]


def test_every_field_has_a_kind_in_json():
    assert {each.name for each in dataclasses.fields(Provenance)} == {*_KINDS, "others"}


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"seed": 3},
        {"columns": {"a": {"unit": "nats", "low": 0, "high": None}}},
        {"model": "by hand", "layers": None, "columns": {"a": "nats"}, "mine": [1, {"b": None}]},
    ],
)
def test_what_a_user_wrote_by_hand_is_kept(facts):
    assert Provenance.from_json(facts).as_json() == facts


def test_what_is_not_known_is_none():
    nothing = Provenance.from_json({})
    assert all(getattr(nothing, name) is None for name in _KINDS)
    assert nothing.column("a") is None and nothing.half_reliability("a", 0) != nothing.half_reliability("a", 0)
    assert FULL.half_reliability("surprisal", 0) == 0.5
    assert FULL.column("surprisal") == Column("nats", 0.0, None, "token", "Surprisal")


def test_every_fact_of_a_run_has_a_field(llama):
    table = bl.analyze(llama, random_tokens(5, 12), controls=True, progress=False)
    (facts,) = bl.tables.runs(table).values()
    assert facts.others == {}
    assert set(facts.columns) == set(bl.tables.columns(table)) == set(bl.tables.scores(table))
    assert table.attrs["provenance"] == {table["run"].iloc[0]: facts.as_json()}
