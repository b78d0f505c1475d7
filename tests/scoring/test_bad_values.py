"""Wrong kinds of values are refused in words."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Under pytest, types are checked on the way in (jaxtyping, beartype). Users have no such net, so these cases run where
# basin_lens was imported without it: in a process of its own, once.
UNCHECKED = """
import json, sys
import numpy as np
import basin_lens as bl
import basin_lens.scoring, basin_lens.tables
from tests.conftest import TEXTS, make_bridge, make_tokenizer, random_tokens

model = make_bridge("llama", tokenizer=make_tokenizer())
capture = bl.Capture.from_texts(model, TEXTS, progress=False)
A = bl.analyzers
passes = []
model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))

def analyze(data=TEXTS, analyzers=None, **more):
    return bl.analyze(model, data, analyzers or [A.Compression(k=5)], progress=False, **more)

class Almost:
    columns = ()

cases = {
    "class": lambda: analyze(analyzers=[A.Compression]),
    "name of an analyzer": lambda: analyze(analyzers=["compression"]),
    "foreign object": lambda: analyze(analyzers=[Almost()]),
    "one analyzer, no list": lambda: analyze(analyzers=A.Compression(k=5)),
    "context": lambda: analyze(analyzers=[A.Compression(context="patchd")]),
    "metric": lambda: analyze(analyzers=[A.Compression(metric="euclid")]),
    "same_token": lambda: analyze(analyzers=[A.Compression(same_token="none")]),
    "position_0": lambda: analyze(analyzers=[A.Compression(position_0=1)]),
    "exclude": lambda: analyze(analyzers=[A.Compression(k=5, exclude=3)]),
    "exclude None": lambda: analyze(analyzers=[A.Compression(k=5, exclude=None)]),
    "k": lambda: analyze(analyzers=[A.Compression(k="five")]),
    "k fraction": lambda: analyze(analyzers=[A.Compression(k=5.5)]),
    "target": lambda: analyze(analyzers=[A.GradientNorm(target="loss")]),
    "neighborhood context": lambda: bl.neighborhood(model, capture, 1, 0, 3, k=5, context="x"),
    "neighborhood metric": lambda: bl.neighborhood(model, capture, 1, 0, 3, k=5, metric="x"),
    "bank number": lambda: analyze(bank=3),
    "bank list": lambda: analyze(bank=TEXTS),
    "queries fraction": lambda: analyze(queries=1.5),
    "queries dict": lambda: analyze(queries={"a": 1}),
    "queries names": lambda: analyze(queries=["a", "b"]),
    "layers fraction": lambda: analyze(layers=[0.5]),
    "layers text": lambda: analyze(layers="all"),
    "layers flag": lambda: analyze(layers=True),
    "layer fraction": lambda: analyze(layers=1.0),
    "data number": lambda: analyze(3),
    "data None": lambda: analyze(None),
    "data bytes": lambda: analyze(b"bytes"),
    "data dict": lambda: analyze({"text": "a b c"}),
    "data of numbers": lambda: analyze([1, 2, 3]),
    "passage bytes": lambda: bl.Passage(b"bytes"),
    "passage None": lambda: bl.Passage(None),
    "cache tokens": lambda: bl.Capture.from_cache(model, [[1, 2, 3]], {}),
    "tokens 3-D": lambda: bl.Capture.from_cache(model, random_tokens()[None], {}),
    "model kind": lambda: bl.load_model(kind="transformer"),
    "model name": lambda: bl.load_model(None),
    "model name bytes": lambda: bl.load_model(b"gpt2"),
    "device flag": lambda: bl.load_model(device=True),
    "device fraction": lambda: bl.load_model(device=0.5),
    "dtype text": lambda: bl.load_model(dtype="float32"),
    "dtype of numpy": lambda: bl.load_model(dtype=np.float32),
    "dtype None": lambda: bl.load_model(dtype=None),
}
answers = {}
for name, case in cases.items():
    passes.clear()
    try:
        case()
        answers[name] = ["accepted", "", len(passes)]
    except Exception as error:
        answers[name] = [type(error).__name__ if isinstance(error, bl.errors.BasinLensError) else "raw " + repr(error)[:200],
                         str(error), len(passes)]
