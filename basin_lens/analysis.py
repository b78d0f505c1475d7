"""Texts or a capture -> the table. Read this page first: it conducts everything else.

    passages -> model -> Capture -> Neighbors -> images under a block -> analyzers -> table

The model reads the texts once. Then, layer by layer: the states around the block are checked against the block itself; each
distinct set of neighbor options is searched once; each context passes the union of those neighbors through the block once, a
thousand rows at a time; and every analyzer turns its neighborhoods into numbers before the images are dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from basin_lens import model as door
from basin_lens import tables
from basin_lens.analyzers import Analyzer, Cloud, CloudAnalyzer, TokenAnalyzer, default_analyzers, total_variance
from basin_lens.capture import Capture, check_layers, reference_capture
from basin_lens.errors import CaptureError, NeighborError, TableError
from basin_lens.neighbors import Neighbors, Points, find, prefix_keys
from basin_lens.transport import Context, Images, PatchedBlock, Probe, check, images, query_chunks

_SPREAD_QUERIES, _SPREAD_POINTS = 32, 64  # random points behind G_in and G_out, per layer


def analyze(
    model: Any,
    data: Any,
    analyzers: Sequence[Analyzer] | None = None,
    *,
    layers: Sequence[int] | None = None,
    bank: "Capture | str | None" = None,
    queries: Any = None,
    seed: int = 0,
    max_length: int = 128,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure every token of some texts at every layer of a model.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`, in any state.
        data: a text, a `Passage`, a path, a list of these, a dataset with a `text` column, token ids `[batch, pos]`, or a `Capture`.
        analyzers: what to measure; None: `Compression`, the same over other tokens, `Contraction`, `RawCompression`,
            `Neighborhood`, `Surprisal`, `StateNorm`.
        layers: block indices; None: all (of the capture).
        bank: where neighbors come from: None for the texts themselves, another `Capture`, or `"reference"` for the built-in
            passages (needed for a single text).
        queries: which tokens are scored: positions, a boolean mask `[rows]` or `[seqs, pos]`, a label or span name, or a number of
            tokens (a seeded sample); None: all. It does not shrink the bank.
        seed: of every random choice.
        max_length, batch_size, prepend_bos: see `Capture.from_texts`.
        progress: show progress bars.

    Returns:
        one row per (layer, token): `run, layer, passage, doc, seq, pos, token_id, token, start, end`, labels, `span`, then the
        analyzers' columns (units in `table.attrs["provenance"][run]["columns"]`). What an analyzer leaves out is NaN, counted by reason
        in the provenance.

    Raises:
        BasinLensError: before any long work, if the model, the texts, the layers, the analyzers or the bank do not fit.
        TransportError: the block does not reproduce the captured states, or a route is not exact on this model.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, "The cat sat on the mat.", layers=[5], bank="reference", progress=False)
        >>> bool(table.compression.notna().any())
        True
    """
    return score(
        model, data, analyzers, layers=layers, bank=bank, queries=queries, seed=seed, max_length=max_length,
        batch_size=batch_size, prepend_bos=prepend_bos, progress=progress,
    ).table  # fmt: skip


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
class Analysis:
    """A table, and the neighbors behind one of its scores if they were to be kept."""

    table: pd.DataFrame
    neighbors: KeptNeighbors | None


