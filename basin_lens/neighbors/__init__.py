"""Points -> their nearest distinct neighbors, in chunks.

- `points.py`: what goes in and what comes out
- `eligible.py`: who may be whose neighbor, and how many could be
- `exact.py`: candidates by matrix product in torch, exact re-ranking until the answer is certain
- `flat.py`: candidates from FAISS's flat search instead
- `approximate.py`: candidates in a principal subspace, with measured recall
- `search.py`: `find`, which chooses
"""

from basin_lens.neighbors.eligible import count_candidates
from basin_lens.neighbors.points import Backend, Metric, Neighbors, Points, SameToken, has_direction, prefix_keys
from basin_lens.neighbors.search import find

__all__ = ["Backend", "Metric", "Neighbors", "Points", "SameToken", "count_candidates", "find", "has_direction", "prefix_keys"]
