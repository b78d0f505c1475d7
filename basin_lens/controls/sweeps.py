"""One score under other numbers of neighbors and smaller banks."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from basin_lens import tables
from basin_lens.analyzers import CloudAnalyzer
from basin_lens.capture import Bank, Capture, subset
from basin_lens.errors import CaptureError, NeighborError, TableError
from basin_lens.model import HookedModel
from basin_lens.scoring import Queries, analyze
from basin_lens.scoring.reliability import rank_agreement
from basin_lens.values import Layers, whole_numbers

_KS = (5, 10, 15, 30, 50)


@whole_numbers(TableError)
def sweep(
    model: HookedModel,
    capture: object,
    analyzer: object,
    *,
    k: Sequence[int] | None = None,
    bank_sizes: Sequence[int] | None = None,
    seed: int = 0,
    layers: Layers = None,
    queries: Queries = None,
    bank: Bank = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How far a score depends on the number of neighbors and on the size of the bank: every k in every bank.

    The score as it stands (the analyzer's own k, the whole bank) is always among the settings: it is what the others are compared
    with. All k of a bank share one search, that of the largest k; each bank is searched by itself. Smaller banks are whole
    sequences in a seeded order, so that each is part of the larger ones; queries stay the same.

    Args:
        model: the model that made the capture.
        capture: the texts, a `Capture`.
        analyzer: a cloud analyzer with fields `k` and `name`.
        k: numbers of neighbors; None: the analyzer's own, or 5, 10, 15, 30 and 50 if `bank_sizes` is None too.
        bank_sizes: points of the bank (tokens beyond position 0); a bank is the fewest sequences that hold so many. None: the whole
            bank.
        seed: of the banks and of every random choice of `analyze`.
        layers, queries, bank: as for `analyze`. With `bank_sizes`, `bank` is None or a `Capture`.
        progress: show progress bars.

    Returns:
        one row per (score, layer, k, bank): `run, score, layer, k, bank_size` (points of the bank as it was), `mean, low, high`
        (95 % interval over documents, as in `tables.layer_summary`), `nan_share` (of tokens), `reliability` (split-half; NaN
        without), `spearman` (over tokens scored in both, with the score as it stands; 1 for itself, NaN below 3 tokens). Provenance
        of every run is in `attrs["provenance"]`.

    Raises:
        TableError: not a cloud analyzer, or one without fields `k` and `name`.
        CaptureError: texts instead of a capture.
        NeighborError: a k or a bank too small or too large, or nothing to score.

    Source: design of basin_lens.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> capture = bl.Capture.from_texts(model, "The cat sat on the mat.", layers=[5], progress=False)
        >>> score = bl.analyzers.Contraction(k=10)
        >>> table = bl.controls.sweep(model, capture, score, k=[5, 10], bank="reference", progress=False)
        >>> table.k.tolist()
        [5, 10]
    """
    if not isinstance(capture, Capture):
        raise CaptureError(f"expected a Capture, got {type(capture).__name__}. Make one with Capture.from_texts(model, texts).")
    if not isinstance(analyzer, CloudAnalyzer):
        raise TableError(f"expected a cloud analyzer (an instance, such as Compression()), got {analyzer!r}.")
    analyzer.check_all()
    if k is None:
        k = _KS if bank_sizes is None else ()
    counts = sorted({*k, analyzer.k})
    copies = {count: _with_k(analyzer, count) for count in counts}
    lines: list[pd.DataFrame] = []
    standing: dict[str, np.ndarray] = {}
    runs: dict[str, tables.Provenance] = {}
    for part in _banks(capture, bank, bank_sizes, seed):
        table = analyze(
            model, capture, list(copies.values()), layers=layers, queries=queries, bank=part, seed=seed, progress=progress
        )
        ((run, facts),) = tables.runs(table).items()
        runs[run] = facts
        names = [column.name for copy in copies.values() for column in copy.columns]
        summary = tables.layer_summary(table, names)
        there = list(facts.layers or ())
        values = {name: table[name].to_numpy().reshape(len(there), -1) for name in names}
        if not standing:  # the whole bank comes first
            own = copies[analyzer.k].columns
            standing = {score.name: values[c.name] for score, c in zip(analyzer.columns, own, strict=True)}
        for count, copy in copies.items():
            for score, column in zip(analyzer.columns, copy.columns, strict=True):
                line = {"run": run, "score": score.name, "layer": there, "k": count, "bank_size": (facts.bank or {})["points"]}
                for short, long in {"mean": "mean", "low": "low", "high": "high", "nan_share": "nan"}.items():
                    line[short] = summary[f"{column.name}_{long}"]
                line["reliability"] = summary.get(f"{column.name}_reliability", np.nan)
                pairs = zip(standing[score.name], values[column.name], strict=True)
                line["spearman"] = [rank_agreement(one, other) for one, other in pairs]
                lines.append(pd.DataFrame(line))
    answer = pd.concat(lines, ignore_index=True)
    order = {score.name: place for place, score in enumerate(analyzer.columns)}
    answer["place"] = answer["score"].map(order)
    answer = answer.sort_values(["place", "layer", "bank_size", "k"], ignore_index=True).drop(columns="place")
    return tables.described(answer, runs)


def _with_k(analyzer: CloudAnalyzer, k: int) -> CloudAnalyzer:
    """The analyzer with another k, its columns named after it."""
    several = len(analyzer.columns) > 1  # `name` is then a prefix
    own = getattr(analyzer, "name", None) if several else analyzer.columns[0].name
    try:
        copy: CloudAnalyzer = replace(analyzer, k=k, name=f"{own}_k{k}" if own else f"k{k}")  # type: ignore[type-var]
    except TypeError as error:
        raise TableError(
            f"expected an analyzer that is a dataclass with fields k and name, got {type(analyzer).__name__}: {error}."
        ) from error
    return copy


def _banks(capture: Capture, bank: Bank, sizes: Sequence[int] | None, seed: int) -> list[Bank]:
    """The whole bank as `analyze` takes it, then the smaller ones, each part of the one before."""
    if sizes is None:
        return [bank]
    source = capture if bank is None else bank
    if not isinstance(source, Capture):
        raise NeighborError(
            f"expected bank=None or a Capture with bank_sizes, got {bank!r}: parts are taken of it. Pass the capture, or leave "
            "sizes out."
        )
    points = source.lengths - 1
    order = torch.randperm(len(points), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    held = points[order].cumsum(0)
    wrong = [size for size in sizes if not 1 <= size <= int(held[-1])]
    if wrong:
        raise NeighborError(
            f"expected bank sizes between 1 and the bank's {int(held[-1])} points (position 0 left out), got {wrong}. "
            "Add texts, or ask for less."
        )
    ends = sorted({int((held < size).sum()) + 1 for size in sizes} - {len(points)}, reverse=True)
    return [bank, *(subset(source, sorted(order[:end].tolist())) for end in ends)]