def score(
    model: Any,
    data: Any,
    analyzers: Sequence[Analyzer] | None = None,
    *,
    layers: Sequence[int] | None = None,
    bank: "Capture | str | None" = None,
    queries: Any = None,
    seed: int = 0,
    max_length: int = 128,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
    keep_neighbors_of: CloudAnalyzer | None = None,
) -> Analysis:
    """`analyze`, and on request the neighbors of one of its analyzers (an instance in `analyzers`)."""
    door.check_model(model)
    chosen = default_analyzers() if analyzers is None else list(analyzers)
    _check_analyzers(chosen)
    clouds = [a for a in chosen if isinstance(a, CloudAnalyzer)]
    singles = [a for a in chosen if isinstance(a, TokenAnalyzer)]
    if isinstance(data, Capture):
        capture = data
        capture.check_model_is(model)
        wanted = capture.layers if layers is None else check_layers(model, layers)
        if not set(wanted) <= set(capture.layers):
            raise CaptureError(
                f"expected layers of the capture {list(capture.layers)}, got {sorted(set(wanted) - set(capture.layers))}. "
                "Capture again with layers=[...]."
            )
    else:
        wanted = check_layers(model, layers)
        capture = Capture.from_texts(
            model, data, layers=wanted, analyzers=singles, max_length=max_length, batch_size=batch_size,
            prepend_bos=prepend_bos, progress=progress,
        )  # fmt: skip
    rerun = capture.measure(model, singles, progress=progress)
    asked = _query_rows(capture, queries, seed)
    values = {column.name: np.full((len(wanted), capture.n_rows), np.nan, np.float32) for a in chosen for column in a.columns}
    for analyzer in singles:
        held = capture.columns[analyzer.key]
        for column in analyzer.columns:
            values[column.name][:] = held[column.name][list(wanted) if analyzer.per_layer else [0]].numpy()
    facts: dict[str, Any] = {}
    kept = None
    if clouds:
        conductor = _Conductor(model, capture, _bank(model, capture, bank, wanted, progress), clouds, asked, seed)
        if keep_neighbors_of is not None:
            kept = conductor.keep(keep_neighbors_of, len(wanted))
        bar = tqdm(total=len(wanted), desc="neighbors through blocks", unit="layer", disable=not progress)
        with door.measuring(model), bar:
            for index, layer in enumerate(wanted):
                for name, value in conductor.layer(layer, index).items():
                    values[name][index] = value
                bar.update()
        facts = conductor.facts
    provenance = {
        "model": capture.model,
        "texts": _texts_hash(capture),
        "capture": capture.settings,
        "layers": list(wanted),
        "analyzers": [a.key for a in chosen],
        "columns": {
            c.name: {"unit": c.unit, "low": _finite(c.low), "high": _finite(c.high), "rows": a.rows, "analyzer": type(a).__name__}
            for a in chosen
            for c in a.columns
        },
        "queries": "all" if queries is None else f"{int(asked.sum())} of {capture.n_rows} tokens",
        "seed": seed,
        "read_again_for": rerun,
        **facts,
    }
    rows, labels = _row_facts(capture)
    return Analysis(tables.build(rows, labels, wanted, values, provenance), kept)


