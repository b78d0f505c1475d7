"""Does compression go with how far into a text a token stands? A whole study in one file, to begin a new one from."""

from dataclasses import dataclass
from functools import partial

from basin_lens import stats
from basin_lens.model import HookedModel
from basin_lens.studies.framework.declared_tests import IF_FEW
from basin_lens.studies.framework.measured_texts import StudyData
from basin_lens.studies.framework.runner import run_study
from basin_lens.studies.framework.spec import Analysis, Check, DeclaredTest, Presentation, Results, StudySpec, Task, option
from basin_lens.studies.framework.study import Study
from basin_lens.views import Section, result_curve


@dataclass(frozen=True)
class PositionOptions:
    """Of `study_positions`."""

    fewest: int = option(10, "Fewest scored tokens of a sequence that counts.")


def analysis(task: Task) -> Analysis:
    """What is computed, and what the framework is to test."""
    test = partial(stats.within_sequence_correlation, min_tokens=task.own(PositionOptions).fewest, **task.unit_and_seed)
    return Analysis(
        table=task.measured.table,
        tests=[DeclaredTest(SPEC.tests[0], "pos", partial(test, scores="compression", against="pos"))],
        red_flags=[Check("pos", "compression", ("pos",), {"controls": ["surprisal"]})],
        tables={"by_layer": test(task.measured.table, "compression", "pos")},
    )


def presentation(task: Task, analysis: Analysis, results: Results) -> Presentation:
    """What a reader sees."""
    table, layer = analysis.tables["by_layer"], results.findings["layer"].iloc[0]
    caption, figure = f"Mean over documents; the declared test was made at layer {layer}.", result_curve(table)
    section = Section("Layer by layer", figure=figure, caption=caption, table=table)
    return Presentation([section], {"by-layer": figure}, SPEC.said(most=task.measured.settings["max_length"]))


SPEC = StudySpec(
    name="positions",
    title="Does compression go with position?",
    question="Does compression go with how far into a text a token stands?",
    hypothesis=f"Declared before looking: among the tokens of one text, compression goes with position (either direction). {IF_FEW}",
    tests=("compression goes with position",),
    nulls=("no correlation within sequences",),
    if_yes="Compression goes with position.",
    if_no="Compression says nothing reliable about position here.",
    not_tested=("Texts longer than {most} tokens.",),
    options=PositionOptions,
    analysis=analysis,
    presentation=presentation,
)


def study_positions(model: HookedModel, data: StudyData, *, fewest: int = 10, **options: object) -> Study:
    """Correlate compression with position within sequences. `options`: of `basin_lens.studies.measure`."""
    return run_study(SPEC, model, data, PositionOptions(fewest), measure_options=options)
