"""Tokens grouped into words, with their parts of speech."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.capture import Capture
from basin_lens.studies.framework.measured_texts import Measured
from basin_lens.texts import TaggedPassage, Word, word_of_tokens, words_of

# Universal tags. Auxiliaries are verbs in this tag set, so they count as content words.
FUNCTION = ("ADP", "CONJ", "DET", "PRON", "PRT")
CONTENT = ("ADJ", "ADV", "NOUN", "VERB")
Part = Literal["mean", "first", "last"]


def tagged_tokens(measured: Measured, tagger: str) -> tuple[pd.DataFrame, str]:
    """The measured tokens with their words (see `with_words`), and where the tags come from."""
    words, source = words_by_passage(measured.capture, tagger)
    return with_words(measured.table, words), source


def with_words(table: pd.DataFrame, words: Mapping[int, tuple[Word, ...]]) -> pd.DataFrame:
    """The tokens with `word` (its number in the passage), `tag` and `word_text` (lower case), found by character offsets."""
    answer = table.copy()
    first = table[table["layer"] == table["layer"].iloc[0]]
    times = table["layer"].nunique()
    for name, values in zip(("word", "tag", "word_text"), rows_of_words(first, words), strict=True):
        answer[name] = np.tile(values, times)
    return answer


def words_by_passage(capture: Capture, tagger: str) -> tuple[dict[int, tuple[Word, ...]], str]:
    assert capture.passages is not None
    used = sorted({s.passage for s in capture.sequences})
    passages = [capture.passages[index] for index in used]
    gold = tagger == "gold" or (tagger == "auto" and all(isinstance(passage, TaggedPassage) for passage in passages))
    found = words_of(passages, tagger)
    source = "gold" if gold else {"spacy": "spaCy's en_core_web_sm"}.get(tagger, "NLTK's averaged perceptron")
    return dict(zip(used, found, strict=True)), source


def rows_of_words(rows: pd.DataFrame, words: Mapping[int, tuple[Word, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number, tag and lower-case text of the word of each row, by character offsets; NaN, None, None for none."""
    number = np.full(len(rows), np.nan)
    tag, text = (np.full(len(rows), None, dtype=object) for _ in (0, 1))
    passages = rows["passage"].to_numpy()
    for passage in np.unique(passages).tolist():
        at = np.flatnonzero(passages == passage)
        there = words[passage]
        found = word_of_tokens(rows["start"].to_numpy()[at], rows["end"].to_numpy()[at], there)
        inside = found >= 0
        number[at[inside]] = found[inside]
        tag[at[inside]] = [there[index].tag for index in found[inside].tolist()]
        text[at[inside]] = [there[index].text.lower() for index in found[inside].tolist()]
    return number, tag, text


def word_table(tokens: pd.DataFrame, part: Part) -> pd.DataFrame:
    """One row per word and layer in place of one per token; `log_frequency` is that of the word among the words measured.

    Numbers are the mean over the word's tokens, or those of its first or last token; a word cut by the end of a sequence counts
    with what is there.
    """
    kept = tokens[tokens["word"].notna()].sort_values(["layer", "seq", "pos"], kind="stable")
    keys = ["layer", "doc", "seq", "word"]
    grouped = kept.groupby(keys, sort=False)
    if part == "mean":
        numbers = [name for name in kept.columns if pd.api.types.is_float_dtype(kept[name]) and name not in keys]
        answer = grouped.first()
        answer[numbers] = grouped[numbers].mean()
    else:
        answer = grouped.nth(0 if part == "first" else -1).set_index(keys)
    answer = answer.reset_index()[list(kept.columns)]
    one_layer = answer[answer["layer"] == answer["layer"].iloc[0]]
    share = one_layer["word_text"].value_counts(normalize=True)
    answer["log_frequency"] = np.log(answer["word_text"].map(share).to_numpy(float))
    answer["token_id"] = pd.factorize(answer["word_text"])[0]  # the word's type, as tests over types take it
    return tables.with_provenance(answer, tokens)
