"""Tiny models that can be made to memorize, and recipes that are quick."""

import math

import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.memorize import Recipe
from tests.conftest import (
    TEXTS,
    hooked_lane,
    make_bridge,
    make_hooked,
    make_tokenizer,
)
from tests.families import native

A, M, S = bl.analyzers, bl.memorize, bl.stats


HOOKED = pytest.param("hooked", marks=hooked_lane)


NAN = math.nan


FAST = Recipe(learning_rate=3e-3, batch_size=4, filler=1, warmup=2)


QUIET = {"progress": False, "recipe": FAST, "filler": TEXTS[3:]}


def make(kind):
    tokenizer = make_tokenizer()
    if kind in ("llama", "gpt2", "neox"):
        return make_bridge(kind, tokenizer=tokenizer)
    settings = {"d_vocab": len(tokenizer), "d_mlp": 64, "act_fn": "gelu", "normalization_type": "LN"}
    model = make_hooked(**settings) if kind == "hooked" else native(**settings)()
    model.tokenizer = tokenizer
    return model


def logits_of(model, tokens):
    with torch.no_grad():
        return door.forward_pass(model, tokens, {})


def token_counts(model, passages):
    return {len(M.ids_of(model.tokenizer, getattr(p, "text", p))) for p in passages}
