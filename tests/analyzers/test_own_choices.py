"""Neighbors chosen by a function of the caller's: what it is shown, what it may answer, and what is made of it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.errors import NeighborError
from basin_lens.neighbors import BothSides, Points, find, name_of_choice, own_sets

A = bl.analyzers


def run(model, data, *analyzers, **options):
    return bl.analyze(model, data, list(analyzers), layers=[1], progress=False, **options)


@dataclass(frozen=True)
class Ranks:
    """So many rows from a rank on; remembers nothing, so equal ones are equal."""

    first: int
    count: int

    def __call__(self, distances, _tokens, _positions):
        return distances.argsort(dim=1, stable=True)[:, self.first : self.first + self.count]


def nearest_four(distances, _tokens, _positions):
    return distances.argsort(dim=1, stable=True)[:, :4]


def random_points(seed, n=40, d=6):
    g = torch.Generator().manual_seed(seed)
    key = torch.arange(n)
    key[::7] = 0  # copies
    states = torch.randn(n, d, generator=g)[key]
    token = torch.randint(0, 5, (n,), generator=g)[key]
    return Points(states, key, token, torch.randint(-1, 4, (n,), generator=g), torch.rand(n, generator=g) > 0.2)


# -- laws of the search --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("same_token", ["any", "only", "exclude"])
@pytest.mark.parametrize("distinct", [True, False])
def test_choosing_the_nearest_is_the_search(metric, same_token, distinct):
    """The one choice with a known answer: under every rule the same sets as `find`, and none where it has too few."""
    for seed in range(4):
        points = random_points(seed)
        rules = {"metric": metric, "same_token": same_token, "distinct": distinct}
        near = find(points, points, 4, **rules)
        places = BothSides(torch.arange(40), torch.arange(40))
        rows = own_sets(Ranks(0, 4), points, points, places, 4, **rules)
        assert near.complete.any()
        assert (rows[near.complete].sort(1).values == near.rows[near.complete].sort(1).values).all()
        assert (rows[~near.complete] == -1).all()


def test_what_it_is_shown():
    """Distances of what may be chosen, tokens and positions of both sides, whatever the part of the queries."""
    queries, bank = random_points(1), random_points(2, n=30)
    places = BothSides(torch.arange(100, 140), torch.arange(30))
    seen = []

    def look(distances, tokens, positions):
        assert distances.shape == (len(tokens.queries), 30) and tokens.bank.equal(bank.token) and positions.bank.equal(places.bank)
        for row, place in enumerate((positions.queries - 100).tolist()):
            assert tokens.queries[row] == queries.token[place]
            there = distances[row].isfinite()
            assert not there[~bank.pool].any() and not (there & (bank.group == queries.group[place]) & (bank.group >= 0)).any()
            apart = (bank.states - queries.states[place]).norm(dim=1)
            torch.testing.assert_close(distances[row][there], apart[there])
            seen.append(place)
        return distances.argsort(1)[:, :2]

    own_sets(look, queries, bank, places, 2)
    assert len(seen) == len(set(seen)) > 30


@pytest.mark.parametrize(
    ("choose", "match"),
    [
        (
            lambda d, _t, _p: d.topk(2, largest=False).values,
            "tensor of whole numbers from the choice .*, got a tensor of torch.float32",
        ),
        (lambda d, _t, _p: d.argsort(1)[:, :2].tolist(), "whole numbers from the choice .*, got list"),
        (lambda d, _t, _p: d.argsort(1)[:, :3], r"rows \[q, k\] = \[\d+, 2\] from the choice .*, got \[\d+, 3\]"),
        (lambda d, _t, _p: d.argsort(1)[:, :2] + 40, "rows from 0 to 39"),
        (lambda d, _t, _p: d.argsort(1)[:, :2] - 50, "rows from 0 to 39"),
        (lambda d, _t, _p: d.argsort(1, descending=True)[:, :2], "that may not .*Take rows of finite distance"),
        (lambda d, _t, _p: d.fill_(0.0).argsort(1, descending=True)[:, :2], "that may not"),  # its own scribbles do not count
        (lambda d, _t, _p: d.argsort(1)[:, :1].expand(-1, 2), "same row twice"),
    ],
)
def test_what_it_may_not_answer(choose, match):
    points = random_points(3)
    with pytest.raises(NeighborError, match=match):
        own_sets(choose, points, points, BothSides(torch.arange(40), torch.arange(40)), 2)


def test_its_own_error_is_kept():
    points = random_points(3)
    with pytest.raises(NeighborError, match=r"choice .*<lambda>, got IndexError in its own code") as caught:
        own_sets(lambda d, _t, _p: d[:, 99], points, points, BothSides(torch.arange(40), torch.arange(40)), 2)
    assert isinstance(caught.value.__cause__, IndexError)


# -- in analyze ----------------------------------------------------------------------------------------------------------------------


def test_the_nearest_by_a_function_give_the_same_scores(llama, capture):
    plain = run(llama, capture, A.Contraction(k=4), A.Neighborhood(k=4, name="of"))
    own = run(llama, capture, A.Contraction(k=4, choice=nearest_four), A.Neighborhood(k=4, name="of", choice=nearest_four))
    for name in ("contraction", "of_radius", "of_hubness"):
        assert own[name].notna().any()
        assert own[name].to_numpy() == pytest.approx(plain[name].to_numpy(), nan_ok=True, rel=1e-4, abs=1e-5)
    (facts,) = own.attrs["provenance"].values()
    here = f"{__name__}.nearest_four"
    assert facts["search"]["own_choices"] == [here]
    assert all(here in key and " at 0x" not in key for key in facts["analyzers"])


def test_equal_choices_share_a_search_and_others_do_not(llama, capture):
    calls = []

    @dataclass(frozen=True)
    class Counted(Ranks):
        def __call__(self, distances, tokens, positions):
            calls.append(self)
            return super().__call__(distances, tokens, positions)

    two = [A.Contraction(k=4, choice=Counted(3, 4)), A.Neighborhood(k=4, choice=Counted(3, 4))]
    run(llama, capture, *two)
    assert calls == [Counted(3, 4)]
    calls.clear()
    run(llama, capture, two[0], A.Neighborhood(k=4, choice=Counted(5, 4)))
    assert calls == [Counted(3, 4), Counted(5, 4)]


def test_neighbors_at_the_query_s_own_position(llama, capture):
    """What no named choice can say."""

    def same_place(distances, _tokens, positions):
        there = positions.bank[None] == positions.queries[:, None]
        held = distances.masked_fill(~there, torch.inf).topk(2, largest=False)
        return held.indices.masked_fill(held.values.isinf(), -1)

    @dataclass(frozen=True)
    class Places(A.CloudScore):
        needs = frozenset({"input_neighbors"})
        columns = (A.Column("apart", "tokens", 0),)

        def measure(self, cloud):
            assert cloud.rows.shape[1] == 2
            return {"apart": (cloud.neighbor_pos - cloud.query_pos[:, None]).abs().sum(1)}

    table = run(llama, capture, Places(k=2, choice=same_place))
    scored = table.apart.dropna()
    assert len(scored) > 20 and (scored == 0).all()
    (facts,) = table.attrs["provenance"].values()
    assert facts["left_out"]["apart"]["too few neighbors"] == (table.pos > 0).sum() - len(scored)


@pytest.mark.parametrize(
    ("analyzer", "options", "match"),
    [
        (A.Contraction(k=4, choice=nearest_four), {"backend": "approximate"}, r"nearest_four, of Contraction.*got 'approximate'"),
        (A.Contraction(k=4, choice=lambda distances: distances), {}, "does not take three arguments"),
        (A.Contraction(k=4, choice={}.get), {}, "for Contraction, got"),
        (A.NeighborOverlap(k=4, choice=nearest_four), {}, 'expected choice="nearest" for NeighborOverlap'),
        (A.Contraction(k=5, choice=nearest_four), {}, r"rows \[q, k\] = \[\d+, 5\]"),
    ],
)
def test_choices_that_cannot_be(llama, capture, analyzer, options, match):
    with pytest.raises(NeighborError, match=match):
        run(llama, capture, analyzer, **options)


def test_a_function_as_a_class_attribute_needs_staticmethod():
    @dataclass(frozen=True)
    class Bound(A.CloudScore):
        needs = frozenset({"input_neighbors"})
        columns = (A.Column("one", "share", 0, 1),)
        k: int = 4

        def measure(self, cloud):
            return {"one": torch.zeros(len(cloud.query))}

    held = Bound(choice=nearest_four)
    held.check_all()
    assert name_of_choice(replace(held, choice=Ranks(1, 4)).choice) == "Ranks(first=1, count=4)"

    class Wrong(Bound):
        choice = nearest_four

        def __init__(self):
            pass

    with pytest.raises(NeighborError, match="staticmethod"):
        Wrong().check_all()


def test_a_null_does_not_depend_on_the_other_scores(llama, capture):
    """Random points and equally tight sets are of a size: the first few of a larger set are the nearest of them."""
    names = ["contraction_random", "contraction_radius_matched"]
    alone = run(llama, capture, A.Contraction(k=4), controls=True)
    beside = run(llama, capture, A.Contraction(k=4), A.Contraction(k=12, name="wider"), controls=True)
    for name in names:
        assert alone[name].notna().any()
        np.testing.assert_allclose(beside[name], alone[name], rtol=1e-4, atol=1e-5)
