"""The file that the page on one's own analyzers begins with, as it stands there."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import basin_lens as bl

DOCS = Path(__file__).parents[2] / "docs"
FILE = DOCS / "examples" / "my_analyzer.py"


@pytest.fixture(scope="module")
def mine():
    spec = importlib.util.spec_from_file_location("my_analyzer", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_file():
    page = (DOCS / "own_analyzers.md").read_text(encoding="utf-8")
    assert FILE.read_text(encoding="utf-8") in re.findall(r"```python\n(.*?)```", page, re.S)


def test_both_analyzers_of_the_file(llama, capture, mine):
    table = bl.analyze(llama, capture, [mine.CentroidShift(k=4), mine.ActiveNeurons()], layers=[1], controls=True, progress=False)
    inner = table[table.pos > 0]
    for name in ("centroid_shift", "centroid_shift_random", "active_neurons"):
        assert inner[name].notna().all() and inner[name].nunique() > 10
    assert inner.active_neurons.between(0, 1).all() and (inner.centroid_shift > 0).all()
    (facts,) = table.attrs["provenance"].values()
    assert facts["columns"]["centroid_shift"] == {
        "unit": "state units", "low": 0, "high": None, "rows": "token", "analyzer": "CentroidShift",
    }  # fmt: skip
    with torch.no_grad():
        first = torch.tensor([capture.sequences[0].tokens])
        _, cache = llama.run_with_cache(first)
    expected = (cache["blocks.1.mlp.hook_post"][0] > 0).float().mean(-1).numpy()
    assert table.active_neurons[table.seq == 0].to_numpy() == pytest.approx(expected)
