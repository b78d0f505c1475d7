"""Texts or a capture -> the table. Read this page first: it conducts everything else.

    passages -> model -> Capture -> Neighbors -> images under a block -> analyzers -> table

The model reads the texts once. Then, layer by layer: the states around the block are checked against the block itself; each
distinct set of neighbor options is searched once; each context passes the union of those neighbors through the block once, a
thousand rows at a time; and every analyzer turns its neighborhoods into numbers before the images are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from basin_lens import tables
from basin_lens.analyzers import Analyzer, CloudAnalyzer, Compression, TokenAnalyzer, default_analyzers
from basin_lens.analyzers.control import CONTROLS, controls_of
from basin_lens.capture import Capture, check_cache, check_layers, reference_capture
from basin_lens.errors import CaptureError, NeighborError, TableError
from basin_lens.model import check_model, full_precision, measuring, uses_bos
from basin_lens.neighbors import Backend
from basin_lens.scoring.run import Conductor, KeptNeighbors
from basin_lens.scoring.token_rows import query_rows, row_facts, texts_hash
from basin_lens.values import Whole, whole, whole_numbers


def analyze(
    model: Any,
    data: Any,
    analyzers: Any = None,
    *,
    layers: Any = None,
    bank: Any = None,
    queries: Any = None,
    controls: bool = False,
    backend: Backend = "auto",
    seed: Whole = 0,
    max_length: Whole = 128,
    batch_size: Whole | None = None,
    prepend_bos: bool | None = None,
    attention_mask: Any = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure every token of some texts at every layer of a model.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`, in any state.
        data: a text, a `Passage`, a path, a list of these, a table with a `text` column (`datasets`, pandas, Arrow), token ids
            (`[batch, pos]`, lists of their own lengths, what a tokenizer returns), or a `Capture`.
        analyzers: what to measure; None: `Compression`, the same over other tokens, `Contraction`, `RawCompression`,
            `Neighborhood`, `Surprisal`, `StateNorm`.
        layers: block indices; None: all (of the capture).
        bank: where neighbors come from: None for the texts themselves, another `Capture`, or `"reference"` for the built-in
            passages (needed for a single text).
        queries: which tokens are scored: positions, a boolean mask `[rows]` or `[seqs, pos]`, a label or span name, or a number of
            tokens (a seeded sample); None: all. It does not shrink the bank.
        controls: add to each score on neighbors' images the same on random points (`<column>_random`) and on an equally tight set
            elsewhere, the neighbors of another token (`<column>_radius_matched`). Costs two more sets of images.
        backend: how neighbors are searched; see `basin_lens.neighbors.find`. Only `"approximate"` is not exact.
        seed: of every random choice.
        max_length, batch_size, prepend_bos, attention_mask: see `Capture.from_texts`.
        progress: show progress bars.

    Returns:
        one row per (layer, token): `run, layer, passage, doc, seq, pos, token_id, token, start, end`, labels, `span`, then the
        analyzers' columns (units in `table.attrs["provenance"][run]["columns"]`). What an analyzer leaves out is NaN, counted by reason
        in the provenance. All texts are measured; which of them are copies of one another is in provenance too (`"copies"`), and statistics
        count each text once.

    Raises:
        BasinLensError: before any long work, if the model, the texts, the layers, the analyzers or the bank do not fit.
        TransportError: the block does not reproduce the captured states, or a route is not exact on this model.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, "The cat sat on the mat.", layers=[5], bank="reference", progress=False)
        >>> bool(table.compression.notna().any())
        True
    """
    return score(
        model, data, analyzers, layers=layers, bank=bank, queries=queries, controls=controls, backend=backend, seed=seed, max_length=max_length,
        batch_size=batch_size, prepend_bos=prepend_bos, attention_mask=attention_mask, progress=progress,
    ).table  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """A table, and the neighbors behind one of its scores if they were to be kept."""

    table: pd.DataFrame
    neighbors: KeptNeighbors | None


