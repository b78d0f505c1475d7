"""Prompts of one template are each other's neighbors at the same place: every run measures how far, and says so."""

import itertools

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.errors import BankWarning
from basin_lens.scoring.bank_overlap import overlap, warning
from tests.conftest import random_tokens

NAMES = ["Ann", "Bob", "Eve", "Tom", "Kim", "Sam"]
TEMPLATE = "When [IO:{}] and [S1:{}] had tea by the glass, [S2:{}] gave the clock to"


def prompts():
    return [bl.Passage.marked(TEMPLATE.format(a, b, b)) for a, b in itertools.permutations(NAMES, 2)]


def by_loops(capture, at, rows):
    """The two shares, a pair at a time."""
    place, skeleton, pairs = 0, 0, 0
    tokens = [s.tokens for s in capture.sequences]
    for query, neighbors in zip(at.tolist(), rows.tolist(), strict=True):
        for other in neighbors:
            if other < 0:
                continue
            pairs += 1
            i, j = int(capture.row_pos[query]), int(capture.row_pos[other])
            a, b = tokens[int(capture.row_seq[query])][:i][::-1], tokens[int(capture.row_seq[other])][:j][::-1]
            equal = sum(x == y for x, y in zip(a, b, strict=False))
            place += i == j
            skeleton += min(i, j) >= 3 and equal >= 0.5 * max(i, j)
    return place / pairs, skeleton / pairs


def test_shares_by_loops(llama):
    capture = bl.Capture.plan(llama, [*prompts()[:8], "The water allows no such time, so the carbon stays."])
    rng = np.random.default_rng(0)
    at = torch.from_numpy(rng.choice(capture.n_rows, 60, replace=False))
    rows = torch.from_numpy(rng.integers(-1, capture.n_rows, (60, 9)))
    found = overlap(capture, capture, at, rows)
    assert found == pytest.approx(by_loops(capture, at, rows)) and 0 < found[1] < 1


def test_no_neighbors_have_no_share(llama):
    capture = bl.Capture.plan(llama, prompts()[:2])
    assert all(np.isnan(overlap(capture, capture, torch.arange(3), torch.full((3, 2), -1))))
    assert warning({}) is None


def test_a_template_is_said_with_its_cure(llama):
    with pytest.warns(BankWarning, match=r"skeleton.*bank=\"reference\".*exclude") as said:
        table = bl.analyze(llama, prompts(), [bl.analyzers.Contraction(k=5)], layers=[1], progress=False)
    assert len(said) == 1
    (facts,) = table.attrs["provenance"].values()
    assert facts["search"]["same_skeleton"]["1"] > 0.5 and facts["search"]["same_position"]["1"] > 0.3


@pytest.mark.parametrize(("share", "said"), [(0.0007, False), (0.02, False), (0.25, False), (0.43, True), (0.83, True)])
def test_twelve_prompts_of_a_template_are_said_and_plain_texts_are_not(share, said):
    """Measured: treebank and Brown .0007, Python files .02, 12 prompts of a template from .43 on."""
    assert (warning({"5": share / 2, "18": share}) is not None) == said


def test_other_texts_and_another_bank_are_silent(llama, capture):
    """Warnings are errors in these tests."""
    table = bl.analyze(llama, capture, [bl.analyzers.Contraction(k=5)], layers=[1], progress=False)
    (facts,) = table.attrs["provenance"].values()
    assert facts["search"]["same_skeleton"]["1"] < 0.1
    bl.analyze(llama, random_tokens(), [bl.analyzers.Contraction(k=5)], layers=[1], progress=False)
    bl.analyze(llama, prompts()[:4], [bl.analyzers.Contraction(k=5)], layers=[1], bank=capture, progress=False)
