"""Do two kinds of tokens, or of texts, differ in compression? The contrast that was asked for, declared, tested and judged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from basin_lens import stats, tables
from basin_lens.errors import StudyError
from basin_lens.model import HookedModel
from basin_lens.studies.framework import contrast_flags
from basin_lens.studies.framework.another_bank import OWN_BANK, under_another_bank
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.framework.contrast import Contrast
from basin_lens.studies.framework.contrast_flags import inseparable_controls, spans_beyond, without_scores
from basin_lens.studies.framework.contrast_report import is_paired
from basin_lens.studies.framework.declared_tests import IF_FEW
from basin_lens.studies.framework.display_columns import shown
from basin_lens.studies.framework.measured_texts import HEADLINE, Measured, StudyData
from basin_lens.studies.framework.runner import run_study
from basin_lens.studies.framework.spec import Analysis, Check, DeclaredTest, Presentation, Results, StudySpec, Task, option
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import Row, above_layer_0, named_rows, sequence_shown
from basin_lens.studies.framework.wording import in_words, layers_said
from basin_lens.values import units_said
from basin_lens.views import Section, result_curve, token_view

DIFFERENCE, CONTROLLED = "difference", "difference at fixed controls"

HYPOTHESIS = (
    "Declared before looking: the two kinds of tokens (or texts) differ in compression less that of random sets (either "
    "direction); and still do at fixed frequency, position, norm, neighborhood radius, share of equal tokens and surprisal, as far "
    "as these can be told apart from the kinds: a control whose values in the two kinds hardly overlap is left out, and named. "
    "Each is tested at the layer (not 0) chosen on half of the units, on the other half, as one family (Holm). Kinds that stand "
    f"in the same texts are compared within them. {IF_FEW}"
)


@dataclass(frozen=True)
class ContrastOptions:
    """Of `contrast`. `other_bank`: measure the difference under the other bank, too."""

    other_bank: bool = option(True, "Measure again with the other bank, to see whether the sign depends on it.")


@dataclass(frozen=True)
class _Details:
    paired: bool
    inseparable: dict[str, str]
    by_bank: pd.DataFrame
    no_other: str  # why there is no other bank


def contrast(
    model: HookedModel,
    data: StudyData,
    by: str | Contrast | None = None,
    *,
    other_bank: bool = True,
    progress: bool = True,
    **options: object,
) -> Study:
    """Ask whether two kinds of tokens, or of texts, differ in compression: a declared test, verdict, red flags and figure.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: prompts or texts as for `analyze`, or a `Measured` for the study `"contrast"`.
        by: `"span:IO,S2"` for two spans of the prompts, `"LABEL:VALUE,VALUE"` for two kinds of texts, or a `Contrast`; the
            difference is first less second. None with a `Measured`, which has it.
        other_bank: measure again with the other bank (the built-in passages, or the texts themselves where these were the bank): a
            difference whose sign depends on the bank gets a red flag.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`: `unit` (what is independent: `"document"`, or a label such as `"template"`),
            `layers`, `bank`, `exclude`, `k`, `compression_tokens`, `seed`, ...

    Returns:
        a `Study` with tables `by_bank` (the difference at every layer under each bank, in nats), `controls` (which can be told
        apart from the kinds) and `contrast` (all scores, without and with the standard controls).

    Raises:
        StudyError: fewer than 6 units, a side without tokens, or options together with a `Measured`. Others as for `analyze`.

    Warns:
        BankWarning: see `analyze`.

    Source: design of basin_lens, "Statistics"; prompts as in Wang et al. 2022 (IOI).

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> names = ["Mary", "John", "Anna", "Paul", "Kate", "Mark", "Lucy", "Adam"]
        >>> prompts = [
        ...     bl.Passage.marked(f"When [IO:{a}] and [S1:{b}] went to the store, [S2:{b}] gave a drink to")
        ...     for a, b in zip(names, names[1:] + names[:1])]
        >>> study = bl.contrast(model, prompts, "span:IO,S2", layers=[18], bank="reference", other_bank=False, progress=False)
        >>> sorted(study.tables)
        ['by_bank', 'contrast', 'controls']
    """
    if by is not None:
        options["contrast"] = Contrast.named(by) if isinstance(by, str) else by
    return run_study(SPEC, model, data, ContrastOptions(other_bank), progress=progress, measure_options=options)


def _difference(table: pd.DataFrame, measured: Measured, paired: bool, controls: Sequence[str] = ()) -> pd.DataFrame:
    """First less second at each layer; one at which too few tokens have a score takes none of the others with it.

    In a bank of a dozen prompts, few tokens have neighbors enough where they enter layer 0.
    """
    assert measured.contrast is not None
    parts = [
        attempt(
            stats.compare_groups,
            part,
            HEADLINE,
            "contrast",
            groups=(measured.contrast.first, measured.contrast.second),
            paired=paired,
            controls=controls,
            frequency=measured.frequency,
            unit=measured.unit,
            correction="none",
            seed=measured.seed,
        )
        for part in (tables.select(table, table["layer"] == layer) for layer in sorted(table["layer"].unique().tolist()))
    ]
    found = pd.concat(parts, ignore_index=True)
    if len(why := set(found["note"])) == 1 and found["p"].isna().all():
        raise StudyError(str(why.pop()).removeprefix("not tested: "))
    return stats.correct(found, "bh")


def _analysis(task: Task) -> Analysis:
    measured, table, own = task.measured, task.measured.table, task.own(ContrastOptions)
    assert measured.contrast is not None
    paired = is_paired(table)
    inseparable = inseparable_controls(table, measured, paired)
    kept = [name for name in stats.CONTROLS if name not in inseparable]
    first, second = measured.contrast.first, measured.contrast.second
    tests = [DeclaredTest(f"{first} differs from {second}", DIFFERENCE, partial(_difference, measured=measured, paired=paired))]
    if kept:
        at_fixed = partial(_difference, measured=measured, paired=paired, controls=kept)
        tests.append(DeclaredTest(f"{first} differs from {second} at fixed {', '.join(kept)}", CONTROLLED, at_fixed))
    task.step("the other bank")
    asked = {OWN_BANK: table}
    no_other = "it was not asked for"
    if own.other_bank:
        other, name, no_other = under_another_bank(task.model, measured)
        if other is not None:
            asked[name] = other
    parts = []
    for name, part in asked.items():
        found = attempt(lambda rows, *_, **__: _difference(rows, measured, paired), part, HEADLINE, unit=measured.unit)
        parts.append(found.assign(bank=name))
    by_bank = pd.concat(parts, ignore_index=True)
    options = {
        "group": "contrast",
        "groups": (first, second),
        "paired": paired,
        "frequency": measured.frequency,
        "controls": tuple(kept),
    }
    return Analysis(
        table=table,
        tests=tests,
        red_flags=[Check(DIFFERENCE, HEADLINE, (), options)],
        tokens=table,
        rows="tokens",
        tables={"by_bank": by_bank, "controls": _controls(inseparable)},
        details=_Details(paired, inseparable, by_bank, no_other),
    )


def _controls(inseparable: dict[str, str]) -> pd.DataFrame:
    """Each standard control: whether it can be told apart from the kinds, and why not."""
    return pd.DataFrame(
        [{"control": name, "separable": name not in inseparable, "note": inseparable.get(name, "")} for name in stats.CONTROLS]
    )


def _judge(task: Task, analysis: Analysis, results: Results) -> tuple[Analysis, Results]:
    """With the red flags of a contrast beside those of every finding."""
    (row,) = named_rows(results.findings[results.findings["question"] == DIFFERENCE])
    layer = None if pd.isna(row.layer) else int(row.layer)
    raised = [
        *([] if layer is None else contrast_flags.of_layer(task.measured, analysis.tables["by_bank"], layer)),
        *contrast_flags.of_run(task.measured),
    ]
    ours = pd.DataFrame([{"score": HEADLINE, "question": DIFFERENCE, **line} for line in raised])
    flags = pd.concat([results.flags, ours], ignore_index=True) if results.flags is not None else ours
    flags = flags.astype({"layer": "Int64", "raised": "boolean"})
    return analysis, replace(results, flags=flags)


def _presentation(task: Task, analysis: Analysis, results: Results) -> Presentation:
    measured, details = task.measured, analysis.details
    assert isinstance(details, _Details) and measured.contrast is not None
    (first, *_) = named_rows(results.findings)
    layer = measured.layers[-1] if pd.isna(first.layer) else int(first.layer)
    curves = above_layer_0(details.by_bank)
    figures = {"difference-by-layer": result_curve(curves, by="bank", title=f"{HEADLINE}: {measured.contrast.title}")}
    return Presentation(
        sections=_sections(analysis, measured, figures, layer),
        figures=figures,
        remarks=_remarks(details, first, layer),
        about=(*spans_beyond(measured), *without_scores(measured, layer)),
        not_tested=_not_tested(details, measured),
    )


def _sections(analysis: Analysis, measured: Measured, figures: dict[str, Figure], layer: int) -> list[Section]:
    assert measured.contrast is not None
    details = analysis.details
    assert isinstance(details, _Details)
    how = "within texts" if details.paired else "between whole units"
    given = ", given the bank" if measured.settings.get("partners") == "bank" else ""
    view = token_view(analysis.table, [HEADLINE, "surprisal"], layer, seq=sequence_shown(analysis.table, HEADLINE))
    return [
        Section(
            "The difference, layer by layer, under each bank",
            f"{measured.contrast.first} less {measured.contrast.second}, {how}, without controls. Positive: the block draws the "
            "neighborhood of the first together more. A difference that another bank turns round is one of the bank.",
            figure=figures["difference-by-layer"],
            caption=f"Mean difference in nats with 95 % intervals over {units_said(measured.unit)}{given} (layer 0 in the table); "
            "filled: p at most 0.05 after Benjamini-Hochberg over the layers of a bank.",
            table=shown(details.by_bank, "layer").assign(bank=details.by_bank["bank"]),
        ),
        Section(
            "Which controls can be told apart from the two kinds",
            "A control can be held fixed where both kinds have tokens of the same value. Where they hardly do, in every text, no "
            "statistics tells the two apart: vary the template.",
            table=analysis.tables["controls"],
        ),
        Section("One text", f"A sequence at layer {layer}.", view=view),
    ]


def _remarks(details: _Details, row: Row, layer: int) -> list[str]:
    told = []
    for bank in [name for name in details.by_bank["bank"].unique() if name != OWN_BANK]:
        (other,) = named_rows(details.by_bank[(details.by_bank["bank"] == bank) & (details.by_bank["layer"] == layer)])
        if pd.isna(other.estimate):
            told.append(f"With {bank} as bank, the difference at layer {layer} could not be tested.")
            continue
        sign = "the sign depends on the bank" if other.estimate * row.estimate < 0 else "the same sign"
        if pd.isna(row.estimate):
            sign = "the sign under the run's own bank is not known"
        told.append(
            f"With {bank} as bank, the difference at layer {layer} is {other.estimate:+.3f} nats (p {in_words(other.p)}): {sign}."
        )
    if details.inseparable:
        told.append(
            f"Cannot be told apart from the two kinds in these texts: {', '.join(details.inseparable)}. Vary the template, so that "
            "both kinds have tokens of the same value."
        )
    if pd.notna(row.p_floor) and row.p_floor > 0:
        told.append(f"The smallest p that any data of {int(row.n_units)} units could give is {row.p_floor:.2g}.")
    return told


def _not_tested(details: _Details, measured: Measured) -> list[str]:
    said = SPEC.said(layers=layers_said(measured))
    if details.no_other:
        said.append(f"The other bank: {details.no_other}.")
    return said


SPEC = StudySpec(
    name="contrast",
    title="Do two kinds of tokens differ in compression?",
    question="Do two kinds of tokens (spans of prompts) or of texts differ in compression?",
    hypothesis=HYPOTHESIS,
    tests=("the first kind differs from the second", "the first differs from the second at fixed controls that can be told apart"),
    nulls=(
        "no difference: the two kinds are swapped within whole units (spans of the same texts), or texts are given the other kind",
        "random sets of points in place of neighbors, taken off the score",
    ),
    not_tested=(
        "Whether the model uses the difference: nothing here intervenes.",
        "What cannot be told apart from the kinds, see above.",
        "Layers other than {layers}; other k, metrics and contexts (study robustness).",
    ),
    if_yes="The two differ in compression.",
    if_no="No reliable difference in compression between the two here.",
    options=ContrastOptions,
    analysis=_analysis,
    presentation=_presentation,
    judge=_judge,
    contrasted=True,
    fewest_tokens=4,
    apart=("compression again under the other bank",),
    steps=1,
)
