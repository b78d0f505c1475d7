"""Scores against an oracle in plain numpy, the original guide's score, what does not matter and what does."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from basin_lens.analyzers import CloudAnalyzer, Column
from basin_lens.scoring import Request
from basin_lens.scoring.analysis import score
from tests.conftest import TEXTS, make_bridge, random_tokens
from tests.scoring.oracle import ALL_CLOUDS, LAYERS, A, Oracle, column, facts_of, near, run, some_rows, variance

# -- an oracle in plain numpy ----------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("context", ["patched", "native", "solo"])
def test_scores_equal_the_oracle(world, context):
    """Variances recomputed for a few tokens."""
    model, capture = world
    k = 6
    table = run(model, capture, A.Contraction(k=k, context=context), A.RawCompression(k=k, context=context))
    for layer in LAYERS:
        oracle = Oracle(model, capture, layer)
        for row in some_rows(capture, 4):
            rows, _ = oracle.neighbors(row, k)
            v_in, v_out = variance(oracle.pre[rows]), variance(oracle.images(row, rows, context))
            assert column(table, "contraction", layer)[row] == near(math.log(v_in / v_out))
            assert column(table, "raw_compression", layer)[row] == near(-math.log(v_out + 1e-10))


@pytest.mark.many
@pytest.mark.parametrize("context", ["patched", "solo", "attn"])
def test_crossed_scores_equal_the_oracle(world, context):
    """Tables recomputed for a few groups: neighbors, displacements, reruns and means of its own; only who meets is taken over."""
    model, capture = world
    k = 6
    analyzer = A.Compression(k=k, context=context, nulls=False)
    found = score(model, capture, Request([analyzer], progress=False), keep_neighbors_of=analyzer)
    inner = capture.row_pos.numpy() > 0
    for layer, groups in zip(LAYERS, found.neighbors.groups, strict=True):
        oracle = Oracle(model, capture, layer)
        # No dimension is left out here: that they can be is tested in test_crossed_pass.py and on the real model.
        assert facts_of(found.table)["groups"][str(layer)]["compression"]["dimensions_left_out"] == 0
        assert (oracle.pre[inner].var(0) < 20 * np.median(oracle.pre[inner].var(0))).all()
        assert len(groups) > 10
        for group in groups[:: len(groups) // 2]:
            for name, expected in zip(("", "_place", "_directions"), oracle.parts(group, k, context), strict=True):
                assert column(found.table, f"compression{name}", layer)[group] == near(expected, abs=1e-4), (layer, name)


# -- the original guide's score --------------------------------------------------------------------------------------------------------


def final_norm_of(model):
    """The norm before the unembedding, in numpy."""
    if model.original_model.config.model_type == "gpt2":
        norm = model.original_model.transformer.ln_f

        def normed(x):
            x = x - x.mean(-1, keepdims=True)
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    else:
        norm, eps = model.original_model.model.norm, model.original_model.config.rms_norm_eps

        def normed(x):
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    held = dict(norm.named_parameters())
    weight = next(p for path, p in held.items() if path.endswith("weight")).detach().double().numpy()
    bias = next((p for path, p in held.items() if path.endswith("bias")), torch.zeros(1)).detach().double().numpy()
    return normed


@pytest.mark.many
@pytest.mark.parametrize("k", [3, 15])
def test_the_guides_score_from_the_users_cache(world, k):
    """k nearest including the token itself among everything; minus log variance of what the block made of them."""
    model, capture = world
    table = run(model, capture, A.SeedCompression(k=k))
    pre, post = ([] for _ in range(2))
    for sequence in capture.sequences:
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([sequence.tokens]))
        pre.append(np.stack([cache[f"blocks.{layer}.hook_resid_pre"][0].double().numpy() for layer in LAYERS]))
        post.append(np.stack([cache[f"blocks.{layer}.hook_resid_post"][0].double().numpy() for layer in LAYERS]))
    pre, post = np.concatenate(pre, axis=1), np.concatenate(post, axis=1)
    post[2] = final_norm_of(model)(post[2])
    assert np.isnan(column(table, "seed_compression", 0)).all()
    for layer in (1, 2):
        _, rows = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(pre[layer]).kneighbors(pre[layer])
        expected = -np.log(variance(post[layer][rows]) + 1e-10)
        settled = expected < 20  # nearest all the same prefix: the variance is rounding below 1e-10
        assert settled.sum() > 100
        assert column(table, "seed_compression", layer)[settled] == near(expected[settled], abs=1e-3)


def test_the_guides_score_counts_the_first_token():
    tokens = random_tokens(6, 8)
    table = run(make_bridge("llama"), tokens, A.SeedCompression(k=4), A.RawCompression(k=4))
    first = table[(table.pos == 0) & (table.layer > 0)]
    assert first.seed_compression.notna().all()
    assert first.raw_compression.isna().all()


# -- what does not matter, and what does -----------------------------------------------------------------------------------------------


@pytest.mark.many
def test_permuting_the_texts_permutes_the_answer(world):
    model, _ = world
    order = [4, 0, 5, 2, 1, 3]
    analyzers = (
        *(a for a in ALL_CLOUDS if a.context == "native" or isinstance(a, A.Contraction)),
        A.Contraction(k=6, context="native", name="cached"),
        A.SeedCompression(k=6),
        A.Surprisal(),
        A.StateNorm(),
        A.MatrixEntropy(),
        A.AttentionReceived(),
        A.GradientNorm(),
    )
    here, there = run(model, TEXTS, *analyzers), run(model, [TEXTS[i] for i in order], *analyzers)
    there["passage"] = [order[i] for i in there.passage]
    both = here.merge(there, on=["layer", "passage", "pos"], suffixes=("", "_permuted"), validate="1:1")
    assert len(both) == len(here)
    assert (both.token == both.token_permuted).all()
    # Which of several equal states stands for all of them is the first in the bank: this shows where other things than the
    # state itself are read (at layer 0, also its native image).
    first_counts = {"hubness": 3, "same_position_share": 1, "raw_compression": 1, "cached": 1}
    for name in (one_column.name for a in analyzers for one_column in a.columns):
        at = both[both.layer >= first_counts.get(name, 0)]
        assert at[name].to_numpy() == near(at[f"{name}_permuted"].to_numpy(), nan_ok=True, abs=1e-3), name


@pytest.mark.slow(everywhere=True)
def test_the_seed_acts_only_through_who_meets_and_the_nulls(llama, capture):
    """No neighbor is drawn; groups are, and the displacements of the nulls."""
    a, b, again = (run(llama, capture, *ALL_CLOUDS, A.Compression(k=6), seed=seed) for seed in (0, 1, 0))
    for name in ("contraction", "other", "raw_compression", "radius", "nearest", "hubness"):
        assert a[name].equals(b[name]), name
    for name in (one.name for one in A.Compression().columns):
        assert a[name].equals(again[name])
        assert not a[name].equals(b[name])


@pytest.mark.parametrize("size", [1, 3])
def test_batch_size_does_not_matter(llama, size):
    analyzers = (A.Contraction(k=6), A.GradientNorm(), A.Surprisal(), A.AttentionReceived(), A.MatrixEntropy())
    one, other = run(llama, TEXTS, *analyzers), run(llama, TEXTS, *analyzers, batch_size=size)
    for name in (one_column.name for a in analyzers for one_column in a.columns):
        assert other[name].to_numpy() == near(one[name].to_numpy(), nan_ok=True, rel=1e-4), name


# -- reliability -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnRanks(CloudAnalyzer):
    """Contraction over some ranks of the k nearest, computed here."""

    k: int
    ranks: tuple[int, ...]
    name: str
    context: str = "patched"
    metric: str = "l2"
    exclude: str = "sequence"
    same_token: str = "any"
    needs = frozenset({"input_neighbors", "images"})

    @property
    def columns(self):
        return (Column(self.name, "nats"),)

    def measure(self, cloud):
        ranks = list(self.ranks)
        return {self.name: torch.tensor(np.log(variance(cloud.neighbors[:, ranks]) / variance(cloud.images[:, ranks])))}


@pytest.mark.many
@pytest.mark.parametrize("k", [4, 8, 15])
def test_reliability_is_the_correlation_of_disjoint_halves(llama, capture, k):
    even, odd = tuple(range(0, k - k % 2, 2)), tuple(range(1, k, 2))
    table = run(llama, capture, A.Contraction(k=k), A.RelativeContraction(k=k), OnRanks(k, even, "even"), OnRanks(k, odd, "odd"))
    reliability = facts_of(table)["reliability"]
    for layer in LAYERS:
        at = table[(table.layer == layer) & table.even.notna()]
        expected = stats.spearmanr(at.even, at.odd).statistic
        assert reliability["contraction"][str(layer)] == near(expected, abs=1e-3)
        # Less a number of the layer, and no dimension is left out here.
        assert reliability["relative_contraction"][str(layer)] == near(expected, abs=1e-3)
    assert "even" not in reliability
