"""Telling two groups of texts apart by a score: AUROC, true positives at few false ones, and whether one score beats another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from sklearn.metrics import roc_auc_score, roc_curve

from basin_lens.errors import StudyError, TableError
from basin_lens.stats.design import FEWEST_PER_GROUP, Rows, WhichLayers, enough, group_means, names_of, refuse_constant, split
from basin_lens.stats.results import Correction, Line, Procedure, assemble
from basin_lens.values import whole_numbers


@whole_numbers(TableError)
def detect(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    label: str,
    *,
    versus: str | Sequence[str] = (),
    lower: Sequence[str] = (),
    rates: Sequence[float] = (0.01, 0.05),
    layers: WhichLayers = None,
    unit: str = "document",
    correction: Correction = "bh",
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How well does a score tell texts with a label from texts without? And better than another score, such as the loss?

    A sequence's score is the mean over its tokens. AUROC = P(score of a positive > score of a negative), ties count half; TPR at a
    false-positive rate: share of positives above the lowest threshold that lets no more than this share of negatives pass.

    Args:
        table: from `analyze`, of one run; score columns per token or per sequence.
        scores: columns that are higher for positives.
        label: True and False (or 1 and 0), the same throughout a sequence; rows without a label are passed over.
        versus: other scores to do better than: each adds rows with the difference.
        lower: columns, of scores or versus, that are lower for positives, such as the loss of memorized texts.
        rates: false-positive rates.
        layers, unit, correction: as for `compare_groups`; no max-t.
        n_resamples: of units for intervals, and of labels for p.
        seed: of both.

    Returns:
        one row per (layer, score, metric) with metric `auroc` and `tpr at 1% fpr` and so on, and with `versus` the same
        differences. Intervals: percentile bootstrap of units (of positive and negative ones apart, if each unit has one label), all
        scores on the same resamples. p: of AUROC by permutation of labels, between units or, if units hold both, within them; of
        differences from the bootstrap. TPR at rate f is NaN with fewer than 1 / f negatives: no threshold could be placed.
        `n_positive`, `n_negative`: sequences.

    Raises:
        TableError: several runs, missing columns, a label that is not True and False or changes within a sequence, constant
            columns.
        StudyError: fewer than 4 units with positives or with negatives.

    Source: Hanley and McNeil 1982; Carlini et al. 2022 (TPR at a low FPR); by scikit-learn.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"doc": range(40), "seq": range(40), "a": np.arange(40.0)})
        >>> table["member"] = table.a >= 20
        >>> float(bl.stats.detect(table, "a", "member").estimate[0])
        1.0
    """
    names, others = names_of(scores), [versus] if isinstance(versus, str) else list(versus)
    signs = {name: -1.0 if name in lower else 1.0 for name in [*names, *others]}
    unknown = [name for name in lower if name not in signs]
    if unknown:
        raise TableError(f"expected columns among scores or versus as lower, got {unknown[0]!r}. Name it there too.")
    detector = _Detector(label, signs, tuple(rates), unit, n_resamples, seed)
    lines: list[Line] = []
    for every in split(table, [*names, *others], layers=layers, unit=unit, labels=[label]):
        for score in names:
            lines += detector.of(every, [score, *(other for other in others if other != score)])
    refuse_constant(lines, names)
    return assemble(table, lines, correction)


@dataclass(frozen=True)
class _Detection:
    """How well one score tells sequences apart: each metric, and its values under resampled units."""

    found: Float[np.ndarray, " metrics"]
    drawn: Float[np.ndarray, "resamples metrics"]


