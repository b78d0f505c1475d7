"""Tokens with neighborhoods: where these are, what displaces their centroids, and what the map makes of states there."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.analyzers import Crossing, Displaced, Surroundings, total_variance
from basin_lens.analyzers.contract import MASSIVE, log_or_nan, own_spread
from basin_lens.neighbors.choices import random_sets
from basin_lens.scoring.plan import SearchOptions
from basin_lens.scoring.search import Searches, SearchResult
from basin_lens.transport import BlockMap

_TOKENS = 256  # clouds held at once where only their variance is asked for


@dataclass(frozen=True)
class Clouds:
    """The tokens of one capture (the texts', or the bank's own) at one layer, and their clouds.

    Attributes:
        searches: the searches among the bank's rows for these tokens.
        layer: where the map begins.
        passage: the map at these tokens.
        bank: the bank's states around the map: what its ordinary dimensions are measured on.
        options: under which the neighbors were found.
        found: who the neighbors are.
        k: how many of them count.
        crossing: what is crossed.
        random: rows of tokens, ascending, and random rows of the bank for each, drawn before; None: drawn when asked for.
    """

    searches: Searches
    layer: int
    passage: BlockMap
    bank: Surroundings
    options: SearchOptions
    found: SearchResult
    k: int
    crossing: Crossing
    random: tuple[Int[Tensor, " some"], Int[Tensor, "some k"]] | None = None

    def near(self, rows: Int[Tensor, " n"]) -> Int[Tensor, "n k"]:
        """Rows of the bank that are these tokens' neighbors."""
        return self.found.near.rows[rows, : self.k]

    def neighbor_keys(self, rows: Int[Tensor, " n"]) -> Int[Tensor, "n k"]:
        """Neighbors told apart: equal keys are one neighbor, also of tokens of another capture with the same bank."""
        return self._first_alike[self.near(rows)]

    @cached_property
    def _first_alike(self) -> Int[Tensor, " bank"]:
        """For each row of the bank, the first row with its key: keys themselves are numbered anew in every search."""
        _, which = self.found.bank.key.unique(return_inverse=True)
        rows = torch.arange(len(which), device=which.device)
        return torch.zeros_like(rows).scatter_reduce(0, which, rows, "amin", include_self=False)[which]

    def log_variance(self, rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """log V_in of these tokens' neighborhoods; NaN where it is rounding."""
        parts = [self.log_before(self.of("neighbors", part)[1])[0] for part in rows.split(_TOKENS)]
        return torch.cat(parts) if parts else torch.empty(0, device=rows.device)

    def of(self, kind: Displaced, rows: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k d"]]:
        """Centers and displacements of these tokens' clouds."""
        known: dict[Displaced, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
            "neighbors": self._neighbors,
            "random_sets": self._random_sets,
            "isotropic": self._isotropic,
        }
        return known[kind](rows)

    def _neighbors(self, rows: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k d"]]:
        return _centered(self.passage.bank_before[self.near(rows)])

    def _random_sets(self, rows: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k d"]]:
        chosen = self.random_rows(rows)
        short = (chosen < 0).any(1)  # who has k neighbors has k random points under the same rules, unless some are far out
        center, moves = _centered(self.passage.bank_before[chosen.clamp_min(0)])
        return center, moves.masked_fill(short[:, None, None], torch.nan)

    @cached_property
    def far_out(self) -> Bool[Tensor, " bank"]:
        """Rows of the bank that are in no random set: squared distance from the median state over 20 times the median row's.

        Attention sinks are such: one of them is most of the variance of a set that holds it, and nobody's near neighbor.
        """
        states, pool = self.passage.bank_before, self.found.bank.pool
        size = (states - states[pool].median(0).values).square().sum(1)
        return pool & (size > MASSIVE * size[pool].median())

    def random_rows(self, rows: Int[Tensor, " n"]) -> Int[Tensor, "n k"]:
        """Random rows of the bank for these tokens."""
        return self._random_rows[rows] if self.random is None else self.random[1][torch.searchsorted(self.random[0], rows)]

    @cached_property
    def _random_rows(self) -> Int[Tensor, "rows k"]:
        """Random rows of the bank for each row of the capture; -1: not enough, or a row not searched."""
        rows = torch.full((self.searches.capture.n_rows, self.k), -1, dtype=torch.int64, device=self.searches.device)
        rows[self.found.at] = self.drawn(self.found.at)
        return rows

    def drawn(self, rows: Int[Tensor, " n"]) -> Int[Tensor, "n k"]:
        """Random rows of the bank for these tokens, all of them searched, under the rules for their neighbors and none far out; -1:
        not enough. They are the same whoever else is asked for."""
        found, seed = self.found, (self.searches.seed * 1_000_003 + self.layer) % 2**63
        same_token, distinct = self.options.same_token, self.options.exclude != "nothing"
        bank = replace(found.bank, pool=found.bank.pool & ~self.far_out)
        if int(bank.pool.sum()) < self.k:
            return torch.full((len(rows), self.k), -1, dtype=torch.int64, device=rows.device)
        places = torch.searchsorted(found.at, rows)
        # With partners from the bank, nothing of a token depends on who else is searched.
        keys = self.keys_of(rows) if self.crossing.partners == "bank" else None
        among = len(found.at), places
        queries = found.queries.some(places)
        return random_sets(queries, bank, self.k, same_token=same_token, distinct=distinct, seed=seed, keys=keys, among=among)

    def _isotropic(self, rows: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k d"]]:
        """Displacements in random directions, each as long in the ordinary dimensions as one of the neighbors'."""
        center, moves = self._neighbors(rows)
        drawn = [
            np.random.default_rng([self.searches.seed, self.layer, key]).standard_normal(moves.shape[1:], dtype=np.float32)
            for key in self.keys_of(rows).tolist()
        ]
        random = torch.from_numpy(np.stack(drawn)).to(moves)
        ordinary = self.bank.ordinary
        return center, random * (moves[..., ordinary].norm(dim=2) / random[..., ordinary].norm(dim=2))[..., None]

    def keys_of(self, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """What tells tokens apart, whatever the order of the texts: their sequence and their place in it."""
        capture, at = self.searches.capture, rows.cpu()
        places = zip(capture.row_seq[at].tolist(), capture.row_pos[at].tolist(), strict=True)
        told = (repr((capture.sequences[seq].tokens, pos)).encode() for seq, pos in places)
        keys = [int.from_bytes(hashlib.blake2b(each, digest_size=8).digest(), "big") >> 1 for each in told]
        return torch.tensor(keys, dtype=torch.int64, device="cpu")

    def log_before(self, moves: Float[Tensor, "n k d"]) -> list[Float[Tensor, " n"]]:
        """log V of displacements with both signs, of all of them and of either half; NaN where they are rounding."""
        sizes, total = moves[..., self.bank.ordinary].square().sum(2), self._totals[0]
        factor = 2 * math.log(self.crossing.scale)
        return [log_or_nan(sizes[:, some].mean(1), total) + factor for some in halves_of(self.k)]

    def log_after(self, kind: Displaced, rows: Int[Tensor, " n"], moves: Float[Tensor, "n g k d"]) -> list[Float[Tensor, "n g"]]:
        """log V of the images of these tokens' centers so displaced, of all displacements and of either half; NaN: rounding."""
        center = self.of(kind, rows)[0]
        points = center[:, None, None, None] + self.crossing.scale * torch.stack([moves, -moves], dim=2)
        images = self.passage.of_points(rows, points.flatten(1, 3)).view(points.shape)[..., self.bank.ordinary]
        total = self._totals[1]
        return [log_or_nan(total_variance(images[..., some, :].flatten(2, 3)), total) for some in halves_of(self.k)]

    @cached_property
    def _totals(self) -> tuple[float, float]:
        """The layer's own variance in its ordinary dimensions before and behind the map, beside which rounding is told."""
        before, after = (own_spread(states[:, self.bank.ordinary]) for states in (self.bank.before, self.bank.after))
        return float(before), float(after)


def _centered(states: Float[Tensor, "n k d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k d"]]:
    center = states.mean(1)
    return center, states - center[:, None]


def halves_of(k: int) -> tuple[slice, slice, slice]:
    """All displacements, every other one, and as many of those between."""
    return slice(0, k), slice(0, k - k % 2, 2), slice(1, k, 2)
