"""Rows of a table by layer, with the sequence, document and unit of analysis of each; and the tables that statistics refuses."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from basin_lens import tables
from basin_lens.errors import StudyError, TableError
from basin_lens.tables.distinct import Once, codes_of, once
from basin_lens.values import Layers, several, whole_or_none

# What a caller may give as layers of a table: whole numbers of its column `layer`, or a single one; None: all.
WhichLayers = Layers

# With fewer, no sign-flip (2 / 2^6 = 0.03) and no exchange of labels (2 / 70 = 0.03) could reach 0.05.
FEWEST = 6
FEWEST_PER_GROUP = 4
# Cluster-robust errors and cross-fitting need more.
FEWEST_CLUSTERS = 10


@dataclass(frozen=True)
class Rows:
    """Rows of one layer: columns, and codes of the sequence, unit and document of each row.

    Codes count from 0 over the whole table, so that they are the same at every layer. Texts that are copies of others are not among
    the rows; `copies` says how many. `fold`: units, those that share copies under whatever labels in one: for splits.
    `reference_error`: standard error of what a column is held against, for columns that have a reference: it is in the mean of the
    rows, and not in differences between them, slopes or ranks.
    """

    layer: object  # an int, or pandas' NA in a table without layers
    values: Mapping[str, Float[np.ndarray, " rows"]]
    labels: Mapping[str, np.ndarray]
    sequence: Int[np.ndarray, " rows"]
    unit: Int[np.ndarray, " rows"]
    document: Int[np.ndarray, " rows"]
    fold: Int[np.ndarray, " rows"]
    copies: str
    infinite: int = 0  # rows left out because a value was infinite
    reference_error: Mapping[str, float] = field(default_factory=dict)

    def where(self, keep: Bool[np.ndarray, " rows"] | Int[np.ndarray, " kept"]) -> "Rows":
        """The rows marked, or those at these places."""
        return replace(
            self,
            values={name: value[keep] for name, value in self.values.items()},
            labels={name: label[keep] for name, label in self.labels.items()},
            sequence=self.sequence[keep],
            unit=self.unit[keep],
            document=self.document[keep],
            fold=self.fold[keep],
        )

    def finite(self, *names: str) -> "Rows":
        """The rows where all these columns are finite; those with infinite values are counted."""
        keep = np.ones(len(self.sequence), bool)
        endless = np.zeros(len(self.sequence), bool)
        for name in names:
            keep &= np.isfinite(self.values[name])
            endless |= np.isinf(self.values[name])
        return self if keep.all() else replace(self.where(keep), infinite=self.infinite + int(endless.sum()))

    def constant_column(self, *names: str) -> str | None:
        """The first of these columns that does not vary here."""
        return next((name for name in names if constant(self.values[name])), None)

    def with_values(self, **values: Float[np.ndarray, " rows"]) -> "Rows":
        """The same rows with columns replaced or added."""
        return replace(self, values={**self.values, **values})

    def counts(self) -> dict[str, int]:
        """How much data there is: the columns that every result has."""
        return {
            "n_units": len(np.unique(self.unit)),
            "n_sequences": len(np.unique(self.sequence)),
            "n_documents": len(np.unique(self.document)),
            "n_tokens": len(self.sequence),
        }

    def unit_of_sequence(self) -> tuple[Int[np.ndarray, " sequences"], Int[np.ndarray, " sequences"]]:
        """Codes of the sequences here, ascending, and the unit of each."""
        codes, first = np.unique(self.sequence, return_index=True)
        return codes, self.unit[first]

    def unit_means(self, name: str) -> tuple[Int[np.ndarray, " units"], Float[np.ndarray, " units"]]:
        """Codes of the units here, and the mean over a unit's sequences of the mean over a sequence's tokens."""
        _, means = group_means(self.sequence, self.values[name])
        _, units = self.unit_of_sequence()
        return group_means(units, means)


def group_means(codes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes there, ascending, and the mean of the values of each."""
    there, inverse, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    return there, np.bincount(inverse, weights=values, minlength=len(there)) / sizes


