"""What later tokens lose when one token is taken out of their attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.analyzers.drawing import drawing_order
from basin_lens.capture import TokenBatch
from basin_lens.errors import CaptureError
from basin_lens.values import Whole, whole_or_none


@dataclass(frozen=True)
class Erasure(TokenAnalyzer):
    """Mean rise of the later tokens' loss when the token is knocked out of the attention of all later queries, in all blocks.

    erasure_i = mean over t > i of [-log p(x_{t+1} | x_<=t without i)] - [-log p(x_{t+1} | x_<=t)]

    Nothing of token i then reaches a later position, so this is an intervention, the ground truth for the other importance
    measures. The prediction made at position i itself stays as it is and is left out of the mean. Unit: nats per token. Range:
    (-inf, inf). The same at every layer. NaN: positions that were not drawn, position 0 (mostly the attention sink: without it the
    model breaks), and the last two.

    Args:
        positions: at most so many positions of each sequence, drawn from the seed and the sequence's own tokens; None: all. Each
            costs a pass of its sequence.
        seed: of the draw.
        name: column name.

    Shapes: tokens `[batch, pos]` -> `[batch, pos]`.

    Raises:
        CaptureError: not at least one position. ModelError: a model whose attention cannot be masked.

    Source: design of basin_lens; Geva et al. 2023, "Dissecting recall of factual associations" (attention knockout).

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.Erasure(positions=4).columns[0].unit
        'nats per token'
    """

    role: ClassVar[Role] = "importance"
    positions: Whole | None = 16
    seed: Whole = 0
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "passes"})
    per_layer: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "erasure", "nats per token"),)

    def check(self) -> None:
        if self.positions is not None and (whole_or_none(self.positions) or 0) < 1:
            raise CaptureError(f"expected at least 1 position per sequence for Erasure, or None for all, got {self.positions!r}.")

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        assert batch.passes is not None
        device = batch.tokens.device
        answer = torch.full(batch.tokens.shape, torch.nan, device=device)
        drawn = [(row, pos) for row, ids in enumerate(batch.tokens) for pos in self._draw(ids[batch.valid[row]].tolist())]
        if drawn:
            rows, columns = torch.tensor(drawn, device=device).T
            before = batch.passes.losses(batch.values["logits"])[rows]
            after = batch.passes.losses_without(rows, columns)
            # The loss of token t was predicted at t - 1, which must stand behind the column.
            places = torch.arange(batch.tokens.shape[1], device=device)
            later = (places - 1 > columns[:, None]) & batch.valid[rows]
            rise = torch.where(later, after - before, 0).sum(1) / later.sum(1)
            answer[rows, columns] = rise
        return {self.columns[0].name: answer}

    def _draw(self, tokens: list[int]) -> list[int]:
        """Positions of one sequence, from its own tokens: whatever else is in the batch."""
        able = max(0, len(tokens) - 3)
        wanted = able if self.positions is None else min(able, int(self.positions))
        return sorted(drawing_order(tokens, int(self.seed))[:wanted].tolist())
