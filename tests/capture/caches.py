"""A user's own cache beside the path from ids."""

import numpy as np
import pytest

import basin_lens as bl
from tests.conftest import make_bridge
from tests.families import families

A = bl.analyzers
QUICK = {"Llama, SmolLM2", "Gemma 2", "GPT-2", "native"}
SERVED = [
    pytest.param(f, id=f"{f.kind}-{f.name}", marks=() if f.name in QUICK else pytest.mark.slow)
    for f in families()
    if f.name not in ("Mamba", "T5")
]


def either(kind):
    return kind() if kind else make_bridge("llama")


def scores(model, data, *more, **options):
    """A table of the default scores and of attention, and of `more`."""
    crossed = A.Compression(k=4, group=3)  # few tokens have 15 neighbors that no other of the group has
    chosen = [crossed, *A.default_analyzers()[1:], A.AttentionReceived(), A.AttentionRollout(), A.MatrixEntropy(), *more]
    return bl.analyze(model, data, chosen, progress=False, **options)


def columns_of(table) -> list[str]:
    (facts,) = table.attrs["provenance"].values()
    return list(facts["columns"])


def facts_of(table) -> dict:
    (facts,) = table.attrs["provenance"].values()
    return facts


def assert_same_scores(got, expected, columns=None, atol=2e-4) -> None:
    for name in columns or columns_of(expected):
        np.testing.assert_allclose(got[name].to_numpy(), expected[name].to_numpy(), rtol=1e-3, atol=atol, err_msg=name)
