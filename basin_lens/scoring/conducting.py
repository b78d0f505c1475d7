"""The pieces of a job, done one after the other in this process, and what they come to."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from basin_lens.analyzers import TokenAnalyzer
from basin_lens.scoring.job import Job, LayerPiece
from basin_lens.scoring.memory_store import Store
from basin_lens.scoring.results import KeptNeighbors, LayerNeighbors, Results, provenance
from basin_lens.values import Facts, hides_bars


def conduct(job: Job, store: Store) -> None:
    """Do every piece that the store does not have."""
    read_all(job, store, store.unread())
    store.all_read()
    job.fill()
    score_all(job, store, store.unscored())


def read_all(job: Job, store: Store, pieces: list[int]) -> None:
    """Do some pieces of reading."""
    if not job.pieces:
        return
    total, left = job.capture.n_rows, sum(len(job.rows_of(index)) for index in pieces)
    bar = tqdm(total=total, initial=total - left, desc="reading the model", unit="token", disable=hides_bars(job.request.progress))
    with bar:
        for index in pieces:
            store.put_read(index, job.read(index, bar.update))


def score_all(job: Job, store: Store, layers: list[int], mine: Callable[[LayerPiece], bool] = lambda _: True) -> None:
    """Do the work at some layers, as far as it is this process's and what it needs is there.

    Args:
        job, store: of the run.
        layers: in order.
        mine: which of the pieces this process does; the others are another's.
    """
    if not job.layers:
        return
    total, progress = len(job.layers), job.request.progress
    done = total - len(layers)
    with tqdm(total=total, initial=done, desc="neighbors through blocks", unit="layer", disable=hides_bars(progress)) as bar:
        for layer in layers:
            for piece in job.pieces_of(layer):
                if mine(piece) and not store.has(piece) and all(map(store.has, job.needs(piece))):
                    do(job, store, piece)
                    bar.update(piece.step == "collect")


def do(job: Job, store: Store, piece: LayerPiece) -> None:
    """Do a piece of the work at a layer, all that it needs being there."""
    if piece.step != "collect":
        store.put(piece, job.work(piece, store.part))
    else:
        store.put_scores(job.score(piece.layer) if job.shards == 1 else job.collect(piece, store.part))


def found(job: Job, store: Store) -> Facts:
    """What the table says of its making: of the request, and of what all pieces found."""
    results = Results(job.plan)
    results.take_columns(job.capture)
    if job.run is not None:
        facts = job.run.facts()
        if job.request.backend == "approximate" and job.shards > 1:
            facts["search"]["shard_tokens"] = job.shard_tokens  # each shard chooses its candidates: another cut is another answer
        results.begin(facts)
        for layer in job.layers:
            results.add(store.scores(layer))
    return provenance(
        job.request, job.capture, job.asked, results, read_again_for=job.read_again_for, frozen=job.frozen is not None
    )


def values_at(job: Job, store: Store, layers: Sequence[int]) -> dict[str, Float[np.ndarray, "layers rows"]]:
    """All columns of the table at some layers."""
    found = [store.scores(layer).values if job.run is not None else {} for layer in layers]
    values: dict[str, np.ndarray] = {}
    for analyzer in job.plan.analyzers:
        for column in analyzer.columns:
            if isinstance(analyzer, TokenAnalyzer):
                held = job.capture.columns[analyzer.key][column.name]
                values[column.name] = held[list(layers) if analyzer.per_layer else [0] * len(layers)].numpy()
            else:
                values[column.name] = np.stack([each[column.name] for each in found])
    return values


def kept_neighbors(job: Job, store: Store) -> KeptNeighbors | None:
    """The neighbors behind one score, if they were to be kept."""
    if job.run is None or job.keep is None:
        return None
    held = [store.scores(layer).neighbors or LayerNeighbors.none(job.capture.n_rows, job.keep.k) for layer in job.layers]
    return KeptNeighbors.of(held, job.run.bank, job.keep.columns[0].name, own=not job.run.external)
