"""What a `TokenMerger` can be asked for."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import SupportsIndex

from basin_lens.errors import MergeError
from basin_lens.merging.policies import Decision, rule_named
from basin_lens.values import Facts, Whole, several, whole, whole_fields, whole_or_none

# The latest layers bear most: which share of depth is early, which middle, and how strictly each merges.
_STRICT = ((0.3, 0.5), (0.7, 1.0), (1.0, 1.5))
_CHOICES = {
    "representative": ("leader", "mean"),
    "residual": ("none", "gated"),
    "preserve": ("none", "norm", "surprisal"),
}


@dataclass(frozen=True)
class Options:
    """Options of a `TokenMerger`. The texts beside the fields are those of the command line.

    Attributes:
        layers: where to merge.
        threshold: similarity from which a token joins, `floor` to 1; from 1 on nothing is merged. Or
        target_rate: share of the tokens to merge in these layers, on average. Or
        target_bytes: share of the full key/value cache to be left, all layers counted. Both targets need `calibrate`.
        rule: who joins whom: see `basin_lens.merging.RULES`. All but "cosine" are baselines.
        drop: tokens that would join are forgotten instead.
        representative: `"leader"` (the first member) or `"mean"` (running mean of the values; keys stay the leader's).
        adaptive: the threshold moves with what came before the token (place, norm, novelty), by learned weights.
        progressive: merge less in early layers (depth below 0.3: half), more in late ones (from 0.7: one and a half times).
        attention_weight: share of the attention rows in the similarity, 0 to 1. The rows have to be kept, and are counted.
        projection: width to which states are projected before they are compared (principal directions until trained); None: not at
            all.
        residual: `"gated"`: a cluster keeps the mean difference of its members' values from its leader's, in `residual_width`
            numbers.
        residual_width: see above.
        preserve: `"norm"` or `"surprisal"`: tokens above the calibrated quantile are never merged. Surprisal (of the plain model)
            must be given to `attached`.
        preserve_share: share of tokens above it.
        contrastive_weight: in training, of the hinge on the cosine between clusters of one sequence.
        margin: cosine from which it acts.
        recent: tokens that stay raw behind the current one, itself counted; of no effect with `simulate`.
        floor: lowest threshold.
        temperature: of the soft mask that training goes by.
        simulate: overwrite the states of merged tokens with their representative's instead, as soon as they come, in a stream that
            keeps its length: saves no memory.
        seed: of random merging.

    Raises:
        MergeError: options that do not fit.
    """

    layers: tuple[int, ...]
    threshold: float | None = field(default=None, metadata={"help": "Cosine to begin from, in place of a target."})
    target_rate: float | None = field(default=None, metadata={"help": "Share of the tokens to merge, on average."})
    target_bytes: float | None = field(default=None, metadata={"help": "Share of the cache to be left."})
    rule: str = "cosine"
    drop: bool = False
    representative: str = field(default="leader", metadata={"help": "leader or mean."})
    adaptive: bool = field(default=False, metadata={"help": "Thresholds that move with what came before."})
    progressive: bool = field(default=False, metadata={"help": "Merge less in early layers, more in late ones."})
    attention_weight: float = field(default=0.0, metadata={"help": "Share of attention rows in the similarity."})
    projection: Whole | None = field(default=None, metadata={"help": "Numbers that a token is compared by."})
    residual: str = field(default="none", metadata={"help": "none or gated."})
    residual_width: Whole = field(default=8, metadata={"help": "Numbers that a cluster's residual is kept in."})
    preserve: str = field(
        default="none", metadata={"help": "none, norm, or surprisal (takes the plain model beside, so no generate)."}
    )
    preserve_share: float = field(default=0.05, metadata={"help": "Share of the tokens that is preserved."})
    contrastive_weight: float = field(default=0.0, metadata={"help": "Of the hinge between clusters."})
    margin: float = field(default=0.5, metadata={"help": "Cosine between clusters from which the hinge acts."})
    recent: Whole = field(default=8, metadata={"help": "Tokens that stay raw behind the current one."})
    floor: float = field(default=0.0, metadata={"help": "Lowest threshold."})
    temperature: float = 0.05
    simulate: bool = False
    seed: Whole = 0

    def __post_init__(self) -> None:
        whole_fields(self, MergeError)
        rule = rule_named(self.rule)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise MergeError(f"expected {name} among {', '.join(known)}, got {getattr(self, name)!r}.")
        given = [n for n in ("threshold", "target_rate", "target_bytes") if getattr(self, n) is not None]
        if rule.has_level and len(given) != 1:
            raise MergeError(f"expected one of threshold, target_rate and target_bytes, got {given or 'none'}. Give one.")
        for name in ("recent", "residual_width", "projection", "seed"):
            self._need(getattr(self, name) is None or whole_or_none(getattr(self, name)) is not None, name, "a whole number")
        for met, name, what in self._bounds():
            self._need(met, name, what)
        if any(one and other for one, other in self._excluded(rule)):
            raise MergeError(f"expected options that go together, got {self}. See the docstring of merging.Options.")

    def _need(self, met: bool, name: str, what: str) -> None:
        if not met:
            raise MergeError(f"expected {name} to be {what}, got {getattr(self, name)!r}.")

    def _bounds(self) -> Iterator[tuple[bool, str, str]]:
        """Whether each option is what it has to be, one after another: a later one may be taken for granted by those before it."""
        layers = self.layers
        yield all(whole_or_none(layer) is not None for layer in layers), "layers", "distinct numbers from 0 on"
        yield self.seed >= 0, "seed", "0 or more"
        yield 0 <= self.contrastive_weight < math.inf, "contrastive_weight", "a number from 0 on"
        yield -1 <= self.margin <= 1, "margin", "a cosine from -1 to 1"
        yield bool(layers) and len(set(layers)) == len(layers) and min(layers) >= 0, "layers", "distinct numbers from 0 on"
        for name in ("target_rate", "target_bytes", "preserve_share"):
            value = getattr(self, name)
            yield value is None or 0 < value < 1, name, "a share between 0 and 1"
        yield self.recent >= 1, "recent", "a window of 1 token or more, for a query reads itself"
        yield 0 <= self.attention_weight <= 1, "attention_weight", "a share from 0 to 1"
        yield -1 <= self.floor < 1, "floor", "a cosine from -1 to below 1"
        reached = self.threshold is None or self.threshold >= self.floor
        yield reached, "threshold", f"a number not below the floor {self.floor}"
        yield self.temperature > 0, "temperature", "a number above 0"
        yield self.projection is None or self.projection >= 1, "projection", "a width of 1 or more"
        yield self.residual_width >= 1, "residual_width", "a width of 1 or more"
        moved = self.contrastive_weight == 0 or self.projection is not None
        yield moved, "contrastive_weight", "0 without a projection: states of a frozen model have no gradient"

    def _excluded(self, rule: Decision) -> Iterator[tuple[bool, bool]]:
        """Pairs of which one at most may hold."""
        yield self.residual == "gated", self.representative == "mean"
        yield self.residual == "gated", self.drop
        yield self.simulate, self.drop
        yield self.simulate, self.residual == "gated"
        yield self.simulate, self.attention_weight > 0
        yield self.simulate, rule.sees_future
        yield self.simulate, self.target_bytes is not None
        yield rule.drops, not self.drop
        yield self.contrastive_weight > 0, not self.compares
        yield self.progressive, rule.scored and self.threshold is not None
        yield self.adaptive, not rule.learned
        yield self.attention_weight > 0, not rule.takes_rows

    @property
    def decision(self) -> Decision:
        """The rule by its name: who joins whom."""
        return rule_named(self.rule)

    @property
    def compares(self) -> bool:
        """Whether tokens are compared at all, so that descriptors have to be kept."""
        rule = self.decision
        return rule.compares and not (rule.scored and self.drop)

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
                f"expected a target that can be met, got one that needs {rate:.3f} of the tokens of each layer merged, of 0 to "
                f"{most:.3f} that can be. Ask for less, merge in more layers, or shorten the recent window."
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

    def plain(self) -> Facts:
        """As JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def options_of(layers: Iterable[object] | SupportsIndex, given: Facts) -> Options:
    """Options by their names, as a caller or a record gives them.

    Raises:
        MergeError: a name that no option has, or options that do not fit.
    """
    try:
        chosen = several(layers)
        if chosen is None:
            raise MergeError(f"expected a layer or a list of layers, got {layers!r}. Give whole numbers.")
        return Options(layers=tuple(sorted(whole(n, "layers", error=MergeError) for n in chosen)), **given)
    except TypeError as error:
        raise MergeError(f"expected options of TokenMerger, got another: {error}. See merging.Options.") from error
