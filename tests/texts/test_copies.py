"""One text several times is one observation: copies are found once, counted once, and never on both sides of a split."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import merging, studies, tables
from basin_lens.errors import MergeError, StudyError, TextError
from basin_lens.merging.windows import without_seen
from basin_lens.stats.added import _cases
from basin_lens.stats.design import split
from basin_lens.studies.framework.units import count_units
from basin_lens.studies.memorization import experiment as planted
from basin_lens.studies.memorization import extraction, single_author
from basin_lens.tables.distinct import documents_once
from basin_lens.texts import reference_passages
from basin_lens.texts.copies import COMMON, LONG, groups_of_copies, made_of_runs, runs_of
from tests.conftest import TEXTS, random_tokens

S = bl.stats
IOI = [
    "When Mary and John went to the store, John gave a drink to",
    "Then, {} and {} had a lot of fun at the {}. {} gave a {} to",
    "Then, {} and {} were thinking about going to the {}. {} wanted to give a {} to",
    "Afterwards {} and {} went to the {}. {} gave a {} to",
]


def random_texts(count, length=60, seed=0, vocabulary=5000):
    return np.random.default_rng(seed).integers(1, vocabulary, (count, length)).tolist()


def table_of(texts, seed=0, icc=0.3, scores=None):
    """A table made by hand, without provenance: one row per token, `b` and a label; copies have their text's own values if `scores` has them."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, text in enumerate(texts):
        a, b = (icc * rng.normal() + rng.normal(size=len(text)) for _ in "ab") if scores is None else scores[index]
        rows.append(pd.DataFrame({
            "layer": 3, "doc": f"text-{index}", "seq": index, "pos": range(len(text)), "token_id": text, "a": a, "b": b, "member": index % 2 == 0,
        }))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def copied(table, times, rows=None):
    """The table with every text `times` times, the copies as documents of their own."""
    docs = list(dict.fromkeys(table.doc))
    parts = []
    for copy in range(times):
        part = table.copy()
        part["doc"], part["seq"] = part.doc + f" copy {copy}" * (copy > 0), part.seq + copy * len(docs)
        parts.append(part if rows is None else rows(part, copy))
    return pd.concat(parts, ignore_index=True)


# -- what is a copy -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copy",
    [
        lambda text: text,
        lambda text: [9001, 9002, 9003, 9004, *text],
        lambda text: [*text[:30], 9001, *text[31:]],
        lambda text: text[10:] + random_texts(1, 10, seed=5)[0],
        lambda text: text[30:] + random_texts(1, 30, seed=5)[0],
        lambda text: text[15:50],
        lambda text: random_texts(1, 500, seed=6)[0] + text,
        lambda text: text[20:33],
    ],
    ids=["equal", "title", "a word changed", "shifted", "shifted by half", "excerpt", "quoted whole", "excerpt of 13 tokens"],
)
def test_copies_are_found(copy):
    texts = random_texts(6)
    assert groups_of_copies([*texts, copy(texts[2])]) == [[6, 2] if len(copy(texts[2])) > 200 else [2, 6]]


@pytest.mark.parametrize(
    "other",
    [
        lambda text: text[:25] + random_texts(1, 35, seed=5)[0],
        lambda text: text[::-1],
        lambda text: [x for token in text for x in (token, 9000)],
        lambda text: text[20:32],
    ],
    ids=["less than half", "backwards", "no run of 13", "12 tokens of it"],
)
def test_other_texts_are_not_copies(other):
    texts = random_texts(6)
    assert groups_of_copies([*texts, other(texts[2])]) == []


def test_short_texts_are_copies_only_if_equal_or_whole_in_another():
    (text,) = random_texts(1, LONG - 1)
    assert groups_of_copies([text, [9001, *text[1:]]]) == []
    assert groups_of_copies([text, [*text[:-1], 9001]]) == []
    assert groups_of_copies([text, [9001, *text]]) == [[0, 1]]
    assert groups_of_copies([[5], [5], [5, 6]]) == [[0, 1]]


def test_white_space_and_byte_order_marks_make_no_other_text():
    strings = {1: "The", 2: " The", 3: " cat", 4: "\n", 5: "  ", 6: "\ufeff", 7: "\ufffd", 8: "\ufffd", 9: "cat"}
    assert groups_of_copies([[1, 3], [6, 1, 3], [5, 2, 4, 9], [1, 3, 4]], strings) == [[0, 1, 2, 3]]
    assert groups_of_copies([[7, 3], [8, 3]], strings) == []  # parts of characters look alike and are not
    assert groups_of_copies([[4], [5], [4]], strings) == [[0, 2]]  # nothing but white space: as it is
    assert groups_of_copies([[1, 3], [6, 1, 3]]) == []


def test_a_copy_of_a_copy_is_a_copy():
    (book,) = random_texts(1, 400)
    windows = [book[first : first + 100] for first in range(0, 301, 50)]
    assert groups_of_copies(windows) == [list(range(7))]
    assert groups_of_copies([book[first : first + 100] for first in range(0, 301, 75)]) == []


