"""Three tests of whether a score differs between kinds of tokens: among the tokens of each text, among words, and among both."""

import numpy as np
import pandas as pd
import statsmodels.api as sm
from jaxtyping import Float, Int
from scipy import stats
from statsmodels.stats.oneway import anova_oneway, confint_effectsize_oneway

from basin_lens.stats.design import Rows, group_means, without_rounding
from basin_lens.stats.mixed import freed, level_ratio
from basin_lens.stats.results import Estimate, Line


def centered(rows: Rows, score: str) -> Float[np.ndarray, " rows"]:
    """A score less its sequence means."""
    codes, means = group_means(rows.sequence, rows.values[score])
    return without_rounding(rows.values[score] - means[np.searchsorted(codes, rows.sequence)], rows.values[score])


def omega_squared(
    sums: Float[np.ndarray, "parts tags"],
    counts: Float[np.ndarray, "parts tags"],
    squares: Float[np.ndarray, " parts"],
    means_removed: float | np.ndarray,
) -> tuple[float, float, float]:
    """Omega squared of centered values from the sums of each part, and its 95 % interval by leaving out one part at a time."""

    def of(sums: np.ndarray, counts: np.ndarray, squares: np.ndarray, removed: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            between = np.where(counts > 0, sums**2 / counts, 0.0).sum(-1)
        freedom = (counts > 0).sum(-1) - 1
        rest = (squares - between) / (counts.sum(-1) - removed - freedom)
        return np.asarray((between - freedom * rest) / (squares + rest))

    removed = np.broadcast_to(np.asarray(means_removed, float), squares.shape)
    total = sums.sum(0), counts.sum(0), np.asarray(squares.sum()), np.asarray(removed.sum())
    estimate = float(of(*total))
    without = of(total[0] - sums, total[1] - counts, total[2] - squares, total[3] - removed)
    n = len(squares)
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    wide = stats.t.ppf(0.975, n - 1) * error
    return estimate, float(estimate - wide), float(min(1.0, estimate + wide))


def _table_of(parts: Int[np.ndarray, " rows"], codes: Int[np.ndarray, " rows"], weights: np.ndarray) -> np.ndarray:
    there, inverse = np.unique(parts, return_inverse=True)
    width = int(codes.max()) + 1
    return np.bincount(inverse * width + codes, weights=weights, minlength=len(there) * width).reshape(len(there), width)


def by_sequence(rows: Rows, score: str, codes: np.ndarray, n_resamples: int, seed: int) -> Line:
    """Tags permuted among the tokens of each sequence."""
    values = centered(rows, score)
    parts = [_table_of(rows.unit, codes, weights) for weights in (values, np.ones(len(codes)))]
    squares = _table_of(rows.unit, np.zeros_like(codes), values**2)[:, 0]
    _, units = rows.unit_of_sequence()
    sums, counts = parts
    estimate, low, high = omega_squared(sums, counts, squares, np.unique(units, return_counts=True)[1])
    rng = np.random.default_rng(seed)
    _, starts = np.unique(rows.sequence, return_index=True)
    counts = counts.sum(0)
    width = len(counts)
    reached, chunk = 1, max(1, 4_000_000 // len(codes))
    observed = (sums.sum(0) ** 2 / counts).sum()
    for first in range(0, n_resamples, chunk):
        size = min(chunk, n_resamples - first)
        drawn = np.concatenate([rng.permuted(np.broadcast_to(c, (size, len(c))), axis=1) for c in np.split(codes, starts[1:])], 1)
        drawn += np.arange(size)[:, None] * width
        sums = np.bincount(drawn.ravel(), weights=np.broadcast_to(values, drawn.shape).ravel(), minlength=size * width)
        reached += int(((sums.reshape(size, width) ** 2 / counts).sum(1) >= observed * (1 - 1e-9)).sum())
    return {"estimate": estimate, "low": low, "high": high, "p": reached / (n_resamples + 1)}


def min_f(rows: Rows, score: str, codes: np.ndarray, n_resamples: int, seed: int) -> Line:
    """Tags against both texts and words (Clark 1973).

    The model with random levels of units and of token types at once is not fitted: with types crossed with units, statsmodels'
    MixedLM works on one dense matrix of all tokens. min F' needs the two simple analyses alone, and is at most the F of that model.
    """
    del n_resamples, seed  # nothing is drawn
    tags = int(codes.max())
    (one, rest_one), (two, rest_two) = _f_of_units(rows, score, codes), _f_of_types(rows, score, codes)
    if not np.isfinite([one, two]).all():
        return Estimate(note="not tested: the words of a tag do not differ in their means").columns()
    f = one * two / (one + two)
    rest = (one + two) ** 2 / (one**2 / rest_two + two**2 / rest_one)
    with np.errstate(divide="ignore"):  # statsmodels takes 1 / 0 where the interval begins at no effect
        bounds = confint_effectsize_oneway(f, (tags, rest), nobs=tags + rest + 1).ci_omega2
    estimate = tags * (f - 1) / (tags * f + rest + 1)
    low, high = min(estimate, float(bounds[0])), max(estimate, float(bounds[1]))  # the interval of an F' near 0 is empty
    return {"estimate": estimate, "low": low, "high": high, "p": float(stats.f.sf(f, tags, rest))}


def _f_of_units(rows: Rows, score: str, codes: np.ndarray) -> tuple[float, float]:
    """F of tags, and its degrees of freedom, on means by unit and tag (each token type once), with a random level for each unit."""
    frame = pd.DataFrame({"unit": rows.unit, "tag": codes, "type": rows.values["token_id"], "y": rows.values[score]})
    cells = frame.groupby(["unit", "tag", "type"])["y"].mean().groupby(level=["unit", "tag"]).mean().reset_index()
    units, y = cells["unit"].to_numpy(), cells["y"].to_numpy()
    y = (y - y.mean()) / (y.std() or 1.0)
    x = np.eye(int(codes.max()) + 1)[cells["tag"].to_numpy()]
    y, x = freed(y, x, units, level_ratio(y, x, units))
    contrasts = np.eye(x.shape[1])[1:] - np.eye(x.shape[1])[0]
    return float(np.squeeze(sm.OLS(y, x).fit().f_test(contrasts).fvalue)), float(len(y) - len(np.unique(units)) - len(contrasts))


def _type_means(rows: Rows, score: str, codes: np.ndarray) -> tuple[Float[np.ndarray, " types"], Int[np.ndarray, " types"]]:
    """Means by token type and tag of scores less their sequence mean, and the tags."""
    frame = pd.DataFrame({"type": rows.values["token_id"], "tag": codes, "y": centered(rows, score)})
    cells = frame.groupby(["type", "tag"])["y"].mean().reset_index()
    return cells["y"].to_numpy(), cells["tag"].to_numpy()


def _f_of_types(rows: Rows, score: str, codes: np.ndarray) -> tuple[float, float]:
    """Welch's F of tags, and its degrees of freedom, on means by token type: means of rare words vary more than others."""
    y, tags = _type_means(rows, score, codes)
    spread = pd.Series(y).groupby(tags).var()
    if not (spread > 1e-12 * y.var()).all():
        return float("nan"), float("nan")  # a tag whose words all have one score would have all the weight
    found = anova_oneway(y, tags, use_var="unequal")
    return float(found.statistic), float(found.df_denom)


def by_type(rows: Rows, score: str, codes: np.ndarray, n_resamples: int, seed: int) -> Line:
    """Tags permuted among token types, by Welch's F."""
    y, tags = _type_means(rows, score, codes)
    y = y - y.mean()
    width, n = int(tags.max()) + 1, len(y)
    items = np.arange(n)
    parts = [_table_of(items, tags, weights) for weights in (y, np.ones(n))]
    estimate, low, high = omega_squared(parts[0], parts[1], y**2, 1 / n)
    counts = np.bincount(tags, minlength=width).astype(float)

    def welch(drawn: np.ndarray) -> np.ndarray:
        """Between-tag sum of squares, each tag weighed by how well its mean is known: rare words vary more than frequent ones."""
        at = (drawn + np.arange(len(drawn))[:, None] * width).ravel()
        sums, squares = (
            np.bincount(at, weights=np.broadcast_to(v, drawn.shape).ravel(), minlength=len(drawn) * width).reshape(-1, width)
            for v in (y, y**2)
        )
        means = sums / counts
        weights = counts / np.maximum((squares - counts * means**2) / (counts - 1), 1e-12 * y.var())
        center = (weights * means).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
        return np.asarray((weights * (means - center) ** 2).sum(1))

    rng = np.random.default_rng(seed)
    observed = welch(tags[None])[0]
    reached, chunk = 1, max(1, 4_000_000 // n)
    for first in range(0, n_resamples, chunk):
        drawn = rng.permuted(np.broadcast_to(tags, (min(chunk, n_resamples - first), n)), axis=1)
        reached += int((welch(drawn) >= observed * (1 - 1e-9)).sum())
    return {"estimate": estimate, "low": low, "high": high, "p": reached / (n_resamples + 1), "unit": "token type", "n_units": n}
