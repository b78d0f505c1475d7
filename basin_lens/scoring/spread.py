"""G_in and G_out: the scale of a layer, against which the variances of neighborhoods are held."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.analyzers import total_variance
from basin_lens.scoring.search import Searches
from basin_lens.transport import BlockMap, query_chunks

_QUERIES, _POINTS = 32, 64  # random points behind G_in and G_out, per layer


def layer_spread(searches: Searches, layer: int, exclude: str, passage: BlockMap) -> tuple[float, float]:
    """G_in and G_out: mean total variance of random bank points before and after the same map."""
    pool = torch.nonzero(searches.bank.row_pos > 0).squeeze(1)
    if passage.context in ("native", "mlp"):
        at = pool.to(searches.device)
        return float(total_variance(passage.bank_before[at])), float(total_variance(passage.bank_after[at]))
    generator = torch.Generator().manual_seed((searches.seed * 1_000_003 + layer) % 2**63)
    # Of all tokens, asked for or not: G is a fact about the layer.
    candidates = torch.nonzero(searches.capture.row_pos > 0).squeeze(1)
    picks = torch.randint(len(candidates), (_QUERIES,), generator=generator, device="cpu")
    if len(candidates) >= _QUERIES:
        picks = torch.randperm(len(candidates), generator=generator, device="cpu")[:_QUERIES]
    queries = candidates[picks].sort().values
    groups = searches.groups[exclude][0].cpu(), searches.groups[exclude][1].cpu()
    before: list[Float[Tensor, " part"]] = []
    after: list[Float[Tensor, " part"]] = []
    for part in query_chunks(searches.capture, queries, _POINTS, 16 * _POINTS):
        rows = [_random_rows(searches, q, pool, groups, generator) for q in part.tolist()]
        fewest = min(len(r) for r in rows)
        if fewest < 2:
            return float("nan"), float("nan")
        chosen = torch.stack([r[:fewest] for r in rows]).to(searches.device)
        before.append(total_variance(passage.bank_before[chosen]))
        after.append(total_variance(passage.of_rows(part.to(searches.device), chosen)))
    return float(torch.cat(before).mean()), float(torch.cat(after).mean())


def _random_rows(
    searches: Searches,
    query: int,
    pool: Int[Tensor, " pool"],
    groups: tuple[Int[Tensor, " rows"], Int[Tensor, " bank"]],
    generator: torch.Generator,
) -> Int[Tensor, " points"]:
    """Random rows of the pool outside the query's group, no token prefix twice."""
    own, other = groups
    shuffled = pool[torch.randperm(len(pool), generator=generator, device="cpu")]
    if int(own[query]) >= 0:
        shuffled = shuffled[other[shuffled] != own[query]]
    shuffled = shuffled[: 4 * _POINTS]
    seen = dict(zip(reversed(searches.keys[1].cpu()[shuffled].tolist()), reversed(shuffled.tolist()), strict=True))
    seen.pop(int(searches.keys[0][query]), None)
    return torch.tensor(sorted(seen.values(), key=shuffled.tolist().index)[:_POINTS], dtype=torch.int64, device="cpu")
