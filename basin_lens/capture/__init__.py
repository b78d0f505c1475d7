"""A model and texts -> `Capture`: one row per token, the residual states at block borders, and what was measured on the way.

A block border b is the state that enters block b; border `n_layers` is the state that leaves the last block. One forward pass
per batch; only the hook points asked for are read, and token analyzers are filled while the pass runs, layer by layer, so
that attention patterns are never held for more than one layer.
"""

from basin_lens.capture.batches import TokenBatch, TokenMeasure, check_layers
from basin_lens.capture.cache_check import check_cache, tolerance_of
from basin_lens.capture.derived import border_states, borders, subset, with_states, with_tokens
from basin_lens.capture.passes import Passes, Target, future_loss
from basin_lens.capture.planning import Mask
from basin_lens.capture.reading import read_states
from basin_lens.capture.record import Bank, Capture
from basin_lens.capture.reference import kept_banks, planned_reference, reference_capture
from basin_lens.capture.states import CapturedStates
from basin_lens.capture.token_columns import fill_columns, layers_asked
from basin_lens.model import StateCache

__all__ = [
    "Bank",
    "Capture",
    "CapturedStates",
    "Mask",
    "StateCache",
    "Passes",
    "Target",
    "TokenBatch",
    "TokenMeasure",
    "border_states",
    "borders",
    "check_cache",
    "check_layers",
    "fill_columns",
    "future_loss",
    "kept_banks",
    "layers_asked",
    "planned_reference",
    "read_states",
    "reference_capture",
    "subset",
    "tolerance_of",
    "with_states",
    "with_tokens",
]
