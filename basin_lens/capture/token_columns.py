"""Token analyzers on a capture: measured on what it holds (states, a user's patterns and gradients), or in one more pass."""

import warnings
from collections.abc import Sequence

from jaxtyping import Bool, Shaped
from torch import Tensor

from basin_lens.capture.batches import (
    TokenBatch,
    TokenMeasure,
    check_layers,
    check_points,
    layers_of,
    measured_values,
    token_batches,
)
from basin_lens.capture.cache_check import check_cache
from basin_lens.capture.caches import right_padded
from basin_lens.capture.columns import all_or_none, keep_values
from basin_lens.capture.reading import run_model
from basin_lens.capture.states import CapturedStates
from basin_lens.errors import CaptureError
from basin_lens.model import HookedModel, full_precision, logits_of
from basin_lens.values import Layers


def layers_asked(model: HookedModel, capture: CapturedStates, layers: Layers) -> tuple[int, ...]:
    """Layers of a capture in ascending order; None: all that it holds.

    Raises:
        CaptureError: a layer that the model does not have, or the capture does not hold.
    """
    if layers is None:
        return capture.layers
    asked = check_layers(model, layers)
    if not set(asked) <= set(capture.layers):
        raise CaptureError(
            f"expected layers of the capture {list(capture.layers)}, got {sorted(set(asked) - set(capture.layers))}. "
            "Capture again with layers=[...]."
        )
    return asked


def fill_columns(
    model: HookedModel,
    capture: CapturedStates,
    analyzers: Sequence[TokenMeasure],
    *,
    layers: Layers = None,
    progress: bool = True,
) -> list[str]:
    """Fill the columns of token analyzers that are not there yet: from what was read, else with one more pass.

    From what was read only `layers` are filled (None: all of the capture), and those that their values build on: of a user's cache
    no other is checked. The rest stays NaN until it is asked for. A second reading behind a user's cache is said (`UserWarning`).

    Returns:
        keys of the analyzers for which the model ran again.

    Raises:
        CaptureError: a hook point or a gradient that is not to be had, or a layer that the capture does not hold.
        TransportError: states of a user's cache that are not the model's.
    """
    asked = layers_asked(model, capture, layers)
    readable = [a for a in analyzers if _readable(capture, a)]
    again = [a for a in analyzers if a not in readable and a.key not in capture.columns]
    if again and not capture.states_of_model:
        made = capture.settings["controls"][-1]["name"]
        raise CaptureError(f"expected analyzers of states alone: {made} are not the model's own; got {again[0].key}. Leave it out.")
    check_points(model, capture.layers, again)
    looks = {a.key: layers_of(a, missing) for a in readable if (missing := _not_filled(capture, a, asked))}
    readable = [a for a in readable if a.key in looks]
    ends = [capture.model["layers"] - 1] if any("logits" in a.needs for a in readable) else []
    check_cache(model, capture, {*ends, *(layer for look in looks.values() for layer in look)})
    with full_precision(), all_or_none(capture, readable):
        for analyzer in readable:
            _measure_held(model, capture, analyzer, looks[analyzer.key])
    if again:
        if capture.settings["source"] == "cache":
            warnings.warn(
                f"The cache does not hold what {', '.join(a.key for a in again)} needs: the model reads the tokens once more.",
                stacklevel=2,
            )
        run_model(model, capture, again, batch_size=None, progress=progress, keep_states=False)
    return [analyzer.key for analyzer in again]


def _not_filled(capture: CapturedStates, analyzer: TokenMeasure, layers: Sequence[int]) -> list[int]:
    """Those of the layers at which an analyzer's columns hold no number: what was never asked for there must not pass for measured.

    Columns say so themselves, because they are saved and cut with the capture. Where nothing can be measured, it is tried again.
    """
    held = capture.columns.get(analyzer.key)
    if held is None or not analyzer.per_layer:
        return list(layers) if held is None else []
    return [layer for layer in layers if all(bool(column[layer].isnan().all()) for column in held.values())]


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


def _measure_held(model: HookedModel, capture: CapturedStates, analyzer: TokenMeasure, looks: Sequence[int]) -> None:
    """Fill an analyzer's columns at layers of which the capture holds what it needs; logits come from the last state, by batch."""
    batches = list(token_batches(capture, None))
    shape = capture.model["layers"], capture.n_rows
    memories: list[dict[str, Tensor]] = [{} for _ in batches]
    for layer in looks:
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
            measured = measured_values(analyzer, TokenBatch(layer, capture.model["layers"], tokens, valid, values, memory))
            keep_values(capture.columns, shape, rows, valid, analyzer, layer, measured)


def _grid(rows: Shaped[Tensor, "rows *d"], valid: Bool[Tensor, "batch pos"]) -> Shaped[Tensor, "batch pos *d"]:
    """Rows of some sequences as `[batch, pos, ...]`, padded with zeros."""
    grid = rows.new_zeros((*valid.shape, *rows.shape[1:]))
    grid[valid] = rows
    return grid