def neighborhood(
    model: Any,
    capture: Capture,
    layer: int,
    seq: int,
    pos: int,
    *,
    k: int = 15,
    context: Context = "patched",
    metric: str = "l2",
    exclude: str = "sequence",
    same_token: str = "any",
    bank: "Capture | str | None" = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Who the neighbors of one token are, and where the block takes them.

    Args:
        model: the model that made the capture.
        capture: holds the token.
        layer: block index.
        seq, pos: the token: sequence and position in it.
        k, context, metric, exclude, same_token: as for `Compression`.
        bank: as for `analyze`.
        progress: show a bar if the reference bank must be read first.

    Returns:
        one row per neighbor, nearest first: `rank, token, text` (the text around it, the token in brackets), `passage, doc, seq,
        pos, distance_before, distance_after` (to the query and to its `resid_post`, state units; before: 1 - cosine with that metric).

    Raises:
        CaptureError: no such token or layer. NeighborError: position 0, or fewer than k neighbors.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> capture = bl.Capture.from_texts(model, "The cat sat on the mat.", layers=[5], progress=False)
        >>> len(bl.neighborhood(model, capture, layer=5, seq=0, pos=3, k=5, bank="reference"))
        5
    """
    from basin_lens.analyzers import Compression

    capture.check_model_is(model)
    row = capture.row_of(seq, pos)
    if pos == 0:
        raise NeighborError("expected a position from 1 on, got 0: the first token is neither query nor neighbor.")
    analyzer = Compression(k=k, context=context, metric=metric, exclude=exclude, same_token=same_token)  # type: ignore[arg-type]
    _check_analyzers([analyzer])
    asked = torch.zeros(capture.n_rows, dtype=torch.bool)
    asked[row] = True
    (layer,) = check_layers(model, [layer])
    bank = _bank(model, capture, bank, (layer,), progress)
    conductor = _Conductor(model, capture, bank, [analyzer], asked, seed=0)
    kept = conductor.keep(analyzer, 1)
    with door.measuring(model):
        conductor.layer(layer, 0)
    strings = bank.row_strings()
    lines = []
    for rank, other in enumerate(kept.rows[0, row].tolist()):
        where = int(bank.row_seq[other])
        first, length, place = int(bank.offsets[where]), int(bank.lengths[where]), int(bank.row_pos[other])
        before = strings[first + max(1, place - 6) : first + place]
        after = strings[first + place + 1 : first + min(length, place + 5)]
        lines.append({
            "rank": rank + 1, "token": strings[other], "text": f"{''.join(before)}[{strings[other]}]{''.join(after)}",
            "passage": bank.sequences[where].passage, "doc": bank.docs[where], "seq": where, "pos": place,
            "distance_before": float(kept.before[0, row, rank]), "distance_after": float(kept.after[0, row, rank]),
        })  # fmt: skip
    return pd.DataFrame(lines)


# -- the pieces -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    """Neighbor options: analyzers that agree on them share one search."""

    metric: Any
    exclude: str
    same_token: Any

    @classmethod
    def of(cls, analyzer: CloudAnalyzer) -> "_Search":
        return cls(analyzer.metric, analyzer.exclude, analyzer.same_token)


class _Conductor:
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
        self.groups = {s.exclude: [g.to(self.device) for g in _groups(capture, bank, s.exclude)] for s in self.searches}
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
                "texts": _texts_hash(bank),
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
        spreads = {a.exclude: self._spread(layer, a.exclude, maps) for a in needing}
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
        return torch.bincount(rows[rows >= 0], minlength=len(rows)).float()

    def _spread(self, layer: int, exclude: str, maps: Images) -> tuple[float, float]:
        """G_in and G_out: mean total variance of random bank points before and after the same map."""
        pool = torch.nonzero(self.bank.row_pos > 0).squeeze(1)
        if maps.context == "native":
            at = pool.to(self.device)
            return float(total_variance(maps.pre[at])), float(total_variance(maps.post[at]))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        candidates = torch.nonzero(self.asked & (self.capture.row_pos > 0)).squeeze(1)
        if not len(candidates):
            return float("nan"), float("nan")
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


def _groups(capture: Capture, bank: Capture, exclude: str) -> tuple[Tensor, Tensor]:
    """Group of each row of the capture and of the bank: a query's own group is never its neighbor."""
    if exclude in ("self", "nothing"):
        return torch.full((capture.n_rows,), -1), torch.full((bank.n_rows,), -1)

    def of(source: Capture) -> list[Any]:
        if exclude == "sequence":
            # In another capture, the same text is the same sequence.
            return list(range(len(source.sequences))) if source is bank is capture else [s.tokens for s in source.sequences]
        if exclude == "document":
            return list(source.docs)
        if source is capture and not any(exclude in label for label in source.labels):
            raise NeighborError(
                f'expected exclude "self", "sequence", "document" or a label of the texts, got {exclude!r}; labels: '
                f"{sorted({name for label in source.labels for name in label})}."
            )
        return [label.get(exclude) for label in source.labels]

    known: dict[Any, int] = {}
    answers = []
    for source in (capture, bank):
        ids = [-1 if name is None else known.setdefault(name, len(known)) for name in of(source)]
        answers.append(torch.tensor(ids)[source.row_seq])
    return answers[0], answers[1]


def _check_analyzers(analyzers: Sequence[Any]) -> None:
    if not analyzers:
        raise TableError("expected at least one analyzer, got none. Leave analyzers out for the default ones.")
    for analyzer in analyzers:
        if not isinstance(analyzer, CloudAnalyzer | TokenAnalyzer):
            raise TableError(
                f"expected analyzers (instances, such as Compression(k=15)), got {analyzer!r}. Subclass CloudAnalyzer or TokenAnalyzer."
            )
        analyzer.check()
    names = [column.name for analyzer in analyzers for column in analyzer.columns]
    twice = sorted({name for name in (*names, *tables.KEYS, "span") if (*names, *tables.KEYS, "span").count(name) > 1})
    if twice:
        raise TableError(f"expected different column names, got {twice[0]!r} twice. Give one of the analyzers a name=.")


def _bank(model: Any, capture: Capture, bank: Any, layers: Sequence[int], progress: bool) -> Capture:
    if bank is None:
        return capture
    if bank == "reference":
        bos = door.uses_bos(model, None)
        starts = {s.tokens[0] for s in capture.sequences}
        return reference_capture(model, layers, prepend_bos=bos is not None and starts == {bos}, progress=progress)
    if not isinstance(bank, Capture):
        raise NeighborError(f'expected bank=None, a Capture or "reference", got {bank!r}.')
    bank.check_model_is(model)
    if not set(layers) <= set(bank.layers):
        raise NeighborError(f"expected a bank with layers {list(layers)}, got one with {list(bank.layers)}. Capture them too.")
    return bank


def _query_rows(capture: Capture, queries: Any, seed: int) -> Bool[Tensor, " rows"]:
    """Which rows to score."""
    if queries is None:
        return torch.ones(capture.n_rows, dtype=torch.bool)
    if isinstance(queries, str):
        if any(queries in label for label in capture.labels):
            chosen = torch.tensor([bool(label.get(queries)) for label in capture.labels])[capture.row_seq]
        else:
            chosen = torch.tensor([queries in names for names in _spans(capture)])
        if not bool(chosen.any()):
            raise NeighborError(f"expected queries to name a label or span of the texts, got {queries!r}, which marks no token.")
        return chosen
    if isinstance(queries, int) and not isinstance(queries, bool):
        rows = torch.nonzero(capture.row_pos > 0).squeeze(1)
        if queries < 1:
            raise NeighborError(f"expected a positive number of queries, got {queries}.")
        chosen = torch.zeros(capture.n_rows, dtype=torch.bool)
        chosen[rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:queries]]] = True
        return chosen
    mask = torch.as_tensor(np.asarray(queries.cpu() if isinstance(queries, Tensor) else queries))
    if mask.dtype == torch.bool:
        if mask.shape == (capture.n_rows,):
            return mask.clone()
        if mask.shape == capture.valid.shape:
            return mask[capture.valid]
        raise NeighborError(
            f"expected a mask of shape {(capture.n_rows,)} or {tuple(capture.valid.shape)}, got {tuple(mask.shape)}."
        )
    if mask.ndim != 1 or not mask.numel() or mask.is_floating_point():
        raise NeighborError(f"expected queries as positions, a boolean mask, a name or a number, got {queries!r}.")
    chosen = torch.isin(capture.row_pos, mask.long())
    if not bool(chosen.any()):
        raise NeighborError(f"expected positions below {int(capture.lengths.max())}, got {mask.tolist()[:8]}.")
    return chosen


