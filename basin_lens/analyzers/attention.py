"""How much attention each token receives from the tokens after it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.base import Column, TokenAnalyzer, column_name
from basin_lens.capture import TokenBatch


@dataclass(frozen=True)
class AttentionReceived(TokenAnalyzer):
    """Mean attention from later tokens, relative to uniform attention, averaged over heads.

    r_i = sum_{t>i} a[t, i] / sum_{t>i} 1 / (t + 1)

    1 means what uniform attention would give. Position 0 is usually the attention sink. Unit: multiples of uniform. Range: [0, inf).
    The last 5 positions are NaN: too few later tokens to average over.

    Args:
        normalize: False: the raw column sum over later tokens, as in the original guide; it is mostly position.
        sink: False: leave out column 0 and renormalize the rows (uniform is then 1 / t); position 0 is NaN.
        name: column name.

    Shapes: pattern `[batch, head, query, key]` -> `[batch, pos]`.

    Source: design of basin_lens; for the sink, Xiao et al. 2023, "Efficient streaming language models with attention sinks".

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.AttentionReceived(sink=False).columns[0].name
        'attention_received_without_sink'
    """

    normalize: bool = True
    sink: bool = True
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"pattern"})

    @property
    def columns(self) -> tuple[Column, ...]:
        default = "attention_received" + ("" if self.normalize else "_raw") + ("" if self.sink else "_without_sink")
        return (Column(column_name(self, default), "multiples of uniform" if self.normalize else "sum of weights", 0),)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        attention = batch.values["pattern"].mean(1)
        count = attention.shape[-1]
        later = torch.ones(count, count, device=attention.device).tril(-1)
        queries = torch.arange(1, count + 1, device=attention.device).float()
        if not self.sink:
            attention = attention.clone()
            attention[:, :, 0] = 0
            attention = attention / attention.sum(-1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)
            queries = (queries - 1).clamp_min(1)
        real = batch.valid.to(attention.device).float()
        weights = later * real[:, :, None]
        received = (attention * weights).sum(1)
        if self.normalize:
            received = received / (weights / queries[None, :, None]).sum(1)
        received = received.masked_fill(weights.sum(1) < 5, torch.nan)
        if not self.sink:
            received[:, 0] = torch.nan
        return {self.columns[0].name: received}
