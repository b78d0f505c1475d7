"""What an analyzer declares, checked before any work: a mistake is named where it was made, not where it strikes."""

import difflib
import inspect
import math
from collections.abc import Collection
from dataclasses import dataclass

from basin_lens.errors import AnalyzerError
from basin_lens.values import whole_or_none


@dataclass(frozen=True)
class Column:
    """A column of the table: its name, unit, and the range of values it can take."""

    name: str
    unit: str
    low: float | int = -float("inf")
    high: float | int = float("inf")


def declared(analyzer: object, name: str, cure: str) -> object:
    """What an analyzer says of itself under a name.

    Raises:
        AnalyzerError: there is nothing under it, or the analyzer's own property failed.
    """
    kind = type(analyzer).__name__
    missing = object()
    if inspect.getattr_static(analyzer, name, missing) is missing:
        raise AnalyzerError(f"expected {name} in {kind}, got a class without it. {cure}")
    try:
        return getattr(analyzer, name)
    except Exception as error:
        raise AnalyzerError(
            f"expected {name} of {kind}, got {type(error).__name__}: {error}. Its own code failed there."
        ) from error


def check_description(analyzer: object) -> None:
    """Refuse a class that does not print its options: by them results are told apart, and provenance names the analyzer."""
    kind = type(analyzer)
    if kind.__repr__ is object.__repr__ and "key" not in vars(kind):
        raise AnalyzerError(
            f"expected {kind.__name__} to be a frozen dataclass, which is told apart by its options, got a plain class. Write "
            f"@dataclass(frozen=True) above class {kind.__name__}."
        )


def check_needs(analyzer: object, known: Collection[str] | None, said: str) -> None:
    """Refuse needs that are no frozenset of names, or, where `known` are all there is, unknown ones. `said`: what there is."""
    kind, needs = type(analyzer).__name__, declared(analyzer, "needs", 'Write needs = frozenset({"..."}).')
    if not isinstance(needs, frozenset) or not all(isinstance(need, str) and need for need in needs):
        raise AnalyzerError(
            f'expected needs of {kind} as a frozenset of names, got {needs!r}. Write needs = frozenset({{"..."}}), of {said}.'
        )
    unknown = sorted(needs - set(needs if known is None else known))
    if unknown:
        raise AnalyzerError(
            f"expected needs of {kind} among {said}, got {', '.join(unknown)}.{did_you_mean(unknown[0], known or ())}"
        )


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The nearest known names as a sentence, with a space before it; nothing if none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=2)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def check_columns(analyzer: object) -> None:
    """Refuse columns that are none, no `Column`s, twice the same, or without a name, a unit or a range."""
    kind = type(analyzer).__name__
    cure = 'Write columns = (Column("NAME", "UNIT", LOW, HIGH),), Column from basin_lens.analyzers.'
    columns = declared(analyzer, "columns", cure)
    if not isinstance(columns, tuple | list) or not columns:
        raise AnalyzerError(f"expected columns of {kind} as a tuple of at least one Column, got {columns!r}. {cure}")
    for column in columns:
        if not isinstance(column, Column):
            raise AnalyzerError(f"expected columns of {kind} to be Columns, got {column!r} ({type(column).__module__}). {cure}")
        if not (isinstance(column.name, str) and column.name.strip() and isinstance(column.unit, str) and column.unit.strip()):
            raise AnalyzerError(
                f'expected each column of {kind} to have a name and a unit as text, got {column!r}. Say "share" or "count" of a '
                "pure number."
            )
        bounds = (column.low, column.high)
        wrong = [b for b in bounds if isinstance(b, bool) or not isinstance(b, int | float) or math.isnan(b)]
        if wrong or not column.low < column.high:
            raise AnalyzerError(
                f"expected a range of numbers, low below high, for column {column.name!r} of {kind}, got {bounds}. Leave a bound "
                "out where there is none."
            )
    names = [column.name for column in columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnalyzerError(f"expected different columns of {kind}, got {twice[0]!r} twice. Give each a name of its own.")


def check_one_of(analyzer: object, name: str, allowed: Collection[object]) -> None:
    """Refuse a value other than those allowed."""
    value = declared(analyzer, name, f"Set it to one of {tuple(allowed)}.")
    if not any(value is one or (type(value) is type(one) and value == one) for one in allowed):
        raise AnalyzerError(
            f"expected {name} of {type(analyzer).__name__} in {tuple(allowed)}, got {value!r}. Set it to one of these."
        )


def check_count(analyzer: object, name: str) -> None:
    """Refuse a number of tokens that is neither None nor a whole number from 1 on."""
    value = declared(analyzer, name, "Leave it out for all tokens.")
    if value is not None and (whole_or_none(value) or 0) < 1:
        raise AnalyzerError(
            f"expected {name} of {type(analyzer).__name__} as None or a whole number from 1 on, got {value!r}. None: all tokens."
        )


def check_values(analyzer: object, rows: Collection[str], roles: Collection[str]) -> None:
    """Refuse what an analyzer says wrongly of its values: columns, rows, role."""
    check_columns(analyzer)
    check_one_of(analyzer, "rows", rows)
    check_one_of(analyzer, "role", roles)
