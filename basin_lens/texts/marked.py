"""Spans marked in the text itself: `[NAME:words]`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from basin_lens.errors import TextError

# What a name may be: a plus sign joins names in the table's column `span`, a colon ends the name here.
_NAME = re.compile(r"[^\W\d][\w.-]*")
_MARK = re.compile(r"\[([^\[\]:]*):")


@dataclass(frozen=True)
class MarkedText:
    """A text without its marks, and where each span stands in it: `[start, end)` in characters."""

    text: str
    spans: dict[str, tuple[int, int]]


def read_marks(marked: str) -> MarkedText:
    """Take the marks out of a text. `[NAME:words]` is a span, `[[` a bracket of the text, `]` outside of spans itself.

    Raises:
        TextError: a bracket that opens no span, a span that is not closed, empty, begins or ends with a space, holds another one,
            or has the name of an earlier one. The message says at which character.

    Example:
        >>> from basin_lens.texts import read_marks
        >>> read_marks("[IO:Mary] and [S1:John] went out.").spans
        {'IO': (0, 4), 'S1': (9, 13)}
    """
    text = ""
    spans: dict[str, tuple[int, int]] = {}
    at = 0
    while at < len(marked):
        if marked.startswith("[[", at):
            text, at = text + "[", at + 2
        elif marked[at] == "[":
            name, words, end = _span(marked, at)
            if name in spans:
                raise TextError(
                    f"expected each span once in a text, got [{name}: again at character {at}: {_near(marked, at)}. Number them, "
                    f"such as {name}1 and {name}2."
                )
            spans[name] = len(text), len(text) + len(words)
            text, at = text + words, end
        else:
            text, at = text + marked[at], at + 1
    return MarkedText(text, spans)


def skeleton_of(text: str, spans: Mapping[str, Sequence[int]]) -> str:
    """The text with each span replaced by its name in braces; prompts of one template have the same.

    Example:
        >>> from basin_lens.texts import skeleton_of
        >>> skeleton_of("Mary and John went out.", {"IO": (0, 4), "S1": (9, 13)})
        '{IO} and {S1} went out.'
    """
    parts, at = [], 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: tuple(item[1])):
        parts += [text[at : max(at, start)], f"{{{name}}}"]
        at = max(at, end)
    return "".join([*parts, text[at:]])


def _span(marked: str, at: int) -> tuple[str, str, int]:
    """Name and words of the span that the bracket at `at` opens, and the place behind it."""
    found = _MARK.match(marked, at)
    if found is None or not _NAME.fullmatch(found[1]):
        raise TextError(
            f"expected a span such as [IO:Mary] at character {at}, got {_near(marked, at)}. A name begins with a letter and holds "
            "letters, digits, _, . and -; write a bracket that belongs to the text twice: [[."
        )
    name, words, place = found[1], "", found.end()
    while not marked.startswith("]", place):
        if place >= len(marked):
            raise TextError(f"expected ] behind the span {name!r}, got none: {_near(marked, at)} opens at character {at}.")
        if marked.startswith("[", place) and not marked.startswith("[[", place):
            raise TextError(
                f"expected span {name!r} to end before another begins, got {_near(marked, place)} at character {place} inside it. "
                "Spans do not nest; write a bracket that belongs to the text twice: [[."
            )
        words += marked[place]
        place += 2 if marked.startswith("[[", place) else 1
    if words != words.strip() or not words:
        raise TextError(
            f"expected words in span {name!r}, without spaces around them, got {words!r} at character {at}. Write spaces outside "
            "of the brackets."
        )
    return name, words, place + 1


def _near(marked: str, at: int) -> str:
    """The text from there on, as far as a message needs it."""
    return repr(marked[at : at + 24] + ("..." if len(marked) > at + 24 else ""))
