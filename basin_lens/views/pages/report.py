"""One offline page for a run: token view by layer and score, layer curve, neighbors on click, what was left out."""

import json
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.values import Facts
from basin_lens.views.pages.packing import DISTANCE_STEPS, SCORE_STEPS, packed_floats, packed_rows
from basin_lens.views.pages.page import Report, explorer_page

# Values in a page, of about a byte each when they are packed. A page of every token of a large run no browser opens.
_MOST_VALUES = 6_000_000
_MOST_NEIGHBORS = 5  # of each token: whole numbers that nothing compresses are most of a page
_TOKEN = ("doc", "seq", "pos", "token")
_NOTES = (
    "compression is how much more the block contracts the differences between a token's neighbors at the token's own place "
    "than the place contracts other neighborhoods' differences (compression_place) and other places contract these "
    "(compression_directions); natural logarithms of ratios of variances. Positive: differences are drawn together more at home "
    "than elsewhere, a basin of this place; negative: the block tells apart what is near home. 0, for every token, is what any "
    "affine map gives, also with a vector or a factor of its own at each place.",
    "compression_random_sets and compression_isotropic are the same for random sets of the bank and for random directions: the "
    "nulls. A finding is a difference from the random sets, compression_above_random_sets.",
    "contraction is the log ratio of the neighborhood's variance before and after the block: how much it shrinks at all. "
    "raw_compression is the log variance of the neighbors' outputs alone: it mostly tells how dense the neighborhood was to begin "
    "with, and moves with the growth of norms.",
    "A correlation with a score cannot exceed the square root of the product of the reliabilities: read differences between tokens "
    "only where the split-half reliability is well above 0.",
    "Intervals are over documents, because tokens of one text are not independent; of one document there is none. No test has been "
    "made on this page, and no correction for looking at many layers and scores.",
    "Numbers of single tokens are rounded here: scores to less than a hundredth of their spread, distances of neighbors to a few "
    "hundredths, coarser for values far out. The table has them as they were measured.",
)


@runtime_checkable
class KeptLike(Protocol):
    """The neighbors behind one score: arrays `[layers, rows, k]` and the bank's rows."""

    @property
    def rows(self) -> np.ndarray: ...
    @property
    def before(self) -> np.ndarray: ...
    @property
    def after(self) -> np.ndarray: ...
    @property
    def bank(self) -> pd.DataFrame: ...
    @property
    def score(self) -> str: ...
    @property
    def own(self) -> bool: ...


def make_report(
    table: pd.DataFrame, *, neighbors: KeptLike | None = None, title: str = "Where does this model compress?"
) -> Report:
    """A page to look at one run: token view (selectors for score and layer), layer curve, layer table, what was left out.

    Of a run with more values than a browser can open, the first sequences are shown, and the page says how many; curves and means
    are of all.

    Args:
        table: from `analyze`, of one run.
        neighbors: the neighbors behind one score, shown when a token is clicked; None: not shown.
        title: heading of the page.

    Returns:
        a `Report` with `.html` and `.save(path)`. Token texts and labels are data in it, never markup.

    Raises:
        TableError: several runs, no scores, layers with other tokens than the first, or the neighbors of another table.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, "The cat sat on the mat.", [bl.analyzers.Surprisal()], layers=[0], progress=False)
        >>> "</html>" in bl.views.make_report(table).html
        True
    """
    return explorer_page(title, explorer_data(table, neighbors, title))


