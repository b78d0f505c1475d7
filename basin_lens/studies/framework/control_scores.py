"""The headline score on random points and on equally tight neighborhoods of other tokens, for studies that compare with them."""

from collections.abc import Sequence

from basin_lens.analyzers import Analyzer
from basin_lens.analyzers.control import controls_of
from basin_lens.studies.framework.spec import ScoreOptions

_CONTROLLED = 2048  # tokens per layer: enough for means over documents, and each control costs as much as the score


def sampled_controls(scoring: ScoreOptions) -> Sequence[Analyzer]:
    """Controls of the headline score on a sample of the tokens."""
    return controls_of([scoring.headline], queries=_CONTROLLED)
