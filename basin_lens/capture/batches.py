"""One batch through the model: what token analyzers see, and the pass that fills them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from basin_lens.capture.layout import TokenRows
from basin_lens.capture.passes import TOKENS_PER_PASS, Passes, Target, target_values
from basin_lens.errors import CaptureError
from basin_lens.model import device_of, forward_pass, measuring, missing_points, output_weight, point_name, vocabulary_size
from basin_lens.model import n_layers as count_layers
from basin_lens.values import Whole, whole, whole_or_none

_NO_POINTS = {"logits", "gradient", "passes", "output_weight"}  # needs that are not read at a hook point of a block


@dataclass(frozen=True)
class TokenBatch:
    """One batch at one layer, as a token analyzer sees it.

    `values[name]` holds what the analyzer `needs`, `[batch, pos, ...]` (`pattern`: `[batch, head, query, key]`; `output_weight`:
    `[head, d_head, d]`). `memory` is the analyzer's own scratch, kept from layer to layer (ascending) of the same batch.
    `passes`: more passes over the batch, only if needed.
    """

    layer: int
    n_layers: int
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    values: Mapping[str, Tensor]
    memory: dict[str, Any]
    passes: Passes | None = None


@runtime_checkable
class TokenMeasure(Protocol):
    """What a capture asks of a token analyzer (`basin_lens.analyzers.TokenAnalyzer` is the base class)."""

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def per_layer(self) -> bool: ...
    @property
    def cumulative(self) -> bool: ...
    @property
    def target(self) -> Target | None: ...
    @property
    def key(self) -> str: ...
    def measure(self, batch: TokenBatch) -> dict[str, Tensor]: ...


def token_batches(
    rows: TokenRows, batch_size: Whole | None, boundary: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows, right-padded tokens and validity of batches of sequences of like length.

    `boundary`: no batch holds both sequences of more tokens than this and others (see `basin_lens.model.one_side`).

    Raises:
        CaptureError: a batch size below 1.
    """
    if batch_size is not None:
        batch_size = whole(batch_size, "batch_size", least=1, error=CaptureError, cure="Leave it out for about 1,000 tokens.")
    lengths = rows.lengths
    order = sorted(range(len(lengths)), key=lambda i: -int(lengths[i]))
    while order:
        longest = int(lengths[order[0]])
        size = batch_size or max(1, TOKENS_PER_PASS // longest)
        if boundary is not None and longest > boundary:
            size = min(size, sum(int(lengths[i]) > boundary for i in order))
        chosen, order = order[:size], order[size:]
        valid = torch.arange(longest, device="cpu")[None] < lengths[chosen][:, None]
        at = torch.cat([torch.arange(int(lengths[i]), device="cpu") + rows.offsets[i] for i in chosen])
        # Any id will do as padding: no real token of a causal model sees it.
        tokens = torch.zeros(len(chosen), longest, dtype=torch.int64, device="cpu")
        tokens[valid] = rows.row_token[at]
        yield at, tokens, valid


def layers_of(analyzer: TokenMeasure, layers: Sequence[int]) -> Sequence[int]:
    """Layers at which an analyzer looks, in order, when `layers` are asked for.

    The first of them if one look holds for every layer; all from 0 on if each layer's value builds on those below.
    """
    if not analyzer.per_layer:
        return layers[:1]
    return range(max(layers) + 1) if analyzer.cumulative else layers


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
    """One forward pass over a batch, and one backward pass for each different target of the gradients that analyzers want.

    Analyzers of patterns, states and other hook points run while the pass does: what they read is dropped as soon as the state leaves
    the block. Those of logits and gradients run behind it, and so do those that make passes of their own.

    Args:
        model: a hooked model.
        tokens: token ids, padded on the right.
        valid: which of them are real.
        layers: layers that are asked for.
        borders: block borders whose states are kept.
        analyzers: token analyzers to fill.
        keep: called with each analyzer, layer and its values.
        refuse_nonfinite: called with each kept border and its states; raises if they are not finite.

    Returns:
        states of the real tokens by border, `[rows, d]`, float32, on the CPU.
    """
    device = device_of(model)
    with torch.inference_mode(False):  # tensors made under a caller's inference_mode cannot take part in a backward pass
        tokens, valid_there = tokens.clone().to(device), valid.clone().to(device)
    count = count_layers(model)
    passes = Passes(model, tokens, valid_there)
    memories: dict[str, dict[str, Any]] = {a.key: {} for a in analyzers}
    at_layer = [a for a in analyzers if a.per_layer and not a.needs & {"logits", "gradient", "passes"}]
    sloped = [a for a in analyzers if "gradient" in a.needs]
    at_end = [a for a in analyzers if a not in at_layer and a not in sloped]
    looks = {a.key: layers_of(a, layers) for a in analyzers}
    visited = sorted({*layers, *(layer for look in looks.values() for layer in look)})
    held: dict[int, dict[str, Tensor]] = {layer: {} for layer in visited}
    live: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}

    def wants(need: str, layer: int, among: Sequence[TokenMeasure] = analyzers) -> bool:
        return any(need in a.needs and layer in looks[a.key] for a in among)

    def run(analyzer: TokenMeasure, layer: int, **more: Tensor) -> None:
        values = {n: v for n, v in {**held[layer], **more}.items() if n in analyzer.needs}
        if "output_weight" in analyzer.needs:
            values["output_weight"] = output_weight(model, layer)
        own = passes if "passes" in analyzer.needs else None
        with torch.no_grad():
            measured = analyzer.measure(TokenBatch(layer, count, tokens, valid_there, values, memories[analyzer.key], own))
        if layer in layers:
            keep(analyzer, layer, measured)

    def read_state(border: int) -> Callable[[Tensor], None]:
        def reader(state: Tensor) -> None:
            if border in borders:
                kept[border] = state.detach()[valid_there].float().cpu()
                refuse_nonfinite(border, kept[border])
            if border in held and wants("gradient", border):
                live[border] = state
            if border in held and wants("resid_pre", border):
                held[border]["resid_pre"] = state.detach().float()
            # The state leaving a block closes it: all that its analyzers need has been read by then.
            layer = border - 1
            if layer in held:
                if wants("resid_post", layer):
                    held[layer]["resid_post"] = state.detach().float()
                for analyzer in at_layer:
                    if layer in looks[analyzer.key]:
                        run(analyzer, layer)
                held[layer] = {n: value for n, value in held[layer].items() if wants(n, layer, [*sloped, *at_end])}

        return reader

    def read_point(need: str, layer: int) -> Callable[[Tensor], None]:
        def reader(value: Tensor) -> None:
            held[layer][need] = value.detach().float()

        return reader

    readers: dict[str, Callable[[Tensor], Tensor | None]] = {}
    for border in sorted({b for layer in visited for b in (layer, layer + 1)}):
        # A layer whose analyzers run when it closes is read at its own end, not at the next block's start.
        if border < count:
            readers[point_name("resid_pre", border)] = read_state(border)
        else:
            readers[point_name("resid_post", count - 1)] = read_state(count)
    points = {need for a in analyzers for need in a.needs} - _NO_POINTS - {"resid_pre", "resid_post"}
    for layer in visited:
        for need in points:
            if wants(need, layer):
                readers[point_name(need, layer)] = read_point(need, layer)

    with measuring(model, gradients=bool(sloped)):
        logits = forward_pass(model, tokens, readers, gradients=bool(sloped))
        shown = logits.detach().float() if any("logits" in a.needs for a in analyzers) else logits.detach()
        targets = list(dict.fromkeys(a.target for a in sloped if a.target is not None))
        for left, target in enumerate(reversed(targets)):
            total = target_values(logits, tokens, valid_there, target).sum()
            slopes = torch.autograd.grad(total, list(live.values()), retain_graph=left + 1 < len(targets))
            for layer, slope in zip(live, slopes, strict=True):
                for analyzer in sloped:
                    if analyzer.target == target and layer in looks[analyzer.key]:
                        run(analyzer, layer, gradient=slope.float(), logits=shown)
        del logits
        live.clear()
        for analyzer in at_end:
            for layer in looks[analyzer.key]:
                run(analyzer, layer, logits=shown)
    return kept


