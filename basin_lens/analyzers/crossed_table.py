"""The two-way table of places and directions, and what it is made of: what neither explains is the interaction."""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Displaced = Literal["neighbors", "random_sets", "isotropic"]
Partners = Literal["all", "first", "second"]
PartnersFrom = Literal["texts", "bank"]


@dataclass(frozen=True)
class Crossing:
    """How tokens are crossed with one another.

    Attributes:
        group: tokens in a group.
        scale: factor on the displacements.
        displaced: whose displacements are passed: of the `"neighbors"` from their centroid, of `"random_sets"` of the bank from
            theirs, or `"isotropic"` ones (as long as the neighbors', in random directions).
        partners: where a token's partners come from: other tokens of the `"texts"`, or of the `"bank"`.
    """

    group: int
    scale: float
    displaced: tuple[Displaced, ...] = ("neighbors",)
    partners: PartnersFrom = "texts"


class Parts(NamedTuple):
    """What a table says of each token scored: the interaction, and the two parts that it is free of."""

    interaction: Float[Tensor, "groups scored"]
    place: Float[Tensor, "groups scored"]
    directions: Float[Tensor, "groups scored"]


@dataclass(frozen=True)
class CrossedTable:
    """Contraction at every place of a group along the displacements of every token of it.

    c(p, q) = log [ V(mu_p +- s D_q) / V(F_p(mu_p +- s D_q)) ]

    F_p: the map at token p; mu_p: the centroid of its neighbors; D_q: the displacements of q's neighbors from their own centroid,
    with both signs, so that home and away are equally synthetic; s: the scale. V: total variance over the layer's ordinary
    dimensions.

    Attributes:
        log_before: log V of what is put in. Adding to mu_p changes no variance, so there is one for each q.
        log_after: log V of the images, by place and by directions. NaN where it is rounding.
        halves: the same over every other displacement, and over those between.
        partners: which of a token's partners count, see `parts`.
        scored: how many of a group's tokens are scored, the first ones; None: all. The others are partners alone.
    """

    log_before: Float[Tensor, "groups g"]
    log_after: Float[Tensor, "groups g g"]
    halves: "tuple[CrossedTable, ...]" = field(default=())
    partners: Partners = "all"
    scored: int | None = None

    @property
    def contraction(self) -> Float[Tensor, "groups g g"]:
        """c(p, q), `[group, p, q]`, in nats."""
        return self.log_before[:, None, :] - self.log_after

    @property
    def at_home(self) -> Float[Tensor, "groups scored"]:
        """c(i, i) of each token i that is scored, in nats."""
        return self.contraction.diagonal(dim1=1, dim2=2)[:, : self.scored]

    @property
    def partner_halves(self) -> "tuple[CrossedTable, CrossedTable]":
        """The same table, read once with half of the partners as places and the rest as directions, and once the other way round.

        The two have no cell in common but the token's own, and each is free of place and directions as the whole is.
        """
        return replace(self, partners="first"), replace(self, partners="second")

    def some(self, groups: Tensor) -> "CrossedTable":
        """The table of some of the groups."""
        return replace(
            self,
            log_before=self.log_before[groups],
            log_after=self.log_after[groups],
            halves=tuple(half.some(groups) for half in self.halves),
        )

    def parts(self) -> Parts:
        """Interaction, place and directions of each token i that is scored.

        place_i = mean over q of c(i, q); directions_i = mean over p of c(p, i); p, q: partners, the other tokens of the group
        interaction_i = c(i, i) - place_i - directions_i + mean over p != q of c(p, q)

        It is 0 for every token where log V of the images is a sum of a place's and a displacement set's own part.
        """
        table = self.contraction
        as_place, as_directions = partner_masks(table.shape[1], self.partners, table.device)
        pairs = (as_place[:, :, None] & as_directions[:, None, :]).to(table.dtype)
        pairs *= 1 - torch.eye(table.shape[1], dtype=table.dtype, device=table.device)
        place = torch.einsum("niq,iq->ni", table, _shares(as_directions, table))
        directions = torch.einsum("npi,ip->ni", table, _shares(as_place, table))
        elsewhere = torch.einsum("npq,ipq->ni", table, pairs / pairs.sum((1, 2), keepdim=True))
        found = (table.diagonal(dim1=1, dim2=2) - place - directions + elsewhere, place, directions)
        return Parts(*(part[:, : self.scored] for part in found))


def partner_masks(size: int, partners: Partners, device: torch.device) -> tuple[Bool[Tensor, "g g"], Bool[Tensor, "g g"]]:
    """For token i (row), which partners are read as places and which as directions.

    Counted from i on around the group, the first half of the partners is one side and the rest the other.
    """
    index = torch.arange(size, device=device)
    ahead = (index[None] - index[:, None]) % size  # 0: the token itself
    if partners == "all":
        return ahead > 0, ahead > 0
    near, rest = (ahead > 0) & (ahead <= (size - 1) // 2), ahead > (size - 1) // 2
    return (near, rest) if partners == "first" else (rest, near)


def _shares(mask: Bool[Tensor, "g g"], like: Tensor) -> Float[Tensor, "g g"]:
    """Weights of a mean over what each row marks."""
    weights = mask.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)
