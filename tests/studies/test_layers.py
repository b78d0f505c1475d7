"""The studies of layers and of code length."""

import numpy as np
import pytest

import basin_lens as bl
from basin_lens.studies import codelength
from tests.studies.planted import S, noise, plant

# -- layers ----------------------------------------------------------------------------------------------------------------------------


def test_compression_above_its_controls_is_found(deep):
    assert deep.decision.startswith("yes")
    assert deep.findings.holds.all()
    assert deep.findings.layer.tolist() == [1, 1]
    assert (deep.findings.estimate > 0.3).all()
    controls = deep.tables["controls"]
    assert (controls.p_corrected <= 0.05).all()
    assert any("more at layers [0, 1, 2]" in line for line in deep.verdict)


@pytest.mark.slow
def test_compression_below_its_controls_is_the_other_way(llama, measured):
    table = measured.table
    control = table[["compression_random", "compression_radius_matched"]].min(axis=1)
    study = S.study_layers(llama, plant(measured, compression=control - 0.3 + noise(table, 4, 0.1)), progress=False)
    assert study.decision == "no"
    assert any("the other way" in line for line in study.verdict)
    assert (study.findings.p > 0.9).all()


def test_above_random_points_alone_is_half_of_the_declared_hypothesis(llama, measured):
    """The hypothesis has two parts, joined by 'and'."""
    table = measured.table
    low = table["compression_radius_matched"] - 0.3 + noise(table, 4, 0.1)
    study = S.study_layers(
        llama, plant(measured, compression=low, compression_random=low - 0.3 + noise(table, 5, 0.1)), progress=False
    )
    assert study.findings.holds.tolist() == [True, False]
    assert study.decision.startswith("in part")
    assert study.verdict[0].startswith("In part")


def test_halves_agree_on_a_curve_without_noise(measured):
    table = measured.table
    curve = plant(measured, compression=np.array([0.3, -0.1, 0.2])[table["layer"]], contraction=noise(table)).table
    answer = linguistic_free_halves(curve, measured)
    assert answer.loc["compression", ["estimate", "low", "high"]].tolist() == [1.0, 1.0, 1.0]
    assert answer.loc["compression", "largest_difference"] == pytest.approx(0, abs=1e-12)
    assert (answer.n_units == measured.n_units).all()
    assert answer.loc["contraction", "low"] < 0.9


def linguistic_free_halves(table, measured):
    return bl.studies.layers.halves_agree(table, ["compression", "contraction"], measured).set_index("score")


def test_halves_of_a_constant_curve_say_nothing(measured):
    flat = plant(measured, compression=np.zeros(len(measured.table))).table
    assert np.isnan(linguistic_free_halves(flat, measured).loc["compression", "estimate"])


# -- code length -----------------------------------------------------------------------------------------------------------------------


def test_code_lengths_are_bits_and_stand_beside_the_token_before(measured):
    table = codelength.with_code_lengths(measured.table)
    assert np.allclose(table.code_length * np.log(2), table.surprisal, equal_nan=True)
    for (_, _), rows in table[table.seq < 2].sort_values("pos").groupby(["layer", "seq"]):
        assert np.array_equal(rows.next_code_length.to_numpy()[:-1], rows.code_length.to_numpy()[1:], equal_nan=True)
        assert np.isnan(rows.next_code_length.iloc[-1])


def test_compression_that_goes_with_the_next_code_length_is_found_and_chance_is_not(llama, measured):
    after = codelength.with_code_lengths(measured.table).next_code_length
    drawn = plant(measured, compression=after.fillna(after.mean()) / after.std() + noise(measured.table, 8, 0.3))
    study = S.study_codelength(llama, drawn, progress=False)
    found = study.findings.set_index("question")
    assert found.holds["next_code_length"] and found.estimate["next_code_length"] > 0.5
    assert set(study.tables["partial_correlation"].against) == {"code_length", "next_code_length"}
    assert "bits per token" in study.verdict[-1] and "code length" in study.report().html
    nothing = S.study_codelength(llama, plant(measured, compression=noise(measured.table, 9, 1.0)), progress=False)
    assert not nothing.findings.holds.any() and nothing.decision in ("no", "undecided")
