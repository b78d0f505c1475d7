"""Causal token merging: compression inside the model, without a look at the future.

`TokenMerger` merges in any pass (`attached`), `generate` keeps a compressed cache, `train_merger` learns where to merge,
`compare_policies` sets it beside baselines at equal bytes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from basin_lens.merging.assignment import Assigned, Clusters
    from basin_lens.merging.budgets import fit_budget
    from basin_lens.merging.cache import Stream, generate, streaming
    from basin_lens.merging.evaluation import Compared, Setting, by_layer, compare_policies, context_protocol, recent_window
    from basin_lens.merging.losses import Plain, excess, plain_pass, share_left, surprisal_for
    from basin_lens.merging.options import Options
    from basin_lens.merging.parachute import Parachute
    from basin_lens.merging.policies import POLICIES, RULES
    from basin_lens.merging.probes import generation_quality, induction_probe, merge_map
    from basin_lens.merging.token_merger import TokenMerger
    from basin_lens.merging.training import Trained, train_merger
    from basin_lens.merging.training_options import Training
    from basin_lens.merging.windows import Windows, windows_of

# Imported when asked for: the command line reads options from here, and must not wait for torch.
_HOMES = {
    "Assigned": "assignment",
    "by_layer": "evaluation",
    "Clusters": "assignment",
    "compare_policies": "evaluation",
    "Compared": "evaluation",
    "context_protocol": "evaluation",
    "excess": "losses",
    "fit_budget": "budgets",
    "generate": "cache",
    "generation_quality": "probes",
    "induction_probe": "probes",
    "merge_map": "probes",
    "Options": "options",
    "Parachute": "parachute",
    "Plain": "losses",
    "plain_pass": "losses",
    "POLICIES": "policies",
    "recent_window": "evaluation",
    "RULES": "policies",
    "Setting": "evaluation",
    "share_left": "losses",
    "Stream": "cache",
    "streaming": "cache",
    "surprisal_for": "losses",
    "TokenMerger": "token_merger",
    "train_merger": "training",
    "Trained": "training",
    "Training": "training_options",
    "Windows": "windows",
    "windows_of": "windows",
}

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


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"basin_lens.merging.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'basin_lens.merging' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
