"""Token analyzers on what a capture holds already: states, and the patterns and gradients of a user's cache."""

from typing import Any

from jaxtyping import Bool
from torch import Tensor

from basin_lens.capture.batches import TokenBatch, TokenMeasure, layers_of, token_batches
from basin_lens.capture.caches import right_padded
from basin_lens.model import logits_of


def holds(capture: Any, need: str, layer: int) -> bool:
    """Whether a reading is there, or can be had from the states (logits)."""
    if need == "logits":
        return capture.model["layers"] - 1 in capture.layers and bool(capture.settings.get("states_of_model", True))
    return need in ("resid_pre", "resid_post") or f"{need}.{layer}" in capture._readings


def measure_readings(model: Any, capture: Any, analyzer: TokenMeasure) -> None:
    """Fill an analyzer's columns of a capture that holds what it needs; logits are computed from the last state, a batch at a time."""
    batches = list(token_batches(capture, None))
    memories: list[dict[str, Any]] = [{} for _ in batches]
    for layer in layers_of(analyzer, capture.layers):
        # A border may lie on disk: it is read once.
        borders = {"resid_pre": layer, "resid_post": layer + 1, "logits": capture.model["layers"]}
        states = {need: capture._border(borders[need]) for need in analyzer.needs & borders.keys()}
        for memory, (rows, tokens, valid) in zip(memories, batches, strict=True):
            values = {need: _grid(held[rows], valid) for need, held in states.items()}
            if "logits" in values:
                values["logits"] = logits_of(model, values["logits"]).cpu()
            seqs = capture.row_seq[rows].unique_consecutive()
            for need in analyzer.needs - borders.keys():
                reading, padding = capture._readings[f"{need}.{layer}"][seqs], capture._readings["valid"][seqs]
                values[need] = right_padded(reading, padding, valid.shape[1], square=need == "pattern")
            measured = analyzer.measure(TokenBatch(layer, capture.model["layers"], tokens, valid, values, memory))
            if layer in capture.layers:
                capture._keep(rows, valid, analyzer, layer, measured)


def _grid(rows: Tensor, valid: Bool[Tensor, "batch pos"]) -> Tensor:
    """Rows of some sequences as `[batch, pos, ...]`, padded with zeros."""
    grid = rows.new_zeros((*valid.shape, *rows.shape[1:]))
    grid[valid] = rows
    return grid
