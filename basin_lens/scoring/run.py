"""Runs a plan layer by layer: search once, pass once, let every analyzer look, drop the images."""

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from basin_lens.analyzers import CloudAnalyzer
from basin_lens.capture import Capture
from basin_lens.errors import CaptureError, TransportError
from basin_lens.model import HookedModel, full_name, one_side
from basin_lens.neighbors import Backend
from basin_lens.scoring.bank_partners import BankPartners
from basin_lens.scoring.crossed_pass import need_partners
from basin_lens.scoring.left_out import count_left_out
from basin_lens.scoring.map_scores import MapScores
from basin_lens.scoring.plan import MapPlan, Piece, Plan, SearchSite
from basin_lens.scoring.results import KeptNeighbors, LayerScores
from basin_lens.scoring.search import OF_LAYERS, Searches, SearchResult
from basin_lens.scoring.token_rows import texts_hash
from basin_lens.transport import BlockMap, LayerMaps, Probe
from basin_lens.values import Facts


class Run:
    """The part of a plan that looks at neighbors, on one capture and one bank.

    Args:
        model: the model that made both captures.
        capture: the texts.
        bank: where neighbors come from; the capture itself, if the texts are their own bank.
        plan: what to measure.
        asked: rows to score.
        backend: see `basin_lens.neighbors.find`.
        frozen: another run's neighbors on the same texts and layers, taken as they are.
        keep: the analyzer whose neighbors are kept.

    Raises:
        CaptureError: layers that a map of several blocks needs and a capture does not hold.
        NeighborError: options under which no token has neighbors.
        TransportError: texts on both sides of a length at which the model changes its rotary table.
    """

    def __init__(
        self,
        model: HookedModel,
        capture: Capture,
        bank: Capture,
        plan: Plan,
        asked: Bool[Tensor, " rows"],
        *,
        backend: Backend = "auto",
        frozen: KeptNeighbors | None = None,
        keep: CloudAnalyzer | None = None,
    ) -> None:
        self.model, self.capture, self.bank, self.plan, self.keep = model, capture, bank, plan, keep
        self.external = bank is not capture
        self._refuse_missing_layers()
        self.partnered = need_partners(capture, bank, plan, asked)
        self.searches = Searches(model, capture, bank, plan.largest_k, asked, backend, plan.seed)
        self.frozen_groups: dict[int, np.ndarray | None] = {}
        if frozen is not None:
            self.searches.frozen = {layer: torch.from_numpy(frozen.rows[index]) for index, layer in enumerate(plan.layers)}
            self.frozen_groups = dict(zip(plan.layers, frozen.groups, strict=True))
        self.own_states = capture.states_of_model
        self._refuse_two_tables()
        probe = Probe(model, int(capture.lengths.max()))
        self.probes = probe, Probe(model, int(bank.lengths.max())) if self.external else probe
        self.partners = BankPartners(model, bank, self.probes[1], backend, plan.seed) if self.partnered else None

    def facts(self) -> Facts:
        """What provenance says of the bank and of the searches; what each layer has of its own comes with its scores."""
        bank = {
            "source": "another capture" if self.external else "the texts themselves",
            "points": int((self.bank.row_pos > 0).sum()),
            "sequences": len(self.bank.sequences),
            "texts": texts_hash(self.bank),
        }
        return {"bank": bank, "search": {**self.searches.facts, **{name: {} for name in OF_LAYERS}}}

    def layer(self, layer: int) -> LayerScores:
        """Do the piece of work of one layer."""
        piece = self.plan.piece(layer)
        lengths = {some.blocks for some in piece.maps if some.context == "patched"}
        maps = LayerMaps(self.model, self.capture, self.bank, self.probes, layer, self.plan.seed, several_paths=len(lengths) > 1)
        if self.own_states:
            maps.block(layer, patched=self.plan.patches)
        scores = self._too_few_blocks(piece)
        found: dict[SearchSite, SearchResult] = {}
        for some in piece.maps:
            passage = maps.map(some.context, some.blocks)
            self._search(layer, some, passage, found)
            groups = self.frozen_groups.get(layer)
            done = MapScores(
                self.searches,
                layer,
                some,
                passage,
                found,
                self.keep,
                partners=self.partners,
                partnered=self.partnered,
                groups=None if groups is None else torch.from_numpy(groups).to(self.searches.device),
            )
            scores.values.update({name: answer.numpy() for name, answer in done.answers.items()})
            scores.reliability.update(done.reliability())
            scores.reference_error.update(done.reference_error())
            scores.left_out.update(done.left_out())
            for name, facts in (("groups", done.groups), ("random_contraction", done.random_contraction())):
                if facts:
                    scores.facts.setdefault(name, {}).update(facts)
            if done.neighbors is not None:
                scores.neighbors = done.neighbors
        scores.facts.update(_facts_of(maps))
        scores.search.update(self.searches.facts_of(layer))
        return scores

    def _search(self, layer: int, plan: MapPlan, passage: BlockMap, found: dict[SearchSite, SearchResult]) -> None:
        """Search for the neighbors that the analyzers of a map need and that no map before it has searched for."""
        for a in plan.analyzers:
            site = SearchSite.before(a)
            if site not in found:
                bare = layer == 0 and site.place == "pre"
                found[site] = self.searches.find(site.options, layer, passage.before, passage.bank_before, bare=bare)
            site = SearchSite.behind(a)
            if "output_neighbors" in a.needs and site not in found:
                found[site] = self.searches.find(site.options, layer, passage.after, passage.bank_after)

    def _too_few_blocks(self, piece: Piece) -> LayerScores:
        """Scores of a layer with nothing but NaN, for the analyzers whose maps would end beyond the last block."""
        scores = LayerScores(piece.layer)
        for a in piece.beyond_the_last_block:
            missing = {c.name: torch.full((self.capture.n_rows,), torch.nan, device="cpu") for c in a.columns}
            scores.values.update({name: np.full(self.capture.n_rows, np.nan, np.float32) for name in missing})
            scores.left_out.update(count_left_out(a, missing, self.capture, self.searches.asked, complete=None))
        return scores

    def _refuse_two_tables(self) -> None:
        """A block is called with one rotary table, that of the longest sequence."""
        called = self.partnered or any(a.context in ("attn", "mlp") for a in self.plan.of_neighbors)
        for name, source in (("capture", self.capture), *([("bank", self.bank)] if called else [])):
            lengths = source.lengths.tolist()
            boundary = one_side(self.model, lengths)
            if boundary is not None and self.own_states:
                raise TransportError(
                    f"expected sequences on one side of {boundary} tokens in the {name}, got {min(lengths)} to {max(lengths)}: "
                    "beyond its original "
                    f'context, {full_name(self.model)} has another rotary table (rope_type "longrope"), and a block is called '
                    f"with one. Analyze the texts of up to {boundary} tokens and the longer ones apart (max_length={boundary} cuts "
                    "them)."
                )

    def _refuse_missing_layers(self) -> None:
        """A path of several blocks reads the states at each of them."""
        for name, source in (("capture", self.capture), ("bank", self.bank)):
            if missing := sorted(self.plan.layers_needed - set(source.layers)):
                raise CaptureError(
                    f"expected a {name} that holds layers {missing} too (blocks={self.plan.most_blocks}), got one with "
                    f"{list(source.layers)}. Capture again with layers=[...]."
                )


def _facts_of(maps: LayerMaps) -> Facts:
    """What provenance says of the maps at a layer."""
    layer = maps.layer
    facts: Facts = {"check_error": maps.errors.get(layer), "routes": maps.routes.get(layer, "native")}
    if layer in maps.reasons:
        facts["route_reasons"] = maps.reasons[layer]
    if maps.fits:
        facts["affine_fit"] = {
            str(blocks): {"held_out_r2": fit.held_out_r2, "ridge": fit.ridge} for blocks, fit in maps.fits.items()
        }
    return facts
