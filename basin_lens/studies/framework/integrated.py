"""Integrated gradients of a few sequences, beside what is measured of all."""

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.analyzers import IntegratedGradients
from basin_lens.capture import Capture, subset
from basin_lens.model import HookedModel
from basin_lens.scoring import analyze
from basin_lens.tables.frame import described_by_json


def add_integrated_gradients(
    model: HookedModel, capture: Capture, table: pd.DataFrame, most: int, seed: int, progress: bool
) -> tuple[pd.DataFrame, int]:
    """The table with integrated gradients of some sequences, each of another document where there are enough; of how many."""
    order = np.random.default_rng(seed).permutation(len(capture.sequences)).tolist()
    first_of_doc = {capture.docs[seq]: seq for seq in reversed(order)}
    chosen = sorted(sorted(order, key=lambda seq: (first_of_doc[capture.docs[seq]] != seq, order.index(seq)))[:most])
    part = subset(capture, chosen)
    # From the middle block on: the way from the embeddings is too rough to integrate on a trained model.
    analyzer = IntegratedGradients(layer=capture.model["layers"] // 2, steps=24)
    found = analyze(model, part, [analyzer], layers=[capture.layers[0]], progress=progress)
    (facts,), (mine,) = tables.provenance(found).values(), tables.provenance(table).values()
    column = "integrated_gradients"
    values = np.full(capture.n_rows, np.nan)
    values[np.isin(capture.row_seq.numpy(), chosen)] = found[column].to_numpy()
    columns = {**mine["columns"], column: facts["columns"][column]}
    told = {**mine, "columns": columns, "analyzers": [*mine["analyzers"], *facts["analyzers"]]}
    answer = tables.assign(table, **{column: np.tile(values, table["layer"].nunique())})
    (run,) = tables.provenance(table)
    return described_by_json(answer, {run: told}), len(chosen)