def _row_facts(capture: Capture) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Key columns and labels of each row."""
    seqs = capture.row_seq.tolist()
    rows = {
        "passage": np.array([capture.sequences[s].passage for s in seqs]),
        "doc": [capture.docs[s] for s in seqs],
        "seq": capture.row_seq.numpy(),
        "pos": capture.row_pos.numpy(),
        "token_id": capture.row_token.numpy(),
        "token": capture.row_strings(),
        "start": np.array([start for s in capture.sequences for start in s.starts]),
        "end": np.array([end for s in capture.sequences for end in s.ends]),
        "span": ["+".join(names) for names in _spans(capture)],
    }
    names = dict.fromkeys(name for label in capture.labels for name in label)
    return rows, {name: [capture.labels[s].get(name) for s in seqs] for name in names}


def _spans(capture: Capture) -> list[list[str]]:
    """Names of the spans that each row's characters overlap."""
    if capture.passages is None:
        return [[] for _ in range(capture.n_rows)]
    return [
        [name for name, (a, b) in capture.passages[s.passage].spans.items() if start < b and a < end]
        for s in capture.sequences
        for start, end in zip(s.starts, s.ends, strict=True)
    ]


def _spearman(first: Tensor, second: Tensor) -> float | None:
    """Spearman correlation over rows where both are there; None if it is not defined."""
    both = ~(first.isnan() | second.isnan())
    a, b = first[both].numpy(), second[both].numpy()
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(stats.spearmanr(a, b).statistic)


def _texts_hash(capture: Capture) -> str:
    import hashlib

    return hashlib.blake2b(repr([s.tokens for s in capture.sequences]).encode(), digest_size=8).hexdigest()


def _finite(bound: float | int) -> float | int | None:
    """A bound as JSON has it: None for no bound."""
    return bound if np.isfinite(bound) else None
