"""Fixtures that several files of this room use."""

import pytest

from tests.capture.readers import BOTH, with_tokenizer


@pytest.fixture(params=BOTH)
def reader(request, tokenizer):
    """A tiny model with a tokenizer, of either class, to do anything to."""
    return with_tokenizer(request.param, tokenizer)
