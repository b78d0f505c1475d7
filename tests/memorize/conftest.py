"""Fixtures that several files of this room use."""

import pytest

from basin_lens.memorize import Recipe, finetune
from tests.conftest import (
    TEXTS,
    make_bridge,
)
from tests.memorize.learners import QUIET


@pytest.fixture(scope="module")
def learner(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer, initializer_range=0.05)


@pytest.fixture(scope="module")
def tuned(learner):
    """The first text seen once, the second 120 times."""
    return finetune(learner, TEXTS[:2], [1, 120], **QUIET | {"recipe": Recipe(learning_rate=1e-2, batch_size=3, filler=1)})
