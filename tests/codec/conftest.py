"""Fixtures that several files of this room use."""

import pytest

from basin_lens import codec
from tests.codec.coded import TEXT, coded
from tests.conftest import make_bridge


@pytest.fixture(scope="package")
def llama(tokenizer):
    """One block: a file is made of predictions, a step for every token, and what makes them is tested by the model's room."""
    return make_bridge("llama", tokenizer=tokenizer, num_hidden_layers=1)


@pytest.fixture(scope="module")
def blob(llama) -> bytes:
    """A file that the model wrote, of several chunks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(codec.text, "CHUNK_TOKENS", 1)
        return coded(codec.TextCodec(llama, streams=2, context=40), TEXT[:330])
