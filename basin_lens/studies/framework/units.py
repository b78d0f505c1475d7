"""Independent units: what tests and intervals are over."""

from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd

from basin_lens import stats, tables
from basin_lens.capture import Capture
from basin_lens.errors import StudyError

FEWEST_UNITS = 6  # the statistics refuse fewer
FEWEST_DOCUMENTS = 16  # with fewer, documents cannot be halved into some that choose and some that test
# Columns that studies put beside the labels, in place of one of that name.
_MADE = frozenset(("contrast", "integrated_gradients", "kind", "noun_verb", "tag", "word", "word_text"))


@runtime_checkable
class Units(Protocol):
    """What a declared test asks of what was measured: a `Measured`, or a design of its own."""

    @property
    def n_units(self) -> int: ...
    @property
    def unit(self) -> str: ...
    @property
    def seed(self) -> int: ...


def unit_keys(unit: str) -> list[str]:
    """Columns that tell units apart."""
    return {"document": ["doc"], "sequence": ["doc", "seq"]}.get(unit, [unit])


def units_in(table: pd.DataFrame, measured: Units) -> int:
    """How many units the table's rows belong to, copies of a text counted once."""
    return stats.design.distinct_units(table, measured.unit)


def count_units(capture: Capture, unit: str) -> int:
    """How many units the capture's sequences belong to, copies of a text counted once.

    Raises:
        StudyError: a label that not all of them have.
    """
    if unit in _MADE:
        raise StudyError(
            f"expected a label as unit with a name of its own, got {unit!r}, a column that studies make. Rename the label."
        )
    if unit not in ("sequence", "document") and any(unit not in label for label in capture.labels):
        known = sorted({name for label in capture.labels for name in label})
        at = next(seq for seq, label in enumerate(capture.labels) if unit not in label)
        raise StudyError(
            f'expected unit "sequence", "document" or a label that every text has, got {unit!r}, which passage '
            f"{capture.sequences[at].passage} (document {capture.docs[at]!r}) lacks; labels: {known}."
        )
    seqs = np.repeat(np.arange(len(capture.sequences)), capture.lengths.numpy())
    rows = pd.DataFrame({"doc": np.array(capture.docs, object)[seqs], "seq": seqs})
    if unit not in ("sequence", "document"):
        rows[unit] = np.array([str(label[unit]) for label in capture.labels], object)[seqs]
    return stats.design.distinct_units(tables.described(rows, {"": tables.Provenance(copies=capture.copies)}), unit)
