"""Whether the model's own guess is the token that follows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.capture import TokenBatch


@dataclass(frozen=True)
class Agreement(TokenAnalyzer):
    """Whether the model's most likely token, given the true tokens before it, is the token itself (teacher-forced agreement).

    agreement_i = 1 if argmax_v p(v | x_<i) = x_i, else 0

    Unit: share of tokens. Range: 0 or 1. Position 0 is NaN: nothing predicts it. The same at every layer. A continuation on which
    every token agrees is exactly what greedy decoding writes behind the same prompt: it is extractable.

    Args:
        name: column name.

    Shapes: logits `[batch, pos, vocab]` -> `[batch, pos]`.

    Source: Carlini et al. 2023, "Quantifying memorization across neural language models" (extractable); Biderman et al. 2023 (share
    of tokens).

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.Agreement().columns[0].name
        'agreement'
    """

    role: ClassVar[Role] = "confound"
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    per_layer: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "agreement", "share of tokens", 0, 1),)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        logits = batch.values["logits"]
        answer = torch.full(batch.tokens.shape, torch.nan, device=logits.device)
        answer[:, 1:] = (logits[:, :-1].argmax(-1) == batch.tokens[:, 1:].to(logits.device)).float()
        return {self.columns[0].name: answer}
