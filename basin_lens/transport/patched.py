"""The patched pass: states placed at a query's position, in the query's context, through one block."""

from collections import OrderedDict
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.capture import Capture
from basin_lens.errors import ModelError, TransportError
from basin_lens.model import (
    BlockCall,
    CompiledBlock,
    FrozenPrefix,
    HookedModel,
    PaddedPrefix,
    call_block,
    keys_and_values,
    kind_of,
    measuring,
)
from basin_lens.transport.probe import Probe, is_mask

# About 1,000 rows a call keep the matrix products at full rate; groups of up to 64 balance the cost of attention between a group's
# rows (grows with the group) against copies of the prefix (one per group). Calls take a few neighboring positions of many
# sequences, because a call's prefix is as long as its last position.
_ROWS_PER_CALL = {"cpu": 1024, "cuda": 8192}
# Of narrow states more rows, or the calls themselves take the time; but no more pairs of a row and what it attends to: memory.
_VALUES_PER_CALL = {"cpu": 1 << 19, "cuda": 1 << 22}
_PAIRS_PER_CALL = {"cpu": 1 << 20, "cuda": 1 << 24}
_ROWS_PER_GROUP = 64
_SEQUENCES_AT_ONCE = 64
_POSITIONS_AT_ONCE = 4
_PADDED_VALUES = 1 << 25  # keys, values and their copies in one call of a HookedTransformer: 128 MiB in float32


