"""Who the neighbors are: every distinct set of neighbor options is searched once, under one set of exclusion rules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens import neighbors
from basin_lens.capture import Capture
from basin_lens.errors import NeighborError
from basin_lens.model import HookedModel, device_of, has_absolute_positions, n_context
from basin_lens.neighbors import (
    Backend,
    BothSides,
    Neighbors,
    Points,
    find,
    flat,
    has_direction,
    name_of_choice,
    own_sets,
    prefix_keys,
)
from basin_lens.neighbors.choices import radius_matched_sets, random_sets, reach
from basin_lens.scoring.bank_overlap import overlap
from basin_lens.scoring.plan import SearchOptions
from basin_lens.scoring.token_rows import row_groups
from basin_lens.values import Facts

# Facts of a search that each layer has of its own.
OF_LAYERS = ("recall", "same_position", "same_skeleton")


@dataclass(frozen=True)
class SearchResult:
    """Neighbors by row of the capture, and what they were chosen from: the rows `at` were searched.

    `queries`: what the rules need to know of these rows; their states are left out. `directed`: rows of the capture whose state
    has a direction, without which no cosine is defined; of a search by another metric, all.
    """

    near: Neighbors
    at: Int[Tensor, " q"]
    queries: Points
    bank: Points
    directed: Bool[Tensor, " rows"]


class Searches:
    """The searches of a plan over one capture and its bank: tokens, groups and token prefixes of both.

    `largest`: the largest k asked for, by neighbor options. `seed`: of every random choice.

    Raises:
        NeighborError: a k above the bank, or options under which no token has k candidates.
    """

    def __init__(
        self,
        model: HookedModel,
        capture: Capture,
        bank: Capture,
        largest: Mapping[SearchOptions, int],
        asked: Bool[Tensor, " rows"],
        backend: Backend,
        seed: int,
    ) -> None:
        self.model, self.capture, self.bank, self.asked, self.seed = model, capture, bank, asked, seed
        if backend == "faiss":
            flat.load()
        self.backend, self.device = backend, device_of(model)
        self.facts: Facts = {"backend": backend, "exact": backend != "approximate", **{name: {} for name in OF_LAYERS}}
        if own := [name_of_choice(options.choice) for options in largest if callable(options.choice)]:
            self.facts["own_choices"] = sorted(set(own))
        self.external = bank is not capture
        self.frozen: dict[int, Tensor] = {}  # by layer, rows by row of the capture: another run's neighbors, taken as they are
        self.largest = largest
        texts = [[s.tokens for s in capture.sequences], [s.tokens for s in bank.sequences]]
        keys = prefix_keys(*texts) if self.external else prefix_keys(texts[0]) * 2
        self.keys = [key.to(self.device) for key in keys]
        self.tokens = [c.row_token.to(self.device) for c in (capture, bank)]
        self.positions = [c.row_pos.to(self.device) for c in (capture, bank)]
        self.groups = {s.exclude: [g.to(self.device) for g in row_groups(capture, bank, s.exclude)] for s in self.largest}
        for options, k in self.largest.items():
            self._refuse_hopeless(options, k)

    def _refuse_hopeless(self, options: SearchOptions, k: int) -> None:
        """Before any work: a k above the bank, or no token with k candidates outside its own group."""
        pool = self._pool(options)
        points = int(pool.sum())
        if k > points:
            left_out = "" if bool(pool.all()) else " (position 0 left out)"
            raise NeighborError(
                f"expected k of at most the bank's {points} points{left_out}, got {k}. "
                'Lower k, add texts, or pass bank="reference".'
            )
        own, other = (group.cpu() for group in self.groups[options.exclude])
        if options.exclude != "nothing" and not bool((self.asked & (self.capture.row_pos > 0)).any()):
            raise NeighborError("expected queries beyond position 0, got none: the first token is never a query.")
        for group in own[self.asked & (self.capture.row_pos > 0)].unique().tolist():
            left = pool & (other != group) if group >= 0 else pool
            if len(self.keys[1].cpu()[left].unique()) >= k:
                return
        if options.exclude != "nothing":
            raise NeighborError(_nothing_to_score(options, k))

    def _pool(self, options: SearchOptions) -> Bool[Tensor, " bank"]:
        """Rows of the bank that may be neighbors: without position 0, unless it was asked for."""
        return (self.bank.row_pos > 0) | options.position_0

    def find(
        self,
        options: SearchOptions,
        layer: int,
        states: Float[Tensor, "rows d"],
        bank_states: Float[Tensor, "bank d"],
        *,
        bare: bool = False,
    ) -> SearchResult:
        """Neighbors by row of the capture. `bare`: the states are those that enter block 0, so that equal tokens have equal states.

        Raises:
            NeighborError: no token has as many neighbors as are asked for.
        """
        found = self.some(options, layer, states, bank_states, range(self.capture.n_rows), bare=bare)
        return self.join(options, layer, states, bank_states, [found], bare=bare)

    def some(
        self,
        options: SearchOptions,
        layer: int,
        states: Float[Tensor, "rows d"],
        bank_states: Float[Tensor, "bank d"],
        rows: range,
        *,
        bare: bool = False,
    ) -> Neighbors:
        """Neighbors of those rows of the capture, in order, that are asked for and among `rows`.

        For sets as tight as the neighborhood, these are the neighborhood: whose else is as tight, all of them tell together.
        """
        k, choice = self.largest[options], options.choice
        everyone = self._at(options)
        places = torch.nonzero((everyone >= rows.start) & (everyone < rows.stop)).squeeze(1)
        at = everyone[places]
        if not len(at):
            return Neighbors(torch.empty(0, k, dtype=torch.int64, device=self.device), torch.empty(0, k, device=self.device))
        queries, bank = self._points(options, at, states[at], bank_states, bare=bare)
        same_token, distinct = options.same_token, options.exclude != "nothing"
        if layer in self.frozen:
            return reach(queries, bank, self.frozen[layer].to(self.device)[at, :k], options.metric)
        if callable(choice):
            positions = BothSides(self.positions[0][at], self.positions[1])
            chosen = own_sets(choice, queries, bank, positions, k, metric=options.metric, same_token=same_token, distinct=distinct)
            return reach(queries, bank, chosen, options.metric)
        if choice == "random":
            seed, among = (self.seed * 1_000_003 + layer) % 2**63, (len(everyone), places)
            chosen = random_sets(queries, bank, k, same_token=same_token, distinct=distinct, seed=seed, among=among)
            return reach(queries, bank, chosen, options.metric)
        return find(queries, bank, k, metric=options.metric, same_token=same_token, distinct=distinct, backend=self.backend)

    def join(
        self,
        options: SearchOptions,
        layer: int,
        states: Float[Tensor, "rows d"],
        bank_states: Float[Tensor, "bank d"],
        parts: Sequence[Neighbors],
        *,
        bare: bool = False,
    ) -> SearchResult:
        """What the searches for all rows, a part of them each, come to.

        Raises:
            NeighborError: no token has as many neighbors as are asked for.
        """
        k, choice = self.largest[options], options.choice
        at, everything = self._at(options), options.exclude == "nothing"
        if layer not in self.frozen and choice in ("nearest", "radius_matched"):
            for part in parts:
                self._note_recall(layer, part)
            if not everything:
                self._note_overlap(layer, at, torch.cat([part.rows for part in parts]))
        queries, bank = self._points(options, at, None, bank_states, bare=bare)
        if choice == "radius_matched" and layer not in self.frozen:
            found = Neighbors(torch.cat([part.rows for part in parts]), torch.cat([part.distances for part in parts]))
            rows, sizes = radius_matched_sets(found, queries, bank), [len(part.rows) for part in parts]
            parts = [
                reach(self._points(options, some, states[some], bank_states, bare=bare)[0], bank, chosen, options.metric)
                for some, chosen in zip(at.split(sizes), rows.split(sizes), strict=True)
            ]
        if choice == "nearest" and not bare and len(at) and not any(bool(part.complete.any()) for part in parts):
            raise NeighborError(_nothing_to_score(options, k))
        directed = (
            has_direction(states) if options.metric == "cosine" else torch.ones(len(states), dtype=torch.bool, device=self.device)
        )
        return SearchResult(self._by_row(at, parts), at, queries, bank, directed)

    def again(
        self,
        options: SearchOptions,
        near: Neighbors,
        directed: Bool[Tensor, " rows"],
        bank_states: Float[Tensor, "bank d"],
        *,
        bare: bool,
    ) -> SearchResult:
        """What was joined before, from the neighbors by row."""
        at = self._at(options)
        queries, bank = self._points(options, at, None, bank_states, bare=bare)
        return SearchResult(near, at, queries, bank, directed)

    def _at(self, options: SearchOptions) -> Int[Tensor, " q"]:
        """Rows of the capture that are searched for."""
        asked = self.asked if options.exclude == "nothing" else self.asked & (self.capture.row_pos > 0)
        return torch.nonzero(asked).squeeze(1).to(self.device)

    def _points(
        self, options: SearchOptions, at: Int[Tensor, " q"], states: Float[Tensor, "q d"] | None, bank_states: Tensor, *, bare: bool
    ) -> tuple[Points, Points]:
        """Queries (None: without their states) and bank, as the rules see them."""
        own, other = self.groups[options.exclude]
        keys = [self._bare_key(c) for c in (self.capture, self.bank)] if bare else self.keys
        held = bank_states.new_empty(len(at), 0) if states is None else states
        queries = Points(held, keys[0][at], self.tokens[0][at], own[at], torch.ones_like(at).bool())
        bank = Points(bank_states, keys[1], self.tokens[1], other, self._pool(options).to(self.device)).under(options.metric)
        return queries, bank

    def _note_recall(self, layer: int, found: Neighbors) -> None:
        """The lowest recall of the layer's searches, of a range of rows each; of searches that find nothing there is none."""
        if found.recall is not None and found.recall == found.recall:
            known = self.facts["recall"].get(str(layer), 1.0)
            self.facts["recall"][str(layer)] = min(known, found.recall)

    def _note_overlap(self, layer: int, at: Int[Tensor, " q"], rows: Int[Tensor, "q k"]) -> None:
        """The highest shares of the layer's searches."""
        shares = overlap(self.capture, self.bank, at, rows)
        for name, share in zip(("same_position", "same_skeleton"), shares, strict=True):
            if share == share:  # NaN where nobody has neighbors
                known = self.facts[name].get(str(layer), 0.0)
                self.facts[name][str(layer)] = max(known, round(share, 4))

    def facts_of(self, layer: int) -> Facts:
        """What was noted of a layer's searches."""
        return {name: self.facts[name][str(layer)] for name in OF_LAYERS if str(layer) in self.facts[name]}

    def candidates(self, options: SearchOptions, found: SearchResult) -> Int[Tensor, " rows"]:
        """How many different points each row of the capture could have had as neighbors; 0 where none was looked for."""
        counts = torch.zeros(self.capture.n_rows, dtype=torch.int64, device=self.device)
        counts[found.at] = neighbors.count_candidates(
            found.queries, found.bank, same_token=options.same_token, distinct=options.exclude != "nothing"
        )
        return counts

    def hubness(self, rows: Int[Tensor, "rows k"]) -> Float[Tensor, " rows"]:
        """How many neighborhoods each row is in; NaN with an external bank."""
        if self.external:
            return torch.full((len(rows),), torch.nan, device=self.device)
        full = rows[rows[:, -1] >= 0]  # a query with too few neighbors has no neighborhood, so it counts for nobody
        return torch.bincount(full.flatten(), minlength=len(rows)).float()

    def _bare_key(self, capture: Capture) -> Tensor:
        """Rows with equal keys enter block 0 with equal states: the same token (at the same place, with learned positions)."""
        place = capture.row_pos if has_absolute_positions(self.model) else torch.zeros_like(capture.row_pos)
        return (capture.row_token * n_context(self.model) + place).to(self.device)

    def _by_row(self, at: Int[Tensor, " q"], parts: Sequence[Neighbors]) -> Neighbors:
        """Searches leave different rows out, so neighbors are laid out by row of the capture."""
        rows = torch.full((self.capture.n_rows, parts[0].rows.shape[1]), -1, dtype=torch.int64, device=self.device)
        distances = torch.full(rows.shape, torch.nan, dtype=torch.float32, device=self.device)
        for some, part in zip(at.split([len(part.rows) for part in parts]), parts, strict=True):
            rows[some], distances[some] = part.rows, part.distances
        return Neighbors(rows, distances)


def _nothing_to_score(options: SearchOptions, k: int) -> str:
    return (
        f"expected at least one token with {k} neighbors, got none: with exclude={options.exclude!r} and same_token="
        f'{options.same_token!r} too few distinct tokens are left. Pass bank="reference" or another capture, add texts, lower '
        "k, or "
        'choose exclude="self".'
    )
