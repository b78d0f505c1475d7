"""One batch through the model: what token analyzers see, and the pass that fills them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens import model as door
from basin_lens.capture.rows import TokenRows
from basin_lens.errors import CaptureError

_TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class TokenBatch:
    """One batch at one layer, as a token analyzer sees it.

    `values[name]` holds what the analyzer `needs`, `[batch, pos, ...]` (`pattern`: `[batch, head, query, key]`). `memory` is the
    analyzer's own scratch, kept from layer to layer (ascending) of the same batch.
    """

    layer: int
    n_layers: int
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    values: Mapping[str, Tensor]
    memory: dict[str, Any]


@runtime_checkable
class TokenMeasure(Protocol):
    """What a capture asks of a token analyzer (`basin_lens.analyzers.TokenAnalyzer` is the base class)."""

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def per_layer(self) -> bool: ...
    @property
    def target(self) -> str | None: ...
    @property
    def key(self) -> str: ...
    def measure(self, batch: TokenBatch) -> dict[str, Tensor]: ...


def token_batches(rows: TokenRows, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows, right-padded tokens and validity of batches of sequences of like length.

    Raises:
        CaptureError: a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise CaptureError(f"expected a batch_size of at least 1 sequence, got {batch_size}.")
    lengths = rows.lengths
    order = sorted(range(len(lengths)), key=lambda i: -int(lengths[i]))
    while order:
        longest = int(lengths[order[0]])
        size = batch_size or max(1, _TOKENS_PER_BATCH // longest)
        chosen, order = order[:size], order[size:]
        valid = torch.arange(longest, device="cpu")[None] < lengths[chosen][:, None]
        at = torch.cat([torch.arange(int(lengths[i]), device="cpu") + rows.offsets[i] for i in chosen])
        # Any id will do as padding: no real token of a causal model sees it.
        tokens = torch.zeros(len(chosen), longest, dtype=torch.int64, device="cpu")
        tokens[valid] = rows.row_token[at]
        yield at, tokens, valid


def run_batch(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    valid: Bool[Tensor, "batch pos"],
    layers: Sequence[int],
    borders: Sequence[int],
    analyzers: Sequence[TokenMeasure],
    keep: Callable[[TokenMeasure, int, Mapping[str, Tensor]], None],
    refuse_nonfinite: Callable[[int, Tensor], None],
) -> dict[int, Tensor]:
    """One forward pass (and one backward pass if an analyzer wants gradients) over a batch.

    Args:
        model: a hooked model.
        tokens: token ids, padded on the right.
        valid: which of them are real.
        layers: layers that the analyzers look at.
        borders: block borders whose states are kept.
        analyzers: token analyzers to fill.
        keep: called with each analyzer, layer and its values.
        refuse_nonfinite: called with each kept border and its states; raises if they are not finite.

    Returns:
        states of the real tokens by border, `[rows, d]`, float32, on the CPU.
    """
    device = door.device_of(model)
    with torch.inference_mode(False):  # tensors made under a caller's inference_mode cannot take part in a backward pass
        tokens, valid_there = tokens.clone().to(device), valid.clone().to(device)
    gradients = any(a.target is not None for a in analyzers)
    count = door.n_layers(model)
    memories: dict[str, dict[str, Any]] = {a.key: {} for a in analyzers}
    held: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    live: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}
    at_layer = [a for a in analyzers if a.per_layer and a.target is None and "logits" not in a.needs]
    at_end = [a for a in analyzers if a not in at_layer]
    needed_at_end = {need for a in at_end for need in a.needs}

    def run(analyzer: TokenMeasure, layer: int, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            batch = TokenBatch(layer, count, tokens, valid_there, values, memories[analyzer.key])
            keep(analyzer, layer, analyzer.measure(batch))

    def read_state(border: int) -> Callable[[Tensor], None]:
        def reader(state: Tensor) -> None:
            if border in borders:
                kept[border] = state.detach()[valid_there].float().cpu()
                refuse_nonfinite(border, kept[border])
            if gradients and border in held:
                live[border] = state
            if border in held and wants("resid_pre"):
                held[border]["resid_pre"] = state.detach().float()
            # The state leaving a block closes it: all that its analyzers need has been read by then.
            layer = border - 1
            if layer in held:
                if wants("resid_post"):
                    held[layer]["resid_post"] = state.detach().float()
                for analyzer in at_layer:
                    run(analyzer, layer, {need: held[layer][need] for need in analyzer.needs})
                held[layer] = {need: value for need, value in held[layer].items() if need in needed_at_end}

        return reader

    def wants(need: str) -> bool:
        return any(need in a.needs for a in analyzers)

    def read_point(need: str, layer: int) -> Callable[[Tensor], None]:
        def reader(value: Tensor) -> None:
            held[layer][need] = value.detach().float()

        return reader

    readers: dict[str, Callable[[Tensor], Tensor | None]] = {}
    for border in sorted({b for layer in layers for b in (layer, layer + 1)}):
        # A layer whose analyzers run when it closes is read at its own end, not at the next block's start.
        if border < count:
            readers[door.point_name("resid_pre", border)] = read_state(border)
        else:
            readers[door.point_name("resid_post", count - 1)] = read_state(count)
    points = {need for a in analyzers for need in a.needs} - {"logits", "gradient", "resid_pre", "resid_post"}
    for layer in layers:
        for need in points:
            readers[door.point_name(need, layer)] = read_point(need, layer)

    with door.measuring(model, gradients=gradients):
        logits = door.forward_pass(model, tokens, readers, gradients=gradients)
        if gradients:
            borders_live = sorted(live)
            loss = future_loss(logits, tokens, valid_there)
            slopes = torch.autograd.grad(loss, [live[border] for border in borders_live])
            for layer, slope in zip(borders_live, slopes, strict=True):
                held[layer]["gradient"] = slope.detach().float()
    logits = logits.detach()
    for analyzer in at_end:
        for layer in layers if analyzer.per_layer else layers[:1]:
            run(analyzer, layer, {n: logits.float() if n == "logits" else held[layer][n] for n in analyzer.needs})
    return kept


def future_loss(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"], valid: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Sum over tokens of -log p(token | those before it), in nats.

    Its gradient at position i is that of the loss of the tokens after i, because a state cannot reach earlier predictions.
    """
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
    return (losses * valid[:, 1:]).sum()


def check_layers(model: Any, layers: Any) -> tuple[int, ...]:
    """Layers in ascending order; None: all; negative ones count from the end.

    Raises:
        CaptureError: a layer that the model does not have.
    """
    count = door.n_layers(model)
    if layers is None:
        return tuple(range(count))
    given = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    wrong = [layer for layer in given if not isinstance(layer, Integral) or not -count <= int(layer) < count]
    if wrong or not given or given == [layers]:
        raise CaptureError(f"expected a list of layers between 0 and {count - 1}, got {wrong or given or 'none'}.")
    return tuple(sorted({int(layer) % count for layer in given}))


def check_points(model: Any, layers: Sequence[int], analyzers: Sequence[TokenMeasure]) -> None:
    """Refuse, before the pass, analyzers that need hook points the model does not have.

    Raises:
        CaptureError: with the names of the missing points.
    """
    points = {need for a in analyzers for need in a.needs if need not in ("logits", "gradient")}
    missing = door.missing_points(model, points | {"resid_pre", "resid_post"}, list(layers))
    if missing:
        raise CaptureError(
            f"expected the hook points the analyzers need, got a model without {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}. Leave out the analyzers that need them."
        )