def rows_per_call(states: Float[Tensor, "rows d"], length: int) -> int:
    """Rows that one call should have to run at full speed: of states of this width on this device, in contexts up to `length`."""
    kind = states.device.type if states.device.type in _ROWS_PER_CALL else "cpu"
    return max(_ROWS_PER_CALL[kind], min(_VALUES_PER_CALL[kind] // states.shape[1], _PAIRS_PER_CALL[kind] // length))


class PatchedBlock:
    """Block `layer` as a map on states placed at a query's position in the query's context.

    Args:
        model: the model that made `capture`.
        capture: the queries' sequences.
        layer: which block.
        probe: the model's recorded block arguments, for sequences at least as long as the capture's.
        states: `capture.resid_pre(layer)` on the model's device.
        route: force "R1" or "R2" (tests, benchmarks); None: the fastest one that the block's arguments allow.
        until_mid: images are the states between attention and feed-forward (`resid_mid`).
        compiled: run the block compiled.

    Raises:
        TransportError: route R2 on a block that cannot be packed.
        ModelError: `compiled` on a block that cannot be, or `until_mid`, which is read at a hook point.
    """

    def __init__(
        self,
        model: HookedModel,
        capture: Capture,
        layer: int,
        probe: Probe,
        states: Float[Tensor, "rows d"],
        route: str | None = None,
        *,
        until_mid: bool = False,
        compiled: bool = False,
    ) -> None:
        self.model, self.capture, self.layer, self.states, self.probe = model, capture, layer, states, probe
        self.until_mid = until_mid
        if compiled and until_mid:
            raise ModelError("resid_mid is read at a hook point, which a compiled block does not have")
        self.compiled = CompiledBlock(model, layer) if compiled else None
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
        return rows_per_call(self.states, self.length)

    def __call__(self, queries: Int[Tensor, " q"], points: Float[Tensor, "q m d"]) -> Float[Tensor, "q m d"]:
        """Images of `points[i]` in the context of row `queries[i]`."""
        rows = torch.arange(points.shape[0] * points.shape[1], device=points.device).view(points.shape[:2])
        return self.of_rows(points.flatten(0, 1), queries, rows)

    def of_rows(
        self, bank: Float[Tensor, "bank d"], queries: Int[Tensor, " q"], rows: Int[Tensor, "q m"]
    ) -> Float[Tensor, "q m d"]:
        """Images of rows of `bank` in the context of each query; zero where the row is -1."""
        run = self._whole
        if self.route == "R2":
            run = self._padded if kind_of(self.model) == "hooked" else self._packed
        owner = queries.cpu()[:, None].expand(rows.shape)
        with measuring(self.model):
            present = rows >= 0
            if bool(present.all()):
                return run(bank, owner.reshape(-1), rows.reshape(-1)).view(*rows.shape, -1)
            images = bank.new_zeros(*rows.shape, bank.shape[1])
            if bool(present.any()):
                images[present] = run(bank, owner[present.cpu()], rows[present])
            return images

    def sequences(self, seqs: list[int], copies: int | None = None) -> Float[Tensor, "seqs pos d"]:
        """The block's (or, `until_mid`, the attention's) output on whole sequences as they are, padded on the right."""
        copies = copies or max(1, self.rows_per_call // self.length)
        call = self.probe.call(self.layer, copies)
        answers = []
        with measuring(self.model):
            for first in range(0, len(seqs), copies):
                part = seqs[first : first + copies]
                batch = torch.stack([self._sequence(seq) for seq in [*part, *[part[0]] * (copies - len(part))]])
                answers.append(self._call(call, batch)[: len(part)])
        return torch.cat(answers)

    def all_rows(self) -> Float[Tensor, "rows d"]:
        """The output of every row of the capture, as it is."""
        valid = self.capture.valid.to(self.states.device)
        return self.sequences(list(range(len(valid))))[:, : valid.shape[1]][valid]

    def _call(self, call: BlockCall, states: Tensor, prefix: FrozenPrefix | PaddedPrefix | None = None) -> Tensor:
        return call_block(self.model, self.layer, call, states, prefix, until_mid=self.until_mid, run=self.compiled)

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

        def argument(value: object) -> object:
            if isinstance(value, tuple | list):
                return type(value)(argument(item) for item in value)
            if is_mask(value, self.length):
                return self._pack_mask(value, positions, seen)
            if isinstance(value, Tensor):
                return value[0].to(device)[positions]
            return value

        call = BlockCall(tuple(map(argument, self.call.args)), {k: argument(v) for k, v in self.call.kwargs.items()})
        return self._call(call, points, prefix)

    def _pack_mask(self, mask: Tensor, positions: Int[Tensor, "groups n"], seen: int) -> Float[Tensor, "groups 1 n columns"]:
        lowest = torch.finfo(mask.dtype).min
        prefix = mask[0, 0].to(positions.device)[positions]
        # The query's own column: its place is taken by the row.
        prefix = prefix.scatter(2, positions[..., None], lowest)[..., :seen]
        own = torch.full((positions.shape[1],) * 2, lowest, dtype=mask.dtype, device=positions.device).fill_diagonal_(0)
        return torch.cat([prefix, own.expand(len(positions), -1, -1)], dim=2)[:, None]

    def _prefix(self, seqs: list[int], seen: int, rows: int) -> FrozenPrefix:
        """Keys and values of the sequences' first `seen` tokens, which the block makes of their states, and room for `rows`."""
        self._record(seqs)
        wide = []
        for kind in (0, 1):
            _, heads, _, width = self._prefixes[seqs[0]][kind].shape
            room = self._prefixes[seqs[0]][kind].new_empty(len(seqs), heads, seen + rows, width)
            for index, seq in enumerate(seqs):
                room[index, :, :seen] = self._prefixes[seq][kind][0, :, :seen]
            wide.append(room)
        self._forget()
        return FrozenPrefix(wide[0], wide[1], seen)

    def _record(self, seqs: list[int]) -> None:
        """Have the keys and values of these sequences."""
        for seq in dict.fromkeys(seqs):
            if seq not in self._prefixes:
                self._prefixes[seq] = keys_and_values(self.model, self.layer, self.call, self._sequence(seq)[None])
            self._prefixes.move_to_end(seq)

    def _forget(self) -> None:
        while len(self._prefixes) > _SEQUENCES_AT_ONCE:
            self._prefixes.popitem(last=False)

    def _sequence(self, seq: int) -> Float[Tensor, "pos d"]:
        """States of a sequence, padded on the right to the probe's length."""
        states = self.states.new_zeros(self.length, self.states.shape[1])
        first, count = int(self.capture.offsets[seq]), int(self.capture.lengths[seq])
        states[:count] = self.states[first : first + count]
        return states

    # -- R2 on a HookedTransformer --------------------------------------------------------------------------------------

    def _padded(self, bank: Float[Tensor, "bank d"], owner: Int[Tensor, " n"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Each pair is a sequence of one token after its own prefix, padded on the left: HookedTransformer takes no 4-D mask.

        Padding on the left also shifts its rotary positions, and keeps alibi's and local attention's distances.
        """
        device = bank.device
        images = bank.new_empty(len(rows), bank.shape[1])
        # Neighboring positions together, so that little is padded.
        order = self._pos[owner].argsort(stable=True)
        self._record(self._seq[owner[:1]].tolist())
        per_column = 2 * self._prefixes[int(self._seq[owner[0]])][0][0, 0].numel() + self.model.cfg.n_heads * self.model.cfg.d_head
        step = max(1, min(self.rows_per_call, _PADDED_VALUES // (per_column * max(1, int(self._pos[owner].max())))))
        for part in order.split(step):
            seqs, positions = self._seq[owner[part]], self._pos[owner[part]]
            columns = max(1, int(positions.max()))
            present, which = seqs.unique(return_inverse=True)
            self._record(present.tolist())
            place = (torch.arange(columns, device="cpu") - columns + positions[:, None]).to(device)
            at = which.to(device)[:, None], place.clamp_min(0)
            keys, values = (torch.cat([self._prefixes[s][kind][:, :columns] for s in present.tolist()])[at] for kind in (0, 1))
            prefix = PaddedPrefix(keys, values, place >= 0)
            points = bank[rows[part.to(rows.device)]]
            images[part.to(device)] = self._call(self.call, points[:, None], prefix)[:, 0]
            self._forget()
        return images

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
            images[part] = self._call(call, padded)[index, positions]
        return images


def query_chunks(capture: Capture, queries: Int[Tensor, " q"], points_per_query: int, rows: int) -> Iterator[Int[Tensor, " part"]]:
    """Queries in parts that fill one block call each, a few neighboring positions of many sequences at a time."""
    for places in chunk_places(capture, queries, points_per_query, rows):
        yield queries[places]


def chunk_places(capture: Capture, queries: Int[Tensor, " q"], points_per_query: int, rows: int) -> Iterator[Int[Tensor, " part"]]:
    """The same parts, as places in the list of queries, of which one may be there several times."""
    at = queries.cpu()
    seq, pos = capture.row_seq[at], capture.row_pos[at]
    width = len(capture.sequences)
    order = ((seq // _SEQUENCES_AT_ONCE) * (int(capture.lengths.max()) + 1) + pos // _POSITIONS_AT_ONCE) * width + seq
    size = rows // max(1, points_per_query)
    size = size - size % _POSITIONS_AT_ONCE if size > _POSITIONS_AT_ONCE else max(1, size)
    yield from order.argsort(stable=True).to(queries.device).split(size)
