"""Two runs on the same texts, row by row."""

import math
from collections.abc import Sequence

import pandas as pd

from basin_lens import tables
from basin_lens.analyzers import Analyzer, CloudAnalyzer, default_analyzers
from basin_lens.capture import Capture
from basin_lens.errors import NeighborError, TableError
from basin_lens.model import HookedModel
from basin_lens.scoring.analysis import score
from basin_lens.scoring.request import Request, check_analyzers
from basin_lens.values import Facts, Layers, did_you_mean

# One run: its table, or what to measure it on.
Side = pd.DataFrame | tuple[HookedModel, Capture]
_ROW = ["passage", "doc", "seq", "pos", "token_id", "token", "start", "end"]


def compare(
    a: Side,
    b: Side,
    on: str | Analyzer = "compression",
    *,
    frozen_neighbors: bool = False,
    layers: Layers = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Pair the rows of two runs on the same texts: two models, checkpoints, layers or settings.

    What a score is held against (`tables.reference_error`) has an error on each side, also where both have the same model and
    neighbors: that of `difference` is both in quadrature, stands in provenance, and is in every interval of `basin_lens.stats`. A
    run's layer beside itself has none.

    Args:
        a, b: tables from `analyze`, of one run each; or pairs `(model, capture)`, which are measured here.
        on: a column of both tables; with pairs, a default score's column or an analyzer.
        frozen_neighbors: the second run measures the neighbors that the first one found, not its own, and crosses the same tokens
            with one another, so that the difference is in the map alone. Needs pairs: a table does not hold its neighbors.
        layers: with pairs, which layers; None: all that both captures hold.
        seed, progress: with pairs, as for `analyze`.

    Returns:
        one row per token (and layer): `layer` (or `layer_a`, `layer_b` if each run has one layer and they differ), `passage, doc,
        seq, pos, token_id, token, start, end`, then `<on>_a`, `<on>_b` and `difference` (b - a, in the score's unit). Rows where
        either side is NaN have a NaN difference. Intervals over documents come from `basin_lens.stats`.

    Raises:
        TableError: different texts, a missing column, layers that do not pair.
        NeighborError: frozen neighbors of tables.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> text = "The cat sat on the mat."
        >>> table = bl.analyze(model, text, [bl.analyzers.StateNorm()], layers=[5, 6], progress=False)
        >>> pairs = bl.compare(table[table.layer == 5], table[table.layer == 6], on="state_norm")
        >>> bool((pairs.difference == pairs.state_norm_b - pairs.state_norm_a).all())
        True
    """
    if not (isinstance(a, pd.DataFrame) and isinstance(b, pd.DataFrame)):
        both, column = _measured(a, b, on, frozen_neighbors, layers, seed, progress)
    elif frozen_neighbors:
        raise NeighborError(
            "expected pairs (model, capture) for frozen neighbors, got tables, which do not hold who the neighbors were. "
            "Pass compare((model_a, capture_a), (model_b, capture_b), frozen_neighbors=True)."
        )
    else:
        both, column = (a, b), str(on)
    for table in both:
        tables.require(table, column, "layer", *_ROW)
    first, second = (_facts(table) for table in both)
    if first["texts"] != second["texts"]:
        raise TableError(
            "expected two runs on the same texts (tokens and their order), got different ones. Measure both on one capture's "
            "tokens."
        )
    there = [sorted(table["layer"].unique().tolist()) for table in both]
    keys = ["layer", *_ROW]
    apart = there[0] != there[1]
    if apart:
        if max(map(len, there)) > 1:
            raise TableError(
                f"expected runs with the same layers, or one layer each, got {there[0]} and {there[1]}. Select them first."
            )
        keys = _ROW
    sides = [
        table[["layer", *_ROW, column]].rename(columns={column: f"{column}_{name}"}) for name, table in zip("ab", both, strict=True)
    ]
    if apart:
        sides = [side.rename(columns={"layer": f"layer_{name}"}) for name, side in zip("ab", sides, strict=True)]
    joined = sides[0].merge(sides[1], on=keys, how="inner", validate="one_to_one", sort=False)
    layer_columns = ["layer_a", "layer_b"] if apart else ["layer"]
    joined = joined[[*layer_columns, *_ROW, f"{column}_a", f"{column}_b"]]
    joined["difference"] = joined[f"{column}_b"] - joined[f"{column}_a"]
    answer = tables.noted(tables.with_provenance(joined, *both), frozen_neighbors=frozen_neighbors)
    return _with_reference_errors(answer, both, column)


def _with_reference_errors(joined: pd.DataFrame, both: Sequence[pd.DataFrame], column: str) -> pd.DataFrame:
    """The pairs with the errors of both sides' references, and of the differences, in their provenance."""
    a, b = (dict(zip(table["layer"].tolist(), tables.reference_error(table, column).tolist(), strict=True)) for table in both)
    if not any(a.values()) and not any(b.values()):
        return joined
    pairs = zip(a, b, strict=True) if "layer_b" in joined else zip(a, a, strict=True)
    same_run = both[0]["run"].iloc[0] == both[1]["run"].iloc[0]
    # One run has one reference at a layer; another run, also of the same model and neighbors, drew its own.
    apart = {str(int(after)): 0.0 if same_run and before == after else math.hypot(a[before], b[after]) for before, after in pairs}
    sides = {f"{column}_{name}": {str(int(layer)): error for layer, error in side.items()} for name, side in (("a", a), ("b", b))}
    return tables.with_reference_error(joined, {**sides, "difference": apart})


def _facts(table: pd.DataFrame) -> Facts:
    runs = table["run"].unique().tolist()
    if len(runs) != 1:
        raise TableError(f"expected a table of one run, got {len(runs)}. Select it: table[table.run == ...].")
    return tables.provenance(table)[runs[0]]


def _measured(
    a: Side, b: Side, on: str | Analyzer, frozen: bool, layers: Layers, seed: int, progress: bool
) -> tuple[tuple[pd.DataFrame, pd.DataFrame], str]:
    """Both runs and the score's column, the second run with the first one's neighbors if they are frozen."""
    (model_a, capture_a), (model_b, capture_b) = _pair(a), _pair(b)
    if [s.tokens for s in capture_a.sequences] != [s.tokens for s in capture_b.sequences]:
        raise TableError(
            "expected two captures of the same texts (tokens and their order), got different ones. Capture the same token ids."
        )
    if isinstance(on, str):
        named = [x for x in default_analyzers() if on in [c.name for c in x.columns]]
        if not named:
            meant = did_you_mean(on, [c.name for x in default_analyzers() for c in x.columns])
            raise TableError(f"expected a default score's column or an analyzer, got {on!r}. {meant}Pass an analyzer for others.")
        analyzer, column = named[0], on
    else:
        check_analyzers([on])
        analyzer, column = on, on.columns[0].name
    if frozen and not isinstance(analyzer, CloudAnalyzer):
        raise NeighborError(f"expected a score on neighbors for frozen neighbors, got {type(analyzer).__name__}.")
    wanted = sorted(set(capture_a.layers) & set(capture_b.layers)) if layers is None else layers
    keep = analyzer if frozen and isinstance(analyzer, CloudAnalyzer) else None
    request = Request([analyzer], layers=wanted, seed=seed, progress=progress)
    first = score(model_a, capture_a, request, keep_neighbors_of=keep)
    second = score(model_b, capture_b, request, frozen=first.neighbors)
    return (first.table, second.table), column


def _pair(side: Side) -> tuple[HookedModel, Capture]:
    if not (isinstance(side, tuple) and len(side) == 2 and isinstance(side[1], Capture)):
        raise TableError(f"expected two tables or two pairs (model, capture), got {type(side).__name__}.")
    return side