print(json.dumps(answers))
"""


WRONG_KINDS = {
    "class": ("TableError", r"instances, such as Compression\(k=15\).*got <class"),
    "name of an analyzer": ("TableError", "instances.*got 'compression'"),
    "foreign object": ("TableError", "instances.*Subclass"),
    "one analyzer, no list": ("TableError", "analyzers"),
    "context": (
        "NeighborError",
        r"context in \('patched', 'native', 'solo', 'attn', 'mlp', 'affine'\) for Compression, got 'patchd'",
    ),
    "metric": ("NeighborError", r"metric in \('l2', 'cosine'\).*got 'euclid'"),
    "same_token": ("NeighborError", r"same_token in \('any', 'only', 'exclude'\).*got 'none'"),
    "position_0": ("NeighborError", "expected position_0 True or False for Compression, got 1"),
    "exclude": ("NeighborError", r'exclude "self", "sequence", "document" or a label.*got 3'),
    "exclude None": ("NeighborError", r'exclude "self", "sequence", "document" or a label.*got None'),
    "k": ("NeighborError", "k of at least 2 for Compression, got 'five'"),
    "k fraction": ("NeighborError", r"k of at least 2 for Compression, got 5\.5"),
    "target": ("CaptureError", 'gradient of "future_loss" or "cache", got \'loss\''),
    "neighborhood context": ("NeighborError", "context in"),
    "neighborhood metric": ("NeighborError", "metric in"),
    "bank number": ("NeighborError", 'bank=None, a Capture or "reference", got 3'),
    "bank list": ("NeighborError", 'bank=None, a Capture or "reference"'),
    "queries fraction": ("NeighborError", r"queries as positions.*got 1\.5"),
    "queries dict": ("NeighborError", "queries as positions"),
    "queries names": ("NeighborError", "queries as positions"),
    "layers fraction": ("CaptureError", r"layers between 0 and 2, got \[0\.5\]"),
    "layers text": ("CaptureError", "layers"),
    "layers flag": ("CaptureError", r"layers between 0 and 2, got \[True\]"),
    "layer fraction": ("CaptureError", r"layers between 0 and 2, got \[1\.0\]"),
    "data number": ("TextError", "got int"),
    "data None": ("TextError", "got NoneType"),
    "data bytes": ("TextError", "got bytes"),
    "data dict": ("TextError", "got dict"),
    "data of numbers": ("TextError", "at index 0, got int"),
    "passage bytes": ("TextError", "got bytes.*Decode bytes first"),
    "passage None": ("TextError", "got NoneType"),
    "cache tokens": ("CaptureError", r"tokens as a LongTensor \[batch, pos\]"),
    "tokens 3-D": ("CaptureError", r"tokens as a LongTensor \[batch, pos\]"),
    "model kind": ("ModelError", 'kind "bridge" or "hooked", got \'transformer\''),
    "model name": ("ModelError", "name of a model or a path, got None"),
    "model name bytes": ("ModelError", "name of a model or a path, got b'gpt2'"),
    "device flag": ("ModelError", "name of a device, got True"),
    "device fraction": ("ModelError", r"name of a device, got 0\.5"),
    "dtype text": ("ModelError", r"expected dtype torch\.float32, .*got 'float32'"),
    "dtype of numpy": ("ModelError", r"expected dtype torch\.float32, .*got <class 'numpy\.float32'>"),
    "dtype None": ("ModelError", "expected dtype .*got None"),
}


@pytest.fixture(scope="module")
def unchecked() -> dict[str, list]:
    """What the cases above raise for a user: error class, message, forward passes."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", UNCHECKED]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers.keys() == WRONG_KINDS.keys()
    return answers


@pytest.mark.slow(everywhere=True)
@pytest.mark.parametrize("name", WRONG_KINDS)
def test_wrong_kind_of_value(unchecked, name):
    error, said = WRONG_KINDS[name]
    came, message, passes = unchecked[name]
    assert came == error, message
    assert re.search(said, message, re.DOTALL), message
    assert message.startswith("expected ")
    assert passes == 0
