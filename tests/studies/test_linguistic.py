"""The linguistic study, and the words that it is about."""

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.studies.framework import words
from basin_lens.studies.framework.declared_tests import (
    declared_test,
    settle,
)
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.table_parts import named_rows
from tests.studies.planted import noise, standard

# -- words -----------------------------------------------------------------------------------------------------------------------------


def test_rows_of_words_against_all_pairs(measured):
    tokens, source = words.tagged_tokens(measured, "auto")
    assert source == "gold"
    for row in tokens[tokens.layer == 1].sample(150, random_state=0).itertuples():
        held = measured.capture.passages[row.passage].words
        shared = [min(row.end, w.end) - max(row.start, w.start) for w in held]
        best = int(np.argmax(shared))
        if shared[best] <= 0:
            assert np.isnan(row.word) and pd.isna(row.tag) and pd.isna(row.word_text)
        else:
            assert (row.word, row.tag, row.word_text) == (best, held[best].tag, held[best].text.lower())
    for layer in measured.layers:  # the same at every layer
        part = tokens[tokens.layer == layer]
        assert part.word.equals(part.word) and np.array_equal(part.word, tokens[tokens.layer == 0].word, equal_nan=True)
    pd.testing.assert_frame_equal(tokens[measured.table.columns], measured.table)


def token_rows(*rows, layers=(0, 1)):
    names = ["doc", "seq", "pos", "word", "word_text", "tag", "score", "token_id"]
    one = pd.DataFrame(rows, columns=names).astype({"word": float, "score": float})
    table = pd.concat([one.assign(layer=layer, run="r", score=one.score + 10 * layer) for layer in layers], ignore_index=True)
    table.attrs = {"provenance": {"r": {}}}
    return table


WORDS = token_rows(
    ("d", 0, 0, np.nan, None, None, np.nan, 0),  # BOS
    ("d", 0, 1, 0, "the", "DET", 1.0, 1),
    ("d", 0, 2, 1, "ferry", "NOUN", 2.0, 2),
    ("d", 0, 3, 1, "ferry", "NOUN", 6.0, 3),
    ("d", 0, 4, 2, "the", "DET", np.nan, 1),
    ("d", 0, 5, 3, "lamp", "NOUN", 3.0, 4),  # cut by the end of the sequence
    ("d", 1, 1, 3, "lamp", "NOUN", 9.0, 5),
    ("d", 1, 2, 4, "the", "DET", 4.0, 1),
    ("e", 2, 1, 0, "ferry", "NOUN", np.nan, 2),
    ("e", 2, 2, 0, "ferry", "NOUN", 8.0, 3),
)


@pytest.mark.parametrize(
    ("part", "scores"),
    [
        ("mean", [1, 4, np.nan, 3, 9, 4, 8]),
        ("first", [1, 2, np.nan, 3, 9, 4, np.nan]),
        ("last", [1, 6, np.nan, 3, 9, 4, 8]),
    ],
)
def test_word_table(part, scores):
    for shuffled in (False, True):
        given = WORDS.sample(frac=1, random_state=0) if shuffled else WORDS
        given.attrs = WORDS.attrs
        table = words.word_table(given, part)
        assert table.attrs == WORDS.attrs
        for layer in (0, 1):
            one = table[table.layer == layer].sort_values(["seq", "word"])
            assert one.word_text.tolist() == ["the", "ferry", "the", "lamp", "lamp", "the", "ferry"]
            np.testing.assert_array_equal(one.score, np.array(scores) + 10 * layer)
            # Shares among the seven words of a layer.
            assert np.exp(one.log_frequency).to_numpy() * 7 == pytest.approx([3, 2, 3, 2, 2, 3, 2])
            assert one.groupby("word_text").token_id.nunique().eq(1).all() and one.token_id.nunique() == 3


