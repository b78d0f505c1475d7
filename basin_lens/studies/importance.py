"""Does compression go with the importance of a token, beyond what position, frequency, norm and density already say?"""

from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from basin_lens import stats, tables
from basin_lens.errors import StudyError
from basin_lens.studies.framework import base
from basin_lens.studies.framework.contrasts import contrast_section
from basin_lens.studies.framework.display_columns import ALL_SHOWN
from basin_lens.studies.framework.measurement import FEWEST_UNITS, SCORES, Measured, ready
from basin_lens.views import Section, forest, joint_density, quartile_bars, result_curve, scatter, token_view

# Measures of importance, by column; those with a sign are taken by size.
MEASURES = (
    "attention_received", "attention_received_without_sink", "attention_received_raw", "attention_rollout",
        "attention_rollout_without_sink",
    "value_weighted_attention", "gradient_norm", "gradient_norm_scaled", "gradient_norm_last_logit",
        "gradient_norm_scaled_last_logit",
    "gradient_times_activation_size", "integrated_gradients_size",
)  # fmt: skip
TRUTH = "erasure"
WITHOUT_SURPRISAL = tuple(name for name in stats.CONTROLS if name != "surprisal")
FEWEST_SCORED = 6  # erasure is known at 16 positions of a sequence, and six controls take their share

HYPOTHESIS = (
    "Declared before looking: among the tokens of one text, compression goes with the token's importance (either "
    "direction), at fixed token frequency, position, norm, neighborhood radius, share of equal tokens and surprisal. "
    "Importance is erasure, the rise of later loss when the token is knocked out, and the cheaper measure that agrees "
    "best with erasure. Both are tested at the layer (not 0, where a state is its token alone) chosen on half of the "
    f"documents, on the other half, as one family (Holm). {base.IF_FEW}"
)


def study_importance(model: Any, data: Any, *, progress: bool = True, **options: Any) -> base.Study:
    """Rank the measures of token importance by their agreement with erasure, then ask whether compression goes with importance.

    Agreement is the correlation within sequences at the positions where erasure is known. Each measure's layer is chosen on half of the
    documents and reported on the other half. Then, for every measure, score and layer: the partial correlation within sequences given the
    standard controls, with and without surprisal (which may be a mediator), tested over documents.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, or a `Measured` for the study `"importance"`.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`, with texts: `layers, k, context, bank, unit, contrast, max_sequences, seed, ...`.

    Returns:
        a `Study`; `.save(folder)` writes its tables, figures and report. Its tables: `ranking`, `agreement`, `partial_correlation`, `quartiles`,
        `mixed_model`, `guide`, and `contrast` if one was asked for.

    Raises:
        StudyError: too few documents, or other options together with a `Measured`. Others as for `analyze`.

    Source: design of basin_lens, "Token importance".

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> study = bl.studies.study_importance(
        ...     model, list(reference_passages()), layers=[5], max_sequences=8, max_length=48, integrated=0, progress=False)
        >>> "ranking" in study.tables
        True
    """
    measured = ready(model, data, "importance", progress, options)
    with base.steps("study importance", 7, progress) as step:
        return _study(measured, step)


