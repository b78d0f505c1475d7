"""Tokens in groups, and every cloud of a group through the map at every place of it."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.analyzers import CrossedTable, Crossing, Displaced, Surroundings, total_variance
from basin_lens.analyzers.contract import log_or_nan
from basin_lens.capture import Capture
from basin_lens.errors import NeighborError
from basin_lens.neighbors.choices import random_sets
from basin_lens.neighbors.grouping import matched_groups
from basin_lens.scoring.plan import Plan, SearchOptions
from basin_lens.scoring.search import Searches, SearchResult
from basin_lens.scoring.token_rows import row_groups
from basin_lens.transport import BlockMap, query_chunks, rows_per_call

# Centers and displacements of the clouds of some rows of the capture.
Clouds = Callable[[Int[Tensor, " n"]], tuple[Float[Tensor, "n d"], Float[Tensor, "n k d"]]]
_TOKENS = 256  # clouds held at once where only their variance is asked for


@dataclass(frozen=True)
class Crossed:
    """Groups of rows of the capture, and their tables by whose displacements were passed.

    `without`: rows that could be measured and found no group.
    """

    rows: Int[Tensor, "groups g"]
    tables: dict[Displaced, CrossedTable]
    without: int

    def facts(self) -> dict[str, float | int | None]:
        """What provenance says of the groups.

        `spread_within_groups`: median over groups of the largest difference of log V_in. `local`: median V_in of the neighbors
        over that of random sets, by which a reader sees how local a neighborhood is.
        """
        known: dict[str, float | int | None] = {"groups": len(self.rows), "without_group": self.without}
        if len(self.rows):
            before = self.tables["neighbors"].log_before
            known["spread_within_groups"] = float((before.amax(1) - before.amin(1)).median())
            if "random_sets" in self.tables:
                ratio = (before - self.tables["random_sets"].log_before).exp()
                known["local"] = float(ratio.nanmedian())
        return known


class CrossedPass:
    """The crossed tables of one map at one layer.

    Args:
        searches: the run's searches, with its model, capture and bank.
        layer: where the map begins.
        passage: the map.
        bank: the bank's states around the map: what its ordinary dimensions are measured on.
        options: under which the neighbors were found.
        found: who the neighbors are.
        k: how many of them count.
        crossing: what is crossed.
    """

    def __init__(
        self,
        searches: Searches,
        layer: int,
        passage: BlockMap,
        bank: Surroundings,
        options: SearchOptions,
        found: SearchResult,
        k: int,
        crossing: Crossing,
    ) -> None:
        self.searches, self.layer, self.passage, self.bank = searches, layer, passage, bank
        self.options, self.found, self.k, self.crossing = options, found, k, crossing
        self.device = searches.device

    def __call__(self, able: Bool[Tensor, " rows"]) -> Crossed:
        """Cross the rows that are able to be measured: those with k neighbors, and in the sample if there is one."""
        rows = torch.nonzero(able).squeeze(1)
        values = torch.full((len(rows),), torch.nan, dtype=torch.float32, device=self.device)
        for part in torch.arange(len(rows), device=self.device).split(_TOKENS):
            values[part] = self._log_before(self._near(rows[part])[1])[0]
        there = ~values.isnan()
        groups = self._grouped(rows[there], values[there])
        tables = {kind: self._table(groups, clouds) for kind, clouds in self._clouds.items()}
        return Crossed(groups, tables, len(rows) - groups.numel())

    def _grouped(self, rows: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> Int[Tensor, "groups g"]:
        """Groups of nearly equal log V_in, from different units, with no neighbor in common. Equal keys are one neighbor."""
        at = rows.cpu()
        groups = matched_groups(
            values.double().cpu().numpy(),
            unit_of_rows(self.searches.capture, self.options.exclude)[at].numpy(),
            self.found.bank.key[self.found.near.rows[rows, : self.k]].cpu().numpy(),
            self._keys[at].numpy(),
            size=self.crossing.group,
            seed=self.searches.seed * 1_000_003 + self.layer,
        )
        return rows[torch.from_numpy(groups).to(rows.device)]

    @cached_property
    def _keys(self) -> Int[Tensor, " rows"]:
        """What tells tokens apart, whatever the order of the texts: their sequence and their place in it."""
        return torch.tensor(
            [
                int.from_bytes(hashlib.blake2b(repr((sequence.tokens, pos)).encode(), digest_size=8).digest(), "big") >> 1
                for sequence in self.searches.capture.sequences
                for pos in range(len(sequence.tokens))
            ],
            device="cpu",
        )

    @cached_property
    def _clouds(self) -> dict[Displaced, Clouds]:
        known: dict[Displaced, Clouds] = {"neighbors": self._near, "random_sets": self._random, "isotropic": self._isotropic}
        return {kind: known[kind] for kind in self.crossing.displaced}

    def _near(self, rows: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k d"]]:
        return _cloud(self.passage.bank_before[self.found.near.rows[rows, : self.k]])

    def _random(self, rows: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k d"]]:
        chosen = self._random_rows[rows]
        assert bool((chosen >= 0).all())  # who has k neighbors has k random points, under the same rules
        return _cloud(self.passage.bank_before[chosen])

    @cached_property
    def _random_rows(self) -> Int[Tensor, "rows k"]:
        """Random rows of the bank for each row of the capture, under the rules for its neighbors; -1 for rows not searched."""
        found, seed = self.found, (self.searches.seed * 1_000_003 + self.layer) % 2**63
        same_token, distinct = self.options.same_token, self.options.exclude != "nothing"
        chosen = random_sets(found.queries, found.bank, self.k, same_token=same_token, distinct=distinct, seed=seed)
        rows = torch.full((self.searches.capture.n_rows, self.k), -1, dtype=torch.int64, device=self.device)
        rows[found.at] = chosen
        return rows

    def _isotropic(self, rows: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k d"]]:
        """Displacements in random directions, each as long in the ordinary dimensions as one of the neighbors'."""
        center, moves = self._near(rows)
        drawn = [
            np.random.default_rng([self.searches.seed, self.layer, key]).standard_normal(moves.shape[1:], dtype=np.float32)
            for key in self._keys[rows.cpu()].tolist()
        ]
        random = torch.from_numpy(np.stack(drawn)).to(moves)
        ordinary = self.bank.ordinary
        return center, random * (moves[..., ordinary].norm(dim=2) / random[..., ordinary].norm(dim=2))[..., None]

    def _log_before(self, moves: Float[Tensor, "n k d"]) -> list[Float[Tensor, " n"]]:
        """log V of displacements with both signs, of all of them and of either half; NaN where they are rounding."""
        sizes, total = moves[..., self.bank.ordinary].square().sum(2), self._total(self.bank.before)
        factor = 2 * math.log(self.crossing.scale)
        return [log_or_nan(sizes[:, some].mean(1), total) + factor for some in _halves(self.k)]

    def _table(self, groups: Int[Tensor, "n g"], clouds: Clouds) -> CrossedTable:
        """All clouds of a group at all its places."""
        n, g = groups.shape
        before = torch.full((3, n, g), torch.nan, dtype=torch.float32, device=self.device)
        after = torch.full((3, n, g, g), torch.nan, dtype=torch.float32, device=self.device)
        where = torch.full((self.searches.capture.n_rows,), -1, dtype=torch.int64, device=self.device)
        where[groups.flatten()] = torch.arange(n * g, device=self.device)
        total = self._total(self.bank.after)
        parts = query_chunks(self.searches.capture, groups.flatten(), 2 * self.k * g, rows_per_call(self.device)) if n else ()
        for part in parts:
            slot = where[part]
            centers, moves = clouds(groups[slot // g].flatten())
            centers, moves = centers.view(len(part), g, -1), moves.view(len(part), g, self.k, -1)
            own = torch.arange(len(part), device=self.device), slot % g
            points = centers[own][:, None, None, None] + self.crossing.scale * torch.stack([moves, -moves], dim=2)
            images = self.passage.of_points(part, points.flatten(1, 3)).view(points.shape)[..., self.bank.ordinary]
            log_before = self._log_before(moves[own])
            for index, some in enumerate(_halves(self.k)):
                before[index].view(-1)[slot] = log_before[index]
                after[index].view(-1, g)[slot] = log_or_nan(total_variance(images[..., some, :].flatten(2, 3)), total)
        whole, *halves = (CrossedTable(b, a) for b, a in zip(before, after, strict=True))
        return CrossedTable(whole.log_before, whole.log_after, tuple(halves))

    def _total(self, states: Float[Tensor, "points d"]) -> float:
        """The layer's own variance in its ordinary dimensions, beside which rounding is told."""
        return float(total_variance(states[:, self.bank.ordinary]))


def _cloud(states: Float[Tensor, "n k d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k d"]]:
    center = states.mean(1)
    return center, states - center[:, None]


def _halves(k: int) -> tuple[slice, slice, slice]:
    """All displacements, every other one, and as many of those between."""
    return slice(0, k), slice(0, k - k % 2, 2), slice(1, k, 2)


def unit_of_rows(capture: Capture, exclude: str) -> Int[Tensor, " rows"]:
    """What tokens of one group must differ in: the document, or the label that `exclude` names, where a text has it."""
    documents = row_groups(capture, capture, "document")[0]
    if exclude in ("self", "sequence", "document", "nothing"):
        return documents
    labels = row_groups(capture, capture, exclude)[0]
    return torch.where(labels >= 0, labels, documents + len(capture.sequences))


def refuse_few_units(capture: Capture, plan: Plan, asked: Bool[Tensor, " rows"]) -> None:
    """Before any work: groups whose tokens cannot all be of different documents.

    Raises:
        NeighborError: fewer documents than a group has tokens.
    """
    for a in plan.of_neighbors:
        if a.crossing is not None:
            units = len(unit_of_rows(capture, a.exclude)[asked & (capture.row_pos > 0)].unique())
            if units < a.crossing.group:
                kind = a.exclude if a.exclude not in ("self", "sequence", "nothing") else "document"
                raise NeighborError(
                    f"expected tokens of at least {a.crossing.group} different values of {kind!r} for {type(a).__name__}, whose "
                    f"groups of {a.crossing.group} hold one of each, got {units}. Add texts, ask for tokens of more of them, or "
                    f"leave {type(a).__name__} out."
                )
