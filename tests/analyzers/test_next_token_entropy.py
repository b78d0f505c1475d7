"""Entropy of what is predicted next, on distributions whose entropy is known."""

import math

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.capture import TokenBatch
from tests.conftest import VOCAB, random_tokens


def entropy(logits):
    tokens = torch.zeros(logits.shape[:2], dtype=torch.int64)
    batch = TokenBatch(
        tokens=tokens, valid=torch.ones_like(tokens).bool(), values={"logits": logits}, layer=0, n_layers=1, memory={}
    )
    return bl.analyzers.NextTokenEntropy().measure(batch)["next_token_entropy"]


def test_all_tokens_equally_likely():
    found = entropy(torch.full((2, 5, VOCAB), 3.0))
    torch.testing.assert_close(found, torch.full((2, 5), math.log(VOCAB)))


@pytest.mark.parametrize("far", [1e4, math.inf])
def test_one_token_certain(far):
    logits = torch.full((1, 4, VOCAB), -far)
    logits[:, :, 7] = 0
    assert (entropy(logits) == 0).all()


def test_two_tokens_by_hand():
    logits = torch.full((1, 1, VOCAB), -math.inf)
    logits[0, 0, :2] = torch.tensor([0.75, 0.25]).log()
    assert entropy(logits).item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-6)


def test_as_torch_has_it(llama):
    tokens = random_tokens(3, 12)
    table = bl.analyze(llama, tokens, [bl.analyzers.NextTokenEntropy()], layers=[0, 2], progress=False)
    with torch.inference_mode():
        logits = llama(tokens)
    expected = torch.distributions.Categorical(logits=logits.double()).entropy().numpy().ravel()
    for layer in (0, 2):
        np.testing.assert_allclose(table[table.layer == layer].next_token_entropy, expected, rtol=1e-5)
    assert (table.next_token_entropy <= math.log(logits.shape[-1]) + 1e-6).all()
    (facts,) = table.attrs["provenance"].values()
    assert facts["columns"]["next_token_entropy"]["unit"] == "nats"
