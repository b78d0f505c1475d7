"""Sentences that all studies share: what was measured, and what came out."""

import re

import pandas as pd

from basin_lens.studies.framework.declared_tests import ALPHA, Decision
from basin_lens.studies.framework.measured_texts import HEADLINE, Measured
from basin_lens.studies.framework.table_parts import Row
from basin_lens.values import units_said

# The package's errors say what was expected and what came.
_OF_AN_ERROR = re.compile(r"\bexpected\b.*\bgot\b", re.DOTALL)
_OF_BANK = " Compression crosses each token with tokens of that bank: intervals and p are given this bank."
_NO_NUMBER = re.compile(r"(?<![\w'\"])[+-]?nan(?![\w'\"])")


def about_measured(measured: Measured) -> list[str]:
    """What was measured on what, in sentences."""
    capture, chosen = measured.capture, measured.settings
    model = capture.model
    layers = measured.layers
    which = f"all {len(layers)}" if len(layers) == model["layers"] else f"{', '.join(map(str, layers))} of {model['layers']}"
    passed = f"{chosen['sequences_too_short']} sequences were too short" if chosen["sequences_too_short"] else ""
    left = chosen["sequences_given"] - chosen["sequences_too_short"] - len(capture.sequences)
    rest = ", ".join(x for x in (passed, f"{left} were left unread" if left else "") if x)
    sentences = [
        f"{model['name']}: {model['layers']} layers, width {model['width']}, {model['dtype']}, {model['kind']}.",
        f"{capture.n_rows:,} tokens in {units_said('sequence', len(capture.sequences))} of "
        f"{units_said('document', len(set(capture.docs)))}" + (f"; {rest}." if rest else "."),
        f"Layers {which}. Neighbors: k = {chosen['k']}, context {chosen['context']}, from {chosen['bank']}, never of "
        f"the same {chosen['exclude']}." + (_OF_BANK if chosen.get("partners") == "bank" else ""),
        *chosen.get("notes", ()),
        *_sampled(measured),
        f"Tests and intervals are over {units_said(measured.unit, measured.n_units)}; tokens of one text are not independent.",
    ]
    if measured.contrast is not None:
        sentences.append(f"Contrast: {measured.contrast.title}.")
    return sentences


def _sampled(measured: Measured) -> list[str]:
    """Of how many tokens the headline score is, where it is not of all."""
    table = measured.table
    if HEADLINE not in table.columns:
        return []
    there = table[HEADLINE].notna()
    by_layer = there.groupby(table["layer"]).sum()
    fewest, most = int(by_layer.min()), int(by_layer.max())
    tokens = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    documents = table[there]["doc"].nunique()
    if "contraction" in table.columns and int(table["contraction"].notna().sum()) <= int(there.sum()):
        return [f"Scores of neighborhoods: {tokens} tokens of a layer, of {documents} documents."]
    return [
        f"Compression and its nulls: {tokens} tokens of a layer, of {documents} documents; what is said of compression is of "
        "these. Contraction and the other scores: all tokens."
    ]


def layers_said(measured: Measured) -> str:
    """The layers measured, as a list in a sentence."""
    return ", ".join(map(str, measured.layers))


def opening(decision: Decision, yes: str, no: str) -> str:
    """The first sentence of a verdict."""
    if decision == "undecided":
        return "Undecided: with these texts no data could have passed the declared tests. More documents are needed."
    if decision == "no":
        return f"No. {no}"
    said = f"Yes. {yes}" if decision.startswith("yes") else "In part: some of the declared tests hold, others do not."
    return said + (" But red flags are raised (below): do not cite this as it stands." if decision.endswith("flags") else "")


def sentence(row: Row, unit: str = "", rows: str = "") -> str:
    """One finding in words, with its figures and its note.

    `unit`: of the estimate; if left out, that in `effect_unit`. `rows`: what was counted in `n_tokens`, such as tokens; if left
    out, their number is not told.
    """
    told = unit or getattr(row, "effect_unit", None)
    measure = f" {told}" if isinstance(told, str) and told else ""
    layer = "" if pd.isna(row.layer) else f" at layer {int(row.layer)}"
    if pd.isna(row.p):
        return f"{row.finding}: could not be tested ({why_untested(row.note)})."
    p = f"corrected p {in_words(row.p_corrected)}"
    interval = "" if pd.isna(row.low) else f" (95 % interval {row.low:+.3f} to {row.high:+.3f})"
    out = "undecided, too few units for any p to reach 0.05" if row.p_floor * row.n_tests > ALPHA else "undecided"
    holds = "holds" if row.holds else "does not hold" if row.within_reach else out
    # A study may ask for more than significance; then the note begins with what is lacking.
    denied = bool(row.p_corrected <= ALPHA and not row.holds)
    note = as_sentence(row.note, "Significant, but " if denied else "")
    found = f"{row.effect} {row.estimate:+.3f}{measure}{interval}{layer}, {p}, {_over(row)}{_counted(row, rows)}"
    return f"{row.finding}: {holds}. {found}.{note and ' '}{note}"


def _over(row: Row) -> str:
    """The units tested, and the documents that they are of where these are not the units."""
    unit, documents = getattr(row, "unit", None), units_said("document", int(row.n_documents))
    if unit == "document" and row.n_units == row.n_documents:
        return documents
    units = units_said(unit, int(row.n_units)) if isinstance(unit, str) else f"{int(row.n_units)} units"
    return f"{units}, {documents}"


def _counted(row: Row, rows: str) -> str:
    count = getattr(row, "n_tokens", None)
    return f", {int(count):,} {rows}" if rows and not pd.isna(count) else ""


def as_sentence(note: object, opening: str = "") -> str:
    """A note as a sentence of its own; nothing if there is none."""
    if not isinstance(note, str) or not note:
        return ""
    said = f"{opening}{note.rstrip('.')}."
    return said[0].upper() + said[1:]


def why_untested(note: object) -> str:
    """Why a test could not be made, for a sentence of a verdict.

    What an error said is for whoever calls the function that raised it: it stays in the table's note.

    Example:
        >>> import math
        >>> from basin_lens.studies.framework.wording import why_untested
        >>> why_untested("the words of a tag do not differ in their means")
        'the words of a tag do not differ in their means'
        >>> why_untested("not tested: expected at least 6 units, got 2. Give more."), why_untested(math.nan)
        ('too few texts for it, or texts without what it compares: the note in its table says more', 'no reason is on record')
    """
    if not isinstance(note, str) or not note.strip():
        return "no reason is on record"
    if _OF_AN_ERROR.search(note):
        return "too few texts for it, or texts without what it compares: the note in its table says more"
    return note.rstrip(".")


def without_nan(sentence: str) -> str:
    """A sentence of a verdict, with words for numbers that are not there.

    Example:
        >>> from basin_lens.studies.framework.wording import without_nan
        >>> without_nan("Means run from +nan to -0.20 nats; the word 'nan' stays.")
        "Means run from (not known) to -0.20 nats; the word 'nan' stays."
    """
    return _NO_NUMBER.sub("(not known)", sentence)


def in_words(p: float) -> str:
    """A p-value as a reader wants it."""
    if pd.isna(p):
        return "not known"
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"