@dataclass(frozen=True)
class _Detector:
    """How scores are tested at one layer. `signs`: of each column, -1 where it is lower for positives."""

    label: str
    signs: Mapping[str, float]
    rates: tuple[float, ...]
    unit: str
    n_resamples: int
    seed: int

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return ["auroc", *(f"tpr at {100 * rate:g}% fpr" for rate in self.rates)]

    def of(self, every: Rows, columns: Sequence[str]) -> list[Line]:
        """The rows of results of a score, the first column, by itself and against the others."""
        rows, positive = labeled(every.finite(*columns), self.label)
        flat = rows.constant_column(*columns)
        if flat is not None:
            return [self._procedure("auroc").constant_line(rows, columns[0], flat, metric="auroc", null=0.5)]
        units, truth, values = _sequences(rows, positive, columns, self.label)
        weights = unit_weights(units, truth, self.n_resamples, self.seed)[:, np.searchsorted(np.unique(units), units)]
        scores = [self.signs[name] * column for name, column in zip(columns, values.T, strict=True)]
        own, *others = (
            _Detection(curve_metrics(truth, score, self.rates), resampled_metrics(truth, score, self.rates, weights))
            for score in scores
        )
        sizes: Line = {"n_positive": int(truth.sum()), "n_negative": int((~truth).sum())}
        p, how = _permuted(truth, scores[0], units, self.n_resamples, self.seed)
        answers = [*self._alone(own, sizes, p, how)]
        for name, other in zip(columns[1:], others, strict=True):
            answers += self._against(own, other, sizes, name)
        return [procedure.line(rows, columns[0], **answer) for procedure, answer in answers]

    def _procedure(self, effect: str, paired: str = "") -> Procedure:
        return Procedure(self.unit, f"{paired}percentile bootstrap of units", effect)

    def _alone(self, own: _Detection, sizes: Line, p: float, how: str) -> Iterator[tuple[Procedure, Line]]:
        """Each metric with its interval; p of AUROC alone."""
        for place, (metric, found) in enumerate(zip(self.metrics, own.found, strict=True)):
            low, high = percentiles(own.drawn[:, place]) if np.isfinite(found) else (np.nan, np.nan)
            if place == 0:
                more: Line = {"null": 0.5, "p": p, "note": ""}
                procedure = Procedure(self.unit, how, metric)
            else:
                note = "no p: a rate has no value under no effect" if low == low else _few(sizes, metric)
                more = {"null": np.nan, "note": note}
                procedure = self._procedure(metric)
            if low == high:
                narrow = "the bootstrap does not vary: the interval is too narrow"
                more["note"] = narrow if place == 0 else f"{narrow}, and a rate has no p"
            yield procedure, {"metric": metric, "versus": None, **sizes, "estimate": found, "low": low, "high": high, **more}

    def _against(self, own: _Detection, other: _Detection, sizes: Line, name: str) -> Iterator[tuple[Procedure, Line]]:
        """Each metric less that of another score, on the same resamples."""
        for place, metric in enumerate(self.metrics):
            gap = own.drawn[:, place] - other.drawn[:, place]
            answer: Line = {"estimate": own.found[place] - other.found[place], "note": ""}
            if np.isfinite(own.found[place] - other.found[place]):
                answer["low"], answer["high"] = percentiles(gap)
                answer["p"] = bootstrap_p(gap)
            else:
                answer["note"] = _few(sizes, metric)
            yield self._procedure(f"{metric}, difference", "paired "), {"metric": metric, "versus": name, **sizes, **answer}


def _few(sizes: Line, metric: str) -> str:
    return f"{sizes['n_negative']} negatives are too few to place a threshold: no {metric}"


def labeled(rows: Rows, label: str) -> tuple[Rows, Bool[np.ndarray, " rows"]]:
    """The rows that have a label, and whether it is True.

    Raises:
        TableError: other values than True and False.
    """
    held = rows.labels[label]
    there = ~pd.isna(held)
    values = set(held[there].tolist())
    if not values <= {0, 1}:
        raise TableError(f"expected True and False in {label!r}, got {sorted(map(str, values))[:8]}. Make it a comparison.")
    return rows.where(there), held[there].astype(bool)


def _sequences(
    rows: Rows, positive: Bool[np.ndarray, " rows"], columns: Sequence[str], label: str
) -> tuple[Int[np.ndarray, " sequences"], Bool[np.ndarray, " sequences"], Float[np.ndarray, "sequences columns"]]:
    """Unit, label and mean scores of each sequence."""
    _, share = group_means(rows.sequence, positive.astype(float))
    if ((share > 0) & (share < 1)).any():
        raise TableError(f"expected a label that is the same throughout a sequence, got {label!r}, which changes within one.")
    truth = share == 1
    _, units = rows.unit_of_sequence()
    for name, side in (("True", truth), ("False", ~truth)):
        enough(len(np.unique(units[side])), FEWEST_PER_GROUP, f"units with {label} = {name}")
    return units, truth, np.stack([group_means(rows.sequence, rows.values[name])[1] for name in columns], 1)


def one_label_each(units: np.ndarray, truth: np.ndarray) -> bool:
    """Whether no unit holds both positives and negatives."""
    return not len(np.intersect1d(units[truth], units[~truth]))