def _study(measured: Measured, step: base.Steps) -> base.Study:
    table = _with_sizes(measured.table)
    shared: dict[str, Any] = {"unit": measured.unit, "seed": measured.seed}
    # Integrated gradients of a few sequences may be too few for any test.
    there = [
        name for name in MEASURES if name in table.columns and base.n_units(table[table[name].notna()], measured) >= FEWEST_UNITS
    ]
    unranked = [name for name in MEASURES if name not in there]

    step("agreement with erasure")
    known = tables.select(table, table[TRUTH].notna())
    agreement = stats.within_sequence_correlation(known, there, TRUTH, **shared)
    beyond = stats.partial_correlation(known, there, TRUTH, controls=["position"], min_tokens=FEWEST_SCORED, **shared)
    agreement = pd.concat([agreement, beyond], ignore_index=True)
    ranking = _ranking(known, there, beyond, measured)
    best = str(ranking["score"].iloc[0])

    step("partial correlations")
    partial = _partial(table, [TRUTH, *there], measured)

    step("declared tests")
    rows = []
    for other, finding in ((TRUTH, "compression goes with erasure"), (best, f"compression goes with {best}")):
        rows.append(base.declared(table, _test(other, measured), measured, finding, other))
    findings = base.settle("importance", rows)
    guide = pd.concat([base.guide(table, list(SCORES), other) for other in (TRUTH, best)], ignore_index=True)
    findings = base.beside_guide(findings, guide)

    step("red flags")
    flags = pd.concat(
        [
            base.red_flags(table, "compression", other, frequency=measured.frequency, **shared).assign(question=other)
            for other in (TRUTH, best)
        ],
        ignore_index=True,
    )

    step("quartiles and mixed model")
    layer = int(findings["layer"].iloc[1])
    quartiles = stats.quartile_table(table, list(SCORES), best, layers=[layer], unit=measured.unit)
    mixed = None
    if measured.n_units >= 10:
        mixed = stats.mixed_model(
            table,
            "compression",
            best,
            frequency=measured.frequency,
            layers=[layer],
            unit=measured.unit,
            all_terms=True,
            correction="holm",
        )

    step("figures")
    decision = base.decide(findings, flags)
    sections, figures = _sections(table, ranking, partial, quartiles, mixed, best, layer)
    held = {"ranking": ranking, "agreement": agreement, "partial_correlation": partial, "quartiles": quartiles, "guide": guide}
    if mixed is not None:
        held["mixed_model"] = mixed
    step("contrast")
    if measured.contrast is not None:
        section, found, figure = contrast_section(table, [*SCORES, TRUTH, *there], measured)
        sections.append(section)
        held["contrast"], figures["contrast-by-layer"] = found, figure
    return base.Study(
        name="importance",
        title="Does compression go with token importance?",
        about=tuple(base.about(measured)),
        hypothesis=HYPOTHESIS,
        decision=decision,
        verdict=tuple(_verdict(decision, findings, ranking, partial, best)),
        findings=findings,
        flags=flags,
        not_tested=_not_tested(measured, unranked),
        sections=tuple(sections),
        tables=held,
        figures=figures,
        provenance=base.provenance(measured),
        tokens=measured.table,
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
        test = base.one_sided(plain)
        units = base.n_units(part, measured)
        found, how = None, f"too few documents to halve ({units}): the best layer of all, which flatters"
        if units >= base.FEWEST_TO_SPLIT:
            try:
                found = stats.best_layer(part, test, unit=measured.unit, seed=measured.seed)
                how = "layer chosen on half of the documents, reported on the others"
            except StudyError as error:
                how = f"half of the documents would be too few ({error}): the best layer of all, which flatters"
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
        for name in measures:
            found = stats.partial_correlation(
                table, list(SCORES), name, controls=controls, frequency=measured.frequency, unit=measured.unit, seed=measured.seed,
                min_tokens=FEWEST_SCORED, correction="none",
            )  # fmt: skip
            parts.append(found.assign(control_set=wording))
    return stats.correct(pd.concat(parts, ignore_index=True), "bh")


def _test(other: str, measured: Measured) -> Any:
    def test(part: pd.DataFrame) -> pd.DataFrame:
        return stats.partial_correlation(
            part,
            "compression",
            other,
            frequency=measured.frequency,
            unit=measured.unit,
            seed=measured.seed,
            min_tokens=FEWEST_SCORED,
        )

    return test


def _sections(
    table: pd.DataFrame, ranking: pd.DataFrame, partial: pd.DataFrame, quartiles: pd.DataFrame,
    mixed: pd.DataFrame | None, best: str, layer: int,
) -> tuple[list[Section], dict[str, Any]]:  # fmt: skip
    figures: dict[str, Any] = {}
    sections = []

    def add(
        name: str, title: str, text: str, figure: Any, caption: str, shown: pd.DataFrame | None = None, view: Any = None
    ) -> None:
        figures[name] = figure
        sections.append(Section(title, text, figure=figure, caption=caption, table=shown, view=view))

    add(
        "importance-ranking",
        "Which cheap measure of importance to believe",
        "Erasure takes a token out of the attention of all later queries and measures what their loss rises by. It "
        "costs a pass per token. Here is how well each cheaper measure agrees with it among the tokens of one text. Early tokens are attended to "
        "by more that follow, so both may go with position alone: given_position is the agreement at fixed position, over all documents.",
        forest(ranking, "score", title="Agreement with erasure"),
        "Mean Spearman correlation with erasure within sequences, 95 % interval over documents; p of agreement above 0 (one-sided), corrected by "
        "Benjamini-Hochberg over the measures.",
        ranking[
            [
                "score",
                "layer",
                "estimate",
                "low",
                "high",
                "p_corrected",
                "given_position",
                "given_position_low",
                "given_position_high",
                "n_documents",
                "n_tokens",
                "how",
            ]
        ],
    )
    chosen = partial[partial["against"].isin([TRUTH, best]) & (partial["score"] == "compression")]
    add(
        "partial-correlation-by-layer",
        "Compression against importance, layer by layer",
        f"Correlation within sequences of compression with {TRUTH} and with {best}, at fixed token frequency, position, "
        "norm, radius and share of equal tokens; with and without surprisal, which may carry the effect rather than "
        "confound it.",
        result_curve(base.inner(chosen), by=["against", "control_set"]),
        "Mean partial Spearman correlation within sequences, 95 % interval over documents (layer 0 in the table). "
        "Filled: p at most 0.05 after Benjamini-Hochberg over all measures, scores, layers and control sets.",
        partial[partial["against"].isin([TRUTH, best])][
            [
                "layer",
                "score",
                "against",
                "control_set",
                "estimate",
                "low",
                "high",
                "p",
                "p_corrected",
                "uncontrolled",
                "bound",
                "n_documents",
            ]
        ],
    )
    add(
        "quartiles",
        f"Scores in the quartiles of {best}, layer {layer}",
        f"Tokens of each sequence in four parts by {best}. No control is applied here: position and frequency are still in it.",
        quartile_bars(quartiles),
        f"Mean over documents with 95 % intervals; above each panel, the highest quartile less the lowest. {ALL_SHOWN}",
    )
    y = "compression"
    add(
        "scatter",
        f"{best} and compression, token by token, layer {layer}",
        "Each point is a token, its sequence's mean taken out of both. A cloud this wide with a line this flat is what "
        "most of these correlations are.",
        scatter(table, best, y, layer, x_scale="rank", y_scale="rank"),
        f"Ranks within sequences; line by least squares, band from a bootstrap of documents. {ALL_SHOWN}",
    )
    add(
        "joint-density",
        f"Joint density of {best} and compression, layer {layer}",
        "",
        joint_density(table, best, y, layer),
        f"Number of tokens, with both margins. {ALL_SHOWN}",
    )
    if mixed is not None:
        sections.append(
            Section(
                "What explains compression",
                "A mixed model of compression on importance and the controls at once, a random level for each "
                f"sequence. Standardized coefficients; the larger, the more of the score it carries. {ALL_SHOWN}",
                table=mixed[["term", "estimate", "low", "high", "p", "p_corrected", "partial_r2", "icc", "n_units", "n_tokens"]],
            )
        )
    shown = [name for name in ("compression", best.removesuffix("_size"), TRUTH, "surprisal") if table[name].notna().any()]
    sections.append(Section(
        "One text", f"The first sequence at layer {layer}, by several columns.", view=token_view(table, shown, layer, seq=int(table[
            "seq"].min())),
    ))  # fmt: skip
    return sections, figures


def _verdict(decision: base.Decision, findings: pd.DataFrame, ranking: pd.DataFrame, partial: pd.DataFrame, best: str) -> list[str]:
    opening = base.opening(
        decision,
        "Compression goes with token importance beyond frequency, position, norm, density and surprisal.",
        "At fixed frequency, position, norm, density and surprisal, compression says nothing reliable about token importance here.",
    )
    first = ranking.iloc[0]
    told = [opening, *(base.sentence(row) for row in base.rows(findings))]
    fixed = (
        f"; at fixed position, over all documents, {first['given_position']:+.2f} "
        f"({first['given_position_low']:+.2f} to {first['given_position_high']:+.2f})"
        if pd.notna(first["given_position"])
        else ""
    )
    told.append(
        f"The measure that agrees best with erasure is {best} at layer {first['layer']}: mean Spearman correlation "
        f"{first['estimate']:+.2f} (95 % interval {first['low']:+.2f} to {first['high']:+.2f}){fixed}; {first['how']}."
    )
    for wording in ("with surprisal", "without surprisal"):
        mine = partial[(partial["control_set"] == wording) & (partial["score"] == "compression") & (partial["against"] == best)]
        kept = mine[mine["p_corrected"] <= base.ALPHA]
        told.append(
            f"Exploration, {wording} among the controls: against {best}, {len(kept)} of {len(mine)} layers stay below "
            f"0.05 after correction; partial correlations from {mine['estimate'].min():+.3f} to "
            f"{mine['estimate'].max():+.3f}, uncontrolled from {mine['uncontrolled'].min():+.3f} to "
            f"{mine['uncontrolled'].max():+.3f}."
        )
    return told


def _not_tested(measured: Measured, unranked: list[str]) -> tuple[str, ...]:
    said = [
        "Whether compression causes importance or the reverse: nothing here intervenes on compression.",
        "Importance for anything but the loss of later tokens of the same text (erasure, gradients) or the last token's logit.",
        "Erasure at position 0 (the model breaks without its attention sink), at the last two positions, and at more "
        "than 16 positions per sequence.",
        f"Layers other than {', '.join(map(str, measured.layers))}; other k, metrics and contexts (study robustness).",
        "Token frequency outside of these texts: log frequency is counted on them.",
    ]
    if unranked:
        said.append(f"Not measured here: {', '.join(unranked)}.")
    few = measured.settings["integrated_gradients_sequences"]
    if few:
        said.append(
            f"Integrated gradients of more than {few} sequences, and of states other than those that enter the middle block."
        )
    if measured.contrast is None:
        said.append("Any contrast of spans or labels: none was asked for.")
    return tuple(said)