def test_a_header_that_many_texts_have_makes_no_copies():
    (header,) = random_texts(1, 40, seed=1)
    files = [header + body for body in random_texts(3 * COMMON, 60)]
    assert groups_of_copies(files) == []
    # ... not even of the header itself; but of a file with the header, and of the header with another year.
    changed = [*files[90][:70], 9001, *files[90][71:]]
    assert groups_of_copies([*files, header]) == []
    assert groups_of_copies([*files, changed]) == [[90, len(files)]]
    assert groups_of_copies([*files, header, [9001, *header]]) == [[len(files), len(files) + 1]]


def test_thousands_of_near_copies_are_one_group():
    (text,) = random_texts(1)
    assert groups_of_copies([[9000 + index, *text] for index in range(2000)]) == [list(range(2000))]


def test_the_same_as_comparing_all_pairs():
    """Against the definition, pair by pair, on windows, excerpts and changed words of a few texts."""
    rng = np.random.default_rng(0)
    sources = random_texts(6, 200)
    texts = []
    for _ in range(60):
        source, first, length = rng.integers(6), int(rng.integers(150)), int(rng.integers(5, 120))
        text = sources[source][first : first + length]
        texts.append([9000 + int(rng.integers(99)) if rng.random() < 0.03 else token for token in text])

    def share(short, *longer):
        there = {tuple(long[i : i + 13]) for long in longer for i in range(len(long) - 12)}
        in_run = np.zeros(len(short), bool)
        for i in range(len(short) - 12):
            if tuple(short[i : i + 13]) in there:
                in_run[i : i + 13] = True
        return in_run.mean()

    def least(text):
        return 0.5 if len(text) >= 32 else 1.0

    expected = {frozenset([index]) for index in range(len(texts))}
    for i, a in enumerate(texts):
        for j, b in enumerate(texts[:i]):
            short, long = sorted((a, b), key=len)
            if a == b or share(short, long) >= least(short):
                joined = {group for group in expected if i in group or j in group}
                expected = expected - joined | {frozenset().union(*joined)}
    found = groups_of_copies(texts)
    assert len(found) > 2 and len(found) < len(expected)
    for pairwise in expected:
        assert len(pairwise) == 1 or any(pairwise <= set(group) for group in found)
    # What more is in a group has its runs in several texts of it.
    for group in found:
        for one in group:
            others = [texts[index] for index in group if index != one and len(texts[index]) >= len(texts[one])]
            assert (
                not others
                or share(texts[one], *others) >= least(texts[one])
                or any(one in pairwise for pairwise in expected if len(pairwise) > 1)
            )


@pytest.mark.parametrize("template", IOI[1:])
def test_prompts_of_a_template_are_texts_of_their_own(template):
    """Words as tokens: fewer than any tokenizer makes of them, so the longest possible share."""
    names, places, things = ["Mary", "John", "Tom", "Ann"], ["store", "park", "school"], ["drink", "bone", "ring"]
    prompts = sorted({
        template.format(a, b, place, b, thing) for a in names for b in names for place in places for thing in things if a != b
    })  # fmt: skip
    known: dict[str, int] = {}
    texts = [[known.setdefault(word, len(known)) for word in prompt.split()] for prompt in [IOI[0], *prompts]]
    assert groups_of_copies(texts) == []
    assert groups_of_copies([*texts, texts[5]]) == [[5, len(texts)]]


def test_prompts_are_texts_of_their_own_by_a_tokenizer_of_letters_too(tokenizer):
    prompts = [IOI[2].format(a, b, "school", b, "ring") for a, b in (("Mary", "John"), ("Ann", "Tom"), ("Mary", "Tom"))]
    texts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    strings = {token: tokenizer.decode([token]) for text in texts for token in text}
    assert min(map(len, texts)) > LONG and groups_of_copies(texts, strings) == []
    assert groups_of_copies([*texts, texts[1]], strings) == [[1, 3]]


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


def words(seed, count=40):
    """A text of these words in an order of its own."""
    return " ".join(np.random.default_rng(seed).choice(" ".join(TEXTS).split(), count))


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


# -- texts that were trained on ---------------------------------------------------------------------------------------------------------


