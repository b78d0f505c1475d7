"""Why values are missing."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from basin_lens.analyzers import CloudAnalyzer
from basin_lens.capture import Capture

_SELDOM = (
    "too few blocks left",
    "not sampled",
    "no group",
    "zero state, which has no cosine",
)  # reasons that are named only where they occur


def count_left_out(
    analyzer: CloudAnalyzer,
    answers: Mapping[str, Float[Tensor, " rows"]],
    capture: Capture,
    asked: Bool[Tensor, " rows"],
    *,
    complete: Bool[Tensor, " rows"] | None,
    sampled: Bool[Tensor, " rows"] | None = None,
    grouped: Bool[Tensor, " rows"] | None = None,
    undirected: Bool[Tensor, " rows"] | None = None,
) -> dict[str, dict[str, int]]:
    """How many values of an analyzer are missing at a layer, by column and reason; each missing value has one reason.

    Args:
        analyzer: a cloud analyzer.
        answers: its values, by column; NaN: missing. Columns of other analyzers are not looked at.
        capture: whose rows they are.
        asked: rows that were to be scored.
        complete: rows with as many neighbors as asked for; None: there is no block to pass.
        sampled: rows in the analyzer's sample; None: all.
        grouped: rows that were put into a group; None: none had to be.
        undirected: rows whose state has no length, and so no cosine with any other.
    """
    first = (capture.row_pos == 0) & (analyzer.exclude != "nothing")
    wanted = asked & ~first
    none = torch.zeros_like(wanted)
    looked = none if complete is None else wanted  # with no block to pass, no other reason counts
    enough = none if complete is None else complete
    there = torch.ones_like(wanted) if sampled is None else sampled.cpu()
    alone = none if grouped is None else ~grouped.cpu()
    zero = none if undirected is None else looked & undirected
    reasons = {
        "position 0": first,
        "not asked for": ~asked & ~first,
        "too few blocks left": wanted & ~looked,
        "zero state, which has no cosine": zero,
        "too few neighbors": looked & ~enough & ~zero,
        "not sampled": looked & enough & ~there,
        "no group": looked & enough & there & alone,
        "degenerate or undefined": looked & enough & there & ~alone,
    }
    named = {reason: where for reason, where in reasons.items() if reason not in _SELDOM or bool(where.any())}
    missing = {column.name: answers[column.name].isnan() for column in analyzer.columns}
    return {name: {reason: int((gone & where).sum()) for reason, where in named.items()} for name, gone in missing.items()}
