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
from basin_lens.scoring.layer_work import LayerWork
from basin_lens.scoring.plan import Plan
from basin_lens.scoring.results import KeptNeighbors, LayerScores
from basin_lens.scoring.search import OF_LAYERS, Searches
from basin_lens.scoring.token_rows import texts_hash
from basin_lens.transport import LayerMaps, Probe
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
        compiles: blocks are to be compiled.
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
        compiles: bool = False,
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
        probe = Probe(model, int(capture.lengths.max()), compiles=compiles)
        self.probes = probe, Probe(model, int(bank.lengths.max()), compiles=compiles) if self.external else probe
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

    def work(self, layer: int) -> LayerWork:
        """The work at one layer; its block is proved."""
        lengths = {some.blocks for some in self.plan.piece(layer).maps if some.context == "patched"}
        maps = LayerMaps(self.model, self.capture, self.bank, self.probes, layer, self.plan.seed, several_paths=len(lengths) > 1)
        if self.own_states:
            maps.block(layer, patched=self.plan.patches)
        groups = self.frozen_groups.get(layer)
        return LayerWork(
            self.searches,
            self.plan.piece(layer),
            maps,
            self.keep,
            self.partners,
            self.partnered,
            None if groups is None else torch.from_numpy(groups),
        )

    def layer(self, layer: int, shards: int = 1) -> LayerScores:
        """Do all the work at one layer, one shard after the other."""
        work = self.work(layer)
        joined = [work.join(work.search(shard, shards) for shard in range(shards))]
        return work.collect(joined, [work.score(joined, shard, shards) for shard in range(shards)])

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
