"""Texts or a capture -> the table. Read this page first.

    Request -> Plan -> Capture -> SearchResult -> images under a block -> scores of each layer -> Results -> table

The model reads the texts once. Then, layer by layer: the states around the block are checked against the block itself; each
distinct set of neighbor options is searched once; each context passes the union of those neighbors through the block once, a
thousand rows at a time; and every analyzer turns its neighborhoods into numbers before the images are dropped.

`request` what is asked for, checked once; `plan` what it comes to, as data; `run` does a plan's work, a layer at a time, with
`search`, `map_scores`, `spread` and `left_out`; `results` what was found; `analysis` goes from a request to the table.
"""

from basin_lens.scoring.analysis import Analysis, analyze, score
from basin_lens.scoring.comparison import compare
from basin_lens.scoring.neighbor_table import neighborhood
from basin_lens.scoring.plan import Plan
from basin_lens.scoring.request import Analyzers, Queries, Request
from basin_lens.scoring.results import KeptNeighbors, Results
from basin_lens.scoring.run import Run

__all__ = [
    "Analysis",
    "Analyzers",
    "KeptNeighbors",
    "Plan",
    "Queries",
    "Request",
    "Results",
    "Run",
    "analyze",
    "compare",
    "neighborhood",
    "score",
]
