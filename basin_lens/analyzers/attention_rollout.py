"""How much of each token flows into the tokens after it through all layers so far."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from basin_lens.analyzers.attention import PerHead, check_heads, fill_columns, head_columns, received, without_sink
from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.capture import TokenBatch


@dataclass(frozen=True)
class AttentionRollout(TokenAnalyzer):
    """Attention rolled out over blocks 0 to L, the residual stream counted as half: what later tokens hold of each token.

    A^_l = (A_l + I) / 2 with A_l the mean over heads, R_L = A^_L R_{L-1}, R_{-1} = I;
    rollout_i = sum_{t>i} R_L[t, i] / sum_{t>i} 1 / (t + 1)

    Unit: multiples of uniform. Range: [0, inf). The last 5 positions are NaN: too few later tokens to average over. Block L's value
    needs the patterns of all blocks up to L; they are read whichever layers are asked for.

    Args:
        sink: False: leave out column 0 of every A_l and renormalize its rows (uniform is then 1 / t); position 0 is NaN.
        per_head: also a column for each head of block L, `<column>_head<h>`; see `AttentionReceived`. A head takes the last step
            alone, (A_L,h + I) / 2 R_{L-1}, below it all heads are averaged: what this head hands on. With the sink, their mean is
            the value itself.
        name: column name; the prefix of the columns with `per_head`.

    Shapes: pattern `[batch, head, query, key]` of every layer -> `[batch, pos]`.

    Raises:
        CaptureError: heads that the model does not have.

    Source: Abnar and Zuidema 2020, "Quantifying attention flow in transformers".

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.AttentionRollout().columns[0].name
        'attention_rollout'
    """

    role: ClassVar[Role] = "importance"
    sink: bool = True
    per_head: PerHead = False
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"pattern"})
    cumulative: ClassVar[bool] = True

    @property
    def columns(self) -> tuple[Column, ...]:
        default = "attention_rollout" + ("" if self.sink else "_without_sink")
        return head_columns(self.name, self.per_head, default, "multiples of uniform")

    def check(self) -> None:
        check_heads(self.per_head)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        pattern = batch.values["pattern"]
        below = batch.memory.get("rollout")
        batch.memory["rollout"] = rolled = self._step(pattern.mean(1, keepdim=True), below)
        # No renormalizing of R itself: without the sink, no row has any of it, and the rows still sum to 1.
        whole = received(rolled, batch.valid, normalize=True, sink=self.sink)[:, 0]
        if not self.per_head:
            return {self.columns[0].name: whole}
        return fill_columns(
            self.columns, self.per_head, whole, received(self._step(pattern, below), batch.valid, normalize=True, sink=self.sink)
        )

    def _step(
        self, attention: Float[Tensor, "batch head query key"], below: Float[Tensor, "batch 1 query key"] | None
    ) -> Float[Tensor, "batch head query key"]:
        """One block on top of what those below have rolled out."""
        stay = torch.eye(attention.shape[-1], device=attention.device)
        if not self.sink:
            attention = without_sink(attention)
            # A row that attended to nothing but the sink (row 0 does) keeps what it has.
            attention = torch.where(attention.sum(-1, keepdim=True) > 0, attention, stay)
        step = (attention + stay) / 2
        return step if below is None else step @ below