def test_word_table_of_a_measurement(measured):
    tokens, _ = words.tagged_tokens(measured, "auto")
    mean, first, last = (words.word_table(tokens, part) for part in ("mean", "first", "last"))
    keys = ["layer", "doc", "seq", "word"]
    own = tokens.groupby(keys)
    assert len(mean) == len(first) == len(last) == own.ngroups
    for table, expected in (
        (mean, own.mean(numeric_only=True)),
        (first, own.nth(0).set_index(keys)),
        (last, own.nth(-1).set_index(keys)),
    ):
        one = table.set_index(keys).sort_index()
        for column in (HEADLINE, "contraction", "surprisal", "erasure"):
            np.testing.assert_allclose(one[column].to_numpy(float), expected.sort_index()[column].to_numpy(float))
    whole = {(p, i) for p, passage in enumerate(measured.capture.passages) for i in range(len(passage.words))}
    assert set(zip(mean.passage, mean.word.astype(int), strict=True)) <= whole


# -- linguistic ------------------------------------------------------------------------------------------------------------------------


def test_a_planted_difference_between_kinds_of_words_is_found(spoken):
    rows = spoken.findings.set_index("question")
    assert spoken.decision.startswith("in part")
    row = rows.loc["function - content"]
    assert row.holds and row.low < 1 < row.high and row.estimate == pytest.approx(1, abs=0.15)  # at fixed controls, too
    nothing = rows.loc["noun - verb"]
    assert not nothing.holds and nothing.low < 0 < nothing.high and abs(nothing.estimate) < 0.3
    row = rows.loc["tag"]
    assert row.holds and row.test.startswith("min F'") and row.estimate > 0.1 and row.layer > 0
    assert row.n_units == row.n_documents == 8 and row.p_corrected > row.p
    groups = spoken.tables["groups"]
    mine = groups[(groups.score == HEADLINE) & (groups.group == "function - content") & (groups.control_set == "none")]
    assert mine.estimate.to_numpy() == pytest.approx(1, abs=0.1)
    assert (mine.p_corrected < 0.05).all()
    guide = spoken.findings.set_index("question").loc["function - content"]
    assert guide.guide_reading == "strong" and "t-test over tokens" in guide.guide_test
    means = spoken.tables["tag_means"]
    mine = means[(means.score == HEADLINE) & (means.control_set == "none") & (means.layer == 1)].set_index("tag")["mean"]
    assert mine[["DET", "ADP", "PRON"]].min() > mine[["NOUN", "VERB", "ADJ"]].max()


def test_a_difference_that_is_all_frequency_is_no_finding(measured):
    """Without controls it is there."""
    tokens, _ = words.tagged_tokens(measured, "auto")
    table = words.word_table(tokens, "mean")
    # Frequency made unequal between the kinds, as it is in English.
    kind = table["tag"].map({**dict.fromkeys(words.FUNCTION, "function"), **dict.fromkeys(words.CONTENT, "content")})
    table["kind"] = kind
    table["log_frequency"] += 1.5 * (kind == "function")
    table[HEADLINE] = np.where(table[HEADLINE].notna(), standard(table["log_frequency"].to_numpy()) + noise(table, 3, 0.1), np.nan)
    table.attrs = dict(measured.table.attrs)

    def test(controls):
        return lambda part: bl.stats.compare_groups(
            part, HEADLINE, "kind", groups=("function", "content"), paired=True, controls=controls, n_resamples=499
        )

    before = settle("linguistic", [declared_test(table, test(()), measured, "x", "function - content")])
    after = settle("linguistic", [declared_test(table, test(bl.stats.CONTROLS), measured, "x", "function - content")])
    assert before.holds.all() and before.estimate.iloc[0] > 0.5
    assert not after.holds.any() and abs(after.estimate.iloc[0]) < 0.1
    # Another 1 on top of it is found whole: the controls do not take their share of it.
    table[HEADLINE] += 1.0 * (kind == "function")
    (row,) = named_rows(declared_test(table, test(bl.stats.CONTROLS), measured, "x", "function - content"))
    assert row.low < 1 < row.high and row.estimate == pytest.approx(1, abs=0.1)
