"""The study of importance: what is planted is found, what controls explain is not."""

from html import unescape

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import basin_lens as bl
from basin_lens import tables
from basin_lens.studies import importance
from basin_lens.studies.framework.attempts import checked_red_flags
from basin_lens.studies.framework.declared_tests import (
    declared_test,
    settle,
)
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.table_parts import named_rows
from tests.studies.planted import S, noise, plant, plant_compression, standard, with_importance

# -- one measurement for all -----------------------------------------------------------------------------------------------------------


def flag(study, name, question=None):
    chosen = study.flags[study.flags.flag == name]
    return chosen[chosen.question == question].raised if question is not None else chosen.raised


# -- importance ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importance_that_is_planted_is_found(important):
    assert important.decision.startswith("yes")
    assert important.findings.holds.all()
    assert (important.findings.estimate > 0.4).all()
    assert important.tables["ranking"].score.iloc[0] == "attention_received"
    assert important.findings.finding.tolist() == ["compression goes with erasure", "compression goes with attention_received"]
    assert (important.findings.n_units == 8).all()  # the half that did not choose
    assert not flag(important, "vanishes under controls").fillna(True).any()
    partial = important.tables["partial_correlation"]
    # Where tokens enter layer 0, those of one id are one point: few of this small vocabulary find a group.
    mine = partial[(partial.score == HEADLINE) & (partial.against == "erasure") & (partial.layer > 0)]
    assert sorted(mine.control_set.unique()) == ["with surprisal", "without surprisal"]
    assert (mine.p_corrected <= 0.05).all() and (mine.estimate > 0).all()
    assert partial.n_tests.nunique() == 1 and partial.n_tests.iloc[0] == partial.p.notna().sum()
    assert "surprisal" in mine[mine.control_set == "with surprisal"].controls.iloc[0]
    assert "surprisal" not in mine[mine.control_set == "without surprisal"].controls.iloc[0]


def test_the_ranking_wants_agreement_not_its_opposite(measured):
    """At layer 2 a measure says the opposite of erasure, and surely so; at layer 1 it agrees, less surely."""
    table = measured.table
    truth = standard(table["erasure"].rank().to_numpy())
    turned = np.where(
        table["layer"] == 2,
        noise(table, 6, 0.1) - truth,
        np.where(table["layer"] == 1, truth + noise(table, 3, 1.0), noise(table, 4)),
    )
    known = plant(measured, attention_received=turned).table
    known = known[known.erasure.notna()]
    options = {"controls": ["position"], "min_tokens": importance.FEWEST_SCORED}
    beyond = bl.stats.partial_correlation(known, ["attention_received"], "erasure", **options)
    (row,) = named_rows(importance._ranking(known, ["attention_received"], beyond, measured))
    assert row.layer == 1 and row.estimate > 0.4
    fixed = beyond[beyond.layer == 1].iloc[0]
    assert (row.given_position, row.given_position_low) == (fixed.estimate, fixed.low)
    plain = bl.stats.within_sequence_correlation(known, "attention_received", "erasure")
    assert plain.sort_values("p").layer.iloc[0] == 2  # the smallest p of all
    few = known[known.doc.isin(known.doc.unique()[:10])]
    (small,) = named_rows(importance._ranking(few, ["attention_received"], beyond, measured))
    assert small.layer == 1 and "too few documents to halve (10)" in small.how


def test_red_flags_are_of_the_layers_that_can_be_chosen(measured):
    """All of it at layer 0, where a state is its token alone."""
    table = measured.table
    level = standard(table["surprisal"].to_numpy())
    planted = plant_compression(measured, np.where(table["layer"] == 0, level, 0) + noise(table, 2))
    flags = checked_red_flags(planted.table, HEADLINE, "surprisal", controls=["position"])
    assert 0 not in flags.layer.dropna().tolist()
    assert flags.set_index("flag").raised["nothing survives correction"]
    whole = bl.stats.red_flags(planted.table, HEADLINE, "surprisal", controls=["position"])
    assert not whole.set_index("flag").raised["nothing survives correction"]


