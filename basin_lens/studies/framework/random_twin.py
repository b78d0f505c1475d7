"""The tokens of a run read by a model of the same shape whose weights have learned nothing."""

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.analyzers import Compression
from basin_lens.capture import Capture, read_states
from basin_lens.errors import BasinLensError
from basin_lens.model import HookedModel, provenance, random_twin
from basin_lens.scoring import analyze
from basin_lens.studies.framework.measured_texts import Measured

TWIN = "compression_random_twin"


def with_random_twin(model: HookedModel, measured: Measured, table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The run's table with the compression of the same tokens in the random twin, `TWIN` (nats), and why there is none, or "".

    The twin has states of its own, and so neighbors and groups of its own, among the tokens that the run measured.
    """
    own, capture = measured.settings, measured.capture
    score = Compression(k=own["k"], context=own["context"], exclude=own["exclude"], nulls=False)
    asked = np.any([part["compression"].notna().to_numpy() for _, part in measured.table.groupby("layer")], axis=0)
    layers = tuple(measured.layers)
    try:
        twin = random_twin(model, seed=measured.seed)
        bank = measured.bank
        if isinstance(bank, Capture):
            bank = read_states(twin, same_tokens(bank, twin, layers), progress=False)
        read = same_tokens(capture, twin, layers)
        made = analyze(twin, read, [score], layers=layers, bank=bank, queries=asked, seed=measured.seed, progress=False)
    except BasinLensError as error:
        return table, f"The random twin: {error}"
    keys = ["layer", "seq", "pos"]
    answer = table.copy()
    answer[TWIN] = made.set_index(keys)["compression"].reindex(pd.MultiIndex.from_frame(table[keys])).to_numpy()
    return tables.with_columns(answer, {TWIN: tables.Column("nats")}), ""


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
