"""How open it is what comes next."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.capture import TokenBatch


@dataclass(frozen=True)
class NextTokenEntropy(TokenAnalyzer):
    """Entropy of what the model predicts behind each token, given it and those before it.

    next_token_entropy_i = -sum_v p(v | x_<=i) log p(v | x_<=i)

    The surprisal of the next token is one draw from what this is the mean of, if the model is right. Unit: nats. Range: [0, log
    vocabulary]: 0 where one token is certain, log vocabulary where all are equally likely. The same at every layer.

    Args:
        name: column name.

    Shapes: logits `[batch, pos, vocab]` -> `[batch, pos]`.

    Source: Shannon 1948.

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.NextTokenEntropy().columns[0].unit
        'nats'
    """

    role: ClassVar[Role] = "confound"
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    per_layer: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "next_token_entropy", "nats", 0),)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        logits = batch.values["logits"]
        answer = torch.empty(batch.tokens.shape, device=logits.device)
        for index, row in enumerate(logits):  # a sequence at a time: the vocabulary is wide
            # In double precision, and a probability of 0 times a logarithm of minus infinity is 0.
            answer[index] = torch.special.entr(torch.softmax(row.double(), -1)).sum(-1).float()
        return {self.columns[0].name: answer}
