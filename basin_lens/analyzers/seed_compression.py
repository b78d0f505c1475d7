"""The original guide's score as it was written, for comparison with earlier figures."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.contract import Choice, CloudScore, Column, Neighborhoods, Role, total_variance
from basin_lens.neighbors import Metric, SameToken
from basin_lens.transport import Context


@dataclass(frozen=True)
class SeedCompression(CloudScore):
    """Negative log of the total variance of the native images of the k nearest points, the token itself among them.

    seed = -log(V_out + 1e-10)

    Everything in the bank counts, as in the guide: position 0, the same sequence, duplicates. The guide drops the embedding, so
    its step l is our row l+1 and row 0 is NaN; the last row uses the final-normed output, as the guide's library does.
    Unit: nats. Range: up to 23.03. It is input density in disguise and knows no confound: read `Compression` instead.

    Args:
        k: points, the token itself included.
        name: column name.

    Shapes: images `[q, k, d]` -> `[q]`.

    Raises:
        NeighborError: with an external bank, which does not hold the token itself.

    Source: the original guide.

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.SeedCompression(k=15).exclude
        'nothing'
    """

    role: ClassVar[Role] = "score"
    # Not to be chosen: anything else would not be the guide's score.
    context: Context = field(default="native", init=False)
    blocks: int = field(default=1, init=False)
    metric: Metric = field(default="l2", init=False)
    exclude: str = field(default="nothing", init=False)
    same_token: SameToken = field(default="any", init=False)
    position_0: bool = field(default=True, init=False)
    choice: Choice = field(default="nearest", init=False)
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "images", "halves", "final_norm"})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "seed_compression", "nats", high=23.03),)

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.images is not None and neighborhoods.final_norm is not None
        images = (
            neighborhoods.final_norm(neighborhoods.images)
            if neighborhoods.layer == neighborhoods.n_layers - 1
            else neighborhoods.images
        )
        score = -(total_variance(images) + 1e-10).log()
        return {self.columns[0].name: torch.full_like(score, torch.nan) if neighborhoods.layer == 0 else score}
