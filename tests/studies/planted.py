"""Made-up sentences of words of a few kinds, and effects planted into copies of what was measured on them."""

from dataclasses import replace

import numpy as np
import pytest

import basin_lens as bl
from basin_lens.errors import StudyError
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.texts import TaggedPassage, Word
from tests.analyzers.passes import counting

S = bl.studies


QUIET = {"k": 5, "progress": False}


# -- texts -----------------------------------------------------------------------------------------------------------------------------


LEXICON = {
    "DET": ["the", "a", "this", "every"],
    "ADP": ["of", "in", "on", "with", "by", "from"],
    "PRON": ["she", "he", "it", "they"],
    "CONJ": ["and", "but", "or"],
    "NOUN": [
        "ferry",
        "lamp",
        "voice",
        "steps",
        "tea",
        "jar",
        "glass",
        "blade",
        "water",
        "crystal",
        "piano",
        "clock",
        "boy",
        "man",
        "rain",
    ],
    "VERB": ["stopped", "running", "climbed", "sat", "plunge", "trapped", "stays", "came", "took", "reads", "said"],
    "ADJ": ["cold", "slow", "own", "steel"],
    ".": [",", "."],
}


WEIGHTS = {"DET": 0.16, "ADP": 0.14, "PRON": 0.1, "CONJ": 0.06, "NOUN": 0.26, "VERB": 0.18, "ADJ": 0.06, ".": 0.04}


TAG_OF = {word: tag for tag, held in LEXICON.items() for word in held}


def made_text(n_words: int, seed: int, doc: str, tags: dict[str, float] = WEIGHTS, **more) -> TaggedPassage:
    """Words of a few kinds in any order, some far more frequent than others, whatever their kind."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(list(tags), n_words, p=np.array(list(tags.values())) / sum(tags.values()))
    text, made = "", []
    for kind in kinds:
        rank = min(int(rng.geometric(0.4)), len(LEXICON[kind])) - 1
        word = LEXICON[kind][rank]
        made.append(Word(len(text), len(text) + len(word), word, TAG_OF[word]))
        text += word + " "
    return TaggedPassage(text.strip(), doc=doc, words=tuple(made), **more)


def short_texts(count: int, n_words: int = 16, **more) -> list[TaggedPassage]:
    """A document each, of one sequence."""
    return [made_text(n_words, seed, f"d{seed}", **more) for seed in range(count)]


NAMES = ["Mary", "John", "Anna", "Peter", "Clara", "Oscar"]


TEMPLATES = [
    "When {a} and {b} went to the shop in the rain, {a} gave the lamp to {b}.",
    "After {a} and {b} had tea by the glass, {a} sold the piano to {b}.",
    "Then {a} and {b} read the clock at four, and {a} took the jar from {b}.",
    "While {a} and {b} ran along the water, {a} lent the steel blade to {b}.",
    "Because {a} and {b} met on the steps, {a} sent the ferry home with {b}.",
    "Today {a} and {b} heat the blade in water, and {a} wedged it for {b}.",
    "Once {a} and {b} sat down in the cold, {a} told the story to {b}.",
]


def prompts(per_template: int = 3) -> list[bl.Passage]:
    """Prompts of templates: the subject is named twice, the indirect object once more at the end."""
    answer = []
    for at, template in enumerate(TEMPLATES):
        for turn in range(per_template):
            a, b = np.random.default_rng([at, turn]).choice(NAMES, 2, replace=False)
            text = template.format(a=a, b=b)
            second = text.index(a, text.index(a) + 1)
            spans = {"IO": (text.rindex(b), text.rindex(b) + len(b)), "S": (second, second + len(a))}
            answer.append(bl.Passage(text, doc=f"{at}-{turn}", labels={"template": f"t{at}", "early": at < 3}, spans=spans))
    return answer


# -- one measurement for all -----------------------------------------------------------------------------------------------------------


def plant(measured, table=None, **columns):
    """A copy with other columns in its table."""
    held = (measured.table if table is None else table).copy()
    for name, values in columns.items():
        held[name] = np.asarray(values, float)
    held.attrs = dict(measured.table.attrs)
    return replace(measured, table=held)


def plant_compression(measured, values, table=None, **columns):
    """A copy whose compression is above that of random sets by these values, where there is compression: of a sample of the tokens."""
    held = measured.table if table is None else table
    above = np.where(held[HEADLINE].notna(), np.asarray(values, float), np.nan)
    return plant(measured, table, **{HEADLINE: above, "compression": held["compression_random_sets"] + above}, **columns)


def noise(table, seed=0, size=1.0):
    return size * np.random.default_rng(seed).normal(size=len(table))


def standard(values):
    return (values - np.nanmean(values)) / np.nanstd(values)


def with_importance(measured, sign, seed=0):
    """Compression that goes with importance, and one cheap measure that is nearly erasure."""
    table = measured.table
    truth = standard(table["erasure"].rank().to_numpy())
    cheap = np.where(np.isnan(truth), noise(table, seed), truth + noise(table, seed + 1, 0.2))
    return plant_compression(measured, sign * cheap + noise(table, seed + 2, 0.5), attention_received=cheap)


# -- contrasts -------------------------------------------------------------------------------------------------------------------------


def refused(llama, monkeypatch, data, match, error=StudyError, study=None, **options):
    """Before any token went through the model."""
    run = S.measure if study is None else getattr(S, f"study_{study}")
    with counting(monkeypatch) as (forward, _), pytest.raises(error, match=match):
        run(llama, data, **QUIET | {"max_length": 40} | options)
    assert forward == []
