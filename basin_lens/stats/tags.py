"""Tokens of different kinds, such as parts of speech: does the kind matter, and how does each stand?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from jaxtyping import Float, Int
from scipy import stats
from statsmodels.stats.oneway import anova_oneway, confint_effectsize_oneway

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.stats.covariates import chosen, residuals
from basin_lens.stats.design import (
    FEWEST,
    Rows,
    check_run,
    constant,
    enough,
    group_means,
    names_of,
    refuse_constant,
    split,
    without_rounding,
)
from basin_lens.stats.mixed import freed, level_ratio
from basin_lens.stats.projection import EXPLAINED
from basin_lens.stats.results import Correction, assemble, constant_line, interval_and_p, joined, line
from basin_lens.values import whole_numbers

_TESTS = {
    "sequence": "permutation of tags within sequences",
    "mixed": "min F' over units (mixed model) and token types",
    "type": "permutation of tags among token types (Welch F)",
}

_ONLY = {  # what a row of a test that is not sound for tags as such says of itself
    "sequence": "holds for these tokens, not of tags as such",
    "type": "holds in these texts, not of tags as such",
}
_MEANS = "one-sample t-test of unit means", "deviation from the sequence mean"


@whole_numbers(TableError)
def tag_effect(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    tag: str,
    *,
    tests: Sequence[str] = ("sequence", "mixed", "type"),
    word: str | None = None,
    controls: Sequence[str] = (),
    frequency: Mapping[Any, float] | None = None,
    layers: Any = None,
    unit: str = "document",
    fewest: int = 20,
    correction: Correction = "bh",
    n_resamples: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Does a score differ between kinds of tokens? Three tests, which ask for three kinds of generality.

    - `sequence`: tags permuted among the tokens (or words) of each sequence. Only says that these tokens differ by tag.
    - `mixed`: that new texts and other words at once would show it. min F' = F1 F2 / (F1 + F2), of F1 of means by unit and tag (each token
      type once; random level for each unit) and F2 of means by token type (Welch). Careful where neither words nor texts have differences of
      their own: there it rejects less often than it may.
    - `type`: means by token type, tags permuted among types: that other words of these tags would show it, in these texts.

    A tag of few words, each with a score of its own, passes `sequence` alone (.50 false positives); where every text has differences between tags of
    its own, which mean nothing in others, `mixed` alone does not find them (the others: .47). Only `mixed` is sound for tags as such: go by it, as
    `red_flags` does (where words and texts both have their own: .025; `sequence` .77, `type` .17).
    `sequence` and `type` say what they say of these tokens, or these texts. To ask for all three is very conservative (.015).

    omega squared = (SS_tag - df_tag MS_rest) / (SS_total + MS_rest), the share of the variance that is between tags; of scores less their
    sequence mean, or of type means; for `mixed` as min F' and its degrees of freedom a, b give it: a (F' - 1) / (a F' + b + 1). At no effect
    it is about 0, and can be below.

    Args:
        table: from `analyze`, of one run, with a tag for each token.
        scores: columns to test.
        tag: label column; rows without a tag are passed over.
        tests: which; `mixed` and `type` need `token_id`.
        word: column that numbers the words of a sequence; tokens of one word are then averaged, and words take the place of tokens (and
            the first token's id that of a word's type). None: every token by itself, right only if words are single tokens.
        controls: standard controls (those that the table lacks are passed over) or columns of the table, taken out of the score
            within sequences first (`residuals`). Everything then is of what they leave of the score: what tag and controls explain alike counts as
            the controls', so an effect can be lost, and a difference between tags is smaller than at fixed controls (`compare_groups` gives that).
        frequency: as for `add_controls`.
        layers, unit, correction: as for `compare_groups`; no max-t.
        fewest: tags with fewer tokens (or words), or in fewer than 6 units, or of fewer than 4 types, are left out; the note names them.
        n_resamples: permutations.
        seed: of the permutations.

    Returns:
        one row per (layer, score, test): omega squared with a 95 % interval (jackknife over units, or over types; from the noncentral F for
        `mixed`) and p. For `type`, `unit` is "token type". `n_tags`: tags compared.

    Raises:
        TableError: several runs, missing columns, fewer than two tags left, constant columns. StudyError: fewer than 6 units.

    Source: Clark 1973 (texts and words as random effects); omega squared: Hays 1963.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> doc = np.repeat(range(20), 30)
        >>> table = pd.DataFrame({"doc": doc, "seq": doc, "token_id": rng.integers(0, 40, 600)})
        >>> table["tag"] = np.where(table.token_id < 20, "NOUN", "VERB")
        >>> table["a"] = 1.0 * (table.tag == "NOUN") + rng.normal(size=600)
        >>> bool((bl.stats.tag_effect(table, "a", "tag").p < 0.01).all())
        True
    """
    names = names_of(scores)
    unknown = [name for name in tests if name not in _TESTS]
    if unknown or not len(tests):
        raise TableError(f"expected tests among {list(_TESTS)}, got {list(tests)}.")
    types = ["token_id"] if "type" in tests or "mixed" in tests else []
    check_run(table)
    tables.require(table, tag, *types, *([] if word is None else [word]))
    lines = []
    for score in names:
        held, note = table, ""
        there: list[str] = []
        if len(controls):
            _, there, note = chosen(table, controls, [score], frequency)
            held = residuals(table, score, controls=there, frequency=frequency)
        if word is not None:
            held = _words(held, score, tag, word)
        for every in split(held, [score, *types], layers=layers, unit=unit, labels=[tag]):
            rows = every.where(~pd.isna(every.labels[tag])).finite(score)
            enough(rows.counts()["n_units"], FEWEST, f"units ({unit})")
            rows, dropped = _frequent(rows, tag, fewest, bool(types))
            given: dict[str, Any] = {"tag": tag, "controls": ", ".join(there)}
            if constant(every.finite(score).values[score]):
                lines += [constant_line(rows, score, unit, _TESTS[t], "omega squared", score, **given, n_tags=0) for t in tests]
                continue
            if there and _explained(rows, score):
                given["note"] = joined(note, EXPLAINED)
                lines += [line(rows, score, unit, _TESTS[t], "omega squared", **given, n_tags=0) for t in tests]
                continue
            if len(rows.sequence) and not _centered(rows, score).any():
                given["note"] = joined(note, f"{score} does not vary within any text")
                lines += [line(rows, score, unit, _TESTS[t], "omega squared", **given, n_tags=0) for t in tests]
                continue
            kinds, codes = np.unique(rows.labels[tag].astype(str), return_inverse=True)
            if len(kinds) < 2:
                raise TableError(
                    f"expected at least two tags with {fewest} tokens each, got {kinds.tolist()} at layer {rows.layer}. Add texts, or "
                    "pass fewest=."
                )
            given |= {
                "n_tags": len(kinds),
                "note": "; ".join(x for x in (note, f"too rare: {', '.join(dropped)}" if dropped else "") if x),
            }
            for name in tests:
                found = {"sequence": _by_sequence, "mixed": _min_f, "type": _by_type}[name](rows, score, codes, n_resamples, seed)
                told = {**given, "note": joined(str(given["note"]), _ONLY.get(name, ""))}
                lines.append(line(rows, score, unit, _TESTS[name], "omega squared", **told) | found)
    refuse_constant(lines, names)
    return assemble(table, lines, correction)


