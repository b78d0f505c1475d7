"""Levels that meet a target: a share of the tokens, or of the bytes."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from basin_lens.errors import MergeError
from basin_lens.merging.assign import assign, cosines

if TYPE_CHECKING:
    from basin_lens.merging.hook import TokenMerger

_CALIBRATION_STEPS = 14


def bytes_for(
    merger: "TokenMerger", rows: int, clusters: int, waiting: int, length: int = 0, *, numbers: int | None = None, closed: bool = False
) -> int:  # fmt: skip
    """Bytes that one sequence needs in one layer.

    Args:
        merger: prepared.
        rows: keys and values, each with its place (4 bytes).
        clusters: of them, those that tokens may join: leader and size (8 bytes), descriptor (float16), residual (float32).
        waiting: tokens in the recent window: descriptors (float16).
        length: of the sequence, for attention rows (float32).
        numbers: in all attention rows that are kept, if that is known better.
        closed: no token will be compared any more, so all that serves comparing can go.
    """
    o = merger.options
    held = rows * (merger.row_bytes + 4) + clusters * (8 + (0 if merger.down is None else 4 * merger.down.shape[1]))
    if closed:
        return held
    width = 0 if not o.compares else (merger.center.shape[1] if merger.head is None else merger.head.shape[1])
    described = (min(clusters, 1) if o.rule == "adjacent" else clusters) + waiting
    # A row is as long as its token's past: half the sequence, on average.
    numbers = (clusters + waiting) * length // 2 if numbers is None else numbers
    # What the adaptive threshold remembers: sum and last of the descriptors.
    carry = width * 8 if o.adaptive else 0
    return held + described * width * 2 + (4 * numbers if o.attention_weight else 0) + carry


def meet_target(
    merger: "TokenMerger", run: Callable[[dict[int, float]], list[dict[str, Any]]], length: int, context: int | None
) -> None:
    """Set the levels so that the target is met on the tokens that `run` runs over.

    Args:
        merger: with a target.
        run: sets the levels for these rates, layer by layer, in one pass, and says what was noted of each layer.
        length: of the sequences.
        context: see `TokenMerger.attached`.

    Raises:
        MergeError: out of reach.
    """
    o = merger.options
    # Position 0 and the window stay, and so does the first of a sequence that is offered: there is nothing to join.
    waiting = min(o.recent, length - 1) if context is None else 0
    clustered: float = length - 1 - waiting if context is None else min(context, length) - 1
    clustered *= 1 - o.preserve_share * (o.preserve != "none")
    most = max(0.0, clustered - 1) / length
    if o.target_bytes is None:
        rate = float(o.target_rate or 0)
    else:
        # Every cluster costs its row and its descriptor; a merged token saves both.
        whole = bytes_for(merger, length, round(clustered), waiting, length, closed=context is not None)
        each = bytes_for(merger, 2, 2, 0, closed=context is not None) - bytes_for(merger, 1, 1, 0, closed=context is not None)
        slope = len(o.layers) * each / (merger.n_layers * merger.row_bytes)
        left = 1 - len(o.layers) / merger.n_layers * (1 - whole / (length * merger.row_bytes))
        rate = (left - o.target_bytes) / slope
    for attempt in range(5):
        noted = run(o.rates(rate, merger.n_layers, most, strict=context is None))
        if o.target_bytes is None or o.rule == "random" or context is not None:
            return
        share = sum(row["bytes"] / row["full_bytes"] for row in noted) / len(o.layers)
        off = 1 - len(o.layers) / merger.n_layers * (1 - share) - o.target_bytes
        if abs(off) <= (0.01 if attempt < 3 else 0.02):
            return
        rate += off / slope
    raise MergeError(
        f"expected levels that leave {o.target_bytes} of the cache, got {o.target_bytes + off:.3f} at best. Ask for more, or "
        "calibrate on more tokens."
    )


def find_level(
    merger: "TokenMerger", wanted: int, descriptors: Float[np.ndarray, "batch pos width"], eligible: Bool[np.ndarray, "batch pos"],
    arguments: dict[str, Any],
) -> float:  # fmt: skip
    """The level at which about `wanted` tokens of this layer join: by halving for thresholds, else by its meaning."""
    o = merger.options
    count = int(eligible.sum())
    if o.rule in ("random", "bipartite"):
        opened = int(eligible.any(1).sum()) if o.rule == "random" else 0  # the first of a sequence has none to join
        return min(1.0, wanted / max(1, count - opened))
    scores = arguments["scores"][eligible] if o.scored else None

    def level(strict: float) -> float:
        if scores is not None:
            return float(np.quantile(scores, strict)) if count else 0.0
        return 1 - strict if o.rule == "stride" else o.floor + (1 - o.floor) * strict

    # What is compared does not depend on the level.
    similarity = [cosines(rows, rows) for rows in descriptors] if o.compares else None
    low, high, nearest = 0.0, 1.0, (math.inf, 1.0)
    for step in range(_CALIBRATION_STEPS + 1):
        middle = (low + high) / 2 if step else 0.0
        found = assign(descriptors, np.full(eligible.shape, level(middle)), eligible, similarity=similarity, **arguments)
        off = int(found.joined.sum()) - wanted
        if not step and off < -max(2, wanted // 50) and arguments["context"] is None:
            raise MergeError(
                f"expected a target that can be met, got one that needs {wanted} merges in a layer where {wanted + off} tokens of "
                f"{eligible.size} can be merged at most. Ask for less, or lower the floor."
            )
        nearest = min(nearest, (abs(off), level(middle)))
        if abs(off) <= wanted // 100:  # a hundredth is nearer than other texts will be
            break
        low, high = (middle, high) if off > 0 else (low, middle)
    return nearest[1]
