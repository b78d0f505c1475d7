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
def counting(monkeypatch, kinds=("forward_pass", "pass_until", "pass_from", "entering")):
    """Forward passes as their batch shapes, whole ones and shorter ones of these kinds, and backward passes."""
    forward, backward = [], []
    slope, go_on = torch.autograd.grad, door.Prefixes.go_on

    def counted(run):
        def counted_run(model, *rest, **options):
            forward.append(tuple(next(given for given in rest if isinstance(given, torch.Tensor)).shape))
            return run(model, *rest, **options)

        return counted_run

    def counted_rest(prefixes, rows, first):
        forward.append((len(rows), prefixes.tokens.shape[1] - first))
        return go_on(prefixes, rows, first)

    def counted_slope(*given, **options):
        backward.append(1)
        return slope(*given, **options)

    with monkeypatch.context() as patch:
        for name in kinds:
            replace_in_all_rooms(patch, name, counted(getattr(door, name)))
        patch.setattr(door.Prefixes, "go_on", counted_rest)
        patch.setattr(torch.autograd, "grad", counted_slope)
        yield forward, backward
