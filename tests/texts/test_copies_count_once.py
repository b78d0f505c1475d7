"""Copies of a text are one observation: tests, splits, flags and tables count them once."""

import numpy as np
import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import tables
from basin_lens.errors import StudyError
from basin_lens.stats.added import _cases
from basin_lens.stats.design import split
from basin_lens.tables.distinct import documents_once
from tests.conftest import random_tokens
from tests.texts.copied import S, copied, random_texts, table_of, words

# -- tests over copies are tests over texts ---------------------------------------------------------------------------------------------


def every_test(table):
    """All statistics of one table: the answer must not depend on copies."""
    given = {"n_resamples": 99, "seed": 1}
    tagged = table.assign(tag=np.where(table.token_id % 2 == 0, "even", "odd"))
    bare = table.drop(columns="member").assign(member=table.member)
    return {
        "correlation": S.within_sequence_correlation(table, "a", "b"),
        "partial": S.partial_correlation(table, "a", "b", controls=["position", "log_frequency"]),
        "ranks": S.rank_regression(table, "a", "b", controls=["position"]),
        "groups": S.compare_groups(table, "a", "member", **given),
        "pairs": S.compare_groups(tagged, "a", "tag", paired=True, controls=["position"], **given),
        "change": S.before_after(table, "a", **given),
        "detection": S.detect(bare, "a", "member", versus="b", **given),
        "added": S.added_value(table, "a", "member", "b", n_splits=2, **given),
        "mixed": S.mixed_model(table, "a", "b", controls=["position"]),
        "quartiles": S.quartile_table(table, "a", "b"),
        "tags": S.tag_effect(tagged, "a", "tag", controls=["position"], n_resamples=99),
        "means": S.tag_means(tagged, "a", "tag"),
        "guide": S.guide_tests(table, "a", "b"),
        "flags": S.red_flags(table, "a", "b", controls=["position"], n_resamples=99).query("flag != 'copies'"),
    }  # fmt: skip


@pytest.mark.parametrize("unit", ["document", "sequence"])
def test_eight_texts_five_times_are_eight_texts(unit):
    table = table_of(random_texts(8), seed=3)
    once, five = (S.within_sequence_correlation(t, "a", "b", unit=unit).iloc[0] for t in (table, copied(table, 5)))
    assert (once.n_units, five.n_units, five.n_documents, five.n_tokens) == (8, 8, 8, 480)
    assert five.p == pytest.approx(once.p, rel=1e-9) and five.estimate == pytest.approx(once.estimate, rel=1e-9)
    assert once.note == "" and "32 of 40 texts are copies of others and left out" in five.note


@pytest.mark.slow
def test_no_statistic_sees_copies():
    """Some texts twice, some five times, some once; the copies anywhere in the table."""
    table = table_of(random_texts(14), seed=4)
    many = copied(table, 5, lambda part, copy: part[part.groupby("doc").ngroup() % 5 >= copy])
    expected, found = every_test(table), every_test(many)
    assert many.doc.nunique() > 30
    for name, answer in expected.items():
        pd.testing.assert_frame_equal(
            found[name].drop(columns=["note", "why"], errors="ignore"), answer.drop(columns=["note", "why"], errors="ignore"), rtol=1e-6,
            atol=1e-9, obj=name,
        )  # fmt: skip
        if "note" in found[name]:
            assert found[name].note.str.contains("texts are copies of others and left out").all(), name


def test_near_copies_are_one_unit_each():
    texts = random_texts(8)
    near = [[9000 + index, *text] for index, text in enumerate(texts)] + [
        text[8:] + [9100 + index] * 8 for index, text in enumerate(texts)
    ]
    answer = S.within_sequence_correlation(table_of([*texts, *near]), "a", "b").iloc[0]
    assert (answer.n_units, answer.n_sequences) == (8, 8)
    assert "16 of 24 texts" in answer.note


@pytest.mark.slow
def test_false_positives_with_copies_are_those_of_the_texts():
    """12 texts, each 5 times: without counting them once, 4 times of 10 where nothing is."""
    texts = random_texts(12, 40)
    layers = []
    for layer in range(200):
        table = table_of(texts, seed=100 + layer).assign(layer=layer)
        layers.append(copied(table, 5))
    p = S.within_sequence_correlation(pd.concat(layers, ignore_index=True), "a", "b").p
    assert p.notna().all() and (p <= 0.05).mean() == pytest.approx(0.05, abs=0.035)


