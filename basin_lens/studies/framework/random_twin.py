"""The tokens of a run read by a model of the same shape whose weights have learned nothing."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Bool

from basin_lens import tables
from basin_lens.analyzers import Compression
from basin_lens.analyzers.crossed_table import Displaced, PartnersFrom
from basin_lens.capture import Bank, Capture, read_states
from basin_lens.errors import BasinLensError
from basin_lens.model import HookedModel, provenance, random_twin
from basin_lens.scoring import analyze
from basin_lens.studies.framework.measured_texts import Measured

TWIN = "compression_random_twin"


def with_random_twin(model: HookedModel, measured: Measured, table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The run's table with the compression of the same tokens in the random twin, `TWIN` (nats), and why there is none, or "".

    The twin has states of its own, and so neighbors and groups of its own, among the tokens that the run measured.
    """
    layers, scored = tuple(measured.layers), scored_tokens(measured, "compression")
    try:
        twin = random_twin(model, seed=measured.seed)
        made = analyze(
            twin,
            same_tokens(measured.capture, twin, layers),
            [compression_of(measured, nulls=False)],
            layers=layers,
            bank=same_bank(measured, twin, layers),
            queries=scored,
            seed=measured.seed,
            progress=False,
        )
    except BasinLensError as error:
        return table, f"The random twin: {error}"
    return tables.with_columns(taken_over(table, made, {TWIN: "compression"}), {TWIN: tables.Column("nats")}), ""


def compression_of(measured: Measured, nulls: bool | tuple[Displaced, ...], partners: PartnersFrom | None = None) -> Compression:
    """The run's own score, of all tokens asked for; partners as the run's, if none are named."""
    own = measured.settings
    whose = partners or own["partners"]
    return Compression(k=own["k"], context=own["context"], exclude=own["exclude"], nulls=nulls, partners=whose)


def scored_tokens(measured: Measured, column: str) -> Bool[np.ndarray, " rows"]:
    """The tokens with a value of this column at one of the run's layers at least."""
    return np.any([part[column].notna().to_numpy() for _, part in measured.table.groupby("layer")], axis=0)


def same_bank(measured: Measured, model: HookedModel, layers: tuple[int, ...]) -> Bank:
    """The run's bank as a model of the same tokenizer reads it."""
    bank = measured.bank
    return read_states(model, same_tokens(bank, model, layers), progress=False) if isinstance(bank, Capture) else bank


def taken_over(table: pd.DataFrame, made: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """The same tokens with columns of another table of them: `{name here: name there}`."""
    keys = ["layer", "seq", "pos"]
    there = made.set_index(keys)[list(dict.fromkeys(columns.values()))]
    found = there.reindex(pd.MultiIndex.from_frame(table[keys]))
    return tables.assign(table, **{name: found[column].to_numpy() for name, column in columns.items()})


def same_tokens(capture: Capture, model: HookedModel, layers: tuple[int, ...]) -> Capture:
    """The very tokens of a capture with their texts, documents and labels, for another model of the same tokenizer; unread."""
    source = "tokens" if capture.passages is None else "texts"
    held = {"max_length": capture.settings.get("max_length"), "bos": capture.settings.get("bos"), "source": source}
    return Capture(
        capture.sequences,
        capture.passages,
        list(capture.docs),
        [dict(label) for label in capture.labels],
        dict(capture.strings),
        layers,
        provenance(model),
        held,
    )
