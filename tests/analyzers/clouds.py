"""Clouds of many points for the scores of neighborhoods."""

import math
from dataclasses import replace

import numpy as np
import torch

import basin_lens as bl
from basin_lens.analyzers import RunOn, Surroundings
from tests.scoring.oracle import make_cloud

A = bl.analyzers


D, Q = 12, 7


def family_cloud(f, *, q=Q, k=15, d=D, seed=0, **given):
    """A cloud with everything that any of them needs; `f` is the block."""
    g = torch.Generator().manual_seed(seed + 100)
    others = 2 + 3 * torch.randn(200, d, generator=g)
    cloud = make_cloud(f, q=q, k=k, d=d, seed=seed)
    chosen_after = cloud.neighbors + 0.3 * torch.randn(q, k, d, generator=g)
    values = {
        "output_preimages": chosen_after,
        "output_neighbors": f(chosen_after),
        "bank": Surroundings(others, f(others[:, None])[:, 0]),
        "output_rows": cloud.rows.roll(5, 0),
        "candidates": torch.full((q,), 60),
        "block": f,
        "query": cloud.neighbors.mean(1) + 0.2 * torch.randn(q, d, generator=g),
        "run_on": fake_run(f),
        "query_token": torch.arange(q) * 3 % 11,
    }
    return replace(cloud, **values | given)


def fake_run(f):
    """Divergence and loss as some function of the block's image alone."""
    return lambda points: RunOn(f(points).square().mean(2), f(points).sum(2))


def values(analyzer, cloud):
    return {name: answer.numpy() for name, answer in analyzer.measure(cloud).items()}


# -- angular contraction ---------------------------------------------------------------------------------------------------------------


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def without_the_common(x, states):
    """Minus the mean, massive dimensions dropped."""
    spread = states.var(0)
    return (x - states.mean(0))[..., spread <= 20 * np.median(spread)]


# -- effective rank --------------------------------------------------------------------------------------------------------------------


def rank_reference(points):
    """From the eigenvalues."""
    answer = []
    for cloud in np.asarray(points, np.float64):
        spectrum = np.linalg.eigvalsh(np.cov(cloud.T, bias=True))
        share = (spectrum**2).sum() / spectrum.sum() ** 2 - 1 / (len(cloud) - 1)
        answer.append(1 / share if share > 1e-6 else math.nan)
    return np.array(answer)
