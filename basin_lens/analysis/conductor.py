"""The cloud analyzers, layer by layer: search once, pass once, let every analyzer look, drop the images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from scipy import stats
from torch import Tensor

from basin_lens import model as door
from basin_lens.analysis.rows import row_groups, texts_hash
from basin_lens.analyzers import Cloud, CloudAnalyzer, total_variance
from basin_lens.capture import Capture
from basin_lens.errors import NeighborError
from basin_lens.neighbors import Neighbors, Points, find, prefix_keys
from basin_lens.transport import Images, PatchedBlock, Probe, check, images, query_chunks

_SPREAD_QUERIES, _SPREAD_POINTS = 32, 64  # random points behind G_in and G_out, per layer


@dataclass(frozen=True)
class KeptNeighbors:
    """Who the neighbors behind one score are: bank rows and distances before and after the block, `[layers, rows, k]`; -1, NaN: none.

    `bank`: token, doc, seq and pos of each row of the bank. `own`: whether the bank is the texts themselves.
    """

    rows: np.ndarray
    before: np.ndarray
    after: np.ndarray
    bank: pd.DataFrame
    score: str
    own: bool


@dataclass(frozen=True)
class _Search:
    """Neighbor options: analyzers that agree on them share one search."""

    metric: Any
    exclude: str
    same_token: Any

    @classmethod
    def of(cls, analyzer: CloudAnalyzer) -> "_Search":
        return cls(analyzer.metric, analyzer.exclude, analyzer.same_token)


class Conductor:
    """Runs the cloud analyzers layer by layer."""

    def __init__(
        self, model: Any, capture: Capture, bank: Capture, analyzers: list[CloudAnalyzer], asked: Bool[Tensor, " rows"], seed: int
    ) -> None:
        self.model, self.capture, self.bank, self.analyzers, self.asked, self.seed = model, capture, bank, analyzers, asked, seed
        self.device = door.device_of(model)
        self.external = bank is not capture
        if self.external and any(a.exclude == "nothing" for a in analyzers):
            raise NeighborError(
                "expected the texts as their own bank for SeedCompression, got another bank. Leave it out, or bank=None."
            )
        self.searches: dict[_Search, int] = {}
        for a in analyzers:
            self.searches[_Search.of(a)] = max(a.k, self.searches.get(_Search.of(a), 0))
        texts = [[s.tokens for s in capture.sequences], [s.tokens for s in bank.sequences]]
        keys = prefix_keys(*texts) if self.external else prefix_keys(texts[0]) * 2
        self.keys = [key.to(self.device) for key in keys]
        self.tokens = [c.row_token.to(self.device) for c in (capture, bank)]
        self.positions = [c.row_pos.to(self.device) for c in (capture, bank)]
        self.groups = {s.exclude: [g.to(self.device) for g in row_groups(capture, bank, s.exclude)] for s in self.searches}
        for search, k in self.searches.items():
            self._refuse_hopeless(search, k)
        self.probe = Probe(model, int(capture.lengths.max()))
        self.uses_block = any(a.context == "patched" or "block" in a.needs for a in analyzers)
        names = [column.name for a in analyzers if "halves" in a.needs for column in a.columns]
        self.facts: dict[str, Any] = {
            "bank": {
                "source": "another capture" if self.external else "the texts themselves",
                "points": int((bank.row_pos > 0).sum()),
                "sequences": len(bank.sequences),
                "texts": texts_hash(bank),
            },
            "routes": {},
            "check_error": {},
            "reliability": {name: {} for name in names},
            "left_out": {column.name: {} for a in analyzers for column in a.columns},
        }
        self._kept: tuple[CloudAnalyzer, KeptNeighbors] | None = None

    def keep(self, analyzer: CloudAnalyzer, n_layers: int) -> KeptNeighbors:
        """Remember the neighbors of one analyzer from here on."""
        shape = (n_layers, self.capture.n_rows, analyzer.k)
        bank = self.bank
        rows = pd.DataFrame({
            "token": bank.row_strings(), "doc": [bank.docs[s] for s in bank.row_seq.tolist()], "seq": bank.row_seq.numpy(),
            "pos": bank.row_pos.numpy(),
        })  # fmt: skip
        kept = KeptNeighbors(
            np.full(shape, -1, np.int64), np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32), rows,
            analyzer.columns[0].name, not self.external,
        )  # fmt: skip
        self._kept = (analyzer, kept)
        return kept

    def layer(self, layer: int, index: int) -> dict[str, np.ndarray]:
        """Columns of all analyzers at one layer, `[rows]`."""
        pre, post = self.capture.resid_pre(layer).to(self.device), self.capture.resid_post(layer).to(self.device)
        bank_pre, bank_post = pre, post
        if self.external:
            bank_pre, bank_post = self.bank.resid_pre(layer).to(self.device), self.bank.resid_post(layer).to(self.device)
        block = PatchedBlock(self.model, self.capture, layer, self.probe, pre)
        others = bank_pre[(self.bank.row_pos > 0).to(self.device)]
        error = check(self.model, self.capture, block, post, others=others, seed=self.seed, patched=self.uses_block)
        self.facts["check_error"][str(layer)] = error
        self.facts["routes"][str(layer)] = block.route if self.uses_block else "native"
        found = {s: self._find(s, k, layer, pre, bank_pre) for s, k in self.searches.items()}
        found_after = {
            s: self._find(s, k, layer, post, bank_post, after=True)
            for s, k in self.searches.items()
            if any("output_neighbors" in a.needs and _Search.of(a) == s for a in self.analyzers)
        }
        answers: dict[str, np.ndarray] = {}
        for context in dict.fromkeys(a.context for a in self.analyzers):
            here = [a for a in self.analyzers if a.context == context]
            maps = images(self.probe, context, layer, bank_pre, bank_post, block)
            answers |= self._context(layer, index, here, maps, block, pre, post, found, found_after)
        return answers

    def _context(
        self,
        layer: int,
        index: int,
        analyzers: list[CloudAnalyzer],
        maps: Images,
        block: PatchedBlock,
        pre: Tensor,
        post: Tensor,
        found: Mapping[_Search, tuple[Tensor, Neighbors]],
        found_after: Mapping[_Search, tuple[Tensor, Neighbors]],
    ) -> dict[str, np.ndarray]:
        """One context: pass the union of all neighbors once, and let every analyzer look."""
        needing = [a for a in analyzers if "images" in a.needs]
        spreads = {exclude: self._spread(layer, exclude, maps) for exclude in {a.exclude for a in needing}}
        # Searches leave different rows out, so neighbors are laid out by row of the capture.
        wide = {s: self._by_row(*found[s]) for s in {_Search.of(a) for a in analyzers}}
        wide_after = {s: self._by_row(*found_after[s]) for s in wide if s in found_after}
        hubness = {(_Search.of(a), a.k): self._hubness(wide[_Search.of(a)].rows[:, : a.k]) for a in analyzers}
        passing = list(dict.fromkeys(_Search.of(a) for a in needing)) or list(wide)
        union, found_places = _union([wide[search].rows for search in passing])
        place_of = dict(zip(passing, found_places, strict=True))
        answers = {column.name: torch.full((len(pre),), torch.nan) for a in analyzers for column in a.columns}
        halves: dict[str, list[Tensor]] = {name: [torch.full((len(pre),), torch.nan) for _ in (0, 1)] for name in answers}
        queries = torch.nonzero((union >= 0).any(1)).squeeze(1)
        for part in query_chunks(self.capture, queries, union.shape[1], block.rows_per_call):
            passed = maps.of_rows(part, union[part]) if needing else None
            clouds: dict[Any, tuple[Tensor, Cloud] | None] = {}  # analyzers with the same options look at the same cloud
            for a in analyzers:
                search = _Search.of(a)
                options = (search, a.k, a.needs)
                if options not in clouds:
                    ready = wide[search].rows[part, a.k - 1] >= 0
                    after = wide_after.get(search) if "output_neighbors" in a.needs else None
                    if after is not None:
                        ready &= after.rows[part, a.k - 1] >= 0
                    clouds[options] = None
                    if bool(ready.any()):
                        at = part[ready]
                        seen = None
                        if passed is not None and "images" in a.needs:
                            places = place_of[search][at, : a.k, None].expand(-1, -1, pre.shape[1])
                            seen = passed[ready].gather(1, places)
                        spread = spreads.get(a.exclude, (float("nan"),) * 2)
                        cloud = self._cloud(
                            layer, a, at, wide[search], maps, pre, post, hubness[search, a.k], spread, block, seen, after
                        )
                        clouds[options] = (at.cpu(), cloud)
                entry = clouds[options]
                if entry is None:
                    continue
                there, cloud = entry
                for name, value in a.measure(cloud).items():
                    answers[name][there] = value.detach().float().cpu()
                if "halves" in a.needs and a.k >= 4:
                    for half, split in enumerate(cloud.halves):
                        for name, value in a.measure(split).items():
                            halves[name][half][there] = value.detach().float().cpu()
                if self._kept is not None and self._kept[0] is a:
                    self._remember(index, cloud, there)
        for a in analyzers:
            for column in a.columns:
                self._count(column.name, a, answers[column.name], wide[_Search.of(a)].rows[:, a.k - 1].cpu() >= 0)
                if "halves" in a.needs:
                    self.facts["reliability"][column.name][str(layer)] = _spearman(*halves[column.name])
        return {name: answer.numpy() for name, answer in answers.items()}

    def _cloud(
        self, layer: int, a: CloudAnalyzer, at: Tensor, near: Neighbors, maps: Images, pre: Tensor, post: Tensor, hubness: Tensor,
        spread: tuple[float, float], block: PatchedBlock, passed: Tensor | None, after: Neighbors | None,
    ) -> Cloud:  # fmt: skip
        """What an analyzer gets to see of the queries `at`: what it needs, and no more."""
        rows = near.rows[at, : a.k]
        return Cloud(
            layer=layer, n_layers=door.n_layers(self.model), query=pre[at], query_image=post[at],
            query_token=self.tokens[0][at], query_pos=self.positions[0][at], rows=rows, distances=near.distances[at, : a.k],
            neighbors=maps.pre[rows], neighbor_token=self.tokens[1][rows], neighbor_pos=self.positions[1][rows],
            hubness=hubness[at], spread_in=spread[0], spread_out=spread[1], images=passed,
            output_rows=None if after is None else after.rows[at, : a.k],
            output_distances=None if after is None else after.distances[at, : a.k],
            block=(lambda points: block(at, points)) if "block" in a.needs else None,
            final_norm=(lambda states: door.final_norm(self.model, states)) if "final_norm" in a.needs else None,
        )  # fmt: skip

    def _find(
        self, search: _Search, k: int, layer: int, states: Tensor, bank_states: Tensor, *, after: bool = False
    ) -> tuple[Int[Tensor, " q"], Neighbors]:
        """Rows that were searched, and their neighbors."""
        everything = search.exclude == "nothing"
        asked = self.asked if everything else self.asked & (self.capture.row_pos > 0)
        at = torch.nonzero(asked).squeeze(1).to(self.device)
        own, other = self.groups[search.exclude]
        keys = [self._bare_key(c) for c in (self.capture, self.bank)] if layer == 0 and not after else self.keys
        pool = torch.ones_like(self.bank.row_pos, dtype=torch.bool) if everything else self.bank.row_pos > 0
        queries = Points(states[at], keys[0][at], self.tokens[0][at], own[at], torch.ones_like(at).bool())
        bank = Points(bank_states, keys[1], self.tokens[1], other, pool.to(self.device))
        near = find(queries, bank, k, metric=search.metric, same_token=search.same_token, distinct=not everything)
        if layer > 0 and len(at) and not bool(near.complete.any()):
            raise NeighborError(_nothing_to_score(search, k))
        return at, near

    def _bare_key(self, capture: Capture) -> Tensor:
        """Rows with equal keys enter block 0 with equal states: the same token (at the same place, with learned positions)."""
        place = capture.row_pos if door.has_absolute_positions(self.model) else torch.zeros_like(capture.row_pos)
        return (capture.row_token * door.n_context(self.model) + place).to(self.device)

    def _by_row(self, at: Tensor, near: Neighbors) -> Neighbors:
        rows = torch.full((self.capture.n_rows, near.rows.shape[1]), -1, dtype=torch.int64, device=self.device)
        distances = torch.full(rows.shape, torch.nan, device=self.device)
        rows[at], distances[at] = near.rows, near.distances
        return Neighbors(rows, distances)

    def _hubness(self, rows: Tensor) -> Tensor:
        if self.external:
            return torch.full((len(rows),), torch.nan, device=self.device)
        full = rows[rows[:, -1] >= 0]  # a query with too few neighbors has no neighborhood, so it counts for nobody
        return torch.bincount(full.flatten(), minlength=len(rows)).float()

    def _spread(self, layer: int, exclude: str, maps: Images) -> tuple[float, float]:
        """G_in and G_out: mean total variance of random bank points before and after the same map."""
        pool = torch.nonzero(self.bank.row_pos > 0).squeeze(1)
        if maps.context == "native":
            at = pool.to(self.device)
            return float(total_variance(maps.pre[at])), float(total_variance(maps.post[at]))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        # Of all tokens, asked for or not: G is a fact about the layer.
        candidates = torch.nonzero(self.capture.row_pos > 0).squeeze(1)
        picks = torch.randint(len(candidates), (_SPREAD_QUERIES,), generator=generator)
        if len(candidates) >= _SPREAD_QUERIES:
            picks = torch.randperm(len(candidates), generator=generator)[:_SPREAD_QUERIES]
        queries = candidates[picks].sort().values
        own, other = (group.cpu() for group in self.groups[exclude])
        before, after = [], []
        for part in query_chunks(self.capture, queries, _SPREAD_POINTS, 16 * _SPREAD_POINTS):
            rows = [self._random_rows(q, pool, own, other, generator) for q in part.tolist()]
            fewest = min(len(r) for r in rows)
            if fewest < 2:
                return float("nan"), float("nan")
            chosen = torch.stack([r[:fewest] for r in rows]).to(self.device)
            before.append(total_variance(maps.pre[chosen]))
            after.append(total_variance(maps.of_rows(part.to(self.device), chosen)))
        return float(torch.cat(before).mean()), float(torch.cat(after).mean())

    def _random_rows(self, query: int, pool: Tensor, own: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
        """Random rows of the pool outside the query's group, no token prefix twice."""
        shuffled = pool[torch.randperm(len(pool), generator=generator)]
        if int(own[query]) >= 0:
            shuffled = shuffled[other[shuffled] != own[query]]
        shuffled = shuffled[: 4 * _SPREAD_POINTS]
        seen = dict(zip(reversed(self.keys[1].cpu()[shuffled].tolist()), reversed(shuffled.tolist()), strict=True))
        seen.pop(int(self.keys[0][query]), None)
        return torch.tensor(sorted(seen.values(), key=shuffled.tolist().index)[:_SPREAD_POINTS], dtype=torch.int64)

    def _remember(self, index: int, cloud: Cloud, there: Tensor) -> None:
        assert self._kept is not None and cloud.images is not None
        kept = self._kept[1]
        kept.rows[index, there.numpy()] = cloud.rows.cpu().numpy()
        kept.before[index, there.numpy()] = cloud.distances.cpu().numpy()
        kept.after[index, there.numpy()] = (cloud.images - cloud.query_image[:, None]).norm(dim=2).cpu().numpy()

    def _count(self, name: str, a: CloudAnalyzer, answer: Tensor, complete: Tensor) -> None:
        """Why values are missing, each missing value under one reason."""
        missing = answer.isnan()
        first = (self.capture.row_pos == 0) & (a.exclude != "nothing")
        reasons = {
            "position 0": first,
            "not asked for": ~self.asked & ~first,
            "too few neighbors": self.asked & ~first & ~complete,
            "degenerate or undefined": self.asked & ~first & complete,
        }
        counts = self.facts["left_out"][name]
        for reason, where in reasons.items():
            counts[reason] = counts.get(reason, 0) + int((missing & where).sum())

    def _refuse_hopeless(self, search: _Search, k: int) -> None:
        """Before any work: a k above the bank, or no token with k candidates outside its own group."""
        pool = self.bank.row_pos > 0
        points = int(pool.sum()) if search.exclude != "nothing" else self.bank.n_rows
        if k > points:
            raise NeighborError(
                f"expected k of at most the bank's {points} points (position 0 left out), got {k}. "
                'Lower k, add texts, or pass bank="reference".'
            )
        own, other = (group.cpu() for group in self.groups[search.exclude])
        if search.exclude != "nothing" and not bool((self.asked & (self.capture.row_pos > 0)).any()):
            raise NeighborError("expected queries beyond position 0, got none: the first token is neither query nor neighbor.")
        for group in own[self.asked & (self.capture.row_pos > 0)].unique().tolist():
            left = pool & (other != group) if group >= 0 else pool
            if len(self.keys[1].cpu()[left].unique()) >= k:
                return
        if search.exclude != "nothing":
            raise NeighborError(_nothing_to_score(search, k))


def _nothing_to_score(search: _Search, k: int) -> str:
    return (
        f"expected at least one token with {k} neighbors, got none: with exclude={search.exclude!r} and same_token="
        f'{search.same_token!r} too few distinct tokens are left. Pass bank="reference" or another capture, add texts, lower k, or '
        'choose exclude="self".'
    )


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


def _spearman(first: Tensor, second: Tensor) -> float | None:
    """Spearman correlation over rows where both are there; None if it is not defined."""
    both = ~(first.isnan() | second.isnan())
    a, b = first[both].numpy(), second[both].numpy()
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(stats.spearmanr(a, b).statistic)