def check_layers(model: Any, layers: Any) -> tuple[int, ...]:
    """Layers in ascending order; None: all; negative ones count from the end.

    Raises:
        CaptureError: a layer that the model does not have.
    """
    count = count_layers(model)
    if layers is None:
        return tuple(range(count))
    # A 0-d tensor says that it can be iterated, and cannot.
    many = isinstance(layers, Iterable) and not isinstance(layers, str) and getattr(layers, "ndim", 1) > 0
    given = list(layers) if many else [layers]
    found = [whole_or_none(layer) for layer in given]
    wrong = [layer for layer, number in zip(given, found, strict=True) if number is None or not -count <= number < count]
    if wrong or not given or not many:
        raise CaptureError(f"expected a list of layers between 0 and {count - 1}, got {wrong or given or 'none'}.")
    return tuple(sorted({number % count for number in found if number is not None}))


def check_points(model: Any, layers: Sequence[int], analyzers: Sequence[TokenMeasure]) -> None:
    """Refuse, before the pass, analyzers that need hook points or gradients that the model does not give.

    Raises:
        CaptureError: with the names of the missing points.
    """
    for analyzer in analyzers:
        if analyzer.target == "cache":
            raise CaptureError(
                f"expected gradients (*_grad) in the cache for {analyzer.key}, got none. Make the capture with Capture.from_cache on a "
                "run_with_cache(..., incl_bwd=True), or use another target."
            )
        if "gradient" in analyzer.needs and analyzer.target is None:
            raise CaptureError(f"expected a target with the gradients that {analyzer.key} needs, got None. See TokenAnalyzer.")
        if isinstance(analyzer.target, int) and not 0 <= analyzer.target < vocabulary_size(model):
            raise CaptureError(
                f"expected a token id below {vocabulary_size(model)} as target of {analyzer.key}, got {analyzer.target}."
            )
    missing = missing_points(model, {"resid_pre", "resid_post"}, list(layers))
    for analyzer in analyzers:
        missing += missing_points(model, set(analyzer.needs - _NO_POINTS), list(layers_of(analyzer, layers)))
    if missing:
        raise CaptureError(
            f"expected the hook points the analyzers need, got a model without {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}. Leave out the analyzers that need them."
        )
