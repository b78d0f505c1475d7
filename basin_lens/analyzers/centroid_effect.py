"""Whether the basin matters: what the model says when a state is replaced by the center of its neighbors."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from basin_lens.analyzers.contract import CloudScore, Column, Neighborhoods, Role, random_directions
from basin_lens.errors import NeighborError
from basin_lens.transport import Context
from basin_lens.values import Whole, whole_or_none


@dataclass(frozen=True)
class CentroidEffect(CloudScore):
    """Effect on the model's output of replacing a token's state by the centroid of its neighbors, beside a random displacement.

    The state that enters block L is replaced by c = mean of its k neighbors, or by h + ||c - h|| u with u a random unit vector, and
    the model runs on to the logits:
    centroid_divergence, displacement_divergence = KL(p || p') of the token's own prediction, p as it is, p' with the new state;
    centroid_later_loss, displacement_later_loss = rise of the mean loss of the sequence's later tokens

    If the neighborhood is a basin, where inside it a state lies matters little: the centroid's effect is small beside that of the
    random displacement of the same length. Units: nats, and nats per token. Range: [0, inf) for the divergences, all real numbers
    for the losses. The last token has no later ones: NaN.

    Options and errors: see `Compression`. `name` becomes a prefix of the columns. `blocks` has no part in it.

    Args:
        queries: at most so many tokens per layer are measured, because each costs two runs of the blocks that are left.
        seed: of the random displacements. Each token has its own, from the seed, the layer, its token id and its position.

    Shapes: query `[q, d]`, neighbors `[q, k, d]`, run_on `[q, 2, d]` -> `[q, 2]` -> `[q]`.

    Raises:
        NeighborError: a context other than `"native"` (the state goes through the whole rest of the model, in its own context);
            queries below 1, or a negative seed.

    Source: design of basin_lens; for states replaced in a run, Vig et al. 2020 (causal mediation).

    Example:
        >>> import basin_lens as bl
        >>> [column.unit for column in bl.analyzers.CentroidEffect(queries=8).columns]
        ['nats', 'nats per token', 'nats', 'nats per token']
    """

    role: ClassVar[Role] = "score"
    context: Context = "native"
    queries: Whole = 16
    seed: Whole = 0
    needs: ClassVar[frozenset[str]] = frozenset({"input_neighbors", "run_on"})

    @property
    def max_queries(self) -> int:
        """Tokens measured per layer."""
        return self.queries

    @property
    def columns(self) -> tuple[Column, ...]:
        prefix = f"{self.name}_" if self.name else ""
        return tuple(
            column
            for kind in ("centroid", "displacement")
            for column in (
                Column(f"{prefix}{kind}_divergence", "nats", 0),
                Column(f"{prefix}{kind}_later_loss", "nats per token"),
            )
        )

    def check(self) -> None:
        super().check()
        if self.context != "native":
            raise NeighborError(
                f'expected context="native" for CentroidEffect, got {self.context!r}: the state goes through the whole rest of the '
                "model in its own context. Leave the context out."
            )
        for option, least in {"queries": 1, "seed": 0}.items():
            if (found := whole_or_none(getattr(self, option))) is None or found < least:
                raise NeighborError(f"expected {option} of at least {least} for CentroidEffect, got {getattr(self, option)!r}.")

    def measure(self, neighborhoods: Neighborhoods) -> dict[str, Tensor]:
        assert neighborhoods.run_on is not None
        step = neighborhoods.neighbors.mean(1) - neighborhoods.query
        random = torch.nn.functional.normalize(random_directions(neighborhoods, 1, self.seed)[:, 0], dim=1)
        moves = torch.stack([step, step.norm(dim=1, keepdim=True) * random], dim=1)
        effect = neighborhoods.run_on(neighborhoods.query[:, None] + moves)
        values = (effect.divergence[:, 0], effect.later_loss[:, 0], effect.divergence[:, 1], effect.later_loss[:, 1])
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}
