"""A score against another column, token by token, tested over sequences or documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from basin_lens.errors import StudyError, TableError
from basin_lens.stats.covariates import CONTROLS, chosen, varied
from basin_lens.stats.design import FEWEST, FEWEST_CLUSTERS, Rows, constant, enough, group_means, names_of, refuse_constant, split
from basin_lens.stats.groups import side_by_side
from basin_lens.stats.projection import (
    EXPLAINED,
    IN_FULL,
    IN_FULL_OF_RANKS,
    STRAIGHT,
    Left,
    curves,
    curves_of_ranks,
    in_full,
    left_of_values,
    places,
    project,
    unexplained,
    with_indexes,
)
from basin_lens.stats.reliability import bounds
from basin_lens.stats.results import (
    Correction,
    assemble,
    clustered_slope,
    constant_line,
    interval_and_p,
    joined,
    line,
    max_t_signs,
    toned,
)
from basin_lens.values import whole_numbers

_UNITS_PER_INDEX = 5  # beyond the controls; with fewer texts, what the controls say at once is not held fixed besides
NEARLY = 0.2  # of the variance: with less left of a column, partial rank correlation has an excess of its own


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
        smooth: with controls, a smooth function of each, fitted over all tokens of the layer (see `basin_lens.stats.projection.curves`), leaves
            together with a straight line within each sequence; False: the lines alone. A confound that bends would leave a correlation
            otherwise. Where tokens are too few for that, straight lines alone, and the note says so.
        correction: over all rows of the answer: `"bh"`, `"holm"`, `"max-t"` (signs of units flipped for all rows at once) or `"none"`.
        n_resamples: sign flips of max-t.
        seed: of the sign flips.

    Returns:
        one row per (layer, score, against): the mean correlation (tanh of the mean z) with its 95 % interval and p. `uncontrolled`: the
        same rows without controls. `controls`: those used. `left`: the share of the variance within sequences that they leave, the least of
        both columns' ranks and values; below a fifth, the note gives the answers of ranks, of values and of the joint regression side by side (see
        `partial_correlation`). `reliability`, `bound`: see `reliability_bound`. NaN, and a note that says why: a column is constant at a
        layer, the controls explain it in full, or correlations do not differ between units at all.

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
        given = {"against": other, "controls": ", ".join(there), "uncontrolled": np.nan, "left": np.nan}
        for every in split(with_them, [score, other, *there], layers=layers, unit=unit):
            rows = every.finite(score, other, *there)
            flat = next((c for c in (score, other) if constant(rows.values[c])), None)
            if flat is not None:
                lines.append(constant_line(rows, score, unit, label, f"mean {kind} rho", flat, **given))
                values.append((np.empty(0, int), np.empty(0)))
                continue
            here, said = varied(rows, there)
            found = _fisher(rows, [score, other, *here], method, min_tokens, smooth)
            if found.explained is not None:
                why = joined(note, said, f"{(score, other)[found.explained]}: {EXPLAINED}")
                lines.append(line(rows, score, unit, label, f"mean {kind} rho", **given | {"left": 0.0, "note": why}))
                values.append((np.empty(0, int), np.empty(0)))
                most = max(most, rows.counts()["n_units"])
                continue
            codes, units = rows.unit_of_sequence()
            tested = rows.where(np.isin(rows.sequence, codes[found.usable]))
            by_unit, means = group_means(units[found.usable], found.z[found.usable])
            most = max(most, len(means))
            answer = interval_and_p(means, found.inflation)
            answer |= {name: float(np.tanh(answer[name])) for name in ("estimate", "low", "high")}
            before = (
                np.tanh(group_means(units[found.usable], found.plain[found.usable])[1].mean()) if found.usable.any() else np.nan
            )
            notes = [note, said, answer.pop("note", ""), *found.notes]
            if here and found.left < NEARLY:
                notes.append(_beside(rows, [score, other, *here], method, min_tokens, smooth, found.left))
            answer |= {"uncontrolled": before, "left": found.left, "note": joined(*notes)}
            lines.append(line(tested, score, unit, label, f"mean {kind} rho", **given | answer))
            values.append((by_unit, toned(means, found.inflation)))
    refuse_constant(lines, [*names, *others])
    enough(max(most, 0), FEWEST, f"units ({unit}) with sequences of at least {min_tokens + len(controls)} scored tokens")
    for one, (codes, _) in zip(lines, values, strict=True):
        if 0 < len(codes) < FEWEST:
            one |= {"low": np.nan, "high": np.nan, "p": np.nan, "note": f"only {len(codes)} units at this layer"}
    if not len(controls):
        for one in lines:
            del one["uncontrolled"], one["controls"], one["left"]
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

    Within each sequence, both columns and all controls are ranked. A level and a straight line in each control for every sequence, and a smooth
    function of each control over all tokens, leave both columns in one least-squares fit; what is left is correlated, and then as
    `within_sequence_correlation`.

    Where a control nearly determines both columns, ranks have an excess of their own: a token's rank depends on the other tokens of its
    sequence too, in the same way for both, and no function of the control takes this out. Measured with nothing but a control in common, 20
    documents of 40 tokens, normal noise: 5 % false positives where the control leaves .22 of the variance, 7 % at .10, 15 % at .05 (Pearson: 5 %
    throughout), 44 % at .02; with a heavy-tailed control, 10 % at .14; with a lognormal one and text levels 20 % (of ranks .30 was left, of values
    .01); with two lognormal ones whose sum makes both columns, 17 to 29 % (24 data sets each). So below .2 (`left`) the note puts the
    correlations of ranks and of values and the joint regression beside each other: believe what all three say.

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
    smooth: bool = True,
    correction: Correction = "bh",
) -> pd.DataFrame:
    """Regression of a score's ranks on another column's ranks, with errors that allow any dependence within a unit.

    rank(score) = a + b rank(against) + c rank(controls) + s(controls); cluster-robust covariance, Student's t with units - 1 degrees of freedom

    Against `within_sequence_correlation`, long sequences weigh more, and short ones are not lost. Where controls leave little, ranks have the excess
    that `partial_correlation` tells of (here 11 % at .08, 27 % at .03, 51 % at .02), and the note says so.

    Between texts (`within=False`), errors are the jackknife's. Of 48 texts with nothing in common but a control, 5 to 12 % passed with two controls,
    9 to 10 % with one that bends, 27 % where two leave of a score what differs within texts alone; of 12 texts, 12 %. The note says where
    curves are coarse, or lines straight.

    Args:
        table, scores, against, controls, frequency, layers, unit, correction: as for `within_sequence_correlation`; no max-t.
        within: rank within each sequence, less the sequence mean, so that differences between texts play no part; False: rank over all tokens.
        smooth: a smooth function s of each control besides (see `basin_lens.stats.projection.curves`); where tokens are too few, straight lines
            alone, and the note says so.

    Returns:
        one row per (layer, score, against): the standardized slope b, its interval, p, and `partial_r2`, the share of the variance left by the
        controls that `against` explains; `left` as for `within_sequence_correlation`. Where the controls explain a column in full: NaN and a note.

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
        given = {"against": other, "controls": ", ".join(there), "partial_r2": np.nan, "left": np.nan}
        for every in split(with_them, [score, other, *there], layers=layers, unit=unit):
            rows = every.finite(score, other, *there)
            enough(rows.counts()["n_units"], FEWEST_CLUSTERS, f"units ({unit}) for cluster-robust errors")
            flat = next((c for c in (score, other) if constant(rows.values[c])), None)
            ranks = _ranks(rows, [score, other, *there], within)
            if flat is None and not (ranks[:, :2].std(0) > 0).all():
                flat = (score, other)[int(np.argmin(ranks[:, :2].std(0)))]
            if flat is not None:
                lines.append(constant_line(rows, score, unit, test, effect, flat, **given))
                continue
            here, said = varied(rows, there)
            kept = [0, 1, *(2 + there.index(name) for name in here)]
            found = _rank_slope(rows, ranks[:, kept], [score, other, *here], within, smooth)
            lines.append(line(rows, score, unit, test, effect, **given | found | {"note": joined(note, said, found["note"])}))
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


