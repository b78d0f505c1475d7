"""Two analyzers of one's own, to begin with: one of neighborhoods, one of the forward pass. Pass instances to `bl.analyze`."""

from dataclasses import dataclass

from torch import Tensor

from basin_lens.analyzers import CloudScore, Column, Neighborhoods, TokenAnalyzer, TokenBatch


@dataclass(frozen=True)
class CentroidShift(CloudScore):  # k, context, metric, exclude, ... come with it
    """How far the block moves the neighborhood's centroid."""

    needs = frozenset({"input_neighbors", "images"})
    columns = (Column("centroid_shift", "state units", 0),)  # name, unit, smallest value, largest value

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        """`[q, k, d]` -> `[q]`."""
        return {"centroid_shift": (neighborhoods.images.mean(1) - neighborhoods.neighbors.mean(1)).norm(dim=1)}


@dataclass(frozen=True)
class ActiveNeurons(TokenAnalyzer):
    """Share of the feed-forward neurons that are positive."""

    needs = frozenset({"mlp.hook_post"})
    columns = (Column("active_neurons", "share", 0, 1),)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        """`[batch, pos, neurons]` -> `[batch, pos]`."""
        return {"active_neurons": (batch.values["mlp.hook_post"] > 0).float().mean(-1)}
