"""How much attention each token receives from the tokens after it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.capture import TokenBatch
from basin_lens.errors import CaptureError
from basin_lens.values import Whole, whole_or_none

# False; the number of the model's heads; or some of its heads. Never True: columns are declared before a model is seen.
PerHead = Whole | tuple[Whole, ...]


@dataclass(frozen=True)
class AttentionReceived(TokenAnalyzer):
    """Mean attention from later tokens, relative to uniform attention, averaged over heads.

    r_i = sum_{t>i} a[t, i] / sum_{t>i} 1 / (t + 1)

    1 means what uniform attention would give. Position 0 is usually the attention sink. Unit: multiples of uniform.
    Range: [0, inf). The last 5 positions are NaN: too few later tokens to average over.

    Args:
        normalize: False: the raw column sum over later tokens, as in the original guide; it is mostly position.
        sink: False: leave out column 0 and renormalize the rows (uniform is then 1 / t); position 0 is NaN.
        per_head: also a column for each head, `<column>_head<h>`: the number of the model's heads, or a tuple of some of them.
            Without the sink, each head's own rows are renormalized.
        name: column name; the prefix of the columns with `per_head`.

    Shapes: pattern `[batch, head, query, key]` -> `[batch, pos]`.

    Raises:
        CaptureError: heads that the model does not have.

    Source: design of basin_lens; for the sink, Xiao et al. 2023, "Efficient streaming language models with attention sinks".

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.AttentionReceived(sink=False).columns[0].name
        'attention_received_without_sink'
        >>> [column.name for column in bl.analyzers.AttentionReceived(per_head=2).columns]
        ['attention_received', 'attention_received_head0', 'attention_received_head1']
    """

    role: ClassVar[Role] = "importance"
    normalize: bool = True
    sink: bool = True
    per_head: PerHead = False
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"pattern"})

    @property
    def columns(self) -> tuple[Column, ...]:
        default = "attention_received" + ("" if self.normalize else "_raw") + ("" if self.sink else "_without_sink")
        return head_columns(self.name, self.per_head, default, "multiples of uniform" if self.normalize else "sum of weights")

    def check(self) -> None:
        check_heads(self.per_head)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        pattern = batch.values["pattern"]
        whole = received(pattern.mean(1, keepdim=True), batch.valid, normalize=self.normalize, sink=self.sink)[:, 0]
        if not self.per_head:
            return {self.columns[0].name: whole}
        each = received(pattern, batch.valid, normalize=self.normalize, sink=self.sink)
        return fill_columns(self.columns, self.per_head, whole, each)


def received(
    attention: Float[Tensor, "batch head query key"], valid: Bool[Tensor, "batch key"], *, normalize: bool, sink: bool
) -> Float[Tensor, "batch head key"]:
    """Attention to each token from the real tokens after it, as `AttentionReceived` defines it; NaN with fewer than 5 of them."""
    if not sink:
        attention = without_sink(attention)
    later = later_queries(valid, attention.device)
    total = (attention * later[:, None]).sum(2)
    if normalize:
        queries = torch.arange(1, attention.shape[-1] + 1, device=attention.device).float()
        uniform = 1 / (queries if sink else (queries - 1).clamp_min(1))
        total = total / (later * uniform[:, None]).sum(1)[:, None]
    total = total.masked_fill((later.sum(1) < 5)[:, None], torch.nan)
    if not sink:
        total[:, :, 0] = torch.nan
    return total


def later_queries(valid: Bool[Tensor, "batch query"], device: torch.device) -> Float[Tensor, "batch query key"]:
    """1 where a real query stands after the key."""
    count = valid.shape[1]
    return torch.ones(count, count, device=device).tril(-1) * valid.to(device).float()[:, :, None]


def without_sink(attention: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Column 0 left out, the rows renormalized; a row that has nothing else stays 0."""
    attention = attention.clone()
    attention[..., 0] = 0
    return attention / attention.sum(-1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)


def heads_of(per_head: PerHead) -> tuple[int, ...]:
    """The heads that get a column."""
    return per_head if isinstance(per_head, tuple) else tuple(range(per_head))


def check_heads(per_head: PerHead) -> None:
    """Refuse what names no heads.

    Raises:
        CaptureError: see there.
    """
    whole = per_head is False or ((found := whole_or_none(per_head)) is not None and found >= 0)
    some = isinstance(per_head, tuple) and per_head and all(whole_or_none(h) is not None and h >= 0 for h in per_head)
    if not (whole or some) or (some and len(set(heads_of(per_head))) < len(heads_of(per_head))):
        raise CaptureError(
            f"expected per_head as the number of heads (model.cfg.n_heads) or a tuple of different heads, got {per_head!r}: "
            "columns are declared before a model is seen."
        )


def head_columns(name: str | None, per_head: PerHead, default: str, unit: str) -> tuple[Column, ...]:
    """One column, or that one and one for each head asked for; `name` is the column's, or the prefix of several."""
    heads = heads_of(per_head)
    if not heads:
        return (Column(name or default, unit, 0),)
    prefix = f"{name}_" if name else ""
    return tuple(Column(prefix + default + end, unit, 0) for end in ("", *(f"_head{h}" for h in heads)))


def fill_columns(
    columns: tuple[Column, ...], per_head: PerHead, whole: Float[Tensor, "batch pos"], each: Float[Tensor, "batch head pos"]
) -> dict[str, Tensor]:
    """Values for `head_columns`.

    Raises:
        CaptureError: the model has other heads.
    """
    count, heads = each.shape[1], heads_of(per_head)
    if heads and (max(heads) >= count if isinstance(per_head, tuple) else per_head != count):
        raise CaptureError(f"expected per_head={count} or heads below {count}, got {per_head!r} on a model of {count} heads.")
    values = [whole, *(each[:, head] for head in heads)]
    return {column.name: value for column, value in zip(columns, values, strict=True)}
