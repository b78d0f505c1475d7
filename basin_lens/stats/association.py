"""A score against another column, token by token, tested over sequences or documents."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import statsmodels.api as sm
from jaxtyping import Bool, Float

from basin_lens.errors import StudyError, TableError
from basin_lens.stats.controls import CONTROLS, chosen, smooth_parts, without_smooth_parts
from basin_lens.stats.groups import side_by_side
from basin_lens.stats.reliability import bounds
from basin_lens.stats.results import Correction, assemble, constant_line, interval_and_p, line, max_t_signs
from basin_lens.stats.rows import FEWEST, FEWEST_CLUSTERS, Rows, constant, enough, group_means, names_of, refuse_constant, split
from basin_lens.values import whole_numbers


@whole_numbers(TableError)
def within_sequence_correlation(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    against: str | Sequence[str],
    *,
    controls: Sequence[str] = (),
    frequency: Mapping[Any, float] | None = None,
    layers: Any = None,
    unit: str = "document",
    method: Literal["spearman", "pearson"] = "spearman",
    min_tokens: int = 10,
    smooth: bool = True,
    correction: Correction = "bh",
    n_resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Does a score go with another column among the tokens of one text?

    rho_s = correlation within sequence s; z_u = mean of atanh(rho_s) over the sequences of unit u; one-sample t-test of the z_u

    Differences between texts cannot make this correlation, and dependence between tokens cannot make its p-value: units are the sample.
    Each sequence and each unit has the same weight.

    Args:
        table: from `analyze`, of one run.
        scores: columns to test.
        against: the other columns, such as a token importance.
        controls: partial correlation, given these; see `partial_correlation`.
        frequency: as for `add_controls`.
        layers: which; None: all.
        unit: what is independent: `"sequence"`, `"document"` or a label (such as the template of a prompt).
        method: on ranks within the sequence, or on the values.
        min_tokens: sequences with fewer tokens (plus one per control) where all columns are finite are left out, as are those where a
            column is constant; the note counts them.
        smooth: with controls, first take a smooth function of each control out of both columns, fitted over all tokens of the layer (see
            `basin_lens.stats.controls.smooth_parts`), then straight lines within each sequence. A confound that bends would leave a
            correlation otherwise. Where tokens are too few for that, straight lines alone, and the note says so.
        correction: over all rows of the answer: `"bh"`, `"holm"`, `"max-t"` (signs of units flipped for all rows at once) or `"none"`.
        n_resamples: sign flips of max-t.
        seed: of the sign flips.

    Returns:
        one row per (layer, score, against): the mean correlation (tanh of the mean z) with its 95 % interval and p. `uncontrolled`: the
        same rows without controls. `controls`: those used. `reliability`, `bound`: see `reliability_bound`. Where a column is constant at a
        layer: NaN and a note. Where correlations do not differ between units at all: NaN interval and p.

    Raises:
        TableError: several runs, missing columns, a column that is constant at every layer.
        StudyError: fewer than 6 units.

    Source: Fisher 1915, 1921; the unit of analysis after Lazic et al. 2018.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> table = pd.DataFrame({"doc": np.repeat(range(20), 30), "seq": np.repeat(range(20), 30), "a": rng.normal(size=600)})
        >>> table["b"] = table.a + rng.normal(size=600)
        >>> bool(bl.stats.within_sequence_correlation(table, "a", "b").p[0] < 0.001)
        True
    """
    names, others = names_of(scores), names_of(against, "against")
    pairs = [(score, other) for other in others for score in names if score != other]
    names_of([score for score, _ in pairs], "scores other than against") if not pairs else None
    lines: list[dict[str, Any]] = []
    values: list[tuple[np.ndarray, np.ndarray]] = []
    kind = f"{'partial ' if len(controls) else ''}{method.capitalize()}"
    label = f"one-sample t-test of Fisher z ({kind} within sequences)"
    most = 0
    for score, other in pairs:
        with_them, there, note = chosen(table, controls, (score, other), frequency)
        given = {"against": other, "controls": ", ".join(there), "uncontrolled": np.nan}
        for every in split(with_them, [score, other, *there], layers=layers, unit=unit):
            rows = every.finite(score, other, *there)
            flat = next((c for c in (score, other) if constant(rows.values[c])), None)
            if flat is not None:
                lines.append(constant_line(rows, score, unit, label, f"mean {kind} rho", flat, **given))
                values.append((np.empty(0, int), np.empty(0)))
                continue
            z, plain, usable = _fisher(rows, [score, other, *there], method, min_tokens, smooth)
            codes, units = rows.unit_of_sequence()
            tested = rows.where(np.isin(rows.sequence, codes[usable]))
            by_unit, means = group_means(units[usable], z[usable])
            most = max(most, len(means))
            answer = interval_and_p(means)
            answer |= {name: float(np.tanh(answer[name])) for name in ("estimate", "low", "high")}
            before = np.tanh(group_means(units[usable], plain[usable])[1].mean()) if usable.any() else np.nan
            notes = [note] if note else []
            if there and (not smooth or smooth_parts([rows.values[name] for name in there]) is None):
                notes.append("controls as straight lines" + (": too few tokens for curves" if smooth else ""))
            if (~usable).any():
                notes.append(f"{int((~usable).sum())} sequences left out: too short, or a column constant within")
            lines.append(
                line(
                    tested,
                    score,
                    unit,
                    label,
                    f"mean {kind} rho",
                    **given | answer | {"uncontrolled": before, "note": "; ".join(notes)},
                )
            )
            values.append((by_unit, means))
    refuse_constant(lines, [*names, *others])
    enough(max(most, 0), FEWEST, f"units ({unit}) with sequences of at least {min_tokens + len(controls)} scored tokens")
    for one, (codes, _) in zip(lines, values, strict=True):
        if 0 < len(codes) < FEWEST:
            one |= {"low": np.nan, "high": np.nan, "p": np.nan, "note": f"only {len(codes)} units at this layer"}
    if not len(controls):
        for one in lines:
            del one["uncontrolled"], one["controls"]
    for one in lines:
        one |= bounds(table, one["score"], one["against"], one["layer"])
    adjusted = max_t_signs(side_by_side(values)[0], n_resamples, seed) if correction == "max-t" else None
    return assemble(table, lines, correction, adjusted)


