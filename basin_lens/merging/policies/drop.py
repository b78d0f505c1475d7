"""Dropping in place of merging."""

from basin_lens.merging.policies.contract import Policy
from basin_lens.merging.policies.cosine import COSINE

DROP = Policy("drop", "as cosine, but what would join is dropped", rule=COSINE.rule, options={"drop": True})
