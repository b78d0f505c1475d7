"""Fixtures that several files of this room use."""

import pytest

import basin_lens as bl
from tests.conftest import TEXTS, make_bridge, make_tokenizer


@pytest.fixture(scope="module")
def gpt2():
    return make_bridge("gpt2", tokenizer=make_tokenizer())


@pytest.fixture(scope="module")
def gpt2_capture(gpt2):
    return bl.Capture.from_texts(gpt2, TEXTS, progress=False)


@pytest.fixture(params=["llama", "gpt2"])
def world(request):
    """A tiny model and its capture of TEXTS: rotary and learned positions."""
    name = request.param
    held = {"llama": ("llama", "capture"), "gpt2": ("gpt2", "gpt2_capture")}[name]
    return tuple(request.getfixturevalue(fixture) for fixture in held)


@pytest.fixture(scope="module")
def other(tokenizer):
    """The fixture `llama`'s twin with other weights."""
    return make_bridge("llama", seed=5, tokenizer=tokenizer)
