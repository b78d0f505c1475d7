"""What analyzers say of some tokens, noted as it is said."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.analyzers import CloudAnalyzer, Neighborhoods
from basin_lens.capture.returned import check_returned, own_code
from basin_lens.scoring.results import LayerNeighbors, Part


class Noted:
    """What analyzers say of some queries, in their order."""

    def __init__(self, analyzers: Sequence[CloudAnalyzer], count: int, keep: CloudAnalyzer | None) -> None:
        split = [a for a in analyzers if "halves" in a.needs and a.k >= 4]
        self.values = {
            prefix: {column.name: nothing(count) for a in some for column in a.columns}
            for prefix, some in (("value", analyzers), ("first", split), ("second", split))
        }
        kept = keep is not None and any(a is keep for a in analyzers)
        self.neighbors = LayerNeighbors.none(count, keep.k) if keep is not None and kept else None

    def part(self, rows: Int[Tensor, " n"]) -> Part:
        """The same as tensors; `rows`: of the queries."""
        found = {f"{prefix} {name}": value for prefix, held in self.values.items() for name, value in held.items()}
        if self.neighbors is not None:
            near = self.neighbors
            found |= {
                "near": torch.from_numpy(near.rows),
                "before": torch.from_numpy(near.before),
                "after": torch.from_numpy(near.after),
            }
        return Part({"rows": rows, **found})


def note(a: CloudAnalyzer, neighborhoods: Neighborhoods, there: Int[Tensor, " q"], answers: Mapping[str, Tensor]) -> None:
    """Put down what an analyzer says of neighborhoods."""
    with own_code(a.called, neighborhoods.layer, a.needs):
        values = a.measure(neighborhoods)
    check_returned(a.called, neighborhoods.layer, values, [c.name for c in a.columns], {"[q]": (len(there),)})
    for name, value in values.items():
        answers[name][there] = value.detach().float().cpu()


def keep_near(near: LayerNeighbors, neighborhoods: Neighborhoods, there: Int[Tensor, " q"]) -> None:
    """Keep these neighbors, with their distances before the map, and behind it if they pass it."""
    near.rows[there.numpy()] = neighborhoods.rows.cpu().numpy()
    near.before[there.numpy()] = neighborhoods.distances.cpu().numpy()
    if neighborhoods.images is not None:
        near.after[there.numpy()] = (neighborhoods.images - neighborhoods.query_image[:, None]).norm(dim=2).cpu().numpy()


def nothing(count: int) -> Float[Tensor, " count"]:
    return torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")
