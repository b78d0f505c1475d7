"""The run-time check of types under pytest: beartype, for everything that a module defines; jaxtyping, where shapes are told."""

import inspect
import sys
from functools import cache
from typing import get_args

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype

# What comes from outside is refused by the package, in words that a user can act on; the tests of those words must reach them.
_FROM_OUTSIDE = (
    ("basin_lens.model.protocol", "HookedModel"),
    ("basin_lens.model.protocol", "Tokenizer"),
    ("basin_lens.values", "Labels"),
    ("basin_lens.values", "Layers"),
    ("basin_lens.texts.passages", "Spans"),
    ("basin_lens.stats.design", "WhichLayers"),
    ("basin_lens.texts.passages", "Texts"),
    ("basin_lens.capture.record", "Bank"),
    ("basin_lens.capture.planning", "Mask"),
    ("basin_lens.model.protocol", "StateCache"),
    ("basin_lens.scoring.request", "Analyzers"),
    ("basin_lens.scoring.request", "Queries"),
    ("basin_lens.scoring.comparison", "Side"),
)


@cache
def _lenient(*hints) -> BeartypeConf:
    return BeartypeConf(hint_overrides=FrozenDict(dict.fromkeys(hints, object)))


def outermost(thing):
    """Beartype, lenient where the package itself refuses."""
    # A module that names one of them has imported it before its own functions are made.
    known = [getattr(sys.modules.get(module), name, None) for module, name in _FROM_OUTSIDE]
    return beartype(thing, conf=_lenient(*(hint for hint in known if hint is not None)))


def tells_a_shape(hint) -> bool:
    if isinstance(hint, str) or (isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)):
        return True
    return any(tells_a_shape(part) for part in get_args(hint))


_jaxtyped = jaxtyping.jaxtyped


def where_needed(thing=None, *, typechecker):
    """What jaxtyping's import hook puts on everything: jaxtyping's own check, which binds every call's arguments for the sake of their
    shapes, only where a shape is told. It took a third of the time of all tests.

    Functions made inside functions, anew in every call, are left alone: a check would be compiled each time.
    """
    if thing is None:
        return lambda known: where_needed(known, typechecker=typechecker)
    if inspect.isfunction(thing) and "<locals>" in thing.__qualname__:
        return thing
    if inspect.isclass(thing) and "__dataclass_fields__" not in vars(thing):
        return thing
    if inspect.isfunction(thing) and not any(tells_a_shape(hint) for hint in thing.__annotations__.values()):
        return outermost(thing)
    # Of a dataclass too: it is checked when it is made, behind its own refusals.
    return _jaxtyped(thing, typechecker=typechecker)


jaxtyping.jaxtyped = where_needed
