"""What comes from outside as a number, a name or a label: made plain, or refused before any work."""

import datetime
import difflib
import inspect
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import wraps
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec, SupportsFloat, SupportsIndex, TypeVar, cast, get_args, get_origin

from basin_lens.errors import BasinLensError, TextError

if TYPE_CHECKING:
    Whole = int
else:
    # A whole number as a caller gives it: also numpy's and a 0-d tensor. `whole` makes an int of it.
    Whole = SupportsIndex

# What a caller may give as layers: whole numbers in any order, or one, negative ones from the end; None: all.
Layers = Iterable[SupportsIndex] | SupportsIndex | None
# Plain JSON facts about a run, a model or a file, as they are stored.
Facts = dict[str, Any]

P = ParamSpec("P")
R = TypeVar("R")

# Columns that every table has; labels must have other names.
KEYS = ("run", "layer", "passage", "doc", "seq", "pos", "token_id", "token", "start", "end")
TAKEN = frozenset((*KEYS, "span"))

Plain = str | int | float | bool | None
# Labels by name, as they are held; a caller may give what stands for these, too, see `labels`.
Labels = Mapping[str, Plain]
_PLAIN = "plain values (text, numbers, True or False, None)"
_EXACT = 2**53  # whole numbers beyond it change when they become floats, as they do in a column with gaps


def whole_or_none(value: object) -> int | None:
    """The int that a value stands for, or None: ints, numpy's whole numbers, 0-d tensors and arrays of them; never a truth value.

    Example:
        >>> import numpy as np
        >>> from basin_lens.values import whole_or_none
        >>> whole_or_none(np.int64(3)), whole_or_none(True), whole_or_none(3.0)
        (3, None, None)
    """
    # A tensor of one truth value would pass for 0 or 1.
    dims = getattr(value, "ndim", 0)
    if isinstance(value, bool) or dims or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(cast("SupportsIndex", value))
    except TypeError:
        return None


def whole(
    value: object, name: str, *, least: int | None = None, error: type[BasinLensError] = BasinLensError, cure: str = "Give an int."
) -> int:
    """The int that a value stands for: the one check of whole numbers at every door.

    Args:
        value: an int, numpy's, or a 0-d tensor.
        name: what it is, for the message.
        least: smallest that is allowed; None: any.
        error: class of the refusal.
        cure: what to do instead.

    Raises:
        BasinLensError: of the class asked for: a truth value, a fraction, anything else, or too small.

    Example:
        >>> import torch
        >>> from basin_lens.values import whole
        >>> whole(torch.tensor(7), "seed")
        7
    """
    found = whole_or_none(value)
    if found is None or (least is not None and found < least):
        bound = "as a whole number" if least is None else f"of at least {least}"
        raise error(f"expected {name} {bound}, got {value!r}. {cure}")
    return found


def several(given: object) -> list[object] | None:
    """What was given where whole numbers are taken, several or one, as a list; None if it is neither. The numbers are unchecked.

    Example:
        >>> from basin_lens.values import several
        >>> several(range(2)), several(5), several(True), several("05")
        ([0, 1], [5], None, None)
    """
    one = whole_or_none(given)
    if one is not None:
        return [one]
    # A 0-d tensor says that it can be iterated, and cannot.
    many = isinstance(given, Iterable) and not isinstance(given, str | bytes) and getattr(given, "ndim", 1) > 0
    return list(cast("Iterable[object]", given)) if many else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`Did you mean ...?`, with a space behind; empty where nothing is like it, or the name is right.

    Of names with a `/` the part behind it counts, too; capitals do not.

    Example:
        >>> from basin_lens.values import did_you_mean
        >>> did_you_mean("compresion", ["compression", "surprisal"])
        "Did you mean 'compression'? "
    """
    names = list(known)
    if name in names:
        return ""
    short = {one.rsplit("/", 1)[-1].lower(): one for one in reversed(names)} | {one.lower(): one for one in names}
    found = difflib.get_close_matches(name.lower(), list(short), n=3, cutoff=0.75)
    close = list(dict.fromkeys(short[one] for one in found))
    return f"Did you mean {' or '.join(map(repr, close))}? " if close else ""


def hides_bars(progress: bool) -> bool:
    """Whether a progress bar stays hidden: it was not asked for, or `TQDM_DISABLE` is set (to anything but 0 or false).

    Source: https://tqdm.github.io (the variables of its environment)
    """
    return not progress or os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")


def takes_whole(annotation: object) -> bool:
    """Whether a parameter or field of this annotation is a whole number, or may be one."""
    return annotation in (int, Whole) or (
        get_origin(annotation) is not tuple and any(part in (int, Whole) for part in get_args(annotation))
    )


def _takes_many(annotation: object) -> bool:
    return any(
        get_origin(part) is tuple and any(each in (int, Whole) for each in get_args(part))
        for part in (annotation, *get_args(annotation))
    )


def _as_whole(value: object, name: str, annotation: object, error: type[BasinLensError]) -> object:
    """The int that was meant; a truth value is refused, and whatever else it is goes on to the door's own check."""
    if value is None or type(value) is int:
        return value
    found = whole_or_none(value)
    truth = isinstance(value, bool) or (not getattr(value, "ndim", 0) and "bool" in str(getattr(value, "dtype", "")))
    if found is None and truth and bool not in get_args(annotation):
        return whole(value, name, error=error)
    return value if found is None else found


