"""What one forward pass must collect, as data: the same for every batch, made before the model runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from basin_lens.capture.batches import NO_POINTS, TokenMeasure, layers_of
from basin_lens.capture.passes import Target

_BEHIND_THE_PASS = frozenset({"logits", "gradient", "passes"})  # needs that are there only when the pass is over
_STATES = frozenset({"resid_pre", "resid_post"})


@dataclass(frozen=True)
class PassSchedule:
    """What to collect in one pass over a batch, and in one backward pass for each different target of gradients.

    Attributes:
        n_layers: blocks of the model.
        layers: layers that are asked for, ascending.
        borders: block borders whose states are kept.
        analyzers: token analyzers to fill.
    """

    n_layers: int
    layers: tuple[int, ...]
    borders: tuple[int, ...]
    analyzers: tuple[TokenMeasure, ...]

    @cached_property
    def at_layer(self) -> tuple[TokenMeasure, ...]:
        """Analyzers of states, patterns and other hook points: they run during the pass, when the state leaves the block."""
        return tuple(a for a in self.analyzers if a.per_layer and not a.needs & _BEHIND_THE_PASS)

    @cached_property
    def of_gradients(self) -> tuple[TokenMeasure, ...]:
        """Analyzers that need a gradient: they run after the backward pass of their target."""
        return tuple(a for a in self.analyzers if "gradient" in a.needs)

    @cached_property
    def at_end(self) -> tuple[TokenMeasure, ...]:
        """Analyzers of logits, analyzers that make passes of their own, and those that measure once: they run last."""
        return tuple(a for a in self.analyzers if a not in self.at_layer and a not in self.of_gradients)

    @cached_property
    def looks(self) -> dict[str, Sequence[int]]:
        """Layers at which each analyzer looks, by its key."""
        return {a.key: layers_of(a, self.layers) for a in self.analyzers}

    @cached_property
    def visited(self) -> tuple[int, ...]:
        """Layers around which states are read, ascending."""
        return tuple(sorted({*self.layers, *(layer for look in self.looks.values() for layer in look)}))

    @cached_property
    def read_borders(self) -> tuple[int, ...]:
        """Block borders at which a state is read: around every visited layer."""
        return tuple(sorted({border for layer in self.visited for border in (layer, layer + 1)}))

    @cached_property
    def read_points(self) -> tuple[tuple[str, int], ...]:
        """Hook points within blocks, each with its layer."""
        points = sorted({need for a in self.analyzers for need in a.needs} - NO_POINTS - _STATES)
        return tuple((need, layer) for layer in self.visited for need in points if self.wants(need, layer, self.analyzers))

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """What gradients are taken of, each with a backward pass of its own."""
        return tuple(dict.fromkeys(a.target for a in self.of_gradients if a.target is not None))

    @cached_property
    def needs_logits(self) -> bool:
        """Whether an analyzer reads the logits."""
        return any("logits" in a.needs for a in self.analyzers)

    @cached_property
    def ends_early(self) -> bool:
        """Whether the pass may end at the last border that is read: nobody asks for logits, or for gradients of them."""
        return not self.needs_logits and not self.of_gradients

    def wants(self, need: str, layer: int, among: Sequence[TokenMeasure]) -> bool:
        """Whether one of these analyzers needs this at this layer."""
        return any(need in a.needs and layer in self.looks[a.key] for a in among)

    def wanted_later(self, need: str, layer: int) -> bool:
        """Whether an analyzer needs this at this layer after the state has left the block."""
        return self.wants(need, layer, (*self.of_gradients, *self.at_end))
