"""Of a user's own cache only the layers that a request asks are checked, and whatever a later request asks is checked then."""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import AttentionReceived, AttentionRollout, Compression, StateNorm, Surprisal
from basin_lens.capture import cache_check, fill_columns, subset
from basin_lens.errors import CaptureError, TransportError
from tests.capture.readers import BOTH
from tests.capture.test_caches import either
from tests.conftest import make_bridge, random_tokens

SEQUENCES, LENGTH = 30, 10
EVERY = SEQUENCES * LENGTH


def foreign(model, wrong_border: int | None = None, shape: tuple[int, int] = (SEQUENCES, LENGTH)) -> bl.Capture:
    """A capture of the user's own cache, right or with one wrong state at a block border."""
    tokens = random_tokens(*shape)
    _, cache = model.run_with_cache(tokens)
    states = {name: value.clone() for name, value in cache.items() if "resid" in name or "pattern" in name}
    for name in (f"blocks.{wrong_border}.hook_resid_pre", f"blocks.{(wrong_border or 0) - 1}.hook_resid_post"):
        if wrong_border is not None and name in states:
            states[name][-1, -1] += 0.1
    return bl.Capture.from_cache(model, tokens, states)


@contextmanager
def tokens_checked(monkeypatch):
    """Tokens that the check passes through each block."""
    passed: Counter = Counter()
    own = cache_check.call_block

    def counted(model, layer, call, states):
        passed[layer] += states.shape[:2].numel()
        return own(model, layer, call, states)

    with monkeypatch.context() as patch:
        patch.setattr(cache_check, "call_block", counted)
        yield passed


def norms(model, capture, layers):
    return bl.analyze(model, capture, [StateNorm()], layers=layers, progress=False).state_norm.to_numpy()


# -- what is checked ------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize(
    ("analyzer", "layers", "checked"),
    [
        (StateNorm(), [1], [1]),
        (StateNorm(), [-1], [2]),
        (AttentionReceived(), [0, 2], [0, 2]),
        (Compression(k=5), [1], [1]),
        (Compression(k=5), [0, 2], [0, 2]),
        (Compression(k=5, blocks=2), [0], [0, 1]),  # the states between its blocks
        (AttentionRollout(), [1], [0, 1]),  # builds on all below
        (Surprisal(), [1], [1, 2]),  # logits come from the last state
        (StateNorm(), None, [0, 1, 2]),
        (Compression(k=5), None, [0, 1, 2]),
    ],
    ids=lambda value: getattr(value, "key", None),
)
@pytest.mark.parametrize("kind", BOTH)
def test_a_request_costs_one_block_pass_per_layer_that_it_asks(kind, analyzer, layers, checked, monkeypatch):
    model = either(kind)
    capture = foreign(model)
    with tokens_checked(monkeypatch) as passed:
        for _ in (1, 2):  # known by the second time
            bl.analyze(model, capture, [analyzer], layers=layers, progress=False)
            assert passed == dict.fromkeys(checked, EVERY)


def test_a_wrong_state_elsewhere_does_not_matter():
    """Right numbers at the layers asked, whatever the cache holds at others."""
    model = make_bridge("llama")
    expected = norms(model, random_tokens(SEQUENCES, LENGTH), [0])
    np.testing.assert_allclose(norms(model, foreign(model, wrong_border=3), [0]), expected, rtol=1e-4)


# -- later requests -------------------------------------------------------------------------------------------------------------


def itself(capture, _path):
    return capture


def saved(capture, path):
    capture.save(path / "saved")
    return bl.Capture.load(path / "saved")


def part(capture, _path):
    return subset(capture, range(1, SEQUENCES))


@pytest.mark.many
@pytest.mark.parametrize("later", [itself, saved, part])
@pytest.mark.parametrize(
    ("analyzer", "first", "second"), [(StateNorm(), [0], [2]), (StateNorm(), [0, 1], None), (AttentionRollout(), [0], [2])]
)
def test_a_later_request_for_other_layers_is_checked_there(later, analyzer, first, second, tmp_path):
    model = make_bridge("llama")
    capture = foreign(model, wrong_border=3)
    bl.analyze(model, capture, [analyzer], layers=first, progress=False)
    capture = later(capture, tmp_path)
    with pytest.raises(TransportError, match="block 2 "):
        bl.analyze(model, capture, [analyzer], layers=second, progress=False)
    with pytest.raises(TransportError, match="block 2 "):
        fill_columns(model, capture, [analyzer], progress=False)
    (values,) = capture.columns[analyzer.key].values()
    assert values[2].isnan().all() and values[0].isfinite().any()
    assert bl.analyze(model, capture, [analyzer], layers=first, progress=False).iloc[:, -1].notna().any()


@pytest.mark.many
@pytest.mark.parametrize("later", [itself, saved])
@pytest.mark.parametrize("analyzer", [StateNorm(), AttentionReceived(), AttentionRollout()])
def test_later_requests_fill_what_is_not_there(later, analyzer, tmp_path):
    model = make_bridge("llama")
    capture, whole = foreign(model), foreign(model)
    fill_columns(model, whole, [analyzer], progress=False)
    for layers in ([1], [0, 2]):
        table = bl.analyze(model, capture, [analyzer], layers=layers, progress=False)
        (name,) = whole.columns[analyzer.key]
        expected = whole.columns[analyzer.key][name][layers].numpy().reshape(-1)
        np.testing.assert_array_equal(table[name].to_numpy().reshape(-1), expected)
        if layers == [1]:
            capture = later(capture, tmp_path)
    torch.testing.assert_close(capture.columns[analyzer.key], whole.columns[analyzer.key], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("own", [False, True])
def test_layers_begun_when_an_error_came_do_not_pass_for_filled(own, monkeypatch):
    """Two batches; the second fails at the later layer. What an earlier request filled stays."""
    model, shape = make_bridge("llama"), (30, 40)
    capture = bl.Capture.from_texts(model, random_tokens(*shape), progress=False) if own else foreign(model, shape=shape)
    expected = norms(model, capture, [0])
    measure, calls = StateNorm.measure, []

    def failing(self, batch):
        calls.append(batch.layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(StateNorm, "measure", failing)
        with pytest.raises(KeyboardInterrupt):
            norms(model, capture, [2])
    assert calls == [2, 2]
    (values,) = capture.columns[StateNorm().key].values()
    assert values[2].isnan().all()
    np.testing.assert_array_equal(norms(model, capture, [0]), expected)
    assert np.isfinite(norms(model, capture, [2])).all()


def test_one_number_for_all_layers_is_filled_once(monkeypatch):
    """Surprisal holds for every layer: a later request for others needs nothing more than their own check."""
    model = make_bridge("llama")
    capture = foreign(model)
    bl.analyze(model, capture, [Surprisal()], layers=[1], progress=False)
    monkeypatch.setattr(Surprisal, "measure", lambda *_: pytest.fail("measured twice"))
    with tokens_checked(monkeypatch) as passed:
        bl.analyze(model, capture, [Surprisal()], layers=[0], progress=False)
    assert passed == {0: EVERY}


def test_layers_that_a_capture_lacks_are_refused():
    model = make_bridge("llama")
    capture = bl.Capture.from_texts(model, random_tokens(), layers=[0], progress=False)
    with pytest.raises(CaptureError, match=r"layers of the capture \[0\], got \[2\].*Capture again with layers"):
        fill_columns(model, capture, [StateNorm()], layers=[0, 2], progress=False)
    assert capture.columns == {}
