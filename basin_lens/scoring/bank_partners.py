"""Tokens of the bank as partners of the texts' tokens, each in its own context."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from basin_lens.analyzers import Crossing, Surroundings
from basin_lens.capture import Capture
from basin_lens.model import HookedModel
from basin_lens.neighbors import Backend
from basin_lens.scoring.clouds import Clouds
from basin_lens.scoring.plan import MapPlan, SearchOptions
from basin_lens.scoring.search import Searches
from basin_lens.transport import LayerMaps, Probe

_CANDIDATES = 512  # tokens of the bank among which partners are sought


@dataclass
class BankPartners:
    """The bank's own tokens with their neighborhoods in it, found when first asked for.

    Attributes:
        model: the model that made the bank.
        bank: a capture other than the texts.
        probe: the model's recorded block arguments, for the bank.
        backend: of the searches.
        seed: of every random choice.
    """

    model: HookedModel
    bank: Capture
    probe: Probe
    backend: Backend
    seed: int
    _searches: dict[tuple[SearchOptions, int], Searches] = field(default_factory=dict)
    _maps: LayerMaps | None = None

    def clouds(
        self, layer: int, plan: MapPlan, bank: Surroundings, options: SearchOptions, k: int, crossing: Crossing, *, bare: bool
    ) -> Clouds:
        """A sample of the bank's tokens, their neighbors under the options that the texts' tokens have, and the map at them.

        A label that the bank's texts lack keeps no neighbor out: their own sequence is left out instead.
        """
        if options.exclude not in ("self", "sequence", "document") and not any(options.exclude in x for x in self.bank.labels):
            options = replace(options, exclude="sequence")
        if (options, k) not in self._searches:
            self._searches[options, k] = Searches(
                self.model, self.bank, self.bank, {options: k}, self._candidates(), self.backend, self.seed
            )
        if self._maps is None or self._maps.layer != layer:
            self._maps = LayerMaps(self.model, self.bank, self.bank, (self.probe, self.probe), layer, self.seed)
        passage = self._maps.map(plan.context, plan.blocks)
        searches = self._searches[options, k]
        found = searches.find(options, layer, passage.before, passage.bank_before, bare=bare)
        return Clouds(searches, layer, passage, bank, options, found, k, crossing)

    def _candidates(self) -> Bool[Tensor, " rows"]:
        rows = torch.nonzero(self.bank.row_pos > 0).squeeze(1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed % 2**63), device="cpu")
        chosen = torch.zeros(self.bank.n_rows, dtype=torch.bool, device="cpu")
        chosen[rows[order[:_CANDIDATES]]] = True
        return chosen
