"""The study of robustness: what survives which settings."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.errors import ModelError
from basin_lens.studies.framework import words
from basin_lens.studies.framework.declared_tests import (
    decide,
)
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.framework.wording import sentence
from basin_lens.studies.robustness import stability, variants
from basin_lens.studies.robustness import study as robustness
from tests.conftest import make_bridge, make_tokenizer, random_tokens
from tests.studies.planted import QUIET, S, plant

NAME = "compression differs from that of random sets"


@pytest.mark.slow
def test_what_is_in_the_table_only_does_not_survive(sturdy):
    held, study = sturdy
    name = NAME
    row = study.tables["survival"].set_index("finding").loc[name]
    assert row.holds_as_run
    assert row.survives < row.settings
    assert study.decision == "no"
    assert not study.findings.set_index("finding").loc[name, "holds"]
    mine = study.tables["settings"].query("finding == @name").set_index("setting")
    # Parts of the same table keep it; anything that the model measures again does not.
    for setting in ("as run", "tested tokens from position 8 on", "one half of the documents", "the other half"):
        assert mine.loc[setting, "estimate"] == pytest.approx(1, abs=0.1)
    for setting in ("k = 10", "context solo", "neighbors of other tokens", "groups of 3 tokens", "displacements half as long"):
        assert not mine.loc[setting, "survives"]
        assert setting in row.lost_under
    raised = study.flags[(study.flags.flag == "lost under another setting") & study.flags.why.str.startswith(name)]
    assert raised.raised.tolist() == [True]
    assert held.n_units == 20


APART = ["twin", "score", "affine map"]  # kinds that are no settings


@pytest.mark.slow
def test_an_affine_map_has_no_compression_and_does_not_count(sturdy):
    """By definition 0 for every token: shown, but nothing that a finding could be lost under."""
    _, study = sturdy
    affine = study.tables["settings"].query("kind == 'affine map'").set_index("question")
    assert abs(affine.estimate["random"]) < 1e-5 and affine.n_units["random"] == 20
    assert affine.p.drop("random").isna().all() and affine.note["surprisal"].startswith("not tested: expected a score that differs")
    assert not study.tables["survival"].lost_under.str.contains("affine").any()


@pytest.mark.slow
def test_survival_is_counted(sturdy):
    _, study = sturdy
    for finding, mine in study.tables["settings"].groupby("finding"):
        row = study.tables["survival"].set_index("finding").loc[finding]
        twin, score, affine = (mine[mine.kind == kind] for kind in APART)
        rest = mine[~mine.kind.isin(APART) & (mine.setting != "as run")]
        assert len(twin) == len(score) == len(affine) == 1 and mine.setting.is_unique
        few = rest[rest.p.notna() & ~rest.within_reach]
        assert (few.p_floor * few.n_tests > 0.05).all() and (few.p_corrected > 0.05).all()
        assert row.settings == rest.p.notna().sum() - len(few)
        assert row.not_testable == ("; ".join(few.setting) or "none")
        assert row.survives == rest.survives.fillna(False).sum()
        assert row.not_tested == rest.p.isna().sum() + twin.p.isna().sum() + len(few)
        lost = rest[rest.survives.eq(False).fillna(False)].setting
        assert row.lost_under == ("; ".join(lost) or "none")
        # The twin's p is its own, the others pay for each other.
        assert twin.p_corrected.tolist() == pytest.approx(twin.p.tolist(), nan_ok=True)
        own = mine[~mine.kind.isin(APART)]
        expected = bl.stats.correct(own[["p"]].reset_index(drop=True), "holm").p_corrected
        assert own.p_corrected.tolist() == pytest.approx(expected.tolist(), nan_ok=True)
        sign = np.sign(own.set_index("setting").loc["as run", "estimate"])
        assert (own[own.survives.fillna(False)].estimate * sign > 0).all()
        assert (own[own.survives.fillna(False)].p_corrected <= 0.05).all()


@pytest.mark.slow
def test_settings_that_change_one_thing(sturdy):
    _, study = sturdy
    kinds = set(study.tables["settings"].kind)
    assert kinds == {
        "own", "positions", "halves", "k", "metric", "neighbors", "position 0", "groups", "scale", "context", "bank", *APART,
    }  # fmt: skip
    names = set(study.tables["settings"].setting)
    assert {
        "k = 10",
        "k = 15",
        "k = 30",
        "context solo",
        "context attn",
        "context mlp",
        "cosine neighbors",
        "half of the bank",
        "built-in passages as bank",
    } <= names
    assert not {"k = 5", "context patched", "context native"} & names
    said = " ".join(study.not_tested)
    for line in (
        "second trained model",
        "agreement with erasure",
        "each setting that counts",
    ):
        assert line in said
    assert study.findings.question.tolist() == [
        "random", "surprisal", "gradient_norm_scaled", "attention_received", "function-content", "noun-verb",
    ]  # fmt: skip
    twin = study.tables["settings"].query("kind == 'twin'").set_index("question")
    assert twin.p.drop(["function-content", "noun-verb"]).notna().all()
    assert study.findings.effect_unit.tolist() == ["nats", "", "", "", "nats", "nats"]


@pytest.mark.slow
def test_position_0_is_a_setting_of_its_own(llama, sturdy):
    """Nothing but position 0 changes: the finding again, from a run with it among neighbors and random sets."""
    held, study = sturdy
    row = study.tables["settings"].query("kind == 'position 0' and question == 'random'").iloc[0]
    scores = [bl.analyzers.Compression(k=held.settings["k"], position_0=p, name=f"c{p}") for p in (False, True)]
    asked = variants.tested_tokens(held)
    tested = bl.analyze(llama, held.capture, scores, layers=[1], queries=asked, seed=held.seed, progress=False)
    without, with_it = ((tested[f"c{p}"] - tested[f"c{p}_random_sets"]).groupby(tested.seq).mean().mean() for p in (False, True))
    assert row.estimate == pytest.approx(with_it, abs=1e-5) and row.n_units == 20
    assert abs(with_it - without) > 1e-4  # ten times what the two runs above may differ by


def test_tokens_tested_again_are_of_one_sequence_of_each_document(measured):
    capture, scored = measured.capture, measured.table.groupby(["seq", "pos"])[HEADLINE].count().to_numpy() > 0
    asked = variants.tested_tokens(measured)
    assert (scored | ~asked).all() and asked.tolist() != variants.queries(capture, 1, scored).tolist()
    counts = pd.Series(capture.row_seq.numpy()[asked]).value_counts()
    assert len(counts) == len(set(capture.docs)) == len({capture.docs[seq] for seq in counts.index})
    able = pd.Series(capture.row_seq.numpy()[scored]).value_counts()
    share = max(variants.FEWEST_TESTED, variants.TESTED // len(counts))
    assert (counts == able[counts.index].clip(upper=share)).all() and counts.max() == share
    assert not asked[capture.row_pos.numpy() == 0].any()


def test_corrected_by_hand():
    table = pd.DataFrame({
        "finding": "f", "setting": ["as run", "a", "b", "c", "d", "twin", "other score"], "kind": ["own", "k", "k", "k", "k", "twin", "score"],
        "estimate": [1.0, 2.0, -2.0, 1.0, np.nan, 1.0, -1.0], "null": 0.0, "p": [0.001, 0.01, 0.001, 0.04, np.nan, 0.04, 0.9],
        "test": "t", "n_units": 9, "note": "",
    })  # fmt: skip
    done = stability.corrected(table).set_index("setting")
    there = ["as run", "a", "b", "c", "twin", "other score"]
    assert done.loc[there, "p_corrected"].tolist() == pytest.approx([0.004, 0.02, 0.004, 0.04, 0.04, 0.9])
    assert done.survives.loc[there].tolist() == [True, True, False, True, True, False]
    assert pd.isna(done.survives["d"])
    settled = SETTLED
    (row,) = stability.survival_of(stability.corrected(table), settled).to_dict("records")
    assert (row["settings"], row["survives"], row["lost_under"], row["not_tested"]) == (3, 2, "b", 1)
    assert row["in_random_twin"] is True
    assert survived(table).holds.tolist() == [False]
    without = stability.survival_of(stability.corrected(table[table.kind != "twin"]), settled)
    assert without.in_random_twin[0] is None


SETTLED = pd.DataFrame([
    {"finding": "f", "question": "q", "layer": 1, "holds": True, "within_reach": True, "effect": "mean difference", "effect_unit": "nats",
     "estimate": 1.0, "p": 0.01, "p_corrected": 0.01, "note": "layer chosen on 9 documents"},
])  # fmt: skip


def survived(table):
    return stability.with_survival(SETTLED, stability.survival_of(stability.corrected(table), SETTLED))


def some_settings(**twin):
    return pd.DataFrame({
        "finding": "f", "setting": ["as run", "a", "b", "twin"], "kind": ["own", "k", "halves", "twin"], "estimate": 1.0, "null": 0.0,
        "p": [0.001, 0.01, 0.01, twin.get("p", 0.5)], "test": "t", "n_units": 9, "note": "",
    })  # fmt: skip


def told(table):
    found = stability.survival_of(stability.corrected(table), SETTLED)
    settled = stability.with_survival(SETTLED, found)
    return decide(settled, None), stability.verdict_of(decide(settled, None), settled, found), found, settled


def test_a_twin_that_was_not_checked_shows_nothing_absent():
    decision, verdict, _, settled = told(some_settings())
    assert decision == "yes" and settled.within_reach.all()
    assert "absent from the random twin" in verdict[0] and "absent from the random twin" in verdict[1]
    assert verdict[1].endswith("Layer chosen on 9 documents.")
    for table in (some_settings(p=np.nan), some_settings().query("kind != 'twin'")):
        decision, verdict, found, settled = told(table)
        assert decision == "undecided"
        assert not settled.holds.any() and not settled.within_reach.any()
        assert "absent" not in " ".join(verdict)
        assert "could not be checked in the random twin" in verdict[0] and "not checked in the random twin" in verdict[1]
        assert any(line.startswith("In the random twin: f.") for line in stability.untestable(found))
        assert stability.flags_of(found).set_index("flag").raised.isna()["appears in the random twin"]
        row = named_rows(settled.assign(p_floor=0.0, n_tests=1, low=np.nan, n_units=9, n_documents=9))[0]
        assert "Significant, but survives 2 of 2 settings (lost under: none); not checked in the random twin" in sentence(row)
    decision, verdict, _, settled = told(some_settings(p=0.001))
    assert decision == "no" and "ALSO IN THE RANDOM TWIN" in verdict[1] and settled.within_reach.all()


def test_one_finding_without_the_twin_among_others():
    both = [SETTLED, SETTLED.assign(finding="g")]
    settings = pd.concat([some_settings(), some_settings(p=np.nan).assign(finding="g")], ignore_index=True)
    found = stability.survival_of(stability.corrected(settings), pd.concat(both, ignore_index=True))
    settled = stability.with_survival(pd.concat(both, ignore_index=True), found)
    assert settled.holds.tolist() == [True, False]
    verdict = stability.verdict_of(decide(settled, None), settled, found)
    assert verdict[1].startswith("1 of 2 findings count as holding under every setting; 1 could not be checked in the random twin")
    assert "absent" not in verdict[0] + verdict[1] + verdict[3] and "absent from the random twin" in verdict[2]


def test_a_setting_that_no_p_could_pass_is_not_lost():
    """Halves of six units by sign flips: 2 / 2^6 is too much for two tests, and here two are left after the smallest."""
    flips = "sign-flip permutation"
    table = some_settings().assign(test=[flips, flips, flips, "t"], n_units=[12, 12, 6, 12], p=[0.001, 0.04, 0.04, 0.5])
    _, verdict, found, settled = told(table)
    (row,) = named_rows(found)
    assert (row.settings, row.survives, row.lost_under, row.not_testable, row.not_tested) == (1, 0, "a", "b", 1)
    assert not settled.holds.any() and settled.within_reach.all()
    assert "not testable under: b" in verdict[1]
    assert stability.untestable(found) == ["f: too few units for any p to reach 0.05 (Holm) under b."]
    assert "not testable" in stability.corrected(table).set_index("setting").note["b"]
    # The same p with enough units is lost; six units are enough where the other setting passes, so that one test is left.
    (row,) = named_rows(told(table.assign(n_units=12))[2])
    assert (row.settings, row.survives, row.lost_under, row.not_testable) == (2, 0, "a; b", "none")
    for p, survives in ((0.04, 2), (0.06, 1)):
        (row,) = named_rows(told(table.assign(p=[0.001, 0.01, p, 0.5]))[2])
        assert (row.settings, row.survives, row.not_testable) == (2, survives, "none")
    # Nothing that could be tested: no yes by default.
    decision, verdict, _, settled = told(table.assign(n_units=4))
    assert "testable under no other setting, for too few units" in verdict[1] and "lost under" not in verdict[1]
    assert decision == "undecided" and not settled.holds.any()


@pytest.mark.slow
def test_token_ids_parallel_blocks_and_another_bank():
    """What cannot be tried is said, and nothing crashes."""
    neox = make_bridge("neox", tokenizer=make_tokenizer())
    study = S.study_robustness(neox, random_tokens(14, 22), layers=[1], bank="reference", dtype=None, **QUIET)
    said = " ".join(study.not_tested)
    for expected in ("token ids were given", "parallel blocks", "needs the texts as their own bank"):
        assert expected in said
    assert "function-content" not in set(study.findings.question)
    # The twin has the same tokens: ids will do, for every finding.
    twin = study.tables["settings"].query("kind == 'twin'")
    assert len(twin) == len(study.findings) == 4 and twin.p.notna().all()
    assert study.tables["survival"].in_random_twin.notna().all()
    assert not any("random twin" in line for line in study.not_tested)
    json.dumps(study.as_json(), allow_nan=False)


@pytest.mark.slow
def test_the_same_tokens_read_by_the_same_model(llama, measured):
    """A copy of the model in its own number format, as if it were another: every column as in the run, documents and labels too."""
    held = replace(measured, capture=bl.capture.subset(measured.capture, range(0, 32, 2)))
    held = replace(held, table=held.table[held.table.seq % 2 == 0].assign(seq=lambda t: t.seq // 2), bank=measured.capture)
    held.table.attrs = dict(measured.table.attrs)
    untested = []
    names = ["gradient_norm_scaled", "attention_received", "gradient_norm_last_logit"]
    (made,) = variants.other_model(lambda: llama, "same", "dtype", held, [1], names, untested)
    assert untested == [] and made.at == {1: 1}
    one = held.table[held.table.layer == 1]
    asked = variants.tested_tokens(held)
    assert 100 < asked.sum() < held.capture.n_rows
    assert made.table.doc.tolist() == one.doc.tolist() and made.table.token_id.tolist() == one.token_id.tolist()
    for name in ("surprisal", *names):
        got, expected = np.asarray(made.table[name])[asked], np.asarray(one[name])[asked]
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    # Compression is of the tokens crossed with one another: of the same ones asked for, the same.
    again = bl.analyze(
        llama, held.capture, [variants.headline_of(held)], layers=[1], bank=held.bank, queries=asked, seed=held.seed, progress=False
    )
    assert made.table[HEADLINE].notna().to_numpy()[~asked].sum() == 0 and made.table[HEADLINE].notna().mean() > 0.2
    np.testing.assert_allclose(made.table[HEADLINE], again[HEADLINE], rtol=1e-3, atol=1e-4)
    assert made.table.tag.tolist() == words.tagged_tokens(held, "auto")[0].query("layer == 1").tag.tolist()
    assert np.allclose(made.table.log_frequency, variants.with_frequency(one, held).log_frequency)
    # Without texts: ids of ragged sequences, with the run's documents.
    bare = replace(held, capture=replace(held.capture, passages=None))
    (ids,) = variants.other_model(lambda: llama, "same", "twin", bare, [1], names, untested)
    assert untested == [] and ids.table.doc.tolist() == one.doc.tolist() and "tag" not in ids.table
    np.testing.assert_allclose(ids.table[HEADLINE], made.table[HEADLINE], rtol=1e-4, atol=1e-5)
    assert not list(variants.other_model(lambda: llama, "another", "model", bare, [1], names, untested))
    assert untested == ["another: token ids were given, not texts."]


@pytest.mark.slow
def test_a_twin_that_cannot_be_built_costs_the_findings_not_the_study(llama, sturdy, monkeypatch):
    def refused(*_, **__):
        raise ModelError("expected a model that can be built from its settings alone.")

    monkeypatch.setattr(robustness, "random_twin", refused)
    monkeypatch.setattr(robustness, "scores", lambda *_: iter(()))  # for time
    monkeypatch.setattr(robustness, "banks", lambda *_: iter(()))
    study = S.study_robustness(llama, sturdy[0], dtype=None, progress=False)
    assert study.decision == "undecided" and study.findings.p.notna().any()
    assert "absent" not in " ".join(study.verdict)
    assert any("built from its settings alone" in line for line in study.not_tested)


def test_pieces_of_text_as_passages(measured, prompted):
    made = variants.passages_of(measured.capture)
    assert [p.doc for p in made] == measured.capture.docs
    for sequence, passage in zip(measured.capture.sequences, made, strict=True):
        whole = measured.capture.passages[sequence.passage]
        start = min(s for s in sequence.starts if s >= 0)
        assert whole.text[start : start + len(passage.text)] == passage.text
        assert [w.text for w in passage.words] == [passage.text[w.start : w.end] for w in passage.words]
        inside = [w for w in whole.words if w.start >= start and w.end <= start + len(passage.text)]
        assert [(w.text, w.tag) for w in passage.words] == [(w.text, w.tag) for w in inside]
    for one, other in zip(variants.passages_of(prompted.capture), prompted.capture.passages, strict=True):
        assert (one.text, dict(one.spans), dict(one.labels)) == (other.text, dict(other.spans), dict(other.labels))
    assert variants.passages_of(replace(measured.capture, passages=None)) is None


@pytest.mark.slow
def test_a_second_model_with_another_tokenizer_has_its_own_frequencies(sturdy):
    """The same model, its token ids permuted: every finding must come out the same as for the model itself."""
    held, _ = sturdy
    findings = robustness._findings(held, ["gradient_norm_scaled"], False)
    moved = variants.Setting("other ids", "model", plant(held, held.table.assign(token_id=9_999 - held.table.token_id)).table)
    same = variants.Setting("same", "model", held.table)
    one, other = (robustness._tested(replace(findings[2], layer=1), setting).iloc[0] for setting in (same, moved))
    assert one.n_tokens == other.n_tokens
    assert one.estimate == pytest.approx(other.estimate)


@pytest.mark.slow
def test_a_trained_model_of_another_architecture_and_tokenizer_as_second_model(sturdy, trained):
    """Four layers for three, other tokens of the same words: every text, its documents and its words are there."""
    held, _ = sturdy
    untested = []
    (made,) = variants.other_model(lambda: trained, "trained", "model", held, [1], ["gradient_norm_scaled"], untested)
    assert untested == [] and made.at == {1: 2}
    assert set(made.table.doc) == set(held.table.doc) and len(made.table) != len(held.table)
    own, other = (words.tagged_tokens(held, "auto")[0], made.table)
    for doc in held.table.doc.unique()[:3]:
        spoken = [dict.fromkeys(table[table.doc == doc].word_text.dropna()) for table in (own, other)]
        assert list(spoken[0]) == list(spoken[1])
    assert made.table[made.table.pos > 0][["surprisal", HEADLINE, "gradient_norm_scaled"]].notna().any().all()
