"""Which findings survive other settings: k, metric, context, bank, positions, number format, halves of the documents, another model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from basin_lens import model as door
from basin_lens import stats
from basin_lens.controls import random_twin
from basin_lens.errors import BasinLensError, StudyError, TextError
from basin_lens.studies import base
from basin_lens.studies.contrasts import is_paired
from basin_lens.studies.measured import Measured, ready, spaced_layers
from basin_lens.studies.settings import Setting, banks, other_model, parts, queries, scores
from basin_lens.studies.words import CONTENT, FUNCTION, tagged_tokens, word_table
from basin_lens.views import Section, forest

TWIN = "random twin of the model"

HYPOTHESIS = (
    "Declared before looking: each finding that holds at the settings of this run (held-out half of the documents, "
    "Holm over findings) keeps its sign and a p of at most 0.05 (Holm over settings) under every other setting, and is "
    "absent from the random twin of the model."
)


@dataclass(frozen=True)
class Finding:
    """A statement about the column `compression` of a table, and its test at one layer."""

    name: str
    question: str
    test: Callable[[pd.DataFrame], pd.DataFrame]
    layer: int = -1


def study_robustness(
    model: Any,
    data: Any,
    *,
    importance: str = "gradient_norm_scaled",
    second_model: Any = None,
    dtype: torch.dtype | None = torch.bfloat16,
    progress: bool = True,
    **options: Any,
) -> base.Study:
    """Test the main findings again under other settings: one table says which survive.

    The findings: nearest neighbors are compressed differently from random points; compression goes with surprisal, and with a measure of
    importance, beyond the controls; function words differ from content words; and the contrast asked for. Each at the layer
    that half of the documents chose among three; tokens of one sequence of each document are tested, in the whole bank.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, or a `Measured` for the study `"robustness"`.
        importance: which measure of importance: `"gradient_norm"`, `"gradient_norm_scaled"`, or any column measured.
        second_model: another model to read the same texts (layers at the same relative depth). The random twin is always read.
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
        door.check_model(second_model)
    given = set(data.table.columns) if isinstance(data, Measured) else {"gradient_norm", "gradient_norm_scaled"}
    if importance not in given:
        raise StudyError(
            f"expected a measured column as importance, got {importance!r}. Choose gradient_norm or gradient_norm_scaled."
        )
    measured = ready(model, data, "robustness", progress, options)
    with base.steps("study robustness", 7, progress) as step:
        return _study(model, measured, importance, second_model, dtype, step)


def _study(model: Any, measured: Measured, importance: str, second: Any, dtype: Any, step: base.Steps) -> base.Study:
    step("findings at the run's own settings")
    untested: list[str] = []
    table, tagged = _tagged(measured, untested)
    # Each setting costs a run: a few layers to choose from, and one sequence of each document.
    few = (
        measured.layers if len(measured.layers) < 5 else [measured.layers[i] for i in spaced_layers(len(measured.layers), 5)][1:-1]
    )
    scored = np.tile(queries(measured.capture), len(measured.layers))
    # By this model's token ids: another model's tables count their own tokens.
    table = table.assign(log_frequency=np.log(table["token_id"].map(dict(measured.frequency)).to_numpy(float)))
    table = table[scored & table["layer"].isin(few)]
    table.attrs = dict(measured.table.attrs)
    findings = _findings(measured, importance, tagged)
    rows = [base.declared(table, finding.test, measured, finding.name, finding.question) for finding in findings]
    settled = base.settle("robustness", rows)
    findings = [replace(finding, layer=int(row["layer"].iloc[0])) for finding, row in zip(findings, rows, strict=True)]
    layers = sorted({finding.layer for finding in findings})
    table = table[table["layer"].isin(layers)]

    tried = [Setting("as run", "own", table), *parts(table, measured)]
    step("k, metric, neighbors, context")
    tried += scores(model, measured, table, layers, untested)
    step("banks")
    tried += banks(model, measured, table, layers, untested)
    step("number format")
    if dtype is None or next(model.parameters()).dtype == dtype:
        untested.append(
            "Other number formats: none was asked for." if dtype is None else f"Number format {dtype}: the model has it already."
        )
    else:
        tried += other_model(door.in_dtype(model, dtype), str(dtype).removeprefix("torch."), "dtype", measured, layers, untested)
    step("other models")
    tried += other_model(random_twin(model, seed=measured.seed), TWIN, "twin", measured, layers, untested)
    if second is None:
        untested.append("A second trained model: none was given (second_model=).")
    else:
        tried += other_model(second, door.full_name(second), "model", measured, layers, untested)
    step("tests under every setting")
    found = [_tested(finding, setting) for finding in findings for setting in tried]

    step("figures")
    settings = _corrected(pd.concat(found, ignore_index=True))
    survival = _survival(settings, settled)
    settled = _with_survival(settled, survival)
    figures = {
        f"robustness-{finding.question}": forest(
            settings[settings["finding"] == finding.name], "setting", by="kind", title=f"{finding.name}, layer {finding.layer}"
        )
        for finding in findings
    }
    decision = base.decide(settled, None)
    sections = [
        Section(
            "Which findings survive",
            "A finding survives a setting if its sign stays and p is at most 0.05, Holm over the settings. The random "
            "twin has learned nothing: there, no finding should appear.",
            table=survival,
        )
    ]
    for finding, figure in zip(findings, figures.values(), strict=True):
        mine = settings[settings["finding"] == finding.name]
        sections.append(
            Section(
                f"{finding.name} (layer {finding.layer})",
                figure=figure,
                caption=f"95 % intervals over {measured.unit}s; filled: p at most 0.05, Holm over settings.",
                table=mine[
                    [
                        "setting",
                        "kind",
                        "layer",
                        "estimate",
                        "low",
                        "high",
                        "p",
                        "p_corrected",
                        "survives",
                        "n_units",
                        "n_tokens",
                        "note",
                    ]
                ],
            )
        )
    return base.Study(
        name="robustness",
        title="Which findings survive other settings?",
        about=tuple(base.about(measured)),
        hypothesis=HYPOTHESIS,
        decision=decision,
        verdict=tuple(_verdict(decision, settled, survival)),
        findings=settled,
        flags=_flags(survival),
        not_tested=tuple(_not_tested(measured, untested)),
        sections=tuple(sections),
        tables={"settings": settings, "survival": survival},
        figures=figures,
        provenance=base.provenance(measured),
        tokens=None,
    )


