"""Whether a block shrinks a neighborhood along its own directions more than along generic ones at the same place and scale."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role, log_variance_ratio
from basin_lens.errors import NeighborError
from basin_lens.values import Whole, whole_or_none


@dataclass(frozen=True)
class DirectionalContraction(CloudScore):
    """Contraction of a neighborhood less that of generic displacements of the same lengths around the same centroid.

    directional_contraction = log [ V(mu + D) / V(F(mu + D)) ] - log [ V(mu + R) / V(F(mu + R)) ]

    F: the block in the token's context; mu: the centroid of its neighbors; D: their displacements from it; R: as many differences
    of random pairs of the bank, about their mean, with the lengths of D. V, and the lengths: over the layer's ordinary dimensions
    (left out: those whose variance in the bank is above 20 times the median, before or behind the block). As V(mu + R) is nearly
    V(mu + D), this is log V(F(mu + R)) / V(F(mu + D)). Positive: the block shrinks the neighborhood's own directions more than
    generic ones here. Unit: nats. Range: all real numbers; 0 for an isometry, scaling or shift, and whatever the place does to
    all directions alike.

    Options and errors: see `Compression`. Costs as many rows through the block again as the neighborhood, for the generic
    displacements, and for halves of them.

    Args:
        seed: of the random pairs. Each token has its own, from the seed, the layer, its token id, its position and its neighbors.

    Shapes: neighbors `[q, k, d]`, images `[q, k, d]`, block `[q, k, d]` -> the same -> `[q]`.

    Raises:
        NeighborError: a negative seed, or `context="native"`, where a displaced state has no image.

    Source: design of basin_lens.

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.DirectionalContraction(seed=3).columns[0].unit
        'nats'
    """

    role: ClassVar[Role] = "score"
    seed: Whole = 0
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "images", "block", "bank", "halves"})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "directional_contraction", "nats"),)

    def check(self) -> None:
        super().check()
        if (found := whole_or_none(self.seed)) is None or found < 0:
            raise NeighborError(f"expected a seed of at least 0 for DirectionalContraction, got {self.seed!r}.")
        if self.context == "native":
            raise NeighborError(
                'expected a context that passes states for DirectionalContraction, got "native": generic displacements are no '
                'tokens of the bank, and have no cached output. Use context="patched".'
            )

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.images is not None and neighborhoods.block is not None and neighborhoods.bank is not None
        bank, near = neighborhoods.bank, neighborhoods.neighbors
        center = near.mean(1, keepdim=True)
        generic = center + self._generic(neighborhoods, near - center)
        along = log_variance_ratio(near, neighborhoods.images, bank)
        return {self.columns[0].name: along - log_variance_ratio(generic, neighborhoods.block(generic), bank)}

    def _generic(self, neighborhoods: Neighborhoods, moves: Float[Tensor, "q k d"]) -> Float[Tensor, "q k d"]:
        """Differences of random pairs of the bank, about their mean, with the lengths of the neighbors' displacements."""
        assert neighborhoods.bank is not None
        states, ordinary = neighborhoods.bank.before, neighborhoods.bank.ordinary
        facts = zip(
            neighborhoods.query_token.tolist(),
            neighborhoods.query_pos.tolist(),
            neighborhoods.rows.amin(1).tolist(),
            strict=True,
        )
        pairs = torch.from_numpy(np.stack([self._pairs(neighborhoods.layer, fact, moves.shape[1], len(states)) for fact in facts]))
        first, second = states[pairs.to(states.device)].unbind(2)
        differences = first - second
        differences = differences - differences.mean(1, keepdim=True)
        # Longest with longest would follow the order of the neighbors: lengths are dealt out in order of size.
        lengths = moves[..., ordinary].norm(dim=2).sort(dim=1).values
        return differences * (lengths / differences[..., ordinary].norm(dim=2))[..., None]

    def _pairs(self, layer: int, fact: tuple[int, ...], count: int, states: int) -> np.ndarray:
        """Rows of the bank, `[count, 2]`, the two of a pair different."""
        rng = np.random.default_rng([self.seed, layer, *fact])
        first = rng.integers(states, size=count)
        return np.stack([first, (first + rng.integers(1, states, size=count)) % states], axis=1)