def partial_correlation(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    against: str | Sequence[str],
    *,
    controls: Sequence[str] = CONTROLS,
    **options: Any,
) -> pd.DataFrame:
    """Does a score go with another column beyond what token frequency, position, norm, density and surprisal explain?

    Within each sequence, both columns and all controls are ranked; a smooth function of each control is taken out of both (over all tokens),
    then the controls' linear part (within each sequence), and what is left is correlated; then as `within_sequence_correlation`.
    Surprisal may be a mediator rather than a confound: show the result also with `controls=[c for c in bl.stats.CONTROLS if c != "surprisal"]`.

    Args:
        table, scores, against: as for `within_sequence_correlation`.
        controls: standard controls (those that the table lacks are passed over, and the note says so), or columns of the table.
        **options: of `within_sequence_correlation`.

    Returns:
        as `within_sequence_correlation`; `uncontrolled` is the correlation without controls over the same tokens.

    Raises:
        TableError: as there, or a table with none of the controls. StudyError: as there.

    Source: Yule 1907; on ranks, Conover 1999.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> table = pd.DataFrame({"doc": np.repeat(range(20), 30), "seq": np.repeat(range(20), 30), "pos": np.tile(range(30), 20)})
        >>> table["a"], table["b"] = table.pos + rng.normal(size=600), table.pos + rng.normal(size=600)
        >>> result = bl.stats.partial_correlation(table, "a", "b", controls=["position"])
        >>> bool(result.uncontrolled[0] > 0.9 and abs(result.estimate[0]) < 0.2)
        True
    """
    own = [*names_of(scores), *names_of(against, "against")]
    if not chosen(table, names_of(controls, "controls"), own[:1], None)[1]:
        raise StudyError(f"expected a table with at least one of the controls {list(controls)}, got none. Measure them too.")
    return within_sequence_correlation(table, scores, against, controls=controls, **options)


