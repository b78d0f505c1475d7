"""Proof, before anything is computed with it, that a block can be called by itself and that its route is exact."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.capture import Capture, tolerance_of
from basin_lens.errors import ModelError, TransportError
from basin_lens.model import HookedModel, feed_forward, measuring, rerun_with_state
from basin_lens.transport.patched import PatchedBlock
from basin_lens.transport.probe import Probe

_POINTS = 63  # and the own state: a full group, so that a window counted in columns, or a table of too few, would be found out
_SCALE_ROWS = 1 << 14  # of a layer, beyond position 0, whose size is the yardstick of errors
_REPORT = "Please report this model."


@dataclass(frozen=True)
class Proof:
    """A block that passed the check, its largest relative error, why it takes route R1 (empty: it takes R2), and why it is not
    compiled (empty: it is, or nobody asked)."""

    block: PatchedBlock
    error: float
    reason: str
    uncompiled: str = ""


class _WrongRoute(TransportError):  # noqa: N818 - turned into the other route, or raised as what it is
    """The packed route gives other numbers than the block on whole sequences."""


def prove(
    model: HookedModel,
    capture: Capture,
    layer: int,
    probe: Probe,
    pre: Float[Tensor, "rows d"],
    post: Float[Tensor, "rows d"],
    *,
    others: Float[Tensor, "bank d"],
    among: Int[Tensor, " some"] | None = None,
    seed: int = 0,
    patched: bool = True,
    until_mid: bool = False,
) -> Proof:
    """The fastest route of a block that passes `check`; compiled, if the probe says so and that passes too.

    Where the packed route's arguments look right and its numbers are not (GPT-Neo's local attention counts columns, whatever the
    mask says), the whole-sequence route is taken, and the reason kept.

    Raises:
        TransportError: no route is exact. See `check`.
    """
    uncompiled = ""
    if probe.compiles and patched and not until_mid:
        try:
            block = PatchedBlock(model, capture, layer, probe, pre, compiled=True)
            error = check(model, capture, block, post, others=others, among=among, seed=seed)
            return Proof(block, error, probe.reason(layer))
        except (TransportError, ModelError, RuntimeError) as wrong:
            if isinstance(wrong, torch.OutOfMemoryError):
                raise
            uncompiled = str(wrong)
    block = PatchedBlock(model, capture, layer, probe, pre, until_mid=until_mid)
    try:
        error = check(model, capture, block, post, others=others, among=among, seed=seed, patched=patched)
    except (_WrongRoute, RuntimeError) as wrong:  # torch raises RuntimeError where shapes do not fit
        if block.route == "R1" or isinstance(wrong, torch.OutOfMemoryError):
            raise
        block = PatchedBlock(model, capture, layer, probe, pre, "R1", until_mid=until_mid)
        error = check(model, capture, block, post, others=others, among=among, seed=seed, patched=patched)
        return Proof(block, error, f"the packed route is not exact on this block: {wrong}", uncompiled)
    return Proof(block, error, probe.reason(layer), uncompiled)


def check(
    model: HookedModel,
    capture: Capture,
    block: PatchedBlock,
    post: Float[Tensor, "rows d"],
    *,
    others: Float[Tensor, "bank d"],
    among: Int[Tensor, " some"] | None = None,
    seed: int = 0,
    patched: bool = True,
) -> float:
    """Prove the transport on a few tokens of one layer.

    Checks that the block maps `resid_pre` to `resid_post` (also for `native`: it catches a capture of another model), and for
    `patched`, that a token's own state among its neighbors' rows comes back as its `resid_post`, and that foreign rows agree
    with a slower route (R1 for R2, R0 for R1): the self-pass alone cannot see a route that uses the query's own key and value
    for the neighbor. The last token of the longest sequence is among the queries: there a window or a distance counts most.
    Foreign rows are of `others`: any, or of those `among` them.

    Returns:
        the largest relative error: root mean square over dimensions, divided by that of the layer's first 16,384 states that
        are not at position 0.

    Raises:
        TransportError: an error above 1e-5 (float32), 4e-3 (float16) or 2e-2 (bfloat16), by the coarser type of model and cache.
    """
    layer, device = block.layer, block.states.device
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
    seq, queries = _some_queries(capture, generator)
    first, count = int(capture.offsets[seq]), int(capture.lengths[seq])
    errors = _Errors(
        layer,
        scale=float(post[torch.nonzero(capture.row_pos > 0).squeeze(1)[:_SCALE_ROWS].to(device)].square().mean().sqrt()),
        tolerance=tolerance_of(model, capture),
        dtype=next(model.parameters()).dtype,
    )
    end = "resid_mid" if block.until_mid else "resid_post"
    errors.compare(
        f"the block to map the captured resid_pre to {end}",
        block.sequences([seq], copies=1)[0, 1:count],
        post[first + 1 : first + count],
        "Is this capture (or cache) from the same model, with the same hooks and weight processing?",
    )
    if not patched:
        return errors.worst
    wrong = _WrongRoute if block.route == "R2" else TransportError
    among = torch.arange(len(others), device=others.device) if among is None else among
    foreign = others[among[torch.randint(len(among), (len(queries), _POINTS), generator=generator, device="cpu").to(among.device)]]
    points = torch.cat([foreign[:, :-1], block.states[queries.to(device)][:, None], foreign[:, -1:]], dim=1)
    got = block(queries, points if block.route == "R2" else points[:, -3:])
    what = f"a token's own state (route {block.route}) to come back as its {end}"
    errors.compare(what, got[:, -2], post[queries.to(device)], _REPORT, wrong)
    if block.route == "R2":
        some = [0, 1, _POINTS]
        whole = PatchedBlock(model, capture, layer, block.probe, block.states, "R1", until_mid=block.until_mid)
        slow, name, got = whole(queries, points[:, some]), "R1", got[:, some]
    else:
        slow, name = _rerun(model, capture, block, queries, points[:, -3:]), "R0"
    errors.compare(f"route {block.route} to agree with {name} on neighbors' rows", got, slow, _REPORT, wrong)
    return errors.worst


@dataclass
class _Errors:
    """The largest error of several comparisons at a layer, each within a tolerance, both as shares of the states' scale."""

    layer: int
    scale: float
    tolerance: float
    dtype: torch.dtype
    worst: float = 0.0

    def compare(self, what: str, got: Tensor, expected: Tensor, advice: str, kind: type[TransportError] = TransportError) -> None:
        """Hold states against those expected.

        Raises:
            TransportError: of this kind, if they are too far apart.
        """
        error = float((got - expected).square().mean(-1).sqrt().max()) / self.scale
        if not error <= self.tolerance:
            raise kind(
                f"expected {what} at block {self.layer} within {self.tolerance:g} of the states' scale ({self.dtype}), got "
                f"{error:.3g}. {advice}"
            )
        self.worst = max(self.worst, error)


