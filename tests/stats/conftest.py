"""Fixtures that several files of this room use."""

import pytest

from tests.stats.simulated import simulate


@pytest.fixture(scope="module")
def null():
    return simulate(400, ("a", "b", "c"), seed=2)
