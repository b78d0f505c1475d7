"""Who the neighbors are: shares, what chance gives, what comes first."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from basin_lens.studies import neighbor_composition
from basin_lens.studies.framework import words
from tests.studies.planted import plant


def with_neighbors(measured, draw):
    """Neighbors by our own rule: from (row, eligible rows) to rows."""
    kept = measured.neighbors
    first = measured.table[measured.table.layer == measured.layers[0]].reset_index(drop=True)
    rows = np.full_like(kept.rows, -1)
    seq, later = first.seq.to_numpy(), first.pos.to_numpy() > 0
    for layer in range(len(rows)):
        for row in np.flatnonzero(later):
            rows[layer, row] = draw(layer, row, np.flatnonzero(later & (seq != seq[row])))
    return replace(measured, neighbors=replace(kept, rows=rows)), first


def test_the_bank_s_rows_are_the_tokens(measured):
    bank = measured.neighbors.bank
    first = measured.table[measured.table.layer == 0]
    assert measured.neighbors.own
    assert bank["seq"].tolist() == first["seq"].tolist() and bank["pos"].tolist() == first["pos"].tolist()


def test_shares_and_chance_by_hand(measured):
    tokens, _ = words.tagged_tokens(measured, "auto")
    shares, curves = neighbor_composition.neighbor_shares(tokens, measured)
    n = len(tokens) // len(measured.layers)
    bank = tokens[:n].reset_index(drop=True)
    rng, compared = np.random.default_rng(0), 0
    columns = {"same_tag": "tag", "same_word": "word_text", "same_document": "doc"}
    for row in rng.choice(np.flatnonzero(bank.pos > 0), 25, replace=False):
        for layer in (0, 2):
            mine, near = bank.loc[row], bank.loc[measured.neighbors.rows[layer][row]]
            others = bank[(bank.pos > 0) & (bank.seq != mine.seq)]
            got = shares.iloc[layer * n + row]
            assert (got.seq, got.pos, got.layer) == (mine.seq, mine.pos, layer)
            for name, column in columns.items():
                if pd.isna(mine[column]):
                    assert np.isnan(got[name]) and np.isnan(got[f"{name}_chance"])
                    continue
                assert got[name] == pytest.approx((near[column] == mine[column]).mean())
                assert got[f"{name}_chance"] == pytest.approx((others[column] == mine[column]).mean())
                assert got[f"{name}_excess"] == pytest.approx(got[name] - got[f"{name}_chance"])
            # Among other words: of the neighbors that are words, but not this one.
            near, others = (part[part.word_text.notna() & (part.word_text != mine.word_text)] for part in (near, others))
            if pd.isna(mine.tag) or not len(near):
                assert np.isnan(got.same_tag_other_word) and np.isnan(got.same_tag_other_word_chance)
                continue
            assert got.same_tag_other_word == pytest.approx((near.tag == mine.tag).mean())
            assert got.same_tag_other_word_chance == pytest.approx((others.tag == mine.tag).mean())
            compared += 1
    assert compared > 25
    assert set(curves.score) == {f"{name}_excess" for name in (*columns, "same_tag_other_word")}
    assert np.allclose(curves.estimate, curves.share - curves.chance, atol=0.05)


def test_chance_of_the_same_tag_among_other_words_by_hand():
    """Words of several tags, tokens without a word or tag, tokens of no group, groups larger than sequences."""
    rng = np.random.default_rng(0)
    word, tag, group = rng.integers(-1, 6, 80), rng.integers(-1, 3, 80), rng.integers(-1, 5, 80)
    eligible = rng.random(80) < 0.8
    found = neighbor_composition._chance_of_other_words(tag, word, group, eligible)
    for row in range(80):
        outside = (group != group[row]) | ((group[row] < 0) & (np.arange(80) != row))
        others = eligible & outside & (word >= 0) & (word != word[row])
        expected = (tag[others] == tag[row]).mean() if tag[row] >= 0 and word[row] >= 0 else np.nan
        assert found[row] == pytest.approx(expected, nan_ok=True)


def test_neighbors_at_random_have_no_excess(measured):
    tokens, _ = words.tagged_tokens(measured, "auto")
    rng = np.random.default_rng(0)
    planted, _ = with_neighbors(measured, lambda _layer, _row, able: rng.choice(able, measured.settings["k"]))
    _, curves = neighbor_composition.neighbor_shares(tokens, planted)
    assert curves.estimate.abs().max() < 0.02
    assert (curves.p_corrected > 0.01).all()


@pytest.fixture
def drawn(measured):
    """Neighbors as told layer by layer, what the declared test makes of them, and the shares."""
    tokens, _ = words.tagged_tokens(measured, "auto")
    first = tokens[tokens.layer == 0].reset_index(drop=True)
    tag, doc, word = (first[name].to_numpy(object) for name in ("tag", "doc", "word_text"))
    alike = {
        "tag": lambda row, able: (tag[able] == tag[row]) & (word[able] != word[row]),
        "word": lambda row, able: word[able] == word[row],
        "document": lambda row, able: doc[able] == doc[row],
        "any": lambda _, able: np.ones(len(able), bool),
    }

    def make(*kinds):
        rng = np.random.default_rng(0)

        def draw(layer, row, able):
            chosen = able[alike[kinds[layer]](row, able)]
            return rng.choice(chosen if len(chosen) and rng.random() < 0.8 else able, measured.settings["k"])

        planted, _ = with_neighbors(measured, draw)
        shares, curves = neighbor_composition.neighbor_shares(tokens, planted)
        return neighbor_composition.syntax_first(shares, planted).iloc[0], curves.set_index(["score", "layer"])

    return make


def test_neighbors_of_the_same_tag_first_and_of_the_same_document_last(drawn):
    earlier, by = drawn("any", "tag", "document")
    assert by.loc[("same_tag_other_word_excess", 1), "share"] > 0.75
    assert by.loc[("same_tag_other_word_excess", 2), "p_corrected"] > 0.01
    assert by.loc[("same_document_excess", 2), "p_corrected"] < 0.05
    assert -1 < earlier.estimate < -0.7 and earlier.p < 0.001 and earlier.effect_unit == "layers"
    later, _ = drawn("any", "document", "tag")
    assert 0.7 < later.estimate < 1 and later.p > 0.99


def test_the_same_word_first_is_no_early_syntax(drawn):
    """Its tag is the same, of course."""
    earlier, by = drawn("word", "word", "document")
    assert by.loc[("same_tag_excess", 1), "estimate"] > 0.4
    assert abs(by.loc[("same_tag_other_word_excess", 1), "estimate"]) < 0.05
    assert earlier.p > 0.05


def test_a_share_that_is_chance_has_no_late_center(measured):
    """Noise that moves together over layers: where it is below chance there is no center, and those count, too."""
    rng, n = np.random.default_rng(3), 40
    keys = pd.DataFrame({"doc": [f"d{i}" for i in range(n)], "seq": range(n), "run": "r"})
    level, tag = rng.normal(0, 0.05, n), rng.normal(0.2, 0.01, n)
    parts = [
        keys.assign(layer=layer, same_tag_other_word_excess=tag if layer == 1 else 0.02, same_document_excess=level + 0.002 * layer)
        for layer in (1, 2, 3)
    ]  # fmt: skip
    shares = pd.concat(parts, ignore_index=True)
    found = neighbor_composition.syntax_first(shares, measured).iloc[0]
    below = int((level + 0.006 <= 0).sum())
    assert found.estimate < -0.5 and found.p > 0.05 and 10 < below < 30
    assert f"{below} sequences have no center" in found.note and 0 < found.p_floor < 1e-3
    above = neighbor_composition.syntax_first(shares.assign(same_document_excess=shares.same_document_excess.abs()), measured).iloc[
        0
    ]
    assert above.p < 0.001


def test_layer_0_is_not_counted_in_what_comes_first(drawn):
    late, _ = drawn("tag", "document", "tag")
    assert late.estimate > 0.5 and late.p > 0.99


def test_one_tag_for_all_is_no_excess(measured):
    tokens, _ = words.tagged_tokens(measured, "auto")
    tokens["tag"], tokens["word"] = "X", 1.0
    shares, curves = neighbor_composition.neighbor_shares(tokens, measured)
    later = shares[(shares.pos > 0)]
    assert (later.same_tag == 1).all() and (later.same_tag_chance == 1).all() and (later.same_tag_excess == 0).all()
    assert "same_tag_excess" not in set(curves.score)
    assert np.isnan(neighbor_composition.syntax_first(shares, measured).p.iloc[0])


def test_shares_are_not_made_where_they_would_mean_nothing(measured):
    tokens, _ = words.tagged_tokens(measured, "auto")
    for other in (
        replace(measured, neighbors=None),
        replace(measured, neighbors=replace(measured.neighbors, own=False)),
    ):
        assert neighbor_composition.neighbor_shares(tokens, other) == (None, None)


def test_chance_knows_which_neighbors_are_excluded(measured):
    """Neighbors of one's own topic are never allowed, and drawn at random from all that are: no excess, more or less."""
    docs = measured.table.doc.str.removeprefix("doc-").astype(int)
    table = measured.table.assign(topic="t" + (docs % 3).astype(str))
    held = plant(replace(measured, settings={**measured.settings, "exclude": "topic"}), table)
    tokens = held.table.assign(word=1.0, tag=held.table.topic, word_text=held.table.topic)  # tags go with topics
    tokens.attrs = dict(measured.table.attrs)
    topic = tokens[tokens.layer == 0].topic.to_numpy()
    rng = np.random.default_rng(0)
    planted, _ = with_neighbors(held, lambda _layer, row, able: rng.choice(able[topic[able] != topic[row]], 5))
    _, curves = neighbor_composition.neighbor_shares(tokens, planted)
    assert curves is None or curves.estimate.abs().max() < 0.05
