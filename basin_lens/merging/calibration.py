"""Calibration: centers, directions and quantiles of the states, and levels that meet a target on texts that nothing is tested
on.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.errors import MergeError
from basin_lens.merging.assignment import assign
from basin_lens.merging.merge_pass import Given, MergePass, Reader, Undecided, alone_in, context_statistics
from basin_lens.merging.options import Options
from basin_lens.merging.parameters import Parameters
from basin_lens.merging.similarity import cosines
from basin_lens.merging.statistics import Row
from basin_lens.model import HookedModel, forward_pass, measuring, point_name

# Halvings of the range of levels, and passes over the texts for a target in bytes.
_HALVINGS = 14
_PASSES = 5


def calibrate_parameters(parameters: Parameters, model: HookedModel, tokens: Int[Tensor, "batch pos"], given: Given) -> None:
    """Set all that is calibrated, in place; see `TokenMerger.calibrate`.

    Raises:
        MergeError: a target that cannot be met, too few tokens, or something missing.
    """
    o = parameters.options
    aimed = o.target_rate is not None or o.target_bytes is not None
    if o.preserve == "surprisal" and given.surprisal is None:
        raise MergeError("expected surprisal with preserve='surprisal', got none. Give it to calibrate.")
    given.check(o, needed=aimed)
    with alone_in(model, o.layers), measuring(model):
        forward_pass(model, tokens, _gatherers(parameters, given))
        if o.preserve == "surprisal" and given.surprisal is not None:
            real = _behind_the_first(given, given.surprisal)
            parameters.surprisal_cutoff.fill_(float(given.surprisal[real].quantile(1 - o.preserve_share)))

        def run(rates: Mapping[int, float]) -> list[Row]:
            tuned = MergePass(o, parameters, given, before=partial(_set_rate, parameters, given, rates))
            forward_pass(model, tokens, tuned.readers())
            return tuned.noted

        if aimed:
            length = tokens.shape[1] if given.valid is None else round(float(given.valid.sum(1).float().mean()))
            meet_target(parameters, run, length, given.context)


def _behind_the_first(given: Given, values: Tensor) -> Tensor:
    """Real tokens without position 0: the attention sink is far from everything."""
    real = given.real(values.shape[:2], values.device).clone()
    real[:, 0] = False
    return real


def _gatherers(parameters: Parameters, given: Given) -> dict[str, Reader]:
    """Readers of the states that enter each merged layer; they change nothing in the model."""
    return {
        point_name("resid_pre", layer): partial(_gather, parameters, given, index)
        for index, layer in enumerate(parameters.options.layers)
    }


def _gather(parameters: Parameters, given: Given, index: int, states: Float[Tensor, "batch pos d"]) -> None:
    """Center, principal directions, and the statistics of norms and features."""
    given.check_shape(states)
    o, real = parameters.options, _behind_the_first(given, states)
    rows = states[real].float()
    least = max(2, 0 if parameters.head is None else parameters.head.shape[1])
    if len(rows) < least:
        raise MergeError(f"expected {least} tokens or more behind position 0 to calibrate on, got {len(rows)}. Give more text.")
    parameters.center[index] = rows.mean(0)
    if parameters.head is not None:
        # Principal directions: what a cosine in few numbers keeps most of.
        directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh
        parameters.head.data[index] = directions[: parameters.head.shape[1]]
    units, norms = parameters.describe(index, states)
    if o.preserve == "norm":
        parameters.norm_cutoff[index] = norms[real].float().quantile(1 - o.preserve_share)
    features = context_statistics(units, norms, None)[0][real].float()
    parameters.feature_mean[index] = features.mean(0)
    parameters.feature_scale[index] = features.std(0).clamp(min=1e-3)


def _set_rate(parameters: Parameters, given: Given, rates: Mapping[int, float], asked: Undecided) -> None:
    """Set a layer's level so that its rate is met on the tokens at hand."""
    tokens = asked.eligible.size if given.valid is None else int(given.valid.sum())
    parameters.set_level(asked.index, find_level(parameters.options, round(rates[asked.layer] * tokens), asked))


