"""Neighbors -> their images under one block, in a stated context, exactly.

Three contexts: `native` (the neighbor's own cached output), `patched` (the neighbor's state at the query's place, in the query's
context) and `solo` (the state alone at position 0). The patched pass takes one of two routes that give the same numbers:

R2  packed: (query, neighbor) pairs are rows of one block call with frozen prefix keys and values. One block-token per pair.
R1  block only: the block's recorded arguments on copies of the whole sequence with the state put in. Any block that can be
    called by itself; slower by about the length of the sequence.

R0, rerunning the model with a hook, is the oracle (`model.rerun_with_state`).
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens import model as door
from basin_lens.capture import Capture
from basin_lens.errors import TransportError

Context = Literal["patched", "native", "solo"]
CONTEXTS: tuple[Context, ...] = ("patched", "native", "solo")

# About 1,000 rows a call keep two CPU cores at 0.8 of their matrix rate; groups of 128 keep attention between rows cheap.
_ROWS_PER_CALL = {"cpu": 1024, "cuda": 8192}
_ROWS_PER_GROUP = 128
_PREFIXES_AT_ONCE = 8
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Probe:
    """What the blocks of a model are called with, recorded once per shape of batch, and the route that this allows.

    Args:
        model: a hooked model.
        length: tokens of the longest sequence.
    """

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.length = model, length
        self._recorded: dict[tuple[int, int], list[door.BlockCall]] = {}

    def call(self, layer: int, copies: int = 1, length: int | None = None) -> door.BlockCall:
        """Arguments of a block for `copies` sequences of `length` tokens (None: the longest).

        They are recorded from a real pass of that shape, unless they broadcast over the batch: some models fold heads into it.
        """
        length = length or self.length
        single = self._calls(1, length)[layer]
        if copies == 1 or not why_not_packed(single, length):
            return single
        return self._calls(copies, length)[layer]

    def reason(self, layer: int) -> str:
        """Why block `layer` cannot take route R2; empty if it can."""
        return why_not_packed(self._calls(1, self.length)[layer], self.length)

    def _calls(self, copies: int, length: int) -> list[door.BlockCall]:
        if (copies, length) not in self._recorded:
            tokens = torch.zeros(copies, length, dtype=torch.int64, device=door.device_of(self.model))
            self._recorded[copies, length] = door.record_calls(self.model, tokens)
        return self._recorded[copies, length]


def why_not_packed(call: door.BlockCall, length: int) -> str:
    """Why a block's arguments do not allow the packed route; empty if they do."""
    caches = sum(door.is_cache_slot(value) for value in call.leaves())
    if caches != 1:
        return f"the block takes {caches} key/value caches, not one"
    if not any(_is_mask(value, length) for value in call.leaves()):
        return "the block gets no 4-D attention mask"
    for value in call.leaves():
        tensors = value if isinstance(value, tuple | list) else [value]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not (_is_mask(tensor, length) or _is_per_position(tensor, length)):
                return f"the block takes a tensor of shape {tuple(tensor.shape)} that is neither mask nor per position"
    return ""


def _is_mask(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) == (1, 1, length, length)


def _is_per_position(value: Tensor, length: int) -> bool:
    """Position ids `[1, pos]`, or one rotary table `[1, pos, d]`."""
    return value.ndim in (2, 3) and tuple(value.shape[:2]) == (1, length)


