"""NLTK's corpora as readable text; Penn Treebank and Brown with their own words and parts of speech."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from basin_lens.errors import TextError
from basin_lens.texts.passages import Passage
from basin_lens.texts.words import TaggedPassage, Word

# Corpus -> NLTK's name of its tags.
_TAGGED = {"treebank": "en-ptb", "brown": "en-brown"}
# Not the only ones that can be read, but those worth naming.
_KNOWN = ("brown", "genesis", "gutenberg", "inaugural", "movie_reviews", "state_union", "treebank", "webtext")
_FIRST = {"genesis": "english"}

_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}
_CLITICS = frozenset(("'s", "'re", "'ve", "'ll", "'d", "'m", "n't"))
_BEFORE = frozenset((",", ".", ";", ":", "?", "!", "%", "...", ")", "]", "}"))
_AFTER = frozenset(("(", "[", "{", "#"))
# Brown's coders wrote these marks twice in most places (every "?", "!" and ";" in running text).
_DOUBLED = frozenset(("?", "!", ";", ":", ","))
# And so the mark for inches: 10'' '' is 10" in print.
_INCHES = re.compile(r"\d''")


@contextmanager
def nltk_data(package: str) -> Iterator[None]:
    """Says which NLTK data is missing, and how to get it, if the body needs data that is not there."""
    try:
        yield
    except LookupError as error:
        # A KeyError or IndexError is a mistake, not missing data.
        if type(error) is not LookupError:
            raise
        named = re.search(r"nltk\.download\('([^']+)'\)", str(error))
        package = named[1] if named else package
        raise TextError(
            f"expected NLTK's data {package!r} on this machine, found none. Get it once: python -m nltk.downloader {package}"
        ) from error


def read_corpus(name: str, *, files: str | None = None, max_passages: int | None = None) -> list[Passage]:
    """One passage for each file of an NLTK corpus, in the corpus's order.

    Args:
        name: `treebank` and `brown` give `TaggedPassage`s; any other plain-text corpus of NLTK gives `Passage`s.
        files: only files whose name starts so, or of this category; None: all (`genesis`: the English ones).
        max_passages: as many of the first files; None: all.

    Raises:
        TextError: an unknown corpus, one that is not text, no such files, or data that is not installed.
    """
    import nltk.corpus
    from nltk.corpus.reader import CorpusReader, PlaintextCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    corpus = getattr(nltk.corpus, name, None)
    if not isinstance(corpus, LazyCorpusLoader | CorpusReader):
        raise TextError(
            f"expected a corpus of NLTK, got {name!r}. Known: {', '.join(_KNOWN)}, and NLTK's other plain-text corpora."
        )
    with nltk_data(name):
        # Loads it: before, it is of no class that says what it holds.
        found = corpus.fileids()
    if name not in _TAGGED and not isinstance(corpus, PlaintextCorpusReader):
        raise TextError(f"expected a corpus of running text, got {name!r} ({type(corpus).__name__}). Known: {', '.join(_KNOWN)}.")
    kinds = {file: corpus.categories(file) if hasattr(corpus, "categories") else [] for file in found}
    wanted = _FIRST.get(name, "") if files is None else files
    chosen = [file for file in found if file.startswith(wanted) or wanted in kinds[file]]
    if not chosen:
        raise TextError(f"expected files or a category of {name} named {wanted!r}, found none. Files: {', '.join(found[:5])}, ...")
    passages: list[Passage] = []
    for file in chosen[:max_passages]:
        doc = f"{name}/{re.sub(r'[.](txt|mrg)$', '', file)}"
        labels = {"category": ", ".join(kinds[file])} if kinds[file] else {}
        with nltk_data(name):
            paragraphs = _paragraphs(corpus, name, file) if name in _TAGGED else None
            text = "" if name in _TAGGED else corpus.raw(file)
        if paragraphs is not None:
            text, words = _compose(paragraphs, _TAGGED[name])
            passages.append(TaggedPassage(text, doc=doc, labels=labels, words=words))
        elif text.strip():
            passages.append(Passage(text, doc=doc, labels=labels))
    return passages


def _paragraphs(corpus: Any, name: str, file: str) -> list[list[list[tuple[str, str]]]]:
    """Paragraphs of sentences of (word, tag of the corpus), without what is not in the text itself."""
    if name == "treebank":
        # The trees know no paragraphs.
        return [[[(word, tag) for word, tag in sentence if tag != "-NONE-" and word] for sentence in corpus.tagged_sents(file)]]
    return [[list(_written_once(sentence)) for sentence in paragraph] for paragraph in corpus.tagged_paras(file)]


def _written_once(sentence: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    before = ""
    for word, tag in sentence:
        doubled = (word == before and word in _DOUBLED) or (word == "''" and _INCHES.search(before[-3:]) is not None)
        before = "" if doubled else word
        if word and not doubled:
            yield word, tag


def _compose(paragraphs: Iterable[Iterable[Iterable[tuple[str, str]]]], tagset: str) -> tuple[str, tuple[Word, ...]]:
    """Readable text from a corpus's tokens, and where each of them went."""
    from nltk.tag import map_tag

    universal: dict[str, str] = {}
    pieces: list[str] = []
    words: list[Word] = []
    length = 0
    for paragraph in paragraphs:
        gap, quoted = "\n\n" if words else "", False
        for sentence in paragraph:
            first = True
            for token, tag in sentence:
                if token == "." and pieces and pieces[-1].endswith("."):
                    # In print, an abbreviation's point ends the sentence too.
                    continue
                if tag not in universal:
                    with nltk_data("universal_tagset"):
                        universal[tag] = map_tag(tagset, "universal", tag)
                shown, closes, opens = _printed(token, tag, first, quoted)
                if shown in ("'", '"'):
                    # A double quote ends what single quotes it holds. Possessives change nothing.
                    quoted = quoted if tag == "POS" else shown == "'" and opens
                if closes and gap == " ":
                    gap = ""
                pieces += gap, shown
                start = length + len(gap)
                length = start + len(shown)
                words.append(Word(start, length, shown, universal[tag]))
                gap, first = "" if opens else " ", False
    return "".join(pieces), tuple(words)


def _printed(token: str, tag: str, first: bool, quoted: bool) -> tuple[str, bool, bool]:
    """A token as it is printed; whether it stands close to what is before it, and to what is after it."""
    if token in ("``", "''"):
        return '"', token == "''", token == "``"
    if token == "`":
        return "'", False, True
    if token == "'":
        # A possessive or a closing quote by its tag; Brown has one tag for both quotes, so they take turns.
        opens = tag not in ("POS", "''") and not quoted
        return "'", not opens, opens
    shown = _BRACKETS.get(token) or _INCHES.sub(lambda mark: mark[0][0] + '"', token.replace("\\/", "/").replace("\\*", "*"))
    closes = shown in _BEFORE or (shown.lower() in _CLITICS and not first)
    return shown, closes, shown in _AFTER or shown.endswith("$")
