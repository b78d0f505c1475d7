"""What is measured of each text under each model: compression of some of its tokens, contraction of all."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool

from basin_lens import tables
from basin_lens.analyzers import Analyzer, Compression, Contraction
from basin_lens.capture import Capture
from basin_lens.model import HookedModel
from basin_lens.scoring import analyze
from basin_lens.studies.framework.measured_texts import HEADLINE

SCORES = (HEADLINE, "contraction")
CHANGES = tuple(f"{name}_change" for name in SCORES)
CHANGE = CHANGES[0]  # of the headline, which the declared tests are of
BEFORE = tuple(f"{name}_base" for name in SCORES)
# A token crossed costs 4 k group passes of the block, random sets with it. A text's mean gains more from more tokens than from more
# neighbors of each.
CROSSED = 8  # tokens of a text
NEIGHBORS = 8  # of each, at most
GROUP = 4


def compression_of(k: int) -> Compression:
    """The headline score as it is measured here."""
    return Compression(k=min(k, NEIGHBORS), group=GROUP, nulls=("random_sets",))


def spread_tokens(rows: pd.DataFrame, by: Sequence[str] = ("seq",), count: int = CROSSED) -> Bool[np.ndarray, " rows"]:
    """So many tokens of each text, or of each part of it, evenly spaced: the same ones whatever the model.

    Args:
        rows: the tokens to choose from, a row each, in the order of the text.
        by: columns that name the parts.
        count: tokens of a part; all, where it has fewer.
    """
    chosen = np.zeros(len(rows), bool)
    for at in rows.groupby(list(by), dropna=False).indices.values():
        chosen[at[np.linspace(0, len(at) - 1, min(count, len(at))).round().astype(int)]] = True
    return chosen


def measure_texts(
    model: HookedModel,
    capture: Capture,
    others: Sequence[Analyzer] = (),
    *,
    k: int,
    layers: Sequence[int],
    bank: Capture,
    seed: int,
    progress: bool,
    first: int = 1,
    by: Sequence[str] = ("seq",),
) -> pd.DataFrame:
    """Contraction and other scores of all tokens, and compression of some of each text, on the same states.

    Args:
        model: the model.
        capture: the texts, read or planned.
        others: analyzers beside the two.
        k: neighbors.
        layers: where.
        bank: where neighbors come from.
        seed: of random sets and groups.
        progress: show bars.
        first: position from which on scores of neighborhoods are measured.
        by: see `spread_tokens`.

    Returns:
        the table of `analyze`, with the columns of compression, NaN for tokens that are not crossed.
    """
    asked = (capture.row_pos >= first).numpy()
    table = analyze(
        model, capture, [Contraction(k=k), *others], layers=layers, bank=bank, queries=asked, seed=seed, progress=progress
    )
    crossed = np.zeros(capture.n_rows, bool)
    crossed[asked] = spread_tokens(table[: capture.n_rows][asked], by)
    own = compression_of(k)
    found = analyze(model, capture, [own], layers=layers, bank=bank, queries=crossed, seed=seed, progress=progress)
    columns = {column.name: column for column in own.columns}
    table = tables.assign(table, **{name: found[name].to_numpy() for name in columns})
    return tables.with_columns(table, {name: tables.Column(column.unit) for name, column in columns.items()})


def with_changes(before: pd.DataFrame, after: pd.DataFrame, scores: Sequence[str]) -> pd.DataFrame:
    """The second table with `<score>_base` and `<score>_change` beside each score; both of the same tokens and layers."""
    keys = ["layer", "seq", "pos", "token_id"]
    assert before[keys].reset_index(drop=True).equals(after[keys].reset_index(drop=True)), "other tokens before and after"
    answer = after.copy()
    for name in scores:
        answer[f"{name}_base"] = before[name].to_numpy()
        answer[f"{name}_change"] = after[name].to_numpy() - before[name].to_numpy()
    return tables.with_provenance(answer, after)


def by_sequence(tokens: pd.DataFrame, scores: Sequence[str], texts: pd.DataFrame) -> pd.DataFrame:
    """Means over each text's tokens, by layer, with the text's labels and baselines in every row."""
    means = tokens.groupby(["layer", "seq"], sort=True)[list(scores)].mean().reset_index()
    return tables.without_provenance(means.merge(texts, on="seq", how="left", validate="many_to_one"))
