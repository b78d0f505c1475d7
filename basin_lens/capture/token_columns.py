"""Token analyzers on a capture: measured on what it holds (states, a user's patterns and gradients), or in one more pass."""

from collections.abc import Sequence

from jaxtyping import Bool, Shaped
from torch import Tensor

from basin_lens.capture.batches import TokenBatch, TokenMeasure, check_points, layers_of, token_batches
from basin_lens.capture.cache_check import check_cache
from basin_lens.capture.caches import right_padded
from basin_lens.capture.columns import all_or_none, keep_values
from basin_lens.capture.reading import run_model
from basin_lens.capture.states import CapturedStates
from basin_lens.errors import CaptureError
from basin_lens.model import HookedModel, full_precision, logits_of


def fill_columns(
    model: HookedModel, capture: CapturedStates, analyzers: Sequence[TokenMeasure], *, progress: bool = True
) -> list[str]:
    """Fill the columns of token analyzers that are not there yet: from what was read, else with one more pass.

    Returns:
        keys of the analyzers for which the model ran again.

    Raises:
        CaptureError: a hook point or a gradient that is not to be had.
        TransportError: states of a user's cache that are not the model's.
    """
    missing = [a for a in analyzers if a.key not in capture.columns]
    readable = [a for a in missing if _readable(capture, a)]
    again = [a for a in missing if a not in readable]
    if again and not capture.states_of_model:
        made = capture.settings["controls"][-1]["name"]
        raise CaptureError(f"expected analyzers of states alone: {made} are not the model's own; got {again[0].key}. Leave it out.")
    check_points(model, capture.layers, again)
    ends = [capture.model["layers"] - 1] if any("logits" in a.needs for a in readable) else []
    check_cache(model, capture, {*ends, *(layer for a in readable for layer in layers_of(a, capture.layers))})
    with full_precision(), all_or_none(capture, readable):
        for analyzer in readable:
            _measure_held(model, capture, analyzer)
    if again:
        run_model(model, capture, again, batch_size=None, progress=progress, keep_states=False)
    return [analyzer.key for analyzer in again]


def _readable(capture: CapturedStates, analyzer: TokenMeasure) -> bool:
    """Whether an analyzer can be measured on what the capture holds."""
    looks = layers_of(analyzer, capture.layers)
    if analyzer.needs <= {"resid_pre", "resid_post"} and analyzer.target is None:
        return set(looks) <= set(capture.layers)
    if capture.settings["source"] != "cache" or analyzer.target not in (None, "cache") or not set(looks) <= set(capture.layers):
        return False
    return all(_holds(capture, need, layer) for layer in looks for need in analyzer.needs)


def _holds(capture: CapturedStates, need: str, layer: int) -> bool:
    """Whether a reading is there, or can be had from the states (logits)."""
    if need == "logits":
        return capture.model["layers"] - 1 in capture.layers and capture.states_of_model
    return need in ("resid_pre", "resid_post") or f"{need}.{layer}" in capture._readings


def _measure_held(model: HookedModel, capture: CapturedStates, analyzer: TokenMeasure) -> None:
    """Fill an analyzer's columns of a capture that holds what it needs; logits come from the last state, a batch at a time."""
    batches = list(token_batches(capture, None))
    memories: list[dict[str, Tensor]] = [{} for _ in batches]
    for layer in layers_of(analyzer, capture.layers):
        # A border may lie on disk: it is read once.
        borders = {"resid_pre": layer, "resid_post": layer + 1, "logits": capture.model["layers"]}
        states = {need: capture.border(borders[need]) for need in analyzer.needs & borders.keys()}
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
                keep_values(capture, rows, valid, analyzer, layer, measured)


def _grid(rows: Shaped[Tensor, "rows *d"], valid: Bool[Tensor, "batch pos"]) -> Shaped[Tensor, "batch pos *d"]:
    """Rows of some sequences as `[batch, pos, ...]`, padded with zeros."""
    grid = rows.new_zeros((*valid.shape, *rows.shape[1:]))
    grid[valid] = rows
    return grid
