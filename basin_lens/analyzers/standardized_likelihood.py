"""How likely each token is, beside what the model expected of likelihood there."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.capture import TokenBatch


@dataclass(frozen=True)
class StandardizedLikelihood(TokenAnalyzer):
    """The token's log probability in standard deviations from the mean log probability at its place: the token's part of Min-K%++.

    z_i = (l_i - mu_i) / sigma_i,  l_i = log p(x_i | x_<i),  mu_i = sum_v p log p,  sigma_i^2 = sum_v p (log p)^2 - mu_i^2

    Unit: standard deviations. Range: any. Position 0 is NaN: nothing predicts it; so is a prediction that does not vary (sigma
    below 1e-6). The same at every layer.

    Args:
        name: column name.

    Shapes: logits `[batch, pos, vocab]` -> `[batch, pos]`.

    Source: Zhang et al. 2024, "Min-K%++: Improved baseline for detecting pre-training data from large language models".

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.StandardizedLikelihood().columns[0].unit
        'standard deviations'
    """

    role: ClassVar[Role] = "confound"
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    per_layer: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "standardized_likelihood", "standard deviations"),)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        logits = batch.values["logits"]
        answer = torch.full(batch.tokens.shape, torch.nan, device=logits.device)
        tokens = batch.tokens.to(logits.device)
        for index, row in enumerate(logits):  # a sequence at a time: the vocabulary is wide
            log_p = torch.log_softmax(row[:-1].double(), -1)
            p = log_p.exp()
            mean = (p * log_p).sum(-1)
            # Deviations first: the difference of squares would lose a confident prediction's variance to rounding.
            spread = (p * (log_p - mean[:, None]) ** 2).sum(-1).sqrt()
            own = log_p.gather(1, tokens[index, 1:, None])[:, 0]
            answer[index, 1:] = torch.where(spread > 1e-6, (own - mean) / spread, torch.nan).float()
        return {self.columns[0].name: answer}
