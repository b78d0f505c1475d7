"""Does compression go with the importance of a token, beyond what position, frequency, norm and density already say?"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pandas as pd

from basin_lens import stats, tables
from basin_lens.analyzers import (
    Analyzer,
    AttentionReceived,
    AttentionRollout,
    Erasure,
    GradientNorm,
    GradientTimesActivation,
    ValueWeightedAttention,
)
from basin_lens.errors import StudyError
from basin_lens.model import HookedModel
from basin_lens.studies.framework.declared_tests import ALPHA, FEWEST_TO_SPLIT, IF_FEW, one_sided
from basin_lens.studies.framework.display_columns import ALL_SHOWN
from basin_lens.studies.framework.measured_texts import FEWEST_SCORED, HEADLINE, SCORES, Measured, StudyData
from basin_lens.studies.framework.runner import run_study
from basin_lens.studies.framework.spec import Analysis, Check, DeclaredTest, Presentation, Results, StudySpec, Task
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import above_layer_0, sequence_shown
from basin_lens.studies.framework.units import FEWEST_UNITS, units_in
from basin_lens.studies.framework.wording import layers_said
from basin_lens.views import Section, forest, joint_density, quartile_bars, result_curve, scatter, token_view

# Measured in the pass that reads the texts, its gradients, and, for erasure, passes of its own.
IMPORTANCE: tuple[Analyzer, ...] = (
    AttentionReceived(),
    AttentionReceived(sink=False),
    AttentionReceived(normalize=False),
    AttentionRollout(),
    AttentionRollout(sink=False),
    ValueWeightedAttention(),
    GradientNorm(),
    GradientNorm(target="last_logit"),
    GradientTimesActivation(),
    Erasure(),
)
# Measures of importance, by column; those with a sign are taken by size.
MEASURES = (
    "attention_received",
    "attention_received_without_sink",
    "attention_received_raw",
    "attention_rollout",
    "attention_rollout_without_sink",
    "value_weighted_attention",
    "gradient_norm",
    "gradient_norm_scaled",
    "gradient_norm_last_logit",
    "gradient_norm_scaled_last_logit",
    "gradient_times_activation_size",
    "integrated_gradients_size",
)
TRUTH = "erasure"
WITHOUT_SURPRISAL = tuple(name for name in stats.CONTROLS if name != "surprisal")

_FINDING = "compression goes with"

HYPOTHESIS = (
    "Declared before looking: among the tokens of one text, compression (less that of random sets) goes with the token's "
    "importance (either direction), at fixed token frequency, position, norm, neighborhood radius, share of equal tokens and "
    "surprisal. Importance is erasure, the rise of later loss when the token is knocked out, and the cheaper measure that agrees "
    "best with erasure. Both are tested at the layer (not 0, where a state is its token alone) chosen on half of the "
    f"documents, on the other half, as one family (Holm). {IF_FEW}"
)


def study_importance(model: HookedModel, data: StudyData, *, progress: bool = True, **options: object) -> Study:
    """Rank the measures of token importance by their agreement with erasure, then ask whether compression goes with importance.

    Agreement is the correlation within sequences at the positions where erasure is known. Each measure's layer is chosen on half
    of the documents and reported on the other half. Then, for every measure, score and layer: the partial correlation within
    sequences given the standard controls, with and without surprisal (which may be a mediator), tested over documents.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, or a `Measured` for the study `"importance"`.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`, with texts: `layers, k, context, bank, unit, contrast, max_sequences, seed,
            ...`.

    Returns:
        a `Study`; `.save(folder)` writes its tables, figures and report. Its tables: `ranking`, `agreement`,
        `partial_correlation`, `quartiles`, `mixed_model`, `guide`, and `contrast` if one was asked for.

    Raises:
        StudyError: too few documents, or other options together with a `Measured`. Others as for `analyze`.

    Source: design of basin_lens, "Token importance".

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> study = bl.studies.study_importance(
        ...     model, list(reference_passages()), layers=[5], bank="reference", max_sequences=8, max_length=48, integrated=0,
        ...     progress=False)
        >>> "ranking" in study.tables
        True
    """
    return run_study(SPEC, model, data, progress=progress, measure_options=options)


def _analysis(task: Task) -> Analysis:
    measured = task.measured
    table = _with_sizes(measured.table)
    # Integrated gradients of a few sequences may be too few for any test.
    there = [name for name in MEASURES if name in table.columns and units_in(table[table[name].notna()], measured) >= FEWEST_UNITS]

    task.step("agreement with erasure")
    known = tables.select(table, table[TRUTH].notna())
    plain = stats.within_sequence_correlation(known, there, TRUTH, **task.unit_and_seed)
    beyond = stats.partial_correlation(known, there, TRUTH, controls=["position"], min_tokens=FEWEST_SCORED, **task.unit_and_seed)
    ranking = _ranking(known, there, beyond, measured)
    best = str(ranking["score"].iloc[0])

    task.step("partial correlations")
    return Analysis(
        table=table,
        tests=[DeclaredTest(f"{_FINDING} {other}", other, _test(other, measured)) for other in (TRUTH, best)],
        token_level=[Check(other, list(SCORES), (other,)) for other in (TRUTH, best)],
        red_flags=[
            Check(other, HEADLINE, (other,), {"frequency": measured.frequency, "min_tokens": FEWEST_SCORED})
            for other in (TRUTH, best)
        ],
        contrast=[*SCORES, TRUTH, *there],
        tokens=measured.table,
        rows="tokens",
        tables={
            "ranking": ranking,
            "agreement": pd.concat([plain, beyond], ignore_index=True),
            "partial_correlation": _partial(table, [TRUTH, *there], measured),
        },
        details=best,
    )


def _with_sizes(table: pd.DataFrame) -> pd.DataFrame:
    """Signed attributions by size: how much, not in which direction."""
    answer, known, sizes = table.copy(), tables.columns(table), {}
    for name in ("gradient_times_activation", "integrated_gradients"):
        if name in table.columns and table[name].notna().any():
            answer[f"{name}_size"] = table[name].abs()
            sizes[f"{name}_size"] = replace(known[name], low=0.0)
    return tables.with_columns(answer, sizes)


def _ranking(known: pd.DataFrame, measures: list[str], beyond: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """One row per measure, the best agreement first, each at the layer that other documents chose for the most positive agreement.

    `given_position`, with its interval: the agreement at that layer at fixed position, over all documents (from `beyond`).
    """
    rows = []
    for name in measures:
        part = known[known[name].notna()]
        plain = partial(stats.within_sequence_correlation, scores=name, against=TRUTH, unit=measured.unit, seed=measured.seed)
        # A measure that says the opposite of erasure is no good one, however sure that is.
        test = one_sided(plain)
        units = units_in(part, measured)
        found, how = None, f"too few documents to halve ({units}): the best layer of all, which flatters"
        if units >= FEWEST_TO_SPLIT:
            try:
                found = stats.best_layer(part, test, unit=measured.unit, seed=measured.seed)
                how = "layer chosen on half of the documents, reported on the others"
            except StudyError:
                how = "half of the documents would be too few: the best layer of all, which flatters"
        if found is None or found.empty:
            every = test(part)
            found = every.loc[[every["estimate"].idxmax()]] if every["estimate"].notna().any() else every[:1]
        rows.append(found.assign(how=how))
    ranking = stats.correct(pd.concat(rows, ignore_index=True), "bh")
    names = {"estimate": "given_position", "low": "given_position_low", "high": "given_position_high"}
    fixed = beyond[["score", "layer", *names]].rename(columns=names)
    ranking = ranking.merge(fixed, on=["score", "layer"], how="left", validate="one_to_one")
    return ranking.sort_values("estimate", ascending=False, ignore_index=True)


def _partial(table: pd.DataFrame, measures: list[str], measured: Measured) -> pd.DataFrame:
    """Partial correlations of every score with every measure, with surprisal among the controls and without."""
    parts = []
    for wording, controls in (("with surprisal", stats.CONTROLS), ("without surprisal", WITHOUT_SURPRISAL)):
        found = stats.partial_correlation(
            table,
            list(SCORES),
            measures,
            controls=controls,
            frequency=measured.frequency,
            unit=measured.unit,
            seed=measured.seed,
            min_tokens=FEWEST_SCORED,
            correction="none",
        )
        parts.append(found.assign(control_set=wording))
    return stats.correct(pd.concat(parts, ignore_index=True), "bh")


def _test(other: str, measured: Measured) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def test(part: pd.DataFrame) -> pd.DataFrame:
        return stats.partial_correlation(
            part,
            HEADLINE,
            other,
            frequency=measured.frequency,
            unit=measured.unit,
            seed=measured.seed,
            min_tokens=FEWEST_SCORED,
        )

    return test


def _presentation(task: Task, analysis: Analysis, results: Results) -> Presentation:
    measured, table, best = task.measured, analysis.table, str(analysis.details)
    layer = int(results.findings["layer"].iloc[1])
    quartiles = stats.quartile_table(table, list(SCORES), best, layers=[layer], unit=measured.unit)
    assert results.token_level is not None
    more = {"quartiles": quartiles, "guide": results.token_level}
    if measured.n_units >= 10:
        more["mixed_model"] = stats.mixed_model(
            table,
            HEADLINE,
            best,
            frequency=measured.frequency,
            layers=[layer],
            unit=measured.unit,
            all_terms=True,
            correction="holm",
        )
    ranking, partials = analysis.tables["ranking"], analysis.tables["partial_correlation"]
    sections = [
        _ranking_section(ranking),
        _layers_section(partials, best),
        *_one_layer_sections(table, quartiles, best, layer),
        *([_mixed_section(more["mixed_model"])] if "mixed_model" in more else []),
        _text_section(table, best, layer),
    ]
    names = ("importance-ranking", "partial-correlation-by-layer", "quartiles", "scatter", "joint-density")
    return Presentation(
        sections=sections,
        figures={name: section.figure for name, section in zip(names, sections, strict=False) if section.figure is not None},
        tables=more,
        remarks=_remarks(ranking, partials, best),
        not_tested=_not_tested(measured, [name for name in MEASURES if name not in analysis.contrast]),
    )


def _ranking_section(ranking: pd.DataFrame) -> Section:
    fixed = ("given_position", "given_position_low", "given_position_high")
    return Section(
        "Which cheap measure of importance to believe",
        "Erasure takes a token out of the attention of all later queries and measures what their loss rises by. It costs a pass "
        "per token. Here is how well each cheaper measure agrees with it among the tokens of one text. Early tokens are "
        "attended to by more that follow, so both may go with position alone: given_position is the agreement at fixed "
        "position, over all documents.",
        figure=forest(ranking, "score", title="Agreement with erasure"),
        caption="Mean Spearman correlation with erasure within sequences, 95 % interval over documents; p of agreement above 0 "
        "(one-sided), corrected by Benjamini-Hochberg over the measures.",
        table=ranking[["score", "layer", "estimate", "low", "high", "p_corrected", *fixed, "n_documents", "n_tokens", "how"]],
    )


def _layers_section(partials: pd.DataFrame, best: str) -> Section:
    mine = partials[partials["against"].isin([TRUTH, best])]
    first, then = ("layer", "score", "against", "control_set"), ("uncontrolled", "bound", "n_documents")
    return Section(
        "Compression against importance, layer by layer",
        f"Correlation within sequences of compression with {TRUTH} and with {best}, at fixed token frequency, position, "
        "norm, radius and share of equal tokens; with and without surprisal, which may carry the effect rather than "
        "confound it.",
        figure=result_curve(above_layer_0(mine[mine["score"] == HEADLINE]), by=["against", "control_set"]),
        caption="Mean partial Spearman correlation within sequences, 95 % interval over documents (layer 0 in the table). "
        "Filled: p at most 0.05 after Benjamini-Hochberg over all measures, scores, layers and control sets.",
        table=mine[[*first, "estimate", "low", "high", "p", "p_corrected", *then]],
    )


def _one_layer_sections(table: pd.DataFrame, quartiles: pd.DataFrame, best: str, layer: int) -> list[Section]:
    return [
        Section(
            f"Scores in the quartiles of {best}, layer {layer}",
            f"Tokens of each sequence in four parts by {best}. No control is applied here: position and frequency are still in it.",
            figure=quartile_bars(quartiles),
            caption=f"Mean over documents with 95 % intervals; above each panel, the highest quartile less the lowest. {ALL_SHOWN}",
        ),
        Section(
            f"{best} and compression, token by token, layer {layer}",
            "Each point is a token, its sequence's mean taken out of both. A cloud this wide with a line this flat is what "
            "most of these correlations are.",
            figure=scatter(table, best, HEADLINE, layer, x_scale="rank", y_scale="rank"),
            caption=f"Ranks within sequences; line by least squares, band from a bootstrap of documents. {ALL_SHOWN}",
        ),
        Section(
            f"Joint density of {best} and compression, layer {layer}",
            "",
            figure=joint_density(table, best, HEADLINE, layer),
            caption=f"Number of tokens, with both margins. {ALL_SHOWN}",
        ),
    ]


def _mixed_section(mixed: pd.DataFrame) -> Section:
    return Section(
        "What explains compression",
        "A mixed model of compression on importance and the controls at once, a random level for each "
        f"sequence. Standardized coefficients; the larger, the more of the score it carries. {ALL_SHOWN}",
        table=mixed[["term", "estimate", "low", "high", "p", "p_corrected", "partial_r2", "icc", "n_units", "n_tokens"]],
    )


def _text_section(table: pd.DataFrame, best: str, layer: int) -> Section:
    columns = [
        name for name in (HEADLINE, "contraction", best.removesuffix("_size"), TRUTH, "surprisal") if table[name].notna().any()
    ]
    view = token_view(table, columns, layer, seq=sequence_shown(table, HEADLINE))
    return Section(
        "One text",
        f"A sequence at layer {layer}, by several columns; tokens without compression were not in its sample.",
        view=view,
    )


def _remarks(ranking: pd.DataFrame, partials: pd.DataFrame, best: str) -> list[str]:
    first = ranking.iloc[0]
    fixed = (
        f"; at fixed position, over all documents, {first['given_position']:+.2f} "
        f"({first['given_position_low']:+.2f} to {first['given_position_high']:+.2f})"
        if pd.notna(first["given_position"])
        else ""
    )
    told = [
        f"The measure that agrees best with erasure is {best} at layer {first['layer']}: mean Spearman correlation "
        f"{first['estimate']:+.2f} (95 % interval {first['low']:+.2f} to {first['high']:+.2f}){fixed}; {first['how']}."
    ]
    for wording in ("with surprisal", "without surprisal"):
        mine = partials[(partials["control_set"] == wording) & (partials["score"] == HEADLINE) & (partials["against"] == best)]
        kept = mine[mine["p_corrected"] <= ALPHA]
        told.append(
            f"Exploration, {wording} among the controls: against {best}, {len(kept)} of {len(mine)} layers stay below "
            f"0.05 after correction; partial correlations from {mine['estimate'].min():+.3f} to "
            f"{mine['estimate'].max():+.3f}, uncontrolled from {mine['uncontrolled'].min():+.3f} to "
            f"{mine['uncontrolled'].max():+.3f}."
        )
    return told


def _not_tested(measured: Measured, unranked: list[str]) -> tuple[str, ...]:
    said = SPEC.said(layers=layers_said(measured))
    if unranked:
        said.append(f"Not measured here: {', '.join(unranked)}.")
    few = measured.settings["integrated_gradients_sequences"]
    if few:
        said.append(
            f"Integrated gradients of more than {few} sequences, and of states other than those that enter the middle block."
        )
    return tuple(said)


SPEC = StudySpec(
    name="importance",
    title="Does compression go with token importance?",
    question="Does compression go with token importance, beyond frequency, position, norm, density and surprisal?",
    hypothesis=HYPOTHESIS,
    tests=(f"{_FINDING} {TRUTH}", f"{_FINDING} the cheaper measure of importance that agrees best with {TRUTH}"),
    nulls=("no correlation within sequences at fixed controls: signs of whole documents are flipped",),
    not_tested=(
        "Whether compression causes importance or the reverse: nothing here intervenes on compression.",
        "Importance for anything but the loss of later tokens of the same text (erasure, gradients) or the last token's logit.",
        "Erasure at position 0 (the model breaks without its attention sink), at the last two positions, and at more "
        "than 16 positions per sequence.",
        "Layers other than {layers}; other k, metrics and contexts (study robustness).",
        "Token frequency outside of these texts: log frequency is counted on them.",
    ),
    if_yes="Compression goes with token importance beyond frequency, position, norm, density and surprisal.",
    if_no="At fixed frequency, position, norm, density and surprisal, compression says nothing reliable about token importance "
    "here.",
    analyzers=lambda _: IMPORTANCE,
    integrated_gradients=True,
    analysis=_analysis,
    presentation=_presentation,
    steps=2,
)
