"""Within one call, what was computed from arrays is kept and given again for equal ones: many pairs share their controls."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")
_BYTES = 2**28  # of all that one call keeps: the controls of 10 layers of some thousands of tokens


class _Memory:
    """Answers by question, the least recently used first."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Hashable, object] = OrderedDict()
        self.numbers: dict[int, int] = {}  # of arrays that are kept, by identity: they need not be read again to be told apart
        self.bytes = 0
        self._made = 0  # arrays so far

    def keep(self, question: Hashable, answer: object) -> None:
        """Keep an answer, read-only, and drop the oldest beyond the limit."""
        for array in _arrays(answer):
            array.flags.writeable = False
            self.numbers[id(array)] = self._made
            self._made += 1
            self.bytes += array.nbytes
        self.kept[question] = answer
        while self.bytes > _BYTES:
            for array in _arrays(self.kept.popitem(last=False)[1]):
                self.bytes -= array.nbytes
                self.numbers.pop(id(array), None)

    def digest(self, value: object) -> Hashable:
        """What tells a value apart: of a large array, not the array itself."""
        if isinstance(value, np.ndarray):
            if (number := self.numbers.get(id(value))) is not None:
                return number
            return value.shape, value.dtype.str, hashlib.blake2b(np.ascontiguousarray(value).data, digest_size=16).digest()
        return tuple(map(self.digest, value)) if isinstance(value, list | tuple) else value


_memory: ContextVar[_Memory | None] = ContextVar("_memory", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """In such a block, or a function that this decorates, `remembered` functions keep what they compute until it ends."""
    if _memory.get() is not None:
        yield
        return
    before = _memory.set(_Memory())
    try:
        yield
    finally:
        _memory.reset(before)


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """A pure function of arrays, of lists of arrays and of plain values; while work is shared, computed once for equal arguments.

    What it returns then (an array, or a tuple of arrays) is read-only. The least recently used goes first once 256 MB are kept.
    """

    @wraps(function)
    def once(*args: P.args, **kwargs: P.kwargs) -> R:
        memory = _memory.get()
        if memory is None:
            return function(*args, **kwargs)
        digest = memory.digest
        question = (function.__qualname__, tuple(map(digest, args)), tuple((name, digest(kwargs[name])) for name in sorted(kwargs)))
        if question in memory.kept:
            memory.kept.move_to_end(question)
            return cast("R", memory.kept[question])
        answer = function(*args, **kwargs)
        memory.keep(question, answer)
        return answer

    return once


def _arrays(answer: object) -> list[np.ndarray]:
    if isinstance(answer, np.ndarray):
        return [answer]
    return [array for part in answer for array in _arrays(part)] if isinstance(answer, tuple) else []
