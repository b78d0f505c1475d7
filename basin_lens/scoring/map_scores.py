"""One map at one layer: the union of all neighbors passes once, and every analyzer looks."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.analyzers import CloudAnalyzer, Neighborhoods, Surroundings
from basin_lens.analyzers.contract import own_spread
from basin_lens.capture.returned import check_returned, own_code
from basin_lens.model import final_norm
from basin_lens.model import n_layers as count_layers
from basin_lens.neighbors import Neighbors
from basin_lens.scoring.bank_partners import BankPartners
from basin_lens.scoring.clouds import Clouds
from basin_lens.scoring.crossed_pass import Crossed, CrossedPass, unit_of_rows
from basin_lens.scoring.left_out import count_left_out
from basin_lens.scoring.plan import MapPlan, SearchOptions, SearchSite
from basin_lens.scoring.random_reference import random_contraction
from basin_lens.scoring.reliability import rank_agreement, spearman_brown
from basin_lens.scoring.reruns import rerun_points
from basin_lens.scoring.results import LayerNeighbors
from basin_lens.scoring.sampling import drawn_alike, drawn_in_turns
from basin_lens.scoring.search import Searches, SearchResult
from basin_lens.transport import BlockMap, query_chunks, rows_per_call
from basin_lens.values import Facts

_GROUPS = 64  # groups of tokens that an analyzer looks at together


class MapScores:
    """Scores of the analyzers that look through one map.

    Args:
        searches: the run's searches, with its model, capture and bank.
        layer: where the map begins.
        plan: the map and its analyzers.
        passage: the map on the states of this layer.
        found: results of the searches before the map, and behind it where an analyzer needs them.
        keep: the analyzer whose neighbors are kept, if it is one of these.
        partners: the bank's tokens, for analyzers (by key, `partnered`) whose tokens' partners come from the bank.
        groups: groups of another run, taken as they are.
    """

    def __init__(
        self,
        searches: Searches,
        layer: int,
        plan: MapPlan,
        passage: BlockMap,
        found: Mapping[SearchSite, SearchResult],
        keep: CloudAnalyzer | None = None,
        *,
        partners: BankPartners | None = None,
        partnered: frozenset[str] = frozenset(),
        groups: Int[Tensor, "groups g"] | None = None,
    ) -> None:
        self.searches, self.layer, self.plan, self.passage, self.found = searches, layer, plan, passage, found
        self.device = searches.device
        self._partners, self._partnered, self._frozen_groups = partners, partnered, groups
        count = searches.capture.n_rows
        self.keep = keep if any(a is keep for a in plan.analyzers) else None
        self.neighbors = None if self.keep is None else LayerNeighbors.none(count, self.keep.k)
        columns = [column.name for a in plan.analyzers for column in a.columns]
        self.answers = {name: _nothing(count) for name in columns}
        self._of_halves = {name: (_nothing(count), _nothing(count)) for name in columns}
        self._hubness = {
            (site, k): searches.hubness(found[site].near.rows[:, :k])
            for site, k in dict.fromkeys((SearchSite.before(a), a.k) for a in plan.analyzers)
        }
        self._sampled = {a.key: self._sample(a) for a in plan.analyzers if a.max_queries is not None}
        # Counted where the neighbors of the share are chosen: tokens of one id are one point where they enter block 0.
        self._candidates = {
            a.key: searches.candidates(
                SearchOptions.of(a), found[SearchSite.behind(a) if _looks_behind(a) else SearchSite.before(a)]
            )
            for a in plan.analyzers
            if "candidates" in a.needs
        }
        in_bank = (searches.bank.row_pos > 0).to(self.device)
        self._surroundings = Surroundings(passage.bank_before[in_bank], passage.bank_after[in_bank])
        self._spreads = float(own_spread(self._surroundings.before)), float(own_spread(self._surroundings.after))
        asking: dict[str, set[int]] = {}
        for a in plan.analyzers:
            if "random_contraction" in a.needs:
                asking.setdefault(a.exclude, set()).add(a.k)
        self._random = {e: random_contraction(searches, layer, e, ks, passage, self._surroundings) for e, ks in asking.items()}
        self._grouped: dict[str, Bool[Tensor, " rows"]] = {}
        self._crossed: dict[object, Crossed] = {}
        self.groups: dict[str, Facts] = {}  # what provenance says of an analyzer's groups, by its first column
        if plan.single:
            self._measure()
        for a in plan.grouped:
            self._measure_groups(a)

    def _measure(self) -> None:
        """Pass the neighbors, a part of the queries at a time, and let every analyzer look before the images are dropped."""
        passing = self.plan.passing
        union, places = _union([self._passed(site) for site in passing])
        place_of = dict(zip(passing, places, strict=True))
        # Also those whose neighbors do not pass: an analyzer that needs no images looks at them.
        have = torch.stack([(self.found[site].near.rows >= 0).any(1) for site in passing]).any(0)
        queries = torch.nonzero(have).squeeze(1)
        rows = rows_per_call(self.passage.bank_before, int(self.searches.capture.lengths.max()))
        for part in query_chunks(self.searches.capture, queries, union.shape[1], rows):
            passed = self.passage.of_rows(part, union[part]) if self.plan.of_images else None
            looks: dict[object, tuple[Tensor, Neighborhoods] | None] = {}  # analyzers with the same options share them
            for a in self.plan.single:
                options = (SearchSite.before(a), a.k, a.needs, a.max_queries and a.key)
                if options not in looks:
                    looks[options] = self._look(a, part, passed, place_of)
                seen = looks[options]
                if seen is not None:
                    self._answer(a, *seen)

    def _measure_groups(self, a: CloudAnalyzer) -> None:
        """Put tokens into groups, pass every cloud of a group at every place of it, and let the analyzer look, also at halves."""
        assert a.crossing is not None
        site = SearchSite.before(a)
        able = self.found[site].near.rows[:, a.k - 1] >= 0
        if a.max_queries is not None:
            able = able & self._sampled[a.key]
        options = (site, a.k, a.crossing, a.max_queries)  # analyzers with the same options share the pass
        if options not in self._crossed:
            self._crossed[options] = self._pass(a, site)(able)
        crossed = self._crossed[options]
        if a is self.keep:
            assert self.neighbors is not None
            self.neighbors = replace(self.neighbors, groups=crossed.rows.cpu().numpy())
            for part in torch.nonzero(able).squeeze(1).split(_GROUPS * a.crossing.group):
                self._keep(self._neighborhoods(a, part, None, None), part.cpu())
        self._grouped[a.key] = torch.zeros_like(able)
        self._grouped[a.key][crossed.scored.flatten()] = True
        partners = {column.name: (_nothing(len(able)), _nothing(len(able))) for column in a.columns}
        for groups in torch.arange(len(crossed.rows), device=self.device).split(_GROUPS):
            at = crossed.scored[groups].flatten()
            there, seen = at.cpu(), self._neighborhoods(a, at, None, None)
            tables = {kind: table.some(groups) for kind, table in crossed.tables.items()}
            self._note(a, replace(seen, crossed=tables), there, self.answers)
            for half in (0, 1):
                looks = (
                    ({kind: table.halves[half] for kind, table in tables.items()}, self._of_halves),
                    ({kind: table.partner_halves[half] for kind, table in tables.items()}, partners),
                )
                for read, answers in looks:
                    self._note(a, replace(seen, crossed=read), there, {name: pair[half] for name, pair in answers.items()})
        self.groups[a.columns[0].name] = {
            "size": a.crossing.group,
            **crossed.facts(),
            "dimensions_left_out": int((~self._surroundings.ordinary).sum()),
            "reliability_over_displacements": {c.name: _whole(self._of_halves[c.name]) for c in a.columns},
            "reliability_over_partners": {name: _whole(pair) for name, pair in partners.items()},
        }

    def _pass(self, a: CloudAnalyzer, site: SearchSite) -> CrossedPass:
        """The crossed tables that an analyzer looks at."""
        assert a.crossing is not None
        about = (self._surroundings, site.options)
        own = Clouds(self.searches, self.layer, self.passage, *about, self.found[site], a.k, a.crossing)
        bank = None
        if a.key in self._partnered:
            assert self._partners is not None
            bare = self.layer == 0 and site.place == "pre"
            bank = self._partners.clouds(self.layer, self.plan, *about, a.k, a.crossing, bare=bare)
        return CrossedPass(own, bank, self._frozen_groups)

    def _passed(self, site: SearchSite) -> Int[Tensor, "rows k"]:
        """The neighbors of a search that go through the map: none of a token outside the samples of all its analyzers."""
        rows = self.found[site].near.rows
        asking = [a for a in self.plan.of_images if SearchSite.before(a) == site]
        if not asking or any(a.max_queries is None for a in asking):
            return rows
        looked_at = torch.stack([self._sampled[a.key] for a in asking]).any(0)
        return torch.where(looked_at[:, None], rows, -1)

    def _sample(self, a: CloudAnalyzer) -> Bool[Tensor, " rows"]:
        """A seeded sample of the tokens that could be measured, the same at every layer if the same tokens have neighbors."""
        capture, seed = self.searches.capture, self.searches.seed
        able = self.found[SearchSite.before(a)].near.rows[:, a.k - 1].cpu() >= 0
        if a.max_per_sequence is None:
            order = drawn_alike(capture, seed)
            order = order[able[order]]
        else:
            order = drawn_in_turns(capture, able, unit_of_rows(capture, a.exclude), a.max_per_sequence, seed)
        chosen = torch.zeros(capture.n_rows, dtype=torch.bool, device="cpu")
        chosen[order[: a.max_queries]] = True
        return chosen.to(self.device)

    def _look(
        self,
        a: CloudAnalyzer,
        part: Int[Tensor, " part"],
        passed: Float[Tensor, "part m d"] | None,
        place_of: Mapping[SearchSite, Int[Tensor, "rows k_all"]],
    ) -> tuple[Int[Tensor, " q"], Neighborhoods] | None:
        """Those queries of a part that an analyzer can measure (on the CPU), and their neighborhoods; None: there are none."""
        site = SearchSite.before(a)
        after = self.found[SearchSite.behind(a)].near if _looks_behind(a) else None
        ready = self.found[site].near.rows[part, a.k - 1] >= 0
        if after is not None:
            ready &= after.rows[part, a.k - 1] >= 0
        if a.max_queries is not None:
            ready &= self._sampled[a.key][part]
        if not bool(ready.any()):
            return None
        at = part[ready]
        images = None
        if passed is not None and "images" in a.needs:
            places = place_of[site][at, : a.k, None].expand(-1, -1, self.passage.before.shape[1])
            images = passed[ready].gather(1, places)
        return at.cpu(), self._neighborhoods(a, at, images, after)

    def _neighborhoods(
        self, a: CloudAnalyzer, at: Int[Tensor, " q"], images: Float[Tensor, "q k d"] | None, after: Neighbors | None
    ) -> Neighborhoods:
        """What an analyzer gets to see of the queries `at`: what it needs, and no more."""
        searches, passage, site = self.searches, self.passage, SearchSite.before(a)
        near = self.found[site].near
        rows = near.rows[at, : a.k]
        there = None if after is None else after.rows[at, : a.k]
        rerun = partial(rerun_points, searches.model, searches.capture, self.layer, at)
        spread_in, spread_out = self._spreads
        return Neighborhoods(
            layer=self.layer,
            n_layers=count_layers(searches.model),
            query=passage.before[at],
            query_image=passage.after[at],
            query_token=searches.tokens[0][at],
            query_pos=searches.positions[0][at],
            rows=rows,
            distances=near.distances[at, : a.k],
            neighbors=passage.bank_before[rows],
            neighbor_token=searches.tokens[1][rows],
            neighbor_pos=searches.positions[1][rows],
            hubness=self._hubness[site, a.k][at],
            spread_in=spread_in,
            spread_out=spread_out,
            images=images,
            output_rows=there,
            output_distances=None if after is None else after.distances[at, : a.k],
            output_neighbors=None if there is None else passage.bank_after[there],
            output_preimages=None if there is None else passage.bank_before[there],
            candidates=self._candidates[a.key][at] if a.key in self._candidates else None,
            block=partial(passage.of_points, at) if "block" in a.needs else None,
            run_on=rerun if "run_on" in a.needs else None,
            bank=self._surroundings if "bank" in a.needs else None,
            random_contraction=self._random[a.exclude][a.k][0] if "random_contraction" in a.needs else None,
            final_norm=partial(final_norm, searches.model) if "final_norm" in a.needs else None,
        )

    def _answer(self, a: CloudAnalyzer, there: Int[Tensor, " q"], neighborhoods: Neighborhoods) -> None:
        """Let an analyzer look at neighborhoods of the rows `there`, and put down what it says, also of halves of the neighbors."""
        self._note(a, neighborhoods, there, self.answers)
        if "halves" in a.needs and a.k >= 4:
            for half, split in enumerate(neighborhoods.split_half):
                self._note(a, split, there, {name: pair[half] for name, pair in self._of_halves.items()})
        if a is self.keep:
            self._keep(neighborhoods, there)

    @staticmethod
    def _note(a: CloudAnalyzer, neighborhoods: Neighborhoods, there: Int[Tensor, " q"], answers: Mapping[str, Tensor]) -> None:
        """Put down what an analyzer says of neighborhoods."""
        with own_code(a.called, neighborhoods.layer, a.needs):
            values = a.measure(neighborhoods)
        check_returned(a.called, neighborhoods.layer, values, [c.name for c in a.columns], {"[q]": (len(there),)})
        for name, value in values.items():
            answers[name][there] = value.detach().float().cpu()

    def _keep(self, neighborhoods: Neighborhoods, there: Int[Tensor, " q"]) -> None:
        """Keep these neighbors, with their distances before the map, and behind it if they pass it."""
        assert self.neighbors is not None
        self.neighbors.rows[there.numpy()] = neighborhoods.rows.cpu().numpy()
        self.neighbors.before[there.numpy()] = neighborhoods.distances.cpu().numpy()
        if neighborhoods.images is not None:
            self.neighbors.after[there.numpy()] = (
                (neighborhoods.images - neighborhoods.query_image[:, None]).norm(dim=2).cpu().numpy()
            )

    def left_out(self) -> dict[str, dict[str, int]]:
        """How many values are missing, by column and reason."""
        counts: dict[str, dict[str, int]] = {}
        for a in self.plan.analyzers:
            result = self.found[SearchSite.before(a)]
            counts |= count_left_out(
                a,
                self.answers,
                self.searches.capture,
                self.searches.asked,
                complete=result.near.rows[:, a.k - 1].cpu() >= 0,
                sampled=self._sampled.get(a.key),
                grouped=self._grouped.get(a.key),
                undirected=~result.directed.cpu() if a.metric == "cosine" else None,
            )
        return counts

    def random_contraction(self) -> dict[str, Facts]:
        """Mean contraction of random sets, its standard error and their number, by column that it is taken out of."""
        facts: dict[str, Facts] = {}
        for a in self.plan.analyzers:
            if "random_contraction" in a.needs:
                found, sets = self._random[a.exclude][a.k]
                known: Facts = {"mean": _or_none(found.mean), "standard_error": _or_none(found.standard_error), "sets": sets}
                facts.update({column.name: known for column in a.columns})
        return facts

    def reference_error(self) -> dict[str, float | None]:
        """Standard error of the mean of a random sample that columns are held against, by column; None: not defined."""
        held = [a for a in self.plan.analyzers if "random_contraction" in a.needs]
        return {column.name: _or_none(self._random[a.exclude][a.k][0].standard_error) for a in held for column in a.columns}

    def reliability(self) -> dict[str, float | None]:
        """Spearman correlation of each score over disjoint halves of the neighbors, by column."""
        split = [column.name for a in self.plan.analyzers if "halves" in a.needs for column in a.columns]
        return {name: _or_none(_agreement(self._of_halves[name])) for name in split}


def _looks_behind(a: CloudAnalyzer) -> bool:
    """Whether an analyzer looks at neighbors among the states that leave the map."""
    return "output_neighbors" in a.needs


def _nothing(count: int) -> Float[Tensor, " count"]:
    return torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")


def _union(tables_: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Per query, the different rows among several neighbor tables `[n, k_i]`, and where each table's rows are in it.

    A pair of query and neighbor is passed through the block once, however many scores ask for it.
    """
    joined = torch.cat(tables_, dim=1)
    values, order = joined.sort(dim=1)
    new = torch.ones_like(values, dtype=torch.bool)
    new[:, 1:] = values[:, 1:] != values[:, :-1]
    slots = new.long().cumsum(1) - 1
    union = torch.full((len(joined), int(slots.max()) + 1 if joined.numel() else 1), -1, dtype=torch.int64, device=joined.device)
    union.scatter_(1, slots, values)
    places = torch.empty_like(slots).scatter_(1, order, slots)
    return union, list(places.split([t.shape[1] for t in tables_], dim=1))


def _agreement(halves: tuple[Tensor, Tensor]) -> float:
    return rank_agreement(*(half.numpy() for half in halves))


def _whole(halves: tuple[Tensor, Tensor]) -> float | None:
    return _or_none(spearman_brown(_agreement(halves)))


def _or_none(number: float) -> float | None:
    """A number as JSON has it."""
    return number if math.isfinite(number) else None
