"""How many of its neighbors a token keeps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role
from basin_lens.errors import NeighborError
from basin_lens.transport import Context


@dataclass(frozen=True)
class NeighborOverlap(CloudScore):
    """Share of a token's k nearest neighbors before the block that are among its k nearest after it, beyond chance.

    neighbor_overlap = (o - k/m) / (1 - k/m), neighbor_overlap_raw = o

    o: share of the neighbors kept; m: how many tokens could have been chosen, so that k/m is what
    unrelated states would keep.
    1: all kept; 0: as many as by chance. Unit: share. Range: [-1, 1] and, raw, [0, 1]. NaN where m is not above k, because then
    every choice is the same. A token's neighbors can all change while the neighborhood neither shrinks nor grows, and the other way
    round: this says who, `Contraction` how near. At layer 0 of a rotary model all tokens of one id are one point, for which the
    first of them stands, so that few can be found again: read it from layer 1 on.

    Options and errors: see `Compression`. `name` becomes a prefix of the columns.

    Shapes: rows `[q, k]`, output_rows `[q, k]`, candidates `[q]` -> `[q]`.

    Raises:
        NeighborError: a context other than `"native"` (only tokens' own states can be neighbors at the output), or a choice other
            than `"nearest"`.

    Source: Doimo et al. 2020 (neighborhood overlap); adjusted for chance like Cohen's kappa.

    Example:
        >>> import basin_lens as bl
        >>> [column.name for column in bl.analyzers.NeighborOverlap(k=10).columns]
        ['neighbor_overlap', 'neighbor_overlap_raw']
    """

    role: ClassVar[Role] = "score"
    context: Context = "native"
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "output_neighbors", "candidates", "halves"})

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        # -1, not lower: of m tokens, two sets of k share at least 2k - m.
        return (Column(f"{prefix}neighbor_overlap", "share", -1, 1), Column(f"{prefix}neighbor_overlap_raw", "share", 0, 1))

    def check(self) -> None:
        super().check()
        if self.context != "native":
            raise NeighborError(
                f'expected context="native" for NeighborOverlap, got {self.context!r}: only tokens\' own states can be '
                "neighbors at the output. Leave the context out."
            )

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.output_rows is not None and neighborhoods.candidates is not None
        kept = (neighborhoods.rows[:, :, None] == neighborhoods.output_rows[:, None, :]).any(2).float().mean(1)
        chance = neighborhoods.output_rows.shape[1] / neighborhoods.candidates.float()
        kept = torch.where(chance < 1, kept, torch.nan)
        values = ((kept - chance) / (1 - chance), kept)
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}
