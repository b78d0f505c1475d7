"""What a merger learns or is calibrated to, for one model: thresholds, projection, residual, and the statistics that they rest
on.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from basin_lens.errors import MergeError
from basin_lens.merging.options import Options
from basin_lens.model import (
    HookedModel,
    check_model,
    device_of,
    full_name,
    kv_shape,
    missing_points,
    n_layers,
    obeys_pattern,
    parameters_of,
)
from basin_lens.model import width as width_of

# Of `context_statistics`: what an adaptive threshold may know of a token.
N_FEATURES = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of the model that a merger works in.

    Attributes:
        n_layers: all of them.
        width: numbers of a state.
        kv: key/value heads.
        d_head: numbers of a key.
        element_bytes: of a number in the key/value cache.
        device: where the model is.
    """

    n_layers: int
    width: int
    kv: int
    d_head: int
    element_bytes: int
    device: torch.device

    @property
    def row_bytes(self) -> int:
        """A key and a value of one token in one layer."""
        return 2 * self.kv * self.d_head * self.element_bytes


def shape_of(model: HookedModel) -> Shape:
    """The sizes of a model."""
    kv, d_head = kv_shape(model)
    element_bytes = next(iter(parameters_of(model).values())).element_size()
    return Shape(n_layers(model), width_of(model), kv, d_head, element_bytes, device_of(model))


def check_able(model: HookedModel, options: Options) -> None:
    """Refuse a model in which such a merger cannot work.

    Raises:
        ModelError: no model that can be hooked. MergeError: layers or points it does not have, or attention that does not obey its
            pattern.
    """
    check_model(model)
    layers, n = options.layers, n_layers(model)
    if max(layers) >= n:
        raise MergeError(f"expected layers below {n}, got {max(layers)}.")
    points = {"resid_pre", "pattern"} | ({"v", "z"} if options.residual == "gated" else set())
    points |= {"k"} if options.decision.needs_keys else set()
    if missing := missing_points(model, points, list(layers)):
        raise MergeError(f"expected the hook points of merging, got a model without {missing[0]}.")
    if not obeys_pattern(model, layers[0]):
        raise MergeError(
            f"expected attention that reads the pattern that a hook returns, got {full_name(model)}, which goes past it. Use "
            "another model."
        )
    if options.projection is not None and options.compares and options.projection > width_of(model):
        raise MergeError(
            f"expected a projection of at most {width_of(model)} numbers (the model's width), got {options.projection}."
        )