def rank_regression(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    against: str | Sequence[str],
    *,
    controls: Sequence[str] = (),
    frequency: Mapping[Any, float] | None = None,
    layers: Any = None,
    unit: str = "document",
    within: bool = True,
    correction: Correction = "bh",
) -> pd.DataFrame:
    """Regression of a score's ranks on another column's ranks, with errors that allow any dependence within a unit.

    rank(score) = a + b rank(against) + c rank(controls); cluster-robust covariance, Student's t with units - 1 degrees of freedom

    Against `within_sequence_correlation`, long sequences weigh more, and short ones are not lost.

    Args:
        table, scores, against, controls, frequency, layers, unit, correction: as for `within_sequence_correlation`; no max-t.
        within: rank within each sequence, less the sequence mean, so that differences between texts play no part; False: rank over all tokens.

    Returns:
        one row per (layer, score, against): the standardized slope b, its interval, p, and `partial_r2`, the share of the variance left by the
        controls that `against` explains.

    Raises:
        TableError: several runs, missing columns, a column that is constant at every layer. StudyError: fewer than 10 units.

    Source: Iman and Conover 1979 (ranks); Liang and Zeger 1986 (errors), by statsmodels.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> table = pd.DataFrame({"doc": np.repeat(range(20), 30), "seq": np.repeat(range(20), 30), "a": rng.normal(size=600)})
        >>> table["b"] = table.a + rng.normal(size=600)
        >>> bool(0.5 < bl.stats.rank_regression(table, "b", "a").estimate[0] < 0.9)
        True
    """
    names, others = names_of(scores), names_of(against, "against")
    test, effect = "rank regression, cluster-robust t-test", "standardized slope of ranks"
    lines = []
    for score, other in ((score, other) for other in others for score in names if score != other):
        with_them, there, note = chosen(table, controls, (score, other), frequency)
        given = {"against": other, "controls": ", ".join(there), "partial_r2": np.nan}
        for every in split(with_them, [score, other, *there], layers=layers, unit=unit):
            rows = every.finite(score, other, *there)
            enough(rows.counts()["n_units"], FEWEST_CLUSTERS, f"units ({unit}) for cluster-robust errors")
            flat = next((c for c in (score, other) if constant(rows.values[c])), None)
            ranks = _ranks(rows, [score, other, *there], within)
            spread = ranks.std(0)
            if flat is None and not (spread[:2] > 0).all():
                flat = (score, other)[int(np.argmin(spread[:2]))]
            if flat is not None:
                lines.append(constant_line(rows, score, unit, test, effect, flat, **given))
                continue
            ranks = (ranks - ranks.mean(0))[:, spread > 0] / spread[spread > 0]
            fit = sm.OLS(ranks[:, 0], sm.add_constant(ranks[:, 1:])).fit(
                cov_type="cluster", cov_kwds={"groups": rows.unit, "df_correction": True}, use_t=True
            )
            low, high = fit.conf_int()[1]
            rest = sm.OLS(ranks[:, 0], np.column_stack([np.ones(len(ranks)), ranks[:, 2:]])).fit()
            answer = {
                "estimate": fit.params[1], "low": low, "high": high, "p": fit.pvalues[1], "partial_r2": 1 - fit.ssr / rest.ssr,
                "note": note,
            }  # fmt: skip
            lines.append(line(rows, score, unit, test, effect, **given | answer))
    refuse_constant(lines, [*names, *others])
    return assemble(table, lines, correction)


