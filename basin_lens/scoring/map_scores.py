"""One map at one layer: the union of all neighbors passes once, and every analyzer looks.

What needs all tokens comes first (`join`), then the block calls, all or a share of them (`score`), then what they come to
(`collect`). Block calls are the same, and so are the numbers, bit for bit, however many shares there are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.analyzers import CloudAnalyzer, Neighborhoods, RandomContraction, Surroundings
from basin_lens.analyzers.contract import own_spread
from basin_lens.model import final_norm
from basin_lens.model import n_layers as count_layers
from basin_lens.neighbors import Neighbors
from basin_lens.scoring.bank_partners import BankPartners
from basin_lens.scoring.clouds import Clouds
from basin_lens.scoring.crossed_pass import Crossed, CrossedPass, share_of, unit_of_rows
from basin_lens.scoring.left_out import count_left_out
from basin_lens.scoring.noted import Noted, keep_near, note, nothing
from basin_lens.scoring.plan import MapPlan, SearchOptions, SearchSite
from basin_lens.scoring.random_reference import random_contraction
from basin_lens.scoring.reliability import rank_agreement, spearman_brown
from basin_lens.scoring.reruns import rerun_points
from basin_lens.scoring.results import LayerNeighbors, Part
from basin_lens.scoring.sampling import drawn_alike, drawn_in_turns
from basin_lens.scoring.search import Searches, SearchResult
from basin_lens.transport import BlockMap, query_chunks, rows_per_call
from basin_lens.values import Facts

_GROUPS = 64  # groups of tokens that an analyzer looks at together
_ROWS = 1 << 14  # tokens whose neighbors are gone through together


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
        surroundings: what makes the bank's states around the map.
        entering: gives the capture's states that enter the layer, whatever the map begins with.
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
        surroundings: Callable[[], Surroundings],
        entering: Callable[[], Float[Tensor, "rows d"]],
    ) -> None:
        self.searches, self.layer, self.plan, self.passage, self.found = searches, layer, plan, passage, found
        self.device = searches.device
        self._partners, self._partnered, self._frozen_groups = partners, partnered, groups
        self.keep = keep if any(a is keep for a in plan.analyzers) else None
        self.neighbors: LayerNeighbors | None = None
        self.answers: dict[str, Float[Tensor, " rows"]] = {}
        self._of_halves: dict[str, tuple[Tensor, Tensor]] = {}
        self._sites = list(dict.fromkeys((SearchSite.before(a), a.k) for a in plan.analyzers))
        self._measure_surroundings, self._entering = surroundings, entering
        self._grouped: dict[str, Bool[Tensor, " rows"]] = {}
        self._passes: dict[object, CrossedPass] = {}
        self._crossed: dict[int, Crossed] = {}
        # Analyzers with the same options share the groups and their pass: one analyzer for each.
        self._crossing = list({self._options(a): a for a in reversed(plan.grouped)}.values())[::-1]
        self.joined = Part()
        self.groups: dict[str, Facts] = {}  # what provenance says of an analyzer's groups, by its first column

    @cached_property
    def _surroundings(self) -> Surroundings:
        return self._measure_surroundings()

    @cached_property
    def _spreads(self) -> tuple[float, float]:
        return float(own_spread(self._surroundings.before)), float(own_spread(self._surroundings.after))

    # -- what needs all tokens -----------------------------------------------------------------------------------------------

    def join(self) -> Part:
        """What depends on all tokens: samples, hubness, candidates, random sets, what goes through the block, groups."""
        searches, plan, done = self.searches, self.plan, Part()
        self.joined = done
        for number, (site, k) in enumerate(self._sites):
            done.tensors[f"hubness {number}"] = searches.hubness(self.found[site].near.rows[:, :k])
        for number, a in enumerate(plan.analyzers):
            if a.max_queries is not None:
                done.tensors[f"sampled {number}"] = self._sample(a)
            if "candidates" in a.needs:
                # Counted where the neighbors of the share are chosen: tokens of one id are one point where they enter block 0.
                there = self.found[SearchSite.behind(a) if _looks_behind(a) else SearchSite.before(a)]
                done.tensors[f"candidates {number}"] = searches.candidates(SearchOptions.of(a), there)
        asking: dict[str, set[int]] = {}
        for a in plan.analyzers:
            if "random_contraction" in a.needs:
                asking.setdefault(a.exclude, set()).add(a.k)
        for exclude, ks in asking.items():
            known = random_contraction(searches, self.layer, exclude, ks, self.passage, self._surroundings)
            told = {str(k): [mean.mean, mean.standard_error, sets] for k, (mean, sets) in known.items()}
            done.facts.setdefault("random", {})[exclude] = told
        if plan.single:
            # Also those whose neighbors do not pass: an analyzer that needs no images looks at them.
            done.tensors["have"] = torch.stack([(self.found[site].near.rows >= 0).any(1) for site in plan.passing]).any(0)
            every = torch.arange(len(done.tensors["have"]), device=self.device)
            passed = ([self._passed(site, part) for site in plan.passing] for part in every.split(_ROWS))  # one after the other
            done.facts["width"] = max((_union(some)[0].shape[1] for some in passed), default=1)
        for number, a in enumerate(self._crossing):
            self._join_groups(number, a, done)
        return done

    def _join_groups(self, number: int, a: CloudAnalyzer, done: Part) -> None:
        able = self._able(a)
        crossing = self._pass(a)
        groups = crossing.grouped(able)
        done.tensors[f"groups {number}"] = groups
        done.facts[f"groups {number}"] = {"able": int(able.sum()), "far_out": crossing.far_out}
        if "random_sets" in crossing.own.crossing.displaced:
            rows = (groups if crossing.partners is None else groups[:, :1]).unique()
            random = rows, crossing.own.drawn(rows)  # of those in groups only
            done.tensors.update({f"random rows {number}": random[0], f"random sets {number}": random[1]})
            crossing.own = replace(crossing.own, random=random)

    def _able(self, a: CloudAnalyzer) -> Bool[Tensor, " rows"]:
        """Tokens that can be measured: with k neighbors, and in the sample if there is one."""
        able = self.found[SearchSite.before(a)].near.rows[:, a.k - 1] >= 0
        return able if a.max_queries is None else able & self._sampled(a)

    def _sampled(self, a: CloudAnalyzer) -> Bool[Tensor, " rows"]:
        return self.joined.tensors[f"sampled {self._number(a)}"]

    def _number(self, a: CloudAnalyzer) -> int:
        return next(number for number, other in enumerate(self.plan.analyzers) if other is a)

    @staticmethod
    def _options(a: CloudAnalyzer) -> object:
        return SearchSite.before(a), a.k, a.crossing, a.max_queries

    def _mean(self, a: CloudAnalyzer) -> tuple[RandomContraction, int]:
        """Mean contraction of random sets, and of how many."""
        mean, error, sets = self.joined.facts["random"][a.exclude][str(a.k)]
        return RandomContraction(mean, error), sets

    # -- a share of the block calls ------------------------------------------------------------------------------------------

    def score(self, shard: int, shards: int) -> Part:
        """Do one of so many shares of the block calls."""
        done = self._measure(shard, shards) if self.plan.single else Part()
        for number, a in enumerate(self._crossing):
            found = self._pass(a).some(self.joined.tensors[f"groups {number}"], shard, shards)
            done.put(f"crossed {number} ", Part(found))
        return done

    def _measure(self, shard: int, shards: int) -> Part:
        """Pass the neighbors, a part of the queries at a time, and let every analyzer look before the images are dropped."""
        passing, width = self.plan.passing, self.joined.facts["width"]
        queries = torch.nonzero(self.joined.tensors["have"]).squeeze(1)
        rows = rows_per_call(self.passage.bank_before, int(self.searches.capture.lengths.max()))
        calls = share_of(list(query_chunks(self.searches.capture, queries, width, rows)), shard, shards)
        at = torch.cat(list(calls)) if len(calls) else queries[:0]
        noted = Noted(self.plan.single, len(at), self.keep)
        first = 0
        for part in calls:
            union, places = _union([self._passed(site, part) for site in passing], width)
            place_of = dict(zip(passing, places, strict=True))
            passed = self.passage.of_rows(part, union) if self.plan.of_images else None
            looks: dict[object, tuple[Tensor, Neighborhoods] | None] = {}  # analyzers with the same options share them
            for a in self.plan.single:
                options = (SearchSite.before(a), a.k, a.needs, a.max_queries and a.key)
                if options not in looks:
                    looks[options] = self._look(a, part, passed, place_of)
                seen = looks[options]
                if seen is not None:
                    self._answer(a, noted, first + seen[0], seen[1])
            first += len(part)
        return noted.part(at.cpu())

    # -- what they come to ---------------------------------------------------------------------------------------------------

    def collect(self, parts: Sequence[Part]) -> None:
        """Take what all shares found."""
        count = self.searches.capture.n_rows
        self.neighbors = None if self.keep is None else LayerNeighbors.none(count, self.keep.k)
        names = [column.name for a in self.plan.analyzers for column in a.columns]
        self.answers = {name: nothing(count) for name in names}
        self._of_halves = {name: (nothing(count), nothing(count)) for name in names}
        for part in parts:
            rows = part.tensors.get("rows")
            for name in self.answers if rows is not None else ():
                for prefix, answers in (
                    ("value", self.answers[name]),
                    *zip(("first", "second"), self._of_halves[name], strict=True),
                ):
                    if (held := part.tensors.get(f"{prefix} {name}")) is not None:
                        answers[rows] = held
            if "near" in part.tensors and self.neighbors is not None and rows is not None:
                for name in ("rows", "before", "after"):
                    getattr(self.neighbors, name)[rows.numpy()] = part.tensors["near" if name == "rows" else name].numpy()
        for a in self.plan.grouped:
            self._measure_groups(a, parts)

    def _measure_groups(self, a: CloudAnalyzer, parts: Sequence[Part]) -> None:
        """Let an analyzer look at every cloud of a group at every place of it, also at halves."""
        assert a.crossing is not None
        number = next(n for n, other in enumerate(self._crossing) if self._options(other) == self._options(a))
        if number not in self._crossed:
            found = [part.under(f"crossed {number} ").tensors for part in parts]
            facts = self.joined.facts[f"groups {number}"]
            self._crossed[number] = self._pass(a).crossed(
                self.joined.tensors[f"groups {number}"], found, facts["able"], facts["far_out"]
            )
        crossed, able = self._crossed[number], self._able(a)
        if a is self.keep:
            assert self.neighbors is not None
            self.neighbors = replace(self.neighbors, groups=crossed.rows.cpu().numpy())
            for part in torch.nonzero(able).squeeze(1).split(_GROUPS * a.crossing.group):
                keep_near(self.neighbors, self._neighborhoods(a, part, None, None), part.cpu())
        self._grouped[a.key] = torch.zeros_like(able)
        self._grouped[a.key][crossed.scored.flatten()] = True
        partners = {column.name: (nothing(len(able)), nothing(len(able))) for column in a.columns}
        for groups in torch.arange(len(crossed.rows), device=self.device).split(_GROUPS):
            at = crossed.scored[groups].flatten()
            there, seen = at.cpu(), self._neighborhoods(a, at, None, None)
            tables = {kind: table.some(groups) for kind, table in crossed.tables.items()}
            note(a, replace(seen, crossed=tables), there, self.answers)
            for half in (0, 1):
                looks = (
                    ({kind: table.halves[half] for kind, table in tables.items()}, self._of_halves),
                    ({kind: table.partner_halves[half] for kind, table in tables.items()}, partners),
                )
                for read, answers in looks:
                    note(a, replace(seen, crossed=read), there, {name: pair[half] for name, pair in answers.items()})
        self.groups[a.columns[0].name] = {
            "size": a.crossing.group,
            **crossed.facts(),
            "dimensions_left_out": int((~self._surroundings.ordinary).sum()),
            "reliability_over_displacements": {c.name: _whole(self._of_halves[c.name]) for c in a.columns},
            "reliability_over_partners": {name: _whole(pair) for name, pair in partners.items()},
        }

    def _pass(self, a: CloudAnalyzer) -> CrossedPass:
        """The crossed tables that an analyzer looks at."""
        assert a.crossing is not None
        options, site = self._options(a), SearchSite.before(a)
        if options not in self._passes:
            number = next(n for n, other in enumerate(self._crossing) if self._options(other) == options)
            about = (self._surroundings, site.options)
            drawn = [self.joined.tensors.get(f"random {what} {number}") for what in ("rows", "sets")]
            random = None if drawn[0] is None or drawn[1] is None else (drawn[0], drawn[1])
            own = Clouds(self.searches, self.layer, self.passage, *about, self.found[site], a.k, a.crossing, random)
            bank = None
            if a.key in self._partnered:
                assert self._partners is not None
                bare = self.layer == 0 and site.place == "pre"
                bank = self._partners.clouds(self.layer, self.plan, *about, a.k, a.crossing, bare=bare)
            self._passes[options] = CrossedPass(own, bank, self._frozen_groups)
        return self._passes[options]

    def _passed(self, site: SearchSite, part: Int[Tensor, " part"]) -> Int[Tensor, "part k"]:
        """Neighbors of a search that go through the map: none of a token outside the samples of its analyzers."""
        rows = self.found[site].near.rows[part]
        asking = [a for a in self.plan.of_images if SearchSite.before(a) == site]
        if not asking or any(a.max_queries is None for a in asking):
            return rows
        looked_at = torch.stack([self._sampled(a)[part] for a in asking]).any(0)
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
        place_of: Mapping[SearchSite, Int[Tensor, "part k_all"]],
    ) -> tuple[Int[Tensor, " q"], Neighborhoods] | None:
        """Which queries of a part an analyzer can measure (on the CPU), and their neighborhoods; None: there are none."""
        site = SearchSite.before(a)
        after = self.found[SearchSite.behind(a)].near if _looks_behind(a) else None
        ready = self.found[site].near.rows[part, a.k - 1] >= 0
        if after is not None:
            ready &= after.rows[part, a.k - 1] >= 0
        if a.max_queries is not None:
            ready &= self._sampled(a)[part]
        if not bool(ready.any()):
            return None
        at = part[ready]
        images = None
        if passed is not None and "images" in a.needs:
            places = place_of[site][ready, : a.k, None].expand(-1, -1, self.passage.before.shape[1])
            images = passed[ready].gather(1, places)
        return torch.nonzero(ready).squeeze(1).cpu(), self._neighborhoods(a, at, images, after)

    def _neighborhoods(
        self, a: CloudAnalyzer, at: Int[Tensor, " q"], images: Float[Tensor, "q k d"] | None, after: Neighbors | None
    ) -> Neighborhoods:
        """What an analyzer gets to see of the queries `at`: what it needs, and no more."""
        searches, passage, site = self.searches, self.passage, SearchSite.before(a)
        near = self.found[site].near
        rows = near.rows[at, : a.k]
        there = None if after is None else after.rows[at, : a.k]
        rerun = None
        if "run_on" in a.needs:
            rerun = partial(rerun_points, searches.model, searches.capture, self.layer, self._entering(), at)
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
            hubness=self.joined.tensors[f"hubness {self._sites.index((site, a.k))}"][at],
            spread_in=spread_in,
            spread_out=spread_out,
            images=images,
            output_rows=there,
            output_distances=None if after is None else after.distances[at, : a.k],
            output_neighbors=None if there is None else passage.bank_after[there],
            output_preimages=None if there is None else passage.bank_before[there],
            candidates=self.joined.tensors[f"candidates {self._number(a)}"][at] if "candidates" in a.needs else None,
            block=partial(passage.of_points, at) if "block" in a.needs else None,
            run_on=rerun,
            bank=self._surroundings if "bank" in a.needs else None,
            random_contraction=self._mean(a)[0] if "random_contraction" in a.needs else None,
            final_norm=partial(final_norm, searches.model) if "final_norm" in a.needs else None,
        )

    def _answer(self, a: CloudAnalyzer, noted: "Noted", there: Int[Tensor, " q"], neighborhoods: Neighborhoods) -> None:
        """Let an analyzer look at neighborhoods, and note what it says at the places `there`, also of halves of the neighbors."""
        note(a, neighborhoods, there, noted.values["value"])
        if "halves" in a.needs and a.k >= 4:
            for half, split in zip(("first", "second"), neighborhoods.split_half, strict=True):
                note(a, split, there, noted.values[half])
        if a is self.keep:
            assert noted.neighbors is not None
            keep_near(noted.neighbors, neighborhoods, there)

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
                sampled=None if a.max_queries is None else self._sampled(a),
                grouped=self._grouped.get(a.key),
                undirected=~result.directed.cpu() if a.metric == "cosine" else None,
            )
        return counts

    def random_contraction(self) -> dict[str, Facts]:
        """Mean contraction of random sets, its standard error and their number, by column that it is taken out of."""
        facts: dict[str, Facts] = {}
        for a in self.plan.analyzers:
            if "random_contraction" in a.needs:
                found, sets = self._mean(a)
                known: Facts = {"mean": _or_none(found.mean), "standard_error": _or_none(found.standard_error), "sets": sets}
                facts.update({column.name: known for column in a.columns})
        return facts

    def reference_error(self) -> dict[str, float | None]:
        """Standard error of the mean of a random sample that columns are held against, by column; None: not defined."""
        held = [a for a in self.plan.analyzers if "random_contraction" in a.needs]
        return {column.name: _or_none(self._mean(a)[0].standard_error) for a in held for column in a.columns}

    def reliability(self) -> dict[str, float | None]:
        """Spearman correlation of each score over disjoint halves of the neighbors, by column."""
        split = [column.name for a in self.plan.analyzers if "halves" in a.needs for column in a.columns]
        return {name: _or_none(_agreement(self._of_halves[name])) for name in split}


def _looks_behind(a: CloudAnalyzer) -> bool:
    """Whether an analyzer looks at neighbors among the states that leave the map."""
    return "output_neighbors" in a.needs


def _union(tables_: list[Tensor], width: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """Per query, the different rows among several neighbor tables `[n, k_i]`, and where each table's rows are in it.

    `width`: columns of the answer; None: as many as are needed.

    A pair of query and neighbor is passed through the block once, however many scores ask for it.
    """
    joined = torch.cat(tables_, dim=1)
    values, order = joined.sort(dim=1)
    new = torch.ones_like(values, dtype=torch.bool)
    new[:, 1:] = values[:, 1:] != values[:, :-1]
    slots = new.long().cumsum(1) - 1
    width = width or (int(slots.max()) + 1 if joined.numel() else 1)
    union = torch.full((len(joined), width), -1, dtype=torch.int64, device=joined.device)
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