def tag_means(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    tag: str,
    *,
    controls: Sequence[str] = (),
    frequency: Mapping[Any, float] | None = None,
    layers: Any = None,
    unit: str = "document",
    correction: Correction = "bh",
) -> pd.DataFrame:
    """How each kind of token stands: its mean, and how far it is from the mean of its own text.

    Args:
        table, scores, tag, controls, frequency, layers, unit, correction: as for `tag_effect`. With controls, means and deviations are of what
            they leave of the score, as there.

    Returns:
        one row per (layer, score, tag): `estimate` is the mean over units of (tag mean - sequence mean), in the score's unit, with Student's
        95 % interval and p; `mean`, `mean_low`, `mean_high` the same of the tag's means themselves. NaN intervals with fewer than 6 units.

    Raises:
        TableError: several runs, missing columns.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"doc": [0, 0, 1, 1], "seq": [0, 0, 1, 1], "tag": ["A", "B"] * 2, "a": [1.0, 0.0, 3.0, 2.0]})
        >>> bl.stats.tag_means(table, "a", "tag").estimate.tolist()
        [0.5, -0.5]
    """
    names = names_of(scores)
    lines = []
    for score in names:
        held = table
        there: list[str] = []
        if len(controls):
            _, there, _ = chosen(table, controls, [score], frequency)
            held = residuals(table, score, controls=there, frequency=frequency)
        for every in split(held, [score], layers=layers, unit=unit, labels=[tag]):
            rows = every.where(~pd.isna(every.labels[tag])).finite(score)
            rows = rows.with_values(_off=_centered(rows, score))
            explained = bool(there) and _explained(rows, score)
            if not len(rows.sequence):
                also = {"tag": pd.NA, "controls": ", ".join(there), **dict.fromkeys(("mean", "mean_low", "mean_high"), np.nan)}
                lines.append(constant_line(rows, score, unit, _MEANS[0], _MEANS[1], score, **also))
            for kind in sorted(set(rows.labels[tag].tolist()), key=str):
                part = rows.where(np.array(rows.labels[tag] == kind, bool))
                off, whole = (part.unit_means(name)[1] for name in ("_off", score))
                found, mean = interval_and_p(without_rounding(off, rows.values[score])), interval_and_p(whole)
                answer: dict[str, Any] = {
                    **found, "tag": kind, "controls": ", ".join(there), "mean": mean["estimate"], "mean_low": mean["low"],
                    "mean_high": mean["high"],
                }  # fmt: skip
                if mean["low"] != mean["low"] and "note" not in found:
                    answer["note"] = mean["note"]
                if part.counts()["n_units"] < FEWEST:
                    answer |= dict.fromkeys(("low", "high", "p", "mean_low", "mean_high"), np.nan)
                    answer["note"] = f"fewer than {FEWEST} units"
                if explained:
                    answer |= dict.fromkeys(("estimate", "low", "high", "p", "mean", "mean_low", "mean_high"), np.nan) | {
                        "note": EXPLAINED
                    }
                lines.append(line(part, score, unit, *_MEANS, **answer))
    return assemble(table, lines, correction)


