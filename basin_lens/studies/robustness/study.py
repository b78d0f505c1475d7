"""Which findings survive other settings: k, metric, context, groups, bank, number format, parts of the texts, another model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from basin_lens import stats, tables
from basin_lens.analyzers import Analyzer
from basin_lens.controls import random_twin
from basin_lens.errors import BasinLensError, StudyError, TextError
from basin_lens.model import HookedModel, check_model, full_name, in_dtype
from basin_lens.studies.framework.attempts import empty_finding
from basin_lens.studies.framework.contrast_report import is_paired
from basin_lens.studies.framework.declared_tests import IF_FEW
from basin_lens.studies.framework.measured_texts import HEADLINE, Measured, StudyData
from basin_lens.studies.framework.measurement import spaced_layers
from basin_lens.studies.framework.runner import run_study
from basin_lens.studies.framework.spec import (
    Analysis,
    DeclaredTest,
    Presentation,
    Results,
    ScoreOptions,
    StudySpec,
    Task,
    UnitAndSeed,
    option,
)
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.words import CONTENT, FUNCTION, tagged_tokens, word_table
from basin_lens.studies.robustness.stability import (
    AFFINE,
    SCORE,
    corrected,
    flags_of,
    survival_of,
    untestable,
    verdict_of,
    with_survival,
)
from basin_lens.studies.robustness.variants import (
    QUICK_IMPORTANCE,
    Setting,
    banks,
    other_model,
    parts,
    scores,
    tested_tokens,
    with_frequency,
)
from basin_lens.values import did_you_mean, units_said
from basin_lens.views import Section, forest

TWIN = "random twin of the model"
RANDOM, SURPRISAL = "compression differs from that of random sets", "goes with surprisal"
_FEWEST_SCORED = 6  # tokens of a sequence beyond the controls: few are crossed in each
_KINDS_OF_WORDS = {
    "function words differ from content words": ("function-content", FUNCTION, CONTENT),
    "nouns differ from verbs": ("noun-verb", ("NOUN",), ("VERB",)),
}

HYPOTHESIS = (
    "Declared before looking: each finding that holds at the settings of this run (held-out half of the documents, "
    "Holm over findings) keeps its sign and a p of at most 0.05 (Holm over settings) under every other setting that "
    "leaves enough units for such a p, and is absent from the random twin of the model; what could not be checked "
    f"there does not count as holding. All are of compression less that of random sets. {IF_FEW}"
)


@dataclass(frozen=True)
class Finding:
    """A statement about the column `HEADLINE` of a table, and its test at one layer. `subject`: what is shown together."""

    name: str
    question: str
    test: Callable[[pd.DataFrame], pd.DataFrame]
    subject: str
    layer: int = -1


@dataclass(frozen=True)
class RobustnessOptions:
    """Of `study_robustness`."""

    importance: tuple[str, ...] = option(("gradient_norm_scaled", "attention_received"))
    second_model: HookedModel | None = option(None, "Another model to read the same texts.", model=True)
    dtype: torch.dtype | None = option(torch.bfloat16)


def study_robustness(
    model: HookedModel,
    data: StudyData,
    *,
    importance: str | Sequence[str] = ("gradient_norm_scaled", "attention_received"),
    second_model: HookedModel | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    progress: bool = True,
    **options: object,
) -> Study:
    """Test the main findings again under other settings: one table says which survive.

    The findings, of compression less that of random sets: it is not 0; it goes with surprisal, and with measures of importance,
    beyond the controls; function words differ from content words, and nouns from verbs; and the contrast asked for. Each at the
    layer that half of the documents chose among three (with fewer than 16: all three are tested, p corrected for them). Some
    tokens of one sequence of each document are tested, about 200 in all (at least 16 of a sequence, as far as the run measured
    so many), in the whole bank.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, or a `Measured` for the study `"robustness"`.
        importance: measures of importance, one or several: `"gradient_norm"`, `"gradient_norm_scaled"`, `"attention_received"`, or
            any column measured. Other models are measured too; what they cannot give there (integrated gradients) stays unchecked.
        second_model: another model to read the same texts (layers at the same relative depth). The random twin is always read; it
            and the other number format read the very tokens of the run, token ids too.
        dtype: other number format, on a copy of the model (twice the memory); None: not tried.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`, with texts.

    Returns:
        a `Study` with tables `settings` (every finding under every setting) and `survival` (one row per finding).

    Raises:
        StudyError: too few documents, or options together with a `Measured`. Others as for `analyze`.

    Source: design of basin_lens, "Controls printed beside a result".

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> study = bl.studies.study_robustness(
        ...     model, list(reference_passages()), layers=[5], max_sequences=8, max_length=48, dtype=None, progress=False)
        >>> "survival" in study.tables
        True
    """
    if second_model is not None:
        check_model(second_model)
    measures = [importance] if isinstance(importance, str) else list(importance)
    given = set(data.table.columns) if isinstance(data, Measured) else {c.name for a in QUICK_IMPORTANCE for c in a.columns}
    if not measures or len(set(measures)) < len(measures) or not set(measures) <= given - {"compression", HEADLINE, "surprisal"}:
        meant = "".join(did_you_mean(name, given) for name in measures if isinstance(name, str))
        raise StudyError(
            f"expected measured columns as importance, each once, got {measures}. {meant}Choose among gradient_norm, "
            "gradient_norm_scaled and attention_received (surprisal is a finding already)."
        )
    own = RobustnessOptions(tuple(measures), second_model, dtype)
    return run_study(SPEC, model, data, own, progress=progress, measure_options=options)


@dataclass(frozen=True)
class _Details:
    """What the study needs again after its declared tests. `settings`, `survival`: None until every setting was tested."""

    findings: tuple[Finding, ...]
    untested: list[str]
    settings: pd.DataFrame | None = None
    survival: pd.DataFrame | None = None


def _analyzers(_scoring: ScoreOptions) -> list[Analyzer]:
    return [*QUICK_IMPORTANCE]


def _analysis(task: Task) -> Analysis:
    measured = task.measured
    task.step("findings at the run's own settings")
    untested: list[str] = []
    table, tagged = _tagged(measured, untested)
    # Each setting costs a run: a few layers to choose from, and some tokens of one sequence of each document.
    few = (
        measured.layers if len(measured.layers) < 5 else [measured.layers[i] for i in spaced_layers(len(measured.layers), 5)][1:-1]
    )
    scored = np.tile(tested_tokens(measured), len(measured.layers))
    table = with_frequency(table, measured)
    table = tables.select(table, scored & table["layer"].isin(few))
    findings = _findings(measured, task.own(RobustnessOptions).importance, tagged)
    return Analysis(
        table=table,
        tests=[DeclaredTest(finding.name, finding.question, finding.test) for finding in findings],
        contrast=(),  # the contrast asked for is one of the findings
        details=_Details(tuple(findings), untested),
    )


def _judge(task: Task, analysis: Analysis, results: Results) -> tuple[Analysis, Results]:
    """Every finding again under every setting: one holds that survives them all."""
    details = analysis.details
    assert isinstance(details, _Details)
    findings = tuple(
        replace(finding, layer=int(layer)) for finding, layer in zip(details.findings, results.findings["layer"], strict=True)
    )
    layers = sorted({finding.layer for finding in findings})
    table = analysis.table[analysis.table["layer"].isin(layers)]
    tried = _tried(task, table, layers, details.untested)
    task.step("tests under every setting")
    found = [_tested(finding, setting) for finding in findings for setting in tried]
    settings = corrected(pd.concat(found, ignore_index=True))
    survival = survival_of(settings, results.findings)
    settled = with_survival(results.findings, survival)
    details = replace(details, findings=findings, settings=settings, survival=survival)
    analysis = replace(analysis, details=details, tables={"settings": settings, "survival": survival})
    return analysis, replace(results, findings=settled, flags=flags_of(survival))


def _tried(task: Task, table: pd.DataFrame, layers: list[int], untested: list[str]) -> list[Setting]:
    """The run's own tables, and those of every other setting; why one could not be made goes to `untested`."""
    model, measured, options = task.model, task.measured, task.own(RobustnessOptions)
    tried = [Setting("as run", "own", table), *parts(table, measured)]
    task.step("k, metric, neighbors, context, groups")
    tried += scores(model, measured, table, layers, untested)
    task.step("banks")
    tried += banks(model, measured, table, layers, untested)
    other = partial(other_model, measured=measured, layers=layers, importance=options.importance, untested=untested)
    task.step("number format")
    dtype = options.dtype
    if dtype is None or next(model.parameters()).dtype == dtype:
        untested.append(
            "Other number formats: none was asked for." if dtype is None else f"Number format {dtype}: the model has it already."
        )
    else:
        tried += other(lambda: in_dtype(model, dtype), str(dtype).removeprefix("torch."), "dtype")
    task.step("other models")
    tried += other(lambda: random_twin(model, seed=measured.seed), TWIN, "twin")
    second = options.second_model
    if second is None:
        untested.append("A second trained model: none was given (second_model=).")
    else:
        tried += other(lambda: second, full_name(second), "model")
    return tried


# -- findings -------------------------------------------------------------------------------------------------------------------


def _tagged(measured: Measured, untested: list[str]) -> tuple[pd.DataFrame, bool]:
    """The measured tokens with their words' tags, and whether there are any; why not goes to `untested`."""
    try:
        if measured.capture.passages is None:
            raise TextError("token ids were given, not texts.")
        return tagged_tokens(measured, "auto")[0], True
    except TextError as error:
        untested.append(f"Function against content words, and nouns against verbs: {error}")
        return measured.table, False


def _findings(measured: Measured, importance: Sequence[str], tagged: bool) -> list[Finding]:
    options: UnitAndSeed = {"unit": measured.unit, "seed": measured.seed}

    def above(part: pd.DataFrame) -> pd.DataFrame:
        return stats.before_after(part, HEADLINE, n_resamples=4999, **options)

    def goes_with(other: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
        return lambda part: stats.partial_correlation(part, HEADLINE, other, min_tokens=_FEWEST_SCORED, **options)

    def words_of_kinds(part: pd.DataFrame, first: Sequence[str], second: Sequence[str]) -> pd.DataFrame:
        tables.require(part, "word", "tag")
        words = word_table(part, "mean")
        words["kind"] = words["tag"].map({**dict.fromkeys(first, "first"), **dict.fromkeys(second, "second")})
        return stats.compare_groups(
            words,
            HEADLINE,
            "kind",
            groups=("first", "second"),
            paired=True,
            controls=stats.CONTROLS,
            n_resamples=4999,
            **options,
        )

    answer = [
        Finding(RANDOM, "random", above, "random"),
        Finding(SURPRISAL, "surprisal", goes_with("surprisal"), "surprisal"),
        *(Finding(f"goes with {name}", name, goes_with(name), "importance") for name in importance),
    ]
    if tagged:
        for name, (question, first, second) in _KINDS_OF_WORDS.items():
            test = partial(words_of_kinds, first=first, second=second)
            answer.append(Finding(name, question, test, "words"))
    if measured.contrast is not None:
        sides = (measured.contrast.first, measured.contrast.second)
        paired = is_paired(measured.table)

        def contrasted(part: pd.DataFrame) -> pd.DataFrame:
            return stats.compare_groups(part, HEADLINE, "contrast", groups=sides, paired=paired, n_resamples=4999, **options)

        answer.append(Finding(f"contrast {measured.contrast.title}", "contrast", contrasted, "contrast"))
    return answer


def _tested(finding: Finding, setting: Setting) -> pd.DataFrame:
    """One finding under one setting, at its layer (or the one that stands for it in another model)."""
    layer = finding.layer if setting.at is None else setting.at[finding.layer]
    part = tables.select(setting.table, setting.table["layer"] == layer)
    try:
        if finding.question == "random" and setting.kind == SCORE:
            raise StudyError("expected a score beside that of random sets, got one that has none.")
        if finding.question != "random" and setting.kind == AFFINE:
            raise StudyError("expected a score that differs between tokens, got one that is 0 but for rounding.")
        found = finding.test(part)
    except BasinLensError as error:
        found = empty_finding(HEADLINE, "").assign(note=f"not tested: {error}", layer=layer)
    return found.assign(finding=finding.name, question=finding.question, setting=setting.name, kind=setting.kind)


# -- what a reader sees ---------------------------------------------------------------------------------------------------------


def _presentation(task: Task, analysis: Analysis, results: Results) -> Presentation:
    details = analysis.details
    assert isinstance(details, _Details) and details.settings is not None and details.survival is not None
    sections, figures = _sections(details.findings, details.settings, details.survival, task.measured)
    return Presentation(
        sections=sections,
        figures=figures,
        verdict=verdict_of(results.decision, results.findings, details.survival),
        not_tested=_not_tested(task.measured, details.untested, details.survival),
    )


_COLUMNS = ["setting", "kind", "layer", "estimate", "low", "high", "p", "p_corrected", "survives", "n_units", "n_tokens", "note"]


def _sections(
    findings: Sequence[Finding], settings: pd.DataFrame, survival: pd.DataFrame, measured: Measured
) -> tuple[list[Section], dict[str, Figure]]:
    sections = [
        Section(
            "Which findings survive",
            "Under every setting all documents are tested, those that chose the layer among them. A finding survives a setting "
            "if its sign stays and p is at most 0.05, Holm over the settings; where too few units are left for any p to reach "
            "that, the setting is not testable and does not count. The random twin has learned nothing: there, no finding "
            "should appear, and what could not be checked there does not count as holding. Two rows are shown and do not count: "
            "context affine, in which an affine map fitted to the block takes its place, so that compression is 0 for every token "
            "but for rounding, whatever the finding; and seed_compression, another score, which changes several things at once.",
            table=survival,
        )
    ]
    figures = {}
    for subject in dict.fromkeys(finding.subject for finding in findings):
        held = [finding for finding in findings if finding.subject == subject]
        rows = settings[settings["finding"].isin([finding.name for finding in held])]
        rows = tables.with_provenance(rows, measured.table)
        title = "; ".join(f"{finding.name}, layer {finding.layer}" for finding in held)
        several = len(held) > 1
        figures[f"robustness-{subject}"] = figure = forest(rows, "setting", by="finding" if several else "kind", title=title)
        sections.append(
            Section(
                "; ".join(f"{finding.name} (layer {finding.layer})" for finding in held),
                figure=figure,
                caption=f"95 % intervals over {units_said(measured.unit)}; filled: p at most 0.05, Holm over settings.",
                table=rows[[*(("finding",) if several else ()), *_COLUMNS]],
            )
        )
    return sections, figures


def _not_tested(measured: Measured, untested: list[str], survival: pd.DataFrame) -> list[str]:
    return [
        *untested,
        *untestable(survival),
        *SPEC.said(max_length=measured.settings["max_length"]),
    ]


SPEC = StudySpec(
    name="robustness",
    title="Which findings survive other settings?",
    question="Which findings survive other settings, and a model that has learned nothing?",
    hypothesis=HYPOTHESIS,
    tests=(
        RANDOM,
        SURPRISAL,
        "goes with each measure of importance asked for",
        *_KINDS_OF_WORDS,
        "the contrast, if one was asked for",
    ),
    nulls=(
        "random sets of the bank in place of the neighbors, each around its own centroid",
        f"a {TWIN}, which has learned nothing",
        "an affine map in place of the block (context affine), for which compression is 0",
    ),
    not_tested=(
        "Findings of the other studies that are not among these: agreement with erasure, code length of the next token, tags and "
        "documents of the neighbors.",
        "Each finding at other layers than its own, and in more than one sequence of a document.",
        "Settings in combination: each setting that counts was changed alone.",
        "Other lengths than {max_length} tokens, and other texts.",
    ),
    options=RobustnessOptions,
    analyzers=_analyzers,
    analysis=_analysis,
    judge=_judge,
    presentation=_presentation,
    steps=6,
)
