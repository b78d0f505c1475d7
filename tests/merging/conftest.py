"""Reports are drawn coarse here, too."""

import pytest
import torch

from basin_lens import model as door
from tests.conftest import make_bridge
from tests.studies.conftest import _coarse_pictures  # noqa: F401 - a fixture for every test


@pytest.fixture(scope="module")
def tiny():
    return door.in_dtype(make_bridge("llama"), torch.float64)


@pytest.fixture(scope="module")
def gpt2():
    return door.in_dtype(make_bridge("gpt2"), torch.float64)


@pytest.fixture(scope="module")
def llama64():
    return door.in_dtype(make_bridge("llama"), torch.float64)
