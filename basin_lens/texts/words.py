"""Words with their part of speech, and which word a token belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from basin_lens.errors import TextError
from basin_lens.texts.passages import Passage

# The universal tagset of Petrov, Das and McDonald 2012; "." is punctuation and symbols, PRT particles, X the rest.
TAGS = ("NOUN", "VERB", "ADJ", "ADV", "PRON", "DET", "ADP", "NUM", "CONJ", "PRT", ".", "X")
_TAGS = frozenset(TAGS)


@dataclass(frozen=True, slots=True)
class Word:
    """A word or punctuation mark of a passage: where it is, how it is written, and its part of speech.

    Args:
        start: first character, counted in the passage.
        end: one past the last character.
        text: the characters themselves.
        tag: universal part of speech, one of `TAGS`.

    Raises:
        TextError: a range that does not fit the text, or another tag.

    Source: Petrov, Das and McDonald 2012, A Universal Part-of-Speech Tagset.

    Example:
        >>> from basin_lens.texts import Word
        >>> Word(0, 5, "Paris", "NOUN").tag
        'NOUN'
    """

    start: int
    end: int
    text: str
    tag: str

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end or self.end - self.start != len(self.text):
            raise TextError(
                f"expected word {self.text!r} at a range of {len(self.text)} characters, got ({self.start}, {self.end}). "
                "Ranges are [start, end) in characters of the passage."
            )
        if self.tag not in _TAGS:
            raise TextError(
                f"expected a universal part of speech, got {self.tag!r} for {self.text!r}. Use one of {', '.join(TAGS)}."
            )


@dataclass(frozen=True)
class TaggedPassage(Passage):
    """A passage whose words and parts of speech are known, as those of the Penn Treebank and Brown are.

    Args:
        text, doc, labels, spans: as for `Passage`.
        words: its words, in order, without overlap; text that is no word (spaces) lies between them.

    Raises:
        TextError: as `Passage`, or words that are out of order or not those of the text.

    Example:
        >>> from basin_lens.texts import TaggedPassage, Word
        >>> TaggedPassage("Paris shines.", words=(Word(0, 5, "Paris", "NOUN"), Word(6, 12, "shines", "VERB"))).words[1].text
        'shines'
    """

    words: tuple[Word, ...] = ()

    def __post_init__(self) -> None:
        Passage.__post_init__(self)
        object.__setattr__(self, "words", tuple(self.words))
        reached = 0
        for word in self.words:
            if word.start < reached or self.text[word.start : word.end] != word.text:
                raise TextError(
                    f"expected words in the order of the text, each as it is written there, got {word} where the text has "
                    f"{self.text[word.start : word.end]!r} and the word before ends at {reached}. Count characters in the text."
                )
            reached = word.end


def word_of_tokens(
    starts: Sequence[int] | Int[np.ndarray, " tokens"], ends: Sequence[int] | Int[np.ndarray, " tokens"], words: Sequence[Word]
) -> Int[np.ndarray, " tokens"]:
    """Which word does each token belong to? The one it shares most characters with; the earlier of two with as many.

    Tokens may include the space before a word, be part of a word, or span several. The cost is n log n in tokens and words.

    Args:
        starts: first character of each token, in the passage; -1 for a token that is not text, as BOS.
        ends: one past its last character; -1 likewise. `TokenSequence` holds both.
        words: the words of the same passage, in order, without overlap.

    Returns:
        index into `words`, -1 for a token that shares no character with any.

    Raises:
        TextError: as many starts as ends, or words in order, is not what came.

    Example:
        >>> from basin_lens.texts import Word, word_of_tokens
        >>> words = [Word(0, 4, "Rare", "ADJ"), Word(5, 10, "books", "NOUN"), Word(10, 11, ".", ".")]
        >>> word_of_tokens([-1, 0, 2, 4, 10], [-1, 2, 4, 10, 11], words).tolist()
        [-1, 0, 0, 1, 2]
    """
    starts, ends = np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64)
    if starts.shape != ends.shape or starts.ndim != 1:
        raise TextError(
            f"expected a start and an end for each token, got {starts.shape} and {ends.shape}. Pass those of one sequence."
        )
    opens = np.array([word.start for word in words], dtype=np.int64)
    closes = np.array([word.end for word in words], dtype=np.int64)
    wrong = np.flatnonzero(opens[1:] < closes[:-1])
    if len(wrong):
        first, second = words[wrong[0]], words[wrong[0] + 1]
        raise TextError(f"expected words in order and without overlap, got {first} before {second}. Sort them by start.")
    found = np.full(len(starts), -1, dtype=np.int64)
    # Words that share a character with a token are neighbors: from the first that ends after its start to the last that starts
    # before its end. All such pairs, one line each: at most tokens + words of them, as tokens hardly overlap.
    low = np.searchsorted(closes, starts, side="right")
    counts = np.maximum(np.searchsorted(opens, ends, side="left") - low, 0)
    counts[ends <= starts] = 0
    token = np.repeat(np.arange(len(starts)), counts)
    word = np.arange(len(token)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    shared = np.minimum(ends[token], closes[word]) - np.maximum(starts[token], opens[word])
    best = np.lexsort((word, -shared, token))
    owners, at = np.unique(token[best], return_index=True)
    found[owners] = word[best][at]
    return found
