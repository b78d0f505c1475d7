"""Every example in a docstring gives what it says."""

import doctest
import importlib
import os
import pkgutil

import pytest

import basin_lens
from tests.conftest import has_hooked_transformer

# Minutes each on two cores: run with BASIN_LENS_ALL_EXAMPLES=1.
LONG = ("codec.benchmark.bench", "codec.text.TextCodec")

pytestmark = pytest.mark.skipif(has_hooked_transformer(), reason="the same examples in both lanes: run with TransformerLens 4")


def _examples() -> list[object]:
    """Each once; those that load a model, or NLTK's data, are marked `real`."""
    found = []
    for module in pkgutil.walk_packages(basin_lens.__path__, "basin_lens."):
        if module.name.endswith("__main__"):
            continue
        for test in doctest.DocTestFinder().find(importlib.import_module(module.name)):
            marks = (
                [pytest.mark.real] if any(name in step.source for step in test.examples for name in ("load_model", "nltk")) else []
            )
            if test.examples:
                found.append(pytest.param(test, marks=marks, id=test.name.removeprefix("basin_lens.")))
    return found


@pytest.mark.parametrize("example", _examples())
def test_example(example, request, monkeypatch, tmp_path):
    if example.name.removeprefix("basin_lens.") in LONG and "BASIN_LENS_ALL_EXAMPLES" not in os.environ:
        pytest.skip("takes minutes; set BASIN_LENS_ALL_EXAMPLES=1")
    monkeypatch.chdir(tmp_path)
    if request.node.get_closest_marker("real"):
        model = request.getfixturevalue("real_model")
        for place in ("basin_lens.load_model", "basin_lens.model.load_model"):
            monkeypatch.setattr(place, lambda *_, **__: model)
    said: list[str] = []
    example.globs = {}  # what a reader has, not what the module has
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)
