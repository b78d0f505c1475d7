"""What a run found: values by column, how reliable they are, what was left out and why, and what a table says of its making."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.capture import Capture
from basin_lens.scoring.plan import Plan
from basin_lens.scoring.request import Request
from basin_lens.scoring.token_rows import places_of, texts_hash
from basin_lens.values import Facts


@dataclass(frozen=True)
class LayerNeighbors:
    """Neighbors behind one score at one layer: bank rows, and distances before and after the block; -1 and NaN: none.

    `groups`: rows of the tokens that were crossed with one another, for a score that crosses them.
    """

    rows: Int[np.ndarray, "rows k"]
    before: Float[np.ndarray, "rows k"]
    after: Float[np.ndarray, "rows k"]
    groups: Int[np.ndarray, "groups g"] | None = None

    @classmethod
    def none(cls, n_rows: int, k: int) -> "LayerNeighbors":
        """No neighbors for any row, to be filled."""
        distances = [np.full((n_rows, k), np.nan, np.float32) for _ in (0, 1)]
        return cls(np.full((n_rows, k), -1, np.int64), *distances)


@dataclass(frozen=True)
class KeptNeighbors:
    """Who the neighbors behind one score are: bank rows and distances before and after the block, `[layers, rows, k]`; -1, NaN:
    none.

    `bank`: token, doc, seq and pos of each row of the bank. `own`: whether the bank is the texts themselves. `groups`: by layer, of
    a score that crosses tokens.
    """

    rows: np.ndarray
    before: np.ndarray
    after: np.ndarray
    bank: pd.DataFrame
    score: str
    own: bool
    groups: tuple[np.ndarray | None, ...] = ()

    @classmethod
    def of(cls, layers: Sequence[LayerNeighbors], bank: Capture, score: str, *, own: bool) -> "KeptNeighbors":
        """The neighbors of several layers, in order."""
        about = pd.DataFrame(
            {
                "token": bank.row_strings(),
                "doc": [bank.docs[s] for s in bank.row_seq.tolist()],
                "seq": bank.row_seq.numpy(),
                "pos": bank.row_pos.numpy(),
            }
        )
        return cls(
            np.stack([some.rows for some in layers]),
            np.stack([some.before for some in layers]),
            np.stack([some.after for some in layers]),
            about,
            score,
            own,
            tuple(some.groups for some in layers),
        )


@dataclass(frozen=True)
class Part:
    """What a piece of the work at a layer finds, before all of them come to its scores: tensors, and facts as plain JSON."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)

    def under(self, name: str) -> "Part":
        """What stands under a name (see `put`)."""
        tensors = {key.removeprefix(name): value for key, value in self.tensors.items() if key.startswith(name)}
        return Part(tensors, self.facts.get(name, {}))

    def put(self, name: str, part: "Part") -> None:
        """Put another part's finds under a name."""
        self.tensors.update({name + key: value for key, value in part.tensors.items()})
        self.facts[name] = part.facts


@dataclass
class LayerScores:
    """What one piece of a plan found.

    Attributes:
        layer: where.
        values: by column, for each row of the capture; NaN: left out.
        reliability: Spearman correlation over disjoint halves of the neighbors, by column; None: not defined.
        reference_error: standard error of what a column is held against, by column; None: not defined.
        left_out: how many values are missing, by column and reason.
        facts: route, reason for it, error of the check and affine fit of the layer, by their names in provenance.
        search: what was noted of the layer's searches, by its name in provenance.
        neighbors: behind one score, if they were to be kept.
    """

    layer: int
    values: dict[str, Float[np.ndarray, " rows"]] = field(default_factory=dict)
    reliability: dict[str, float | None] = field(default_factory=dict)
    reference_error: dict[str, float | None] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)
    search: Facts = field(default_factory=dict)
    neighbors: LayerNeighbors | None = None


@dataclass(frozen=True)
class Results:
    """What a whole plan found, besides the values: as in `LayerScores`, by column and layer."""

    plan: Plan
    reliability: dict[str, dict[str, float | None]] = field(default_factory=dict)
    reference_error: dict[str, dict[str, float | None]] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)

    def take_columns(self, capture: Capture) -> None:
        """What is missing among the values of token analyzers, which the capture holds."""
        for analyzer in self.plan.of_tokens:
            held = capture.columns[analyzer.key]
            for column in analyzer.columns:
                rows = list(self.plan.layers) if analyzer.per_layer else [0] * len(self.plan.layers)
                missing = sum(int(held[column.name][row].isnan().sum()) for row in rows)
                self.left_out[column.name] = {"not defined at this position": missing}

    def begin(self, facts: Facts) -> None:
        """Make room for what layers will add: `facts` are those of the whole run."""
        self.facts.update(facts, **{name: {} for name in _OF_LAYERS})
        self.reliability.update({c.name: {} for a in self.plan.of_neighbors if "halves" in a.needs for c in a.columns})
        self.left_out.update({column.name: {} for a in self.plan.of_neighbors for column in a.columns})

    def add(self, scores: LayerScores) -> None:
        """Add what one layer's piece found, besides its values."""
        for name, fact in scores.facts.items():
            self.facts.setdefault(name, {})[str(scores.layer)] = fact
        for name, fact in scores.search.items():
            self.facts["search"][name][str(scores.layer)] = fact
        for name, agreement in scores.reliability.items():
            self.reliability[name][str(scores.layer)] = agreement
        for name, error in scores.reference_error.items():
            self.reference_error.setdefault(name, {})[str(scores.layer)] = error
        for name, reasons in scores.left_out.items():
            counts = self.left_out[name]
            for reason, count in reasons.items():
                counts[reason] = counts.get(reason, 0) + count


_OF_LAYERS = ("routes", "route_reasons", "compiled", "check_error", "affine_fit")


def provenance(
    request: Request,
    capture: Capture,
    asked: Bool[Tensor, " rows"],
    results: Results,
    *,
    read_again_for: Sequence[str],
    frozen: bool,
) -> Facts:
    """What a table says of its making, as plain JSON."""
    analyzers = results.plan.analyzers
    return {
        "model": capture.model,
        "precision": "full: autocast and reduced float32 products off",
        "texts": texts_hash(capture),
        "copies": capture.copies,
        "capture": capture.settings,
        "layers": list(results.plan.layers),
        "analyzers": [a.key for a in analyzers],
        "columns": {
            c.name: {"unit": c.unit, "low": _finite(c.low), "high": _finite(c.high), "rows": a.rows, "analyzer": type(a).__name__}
            for a in analyzers
            for c in a.columns
        },
        "controls": request.nulls,
        "neighbors": "frozen: those of another run" if frozen else "its own",
        "queries": "all" if request.queries is None else f"{int(asked.sum())} of {capture.n_rows} tokens",
        **({} if request.queries is None else {"asked": places_of(asked)}),
        "seed": request.seed,
        "read_again_for": list(read_again_for),
        "left_out": results.left_out,
        **results.facts,
        **({"reliability": results.reliability} if results.plan.of_neighbors else {}),
        **({"reference_error": results.reference_error} if results.reference_error else {}),
    }


def _finite(bound: float | int) -> float | int | None:
    """A bound as JSON has it: None for no bound."""
    return bound if np.isfinite(bound) else None
