"""The studies of layers and of code length."""

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens import tables
from basin_lens.errors import ModelError
from basin_lens.studies import codelength, layers
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.random_twin import same_tokens
from basin_lens.studies.framework.spec import Analysis, Results
from tests.studies.planted import S, noise, plant, plant_compression

# -- layers ----------------------------------------------------------------------------------------------------------------------------


def test_compression_above_its_nulls_is_a_basin(deep):
    assert deep.decision.startswith("yes")
    assert deep.findings.holds.all()
    assert deep.findings.layer.tolist() == [1, 1] and deep.findings.score.tolist() == list(layers.ABOVE)
    assert deep.findings.effect_unit.tolist() == ["nats", "nats"]
    assert (deep.findings.estimate > 0.3).all()
    nulls = deep.tables["nulls"]
    assert (nulls.p_corrected <= 0.05).all()
    assert deep.verdict[0].startswith("Yes. It is a basin") and "opposite" not in deep.verdict[0]
    assert any("above it at layers [0, 1, 2]" in line for line in deep.verdict)


@pytest.mark.slow
def test_the_random_twin_stands_beside_it(llama, measured, deep):
    """The run's own tokens in a model with weights drawn anew, as `analyze` measures them."""
    twin = bl.controls.random_twin(llama, seed=measured.seed)
    asked = measured.table.groupby(["seq", "pos"])["compression"].count().to_numpy() > 0
    capture = same_tokens(measured.capture, twin, tuple(measured.layers))
    direct = bl.analyze(twin, capture, [bl.analyzers.Compression(k=5)], queries=asked, seed=measured.seed, progress=False)
    direct = bl.tables.layer_summary(direct, ["compression"])
    summary = deep.tables["summary"]
    assert summary["compression_random_twin_mean"].to_numpy() == pytest.approx(direct["compression_mean"].to_numpy(), abs=1e-4)
    assert any(line.startswith("The random twin's runs from") for line in deep.verdict)
    assert not any("random twin" in line for line in deep.not_tested)


def test_halves_that_cannot_be_held_against_one_another_are_said_to_be_so(deep):
    """Two layers make no curve: words, and no "agree at nan"."""

    def last_of(**halves):
        held = {**deep.tables, "halves": deep.tables["halves"].assign(**halves)}
        return layers._remarks(Analysis(deep.tokens, (), tables=held))[-1]

    said = last_of(estimate=np.nan, n_layers=2, n_units=18)
    assert said.startswith("Whether the curves of two halves of the documents agree cannot be said of 2 layers and 18 units")
    assert said.endswith("it takes 3 layers at which both halves are measured, and curves that vary.") and "nan" not in said
    assert last_of(estimate=0.5).startswith("Curves of two halves of the documents agree at 0.50")


@pytest.mark.slow
def test_a_model_without_a_random_twin_says_so(llama, measured, monkeypatch):
    def refuse(*_args, **_options):
        raise ModelError("expected weights that can be drawn anew.")

    monkeypatch.setattr("basin_lens.studies.framework.random_twin.random_twin", refuse)
    study = S.study_layers(llama, measured, progress=False)
    assert "The random twin: expected weights that can be drawn anew." in study.not_tested
    assert "compression_random_twin_mean" not in study.tables["summary"] and "compression_mean" in study.tables["summary"]


@pytest.mark.slow
def test_compression_below_its_nulls_is_no_basin_but_the_opposite(llama, measured):
    table = measured.table
    apart = (table["compression_isotropic"] - table["compression_random_sets"]).clip(upper=0)
    study = S.study_layers(llama, plant_compression(measured, apart - 0.3 + noise(table, 4, 0.1)), progress=False)
    assert study.decision.startswith("yes") and (study.findings.estimate < -0.1).all()
    assert "no basin but the opposite" in study.verdict[0]
    assert any("below it at [0, 1, 2]" in line for line in study.verdict)


@pytest.mark.slow
def test_above_random_sets_alone_is_half_of_the_declared_hypothesis(llama, measured):
    """The hypothesis has two parts, joined by 'and'."""
    table = measured.table
    above = 0.3 + noise(table, 4, 0.1)
    compression = table["compression_random_sets"] + above
    planted = plant_compression(measured, above, compression_isotropic=compression + noise(table, 5, 0.1))
    study = S.study_layers(llama, planted, progress=False)
    assert study.findings.holds.tolist() == [True, False]
    assert study.decision.startswith("in part")
    assert study.verdict[0].startswith("In part") and study.verdict[1].startswith("It is a basin")
    assert "against random sets" in study.verdict[1] and "isotropic" not in study.verdict[1]


def test_the_verdict_says_which_sign_each_test_has():
    def said(*estimates, holds=(True, True)):
        rows = {"question": layers.ABOVE, "estimate": estimates, "holds": holds, "layer": [2, 3]}
        return layers._direction(Results(pd.DataFrame(rows), None, "yes"))

    assert said(0.2, 0.1).startswith("It is a basin: ") and "+0.200 nats against random sets at layer 2" in said(0.2, 0.1)
    assert said(-0.2, -0.1).startswith("It is no basin but the opposite: ")
    assert said(0.2, -0.1).endswith("above that of random sets at layer 2; below that of isotropic displacements at layer 3.")
    assert said(-0.2, 0.1, holds=(False, True)).startswith("It is a basin: ")


@pytest.mark.slow
def test_noise_is_neither_a_basin_nor_its_opposite(llama, measured):
    table = measured.table
    values = noise(table, 7, 0.1)
    nothing = plant_compression(measured, values, compression_isotropic=table["compression_random_sets"] + noise(table, 8, 0.1))
    study = S.study_layers(llama, nothing, progress=False)
    assert not study.findings.holds.any() and study.decision == "no"
    assert study.verdict[0] == "No. Compression does not reliably differ from its nulls here."


