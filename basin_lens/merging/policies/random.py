"""A cluster that is drawn."""

import numpy as np

from basin_lens.merging.policies.contract import Choice, Offer, Policy, Rule


class Random(Rule):
    """The draw depends on the token's place alone, not on what else is in the batch."""

    name = "random"
    description = "any cluster, with the level as probability"
    compares = False
    exact = False

    def join(self, offer: Offer) -> Choice:
        draw = np.random.default_rng((*offer.seed, offer.place))
        return Choice(int(draw.integers(offer.clusters)), bool(draw.random() < offer.level))

    def level_for(self, wanted: int, offered: int, sequences: int, /) -> float:
        # The first token of a sequence has no cluster to join.
        return min(1.0, wanted / max(1, offered - sequences))


RANDOM = Policy("random", "with a random earlier cluster", rule=Random(), seeded=True, blind=True, turn=3)
