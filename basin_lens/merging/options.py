"""What a `TokenMerger` can be asked for."""

import math
from dataclasses import dataclass
from typing import Any

from basin_lens.errors import MergeError
from basin_lens.merging.assign import RULES
from basin_lens.values import Whole, whole_fields, whole_or_none

# The latest layers bear most: which share of depth is early, which middle, and how strictly each merges.
_STRICT = ((0.3, 0.5), (0.7, 1.0), (1.0, 1.5))
_CHOICES = {
    "rule": (*RULES, "key_norm"), "representative": ("leader", "mean"), "residual": ("none", "gated"),
    "preserve": ("none", "norm", "surprisal"),
}  # fmt: skip
# Of these rules, the level is a cosine that can be learned.
LEARNED = ("cosine", "adjacent")


@dataclass(frozen=True)
class Options:
    """Options of a `TokenMerger`; see there."""

    layers: tuple[int, ...]
    threshold: float | None = None
    target_rate: float | None = None
    target_bytes: float | None = None
    rule: str = "cosine"
    drop: bool = False
    representative: str = "leader"
    adaptive: bool = False
    progressive: bool = False
    attention_weight: float = 0.0
    projection: Whole | None = None
    residual: str = "none"
    residual_width: Whole = 8
    preserve: str = "none"
    preserve_share: float = 0.05
    contrastive_weight: float = 0.0
    margin: float = 0.5
    recent: Whole = 8
    floor: float = 0.0
    temperature: float = 0.05
    simulate: bool = False
    seed: Whole = 0

    def __post_init__(self) -> None:
        whole_fields(self, MergeError)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise MergeError(f"expected {name} among {', '.join(known)}, got {getattr(self, name)!r}.")
        given = [n for n in ("threshold", "target_rate", "target_bytes") if getattr(self, n) is not None]
        if self.rule != "all" and len(given) != 1:
            raise MergeError(f"expected one of threshold, target_rate and target_bytes, got {given or 'none'}. Give one.")
        layers = self.layers
        for name in ("recent", "residual_width", "projection", "seed"):
            self._need(getattr(self, name) is None or whole_or_none(getattr(self, name)) is not None, name, "a whole number")
        self._need(all(whole_or_none(layer) is not None for layer in layers), "layers", "distinct numbers from 0 on")
        self._need(self.seed >= 0, "seed", "0 or more")
        self._need(0 <= self.contrastive_weight < math.inf, "contrastive_weight", "a number from 0 on")
        self._need(-1 <= self.margin <= 1, "margin", "a cosine from -1 to 1")
        self._need(bool(layers) and len(set(layers)) == len(layers) and min(layers) >= 0, "layers", "distinct numbers from 0 on")
        for name in ("target_rate", "target_bytes", "preserve_share"):
            value = getattr(self, name)
            self._need(value is None or 0 < value < 1, name, "a share between 0 and 1")
        self._need(self.recent >= 1, "recent", "a window of 1 token or more, for a query reads itself")
        self._need(0 <= self.attention_weight <= 1, "attention_weight", "a share from 0 to 1")
        self._need(-1 <= self.floor < 1, "floor", "a cosine from -1 to below 1")
        self._need(
            self.threshold is None or self.threshold >= self.floor, "threshold", f"a number not below the floor {self.floor}"
        )
        self._need(self.temperature > 0, "temperature", "a number above 0")
        self._need(self.projection is None or self.projection >= 1, "projection", "a width of 1 or more")
        self._need(self.residual_width >= 1, "residual_width", "a width of 1 or more")
        self._need(self.contrastive_weight == 0 or self.projection is not None, "contrastive_weight",
                   "0 without a projection: states of a frozen model have no gradient")  # fmt: skip
        for one, other in (
            (self.residual == "gated", self.representative == "mean"), (self.residual == "gated", self.drop),
            (self.simulate, self.drop), (self.simulate, self.residual == "gated"), (self.simulate, self.attention_weight > 0),
            (self.rule == "all", not self.drop), (self.rule == "key_norm", not self.drop),
            (self.contrastive_weight > 0, not self.compares), (self.simulate, self.rule == "bipartite"),
            (self.simulate, self.target_bytes is not None), (self.progressive, self.scored and self.threshold is not None),
            (self.adaptive, self.rule not in LEARNED), (self.attention_weight > 0, self.rule not in ("cosine", "score")),
        ):  # fmt: skip
            if one and other:
                raise MergeError(f"expected options that go together, got {self}. See the docstring of TokenMerger.")

    def _need(self, met: bool, name: str, what: str) -> None:
        if not met:
            raise MergeError(f"expected {name} to be {what}, got {getattr(self, name)!r}.")

    @property
    def compares(self) -> bool:
        """Whether tokens are compared at all, so that descriptors have to be kept."""
        return self.rule in ("cosine", "adjacent", "bipartite") or (self.rule == "score" and not self.drop)

    @property
    def scored(self) -> bool:
        """Whether tokens are chosen by a score, not by what they are compared with."""
        return self.rule in ("score", "key_norm")

    @property
    def learned(self) -> bool:
        """Whether the level is a threshold that can be learned."""
        return self.rule in LEARNED

    def strictness(self, layer: int, n_layers: int) -> float:
        """Factor of the rate in this layer; 1 unless progressive."""
        if not self.progressive:
            return 1.0
        return next(factor for depth, factor in _STRICT if layer / n_layers < depth)

    def rates(self, rate: float, n_layers: int, most: float = 1.0, *, strict: bool = True) -> dict[int, float]:
        """Share of the tokens to merge in each layer, `rate` on average, none above `most`; not `strict`: as near as that allows.

        Raises:
            MergeError: not reachable.
        """
        if not 0 <= rate <= most and strict:
            raise MergeError(
                f"expected a target that can be met, got one that needs {rate:.3f} of the tokens of each layer merged, of 0 to {most:.3f} "
                f"that can be. "
                "Ask for less, merge in more layers, or shorten the recent window."
            )
        rate = min(max(rate, 0.0), most)
        factors = {layer: self.strictness(layer, n_layers) for layer in self.layers}
        mean = sum(factors.values()) / len(factors)
        rates = {layer: min(most, rate * factor / mean) for layer, factor in factors.items()}
        # What a layer at its limit cannot take, the others must.
        for _ in range(20):
            missing = rate * len(rates) - sum(rates.values())
            open_ = [layer for layer, value in rates.items() if value < most]
            if missing < 1e-9 or not open_:
                break
            for layer in open_:
                rates[layer] = min(most, rates[layer] + missing / len(open_))
        return rates

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
