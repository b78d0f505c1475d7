"""Analyzers of the caller's own in whatever study: measured in its run, shown beside the headline score, in no declared test."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from basin_lens import tables
from basin_lens.analyzers.control import NULLS
from basin_lens.studies.framework.contrast_report import contrast_section
from basin_lens.studies.framework.measured_texts import HEADLINE, Measured
from basin_lens.studies.framework.spec import Presentation
from basin_lens.views import Section, layer_curve


def with_own_analyzers(measured: Measured, shown: Presentation) -> Presentation:
    """A study's presentation with what the caller's own analyzers measured: units and ranges, curves over depth with their nulls,
    and the contrast asked for. Exploration: corrected apart from the study's own results, and no part of its verdict."""
    if not measured.own:
        return shown
    columns = {column.name: column for one in measured.own for column in one.columns}
    beside = [HEADLINE] if HEADLINE in measured.table else []
    nulls = {name: [null for null in (f"{name}_{choice}" for choice in NULLS) if null in measured.table] for name in columns}
    every = [*beside, *dict.fromkeys(each for name in columns for each in (name, *nulls[name]) if each not in beside)]
    summary = tables.layer_summary(measured.table, every)
    sections, figures = [_declared(measured, summary)], dict(shown.figures)
    for place, unit in enumerate(dict.fromkeys(column.unit for column in columns.values())):
        mine = [name for name, column in columns.items() if column.unit == unit and name not in beside]
        if not mine:
            continue
        same_unit = [name for name in beside if tables.columns(measured.table)[name].unit == unit]
        drawn = [*same_unit, *(each for name in mine for each in (name, *nulls[name]))]
        figures[f"own-analyzers-{place + 1}"] = figure = layer_curve(measured.table, drawn)
        means = [column for name in (*beside, *drawn) for column in (f"{name}_mean", f"{name}_low", f"{name}_high")]
        sections.append(
            Section(
                f"Your analyzers over depth [{unit}]",
                "Beside the headline score, and beside the same on random points and on an equally tight set elsewhere where a "
                "score looks at its neighbors' images.",
                figure=figure,
                caption="Mean over documents with 95 % intervals.",
                table=summary[["layer", *dict.fromkeys(means)]],
            )
        )
    found = {"own_analyzers": summary}
    if measured.contrast is not None:
        section, found["own_contrast"], figures["own-contrast-by-layer"] = contrast_section(measured.table, list(columns), measured)
        sections.append(replace(section, title=f"Your analyzers. {section.title}"))
    return replace(shown, sections=(*shown.sections, *sections), figures=figures, tables={**shown.tables, **found})


def _declared(measured: Measured, summary: pd.DataFrame) -> Section:
    """What the analyzers declare, and of how many tokens there is a value."""
    lines: list[dict[str, object]] = [
        {
            "score": column.name,
            "unit": column.unit,
            "low": column.low,
            "high": column.high,
            "rows": one.rows,
            "analyzer": one.key,
            "share without a value": float(summary[f"{column.name}_nan"].mean()),
        }
        for one in measured.own
        for column in one.columns
    ]
    return Section("Your analyzers", _exploration([one.called for one in measured.own]), table=pd.DataFrame(lines))


def _exploration(names: Sequence[str]) -> str:
    return (
        f"{', '.join(names)}: measured in the same run. Exploration: no declared test is of them, the verdict and its red flags "
        "say nothing of them, and what is found here is to be tested on other texts."
    )
