"""How many directions the states of a sequence use."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.capture import TokenBatch


@dataclass(frozen=True)
class MatrixEntropy(TokenAnalyzer):
    """Normalized von Neumann entropy of a sequence's states entering the block, and their anisotropy.

    States centered over the tokens, rows scaled to unit length, K = Z Z^T / trace with eigenvalues l:
    matrix_entropy = -sum l log l / log min(T, d); anisotropy = max l / sum l.

    Each with position 0 and without (`_without_first`): a massive first token alone can make the "compression valley".
    Unit: share of the maximum. Range: [0, 1]. One number per sequence, repeated on its tokens; NaN where fewer than 3 states
    are left: two centered rows are one direction, whatever they are.

    Args:
        name: prefix of the columns.

    Shapes: resid_pre `[batch, pos, d]` -> `[batch]`.

    Source: Skean et al. 2025, "Layer by layer" (prompt entropy).

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.MatrixEntropy().rows
        'sequence'
    """

    role: ClassVar[Role] = "score"
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"resid_pre"})
    rows: ClassVar = "sequence"

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        names = ("matrix_entropy", "matrix_entropy_without_first", "anisotropy", "anisotropy_without_first")
        return tuple(Column(prefix + name, "share", 0, 1) for name in names)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        states = batch.values["resid_pre"]
        answers = torch.full((4, len(states)), torch.nan, device=states.device)
        for index, length in enumerate(batch.valid.sum(1).tolist()):
            for column, first in enumerate((0, 1)):
                spectrum = unit_spectrum(states[index, first:length])
                if spectrum is None:
                    continue
                entropy = -torch.special.xlogy(spectrum, spectrum).sum()
                answers[column, index] = entropy / math.log(min(length - first, states.shape[-1]))
                answers[column + 2, index] = spectrum.max()
        return {column.name: answer for column, answer in zip(self.columns, answers, strict=True)}


def unit_spectrum(states: Float[Tensor, "t d"]) -> Float[Tensor, " l"] | None:
    """Eigenvalues, summing to 1, of the Gram matrix of centered, unit-length rows; None for fewer than 3 rows."""
    if len(states) < 3:
        return None
    rows = torch.nn.functional.normalize(states - states.mean(0), dim=1)
    values = torch.linalg.svdvals(rows).square()
    return values / values.sum()
