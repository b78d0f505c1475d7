"""The work at one layer, in steps: search, join, score, collect. Searches and scores can be done in shards, each by itself.

    search(s)   the neighbors of a range of the texts' tokens
    join        what needs all tokens: hubness, samples, groups, random sets, how many rows go through the block for a token
    score(s)    a share of the block calls, and what analyzers say of the tokens that they are for
    collect     the layer's scores, how reliable they are, what was left out

The steps hold what is small for a token: ids of neighbors, masks, scores. States of the texts are asked for by row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from basin_lens.analyzers import CloudAnalyzer, Surroundings
from basin_lens.neighbors import Neighbors
from basin_lens.scoring.bank_partners import BankPartners
from basin_lens.scoring.left_out import count_left_out
from basin_lens.scoring.map_scores import MapScores
from basin_lens.scoring.plan import Piece, SearchSite
from basin_lens.scoring.results import LayerScores, Part
from basin_lens.scoring.search import Searches, SearchResult
from basin_lens.transport import BlockMap, LayerMaps
from basin_lens.values import Facts


@dataclass(frozen=True)
class _Search:
    """One search at a layer: in which map's states, before it or behind."""

    site: SearchSite
    map: int
    behind: bool
    bare: bool


@dataclass
class LayerWork:
    """The work at one layer.

    Attributes:
        searches: the run's searches, with its model, capture and bank.
        piece: the layer, its maps and their analyzers.
        maps: the layer's maps, proved.
        keep: the analyzer whose neighbors are kept.
        partners, partnered, groups: see `MapScores`.
    """

    searches: Searches
    piece: Piece
    maps: LayerMaps
    keep: CloudAnalyzer | None
    partners: BankPartners | None
    partnered: frozenset[str]
    groups: Int[Tensor, "groups g"] | None
    _joined: Part | None = None
    _found: dict[SearchSite, SearchResult] = field(default_factory=dict)
    _around: dict[tuple[int, int], Surroundings] = field(default_factory=dict)

    @cached_property
    def _passages(self) -> list[BlockMap]:
        return [self.maps.map(some.context, some.blocks) for some in self.piece.maps]

    @cached_property
    def _sites(self) -> list[_Search]:
        """The searches that the analyzers need, each once."""
        known: dict[SearchSite, _Search] = {}
        for number, some in enumerate(self.piece.maps):
            for a in some.analyzers:
                site = SearchSite.before(a)
                known.setdefault(site, _Search(site, number, False, self.piece.layer == 0 and site.place == "pre"))
                if "output_neighbors" in a.needs:
                    site = SearchSite.behind(a)
                    known.setdefault(site, _Search(site, number, True, False))
        return list(known.values())

    def _states(self, search: _Search) -> tuple[Tensor, Tensor]:
        passage = self._passages[search.map]
        return (passage.after, passage.bank_after) if search.behind else (passage.before, passage.bank_before)

    @cached_property
    def _scores(self) -> list[MapScores]:
        groups = None if self.groups is None else self.groups.to(self.searches.device)
        return [
            MapScores(
                self.searches,
                self.piece.layer,
                some,
                passage,
                self._found,
                self.keep,
                partners=self.partners,
                partnered=self.partnered,
                groups=groups,
                surroundings=partial(self._surroundings, passage),
                entering=lambda: self.maps.border(self.piece.layer)[0],
            )
            for some, passage in zip(self.piece.maps, self._passages, strict=True)
        ]

    def _surroundings(self, passage: BlockMap) -> Surroundings:
        """The bank's states around a map, once for all maps between the same borders."""
        borders = passage.bank_before, passage.bank_after
        key = borders[0].data_ptr(), borders[1].data_ptr()
        if key not in self._around:
            there = (self.searches.bank.row_pos > 0).to(self.searches.device)
            self._around[key] = Surroundings(*(states[there] for states in borders))
        return self._around[key]

    # -- the steps -----------------------------------------------------------------------------------------------------------

    def search(self, shard: int, shards: int) -> Part:
        """Search for the neighbors of one of so many ranges of rows."""
        rows, done = self.searches.capture.n_rows, Part()
        there = range(shard * rows // shards, (shard + 1) * rows // shards)
        for number, search in enumerate(self._sites):
            found = self.searches.some(search.site.options, self.piece.layer, *self._states(search), there, bare=search.bare)
            done.tensors.update({f"rows {number}": found.rows, f"distances {number}": found.distances})
            done.facts[f"recall {number}"] = found.recall
        return done

    def join(self, searched: Iterable[Part]) -> Part:
        """What needs all tokens, once all have their neighbors. `searched`: by all searches.

        Raises:
            NeighborError: no token has as many neighbors as are asked for.
        """
        done = Part()
        parts = list(searched)
        near = [[self._found_in(part, number) for part in parts] for number in range(len(self._sites))]
        del parts, searched  # gone with each search, once it is joined
        for number, search in enumerate(self._sites):
            found = self.searches.join(search.site.options, self.piece.layer, *self._states(search), near.pop(0), bare=search.bare)
            self._found[search.site] = found
            done.tensors.update({f"rows {number}": found.near.rows, f"distances {number}": found.near.distances})
            done.tensors[f"directed {number}"] = found.directed
        done.facts["search"] = self.searches.facts_of(self.piece.layer)
        for number, scores in enumerate(self._scores):
            done.put(f"map {number} ", scores.join())
        self._joined = done
        return done

    def _found_in(self, part: Part, number: int) -> Neighbors:
        """The neighbors that one range of rows has by a search; a part that lay on a disk comes to the run's device."""
        rows, distances = (part.tensors[f"{name} {number}"].to(self.searches.device) for name in ("rows", "distances"))
        return Neighbors(rows, distances, part.facts[f"recall {number}"])

    def score(self, joined: Iterable[Part], shard: int, shards: int) -> Part:
        """Do one of so many shares of the block calls. `joined`: what was, which is asked for where it is not here already."""
        self._take(joined)
        done = Part()
        for number, scores in enumerate(self._scores):
            done.put(f"map {number} ", scores.score(shard, shards))
        return done

    def collect(self, joined: Iterable[Part], parts: Sequence[Part]) -> LayerScores:
        """The layer's scores, from all shares."""
        search = self._take(joined).facts["search"]
        scores = self._too_few_blocks()
        for number, done in enumerate(self._scores):
            done.collect([part.under(f"map {number} ") for part in parts])
            scores.values.update({name: answer.numpy() for name, answer in done.answers.items()})
            scores.reliability.update(done.reliability())
            scores.reference_error.update(done.reference_error())
            scores.left_out.update(done.left_out())
            for name, facts in (("groups", done.groups), ("random_contraction", done.random_contraction())):
                if facts:
                    scores.facts.setdefault(name, {}).update(facts)
            if done.neighbors is not None:
                scores.neighbors = done.neighbors
        scores.facts.update(_facts_of(self.maps))
        scores.search.update(search)
        return scores

    def close(self) -> None:
        """Let go of states and neighbors, now: its parts know one another, and would be there until the collector comes."""
        vars(self).clear()

    def _take(self, given: Iterable[Part]) -> Part:
        """Take over what was joined, here or elsewhere."""
        if self._joined is not None:
            return self._joined
        (joined,) = given
        device = self.searches.device
        for number, search in enumerate(self._sites):
            rows, distances, directed = (
                joined.tensors[f"{name} {number}"].to(device) for name in ("rows", "distances", "directed")
            )
            near, bank = Neighbors(rows, distances), self._states(search)[1]
            self._found[search.site] = self.searches.again(search.site.options, near, directed, bank, bare=search.bare)
        for number, scores in enumerate(self._scores):
            part = joined.under(f"map {number} ")
            scores.joined = Part({name: value.to(device) for name, value in part.tensors.items()}, part.facts)
        self._joined = joined
        return joined

    def _too_few_blocks(self) -> LayerScores:
        """Scores of a layer with nothing but NaN, for the analyzers whose maps would end beyond the last block."""
        scores, capture = LayerScores(self.piece.layer), self.searches.capture
        for a in self.piece.beyond_the_last_block:
            missing = {c.name: torch.full((capture.n_rows,), torch.nan, device="cpu") for c in a.columns}
            scores.values.update({name: np.full(capture.n_rows, np.nan, np.float32) for name in missing})
            scores.left_out.update(count_left_out(a, missing, capture, self.searches.asked, complete=None))
        return scores


def _facts_of(maps: LayerMaps) -> Facts:
    """What provenance says of the maps at a layer."""
    layer = maps.layer
    facts: Facts = {"check_error": maps.errors.get(layer), "routes": maps.routes.get(layer, "native")}
    if layer in maps.reasons:
        facts["route_reasons"] = maps.reasons[layer]
    if layer in maps.compiled:
        facts["compiled"] = maps.compiled[layer]  # or why it is not
    if maps.fits:
        facts["affine_fit"] = {
            str(blocks): {"held_out_r2": fit.held_out_r2, "ridge": fit.ridge} for blocks, fit in maps.fits.items()
        }
    return facts
