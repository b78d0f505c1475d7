"""Does a score say anything of a label beyond what the baselines already say?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from basin_lens.errors import StudyError, TableError
from basin_lens.stats.auroc import labeled, one_label_each, percentiles, resampled_metrics, unit_weights
from basin_lens.stats.design import FEWEST_CLUSTERS, Rows, WhichLayers, enough, names_of, refuse_constant, split
from basin_lens.stats.projection import EXPLAINED, curves, told_in_full, unexplained
from basin_lens.stats.remembering import sharing
from basin_lens.stats.results import Correction, Estimate, Line, Procedure, assemble
from basin_lens.values import whole_numbers

_PENALTY = 1.0  # of the squared coefficients: scikit-learn's default
_CURVES = 3  # terms per baseline: cases are few, and every permutation is fitted anew
_METRICS = ("delta log-loss", "delta auroc")


@whole_numbers(TableError)
@sharing()
def added_value(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    label: str,
    baselines: str | Sequence[str],
    *,
    n_splits: int = 5,
    layers: WhichLayers = None,
    unit: str = "document",
    correction: Correction = "bh",
    n_resamples: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """What does a score add to the baselines when predicting a label of texts that were not fitted?

    Two logistic regressions, baselines alone and baselines with the score, are fitted on some units and predict the others. A
    baseline goes in as a straight line and, where cases suffice (30 per baseline), a curve: a score that bends with it adds nothing
    by that. delta log-loss = log-loss of baselines - log-loss of both (nats per text; positive: the score helps); delta AUROC = the
    other way round

    The cases are means over a unit's sequences with one label. Columns are standardized on the fitted units, coefficients have the
    usual ridge penalty (C = 1): labels that can be told apart in full stay finite.

    Args:
        table: from `analyze`, of one run.
        scores: columns, each added by itself.
        label: True and False (or 1 and 0), the same throughout a sequence; rows without a label are passed over.
        baselines: columns that any score must beat, such as the loss.
        n_splits: folds; units are never split.
        layers, unit, correction: as for `compare_groups`; no max-t.
        n_resamples: of units for intervals, and permutations for p.
        seed: of folds, resamples and permutations.

    Returns:
        two rows per (layer, score), metric `delta log-loss` and `delta auroc`. Intervals: percentile bootstrap of units,
        predictions as they are. p, one-sided: the part of the score that the baselines do not explain is permuted among cases
        (within units, if these hold both labels), and everything fitted again. `null`: mean under permutation; a score that says
        nothing costs a little. Where the baselines explain the score in full: NaN and a note.

    Raises:
        TableError: several runs, missing columns, a label that is not True and False, constant columns.
        StudyError: fewer than 10 units, or than `n_splits` of a label.

    Source: cross-fitting after Chernozhukov et al. 2018; folds and regression by scikit-learn; permutation after Freedman and Lane
        1983.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> table = pd.DataFrame({"doc": range(60), "seq": range(60), "loss": rng.normal(size=60), "a": rng.normal(size=60)})
        >>> table["member"] = table.loss + table.a > 0
        >>> bool(bl.stats.added_value(table, "a", "member", "loss", n_resamples=99).p[0] <= 0.01)
        True
    """
    names, base = names_of(scores), names_of(baselines, "baselines")
    test = "cross-fitted logistic regression, permutation of the score's own part"
    lines: list[Line] = []
    for every in split(table, [*names, *base], layers=layers, unit=unit, labels=[label]):
        for score in (name for name in names if name not in base):
            rows, positive = labeled(every.finite(score, *base), label)
            given = {"versus": ", ".join(base)}
            flat = rows.constant_column(score, *base)
            if flat is not None:
                procedure = Procedure(unit, test, _METRICS[0])
                lines.append(procedure.constant_line(rows, score, flat, metric=_METRICS[0], **given))
                continue
            units, truth, values = _cases(rows, positive, [*base, score])
            # Copies of a text, whatever their labels, are fitted or predicted, never both.
            folds = rows.fold[np.unique(rows.unit, return_index=True)[1]][np.searchsorted(np.unique(rows.unit), units)]
            enough(len(np.unique(units)), FEWEST_CLUSTERS, f"units ({unit}) for cross-fitting")
            for name, side in (("True", truth), ("False", ~truth)):
                enough(int(side.sum()), n_splits, f"cases with {label} = {name}, one per fold")
            enough(len(np.unique(folds)), n_splits, "texts that are no copies of one another, one per fold")
            found = _nothing()
            if not told_in_full(rows, score, base):
                found = _added(units, folds, truth, values, n_splits, n_resamples, seed)
            for metric, one in zip(_METRICS, found, strict=True):
                lines.append(Procedure(unit, test, metric).line(rows, score, metric=metric, **given, **one))
    if not lines:
        raise StudyError(f"expected scores other than the baselines, got {names} and {base}.")
    refuse_constant(lines, names)
    return assemble(table, lines, correction)


def _nothing() -> list[Line]:
    return [Estimate(note=EXPLAINED.replace("controls", "baselines")).columns() | {"null": np.nan} for _ in _METRICS]


def _cases(rows: Rows, positive: np.ndarray, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Units, labels and mean values of the cases: one per unit and label."""
    cases = []
    for side in (False, True):
        part = rows.where(positive == side)
        if len(part.sequence):
            codes = part.unit_means(columns[0])[0]
            cases.append((codes, np.full(len(codes), side), np.stack([part.unit_means(name)[1] for name in columns], 1)))
    units, truth, values = (np.concatenate(parts) for parts in zip(*cases, strict=True))
    return units, truth, values


