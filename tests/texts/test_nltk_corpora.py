"""Passages of NLTK's corpora, tagged and plain."""

import re
import subprocess
import sys
from pathlib import Path

import nltk
import pytest

import basin_lens as bl
from basin_lens import texts
from basin_lens.errors import TextError
from basin_lens.texts import (
    TAGS,
    TaggedPassage,
    read_dataset,
)


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips where NLTK's data is not installed."""

    def missing(package: str) -> bool:
        for place in (f"corpora/{package}.zip", f"corpora/{package}", f"taggers/{package}"):
            try:
                nltk.data.find(place)
            except LookupError:
                continue
            return False
        return True

    gone = [package for package in packages if missing(package)]
    return pytest.mark.skipif(bool(gone), reason=f"needs NLTK's data: python -m nltk.downloader {' '.join(gone)}")


BROWN = ("humor", "science_fiction", "ca0")


@pytest.fixture(scope="module")
def treebank() -> list:
    return read_dataset("nltk:treebank")


# -- NLTK's tagged corpora --------------------------------------------------------------------------------------------


def assert_words(passage: TaggedPassage) -> None:
    assert [passage.text[w.start : w.end] for w in passage.words] == [w.text for w in passage.words]
    assert "".join(w.text for w in passage.words) == "".join(passage.text.split())
    assert {w.tag for w in passage.words} <= set(TAGS)


@needs("treebank", "universal_tagset")
def test_treebank_passages(treebank):
    assert len(treebank) == 199
    assert len({p.doc for p in treebank}) == 199
    assert treebank[0].doc == "treebank/wsj_0001"
    for passage in treebank:
        assert isinstance(passage, TaggedPassage)
        assert_words(passage)


@needs("treebank", "universal_tagset")
def test_treebank_is_readable(treebank):
    assert treebank[0].text == (
        "Pierre Vinken, 61 years old, will join the board as a nonexecutive director Nov. 29. "
        "Mr. Vinken is chairman of Elsevier N.V., the Dutch publishing group."
    )
    everything = "\n".join(p.text for p in treebank)
    assert "It was Richard Nixon's first visit to China" in everything
    assert "(US$148.9 million to" in everything
    assert "3 1/2 years" in everything
    assert "don't" in everything
    assert not re.search(r"``|''|-[LR][RC]B-|\\|\*T\*|\*-\d|  | [,.;:?!%)]|[($#] |\.\.$| n't", everything)
    # An opening quote that a tree left at the end of its sentence opens the next.
    assert ' " ' not in everything


@needs("treebank", "universal_tagset")
def test_treebank_words_and_tags_are_the_corpus_own(treebank):
    """All but traces and the full stop after an abbreviation's, respelled."""
    from nltk.corpus import treebank as corpus

    spelled = {"``": '"', "''": '"', "`": "'", "-LRB-": "(", "-RRB-": ")", "-LCB-": "{", "-RCB-": "}"}
    for passage, file in zip(treebank[:40], corpus.fileids()[:40], strict=True):
        fine, coarse = corpus.tagged_words(file), corpus.tagged_words(file, tagset="universal")
        pairs = [
            (spelled.get(word, word.replace("\\/", "/").replace("\\*", "*")), tag)
            for (word, kind), (_, tag) in zip(fine, coarse, strict=True)
            if kind != "-NONE-"
        ]
        kept = [
            pair
            for before, pair in zip([("", ""), *pairs], pairs, strict=False)
            if not (pair[0] == "." and before[0].endswith("."))
        ]
        assert [(w.text, w.tag) for w in passage.words] == kept


@pytest.mark.many
@needs("brown", "universal_tagset")
@pytest.mark.parametrize("part", BROWN)
def test_brown_passages(part):
    passages = read_dataset("nltk:brown", config=part)
    assert len(passages) == 9 if part != "science_fiction" else 6
    for passage in passages:
        assert passage.labels == {"category": "news" if part == "ca0" else part}
        assert_words(passage)
        assert not re.search(r"``|  | [,;?!%)]|[(] |([?!;,])\1", passage.text)