def _some_queries(capture: Capture, generator: torch.Generator) -> tuple[int, Int[Tensor, " q"]]:
    """A random sequence; and as queries a random token of it, its last one, and the last one of the longest sequence."""
    last = capture.offsets + capture.lengths - 1
    later = torch.nonzero((capture.row_pos > 0) & (torch.arange(capture.n_rows, device="cpu") < last[capture.row_seq])).squeeze(1)
    inner = later if len(later) else torch.nonzero(capture.row_pos > 0).squeeze(1)
    row = int(inner[torch.randint(len(inner), (1,), generator=generator, device="cpu")])
    seq = int(capture.row_seq[row])
    # With the sequence's last token beside it, a row that saw the column of its own query, or of a later one, would be found out.
    rows = sorted({row, int(last[seq]), int(last[int(capture.lengths.argmax())])})
    return seq, torch.tensor(rows, device="cpu")


def _rerun(
    model: HookedModel, capture: Capture, block: PatchedBlock, queries: Int[Tensor, " q"], points: Float[Tensor, "q m d"]
) -> Float[Tensor, "q m d"]:
    """Images by route R0: the model rerun with each state in its query's place."""
    images = []
    for query, states in zip(queries.tolist(), points, strict=True):
        tokens = torch.tensor(capture.sequences[int(capture.row_seq[query])].tokens, device=block.states.device)
        position = int(capture.row_pos[query])
        images.append(rerun_with_state(model, tokens, block.layer, position, states, until_mid=block.until_mid))
    return torch.stack(images)


def check_halves(
    model: HookedModel,
    capture: Capture,
    probe: Probe,
    layer: int,
    mid: Float[Tensor, "rows d"],
    post: Float[Tensor, "rows d"],
    *,
    seed: int = 0,
) -> None:
    """Prove that `resid_mid` is the whole state between attention and feed-forward: put at other positions, the states of a
    sequence must leave the block as they did at their own.

    Raises:
        TransportError: they do not.
    """
    seq = int(capture.lengths.argmax())
    first, count = int(capture.offsets[seq]), int(capture.lengths[seq])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu").to(mid.device)
    own, expected = mid[first : first + count][order], post[first : first + count][order]
    padded = torch.cat([own, own[:1].expand(probe.length - count, -1)])
    with measuring(model):
        got = feed_forward(model, layer, probe.call(layer), padded[None])[0, :count]
    kept = order > 0  # position 0's state can be a thousand times the others
    error = float((got - expected)[kept].square().mean(-1).sqrt().max() / expected[kept].square().mean().sqrt())
    tolerance = tolerance_of(model, capture)
    if not error <= tolerance:
        raise TransportError(
            f"expected resid_mid of block {layer} to decide its resid_post within {tolerance:g} of the states' scale, got "
            f'{error:.3g}. The contexts "attn" and "mlp" are not defined on this block: use context="patched".'
        )
