"""The original guide's tests, over tokens as if they were independent: to be read beside the sound ones, never instead."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.stats.design import Rows, WhichLayers, constant, names_of, split
from basin_lens.stats.groups import two_groups
from basin_lens.stats.results import joined

# The guide's own words for a correlation: strong above the first, moderate above the second.
STRONG, MODERATE = 0.4, 0.2


def guide_tests(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    against: str | None = None,
    *,
    group: str | None = None,
    groups: Sequence[object] | None = None,
    tag: str | None = None,
    layers: WhichLayers = None,
) -> pd.DataFrame:
    """What the original guide would have reported: tests that count every token as an independent observation.

    - `against`: Pearson's r over tokens.
    - `group`: Student's t over tokens, with the point-biserial r.
    - `tag`: one-way analysis of variance over tokens, with r = sqrt(eta squared).

    They are here so that older figures can be compared. **Their p-values are wrong** for tokens of running text: at an intraclass
    correlation of 0.3 and no effect at all, such a test rejects 6 times out of 10. Believe the tests over documents beside them.

    Args:
        table: from `analyze`, of one run.
        scores: columns to test.
        against: another column.
        group, groups: as for `compare_groups`.
        tag: label column with two or more values.
        layers: which; None: all.

    Returns:
        one row per (layer, score): `question, guide_test, guide_statistic, guide_r, guide_p, guide_reading`, and `n_tokens`.
        `guide_reading`: "strong" for |r| > 0.4, "moderate" for |r| > 0.2, else "weak". NaN, and a `note`, where a column is
        constant; copies of texts count once here too, and the note says so.

    Raises:
        TableError: not exactly one question, several runs, missing columns, not two groups.

    Source: the guide that basin_lens began with; the tests by scipy (`pearsonr`, `ttest_ind`, `pointbiserialr`, `f_oneway`).

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"doc": [0, 0, 1, 1], "seq": [0, 0, 1, 1], "a": [1.0, 2.0, 3.0, 4.0], "b": [1.0, 2.0, 3.0, 5.0]})
        >>> bl.stats.guide_tests(table, "a", "b").guide_reading.tolist()
        ['strong']
    """
    names = names_of(scores)
    asked = {"against": against, "group": group, "tag": tag}
    if sum(value is not None for value in asked.values()) != 1:
        raise TableError(
            f"expected one question (against, group or tag), got { {k: v for k, v in asked.items() if v is not None} }."
        )
    lines = []
    for score in names:
        columns = [score] if against is None else [score, against]
        labels = [name for name in (group, tag) if name is not None]
        for every in split(table, columns, layers=layers, labels=labels):
            rows = every.finite(*columns)
            if against is not None:
                found = _correlation(rows, score, against)
            elif group is not None:
                found = _difference(rows, score, group, groups)
            else:
                found = _variance(rows, score, str(tag))
            r = abs(found.guide_r)
            reading = "" if np.isnan(r) else "strong" if r > STRONG else "moderate" if r > MODERATE else "weak"
            note = "too few tokens, or values that do not differ" if np.isnan(r) else ""
            note = joined(note, f"{rows.infinite} rows with an infinite value left out" if rows.infinite else "", rows.copies)
            lines.append({"layer": rows.layer, "score": score, **vars(found), "guide_reading": reading, "note": note})
    answer = pd.DataFrame(lines)
    answer["layer"] = answer["layer"].astype("Int64")
    return tables.with_provenance(answer, table)


@dataclass(frozen=True)
class _Found:
    """What a test over tokens says."""

    question: str
    guide_test: str
    guide_statistic: float
    guide_r: float
    guide_p: float
    n_tokens: int


def _correlation(rows: Rows, score: str, against: str) -> _Found:
    x, y = rows.values[score], rows.values[against]
    if len(x) < 3 or constant(x) or constant(y):
        return _Found(against, "Pearson r over tokens", np.nan, np.nan, np.nan, len(x))
    found = stats.pearsonr(x, y)
    return _Found(against, "Pearson r over tokens", float(found.statistic), float(found.statistic), float(found.pvalue), len(x))


def _difference(rows: Rows, score: str, group: str, groups: Sequence[object] | None) -> _Found:
    first, second, wording = two_groups(rows, group, groups)
    one, other = rows.values[score][first], rows.values[score][second]
    test, count = "t-test over tokens, point-biserial r", len(one) + len(other)
    if min(len(one), len(other)) < 2 or constant(np.concatenate([one, other])):
        return _Found(wording, test, np.nan, np.nan, np.nan, count)
    t = stats.ttest_ind(one, other)
    r = stats.pointbiserialr(np.repeat([True, False], [len(one), len(other)]), np.concatenate([one, other]))
    return _Found(wording, test, float(t.statistic), float(r.statistic), float(t.pvalue), count)


def _variance(rows: Rows, score: str, tag: str) -> _Found:
    there = ~pd.isna(rows.labels[tag])
    values, kinds = rows.values[score][there], rows.labels[tag][there].astype(str)
    groups = [values[kinds == kind] for kind in np.unique(kinds)]
    groups = [part for part in groups if len(part) > 1]
    test = "analysis of variance over tokens, r = sqrt(eta squared)"
    if len(groups) < 2 or constant(np.concatenate(groups)):
        return _Found(tag, test, np.nan, np.nan, np.nan, len(values))
    held = np.concatenate(groups)
    found = stats.f_oneway(*groups)
    between = sum(len(part) * (part.mean() - held.mean()) ** 2 for part in groups)
    r = float(np.sqrt(between / ((held - held.mean()) ** 2).sum()))
    return _Found(tag, test, float(found.statistic), r, float(found.pvalue), len(held))
