"""Causal token merging: compression inside the model, without a look at the future."""

from basin_lens.merging.assign import RULES, Assigned, Clusters
from basin_lens.merging.cache import Stream, generate, streaming
from basin_lens.merging.hook import TokenMerger
from basin_lens.merging.options import Options

__all__ = ["RULES", "Assigned", "Clusters", "Options", "Stream", "TokenMerger", "generate", "streaming"]
