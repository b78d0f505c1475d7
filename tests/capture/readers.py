"""Tiny models of both kinds, and states read without the package."""

from contextlib import contextmanager

import pytest
import torch

import basin_lens as bl
from tests.conftest import TINY, hooked_lane, make_bridge, make_hooked

MAKERS = [
    *(pytest.param(lambda name=name: make_bridge(name), id=name) for name in TINY),
    pytest.param(make_hooked, id="hooked", marks=hooked_lane),
]


# Unequal lengths, each alone in no batch: the reference below never pads.
RAGGED = [[5, 9, 3, 17, 40, 8, 90, 11, 2, 33], [7, 7, 12], [100, 20, 30, 4, 5, 6], [3, 4], [55, 3, 100, 9, 8, 7]]


def with_tokenizer(maker, tokenizer):
    """A model of either class that can read texts."""
    if maker is make_hooked:
        model = make_hooked(d_vocab=len(tokenizer))
        model.tokenizer = tokenizer
        return model
    return make_bridge("llama", tokenizer=tokenizer)


BOTH = [pytest.param(None, id="bridge"), pytest.param(make_hooked, id="hooked", marks=hooked_lane)]


def padded(sequences, side: str = "right"):
    """Token ids and attention mask `[batch, pos]`."""
    longest = max(map(len, sequences))
    tokens, mask = torch.zeros(2, len(sequences), longest, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        tokens[row, place], mask[row, place] = torch.tensor(sequence), 1
    return tokens, mask


def own_states(model, sequences) -> list[torch.Tensor]:
    """States at every block border from the model's own run_with_cache, one sequence at a time: `[rows, d]` each."""
    count = len(model.blocks)
    pieces = []
    for sequence in sequences:
        _, cache = model.run_with_cache(torch.tensor([list(sequence)]))
        borders = [cache[f"blocks.{layer}.hook_resid_pre"][0] for layer in range(count)]
        pieces.append([*borders, cache[f"blocks.{count - 1}.hook_resid_post"][0]])
        for layer in range(count - 1):
            torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_post"][0], borders[layer + 1])
    return [torch.cat([piece[border] for piece in pieces]) for border in range(count + 1)]


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the states' scale: another batch shape rounds differently."""
    assert got.shape == expected.shape
    scale = float(expected.square().mean().sqrt())
    assert float((got - expected).abs().max()) <= 1e-5 * scale


def assert_states(capture: bl.Capture, expected: list[torch.Tensor]) -> None:
    for layer in capture.layers:
        assert_same(capture.resid_pre(layer), expected[layer])
        assert_same(capture.resid_post(layer), expected[layer + 1])


@contextmanager
def counting(model):
    """Number of passes through block 0 so far, as a list of batch shapes."""
    passes = []
    handle = model.blocks[0].register_forward_hook(
        lambda _module, args, kwargs, _output: passes.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    try:
        yield passes
    finally:
        handle.remove()


def assert_checked_only(seen, tokens) -> None:
    """Through block 0 went what the check of a foreign cache costs, and no more: each token once, one to see the form of its answer,
    one sequence that it does not compute and whose arguments are recorded, and one token before the head."""
    count, length = tokens.shape
    assert sum(batch * pos for batch, pos in seen) <= count * length + length + 2


class BrokenError(RuntimeError):
    """Raised on purpose in the middle of a pass."""


# -- one pass --------------------------------------------------------------------------------------------------------------------------


def token_analyzers():
    a = bl.analyzers
    return [a.Surprisal(), a.StateNorm(), a.MatrixEntropy(), a.AttentionReceived(), a.GradientNorm()]


def assert_columns(got: bl.Capture, expected: bl.Capture, *keys: str) -> None:
    for key in keys or expected.columns:
        assert got.columns[key].keys() == expected.columns[key].keys()
        for name, values in expected.columns[key].items():
            assert bool(values.isfinite().any())
            torch.testing.assert_close(got.columns[key][name], values, rtol=1e-4, atol=1e-5, equal_nan=True)