def explorer_data(table: pd.DataFrame, neighbors: KeptLike | None, title: str) -> Facts:
    """What an explorer of one run shows, as plain JSON; the arguments and refusals of `make_report`."""
    held = tables.provenance(table)
    runs = table["run"].unique().tolist()
    if len(runs) != 1:
        raise TableError(f"expected a table of one run, got {len(runs)}. Choose one: table[table.run == ...].")
    facts = held[runs[0]]
    scores = tables.scores(table)
    if not scores:
        raise TableError("expected a table with scores, got none.")
    tables.require(table, *_TOKEN)
    table = table.sort_values(["layer", "seq", "pos"], kind="stable")
    layers = sorted(table["layer"].unique().tolist())
    first = table[table["layer"] == layers[0]]
    _check_same_tokens(table, first, layers)
    if neighbors is not None:
        _check_neighbors(neighbors, first, layers, list(scores))
    summary = tables.layer_summary(table)
    about = _about(facts, first, facts.get("bank", {}))
    of_means = _of_means(summary, first)
    sampled = _sampled(facts, table)
    signed = {name for name, fact in scores.items() if _has_both_signs(table, name, fact)}
    each = len(layers) * (len(scores) + (0 if neighbors is None else 3 * min(_MOST_NEIGHBORS, neighbors.rows.shape[2])))
    if shown := _first_sequences(first["seq"], _MOST_VALUES // each):
        about += (
            f" Shown here: the first {len(shown):,} of {first['seq'].nunique():,} sequences; curves and means are of all, "
            "and the table holds every token."
        )
        table, first = table[table["seq"].isin(shown)], first[first["seq"].isin(shown)]
    bank = None if neighbors is None else neighbors.bank
    words = pd.concat([first["token"], *([] if bank is None else [bank["token"]])])
    codes, strings = pd.factorize(words)
    arrays, places = _arrays([_by_layer(table, name, layers) for name in scores])
    return {
        "title": title,
        "about": about,
        "notes": _NOTES,
        "layers": layers,
        "scores": [
            {"name": name, "unit": fact["unit"], "low": fact.get("low"), "high": fact.get("high"), "sampled": sampled.get(name)}
            | {"zero": name in signed}
            for name, fact in scores.items()
        ],
        "strings": [str(text) for text in strings],
        "rows": codes[: len(first)].tolist(),
        "positions": first["pos"].tolist(),
        "sequences": _sequences(first),
        "rounded": True,
        "arrays": arrays,
        "values": places,
        "curves": [_curve(summary, name, fact["analyzer"]) for name, fact in scores.items()],
        "of_means": of_means,
        "left_out": [{"score": name, "counts": counts} for name, counts in facts.get("left_out", {}).items()],
        "provenance": json.dumps({runs[0]: facts}, indent=1),
        "neighbors": None if neighbors is None else _neighbors(neighbors, len(first), codes[len(first) :]),
    }


def _check_same_tokens(table: pd.DataFrame, first: pd.DataFrame, layers: Sequence[int]) -> None:
    """The page holds tokens once: a layer of others would be shown on the wrong words."""
    twice = int(first.duplicated(["seq", "pos"]).sum())
    if twice:
        raise TableError(
            f"expected one row per seq and pos at a layer, got {twice} more at layer {layers[0]}. Keep one: "
            'table.drop_duplicates(["layer", "seq", "pos"]).'
        )
    tokens = first[[*_TOKEN]].reset_index(drop=True)
    for layer in layers[1:]:
        here = table.loc[table["layer"] == layer, [*_TOKEN]].reset_index(drop=True)
        if not here.equals(tokens):
            raise TableError(
                f"expected the same tokens at every layer, got {len(here):,} rows at layer {layer} that are not the "
                f"{len(tokens):,} of layer {layers[0]}. Show layers that have the same: table[table.layer == {layer}]."
            )


def _check_neighbors(kept: KeptLike, first: pd.DataFrame, layers: Sequence[int], scores: Sequence[str]) -> None:
    """Neighbors go by place: those of another table would stand at the wrong tokens."""
    again = "Pass the table and the neighbors of one run, the table as it was made."
    expected = (len(layers), len(first))
    for name, array in (("rows", kept.rows), ("before", kept.before), ("after", kept.after)):
        if array.ndim != 3 or array.shape[:2] != expected or array.shape != kept.rows.shape:
            raise TableError(
                f"expected neighbors of the table's {expected[0]} layers and {expected[1]:,} tokens, got {name} of shape "
                f"{array.shape}. {again}"
            )
    if kept.score not in scores:
        raise TableError(f"expected neighbors behind one of {', '.join(scores)}, got those behind {kept.score!r}. {again}")
    if int(kept.rows.max(initial=-1)) >= len(kept.bank):
        raise TableError(f"expected rows of a bank of {len(kept.bank):,}, got row {int(kept.rows.max()):,}. {again}")
    if kept.own and not np.array_equal(kept.bank[["seq", "pos"]].to_numpy(), first[["seq", "pos"]].to_numpy()):
        raise TableError(f"expected neighbors among the table's own tokens, got a bank with others (seq, pos). {again}")


def _of_means(summary: pd.DataFrame, first: pd.DataFrame) -> str:
    """What stands beside means and their intervals: of how many documents, and whether any interval is possible."""
    documents, sequences = int(summary["n_documents"].max()), int(summary["n_sequences"].max())
    labels, texts = int(first["doc"].nunique()), int(first["seq"].nunique())
    words = f"Mean over documents, 95 % interval (Student's t) over {documents:,} documents."
    if documents < 2:
        words = "Mean of one document: over documents no interval is possible."
    if (documents, sequences) != (labels, texts):
        words += (
            f" Of texts that are copies of one another one counts: {sequences:,} of {texts:,} sequences, "
            f"and documents that share them are one: {documents:,} of {labels:,}."
        )
    return words


def _first_sequences(of_rows: pd.Series, most: int) -> list[int]:
    """The sequences from the first on whose rows are no more than so many, but one at least; empty where all are."""
    ends = of_rows.value_counts(sort=False).cumsum()
    return [] if len(of_rows) <= most else ends.index[: max(1, int((ends <= most).sum()))].tolist()


def _about(facts: Facts, first: pd.DataFrame, bank: Facts) -> str:
    model = facts["model"]
    parts = [
        f"{model['name']}: {model['layers']} layers, width {model['width']}, {model['dtype']}, {model['kind']}.",
        f"{len(first):,} tokens in {first['seq'].nunique()} sequences of {first['doc'].nunique()} documents.",
    ]
    if bank:
        parts.append(f"Neighbors from {bank['source']} ({bank['points']:,} points).")
    routes = sorted(set(facts.get("routes", {}).values()))
    if routes:
        worst = max(facts["check_error"].values())
        parts.append(f"Routes {', '.join(routes)}; largest error found by the checks {worst:.1e} of the states' scale.")
    return " ".join(parts)


def _sequences(first: pd.DataFrame) -> list[Facts]:
    parts = [part for _, part in first.groupby("seq", sort=True)]
    return [{"doc": str(part["doc"].iloc[0]), "seq": int(part["seq"].iloc[0]), "length": len(part)} for part in parts]


def _by_layer(table: pd.DataFrame, name: str, layers: Sequence[int]) -> list[np.ndarray]:
    return [table.loc[table["layer"] == layer, name].to_numpy(float) for layer in layers]


def _arrays(by_score: Sequence[Sequence[np.ndarray]]) -> tuple[list[Facts], list[list[int]]]:
    """Arrays for the page, and where each score has its layers': a score that every layer shares is there once."""
    places: dict[bytes, int] = {}
    arrays: list[Facts] = []
    for values in (layer for layers in by_score for layer in layers):
        if places.setdefault(values.tobytes(), len(arrays)) == len(arrays):
            arrays.append(packed_floats(values, SCORE_STEPS))
    return arrays, [[places[layer.tobytes()] for layer in layers] for layers in by_score]


def _has_both_signs(table: pd.DataFrame, name: str, column: Facts) -> bool:
    """Whether 0 is the middle of a score's colors: of the table's own numbers, as those in the page are rounded.

    Position 0 is not in the color scale. What is nothing but rounding beside the largest number has no sign.
    """
    values = table.loc[table["pos"] > 0, name].to_numpy(float)
    values = values[np.isfinite(values)]
    if not values.size or column.get("low") == 0 or column.get("high") == 0:
        return False
    least, most = float(values.min()), float(values.max())
    return min(-least, most) > 1e-9 * max(-least, most)


def _sampled(facts: Facts, table: pd.DataFrame) -> dict[str, int]:
    """The most tokens of a layer that have a score, of the scores that were measured on a sample of them."""
    names = [name for name, counts in facts.get("left_out", {}).items() if counts.get("not sampled") and name in table]
    return {name: int(table[name].notna().groupby(table["layer"]).sum().max()) for name in names}


def _curve(summary: pd.DataFrame, name: str, analyzer: str) -> Facts:
    def column(suffix: str) -> list[float | None] | None:
        if f"{name}_{suffix}" not in summary:
            return None
        return [None if not np.isfinite(v) else float(v) for v in summary[f"{name}_{suffix}"]]

    columns = {suffix: column(suffix) for suffix in ("mean", "low", "high", "reliability", "local")}
    nulls = [
        {"name": null.replace("_", " "), "mean": of}
        for null in ("random_sets", "isotropic")
        if (of := column(f"{null}_mean")) is not None
    ]
    return {**columns, "nulls": nulls, "shown": analyzer != "Neighborhood"}


def _neighbors(kept: KeptLike, shown: int, tokens: np.ndarray) -> Facts:
    """Those of the first rows, so many as are shown; `tokens` are the bank's."""
    bank = kept.bank
    counts = bank.groupby("seq", sort=True).size()
    few = min(_MOST_NEIGHBORS, kept.rows.shape[2])
    return {
        "k": int(kept.rows.shape[2]),
        "shown": few,
        "score": kept.score,
        "own": kept.own,
        "rows": [packed_rows(layer) for layer in kept.rows[:, :shown, :few]],
        "before": [packed_floats(layer, DISTANCE_STEPS, run=few) for layer in kept.before[:, :shown, :few]],
        "after": [packed_floats(layer, DISTANCE_STEPS) for layer in kept.after[:, :shown, :few]],
        "bank": {
            "tokens": tokens.tolist(),
            "seq": bank["seq"].tolist(),
            "first": (counts.cumsum() - counts).tolist(),
            "length": counts.tolist(),
            "docs": bank.groupby("seq", sort=True)["doc"].first().astype(str).tolist(),
        },
    }
