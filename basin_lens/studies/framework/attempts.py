"""Tests that say why they could not be made, in place of stopping a study."""

from collections.abc import Callable, Sequence

import pandas as pd

from basin_lens import stats
from basin_lens.errors import StudyError, TableError
from basin_lens.studies.framework.table_parts import above_layer_0

LAYER_FREE = ("surprisal", "agreement", "surprisal_change", "agreement_change", "next_token_entropy")


def attempt(
    test: Callable[..., pd.DataFrame], table: pd.DataFrame, score: str | list[str], *args: object, **options: object
) -> pd.DataFrame:
    """`test(table, score, ...)`; where texts are too few for it, or a column does not vary, rows without numbers that say so."""
    try:
        return test(table, score, *args, **options)
    except (StudyError, TableError) as error:
        names = [score] if isinstance(score, str) else score
        layers: list[object] = sorted(table["layer"].unique().tolist()) if "layer" in table.columns else [pd.NA]
        empty = [empty_finding(name, str(options.get("unit", ""))).to_dict("records")[0] for name in names]
        blank = pd.DataFrame([{**line, "layer": layer} for line in empty for layer in layers])
        return blank.astype({"layer": "Int64"}).assign(note=f"not tested: {error}")


def attempt_each(
    test: Callable[..., pd.DataFrame], table: pd.DataFrame, scores: Sequence[str], *args: object, **options: object
) -> pd.DataFrame:
    """`attempt` score by score, uncorrected: one that cannot be tested does not take the others with it."""
    parts = []
    for score in scores:
        # What is the same at every layer is one test, not one for each.
        free = "layer" in table and score in LAYER_FREE
        part = table[table["layer"] == table["layer"].iloc[0]] if free else table
        found = attempt(test, part, score, *args, correction="none", **options)
        parts.append(found.assign(layer=pd.Series(pd.NA, found.index, "Int64")) if free else found)
    return pd.concat(parts, ignore_index=True)


def empty_finding(score: str, unit: str) -> pd.DataFrame:
    """A test that could not be made, as a row; its note is to say why."""
    blank = dict.fromkeys(("estimate", "low", "high", "p", "p_corrected", "hedges_g"), float("nan"))
    counts = dict.fromkeys(("n_units", "n_sequences", "n_documents", "n_tokens"), 0)
    row = {"layer": pd.NA, "score": score, "unit": unit} | counts | {"test": "", "effect": "not tested"} | blank
    return pd.DataFrame([row | {"null": 0.0, "note": ""}]).astype({"layer": "Int64"})


def checked_red_flags(table: pd.DataFrame, score: str, *args: object, **options: object) -> pd.DataFrame:
    """`stats.red_flags` at the layers that a declared test may choose; where they cannot be computed, one row that says why."""
    check: Callable[..., pd.DataFrame] = stats.red_flags
    try:
        return check(above_layer_0(table), score, *args, **options)
    except (StudyError, TableError) as error:
        line = {"flag": "could not be checked", "score": score, "layer": pd.NA, "raised": pd.NA, "why": f"not checked: {error}"}
        return pd.DataFrame([line]).astype({"layer": "Int64", "raised": "boolean"})


def token_level_tests(table: pd.DataFrame, scores: list[str], *args: object, **options: object) -> pd.DataFrame:
    """`stats.guide_tests`; no rows where the question cannot be asked of this table."""
    test: Callable[..., pd.DataFrame] = stats.guide_tests
    try:
        return test(table, scores, *args, **options)
    except TableError:
        return pd.DataFrame(columns=["layer", "score", "question", *_GUIDE])


_GUIDE = ("guide_test", "guide_statistic", "guide_r", "guide_p", "guide_reading")


def beside_token_level_tests(findings: pd.DataFrame, guide: pd.DataFrame) -> pd.DataFrame:
    """The findings with the original guide's test of the same question, score and layer, where there is one."""
    answer = findings.copy()
    for at, row in findings.iterrows():
        mine = guide[(guide["score"] == row["score"]) & (guide["layer"] == row["layer"]) & (guide["question"] == row["question"])]
        for name in _GUIDE:
            answer.loc[at, name] = mine[name].iloc[0] if len(mine) else None
    return answer
