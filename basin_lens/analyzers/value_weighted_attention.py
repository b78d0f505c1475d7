"""How much each token writes into the tokens after it, by attention and by the size of what is carried."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.attention import PerHead, check_heads, fill_columns, head_columns, received
from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.capture import TokenBatch


@dataclass(frozen=True)
class ValueWeightedAttention(TokenAnalyzer):
    """Attention from later tokens times the norm of what it carries, summed over heads.

    w_i = sum_heads sum_{t>i} ||a[t, i] v_i W_O|| / sum_{t>i} 1 / (t + 1)

    v_i is the value as the block computes it, its normed input already in it; heads that share a value (grouped-query attention)
    each weigh it by their own part of W_O. What a model does behind W_O (bias, the post-norm of Gemma 2, Granite's residual
    multiplier) is not in it. Unlike attention alone, a token with much attention and a tiny value (a sink) counts for little.

    Units: state units, or with `normalize=False` state units summed over tokens. Range: [0, inf). The last 5 positions are NaN.

    Args:
        normalize: False: the sum over later tokens itself.
        sink: False: leave out column 0 and renormalize each head's rows (uniform is then 1 / t); position 0 is NaN.
        per_head: also a column for each head, `<column>_head<h>`; see `AttentionReceived`.
        name: column name; the prefix of the columns with `per_head`.

    Shapes: pattern `[batch, head, query, key]`, values `[batch, pos, ...]` -> `[batch, pos]`.

    Raises:
        CaptureError: heads that the model does not have. ModelError: attention without an output projection.

    Source: Kobayashi et al. 2020, "Attention is not only a weight: analyzing transformers with vector norms".

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.ValueWeightedAttention().columns[0].unit
        'state units'
    """

    role: ClassVar[Role] = "importance"
    normalize: bool = True
    sink: bool = True
    per_head: PerHead = False
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"pattern", "v", "output_weight"})

    @property
    def columns(self) -> tuple[Column, ...]:
        default = "value_weighted_attention" + ("" if self.normalize else "_raw") + ("" if self.sink else "_without_sink")
        return head_columns(self.name, self.per_head, default, "state units" if self.normalize else "state units summed")

    def check(self) -> None:
        check_heads(self.per_head)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        weight = batch.values["output_weight"]
        heads, size, _ = weight.shape
        values = batch.values["v"].flatten(2).unflatten(2, (-1, size))
        shared = heads // values.shape[2]
        # A head at a time: all of them at once would be as large as the logits.
        norms = [(values[:, :, head // shared] @ weight[head]).norm(dim=-1) for head in range(heads)]
        weighted = received(batch.values["pattern"], batch.valid, normalize=self.normalize, sink=self.sink) * torch.stack(norms, 1)
        return fill_columns(self.columns, self.per_head, weighted.sum(1), weighted)