def _rank_slope(
    rows: Rows, ranks: Float[np.ndarray, "rows columns"], names: Sequence[str], within: bool, smooth: bool
) -> dict[str, Any]:
    """The standardized slope of the first column's ranks on the second's, given the others."""
    codes = rows.sequence if within else np.zeros(len(ranks), int)
    there = names[2:]
    notes, bent, straight = [], None, np.empty((len(ranks), 0))
    if there:
        given = np.stack([rows.values[name] for name in there], 1)
        told = in_full(np.stack([rows.values[name] for name in names[:2]], 1), given, codes, copies=True)
        # Between texts, each text says one thing of a curve, however many tokens it has.
        free = len(ranks) - len(np.unique(codes)) - len(there) if within else len(np.unique(rows.unit)) - len(there)
        held = with_indexes(rows, names, codes, smooth=smooth and within)
        bent, said = curves_of_ranks(held, free, rows.sequence if within else None) if smooth else (None, "")
        notes.append(said)
        if bent is None and len(held) > len(there) and free >= 2 * _UNITS_PER_INDEX:
            straight = places(held[-2:], codes)
        if any(told):
            return {"left": 0.0, "note": f"{names[told.index(True)]}: {EXPLAINED}"}
    terms = np.column_stack([ranks[:, 2:], straight if bent is None else bent])
    left = project(ranks[:, :2], terms, codes)
    if there and left.share.min() <= IN_FULL_OF_RANKS:
        return {"left": float(left.share.min()), "note": f"{names[int(left.share.argmin())]}: {EXPLAINED}"}
    # Between texts there are few of them for each term.
    whole = None if within else np.column_stack([left.basis, np.full(len(ranks), 1 / np.sqrt(len(ranks)))])
    found = clustered_slope(left.values[:, 0], left.values[:, 1], rows.unit, left.basis.shape[1] + 1, whole)
    size = ranks[:, 1].std() / ranks[:, 0].std()
    found |= {name: found[name] * size for name in ("estimate", "low", "high")}
    if there:
        found["left"] = min(float(left.share.min()), left_of_values(rows, names, codes, smooth))
        notes += [_nearly(found["left"]) + ": see partial_correlation"] if found["left"] < NEARLY else []
    return found | {"note": joined(*notes, found.get("note", ""))}