def test_tables_that_do_not_tell_are_as_they_were():
    table = copied(table_of(random_texts(8)), 2)
    for bare in (
        table.drop(columns="token_id"),
        table.drop(columns="pos"),
        table[table.pos % 2 == 0],
        table[table.pos == 7],
        table[table.pos < 4],
    ):
        assert not documents_once(bare).n_copies
    assert documents_once(table).n_copies == 8


def test_copies_under_another_label_are_kept_and_told():
    """The same texts in both groups: they are what is compared. Twice in one group, they count once."""
    texts = random_texts(8)
    table = table_of([*texts, *texts, *texts[:4]])
    table["group"] = np.where(table.seq < 8, "before", "after")
    answer = S.compare_groups(table, "a", "group", n_resamples=99).iloc[0]
    assert (answer.n_first, answer.n_second, answer.n_units) == (8, 8, 16)
    assert "4 of 20 texts are copies of others and left out" in answer.note
    assert "8 of 20 texts are copies of texts under another group, and kept" in answer.note
    assert S.within_sequence_correlation(table, "a", "b").n_units[0] == 8


def test_copies_in_several_label_units_are_told_and_those_in_one_left_out():
    texts = random_texts(10)
    table = table_of([*texts, texts[0], texts[1]])
    table["template"] = table.seq % 10
    table.loc[table.seq == 11, "template"] = 3
    answer = S.within_sequence_correlation(table, "a", "b", unit="template").iloc[0]
    assert (answer.n_units, answer.n_sequences) == (10, 11)
    assert answer.note.startswith(
        "1 of 12 texts are copies of others and left out; 1 of 12 texts are copies of texts under another template"
    )


def test_documents_that_share_much_are_one_and_a_common_line_is_left_out():
    chapters, (line,) = random_texts(12), random_texts(1, 5, seed=9)
    rows = []
    # Six books of two chapters; the second edition of the first has another ending. All have a line in common.
    for doc, parts in enumerate(
        [*([a, b, line] for a, b in zip(chapters[::2], chapters[1::2], strict=True)), [chapters[0], line, [9000] * 50]]
    ):
        for part in parts:
            rows.append(
                pd.DataFrame({"doc": doc, "passage": len(rows), "seq": len(rows), "pos": range(len(part)), "token_id": part})
            )
    table = pd.concat(rows, ignore_index=True)
    found = documents_once(table)
    assert len(np.unique(found.documents)) == 6
    assert found.documents[table.doc == 6][0] == found.documents[table.doc == 0][0]
    assert found.n_copies == 7 and table.passage[~found.keep].nunique() == 7


# -- both sides of a split --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["document", "sequence"])
def test_halves_have_no_text_in_common(unit):
    table = copied(table_of(random_texts(20)), 3)
    for seed in range(5):
        first = S.halves(table, unit=unit, seed=seed)
        assert not set(table.seq[first] % 20) & set(table.seq[~first] % 20)
    with pytest.raises(StudyError, match="copies of a text count once"):
        S.halves(copied(table_of(random_texts(8)), 3))


def test_halves_keep_copies_together_whatever_their_labels():
    table = copied(table_of(random_texts(20)), 2)
    table["member"] = table.seq < 20
    first = S.halves(table, stratify="member")
    assert set(table.seq[first] % 20).isdisjoint(table.seq[~first] % 20)


def test_folds_of_added_value_have_no_text_in_common():
    texts = random_texts(12)
    table = table_of([*texts, *texts[:6]])
    table["member"] = table.seq < 9
    table.loc[table.seq >= 12, "member"] = ~(table.seq[table.seq >= 12] - 12 < 9)
    (rows,) = split(table, ["a", "b"], labels=["member"])
    units = _cases(rows, rows.labels["member"].astype(bool), ["a"])[0]
    assert len(units) == 18 and len(np.unique(rows.fold)) == 12
    assert S.added_value(table, "a", "member", "b", n_splits=3, n_resamples=19).n_units[0] == 18


# -- the flag, and tables from a model --------------------------------------------------------------------------------------------------


def test_the_flag_says_how_many():
    table = table_of(random_texts(12))
    flags = [S.red_flags(t, "a", "b", n_resamples=99).set_index("flag").loc["copies"] for t in (table, copied(table, 4))]
    assert (flags[0].raised, flags[0].value, flags[0].n_documents) == (False, 0, 12)
    assert (flags[1].raised, flags[1].value, flags[1].n_documents) == (True, 0.75, 12)
    assert "36 of 48 texts" in flags[1].why


