"""How far two measurements of the same tokens agree: by ranks, because a few outliers decide the correlation of values."""

import numpy as np
from jaxtyping import Float
from scipy import stats


def rank_agreement(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> float:
    """Spearman correlation over rows where both are there; NaN if it is not defined (fewer than 3 rows, or no variation)."""
    both = ~(np.isnan(first) | np.isnan(second))
    a, b = first[both], second[both]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


def spearman_brown(half: float) -> float:
    """Reliability of a whole whose halves agree so far; NaN if it is not defined."""
    return 2 * half / (1 + half) if half > -1 else float("nan")
