"""The memorization study: a tiny model that can be made to memorize, and every table, verdict and refusal on it."""

import json
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.errors import StoreError, StudyError, TextError
from basin_lens.memorize import Recipe
from basin_lens.studies import Plan
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.memorization import extraction
from basin_lens.studies.memorization import tests as planted_tests
from basin_lens.studies.memorization.experiment import check_classes, plant
from basin_lens.studies.memorization.scores import (
    CHANGE,
    CROSSED,
    SCORES,
    by_sequence,
    measure_texts,
    spread_tokens,
    with_changes,
)
from basin_lens.studies.memorization.single_author import author_passages
from basin_lens.texts import reference_passages
from tests.conftest import make_bridge

PLAN = Plan(
    per_dose=8, doses=(1, 24), length=16, layers=None, forks=6, sources=9, others=6, other_dose=4, k=5, recipe=Recipe(learning_rate=3e-3)
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _licences_are_found_once():
    """They are looked for among the names of all installed files: a second for every study."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "find_licences", cache(extraction.find_licences))
        yield


@pytest.fixture(scope="module")
def learner(tokenizer):
    """Wide enough to memorize, with room for spliced texts."""
    return make_bridge("llama", tokenizer=tokenizer, max_position_embeddings=512, initializer_range=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def study(learner, folder):
    return bl.studies.study_memorization(learner, PLAN, folder=folder, progress=False)


@pytest.mark.slow
def test_planted_memorization_is_recovered(study):
    texts = study.tables["texts"]
    held, shown = texts[~texts.member], texts[texts.member & (texts.dose == 24)]
    assert shown.log_likelihood.mean() > held.log_likelihood.mean() + 1
    by_dose = study.tables["detection_by_dose"].query("dose == 24 and metric == 'auroc'").set_index("score").estimate
    assert by_dose["log_likelihood"] > 0.9 and by_dose["reference"] > 0.9 and by_dose["min_k"] > 0.9
    assert study.flags.set_index("flag").raised["the design does not work"] == np.False_
    assert study.verdict[1].startswith("The design works")


@pytest.mark.slow
def test_members_and_texts_held_out_are_pairs_of_one_kind(study):
    texts = study.tables["texts"]
    pairs = texts.groupby("pair")
    assert (pairs.member.sum() == 1).all() and (pairs.size() == 2).all()
    assert (pairs[["kind", "dose"]].nunique() == 1).all(axis=None)
    assert texts.doc.is_unique


@pytest.mark.slow
def test_negatives_are_at_a_half_within_error(study):
    found = study.tables["negatives"]
    assert set(found.negative) == {
        "blind classifier (text only)", "before training", "random weights", "tuned on other texts", "permuted labels",
    }  # fmt: skip
    permuted = found[found.negative == "permuted labels"].set_index("score").estimate
    assert abs(permuted["linear_probe"] - 0.5) < 0.15 and abs(permuted[HEADLINE] - 0.5) < 0.15
    # No negative may be significant once all of them are one family.
    assert found.p_corrected.min() > 0.05


@pytest.mark.slow
def test_every_table_is_there_and_has_intervals(study):
    for name in ("effects", "effects_by_dose", "dose_slopes", "detection", "detection_by_dose", "added_value", "negatives", "forks", "where",
                 "recitation_contrasts"):  # fmt: skip
        table = study.tables[name]
        tested = table[table.estimate.notna()]
        assert len(tested) and {"low", "high", "p", "p_corrected"} <= set(table.columns), name
        known = tested[tested.low.notna()]
        assert len(known) and (known.low <= known.estimate + 1e-9).all() and (known.estimate <= known.high + 1e-9).all(), name
    assert set(study.tables["detection"].metric) == {"auroc", "tpr at 1% fpr", "tpr at 5% fpr"}
    # 16 texts held out cannot place a threshold that lets 1 % or 5 % of them pass.
    rates = study.tables["detection"][study.tables["detection"].metric != "auroc"]
    assert rates.estimate.isna().all()


@pytest.mark.slow
def test_findings_are_one_family_with_a_layer_chosen_on_other_texts(study):
    found = study.findings
    assert found.question.tolist() == ["difference", "dose", "added", "matched"]
    assert (found[found.p.notna()].correction == "Holm").all() and found.p.notna().sum() >= 3
    first = found.iloc[0]
    assert "layer chosen on 8 documents" in first.note and first.n_units == 8 and first.layer > 0


@pytest.mark.slow
def test_study_is_saved_whole_and_its_model_can_be_analyzed_again(study, learner, folder, tmp_path):
    out = study.save(tmp_path / "memorization")
    held = json.loads((out / "results.json").read_text())
    assert held["study"] == "memorization" and set(held["tables"]) == {*study.tables, "findings"}
    page = (out / "report.html").read_text()
    for title in ("Did the planting work?", "What compression adds", "How wide is the path?", "Negatives", "Red flags"):
        assert title in page
    tuned = bl.memorize.load_tuned(folder / "tuned", learner)
    table = bl.analyze(tuned, reference_passages()[0].text, [bl.analyzers.Surprisal()], layers=[0], progress=False)
    (facts,) = table.attrs["provenance"].values()
    assert facts["model"]["name"].endswith(", tuned")
    assert bl.studies.summarize([out]).findings.study.tolist() == ["memorization"] * 4


@pytest.mark.slow
def test_again_from_its_folder_gives_the_same(study, learner, folder):
    again = bl.studies.study_memorization(learner, PLAN, folder=folder, progress=False)
    for name in ("texts", "effects", "detection"):
        pd.testing.assert_frame_equal(again.tables[name], study.tables[name])


@pytest.mark.slow
@pytest.mark.usefixtures("study")
def test_other_plan_in_the_same_folder_is_refused(learner, folder):
    with pytest.raises(StoreError, match="another"):
        bl.studies.study_memorization(learner, replace(PLAN, seed=1), folder=folder, progress=False)


@pytest.mark.parametrize("count", [0, 12])
def test_all_or_none_memorized_is_refused(count):
    with pytest.raises(StudyError, match=r"held out, got \d+ and \d+. Nothing could be compared"):
        check_classes([True] * count + [False] * (12 - count))


def no_training(*_args, **_options):
    raise AssertionError("trained before it refused")


@pytest.mark.parametrize(
    "change",
    [{"per_dose": 3}, {"forks": 0}, {"sources": 0}, {"others": 0}, {"doses": (0, 4)}, {"doses": (4, 4)}, {"length": 4}, {"k": 3}],
)
def test_plans_that_could_not_be_tested_are_refused(change):
    with pytest.raises(StudyError, match="Plan more"):
        replace(PLAN, **change)


@pytest.mark.slow
def test_bad_input_is_refused_before_the_training(learner, monkeypatch):
    monkeypatch.setattr(bl.memorize, "finetune", no_training)
    run = partial(bl.studies.study_memorization, learner, PLAN, progress=False)
    with pytest.raises(StudyError, match="paraphrases by document"):
        run(paraphrases={"nowhere": "The lamp."})
    with pytest.raises(StudyError, match="other than the built-in"):
        run(texts=reference_passages()[:1])
    with pytest.raises(TextError, match="at least two passages"):
        run(texts=[bl.Passage("Too short.")])
    with pytest.raises(StudyError, match="expected a context"):
        bl.studies.study_memorization(learner, replace(PLAN, length=300), progress=False)
    with pytest.raises(bl.errors.NeighborError):
        bl.studies.study_memorization(learner, replace(PLAN, k=100_000), progress=False)
    author = partial(run, design="author", texts=[bl.Passage(" ".join(f"The lamp of {n} men was a lamp." for n in range(200)))])
    with pytest.raises(StudyError, match="got 0"):
        author(unrelated=[bl.Passage("Too short.")])
    with pytest.raises(StudyError, match="other than the built-in"):
        author(unrelated=reference_passages()[:1])
    with pytest.raises(StudyError, match="pairs of passages"):
        run(design="author", texts=[bl.Passage("Too short a work.")], unrelated=[bl.Passage("The clock was slow. " * 100)])


def test_unknown_preset_and_design_are_refused(learner):
    with pytest.raises(StudyError, match="preset"):
        bl.studies.study_memorization(learner, "huge")
    with pytest.raises(StudyError, match="unrelated"):
        bl.studies.study_memorization(learner, PLAN, design="author", texts=reference_passages())


@pytest.mark.slow
def test_divergence_stops_the_study(learner):
    with pytest.raises(StudyError, match="diverged"):
        plant(learner, replace(PLAN, recipe=Recipe(learning_rate=1e12, warmup=0)), progress=False)


@pytest.mark.slow
def test_author_design_compares_trained_passages_with_the_same_author(learner):
    plan = replace(PLAN, per_dose=6, doses=(8,), forks=6, recipe=Recipe(learning_rate=1e-3))
    works = [bl.Passage(" ".join(f"The {w} of {n} men was {w}." for n in range(60)), doc=w) for w in ("lamp", "clock")]
    others = [bl.Passage(" ".join(f"She sold {n} {w}s in {1500 + n}." for n in range(60)), doc=w) for w in ("kite", "loom")]
    made = author_passages(learner, works, plan)
    assert len(made) == 12 and sum(p.labels["member"] for p in made) == 6
    assert {p.labels["pair"] for p in made} == set(range(6)) and len({p.text for p in made}) == 12
    study = bl.studies.study_memorization(learner, plan, design="author", texts=works, unrelated=others, progress=False)
    assert set(study.tables["author"].contrast) == {"trained - same author", "trained - unrelated"}
    assert study.findings.set_index("question").note["dose"].startswith("one dose only")
    # Six pairs are too few for a regression: the rows are there and say so.
    added = study.tables["added_value"]
    assert (added.metric == "delta log-loss").all() and added.note.str.contains("at least 10 units").all()
    assert "original guide" in study.report().html


@pytest.mark.slow
def test_texts_held_out_are_no_copies_of_those_trained_on(learner):
    """An author's works, each given twice as under two titles: a coin for each pair could train on a passage and hold out its copy."""
    works = [bl.Passage(" ".join(f"The {w} of {n} men was {w}." for n in range(12)), doc=w) for w in ("lamp", "clock")]
    others = [bl.Passage(" ".join(f"She sold {n} {w}s in {1500 + n}." for n in range(60)), doc=w) for w in ("kite", "loom")]
    plan = replace(PLAN, per_dose=6, doses=(8,), recipe=Recipe(learning_rate=1e-3))
    study = bl.studies.study_memorization(
        learner, plan, design="author", texts=[*works, *(replace(w, doc=f"{w.doc}, again") for w in works)], unrelated=others, progress=False
    )  # fmt: skip
    tokens = study.tokens[study.tokens.layer == 0].sort_values("pos").groupby("doc").token_id.apply(tuple)
    texts = study.tables["texts"]
    trained, held = (set(tokens[texts.doc[texts.member == side]]) for side in (True, False))
    assert len(trained) == len(held) == 6 and trained.isdisjoint(held)
    assert any("passages of the works are copies of others" in line for line in study.about)


def test_changes_are_after_less_before_token_by_token(learner):
    texts = ["The lamp had a voice of its own.", "She climbed the ninety steps with her tea."]
    capture = bl.Capture.from_texts(learner, texts, progress=False)
    table = bl.analyze(learner, capture, [bl.analyzers.StateNorm()], progress=False)
    other = table.copy()
    other["state_norm"] += 2
    found = with_changes(table, other, ["state_norm"])
    assert np.allclose(found.state_norm_change, 2) and np.array_equal(found.state_norm_base, table.state_norm)
    with pytest.raises(AssertionError):
        with_changes(table, table[table.seq == 0], ["state_norm"])


def test_tokens_crossed_are_spread_evenly_and_the_same_under_any_model():
    rows = pd.DataFrame({"seq": [0] * 20 + [1] * 5, "span": ["a"] * 4 + [None] * 16 + ["a"] * 5})
    chosen = spread_tokens(rows, count=5)
    assert np.flatnonzero(chosen).tolist() == [0, 5, 10, 14, 19, 20, 21, 22, 23, 24]
    parts = spread_tokens(rows, ["seq", "span"], count=3)
    assert np.flatnonzero(parts).tolist() == [0, 2, 3, 4, 12, 19, 20, 22, 24]
    assert spread_tokens(rows).sum() == CROSSED + 5


@pytest.mark.slow
def test_compression_is_of_some_tokens_of_each_text_and_contraction_of_all(learner):
    texts = [
        bl.Passage(f"The {word} had a voice of its own, and she climbed the ninety steps.")
        for word in ("lamp", "tea", "jar", "boy", "rain")
    ]
    bank = bl.Capture.from_texts(learner, reference_passages()[:12], layers=[0, 2], max_length=24, progress=False)
    options = {"k": 5, "layers": [0, 2], "bank": bank, "seed": 0, "progress": False}
    for first in (1, 6):
        capture = bl.Capture.plan(learner, texts, layers=[0, 2], max_length=24)
        table = measure_texts(learner, capture, **options, first=first)
        assert table.contraction.notna().equals(table.pos >= first)
        asked = np.zeros(len(table) // 2, bool)
        there = table[: len(asked)].pos >= first
        asked[there] = spread_tokens(table[: len(asked)][there])
        assert asked.sum() == CROSSED * len(capture.sequences) and not table[HEADLINE].notna()[~np.tile(asked, 2)].any()
        # Half of the tokens at least find others as tight, whose neighbors are not theirs.
        assert table[HEADLINE].notna().sum() > asked.sum()
        own = bl.analyzers.Compression(k=5, nulls=("random_sets",))
        again = bl.analyze(learner, capture, [own], layers=[0, 2], bank=bank, queries=asked, progress=False)
        for name in (HEADLINE, "compression", "compression_place"):
            assert table[name].equals(again[name]), name
        assert bl.tables.scores(table)[HEADLINE]["unit"] == "nats"


def _planted_null(seed: int, effect: float = 0.0, n_pairs: int = 20, layers: int = 3):
    """Sequences and texts of a design without any effect of membership on geometry (or with one), no model needed."""
    rng = np.random.default_rng(seed)
    texts = pd.DataFrame({"seq": range(2 * n_pairs), "pair": np.repeat(range(n_pairs), 2)})
    texts["doc"] = [f"canary-{i}" for i in texts.seq]
    coin = rng.integers(0, 2, n_pairs)
    texts["member"] = (texts.seq % 2) == np.repeat(coin, 2)
    texts["dose"] = np.repeat([1, 16], n_pairs)
    texts["log_likelihood"] = -4 + 0.5 * texts.member + rng.normal(0, 0.5, len(texts))
    tokens = pd.concat([texts.assign(layer=layer) for layer in range(layers)], ignore_index=True)
    for name in SCORES:
        tokens[f"{name}_change"] = rng.normal(0, 0.1, len(tokens)) + effect * tokens.member * (tokens.layer == 1)
        tokens[name] = tokens[f"{name}_change"] + rng.normal(0, 0.1, len(tokens))
    return texts, tokens


@pytest.mark.slow
def test_declared_difference_has_its_false_positive_rate_and_finds_a_planted_effect():
    def declared(seed: int, effect: float) -> float:
        _, sequences = _planted_null(seed, effect)
        apart = planted_tests.pair_differences(sequences, [CHANGE])
        test = partial(bl.stats.before_after, on=CHANGE, unit="document", n_resamples=499, seed=seed)
        units = planted_tests._Units(apart.doc.nunique(), seed)
        found = planted_tests.declared_test(apart, test, units, "x", "difference", CHANGE)
        return float(found.p.iloc[0])

    null = np.array([declared(seed, 0.0) for seed in range(120)])
    # Discrete: with ten pairs on the second half, a fair test rejects at most this often.
    assert (null <= 0.05).mean() <= 0.10
    assert np.mean([declared(seed, 0.25) <= 0.05 for seed in range(10)]) >= 0.9


@pytest.mark.slow
def test_kind_and_difficulty_are_no_gain():
    """A score that knows the kind of a text and how hard it is, but not whether it was trained on, adds nothing to the baselines."""

    def p_of(seed: int) -> float:
        rng = np.random.default_rng(seed)
        texts, _ = _planted_null(seed, n_pairs=16)
        kind = np.repeat(rng.integers(0, 3, 16), 2)
        before = -4.0 - 4 * kind + rng.normal(0, 0.5, 32)
        texts["reference"] = texts.member * np.log2(texts.dose + 1) + rng.normal(0, 0.1, 32)
        texts["log_likelihood"] = before + texts.reference
        texts["kind_b"], texts["kind_c"] = (kind == 1).astype(float), (kind == 2).astype(float)
        texts[HEADLINE] = 0.1 * before + rng.normal(0, 0.05, 32)
        found = planted_tests._gain(texts.assign(layer=1), ["log_likelihood", "reference", "kind_b", "kind_c"], seed)
        return float(found.p.iloc[0])

    assert np.mean([p_of(seed) <= 0.05 for seed in range(30)]) <= 0.15


@pytest.mark.slow
def test_matched_pairs_are_of_one_kind_and_equal_loss(study):
    pairs, texts = study.tables.get("matched_pairs"), study.tables["texts"].set_index("doc")
    if pairs is None:
        pytest.skip("no two texts of equal loss")
    assert ((pairs["first"] - pairs["second"]).abs() <= planted_tests.CALIPER).all()
    assert (texts.kind[pairs.with_label].to_numpy() == texts.kind[pairs.without_label].to_numpy()).all()
    assert texts.member[pairs.with_label].all() and not texts.member[pairs.without_label].any()
    matched = study.findings.set_index("question").loc["matched"]
    assert (
        matched.n_units in (len(pairs), len(pairs) // 2, len(pairs) - len(pairs) // 2)
        if len(pairs) >= 6
        else "only" in matched.note
    )


@pytest.mark.slow
def test_spliced_texts_are_memorized_in_the_middle_only(study):
    found = study.tables["where"]
    assert set(found.score) == {CHANGE, "contraction_change", "surprisal_change", "agreement_change"}
    # What is the same at every layer is one test.
    assert (found.score == "surprisal_change").sum() == 1
    row = found[found.score == "surprisal_change"].iloc[0]
    assert row.estimate < -0.5 and row.group == "memorized - not"


def test_sources_say_what_was_found_and_what_was_not(learner, monkeypatch):
    def none(*_args, **_options):
        raise TextError("no licences here")

    monkeypatch.setattr(extraction, "find_licences", none)
    monkeypatch.setattr(extraction, "read_dataset", none)
    with pytest.raises(TextError, match="no licences here"):
        extraction.prepare(learner, count=4, length=16, seed=0)
    mine = [bl.Passage("The lamp hums in the north wind, and nobody asks why it does. " * 20, doc="mine")]
    made, said = extraction.prepare(
        learner, count=4, length=16, seed=0, files=mine, paraphrases={"mine": "It sings when the wind is in the north. " * 5}
    )
    assert [p.labels["condition"] for p in made] == ["opening", "later", "shuffled", "paraphrase"]
    assert any("no licences here" in line for line in said) and "1 texts given." in said


def test_command_refuses_what_it_does_not_use(monkeypatch, capsys, tmp_path):
    from basin_lens.cli import app as cli

    monkeypatch.setattr("sys.argv", ["basin-lens", "study", "memorization", "--layers", "3", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "--layers" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["basin-lens", "study", "memorization", "--preset", "huge", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1 and "preset" in capsys.readouterr().err


def test_means_of_a_text_carry_its_labels():
    texts = pd.DataFrame({"seq": [0, 1], "doc": ["a", "b"], "member": [True, False]})
    tokens = pd.DataFrame({"layer": [0, 0, 0, 1], "seq": [0, 0, 1, 1], "score": [1.0, 3.0, 5.0, 7.0]})
    found = by_sequence(tokens, ["score"], texts)
    assert found.score.tolist() == [2.0, 5.0, 7.0] and found.member.tolist() == [True, False, False]


def test_plan_says_what_it_costs(learner):
    lines = bl.studies.describe(learner, PLAN)
    assert "16 texts of 16 tokens" in lines[0] and "1, 24 times" in lines[0]
    assert PLAN.tokens_trained() == int((8 * 25 + 24) * 16 * 8 / 6)
    assert sum(bl.studies.PRESETS["full"].doses) * 25 == 2125 and bl.studies.plan_of("full").layers is None
