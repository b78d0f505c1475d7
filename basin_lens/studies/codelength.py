"""Does compression inside the model go with how many bits the model needs for a token, or for the one behind it?"""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from basin_lens import stats, tables
from basin_lens.studies.framework import base
from basin_lens.studies.framework.contrasts import contrast_section
from basin_lens.studies.framework.display_columns import ALL_SHOWN, shown
from basin_lens.studies.framework.measurement import SCORES, Measured, ready
from basin_lens.views import Section, quartile_bars, result_curve, scatter, token_view

OWN, NEXT = "code_length", "next_code_length"
# The token's own code length is surprisal in bits: it cannot be a control of itself.
CONTROLS = {OWN: tuple(name for name in stats.CONTROLS if name != "surprisal"), NEXT: stats.CONTROLS}

HYPOTHESIS = (
    "Declared before looking: among the tokens of one text, compression goes with the token's own code length, at fixed token frequency, position, "
    "norm, neighborhood radius and share of equal tokens; and with the code length of the next token, at the same and the token's own surprisal "
    "(either direction). Code length is -log2 p of the token given those before it, what direct coding spends on it. Each is tested at the layer "
    f"(not 0) chosen on half of the documents, on the other half, as one family (Holm). {base.IF_FEW}"
)


def study_codelength(model: Any, data: Any, *, progress: bool = True, **options: Any) -> base.Study:
    """Ask whether a token whose neighborhood a block draws together costs fewer bits, itself or in what follows it.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, or a `Measured` for the study `"codelength"`.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`, with texts.

    Returns:
        a `Study` with tables `partial_correlation` (every score and layer against both code lengths), `quartiles` (scores in the quarters of
        the next token's code length), and `contrast` if one was asked for.

    Raises:
        StudyError: too few documents, or options together with a `Measured`. Others as for `analyze`.

    Source: Shannon 1948 (code length); design of basin_lens, "Statistics".

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> study = bl.studies.study_codelength(
        ...     model, list(reference_passages()), layers=[5], max_sequences=8, max_length=48, progress=False)
        >>> sorted(study.tables)
        ['partial_correlation', 'quartiles']
    """
    measured = ready(model, data, "codelength", progress, options)
    with base.steps("study codelength", 4, progress) as step:
        return _study(measured, step)


def with_code_lengths(table: pd.DataFrame) -> pd.DataFrame:
    """The table with each token's code length and that of the token behind it, in bits; NaN where there is none."""
    answer = table.copy()
    answer[OWN] = answer["surprisal"] / np.log(2)
    ordered = answer.sort_values(["layer", "seq", "pos"])
    answer[NEXT] = ordered.groupby(["layer", "seq"])[OWN].shift(-1)
    answer = tables.with_provenance(answer, table)
    return tables.with_columns(answer, dict.fromkeys((OWN, NEXT), tables.Column("bits", low=0.0)))


def _study(measured: Measured, step: base.Steps) -> base.Study:
    table = with_code_lengths(measured.table)

    step("partial correlations")
    parts = [_correlated(table, list(SCORES), against, measured) for against in (OWN, NEXT)]
    found = stats.correct(pd.concat(parts, ignore_index=True), "bh")

    step("declared tests and red flags")
    findings = base.settle("codelength", [
        base.declared(table, partial(_correlated, scores="compression", against=against, measured=measured), measured, finding, against)
        for against, finding in ((OWN, "compression goes with the token's code length"), (NEXT, "compression goes with the next token's code length"))
    ])  # fmt: skip
    guide = pd.concat([base.guide(table, list(SCORES), against) for against in (OWN, NEXT)], ignore_index=True)
    findings = base.beside_guide(findings, guide)
    flags = pd.concat([
        base.red_flags(
            table, "compression", against, controls=CONTROLS[against], frequency=measured.frequency, unit=measured.unit, seed=measured.seed
        ).assign(question=against)
        for against in (OWN, NEXT)
    ], ignore_index=True)  # fmt: skip

    step("figures")
    layer = int(findings["layer"].iloc[1]) if pd.notna(findings["layer"].iloc[1]) else measured.layers[-1]
    quartiles = stats.quartile_table(table, list(SCORES), NEXT, layers=[layer], unit=measured.unit)
    sections, figures = _sections(table, found, quartiles, layer)
    held = {"partial_correlation": found, "quartiles": quartiles}
    step("contrast")
    if measured.contrast is not None:
        section, compared, figure = contrast_section(table, [*SCORES, OWN, NEXT], measured)
        sections.append(section)
        held["contrast"], figures["contrast-by-layer"] = compared, figure
    decision = base.decide(findings, flags)
    return base.Study(
        name="codelength",
        title="Does compression go with code length?",
        about=tuple(base.about(measured)),
        hypothesis=HYPOTHESIS,
        decision=decision,
        verdict=tuple(_verdict(decision, findings, found, table)),
        findings=findings,
        flags=flags,
        not_tested=_not_tested(measured),
        sections=tuple(sections),
        tables=held,
        figures=figures,
        provenance=base.provenance(measured),
        tokens=measured.table,
    )


