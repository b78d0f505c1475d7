"""Does compression inside the model go with how many bits the model needs for a token, or for the one behind it?"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from basin_lens import stats, tables
from basin_lens.analyzers import NextTokenEntropy
from basin_lens.model import HookedModel
from basin_lens.studies.framework.declared_tests import ALPHA, IF_FEW
from basin_lens.studies.framework.display_columns import ALL_SHOWN, shown
from basin_lens.studies.framework.measured_texts import FEWEST_SCORED, HEADLINE, SCORES, Measured, StudyData
from basin_lens.studies.framework.runner import run_study
from basin_lens.studies.framework.spec import Analysis, Check, DeclaredTest, Presentation, Results, StudySpec, Task
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import above_layer_0, sequence_shown
from basin_lens.studies.framework.wording import layers_said
from basin_lens.views import Section, quartile_bars, result_curve, scatter, token_view

OWN, NEXT = "code_length", "next_code_length"
# The token's own code length is surprisal in bits: it cannot be a control of itself.
CONTROLS = {OWN: tuple(name for name in stats.CONTROLS if name != "surprisal"), NEXT: stats.CONTROLS}

ENTROPY = "next_token_entropy"
# Of the exploration of entropy: what the score itself may follow.
OF_NEIGHBORHOOD = ("log_radius", "log_norm", "log_frequency", "position")
PARTS = (HEADLINE, "compression", "compression_place", "compression_directions", "contraction")

FINDINGS = {OWN: "compression goes with the token's code length", NEXT: "compression goes with the next token's code length"}

HYPOTHESIS = (
    "Declared before looking: among the tokens of one text, compression (less that of random sets) goes with the token's own code "
    "length, at fixed token frequency, position, norm, neighborhood radius and share of equal tokens; and with the code length of "
    "the next token, at the same and the token's own surprisal (either direction). Code length is -log2 p of the token given "
    "those before it, what direct coding spends on it. Each is tested at the layer (not 0) chosen on half of the documents, on "
    f"the other half, as one family (Holm). {IF_FEW} A prediction from other texts stands beside the family: at layer 26 of "
    "SmolLM2-135M, at fixed radius, norm, frequency and position, compression goes up with the entropy of the next token's "
    "distribution, and compression_directions goes down with it. The table entropy has every layer measured."
)


def study_codelength(model: HookedModel, data: StudyData, *, progress: bool = True, **options: object) -> Study:
    """Ask whether a token whose neighborhood a block draws together costs fewer bits, itself or in what follows it.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, or a `Measured` for the study `"codelength"`.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`, with texts.

    Returns:
        a `Study` with tables `partial_correlation` (every score and layer against both code lengths), `entropy` (compression, its
        parts and contraction against the entropy of what the model predicts next), `quartiles` (scores in the quarters of the next
        token's code length), and `contrast` if one was asked for.

    Raises:
        StudyError: too few documents, or options together with a `Measured`. Others as for `analyze`.

    Source: Shannon 1948 (code length); design of basin_lens, "Statistics".

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> study = bl.studies.study_codelength(
        ...     model, list(reference_passages()), layers=[5], bank="reference", max_sequences=8, max_length=48, progress=False)
        >>> sorted(study.tables)
        ['entropy', 'partial_correlation', 'quartiles']
    """
    return run_study(SPEC, model, data, progress=progress, measure_options=options)


def with_code_lengths(table: pd.DataFrame) -> pd.DataFrame:
    """The table with each token's code length and that of the token behind it, in bits; NaN where there is none."""
    answer = table.copy()
    answer[OWN] = answer["surprisal"] / np.log(2)
    ordered = answer.sort_values(["layer", "seq", "pos"])
    answer[NEXT] = ordered.groupby(["layer", "seq"])[OWN].shift(-1)
    answer = tables.with_provenance(answer, table)
    return tables.with_columns(answer, dict.fromkeys((OWN, NEXT), tables.Column("bits", low=0.0)))


def _analysis(task: Task) -> Analysis:
    measured, table = task.measured, with_code_lengths(task.measured.table)
    task.step("partial correlations")
    parts = [_correlated(table, list(SCORES), against, measured) for against in (OWN, NEXT)]
    return Analysis(
        table=table,
        tests=[
            DeclaredTest(finding, against, partial(_correlated, scores=HEADLINE, against=against, measured=measured))
            for against, finding in FINDINGS.items()
        ],
        token_level=[Check(against, list(SCORES), (against,)) for against in FINDINGS],
        red_flags=[
            Check(
                against,
                HEADLINE,
                (against,),
                {"controls": CONTROLS[against], "frequency": measured.frequency, "min_tokens": FEWEST_SCORED},
            )
            for against in FINDINGS
        ],
        contrast=[*SCORES, OWN, NEXT],
        tokens=measured.table,
        rows="tokens",
        tables={
            "partial_correlation": stats.correct(pd.concat(parts, ignore_index=True), "bh"),
            "entropy": _entropy(table, measured),
        },
    )


def _entropy(table: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """Compression and its parts against the entropy of what is predicted next, within texts, at fixed `OF_NEIGHBORHOOD`."""
    return stats.partial_correlation(
        table,
        list(PARTS),
        ENTROPY,
        controls=OF_NEIGHBORHOOD,
        frequency=measured.frequency,
        unit=measured.unit,
        seed=measured.seed,
        min_tokens=FEWEST_SCORED,
    )


def _correlated(table: pd.DataFrame, scores: str | list[str], against: str, measured: Measured) -> pd.DataFrame:
    return stats.partial_correlation(
        table,
        scores,
        against,
        controls=CONTROLS[against],
        frequency=measured.frequency,
        unit=measured.unit,
        seed=measured.seed,
        min_tokens=FEWEST_SCORED,
    )


def _presentation(task: Task, analysis: Analysis, results: Results) -> Presentation:
    measured, table = task.measured, analysis.table
    chosen = results.findings["layer"].iloc[1]
    layer = int(chosen) if pd.notna(chosen) else measured.layers[-1]
    quartiles = stats.quartile_table(table, list(SCORES), NEXT, layers=[layer], unit=measured.unit)
    found, entropy = analysis.tables["partial_correlation"], analysis.tables["entropy"]
    figures = {
        "code-length-by-layer": result_curve(above_layer_0(found[found["score"] == HEADLINE]), by="against"),
        "entropy-by-layer": result_curve(above_layer_0(entropy[entropy["score"].isin(_DRAWN)]), by="score"),
        "quartiles": quartile_bars(quartiles),
        "scatter": scatter(table, NEXT, HEADLINE, layer, x_scale="rank", y_scale="rank"),
    }
    return Presentation(
        sections=_sections(table, found, entropy, figures, layer),
        figures=figures,
        tables={"quartiles": quartiles},
        remarks=_remarks(found, entropy, table),
        not_tested=SPEC.said(layers=layers_said(measured)),
    )


_DRAWN = (HEADLINE, "compression_place", "compression_directions")


def _sections(
    table: pd.DataFrame, found: pd.DataFrame, entropy: pd.DataFrame, figures: Mapping[str, Figure], layer: int
) -> list[Section]:
    view = token_view(table, [HEADLINE, "contraction", "surprisal", ENTROPY], layer, seq=sequence_shown(table, HEADLINE))
    return [
        Section(
            "Compression against code length, layer by layer",
            "Correlation within sequences with the token's own code length and with the next token's, at fixed frequency, "
            "position, norm, radius and share of equal tokens; for the next token, also at fixed own surprisal.",
            figure=figures["code-length-by-layer"],
            caption="Mean partial Spearman correlation within sequences, 95 % interval over documents (layer 0 in the table); "
            "filled: p at most 0.05 after Benjamini-Hochberg over scores, layers and both code lengths.",
            table=shown(found, "layer", "score", "against", "n_documents"),
        ),
        Section(
            "Compression against how open the next token is, layer by layer",
            "Correlation within sequences with the entropy of the distribution that the model predicts behind the token, at fixed "
            "radius, norm, frequency and position. An exploration; the prediction is for layer 26 of SmolLM2-135M.",
            figure=figures["entropy-by-layer"],
            caption="Mean partial Spearman correlation within sequences, 95 % interval over documents (layer 0 in the table); "
            "filled: p at most 0.05 after Benjamini-Hochberg over scores and layers.",
            table=shown(entropy, "layer", "score", "n_documents"),
        ),
        Section(
            f"Scores in the quarters of the next token's code length, layer {layer}",
            "No control is applied here.",
            figure=figures["quartiles"],
            caption=f"Mean over documents with 95 % intervals; above each panel, the highest quarter less the lowest. {ALL_SHOWN}",
        ),
        Section(
            f"The next token's code length and compression, token by token, layer {layer}",
            figure=figures["scatter"],
            caption=f"Ranks within sequences; line by least squares, band from a bootstrap of documents. {ALL_SHOWN}",
        ),
        Section("One text", f"A sequence at layer {layer}; tokens without compression were not in its sample.", view=view),
    ]


def _remarks(found: pd.DataFrame, entropy: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    bits = table[table["layer"] == table["layer"].iloc[0]]
    told = []
    for against, name in ((OWN, "the token's own"), (NEXT, "the next token's")):
        mine = above_layer_0(found[(found["score"] == HEADLINE) & (found["against"] == against)])
        told.append(
            f"Exploration, {name} code length: {int((mine['p_corrected'] <= ALPHA).sum())} of {len(mine)} layers stay "
            "below 0.05 after correction; "
            f"partial correlations from {mine['estimate'].min():+.3f} to {mine['estimate'].max():+.3f}."
        )
    for name in (HEADLINE, "compression_directions"):
        mine = above_layer_0(entropy[entropy["score"] == name])
        up, down = (mine[(mine["p_corrected"] <= ALPHA) & (sign * mine["estimate"] > 0)]["layer"].tolist() for sign in (1, -1))
        told.append(
            f"Exploration, entropy of the next token: {name} goes up with it at layers {up or 'none'}, down at {down or 'none'} of "
            f"{mine['layer'].tolist()}; partial correlations from {mine['estimate'].min():+.3f} to {mine['estimate'].max():+.3f}."
        )
    told.append(f"Mean code length: {bits[OWN].mean():.2f} bits per token, over {int(bits[OWN].notna().sum()):,} tokens.")
    return told


SPEC = StudySpec(
    name="codelength",
    title="Does compression go with code length?",
    question="Does compression go with how many bits the model needs for a token, or for the next one?",
    hypothesis=HYPOTHESIS,
    tests=tuple(FINDINGS.values()),
    nulls=("no correlation within sequences at fixed controls: signs of whole documents are flipped",),
    not_tested=(
        "Code lengths as the codec's streams and windows give them (bl.codec): here every sequence is read from its own beginning.",
        "Whether compression makes a token cheap or the reverse: nothing here intervenes.",
        "Layers other than {layers}; other k, metrics and contexts (study robustness).",
    ),
    if_yes="Compression goes with code length beyond frequency, position, norm and density.",
    if_no="At fixed frequency, position, norm and density, compression says nothing reliable about code length here.",
    analyzers=lambda _: (NextTokenEntropy(),),
    analysis=_analysis,
    presentation=_presentation,
)