def meet_target(parameters: Parameters, run: Callable[[Mapping[int, float]], list[Row]], length: int, context: int | None) -> None:
    """Set the levels so that the target is met on the tokens that `run` runs over.

    Args:
        parameters: of a merger with a target.
        run: sets the levels for these rates, layer by layer, in one pass, and gives the statistics of each layer.
        length: of the sequences.
        context: see `TokenMerger.attached`.

    Raises:
        MergeError: out of reach.
    """
    o, n_layers, row_bytes = parameters.options, parameters.shape.n_layers, parameters.shape.row_bytes
    closed, share = context is not None, len(o.layers) / n_layers
    # Position 0 and the window stay, and so does the first of a sequence that is offered: there is nothing to join.
    waiting = min(o.recent, length - 1) if context is None else 0
    clustered: float = length - 1 - waiting if context is None else min(context, length) - 1
    clustered *= 1 - o.preserve_share * (o.preserve != "none")
    most = max(0.0, clustered - 1) / length
    if o.target_bytes is None:
        run(o.rates(float(o.target_rate or 0), n_layers, most, strict=not closed))
        return
    # Every cluster costs its row and its descriptor; a merged token saves both.
    whole = parameters.cache_bytes(length, round(clustered), waiting, length, closed=closed)
    each = parameters.cache_bytes(2, 2, 0, closed=closed) - parameters.cache_bytes(1, 1, 0, closed=closed)
    slope = len(o.layers) * each / (n_layers * row_bytes)
    left = 1 - share * (1 - whole / (length * row_bytes))
    rate = (left - o.target_bytes) / slope
    for attempt in range(_PASSES):
        noted = run(o.rates(rate, n_layers, most, strict=not closed))
        if not o.decision.exact or closed:
            return
        found = sum(row["bytes"] / row["full_bytes"] for row in noted) / len(o.layers)
        off = 1 - share * (1 - found) - o.target_bytes
        if abs(off) <= (0.01 if attempt < 3 else 0.02):
            return
        rate += off / slope
    raise MergeError(
        f"expected levels that leave {o.target_bytes} of the cache, got {o.target_bytes + off:.3f} at best. Ask for more, or "
        "calibrate on more tokens."
    )


def find_level(options: Options, wanted: int, asked: Undecided) -> float:
    """The level at which about `wanted` tokens of this layer join: where the rule does not know it, by halving.

    Raises:
        MergeError: so many cannot be merged.
    """
    rule, eligible, descriptors = options.decision, asked.eligible, asked.descriptors
    known = rule.level_for(wanted, int(eligible.sum()), int(eligible.any(1).sum()))
    if known is not None:
        return known
    given = asked.arguments["scores"]
    scores = given[eligible] if rule.scored and given is not None else None
    # What is compared does not depend on the level.
    similarity = [cosines(rows, rows) for rows in descriptors] if options.compares else None
    low, high, nearest = 0.0, 1.0, (math.inf, 1.0)
    for step in range(_HALVINGS + 1):
        middle = (low + high) / 2 if step else 0.0
        level = rule.level_at(middle, options.floor, scores)
        found = assign(descriptors, np.full(eligible.shape, level), eligible, similarity=similarity, **asked.arguments)
        off = int(found.joined.sum()) - wanted
        if not step and off < -max(2, wanted // 50) and asked.arguments["context"] is None:
            raise MergeError(
                f"expected a target that can be met, got one that needs {wanted} merges in a layer where {wanted + off} tokens of "
                f"{eligible.size} can be merged at most. Ask for less, or lower the floor."
            )
        nearest = min(nearest, (abs(off), level))
        if abs(off) <= wanted // 100:  # a hundredth is nearer than other texts will be
            break
        low, high = (middle, high) if off > 0 else (low, middle)
    return nearest[1]
