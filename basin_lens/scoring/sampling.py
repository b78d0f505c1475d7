"""Which tokens are looked at where not all are."""

from collections import Counter

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from basin_lens.analyzers.drawing import drawing_order
from basin_lens.capture import Capture


def drawn_alike(capture: Capture, seed: int) -> Int[Tensor, " rows"]:
    """All rows in an order in which each is as likely to come first as any other."""
    return torch.randperm(capture.n_rows, generator=torch.Generator().manual_seed(seed % 2**63), device="cpu")


def drawn_in_turns(
    capture: Capture, able: Bool[Tensor, " rows"], units: Int[Tensor, " rows"], per_sequence: int, seed: int
) -> Int[Tensor, " able"]:
    """Rows that are able to be measured, some of one sequence, then of the next: the first of them are of few sequences.

    One sequence of each unit comes before a second one; once all have had their turn, they get another with tokens that are left.

    Args:
        capture: whose rows they are.
        able: rows that can be measured.
        units: of each row, such as its document.
        per_sequence: rows of a sequence in one turn, in `drawing_order`.
        seed: of the order of sequences.
    """
    rows_of: dict[int, Int[np.ndarray, " some"]] = {}
    starts = np.concatenate([[0], np.cumsum(capture.lengths.numpy())])
    for seq, sequence in enumerate(capture.sequences):
        rows = starts[seq] + drawing_order(sequence.tokens)
        rows_of[seq] = rows[able.numpy()[rows]]
    before: Counter[int] = Counter()
    keys, rows_in_order = [], []
    for place, seq in enumerate(np.random.default_rng(seed).permutation(len(capture.sequences)).tolist()):
        if not len(rows := rows_of[seq]):
            continue
        unit, rank = int(units[rows[0]]), np.arange(len(rows))
        alike = np.full(len(rows), before[unit]), np.full(len(rows), place)
        keys.append(np.stack([rank, *reversed(alike), rank // per_sequence]))
        rows_in_order.append(rows)
        before[unit] += 1
    if not keys:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    # The last key counts most: the turn, then how many sequences of the unit came before, then the sequence.
    return torch.from_numpy(np.concatenate(rows_in_order)[np.lexsort(np.concatenate(keys, axis=1))])
