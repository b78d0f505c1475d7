"""Gradients and what is made of them: slopes, Captum, completeness."""

import dataclasses

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import Column, integrated_gradients
from basin_lens.errors import CaptureError
from tests.analyzers.passes import LAYERS, A, counting, measured, near, one
from tests.conftest import (
    TEXTS,
    make_bridge,
    random_tokens,
)

# -- gradients -------------------------------------------------------------------------------------------------------------------------


def target_after(model, tokens, layer, states, target):
    """The target with `states` before a block, through public hooks alone."""
    given = states.reshape(-1, *states.shape[-2:])

    def put(_, hook):  # noqa: ARG001
        return given

    batch = tokens.expand(len(given), -1)
    logits = model.run_with_hooks(batch, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", put)], return_type="logits")
    if target == "future_loss":
        return -logits[:, :-1].log_softmax(-1).gather(2, batch[:, 1:, None]).sum((1, 2))
    return logits[:, -1].amax(-1) if target == "last_logit" else logits[:, -1, target]


TARGETS = ["future_loss", "last_logit", 17]


@pytest.mark.many
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_slopes(name, target):
    """Central differences in every direction, and along the state (norms inside a Llama compute in float32: no tiny steps)."""
    model, tokens = make_bridge(name).double(), random_tokens(2, 8)
    values, capture = measured(
        model, tokens, A.GradientNorm(target=target, name="n"), A.GradientTimesActivation(target=target, name="x")
    )
    norm, scaled, product = list(values)
    for layer in LAYERS:
        states = capture.resid_pre(layer).double().view(2, 8, 32)
        for seq, pos in ((0, 0), (0, 3), (1, 6)):
            moved = states[seq].expand(65, -1, -1).clone()
            moved[:32, pos] += 3e-3 * torch.eye(32)
            moved[32:64, pos] -= 3e-3 * torch.eye(32)
            with torch.no_grad():
                found = target_after(model, tokens[seq], layer, moved, target)
            slope = ((found[:32] - found[32:64]) / 6e-3).numpy()
            row = capture.row_of(seq, pos)
            size = float(states[seq, pos].norm())
            assert values[norm][layer, row] == near(np.linalg.norm(slope), rel=5e-3)
            assert values[scaled][layer, row] == near(np.linalg.norm(slope) * size, rel=5e-3)
            assert values[product][layer, row] == near(
                slope @ states[seq, pos].numpy(), rel=5e-3, abs=5e-3 * np.linalg.norm(slope) * size
            )
        last = np.isnan(values[norm][layer].reshape(2, 8)[:, -1])
        assert last.all() == last.any() == (target == "future_loss")


def test_targets_name_their_columns_and_units():
    assert [c.name for c in A.GradientNorm(target="last_logit").columns] == [
        "gradient_norm_last_logit",
        "gradient_norm_scaled_last_logit",
    ]
    assert A.GradientTimesActivation(target=7).columns[0] == Column("gradient_times_activation_logit_7", "logits")
    assert A.IntegratedGradients(target=7).columns[0].name == "integrated_gradients_logit_7"
    assert A.GradientNorm(target="cache").columns == A.GradientNorm().columns


@pytest.mark.parametrize("analyzer", [A.GradientNorm, A.GradientTimesActivation, A.IntegratedGradients])
def test_a_token_that_the_model_does_not_have(llama, monkeypatch, analyzer):
    with counting(monkeypatch) as (forward, _), pytest.raises(CaptureError, match="token id below"):
        measured(llama, TEXTS, analyzer(target=100_000))
    assert forward == []


@pytest.mark.parametrize(
    "analyzer",
    [
        A.GradientNorm(target=True),
        A.GradientNorm(target="loss"),
        A.GradientTimesActivation(target=-1),
        A.IntegratedGradients(target="cache"),
        A.IntegratedGradients(steps=1),
        A.IntegratedGradients(layer=-1),
        A.Erasure(positions=0),
    ],
    ids=lambda a: a.key,
)
def test_wrong_options_are_refused(llama, monkeypatch, analyzer):
    with counting(monkeypatch) as (forward, _), pytest.raises(CaptureError, match="expected"):
        bl.analyze(llama, TEXTS, [analyzer], progress=False)
    assert forward == []


def test_gradients_of_a_cache_cannot_come_from_a_pass(llama, monkeypatch):
    """Not even in the pass that makes the capture."""
    with counting(monkeypatch) as (forward, _), pytest.raises(CaptureError, match="incl_bwd=True"):
        measured(llama, TEXTS, A.GradientNorm(target="cache"))
    assert forward == []


def test_gradients_without_a_target_are_refused(llama):
    with pytest.raises(CaptureError, match="target"):
        measured(llama, TEXTS, dataclasses.replace(A.GradientNorm(), target="future_loss", name="x"), NoTarget())


class NoTarget(A.StateNorm):
    needs = frozenset({"gradient"})


# -- Captum ----------------------------------------------------------------------------------------------------------------------------


def captum_forward(model, tokens, layer, target):
    """Captum calls it with the two sequences in turn; `target` may be one for each."""
    each = target if isinstance(target, list) else [target] * 2
    return lambda states: torch.cat([target_after(model, tokens[i % 2], layer, s[None], each[i % 2]) for i, s in enumerate(states)])


@pytest.mark.slow
@pytest.mark.usefixtures("as_is")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_captum_agrees(name, target):
    from captum.attr import InputXGradient, IntegratedGradients, Saliency

    model, tokens = make_bridge(name), random_tokens(2, 9)
    values, capture = measured(
        model,
        tokens,
        A.GradientNorm(target=target, name="n"),
        A.GradientTimesActivation(target=target, name="x"),
        A.IntegratedGradients(target=target, layer=None, steps=12, name="i"),
    )
    norm, _, product, integral = list(values)
    for layer in LAYERS:
        states = capture.resid_pre(layer).view(2, 9, 32).requires_grad_()
        forward = captum_forward(model, tokens, layer, target)
        last = slice(0, 8 if target == "future_loss" else 9)
        slope = Saliency(forward).attribute(states, abs=False).detach()
        assert values[norm][layer].reshape(2, 9)[:, last] == near(slope.norm(dim=-1)[:, last].numpy(), rel=1e-3)
        times = InputXGradient(forward).attribute(states).detach().sum(-1)
        assert values[product][layer].reshape(2, 9)[:, last] == near(times[:, last].numpy(), rel=1e-3, abs=1e-3)
        if target == "last_logit":  # the token that is predicted at the states themselves, all along the way
            best = model(tokens, return_type="logits")[:, -1].argmax(-1)
            forward = captum_forward(model, tokens, layer, best.tolist())
        start = states.detach()[:, 1:].mean(1, keepdim=True).repeat(1, 9, 1)
        start[:, 0] = states.detach()[:, 0]
        share = IntegratedGradients(forward).attribute(
            states, baselines=start, n_steps=12, method="gausslegendre", internal_batch_size=2
        )
        expected = share.detach().sum(-1)[:, last][:, 1:].numpy()
        assert values[integral][layer].reshape(2, 9)[:, last][:, 1:] == near(expected, rel=2e-3, abs=2e-3)


# -- integrated gradients --------------------------------------------------------------------------------------------------------------


def completeness(model, tokens, capture, values, baseline, layer, target):
    """Values of the tokens that moved beside the change of the target, by sequence."""
    states = capture.resid_pre(layer).view(*tokens.shape, 32)
    start = torch.zeros_like(states)
    if baseline == "mean":  # position 0 stays
        start = torch.cat([states[:, :1], states[:, 1:].mean(1, keepdim=True).expand(-1, tokens.shape[1] - 1, -1)], 1)
        assert np.isnan(values[0].reshape(tokens.shape)[:, 0]).all()
    for seq, shares in enumerate(values[0].reshape(tokens.shape)):
        with torch.no_grad():
            both = torch.stack([states[seq], start[seq]])
            best = int(model(tokens[[seq]], return_type="logits")[0, -1].argmax())
            end, begin = target_after(model, tokens[seq], layer, both, best if target == "last_logit" else target).tolist()
        yield shares[int(baseline == "mean") : -1 if target == "future_loss" else None], end - begin


@pytest.mark.many
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_integrated_gradients_are_complete(name, layer, target):
    model, tokens = make_bridge(name), random_tokens(2, 10)
    values, capture = one(model, tokens, A.IntegratedGradients(target=target, layer=layer))
    assert values.shape == (1, 20)
    for shares, change in completeness(model, tokens, capture, values, "mean", layer, target):
        assert shares.sum() == pytest.approx(change, rel=0.0101)
        assert shares.std() > 0


@pytest.mark.slow(everywhere=True)
def test_from_zero_values_are_complete_or_missing():
    """Close to zero, norms turn any state into a full-sized one: whole sequences may not be integrable."""
    model, tokens = make_bridge("llama", rms_norm_eps=1.0), random_tokens(2, 10)
    values, capture = one(model, tokens, A.IntegratedGradients(baseline="zero"))
    for shares, change in completeness(model, tokens, capture, values, "zero", 0, "future_loss"):
        assert shares.sum() == pytest.approx(change, rel=0.0101)
    sharp, _ = one(make_bridge("llama"), tokens, A.IntegratedGradients(baseline="zero", steps=2))
    assert np.isnan(sharp).all()


@pytest.mark.slow(everywhere=True)
def test_incomplete_values_are_nan_after_more_steps(llama, monkeypatch):
    tokens = random_tokens(2, 12)
    monkeypatch.setattr(integrated_gradients, "COMPLETE", 0.0)
    with counting(monkeypatch) as (forward, _):
        values, _ = one(llama, tokens, A.IntegratedGradients(steps=4))
    assert np.isnan(values).all()
    assert len(forward) == 4 + 4 + 8 + 16 + 32


@pytest.mark.usefixtures("as_is")
def test_values_at_one_layer_hold_for_every_layer(llama):
    analyzer = A.IntegratedGradients(steps=8)
    table = bl.analyze(llama, TEXTS[:2], [analyzer, A.StateNorm()], layers=[1, 2], progress=False)
    by_layer = table.pivot(index=["seq", "pos"], columns="layer", values="integrated_gradients").to_numpy()
    assert by_layer[:, 0] == near(by_layer[:, 1])
    assert np.isfinite(by_layer).any()
    each = bl.analyze(llama, TEXTS[:2], [A.IntegratedGradients(steps=8, layer=None)], layers=[0, 2], progress=False)
    first = each[each.layer == 0].integrated_gradients.to_numpy()
    assert first == near(by_layer[:, 0])
    assert not np.allclose(each[each.layer == 2].integrated_gradients, first, equal_nan=True)


def test_a_layer_that_is_not_there(llama):
    with pytest.raises(CaptureError, match="layer below 3"):
        measured(llama, TEXTS[:1], A.IntegratedGradients(layer=3))
