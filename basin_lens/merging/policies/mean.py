"""Clusters that are read through their running mean."""

from basin_lens.merging.policies.contract import Policy
from basin_lens.merging.policies.cosine import COSINE

MEAN = Policy("mean", "as cosine, the representative is the running mean", rule=COSINE.rule, options={"representative": "mean"})
