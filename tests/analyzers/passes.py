"""Counting a model's passes."""

from contextlib import contextmanager

import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from tests.conftest import (
    replace_in_all_rooms,
)

A = bl.analyzers


LAYERS = range(3)


def near(x, **kwargs):
    return pytest.approx(x, **({"rel": 1e-4, "abs": 1e-5, "nan_ok": True} | kwargs))


def measured(model, data, *analyzers, **options):
    """Values by column, `[n_layers or 1, rows]`, and the capture."""
    capture = bl.Capture.from_texts(model, data, analyzers=list(analyzers), progress=False, **options)
    return {name: v.numpy() for a in analyzers for name, v in capture.columns[a.key].items()}, capture


def one(model, data, analyzer, **options):
    values, capture = measured(model, data, analyzer, **options)
    return values[analyzer.columns[0].name], capture


@contextmanager
def counting(monkeypatch):
    """Forward passes as their batch shapes, and backward passes."""
    forward, backward = [], []
    run, slope = door.forward_pass, torch.autograd.grad

    def counted_run(model, tokens, *rest, **options):
        forward.append(tuple(tokens.shape))
        return run(model, tokens, *rest, **options)

    def counted_slope(*given, **options):
        backward.append(1)
        return slope(*given, **options)

    with monkeypatch.context() as patch:
        replace_in_all_rooms(patch, "forward_pass", counted_run)
        patch.setattr(torch.autograd, "grad", counted_slope)
        yield forward, backward
