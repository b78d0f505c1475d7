"""Keys of large norm are dropped (Devoto et al. 2024)."""

import numpy as np
from jaxtyping import Float

from basin_lens.merging.policies.contract import KeyRule, Keys, Policy
from basin_lens.merging.policies.score import Score


class KeyNorm(KeyRule, Score):
    """The score of a token is the norm of its key, mean over heads."""

    name = "key_norm"
    description = "no cluster: tokens whose keys have a norm above the level are dropped"
    compares = False
    takes_rows = False
    drops = True

    def key_scores(self, keys: Keys) -> Float[np.ndarray, "batch pos"]:
        return keys.double().norm(dim=3).mean(2).cpu().numpy()


KEY_NORM = Policy("key norm", "keys of large norm dropped", rule=KeyNorm(), options={"drop": True})
