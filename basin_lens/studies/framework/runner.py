"""Runs what a `StudySpec` declares: measuring, tests, red flags, contrast, verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from basin_lens.model import HookedModel
from basin_lens.stats.remembering import sharing
from basin_lens.studies.framework.attempts import beside_token_level_tests, checked_red_flags, token_level_tests
from basin_lens.studies.framework.contrast_report import contrast_section
from basin_lens.studies.framework.declared_tests import Decision, decide, declared_test, settle
from basin_lens.studies.framework.measured_texts import Measured, StudyData, study_provenance
from basin_lens.studies.framework.own_analyzers import with_own_analyzers
from basin_lens.studies.framework.progress import progress_steps
from basin_lens.studies.framework.sign_flags import signs_over_layers
from basin_lens.studies.framework.spec import Analysis, Declaration, Presentation, Results, StudySpec, Task
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.study_data import ready
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.framework.wording import about_measured, opening, sentence, without_nan
from basin_lens.values import Facts

_SHARED_STEPS = 3  # tests, figures, contrast


@sharing()  # a study asks for many pairs under the same controls, one call each
def run_study(
    spec: StudySpec,
    model: HookedModel,
    data: StudyData,
    own: object = None,
    *,
    progress: bool = True,
    measure_options: Mapping[str, object] | None = None,
) -> Study:
    """Run a study of texts.

    Args:
        spec: the study.
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, a `Measured` for this study, or a finished run with its analyzers (`from_run`).
        own: options of the study's own; None: their defaults.
        progress: show progress bars.
        measure_options: of `measure`, with texts; of `from_run`, with a run.

    Raises:
        StudyError: too few documents, options that do not fit, or options of `measure` together with a `Measured`. Others as for
            `analyze`.
    """
    own = spec.options() if own is None else own
    given = dict(measure_options or {})
    unit = data.unit if isinstance(data, Measured) else str(given.get("unit", "document"))
    check = None if spec.check is None else spec.check(model, own, unit)
    measured = ready(model, data, spec.name, progress, given, check)
    with progress_steps(f"study {spec.name}", spec.steps + _SHARED_STEPS, progress) as step:
        task = Task(model, measured, own, step, progress)
        analysis = spec.analysis(task)
        step("declared tests and red flags")
        results = _tested(spec, task, analysis)
        if spec.judge is not None:
            analysis, results = spec.judge(task, analysis, results)
            results = replace(results, decision=_decided(analysis, results.findings, results.flags))
        step("figures")
        shown = spec.presentation(task, analysis, results)
        step("contrast")
        shown = with_own_analyzers(measured, _with_contrast(task, analysis, shown))
    about = (*about_measured(measured), *shown.about)
    provenance = {run: {**facts, **shown.facts} for run, facts in study_provenance(measured).items()}
    shown = replace(shown, tables={**analysis.tables, **shown.tables}, verdict=_verdict(spec, analysis, results, shown))
    return make_study(spec, results, shown, about=about, provenance=provenance, tokens=analysis.tokens)


def make_study(
    spec: Declaration,
    results: Results,
    shown: Presentation,
    *,
    about: Sequence[str],
    provenance: Facts,
    tokens: pd.DataFrame | None,
) -> Study:
    """The record of a study that has run, of any kind: all of them are made here."""
    assert shown.verdict is not None
    return Study(
        name=spec.name,
        title=spec.title,
        about=tuple(about),
        hypothesis=spec.hypothesis,
        decision=results.decision,
        verdict=tuple(map(without_nan, shown.verdict)),
        findings=results.findings,
        flags=results.flags,
        not_tested=tuple(shown.not_tested),
        sections=tuple(shown.sections),
        tables=shown.tables,
        figures=shown.figures,
        provenance=provenance,
        tokens=tokens,
    )


def _tested(spec: StudySpec, task: Task, analysis: Analysis) -> Results:
    """Declared tests as one family, the token-level ones beside them, and the red flags."""
    rows = []
    for one in analysis.tests:
        if one.over_layers:
            rows.append(one.test(analysis.table))
        else:
            rows.append(declared_test(analysis.table, one.test, task.measured, one.finding, one.question, one.score))
    findings = settle(spec.name, rows)
    token_level = None
    if analysis.token_level:
        parts = [
            token_level_tests(analysis.table, _listed(one.scores), *one.against, **one.options) for one in analysis.token_level
        ]
        token_level = pd.concat(parts, ignore_index=True)
        findings = beside_token_level_tests(findings, token_level)
    flags = None
    if analysis.red_flags:
        raised = [
            checked_red_flags(analysis.table, str(one.scores), *one.against, **one.options, **task.unit_and_seed).assign(
                question=one.question
            )
            for one in analysis.red_flags
        ]
        raised.append(signs_over_layers(analysis.tests, findings, analysis.table, task.measured))
        flags = pd.concat([part for part in raised if len(part)], ignore_index=True)
    return Results(findings, flags, _decided(analysis, findings, flags), token_level)


def _listed(scores: str | list[str]) -> list[str]:
    return [scores] if isinstance(scores, str) else scores


def _decided(analysis: Analysis, findings: pd.DataFrame, flags: pd.DataFrame | None) -> Decision:
    beside = [one.question for one in analysis.tests if not one.decides]
    return decide(findings[~findings["question"].isin(beside)], flags)


def _with_contrast(task: Task, analysis: Analysis, shown: Presentation) -> Presentation:
    """With the contrast asked for as the last section; that none was asked for is said, too."""
    if not analysis.contrast:
        return shown
    if task.measured.contrast is None:
        return replace(shown, not_tested=(*shown.not_tested, "Any contrast of spans or labels: none was asked for."))
    section, found, figure = contrast_section(analysis.table, list(analysis.contrast), task.measured)
    return replace(
        shown,
        sections=(*shown.sections, section),
        tables={**shown.tables, "contrast": found},
        figures={**shown.figures, "contrast-by-layer": figure},
    )


def _verdict(spec: StudySpec, analysis: Analysis, results: Results, shown: Presentation) -> Sequence[str]:
    if shown.verdict is not None:
        return shown.verdict
    units = {one.question: one.unit for one in analysis.tests}
    rows = {one.question: "" if one.over_layers else analysis.rows for one in analysis.tests}
    return [
        opening(results.decision, spec.if_yes, spec.if_no),
        *(sentence(row, units.get(row.question, ""), rows.get(row.question, "")) for row in named_rows(results.findings)),
        *shown.remarks,
    ]
