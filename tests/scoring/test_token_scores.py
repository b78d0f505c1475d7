"""Scores of single tokens against their formulas."""

import math

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import TokenBatch
from basin_lens.capture import future_loss
from tests.conftest import TEXTS, make_bridge, random_tokens
from tests.scoring.oracle import LAYERS, A, column, near, run


def batch_of(tokens=None, valid=None, layer=1, **values):
    first = next(iter(values.values()))
    size = (first.shape[0], first.shape[-2])
    tokens = torch.zeros(size, dtype=torch.int64) if tokens is None else tokens
    valid = torch.ones(size, dtype=torch.bool) if valid is None else valid
    return TokenBatch(layer, 3, tokens, valid, values, {})


def entropy(states):
    """-sum l log l / log min(T, d) and max l / sum l of K = Z Z^T / trace, for one sequence, by eigenvalues."""
    z = states - states.mean(0)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    gram = z @ z.T
    values = np.linalg.eigvalsh(gram / np.trace(gram)).clip(0)
    kept = values[values > 0]
    return -(kept * np.log(kept)).sum() / math.log(min(states.shape)), values.max() / values.sum()


def test_matrix_entropy_is_the_formula(llama, capture):
    table = run(llama, capture, A.MatrixEntropy())
    for layer in LAYERS:
        states = capture.resid_pre(layer).double().numpy()
        for seq, (first, length) in enumerate(zip(capture.offsets.tolist(), capture.lengths.tolist(), strict=True)):
            rows = table[(table.layer == layer) & (table.seq == seq)]
            for suffix, start in (("", first), ("_without_first", first + 1)):
                expected = entropy(states[start : first + length])
                assert rows["matrix_entropy" + suffix].to_numpy() == near(np.full(length, expected[0]))
                assert rows["anisotropy" + suffix].to_numpy() == near(np.full(length, expected[1]))


def test_matrix_entropy_of_known_spectra():
    """All on one line: 0 and 1. All directions alike: nearly 1 and nearly 1 / d."""
    line = torch.linspace(-3, 5, 9)[:, None] * torch.ones(4)
    corners = torch.cat([torch.eye(4), -torch.eye(4)])
    got = [A.MatrixEntropy().measure(batch_of(resid_pre=states[None])) for states in (line, corners)]
    assert [float(g["matrix_entropy"]) for g in got] == near([0, 1])
    assert [float(g["anisotropy"]) for g in got] == near([1, 0.25])


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_matrix_entropy_of_short_and_padded_sequences(length):
    """Under 3 states there is nothing to measure: two centered rows are one direction, whatever they are."""
    states = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    got = A.MatrixEntropy().measure(batch_of(resid_pre=states, valid=torch.arange(6)[None] < length))
    for suffix, first in (("", 0), ("_without_first", 1)):
        left = states[0, first:length].double().numpy()
        expected = entropy(left) if len(left) >= 3 else (math.nan, math.nan)
        assert float(got["matrix_entropy" + suffix]) == near(expected[0], nan_ok=True)
        assert float(got["anisotropy" + suffix]) == near(expected[1], nan_ok=True)


def test_surprisal_is_log_softmax(world):
    model, capture = world
    table = run(model, capture, A.Surprisal())
    expected = []
    for sequence in capture.sequences:
        with torch.no_grad():
            logits = model(torch.tensor([sequence.tokens]), return_type="logits")[0].double()
        predicted = -torch.log_softmax(logits, -1)
        expected += [math.nan] + [float(predicted[t - 1, token]) for t, token in enumerate(sequence.tokens) if t]
    for layer in LAYERS:
        assert column(table, "surprisal", layer) == near(np.array(expected), nan_ok=True)


def test_surprisal_of_a_uniform_guess():
    tokens = torch.tensor([[1, 2, 0, 4]])
    got = A.Surprisal().measure(batch_of(tokens, logits=torch.zeros(1, 4, 7)))["surprisal"]
    assert got.numpy() == near(np.array([[math.nan] + [math.log(7)] * 3]), nan_ok=True)


def test_state_norm(world):
    model, capture = world
    table = run(model, capture, A.StateNorm())
    for layer in LAYERS:
        assert column(table, "state_norm", layer) == near(
            np.linalg.norm(capture.resid_pre(layer).double().numpy(), axis=1), rel=1e-5
        )


def patterns_of(model, tokens, layer):
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([tokens]))
    return cache[f"blocks.{layer}.attn.hook_pattern"][0].double().numpy()