@needs("brown", "universal_tagset")
def test_brown_is_readable():
    (passage,) = read_dataset("nltk:brown", max_passages=1)
    assert passage.doc == "brown/ca01"
    assert passage.text.startswith(
        'The Fulton County Grand Jury said Friday an investigation of Atlanta\'s recent primary election produced "no evidence" that '
        "any irregularities took place.\n\nThe jury further said in term-end presentments"
    )


@needs("brown", "universal_tagset")
def test_brown_words_and_tags_are_the_corpus_own():
    from nltk.corpus import brown

    (passage,) = read_dataset("nltk:brown", config="cr01")
    pairs = [('"' if word in ("``", "''") else word, tag) for word, tag in brown.tagged_words("cr01", tagset="universal")]
    doubled = {i for i in range(1, len(pairs)) if pairs[i] == pairs[i - 1] and pairs[i][0] in set("?!;:,")}
    assert len(doubled) > 10
    assert [(w.text, w.tag) for w in passage.words] == [pair for i, pair in enumerate(pairs) if i not in doubled]


@needs("brown", "universal_tagset")
@pytest.mark.parametrize(
    ("part", "printed"),
    [
        ("ce01", "he was only 4' 10\" tall and weighed an"),
        ("ce07", 'most of the bars being 1/8" brass in 1/4" and 1/2" widths.'),
        ("ce07", 'Bar "C" is 2-3/4" long.'),
        ("ce35", '48" wide by a nominal 30" high (or six'),
        ("cj03", 'with a clearance of 0.002" on each side'),
    ],
)
def test_brown_prints_feet_and_inches_as_marks_of_measure(part, printed):
    """The corpus holds 10'' and then '' again, which was printed as a closing quote behind it: 10''"."""
    (passage,) = read_dataset("nltk:brown", config=part)
    assert printed in passage.text, passage.text[:2000]
    assert "''" not in passage.text and '""' not in passage.text
    assert_words(passage)
    assert [w.tag for w in passage.words if w.text.endswith('"') and len(w.text) > 1 and w.tag != "NOUN"] == []


@needs("brown", "universal_tagset")
def test_brown_closes_a_quotation_after_a_number():
    """A number's closing quote is no mark of inches."""
    (passage,) = read_dataset("nltk:brown", config="ca05")
    assert 'Socialist Party in 1910".' in passage.text


@needs("brown", "universal_tagset")
def test_brown_paragraphs_are_apart_by_a_blank_line():
    from nltk.corpus import brown

    (passage,) = read_dataset("nltk:brown", config="cn05")
    assert len(passage.text.split("\n\n")) == len(brown.paras("cn05"))


def composed(*paragraphs: str) -> str:
    """Text of tokens written as word/tag, "|" between sentences."""
    made = [[[tuple(token.rsplit("/", 1)) for token in s.split()] for s in p.split("|")] for p in paragraphs]
    text, words = texts.corpora._compose(made, "en-ptb")
    assert [text[w.start : w.end] for w in words] == [w.text for w in words]
    return text


