"""Token rows: the real tokens of all sequences, one after the other, position 0 included."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from basin_lens.errors import CaptureError
from basin_lens.texts import Passage, TokenSequence
from basin_lens.texts.copies import copies_in
from basin_lens.values import Facts, Plain, whole, whole_numbers


@dataclass
class TokenRows:
    """Sequences of tokens and where each row comes from."""

    sequences: list[TokenSequence]
    passages: list[Passage] | None
    docs: list[str]
    labels: list[dict[str, Plain]]
    strings: dict[int, str]

    @cached_property
    def lengths(self) -> Int[Tensor, " seqs"]:
        """Tokens per sequence."""
        return torch.tensor([len(s.tokens) for s in self.sequences], device="cpu")

    @cached_property
    def offsets(self) -> Int[Tensor, " seqs"]:
        """First row of each sequence."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def n_rows(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum())

    @cached_property
    def row_seq(self) -> Int[Tensor, " rows"]:
        """Sequence of each row."""
        return torch.repeat_interleave(torch.arange(len(self.sequences), device="cpu"), self.lengths)

    @cached_property
    def row_pos(self) -> Int[Tensor, " rows"]:
        """Position in its sequence of each row, from 0 (the BOS token, if there is one)."""
        return torch.arange(self.n_rows, device="cpu") - self.offsets[self.row_seq]

    @cached_property
    def row_token(self) -> Int[Tensor, " rows"]:
        """Token id of each row."""
        return torch.tensor([token for s in self.sequences for token in s.tokens], device="cpu")

    @cached_property
    def valid(self) -> Bool[Tensor, "seqs pos"]:
        """Which cells of the right-padded `[sequence, position]` grid are tokens."""
        return torch.arange(int(self.lengths.max()), device="cpu")[None] < self.lengths[:, None]

    @cached_property
    def copies(self) -> Facts:
        """Which passages are copies of one another, as plain JSON; see `basin_lens.texts.copies.copies_in`."""
        return copies_in(self.sequences, self.docs, self.strings)

    def row_strings(self) -> list[str]:
        """Text of each row's token by itself."""
        return [self.strings[token] for token in self.row_token.tolist()]

    @whole_numbers(CaptureError)
    def row_of(self, seq: int, pos: int) -> int:
        """Row of a token.

        Raises:
            CaptureError: there is no such token.
        """
        seq, pos = (whole(value, name, error=CaptureError) for value, name in ((seq, "seq"), (pos, "pos")))
        if not 0 <= seq < len(self.sequences) or not 0 <= pos < int(self.lengths[seq]):
            known = f"there are {len(self.sequences)} sequences"
            if 0 <= seq < len(self.sequences):
                known = f"sequence {seq} has {int(self.lengths[seq])} tokens"
            raise CaptureError(f"expected a token of this capture, got seq={seq}, pos={pos}; {known}.")
        return int(self.offsets[seq]) + pos
