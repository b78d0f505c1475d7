"""Points -> their nearest distinct neighbors, in chunks.

- `points.py`: what goes in and what comes out
- `eligible.py`: who may be whose neighbor, and how many could be
- `exact.py`: candidates by matrix product in torch, exact re-ranking until the answer is certain
- `flat.py`: candidates from FAISS's flat search instead
- `approximate.py`: candidates in a principal subspace, with measured recall
- `search.py`: `find`, which chooses
- `choices.py`, `own_choice.py`: other sets than the nearest, at random, as tight elsewhere, or by the caller's own rule
"""

from basin_lens.neighbors.eligible import count_candidates
from basin_lens.neighbors.own_choice import BothSides, ChoiceFunction, check_choice, name_of_choice, own_sets
from basin_lens.neighbors.points import Backend, Metric, Neighbors, Points, SameToken, has_direction, prefix_keys
from basin_lens.neighbors.search import find

__all__ = [
    "Backend",
    "BothSides",
    "ChoiceFunction",
    "Metric",
    "Neighbors",
    "Points",
    "SameToken",
    "check_choice",
    "count_candidates",
    "find",
    "has_direction",
    "name_of_choice",
    "own_sets",
    "prefix_keys",
]
