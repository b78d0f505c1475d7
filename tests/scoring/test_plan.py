"""A request says what is asked for, once; a plan, what it comes to, as data; its pieces can be done anywhere, in any order."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.errors import BasinLensError, NeighborError, TableError
from basin_lens.model import measuring
from basin_lens.scoring import Plan, Request, Run
from basin_lens.scoring.folder_run import FolderRequest
from basin_lens.scoring.plan import SearchOptions, SearchSite
from tests.conftest import random_tokens

A = bl.analyzers
ANALYZERS = (
    A.Compression(k=4),
    A.Contraction(k=3),
    A.Compression(k=5, blocks=2, name="two"),
    A.Contraction(k=4, context="mlp", name="mlp"),
    A.NeighborOverlap(k=4),
    A.JacobianGain(k=4, queries=5),
    A.Surprisal(),
)


@pytest.fixture(scope="module")
def capture(llama):
    return bl.Capture.from_texts(llama, random_tokens(), progress=False)


@pytest.fixture(scope="module")
def plan(capture):
    return Plan(capture.layers, capture.model["layers"], ANALYZERS, seed=3)


def new_run(model, capture, plan):
    return Run(model, capture, capture, plan, torch.ones(capture.n_rows, dtype=torch.bool))


# -- the request ----------------------------------------------------------------------------------------------------------------


def test_the_options_of_analyze_are_the_fields_of_a_request():
    _, _, *options = inspect.signature(bl.analyze).parameters.values()
    assert [(o.name, o.default) for o in options] == [(f.name, f.default) for f in dataclasses.fields(FolderRequest)]
    assert [o.name for o in options if o.kind is not inspect.Parameter.KEYWORD_ONLY] == ["analyzers"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seed": -1}, BasinLensError),
        ({"seed": True}, BasinLensError),
        ({"analyzers": []}, TableError),
        ({"analyzers": [A.Compression]}, TableError),
        ({"analyzers": [A.Compression(k=1)]}, NeighborError),
    ],
)
def test_a_request_is_checked_when_it_is_made(options, error):
    with pytest.raises(error, match="expected"):
        Request(**options)


def test_whole_numbers_of_numpy_are_seeds():
    assert type(Request(seed=np.int64(3)).seed) is int


def test_an_unknown_option_is_refused_by_name(llama):
    with pytest.raises(TypeError, match="layer"):
        bl.analyze(llama, "text", layer=[0])


def test_controls_stand_behind_what_was_asked_for():
    asked = Request([A.Contraction(k=4), A.Surprisal()], controls=True)
    assert [c.name for a in asked.chosen for c in a.columns] == [
        "contraction",
        "surprisal",
        "contraction_random",
        "contraction_radius_matched",
    ]
    assert asked.nulls == ["random neighbors", "radius_matched neighbors"]
    own = A.Compression(k=4)  # passes its nulls itself
    assert Request([own], controls=True).chosen == Request([own]).chosen


# -- the plan -------------------------------------------------------------------------------------------------------------------


def test_equal_plans_are_equal(plan):
    again = Plan(plan.layers, plan.n_layers, tuple(dataclasses.replace(a) for a in ANALYZERS), seed=3)
    assert again == plan and hash(again) == hash(plan)
    assert again.piece(1) == plan.piece(1)


def test_a_plan_holds_no_states(plan):
    def held(value):
        if dataclasses.is_dataclass(value):
            return all(held(getattr(value, f.name)) for f in dataclasses.fields(value))
        if isinstance(value, tuple | frozenset):
            return all(map(held, value))
        return value is None or isinstance(value, str | int | float)

    assert held(plan) and held(plan.piece(0))


def test_analyzers_with_equal_options_share_a_search_and_a_map(plan):
    assert [(m.context, m.blocks) for m in plan.maps] == [("patched", 1), ("patched", 2), ("mlp", 1), ("native", 1)]
    common = SearchOptions.of(A.Compression())
    assert plan.largest_k == {common: 5}
    assert plan.maps[0].passing == (SearchSite(common, "pre"),)
    assert plan.maps[2].passing == (SearchSite(common, "mid"),)


def test_every_analyzer_is_in_every_piece_once(plan):
    for layer in plan.layers:
        piece = plan.piece(layer)
        found = [a for some in piece.maps for a in some.analyzers] + list(piece.beyond_the_last_block)
        assert sorted(a.key for a in found) == sorted(a.key for a in plan.of_neighbors)
    assert [a.key for a in plan.piece(plan.n_layers - 1).beyond_the_last_block] == [ANALYZERS[2].key]


def test_needed_layers_are_those_of_maps_that_fit():
    analyzer = A.Compression(k=4, blocks=2)
    assert Plan((1,), 3, (analyzer,), 0).layers_needed == {1, 2}
    assert Plan((2,), 3, (analyzer,), 0).layers_needed == set()


# -- its pieces -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow(everywhere=True)
def test_pieces_done_apart_and_backwards_give_the_same_numbers(llama, capture, plan):
    table = bl.analyze(llama, capture, list(ANALYZERS), seed=3, progress=False)
    (facts,) = bl.tables.provenance(table).values()
    for layer in reversed(plan.layers):
        with measuring(llama):
            scores = new_run(llama, capture, plan).layer(layer)
        rows = table[table.layer == layer]
        assert set(scores.values) == {c.name for a in plan.of_neighbors for c in a.columns}
        for name, value in scores.values.items():
            assert np.array_equal(rows[name].to_numpy(), value.astype(np.float64), equal_nan=True), (layer, name)
        assert scores.reliability == {name: held[str(layer)] for name, held in facts["reliability"].items() if str(layer) in held}
