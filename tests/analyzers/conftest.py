"""Fixtures that several files of this room use."""

import math

import pytest

from basin_lens.analyzers import integrated_gradients


@pytest.fixture
def as_is(monkeypatch):
    """Integrated gradients are taken as they come after the first steps, complete or not: tiny wild models need hundreds."""
    monkeypatch.setattr(integrated_gradients, "COMPLETE", math.inf)
