"""What was computed from arrays is kept and given again for equal ones: tests of many pairs of columns share their controls."""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")
_BYTES = 2**28  # of all that is kept: the controls of 10 layers of some thousands of tokens
_kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
_numbers: dict[int, int] = {}  # of arrays that are kept, by identity: they need not be read again to be told apart
_count = itertools.count()
_held = [0]  # bytes


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """A pure function of arrays, of lists of arrays and of plain values, computed once for equal arguments.

    What it returns (an array, or a tuple of arrays) is read-only. The least recently used goes first once 256 MB are kept.
    """

    @wraps(function)
    def once(*args: P.args, **kwargs: P.kwargs) -> R:
        key = (function.__qualname__, tuple(map(_digest, args)), tuple((name, _digest(kwargs[name])) for name in sorted(kwargs)))
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key][0]
        answer = function(*args, **kwargs)
        arrays = _arrays(answer)
        for array in arrays:
            array.flags.writeable = False
            _numbers[id(array)] = next(_count)
        _kept[key] = (answer, size := sum(array.nbytes for array in arrays))
        _held[0] += size
        while _held[0] > _BYTES:
            gone, size = _kept.popitem(last=False)[1]
            _held[0] -= size
            for array in _arrays(gone):
                _numbers.pop(id(array), None)
        return answer

    return once


def _arrays(answer: Any) -> list[np.ndarray]:
    if isinstance(answer, np.ndarray):
        return [answer]
    return [array for part in answer for array in _arrays(part)] if isinstance(answer, tuple) else []


def _digest(value: Any) -> Hashable:
    if isinstance(value, np.ndarray):
        if (number := _numbers.get(id(value))) is not None:
            return number
        return value.shape, value.dtype.str, hashlib.blake2b(np.ascontiguousarray(value).data, digest_size=16).digest()
    return tuple(map(_digest, value)) if isinstance(value, list | tuple) else value
