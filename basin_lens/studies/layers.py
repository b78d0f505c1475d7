"""How every score moves over depth, and where it owes anything to the nearest neighbors."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from basin_lens import stats, tables
from basin_lens.studies.framework import base
from basin_lens.studies.framework.contrasts import contrast_section
from basin_lens.studies.framework.display_columns import shown
from basin_lens.studies.framework.measurement import SCORES, Measured, ready
from basin_lens.views import Section, forest, layer_curve, layer_view, position_map, result_curve

CONTROLS = ("compression_random", "compression_radius_matched")
ABOVE = tuple(f"above{name.removeprefix('compression')}" for name in CONTROLS)
_SPLITS = 200  # random halvings of the documents behind the agreement between halves

HYPOTHESIS = (
    "Declared before looking: the neighborhoods of nearest neighbors are compressed more than sets of as many random "
    "points (compression above compression_random) at some layer, and more than equally tight neighborhoods of other "
    "tokens (compression_radius_matched) at some layer. Tested over documents, the layer (not 0, where a state is its "
    f"token alone) chosen on half of them and tested on the others, as one family (Holm). {base.IF_FEW}"
)


def study_layers(model: Any, data: Any, *, progress: bool = True, **options: Any) -> base.Study:
    """Follow every score over depth, beside its controls, and ask whether two halves of the documents tell the same story.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, or a `Measured` for the study `"layers"`.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`, with texts; `layers="all"` for every layer.

    Returns:
        a `Study` with tables `summary` (means, intervals, reliabilities by layer), `controls` (compression less its controls by layer,
        max-|t| over layers), `halves` (agreement of the curves of two halves of the documents, by score), and `contrast` if one was asked for.

    Raises:
        StudyError: too few documents, or options together with a `Measured`. Others as for `analyze`.

    Source: design of basin_lens, "Controls printed beside a result".

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> study = bl.studies.study_layers(model, list(reference_passages()), layers=[5], max_sequences=8, max_length=48, progress=False)
        >>> sorted(study.tables)
        ['controls', 'halves', 'summary']
    """
    measured = ready(model, data, "layers", progress, options)
    with base.steps("study layers", 5, progress) as step:
        return _study(measured, step)


def _study(measured: Measured, step: base.Steps) -> base.Study:
    step("curves")
    table = measured.table.copy()
    for name, control in zip(ABOVE, CONTROLS, strict=True):
        table[name] = table["compression"] - table[control]
    known = tables.columns(measured.table)
    table = tables.with_columns(table, dict.fromkeys(ABOVE, known["compression"]))
    scores = [name for name, column in known.items() if column.analyzer not in _NOT_SCORES]
    summary = tables.layer_summary(table, [*scores, *ABOVE])

    step("controls")
    shared: dict[str, Any] = {"unit": measured.unit, "seed": measured.seed}
    against = base.attempt(stats.before_after, table, list(ABOVE), correction="max-t", **shared)

    step("halves")
    agreement = halves_agree(table, scores, measured)

    step("declared tests and red flags")
    rows = [
        base.declared(table, base.one_sided(partial(stats.before_after, on=name, **shared)), measured, finding, name, name)
        for name, finding in zip(ABOVE, _FINDINGS, strict=True)
    ]
    findings = base.settle("layers", rows)
    flags = pd.concat([base.red_flags(table, name, **shared).assign(question=name) for name in ABOVE], ignore_index=True)

    step("figures")
    layer = int(findings["layer"].iloc[0])
    sections, figures = _sections(table, measured, summary, against, agreement, layer)
    held: dict[str, pd.DataFrame] = {"summary": summary, "controls": against, "halves": agreement}
    if measured.contrast is not None:
        section, found, figure = contrast_section(table, [*SCORES, *ABOVE], measured)
        sections.append(section)
        held["contrast"], figures["contrast-by-layer"] = found, figure
    decision = base.decide(findings, flags)
    return base.Study(
        name="layers",
        title="How does compression move over depth?",
        about=tuple(base.about(measured)),
        hypothesis=HYPOTHESIS,
        decision=decision,
        verdict=tuple(_verdict(decision, findings, summary, against, agreement)),
        findings=findings,
        flags=flags,
        not_tested=_not_tested(measured),
        sections=tuple(sections),
        tables=held,
        figures=figures,
        provenance=base.provenance(measured),
        tokens=measured.table,
    )


_FINDINGS = ("more than random neighbors", "more than equally tight neighborhoods")
# What a reader needs beside scores, not scores of the block; attention and gradients have their own study.
_NOT_SCORES = frozenset({
    "AttentionReceived", "AttentionRollout", "Control", "Erasure", "GradientNorm", "GradientTimesActivation", "IntegratedGradients",
        "Neighborhood",
    "StateNorm", "Surprisal", "ValueWeightedAttention",
})  # fmt: skip


def halves_agree(table: pd.DataFrame, scores: list[str], measured: Measured) -> pd.DataFrame:
    """Whether two halves of the units draw the same curve over depth: one row per score.

    Units are halved at random many times; each half's mean curve is correlated with the other's over layers (Spearman). `estimate` is the
    median over halvings, `low` and `high` the middle 95 % of them: a spread, not a confidence interval.
    """
    keys = base.unit_keys(measured.unit)
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
        lines.append({
            "score": name, "estimate": middle[1], "low": middle[0], "high": middle[2], "largest_difference": float(np.median(apart)),
            "n_layers": len(wide.columns), "n_units": len(wide), "n_halvings": _SPLITS, "unit": measured.unit,
            "effect": "Spearman correlation over layers of the curves of two halves", "null": 0.0,
        })  # fmt: skip
    return pd.DataFrame(lines)


def _sections(
    table: pd.DataFrame, measured: Measured, summary: pd.DataFrame, against: pd.DataFrame, agreement: pd.DataFrame, layer: int
) -> tuple[list[Section], dict[str, Figure]]:
    figures = {
        "compression-and-controls": layer_curve(table, ["compression", *CONTROLS]),
        "above-controls-by-layer": result_curve(base.inner(against), by="score"),
        "scores-in-nats": layer_curve(
            table, [name for name in ("compression", "compression_other_token", "contraction") if name in table]
        ),
        "halves-agree": forest(agreement, "score", title="Agreement over layers of the curves of two halves of the documents"),
        "compression-by-position": position_map(table, "compression"),
    }
    columns = ["layer", "n_documents", "n_sequences", "n_tokens"]
    for name in ("compression", "compression_other_token", "contraction", *CONTROLS):
        columns += [c for c in (f"{name}_mean", f"{name}_low", f"{name}_high", f"{name}_reliability") if c in summary]
    rest = [c for c in summary.columns if c.endswith("_mean") and c not in columns]
    view = layer_view(measured.table, ["compression", "contraction", "compression_other_token"], seq=int(table["seq"].min()))
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
        Section(
            "Do halves of the documents agree?",
            f"Documents halved at random {_SPLITS} times; the mean curves of both halves correlated over layers "
            "(Spearman). A score that is noise over depth agrees at 0.",
            figure=figures["halves-agree"],
            caption="Median over halvings and their middle 95 %, which is a spread, not a confidence interval.",
            table=agreement,
        ),
        Section(
            "By position",
            "Compression over layers and positions.",
            figure=figures["compression-by-position"],
            caption="Mean over documents.",
        ),
        Section("One text, all layers", f"The first sequence; layer {layer} is where the declared test was made.", view=view),
    ], figures


def _verdict(
    decision: base.Decision, findings: pd.DataFrame, summary: pd.DataFrame, against: pd.DataFrame, agreement: pd.DataFrame
) -> list[str]:
    opening = base.opening(
        decision,
        "Nearest neighbors are compressed more than the controls at some layer.",
        "Nearest neighbors are not compressed more than the controls here.",
    )
    told = [opening, *(base.sentence(row) for row in base.rows(findings))]
    if decision == "no" and (findings["estimate"] < 0).all():
        told.append("The differences run the other way: the nearest neighbors are compressed less than the controls (see below).")
    for name, control in zip(ABOVE, CONTROLS, strict=True):
        mine = against[against["score"] == name]
        more, less = (
            mine[(mine["p_corrected"] <= base.ALPHA) & (sign * mine["estimate"] > 0)]["layer"].tolist() for sign in (1, -1)
        )
        told.append(
            f"Against {control}: more at layers {more or 'none'}, less at {less or 'none'} of {mine['layer'].tolist()} "
            "(max-|t| over layers and controls)."
        )
    lowest = summary["compression_reliability"].min() if "compression_reliability" in summary else float("nan")
    told.append(
        f"Mean compression runs from {summary['compression_mean'].min():+.3f} to "
        f"{summary['compression_mean'].max():+.3f} nats; its lowest split-half reliability over tokens is {lowest:.2f}.")  # fmt: skip
    own = agreement[agreement["score"] == "compression"].iloc[0]
    told.append(
        f"Curves of two halves of the documents agree at {own['estimate']:.2f} (Spearman over {int(own['n_layers'])} "
        f"layers, median of {_SPLITS} halvings)."
    )
    return told


def _not_tested(measured: Measured) -> tuple[str, ...]:
    said = [
        "The Jacobian contrast and the centroid effect (analyzers JacobianGain, CentroidEffect): a pass per token each.",
        "A global affine fit of the block, shuffled tokens and a random twin as controls over all layers (bl.controls; "
        "study robustness has the twin).",
        f"Layers other than {', '.join(map(str, measured.layers))}; other k, metrics and contexts (study robustness).",
    ]
    if measured.contrast is None:
        said.append("Any contrast of spans or labels: none was asked for.")
    return tuple(said)
