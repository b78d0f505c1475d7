"""The grid of layers, scales and paths, and what is measured at each cell of it on a sample of the tokens."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Int
from tqdm.auto import tqdm

from basin_lens import tables
from basin_lens.analyzers import Compression
from basin_lens.analyzers.crossed_table import Displaced
from basin_lens.capture import Bank, Capture, read_states
from basin_lens.model import HookedModel
from basin_lens.scoring import Request, score
from basin_lens.studies.framework.measured_texts import Measured
from basin_lens.studies.framework.random_twin import same_bank, same_tokens
from basin_lens.transport import Context
from basin_lens.values import hides_bars

# Columns of the analyzer: the one place that names them.
SCORE, HOME = "compression", "compression_at_home"
RANDOM: Displaced = "random_sets"
ISOTROPIC: Displaced = "isotropic"
SCORE_RANDOM, SCORE_ISOTROPIC, HOME_RANDOM, HOME_ISOTROPIC = (
    f"{name}_{null}" for name in (SCORE, HOME) for null in (RANDOM, ISOTROPIC)
)
VALUES = (SCORE, SCORE_RANDOM, SCORE_ISOTROPIC, HOME, HOME_RANDOM, HOME_ISOTROPIC)
CELL = ["layer", "blocks", "scale"]
GROUP = 4  # tokens that are crossed with one another
TO_THE_END = "to the end"


@dataclass(frozen=True)
class Grid:
    """Layers, scales and paths, and how many tokens and neighbors each cell is measured on.

    Attributes:
        layers: where a path begins.
        scales: factors on the displacements, ascending; the first stands for the linear part.
        paths: blocks of a path. Each layer has, too, the path to the end of the model.
        tokens: measured at each cell.
        neighbors: of a token, whose displacements pass.
        n_layers: of the model.
    """

    layers: tuple[int, ...]
    scales: tuple[float, ...]
    paths: tuple[int, ...]
    tokens: int
    neighbors: int
    n_layers: int

    def blocks_from(self, layer: int) -> list[int]:
        """The paths that begin at a layer and end in the model, ascending."""
        last = self.n_layers - layer
        return sorted({*(path for path in self.paths if path <= last), last})

    @property
    def routes(self) -> list[tuple[int, int]]:
        """Every layer with every path from it."""
        return [(layer, blocks) for layer in self.layers for blocks in self.blocks_from(layer)]

    @property
    def cells(self) -> list[tuple[int, int, float]]:
        """Every layer, path and scale."""
        return [(layer, blocks, scale) for layer, blocks in self.routes for scale in self.scales]

    @property
    def absent(self) -> list[tuple[int, int]]:
        """Layers and paths that would go beyond the last block."""
        return [(layer, path) for layer in self.layers for path in self.paths if layer + path > self.n_layers]

    @property
    def shortest(self) -> int:
        """Blocks of the shortest path of those named that is in the grid; where none is, of the shortest to the end."""
        there = [blocks for _, blocks in self.routes]
        return min([blocks for blocks in there if blocks in self.paths] or there)

    def path_name(self, layer: int, blocks: int) -> str:
        """A path in words: its blocks, or that it goes to the end."""
        return TO_THE_END if layer + blocks == self.n_layers and blocks not in self.paths else str(blocks)


@dataclass(frozen=True)
class Subject:
    """A model, the texts as it reads them, and where its neighbors come from."""

    model: HookedModel
    capture: Capture
    bank: Bank


def subject_of(model: HookedModel, measured: Measured, grid: Grid) -> Subject:
    """The measured texts, read again with all layers that the paths go through, by this model.

    `model`: the one that was measured, or another of the same tokenizer.
    """
    layers = tuple(range(min(grid.layers), grid.n_layers))
    capture = read_states(model, same_tokens(measured.capture, model, layers), progress=False)
    return Subject(model, capture, same_bank(measured, model, layers))


def sampled(capture: Capture, count: int, seed: int) -> Int[np.ndarray, " tokens"]:
    """Rows of a seeded sample of tokens, spread over the documents: any number of the first ones are, too.

    One token of each document comes before any gets another, so that a few tokens are many documents. Position 0 is none of them.
    """
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(capture.docs))
    place = {names[at]: rank for rank, at in enumerate(rng.permutation(len(names)).tolist())}
    rows = np.flatnonzero(capture.row_pos.numpy() > 0)
    rows = rows[rng.permutation(len(rows))]
    docs = np.array([place[capture.docs[seq]] for seq in capture.row_seq.numpy()[rows].tolist()], int)
    order = np.argsort(docs, kind="stable")
    before = np.empty(len(rows), int)  # of its document
    before[order] = np.arange(len(rows)) - np.searchsorted(docs[order], docs[order], side="left")
    return rows[np.lexsort((docs, before))][:count]


def measure_cells(
    subject: Subject,
    grid: Grid,
    tokens: Int[np.ndarray, " tokens"],
    measured: Measured,
    *,
    isotropic: int = 0,
    progress: bool,
    what: str,
) -> pd.DataFrame:
    """Every cell on a sample: a row per cell and token, with the columns `VALUES`; NaN for what was not measured.

    Args:
        subject: who is measured.
        grid: the cells.
        tokens: rows of the capture.
        measured: whose options and seed hold here.
        isotropic: so many of the tokens have isotropic displacements passed beside them, too.
        progress: show a bar, over blocks passed.
        what: is measured, for the bar.
    """
    parts = []
    # All paths from a layer go the way of the longest one.
    with tqdm(
        total=sum(grid.n_layers - layer for layer in grid.layers), desc=what, unit="block", disable=hides_bars(progress)
    ) as bar:
        for layer in grid.layers:
            parts.append(_layer(subject, grid, layer, tokens, isotropic, measured))
            bar.update(grid.n_layers - layer)
    found = tables.with_provenance(pd.concat(parts, ignore_index=True), measured.table)
    return tables.with_columns(found, {name: tables.Column("nats") for name in VALUES})


def _keys(measured: Measured) -> list[str]:
    """What tells tokens apart, and the unit."""
    own = [] if measured.unit in ("document", "sequence") else [measured.unit]
    return list(dict.fromkeys(["passage", "doc", "seq", "pos", "token_id", "token", *own]))


def _layer(
    subject: Subject, grid: Grid, layer: int, tokens: Int[np.ndarray, " tokens"], isotropic: int, measured: Measured
) -> pd.DataFrame:
    """All paths from one layer at every scale, on some tokens."""
    mask = np.zeros(subject.capture.n_rows, bool)
    mask[tokens] = True
    context: Context = measured.settings["context"]
    plain = Compression(
        k=grid.neighbors, context=context, exclude=measured.settings["exclude"], group=GROUP, nulls=(RANDOM,), contractions=True
    )
    cells: dict[tuple[int, float], list[Compression]] = {}
    for blocks in grid.blocks_from(layer):
        for at, scale in enumerate(grid.scales):
            own = replace(plain, blocks=blocks, scale=scale, name=f"compression_path{blocks}_scale{at}")
            few = replace(own, nulls=(ISOTROPIC,), queries=isotropic, name=f"{own.name}_few")
            cells[blocks, scale] = [own, few] if isotropic else [own]
    analyzers = [one for some in cells.values() for one in some]
    request = Request(analyzers, layers=[layer], bank=subject.bank, queries=mask, seed=measured.seed, progress=False)
    table = score(subject.model, subject.capture, request).table[mask]
    parts = []
    for (blocks, scale), some in cells.items():
        # The fewer tokens last: of them, only their nulls are taken.
        held = {column.name: column.name.replace(str(one.name), SCORE, 1) for one in some for column in one.columns}
        taken = {name: column for name, column in held.items() if column in VALUES}
        own_first = {column: name for name, column in reversed(list(taken.items()))}
        part = pd.DataFrame({column: table[own_first[column]] if column in own_first else np.nan for column in VALUES}, table.index)
        parts.append(pd.concat([table[_keys(measured)], part], axis=1).assign(layer=layer, blocks=blocks, scale=scale))
    return tables.without_provenance(pd.concat([tables.without_provenance(part) for part in parts], ignore_index=True))