class PatchedBlock:
    """Block `layer` as a map on states placed at a query's position in the query's context.

    Args:
        model: the model that made `capture`.
        capture: the queries' sequences.
        layer: which block.
        probe: the model's recorded block arguments, for sequences at least as long as the capture's.
        states: `capture.resid_pre(layer)` on the model's device.
        route: force "R1" or "R2" (tests, benchmarks); None: the fastest one allowed.
    """

    def __init__(
        self, model: Any, capture: Capture, layer: int, probe: Probe, states: Float[Tensor, "rows d"], route: str | None = None
    ) -> None:
        self.model, self.capture, self.layer, self.states, self.probe = model, capture, layer, states, probe
        self.call, self.length = probe.call(layer), probe.length
        reason = probe.reason(layer)
        self.route = route or ("R1" if reason else "R2")
        if self.route == "R2" and reason:
            raise TransportError(f"expected a block that can be packed (R2), got block {layer}: {reason}. Use R1.")
        self._seq, self._pos = capture.row_seq, capture.row_pos
        self._prefixes: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    @property
    def rows_per_call(self) -> int:
        """Rows that one call should have to run at full speed."""
        return _ROWS_PER_CALL.get(self.states.device.type, 1024)

    def __call__(
        self,
        queries: Int[Tensor, " q"],
        points: Float[Tensor, "q m d"],
        present: Bool[Tensor, "q m"] | None = None,
    ) -> Float[Tensor, "q m d"]:
        """Images of `points[i]` in the context of row `queries[i]`; zero where not `present`.

        Raises:
            TransportError: a query at position 0 is fine for R1 only; any failure of the block itself is raised as it is.
        """
        keep = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device) if present is None else present
        images = torch.zeros_like(points)
        if not bool(keep.any()):
            return images
        owner = queries.to(keep.device)[:, None].expand(keep.shape)[keep].cpu()
        run = self._packed if self.route == "R2" else self._whole
        with door.measuring(self.model):
            images[keep] = run(owner, points[keep])
        return images

    # -- R2 -----------------------------------------------------------------------------------------------------------

    def _packed(self, owner: Int[Tensor, " n"], points: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        seqs = self._seq[owner]
        order = torch.argsort(seqs, stable=True)
        groups: list[Tensor] = []
        for seq in seqs[order].unique_consecutive():
            groups += list(order[seqs[order] == seq].split(_ROWS_PER_GROUP))
        per_call = max(1, self.rows_per_call // _ROWS_PER_GROUP)
        images = torch.empty_like(points)
        for first in range(0, len(groups), per_call):
            chosen = groups[first : first + per_call]
            rows = max(len(group) for group in chosen)
            # Short groups are filled up with their own first pair; what comes back for it is dropped.
            index = torch.stack([torch.cat([g, g[:1].expand(rows - len(g))]) for g in chosen])
            output = self._pack_call(seqs[index[:, 0]].tolist(), self._pos[owner[index]], points[index.to(points.device)])
            for group, out in zip(chosen, output, strict=True):
                images[group.to(images.device)] = out[: len(group)]
        return images

    def _pack_call(
        self, seqs: list[int], positions: Int[Tensor, "groups n"], points: Float[Tensor, "groups n d"]
    ) -> Float[Tensor, "groups n d"]:
        """One block call: each group's rows see the prefix before their query's position, and themselves."""
        device = points.device
        keys, values = self._prefix(seqs)
        positions = positions.to(device)

        def argument(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(argument(item) for item in value)
            if _is_mask(value, self.length):
                return self._pack_mask(value, positions)
            if isinstance(value, Tensor):
                return value[0].to(device)[positions]
            return value

        call = door.BlockCall(tuple(map(argument, self.call.args)), {k: argument(v) for k, v in self.call.kwargs.items()})
        return door.call_block(self.model, self.layer, call, points, door.FrozenPrefix(keys, values))

    def _pack_mask(self, mask: Tensor, positions: Int[Tensor, "groups n"]) -> Float[Tensor, "groups 1 n columns"]:
        lowest = torch.finfo(mask.dtype).min
        prefix = mask[0, 0].to(positions.device)[positions]
        prefix = prefix.scatter(2, positions[..., None], lowest)  # the query's own column: its place is taken by the row
        own = torch.full((positions.shape[1],) * 2, lowest, dtype=mask.dtype, device=positions.device).fill_diagonal_(0)
        return torch.cat([prefix, own.expand(len(positions), -1, -1)], dim=2)[:, None]

    def _prefix(self, seqs: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of the sequences' tokens, recomputed from their states by one ordinary block call."""
        for seq in dict.fromkeys(seqs):
            if seq not in self._prefixes:
                recorder = door.RecordingPrefix()
                door.call_block(self.model, self.layer, self.call, self._sequence(seq)[None], recorder)
                if len(recorder.seen) != 1:
                    raise TransportError(
                        f"expected block {self.layer} to fill its cache once, got {len(recorder.seen)} times. This model needs R1."
                    )
                self._prefixes[seq] = recorder.seen[0]
            self._prefixes.move_to_end(seq)
        keys = torch.cat([self._prefixes[seq][0] for seq in seqs])
        values = torch.cat([self._prefixes[seq][1] for seq in seqs])
        while len(self._prefixes) > _PREFIXES_AT_ONCE:
            self._prefixes.popitem(last=False)
        return keys, values

    def _sequence(self, seq: int) -> Float[Tensor, "pos d"]:
        """States of a sequence, padded on the right to the probe's length."""
        states = self.states.new_zeros(self.length, self.states.shape[1])
        first, count = int(self.capture.offsets[seq]), int(self.capture.lengths[seq])
        states[:count] = self.states[first : first + count]
        return states

    # -- R1 -----------------------------------------------------------------------------------------------------------

    def _whole(self, owner: Int[Tensor, " n"], points: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        copies = max(1, min(len(points), self.rows_per_call // self.length))
        call = self.probe.call(self.layer, copies)
        images = torch.empty_like(points)
        for first in range(0, len(points), copies):
            part = slice(first, min(first + copies, len(points)))
            batch = torch.stack([self._sequence(seq) for seq in self._seq[owner[part]].tolist()])
            index = torch.arange(len(batch), device=batch.device)
            positions = self._pos[owner[part]].to(batch.device)
            batch[index, positions] = points[part]
            padded = torch.cat([batch, batch[:1].expand(copies - len(batch), -1, -1)])
            images[part] = door.call_block(self.model, self.layer, call, padded)[index, positions]
        return images


@dataclass(frozen=True)
class Images:
    """Images of bank rows under one block in one context.

    `pre`, `post`: the bank's states before and after the block. `block`: the patched block (for `patched`).
    """

    context: Context
    pre: Float[Tensor, "bank d"]
    post: Float[Tensor, "bank d"]
    block: PatchedBlock | None

    def of_rows(self, queries: Int[Tensor, " q"], rows: Int[Tensor, "q m"]) -> Float[Tensor, "q m d"]:
        """Images of bank rows for each query; zero where the row is -1."""
        present = rows >= 0
        if self.context == "patched":
            assert self.block is not None
            points = self.pre[rows.clamp_min(0)] * present[..., None]
            return self.block(queries, points, present)
        return self.post[rows.clamp_min(0)] * present[..., None]


def images(
    probe: Probe,
    context: Context,
    layer: int,
    pre: Float[Tensor, "bank d"],
    post: Float[Tensor, "bank d"],
    block: PatchedBlock | None,
) -> Images:
    """The images of a bank under block `layer` in `context`.

    Raises:
        TransportError: an unknown context.
    """
    if context == "solo":
        return Images("solo", pre, solo_images(probe, layer, pre), None)
    if context in ("native", "patched"):
        return Images(context, pre, post, block)
    raise TransportError(f"expected context in {CONTEXTS}, got {context!r}.")


def solo_images(probe: Probe, layer: int, states: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
    """Each state alone, at position 0 of a sequence of one token."""
    step = _ROWS_PER_CALL.get(states.device.type, 1024)
    call = probe.call(layer, step, 1)
    answers = torch.empty_like(states)
    with door.measuring(probe.model):
        for first in range(0, len(states), step):
            piece = states[first : first + step]
            padded = torch.cat([piece, piece[:1].expand(step - len(piece), -1)])
            answers[first : first + step] = door.call_block(probe.model, layer, call, padded[:, None])[: len(piece), 0]
    return answers


def query_chunks(queries: Int[Tensor, " q"], points_per_query: int, rows: int) -> Iterator[Int[Tensor, " part"]]:
    """Consecutive queries, so many that one block call is full."""
    yield from queries.split(max(1, rows // max(1, points_per_query)))


def check(
    model: Any,
    capture: Capture,
    block: PatchedBlock,
    post: Float[Tensor, "rows d"],
    *,
    others: Float[Tensor, "bank d"],
    seed: int = 0,
    patched: bool = True,
) -> float:
    """Prove the transport on a few tokens of one layer, before anything is computed with it.

    Checks that the block maps `resid_pre` to `resid_post` (also for `native`: it catches a capture of another model), and for
    `patched`, that a token's own state among its neighbors' rows comes back as its `resid_post`, and that two foreign rows agree
    with a slower route (R1 for R2, R0 for R1): the self-pass alone cannot see a route that uses the query's own key and value
    for the neighbor.

    Returns:
        the largest relative error: root mean square over dimensions, divided by that of the layer's states without position 0.

    Raises:
        TransportError: an error above 1e-5 (float32), 4e-3 (float16) or 2e-2 (bfloat16).
    """
    layer, device = block.layer, block.states.device
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    inner = torch.nonzero(capture.row_pos > 0).squeeze(1)
    row = int(inner[torch.randint(len(inner), (1,), generator=generator)])
    seq, pos = int(capture.row_seq[row]), int(capture.row_pos[row])
    first, count = int(capture.offsets[seq]), int(capture.lengths[seq])
    scale = float(post[(capture.row_pos > 0).to(device)].square().mean().sqrt())
    dtype = next(model.parameters()).dtype
    tolerance = _TOLERANCE.get(dtype, 1e-5)
    worst = 0.0

    def compare(what: str, got: Tensor, expected: Tensor, advice: str) -> None:
        nonlocal worst
        error = float((got - expected).square().mean(-1).sqrt().max()) / scale
        worst = max(worst, error)
        if not error <= tolerance:
            raise TransportError(
                f"expected {what} at block {layer} within {tolerance:g} of the states' scale ({dtype}), got {error:.3g}. {advice}"
            )

    with door.measuring(model):
        whole = door.call_block(model, layer, block.call, block._sequence(seq)[None])[0, :count]
    compare(
        "the block to map the captured resid_pre to resid_post", whole[1:], post[first + 1 : first + count],
        "Is this capture (or cache) from the same model, with the same hooks and weight processing?",
    )  # fmt: skip
    if not patched:
        return worst
    query = torch.tensor([row])
    foreign = others[torch.randint(len(others), (2,), generator=generator).to(others.device)]
    points = torch.stack([foreign[0], block.states[row], foreign[1]])[None]
    got = block(query, points)[0]
    compare(f"a token's own state (route {block.route}) to come back as its resid_post", got[1:2], post[row : row + 1],
            "Please report this model.")  # fmt: skip
    if block.route == "R2":
        slow, name = PatchedBlock(model, capture, layer, block.probe, block.states, "R1")(query, points)[0], "R1"
    else:
        tokens = torch.tensor(capture.sequences[seq].tokens, device=device)
        slow, name = door.rerun_with_state(model, tokens, layer, pos, points[0]), "R0"
    compare(f"route {block.route} to agree with {name} on neighbors' rows", got[[0, 2]], slow[[0, 2]], "Please report this model.")
    return worst