@needs("universal_tagset")
@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("``/`` `/`` Buy/VB ,/, '/'' ''/'' he/PRP says/VBZ ./.", "\"'Buy,'\" he says."),
        ("the/DT dogs/NNS '/POS bowls/NNS", "the dogs' bowls"),
        ("'/' con/JJ '/' on/IN '/' pro/JJ '/'", "'con' on 'pro'"),
        ("She/PRP 'll/MD ca/MD n't/RB 'd/MD CREATOR/NN 'S/POS", "She'll can't'd CREATOR'S"),
        ("'30s/CD 'em/PRP '/'' '/' x/NN", "'30s 'em' 'x"),
        ("(/( C$/$ 5/CD )/) #/# 15/CD 8/CD %/NN", "(C$5) #15 8%"),
        ("-LRB-/-LRB- a/DT -RRB-/-RRB- -LCB-/-LRB- b/DT -RCB-/-RRB-", "(a) {b}"),
        ("Macmillan\\/McGraw-Hill/NNP B.A.T\\*/NNP", "Macmillan/McGraw-Hill B.A.T*"),
        ("the/DT U.S./NNP ./.|However/RB .../: ./.", "the U.S. However..."),
        ("so/RB :/: a/DT -/: b/DT --/: c/DT &/CC d/DT", "so: a - b -- c & d"),
        ("end/NN ./.|''/''|'s/POS x/NN", "end.\" 's x"),
        ("end/NN ``/``|next/NN", 'end "next'),
    ],
)
def test_spaces_where_a_printer_puts_them(tokens, text):
    assert composed(tokens) == text


@needs("universal_tagset")
def test_quotes_do_not_run_over_paragraphs():
    assert composed("an/DT '/' open/JJ one/NN", "'/' two/CD '/'", ",/, odd/JJ") == "an 'open one\n\n'two'\n\n, odd"
    assert composed("", "a/DT", " | ") == "a"


# -- NLTK's plain corpora ---------------------------------------------------------------------------------------------


@needs("genesis")
def test_genesis_is_english():
    from nltk.corpus import genesis

    passages = read_dataset("nltk:genesis")
    assert [p.doc for p in passages] == ["genesis/english-kjv", "genesis/english-web"]
    assert passages[0].text == genesis.raw("english-kjv.txt")
    (french,) = read_dataset("nltk:genesis", config="french")
    assert french.doc == "genesis/french"


@needs("inaugural")
def test_inaugural():
    passages = read_dataset("nltk:inaugural", max_passages=2)
    assert [p.doc for p in passages] == ["inaugural/1789-Washington", "inaugural/1793-Washington"]
    assert type(passages[0]) is bl.Passage
    assert passages[0].text.startswith("Fellow-Citizens of the Senate")


@needs("inaugural")
def test_no_such_files():
    with pytest.raises(TextError, match=r"files or a category of inaugural named '2222', found none.*1789-Washington"):
        read_dataset("nltk:inaugural", config="2222")


@pytest.mark.parametrize("name", ["nonsense", "", "LazyCorpusLoader", "os"])
def test_unknown_corpus(name):
    with pytest.raises(TextError, match=f"a corpus of NLTK, got '{name}'. Known: brown, genesis, .*treebank"):
        read_dataset(f"nltk:{name}")


@pytest.mark.slow
def test_missing_data_says_how_to_get_it(tmp_path):
    """Asked of a process of its own: NLTK keeps what it has loaded."""
    have = [Path(folder) / "corpora/treebank.zip" for folder in nltk.data.path]
    have = [path for path in have if path.exists()]
    (tmp_path / "corpora").mkdir()
    for path in have[:1]:
        (tmp_path / "corpora/treebank.zip").write_bytes(path.read_bytes())
    code = f"""
import nltk
nltk.data.path[:] = [{str(tmp_path)!r}]
from basin_lens.texts import Passage, read_dataset, words_of
for ask in (
    lambda: read_dataset("nltk:brown"), lambda: read_dataset("nltk:gutenberg"), lambda: words_of([Passage("a text")], "nltk"),
    lambda: read_dataset("nltk:treebank"),
):
    try:
        ask()
    except ValueError as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", code], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    wanted = ["brown", "gutenberg", "averaged_perceptron_tagger_eng", "universal_tagset" if have else "treebank"]
    assert len(said) == len(wanted)
    for line, package in zip(said, wanted, strict=True):
        assert line.startswith("TextError expected NLTK's data")
        assert line.endswith(f"Get it once: python -m nltk.downloader {package}")


def test_a_mistake_is_not_missing_data():
    with pytest.raises(KeyError), texts.corpora.nltk_data("brown"):
        {}["key"]