def split(
    table: pd.DataFrame,
    columns: Sequence[str],
    *,
    layers: WhichLayers = None,
    unit: str = "document",
    labels: Sequence[str] = (),
) -> Iterator[Rows]:
    """The rows of each layer, in order of sequence, each text once; a table without layers is one layer.

    Raises:
        TableError: several runs, mixed weight processing, a missing column or layer, a column that holds no numbers, a unit that
            changes within a sequence.
    """
    check_run(table)
    columns, labels = list(dict.fromkeys(columns)), list(dict.fromkeys(labels))
    tables.require(table, "doc", "seq", *columns, *labels)
    layered = _layers(table) if "layer" in table.columns else np.zeros(len(table), int)
    found = texts_once(table, unit, labels)
    sequence = found.sequence
    there = sorted(np.unique(layered).tolist())
    if layers is not None:
        there = asked_layers(table, layers)
    values = {name: numbers(table, name) for name in columns}
    errors = {name: tables.reference_error(table, name) for name in columns}
    texts = {name: table[name].to_numpy(dtype=object) for name in labels}
    whole = Rows(pd.NA, values, texts, sequence, found.units, found.documents, found.folds, found.note)
    order = np.lexsort((sequence, layered))
    starts = np.searchsorted(layered[order], there, side="left").tolist()
    ends = np.searchsorted(layered[order], there, side="right").tolist()
    for layer, first, last in zip(there, starts, ends, strict=True):
        at = order[first:last]
        of_reference = {name: float(error[at].max()) for name, error in errors.items() if len(at) and error[at].any()}
        rows = replace(whole.where(at[found.keep[at]]), reference_error=of_reference)
        yield replace(rows, layer=layer) if "layer" in table.columns else rows


def folds(table: pd.DataFrame, units: Int[np.ndarray, " rows"], unit: str) -> Int[np.ndarray, " rows"]:
    """Codes of units for splits: those that share copies of a text, under whatever labels, have one code."""
    return once(table, *codes_of(table), units, unit).folds if {"doc", "seq"} <= set(table.columns) else units


def texts_once(table: pd.DataFrame, unit: str = "document", labels: Sequence[str] = ()) -> Once:
    """Every text of a table once, as `split` takes them.

    Raises:
        TableError: a missing column, a unit that changes within a sequence.
    """
    tables.require(table, "doc", "seq", *labels)
    sequence, document = codes_of(table)
    return once(table, sequence, document, _units(table, unit, sequence, document), unit, labels)


def distinct_units(table: pd.DataFrame, unit: str) -> int:
    """How many units the rows belong to, copies of a text counted once."""
    found = texts_once(table, unit)
    return len(np.unique(found.units[found.keep]))


def check_run(table: pd.DataFrame) -> None:
    """Refuse rows of several runs, and pairs of runs whose weights were processed differently.

    Raises:
        TableError: either, or a table without rows.
    """
    if table.empty:
        raise TableError("expected a table with rows, got none. Check the selection.")
    known = tables.runs(table)
    runs = table["run"].unique().tolist() if "run" in table.columns else list(known)
    models = [known[run].model or {} for run in runs if run in known]
    processing = [str(model["weight_processing"]) for model in models if "weight_processing" in model]
    if len(set(processing)) > 1:
        raise TableError(
            f"expected runs of one weight processing, got {sorted(set(processing))}: folding and centering change the variances "
            "that scores are made of. Load the models the same way and measure again."
        )
    if "run" in table.columns and len(runs) > 1:
        raise TableError(
            f"expected a table of one run, got {len(runs)}: the same tokens would count several times. Test each, "
            "table[table.run == ...], or pair two runs with basin_lens.compare."
        )


def asked_layers(table: pd.DataFrame, layers: WhichLayers) -> list[int]:
    """The layers asked for, ascending.

    Raises:
        TableError: the table lacks one, or these are no layers.
    """
    there = sorted(table["layer"].unique().tolist()) if "layer" in table.columns else []
    asked = [layer if (number := whole_or_none(layer)) is None else number for layer in several(layers) or []]
    if not asked or any(layer not in there for layer in asked):
        raise TableError(f"expected layers of the table, got {layers!r}; it has {there}.")
    return [layer for layer in there if layer in asked]