def _added(
    units: np.ndarray, apart: np.ndarray, truth: np.ndarray, values: np.ndarray, n_splits: int, n_resamples: int, seed: int
) -> list[Line]:
    whole = np.zeros(len(units), int)
    left, note = unexplained(values[:, -1:], list(values[:, :-1].T), whole, most=_CURVES)
    if not left.of(0):
        return _nothing()
    note = note.replace("controls", "baselines").replace("tokens", "cases")
    bent = curves(list(values[:, :-1].T), len(units) - values.shape[1], most=_CURVES)
    if bent is not None:
        values = np.column_stack([values[:, :-1], *bent, values[:, -1]])
    folds = list(StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed).split(values, truth, apart))
    baselines = values[:, :-1]
    before, after = (_predicted(x, truth, folds) for x in (baselines, values))
    losses = _losses(before, truth) - _losses(after, truth)
    gains = np.array([losses.mean(), roc_auc_score(truth, after) - roc_auc_score(truth, before)])
    inverse = np.unique(units, return_inverse=True)[1]
    weights = unit_weights(units, truth, n_resamples, seed)[:, inverse]
    drawn = [
        weights @ losses / weights.sum(1),
        resampled_metrics(truth, after, (), weights)[:, 0] - resampled_metrics(truth, before, (), weights)[:, 0],
    ]
    # What the baselines do not explain of the score is what carries no information if the score adds nothing.
    rest = left.values[:, 0]
    shuffled = values[:, -1] - rest + _shuffled(rest, units, truth, n_resamples, seed)
    predicted = batched_predictions(np.broadcast_to(baselines, (n_resamples, *baselines.shape)), shuffled, truth, folds)
    null = np.stack(
        [(_losses(before, truth) - _losses(predicted, truth)).mean(1), _aurocs(predicted, truth) - roc_auc_score(truth, before)]
    )
    sizes = {"n_positive": int(truth.sum()), "n_negative": int((~truth).sum())}
    answers: list[Line] = []
    for gain, sample, chance in zip(gains, drawn, null, strict=True):
        p = (1 + (chance >= gain - 1e-9).sum()) / (n_resamples + 1)
        found = Estimate(float(gain), *percentiles(sample), float(p), note)
        answers.append(found.columns() | {"null": float(chance.mean()), **sizes})
    return answers


def _shuffled(rest: np.ndarray, units: np.ndarray, truth: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = np.broadcast_to(rest, (n_resamples, len(rest))).copy()
    if one_label_each(units, truth):
        return np.asarray(rng.permuted(drawn, axis=1))
    both = np.intersect1d(units[truth], units[~truth])
    enough(len(both), FEWEST_CLUSTERS, "units that hold both labels")
    for code in both:
        at = np.flatnonzero(units == code)
        drawn[:, at] = rng.permuted(drawn[:, at], axis=1)
    return drawn


def _predicted(
    values: np.ndarray, truth: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Float[np.ndarray, " cases"]:
    """Probabilities of True for cases of units that were not fitted."""
    answer = np.full(len(truth), np.nan)
    # Threads are of no use to fits this small, and wait for each other without end where the cores are not theirs alone.
    with threadpool_limits(1):
        for fitted, held in folds:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / _PENALTY, tol=1e-8, max_iter=1000))
            answer[held] = model.fit(values[fitted], truth[fitted]).predict_proba(values[held])[:, 1]
    return answer


def batched_predictions(
    baselines: Float[np.ndarray, "resamples cases columns"],
    score: Float[np.ndarray, "resamples cases"],
    truth: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
) -> Float[np.ndarray, "resamples cases"]:
    """`_predicted` for many versions of the score at once, by Newton's method on scikit-learn's objective: 50 times faster."""
    values = np.concatenate([baselines, score[:, :, None]], 2)
    answer = np.full(score.shape, np.nan)
    for fitted, held in folds:
        part = values[:, fitted]
        mean, size = part.mean(1, keepdims=True), part.std(1, keepdims=True)
        size = np.where(size > 0, size, 1.0)
        x, new = (np.concatenate([np.ones((*v.shape[:2], 1)), (v - mean) / size], 2) for v in (part, values[:, held]))
        ridge = _PENALTY * np.diag([0.0, *np.ones(x.shape[2] - 1)])
        y = truth[fitted].astype(float)
        w = np.zeros((len(x), x.shape[2]))
        for _ in range(25):
            p = _logistic(np.einsum("rnc,rc->rn", x, w))
            gradient = np.einsum("rnc,rn->rc", x, p - y) + w @ ridge
            curvature = np.einsum("rnc,rn,rnd->rcd", x, p * (1 - p), x, optimize=True) + ridge
            step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
            # Full steps far from the minimum can overshoot; the ridge keeps the minimum near.
            w = w - step / np.maximum(1.0, np.abs(step).max(1, keepdims=True) / 2)
            if np.abs(step).max() < 1e-7:
                break
        answer[:, held] = _logistic(np.einsum("rnc,rc->rn", new, w))
    return answer


def _logistic(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


def _losses(p: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Log-loss of each case, nats."""
    right = np.where(truth, p, 1 - p)
    return -np.log(np.maximum(right, np.finfo(float).tiny))


def _aurocs(p: Float[np.ndarray, "resamples cases"], truth: np.ndarray) -> Float[np.ndarray, " resamples"]:
    ranks = pd.DataFrame(p.T).rank().to_numpy().T
    count, others = int(truth.sum()), int((~truth).sum())
    return np.asarray((ranks[:, truth].sum(1) - count * (count + 1) / 2) / (count * others))
