"""A text with its document, labels and spans; and the built-in ones."""

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from itertools import count

from torch import Tensor

from basin_lens.errors import TextError
from basin_lens.texts.marked import read_marks
from basin_lens.values import Labels, document, is_missing, labels, unicode, whole

# Start and end, [start, end), by name.
Spans = Mapping[str, Sequence[int]]


class NumberedDocument(str):
    """The name of a document that nobody gave: the number of its text, which another list of texts gives again.

    Args:
        name: such as `text-0`.
        digest: of the text that it is the name of; by it, two of one name are told apart.
    """

    digest: str

    def __new__(cls, name: str, digest: str) -> "NumberedDocument":
        made = super().__new__(cls, name)
        made.digest = digest
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.digest


@dataclass(frozen=True)
class Passage:
    """A text with its document, its labels and named character spans.

    Args:
        text: the text itself, never empty.
        doc: the document it belongs to; statistics treat documents as independent. None: a document of its own.
        labels: facts about the whole passage, one table column each: `{"memorized": True}`. Text, numbers (64 bits), truth values,
            None, or what stands for one of these (numpy's scalars, pandas's NA, dates); see `basin_lens.values.labels`.
        spans: named character ranges `[start, end)`: `{"IO": (10, 14)}`.

    Raises:
        TextError: empty text, a span outside of it, a label that cannot be stored or is named like a column of the table, a lone
            surrogate.

    Example:
        >>> import basin_lens as bl
        >>> bl.Passage("Paris is in France.", doc="geography", spans={"city": (0, 5)}).doc
        'geography'
    """

    text: str
    doc: str | None = None
    labels: Labels = field(default_factory=dict)
    spans: Spans = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TextError(f"expected a text (str), got {type(self.text).__name__}. Decode bytes first.")
        if not self.text:
            raise TextError("expected a text with at least one character, got an empty one. Leave empty texts out.")
        object.__setattr__(self, "text", unicode(self.text, "text"))
        if not isinstance(self.doc, NumberedDocument):
            object.__setattr__(self, "doc", document(self.doc))
        object.__setattr__(self, "labels", labels(self.labels))
        # None is how api.md spells "nothing given".
        try:
            given: dict[str, Sequence[int]] = {} if is_missing(self.spans) else dict(self.spans)
        except (TypeError, ValueError) as error:
            raise TextError(f'expected spans by name, got {self.spans!r}. Such as {{"city": (0, 5)}}.') from error
        object.__setattr__(self, "spans", dict(self._span(name, ends) for name, ends in given.items()))

    @classmethod
    def marked(cls, text: str, doc: str | None = None, labels: Labels | None = None) -> "Passage":
        """A passage whose spans are marked in the text: `[NAME:words]`; `[[` is a bracket of the text.

        Args:
            text: with its marks; `text` and `spans` of the passage are without them, offsets exact.
            doc, labels: as for `Passage`.

        Raises:
            TextError: a span that is not closed, empty, nested, or named like another one; all that `Passage` refuses.

        Example:
            >>> import basin_lens as bl
            >>> passage = bl.Passage.marked("When [IO:Mary] and [S1:John] went out, [S2:John] gave a drink to")
            >>> passage.text[slice(*passage.spans["S2"])], passage.spans["IO"]
            ('John', (5, 9))
        """
        if not isinstance(text, str):
            raise TextError(f"expected a marked text (str), got {type(text).__name__}. Decode bytes first.")
        read = read_marks(text)
        return cls(read.text, doc, {} if labels is None else labels, read.spans)

    def _span(self, name: object, ends: object) -> tuple[str, tuple[int, int]]:
        if not isinstance(name, str) or not isinstance(ends, Collection) or isinstance(ends, str) or len(ends) != 2:
            raise TextError(f'expected a span as a name with (start, end), got {name!r}: {ends!r}. Such as {{"city": (0, 5)}}.')
        start, end = (whole(value, f"the ends of span {name!r}", error=TextError, cure="Count characters.") for value in ends)
        if not 0 <= start < end <= len(self.text):
            raise TextError(
                f"expected span {name!r} inside the text's {len(self.text)} characters, got ({start}, {end}). "
                "Spans are [start, end) in characters."
            )
        return unicode(name, "names of spans"), (start, end)


# What captures call documents that were not given: the number of a text, or of a sequence of token ids.
_NUMBERED = re.compile(r"(sequence|text)-\d+")


def is_numbered(doc: str) -> bool:
    """Whether a document is called as those that were not given are. A caller may have given this name nevertheless."""
    return _NUMBERED.fullmatch(doc) is not None


def numbered_documents(kind: str, given: Sequence[str | None]) -> list[str]:
    """The documents, those that were not given (None) called by their number; by another where a given one is called so.

    Example:
        >>> from basin_lens.texts.passages import numbered_documents
        >>> numbered_documents("text", [None, "text-2", None])
        ['text-0', 'text-2', 'text-5']
    """
    taken = set(given)
    names = ((f"{kind}-{number}" for number in count(index, len(given))) for index in range(len(given)))
    return [
        next(name for name in of_it if name not in taken) if doc is None else doc for doc, of_it in zip(given, names, strict=True)
    ]


def with_documents(passages: Sequence[Passage]) -> list[Passage]:
    """The passages, each with a document: what has none, or a number that another text of this list has, is numbered anew.

    Parts of a text that was numbered before stay one document.

    Example:
        >>> from basin_lens.texts.passages import Passage, with_documents
        >>> one, other = with_documents([Passage("a")]), with_documents([Passage("b"), Passage("c")])
        >>> [str(passage.doc) for passage in with_documents([*one, *other])]
        ['text-0', 'text-4', 'text-1']
    """
    given = {passage.doc for passage in passages if not isinstance(passage.doc, NumberedDocument)}
    holders: dict[str, str] = {}
    stays = [
        doc
        if not isinstance(doc, NumberedDocument) or (doc not in given and holders.setdefault(doc, doc.digest) == doc.digest)
        else None
        for doc in (passage.doc for passage in passages)
    ]
    anew: dict[tuple[str, str], NumberedDocument] = {}
    found = []
    for passage, name, kept in zip(passages, numbered_documents("text", stays), stays, strict=True):
        if kept is None:
            old = passage.doc
            digest = old.digest if isinstance(old, NumberedDocument) else digest_of(passage.text)
            passage = replace(passage, doc=anew.setdefault((old or name, digest), NumberedDocument(name, digest)))
        found.append(passage)
    return found


def digest_of(text: str) -> str:
    """What a numbered document keeps of its text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# What a caller may give as texts, or as token ids; `read_passages` and `given_ids` say how each is read. Tables, columns and data
# sets are Iterables too.
Texts = str | Passage | os.PathLike[str] | Tensor | Iterable[object]


@cache
def reference_passages() -> tuple[Passage, ...]:
    """The built-in passages: prose of our own, one document per register.

    Each is 60-200 tokens long. They are the demo's texts and the bank behind `bank="reference"`.
    """
    folder = resources.files("basin_lens") / "data" / "passages"
    documents = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".txt")), key=lambda entry: entry.name)
    return tuple(
        Passage(text, doc=entry.name.removesuffix(".txt"))
        for entry in documents
        for text in entry.read_text(encoding="utf-8").strip().split("\n\n")
    )
