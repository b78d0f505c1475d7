"""Every example in a docstring gives what it says.

Examples show what a thing is called with and what comes back; few print what only the trained model gives. Those of `TRAINED` run on
SmolLM2-135M, the others on a stand-in of its family, depth and tokenizer: the same code in a hundredth of the time. README and
notebooks run on the model itself.
"""

import doctest
import importlib
import pkgutil

import pytest

import basin_lens
from tests.conftest import has_hooked_transformer

# What is printed is so of the trained weights alone.
TRAINED = ("capture.record.Capture", "memorize.extraction.extract")

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
    monkeypatch.chdir(tmp_path)
    if request.node.get_closest_marker("real"):
        model = request.getfixturevalue("real_model" if example.name.removeprefix("basin_lens.") in TRAINED else "stand_in")
        for place in ("basin_lens.load_model", "basin_lens.model.load_model"):
            monkeypatch.setattr(place, lambda *_, **__: model)
    said: list[str] = []
    example.globs = {}  # what a reader has, not what the module has
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)
