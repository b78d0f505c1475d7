"""The two-way table by its definition, and what half of the partners make of it."""

import dataclasses

import numpy as np
import pytest
import torch

from basin_lens.analyzers import CrossedTable
from basin_lens.analyzers.crossed_table import partner_masks
from basin_lens.scoring.reliability import rank_agreement, spearman_brown
from tests.scoring.crossed import parts_by_loops


def table_of(contraction):
    """A table with these contractions."""
    contraction = torch.as_tensor(contraction, dtype=torch.float32)
    return CrossedTable(torch.zeros(contraction.shape[:2]), -contraction)


@pytest.mark.parametrize("size", [3, 4, 7])
def test_parts_by_their_definition(size):
    c = np.random.default_rng(0).normal(size=(5, size, size))
    expected = np.stack([parts_by_loops(each) for each in c], axis=1)
    for got, wanted in zip(table_of(c).parts(), expected, strict=True):
        assert got.numpy() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("size", [3, 4, 5, 8])
@pytest.mark.parametrize("partners", ["all", "first", "second"])
def test_a_sum_of_place_and_directions_has_no_interaction_for_any_partners(size, partners):
    g = torch.Generator().manual_seed(0)
    place, directions = 5 * torch.randn(6, size, 1, generator=g), 5 * torch.randn(6, 1, size, generator=g)
    table = dataclasses.replace(table_of(place + directions), partners=partners)
    assert table.parts().interaction.numpy() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_halves_of_the_partners_share_no_cell_but_the_tokens_own(size):
    (place_1, along_1), (place_2, along_2) = (partner_masks(size, half, torch.device("cpu")) for half in ("first", "second"))
    for place, along in ((place_1, along_1), (place_2, along_2)):
        assert not (place & along).any() and bool((place | along | torch.eye(size).bool()).all())
        assert bool(place.any(1).all()) and bool(along.any(1).all())
    assert not (place_1 & place_2).any() and not (along_1 & along_2).any()


def test_reliability_is_that_of_the_whole():
    """Two halves, each signal and as much noise: the whole has half the noise variance. By ranks: 6 / pi asin(r / 2) of normals."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=20_000)
    halves = [signal + rng.normal(size=20_000) for _ in (0, 1)]
    half = rank_agreement(*halves)
    assert half == pytest.approx(6 / np.pi * np.arcsin(1 / 4), abs=0.01)
    assert spearman_brown(half) == pytest.approx(2 * half / (1 + half))
    assert [rank_agreement(signal, signal), spearman_brown(1.0)] == pytest.approx([1, 1])
    assert np.isnan([rank_agreement(signal[:2], signal[:2]), rank_agreement(signal, np.ones(20_000)), spearman_brown(-1.0)]).all()
    assert rank_agreement(np.append(signal, np.nan), np.append(signal, signal[0])) == pytest.approx(1)


def test_a_few_outliers_do_not_make_a_score_reliable():
    """Two halves of noise with 5 tokens in common of 2,000: their values correlate, their ranks do not."""
    first, second = np.random.default_rng(1).normal(size=(2, 2000))
    first[:5] = second[:5] = 40 + np.arange(5)
    assert np.corrcoef(first, second)[0, 1] > 0.7
    assert abs(rank_agreement(first, second)) < 0.1
