"""One text several times is one observation: copies are found, and kept apart from what is trained on."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens import merging, studies
from basin_lens.errors import MergeError, StudyError, TextError
from basin_lens.merging.windows import without_seen
from basin_lens.studies.framework.units import count_units
from basin_lens.studies.memorization import experiment as planted
from basin_lens.studies.memorization import extraction, single_author
from basin_lens.texts import reference_passages
from basin_lens.texts.copies import COMMON, LONG, groups_of_copies, made_of_runs, runs_of
from tests.texts.copied import random_texts, words

IOI = [
    "When Mary and John went to the store, John gave a drink to",
    "Then, {} and {} had a lot of fun at the {}. {} gave a {} to",
    "Then, {} and {} were thinking about going to the {}. {} wanted to give a {} to",
    "Afterwards {} and {} went to the {}. {} gave a {} to",
]


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
