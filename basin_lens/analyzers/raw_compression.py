"""The original guide's quantity, with the exclusions that keep it defined."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basin_lens.analyzers.contract import DEGENERATE, CloudScore, Column, Neighborhoods, Role, total_variance
from basin_lens.transport import Context


@dataclass(frozen=True)
class RawCompression(CloudScore):
    """Negative log of the total variance of the neighbors' images.

    raw = -log(V_out + 1e-10)

    Unit: nats (of squared state units, so it moves with the growth of norms). Range: all real numbers up to 23.03. Mostly input
    density in disguise: on SmolLM2-135M, layer 12, log V_in and log V_out correlate at 0.99. Kept for comparison with the
    guide; read `Compression` instead. Options and errors: see `Compression`; the context is `"native"` as in the guide.

    Shapes: images `[q, k, d]` -> `[q]`.

    Source: the original guide, with our exclusions.

    Example:
        >>> import basin_lens as bl
        >>> bl.analyzers.RawCompression().context
        'native'
    """

    role: ClassVar[Role] = "score"
    context: Context = "native"
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "images", "halves"})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "raw_compression", "nats", high=23.03),)

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.images is not None
        variance = total_variance(neighborhoods.images)
        score = -(variance + 1e-10).log()
        return {self.columns[0].name: score.masked_fill(variance <= DEGENERATE * neighborhoods.spread_out, float("nan"))}