@dataclass(frozen=True)
class _Within:
    """Fisher z of two columns within each sequence given others, the same given nothing, which sequences count, and what to say of it."""

    z: Float[np.ndarray, " sequences"]
    plain: Float[np.ndarray, " sequences"]
    usable: Bool[np.ndarray, " sequences"]
    inflation: float = 1.0
    left: float = 1.0
    notes: tuple[str, ...] = ()
    explained: int | None = None  # the column of which the controls leave nothing


def _fisher(rows: Rows, names: Sequence[str], method: str, min_tokens: int, smooth: bool) -> _Within:
    values = pd.DataFrame({index: rows.values[name] for index, name in enumerate(names)})
    sizes = np.unique(rows.sequence, return_counts=True)[1]
    if method == "spearman":
        # As shares of the sequence, so that one curve of a control can fit long and short ones.
        values = values.groupby(rows.sequence).rank().div(np.repeat(sizes + 1.0, sizes), axis=0)
    elif method != "pearson":
        raise StudyError(f'expected method "spearman" or "pearson", got {method!r}.')
    held, scale = values.to_numpy(), np.abs(values.to_numpy()).max(0)[:2]
    bare = project(held[:, :2], np.empty((len(held), 0)), rows.sequence)
    plain, spread = _correlations(bare.values, sizes)
    usable = (spread > 1e-9 * scale).all(1) & (sizes >= max(4, min_tokens) + len(names) - 2)
    if len(names) == 2 or not usable.any():
        return _Within(_atanh(plain, sizes), _atanh(plain, sizes), usable, notes=_left_out(usable))
    keep = np.repeat(usable, sizes)
    left, notes, told = _given(rows.where(keep), held[keep], names, method, smooth)
    if told is not None:
        return _Within(plain, plain, usable, explained=told)
    z, rest = np.zeros(len(sizes)), np.zeros((len(sizes), 2))
    z[usable], rest[usable] = _correlations(left.values, sizes[usable])
    # What is left of a column that the controls explain in full is rounding.
    usable = usable & (rest**2 > 1e-8 * spread**2).all(1)
    z = np.where(usable, z, 0.0)
    share = float(left.share.min())
    if method == "spearman":
        share = min(share, left_of_values(rows.where(keep), names, rows.sequence[keep], smooth))
    return _Within(_atanh(z, sizes), _atanh(plain, sizes), usable, left.inflation, share, (*notes, *_left_out(usable)))


