"""What the tests of bad input share."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from basin_lens.errors import (
    BasinLensError,
)


@contextmanager
def refusing(error: type[BasinLensError], said: str, *models):
    """Expect this error with these words (a regex over the whole message), and not one forward pass of any of the models."""
    passes = []
    handles = [m.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1)) for m in models]
    try:
        with pytest.raises(error) as caught:
            yield
    finally:
        for handle in handles:
            handle.remove()
    message = str(caught.value)
    assert type(caught.value) is error
    assert re.search(said, message, re.DOTALL), message
    assert message.startswith("expected ")
    assert re.search(r"\bgot\b", message)
    assert passes == []


# -- models ----------------------------------------------------------------------------------------------------------------------------


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
