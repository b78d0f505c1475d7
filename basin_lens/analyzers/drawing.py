"""Which positions of a sequence come first where not all can be measured."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def drawing_order(tokens: Sequence[int], seed: int = 0) -> Int[np.ndarray, " positions"]:
    """Positions of a sequence in an order drawn from the seed and its own tokens, whatever other sequences there are.

    Position 0, mostly an attention sink, and the last two, behind which no loss is predicted from them, come at the end. So
    measurements that take the first few of this order take the same tokens, and can be compared token by token.

    Args:
        tokens: ids.
        seed: of the draw.

    Example:
        >>> from basin_lens.analyzers.drawing import drawing_order
        >>> sorted(drawing_order([5, 3, 8, 1, 9, 2])[:3].tolist())
        [1, 2, 3]
    """
    able = np.random.default_rng([seed, *tokens]).permutation(np.arange(1, max(1, len(tokens) - 2)))
    return np.concatenate([able, np.setdiff1d(np.arange(1, len(tokens)), able), np.arange(min(1, len(tokens)))]).astype(np.int64)
