"""Measuring once for all studies: which sequences, what is said, what is refused; contrasts."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.errors import BasinLensError, CaptureError, ModelError, NeighborError, StudyError, TextError
from basin_lens.studies import Contrast
from basin_lens.studies.framework import contrast_report, registry, sequences
from basin_lens.studies.framework import measurement as room
from basin_lens.studies.framework.measured_texts import HEADLINE, study_provenance
from basin_lens.studies.framework.wording import about_measured
from tests.analyzers.passes import counting
from tests.conftest import make_bridge, make_tokenizer, random_tokens
from tests.studies.planted import QUIET, TEMPLATES, S, made_text, noise, plant, plant_compression, prompts, refused, short_texts

# -- contrasts -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_spans_are_contrasted_within_prompts(llama, prompted):
    assert prompted.n_units == len(TEMPLATES)
    assert contrast_report.is_paired(prompted.table)
    one = prompted.table[prompted.table.layer == 1]
    for side in ("IO", "S"):
        for passage, part in one[one.contrast == side].groupby("passage"):
            start, end = prompted.capture.passages[passage].spans[side]
            assert ((part.start < end) & (part.end > start)).all()
    # Planted: IO above S by 1, in every prompt.
    level = one.contrast.map({"IO": 1.0, "S": 0.0}).fillna(5.0).to_numpy()
    study = S.study_layers(llama, plant_compression(prompted, level + noise(one, 0, 0.1)), progress=False)
    found = study.tables["contrast"]
    row = found[(found.score == HEADLINE) & (found.control_set == "none")].iloc[0]
    assert row.estimate == pytest.approx(1, abs=0.2) and row.n_units == len(TEMPLATES) and row.unit == "template"
    assert row.p == pytest.approx(2 / 2 ** len(TEMPLATES))
    assert any("Contrast: span: IO - S" in line for line in study.about)
    assert "contrast-by-layer" in study.figures
    assert not any("Any contrast" in line for line in study.not_tested)


def test_labels_are_contrasted_between_texts(prompted):
    """A truth value is given as text."""
    contrast = Contrast("early", "True", "False")
    table = prompted.table.assign(contrast=contrast.values(prompted.table))
    assert (table.contrast == np.where(table.early, "True", "False")).all()
    assert not contrast_report.is_paired(table)
    side = table.contrast.eq("True").to_numpy()
    held = plant(replace(prompted, contrast=contrast, settings={**prompted.settings, "unit": "document"}), table)
    held = plant_compression(held, 2.0 * side + noise(table, 0, 0.5))
    section, found, _ = contrast_report.contrast_section(held.table, [HEADLINE], held)
    row = found[found.control_set == "none"].iloc[0]
    assert row.estimate == pytest.approx(2, abs=0.2) and row.p <= 0.001 and row.n_units == 3 * len(TEMPLATES)
    assert "between whole units" in section.text


def test_sides_of_spans(llama):
    text = "Mary and John went to the shop, and then they went home again in the rain."
    where = {"IO": (0, 13), "S": (9, 18), "other": (26, 30)}
    passages = [bl.Passage(text, doc=f"d{i}", spans=where) for i in range(7)]
    table = bl.analyze(llama, passages, [bl.analyzers.StateNorm()], layers=[0], progress=False)
    side = Contrast("span", "IO", "S").values(table)
    for row, got in zip(table.itertuples(), side, strict=True):
        io, s = (row.start < b and row.end > a and row.start >= 0 for a, b in (where["IO"], where["S"]))
        assert got == (None if io == s else "IO" if io else "S")
    assert (table.span.str.split("+").map(len) == 2).any()  # some tokens are in both
    with pytest.raises(StudyError, match="expected a label of the texts or span as contrast, got 'topic'"):
        Contrast("topic", "a", "b").values(table)


@pytest.mark.parametrize(
    ("contrast", "match"),
    [
        (Contrast("span", "IO", "X"), "expected tokens with span"),
        (Contrast("span", "IO", "IO"), "two different values"),
        (Contrast("early", "True", "maybe"), "'False', 'True'"),
        (Contrast("token", "a", "b"), "two different values"),
    ],
)
def test_contrasts_that_the_texts_do_not_have(llama, monkeypatch, contrast, match):
    refused(llama, monkeypatch, prompts(1), match, contrast=contrast)


@pytest.mark.many
@pytest.mark.parametrize(
    ("passages", "contrast"),
    [
        pytest.param(
            [*short_texts(8, spans={"S": (2, 9)}), bl.Passage("short one", spans={"IO": (0, 3)})],
            Contrast("span", "IO", "S"), id="span of a text that is passed over",
        ),
        pytest.param(
            [made_text(16, i, f"d{i}", labels={} if i == 9 else {"g": i % 2}) for i in range(10)],
            Contrast("g", "1", "0"), id="whole numbers, and one text without",
        ),
        pytest.param(
            short_texts(8, spans={"a+b": (2, 9), "S": (12, 20)}), Contrast("span", "a+b", "S"), id="plus in a name",
        ),
    ],
)  # fmt: skip
def test_contrasts_are_refused_early_or_not_at_all(llama, monkeypatch, passages, contrast):
    with counting(monkeypatch) as (forward, _):
        try:
            S.measure(llama, passages, studies=["linguistic"], contrast=contrast, layers=[0], max_length=40, **QUIET)
        except StudyError:
            assert forward == []


# -- measure ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def planned(llama):
    """Documents of 1 to 6 sequences, and some short ends."""
    made = [made_text(20 + 19 * (seed % 6), seed, f"doc-{seed}") for seed in range(12)]
    return bl.Capture.plan(llama, made, max_length=40)


def test_chosen_sequences(planned):
    every, short = sequences.choose_sequences(planned, None, 2, 0)
    lengths = planned.lengths.tolist()
    assert every == [seq for seq, length in enumerate(lengths) if length >= sequences.FEWEST_TOKENS]
    assert short == len(lengths) - len(every) > 0
    for most in (1, 5, 12, 17, len(every), 999):
        chosen, same = sequences.choose_sequences(planned, most, 2, 0)
        assert len(chosen) == min(most, len(every)) and same == short
        assert chosen == sorted(set(chosen)) and set(chosen) <= set(every)


@pytest.mark.parametrize("per_document", [1, 2, 3])
def test_sequences_are_spread_over_documents(planned, per_document):
    docs = planned.docs
    every, _ = sequences.choose_sequences(planned, None, per_document, 0)
    able = pd.Series([docs[seq] for seq in every]).value_counts()
    before: set[int] = set()
    for most in range(1, len(every) + 1):
        chosen, _ = sequences.choose_sequences(planned, most, per_document, 3)
        assert before < set(chosen)  # more sequences are the same and others
        before = set(chosen)
        held = pd.Series([docs[seq] for seq in chosen]).value_counts().reindex(able.index, fill_value=0)
        rounds = np.ceil(held / per_document)
        # Nobody gets a second round before everyone who has more texts has had a first.
        waiting = held[held < able]
        assert waiting.empty or rounds.max() <= np.floor(waiting / per_document).min() + 1
        for doc in held[held > 0].index:  # a document's first sequences come first
            mine = [seq for seq in every if docs[seq] == doc]
            assert [seq for seq in chosen if docs[seq] == doc] == mine[: held[doc]]


def test_the_choice_is_seeded(planned):
    one, same, other = (sequences.choose_sequences(planned, 6, 1, seed)[0] for seed in (0, 0, 1))
    assert one == same != other


def test_what_is_measured_is_said(measured, texts):
    made = measured.settings
    assert made["sequences_given"] == len(measured.planned.sequences)
    assert len(measured.capture.sequences) == 32
    assert measured.n_units == 16 and measured.layers == [0, 1, 2]
    assert not measured.planned.is_read
    rows = measured.planned.row_token
    ids, counts = rows.unique(return_counts=True)
    assert measured.frequency == pytest.approx(dict(zip(ids.tolist(), (counts / len(rows)).tolist(), strict=True)))
    assert sum(measured.frequency.values()) == pytest.approx(1)
    assert len(measured.planned.row_token) > len(measured.capture.row_token)
    json.dumps(made, allow_nan=False)
    (facts,) = study_provenance(measured).values()
    assert facts["study"] == made
    assert any("32 sequences of 16 documents" in line for line in about_measured(measured))
    assert len(texts) == 18


def test_compression_is_of_a_sample_and_everything_else_of_all_tokens(measured):
    """So many tokens of a sequence, of every document; those where erasure is known first, or few tokens would have both."""
    table = measured.table[measured.table.layer == 1]
    scored, known = table[HEADLINE].notna(), table.erasure.notna()
    assert 540 < scored.sum() <= room.COMPRESSION_TOKENS < table.contraction.notna().sum()
    assert table[scored].doc.nunique() == measured.n_units
    by_sequence = scored.groupby(table.seq).sum()
    assert by_sequence.max() <= room.PER_SEQUENCE and (by_sequence > 0).sum() == room.COMPRESSION_TOKENS / room.PER_SEQUENCE
    both = (scored & known).groupby(table.seq).sum()[by_sequence > 0]
    assert both.mean() > 14
    (line,) = (line for line in about_measured(measured) if line.startswith("Compression and its nulls: "))
    assert f"{int(scored.sum()):,}" in line and f"{measured.n_units} documents" in line
    # Kept neighbors are those of all tokens.
    later = (table.pos > 0).to_numpy()
    assert measured.neighbors.score == "contraction" and (measured.neighbors.rows[1][later] >= 0).all()


def test_integrated_gradients_of_some_sequences_only(measured):
    table = measured.table
    there = table.groupby("seq")["integrated_gradients"].apply(lambda column: column.notna().any())
    assert there.sum() == measured.settings["integrated_gradients_sequences"] == 8
    chosen = table[table.seq.isin(there[there].index)]
    assert chosen.drop_duplicates("seq").doc.nunique() == 8  # a document each
    layers = [part["integrated_gradients"].to_numpy() for _, part in table.groupby("layer")]
    for one, other in pairwise(layers):
        np.testing.assert_array_equal(one, other)


def test_integrated_gradients_are_those_of_the_sequence(llama, measured):
    table = measured.table[measured.table.layer == 0]
    seq = int(table[table["integrated_gradients"].notna()].seq.iloc[-1])
    part = bl.capture.subset(measured.capture, [seq])
    own = bl.analyze(llama, part, [bl.analyzers.IntegratedGradients(layer=1, steps=24)], layers=[0], progress=False)
    np.testing.assert_allclose(own["integrated_gradients"], table[table.seq == seq]["integrated_gradients"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_one_pass_serves_the_importance_study(llama, monkeypatch):
    """One batch: a forward pass for all, a backward pass per target, and those that erasure and transport say they need."""
    data = short_texts(8)
    options = {"layers": [1], "max_length": 40, **QUIET}
    with counting(monkeypatch) as (plain, none):
        S.measure(llama, data, studies=["linguistic"], **options)
    with counting(monkeypatch) as (forward, backward):
        S.measure(llama, data, studies=["importance"], integrated=0, **options)
    lengths = [
        length for length in bl.Capture.plan(llama, data, max_length=40).lengths.tolist() if length >= sequences.FEWEST_TOKENS
    ]
    reading = (len(lengths), max(lengths))
    assert plain.count(reading) == forward.count(reading) == 1
    assert none == [] and len(backward) == 2  # future loss and last logit
    erased = sum(min(16, length - 3) for length in lengths)
    proof = 2  # one copy, whole and from its column on
    assert sum(shape[0] for shape in forward) - sum(shape[0] for shape in plain) == erased + proof


def test_refused_before_the_model_runs(llama, monkeypatch):
    few, enough = short_texts(5), short_texts(8)
    refused(llama, monkeypatch, few, r"at least 6 units \(document\).*got 5")
    refused(llama, monkeypatch, enough, "expected studies among", studies=["importance", "nonsense"])
    refused(llama, monkeypatch, enough, "expected studies among", studies=[])
    refused(llama, monkeypatch, enough, "unit", unit="nothing")
    refused(llama, monkeypatch, enough, "exclude", NeighborError, exclude="topic")
    refused(llama, monkeypatch, enough, "expected k", NeighborError, k=10_000)
    refused(llama, monkeypatch, enough, "at least 1", max_sequences=0)
    refused(llama, monkeypatch, enough, "at least 1", per_document=0)
    refused(llama, monkeypatch, enough, "layer", BasinLensError, layers=[7])


def test_texts_that_are_all_too_short(llama, monkeypatch):
    refused(llama, monkeypatch, short_texts(9, n_words=2), "sequences of 12 tokens, got 0")


def test_unknown_context(llama, monkeypatch):
    """Under pytest the type checks come first."""
    with counting(monkeypatch) as (forward, _), pytest.raises(Exception, match="nothing"):
        S.measure(llama, short_texts(8), context="nothing", **QUIET)
    assert forward == []


@pytest.mark.many
@pytest.mark.parametrize(
    ("study", "options"),
    [
        ("linguistic", {"tagger": "gold"}),
        ("linguistic", {"sentiment": "nothing"}),
        ("robustness", {"importance": "nothing", "dtype": None}),
    ],
)
def test_options_of_a_study_are_refused_before_the_model_runs(llama, monkeypatch, study, options):
    data = [bl.Passage(passage.text, doc=passage.doc) for passage in short_texts(8)]
    refused(llama, monkeypatch, data, "expected", (StudyError, TextError), study=study, layers=[0], **options)


def test_token_ids_have_no_words(llama, monkeypatch):
    refused(llama, monkeypatch, random_tokens(8, 24), "character offsets", study="linguistic", layers=[0])


def test_what_was_measured_is_taken_as_it_is(llama, measured):
    for study in S.STUDIES:
        run = getattr(S, f"study_{study}")
        with pytest.raises(StudyError, match=r"no options of measure.*max_sequences"):
            run(llama, measured, max_sequences=3, progress=False)
        with pytest.raises(StudyError, match=f"measured for the study '{study}'"):
            run(llama, replace(measured, studies=()), progress=False)
        with pytest.raises((ModelError, CaptureError)):
            run(make_bridge("llama", seed=1, tokenizer=make_tokenizer()), measured, progress=False)
    capture = replace(measured.capture, passages=None)
    with pytest.raises(StudyError, match="character offsets"):
        S.study_linguistic(llama, replace(measured, capture=capture), progress=False)


# -- code length -----------------------------------------------------------------------------------------------------------------------


def test_names():
    assert registry.check_names("all") == list(S.STUDIES)
    assert registry.check_names("layers", "importance") == ["layers", "importance"]
    for wrong in ((), ("all", "layers"), ("summary",)):
        with pytest.raises(StudyError, match="expected studies among"):
            registry.check_names(*wrong)


@pytest.mark.parametrize(("n", "expected"), [(1, [0]), (3, [0, 1, 2]), (10, list(range(10))), (30, None), (12, None)])
def test_spaced_layers(n, expected):
    layers = room.spaced_layers(n)
    assert layers == (expected or layers)
    assert layers[0] == 0 and layers[-1] == n - 1 and len(layers) == min(n, 10)
    steps = np.diff(layers)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1
