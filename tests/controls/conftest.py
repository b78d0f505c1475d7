"""Fixtures that several files of this room use."""

import pytest

import basin_lens as bl
from tests.conftest import TEXTS


@pytest.fixture(params=["memory", "disk"])
def held(request, llama, tmp_path):
    """One capture, in memory and on disk."""
    passages = [bl.Passage(text, doc=f"d{i % 3}", labels={"even": i % 2 == 0}) for i, text in enumerate(TEXTS)]
    store = tmp_path / "capture" if request.param == "disk" else None
    return bl.Capture.from_texts(llama, passages, layers=[0, 2], store=store, progress=False)
