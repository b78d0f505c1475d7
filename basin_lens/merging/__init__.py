"""Causal token merging: compression inside the model, without a look at the future.

`TokenMerger` merges in any pass (`attached`), `generate` keeps a compressed cache, `train_merger` learns where to merge, `compare_policies` sets
it beside baselines at equal bytes.
"""

from basin_lens.merging.assign import RULES, Assigned, Clusters
from basin_lens.merging.cache import Stream, generate, streaming
from basin_lens.merging.compare import (
    POLICIES,
    Compared,
    Setting,
    by_layer,
    compare_policies,
    context_protocol,
    generation_quality,
    induction_probe,
    merge_map,
    recent_window,
)
from basin_lens.merging.hook import TokenMerger
from basin_lens.merging.options import Options
from basin_lens.merging.train import Parachute, Trained, Training, train_merger
from basin_lens.merging.windows import Plain, Windows, excess, fit_budget, plain_pass, share_left, surprisal_for, windows_of

__all__ = [
    "POLICIES",
    "RULES",
    "Assigned",
    "Clusters",
    "Compared",
    "Options",
    "Parachute",
    "Plain",
    "Setting",
    "Stream",
    "TokenMerger",
    "Trained",
    "Training",
    "Windows",
    "by_layer",
    "compare_policies",
    "context_protocol",
    "excess",
    "fit_budget",
    "generate",
    "generation_quality",
    "induction_probe",
    "merge_map",
    "plain_pass",
    "recent_window",
    "share_left",
    "streaming",
    "surprisal_for",
    "train_merger",
    "windows_of",
]
