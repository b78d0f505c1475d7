"""The texts of a finished run as a capture that was not read: from its table, or from the texts themselves."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.capture import Capture
from basin_lens.errors import StudyError
from basin_lens.model import HookedModel
from basin_lens.scoring.token_rows import row_facts, texts_hash
from basin_lens.studies.framework.run_terms import labels_of
from basin_lens.tables import RunTable
from basin_lens.tables.frame import described_by_json
from basin_lens.texts import Texts
from basin_lens.texts.tokens import TokenSequence, token_strings
from basin_lens.values import Plain

_ROWS = ("passage", "doc", "seq", "start", "end", "span")
_CURE = "Give the texts as the run had them, or none."


def capture_of(model: HookedModel, run: RunTable, table: pd.DataFrame) -> Capture:
    """The tokens in a run's table as a capture that was not read, without texts.

    Args:
        model: the run's.
        run: whose table it is.
        table: its rows at some layers.

    Raises:
        StudyError: rows that are not the run's tokens.
    """
    layers = tuple(int(layer) for layer in table["layer"].unique())
    parts = [part for _, part in table[table["layer"] == layers[0]].groupby("seq", sort=False)]
    sequences = [
        TokenSequence(
            tuple(part["token_id"].tolist()),
            int(part["passage"].iloc[0]),
            tuple(part["start"].tolist()),
            tuple(part["end"].tolist()),
        )
        for part in parts
    ]
    held = [{name: _plain(part[name].iloc[:1].astype(object).item()) for name in labels_of(run)} for part in parts]
    capture = Capture(
        sequences=sequences,
        passages=None,
        docs=[str(part["doc"].iloc[0]) for part in parts],
        # Of texts without a label, a table has None or NaN.
        labels=[{name: value for name, value in one.items() if value is not None} for one in held],
        strings=token_strings(model, (token for one in sequences for token in one.tokens)),
        layers=layers,
        model=run.provenance["model"],
        settings=dict(run.provenance["capture"]),
    )
    _refuse_other_tokens(capture, run)
    return capture


def capture_again(model: HookedModel, run: RunTable, table: pd.DataFrame, texts: Texts) -> Capture:
    """The texts of a run, cut as the run cut them, unread.

    Args:
        model: the run's.
        run: that was made of the texts.
        table: its rows at some layers.
        texts: with the documents, labels and spans that the run had.

    Raises:
        StudyError: other tokens, documents, spans or labels than the run's.
    """
    told, layers = run.provenance["capture"], [int(layer) for layer in table["layer"].unique()]
    bos = told.get("bos") is not None
    capture = Capture.plan(model, texts, layers=layers, max_length=int(told["max_length"]), prepend_bos=bos)
    _refuse_other_tokens(capture, run)
    rows, labels = row_facts(capture)
    there = table[table["layer"] == layers[0]]
    for name in _ROWS:
        _refuse_others(name, list(rows[name]), there, run)
    known = labels_of(run)
    if missing := [name for name in known if name not in labels]:
        raise StudyError(f"expected texts with the label {missing[0]!r}, which the run has, got them without it. {_CURE}")
    if more := [name for name in labels if name not in known]:
        raise StudyError(f"expected texts with the run's labels {known}, got {more[0]!r} besides. {_CURE}")
    for name in known:
        _refuse_others(name, labels[name], there, run)
    return capture


def long_enough(capture: Capture, table: pd.DataFrame, chosen: Capture, fewest: int) -> pd.DataFrame:
    """The rows of a run's table that are of its sequences of at least `fewest` tokens, numbered as `chosen` has them.

    Args:
        capture: all of the run's sequences.
        table: a row per (layer, token) of them.
        chosen: those of at least `fewest` tokens.
        fewest: of a sequence.
    """
    if len(chosen.sequences) == len(capture.sequences):
        return table
    keep = np.tile((capture.lengths.numpy() >= fewest)[capture.row_seq.numpy()], table["layer"].nunique())
    kept = tables.select(table, keep).reset_index(drop=True)
    numbered = tables.assign(kept, seq=np.tile(chosen.row_seq.numpy(), kept["layer"].nunique()))
    return described_by_json(numbered, {run: {**facts, "copies": chosen.copies} for run, facts in tables.provenance(table).items()})


def _refuse_other_tokens(capture: Capture, run: RunTable) -> None:
    if texts_hash(capture) != run.provenance["texts"]:
        raise StudyError(
            f"expected the texts of the run in {str(run.folder)!r}, got {capture.n_rows} tokens whose hash is another (the run has "
            f"{run.n_rows}). Give the texts that it was made of, or none."
        )


def _refuse_others(name: str, given: Sequence[object], there: pd.DataFrame, run: RunTable) -> None:
    """Refuse texts of which some token has another document, span, or value of a label than in the run."""
    for row, one, own in zip(chain(range(len(there))), given, there[name].tolist(), strict=True):
        if _plain(one) != _plain(own):
            at = there.iloc[row]
            what = {"doc": "document", "start": "place in the text", "end": "place in the text"}.get(name, name)
            raise StudyError(
                f"expected the texts of the run in {str(run.folder)!r}, got other ones: the {what} of passage {at['passage']} "
                f"(token {at['pos']} of sequence {at['seq']}) is {_plain(own)!r} in the run and {_plain(one)!r} in the texts. "
                f"{_CURE}"
            )


def _plain(value: Any) -> Plain:
    """A value as Python has it; None for what a table has where there is none."""
    found: Plain = value.item() if isinstance(value, np.generic) else None if value is pd.NA else value
    return None if isinstance(found, float) and math.isnan(found) else found
