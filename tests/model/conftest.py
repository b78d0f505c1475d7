"""Fixtures that several files of this room use."""

import shutil
from pathlib import Path

import pytest

from tests.model.checkpoints import saved


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    saved(path)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))
