"""Two kinds of tokens or texts compared, in whatever study asks for it."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from basin_lens import stats
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.framework.display_columns import shown
from basin_lens.studies.framework.measured_texts import Measured
from basin_lens.studies.framework.table_parts import above_layer_0
from basin_lens.values import units_said
from basin_lens.views import Section, result_curve


def contrast_section(table: pd.DataFrame, scores: list[str], measured: Measured) -> tuple[Section, pd.DataFrame, Figure]:
    """First less second of the contrast asked for, by score and layer, without and with the standard controls.

    Both sides in the same sequences (spans of one prompt): paired within them. Otherwise whole units are compared.
    """
    assert measured.contrast is not None
    sides = (measured.contrast.first, measured.contrast.second)
    paired = is_paired(table)
    parts = []
    for wording, controls in (("none", ()), ("standard", stats.CONTROLS)):
        for score in scores:
            parts.append(_compared(table, score, sides, paired, controls, measured).assign(control_set=wording))
    found = stats.correct(pd.concat(parts, ignore_index=True), "bh")
    curve = found[found["score"].isin(scores[:2])]
    figure = result_curve(above_layer_0(curve), by=["score", "control_set"], title=measured.contrast.title)
    how = "paired within sequences" if paired else "between whole units"
    section = Section(
        f"Contrast: {measured.contrast.title}",
        f"Difference {sides[0]} - {sides[1]}, {how}, clustered by {measured.unit}; without controls and with the "
        "standard ones. Benjamini-Hochberg over all scores, layers and both control sets.",
        figure=figure,
        caption=f"Mean difference with 95 % intervals over {units_said(measured.unit)}.",
        table=shown(found, "layer", "score", "control_set"),
    )
    return section, found, figure


def is_paired(table: pd.DataFrame) -> bool:
    """Whether some sequence holds both sides."""
    return bool((table.dropna(subset=["contrast"]).groupby(["doc", "seq"])["contrast"].nunique() > 1).any())


def _compared(
    table: pd.DataFrame, score: str, sides: tuple[str, str], paired: bool, controls: Sequence[str], measured: Measured
) -> pd.DataFrame:
    """One score's rows."""
    return attempt(
        stats.compare_groups,
        table,
        score,
        "contrast",
        groups=sides,
        paired=paired,
        controls=controls,
        frequency=measured.frequency,
        unit=measured.unit,
        correction="none",
        n_resamples=1999,
        seed=measured.seed,
    )
