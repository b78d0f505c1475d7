"""How every score moves over depth, and where it owes anything to the nearest neighbors."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from basin_lens import stats, tables
from basin_lens.analyzers import (
    Analyzer,
    AngularContraction,
    EffectiveRankChange,
    LocalDimension,
    MatrixEntropy,
    NeighborOverlap,
    SymmetricContraction,
    names_of,
)
from basin_lens.model import HookedModel
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.framework.control_scores import sampled_controls
from basin_lens.studies.framework.declared_tests import ALPHA, IF_FEW, one_sided
from basin_lens.studies.framework.display_columns import shown
from basin_lens.studies.framework.measured_texts import SCORES, Measured, StudyData
from basin_lens.studies.framework.runner import run_study
from basin_lens.studies.framework.spec import Analysis, Check, DeclaredTest, Presentation, Results, ScoreOptions, StudySpec, Task
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import above_layer_0
from basin_lens.studies.framework.units import unit_keys
from basin_lens.studies.framework.wording import layers_said
from basin_lens.views import Section, forest, layer_curve, layer_view, position_map, result_curve

CONTROLS = ("compression_random", "compression_radius_matched")
ABOVE = tuple(f"above{name.removeprefix('compression')}" for name in CONTROLS)
_SPLITS = 200  # random halvings of the documents behind the agreement between halves

HYPOTHESIS = (
    "Declared before looking: the neighborhoods of nearest neighbors are compressed more than sets of as many random "
    "points (compression above compression_random) at some layer, and more than equally tight neighborhoods of other "
    "tokens (compression_radius_matched) at some layer. Tested over documents, the layer (not 0, where a state is its "
    f"token alone) chosen on half of them and tested on the others, as one family (Holm). {IF_FEW}"
)


def study_layers(model: HookedModel, data: StudyData, *, progress: bool = True, **options: object) -> Study:
    """Follow every score over depth, beside its controls, and ask whether two halves of the documents tell the same story.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, or a `Measured` for the study `"layers"`.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`, with texts; `layers="all"` for every layer.

    Returns:
        a `Study` with tables `summary` (means, intervals, reliabilities by layer), `controls` (compression less its controls by
        layer, max-|t| over layers), `halves` (agreement of the curves of two halves of the documents, by score), and `contrast` if
        one was asked for.

    Raises:
        StudyError: too few documents, or options together with a `Measured`. Others as for `analyze`.

    Source: design of basin_lens, "Controls printed beside a result".

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> study = bl.studies.study_layers(
        ...     model, list(reference_passages()), layers=[5], max_sequences=8, max_length=48, progress=False)
        >>> sorted(study.tables)
        ['controls', 'halves', 'summary']
    """
    return run_study(SPEC, model, data, progress=progress, measure_options=options)


def _analyzers(scoring: ScoreOptions) -> list[Analyzer]:
    k, exclude = scoring.k, scoring.exclude
    return [
        *sampled_controls(scoring),
        SymmetricContraction(k=k, exclude=exclude),
        AngularContraction(k=k, exclude=exclude, context=scoring.context),
        NeighborOverlap(k=k, exclude=exclude),
        MatrixEntropy(),
        EffectiveRankChange(k=3 * k, exclude=exclude, context="native"),
        LocalDimension(k=2 * k, exclude=exclude),
    ]


def _analysis(task: Task) -> Analysis:
    measured = task.measured
    task.step("curves")
    table = measured.table.copy()
    for name, control in zip(ABOVE, CONTROLS, strict=True):
        table[name] = table["compression"] - table[control]
    known = tables.columns(measured.table)
    table = tables.with_columns(table, dict.fromkeys(ABOVE, known["compression"]))
    scores = [name for name, column in known.items() if column.analyzer not in _NOT_SCORES]
    summary = tables.layer_summary(table, [*scores, *ABOVE])

    task.step("controls")
    against = attempt(stats.before_after, table, list(ABOVE), correction="max-t", **task.unit_and_seed)

    task.step("halves")
    return Analysis(
        table=table,
        tests=[
            DeclaredTest(finding, name, one_sided(partial(stats.before_after, on=name, **task.unit_and_seed)), score=name)
            for name, finding in zip(ABOVE, _FINDINGS, strict=True)
        ],
        red_flags=[Check(name, name) for name in ABOVE],
        contrast=[*SCORES, *ABOVE],
        tokens=measured.table,
        tables={"summary": summary, "controls": against, "halves": halves_agree(table, scores, measured)},
    )


_FINDINGS = ("more than random neighbors", "more than equally tight neighborhoods")
# What a reader needs beside scores, not scores of the block; attention and gradients have their own study.
_NOT_SCORES = names_of("importance", "confound", "control")


def halves_agree(table: pd.DataFrame, scores: list[str], measured: Measured) -> pd.DataFrame:
    """Whether two halves of the units draw the same curve over depth: one row per score.

    Units are halved at random many times; each half's mean curve is correlated with the other's over layers (Spearman). `estimate`
    is the median over halvings, `low` and `high` the middle 95 % of them: a spread, not a confidence interval.
    """
    keys = unit_keys(measured.unit)
    # Copies of one text on both sides would agree.
    table = table[stats.design.texts_once(table, measured.unit).keep]
    by_sequence = table.groupby([*dict.fromkeys(["layer", *keys, "doc", "seq"])], dropna=False)[scores].mean()
    by_unit = by_sequence.groupby(level=["layer", *keys]).mean()
    rng = np.random.default_rng(measured.seed)
    lines = []
    for name in scores:
        wide = by_unit[name].unstack("layer")
        wide = wide.loc[:, wide.notna().any()]
        values = wide.to_numpy()
        found, apart = [], []
        for _ in range(_SPLITS):
            order = rng.permutation(len(values))
            one, other = (np.nanmean(part, 0) for part in (values[order[: len(order) // 2]], values[order[len(order) // 2 :]]))
            apart.append(float(np.nanmax(np.abs(one - other))) if len(one) else np.nan)
            both = np.isfinite(one) & np.isfinite(other)
            if both.sum() >= 3 and np.ptp(one[both]) > 0 and np.ptp(other[both]) > 0:
                found.append(float(pd.Series(one[both]).corr(pd.Series(other[both]), method="spearman")))
        middle = np.quantile(found, [0.025, 0.5, 0.975]) if found else np.full(3, np.nan)
        lines.append(
            {
                "score": name,
                "estimate": middle[1],
                "low": middle[0],
                "high": middle[2],
                "largest_difference": float(np.median(apart)),
                "n_layers": len(wide.columns),
                "n_units": len(wide),
                "n_halvings": _SPLITS,
                "unit": measured.unit,
                "effect": "Spearman correlation over layers of the curves of two halves",
                "null": 0.0,
            }
        )
    return pd.DataFrame(lines)


def _presentation(task: Task, analysis: Analysis, results: Results) -> Presentation:
    layer = int(results.findings["layer"].iloc[0])
    figures = _figures(analysis)
    return Presentation(
        sections=[*_curve_sections(analysis, figures), *_agreement_sections(task.measured, analysis, figures, layer)],
        figures=figures,
        remarks=_remarks(results, analysis),
        not_tested=SPEC.said(layers=layers_said(task.measured)),
    )


def _figures(analysis: Analysis) -> dict[str, Figure]:
    table, against, agreement = analysis.table, analysis.tables["controls"], analysis.tables["halves"]
    in_nats = [name for name in ("compression", "compression_other_token", "contraction") if name in table]
    return {
        "compression-and-controls": layer_curve(table, ["compression", *CONTROLS]),
        "above-controls-by-layer": result_curve(above_layer_0(against), by="score"),
        "scores-in-nats": layer_curve(table, in_nats),
        "halves-agree": forest(agreement, "score", title="Agreement over layers of the curves of two halves of the documents"),
        "compression-by-position": position_map(table, "compression"),
    }


def _curve_sections(analysis: Analysis, figures: Mapping[str, Figure]) -> list[Section]:
    summary, against = analysis.tables["summary"], analysis.tables["controls"]
    columns = ["layer", "n_documents", "n_sequences", "n_tokens"]
    for name in ("compression", "compression_other_token", "contraction", *CONTROLS):
        columns += [c for c in (f"{name}_mean", f"{name}_low", f"{name}_high", f"{name}_reliability") if c in summary]
    rest = [c for c in summary.columns if c.endswith("_mean") and c not in columns]
    return [
        Section(
            "Compression beside its controls",
            "The headline score, the same on random points, and on the neighbors of another token whose neighborhood "
            "is just as tight. What the score gives there it does not owe to this neighborhood.",
            figure=figures["compression-and-controls"],
            caption="Mean over documents with 95 % intervals.",
            table=summary[columns],
        ),
        Section(
            "Which layers differ from the controls",
            "Compression less each control, token by token.",
            figure=figures["above-controls-by-layer"],
            caption="Mean difference with 95 % intervals over documents (layer 0 in the table); filled: p at most 0.05 by "
            "max-|t| over all layers and both controls.",
            table=shown(against, "layer", "score", "n_documents"),
        ),
        Section(
            "Every score over depth",
            "The scores that are in nats, then the means of all others.",
            figure=figures["scores-in-nats"],
            caption="Mean over documents with 95 % intervals.",
            table=summary[["layer", *rest]],
        ),
    ]


def _agreement_sections(measured: Measured, analysis: Analysis, figures: Mapping[str, Figure], layer: int) -> list[Section]:
    first = int(analysis.table["seq"].min())
    view = layer_view(measured.table, ["compression", "contraction", "compression_other_token"], seq=first)
    return [
        Section(
            "Do halves of the documents agree?",
            f"Documents halved at random {_SPLITS} times; the mean curves of both halves correlated over layers "
            "(Spearman). A score that is noise over depth agrees at 0.",
            figure=figures["halves-agree"],
            caption="Median over halvings and their middle 95 %, which is a spread, not a confidence interval.",
            table=analysis.tables["halves"],
        ),
        Section(
            "By position",
            "Compression over layers and positions.",
            figure=figures["compression-by-position"],
            caption="Mean over documents.",
        ),
        Section("One text, all layers", f"The first sequence; layer {layer} is where the declared test was made.", view=view),
    ]


def _remarks(results: Results, analysis: Analysis) -> list[str]:
    findings, summary = results.findings, analysis.tables["summary"]
    against, agreement = analysis.tables["controls"], analysis.tables["halves"]
    told = []
    if results.decision == "no" and (findings["estimate"] < 0).all():
        told.append("The differences run the other way: the nearest neighbors are compressed less than the controls (see below).")
    for name, control in zip(ABOVE, CONTROLS, strict=True):
        mine = against[against["score"] == name]
        more, less = (mine[(mine["p_corrected"] <= ALPHA) & (sign * mine["estimate"] > 0)]["layer"].tolist() for sign in (1, -1))
        told.append(
            f"Against {control}: more at layers {more or 'none'}, less at {less or 'none'} of {mine['layer'].tolist()} "
            "(max-|t| over layers and controls)."
        )
    lowest = summary["compression_reliability"].min() if "compression_reliability" in summary else float("nan")
    told.append(
        f"Mean compression runs from {summary['compression_mean'].min():+.3f} to "
        f"{summary['compression_mean'].max():+.3f} nats; its lowest split-half reliability over tokens is {lowest:.2f}."
    )
    own = agreement[agreement["score"] == "compression"].iloc[0]
    told.append(
        f"Curves of two halves of the documents agree at {own['estimate']:.2f} (Spearman over {int(own['n_layers'])} "
        f"layers, median of {_SPLITS} halvings)."
    )
    return told


SPEC = StudySpec(
    name="layers",
    title="How does compression move over depth?",
    question="How do scores move over depth, and where do they beat their controls?",
    hypothesis=HYPOTHESIS,
    tests=_FINDINGS,
    nulls=(
        f"random points in place of the nearest neighbors ({CONTROLS[0]})",
        f"the neighbors of another token whose neighborhood is just as tight ({CONTROLS[1]})",
    ),
    not_tested=(
        "The Jacobian contrast and the centroid effect (analyzers JacobianGain, CentroidEffect): a pass per token each.",
        "A global affine fit of the block, shuffled tokens and a random twin as controls over all layers (bl.controls; "
        "study robustness has the twin).",
        "Layers other than {layers}; other k, metrics and contexts (study robustness).",
    ),
    if_yes="Nearest neighbors are compressed more than the controls at some layer.",
    if_no="Nearest neighbors are not compressed more than the controls here.",
    analyzers=_analyzers,
    analysis=_analysis,
    presentation=_presentation,
    steps=3,
)