def _left_out(usable: Bool[np.ndarray, " sequences"]) -> tuple[str, ...]:
    count = int((~usable).sum())
    return (
        (f"{count} sequences left out: too short, or a column constant within or explained in full by the controls",)
        if count
        else ()
    )


def _given(
    rows: Rows, held: Float[np.ndarray, "rows columns"], names: Sequence[str], method: str, smooth: bool
) -> tuple[Left, list[str], int | None]:
    """What the controls leave of the first two columns, what to say of it, and which of the two they explain in full."""
    controls = np.stack([rows.values[name] for name in names[2:]], 1)
    ranked = method == "spearman"
    told = in_full(np.stack([rows.values[name] for name in names[:2]], 1), controls, rows.sequence, copies=ranked or smooth)
    free = len(held) - len(np.unique(rows.sequence)) * (1 + controls.shape[1])
    terms = with_indexes(rows, names, rows.sequence) if ranked else list(controls.T)
    bent, said = None, "controls as straight lines"
    if smooth:
        bent, said = curves_of_ranks(terms, free, rows.sequence) if ranked else (curves(terms, free), "")
        said = STRAIGHT if bent is None else said
    left = project(held[:, :2], np.empty((len(held), 0)) if bent is None else bent, rows.sequence, held[:, 2:])
    told = [one or not left.of(column, IN_FULL_OF_RANKS if ranked else IN_FULL) for column, one in enumerate(told)]
    return left, [said], told.index(True) if any(told) else None


def _nearly(left: float) -> str:
    return f"the controls leave {100 * left:.2g} % of the variance, where partial rank correlation has an excess of its own"


def _beside(rows: Rows, names: Sequence[str], method: str, min_tokens: int, smooth: bool, left: float) -> str:
    """The answers of ranks, of values and of one regression over all tokens, in words."""
    other = "pearson" if method == "spearman" else "spearman"
    found = _fisher(rows, names, other, min_tokens, smooth)
    _, units = rows.unit_of_sequence()
    told = "not to be had"
    if found.explained is None and found.usable.any():
        answer = interval_and_p(group_means(units[found.usable], found.z[found.usable])[1], found.inflation)
        told = f"{np.tanh(answer['estimate']):+.3f} (p {answer['p']:.2g})"
    rest, _ = unexplained(
        np.stack([rows.values[name] for name in names[:2]], 1),
        [rows.values[name] for name in names[2:]],
        rows.sequence,
        smooth=smooth,
    )
    slope = "not to be had"
    if rest.of(0) and rest.of(1):
        y, x = (rest.values / rest.values.std(0)).T
        one = clustered_slope(y, x, rows.unit, rest.basis.shape[1] + 1)
        slope = f"{one['estimate']:+.3f} (p {one['p']:.2g})"
    return (
        f"{_nearly(left)}; beside it, partial {other.capitalize()} {told}, joint regression of values, standardized slope {slope}"
    )


def _correlations(
    held: Float[np.ndarray, "tokens two"], sizes: Int[np.ndarray, " sequences"]
) -> tuple[Float[np.ndarray, " sequences"], Float[np.ndarray, "sequences two"]]:
    """Correlations of two columns without their means within each sequence, and the columns' standard deviations there."""
    starts = np.cumsum(sizes) - sizes
    squares = np.add.reduceat(held**2, starts)
    product = np.add.reduceat(held[:, 0] * held[:, 1], starts)
    size = np.sqrt(squares.prod(1))
    return np.divide(product, size, out=np.zeros_like(product), where=size > 0), np.sqrt(squares / sizes[:, None])


def _atanh(rho: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Fisher's z; a perfect rank correlation counts as half an exchange of two neighboring ranks short of perfect."""
    most = 1 - 6.0 / (sizes.astype(float) ** 3 - sizes)
    return np.asarray(np.arctanh(np.clip(rho, -most, most)))
