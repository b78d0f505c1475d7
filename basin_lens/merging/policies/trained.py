"""The merger that a training made."""

from basin_lens.merging.policies.contract import Policy
from basin_lens.merging.policies.cosine import COSINE

# Comes first: if a budget is out of its reach, that is said before hours went by.
TRAINED = Policy(
    "trained", "the trained merger, all thresholds moved together to the budget", rule=COSINE.rule, trained=True, turn=0
)