def test_windows_that_are_copies_are_left_out_of_what_is_tested(llama):
    own = merging.windows_of(llama, [words(n, 60) for n in range(6)], 32)
    other = [words(n, 60) for n in range(20, 24)]
    held = merging.windows_of(llama, [words(50, 4) + "\n" + words(0, 60), *other], 32)
    rest, copied = held.without_copies_of(own)
    assert copied == sum(doc == "text-0" for doc in held.doc) > 0 and set(rest.doc) == {"text-1", "text-2", "text-3", "text-4"}
    assert own.without_copies_of(rest)[1] == 0
    twice = merging.windows_of(llama, [*other, words(50, 4) + "\n" + other[0]], 32)
    assert set(twice.once()[0].doc) == {"text-0", "text-1", "text-2", "text-3"}

    merger = merging.TokenMerger([0, 1], target_rate=0.3, projection=6, recent=4).calibrate(llama, own.tokens)
    training = merging.Training(steps=1, batch_size=2, evaluate_every=1)
    merging.train_merger(merger, llama, own, held, training=training, progress=False)
    facts = merger.facts["training"]
    assert facts["held_out_copies"] == copied
    assert without_seen(held, facts)[0].doc == rest.doc
    with pytest.raises(MergeError, match="expected held-out windows of other texts"):
        merging.train_merger(merger, llama, own, held.take([0]), training=training, progress=False)
    setting = merging.Setting((0, 1), budgets=(0.9,), seeds=1, policies=("stride",))
    with pytest.raises(MergeError, match="copies of calibration windows"):
        merging.compare_policies(llama, own, replace(held, doc=tuple(f"held {d}" for d in held.doc)), setting, progress=False)


def test_runs_are_known_again_by_their_numbers():
    texts = np.array(random_texts(40, 64))
    known = np.unique(runs_of(texts))
    assert len(known) == 40 * 52
    others = np.array(random_texts(40, 64, seed=1))
    others[3, 30:] = texts[5, :34]
    others[4, 40:] = texts[5, :24]
    assert np.flatnonzero(made_of_runs(others, known)).tolist() == [3]
    assert made_of_runs(texts, known).all() and not made_of_runs(texts[:, :10], known).any()


PLAN = studies.Plan(per_dose=6, doses=(8,), length=48)


def test_an_authors_passages_are_no_copies_of_one_another(llama):
    works = [bl.Passage(words(n, 500), doc=f"work {n}") for n in (30, 31)]
    alone, twice = (single_author.author_passages(llama, w, PLAN) for w in (works, [*works, replace(works[0], doc="edition")]))
    assert [p.text for p in alone] == [p.text for p in twice]
    said = single_author.copies_said(llama, [*works, works[0]], [works[1]], PLAN)
    assert len(said) == 2 and "passages of the works are copies" in said[0] and "unrelated passages" in said[1]
    with pytest.raises(StudyError, match=r"got 0 without \d+ copies of one another or of the works"):
        single_author.unrelated_passages(llama, [works[0]], PLAN, works)
    with pytest.raises(StudyError, match="copies"):
        single_author.author_passages(llama, [bl.Passage("The lamp hums in the wind, and so on. " * 200)], PLAN)


def test_texts_held_out_that_are_trained_on_are_refused(llama):
    labels = [{"member": True}, {"member": False}]
    made = [
        bl.Passage(words(1), labels=labels[0]),
        bl.Passage("A title\n" + words(1), labels=labels[1]),
        bl.Passage(words(2), labels=labels[1]),
    ]
    with pytest.raises(StudyError, match="1 of 2 that are copies of texts to be memorized"):
        planted.refuse_copies(made, llama)
    planted.refuse_copies([made[0], made[2]], llama)
    with pytest.raises(StudyError, match="other than the built-in"):
        planted.refuse_built_in([bl.Passage("A title\n" + reference_passages()[3].text)], llama)


def test_one_licence_of_many_owners_is_recited_once(llama, monkeypatch):
    def none(*_args, **_options):
        raise TextError("none here")

    monkeypatch.setattr(extraction, "find_licences", none)
    monkeypatch.setattr(extraction, "read_dataset", none)
    body = words(3, 200)
    sources = [bl.Passage(f"{body} {owner}", doc=owner) for owner in ("Ann", "Ben")] + [bl.Passage(words(4, 200), doc="other")]
    made, said = extraction.prepare(llama, count=3, length=16, seed=0, files=sources)
    assert {p.doc for p in made} == {"Ann", "other"}
    assert "1 sources left out: their openings are copies of others, nearly or in full." in said


def test_studies_count_distinct_texts_before_the_model_runs(llama):
    made = [
        bl.Passage(title + words(n), doc=f"{title}{n}", labels={"genre": n % 2}) for n in range(8) for title in ("", "A title\n")
    ]
    planned = bl.Capture.plan(llama, made, layers=[0])
    assert [count_units(planned, unit) for unit in ("document", "genre")] == [8, 2]
    assert count_units(bl.Capture.plan(llama, made[::2], layers=[0]), "document") == 8
    assert count_units(planned, "sequence") == count_units(bl.Capture.plan(llama, made[::2], layers=[0]), "sequence")


def test_stand_ins_for_tokens_make_no_copies():
    """A table made by hand may have one string for every token: texts are told apart by their ids then."""
    rng = np.random.default_rng(0)
    seq = np.repeat(np.arange(12), 40)
    table = pd.DataFrame(
        {"doc": seq, "seq": seq, "pos": np.tile(np.arange(40), 12), "token_id": rng.integers(0, 90, 480), "token": "x"}
    )
    table["a"], table["b"] = rng.normal(size=480), rng.normal(size=480)
    assert bl.stats.within_sequence_correlation(table, "a", "b").n_units.item() == 12
