"""Passages -> words with their part of speech: the corpus's own, NLTK's or spaCy's."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from basin_lens.errors import TextError
from basin_lens.texts.corpora import nltk_data
from basin_lens.texts.passages import Passage
from basin_lens.texts.words import TaggedPassage, Word

# spaCy's Universal Dependencies tags -> ours, where they differ. Spaces are no words.
_OURS = {
    "PROPN": "NOUN",
    "AUX": "VERB",
    "PART": "PRT",
    "INTJ": "X",
    **dict.fromkeys(("SCONJ", "CCONJ"), "CONJ"),
    **dict.fromkeys(("PUNCT", "SYM"), "."),
}
_SPACES = ("SPACE", "EOL")
# NLTK's tokenizer and tagger know typewriter quotes only. One character for one: offsets stay.
_TYPEWRITER = str.maketrans("‘’“”«»„", '`\'"""""')
# A sentence ends where a capital follows, unless the point is one of a title or an initial.
_SENTENCE_END = re.compile(r"(?:(?<!\b[A-Z])[.]|[?!])[\"')\]]*(?P<space>\s+)(?=[\"'`(\[]*[A-Z])|\n\s*\n")
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|Messrs|Sen|Rep|Gov|Gen|Col|Capt|Lt|Sgt|St|Rev|Hon|No|vs)$")
# Longest piece for the tokenizer, whose patterns are not all linear.
_LONGEST = 4000


def words_of(passages: Sequence[Passage], tagger: str = "auto", *, spacy_model: str = "en_core_web_sm") -> list[tuple[Word, ...]]:
    """The words of each passage, with exact character offsets and universal parts of speech.

    Args:
        passages: the texts.
        tagger: `gold`: the words that `TaggedPassage`s bring; `nltk`: NLTK's word tokenizer and perceptron tagger (English);
            `spacy`: a pipeline of spaCy (an extra: pip install 'basin-lens[spacy]'); `auto`: gold if every passage has it, else
                NLTK.
        spacy_model: which pipeline.

    Returns:
        for each passage its words in order; none may be left where a passage is blank.

    Raises:
        TextError: `gold` without words, an unknown tagger, or a tagger or its data that is not installed; the message says how to
            get it.

    Source: Bird, Klein and Loper 2009 (NLTK); Petrov, Das and McDonald 2012 (tags).

    Example:
        >>> from basin_lens.texts import read_dataset, words_of
        >>> passages = read_dataset("nltk:treebank", max_passages=1)
        >>> [(word.text, word.tag) for word in words_of(passages)[0][:3]]
        [('Pierre', 'NOUN'), ('Vinken', 'NOUN'), (',', '.')]
    """
    gold = [passage.words for passage in passages if isinstance(passage, TaggedPassage)]
    if tagger == "gold" and len(gold) < len(passages):
        raise TextError(
            f"expected passages with their own words, got {len(passages) - len(gold)} without. Use those of "
            'read_dataset("nltk:treebank") or read_dataset("nltk:brown"), or tagger="nltk".'
        )
    if tagger in ("gold", "auto") and len(gold) == len(passages):
        return gold
    if tagger in ("auto", "nltk"):
        return [tuple(_nltk_words(passage.text)) for passage in passages]
    if tagger == "spacy":
        return _spacy_words([passage.text for passage in passages], spacy_model)
    raise TextError(f"expected a tagger, got {tagger!r}. Use auto, gold, nltk or spacy.")


def _nltk_words(text: str) -> list[Word]:
    from nltk import pos_tag_sents
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer, plain = NLTKWordTokenizer(), text.translate(_TYPEWRITER)
    sentences, places = [], []
    for start, end in _sentences(plain):
        tokens = tokenizer.tokenize(plain[start:end])
        if tokens:
            sentences.append(tokens)
            places += [(start + a, start + b) for a, b in _aligned(tokens, plain[start:end])]
    with nltk_data("averaged_perceptron_tagger_eng"):
        tags = [tag for tagged in pos_tag_sents(sentences, tagset="universal") for _, tag in tagged]
    return [Word(start, end, text[start:end], tag) for (start, end), tag in zip(places, tags, strict=True)]


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Pieces that a sentence does not go beyond, as far as plain rules can tell; never long."""
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if match["space"] is None or not _TITLE.search(text, max(start, match.start() - 8), match.start()):
            yield from _short(text, start, match.end())
            start = match.end()
    yield from _short(text, start, len(text))


def _short(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while end - start > _LONGEST:
        cut = next((at for at in range(start + _LONGEST, start, -1) if text[at - 1].isspace()), start + _LONGEST)
        yield start, cut
        start = cut
    yield start, end


def _aligned(tokens: Sequence[str], text: str) -> Iterator[tuple[int, int]]:
    """Where each token stands.

    The tokenizer leaves out spaces and respells double quotes, nothing else. NLTK's own `span_tokenize` searches ahead for a token,
    past anything, and pairs quotes by their number; here each token must be the next thing in the text.
    """
    point = 0
    for token in tokens:
        while text[point : point + 1].isspace():
            point += 1
        spellings = (token, '"', "''", "``") if token in ("``", "''") else (token,)
        spelled = next((way for way in spellings if text.startswith(way, point)), None)
        if spelled is None:
            raise TextError(
                f"expected {token!r} of NLTK's tokenizer at {text[point : point + 20]!r}. Use another tagger for this text."
            )
        yield point, point + len(spelled)
        point += len(spelled)


def _spacy_words(texts: Sequence[str], name: str) -> list[tuple[Word, ...]]:
    try:
        import spacy
    except ImportError as error:
        raise TextError("expected spaCy for tagger='spacy', found none. Install it: pip install 'basin-lens[spacy]'") from error
    try:
        pipeline = spacy.load(name)
    except OSError as error:
        raise TextError(f"expected spaCy's pipeline {name!r}, found none. Get it once: python -m spacy download {name}") from error
    longest = max(map(len, texts), default=0)
    if longest > pipeline.max_length:
        raise TextError(f"expected texts of at most {pipeline.max_length} characters for spaCy, got {longest}. Split them.")
    return [tuple(_from_spacy(tokens, name)) for tokens in pipeline.pipe(texts)]


def _from_spacy(tokens: Any, name: str) -> Iterator[Word]:
    for token in tokens:
        if not token.pos_ and not token.text.isspace():
            raise TextError(
                f"expected parts of speech from spaCy's pipeline {name!r}, got none. Use one with a tagger, as en_core_web_sm."
            )
        if token.pos_ not in _SPACES and not token.text.isspace():
            yield Word(token.idx, token.idx + len(token.text), token.text, _OURS.get(token.pos_, token.pos_))
