"""Which sequences of the texts are measured."""

from collections import Counter

import numpy as np

from basin_lens.capture import Capture
from basin_lens.errors import StudyError

FEWEST_TOKENS = 12  # shorter ones have too few scored tokens for a correlation; prompts of a template can be that short


def choose_sequences(
    planned: Capture, most: int | None, per_document: int, seed: int, fewest: int = FEWEST_TOKENS
) -> tuple[list[int], int]:
    """Sequences of at least `fewest` tokens to measure, in their own order, and how many were too short."""
    if (most is not None and most < 1) or per_document < 1:
        raise StudyError(f"expected max_sequences and per_document of at least 1, got {most} and {per_document}.")
    long = [seq for seq, length in enumerate(planned.lengths.tolist()) if length >= fewest]
    short = len(planned.sequences) - len(long)
    if most is None or len(long) <= most:
        return long, short
    docs = list(dict.fromkeys(planned.docs[seq] for seq in long))
    order = {docs[place]: rank for rank, place in enumerate(np.random.default_rng(seed).permutation(len(docs)).tolist())}
    seen: Counter[str] = Counter()
    ranked = []
    for seq in long:
        doc = planned.docs[seq]
        ranked.append((seen[doc] // per_document, order[doc], seq))
        seen[doc] += 1
    return sorted(seq for _, _, seq in sorted(ranked)[:most]), short
