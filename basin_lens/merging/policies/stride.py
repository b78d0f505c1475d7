"""Clusters at even distances."""

import math

import numpy as np
from jaxtyping import Float

from basin_lens.merging.policies.contract import Choice, Offer, Policy, Rule


class Stride(Rule):
    """Of the tokens that are offered, each that completes a whole number of kept ones opens a cluster."""

    name = "stride"
    description = "the cluster that was opened last, but for a fixed share of tokens: 1 - level, evenly spaced"
    compares = False

    def join(self, offer: Offer) -> Choice:
        kept = 1 - offer.level
        opens = math.floor(offer.number * kept) > math.floor((offer.number - 1) * kept)
        return Choice(offer.clusters - 1, not opens)

    def level_at(self, strictness: float, _floor: float, _scores: Float[np.ndarray, " offered"] | None, /) -> float:
        return 1 - strictness


STRIDE = Policy("stride", "evenly spaced tokens open clusters, the others join the last one", rule=Stride(), blind=True, turn=3)
