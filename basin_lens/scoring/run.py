"""The cloud analyzers, layer by layer: search once, pass once, let every analyzer look, drop the images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from basin_lens.analyzers import Cloud, CloudAnalyzer, RunOn, Surroundings, total_variance
from basin_lens.capture import Capture
from basin_lens.errors import CaptureError, TransportError
from basin_lens.model import device_of, final_norm, full_name, one_side, rerun_to_logits
from basin_lens.model import n_layers as count_layers
from basin_lens.neighbors import Backend, Neighbors
from basin_lens.scoring.search import Found, Search, Searches
from basin_lens.scoring.token_rows import texts_hash
from basin_lens.transport import BlockMap, LayerMaps, Probe, query_chunks, rows_per_call

_SELDOM = ("too few blocks left", "not sampled", "zero state, which has no cosine")  # reasons that are named only where they occur
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


class Conductor:
    """Runs the cloud analyzers layer by layer."""

    def __init__(
        self,
        model: Any,
        capture: Capture,
        bank: Capture,
        analyzers: list[CloudAnalyzer],
        asked: Bool[Tensor, " rows"],
        seed: int,
        layers: Sequence[int],
        backend: Backend = "auto",
        frozen: KeptNeighbors | None = None,
    ) -> None:
        self.model, self.capture, self.bank, self.analyzers, self.asked, self.seed = model, capture, bank, analyzers, asked, seed
        self.device = device_of(model)
        self.external = bank is not capture
        self._refuse_missing_layers(layers)
        self.searches = Searches(model, capture, bank, analyzers, asked, seed, backend)
        if frozen is not None:
            self.searches.frozen = {layer: torch.from_numpy(frozen.rows[index]) for index, layer in enumerate(layers)}
        self.own_states = all(c.settings.get("states_of_model", True) for c in (capture, bank))
        self._refuse_two_tables()
        probe = Probe(model, int(capture.lengths.max()))
        self.probes = probe, Probe(model, int(bank.lengths.max())) if self.external else probe
        names = [column.name for a in analyzers if "halves" in a.needs for column in a.columns]
        self.facts: dict[str, Any] = {
            "bank": {
                "source": "another capture" if self.external else "the texts themselves",
                "points": int((bank.row_pos > 0).sum()),
                "sequences": len(bank.sequences),
                "texts": texts_hash(bank),
            },
            "search": self.searches.facts,
            "routes": {},
            "route_reasons": {},
            "check_error": {},
            "affine_fit": {},
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
        maps = LayerMaps(self.model, self.capture, self.bank, self.probes, layer, self.seed)
        if self.own_states:
            maps.block(layer, patched=any(a.context in ("patched", "attn") or "block" in a.needs for a in self.analyzers))
        answers: dict[str, np.ndarray] = {}
        found: dict[Any, Found] = {}
        for context, blocks in dict.fromkeys((a.context, a.blocks) for a in self.analyzers):
            here = [a for a in self.analyzers if (a.context, a.blocks) == (context, blocks)]
            if layer + blocks > count_layers(self.model):
                for a in here:
                    self._count(a, {c.name: torch.full((self.capture.n_rows,), torch.nan, device="cpu") for c in a.columns}, None)
                answers |= {c.name: np.full(self.capture.n_rows, np.nan, np.float32) for a in here for c in a.columns}
            else:
                answers |= self._context(layer, index, here, maps.map(context, blocks), found)
        self.facts["check_error"][str(layer)] = maps.errors.get(layer)
        self.facts["routes"][str(layer)] = maps.routes.get(layer, "native")
        if layer in maps.reasons:
            self.facts["route_reasons"][str(layer)] = maps.reasons[layer]
        if maps.fits:
            self.facts["affine_fit"][str(layer)] = {
                str(blocks): {"held_out_r2": fit.held_out_r2, "ridge": fit.ridge} for blocks, fit in maps.fits.items()
            }
        return answers

    def _context(
        self, layer: int, index: int, analyzers: list[CloudAnalyzer], passage: BlockMap, found: dict[Any, Found]
    ) -> dict[str, np.ndarray]:
        """One map: pass the union of all neighbors once, and let every analyzer look."""
        for a in analyzers:
            if _before(a) not in found:
                bare = layer == 0 and a.context != "mlp"
                found[_before(a)] = self.searches.find(Search.of(a), layer, passage.before, passage.bank_before, bare=bare)
            if "output_neighbors" in a.needs and _behind(a) not in found:
                found[_behind(a)] = self.searches.find(Search.of(a), layer, passage.after, passage.bank_after)
        needing = [a for a in analyzers if "images" in a.needs]
        spreads = {exclude: self._spread(layer, exclude, passage) for exclude in {a.exclude for a in needing}}
        hubness = {(_before(a), a.k): self.searches.hubness(found[_before(a)].near.rows[:, : a.k]) for a in analyzers}
        passing = list(dict.fromkeys(_before(a) for a in needing)) or list(dict.fromkeys(_before(a) for a in analyzers))
        sampled = {a.key: self._sample(a, found[_before(a)].near) for a in analyzers if a.max_queries is not None}
        union, found_places = _union([self._passed(found[search].near.rows, search, needing, sampled) for search in passing])
        place_of = dict(zip(passing, found_places, strict=True))
        count = len(passage.before)
        answers = {
            column.name: torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")
            for a in analyzers
            for column in a.columns
        }
        halves: dict[str, list[Tensor]] = {
            name: [torch.full((count,), torch.nan, dtype=torch.float32, device="cpu") for _ in (0, 1)] for name in answers
        }
        # Also those whose neighbors do not pass: an analyzer that needs no images looks at them.
        queries = torch.nonzero(torch.stack([(found[search].near.rows >= 0).any(1) for search in passing]).any(0)).squeeze(1)
        # Counted where the neighbors of the share are chosen: bare embeddings enter block 0, and tokens of one id are one point there.
        candidates = {
            a.key: self.searches.candidates(Search.of(a), found[_behind(a) if "output_neighbors" in a.needs else _before(a)])
            for a in analyzers
            if "candidates" in a.needs
        }
        bank = Surroundings(*(s[(self.bank.row_pos > 0).to(self.device)] for s in (passage.bank_before, passage.bank_after)))
        for part in query_chunks(self.capture, queries, union.shape[1], rows_per_call(self.device)):
            passed = passage.of_rows(part, union[part]) if needing else None
            clouds: dict[Any, tuple[Tensor, Cloud] | None] = {}  # analyzers with the same options look at the same cloud
            for a in analyzers:
                search = _before(a)
                options = (search, a.k, a.needs, a.max_queries and a.key)
                if options not in clouds:
                    near = found[search].near
                    after = found[_behind(a)].near if "output_neighbors" in a.needs else None
                    ready = near.rows[part, a.k - 1] >= 0
                    if after is not None:
                        ready &= after.rows[part, a.k - 1] >= 0
                    if a.max_queries is not None:
                        ready &= sampled[a.key][part]
                    clouds[options] = None
                    if bool(ready.any()):
                        at = part[ready]
                        seen = None
                        if passed is not None and "images" in a.needs:
                            places = place_of[search][at, : a.k, None].expand(-1, -1, passage.before.shape[1])
                            seen = passed[ready].gather(1, places)
                        spread = spreads.get(a.exclude, (float("nan"),) * 2)
                        cloud = self._cloud(
                            layer, a, at, found[search], passage, hubness[search, a.k], spread, seen, after, bank, candidates.get(a.key)
                        )  # fmt: skip
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
            without = ~found[_before(a)].directed.cpu() if a.metric == "cosine" else None
            self._count(a, answers, found[_before(a)].near.rows[:, a.k - 1].cpu() >= 0, sampled.get(a.key), without)
            if "halves" in a.needs:
                for column in a.columns:
                    self.facts["reliability"][column.name][str(layer)] = _spearman(*halves[column.name])
        return {name: answer.numpy() for name, answer in answers.items()}

    def _cloud(
        self, layer: int, a: CloudAnalyzer, at: Tensor, found: Found, passage: BlockMap, hubness: Tensor,
        spread: tuple[float, float], passed: Tensor | None, after: Neighbors | None, bank: Surroundings,
        candidates: Tensor | None,
    ) -> Cloud:  # fmt: skip
        """What an analyzer gets to see of the queries `at`: what it needs, and no more."""
        rows = found.near.rows[at, : a.k]
        output: dict[str, Any] = {}
        if after is not None:
            there = after.rows[at, : a.k]
            output = {
                "output_rows": there, "output_distances": after.distances[at, : a.k],
                "output_neighbors": passage.bank_after[there], "output_preimages": passage.bank_before[there],
            }  # fmt: skip
        return Cloud(
            layer=layer, n_layers=count_layers(self.model), query=passage.before[at], query_image=passage.after[at],
            query_token=self.searches.tokens[0][at], query_pos=self.searches.positions[0][at], rows=rows, distances=found.near.distances[at, : a.k],
            neighbors=passage.bank_before[rows], neighbor_token=self.searches.tokens[1][rows], neighbor_pos=self.searches.positions[1][rows],
            hubness=hubness[at], spread_in=spread[0], spread_out=spread[1], images=passed,
            candidates=None if candidates is None else candidates[at],
            block=(lambda points: passage.of_points(at, points)) if "block" in a.needs else None,
            run_on=(lambda points: self._run_on(layer, at, points)) if "run_on" in a.needs else None,
            bank=bank if "bank" in a.needs else None,
            final_norm=(lambda states: final_norm(self.model, states)) if "final_norm" in a.needs else None, **output,
        )  # fmt: skip

    def _run_on(self, layer: int, at: Int[Tensor, " q"], points: Float[Tensor, "q m d"]) -> RunOn:
        """States in the queries' places, run on to the logits, beside the model as it is."""
        divergence, later = (points.new_full(points.shape[:2], torch.nan) for _ in (0, 1))
        for index, row in enumerate(at.tolist()):
            tokens = torch.tensor(self.capture.sequences[int(self.capture.row_seq[row])].tokens, device=self.device)
            pos = int(self.capture.row_pos[row])
            own = self.capture.resid_pre(layer)[row].to(self.device)
            logs = rerun_to_logits(self.model, tokens, layer, pos, torch.cat([own[None], points[index]])).log_softmax(-1)
            here = logs[:, pos]
            divergence[index] = (here[0].exp() * (here[0] - here[1:])).sum(-1)
            if pos + 1 < len(tokens):
                losses = -logs[:, pos:-1].gather(2, tokens[pos + 1 :].expand(len(logs), -1)[..., None])[..., 0].mean(1)
                later[index] = losses[1:] - losses[0]
        return RunOn(divergence, later)

    def _passed(
        self,
        rows: Int[Tensor, "rows k"],
        search: tuple[Search, str],
        needing: Sequence[CloudAnalyzer],
        sampled: Mapping[str, Tensor],
    ) -> Int[Tensor, "rows k"]:
        """The neighbors of a search that go through the map: none of a token that all of its analyzers leave out of their samples."""
        asking = [a for a in needing if _before(a) == search]
        if not asking or any(a.max_queries is None for a in asking):
            return rows
        looked_at = torch.stack([sampled[a.key] for a in asking]).any(0)
        return torch.where(looked_at[:, None], rows, -1)

    def _sample(self, a: CloudAnalyzer, near: Neighbors) -> Bool[Tensor, " rows"]:
        """A seeded sample of the tokens that could be measured, the same at every layer if the same tokens have neighbors."""
        order = torch.randperm(self.capture.n_rows, generator=torch.Generator().manual_seed(self.seed), device="cpu").to(
            self.device
        )
        able = order[near.rows[order, a.k - 1] >= 0]
        chosen = torch.zeros(self.capture.n_rows, dtype=torch.bool, device=self.device)
        chosen[able[: a.max_queries]] = True
        return chosen

    def _spread(self, layer: int, exclude: str, passage: BlockMap) -> tuple[float, float]:
        """G_in and G_out: mean total variance of random bank points before and after the same map."""
        pool = torch.nonzero(self.bank.row_pos > 0).squeeze(1)
        if passage.context in ("native", "mlp"):
            at = pool.to(self.device)
            return float(total_variance(passage.bank_before[at])), float(total_variance(passage.bank_after[at]))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + layer) % 2**63)
        # Of all tokens, asked for or not: G is a fact about the layer.
        candidates = torch.nonzero(self.capture.row_pos > 0).squeeze(1)
        picks = torch.randint(len(candidates), (_SPREAD_QUERIES,), generator=generator, device="cpu")
        if len(candidates) >= _SPREAD_QUERIES:
            picks = torch.randperm(len(candidates), generator=generator, device="cpu")[:_SPREAD_QUERIES]
        queries = candidates[picks].sort().values
        own, other = (group.cpu() for group in self.searches.groups[exclude])
        before, after = [], []
        for part in query_chunks(self.capture, queries, _SPREAD_POINTS, 16 * _SPREAD_POINTS):
            rows = [self._random_rows(q, pool, own, other, generator) for q in part.tolist()]
            fewest = min(len(r) for r in rows)
            if fewest < 2:
                return float("nan"), float("nan")
            chosen = torch.stack([r[:fewest] for r in rows]).to(self.device)
            before.append(total_variance(passage.bank_before[chosen]))
            after.append(total_variance(passage.of_rows(part.to(self.device), chosen)))
        return float(torch.cat(before).mean()), float(torch.cat(after).mean())

    def _random_rows(self, query: int, pool: Tensor, own: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
        """Random rows of the pool outside the query's group, no token prefix twice."""
        shuffled = pool[torch.randperm(len(pool), generator=generator, device="cpu")]
        if int(own[query]) >= 0:
            shuffled = shuffled[other[shuffled] != own[query]]
        shuffled = shuffled[: 4 * _SPREAD_POINTS]
        seen = dict(zip(reversed(self.searches.keys[1].cpu()[shuffled].tolist()), reversed(shuffled.tolist()), strict=True))
        seen.pop(int(self.searches.keys[0][query]), None)
        return torch.tensor(sorted(seen.values(), key=shuffled.tolist().index)[:_SPREAD_POINTS], dtype=torch.int64, device="cpu")

    def _remember(self, index: int, cloud: Cloud, there: Tensor) -> None:
        assert self._kept is not None and cloud.images is not None
        kept = self._kept[1]
        kept.rows[index, there.numpy()] = cloud.rows.cpu().numpy()
        kept.before[index, there.numpy()] = cloud.distances.cpu().numpy()
        kept.after[index, there.numpy()] = (cloud.images - cloud.query_image[:, None]).norm(dim=2).cpu().numpy()

    def _count(
        self, a: CloudAnalyzer, answers: Mapping[str, Tensor], complete: Tensor | None, sampled: Tensor | None = None,
        undirected: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Why values are missing, each missing value under one reason. `complete` None: there is no block to pass.

        `undirected`: tokens whose state has no length, and so no cosine with any other.
        """
        first = (self.capture.row_pos == 0) & (a.exclude != "nothing")
        wanted = self.asked & ~first
        there = torch.ones_like(wanted) if sampled is None else sampled.cpu()
        none = torch.zeros_like(wanted)
        zero = none if undirected is None or complete is None else wanted & undirected
        reasons = {
            "position 0": first,
            "not asked for": ~self.asked & ~first,
            "too few blocks left": wanted if complete is None else none,
            "zero state, which has no cosine": zero,
            "too few neighbors": none if complete is None else wanted & ~complete & ~zero,
            "not sampled": none if complete is None else wanted & complete & ~there,
            "degenerate or undefined": none if complete is None else wanted & complete & there,
        }
        for column in a.columns:
            missing = answers[column.name].isnan()
            counts = self.facts["left_out"][column.name]
            for reason, where in reasons.items():
                if reason in _SELDOM and not bool(where.any()):
                    continue
                counts[reason] = counts.get(reason, 0) + int((missing & where).sum())

    def _refuse_two_tables(self) -> None:
        """A block is called with one rotary table, that of the longest sequence."""
        halves = any(a.context in ("attn", "mlp") for a in self.analyzers)
        for name, source in (("capture", self.capture), *([("bank", self.bank)] if halves else [])):
            lengths = source.lengths.tolist()
            boundary = one_side(self.model, lengths)
            if boundary is not None and self.own_states:
                raise TransportError(
                    f"expected sequences on one side of {boundary} tokens in the {name}, got {min(lengths)} to {max(lengths)}: beyond its original "
                    f'context, {full_name(self.model)} has another rotary table (rope_type "longrope"), and a block is called with one. '
                    f"Analyze the texts of up to {boundary} tokens and the longer ones apart (max_length={boundary} cuts them)."
                )

    def _refuse_missing_layers(self, layers: Sequence[int]) -> None:
        """A path of several blocks reads the states at each of them."""
        count = count_layers(self.model)
        needed = {layer + n for a in self.analyzers for layer in layers if layer + a.blocks <= count for n in range(a.blocks)}
        for name, source in (("capture", self.capture), ("bank", self.bank)):
            if missing := sorted(needed - set(source.layers)):
                raise CaptureError(
                    f"expected a {name} that holds layers {missing} too (blocks={max(a.blocks for a in self.analyzers)}), got one with "
                    f"{list(source.layers)}. Capture again with layers=[...]."
                )


def _before(a: CloudAnalyzer) -> tuple[Search, str]:
    """Analyzers that agree on this share a search: who the neighbors are where the map begins."""
    return Search.of(a), "mid" if a.context == "mlp" else "pre"


def _behind(a: CloudAnalyzer) -> tuple[Search, str, int]:
    """The same where the map ends."""
    return Search.of(a), "mid" if a.context == "attn" else "post", a.blocks


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
