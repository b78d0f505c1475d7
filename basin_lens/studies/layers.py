"""How every score moves over depth, and where compression differs from its nulls."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from scipy.stats import rankdata

from basin_lens import stats, tables
from basin_lens.analyzers import (
    Analyzer,
    AngularContraction,
    Contraction,
    EffectiveRankChange,
    LocalDimension,
    MatrixEntropy,
    NeighborOverlap,
    SymmetricContraction,
    names_of,
)
from basin_lens.analyzers.control import controls_of
from basin_lens.model import HookedModel
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.framework.declared_tests import ALPHA, IF_FEW
from basin_lens.studies.framework.display_columns import shown
from basin_lens.studies.framework.measured_texts import HEADLINE, NULL_TOKENS, SCORES, Measured, StudyData
from basin_lens.studies.framework.random_twin import TWIN, with_random_twin
from basin_lens.studies.framework.runner import run_study
from basin_lens.studies.framework.spec import Analysis, Check, DeclaredTest, Presentation, Results, ScoreOptions, StudySpec, Task
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import Row, above_layer_0, named_rows, sequence_shown
from basin_lens.studies.framework.units import unit_keys
from basin_lens.studies.framework.wording import layers_said, opening, sentence
from basin_lens.views import Section, forest, layer_curve, layer_view, position_map, result_curve

NULLS = ("compression_random_sets", "compression_isotropic")
ABOVE_ISOTROPIC = "compression_above_isotropic"
ABOVE = (HEADLINE, ABOVE_ISOTROPIC)
PARTS = ("compression_place", "compression_directions")
# Of contraction, by another choice of points.
CHOICES = ("contraction_random", "contraction_radius_matched")
_SPLITS = 200  # random halvings of the documents behind the agreement between halves
_AT_ONCE = 10  # of these: of 100,000 units at 30 layers, 120 MB for each half

_FINDINGS = ("compression differs from that of random sets", "compression differs from that of isotropic displacements")

HYPOTHESIS = (
    "Declared before looking: at some layer, compression differs from that of random sets of points, and at some layer from that "
    "of isotropic displacements (random directions of the same lengths at the same place). Either direction: above them is a "
    "basin, differences between a token's neighbors drawn together more at its own place than elsewhere; below them is the "
    "opposite, the block telling apart what is near. Tested over documents, the layer (not 0, where a state is its token alone) "
    f"chosen on half of them and tested on the others, as one family (Holm). {IF_FEW}"
)


def study_layers(model: HookedModel, data: StudyData, *, progress: bool = True, **options: object) -> Study:
    """Follow every score over depth, compression beside its nulls, and ask whether halves of the documents tell the same story.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, or a `Measured` for the study `"layers"`.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`, with texts; `layers="all"` for every layer.

    Returns:
        a `Study` with tables `summary` (means, intervals, reliabilities by layer, the random twin's beside them; how local
        neighborhoods are), `nulls`
        (compression less that of its nulls by layer, max-|t| over layers), `halves` (agreement of the curves of two halves of the
        documents, by score), and `contrast` if one was asked for.

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
        ['halves', 'nulls', 'summary']
    """
    return run_study(SPEC, model, data, progress=progress, measure_options=options)


def _analyzers(scoring: ScoreOptions) -> list[Analyzer]:
    k, exclude = scoring.k, scoring.exclude
    return [
        *controls_of([Contraction(k=k, exclude=exclude, context=scoring.context)], queries=NULL_TOKENS),
        SymmetricContraction(k=k, exclude=exclude),
        AngularContraction(k=k, exclude=exclude, context=scoring.context),
        NeighborOverlap(k=k, exclude=exclude),
        MatrixEntropy(),
        EffectiveRankChange(k=3 * k, exclude=exclude, context="native"),
        LocalDimension(k=2 * k, exclude=exclude),
    ]


def _analysis(task: Task) -> Analysis:
    measured = task.measured
    task.step("random twin")
    table, why = with_random_twin(task.model, measured, with_isotropic(measured.table))
    task.step("curves")
    known = tables.columns(measured.table)
    scores = [name for name, column in known.items() if column.analyzer not in _NOT_SCORES]
    summary = tables.layer_summary(table, [*scores, ABOVE_ISOTROPIC, *(name for name in (TWIN, *CHOICES) if name in table)])
    scored = table["compression"].notna().groupby(table["layer"]).sum()
    summary["compression_tokens"] = summary["layer"].map(scored)

    task.step("nulls")
    against = attempt(stats.before_after, table, list(ABOVE), correction="max-t", **task.unit_and_seed)

    task.step("halves")
    return Analysis(
        table=table,
        tests=[
            DeclaredTest(finding, name, partial(stats.before_after, on=name, **task.unit_and_seed), score=name)
            for name, finding in zip(ABOVE, _FINDINGS, strict=True)
        ],
        red_flags=[Check(name, name) for name in ABOVE],
        contrast=[*SCORES, ABOVE_ISOTROPIC],
        tokens=measured.table,
        tables={"summary": summary, "nulls": against, "halves": halves_agree(table, scores, measured)},
        details=why,
    )


def with_isotropic(table: pd.DataFrame) -> pd.DataFrame:
    """The table with compression less that of isotropic displacements, in nats."""
    answer = table.copy()
    answer[ABOVE_ISOTROPIC] = answer["compression"] - answer["compression_isotropic"]
    return tables.with_columns(answer, {ABOVE_ISOTROPIC: tables.Column("nats")})


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
        wide = wide.loc[:, wide.notna().any()].dropna(how="all")  # units without a token of the sample
        values = wide.to_numpy()
        one, other = _curves_of_halves(values, rng)
        both = np.isfinite(one) & np.isfinite(other)
        apart = np.where(both, np.abs(one - other), -np.inf).max(1, initial=-np.inf)
        found = _correlations(one, other, both)
        middle = np.quantile(found, [0.025, 0.5, 0.975]) if found else np.full(3, np.nan)
        lines.append(
            {
                "score": name,
                "estimate": middle[1],
                "low": middle[0],
                "high": middle[2],
                "largest_difference": float(np.median(np.where(both.any(1), apart, np.nan))),
                "n_layers": len(wide.columns),
                "n_units": len(wide),
                "n_halvings": _SPLITS,
                "unit": measured.unit,
                "effect": "Spearman correlation over layers of the curves of two halves",
                "null": 0.0,
            }
        )
    return pd.DataFrame(lines)


def _curves_of_halves(
    values: Float[np.ndarray, "units layers"], rng: np.random.Generator
) -> tuple[Float[np.ndarray, "splits layers"], Float[np.ndarray, "splits layers"]]:
    """Mean curves of both halves of the units, of all halvings, some at a time."""
    pairs = []
    for first in range(0, _SPLITS, _AT_ONCE):
        orders = np.stack([rng.permutation(len(values)) for _ in range(first, min(first + _AT_ONCE, _SPLITS))])
        pairs.append([_means(values[part]) for part in np.split(orders, [len(values) // 2], axis=1)])
    one, other = (np.concatenate(curves) for curves in zip(*pairs, strict=True))
    return one, other


def _means(values: Float[np.ndarray, "splits units layers"]) -> Float[np.ndarray, "splits layers"]:
    """Means over units; NaN at a layer where none has a value."""
    count = np.isfinite(values).sum(1)
    return np.where(count > 0, np.nansum(values, 1) / np.maximum(count, 1), np.nan)


def _correlations(
    one: Float[np.ndarray, "splits layers"], other: Float[np.ndarray, "splits layers"], both: Bool[np.ndarray, "splits layers"]
) -> list[float]:
    """Spearman correlations over the layers where both curves are, of splits with at least 3 and both curves not flat.

    All splits with the same layers at once: one by one, pandas takes twenty times as long.
    """
    found = []
    for layers in np.unique(both, axis=0):
        here = (both == layers).all(1)
        curves = np.stack([one[here][:, layers], other[here][:, layers]])
        if layers.sum() < 3:
            continue
        varied = (np.ptp(curves, axis=2) > 0).all(0)
        ranks = rankdata(curves[:, varied], axis=2)
        ranks -= (layers.sum() + 1) / 2
        share = 1 / (layers.sum() - 1)
        deviations = np.sqrt((ranks**2).sum(2) * share)
        covariances = (ranks[0] * ranks[1]).sum(1) * share
        found.extend((covariances / deviations[1] / deviations[0]).clip(-1, 1).tolist())
    return found


def _presentation(task: Task, analysis: Analysis, results: Results) -> Presentation:
    layer = int(results.findings["layer"].iloc[0])
    figures = _figures(analysis)
    rows = named_rows(results.findings)
    return Presentation(
        sections=[*_curve_sections(analysis, figures), *_agreement_sections(analysis, figures, layer)],
        figures=figures,
        verdict=[
            opening(results.decision, _direction(results), SPEC.if_no),
            *([_direction(results)] if results.decision.startswith("in part") else []),
            *(sentence(row, rows="tokens") for row in rows),
            *_remarks(analysis),
        ],
        not_tested=[*SPEC.said(layers=layers_said(task.measured)), *([str(analysis.details)] if analysis.details else [])],
    )


def _direction(results: Results) -> str:
    """What the declared tests that hold say, by their sign."""
    held = [row for row in named_rows(results.findings) if row.holds]
    signs = {bool(row.estimate > 0) for row in held}
    if len(signs) > 1:
        return "Compression differs from its nulls, but not in one direction: " + "; ".join(map(_one_direction, held)) + "."
    if signs == {True}:
        where = "more at its own place than elsewhere"
        return f"It is a basin: differences between a token's neighbors are drawn together {where} ({_held_at(held)})."
    return (
        "It is no basin but the opposite: differences between a token's neighbors are drawn together less at its own place than "
        f"elsewhere, the block tells apart what is near ({_held_at(held)})."
    )


def _one_direction(row: Row) -> str:
    return f"{'above' if row.estimate > 0 else 'below'} that of {_named(row)} at layer {int(row.layer)}"


def _held_at(held: Sequence[Row]) -> str:
    return ", ".join(f"{row.estimate:+.3f} nats against {_named(row)} at layer {int(row.layer)}" for row in held)


def _named(row: Row) -> str:
    return "random sets" if row.question == HEADLINE else "isotropic displacements"


def _figures(analysis: Analysis) -> dict[str, Figure]:
    table, against, agreement = analysis.table, analysis.tables["nulls"], analysis.tables["halves"]
    return {
        "compression-and-nulls": layer_curve(table, ["compression", *NULLS, *([TWIN] if TWIN in table else [])]),
        "place-and-directions": layer_curve(table, list(PARTS)),
        "above-nulls-by-layer": result_curve(above_layer_0(against), by="score"),
        "contraction": layer_curve(table, ["contraction", *(name for name in CHOICES if name in table)]),
        "halves-agree": forest(agreement, "score", title="Agreement over layers of the curves of two halves of the documents"),
        "compression-by-position": position_map(table, HEADLINE),
    }


def _curve_sections(analysis: Analysis, figures: Mapping[str, Figure]) -> list[Section]:
    summary, against = analysis.tables["summary"], analysis.tables["nulls"]
    counted = ["layer", "n_documents", "n_sequences", "n_tokens"]
    of_compression = _columns(summary, ("compression", *NULLS, TWIN, *ABOVE))
    of_parts, of_contraction = _columns(summary, PARTS), _columns(summary, ("contraction", *CHOICES))
    used = {*counted, *of_compression, *of_parts, *of_contraction}
    rest = [c for c in summary.columns if c.endswith("_mean") and c not in used]
    scored = [name for name in ("compression_tokens", "compression_local") if name in summary]
    return [
        Section(
            "Compression beside its nulls",
            "Compression, the same of random sets of points, of isotropic displacements, and of the same tokens in a model whose "
            "weights have learned nothing (the random twin, with neighbors of its own). Above them: a basin. Below them: the block "
            "tells apart what is near. compression_local is the median variance of a neighborhood over that of a random set: how "
            "local neighborhoods are; compression_tokens, how many tokens have compression.",
            figure=figures["compression-and-nulls"],
            caption="Mean over documents with 95 % intervals.",
            table=summary[["layer", *scored, *of_compression]],
        ),
        Section(
            "What compression is free of: place and directions",
            "How a block contracts other neighborhoods at a token's place, and its neighbors' differences at other places.",
            figure=figures["place-and-directions"],
            caption="Mean over documents with 95 % intervals.",
            table=summary[["layer", *of_parts]],
        ),
        Section(
            "Which layers differ from the nulls",
            "Compression less each null, token by token.",
            figure=figures["above-nulls-by-layer"],
            caption="Mean difference with 95 % intervals over documents (layer 0 in the table); filled: p at most 0.05 by "
            "max-|t| over all layers and both nulls.",
            table=shown(against, "layer", "score", "n_documents"),
        ),
        Section(
            "Contraction, and every other score over depth",
            "How much a block shrinks neighborhoods at all, beside sets of as many random points, and the neighbors of another "
            "token whose neighborhood is just as tight; then the means of all other scores.",
            figure=figures["contraction"],
            caption="Mean over documents with 95 % intervals.",
            table=summary[[*counted, *of_contraction, *rest]],
        ),
    ]


def _columns(summary: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Of some scores, those of the summary that a reader wants."""
    every = [f"{name}_{what}" for name in names for what in ("mean", "low", "high", "reliability")]
    return [column for column in every if column in summary]


def _agreement_sections(analysis: Analysis, figures: Mapping[str, Figure], layer: int) -> list[Section]:
    table = analysis.table
    view = layer_view(table, [HEADLINE, *PARTS, "contraction"], seq=sequence_shown(table, HEADLINE))
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
            "Compression, less that of random sets, over layers and positions.",
            figure=figures["compression-by-position"],
            caption="Mean over documents.",
        ),
        Section(
            "One text, all layers",
            f"A sequence; tokens without compression were not in its sample. The first declared test was made at layer {layer}.",
            view=view,
        ),
    ]


def _remarks(analysis: Analysis) -> list[str]:
    summary, against, agreement = (analysis.tables[name] for name in ("summary", "nulls", "halves"))
    told = []
    for name, null in zip(ABOVE, NULLS, strict=True):
        mine = against[against["score"] == name]
        above, below = (mine[(mine["p_corrected"] <= ALPHA) & (sign * mine["estimate"] > 0)]["layer"].tolist() for sign in (1, -1))
        told.append(
            f"Against {null}: above it at layers {above or 'none'}, below it at {below or 'none'} of {mine['layer'].tolist()} "
            "(max-|t| over layers and nulls)."
        )
    lowest = summary["compression_reliability"].min() if "compression_reliability" in summary else float("nan")
    told.append(
        f"Mean compression runs from {summary['compression_mean'].min():+.3f} to "
        f"{summary['compression_mean'].max():+.3f} nats; its lowest split-half reliability over tokens is {lowest:.2f}."
    )
    if TWIN in analysis.table:
        of_twin = summary[f"{TWIN}_mean"]
        told.append(f"The random twin's runs from {of_twin.min():+.3f} to {of_twin.max():+.3f} nats.")
    if "compression_local" in summary:
        local = summary["compression_local"]
        told.append(
            f"Neighborhoods have {local.min():.2f} to {local.max():.2f} of the variance of random sets (medians over tokens, by "
            "layer)."
        )
    own = agreement[agreement["score"] == "compression"].iloc[0]
    if pd.isna(own["estimate"]):
        return [
            *told,
            f"Whether the curves of two halves of the documents agree cannot be said of {int(own['n_layers'])} layers and "
            f"{int(own['n_units'])} units: it takes 3 layers at which both halves are measured, and curves that vary.",
        ]
    told.append(
        f"Curves of two halves of the documents agree at {own['estimate']:.2f} (Spearman over {int(own['n_layers'])} "
        f"layers, median of {_SPLITS} halvings)."
    )
    return told


SPEC = StudySpec(
    name="layers",
    title="How does compression move over depth?",
    question="How do scores move over depth, and where does compression differ from its nulls?",
    hypothesis=HYPOTHESIS,
    tests=_FINDINGS,
    nulls=(
        f"random sets of points, each around its own centroid ({NULLS[0]})",
        f"random directions of the neighbors' lengths around the neighbors' centroid ({NULLS[1]})",
        f"the same tokens in a random twin of the model ({TWIN})",
        "beside contraction: random points, and the neighbors of another token whose neighborhood is just as tight",
    ),
    not_tested=(
        "The Jacobian contrast and the centroid effect (analyzers JacobianGain, CentroidEffect): a pass per token each.",
        "A global affine fit of the block and shuffled tokens as controls over all layers (bl.controls).",
        "Layers other than {layers}; other k, metrics and contexts (study robustness).",
    ),
    if_yes="Compression differs from its nulls at some layer, above them (a basin) or below them (telling apart).",
    if_no="Compression does not reliably differ from its nulls here.",
    analyzers=_analyzers,
    analysis=_analysis,
    presentation=_presentation,
    steps=4,
)
