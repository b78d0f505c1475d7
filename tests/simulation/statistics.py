"""The statistics of the battery, each as it is called, with the kind of tables and the shapes of data that it takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from basin_lens import stats
from tests.simulation import data as made
from tests.simulation.data import SHAPES, Maker

RESAMPLES = 199
LAYERS = 4  # of a draw, where a statistic is about many layers
EXCESS = "excess of its own"  # said where partial rank correlation has one
COARSE = "coarse curves"  # said where they suffice for few alone
STRAIGHT = "as straight lines"  # said where units are too few for curves
TOKENS = "not of tags as such"  # said by tests of tags that hold for these words or these texts

Test = Callable[[pd.DataFrame, list[str]], pd.DataFrame]


@dataclass(frozen=True)
class Statistic:
    """A statistic as it is called.

    Attributes:
        name: in the table.
        make: the kind of tables it takes.
        test: from a table and its control columns to rows with `layer, p, note`.
        shapes: of data (see `SHAPES`).
        by: column that tells several tests of one answer apart.
        layers: of one draw; 1: every layer is a draw of its own, and one call tests all.
        share: of the draws asked for: less than 1 where a call takes long.
        refuses: whether a score within the span of the controls must be refused by name.
        says: one of these its rows must say where there are more false positives than alpha: it has a known excess.
        most: share of false positives that rows may have which say so.
    """

    name: str
    make: Maker
    test: Test
    shapes: Sequence[str] = tuple(SHAPES)
    by: str | None = None
    layers: int = 1
    share: float = 1.0
    refuses: bool = True
    says: tuple[str, ...] = ()
    most: float = 0.3


_N = {"n_resamples": RESAMPLES}
_PLAIN = ("straight", "same text four times")  # nothing in common: the shape only tells whether there are copies


def _pair(call: Callable[..., pd.DataFrame], **options: object) -> Test:
    return lambda t, c: call(t, "x", "y", controls=c, correction="none", **options)


def _groups(**options: object) -> Test:
    return lambda t, c: stats.compare_groups(t, "x", "group", controls=c, correction="none", **_N, **options)


def _alone(call: Callable[..., pd.DataFrame], other: str, **options: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda t: call(t, "x", other, correction="none", **options)


def _bare(call: Callable[[pd.DataFrame], pd.DataFrame]) -> Test:
    return lambda t, _: call(t)


def _freed(call: Callable[[pd.DataFrame], pd.DataFrame]) -> Test:
    return lambda t, c: call(stats.residuals(t, "x", controls=c))


def _ends(t: pd.DataFrame) -> pd.DataFrame:
    return stats.quartile_table(t, "x", "y", correction="none").query("quartile == '4 - 1'")


def _tags(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
    return stats.tag_effect(t, "x", "tag", controls=c, correction="none", **_N)


def _tag_means(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
    return stats.tag_means(t, "x", "tag", controls=c, correction="none")


def _added_value(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
    return stats.added_value(t, "x", "group", c, n_splits=3, correction="none", n_resamples=99)


def _better(t: pd.DataFrame) -> pd.DataFrame:
    return stats.detect(t, "x", "group", versus="z", rates=(), correction="none", **_N).query("versus == 'z'")


def _outside(t: pd.DataFrame) -> pd.DataFrame:
    """p 0 where the interval of a mean that is 0 does not hold it, else 1."""
    answer = stats.mean_interval(t, "difference", "layer", n_resamples=999)
    missed = (answer["low"] > 0) | (answer["high"] < 0)
    return answer.assign(p=np.where(answer["low"].isna(), np.nan, 1.0 - missed))


def _family(test: Test) -> Test:
    """The smallest corrected p of a family of layers."""

    def smallest(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
        answer = test(t, c)
        return pd.DataFrame({"p": [answer["p_corrected"].min()], "note": ["; ".join(sorted(set(answer["note"]) - {""}))]})

    return smallest


def _pair_max_t(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
    return stats.partial_correlation(t, "x", "y", controls=c, correction="max-t", **_N)


def _paired_max_t(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
    return stats.compare_groups(t, "x", "group", paired=True, controls=c, correction="max-t", **_N)


def _unpaired_max_t(t: pd.DataFrame) -> pd.DataFrame:
    return stats.compare_groups(t.assign(group=t["doc"] % 24 < 12), "x", "group", correction="max-t", **_N)


def _change_max_t(t: pd.DataFrame) -> pd.DataFrame:
    return stats.before_after(t, correction="max-t", **_N)


def _best_given(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
    return stats.best_layer(
        t, lambda part: stats.partial_correlation(part, "x", "y", controls=c, method="pearson"), correction="none"
    )


def _best_change(t: pd.DataFrame) -> pd.DataFrame:
    return stats.best_layer(t, lambda part: stats.before_after(part, **_N), correction="none")


def _unflagged(**question: object) -> Test:
    """p 0 where a finding is there and no red flag is raised, else 1."""

    def test(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
        flags = stats.red_flags(t, "x", controls=c, **_N, **question)
        return pd.DataFrame({"p": [float(flags["raised"].fillna(False).any())], "note": [""]})

    return test


def _change_unflagged(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
    return _unflagged()(t.drop(columns=["x"]).rename(columns={"difference": "x"}), c)


# With controls: two columns, or a column and groups, that have nothing in common but these.
GIVEN = (
    Statistic("partial_correlation, pearson", made.of_tokens, _pair(stats.partial_correlation, method="pearson")),
    Statistic("partial_correlation, spearman", made.of_tokens, _pair(stats.partial_correlation), says=(EXCESS,)),
    Statistic("rank_regression", made.of_tokens, _pair(stats.rank_regression), says=(EXCESS,)),
    Statistic(
        "rank_regression, between texts", made.of_units, _pair(stats.rank_regression, within=False), share=0.5,
        says=(EXCESS, STRAIGHT, COARSE), refuses=False,
    ),
    Statistic("mixed_model", made.of_tokens, _pair(stats.mixed_model)),
    Statistic("residuals, then spearman", made.of_tokens, _freed(_alone(stats.within_sequence_correlation, "y")), refuses=False),
    Statistic("residuals, then quartile_table", made.of_tokens, _freed(_ends), refuses=False),
    Statistic("compare_groups, paired", made.grouped_tokens, _groups(paired=True)),
    Statistic("compare_groups, unpaired", made.of_units, _groups(), says=(STRAIGHT,)),
    Statistic("tag_effect", made.grouped_tokens, _tags, by="test", share=0.25),
    Statistic(
        "tag_effect, types with scores of their own", made.of_types, _tags, ("straight", "constant control"), by="test", share=0.5,
        says=(TOKENS,), most=0.8,
    ),
    Statistic("tag_means", made.grouped_tokens, _tag_means, by="tag", share=0.5),
    Statistic("added_value", made.of_units, _added_value, by="metric", share=0.25, says=(STRAIGHT,)),
    Statistic("partial_correlation, max-t over layers", made.of_tokens, _family(_pair_max_t), layers=LAYERS, share=0.25, says=(EXCESS,)),
    Statistic("compare_groups, paired, max-t over layers", made.grouped_tokens, _family(_paired_max_t), layers=LAYERS, share=0.25),
    Statistic("best_layer of partial_correlation, pearson", made.of_tokens, _best_given, layers=LAYERS, share=0.25, refuses=False),
    Statistic("red_flags against", made.of_tokens, _unflagged(against="y"), layers=LAYERS, share=0.25, refuses=False),
    Statistic("red_flags of groups, paired", made.grouped_tokens, _unflagged(group="group", paired=True), layers=2, share=0.25, refuses=False),
    Statistic("red_flags of groups, unpaired", made.of_units, _unflagged(group="group"), layers=2, share=0.25, refuses=False),
    Statistic(
        "red_flags of tags, types with scores of their own", made.of_types, _unflagged(tag="tag"), ("straight", "constant control"),
        layers=2, share=0.5, refuses=False,
    ),
)  # fmt: skip

# Without: columns that have nothing in common at all.
BARE = (
    Statistic("within_sequence_correlation, spearman", made.bare_tokens, _bare(_alone(stats.within_sequence_correlation, "y")), _PLAIN),
    Statistic(
        "within_sequence_correlation, pearson", made.bare_tokens, _bare(_alone(stats.within_sequence_correlation, "y", method="pearson")),
        _PLAIN,
    ),
    Statistic("quartile_table", made.bare_tokens, _bare(_ends), _PLAIN),
    Statistic("compare_groups, paired, no controls", made.bare_tokens, _bare(_alone(stats.compare_groups, "group", paired=True, **_N)), _PLAIN),
    Statistic("compare_groups, unpaired, no controls", made.bare_units, _bare(_alone(stats.compare_groups, "group", **_N)), _PLAIN),
    Statistic("tag_effect, no controls", made.bare_tokens, _bare(_alone(stats.tag_effect, "tag", **_N)), _PLAIN, by="test", share=0.25),
    Statistic("tag_means, no controls", made.bare_tokens, _bare(_alone(stats.tag_means, "tag")), _PLAIN, by="tag", share=0.5),
    Statistic("before_after", made.bare_tokens, _bare(lambda t: stats.before_after(t, correction="none", **_N)), _PLAIN),
    Statistic("unit_slope", made.bare_units, _bare(_alone(stats.unit_slope, "y", **_N)), _PLAIN),
    Statistic("detect", made.bare_units, _bare(_alone(stats.detect, "group", rates=(), **_N)), _PLAIN),
    Statistic("detect, better than another", made.bare_units, _bare(_better), _PLAIN),
    Statistic("mean_interval, 0 outside", made.bare_tokens, _bare(_outside), _PLAIN),
    Statistic("before_after, max-t over layers", made.bare_tokens, _family(_bare(_change_max_t)), _PLAIN, layers=LAYERS),
    Statistic("compare_groups, unpaired, max-t over layers", made.bare_units, _family(_bare(_unpaired_max_t)), ("straight",), layers=LAYERS),
    Statistic("best_layer of before_after", made.bare_tokens, _bare(_best_change), _PLAIN, layers=LAYERS, share=0.5),
    Statistic("red_flags of a change", made.bare_tokens, _change_unflagged, _PLAIN, layers=LAYERS, share=0.25),
)  # fmt: skip

STATISTICS = (*GIVEN, *BARE)
