"""The run-time check of types under pytest: beartype, for everything that a module defines; jaxtyping, where shapes are told."""

import inspect
import sys
from functools import cache, wraps
from typing import Literal, get_args, get_origin

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
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(tells_a_shape(part) for part in get_args(hint))


def is_quoted(hint, own: str = "") -> bool:
    """Whether something stands in quotes beside the name of a method's own class, which beartype reads."""
    if isinstance(hint, str):
        return not own or hint != own
    return get_origin(hint) is not Literal and any(is_quoted(part, own) for part in get_args(hint))


_jaxtyped = jaxtyping.jaxtyped


def within_shapes(function):
    """Beartype's check of each value, where equal names are equal sizes within one call.

    jaxtyping's own binds every call's arguments and checks them twice: a sixth of the time of all tests.
    """
    checked = outermost(function)

    @wraps(function)
    def within(*args, **options):
        with _jaxtyped("context"):
            return checked(*args, **options)

    return within


def checked_behind(made, check):
    """A dataclass's `__init__` and then the check of what its fields hold.

    jaxtyping's own binds every call's arguments, and columns are made by the hundred thousand.
    """
    names = list(inspect.signature(made).parameters)[1:]
    space: dict[str, object] = {}
    exec(f"def fields({', '.join(names)}): ...", space)
    space["fields"].__annotations__ = {name: made.__annotations__[name] for name in names}
    fields = check(space["fields"])

    @wraps(made)
    def init(self, *args, **options):
        made(self, *args, **options)
        fields(*[getattr(self, name) for name in names])

    return init


def where_needed(thing=None, *, typechecker):
    """What jaxtyping's import hook puts on everything: a context of shapes only where a shape is told.

    Functions made inside functions, anew in every call, are left alone: a check would be compiled each time.
    """
    if thing is None:
        return lambda known: where_needed(known, typechecker=typechecker)
    if inspect.isfunction(thing) and "<locals>" in thing.__qualname__:
        return thing
    if inspect.isclass(thing) and "__dataclass_fields__" not in vars(thing):
        return thing
    made = vars(thing).get("__init__") if inspect.isclass(thing) else thing
    hints = list(made.__annotations__.values()) if inspect.isfunction(made) else [""]
    own = getattr(thing, "__qualname__", "").rpartition(".")[0]
    if any(is_quoted(hint, own) for hint in hints) or inspect.isgeneratorfunction(made):
        return _jaxtyped(thing, typechecker=typechecker)  # it reads what is quoted, where it can be read
    check = within_shapes if any(map(tells_a_shape, hints)) else outermost
    if made is thing:
        return check(made)
    # A dataclass is checked when it is made, behind its own refusals, if it has some.
    thing.__init__ = checked_behind(made, check) if hasattr(thing, "__post_init__") else check(made)
    return thing


jaxtyping.jaxtyped = where_needed