def unit_weights(units: np.ndarray, truth: np.ndarray, n_resamples: int, seed: int) -> Float[np.ndarray, "resamples units"]:
    """How often each unit is drawn, with replacement: positive and negative units apart where that can be told.

    scipy's `bootstrap` has no clusters, and does not share resamples between scores.
    """
    codes = np.unique(units)
    rng = np.random.default_rng(seed)
    if not one_label_each(units, truth):
        return rng.multinomial(len(codes), np.full(len(codes), 1 / len(codes)), n_resamples).astype(float)
    side = np.isin(codes, units[truth])
    weights = np.zeros((n_resamples, len(codes)))
    for group in (side, ~side):
        count = int(group.sum())
        weights[:, group] = rng.multinomial(count, np.full(count, 1 / count), n_resamples)
    return weights


def curve_metrics(truth: np.ndarray, score: np.ndarray, rates: Sequence[float]) -> Float[np.ndarray, " metrics"]:
    """AUROC, then TPR at each false-positive rate; NaN with fewer than 1 / rate negatives."""
    false, true, _ = roc_curve(truth, score, drop_intermediate=False)
    at = [true[false <= rate + 1e-12].max() if (~truth).sum() * rate >= 1 - 1e-9 else np.nan for rate in rates]
    return np.array([roc_auc_score(truth, score), *at])


def resampled_metrics(
    truth: np.ndarray, score: np.ndarray, rates: Sequence[float], weights: Float[np.ndarray, "resamples sequences"]
) -> Float[np.ndarray, "resamples metrics"]:
    """`curve_metrics` under many weightings of the sequences, 100 times faster than one by one; not for how many negatives."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])  # ties stand or fall together
    positives = np.add.reduceat((weights * truth)[:, order], starts, axis=1)
    negatives = np.add.reduceat((weights * ~truth)[:, order], starts, axis=1)
    total, others = positives.sum(1), negatives.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        answers = [(positives * (negatives.cumsum(1) - negatives / 2)).sum(1) / total / others]
        false = negatives[:, ::-1].cumsum(1) / others[:, None]
        true = positives[:, ::-1].cumsum(1) / total[:, None]
    for rate in rates:
        answers.append(np.where(np.isfinite(answers[0]), np.where(false <= rate + 1e-12, true, 0.0).max(1), np.nan))
    return np.stack(answers, 1)


def percentiles(drawn: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """The 95 % percentile interval; resamples without positives or without negatives do not count."""
    if not np.isfinite(drawn).any():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_p(drawn: Float[np.ndarray, " resamples"]) -> float:
    """Two-sided p of a difference: twice the share of resamples on the other side of 0."""
    held = drawn[np.isfinite(drawn)]
    return float(min(1.0, 2 * (1 + min((held <= 0).sum(), (held >= 0).sum())) / (len(held) + 1)))


def shuffled_labels(
    truth: Bool[np.ndarray, " sequences"], units: Int[np.ndarray, " sequences"], n_resamples: int, seed: int
) -> tuple[Bool[np.ndarray, "resamples sequences"], str]:
    """Labels exchanged between units that have one each, or else within units; and which of the two."""
    rng = np.random.default_rng(seed)
    codes, inverse = np.unique(units, return_inverse=True)
    if one_label_each(units, truth):
        side = np.isin(codes, units[truth])
        return rng.permuted(np.broadcast_to(side, (n_resamples, len(codes))), axis=1)[:, inverse], "between units"
    drawn = np.broadcast_to(truth, (n_resamples, len(truth))).copy()
    moved = 0
    for code in range(len(codes)):
        at = np.flatnonzero(inverse == code)
        if 0 < truth[at].sum() < len(at):
            drawn[:, at] = rng.permuted(drawn[:, at], axis=1)
            moved += 1
    if moved < FEWEST_PER_GROUP:
        raise StudyError(
            f"expected units of one label each, or at least {FEWEST_PER_GROUP} that hold both, got {moved} that do. Choose another "
            "unit."
        )
    return drawn, "within units"


def _permuted(truth: np.ndarray, score: np.ndarray, units: np.ndarray, n_resamples: int, seed: int) -> tuple[float, str]:
    """Two-sided p of AUROC = 0.5."""
    drawn, how = shuffled_labels(truth, units, n_resamples, seed)
    ranks = pd.Series(score).rank().to_numpy()

    def distance(labels: np.ndarray) -> np.ndarray:
        count = labels.sum(1)
        return np.abs((labels @ ranks - count * (count + 1) / 2) / (count * (len(ranks) - count)) - 0.5)

    observed = distance(truth[None])[0]
    p = (1 + (distance(drawn) >= observed - 1e-12).sum()) / (n_resamples + 1)
    return float(p), f"permutation of labels {how}, bootstrap interval"