def test_the_table_beside_the_curves(deep, measured):
    """How many tokens have compression, how local neighborhoods are, and contraction beside that of other points."""
    summary, table = deep.tables["summary"].set_index("layer"), measured.table
    for layer, rows in table.groupby("layer"):
        assert summary.compression_tokens[layer] == rows.compression.notna().sum() < rows.contraction.notna().sum()
    assert ((summary.compression_local > 0) & (summary.compression_local < 1.2)).all()
    assert {"contraction_random_mean", "contraction_radius_matched_mean", "compression_above_isotropic_mean"} <= set(summary)
    assert list(deep.figures)[:2] == ["compression-and-nulls", "place-and-directions"]


def test_halves_agree_on_a_curve_without_noise(measured):
    table = measured.table
    curve = plant(measured, compression=np.array([0.3, -0.1, 0.2])[table["layer"]], contraction=noise(table)).table
    answer = linguistic_free_halves(curve, measured)
    assert answer.loc["compression", ["estimate", "low", "high"]].tolist() == [1.0, 1.0, 1.0]
    assert answer.loc["compression", "largest_difference"] == pytest.approx(0, abs=1e-12)
    assert (answer.n_units == measured.n_units).all()
    assert answer.loc["contraction", "low"] < 0.9


def test_correlations_of_all_splits_at_once_are_pandas_own():
    """Also with ties, and with other layers left in every split; flat curves and two layers give none."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 40, 6)).round(1)
    both = rng.random(one.shape) < 0.8
    one[3], both[4] = 1.0, [True, True, False, False, False, False]
    found = layers._correlations(one, other, both)
    kept = [(a[there], b[there]) for a, b, there in zip(one, other, both, strict=True) if there.sum() >= 3 and np.ptp(a[there]) > 0]
    expected = [pd.Series(a).corr(pd.Series(b), method="spearman") for a, b in kept]
    assert sorted(found) == pytest.approx(sorted(expected), abs=1e-15) and 30 < len(found) < 39


@pytest.mark.parametrize("shape", [(41, 6), (200, 1), (3, 30)])
def test_curves_of_halves_are_the_same_bit_for_bit_however_many_at_once(monkeypatch, shape):
    values = np.random.default_rng(1).normal(size=shape)
    values[::7, 0] = np.nan
    made = []
    for at_once in (layers._SPLITS, layers._AT_ONCE, 7):
        monkeypatch.setattr(layers, "_AT_ONCE", at_once)
        made.append(np.stack(layers._curves_of_halves(values, np.random.default_rng(2))))
        assert made[-1].shape == (2, layers._SPLITS, shape[1])
    assert made[0].tobytes() == made[1].tobytes() == made[2].tobytes()


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


@pytest.mark.slow
def test_compression_that_goes_with_the_next_code_length_is_found_and_chance_is_not(llama, measured):
    after = codelength.with_code_lengths(measured.table).next_code_length
    drawn = plant_compression(measured, after.fillna(after.mean()) / after.std() + noise(measured.table, 8, 0.3))
    study = S.study_codelength(llama, drawn, progress=False)
    found = study.findings.set_index("question")
    assert found.holds["next_code_length"] and found.estimate["next_code_length"] > 0.5
    assert set(study.tables["partial_correlation"].against) == {"code_length", "next_code_length"}
    assert "bits per token" in study.verdict[-1] and "code length" in study.report().html
    nothing = S.study_codelength(llama, plant_compression(measured, noise(measured.table, 9, 1.0)), progress=False)
    assert not nothing.findings.holds.any() and nothing.decision in ("no", "undecided")


def test_a_finding_counts_the_tokens_of_the_sample(measured):
    """None of a quarter of the sequences, beside what the sample lacks: the effect is found, and its tokens are counted."""
    table = codelength.with_code_lengths(measured.table)
    table = tables.select(table, table.layer > 0)
    kept = table[HEADLINE].notna() & (table.seq % 4 != 3)
    table[HEADLINE] = np.where(kept, table.next_code_length + noise(table, 8, 0.3), np.nan)
    found = codelength._correlated(table, HEADLINE, "next_code_length", measured)
    assert (found.estimate > 0.5).all() and (found.p < 0.01).all()
    scored = table[kept & table.next_code_length.notna() & table.surprisal.notna()].groupby("layer").size()
    assert (found.n_tokens <= scored.to_numpy()).all() and (found.n_tokens > 0.8 * scored.to_numpy()).all()
    assert (found.n_documents < measured.n_units + 1).all()


def test_entropy_shows_the_prediction_by_layer(measured):
    """Compression goes up with it and directions down, as planted at one layer, at fixed radius, norm, frequency and position."""
    table = measured.table
    level = (table.layer == 2) * (table.next_token_entropy - table.next_token_entropy.mean()) / table.next_token_entropy.std()
    planted = plant_compression(measured, level + noise(table, 1, 0.5), compression_directions=-level + noise(table, 2, 0.5))
    found = codelength._entropy(planted.table, measured).set_index(["score", "layer"])
    assert set(found.controls) == {"log_radius, log_norm, log_frequency, position"}
    for score, sign in ((HEADLINE, 1), ("compression_directions", -1)):
        assert sign * found.estimate[score, 2] > 0.4 and found.p_corrected[score, 2] < 0.01
        assert abs(found.estimate[score, 1]) < 0.25
    assert abs(found.estimate["compression_place", 2]) < 0.4
