"""Controls leave what is tested and one another in one least-squares projection: the only place where anything is held fixed.

Frisch and Waugh (1933): a slope of y on x at fixed controls C is that of what C leaves of y on what *the same* C leaves of x. Taken
out in steps (curves from the pair, then the untouched controls), what the first step took comes back with the second, and two
columns that share nothing but a control go together. So curves, straight lines and levels leave at once, in the space where the
test is made: values, or ranks within sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dpstrf
from scipy.special import ndtri
from scipy.stats import rankdata
from sklearn.preprocessing import SplineTransformer

from basin_lens.stats.design import Rows, group_means
from basin_lens.stats.remembering import remembered

_KNOTS = 5  # of the cubic splines of a control
_ROWS_PER_TERM = 10  # beyond levels and straight lines; with fewer rows, fewer terms, and straight lines alone in the end
_RANK = 1e-5  # of a term's size: what other terms leave of it when it says nothing that they do not
# Of the variance of a tested column: what is left when the controls explain it in full. Of values, rounding (also that of a column
# made in float32); of ranks, ties that rounding made.
IN_FULL, IN_FULL_OF_RANKS = 1e-10, 1e-4
EXPLAINED = "the controls explain it in full"
EXPLAINED_GROUPS = "the controls explain the groups or the score in full"
COARSE = "coarse curves of the controls, too few tokens for finer ones: ranks may still go together where a control bends"
STRAIGHT = "controls as straight lines: too few tokens for curves"


@dataclass(frozen=True)
class Left:
    """What controls leave of columns: values, each column's share of its variance within groups, and the terms that were taken out.

    `inflation`: of the variance of a sum over groups, against what the groups' own sums let one expect. Terms fitted over all rows
    tie groups together: with p terms and f rows beyond levels and slopes, (f - p) / (f - 2 p).
    """

    values: Float[np.ndarray, "rows columns"]
    share: Float[np.ndarray, " columns"]
    basis: Float[np.ndarray, "rows terms"]
    inflation: float

    def of(self, column: int, limit: float = IN_FULL) -> bool:
        """Whether anything is left of a column."""
        return bool(self.share[column] > limit)


def curves(
    controls: Sequence[Float[np.ndarray, " rows"]],
    free: int,
    *,
    ranked: Int[np.ndarray, " rows"] | None = None,
    most: int = 2 * (_KNOTS + 2),
) -> list[Float[np.ndarray, "rows _"]] | None:
    """A smooth function of each control, as terms for `project`; None where there are too few rows for any.

    The largest set that leaves 10 of the `free` rows (beyond levels and slopes) for each term: cubic splines of the control's
    normal scores (whatever its distribution, bends in the middle and at the ends can be followed) and of its values (where it is
    made of them, as an exponential is); of the normal scores alone (for ranks, the control's own); or these to the power of 1, 2,
    3. For tests of ranks within the groups `ranked`: splines of normal scores of the control less its group means, and of the
    control's own: what a rank can be expected to be bends with the value and with its group, not with the control's rank. Knots are
    equally spaced. A control that does not vary has no terms.

    Source: Eilers and Marx 1996, by scikit-learn's `SplineTransformer`.
    """
    varies = [len(values) > 0 and np.ptp(values) > 1e-12 * np.abs(values).max() for values in controls]
    if not any(varies):
        return None
    afforded = min(most, free // (_ROWS_PER_TERM * sum(varies)))
    kinds = {2 * (_KNOTS + 2): "both", _KNOTS + 2: "scores", 3: "powers"}
    kind = next((name for terms, name in kinds.items() if afforded >= terms), None)
    if kind is None:
        return None
    none = np.empty((len(controls[0]), 0))
    return [_curve(values, ranked, kind) if one else none for values, one in zip(controls, varies, strict=True)]


@remembered
def _curve(
    values: Float[np.ndarray, " rows"], ranked: Int[np.ndarray, " rows"] | None, kind: str
) -> Float[np.ndarray, "rows terms"]:
    """The terms of one control."""
    own = values[:, None]
    scores = _normal_scores(own)
    splines = SplineTransformer(n_knots=_KNOTS, degree=3, include_bias=False)
    if kind == "both":
        within = scores if ranked is None else _normal_scores(own - levels(ranked, own))
        return np.asarray(splines.fit_transform(np.column_stack([within, own if ranked is None else scores])))
    return np.asarray(splines.fit_transform(scores)) if kind == "scores" else np.column_stack([scores, scores**2, scores**3])


def curves_of_ranks(
    controls: Sequence[Float[np.ndarray, " rows"]], free: int, ranked: Int[np.ndarray, " rows"] | None
) -> tuple[list[Float[np.ndarray, "rows _"]] | None, str]:
    """`curves` for a test of ranks, and a note where they are not the finest: with a bent control, up to .1 false positives."""
    bent = curves(controls, free, ranked=ranked)
    if bent is None:
        return None, STRAIGHT
    return bent, "" if sum(terms.shape[1] for terms in bent) >= 2 * (_KNOTS + 2) * len(controls) else COARSE


def _normal_scores(columns: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
    # Rounding would tell ties apart, as the order of the rows has it.
    held = np.round(columns / np.maximum(np.abs(columns).max(0), 1e-300), 12)
    return np.asarray(ndtri(rankdata(held, axis=0) / (len(columns) + 1)))


def unexplained(
    columns: Float[np.ndarray, "rows columns"],
    controls: Sequence[Float[np.ndarray, " rows"]],
    codes: Int[np.ndarray, " rows"],
    *,
    smooth: bool = True,
    most: int = 2 * (_KNOTS + 2),
) -> tuple[Left, str]:
    """What a level of each group and the controls, straight and smooth, leave of columns; a note where they were straight alone."""
    straight = beside(*controls)
    free = len(columns) - len(np.unique(codes)) - straight.shape[1]
    bent = curves(controls, free, most=most) if smooth else None
    left = project(columns, straight if bent is None else beside(straight, *bent), codes)
    told = in_full(columns, straight, codes, copies=smooth)
    return replace(left, share=np.where(told, 0.0, left.share)), STRAIGHT if smooth and bent is None else ""


@remembered
def beside(*columns: Float[np.ndarray, "rows ..."]) -> Float[np.ndarray, "rows terms"]:
    """Columns and sets of columns as one."""
    return np.column_stack(columns)


def places(indexes: Sequence[Float[np.ndarray, " rows"]], codes: Int[np.ndarray, " rows"]) -> Float[np.ndarray, "rows indexes"]:
    """Ranks within groups, as shares: what stands for indexes where straight lines are all there is."""
    if not indexes:
        return np.empty((len(codes), 0))
    return pd.DataFrame(np.stack(indexes, 1)).groupby(codes).rank(pct=True).to_numpy()


def with_indexes(
    rows: Rows, names: Sequence[str], codes: Int[np.ndarray, " rows"], *, smooth: bool = True
) -> list[Float[np.ndarray, " rows"]]:
    """The controls and, of several, what they say of the first two columns at once: a rank's expected value bends with that.

    The rank of a sum is no sum of functions of what is summed: with two controls and their functions alone, two columns that share
    nothing but the controls' sum passed in 93 to 100 % of data sets. So the fitted columns, and their places within the sequence,
    are controls too.
    """
    controls = [rows.values[name] for name in names[2:]]
    if len(controls) < 2:
        return controls
    pair = np.stack([rows.values[name] for name in names[:2]], 1)
    fitted = pair - levels(codes, pair) - unexplained(pair, controls, codes, smooth=smooth)[0].values
    fitted = np.round(fitted / np.maximum(np.abs(fitted).max(0), 1e-300), 12)  # else rounding would tell ties apart
    return [*controls, *fitted.T, *places(list(fitted.T), codes).T]


def grouped(bent: Sequence[Float[np.ndarray, "rows _"]], controls: int) -> list[Float[np.ndarray, "rows _"]]:
    """Curves of controls and of what `with_indexes` added, in sets that tests share: of controls, of one column, of the other."""
    own, added = bent[:controls], bent[controls:]
    return [beside(*own), *(beside(*added[column::2]) for column in range(2 if added else 0))]


def in_full(
    columns: Float[np.ndarray, "rows columns"],
    controls: Float[np.ndarray, "rows controls"],
    codes: Int[np.ndarray, " rows"],
    *,
    copies: bool,
) -> list[bool]:
    """Which columns are a sum of levels and controls, each with a factor, or with `copies` a monotone function of a control."""
    told = project(columns, controls, codes).share <= IN_FULL
    if copies:
        ranks = np.stack([_ranks(column) for column in (*columns.T, *controls.T)])
        count = columns.shape[1]
        alike = np.corrcoef(ranks)[:count, count:] if np.ptp(ranks, 1).all() else np.zeros((count, 1))
        told |= (1 - alike**2 <= IN_FULL_OF_RANKS).any(1)
    return [bool(one) for one in told]


@remembered
def ranks_within(column: Float[np.ndarray, " rows"], codes: Int[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """Ranks within groups, from 1 on; ties get their mean."""
    return pd.Series(column).groupby(codes).rank().to_numpy()


@remembered
def _ranks(column: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    return np.asarray(rankdata(column))


def told_in_full(rows: Rows, score: str, controls: Sequence[str]) -> bool:
    """Whether controls explain a score in full token by token: their means over texts need not then, and would leave noise."""
    held = np.stack([rows.values[name] for name in (score, *controls)], 1)
    return in_full(held[:, :1], held[:, 1:], np.zeros(len(held), int), copies=True)[0]


def left_of_values(rows: Rows, names: Sequence[str], codes: Int[np.ndarray, " rows"], smooth: bool) -> float:
    """The smaller share that controls (the later names) leave of the first two columns' values.

    Where it is small, ranks go together of themselves, however much the controls leave of these.
    """
    pair, controls = ([rows.values[name] for name in some] for some in (names[:2], names[2:]))
    return float(unexplained(np.stack(pair, 1), controls, codes, smooth=smooth)[0].share.min())


def project(
    columns: Float[np.ndarray, "rows columns"],
    terms: Float[np.ndarray, "rows terms"],
    codes: Int[np.ndarray, " rows"] | None,
    each: Float[np.ndarray, "rows controls"] | None = None,
    *more: Float[np.ndarray, "rows _"],
) -> Left:
    """What is left of columns after one fit on levels of groups, `each` with a slope in each group, and terms over all rows.

    Terms are taken to full rank, each against its own size: constants, copies and sums of others take nothing more. Without
    groups (None) there are no levels: a constant is then a term like any other. `more`: sets of further terms, apart because other
    tests share them.
    """
    y, spread = _sized(columns, codes, each)
    basis = _basis(terms, codes, each)
    if beyond := [_beyond(terms, other, codes, each) for other in more if other.shape[1]]:
        basis = np.column_stack([basis, _orthonormal(np.column_stack(beyond))])
    for _ in range(2):  # the second time, what the first left of large parts by rounding
        y = y - basis @ (basis.T @ y)
    rank = basis.shape[1]
    free = len(columns)
    if codes is not None:
        free -= len(np.unique(codes)) * (1 + (0 if each is None else each.shape[1]))
    inflation = (free - rank) / (free - 2 * rank) if free > 2 * rank else 1.0
    return Left(y * spread, (y**2).sum(0), basis, inflation)


def _sized(
    held: Float[np.ndarray, "rows columns"], codes: Int[np.ndarray, " rows"] | None, each: Float[np.ndarray, "rows controls"] | None
) -> tuple[Float[np.ndarray, "rows columns"], Float[np.ndarray, " columns"]]:
    """Columns less levels, of size 1, and then less slopes; and the sizes."""
    size = np.abs(held).max(0, initial=0.0)
    if codes is not None:
        held = held - levels(codes, held)
    spread = np.sqrt((held**2).sum(0))
    # What is left of a constant after taking its mean is rounding.
    flat = spread <= 1e-12 * size * np.sqrt(len(held))
    held = np.where(flat, 0.0, held / np.where(flat, 1.0, spread))
    if codes is not None and each is not None and each.shape[1]:
        held = _without_slopes(held, each, codes)
    return held, spread


@remembered
def _basis(
    terms: Float[np.ndarray, "rows terms"], codes: Int[np.ndarray, " rows"] | None, each: Float[np.ndarray, "rows controls"] | None
) -> Float[np.ndarray, "rows rank"]:
    """A basis of what terms span beside levels and slopes."""
    return _orthonormal(_sized(terms, codes, each)[0])


@remembered
def _beyond(
    terms: Float[np.ndarray, "rows terms"],
    others: Float[np.ndarray, "rows others"],
    codes: Int[np.ndarray, " rows"] | None,
    each: Float[np.ndarray, "rows controls"] | None,
) -> Float[np.ndarray, "rows others"]:
    """What terms leave of others of size 1."""
    left, basis = _sized(others, codes, each)[0], _basis(terms, codes, each)
    for _ in range(2):
        left = left - basis @ (basis.T @ left)
    return left


def _orthonormal(terms: Float[np.ndarray, "rows terms"]) -> Float[np.ndarray, "rows rank"]:
    """A basis of what terms of size 1 (or less, where levels and slopes are out) span: those that others explain in full left out.

    Pivoted QR by way of the products of terms, six times faster than LAPACK's on columns this long: pivoted Cholesky finds the rank
    and the triangle, a second round what rounding has left between the columns.
    """
    if not terms.shape[1]:
        return terms
    triangle, order, rank, _ = dpstrf(terms.T @ terms, tol=_RANK**2)
    kept = terms[:, order[:rank] - 1]
    for upper in (np.triu(triangle[:rank, :rank]), None):
        upper = np.linalg.cholesky(kept.T @ kept).T if upper is None else upper
        kept = solve_triangular(upper, kept.T, trans="T", check_finite=False).T
    return kept


def _without_slopes(
    held: Float[np.ndarray, "rows columns"], each: Float[np.ndarray, "rows controls"], codes: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, "rows columns"]:
    """Columns less straight lines in `each` of its own for every group; all have their group's mean taken out."""
    answer = held.copy()
    for at, basis in _slopes(each, codes):
        part = held[at]
        for _ in range(2):
            part = part - basis @ (basis.transpose(0, 2, 1) @ part)
        answer[at] = part
    return answer


@remembered
def _slopes(
    each: Float[np.ndarray, "rows controls"], codes: Int[np.ndarray, " rows"]
) -> tuple[tuple[Int[np.ndarray, "groups length"], Float[np.ndarray, "groups length rank"]], ...]:
    """Rows of the groups of each length, and a basis of the straight lines in each of them."""
    size = np.abs(each).max(0)
    each = (each - levels(codes, each)) / np.where(size > 0, size, 1.0)
    order = np.argsort(codes, kind="stable")
    _, starts, sizes = np.unique(codes[order], return_index=True, return_counts=True)
    found = []
    for length in np.unique(sizes).tolist():  # groups of one length go together
        at = order[starts[sizes == length][:, None] + np.arange(length)]
        lines = each[at]
        spread = np.sqrt((lines**2).sum(1, keepdims=True))
        basis, size, _ = np.linalg.svd(lines / np.where(spread > 1e-12 * np.sqrt(length), spread, np.inf), full_matrices=False)
        found.append((at, basis * (size > 1e-7)[:, None]))
    return tuple(found)


def levels(codes: Int[np.ndarray, " rows"], columns: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
    """Mean of each row's group, of every column."""
    there, inverse, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    sums = [np.bincount(inverse, weights=column, minlength=len(there)) for column in columns.T]
    return np.asarray((np.stack(sums, 1) / sizes[:, None])[inverse]) if sums else np.empty(columns.shape)


def level(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of each row's group."""
    there, means = group_means(codes, values)
    return means[np.searchsorted(there, codes)]
