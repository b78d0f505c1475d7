"""Captures and models with structure destroyed on purpose, from a seed; and one score under other settings.

What a finding must beat: tokens in random order, states with nothing but means and covariances, layers that do not correspond,
a model that has learned nothing. Each control is a capture (or a model) like any other: pass it to `analyze`.

A capture made here says so: `capture.settings["controls"]` lists what was done, in order, each with its seed, and
`capture.settings["states_of_model"]` is False where the states are not the model's own (absent: they are).
"""

from basin_lens.controls.nulls import gaussian_states, permuted_layers, shuffled_tokens
from basin_lens.controls.sweeps import sweep
from basin_lens.model import random_twin

__all__ = ["gaussian_states", "permuted_layers", "random_twin", "shuffled_tokens", "sweep"]
