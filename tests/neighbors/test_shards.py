"""A bank in shards: the answer of one search, bit for bit, however the bank is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basin_lens.neighbors import find, shards
from tests.neighbors.points import EXACT, low_rank, reference, worlds


@settings(max_examples=80, deadline=None)
@given(worlds(), st.sampled_from(["any", "only", "exclude"]), st.booleans(), st.integers(1, 9))
def test_ties_across_shards_go_to_the_lower_row(world, same_token, distinct, rows):
    """Whole numbers as states: nearly all distances are tied, and keys, groups and tokens are shared across shards."""
    queries, bank, k = world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_ROWS", rows)
        found = find(queries, bank, k, same_token=same_token, distinct=distinct)
    expected, distances = reference(queries, bank, k, "l2", same_token, distinct)
    assert found.rows.tolist() == expected.tolist()
    torch.testing.assert_close(found.distances.double(), torch.from_numpy(distances), equal_nan=True)


@pytest.mark.many
@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("same_token", ["any", "only", "exclude"])
@pytest.mark.parametrize("rows", [700, 2999])
def test_shards_change_no_bit(monkeypatch, backend, metric, same_token, rows):
    points = low_rank(3000, 24, 8, seed=0)
    queries = points.some(torch.arange(0, 3000, 7))
    whole = find(queries, points, 9, metric=metric, same_token=same_token)
    monkeypatch.setattr(shards, "SHARD_ROWS", rows)
    found = find(queries, points, 9, metric=metric, same_token=same_token, backend=backend)
    assert torch.equal(found.rows, whole.rows)
    assert torch.equal(found.distances.nan_to_num(), whole.distances.nan_to_num())


def test_recall_over_shards_is_measured_on_what_was_found(monkeypatch):
    points = low_rank(3000, 300, 200, seed=0)
    exact = find(points, points, 9)
    monkeypatch.setattr(shards, "SHARD_ROWS", 1000)
    found = find(points, points, 9, backend="approximate")
    true = float((found.rows[:, None] == exact.rows[:, :, None]).any(2).double().mean())
    assert found.recall is not None and 0.9 < found.recall <= 1 and abs(found.recall - true) < 0.03