@pytest.mark.many
@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_attention_received_by_a_loop(llama, capture, normalize, sink):
    """Grouped-query attention: four heads read two key heads."""
    analyzer = A.AttentionReceived(normalize=normalize, sink=sink, name="received")
    table = run(llama, capture, analyzer)
    for layer in LAYERS:
        expected = []
        for sequence in capture.sequences:
            heads = patterns_of(llama, sequence.tokens, layer)
            assert heads.shape[0] == 4
            count = len(sequence.tokens)
            for i in range(count):
                if count - 1 - i < 5 or (i == 0 and not sink):
                    expected.append(math.nan)
                    continue
                total = uniform = 0.0
                for t in range(i + 1, count):
                    rows = heads.mean(0)[t]
                    total += rows[i] if sink else rows[i] / rows[1:].sum()
                    uniform += 1 / (t + 1) if sink else 1 / t
                expected.append(total / uniform if normalize else total)
        assert column(table, "received", layer) == near(np.array(expected), nan_ok=True)


@pytest.mark.parametrize("sink", [True, False])
def test_uniform_attention_receives_1(sink):
    """With padding, whose rows must count nowhere."""
    count, length = 14, 11
    uniform = (torch.ones(count, count).tril() / torch.arange(1, count + 1)[:, None]).expand(1, 3, -1, -1)
    valid = torch.arange(count)[None] < length
    (got,) = A.AttentionReceived(sink=sink).measure(batch_of(pattern=uniform, valid=valid)).values()
    scored = got[0, (0 if sink else 1) : length - 5]
    assert scored.numpy() == near(np.ones(len(scored)))
    assert bool(got[0, length - 5 :].isnan().all())
    assert sink or bool(got[0, 0].isnan())


def loss_after(model, tokens, layer, pos, moves):
    """Summed loss of the tokens after `pos` with each of `moves` added to the state there, through public hooks alone."""

    def move(states, hook):  # noqa: ARG001
        states = states.clone()
        states[:, pos] += moves
        return states

    with torch.no_grad():
        batch = tokens.expand(len(moves), -1)
        logits = model.run_with_hooks(batch, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", move)], return_type="logits")
    predicted = -torch.log_softmax(logits[:, pos:-1], -1)
    return predicted.gather(2, batch[:, pos + 1 :, None]).sum((1, 2))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_norm_is_the_slope(name):
    """Central differences in every direction of the state (norms inside a Llama compute in float32: no tiny steps)."""
    model = make_bridge(name).double()
    tokens = random_tokens(3, 9)
    capture = bl.Capture.from_texts(model, tokens, progress=False)
    table = run(model, capture, A.GradientNorm())
    step = 3e-3 * torch.eye(32, dtype=torch.float64)
    for layer in LAYERS:
        for seq, pos in ((0, 0), (1, 4), (2, 7)):
            rise = loss_after(model, tokens[seq], layer, pos, torch.cat([step, -step]))
            slope = float((rise[:32] - rise[32:]).norm() / 6e-3)
            row = capture.row_of(seq, pos)
            assert column(table, "gradient_norm", layer)[row] == near(slope, rel=5e-3)
            norm = float(capture.resid_pre(layer)[row].norm())
            assert column(table, "gradient_norm_scaled", layer)[row] == near(slope * norm, rel=5e-3)
        last = column(table, "gradient_norm", layer).reshape(3, 9)[:, -1]
        assert np.isnan(last).all()


def test_padding_has_no_slope(llama):
    """Sequences of unequal length in one batch: each as if alone."""
    together = run(llama, TEXTS, A.GradientNorm(), batch_size=6)
    alone = [run(llama, text, A.GradientNorm()) for text in TEXTS]
    for passage, table in enumerate(alone):
        at = together[together.passage == passage]
        assert at.gradient_norm.to_numpy() == near(table.gradient_norm.to_numpy(), rel=1e-3, nan_ok=True)


@pytest.mark.many
@pytest.mark.parametrize("state", ["as loaded", "frozen", "no gradients", "inference mode"])
def test_gradients_in_any_state_of_the_model(state):
    model = make_bridge("llama")
    tokens = random_tokens(2, 8)
    expected = run(make_bridge("llama"), tokens, A.GradientNorm())
    if state == "frozen":
        model.requires_grad_(False)
    modes = {"no gradients": torch.no_grad, "inference mode": torch.inference_mode}
    with modes.get(state, torch.enable_grad)():
        table = run(model, tokens, A.GradientNorm())
    assert table.gradient_norm.to_numpy() == near(expected.gradient_norm.to_numpy(), nan_ok=True, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {parameter.requires_grad for parameter in model.parameters()} == {state != "frozen"}


def test_future_loss_is_the_sum_over_real_tokens():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    tokens = random_tokens(2, 5) % 7
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    predicted = -torch.log_softmax(logits.double(), -1)
    expected = sum(float(predicted[b, t - 1, tokens[b, t]]) for b, n in ((0, 5), (1, 3)) for t in range(1, n))
    assert float(future_loss(logits, tokens, valid)) == near(expected)
