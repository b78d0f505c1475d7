"""How long each state is."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basin_lens.analyzers.contract import Column, Role, TokenAnalyzer
from basin_lens.capture import TokenBatch


@dataclass(frozen=True)
class StateNorm(TokenAnalyzer):
    """Euclidean norm of the state that enters the block, position 0 included.

    state_norm = ||h||, h = resid_pre

    Unit: state units. Range: [0, inf). Position 0 is often 10 to 1,000 times the others.

    Args:
        name: column name.

    Shapes: resid_pre `[batch, pos, d]` -> `[batch, pos]`.

    Source: design of basin_lens; for the first token, Sun et al. 2024, "Massive activations".

    Example:
        >>> import basin_lens as bl
        >>> sorted(bl.analyzers.StateNorm().needs)
        ['resid_pre']
    """

    role: ClassVar[Role] = "confound"
    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"resid_pre"})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "state_norm", "state units", 0),)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {self.columns[0].name: batch.values["resid_pre"].norm(dim=-1)}