def names_of(columns: str | Sequence[str], what: str = "scores") -> list[str]:
    """One or several column names as a list.

    Raises:
        TableError: none, or one twice.
    """
    names = [columns] if isinstance(columns, str) else list(columns)
    if not names or len(set(names)) != len(names):
        raise TableError(f"expected at least one column as {what}, each once, got {columns!r}.")
    return names


def pairs_of(scores: str | Sequence[str], against: str | Sequence[str]) -> list[tuple[str, str]]:
    """Each score with each other column, those of one other column together.

    Raises:
        TableError: none, or one twice.
    """
    names, others = names_of(scores), names_of(against, "against")
    pairs = [(score, other) for other in others for score in names if score != other]
    names_of([score for score, _ in pairs[:1]], "scores other than against")
    return pairs


def numbers(table: pd.DataFrame, name: str) -> Float[np.ndarray, " rows"]:
    """A column as float64.

    Raises:
        TableError: it holds no numbers.
    """
    column = table[name]
    if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
        raise TableError(f"expected numbers in column {name!r}, got {column.dtype}. Name a score, or turn it into numbers.")
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def constant(values: np.ndarray) -> bool:
    """Whether there is nothing to tell these finite values apart but rounding."""
    return len(values) == 0 or bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def without_rounding(differences: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Differences of these values, 0 where the values' own rounding makes them: else a test finds rounding."""
    size = np.abs(values).max(initial=0.0)
    return np.where(np.abs(differences) <= 1e-12 * size, 0.0, differences)


def enough(count: int, needed: int, what: str) -> None:
    """Refuse too little data.

    Raises:
        StudyError: fewer than needed.
    """
    if count < needed:
        raise StudyError(
            f"expected at least {needed} {what}, got {count}: tokens of one text are not independent, so more tokens do not help, "
            "and copies of a text count once. Add other texts."
        )


def refuse_constant(lines: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Refuse a column that was constant at every layer asked for; where it was so at some layers only, they hold NaN and a note.

    Raises:
        TableError: a constant column.
    """
    for name in columns:
        notes = [bool(line.get("_constant") == name) for line in lines if name in (line.get("score"), line.get("against"))]
        if notes and all(notes):
            raise TableError(
                f"expected a column that varies, got {name!r}, which is constant at every layer asked for. Leave it out."
            )


def _layers(table: pd.DataFrame) -> Int[np.ndarray, " rows"]:
    """The layer of each row.

    Raises:
        TableError: layers that are missing or no whole numbers.
    """
    held = table["layer"]
    numbers = held.to_numpy(np.float64, na_value=np.nan) if pd.api.types.is_numeric_dtype(held.dtype) else None
    if numbers is None and isinstance(held.dtype, pd.CategoricalDtype) and pd.api.types.is_numeric_dtype(held.cat.categories):
        numbers = held.astype(float).to_numpy()
    if numbers is None or not (np.isfinite(numbers) & (numbers == np.round(numbers))).all():
        raise TableError(
            f"expected a whole number as the layer of every row, got {list(held.unique()[:8])}. Number the layers; leave rows "
            "without one out."
        )
    return numbers.astype(np.int64)


def _units(table: pd.DataFrame, unit: str, sequence: np.ndarray, document: np.ndarray) -> np.ndarray:
    if unit in ("sequence", "seq"):
        return sequence
    if unit in ("document", "doc"):
        return document
    if unit not in table.columns:
        raise TableError(f'expected unit "sequence", "document" or a label of the table, got {unit!r}.')
    codes = pd.factorize(table[unit], use_na_sentinel=False)[0]
    pairs = np.unique(np.stack([sequence, codes]), axis=1)
    if len(pairs[0]) > len(np.unique(sequence)):
        raise TableError(f"expected a unit that is the same throughout a sequence, got {unit!r}, which changes within one.")
    return codes
