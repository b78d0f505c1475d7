"""Random sets of the bank through a map: what a layer does to everything, on average over logarithms."""

from collections.abc import Collection, Iterator

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from basin_lens.analyzers import RandomContraction, Surroundings
from basin_lens.analyzers.contract import log_variance_ratio
from basin_lens.scoring.search import Searches
from basin_lens.transport import BlockMap, query_chunks

_TOKENS, _POINTS = 64, 64  # behind the mean contraction of a layer: tokens, and random points at each


def random_contraction(
    searches: Searches, layer: int, exclude: str, sizes: Collection[int], passage: BlockMap, bank: Surroundings
) -> dict[int, tuple[RandomContraction, int]]:
    """Mean contraction of random sets of the bank, each in a token's own place and context, and of how many sets it is the mean.

    By the size of the sets, which is that of the neighborhoods held against them: the logarithm of a variance of few points is too
    low on average, the less the more points there are and the rounder their cloud is, so that sets of another size would leave an
    offset where there is none. The points are passed once for all sizes.
    """
    values: dict[int, list[Tensor]] = {k: [] for k in sizes}
    documents: dict[int, list[str]] = {k: [] for k in sizes}
    for part, chosen in _random_rows_of_tokens(searches, layer, exclude, max(*sizes, _POINTS)):
        if not chosen.numel():
            continue
        before, after = passage.bank_before[chosen], passage.of_rows(part, chosen)
        names = [searches.capture.docs[seq] for seq in searches.capture.row_seq[part.cpu()].tolist()]
        for k in sizes:
            sets = min(chosen.shape[1], max(k, _POINTS)) // k
            if sets:
                split_in, split_out = (x[:, : sets * k].unflatten(1, (sets, k)) for x in (before, after))
                values[k].append(log_variance_ratio(split_in, split_out, bank).flatten())
                documents[k] += [name for name in names for _ in range(sets)]
    return {k: _mean_of(values[k], documents[k]) for k in sizes}


def _mean_of(values: list[Tensor], documents: list[str]) -> tuple[RandomContraction, int]:
    """Mean over sets and how many there are; the standard error is over documents, as tokens of one share their context."""
    ratios = torch.cat(values).double().cpu().numpy() if values else np.empty(0)
    there = ~np.isnan(ratios)
    ratios, names = ratios[there], np.array(documents)[there]
    if not len(ratios):
        return RandomContraction(float("nan"), float("nan")), 0
    mean = float(ratios.mean())
    sums = [float((ratios[names == name] - mean).sum()) for name in np.unique(names)]
    scale = len(sums) / (len(sums) - 1) if len(sums) > 1 else float("nan")
    return RandomContraction(mean, float(np.sqrt(scale * np.square(sums).sum()) / len(ratios))), len(ratios)


def _random_rows_of_tokens(
    searches: Searches, layer: int, exclude: str, points: int
) -> Iterator[tuple[Int[Tensor, " part"], Int[Tensor, "part points"]]]:
    """Seeded tokens, asked for or not (these are facts about the layer), each with random rows of the bank; a part at a time."""
    pool = torch.nonzero(searches.bank.row_pos > 0).squeeze(1)
    generator = torch.Generator().manual_seed((searches.seed * 1_000_003 + layer) % 2**63)
    candidates = torch.nonzero(searches.capture.row_pos > 0).squeeze(1)
    picks = torch.randint(len(candidates), (_TOKENS,), generator=generator, device="cpu")  # of fewer tokens, some several times
    if len(candidates) >= _TOKENS:
        picks = torch.randperm(len(candidates), generator=generator, device="cpu")[:_TOKENS]
    groups = searches.groups[exclude][0].cpu(), searches.groups[exclude][1].cpu()
    for part in query_chunks(searches.capture, candidates[picks].sort().values, points, 16 * points):
        rows = [_random_rows(searches, q, pool, groups, points, generator) for q in part.tolist()]
        fewest = min(len(r) for r in rows)
        yield part.to(searches.device), torch.stack([r[:fewest] for r in rows]).to(searches.device)


def _random_rows(
    searches: Searches,
    query: int,
    pool: Int[Tensor, " pool"],
    groups: tuple[Int[Tensor, " rows"], Int[Tensor, " bank"]],
    points: int,
    generator: torch.Generator,
) -> Int[Tensor, " points"]:
    """Random rows of the pool outside the query's group, no token prefix twice."""
    own, other = groups
    shuffled = pool[torch.randperm(len(pool), generator=generator, device="cpu")]
    if int(own[query]) >= 0:
        shuffled = shuffled[other[shuffled] != own[query]]
    shuffled = shuffled[: 4 * points]
    seen = dict(zip(reversed(searches.keys[1].cpu()[shuffled].tolist()), reversed(shuffled.tolist()), strict=True))
    seen.pop(int(searches.keys[0][query]), None)
    return torch.tensor(sorted(seen.values(), key=shuffled.tolist().index)[:points], dtype=torch.int64, device="cpu")