def _explained(rows: Rows, score: str) -> bool:
    """Whether the controls have left nothing of a score within sequences but rounding (see `residuals`)."""
    return len(rows.sequence) > 0 and bool(np.ptp(_centered(rows, score)) <= 1e-12 * np.abs(rows.values[score]).max())


def _words(table: pd.DataFrame, score: str, tag: str, word: str) -> pd.DataFrame:
    """One row per word instead of per token."""
    keys = [*(["layer"] if "layer" in table.columns else []), "doc", "seq", word]
    others = [c for c in table.columns if c not in (*keys, score)]
    kept = table[table[word].notna()]
    grouped = kept.groupby(keys, sort=False, dropna=False)
    if (grouped[tag].nunique() > 1).any():
        raise TableError(f"expected one tag per word, got words in {word!r} with several. Number words anew in every sequence.")
    answer = grouped[others].first().join(grouped[score].mean()).reset_index()
    return tables.with_provenance(answer, table)


def _centered(rows: Rows, score: str) -> Float[np.ndarray, " rows"]:
    codes, means = group_means(rows.sequence, rows.values[score])
    return without_rounding(rows.values[score] - means[np.searchsorted(codes, rows.sequence)], rows.values[score])


def _frequent(rows: Rows, tag: str, fewest: int, by_type: bool) -> tuple[Rows, list[str]]:
    """The rows of tags that are frequent enough, and the other tags."""
    names = rows.labels[tag].astype(str)
    facts = pd.DataFrame({"tag": names, "unit": rows.unit, "type": rows.values.get("token_id", rows.unit)}).groupby("tag")
    good = (facts.size() >= fewest) & (facts["unit"].nunique() >= FEWEST)
    if by_type:
        good &= facts["type"].nunique() >= 4
    kept = rows.where(np.isin(names, good.index[good].to_numpy(dtype=object).astype(str)))
    return kept, [str(name) for name in good.index[~good]]


