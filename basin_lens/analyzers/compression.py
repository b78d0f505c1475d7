"""The headline: how much more a block shrinks a neighborhood than it shrinks unrelated points."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role


@dataclass(frozen=True)
class Compression(CloudScore):
    """Contraction of a token's neighborhood beyond what the block does to unrelated points.

    compression = log(V_in / V_out) - log(G_in / G_out)

    V: total variance of the k nearest neighbors' states before the block (in) and of their images after it (out). G: the same for
    random bank points through the same block in the same context. Positive: the block draws this neighborhood together more
    than it does unrelated states. Unit: nats. Range: all real numbers; 0 for any isometry, scaling or shift.

    Args:
        k: neighbors.
        context: `"patched"` (the neighbor in the query's place), `"native"` (its own cached output), `"solo"` (alone at position
            0), `"attn"` (patched, up to `resid_mid`), `"mlp"` (from `resid_mid` on; neighbors and variances in `resid_mid`),
            `"affine"` (a global affine fit of the block, the linear null).
        blocks: through how many blocks in a row, in the same context; NaN where fewer are left.
        metric: how neighbors are chosen: `"l2"` or `"cosine"`. V stays Euclidean.
        exclude: tokens never taken as neighbors: those of the same `"sequence"`, `"document"`, label, or only `"self"`.
        same_token: whether neighbors may (`"any"`), must (`"only"`) or must not (`"exclude"`) have the query's token id.
        position_0: whether tokens at position 0 may be neighbors (and random points of the controls): mostly attention sinks, whose
            states can be 1,000 times the others. Never queries, and never in G.
        choice: the `"nearest"`; as controls `"random"` points, or `"radius_matched"` ones (the neighbors of an unrelated token
            whose neighborhood is just as tight).
        name: column name.

    Shapes: neighbors `[q, k, d]`, images `[q, k, d]` -> `[q]`.

    Raises:
        NeighborError: k below 2, or above the bank; an unknown option.

    Source: the guide's score, corrected for input density (the ratio) and for what the layer does to everything (G).

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.Compression(k=15).columns[0].unit
        'nats'
    """

    role: ClassVar[Role] = "score"
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "images", "halves"})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "compression", "nats"),)

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        ratio = neighborhoods.log_variance_in - neighborhoods.log_variance_out
        if not (neighborhoods.spread_in > 0 and neighborhoods.spread_out > 0):
            return {self.columns[0].name: torch.full_like(ratio, torch.nan)}
        return {self.columns[0].name: ratio - math.log(neighborhoods.spread_in / neighborhoods.spread_out)}
