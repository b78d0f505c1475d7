"""Reports are drawn coarse here, too."""

from pathlib import Path

import pytest

from tests.conftest import TEXTS, make_hf, make_tokenizer
from tests.studies.conftest import _coarse_pictures  # noqa: F401 - a fixture for every test


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model on disk, and a text file."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    make_hf("llama", vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path.parent / "text.txt").write_text(" ".join(TEXTS * 2), encoding="utf-8")
    return path
