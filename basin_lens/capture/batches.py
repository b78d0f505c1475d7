"""Batches of token rows: how sequences are put together, what a token analyzer sees of them, and what it may ask for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from basin_lens.capture.layout import TokenRows
from basin_lens.capture.passes import TOKENS_PER_PASS, Passes, Target
from basin_lens.capture.returned import check_returned, own_code
from basin_lens.errors import CaptureError
from basin_lens.model import HookedModel, missing_points, vocabulary_size
from basin_lens.model import n_layers as count_layers
from basin_lens.values import Layers, Whole, several, whole, whole_or_none

NO_POINTS = {"logits", "gradient", "passes", "output_weight"}  # needs that are not read at a hook point of a block


@dataclass(frozen=True)
class TokenBatch:
    """One batch at one layer, as a token analyzer sees it.

    `values[name]` holds what the analyzer `needs`, `[batch, pos, ...]` (`pattern`: `[batch, head, query, key]`; `output_weight`:
    `[head, d_head, d]`). `memory` holds what the analyzer puts there, kept from layer to layer (ascending) of the same batch.
    `passes`: more passes over the batch, only if needed.
    """

    layer: int
    n_layers: int
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    values: Mapping[str, Tensor]
    memory: dict[str, Tensor]
    passes: Passes | None = None


@runtime_checkable
class NamedColumn(Protocol):
    """What a capture asks of a column (`basin_lens.analyzers.Column`)."""

    @property
    def name(self) -> str: ...


@runtime_checkable
class TokenMeasure(Protocol):
    """What a capture asks of a token analyzer (`basin_lens.analyzers.TokenAnalyzer` is the base class)."""

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def columns(self) -> Sequence[NamedColumn]: ...
    @property
    def rows(self) -> str: ...
    @property
    def per_layer(self) -> bool: ...
    @property
    def cumulative(self) -> bool: ...
    @property
    def target(self) -> Target | None: ...
    @property
    def key(self) -> str: ...
    def measure(self, batch: TokenBatch) -> dict[str, Tensor]: ...
    def check_all(self) -> None: ...


def check_analyzers(analyzers: Sequence[TokenMeasure]) -> None:
    """Refuse, before any work, what is no token analyzer, and what one declares wrongly.

    Raises:
        CaptureError: no token analyzer. AnalyzerError, NeighborError: see `basin_lens.analyzers.Analyzer.check_all`.
    """
    for analyzer in analyzers:
        if isinstance(analyzer, type) or not isinstance(analyzer, TokenMeasure):
            raise CaptureError(
                f"expected token analyzers (instances, such as Surprisal()), got {analyzer!r}. Those that look at neighbors are "
                "for analyze."
            )
        analyzer.check_all()


def measured_values(analyzer: TokenMeasure, batch: TokenBatch) -> dict[str, Tensor]:
    """What an analyzer measures on a batch at a layer: one tensor of the right shape for each of its columns.

    Raises:
        AnalyzerError: its own code failed, or gave anything else.
    """
    whose, shape = type(analyzer).__name__, tuple(batch.valid.shape)
    with own_code(whose, batch.layer, analyzer.needs):
        values = analyzer.measure(batch)
    shapes = {"[batch, pos]": shape} if analyzer.rows == "token" else {"[batch]": shape[:1], "[batch, pos]": shape}
    check_returned(whose, batch.layer, values, [column.name for column in analyzer.columns], shapes)
    return values


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


def check_layers(model: HookedModel, layers: Layers) -> tuple[int, ...]:
    """Layers in ascending order; one number: that layer; None: all; negative ones count from the end.

    Raises:
        CaptureError: a layer that the model does not have.
    """
    count = count_layers(model)
    if layers is None:
        return tuple(range(count))
    many = several(layers)
    given = [layers] if many is None else many
    found = [whole_or_none(layer) for layer in given]
    wrong = [layer for layer, number in zip(given, found, strict=True) if number is None or not -count <= number < count]
    if wrong or not given:
        raise CaptureError(f"expected a layer, or layers between 0 and {count - 1}, got {wrong or 'none'}.")
    return tuple(sorted({number % count for number in found if number is not None}))


def check_points(model: HookedModel, layers: Sequence[int], analyzers: Sequence[TokenMeasure]) -> None:
    """Refuse, before the pass, analyzers that need hook points or gradients that the model does not give.

    Raises:
        CaptureError: with the names of the missing points.
    """
    for analyzer in analyzers:
        if analyzer.target == "cache":
            raise CaptureError(
                f"expected gradients (*_grad) in the cache for {analyzer.key}, got none. Make the capture with "
                "Capture.from_cache on a run_with_cache(..., incl_bwd=True), or use another target."
            )
        if "gradient" in analyzer.needs and analyzer.target is None:
            raise CaptureError(f"expected a target with the gradients that {analyzer.key} needs, got None. See TokenAnalyzer.")
        if isinstance(analyzer.target, int) and not 0 <= analyzer.target < vocabulary_size(model):
            raise CaptureError(
                f"expected a token id below {vocabulary_size(model)} as target of {analyzer.key}, got {analyzer.target}."
            )
    _refuse_missing("a capture", missing_points(model, {"resid_pre", "resid_post"}, list(layers)))
    for analyzer in analyzers:
        missing = missing_points(model, set(analyzer.needs - NO_POINTS), list(layers_of(analyzer, layers)))
        _refuse_missing(type(analyzer).__name__, missing)


def _refuse_missing(whose: str, missing: Sequence[str]) -> None:
    if missing:
        raise CaptureError(
            f"expected the hook points that {whose} needs, got a model without {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}. An analyzer may need resid_pre, resid_post, pattern, "
            f"{', '.join(sorted(NO_POINTS))}, or a point below a block (model.hook_dict lists them); else leave it out."
        )
