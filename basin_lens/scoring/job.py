"""A run as pieces of work: what each piece needs, and what it finds. Every piece is a function of the job and its own number.

    read(i)    some batches go through the model  -> states at block borders, values of token analyzers
    score(L)   the neighbors at layer L go through the block -> the layer's scores

Of many texts, the work at a layer is cut further (see `layer_work`), so that a piece holds the states of one shard of them:

    search(L, s) -> join(L) -> score(L, s) -> collect(L)

Pieces are the same whoever does them: one process in memory, one that writes to a folder, several on a cluster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from basin_lens import tables
from basin_lens.analyzers import CloudAnalyzer
from basin_lens.capture import Capture, check_cache, check_layers, fill_columns, layers_asked
from basin_lens.capture.batches import check_points
from basin_lens.capture.pieces import Batch, ReadPiece, batches_of, piece_sizes, read_piece, schedule_of
from basin_lens.capture.schedule import PassSchedule
from basin_lens.errors import CaptureError
from basin_lens.model import HookedModel, check_model, full_precision, measuring, n_layers
from basin_lens.scoring.bank import choose_bank
from basin_lens.scoring.layer_work import LayerWork
from basin_lens.scoring.plan import Plan
from basin_lens.scoring.request import Request
from basin_lens.scoring.results import KeptNeighbors, LayerScores, Part
from basin_lens.scoring.run import Run
from basin_lens.scoring.token_rows import query_rows
from basin_lens.texts import Texts

# Tokens of the texts up to which the work at a layer is one piece: 38 MB of states at 576 dimensions.
SHARD_TOKENS = 1 << 14
Step = Literal["search", "join", "score", "collect"]
_IN_SHARDS: tuple[Step, Step] = ("search", "score")


@dataclass(frozen=True)
class LayerPiece:
    """A piece of the work at a layer; the last one, `collect`, gives its scores."""

    step: Step
    layer: int
    shard: int = 0

    def __str__(self) -> str:
        return f"{self.step} {self.shard} of layer {self.layer}"


@dataclass
class Job:
    """All that any piece of a run needs.

    Attributes:
        model: in any state.
        capture: read, or only planned.
        plan: what to measure.
        request: the options of `analyze`.
        asked: rows to score.
        run: the part that looks at neighbors; None if no analyzer does.
        keep: the analyzer whose neighbors are kept.
        frozen: another run's neighbors, taken as they are.
        piece_tokens: a piece of reading holds at least so many; 0: one batch.
        shard_tokens: the work at a layer is cut where the texts have more.
        was_read: whether the capture came read.
        read_again_for: analyzers for which a capture that came read had to be read again.
    """

    model: HookedModel
    capture: Capture
    plan: Plan
    request: Request
    asked: Bool[Tensor, " rows"]
    run: Run | None
    keep: CloudAnalyzer | None = None
    frozen: KeptNeighbors | None = None
    piece_tokens: int = 0
    shard_tokens: int = SHARD_TOKENS
    was_read: bool = True
    read_again_for: list[str] = field(default_factory=list)
    _work: LayerWork | None = None  # of the layer that the last piece was of

    @cached_property
    def _batches(self) -> list[Batch]:
        return batches_of(self.model, self.capture, self.request.batch_size)

    @cached_property
    def pieces(self) -> list[range]:
        """Batches of each piece of reading; none if the capture came read."""
        return [] if self.was_read else piece_sizes(self._batches, self.piece_tokens)

    def rows_of(self, index: int) -> Int[Tensor, " n"]:
        """Rows of a piece of reading."""
        return torch.cat([self._batches[batch][0] for batch in self.pieces[index]])

    @cached_property
    def schedule(self) -> PassSchedule:
        """What each pass collects."""
        check_points(self.model, self.capture.layers, self.plan.of_tokens)
        return schedule_of(self.model, self.capture, self.plan.of_tokens)

    @property
    def layers(self) -> Sequence[int]:
        """Layers with a piece of scoring; none if no analyzer looks at neighbors."""
        return self.plan.layers if self.run is not None else ()

    @torch.inference_mode(False)  # what is kept must not be an inference tensor, whatever mode the caller is in
    @full_precision()
    def read(self, index: int, passed: Callable[[int], object] = lambda _: None) -> ReadPiece:
        """Do a piece of reading. `passed`: called with the number of tokens of each batch when it is done."""
        return read_piece(self.model, self.capture, self.schedule, [self._batches[batch] for batch in self.pieces[index]], passed)

    @property
    def shards(self) -> int:
        """Shards of the work at a layer."""
        return -(-self.capture.n_rows // self.shard_tokens)

    def pieces_of(self, layer: int) -> list[LayerPiece]:
        """The pieces of the work at a layer, in an order in which they can be done."""
        if self.shards == 1:
            return [LayerPiece("collect", layer)]
        search, score = ([LayerPiece(step, layer, shard) for shard in range(self.shards)] for step in _IN_SHARDS)
        return [*search, LayerPiece("join", layer), *score, LayerPiece("collect", layer)]

    def needs(self, piece: LayerPiece) -> list[LayerPiece]:
        """The pieces that must be there before."""
        *before, _ = pieces = self.pieces_of(piece.layer)
        known: dict[Step, list[LayerPiece]] = {
            "search": [],
            "join": [one for one in pieces if one.step == "search"],
            "score": [one for one in pieces if one.step == "join"],
            "collect": [one for one in before if one.step != "search"],
        }
        return known[piece.step]

    @full_precision()
    def score(self, layer: int) -> LayerScores:
        """Do all the work at a layer; all rows must have been read."""
        assert self.run is not None
        with measuring(self.model):
            return self.run.layer(layer, self.shards)

    @full_precision()
    def work(self, piece: LayerPiece, found: Callable[[LayerPiece], Part]) -> Part:
        """Do a piece of the work at a layer that is cut, but for the last one. `found`: what the pieces before it gave."""
        try:
            with measuring(self.model):
                work, before = self._at(piece.layer), map(found, self.needs(piece))  # looked at once, and not held here
                if piece.step == "search":
                    return work.search(piece.shard, self.shards)
                return work.join(before) if piece.step == "join" else work.score(before, piece.shard, self.shards)
        finally:
            self.capture.forget_pages()  # of this shard's states

    @full_precision()
    def collect(self, piece: LayerPiece, found: Callable[[LayerPiece], Part]) -> LayerScores:
        """The scores of a layer, from all its shards."""
        with measuring(self.model):
            joined, *shares = self.needs(piece)
            scores = self._at(piece.layer).collect(map(found, [joined]), [found(one) for one in shares])
            self._let_go()
            return scores

    def _at(self, layer: int) -> LayerWork:
        assert self.run is not None
        if self._work is None or self._work.piece.layer != layer:
            self._let_go()  # first, so that states of two layers are never held
            self._work = self.run.work(layer)
        return self._work

    def _let_go(self) -> None:
        if self._work is not None:
            self._work.close()
        self._work = None
        self.capture.forget_pages()

    @full_precision()
    def fill(self) -> None:
        """Measure token analyzers that a capture does not hold yet; what was read here holds them."""
        if not self.was_read:
            return
        self.read_again_for = fill_columns(
            self.model, self.capture, self.plan.of_tokens, layers=self.plan.layers, progress=self.request.progress
        )


@full_precision()
def prepare(
    model: HookedModel,
    data: Capture | Texts,
    request: Request,
    *,
    keep: CloudAnalyzer | None = None,
    frozen: KeptNeighbors | None = None,
    piece_tokens: int = 0,
    shard_tokens: int = SHARD_TOKENS,
) -> Job:
    """The job of a request. All that can be refused is refused here, before the model runs.

    Raises:
        BasinLensError: what does not fit.
    """
    check_model(model)
    capture, plan = _planned(model, data, request)
    was_read = capture.is_read
    if not was_read:
        check_points(model, capture.layers, plan.of_tokens)
    tables.check_names([*{name for label in capture.labels for name in label}, *plan.columns])
    asked = query_rows(capture, request.queries, request.seed)
    run = None
    if plan.of_neighbors:
        bank = choose_bank(model, capture, request.bank, plan, progress=request.progress)
        run = Run(model, capture, bank, plan, asked, backend=request.backend, compiles=request.compile, frozen=frozen, keep=keep)
    return Job(model, capture, plan, request, asked, run, keep, frozen, piece_tokens, shard_tokens, was_read)


def _planned(model: HookedModel, data: Capture | Texts, request: Request) -> tuple[Capture, Plan]:
    """The capture, read or only planned, and what to measure on it."""
    if not isinstance(data, Capture):
        layers = check_layers(model, request.layers)
        capture = Capture.plan(
            model,
            data,
            layers=layers,
            max_length=request.max_length,
            prepend_bos=request.prepend_bos,
            attention_mask=request.attention_mask,
        )
        return capture, Plan(layers, n_layers(model), request.chosen, request.seed)
    if request.attention_mask is not None:
        raise CaptureError("expected token ids with attention_mask, got a Capture. Give the mask where it is made.")
    data.check_model_is(model)
    plan = Plan(layers_asked(model, data, request.layers), n_layers(model), request.chosen, request.seed)
    check_cache(model, data, plan.path)
    return data, plan
