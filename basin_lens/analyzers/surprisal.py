"""How unexpected each token is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.capture import TokenBatch


@dataclass(frozen=True)
class Surprisal(TokenAnalyzer):
    """Negative log probability of the token itself, given the tokens before it.

    surprisal_i = -log p(x_i | x_<i)

    Unit: nats. Range: [0, inf). Position 0 is NaN: nothing predicts it. The same at every layer.

    Args:
        name: column name.

    Shapes: logits `[batch, pos, vocab]` -> `[batch, pos]`.

    Source: Shannon 1948.

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.Surprisal().columns[0].unit
        'nats'
    """

    role: ClassVar[Role] = "confound"
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    per_layer: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "surprisal", "nats", 0),)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        logits = batch.values["logits"]
        answer = torch.full(batch.tokens.shape, torch.nan, device=logits.device)
        tokens = batch.tokens.to(logits.device)
        for index, row in enumerate(logits):  # a sequence at a time: the vocabulary is wide
            answer[index, 1:] = torch.nn.functional.cross_entropy(row[:-1], tokens[index, 1:], reduction="none")
        return {self.columns[0].name: answer}
