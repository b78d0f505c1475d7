"""What should keep anyone from believing a contrast: the bank, the template, controls that go with the two kinds."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from basin_lens import stats, tables
from basin_lens.scoring.bank_overlap import WARN
from basin_lens.studies.framework.another_bank import OWN_BANK, is_own_texts
from basin_lens.studies.framework.measured_texts import HEADLINE, Measured
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.framework.wording import in_words
from basin_lens.texts import skeleton_of

# Of pairs of a token of each kind: where so many or more are in one order, no text has tokens of both kinds at equal values.
APART = 0.95


def inseparable_controls(table: pd.DataFrame, measured: Measured, paired: bool) -> dict[str, str]:
    """Standard controls that cannot be held fixed in a contrast, and why: missing, constant, or going with the two kinds.

    Looked at on the controls alone, never on a score. Values are taken within sequences where kinds are compared within them.
    """
    assert measured.contrast is not None
    first, second = measured.contrast.first, measured.contrast.second
    with_controls = stats.add_controls(table, frequency=measured.frequency)
    rows = with_controls[with_controls["contrast"].isin([first, second])]
    answer: dict[str, str] = {}
    for name in stats.CONTROLS:
        if name not in rows or not np.isfinite(rows[name].to_numpy(float)).any():
            answer[name] = "not measured"
            continue
        values = rows[name].to_numpy(float)
        if paired:
            values = values - rows.assign(_=values).groupby(["layer", "doc", "seq"])["_"].transform("mean").to_numpy()
        share = _in_order(values, rows["contrast"].to_numpy() == first)
        if np.isnan(share):
            answer[name] = "the same for every token"
        elif max(share, 1 - share) >= APART:
            higher, lower = (first, second) if share > 0.5 else (second, first)
            answer[name] = f"{max(share, 1 - share):.0%} of pairs: higher for {higher} than for {lower}"
    return answer


def _in_order(values: np.ndarray, is_first: np.ndarray) -> float:
    """Share of pairs whose first is higher, ties counting half; NaN where nothing varies."""
    known = np.isfinite(values)
    one, other = np.round(values[known & is_first], 9), np.round(values[known & ~is_first], 9)
    if not len(one) or not len(other) or np.ptp(np.concatenate([one, other])) == 0:
        return float("nan")
    return float(mannwhitneyu(one, other).statistic) / (len(one) * len(other))


def of_layer(measured: Measured, by_bank: pd.DataFrame, layer: int) -> list[dict[str, object]]:
    """Red flags of the difference at the layer of the finding."""
    answer: list[dict[str, object]] = []
    here = {str(row.bank): row for row in named_rows(by_bank[by_bank["layer"] == layer])}
    own = here[OWN_BANK].estimate
    for bank, row in here.items():
        if bank == OWN_BANK:
            continue
        known = bool(np.isfinite(own * row.estimate))
        told = f"{own:+.3f} nats, and {row.estimate:+.3f} (p {in_words(row.p)}) with {bank} as bank"
        answer.append(
            {
                "flag": "sign depends on the bank",
                "layer": layer,
                "raised": own * row.estimate < 0 if known else pd.NA,
                "value": row.estimate,
                "why": told if known else f"not checked: no estimate with {bank} as bank",
            }
        )
    if is_own_texts(measured):
        (facts,) = tables.provenance(measured.table).values()
        share = float(facts["search"]["same_skeleton"].get(str(layer), np.nan))
        if not np.isnan(share):
            answer.append(
                {
                    "flag": "neighbors on the skeleton of their query",
                    "layer": layer,
                    "raised": share > WARN,
                    "value": share,
                    "limit": WARN,
                    "why": f"{share:.0%} of neighbors: the bank is other prompts of the same template",
                }
            )
    return answer


def of_run(measured: Measured) -> list[dict[str, object]]:
    """Red flags of the run as a whole."""
    answer: list[dict[str, object]] = []
    skeletons = skeletons_of(measured)
    if skeletons is not None and measured.n_units > 1:
        answer.append(
            {
                "flag": "one template",
                "layer": pd.NA,
                "raised": skeletons == 1,
                "value": float(skeletons),
                "why": f"different texts once their spans are taken out: {skeletons}; what is found is of these",
            }
        )
    return answer


def skeletons_of(measured: Measured) -> int | None:
    """How many different texts are left of those with spans, once the spans are taken out; None: none has spans."""
    passages = measured.capture.passages
    if passages is None or measured.contrast is None or measured.contrast.by != "span":
        return None
    held = [passages[index] for index in {sequence.passage for sequence in measured.capture.sequences}]
    return len({skeleton_of(passage.text, passage.spans) for passage in held})


def without_scores(measured: Measured, layer: int) -> Sequence[str]:
    """How many tokens of the two kinds have no score at a layer, and why: sentences for the report."""
    assert measured.contrast is not None
    sides = (measured.contrast.first, measured.contrast.second)
    here = measured.table[(measured.table["layer"] == layer) & measured.table["contrast"].isin(sides)]
    missing = here[HEADLINE].isna()
    if not missing.any():
        return (f"All {len(here)} tokens of the two kinds have a score at layer {layer}.",)
    counts = [
        f"{int((here['contrast'] == name)[missing].sum())} of {int((here['contrast'] == name).sum())} of {name}" for name in sides
    ]
    first, few = here["pos"] == 0, here["contraction"].isna() & (here["pos"] > 0)
    why = {
        "the first token of a text has none": missing & first,
        "too few neighbors, or beyond the tokens that were to be measured": missing & few,
        f"tokens of a group may share no neighbor, and tokens at one place of a template share theirs{_cure(measured)}": missing
        & ~first
        & ~few,
    }
    told = "; ".join(f"{reason} ({int(which.sum())})" for reason, which in why.items() if which.any())
    return (f"Without a score at layer {layer}: {', '.join(counts)}. {told[0].upper()}{told[1:]}.",)


def _cure(measured: Measured) -> str:
    """What gives such tokens a score: partners from another bank, which spans have where contrasts alone are measured.

    Nothing does where they have them already, nor for labels, whose tokens are crossed with one another under every bank.
    """
    assert measured.contrast is not None
    if measured.settings.get("partners") == "bank" or measured.contrast.by != "span":
        return ""
    changes = ['bank="reference"'] if measured.settings["bank"] == "the texts themselves" else []
    if any(study != "contrast" for study in measured.studies):
        changes.append("the study contrast measured by itself")
    return f": {' and '.join(changes)} give{'s' * (len(changes) == 1)} each partners of its own" if changes else ""


def spans_beyond(measured: Measured) -> Sequence[str]:
    """What is scored where a contrasted span is no whole tokens: sentences for the report."""
    capture, contrast = measured.capture, measured.contrast
    if capture.passages is None or contrast is None or contrast.by != "span":
        return ()
    tokens: dict[str, int] = dict.fromkeys((contrast.first, contrast.second), 0)
    beyond: dict[str, list[str]] = {name: [] for name in tokens}
    for sequence in capture.sequences:
        passage = capture.passages[sequence.passage]
        for name in tokens.keys() & passage.spans.keys():
            start, end = passage.spans[name]
            for a, b in zip(sequence.starts, sequence.ends, strict=True):
                if not (a < end and start < b):
                    continue
                tokens[name] += 1
                token = passage.text[a:b]
                # A space in front belongs to the token in most tokenizers, and to no span.
                if a + len(token) - len(token.lstrip()) < start or b > end:
                    beyond[name].append(token)
    told = [f"Scored of the spans: {', '.join(f'{count} tokens of {name}' for name, count in tokens.items())}."]
    for name, found in beyond.items():
        if found:
            some = ", ".join(dict.fromkeys(repr(token) for token in found[:3]))
            told.append(f"{len(found)} tokens of {name} reach beyond the span and are scored whole, such as {some}.")
    return tuple(told)