def _correlated(table: pd.DataFrame, scores: str | list[str], against: str, measured: Measured) -> pd.DataFrame:
    return stats.partial_correlation(
        table, scores, against, controls=CONTROLS[against], frequency=measured.frequency, unit=measured.unit, seed=measured.seed
    )


def _sections(
    table: pd.DataFrame, found: pd.DataFrame, quartiles: pd.DataFrame, layer: int
) -> tuple[list[Section], dict[str, Figure]]:
    figures = {
        "code-length-by-layer": result_curve(base.inner(found[found["score"] == "compression"]), by="against"),
        "quartiles": quartile_bars(quartiles),
        "scatter": scatter(table, NEXT, "compression", layer, x_scale="rank", y_scale="rank"),
    }
    return [
        Section(
            "Compression against code length, layer by layer",
            "Correlation within sequences with the token's own code length and with the next token's, at fixed frequency, position, norm, radius and "
            "share of equal tokens; for the next token, also at fixed own surprisal.",
            figure=figures["code-length-by-layer"],
            caption="Mean partial Spearman correlation within sequences, 95 % interval over documents (layer 0 in the table); filled: p at most 0.05 "
            "after Benjamini-Hochberg over scores, layers and both code lengths.",
            table=shown(found, "layer", "score", "against", "n_documents"),
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
        Section(
            "One text", f"The first sequence at layer {layer}.",
            view=token_view(table, ["compression", "surprisal"], layer, seq=int(table["seq"].min())),
        ),
    ], figures  # fmt: skip


def _verdict(decision: base.Decision, findings: pd.DataFrame, found: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    bits = table[table["layer"] == table["layer"].iloc[0]]
    told = [
        base.opening(
            decision,
            "Compression goes with code length beyond frequency, position, norm and density.",
            "At fixed frequency, position, norm and density, compression says nothing reliable about code length here.",
        ),
        *(base.sentence(row) for row in base.rows(findings)),
    ]
    for against, name in ((OWN, "the token's own"), (NEXT, "the next token's")):
        mine = base.inner(found[(found["score"] == "compression") & (found["against"] == against)])
        told.append(
            f"Exploration, {name} code length: {int((mine['p_corrected'] <= base.ALPHA).sum())} of {len(mine)} layers stay "
            "below 0.05 after correction; "
            f"partial correlations from {mine['estimate'].min():+.3f} to {mine['estimate'].max():+.3f}."
        )
    told.append(f"Mean code length: {bits[OWN].mean():.2f} bits per token, over {int(bits[OWN].notna().sum()):,} tokens.")
    return told


def _not_tested(measured: Measured) -> tuple[str, ...]:
    said = [
        "Code lengths as the codec's streams and windows give them (bl.codec): here every sequence is read from its own beginning.",
        "Whether compression makes a token cheap or the reverse: nothing here intervenes.",
        f"Layers other than {', '.join(map(str, measured.layers))}; other k, metrics and contexts (study robustness).",
    ]
    return (*said, *(() if measured.contrast is not None else ("Any contrast of spans or labels: none was asked for.",)))
