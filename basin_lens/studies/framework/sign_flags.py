"""A red flag of studies whose tests choose a layer: a finding that holds at one layer, where another layer says the opposite."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from basin_lens import stats
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.framework.declared_tests import ALPHA, ONE_SIDED
from basin_lens.studies.framework.spec import DeclaredTest
from basin_lens.studies.framework.table_parts import above_layer_0, named_rows
from basin_lens.studies.framework.units import Units

SIGN = "sign changes over layers"


def signs_over_layers(tests: Sequence[DeclaredTest], findings: pd.DataFrame, table: pd.DataFrame, measured: Units) -> pd.DataFrame:
    """For every finding that holds at a layer of its choice: whether it is on both sides of its null over the layers.

    A layer counts with a two-sided p of at most 0.05 after Benjamini-Hochberg over the layers, on all units.
    """
    table = above_layer_0(table)
    held = {row.question: row for row in named_rows(findings) if row.holds}
    rows = []
    for one in tests:
        if one.over_layers or one.question not in held or table["layer"].nunique() < 2:
            continue
        every = attempt(partial(_of, one), table, one.score, unit=measured.unit)
        p = every["p"].to_numpy(float)
        one_sided = every["test"].astype(str).str.endswith(ONE_SIDED).to_numpy()
        every = stats.correct(every.assign(p=np.where(one_sided, 2 * np.minimum(p, 1 - p), p)), "bh")
        away = every["estimate"] - every["null"].fillna(0.0)
        sure = every["p_corrected"] <= ALPHA
        above, below = (every[sure & (sign * away > 0)]["layer"].astype(int).tolist() for sign in (1, -1))
        rows.append(
            {
                "flag": SIGN,
                "score": one.score,
                "layer": pd.NA,
                "raised": bool(above and below),
                "why": f"above its null at layers {_listed(above)}, below at {_listed(below)} (p at most 0.05 after correction)",
                "question": one.question,
            }
        )
    found = pd.DataFrame(rows, columns=["flag", "score", "layer", "raised", "why", "question"])
    return found.astype({"layer": "Int64", "raised": "boolean"})


def _of(one: DeclaredTest, part: pd.DataFrame, *_: object, **__: object) -> pd.DataFrame:
    return one.test(part)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) if layers else "none"
