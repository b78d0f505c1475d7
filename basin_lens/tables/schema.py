"""What a table's provenance says: one record per run, plain JSON on disk and in `table.attrs`, typed fields here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real

from basin_lens.values import Facts


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        unit: of its values.
        low, high: bounds of its values; None for no bound.
        rows: what it has a value for, `"token"` or `"sequence"`; None for columns that a study made.
        analyzer: the class that measured it; None for columns that a study made.

    Example:
        >>> from basin_lens.tables import Column
        >>> Column.from_json(Column("nats", low=0.0).as_json())
        Column(unit='nats', low=0.0, high=None, rows=None, analyzer=None)
    """

    unit: str
    low: float | int | None = None
    high: float | int | None = None
    rows: str | None = None
    analyzer: str | None = None

    @classmethod
    def from_json(cls, facts: Facts) -> "Column":
        """The column that plain JSON describes."""
        return cls(facts.get("unit", ""), facts.get("low"), facts.get("high"), facts.get("rows"), facts.get("analyzer"))

    def as_json(self) -> Facts:
        """The column as plain JSON."""
        measured = {name: value for name, value in (("rows", self.rows), ("analyzer", self.analyzer)) if value is not None}
        return {"unit": self.unit, "low": self.low, "high": self.high, **measured}


# What each fact is in JSON.
_KINDS: dict[str, type] = {
    "seed": int,
    **dict.fromkeys(("precision", "texts", "neighbors", "queries", "asked"), str),
    **dict.fromkeys(("layers", "analyzers", "controls", "read_again_for"), list),
    **dict.fromkeys(("model", "copies", "capture", "columns", "left_out", "bank", "search", "study", "made"), dict),
    **dict.fromkeys(
        ("routes", "route_reasons", "compiled", "check_error", "affine_fit", "reliability", "reference_error", "groups"), dict
    ),
}


@dataclass(frozen=True)
class Provenance:
    """How one run of `analyze` was made. A field is None where nothing is known.

    Attributes:
        model: name, fingerprint, architecture, weight processing, versions.
        precision: of the computation, in words.
        texts: hash of the tokens.
        copies: texts that are copies of one another; see `basin_lens.texts.copies`.
        capture: how the texts were cut and read.
        layers: block indices measured.
        analyzers: the analyzers with their options.
        columns: the analyzers' columns by name.
        controls: random choices measured beside the scores.
        neighbors: whose neighbors were measured, in words.
        queries: which tokens were scored, in words.
        asked: which ones, where not all: places among the run's tokens from 0 on, such as `"3-7,12"`.
        seed: of every random choice.
        read_again_for: analyzers for which the model ran again.
        left_out: how many values are NaN, by column and reason.
        bank: where neighbors come from: source, points, sequences, hash.
        search: how neighbors were searched.
        routes: how the block was applied, by layer; `route_reasons`: why so.
        compiled: whether the block was compiled, by layer, or why not; empty if nobody asked for it.
        check_error: how far the block is from the captured states, by layer.
        affine_fit: fit of the affine map, by layer and number of blocks.
        reliability: Spearman correlation of a column over disjoint halves of the neighbors, by column and layer.
        reference_error: standard error of the reference that a column is held against, by column and layer; see
            `tables.reference_error`.
        groups: by layer and column, the groups of tokens that a score crosses; see `basin_lens.analyzers.Compression`.
        study: settings of the study that made the table.
        made: when, with which versions and by which command; see `tables.making`. It differs between two runs of one thing, and is
            no part of the run's name.
        others: further facts by name, as they are in JSON.

    Example:
        >>> from basin_lens.tables import Provenance
        >>> Provenance.from_json({"seed": 3, "note": "tried twice"}).as_json()
        {'seed': 3, 'note': 'tried twice'}
    """

    model: Facts | None = None
    precision: str | None = None
    texts: str | None = None
    copies: Facts | None = None
    capture: Facts | None = None
    layers: tuple[int, ...] | None = None
    analyzers: tuple[str, ...] | None = None
    columns: Mapping[str, Column] | None = None
    controls: tuple[str, ...] | None = None
    neighbors: str | None = None
    queries: str | None = None
    asked: str | None = None
    seed: int | None = None
    read_again_for: tuple[str, ...] | None = None
    left_out: Mapping[str, Mapping[str, int]] | None = None
    bank: Facts | None = None
    search: Facts | None = None
    routes: Mapping[str, str] | None = None
    route_reasons: Mapping[str, str] | None = None
    compiled: Mapping[str, bool | str] | None = None
    check_error: Mapping[str, float | int | None] | None = None
    affine_fit: Mapping[str, Facts] | None = None
    reliability: Mapping[str, Mapping[str, float | int | None]] | None = None
    reference_error: Mapping[str, Mapping[str, float | int | None]] | None = None
    groups: Mapping[str, Mapping[str, Facts]] | None = None
    study: Facts | None = None
    made: Facts | None = None
    others: Facts = field(default_factory=dict)

    @classmethod
    def from_json(cls, facts: Facts) -> "Provenance":
        """The record that plain JSON describes.

        A fact of another kind than tables keep under its name, as in provenance written by hand, is among `others`.
        """
        known = {name: facts[name] for name, kind in _KINDS.items() if isinstance(facts.get(name), kind)}
        for name in ("columns", "reliability", "reference_error"):
            if not all(isinstance(each, dict) for each in known.get(name, {}).values()):
                del known[name]
        others = {name: fact for name, fact in facts.items() if name not in known}
        typed = known | {name: tuple(fact) for name, fact in known.items() if isinstance(fact, list)}
        if "columns" in known:
            typed["columns"] = {name: Column.from_json(column) for name, column in known["columns"].items()}
        return cls(**typed, others=others)

    def as_json(self) -> Facts:
        """The record as plain JSON, without what is not known."""
        # In the order of the fields, which is the order on disk.
        held = {each.name: getattr(self, each.name) for each in fields(self) if each.name in _KINDS}
        facts = {name: list(fact) if isinstance(fact, tuple) else fact for name, fact in held.items() if fact is not None}
        if self.columns is not None:
            facts["columns"] = {name: column.as_json() for name, column in self.columns.items()}
        return {**facts, **self.others}

    def column(self, name: str) -> Column | None:
        """What is known of a column; None if nothing."""
        return None if self.columns is None else self.columns.get(name)

    def half_reliability(self, name: str, layer: object) -> float:
        """Correlation of a column over disjoint halves of the neighbors at one layer; NaN where it was not measured."""
        value = (self.reliability or {}).get(name, {}).get(_layer_name(layer))
        return float("nan") if value is None else float(value)

    def local(self, name: str, layer: object) -> float:
        """Median V_in of neighbors over that of random sets at one layer, where a column crosses groups; NaN where not measured."""
        value = (self.groups or {}).get(_layer_name(layer), {}).get(name, {}).get("local")
        return float("nan") if value is None else float(value)

    def error_of_reference(self, name: str, layer: object = None) -> float:
        """Standard error of a column's reference at one layer (None: the largest); 0 without one, NaN where it was not measured."""
        by_layer = (self.reference_error or {}).get(name)
        if by_layer is None:
            return 0.0
        errors = list(by_layer.values()) if layer is None else [by_layer.get(_layer_name(layer))]
        known = [float(error) for error in errors if error is not None]
        return max(known) if known and len(known) == len(errors) else float("nan")


def _layer_name(layer: object) -> str:
    """A layer as JSON names it, also one that pandas has made a float of."""
    return str(int(float(layer))) if isinstance(layer, Real) and float(layer).is_integer() else str(layer)
