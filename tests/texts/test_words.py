"""Words with parts of speech: records, taggers, and which word a token belongs to."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import nltk
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import basin_lens as bl
from basin_lens.errors import TextError
from basin_lens.texts import TAGS, TaggedPassage, Word, read_dataset, read_passages, tokenize, word_of_tokens, words_of


def found(resource: str) -> bool:
    try:
        nltk.data.find(resource)
    except LookupError:
        return False
    return True


TAGGER = "averaged_perceptron_tagger_eng"
needs_tagger = pytest.mark.skipif(
    not (found(f"taggers/{TAGGER}") and found("taggers/universal_tagset")),
    reason=f"needs NLTK's data: python -m nltk.downloader {TAGGER} universal_tagset",
)
needs_treebank = pytest.mark.skipif(
    not ((found("corpora/treebank.zip") or found("corpora/treebank")) and found("taggers/universal_tagset")),
    reason="needs NLTK's data: python -m nltk.downloader treebank universal_tagset",
)

QUOTES = {
    "double": 'He said "no" and "yes".',
    "at both ends": '"No."',
    "two in a row": '""quoted""',
    "TeX": "``no'' and `yes'",
    "typographic": "“It’s fine,” she said, ‘really’ — don’t.",
    "guillemets": "«Non», dit-il.",
    "three": "'''triple''' and ```three```",
    "inches": "a 2'' by 4\" board",
    "mixed": "\"''``\"",
    "nested": "\"He said 'no' to 'em,\" I'd say.",
}


def tagged(text: str, *tags: str) -> TaggedPassage:
    """A passage whose words are what spaces separate."""
    words, at = [], 0
    for word, tag in zip(text.split(), tags, strict=True):
        at = text.index(word, at)
        words.append(Word(at, at + len(word), word, tag))
        at += len(word)
    return TaggedPassage(text, words=tuple(words))


def assert_words_of(text: str, words) -> None:
    """Every character that is no space is in one word, in order."""
    assert [text[w.start : w.end] for w in words] == [w.text for w in words]
    assert "".join(w.text for w in words) == "".join(text.split())
    assert all(a.end <= b.start for a, b in pairwise(words))


# -- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [(-1, 4), (0, 4), (0, 6), (5, 5), (5, 0)])
def test_word_at_another_range(where):
    with pytest.raises(TextError, match=r"'Paris' at a range of 5 characters.*Ranges are \[start, end\)"):
        Word(*where, "Paris", "NOUN")


@pytest.mark.parametrize("tag", ["PROPN", "NNP", "noun", ""])
def test_word_of_another_tagset(tag):
    with pytest.raises(TextError, match=f"universal part of speech, got '{tag}' for 'Paris'.*NOUN, VERB"):
        Word(0, 5, "Paris", tag)


def test_tagged_passage_is_a_passage():
    passage = TaggedPassage("Paris", doc="d", labels={"x": 1}, spans={"city": (0, 5)}, words=(Word(0, 5, "Paris", "NOUN"),))
    assert isinstance(passage, bl.Passage)
    assert (passage.doc, passage.labels, passage.spans) == ("d", {"x": 1}, {"city": (0, 5)})
    with pytest.raises(TextError, match="at least one character"):
        TaggedPassage("")


@pytest.mark.parametrize(
    "words",
    [
        (Word(0, 6, "London", "NOUN"),),
        (Word(6, 12, "shines", "VERB"), Word(0, 5, "Paris", "NOUN")),
        (Word(0, 5, "Paris", "NOUN"), Word(4, 6, "s ", "X")),
        (Word(12, 13, ".", "."),),
    ],
    ids=["other text", "out of order", "overlap", "beyond the end"],
)
def test_words_that_are_not_those_of_the_text(words):
    with pytest.raises(TextError, match="words in the order of the text"):
        TaggedPassage("Paris shines", words=words)


def test_reading_keeps_the_words():
    passage = tagged("Paris shines", "NOUN", "VERB")
    first, second = read_passages([passage, bl.Passage("other")])
    assert isinstance(first, TaggedPassage)
    assert (first.words, first.doc) == (passage.words, "text-0")
    assert type(second) is bl.Passage
    assert read_passages(TaggedPassage("a b", doc="mine"))[0].doc == "mine"


# -- taggers ----------------------------------------------------------------------------------------------------------


def test_gold_words():
    passages = [tagged("Paris shines", "NOUN", "VERB"), TaggedPassage("no words known")]
    assert words_of(passages, "gold") == words_of(passages) == [passages[0].words, ()]
    assert words_of([]) == []


def test_gold_words_of_passages_without():
    with pytest.raises(TextError, match=r'their own words, got 1 without.*nltk:treebank.*tagger="nltk"'):
        words_of([tagged("Paris", "NOUN"), bl.Passage("London")], "gold")


def test_unknown_tagger():
    with pytest.raises(TextError, match=r"got 'stanza'. Use auto, gold, nltk or spacy"):
        words_of([bl.Passage("London")], "stanza")


@needs_tagger
def test_auto_is_nltk_unless_all_have_words():
    passages = [tagged("Paris shines", "X", "X"), bl.Passage("London sleeps")]
    assert words_of(passages) == words_of(passages, "nltk")
    assert words_of(passages)[0][0].tag == "NOUN"


@needs_tagger
def test_nltk_tags_plain_english():
    (words,) = words_of([bl.Passage("Mr. Green didn't see the old mill. Two men ran slowly to it, and she laughed!")])
    assert [(w.text, w.tag) for w in words] == [
        ("Mr.", "NOUN"), ("Green", "NOUN"), ("did", "VERB"), ("n't", "ADV"), ("see", "VERB"), ("the", "DET"), ("old", "ADJ"),
        ("mill", "NOUN"), (".", "."), ("Two", "NUM"), ("men", "NOUN"), ("ran", "VERB"), ("slowly", "ADV"), ("to", "PRT"),
        ("it", "PRON"), (",", "."), ("and", "CONJ"), ("she", "PRON"), ("laughed", "VERB"), ("!", "."),
    ]  # fmt: skip


@needs_tagger
@pytest.mark.parametrize("text", QUOTES.values(), ids=QUOTES.keys())
def test_nltk_words_with_quotes(text):
    (words,) = words_of([bl.Passage(text)], "nltk")
    assert_words_of(text, words)


@needs_tagger
def test_typographic_quotes_are_quotes():
    straight, curly = (
        [(w.start, w.end, w.tag) for w in words]
        for words in words_of([bl.Passage('"It\'s fine," she said.'), bl.Passage("“It’s fine,” she said.")], "nltk")
    )
    assert straight == curly
    assert [tag for _, _, tag in curly] == [".", "PRON", "VERB", "ADJ", ".", ".", "PRON", "VERB", "."]


@needs_tagger
@settings(max_examples=150, deadline=None)
@given(
    st.text(
        st.one_of(
            st.sampled_from(list("\"'`“”‘’«.,;:?!()<>-$%&* \n\r\x85\u2028aAbBstnd01")), st.characters(exclude_categories=["Cs"])
        ),
        min_size=1,
    )
)
@example("".join(QUOTES.values()))
def test_nltk_words_of_any_text(text):
    (words,) = words_of([bl.Passage(text)], "nltk")
    assert_words_of(text, words)


@needs_tagger
@pytest.mark.parametrize("size", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("piece", "count"), [("word ", 2000), ("x", 5000), ("Mr. X ", 800), ("\n", 2000), ('"', 2000), ("A. ", 1000)]
)
def test_nltk_words_of_long_texts(piece, count, size):
    """In seconds, not minutes."""
    text = piece * count * size + "end"
    (words,) = words_of([bl.Passage(text)], "nltk")
    assert_words_of(text, words)


@needs_tagger
def test_blank_passage_has_no_words():
    assert words_of([bl.Passage(" \n\n "), bl.Passage("one")], "nltk")[0] == ()


@needs_tagger
@needs_treebank
def test_nltk_finds_the_treebanks_words_and_tags():
    """Measured over the whole sample: 99.8 % of the words, 97 % of their tags."""
    passages = read_dataset("nltk:treebank", max_passages=20)
    gold = {(i, w.start, w.end): w.tag for i, words in enumerate(words_of(passages, "gold")) for w in words}
    ours = {(i, w.start, w.end): w.tag for i, words in enumerate(words_of(passages, "nltk")) for w in words}
    both = gold.keys() & ours.keys()
    assert len(both) > 0.99 * max(len(gold), len(ours))
    assert sum(gold[key] == ours[key] for key in both) > 0.96 * len(both)


# -- spaCy ------------------------------------------------------------------------------------------------------------


class Pipeline:
    """What `words_of` uses of a spaCy pipeline; splits at spaces and dots, spaces are tokens."""

    max_length = 100

    def __init__(self, **tags: str):
        self.tags = tags

    def pipe(self, texts):
        import re

        for text in texts:
            yield [
                SimpleNamespace(idx=m.start(), text=m[0], pos_=self.tags.get(m[0], "SPACE" if m[0].isspace() else ""))
                for m in re.finditer(r"\s{2,}|[.]|[^\s.]+", text)
            ]


@pytest.fixture
def spacy_stub(monkeypatch):
    def load(name):
        if name != "en_core_web_sm":
            raise OSError(f"[E050] Can't find model '{name}'.")
        tags = {
            "Paris": "PROPN",
            "was": "AUX",
            "and": "CCONJ",
            "that": "SCONJ",
            "to": "PART",
            ".": "PUNCT",
            "$": "SYM",
            "oh": "INTJ",
        }
        return Pipeline(**tags, old="ADJ", it="PRON")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))


@pytest.mark.usefixtures("spacy_stub")
def test_spacy_tags_become_universal():
    text = "oh it was  Paris and that old $ to."
    (words,) = words_of([bl.Passage(text)], "spacy")
    assert_words_of(text, words)
    assert [w.tag for w in words] == ["X", "PRON", "VERB", "NOUN", "CONJ", "CONJ", "ADJ", ".", "PRT", "."]


@pytest.mark.usefixtures("spacy_stub")
def test_spacy_without_what_it_needs(monkeypatch):
    with pytest.raises(TextError, match=r"'de_core', found none.*python -m spacy download de_core"):
        words_of([bl.Passage("Paris")], "spacy", spacy_model="de_core")
    with pytest.raises(TextError, match=r"parts of speech.*got none. Use one with a tagger"):
        words_of([bl.Passage("unknown")], "spacy")
    with pytest.raises(TextError, match="at most 100 characters for spaCy, got 101"):
        words_of([bl.Passage("." * 101)], "spacy")
    # None in sys.modules is how Python marks what cannot be imported.
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(TextError, match=r"pip install 'basin-lens\[spacy\]'"):
        words_of([bl.Passage("Paris")], "spacy")


@pytest.mark.slow
def test_a_real_spacy_pipeline(monkeypatch):
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")

    @spacy.Language.component("every_word_a_noun")
    def every_word_a_noun(tokens):
        for token in tokens:
            token.pos_ = "SPACE" if token.is_space else "PUNCT" if token.is_punct else "PROPN"
        return tokens

    pipeline.add_pipe("every_word_a_noun")
    monkeypatch.setattr(spacy, "load", lambda _: pipeline)
    text = "Paris  isn't\n\nLondon, “quite”."
    (words,) = words_of([bl.Passage(text)], "spacy")
    assert_words_of(text, words)
    assert {w.tag for w in words} == {"NOUN", "."}


# -- the word of a token ----------------------------------------------------------------------------------------------


def by_hand(starts, ends, words) -> list[int]:
    """All pairs."""
    best = []
    for start, end in zip(starts, ends, strict=True):
        shared = [min(end, w.end) - max(start, w.start) for w in words]
        most = max(shared, default=0)
        best.append(shared.index(most) if most > 0 else -1)
    return best


@st.composite
def tokens_and_words(draw):
    """Words with and without gaps; tokens of any kind, as of a tokenizer or not."""
    words, at = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=12)):
        at += gap
        words.append(Word(at, at + length, "x" * length, "X"))
        at += length
    if draw(st.booleans()):
        cuts = sorted(draw(st.sets(st.integers(0, at + 3), max_size=20)))
        pairs = [(-1, -1), *pairwise(cuts)]
    else:
        pairs = draw(
            st.lists(st.tuples(st.integers(0, at + 3), st.integers(0, 12)).map(lambda p: (p[0], p[0] + p[1])), max_size=20)
        )
    return [a for a, _ in pairs], [b for _, b in pairs], words


@settings(max_examples=400, deadline=None)
@given(tokens_and_words())
def test_word_of_tokens_is_the_one_that_shares_most(case):
    starts, ends, words = case
    assert word_of_tokens(starts, ends, words).tolist() == by_hand(starts, ends, words)


def test_word_of_tokens_by_name():
    words = [Word(0, 2, "ab", "X"), Word(3, 5, "cd", "X"), Word(5, 9, "efgh", "X"), Word(12, 13, ".", ".")]
    cases = {
        (-1, -1): -1,  # BOS
        (2, 5): 1,  # with the space before
        (0, 5): 0,  # two words with as much of each: the earlier
        (1, 7): 1,  # 1, 2 and 2 characters
        (0, 9): 2,  # the longest
        (2, 3): -1,  # a space
        (9, 12): -1,  # between words
        (4, 4): -1,  # no characters
        (11, 20): 3,  # beyond the end
    }  # fmt: skip
    starts, ends = (np.array(column) for column in zip(*cases, strict=True))
    assert word_of_tokens(starts, ends, words).tolist() == list(cases.values())
    assert word_of_tokens(starts.tolist(), tuple(ends.tolist()), words).tolist() == list(cases.values())


def test_word_of_tokens_without_words_or_tokens():
    assert word_of_tokens([0, 1], [1, 2], []).tolist() == [-1, -1]
    found = word_of_tokens([], [], [Word(0, 1, "a", "X")])
    assert found.shape == (0,)
    assert found.dtype == np.int64


def test_word_of_tokens_refuses_what_does_not_fit():
    word = Word(3, 5, "ab", "X")
    with pytest.raises(TextError, match="a start and an end for each token"):
        word_of_tokens([0, 1], [1], [word])
    for second in (Word(4, 6, "bc", "X"), Word(0, 2, "cd", "X")):
        with pytest.raises(TextError, match="in order and without overlap"):
            word_of_tokens([0], [1], [word, second])


@pytest.mark.slow
def test_word_of_tokens_is_fast():
    """Quadratic would be 10^10 steps."""
    starts = np.arange(0, 400_000, 4)
    words = [Word(a, a + 3, "abc", "X") for a in range(1, 400_000, 4)]
    assert np.array_equal(word_of_tokens(starts, starts + 4, words), np.arange(100_000))


@needs_treebank
def test_tokens_of_a_model_find_their_words(llama):
    (passage,) = read_dataset("nltk:treebank", max_passages=1)
    for sequence in tokenize(llama, [passage], prepend_bos=True):
        owners = word_of_tokens(sequence.starts, sequence.ends, passage.words)
        assert owners[0] == -1
        assert owners.tolist() == by_hand(sequence.starts, sequence.ends, passage.words)
        assert (np.diff(owners[owners >= 0]) >= 0).all()


def test_tags_are_the_universal_twelve():
    assert len(TAGS) == len(set(TAGS)) == 12
