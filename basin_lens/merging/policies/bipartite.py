"""Token merging of vision models (Bolya et al. 2023)."""

import numpy as np
from jaxtyping import Bool, Float, Int

from basin_lens.merging.policies.contract import ContextRule, Policy


class Bipartite(ContextRule):
    """Every other token proposes its most similar one of the rest; the best proposals are taken."""

    name = "bipartite"
    description = "token merging of vision models: every other token of a context may join one of the rest; needs the whole context"

    def pair(
        self, similarity: Float[np.ndarray, "proposing staying"], places: Int[np.ndarray, " tokens"], level: float
    ) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        leader, joined = np.full(len(places), -1), np.zeros(len(places), bool)
        if len(places) < 2:
            return leader, joined
        leader[1::2] = places[::2][similarity.argmax(1)]
        taken = round(level * len(places))
        joined[1 + 2 * np.argsort(-similarity.max(1), kind="stable")[:taken]] = True
        return leader, joined

    def level_for(self, wanted: int, offered: int, _sequences: int, /) -> float:
        return min(1.0, wanted / max(1, offered))


BIPARTITE = Policy("bipartite", "token merging of vision models", rule=Bipartite(), compared=False)
