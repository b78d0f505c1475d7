"""Clouds made by hand, and every cloud score in plain numpy."""

import math

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.analyzers import Neighborhoods
from tests.conftest import make_hf

A = bl.analyzers


LAYERS = range(3)


# -- known answers on clouds made by hand ----------------------------------------------------------------------------------------------


def variance(points):
    """Total population variance over the second to last axis."""
    points = np.asarray(points, np.float64)
    return ((points - points.mean(-2, keepdims=True)) ** 2).sum(-1).mean(-1)


def make_cloud(f, *, q=7, k=15, d=12, seed=0, **given):
    """Random neighborhoods of different sizes and their images under f(points [q, m, d]); the bank's other points go through f too."""
    g = torch.Generator().manual_seed(seed)
    size = torch.rand(q, 1, 1, generator=g) + 0.1
    neighbors = 3 * torch.randn(q, 1, d, generator=g) + size * torch.randn(q, k, d, generator=g)
    others = 3 * torch.randn(q, 64, d, generator=g)
    where = torch.randint(0, 5, (q, k), generator=g)
    values = {
        "layer": 1,
        "n_layers": 3,
        "query": neighbors.mean(1),
        "query_image": neighbors.mean(1),
        "query_token": torch.arange(q) % 5,
        "query_pos": torch.arange(q) % 4 + 1,
        "rows": torch.arange(q * k).view(q, k),
        "distances": torch.rand(q, k).sort(1).values,
        "neighbors": neighbors,
        "neighbor_token": where,
        "neighbor_pos": where + 1,
        "hubness": torch.zeros(q),
        "spread_in": float(variance(others.flatten(0, 1))),
        "spread_out": float(variance(f(others).flatten(0, 1))),
        "images": f(neighbors),
        "final_norm": lambda states: states,
    }
    return Neighborhoods(**values | given)


def orthogonal(d=12, seed=4):
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed))).Q


def near(expected, **options):
    return pytest.approx(expected, **{"abs": 2e-4} | options)


# -- an oracle in plain numpy ----------------------------------------------------------------------------------------------------------


class Oracle:
    """Neighbors and variances by loops over tokens, in float64, from the states and the definitions in scores.md alone."""

    def __init__(self, model, capture, layer, bank=None):
        self.model, self.capture, self.layer, self.bank = model, capture, layer, bank or capture
        self.absolute = model.original_model.config.model_type == "gpt2"
        self.pre, self.post = (np.asarray(s, np.float64) for s in (self.bank.resid_pre(layer), self.bank.resid_post(layer)))
        self.queries = np.asarray(capture.resid_pre(layer), np.float64)
        self.items, self.bank_items = self.list(capture), self.list(self.bank)

    def list(self, capture):
        """What is known of each token: sequence, position, token, document, labels, and what its state is a function of."""
        items = []
        for s, (sequence, doc, labels) in enumerate(zip(capture.sequences, capture.docs, capture.labels, strict=True)):
            for pos, token in enumerate(sequence.tokens):
                prefix = sequence.tokens[: pos + 1]
                key = prefix if self.layer else (token, pos) if self.absolute else token
                items.append({"seq": s, "tokens": sequence.tokens, "pos": pos, "token": token, "doc": doc, **labels, "key": key})
        return items

    def neighbors(self, row, k, *, exclude="sequence", same_token="any", position_0=False, metric="l2"):
        """Bank rows, nearest first, and distances; None if there are fewer than k."""
        own = self.items[row]
        name = {"sequence": "tokens", "document": "doc"}.get(exclude, exclude)
        chosen = {}
        for other, item in enumerate(self.bank_items):
            same = item["token"] == own["token"]
            if (item["pos"] == 0 and not position_0) or item["key"] == own["key"] or (name != "self" and item[name] == own[name]):
                continue
            if {"any": True, "only": same, "exclude": not same}[same_token]:
                chosen.setdefault(item["key"], other)
        rows = np.array(sorted(chosen.values()), int)
        if own["pos"] == 0 or len(rows) < k:
            return None
        if metric == "cosine":
            unit = self.pre[rows] / np.linalg.norm(self.pre[rows], axis=1, keepdims=True)
            distances = 1 - unit @ self.queries[row] / np.linalg.norm(self.queries[row])
        else:
            distances = np.linalg.norm(self.pre[rows] - self.queries[row], axis=1)
        order = np.argsort(distances, kind="stable")[:k]
        return rows[order], distances[order]

    def images(self, row, rows, context):
        """Native: the bank's own output. Patched: the whole model run again with the states put in. Solo: the same on one token."""
        if context == "native":
            return self.post[rows]
        tokens = torch.tensor(self.items[row]["tokens"])
        pos = self.items[row]["pos"]
        if context == "solo":
            tokens, pos = tokens[:1], 0
        return self.rerun(tokens, pos, self.pre[rows])

    def rerun(self, tokens, pos, states, **options):
        """What the block makes of states at a position of some tokens."""
        states = torch.tensor(states, dtype=torch.float32)
        return np.asarray(door.rerun_with_state(self.model, tokens, self.layer, pos, states, **options), np.float64)

    def parts(self, group, k, context):
        """Compression, place and directions of the tokens of a group, `[3, token]`, by the formulas of scores.md."""
        clouds = [self.pre[self.neighbors(row, k)[0]] for row in group]
        c = np.empty((len(group), len(group)))
        for p, row in enumerate(group):
            tokens, pos = torch.tensor(self.items[row]["tokens"]), self.items[row]["pos"]
            if context == "solo":
                tokens, pos = tokens[:1], 0
            for q in range(len(group)):
                moves = clouds[q] - clouds[q].mean(0)
                points = np.concatenate([clouds[p].mean(0) + moves, clouds[p].mean(0) - moves])
                c[p, q] = math.log(variance(points) / variance(self.rerun(tokens, pos, points, until_mid=context == "attn")))
        found = []
        for i in range(len(group)):
            others = [j for j in range(len(group)) if j != i]
            place = sum(c[i, q] for q in others) / len(others)
            directions = sum(c[p, i] for p in others) / len(others)
            pairs = [c[p, q] for p in others for q in others if p != q]
            found.append((c[i, i] - place - directions + sum(pairs) / len(pairs), place, directions))
        return np.array(found).T


def column(table, name, layer):
    return table.loc[table.layer == layer, name].to_numpy()


def facts_of(table):
    (facts,) = table.attrs["provenance"].values()
    return facts


def run(model, data, *analyzers, **options):
    return bl.analyze(model, data, list(analyzers), progress=False, **options)


def some_rows(capture, count=5, seed=0):
    inner = np.flatnonzero(capture.row_pos.numpy() > 0)
    return np.random.default_rng(seed).choice(inner, count, replace=False)


# -- known answers through analyze() ---------------------------------------------------------------------------------------------------


_WRITES = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")


def identity_bridge(name):
    """A bridge whose blocks write nothing: each is the identity."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = make_hf(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(part in path for part in _WRITES):
                parameter.zero_()
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


# -- what does not matter, and what does -----------------------------------------------------------------------------------------------


# On neighbors' images, for every token. Compression, which is of the tokens that find a group, goes beside them.
ALL_CLOUDS = (
    A.Contraction(k=6),
    A.Contraction(k=6, same_token="exclude", name="other"),
    A.RawCompression(k=6),
    A.Neighborhood(k=6),
)
