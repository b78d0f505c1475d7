"""What one layer of one pass merged, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from basin_lens.merging.assignment import Assigned
from basin_lens.merging.options import Options
from basin_lens.merging.parameters import Parameters

# Of one layer in one pass: figures by the names of the columns of `TokenMerger.statistics`.
Row = dict[str, int | float]


@dataclass(frozen=True)
class Merged:
    """One layer of one pass.

    Attributes:
        layer: its number in the model.
        assigned: what was decided.
        eligible: tokens that could have been merged.
        valid: real tokens.
        levels: threshold of each token.
        units: descriptors.
        states: that entered the layer.
        recent: tokens that stay raw.
        closed: no token will be compared any more.
    """

    layer: int
    assigned: Assigned
    eligible: Bool[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    levels: Float[Tensor, "batch pos"]
    units: Float[Tensor, "batch pos width"]
    states: Float[Tensor, "batch pos d"]
    recent: int
    closed: bool


def layer_statistics(options: Options, parameters: Parameters, merged: Merged) -> Row:
    """A row of `TokenMerger.statistics`, without the number of the pass."""
    found, valid, simulate = merged.assigned, merged.valid, options.simulate
    joined = found.joined
    batch, length = joined.shape
    counts, offered, lengths = joined.sum(1), merged.eligible.sum(1), valid.sum(1)
    clusters = offered - counts
    row_bytes = parameters.shape.row_bytes
    kept = [int(n) * row_bytes for n in lengths] if simulate else _bytes_kept(parameters, merged)
    taken = (joined & (found.leader >= 0)).long()
    sizes = torch.zeros(batch, length, dtype=torch.long, device=joined.device)
    sizes.scatter_add_(1, found.leader.clamp(min=0), taken)
    return {
        "layer": merged.layer,
        "sequences": batch,
        "tokens": int(lengths.sum()),
        "eligible": int(offered.sum()),
        "merged": int(counts.sum()),
        "rate": float(counts.sum() / lengths.sum()),
        "clusters": int(clusters.sum()),
        "largest": int(sizes.max()) + 1,
        "rows": int((lengths - (0 if simulate else counts)).sum()),
        "bytes": sum(kept),
        "full_bytes": int(lengths.sum()) * row_bytes,
        "level": float(merged.levels.detach().mean()),
        **_errors(options, merged),
    }


def statistics_table(noted: Sequence[Row]) -> pd.DataFrame:
    """The rows as a table, with the number of the pass before them: every pass begins at the first layer."""
    found = pd.DataFrame(noted)
    if len(found):
        found.insert(0, "pass", (found["layer"] == found["layer"].min()).cumsum() - 1)
    return found


def _bytes_kept(parameters: Parameters, merged: Merged) -> list[int]:
    """Bytes of the layer's cache at the end of each sequence."""
    joined, valid, recent = merged.assigned.joined, merged.valid, merged.recent
    counts, offered, lengths = joined.sum(1), merged.eligible.sum(1), valid.sum(1)
    waiting = (lengths - 1).clamp(min=0, max=recent)
    # An attention row is as long as its token's past; kept of leaders, and of tokens that wait.
    places = torch.arange(1, joined.shape[1] + 1, device=joined.device)
    waits = valid & (places > 1) & (places > lengths[:, None] - recent)
    numbers = (((merged.eligible & ~joined) | waits) * places).sum(1)
    return [
        parameters.cache_bytes(int(n - m), int(e - m), int(w), numbers=int(r), closed=merged.closed)
        for n, m, e, w, r in zip(lengths, counts, offered, waiting, numbers, strict=True)
    ]


def _errors(options: Options, merged: Merged) -> dict[str, float]:
    """How far merged tokens are from what stands for them: `similarity` and `state_error`."""
    found, states = merged.assigned, merged.states.detach()
    chosen = found.joined & (found.leader >= 0)
    if not bool(chosen.any()):
        return {"similarity": float("nan"), "state_error": float("nan")}
    units, row = merged.units.detach(), chosen.nonzero()[:, 0]
    leader = found.leader[chosen]
    cosine = torch.nn.functional.cosine_similarity(units[chosen], units[row, leader], dim=-1)
    wide = states.float()
    standing = wide
    if options.representative == "mean":
        own = torch.arange(wide.shape[1], device=wide.device).expand(chosen.shape)
        home = torch.where(chosen, found.leader, own)
        sums = torch.zeros_like(wide).scatter_add_(1, home[..., None].expand_as(wide), wide)
        sizes = torch.zeros(chosen.shape, device=wide.device).scatter_add_(1, home, torch.ones_like(home, dtype=torch.float32))
        standing = sums / sizes.clamp(min=1)[..., None]
    away = (wide[chosen] - standing[row, leader]).square().sum()
    # Of the same tokens: a few massive ones among the others would make any error look small.
    spread = (wide[chosen] - wide[merged.eligible].mean(0)).square().sum()
    similarity = float(cosine.mean()) if units.shape[2] else float("nan")
    return {"similarity": similarity, "state_error": float(away / spread) if float(spread) > 0 else float("nan")}
