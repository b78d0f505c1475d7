"""Fixtures that several files of this room use."""

import pytest

from tests.conftest import (
    PACKED,
    TINY,
)
from tests.transport.routes import world


@pytest.fixture(params=TINY)
def any_world(request):
    return world(request.param)


@pytest.fixture(params=PACKED)
def packed_world(request):
    return world(request.param)