@full_precision()
def score(
    model: Any,
    data: Any,
    analyzers: Any = None,
    *,
    layers: Any = None,
    bank: Any = None,
    queries: Any = None,
    controls: bool = False,
    backend: Backend = "auto",
    seed: Whole = 0,
    max_length: Whole = 128,
    batch_size: Whole | None = None,
    prepend_bos: bool | None = None,
    attention_mask: Any = None,
    progress: bool = True,
    keep_neighbors_of: CloudAnalyzer | None = None,
    frozen: KeptNeighbors | None = None,
) -> Analysis:
    """`analyze`, and on request the neighbors of one of its analyzers (an instance in `analyzers`).

    `frozen`: neighbors of another run on the same texts and layers, taken as they are.
    """
    check_model(model)
    seed = whole(seed, "seed", least=0)
    chosen = _check_analyzers(default_analyzers() if analyzers is None else analyzers)
    if controls:
        chosen += controls_of(chosen)
    clouds = [a for a in chosen if isinstance(a, CloudAnalyzer)]
    singles = [a for a in chosen if isinstance(a, TokenAnalyzer)]
    if isinstance(data, Capture):
        if attention_mask is not None:
            raise CaptureError("expected token ids with attention_mask, got a Capture. Give the mask where it is made.")
        capture = data
        capture.check_model_is(model)
        wanted = capture.layers if layers is None else check_layers(model, layers)
        if not set(wanted) <= set(capture.layers):
            raise CaptureError(
                f"expected layers of the capture {list(capture.layers)}, got {sorted(set(wanted) - set(capture.layers))}. "
                "Capture again with layers=[...]."
            )
        check_cache(model, capture, _path(wanted, clouds))
    else:
        wanted = check_layers(model, layers)
        capture = Capture.plan(
            model, data, layers=wanted, max_length=max_length, prepend_bos=prepend_bos, attention_mask=attention_mask
        )
    # All that can be refused is refused before the model runs.
    tables.check_names([*{name for label in capture.labels for name in label}, *(c.name for a in chosen for c in a.columns)])
    asked = query_rows(capture, queries, seed)
    conductor = None
    if clouds:
        conductor = Conductor(
            model, capture, _bank(model, capture, bank, wanted, clouds, progress), clouds, asked, seed, wanted, backend, frozen
        )
    if not capture.is_read:
        capture.read(model, singles, batch_size=batch_size, progress=progress)
    rerun = capture.measure(model, singles, progress=progress)
    values = {column.name: np.full((len(wanted), capture.n_rows), np.nan, np.float32) for a in chosen for column in a.columns}
    for analyzer in singles:
        held = capture.columns[analyzer.key]
        for column in analyzer.columns:
            values[column.name][:] = held[column.name][list(wanted) if analyzer.per_layer else [0]].numpy()
    facts: dict[str, Any] = {}
    left_out = {
        column.name: {"not defined at this position": int(np.isnan(values[column.name]).sum())}
        for a in singles
        for column in a.columns
    }
    kept = None
    if conductor is not None:
        if keep_neighbors_of is not None:
            kept = conductor.keep(keep_neighbors_of, len(wanted))
        bar = tqdm(total=len(wanted), desc="neighbors through blocks", unit="layer", disable=not progress)
        with measuring(model), bar:
            for index, layer in enumerate(wanted):
                for name, value in conductor.layer(layer, index).items():
                    values[name][index] = value
                bar.update()
        facts = conductor.facts
        left_out |= facts.pop("left_out")
    provenance = {
        "model": capture.model,
        "precision": "full: autocast and reduced float32 products off",
        "texts": texts_hash(capture),
        "copies": capture.copies,
        "capture": capture.settings,
        "layers": list(wanted),
        "analyzers": [a.key for a in chosen],
        "columns": {
            c.name: {"unit": c.unit, "low": _finite(c.low), "high": _finite(c.high), "rows": a.rows, "analyzer": type(a).__name__}
            for a in chosen
            for c in a.columns
        },
        "controls": [f"{choice} neighbors" for choice in CONTROLS] if controls else [],
        "neighbors": "its own" if frozen is None else "frozen: those of another run",
        "queries": "all" if queries is None else f"{int(asked.sum())} of {capture.n_rows} tokens",
        "seed": seed,
        "read_again_for": rerun,
        "left_out": left_out,
        **facts,
    }
    rows, labels = row_facts(capture)
    return Analysis(tables.build(rows, labels, wanted, values, tables.Provenance.from_json(provenance)), kept)


