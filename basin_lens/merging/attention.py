"""What attention reads once tokens are merged: clusters, each once, with its size."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.merging.assignment import Assigned


def share_of(
    assigned: Assigned,
    similarity: Float[Tensor, "batch pos"],
    levels: Float[Tensor, "batch pos"],
    temperature: float,
    *,
    soft: bool,
) -> Float[Tensor, "batch pos"]:
    """How much of each token is read through its cluster, 0 to 1.

    sigmoid((similarity - level) / temperature) where there is a cluster to join. The hard decision in the forward pass, with the
    soft one's gradient (straight-through), unless `soft`.
    """
    m = torch.sigmoid((similarity - levels) / temperature) * (assigned.leader >= 0)
    return m if soft else assigned.joined.to(m) + (m - m.detach())


def read_weights(assigned: Assigned, share: Float[Tensor, "batch pos"], *, drop: bool) -> Float[Tensor, "batch query key"]:
    """Factor of each key's attention mass at each query: 1 for a raw token, 0 for a merged one, its size for a leader.

    A factor of n on the mass is log(n) on the logit. A query sees only what was decided before it: row t sums the tokens whose
    `since` is at most t.
    """
    batch, length = share.shape
    change = share.new_zeros(batch, length + 1, length)
    rows = torch.arange(batch, device=share.device)[:, None].expand(batch, length)
    places = torch.arange(length, device=share.device).expand(batch, length)
    since = assigned.since.clamp(max=length)
    change = change.index_put((rows, since, places), -share, accumulate=True)
    if not drop:
        taken = assigned.leader >= 0
        change = change.index_put((rows, since, assigned.leader.clamp(min=0)), share * taken, accumulate=True)
    return 1 + change[:, :length].cumsum(1)


def read_pattern(
    pattern: Float[Tensor, "batch head query key"],
    assigned: Assigned,
    share: Float[Tensor, "batch pos"],
    *,
    mean: bool,
    drop: bool,
) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch query key"]]:
    """Attention over clusters, written as attention over tokens, from the plain pattern.

    With `mean`, a member's value counts with its leader's key: that is the same as one row with the leader's key, the mean of the
    values, and log(size) on the logit. Otherwise the leader's row alone is read, with log(size).

    Returns:
        the pattern, and the factors of `read_weights`.
    """
    weights = read_weights(assigned, share, drop=drop)
    if mean and not drop:
        length = share.shape[1]
        now = torch.arange(length, device=share.device)[:, None]
        through = share[:, None] * (assigned.since[:, None] <= now)
        leaders = assigned.leader.clamp(min=0)[:, None, None].expand(-1, *pattern.shape[1:3], -1)
        mixed = (1 - through)[:, None] * pattern + through[:, None] * pattern.gather(3, leaders)
    else:
        mixed = weights[:, None] * pattern
    changed = (weights != 1).any(2)[:, None, :, None]
    read = normalized(mixed, pattern)
    # Queries that see no cluster keep the plain numbers, bit by bit; the gradient still says what merging would have done there.
    still = read + (pattern - read).detach() if weights.requires_grad else pattern
    return torch.where(changed, read, still).to(pattern.dtype), weights


def normalized(
    mixed: Float[Tensor, "batch head query key"], pattern: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch head query key"]:
    """Changed attention mass over its new sum; what the plain rows lack of 1 is an attention sink's (GPT-OSS), and stays its."""
    lost = 1 - pattern.sum(3, keepdim=True)
    # Rounding is no sink.
    return mixed / (mixed.sum(3, keepdim=True) + torch.where(lost > torch.finfo(pattern.dtype).eps ** 0.5, lost, 0))


def running_means(assigned: Assigned, descriptors: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
    """The mean of the cluster that each token was compared with, as it stood then."""
    places = torch.arange(descriptors.shape[1], device=descriptors.device)
    cluster = torch.where(assigned.joined, assigned.leader, places)
    inside = (cluster[:, None] == assigned.leader[:, :, None]) & (places[None] < places[:, None])
    counted = inside.to(descriptors)
    return counted @ descriptors / counted.sum(2, keepdim=True).clamp(min=1)


def leader_rows(values: Float[Tensor, "batch pos width"], leader: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos width"]:
    """The leader's row of each token; its own where it has none."""
    places = torch.arange(values.shape[1], device=values.device)
    found = torch.where(leader >= 0, leader, places)
    return values.gather(1, found[:, :, None].expand(-1, -1, values.shape[2]))


def spread_residual(
    pattern: Float[Tensor, "batch head query key"],
    weights: Float[Tensor, "batch query key"],
    assigned: Assigned,
    share: Float[Tensor, "batch pos"],
    correction: Float[Tensor, "batch pos kv d_head"],
) -> Float[Tensor, "batch query head d_head"]:
    """What the clusters' residuals add to each head's reading: the mean of its members' corrections, the leader's being 0.

    A mean over the members so far needs one row per cluster, and one only.
    """
    now = torch.arange(share.shape[1], device=share.device)[:, None]
    leaders = assigned.leader.clamp(min=0)[:, None].expand(-1, len(now), -1)
    size = weights.gather(2, leaders).clamp(min=1)
    through = share[:, None] * (assigned.since[:, None] <= now) * (assigned.leader >= 0)[:, None] / size
    mass = pattern.gather(3, leaders[:, None].expand(-1, pattern.shape[1], -1, -1)) * through[:, None]
    repeated = correction.repeat_interleave(pattern.shape[1] // correction.shape[2], dim=2)
    return torch.einsum("bhqk,bkhd->bqhd", mass, repeated)
