"""How alike two tokens are: cosine of their descriptors, cosine of their attention rows."""

import numpy as np
import torch
from jaxtyping import Float, Int


def cosines(some: Float[np.ndarray, "n width"], others: Float[np.ndarray, "m width"]) -> Float[np.ndarray, "n m"]:
    """Cosine of float16 descriptors, the same to the last bit one by one as all at once.

    Numbers of float16 are multiples of 2^-24, so their products are multiples of 2^-48, and in float64 a sum of them is exact, in
    whatever order, while it stays below 32: descriptors are no longer than 1. A descriptor of length 0 has no direction: its cosine
    is 0 with every other, so that at a level above 0 it joins no cluster, and none joins it.
    """
    # By torch: a second pool of threads, numpy's, would stand in the way of the model's.
    one, two = (torch.from_numpy(np.asarray(rows, float)) for rows in (some, others))
    norms = [(rows * rows).sum(1).sqrt() for rows in (one, two)]
    return ((one @ two.T) / (norms[0][:, None] * norms[1]).clamp(min=1e-12)).numpy()


def row_read(pattern: Float[np.ndarray, "head key"], weights: Float[np.ndarray, " key"]) -> Float[np.ndarray, " key"]:
    """Mean over heads of what a query reads, a cluster's share at its leader's place."""
    read = pattern * weights
    return (read / read.sum(1, keepdims=True)).mean(0)


def row_likeness(
    row: Float[np.ndarray, " pos"], others: Float[np.ndarray, "clusters pos"], leaders: Int[np.ndarray, " clusters"]
) -> Float[np.ndarray, " clusters"]:
    """Cosine of an attention row with earlier ones, each over the places up to that one's own."""
    row, others = row.astype(float), others.astype(float)
    norms = np.sqrt(np.cumsum(row * row)[leaders]) * np.sqrt((others * others).sum(1))
    return (others @ row) / np.maximum(norms, 1e-12)
