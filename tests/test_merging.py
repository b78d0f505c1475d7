"""Token merging: causality first, then the same numbers by another way, then options."""

import pytest
import torch

from basin_lens import merging
from basin_lens import model as door
from tests.conftest import make_bridge, random_tokens

FAMILIES = ("llama", "gpt2", "gemma2")
LENGTH = 24
KINDS = {
    "leader": {"threshold": 0.3},
    "strict": {"threshold": 0.7},
    "mean": {"threshold": 0.3, "representative": "mean"},
    "rows": {"threshold": 0.4, "attention_weight": 0.5},
    "residual": {"threshold": 0.3, "residual": "gated", "residual_width": 3},
    "adaptive": {"threshold": 0.4, "adaptive": True},
    "projected": {"threshold": 0.4, "projection": 6},
    "preserved": {"threshold": 0.3, "preserve": "norm", "preserve_share": 0.3},
    "dropped": {"threshold": 0.3, "drop": True},
    "random": {"threshold": 0.5, "rule": "random"},
    "stride": {"threshold": 0.5, "rule": "stride"},
    "adjacent": {"threshold": 0.2, "rule": "adjacent"},
    "recent": {"rule": "all", "drop": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def wide(request):
    """A tiny random model in float64."""
    return door.in_dtype(make_bridge(request.param), torch.float64)


@pytest.fixture(scope="module")
def tiny():
    return door.in_dtype(make_bridge("llama"), torch.float64)


def make_merger(model, kind: str, **changes) -> merging.TokenMerger:
    merger = merging.TokenMerger([0, 1, 2], **{"recent": 2} | KINDS[kind] | changes)
    merger.calibrate(model, random_tokens(4, LENGTH, seed=9))
    if merger.slope is not None:
        with torch.no_grad():
            merger.slope += 0.4
    return merger


def merged_logits(merger, model, tokens, **given):
    with merger.attached(model, **given), torch.no_grad():
        return door.forward_pass(model, tokens, {})


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_after_changes_nothing_before(wide, kind):
    merger, tokens = make_merger(wide, kind), random_tokens(2, LENGTH)
    full = merged_logits(merger, wide, tokens)
    assert merger.statistics().merged.sum() > 0
    for cut in (5, 11, 17):
        assert (merged_logits(merger, wide, tokens[:, :cut]) - full[:, :cut]).abs().max() < 1e-5
        changed = torch.cat([tokens[:, :cut], random_tokens(2, LENGTH - cut, seed=cut)], 1)
        assert torch.equal(merged_logits(merger, wide, changed)[:, :cut], full[:, :cut])


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_equals_whole_sequences(wide, kind):
    merger, tokens = make_merger(wide, kind), random_tokens(2, LENGTH)
    full = merged_logits(merger, wide, tokens)
    with merging.streaming(merger, wide, 2) as stream, torch.no_grad():
        steps = torch.stack([stream.step(tokens[:, place]) for place in range(LENGTH)], 1)
    assert (steps - full).abs().max() < 1e-5
