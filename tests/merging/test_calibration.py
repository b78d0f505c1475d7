"""Calibration meets its target or says why not."""

import pytest
import torch

from basin_lens import merging
from basin_lens import model as door
from basin_lens.errors import MergeError
from basin_lens.merging import TokenMerger
from tests.conftest import make_bridge, random_tokens
from tests.merging.mergers import LENGTH, merged_logits

# -- calibration -----------------------------------------------------------------------------------------------------------------------


AIMED = {
    "leader": {}, "mean": {"representative": "mean"}, "rows": {"attention_weight": 0.5}, "projected": {"projection": 6},
    "adaptive": {"adaptive": True}, "adjacent": {"rule": "adjacent", "floor": -0.9}, "stride": {"rule": "stride"},
    "key_norm": {"rule": "key_norm", "drop": True}, "score": {"rule": "score"}, "residual": {"residual": "gated"},
    "preserve": {"preserve": "norm", "preserve_share": 0.2},
}  # fmt: skip


@pytest.mark.many
@pytest.mark.parametrize("options", AIMED.values(), ids=AIMED)
def test_calibration_meets_its_target(tiny, options):
    tokens = random_tokens(4, LENGTH, seed=9)
    given = {"scores": {layer: torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(layer)) for layer in range(3)}}
    given = given if options.get("rule") == "score" else {}
    merger = TokenMerger([0, 1, 2], target_rate=0.35, recent=2, **options).calibrate(tiny, tokens, **given)
    assert merger.statistics().empty and merger.calibrated
    merged_logits(merger, tiny, tokens, **given)
    assert (merger.statistics().merged - 0.35 * tokens.numel()).abs().max() <= 2
    merger = TokenMerger([0, 2], target_bytes=0.85, recent=2, **options).calibrate(tiny, tokens, **given)
    merged_logits(merger, tiny, tokens, **given)
    told = merger.statistics()
    assert (told.bytes.sum() + told.full_bytes[0]) / (3 * told.full_bytes[0]) == pytest.approx(0.85, abs=0.02)


def test_progressive_merges_less_early(tiny):
    tokens = random_tokens(4, LENGTH, seed=9)
    merger = TokenMerger([0, 1, 2], target_rate=0.4, recent=2, progressive=True).calibrate(tiny, tokens)
    merged_logits(merger, tiny, tokens)
    rates = merger.statistics().rate
    assert rates[0] < rates[1] - 0.1 and rates.mean() == pytest.approx(0.4, abs=0.02)
    given = TokenMerger([0, 1, 2], threshold=0.5, progressive=True).prepare(tiny).levels.tolist()
    assert given[0] > given[1] and given[0] == pytest.approx(0.75)


@pytest.mark.parametrize(
    "options",
    [{"target_rate": 0.97}, {"target_bytes": 0.05}, {"target_rate": 0.8, "floor": 0.9}, {"target_bytes": 0.6, "recent": 20}],
)
def test_targets_out_of_reach_are_refused(tiny, options):
    with pytest.raises(MergeError, match=r"Ask for"):
        TokenMerger([0, 1, 2], **{"recent": 2} | options).calibrate(tiny, random_tokens(4, LENGTH))


def test_with_a_threshold_calibration_sets_no_level(tiny):
    merger = TokenMerger([0, 1], threshold=0.4).prepare(tiny)
    before = {name: value.clone() for name, value in merger.weights.state_dict().items()}
    merger.calibrate(tiny, random_tokens())
    changed = {name for name, value in merger.weights.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"center", "feature_mean", "feature_scale"}


def test_a_target_needs_calibration_and_enough_tokens(tiny):
    merger = TokenMerger([0], target_rate=0.4)
    for context in (merger.attached(tiny), merging.streaming(merger, tiny, 1)):
        with pytest.raises(MergeError, match="calibrate"), context:
            pass
    with pytest.raises(MergeError, match="Give more text"):
        merger.calibrate(tiny, random_tokens(1, 2))
    with pytest.raises(MergeError, match="Give more text"):
        TokenMerger([0], threshold=0.5, projection=20).calibrate(tiny, random_tokens(1, 9))
    with pytest.raises(MergeError, match="at most 32"):
        TokenMerger([0], threshold=0.5, projection=33).prepare(tiny)


