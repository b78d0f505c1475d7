"""The maps that analyzers look through: states before and after, and how bank rows and any other states pass.

`patched`  the neighbor's state at the query's place, in the query's context, through one block or several
`native`   the neighbor's own cached output
`solo`     the state alone, at position 0
`attn`     patched, `resid_pre` -> `resid_mid`
`mlp`      `resid_mid` -> `resid_post`: no context enters, so the neighbor's own output is its image
`affine`   a global affine fit of the block: the linear null
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.capture import Capture
from basin_lens.errors import CaptureError, TransportError
from basin_lens.model import HookedModel, call_block, device_of, feed_forward, measuring, missing_points, n_layers
from basin_lens.transport.affine import AffineFit, affine_fit
from basin_lens.transport.patched import PatchedBlock
from basin_lens.transport.probe import Probe
from basin_lens.transport.proof import Proof, check_halves, prove

Context = Literal["patched", "native", "solo", "attn", "mlp", "affine"]
CONTEXTS: tuple[Context, ...] = ("patched", "native", "solo", "attn", "mlp", "affine")
_KEPT_BYTES = 1 << 29
_SOLO_ROWS = 1024  # states in one call, each a sequence of one token


@dataclass(frozen=True)
class BlockMap:
    """One map, on the states of the queries and of the bank.

    `before`, `after`: states of the capture's rows that enter the map, and those behind it; `bank_before`, `bank_after`: the
    bank's.
    `of_rows(queries [q], rows [q, m]) -> [q, m, d]`: images of bank rows for each query, zero where the row is -1.
    `of_points(queries [q], points [q, m, d]) -> [q, m, d]`: images of any states.
    """

    context: Context
    before: Float[Tensor, "rows d"]
    after: Float[Tensor, "rows d"]
    bank_before: Float[Tensor, "bank d"]
    bank_after: Float[Tensor, "bank d"]
    of_rows: Callable[[Tensor, Tensor], Tensor]
    of_points: Callable[[Tensor, Tensor], Tensor]


class LayerMaps:
    """All maps at one layer of a capture and its bank. States are loaded, and routes proved, when first asked for.

    Args:
        model: the model that made both captures.
        capture, bank: the queries and where neighbors come from (the same object, if the texts are their own bank).
        probes: the model's recorded block arguments, for the capture and for the bank.
        layer: the first block.
        seed: of the check's random tokens.
        several_paths: paths of several lengths are to be asked for with the same states; a longer one then goes on from a shorter.
    """

    def __init__(
        self,
        model: HookedModel,
        capture: Capture,
        bank: Capture,
        probes: tuple[Probe, Probe],
        layer: int,
        seed: int = 0,
        *,
        several_paths: bool = False,
    ) -> None:
        self.several_paths = several_paths
        self.model, self.capture, self.bank, self.probes, self.layer, self.seed = model, capture, bank, probes, layer, seed
        self.device = device_of(model)
        self.errors: dict[int, float] = {}
        self.routes: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.compiled: dict[int, bool | str] = {}
        self.fits: dict[int, AffineFit] = {}
        self._borders: dict[int, tuple[Tensor, Tensor]] = {}
        self._blocks: dict[int, PatchedBlock] = {}
        self._mids: tuple[Tensor, Tensor, PatchedBlock] | None = None
        self._on_the_way = OnTheWay()

    def border(self, layer: int) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "bank d"]]:
        """States that enter block `layer` (leave the one before it), of the capture and of the bank."""
        if layer not in self._borders:
            read = (lambda c: c.resid_pre(layer)) if layer < n_layers(self.model) else (lambda c: c.resid_post(layer - 1))
            own = read(self.capture).to(self.device)
            self._borders[layer] = own, own if self.bank is self.capture else read(self.bank).to(self.device)
        return self._borders[layer]

    def block(self, layer: int, *, patched: bool = True) -> PatchedBlock:
        """Block `layer` as a map, checked. With `patched=False`, only that it reproduces the captured states is checked."""
        known = self._blocks.get(layer)
        if known is None or (patched and layer not in self.routes):
            (pre, bank_pre), (post, _) = self.border(layer), self.border(layer + 1)
            proof = self._prove(layer, pre, post, bank_pre, patched=patched)
            self._blocks[layer], self.errors[layer] = proof.block, proof.error
            if patched:
                self.routes[layer] = proof.block.route
                if proof.reason:
                    self.reasons[layer] = proof.reason
                if self.probes[0].compiles:
                    self.compiled[layer] = proof.uncompiled or True
                    if proof.uncompiled:
                        self.probes[0].say_uncompiled(layer, proof.uncompiled)
        return self._blocks[layer]

    def mids(self) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "bank d"], PatchedBlock]:
        """States between attention and feed-forward, recomputed from `resid_pre`, and the attention as a map.

        Raises:
            TransportError: a parallel block, or one whose `resid_mid` is not the sum of state and attention.
        """
        if self._mids is None:
            self.block(self.layer)
            if missing_points(self.model, {"resid_mid", "mlp_out"}, [self.layer]):
                raise TransportError(
                    f"expected a block with a state between attention and feed-forward, got block {self.layer} without one: "
                    'they are parallel here. Use context="patched".'
                )
            (pre, bank_pre), (post, _) = self.border(self.layer), self.border(self.layer + 1)
            whole = PatchedBlock(self.model, self.capture, self.layer, self.probes[0], pre, "R1", until_mid=True)
            own = whole.all_rows()
            other = own
            if self.bank is not self.capture:
                bank_block = PatchedBlock(self.model, self.bank, self.layer, self.probes[1], bank_pre, "R1", until_mid=True)
                other = bank_block.all_rows()
            check_halves(self.model, self.capture, self.probes[0], self.layer, own, post, seed=self.seed)
            self._mids = own, other, self._prove(self.layer, pre, own, bank_pre, until_mid=True).block
        return self._mids

    def _prove(
        self, layer: int, pre: Tensor, post: Tensor, bank_pre: Tensor, *, patched: bool = True, until_mid: bool = False
    ) -> Proof:
        """The fastest exact route from `pre` to `post`, tried with the bank's own states before the block."""
        among = torch.nonzero(self.bank.row_pos > 0).squeeze(1).to(self.device)
        given = self.model, self.capture, layer, self.probes[0], pre, post
        return prove(*given, others=bank_pre, among=among, seed=self.seed, patched=patched, until_mid=until_mid)

    def map(self, context: Context, blocks: int = 1) -> BlockMap:
        """The map of `context` through `blocks` blocks from this layer on.

        Raises:
            TransportError: the route is not exact on this model, or the context is not defined on it.
            CaptureError: states that do not belong to the model, in a context that runs the model.
        """
        # States of a control may stand in a token's place, but there is no context of theirs to stand in.
        sensible = {"native", "affine"} | ({"patched"} if self.capture.states_of_model else set())
        if not (self.capture.states_of_model and self.bank.states_of_model) and context not in sensible:
            raise CaptureError(
                f"expected a context among {sorted(sensible)} for states that are not the model's own, got {context!r}. "
                "A control capture has no context to patch into; as a bank, its states can be patched into the texts' own."
            )
        (own, bank), (own_post, bank_post) = self.border(self.layer), self.border(self.layer + blocks)
        path = range(self.layer, self.layer + blocks)
        if context == "patched":
            steps = [self.block(layer) for layer in path]

            def of_rows(queries: Tensor, rows: Tensor) -> Tensor:
                return _rest(steps, queries, steps[0].of_rows(bank, queries, rows), rows)

            through = self._on_the_way.chain(steps) if self.several_paths else _chain(steps)
            return BlockMap(context, own, own_post, bank, bank_post, of_rows, through)
        if context == "attn":
            own_mid, bank_mid, attention = self.mids()
            return BlockMap(context, own, own_mid, bank, bank_mid, partial(attention.of_rows, bank), attention)
        if context == "mlp":
            own_mid, bank_mid, _ = self.mids()
            return _pointwise(context, own_mid, own_post, bank_mid, bank_post, bank_post, self._feed_forward)
        if context == "native":

            def patched(queries: Tensor, points: Tensor) -> Tensor:
                return _chain([self.block(layer) for layer in path])(queries, points)

            native = _pointwise(context, own, own_post, bank, bank_post, bank_post, lambda points: points)
            return BlockMap(context, own, own_post, bank, bank_post, native.of_rows, patched)
        if context == "solo":

            def solo(states: Tensor) -> Tensor:
                for layer in path:
                    states = solo_images(self.probes[0], layer, states)
                return states

            return _pointwise(context, own, own_post, bank, bank_post, solo(bank), solo)
        fit = self.fits.setdefault(blocks, affine_fit(bank, bank_post, self.bank, self.seed))
        return _pointwise(context, own, own_post, bank, bank_post, fit(bank), fit)

    def _feed_forward(self, states: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """No position enters, so states stand in whatever batch is full: one sequence, or many of one token."""
        length = self.probes[0].length
        shape = (1, length) if len(states) <= length else (_SOLO_ROWS, 1)
        call = self.probes[0].call(self.layer, *shape)
        padded = torch.cat([states, states[:1].expand(-len(states) % math.prod(shape), -1)])
        with measuring(self.model):
            batches = padded.view(-1, *shape, states.shape[1])
            answers = [feed_forward(self.model, self.layer, call, batch).flatten(0, 1) for batch in batches]
        return torch.cat(answers)[: len(states)]


class OnTheWay:
    """Images on a path, kept so that a longer path of the same states goes on from where a shorter one ended.

    States are known again by their values. At most 512 MiB of images are kept, the oldest forgotten first.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[bytes, tuple[int, Tensor]] = OrderedDict()

    def chain(self, steps: list[PatchedBlock]) -> Callable[[Tensor, Tensor], Tensor]:
        """The path of all the blocks, as a map."""

        def through(queries: Tensor, points: Tensor) -> Tensor:
            key = _digest(queries, points)
            done, images = self._held.pop(key, (0, points))
            if done > len(steps):
                done, images = 0, points
            images = _chain(steps[done:])(queries, images)
            self._held[key] = len(steps), images
            while sum(held.numel() * held.element_size() for _, held in self._held.values()) > _KEPT_BYTES:
                self._held.popitem(last=False)
            return images

        return through


def _digest(queries: Tensor, points: Tensor) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for values in (queries, points):
        found.update(repr((values.dtype, values.shape)).encode())
        found.update(values.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.digest()


def _chain(steps: list[PatchedBlock]) -> Callable[[Tensor, Tensor], Tensor]:
    def through(queries: Tensor, points: Tensor) -> Tensor:
        for step in steps:
            points = step(queries, points)
        return points

    return through


def _rest(
    steps: list[PatchedBlock], queries: Int[Tensor, " q"], images: Float[Tensor, "q m d"], rows: Int[Tensor, "q m"]
) -> Float[Tensor, "q m d"]:
    """The blocks after the first one: a row reaches no token before it, so its context is the capture's own at every block."""
    if len(steps) > 1:
        images = _chain(steps[1:])(queries, images) * (rows >= 0)[..., None]
    return images


def _pointwise(
    context: Context,
    own: Tensor,
    own_after: Tensor,
    bank: Tensor,
    bank_after: Tensor,
    images: Tensor,
    function: Callable[[Tensor], Tensor],
) -> BlockMap:
    """A map without context: a state has one image, whoever asks."""

    def of_rows(_: Tensor, rows: Tensor) -> Tensor:
        return images[rows.clamp_min(0)] * (rows >= 0)[..., None]

    def of_points(_: Tensor, points: Tensor) -> Tensor:
        return function(points.flatten(0, 1)).view(*points.shape)

    return BlockMap(context, own, own_after, bank, bank_after, of_rows, of_points)


def solo_images(probe: Probe, layer: int, states: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
    """Each state alone, at position 0 of a sequence of one token."""
    call = probe.call(layer, _SOLO_ROWS, 1)
    answers = []
    with measuring(probe.model):
        for piece in states.split(_SOLO_ROWS):
            padded = torch.cat([piece, piece[:1].expand(_SOLO_ROWS - len(piece), -1)])
            answers.append(call_block(probe.model, layer, call, padded[:, None])[: len(piece), 0])
    return torch.cat(answers)
