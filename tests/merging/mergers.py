"""Tiny models and mergers for the tests of this room."""

import random

import torch

import basin_lens as bl
from basin_lens import merging
from basin_lens import model as door
from basin_lens.merging import TokenMerger, Windows
from tests.conftest import TEXTS, random_tokens

LENGTH = 24


KINDS = {
    "leader": {"threshold": 0.3},
    "strict": {"threshold": 0.7},
    "mean": {"threshold": 0.3, "representative": "mean"},
    "rows": {"threshold": 0.4, "attention_weight": 0.5},
    "residual": {"threshold": 0.3, "residual": "gated", "residual_width": 3},
    "adaptive": {"threshold": 0.4, "adaptive": True},
    "projected": {"threshold": 0.4, "projection": 6},
    "preserved": {"threshold": 0.3, "preserve": "norm", "preserve_share": 0.3},
    "dropped": {"threshold": 0.3, "drop": True},
    "random": {"threshold": 0.5, "rule": "random"},
    "stride": {"threshold": 0.5, "rule": "stride"},
    "adjacent": {"threshold": 0.2, "rule": "adjacent"},
    "recent": {"rule": "all", "drop": True},
}


def make_merger(model, kind: str, **changes) -> merging.TokenMerger:
    merger = merging.TokenMerger([0, 1, 2], **{"recent": 2} | KINDS[kind] | changes)
    merger.calibrate(model, random_tokens(4, LENGTH, seed=9))
    if merger.weights.slope is not None:
        with torch.no_grad():
            merger.weights.slope += 0.4
    return merger


def merged_logits(merger, model, tokens, **given):
    with merger.attached(model, **given), torch.no_grad():
        return door.forward_pass(model, tokens, {})


# -- gradients -------------------------------------------------------------------------------------------------------------------------


def loss_of(merger, model, tokens, *, soft: bool):
    with merger.attached(model, soft=soft):
        logits = door.forward_pass(model, tokens, {})
        kept = {layer: a.joined for layer, a in merger.pass_.assigned.items()}
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), kept


# -- hooks -----------------------------------------------------------------------------------------------------------------------------


def count_hooks(model) -> int:
    roots = [model, getattr(model, "original_model", None)]
    modules = {id(m): m for root in roots if root is not None for m in root.modules()}
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules.values())


# -- trainings ---------------------------------------------------------------------------------------------------------------------


SHORT = {"steps": 4, "batch_size": 2, "evaluate_every": 2, "checkpoint_every": 2}


def windows(count: int = 12, length: int = 24, seed: int = 3) -> Windows:
    return Windows(random_tokens(count, length, seed), tuple(f"doc {i // 2}" for i in range(count)))


def different(count: int) -> list[bl.Passage]:
    """Texts of which none is a copy of another."""
    known = " ".join(TEXTS).split()
    return [bl.Passage(" ".join(random.Random(i).choices(known, k=60)), doc=str(i)) for i in range(count)]


def made_merger(model, **changes) -> TokenMerger:
    options = {"target_rate": 0.4, "adaptive": True, "projection": 6, "recent": 2} | changes
    return TokenMerger([0, 1, 2], **options).calibrate(model, windows(seed=5).tokens)