@pytest.mark.slow
def test_a_report_says_which_figures_show_the_documents_that_chose(important):
    html = unescape(important.report().html)
    said = [
        section.title
        for section in important.sections
        if "All documents are shown, those that chose" in section.text + section.caption
    ]
    assert [title.split()[0] for title in said] == ["Scores", "attention_received", "Joint", "What"]
    assert "given_position" in html and any("at fixed position, over all documents" in line for line in important.verdict)
    (facts,) = tables.provenance(bl.studies.importance._with_sizes(important.tokens)).values()
    assert facts["columns"]["gradient_times_activation_size"]["unit"] == facts["columns"]["gradient_times_activation"]["unit"]


@pytest.mark.slow
def test_every_red_flag_of_importance_can_be_checked(important):
    """Erasure is known at 16 positions of a sequence, which is few for six controls."""
    assert "could not be checked" not in set(important.flags.flag)
    assert important.flags.raised.notna().all(), important.flags[important.flags.raised.isna()].why.tolist()


def test_the_sign_of_importance_is_the_data_s(measured):
    planted = with_importance(measured, -1)
    rows = [
        declared_test(planted.table, bl.studies.importance._test(other, planted), planted, other, other)
        for other in ("erasure", "attention_received")
    ]
    found = settle("importance", rows)
    assert found.holds.all() and (found.estimate < -0.4).all()


def by_control(measured, source, size=1.0):
    """Importance and compression that share one control and nothing else."""
    table = measured.table
    values = table["pos"] if source == "position" else table.groupby(["layer", "seq"])["surprisal"].rank()
    level = standard(values.to_numpy(float))
    truth = np.where(table["erasure"].notna(), level + noise(table, 11, size), np.nan)
    return plant_compression(
        measured, level + noise(table, 13, size), erasure=truth, attention_received=level + noise(table, 12, 0.4)
    )


@pytest.mark.slow
def test_what_position_explains_is_no_finding(llama, measured):
    study = S.study_importance(llama, by_control(measured, "position"), progress=False)
    assert study.decision == "no"
    assert study.verdict[0].startswith("No.")
    for question in study.findings.question:
        assert flag(study, "vanishes under controls", question).all(), study.flags.why.tolist()
    # The guide would have called both strong.
    assert (study.findings.guide_p < 1e-6).all()
    assert set(study.findings.guide_reading) == {"strong"}


def test_what_surprisal_explains_is_no_finding(measured):
    planted = by_control(measured, "surprisal")
    found = declared_importance(planted)
    assert not found.holds.any()
    flags = checked_red_flags(planted.table, HEADLINE, "erasure", frequency=measured.frequency, min_tokens=importance.FEWEST_SCORED)
    assert flags[flags.flag == "vanishes under controls"].raised.all()


@pytest.mark.many
@pytest.mark.parametrize("bend", [np.log, lambda pos: (pos - pos.mean()) ** 2], ids=["logarithm", "parabola"])
def test_what_a_bent_function_of_position_explains_is_no_finding(bend):
    """Both columns are functions of position and noise: 30 layers, each a data set of its own."""
    layer, doc, pos = (part.ravel() for part in np.indices((30, 20, 100)))
    level = standard(bend(pos + 1.0))
    table = pd.DataFrame({"layer": layer, "doc": doc, "seq": doc, "pos": pos + 1})
    table["compression"], table["erasure"] = level + noise(table, 0), level + noise(table, 1)
    answer = bl.stats.partial_correlation(table, "compression", "erasure", controls=["position"])
    assert (answer.p <= 0.05).mean() <= stats.binom.isf(1e-3, 30, 0.05) / 30


@pytest.mark.slow
def test_signed_attributions_can_be_the_best_measure(llama, measured):
    """They are ranked by size, under a name that the token view does not know of."""
    table = measured.table
    truth = standard(table["erasure"].rank().to_numpy())
    values = np.exp(np.where(np.isnan(truth), noise(table), truth)) * np.sign(noise(table, 1))
    study = S.study_importance(llama, plant(measured, gradient_times_activation=values), progress=False)
    assert study.tables["ranking"].score.iloc[0] == "gradient_times_activation_size"


def declared_importance(held):
    rows = [
        declared_test(held.table, bl.studies.importance._test(other, held), held, other, other)
        for other in ("erasure", "attention_received")
    ]
    return settle("importance", rows)