def whole_numbers(error: type[BasinLensError] = BasinLensError) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for a caller's door: whole numbers of numpy and 0-d tensors come in as ints, truth values are refused.

    Args:
        error: class of the refusal.

    Example:
        >>> import numpy as np
        >>> from basin_lens.values import whole_numbers
        >>> @whole_numbers()
        ... def draw(seed: int) -> str:
        ...     return repr(seed)
        >>> draw(np.int64(3))
        '3'
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        taken = {name: one.annotation for name, one in signature.parameters.items() if takes_whole(one.annotation)}

        @wraps(function)
        def door(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            for name in taken.keys() & bound.arguments.keys():
                bound.arguments[name] = _as_whole(bound.arguments[name], name, taken[name], error)
            return function(*bound.args, **bound.kwargs)

        return door

    return decorate


def whole_fields(record: object, error: type[BasinLensError] | None = None) -> None:
    """The same for the fields of a dataclass, frozen or not: called first in its `__post_init__`.

    Fields that are tuples of whole numbers may be lists or arrays of them, too.

    Args:
        record: the dataclass.
        error: class of the refusal; None: truth values stay, and the class checks them itself.

    Raises:
        BasinLensError: of the class asked for: a truth value for a whole number.
    """
    assert is_dataclass(record)
    for one in fields(record):
        if not hasattr(record, one.name):  # made later, by the class itself
            continue
        value = getattr(record, one.name)
        if takes_whole(one.type) and not (error is None and isinstance(value, bool)):
            value = _as_whole(value, one.name, one.type, error or BasinLensError)
        if _takes_many(one.type) and (isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1):
            many = [whole_or_none(each) for each in value]
            value = tuple(value) if None in many else tuple(many)
        object.__setattr__(record, one.name, value)


def unicode(text: str, what: str) -> str:
    """Text that can be written as UTF-8.

    Raises:
        TextError: a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(f"expected Unicode {what}, got a lone surrogate at character {error.start}. Decode it properly.") from error
    return str.__str__(text)  # of a text that is also a name (an Enum), the text


def is_missing(value: object) -> bool:
    """Whether a value says that there is none: None, NaN, pandas's NA and NaT."""
    # pandas is not imported for the sake of two names.
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    # NaN, also numpy's (and numpy's NaT), is what differs from itself.
    return not isinstance(value, str) and not getattr(value, "ndim", 0) and bool(_differs_from_itself(value))


def _differs_from_itself(value: object) -> bool:
    try:
        return bool(value != value)
    except (TypeError, ValueError, RuntimeError):
        return False


def plain(value: object, what: str) -> Plain:
    """A label's value as it can be stored: text, int, float, True or False, None.

    Numpy's scalars and 0-d tensors become Python's; what is missing (NaN, pandas's NA and NaT) becomes None; dates and times become
    text as ISO 8601 has it.

    Args:
        value: what was given.
        what: its name, for the message.

    Raises:
        TextError: anything else (a dict, a list, bytes), a whole number beyond 64 bits, or text with a lone surrogate.

    Source: https://www.iso.org/iso-8601-date-and-time-format.html

    Example:
        >>> import datetime
        >>> import numpy as np
        >>> from basin_lens.values import plain
        >>> plain(np.float32(0.5), "dose"), plain(datetime.date(2024, 5, 1), "day"), plain(float("nan"), "kind")
        (0.5, '2024-05-01', None)
    """
    if is_missing(value):
        return None
    if isinstance(value, str):
        return unicode(value, what)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    kind = str(getattr(value, "dtype", ""))
    if kind.startswith("datetime64") and not getattr(value, "ndim", 0):
        return str(value)
    if isinstance(value, bool) or ("bool" in kind and not getattr(value, "ndim", 0)):
        return bool(value)
    number = whole_or_none(value)
    if number is not None and not -(2**63) <= number < 2**63:
        raise TextError(f"expected {what} as a whole number of 64 bits, got {value!r}. Give it as text.")
    if number is not None:
        return number
    if isinstance(value, float) or ("float" in kind and not getattr(value, "ndim", 0)):
        return float(cast("SupportsFloat", value))
    raise TextError(
        f"expected {what} among {_PLAIN}, got {value!r} ({type(value).__name__}). Give one value of these for each name."
    )


def labels(given: object) -> dict[str, Plain]:
    """Labels by name, each as `plain` has it: the one place where labels are made plain or refused.

    Raises:
        TextError: not a mapping; a name that is no text, empty, or that of a column which every table has; a value that cannot be
            stored.

    Example:
        >>> import numpy as np
        >>> from basin_lens.values import labels
        >>> labels({"memorized": np.bool_(True), "dose": np.int64(4)})
        {'memorized': True, 'dose': 4}
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TextError(f'expected labels by name, each among {_PLAIN}, got {given!r}. Such as {{"memorized": True}}.')
    found: dict[str, Plain] = {}
    for name, value in given.items():
        if not isinstance(name, str) or not name:
            raise TextError(f"expected the names of labels as text, got {name!r}. Give each label a name.")
        if name in TAKEN:
            raise TextError(
                f"expected a label with a name of its own, got {name!r}, a column that every table has. Rename it; taken are "
                f"{', '.join((*KEYS, 'span'))}."
            )
        found[unicode(name, "names of labels")] = plain(value, f"label {name!r}")
    return found


def document(given: object) -> str | None:
    """The name of a document; None: none was given. A whole number stands for its digits; text stays as it is (`001` is not `1`).

    Raises:
        TextError: empty, a lone surrogate, or neither text nor a whole number.
    """
    if is_missing(given):
        return None
    if isinstance(given, str) and given:
        return unicode(given, "document names")
    number = whole_or_none(given)
    if number is None:
        raise TextError(f'expected "doc" to be a name, got {given!r}. Write text, or leave it out for a document of its own.')
    return str(number)


def check_alike(every: Sequence[Mapping[str, Plain]]) -> None:
    """Refuse labels that no column could hold together: one label with values of several kinds in different texts.

    Args:
        every: the labels of each text, as `labels` gives them.

    Raises:
        TextError: naming label, texts and values: text beside numbers, truth values beside others, or whole numbers beyond 2^53
            where other texts have fractions or nothing (a column with gaps is of floats, which would change them).
    """
    for name in dict.fromkeys(name for held in every for name in held):
        column = [held.get(name) for held in every]
        there = [index for index, value in enumerate(column) if value is not None]
        other = next((index for index in there if _kind(column[index]) != _kind(column[there[0]])), None)
        if other is not None:
            first = there[0]
            raise TextError(
                f"expected one kind of value for label {name!r} in all texts, got {column[first]!r} ({_kind(column[first])}) in "
                f"text {first} and {column[other]!r} ({_kind(column[other])}) in text {other}. Write all as text, or leave the "
                "label out where it is unknown."
            )
        large = next((i for i, value in enumerate(column) if type(value) is int and abs(value) > _EXACT), None)
        gap = next((i for i, value in enumerate(column) if type(value) is not int), None)
        if large is not None and gap is not None:
            raise TextError(
                f"expected label {name!r} as a whole number in every text (one beyond 2^53 changes in a column with gaps or "
                f"fractions), got {column[large]!r} in text {large} and {column[gap]!r} in text {gap}. Write all of them as text."
            )


def _kind(value: Plain) -> str:
    return "text" if isinstance(value, str) else "truth value" if isinstance(value, bool) else "number"


def labels_of_all(given: Iterable[object]) -> list[dict[str, Plain]]:
    """The labels of each of several texts, as `labels` has them, alike in kind as `check_alike` wants it."""
    every = [labels(held) for held in given]
    check_alike(every)
    return every


def card(title: str, facts: Mapping[str, object]) -> str:
    """What an object shows of itself at a notebook cell's end: every text is escaped.

    Example:
        >>> from basin_lens.values import card
        >>> "&lt;b&gt;" in card("Capture", {"first words": "<b>"})
        True
    """
    rows = "".join(
        f'<tr><th style="text-align: left; vertical-align: top">{escape(name)}</th>'
        f'<td style="text-align: left">{escape(str(fact))}</td></tr>'
        for name, fact in facts.items()
    )
    return f"<div><strong>{escape(title)}</strong><table>{rows}</table></div>"


def truths_of(values: Iterable[object], name: str, error: type[BasinLensError]) -> list[bool]:
    """Which values of a label choose: True, and numbers but 0; one that is missing does not.

    Raises:
        error: text, of which "False" would choose.

    Example:
        >>> from basin_lens.errors import TableError
        >>> from basin_lens.values import truths_of
        >>> truths_of([True, 0.0, None, 1], "kind", TableError)
        [True, False, False, True]
    """
    held = list(values)
    if any(isinstance(value, str) for value in held):
        text = next(value for value in held if isinstance(value, str))
        raise error(
            f"expected a label of True and False to choose queries by, got {name!r} with text such as {text!r}. "
            "Write true and false without quotes (as .jsonl has them)."
        )
    return [not is_missing(value) and bool(value) for value in held]


_UNITS = frozenset(("document", "sequence", "window", "text", "word", "token", "token type", "tag"))


def units_said(unit: str, count: int | None = None) -> str:
    """What tests and intervals are over, in words: so many of them, or several if it is not said how many.

    `unit`: `"document"`, `"sequence"`, `"window"`, or a label of the texts, whose values are the units.

    Example:
        >>> from basin_lens.values import units_said
        >>> units_said("document", 1), units_said("sequence"), units_said("class", 1_200)
        ('1 document', 'sequences', "1,200 values of 'class'")
    """
    of_label = "" if unit in _UNITS else f" of {unit!r}"
    words = f"{'value' if of_label else unit}{'' if count == 1 else 's'}{of_label}"
    return words if count is None else f"{count:,} {words}"