def omega_squared(
    sums: Float[np.ndarray, "parts tags"],
    counts: Float[np.ndarray, "parts tags"],
    squares: Float[np.ndarray, " parts"],
    means_removed: Any,
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


def _by_sequence(rows: Rows, score: str, codes: np.ndarray, n_resamples: int, seed: int) -> dict[str, Any]:
    centered = _centered(rows, score)
    parts = [_table_of(rows.unit, codes, weights) for weights in (centered, np.ones(len(codes)))]
    squares = _table_of(rows.unit, np.zeros_like(codes), centered**2)[:, 0]
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
        sums = np.bincount(drawn.ravel(), weights=np.broadcast_to(centered, drawn.shape).ravel(), minlength=size * width)
        reached += int(((sums.reshape(size, width) ** 2 / counts).sum(1) >= observed * (1 - 1e-9)).sum())
    return {"estimate": estimate, "low": low, "high": high, "p": reached / (n_resamples + 1)}


def _min_f(rows: Rows, score: str, codes: np.ndarray, n_resamples: int, seed: int) -> dict[str, Any]:
    """Tags against both texts and words (Clark 1973).

    The model with random levels of units and of token types at once is not fitted: with types crossed with units, statsmodels' MixedLM works on one
    dense matrix of all tokens. min F' needs the two simple analyses alone, and is at most the F of that model.
    """
    del n_resamples, seed  # nothing is drawn
    tags = int(codes.max())
    (one, rest_one), (two, rest_two) = _f_of_units(rows, score, codes), _f_of_types(rows, score, codes)
    if not np.isfinite([one, two]).all():
        lone = dict.fromkeys(("estimate", "low", "high", "p"), float("nan"))
        return lone | {"note": "not tested: the words of a tag do not differ in their means"}
    f = one * two / (one + two)
    rest = (one + two) ** 2 / (one**2 / rest_two + two**2 / rest_one)
    with np.errstate(divide="ignore"):  # statsmodels takes 1 / 0 where the interval begins at no effect
        bounds = confint_effectsize_oneway(f, (tags, rest), nobs=tags + rest + 1).ci_omega2
    estimate = tags * (f - 1) / (tags * f + rest + 1)
    return {  # the interval of an F' near 0 is empty
        "estimate": estimate, "low": min(estimate, float(bounds[0])), "high": max(estimate, float(bounds[1])),
        "p": float(stats.f.sf(f, tags, rest)),
    }  # fmt: skip


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
    frame = pd.DataFrame({"type": rows.values["token_id"], "tag": codes, "y": _centered(rows, score)})
    cells = frame.groupby(["type", "tag"])["y"].mean().reset_index()
    return cells["y"].to_numpy(), cells["tag"].to_numpy()


def _f_of_types(rows: Rows, score: str, codes: np.ndarray) -> tuple[float, float]:
    """Welch's F of tags, and its degrees of freedom, on means by token type: means of rare words vary more than of frequent ones."""
    y, tags = _type_means(rows, score, codes)
    spread = pd.Series(y).groupby(tags).var()
    if not (spread > 1e-12 * y.var()).all():
        return float("nan"), float("nan")  # a tag whose words all have one score would have all the weight
    found = anova_oneway(y, tags, use_var="unequal")
    return float(found.statistic), float(found.df_denom)


def _by_type(rows: Rows, score: str, codes: np.ndarray, n_resamples: int, seed: int) -> dict[str, Any]:
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
