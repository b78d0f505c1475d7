"""A token's rank in the model's prediction, and the token of a rank: exact, ties in the order of ids."""

import numpy as np
from jaxtyping import Float, Int

from basin_lens.errors import CodecError


def rank_of(logits: Float[np.ndarray, "rows vocab"], tokens: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """How many tokens the model holds more likely than the one given; 0 is its first choice.

    rank = #{v: l_v > l_token} + #{v < token: l_v = l_token}

    Args:
        logits: `[rows, vocab]`, without NaN.
        tokens: `[rows]` token ids.

    Returns:
        int64 ranks in [0, vocab).

    Example:
        >>> import numpy as np
        >>> from basin_lens.codec.ranks import rank_of, token_of
        >>> logits = np.array([[0.0, 2.0, 2.0, 1.0]], np.float32)
        >>> [int(rank_of(logits, np.array([token]))[0]) for token in (1, 2, 3, 0)]
        [0, 1, 2, 3]
        >>> [int(token_of(logits, np.array([rank]))[0]) for rank in range(4)]
        [1, 2, 3, 0]
    """
    ranks = np.empty(len(tokens), np.int64)
    for index, (row, token) in enumerate(zip(logits, tokens, strict=True)):
        ranks[index] = np.count_nonzero(row > row[token]) + np.count_nonzero(row[:token] == row[token])
    return ranks


def token_of(logits: Float[np.ndarray, "rows vocab"], ranks: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """The token of each rank: the inverse of `rank_of`.

    Raises:
        CodecError: a rank outside of [0, vocab).
    """
    tokens = np.empty(len(ranks), np.int64)
    for index, (row, rank) in enumerate(zip(logits, ranks.tolist(), strict=True)):
        if not 0 <= rank < len(row):
            raise CodecError(f"expected a rank in [0, {len(row)}), got {rank}. The file is damaged or of another model.")
        if rank == 0:
            tokens[index] = np.argmax(row)  # the first of equals
            continue
        place = len(row) - 1 - rank
        value = np.partition(row, place)[place]
        equals = np.flatnonzero(row == value)
        tokens[index] = equals[rank - np.count_nonzero(row > value)]
    return tokens
