"""Analyzers of one run share searches and passes, and sharing changes no number."""

import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass

import pytest

import basin_lens as bl
from basin_lens import model as door
from basin_lens import neighbors
from basin_lens.transport import LayerMaps

A = bl.analyzers


def run(model, data, *analyzers, **options):
    return bl.analyze(model, data, list(analyzers), progress=False, **options)


@dataclass
class Work:
    """What a run did: searches, block calls, and pairs of query and point passed."""

    searches: int = 0
    block_calls: int = 0
    block_rows: int = 0
    passes: list = dataclasses.field(default_factory=list)


def everywhere(monkeypatch, original, replacement):
    """Replace a function in every module of basin_lens that took it by name."""
    for name, module in list(sys.modules.items()):
        if name == "basin_lens" or name.startswith("basin_lens."):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    monkeypatch.setattr(module, attribute, replacement)


@pytest.fixture
def work(monkeypatch, llama, capture):
    """A function that runs analyzers and says what it took."""
    find, call_block, make = neighbors.find, door.call_block, LayerMaps.map
    current = []

    def counted_find(*given, **options):
        current[-1].searches += 1
        return find(*given, **options)

    def counted_call(model, layer, call, states, *rest, **options):
        current[-1].block_calls += 1
        current[-1].block_rows += states.shape[0] * states.shape[1]
        return call_block(model, layer, call, states, *rest, **options)

    def counted_map(self, *given):
        made = make(self, *given)

        def of_rows(queries, rows):
            pairs = ((q, row) for q, many in zip(queries.tolist(), rows.tolist(), strict=True) for row in many if row >= 0)
            current[-1].passes += pairs
            return made.of_rows(queries, rows)

        return dataclasses.replace(made, of_rows=of_rows)

    everywhere(monkeypatch, find, counted_find)
    everywhere(monkeypatch, call_block, counted_call)
    monkeypatch.setattr(LayerMaps, "map", counted_map)

    def measure(*analyzers):
        current.append(Work())
        table = run(llama, capture, *analyzers, layers=[1])
        return current[-1], table

    return measure


@pytest.mark.slow(everywhere=True)
def test_equal_options_share_one_search(work):
    crossed = A.Compression(k=6, nulls=False)
    alone, _ = work(crossed)
    together, _ = work(crossed, A.Contraction(k=6), A.RawCompression(k=6), A.Neighborhood(k=6), A.Contraction(k=3, name="c3"))
    assert alone.searches == together.searches == 1
    with_nulls, _ = work(A.Compression(k=6))
    assert with_nulls.searches == 2  # the random sets are drawn as one more


def test_other_options_are_another_search(work):
    crossed = A.Compression(k=6, nulls=False)
    done, _ = work(crossed, A.Contraction(k=6, same_token="exclude", name="b"), A.Contraction(k=6, metric="cosine", name="c"))
    assert done.searches == 3


def test_equal_contexts_share_one_transport(work):
    """The neighbors and the random sets are passed once, however many scores look at them; so are the clouds of groups."""
    crossed, held = A.Compression(k=6, nulls=False), A.RelativeContraction(k=6)
    for first, others in (
        (held, [A.Contraction(k=6), A.RawCompression(k=6, context="patched"), A.RelativeContraction(k=3, name="r3")]),
        (crossed, [A.Compression(k=6, nulls=False, contractions=True, name="b")]),
    ):
        alone, _ = work(first)
        together, _ = work(first, *others)
        assert alone.block_rows > 0
        assert (together.block_calls, together.block_rows) == (alone.block_calls, alone.block_rows)


def test_overlapping_neighborhoods_are_passed_once(work):
    """Two searches, one context: their common pairs go through the block once."""
    any_, exclude = A.Contraction(k=6), A.Contraction(k=6, same_token="exclude", name="b")
    apart = [set(neighbor_pairs(work(a)[0])) for a in (any_, exclude)]
    together = neighbor_pairs(work(any_, exclude)[0])
    assert len(together) == len(set(together))
    assert set(together) == apart[0] | apart[1]
    assert apart[0] & apart[1]
    assert apart[0] != apart[1]


def neighbor_pairs(done):
    """Pairs passed for the scores: those of a query with few points; the random points are many to a query."""
    counts = Counter(query for query, _ in done.passes)
    few = [pair for pair in done.passes if counts[pair[0]] <= 12]
    assert few
    return few


@pytest.mark.slow(everywhere=True)
def test_sharing_changes_nothing(work):
    every = [
        A.Compression(k=6),
        A.Contraction(k=3),
        A.RawCompression(k=6),
        A.Neighborhood(k=4),
        A.Compression(k=5, context="solo", name="s"),
    ]
    _, together = work(*every)
    for a in every:
        _, alone = work(a)
        for column in a.columns:
            assert together[column.name].to_numpy() == pytest.approx(alone[column.name].to_numpy(), nan_ok=True, abs=2e-5)


def test_native_scores_pass_nothing(work):
    done, _ = work(A.RawCompression(k=6), A.Neighborhood(k=6), A.Contraction(k=6, context="native"))
    assert done.block_calls == 1  # the check that the capture is this model's