class Parameters(nn.Module):
    """Tensors of a `TokenMerger`, one row for each layer that merges.

    Learned: `raw` (thresholds), `slope` (what moves them), `head` (projection), `down`, `up` and `gate` (residual). Calibrated: the
        others.

    Args:
        options: of the merger.
        shape: of its model.
    """

    center: Tensor
    levels: Tensor
    norm_cutoff: Tensor
    surprisal_cutoff: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    offset: Tensor

    @torch.inference_mode(False)  # written to later, whatever mode the caller is in
    def __init__(self, options: Options, shape: Shape) -> None:
        super().__init__()
        self.options, self.shape = options, shape
        count, device = len(options.layers), shape.device
        draw = torch.Generator(device="cpu").manual_seed(options.seed)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, device=device)

        self.register_buffer("center", zeros(count, shape.width))
        self.register_buffer("levels", zeros(count))
        self.register_buffer("norm_cutoff", torch.full((count,), math.inf, device=device))
        self.register_buffer("surprisal_cutoff", torch.full((), math.inf, device=device))
        self.register_buffer("feature_mean", zeros(count, N_FEATURES))
        self.register_buffer("feature_scale", torch.ones(count, N_FEATURES, device=device))
        self.register_buffer("offset", zeros())
        self.raw = nn.Parameter(zeros(count))
        self.slope = nn.Parameter(zeros(count, N_FEATURES)) if options.adaptive else None
        self.head: nn.Parameter | None = None
        if options.projection is not None and options.compares:
            square = torch.linalg.qr(torch.randn(count, shape.width, options.projection, generator=draw)).Q
            self.head = nn.Parameter(square.transpose(1, 2).contiguous().to(device))
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        self.gate: nn.Parameter | None = None
        if options.residual == "gated":
            flat = shape.kv * shape.d_head
            basis = torch.linalg.qr(torch.randn(count, flat, min(options.residual_width, flat), generator=draw)).Q.to(device)
            self.down = nn.Parameter(basis.transpose(1, 2).contiguous())
            self.up = nn.Parameter(basis.contiguous())
            self.gate = nn.Parameter(zeros(count))  # sigmoid of it: half open
        self._begin()

    def _begin(self) -> None:
        """Put the levels that the option `threshold` asks for."""
        o, rule = self.options, self.options.decision
        if o.threshold is None:
            return
        for index, layer in enumerate(o.layers):
            factor = o.strictness(layer, self.shape.n_layers)
            if rule.learned:
                # Half as eager: half-way to 1; half again as eager: as much below.
                level = o.threshold if o.threshold >= 1 else 1 - (1 - o.threshold) * factor
                self.set_level(index, max(level, o.floor))
            else:
                # Of other rules the level is a share of the tokens, but a score has no factor.
                self.set_level(index, o.threshold if rule.scored else min(o.threshold * factor, 1.0))

    @property
    def compared_width(self) -> int:
        """Numbers that a token is compared by."""
        if not self.options.compares:
            return 0
        return self.center.shape[1] if self.head is None else self.head.shape[1]

    def set_level(self, index: int, level: float) -> None:
        """Put the threshold (or the rule's level) of the merger's layer number `index`."""
        with torch.no_grad():
            self.levels[index] = level
            if self.options.decision.learned:
                inside = (level - self.options.floor) / (1 - self.options.floor)
                self.raw[index] = math.inf if level >= 1 else math.log(max(inside, 1e-6) / max(1 - inside, 1e-6))

    def level_of(self, index: int, features: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows"]:
        """The threshold that each token is held to; between floor and 1, moved towards 1 by the parachute's offset."""
        if not self.options.decision.learned:
            return self.levels[index].expand(features.shape[:-1])
        raw = self.raw[index].expand(features.shape[:-1])
        if self.slope is not None:
            scaled = (features.float() - self.feature_mean[index]) / self.feature_scale[index]
            raw = raw + scaled @ self.slope[index]
        level = self.options.floor + (1 - self.options.floor) * torch.sigmoid(raw)
        return level + self.offset * (1 - level)

    def describe(self, index: int, states: Float[Tensor, "*rows d"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "*rows"]]:
        """Unit descriptor of each state, rounded to float16 as it would be stored, and the norm of the centered state."""
        centered = states - self.center[index].to(states.dtype)
        norms = centered.detach().norm(dim=-1)
        if not self.options.compares:
            return centered.new_zeros(*centered.shape[:-1], 0), norms  # a view would keep all of it
        compared = centered if self.head is None else centered @ self.head[index].to(states.dtype).T
        unit = compared / compared.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        rounded = unit.half().to(states.dtype)
        # The gradient goes past the rounding, which would lose what float16 cannot hold.
        return unit + (rounded - unit).detach() if unit.requires_grad else rounded, norms

    def shrink_residual(self, index: int, change: Float[Tensor, "*rows flat"]) -> Float[Tensor, "*rows q"]:
        """What a cluster keeps of the difference between a member's values and its leader's."""
        assert self.down is not None
        return change @ self.down[index].to(change.dtype).T

    def expand_residual(self, index: int, kept: Float[Tensor, "*rows q"]) -> Float[Tensor, "*rows flat"]:
        """What is read of it."""
        assert self.up is not None and self.gate is not None
        return torch.sigmoid(self.gate[index]).to(kept.dtype) * (kept @ self.up[index].to(kept.dtype).T)

    def cache_bytes(
        self, rows: int, clusters: int, waiting: int, length: int = 0, *, numbers: int | None = None, closed: bool = False
    ) -> int:
        """Bytes that one sequence needs in one layer.

        Args:
            rows: keys and values, each with its place (4 bytes).
            clusters: of them, those that tokens may join: leader and size (8 bytes), descriptor (float16), residual (float32).
            waiting: tokens in the recent window: descriptors (float16).
            length: of the sequence, for attention rows (float32).
            numbers: in all attention rows that are kept, if that is known better.
            closed: no token will be compared any more, so all that serves comparing can go.
        """
        o, width = self.options, self.compared_width
        held = rows * (self.shape.row_bytes + 4) + clusters * (8 + (0 if self.down is None else 4 * self.down.shape[1]))
        if closed:
            return held
        described = (min(clusters, 1) if o.decision.last_only else clusters) + waiting
        # A row is as long as its token's past: half the sequence, on average.
        numbers = (clusters + waiting) * length // 2 if numbers is None else numbers
        # What the adaptive threshold remembers: sum and last of the descriptors.
        carry = width * 8 if o.adaptive else 0
        return held + described * width * 2 + (4 * numbers if o.attention_weight else 0) + carry


@contextmanager
def frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that need no gradient meanwhile."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
