"""Logits -> integer frequencies that encoder and decoder share to the last bit."""

import numpy as np
from jaxtyping import Float, Int

from basin_lens.errors import CodecError

PRECISION = 24
TOTAL = 1 << PRECISION


def frequencies(logits: Float[np.ndarray, "rows vocab"]) -> Int[np.ndarray, "rows vocab"]:
    """The softmax of each row in whole numbers, for an entropy coder.

    Each row is computed by itself, in float64, from its first entry to its last. See `quantize`.

    Args:
        logits: float32, `[rows, vocab]`; minus infinity for a token that cannot come.

    Returns:
        int32 of the same shape: every entry at least 1, every row's sum exactly 2^24. One token costs at most
        -log2(1 - vocab / 2^24) bits more than with the exact softmax (0.004 at 49,152 tokens) beside what rounding adds to it.

    Raises:
        CodecError: a row with NaN or plus infinity, or with no finite entry.

    Source: Witten, Neal and Cleary 1987 (arithmetic coding); the precision is that of `constriction` (Bamler 2022).

    Example:
        >>> import numpy as np
        >>> from basin_lens.codec.probabilities import frequencies
        >>> frequencies(np.zeros((1, 4), np.float32))
        array([[4194304, 4194304, 4194304, 4194304]], dtype=int32)
    """
    table = np.empty(logits.shape, np.int32)
    for row, line in zip(logits, table, strict=True):
        line[:] = quantize(weights(row))
    return table


def weights(logits: Float[np.ndarray, " vocab"]) -> Float[np.ndarray, " vocab"]:
    """exp(logits - their maximum) in float64.

    Raises:
        CodecError: NaN or plus infinity among the logits, or no finite one.
    """
    wide = logits.astype(np.float64)
    top = wide.max()
    if not np.isfinite(top):  # a NaN makes the maximum NaN
        raise CodecError(f"expected finite logits, got a maximum of {top}. Use float32, or another model.")
    wide -= top
    return np.exp(wide, out=wide)


def quantize(weights: Float[np.ndarray, " vocab"]) -> Int[np.ndarray, " vocab"]:
    """Weights, not all zero, as whole numbers of at least 1 and of sum 2^24.

    Each entry gets 1; the rest is cut at floor(cumulative share x rest), so that the sum is exact by construction and no entry
    bears the rounding of all others.
    """
    rest = TOTAL - len(weights)
    if rest < len(weights):
        raise CodecError(f"expected a vocabulary of at most {TOTAL // 2} tokens, got {len(weights)}. Use another model.")
    cuts = np.cumsum(weights)  # one after the other: the order of the sum is part of the format
    cuts *= rest / cuts[-1]
    np.floor(cuts, out=cuts)
    cuts[-1] = rest
    return np.diff(cuts, prepend=0.0).astype(np.int32) + np.int32(1)


def uncertainty(logits: Float[np.ndarray, "rows vocab"]) -> Float[np.ndarray, " rows"]:
    """Entropy of each row's softmax, in bits, in [0, log2(vocab)].

    Example:
        >>> import numpy as np
        >>> from basin_lens.codec.probabilities import uncertainty
        >>> uncertainty(np.zeros((1, 4), np.float32))
        array([2.])
    """
    return np.array([_entropy(weights(row)) for row in logits])


def _entropy(weights: Float[np.ndarray, " vocab"]) -> float:
    shares = weights / weights.sum()
    return float(-np.sum(shares * np.log2(shares, out=np.zeros_like(shares), where=shares > 0)))