@pytest.fixture(scope="module")
def many(llama):
    """Eight texts and four copies of each, none of them equal to the letter but one; more than one chunk long."""
    made = []
    for number in range(8):
        text = words(number)
        title = f"{words(50 + number, 3)}\n"
        changed = text.split()
        changed[20] = "ferries"
        for kind, copy in {
            "text": text, "title": title + text, "mark": "\ufeff" + text, "white": text.replace(" ", "  ", 5) + "\n\n", "word": " ".join(changed),
            "shifted": text[len(text) // 4 :] + " " + words(90 + number, 8), "again": text,
        }.items():  # fmt: skip
            made.append(bl.Passage(copy, doc=f"{kind} {number}", labels={"number": number, "kind": kind}))
    return bl.analyze(
        llama, made, [bl.analyzers.StateNorm(), bl.analyzers.Surprisal()], layers=[0, 1], max_length=48, progress=False
    )


def test_copies_are_in_provenance_and_survive_what_tables_do(many, tmp_path):
    def record(table):
        (run,) = tables.provenance(table)
        return tables.provenance(table)[run]["copies"]

    held = record(many)
    assert (held["texts"], held["distinct"], held["n"], held["share"]) == (56, 8, 13, 0.5)
    assert [{member["doc"].split()[-1] for member in group} for group in held["groups"]] == [{str(n)} for n in range(8)]
    assert all(group[0]["doc"].startswith("text") for group in held["groups"])
    tables.save(many, tmp_path / "table.parquet")
    for table in (tables.load(tmp_path / "table.parquet"), tables.concat([many]), many[many.layer == 1], many[many.pos > 20]):
        assert record(table) == held
        answer = S.within_sequence_correlation(table, "state_norm", "surprisal")
        assert set(answer.n_units) == set(answer.n_documents) == {8}
        assert answer.note.str.contains("48 of 56 texts are copies of others and left out").all()
    # Rows of the copies alone: another one stands for each text.
    some = many[many.kind.isin(["word", "title"])]
    assert S.within_sequence_correlation(some, "state_norm", "surprisal").n_units.tolist() == [8, 8]


def test_a_table_without_its_record_is_looked_through_itself(many, tmp_path):
    many.to_parquet(tmp_path / "bare.parquet")
    bare = pd.read_parquet(tmp_path / "bare.parquet")
    bare.attrs = {}
    answer = S.within_sequence_correlation(bare, "state_norm", "surprisal")
    assert answer.n_units.tolist() == [8, 8]
    summary = tables.layer_summary(many, ["surprisal"])
    assert summary.n_documents.tolist() == [8, 8]
    # Texts put together anew: the record is of others.
    again = pd.concat(
        [many, many.assign(doc=many.doc + " again", seq=many.seq + 1000, passage=many.passage + 1000)], ignore_index=True
    )
    again.attrs = dict(many.attrs)
    assert S.within_sequence_correlation(again, "state_norm", "surprisal").n_units.tolist() == [8, 8]


def test_the_answer_is_that_of_the_texts(llama, many):
    alone = [bl.Passage(words(number), doc=f"text {number}") for number in range(8)]
    table = bl.analyze(
        llama, alone, [bl.analyzers.StateNorm(), bl.analyzers.Surprisal()], layers=[0, 1], max_length=48, progress=False
    )
    expected, found = (S.within_sequence_correlation(t, "state_norm", "surprisal") for t in (table, many))
    assert found.p.to_numpy() == pytest.approx(expected.p.to_numpy(), rel=1e-4)
    assert found.estimate.to_numpy() == pytest.approx(expected.estimate.to_numpy(), rel=1e-4)


def test_token_ids_a_cache_and_pairs_of_runs_know_copies_too(llama):
    tokens = torch.cat([random_tokens(8, 40), random_tokens(8, 40)[:4]])
    options = {"layers": [0, 1], "progress": False}
    analyzers = [bl.analyzers.StateNorm(), bl.analyzers.Surprisal()]
    from_ids = bl.analyze(llama, tokens, analyzers, **options)
    _, cache = llama.run_with_cache(tokens)
    from_cache = bl.analyze(llama, bl.Capture.from_cache(llama, tokens, cache), analyzers, **options)
    for table in (from_ids, from_cache):
        answer = S.within_sequence_correlation(table, "state_norm", "surprisal")
        assert answer.n_units.tolist() == [8, 8] and answer.note.str.contains("4 of 12 texts").all()
    pairs = bl.compare(from_ids[from_ids.layer == 0], from_ids[from_ids.layer == 1], on="state_norm")
    assert S.before_after(pairs).n_units.tolist() == [8]