# -- findings -----------------------------------------------------------------------------------------------------------------------


def _tagged(measured: Measured, untested: list[str]) -> tuple[pd.DataFrame, bool]:
    """The measured tokens with their words' tags, and whether there are any; why not goes to `untested`."""
    try:
        if measured.capture.passages is None:
            raise TextError("token ids were given, not texts.")
        return tagged_tokens(measured, "auto")[0], True
    except TextError as error:
        untested.append(f"Function against content words: {error}")
        return measured.table, False


def _findings(measured: Measured, importance: str, tagged: bool) -> list[Finding]:
    options: dict[str, Any] = {"unit": measured.unit, "seed": measured.seed}

    def above(part: pd.DataFrame) -> pd.DataFrame:
        table = part.assign(compression=part["compression"] - part["compression_random"])
        table.attrs = dict(part.attrs)
        return stats.before_after(table, "compression", n_resamples=4999, **options)

    def goes_with(other: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
        return lambda part: stats.partial_correlation(part, "compression", other, **options)

    def function_words(part: pd.DataFrame) -> pd.DataFrame:
        words = word_table(part, "mean")
        words["kind"] = words["tag"].map({**dict.fromkeys(FUNCTION, "function"), **dict.fromkeys(CONTENT, "content")})
        return stats.compare_groups(
            words,
            "compression",
            "kind",
            groups=("function", "content"),
            paired=True,
            controls=stats.CONTROLS,
            n_resamples=4999,
            **options,
        )

    answer = [
        Finding("differs from random neighbors", "random", above),
        Finding("goes with surprisal", "surprisal", goes_with("surprisal")),
        Finding(f"goes with {importance}", importance, goes_with(importance)),
    ]
    if tagged:
        answer.append(Finding("function words differ from content words", "function-content", function_words))
    if measured.contrast is not None:
        sides = (measured.contrast.first, measured.contrast.second)
        paired = is_paired(measured.table)

        def contrasted(part: pd.DataFrame) -> pd.DataFrame:
            return stats.compare_groups(part, "compression", "contrast", groups=sides, paired=paired, n_resamples=4999, **options)

        answer.append(Finding(f"contrast {measured.contrast.title}", "contrast", contrasted))
    return answer


def _tested(finding: Finding, setting: Setting) -> pd.DataFrame:
    """One finding under one setting, at its layer (or the one that stands for it in another model)."""
    layer = finding.layer if setting.at is None else setting.at[finding.layer]
    part = setting.table[setting.table["layer"] == layer]
    part.attrs = dict(setting.table.attrs)
    try:
        if finding.question == "random" and part["compression_random"].isna().all():
            raise StudyError("expected a random-neighbor control, got none for this score.")
        found = finding.test(part)
    except BasinLensError as error:
        found = base.empty_finding("compression", "").assign(note=f"not tested: {error}", layer=layer)
    return found.assign(finding=finding.name, question=finding.question, setting=setting.name, kind=setting.kind)


# -- what survives ------------------------------------------------------------------------------------------------------------------


def _corrected(settings: pd.DataFrame) -> pd.DataFrame:
    """Holm over the settings of each finding, the twin in a family of its own; whether sign and significance stay."""
    parts = []
    for name in settings["finding"].unique():
        mine = settings[settings["finding"] == name]
        twin = mine["kind"] == "twin"
        done = (
            pd.concat([stats.correct(mine[~twin], "holm"), stats.correct(mine[twin], "holm")])
            if twin.any()
            else stats.correct(mine, "holm")
        )
        own = done.loc[done["setting"] == "as run", "estimate"].iloc[0]
        same = np.sign(done["estimate"] - done["null"].fillna(0)) == np.sign(own)
        done["survives"] = (same & (done["p_corrected"] <= base.ALPHA)).astype("boolean")
        done.loc[done["p"].isna(), "survives"] = pd.NA
        parts.append(done)
    return pd.concat(parts, ignore_index=True)


def _survival(settings: pd.DataFrame, settled: pd.DataFrame) -> pd.DataFrame:
    """One row per finding: does it hold, in how many settings does it stay, where does it not, and is it there in the twin."""
    lines = []
    for row in base.rows(settled):
        mine = settings[(settings["finding"] == row.finding) & (settings["setting"] != "as run")]
        twin = mine[mine["kind"] == "twin"]
        rest = mine[(mine["kind"] != "twin") & mine["survives"].notna()]
        lost = rest[~rest["survives"].astype(bool)]["setting"].tolist()
        lines.append({
            "finding": row.finding, "layer": row.layer, "holds_on_held_out_half": bool(row.holds), "estimate": row.estimate,
                "p_corrected": row.p_corrected,
            "settings": len(rest), "survives": len(rest) - len(lost), "lost_under": "; ".join(lost) or "none",
            "in_random_twin": bool(twin["survives"].fillna(False).any()) if len(twin) and twin["survives"].notna().any() else None,
            "not_tested": int(mine["survives"].isna().sum()),
        })  # fmt: skip
    return pd.DataFrame(lines)


def _with_survival(settled: pd.DataFrame, survival: pd.DataFrame) -> pd.DataFrame:
    """A finding holds if it holds on the held-out half, under every setting, and not in the twin."""
    answer = settled.copy()
    whole = (survival["survives"] == survival["settings"]) & ~survival["in_random_twin"].fillna(False).astype(bool)
    answer["holds"] = answer["holds"].to_numpy(bool) & whole.to_numpy(bool)
    answer["note"] = [
        f"survives {row.survives} of {row.settings} settings (lost under: {row.lost_under})"
        f"{', also in the random twin' if row.in_random_twin else ''}; {note}"
        for row, note in zip(base.rows(survival), answer["note"], strict=True)
    ]
    return answer


def _flags(survival: pd.DataFrame) -> pd.DataFrame:
    """A flag per finding for settings that lose it, and one if the twin shows it."""
    lines: list[dict[str, Any]] = []
    for row in base.rows(survival):
        lost: Any = pd.NA
        why = f"not checked: {row.finding} does not hold"
        if row.holds_on_held_out_half:
            lost = row.survives < row.settings
            why = f"{row.finding}: survives {row.survives} of {row.settings}; lost under: {row.lost_under}"
        common = {"score": "compression", "layer": row.layer, "question": row.finding}
        lines.append({"flag": "lost under another setting", **common, "raised": lost, "why": why})
        there: Any = pd.NA if row.in_random_twin is None else row.in_random_twin
        why = (
            "not checked" if row.in_random_twin is None else "also in a model that has learned nothing" if there else "absent there"
        )
        lines.append({"flag": "appears in the random twin", **common, "raised": there, "why": why})
    return pd.DataFrame(lines).astype({"layer": "Int64", "raised": "boolean"})


def _verdict(decision: base.Decision, settled: pd.DataFrame, survival: pd.DataFrame) -> list[str]:
    count = (
        f"{int(settled['holds'].sum())} of {len(settled)} findings hold under every setting and are absent from the random twin."
    )
    told = [base.opening(decision, "Every finding survives every setting and is absent from the random twin.", count)]
    if decision.startswith("in part"):
        told.append(count)
    for row, last in zip(base.rows(settled), base.rows(survival), strict=True):
        base_line = "holds on the held-out half" if last.holds_on_held_out_half else "does not hold on the held-out half"
        twin = "not checked in the random twin" if last.in_random_twin is None else (
            "ALSO IN THE RANDOM TWIN" if last.in_random_twin else "absent from the random twin"
        )  # fmt: skip
        survived = f"survives {last.survives} of {last.settings} settings, lost under: {last.lost_under}; {twin}"
        # What is not there cannot be lost.
        rest = survived if last.holds_on_held_out_half else f"so there is nothing to lose; {twin}"
        told.append(
            f"{row.finding} (layer {last.layer}): {base_line} ({row.effect} {row.estimate:+.3f}, corrected p "
            f"{base.in_words(row.p_corrected)}); {rest}."
        )
    return told


def _not_tested(measured: Measured, untested: list[str]) -> list[str]:
    return [
        *untested,
        "Each finding at other layers than its own, and in more than one sequence of a document.",
        "Settings in combination: each was changed alone.",
        f"Other lengths than {measured.settings['max_length']} tokens, and other texts.",
    ]
