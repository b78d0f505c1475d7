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
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens import model as door
from basin_lens.capture import Capture
from basin_lens.errors import TransportError

Context = Literal["patched", "native", "solo", "attn", "mlp", "affine"]
CONTEXTS: tuple[Context, ...] = ("patched", "native", "solo", "attn", "mlp", "affine")

# About 1,000 rows a call keep the matrix products at full rate; groups of up to 64 balance the cost of attention between a group's
# rows (grows with the group) against copies of the prefix (one per group). Calls take a few neighboring positions of many
# sequences, because a call's prefix is as long as its last position.
_ROWS_PER_CALL = {"cpu": 1024, "cuda": 8192}
_ROWS_PER_GROUP = 64
_SEQUENCES_AT_ONCE = 64
_POSITIONS_AT_ONCE = 4
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

    def __call__(self, queries: Int[Tensor, " q"], points: Float[Tensor, "q m d"]) -> Float[Tensor, "q m d"]:
        """Images of `points[i]` in the context of row `queries[i]`."""
        rows = torch.arange(points.shape[0] * points.shape[1], device=points.device).view(points.shape[:2])
        return self.of_rows(points.flatten(0, 1), queries, rows)

    def of_rows(
        self, bank: Float[Tensor, "bank d"], queries: Int[Tensor, " q"], rows: Int[Tensor, "q m"]
    ) -> Float[Tensor, "q m d"]:
        """Images of rows of `bank` in the context of each query; zero where the row is -1."""
        run = self._packed if self.route == "R2" else self._whole
        owner = queries.cpu()[:, None].expand(rows.shape)
        with door.measuring(self.model):
            present = rows >= 0
            if bool(present.all()):
                return run(bank, owner.reshape(-1), rows.reshape(-1)).view(*rows.shape, -1)
            images = bank.new_zeros(*rows.shape, bank.shape[1])
            if bool(present.any()):
                images[present] = run(bank, owner[present.cpu()], rows[present])
            return images

    # -- R2 -----------------------------------------------------------------------------------------------------------

    def _packed(self, bank: Float[Tensor, "bank d"], owner: Int[Tensor, " n"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        seqs, order = self._seq[owner].sort(stable=True)
        groups: list[Tensor] = []
        for same in order.split(seqs.unique_consecutive(return_counts=True)[1].tolist()):
            count = -(-len(same) // _ROWS_PER_GROUP)
            groups += same.split(-(-len(same) // count))
        groups.sort(key=lambda group: int(group[0]))
        per_call = max(1, self.rows_per_call // max(len(group) for group in groups))
        pieces = []
        for first in range(0, len(groups), per_call):
            chosen = groups[first : first + per_call]
            longest = max(len(group) for group in chosen)
            # Short groups are filled up with their own first pair; what comes back for it is dropped.
            index = torch.stack([torch.cat([g, g[:1].expand(longest - len(g))]) for g in chosen])
            points = bank[rows[index.to(rows.device)]]
            output = self._pack_call(self._seq[owner[index[:, 0]]].tolist(), self._pos[owner[index]], points)
            if all(len(group) == longest for group in chosen):
                pieces.append(output.flatten(0, 1))
            else:
                pieces += [out[: len(group)] for group, out in zip(chosen, output, strict=True)]
        images = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        order = torch.cat(groups)
        in_order = bool((order.diff() > 0).all())
        return images if in_order else images[torch.argsort(order).to(images.device)]

    def _pack_call(
        self, seqs: list[int], positions: Int[Tensor, "groups n"], points: Float[Tensor, "groups n d"]
    ) -> Float[Tensor, "groups n d"]:
        """One block call: each group's rows see the prefix before their query's position, and themselves."""
        device = points.device
        seen = max(1, int(positions.max()))  # the mask is causal: no row sees a column from its query's own on
        prefix = self._prefix(seqs, seen, positions.shape[1])
        positions = positions.to(device)

        def argument(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(argument(item) for item in value)
            if _is_mask(value, self.length):
                return self._pack_mask(value, positions, seen)
            if isinstance(value, Tensor):
                return value[0].to(device)[positions]
            return value

        call = door.BlockCall(tuple(map(argument, self.call.args)), {k: argument(v) for k, v in self.call.kwargs.items()})
        return door.call_block(self.model, self.layer, call, points, prefix)

    def _pack_mask(self, mask: Tensor, positions: Int[Tensor, "groups n"], seen: int) -> Float[Tensor, "groups 1 n columns"]:
        lowest = torch.finfo(mask.dtype).min
        prefix = mask[0, 0].to(positions.device)[positions]
        # The query's own column: its place is taken by the row.
        prefix = prefix.scatter(2, positions[..., None], lowest)[..., :seen]
        own = torch.full((positions.shape[1],) * 2, lowest, dtype=mask.dtype, device=positions.device).fill_diagonal_(0)
        return torch.cat([prefix, own.expand(len(positions), -1, -1)], dim=2)[:, None]

    def _prefix(self, seqs: list[int], seen: int, rows: int) -> door.FrozenPrefix:
        """Keys and values of the sequences' first `seen` tokens, recomputed from their states by the block itself, and room for `rows`."""
        for seq in dict.fromkeys(seqs):
            if seq not in self._prefixes:
                self._prefixes[seq] = door.keys_and_values(self.model, self.layer, self.call, self._sequence(seq)[None])
            self._prefixes.move_to_end(seq)
        wide = []
        for kind in (0, 1):
            _, heads, _, width = self._prefixes[seqs[0]][kind].shape
            room = self._prefixes[seqs[0]][kind].new_empty(len(seqs), heads, seen + rows, width)
            for index, seq in enumerate(seqs):
                room[index, :, :seen] = self._prefixes[seq][kind][0, :, :seen]
            wide.append(room)
        while len(self._prefixes) > _SEQUENCES_AT_ONCE:
            self._prefixes.popitem(last=False)
        return door.FrozenPrefix(wide[0], wide[1], seen)

    def _sequence(self, seq: int) -> Float[Tensor, "pos d"]:
        """States of a sequence, padded on the right to the probe's length."""
        states = self.states.new_zeros(self.length, self.states.shape[1])
        first, count = int(self.capture.offsets[seq]), int(self.capture.lengths[seq])
        states[:count] = self.states[first : first + count]
        return states

    # -- R1 -----------------------------------------------------------------------------------------------------------

    def _whole(self, bank: Float[Tensor, "bank d"], owner: Int[Tensor, " n"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        copies = max(1, min(len(rows), self.rows_per_call // self.length))
        call = self.probe.call(self.layer, copies)
        images = bank.new_empty(len(rows), bank.shape[1])
        for first in range(0, len(rows), copies):
            part = slice(first, min(first + copies, len(rows)))
            batch = torch.stack([self._sequence(seq) for seq in self._seq[owner[part]].tolist()])
            index = torch.arange(len(batch), device=batch.device)
            positions = self._pos[owner[part]].to(batch.device)
            batch[index, positions] = bank[rows[part]]
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
        if self.context == "patched":
            assert self.block is not None
            return self.block.of_rows(self.pre, queries, rows)
        present = rows >= 0
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


def query_chunks(capture: Capture, queries: Int[Tensor, " q"], points_per_query: int, rows: int) -> Iterator[Int[Tensor, " part"]]:
    """Queries in parts that fill one block call each, a few neighboring positions of many sequences at a time."""
    at = queries.cpu()
    seq, pos = capture.row_seq[at], capture.row_pos[at]
    width = len(capture.sequences)
    order = ((seq // _SEQUENCES_AT_ONCE) * (int(capture.lengths.max()) + 1) + pos // _POSITIONS_AT_ONCE) * width + seq
    size = rows // max(1, points_per_query)
    size = size - size % _POSITIONS_AT_ONCE if size > _POSITIONS_AT_ONCE else max(1, size)
    yield from queries[order.argsort(stable=True).to(queries.device)].split(size)


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
    last = capture.offsets + capture.lengths - 1
    later = torch.nonzero((capture.row_pos > 0) & (torch.arange(capture.n_rows) < last[capture.row_seq])).squeeze(1)
    inner = later if len(later) else torch.nonzero(capture.row_pos > 0).squeeze(1)
    row = int(inner[torch.randint(len(inner), (1,), generator=generator)])
    seq = int(capture.row_seq[row])
    # With the sequence's last token beside it, a row that saw the column of its own query, or of a later one, would be found out.
    queries = torch.tensor(sorted({row, int(last[seq])}))
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
    foreign = others[torch.randint(len(others), (len(queries), 2), generator=generator).to(others.device)]
    own = block.states[queries.to(device)]
    points = torch.stack([foreign[:, 0], own, foreign[:, 1]], dim=1)
    got = block(queries, points)
    compare(
        f"a token's own state (route {block.route}) to come back as its resid_post", got[:, 1], post[queries.to(device)],
        "Please report this model.",
    )  # fmt: skip
    if block.route == "R2":
        slow, name = PatchedBlock(model, capture, layer, block.probe, block.states, "R1")(queries, points), "R1"
    else:
        tokens = torch.tensor(capture.sequences[seq].tokens, device=device)
        positions = capture.row_pos[queries].tolist()
        slow = torch.stack(
            [door.rerun_with_state(model, tokens, layer, p, x) for p, x in zip(positions, points, strict=True)]
        )  # fmt: skip
        name = "R0"
    compare(
        f"route {block.route} to agree with {name} on neighbors' rows", got[:, [0, 2]], slow[:, [0, 2]], "Please report this model."
    )
    return worst