@pytest.mark.parametrize("kind", ["norm", "surprisal"])
def test_important_tokens_are_never_merged(tiny, kind):
    tokens = random_tokens(4, LENGTH)
    surprisal = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(0)) if kind == "surprisal" else None
    merger = TokenMerger([0, 1], threshold=0.0, recent=2, preserve=kind, preserve_share=0.4)
    with pytest.raises(MergeError, match="calibrate"), merger.attached(tiny, surprisal=surprisal):
        pass  # nothing would be preserved, and nobody told
    merger.calibrate(tiny, tokens, surprisal=surprisal)
    held = {}
    with merger.attached(tiny, surprisal=surprisal), torch.no_grad():
        door.forward_pass(tiny, tokens, {door.point_name("resid_pre", 0): lambda t: held.setdefault("states", t)})
        found = merger.pass_.assigned[0]
    far = (
        (held["states"] - merger.weights.center[0]).norm(dim=-1) > merger.weights.norm_cutoff[0]
        if surprisal is None
        else surprisal > merger.weights.surprisal_cutoff
    )
    assert 0.3 < far[:, 1:].float().mean() < 0.5
    assert found.joined.sum() > 10 and not (found.joined & far).any()
    taken = torch.zeros_like(far).scatter_(1, found.leader.clamp(min=0), found.leader >= 0)
    assert not (taken & far).any()
    if surprisal is not None:
        with pytest.raises(MergeError, match="surprisal"), merger.attached(tiny):
            pass
        with pytest.raises(MergeError, match="surprisal"):
            TokenMerger([0], threshold=0.1, preserve=kind).calibrate(tiny, tokens)
        with pytest.raises(MergeError, match="token by token"), merging.streaming(merger, tiny, 1):
            pass


def test_simulation_overwrites_states_and_saves_nothing(tiny):
    merger, held = TokenMerger([1], threshold=0.3, simulate=True), {}
    with merger.attached(tiny), torch.no_grad():
        for name, layer in (("after", 0), ("entered", 1)):
            point = "resid_post" if name == "after" else "resid_pre"
            held[name] = []
            door.forward_pass(tiny, random_tokens(2, LENGTH), {door.point_name(point, layer): held[name].append})
        found = merger.pass_.assigned[1]
    states, changed = held["after"][0], held["entered"][0]
    assert found.joined.sum() > 5
    for b, p in found.joined.nonzero().tolist():
        assert torch.equal(changed[b, p], states[b, found.leader[b, p]])
    assert torch.equal(changed[~found.joined], states[~found.joined])
    told = merger.statistics()
    assert (told.bytes == told.full_bytes).all() and (told.rows == told.tokens).all() and (told.merged > 0).all()
    with pytest.raises(MergeError, match="saves no memory"), merging.streaming(merger, tiny, 1):
        pass


# -- documentation ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"target_rate": 0.3}, {"threshold": 0.3, "residual": "gated", "residual_width": 3}])
def test_calibrating_inside_inference_mode(options):
    """As training does: what it makes can be written to, saved and trained afterwards, and is the same."""
    model, tokens = make_bridge("llama"), random_tokens(4, LENGTH, seed=9)
    expected = TokenMerger([0, 1], recent=2, **options).calibrate(model, tokens)
    with torch.inference_mode():
        merger = TokenMerger([0, 1], recent=2, **options).calibrate(model, random_tokens(4, LENGTH, seed=9))
        assert torch.is_inference_mode_enabled()
    own = merger.weights.state_dict()
    assert not any(value.is_inference() for value in own.values())
    assert all(torch.equal(value, own[name]) for name, value in expected.weights.state_dict().items())
    merger.calibrate(model, tokens)
