"""The run-time check of types under pytest: beartype, for everything that a module defines."""

import sys
from functools import cache

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
    ("basin_lens.capture.caches", "StateCache"),
    ("basin_lens.scoring.request", "Analyzers"),
    ("basin_lens.scoring.request", "Queries"),
    ("basin_lens.scoring.comparison", "Side"),
)


@cache
def _lenient(*hints) -> BeartypeConf:
    return BeartypeConf(hint_overrides=FrozenDict(dict.fromkeys(hints, object)))


def outermost(thing):
    """Functions made inside functions, anew in every call, are left alone: a check would be compiled each time, which took a seventh of
    the time of a study's measurement."""
    if "<locals>" in getattr(thing, "__qualname__", ""):
        return thing
    # A module that names one of them has imported it before its own functions are made.
    known = [getattr(sys.modules.get(module), name, None) for module, name in _FROM_OUTSIDE]
    return beartype(thing, conf=_lenient(*(hint for hint in known if hint is not None)))