def _ranks(rows: Rows, names: Sequence[str], within: bool) -> Float[np.ndarray, "rows columns"]:
    values = pd.DataFrame({index: rows.values[name] for index, name in enumerate(names)})
    if not within:
        return values.rank().to_numpy()
    ranks = values.groupby(rows.sequence).rank()
    # As shares of the sequence: in a long one, a rank is worth less.
    share = ranks.div(pd.Series(rows.sequence).groupby(rows.sequence).transform("size") + 1.0, axis=0)
    return (share - share.groupby(rows.sequence).transform("mean")).to_numpy()


def _fisher(
    rows: Rows, names: Sequence[str], method: str, min_tokens: int, smooth: bool = False
) -> tuple[Float[np.ndarray, " sequences"], Float[np.ndarray, " sequences"], Bool[np.ndarray, " sequences"]]:
    """Fisher z of the first two columns within each sequence given the others, the same given nothing, and which sequences count."""
    values = pd.DataFrame({index: rows.values[name] for index, name in enumerate(names)})
    _, starts, sizes = np.unique(rows.sequence, return_index=True, return_counts=True)
    if method == "spearman":
        # As shares of the sequence, so that one curve of a control can fit long and short ones.
        values = values.groupby(rows.sequence).rank().div(np.repeat(sizes + 1.0, sizes), axis=0)
    elif method != "pearson":
        raise StudyError(f'expected method "spearman" or "pearson", got {method!r}.')
    held = values.to_numpy()
    scale = np.abs(held).max(0)
    pair, varied = _correlations(held[:, :2], scale[:2], starts, sizes)
    plain, left = pair[:, 0, 1], pair
    usable = varied.all(1) & (sizes >= max(4, min_tokens) + len(names) - 2)
    if len(names) > 2:
        bent = smooth_parts([rows.values[name] for name in names[2:]]) if smooth else None
        if bent is not None:
            held = np.column_stack([without_smooth_parts(held[:, :2], bent, rows.sequence), held[:, 2:]])
        products, varied = _correlations(held, scale, starts, sizes)
        across, among = products[:, :2, 2:], products[:, 2:, 2:]
        left = products[:, :2, :2] - across @ np.linalg.pinv(among, rcond=1e-9, hermitian=True) @ across.transpose(0, 2, 1)
        usable &= varied[:, :2].all(1)
    remains = np.einsum("sii->si", left)
    # What is left of a column that the controls explain in full is rounding.
    usable &= (remains > 1e-8).all(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = np.where(usable, left[:, 0, 1] / np.sqrt(remains.prod(1)), 0.0)
    return _atanh(rho, sizes), _atanh(np.where(usable, plain, 0.0), sizes), usable


def _correlations(
    held: Float[np.ndarray, "tokens columns"], scale: Float[np.ndarray, " columns"], starts: np.ndarray, sizes: np.ndarray
) -> tuple[Float[np.ndarray, "sequences columns columns"], Bool[np.ndarray, "sequences columns"]]:
    """Correlations between columns within each sequence, and which columns vary there by more than rounding beside their `scale`."""
    held = held - np.repeat(np.add.reduceat(held, starts) / sizes[:, None], sizes, axis=0)
    held[:, scale > 0] /= scale[scale > 0]
    products = np.add.reduceat(held[:, :, None] * held[:, None, :], starts)
    spread = np.sqrt(np.einsum("sii->si", products) / sizes[:, None])
    varied = spread > 1e-9
    size = np.where(varied, spread, 1.0) * np.sqrt(sizes)[:, None]
    return np.where(varied[:, :, None] & varied[:, None, :], products / size[:, :, None] / size[:, None, :], 0.0), varied


def _atanh(rho: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Fisher's z; a perfect rank correlation counts as half an exchange of two neighboring ranks short of perfect."""
    most = 1 - 6.0 / (sizes.astype(float) ** 3 - sizes)
    return np.asarray(np.arctanh(np.clip(rho, -most, most)))