@whole_numbers(CaptureError)
@full_precision()
def neighborhood(
    model: Any,
    capture: Capture,
    layer: int,
    seq: int,
    pos: int,
    *,
    k: int = 15,
    context: str = "patched",
    metric: str = "l2",
    exclude: str = "sequence",
    same_token: str = "any",
    position_0: bool = False,
    bank: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Who the neighbors of one token are, and where the block takes them.

    Args:
        model: the model that made the capture.
        capture: holds the token.
        layer: block index.
        seq, pos: the token: sequence and position in it.
        k, context, metric, exclude, same_token, position_0: as for `Compression`.
        bank: as for `analyze`.
        progress: show a bar if the reference bank must be read first.

    Returns:
        one row per neighbor, nearest first: `rank, token, text` (the text around it, the token in brackets), `passage, doc, seq,
        pos, distance_before, distance_after` (to the query and to its `resid_post`, state units; before: 1 - cosine with that metric).

    Raises:
        CaptureError: no such token or layer. NeighborError: position 0, or fewer than k neighbors.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> capture = bl.Capture.from_texts(model, "The cat sat on the mat.", layers=[5], progress=False)
        >>> len(bl.neighborhood(model, capture, layer=5, seq=0, pos=3, k=5, bank="reference"))
        5
    """
    capture.check_model_is(model)
    row = capture.row_of(seq, pos)
    if pos == 0:
        raise NeighborError("expected a position from 1 on, got 0: the first token is never a query.")
    options: Any = {"context": context, "metric": metric, "exclude": exclude, "same_token": same_token, "position_0": position_0}
    analyzer = Compression(k=k, **options)
    analyzer.check()
    asked = torch.zeros(capture.n_rows, dtype=torch.bool, device="cpu")
    asked[row] = True
    (layer,) = check_layers(model, [layer])
    check_cache(model, capture, [layer])
    bank = _bank(model, capture, bank, (layer,), [analyzer], progress)
    conductor = Conductor(model, capture, bank, [analyzer], asked, 0, (layer,), "auto")
    kept = conductor.keep(analyzer, 1)
    with measuring(model):
        conductor.layer(layer, 0)
    strings = bank.row_strings()
    lines = []
    for rank, other in enumerate(kept.rows[0, row].tolist()):
        where = int(bank.row_seq[other])
        first, length, place = int(bank.offsets[where]), int(bank.lengths[where]), int(bank.row_pos[other])
        before = strings[first + max(1, place - 6) : first + place]
        after = strings[first + place + 1 : first + min(length, place + 5)]
        lines.append({
            "rank": rank + 1, "token": strings[other], "text": f"{''.join(before)}[{strings[other]}]{''.join(after)}",
            "passage": bank.sequences[where].passage, "doc": bank.docs[where], "seq": where, "pos": place,
            "distance_before": float(kept.before[0, row, rank]), "distance_after": float(kept.after[0, row, rank]),
        })  # fmt: skip
    return pd.DataFrame(lines)


def _check_analyzers(analyzers: Any) -> list[Analyzer]:
    if not isinstance(analyzers, list | tuple) or not analyzers:
        raise TableError(f"expected a list of at least one analyzer, got {analyzers!r}. Leave analyzers out for the default ones.")
    for analyzer in analyzers:
        if not isinstance(analyzer, CloudAnalyzer | TokenAnalyzer):
            raise TableError(
                f"expected analyzers (instances, such as Compression(k=15)), got {analyzer!r}. Subclass CloudAnalyzer or TokenAnalyzer."
            )
        analyzer.check()
    return list(analyzers)


def _bank(
    model: Any, capture: Capture, bank: Any, layers: Sequence[int], clouds: Sequence[CloudAnalyzer], progress: bool
) -> Capture:
    if bank is None or bank is capture:
        return capture
    if any(a.exclude == "nothing" for a in clouds):
        raise NeighborError(
            "expected the texts as their own bank for SeedCompression, got another bank. Leave it out, or bank=None."
        )
    if isinstance(bank, str) and bank == "reference":
        bos = uses_bos(model, None)
        starts = {s.tokens[0] for s in capture.sequences}
        return reference_capture(model, prepend_bos=bos is not None and starts == {bos}, progress=progress)
    if not isinstance(bank, Capture):
        raise NeighborError(f'expected bank=None, a Capture or "reference", got {bank!r}.')
    bank.check_model_is(model)
    if not set(layers) <= set(bank.layers):
        raise NeighborError(f"expected a bank with layers {list(layers)}, got one with {list(bank.layers)}. Capture them too.")
    check_cache(model, bank, _path(layers, clouds))
    return bank


def _path(layers: Sequence[int], clouds: Sequence[CloudAnalyzer]) -> set[int]:
    """Layers whose states are read, if some analyzers look through several blocks."""
    return {layer + step for layer in layers for step in range(max((a.blocks for a in clouds), default=1))}


def _finite(bound: float | int) -> float | int | None:
    """A bound as JSON has it: None for no bound."""
    return bound if np.isfinite(bound) else None
