"""Published curves, as they really come out on SmolLM2-135M. `demos/02_geometry.ipynb` draws them and says what does not appear.

Where a published curve does not appear in this model, the test pins what does, so that a change is seen.
"""

import pytest
from scipy.spatial import procrustes

import basin_lens as bl
from basin_lens.analyzers import (
    CentroidEffect,
    Compression,
    JacobianGain,
    LocalDimension,
    MatrixEntropy,
    NeighborOverlap,
    StateNorm,
)
from basin_lens.texts import reference_passages

pytestmark = pytest.mark.real
LAYERS = [0, 1, 3, 8, 11, 12, 15, 20, 24, 29]


@pytest.fixture(scope="module")
def captures(real_model):
    """Two passages of each built-in document: read by the model, by the model with tokens shuffled, by its random twin."""
    passages = list(reference_passages())
    passages = passages[::4] + passages[1::4]
    twin = bl.controls.random_twin(real_model, seed=0)
    capture = bl.Capture.from_texts(real_model, passages, max_length=256, progress=False)
    shuffled = bl.controls.shuffled_tokens(real_model, capture, seed=0, progress=False)
    other = bl.Capture.from_texts(twin, passages, max_length=256, progress=False)
    return {"model": (real_model, capture), "shuffled": (real_model, shuffled), "twin": (twin, other)}


@pytest.fixture(scope="module")
def geometry(captures):
    """Mean over documents by layer of norms, entropies, overlap and dimension."""
    answer = {}
    for name, (model, capture) in captures.items():
        analyzers = [StateNorm(), MatrixEntropy(), NeighborOverlap(), LocalDimension(curve=(15,))]
        table = bl.analyze(model, capture, analyzers, layers=LAYERS, queries=300, progress=False)
        keys = ["layer", "seq"]
        first = table[table.pos == 0].set_index(keys)["state_norm"]
        ratio = first / table[table.pos > 0].groupby(keys)["state_norm"].median()
        summary = bl.tables.layer_summary(table).set_index("layer")
        answer[name] = summary.assign(first_ratio=ratio.groupby("layer").mean())
    return answer


def similarity(x, y):
    """1 - disparity of the best rotation and scale."""
    return 1 - procrustes(x, y)[2]


def around(capture, layer):
    """States before and after a block, and which are not at position 0."""
    return capture.resid_pre(layer).numpy(), capture.resid_post(layer).numpy(), capture.row_pos.numpy() > 0


def test_first_token_becomes_massive_but_in_mid_depth(geometry):
    """Published: within the first few layers. Here a small step at layer 3 dissolves again, and the large one is before layer 12."""
    ratio = geometry["model"]["first_ratio"]
    assert ratio[12] == ratio.max() > 80
    assert ratio[12] > 40 * ratio[11]
    assert ratio[11] < 4
    assert 4 < ratio[3] < 25
    assert ratio[29] < 40
    assert geometry["twin"]["first_ratio"].max() < 5


def test_compression_valley_is_position_0(geometry):
    """Published: matrix entropy falls in the middle and rises at the end. Here it does so with position 0 only."""
    entropy, without = (geometry["model"][f"{name}_mean"] for name in ("matrix_entropy", "matrix_entropy_without_first"))
    assert entropy.idxmin() == 12
    assert entropy[12] < 0.35
    assert min(entropy[0], entropy[29]) > 0.6
    assert entropy.loc[12:].is_monotonic_increasing
    assert without.min() > 0.65
    assert without[12] > without[0] + 0.05
    for name in ("matrix_entropy", "matrix_entropy_without_first"):
        twin = geometry["twin"][f"{name}_mean"]
        assert twin.min() > min(twin[0], twin[29]) - 0.05


def test_successive_states_are_close_to_linear_as_in_a_random_twin(captures):
    """Published: about 0.99. Position 0 alone makes it 1; and a twin is closer still, so that nothing trained shows in it."""
    kept = {"first": [], "state": [], "update": [], "twin": [], "twin update": []}
    for layer in (12, 15, 20, 24):
        before, after, beyond = around(captures["model"][1], layer)
        kept["first"].append(similarity(before, after))
        kept["state"].append(similarity(before[beyond], after[beyond]))
        kept["update"].append(similarity(before[beyond], (after - before)[beyond]))
        before, after, beyond = around(captures["twin"][1], layer)
        kept["twin"].append(similarity(before[beyond], after[beyond]))
        kept["twin update"].append(similarity(before[beyond], (after - before)[beyond]))
    assert min(kept["first"]) > 0.99
    assert 0.85 < min(kept["state"]) < max(kept["state"]) < 0.99
    assert max(kept["update"]) < 0.6
    assert min(kept["twin"]) > max(kept["state"])
    assert min(kept["twin update"]) > 0.8
    before, after, _ = around(captures["model"][1], 11)  # the block that makes the first token massive
    assert similarity(before, after) < 0.3


def test_neighbors_are_kept_between_adjacent_layers_and_not_from_end_to_end(captures, geometry):
    model, capture = captures["model"]
    adjacent = geometry["model"]["neighbor_overlap_mean"].loc[3:28]
    assert adjacent.min() > 0.6
    ends = bl.analyze(model, capture, [NeighborOverlap(blocks=29)], layers=[1], queries=300, progress=False)
    assert ends["neighbor_overlap"].mean() < adjacent.min() / 2
    permuted = bl.controls.permuted_layers(capture, seed=0)
    chance = bl.analyze(model, permuted, [NeighborOverlap()], layers=[15], queries=300, progress=False)
    assert abs(chance["neighbor_overlap"].mean()) < 0.03


def test_dimension_has_a_hump_before_mid_depth_and_shuffled_text_a_lower_one(geometry):
    """Published: dimension peaks mid-depth, less for random text, not for random weights.

    Here the hump is at layer 8 of 30, lower for shuffled text, whose dimension then rises to the end; a twin's states fill far more
    dimensions.
    """
    model, shuffled, twin = (geometry[name]["dimension_mle_k15_mean"].loc[1:] for name in ("model", "shuffled", "twin"))
    assert model[8] > model[1] + 4
    assert model[8] > model[12] + 2
    assert 12 < model.min() < model.max() < 40
    assert shuffled.loc[8:15].mean() < model.loc[8:15].mean() - 1
    assert shuffled[29] == shuffled.max() > shuffled[12] + 5
    assert twin.loc[8:].min() > 2 * model.max()


@pytest.fixture(scope="module")
def crossed(captures):
    """Summary and table of compression and its nulls, in the model and in its twin."""
    answer = {}
    for name, layers, queries in (("model", [11, 23, 26], 96), ("twin", [23], 48)):
        table = bl.analyze(*captures[name], [Compression(queries=queries)], layers=layers, progress=False)
        answer[name] = bl.tables.layer_summary(table).set_index("layer"), table
    return answer


def test_blocks_tell_apart_what_is_near_home(crossed):
    """Measured on other texts: -.049 at layer 11, -.071 at 23, -.024 at 26, and 85 of 100 tokens or more below 0."""
    summary, table = crossed["model"]
    assert (summary["compression_mean"].between(-0.1, -0.015)).all()
    assert (summary["compression_high"] < -0.01).all()
    assert (summary["compression_above_random_sets_high"] < -0.005).all()
    below = table.dropna(subset=["compression"]).groupby("layer")["compression"].apply(lambda values: (values < 0).mean())
    assert (below > 0.8).all()
    assert (summary["compression_reliability"] > 0.4).all()  # of a half; the whole is more


def test_the_nulls_of_compression_are_near_0(crossed):
    """Random sets are within a third of the score, random directions nearer; a random twin has next to nothing."""
    summary, _ = crossed["model"]
    for null, most in (("random_sets", 0.025), ("isotropic", 0.01)):
        assert summary[f"compression_{null}_mean"].abs().max() < most
        assert (summary[f"compression_{null}_mean"].abs() < summary["compression_mean"].abs() / 3).all()
    twin, table = crossed["twin"]
    assert twin["compression_mean"].abs().max() < 0.006
    assert table["compression"].std() < 0.02
    for null in ("random_sets", "isotropic"):
        assert twin[f"compression_{null}_mean"].abs().max() < 0.006


def test_neighborhoods_are_not_small_beside_random_sets(crossed):
    """Half their variance and not a hundredth: what is told of nearness is told of that."""
    assert crossed["model"][0]["compression_local"].between(0.2, 0.7).all()


def test_an_affine_map_explains_little_of_a_block_update(captures):
    """Successive states are nearly linear because updates are small, not because blocks are. It has no compression of its own."""
    score = Compression(context="affine", queries=24, nulls=False)
    table = bl.analyze(*captures["model"], [score], layers=[15], progress=False)
    (facts,) = table.attrs["provenance"].values()
    assert 0.1 < facts["affine_fit"]["15"]["1"]["held_out_r2"] < 0.6
    assert table["compression"].abs().max() < 1e-3 and table["compression"].notna().sum() > 12


def test_no_basin_by_derivative_or_by_centroid(captures):
    """Our own hypothesis, not published: it fails. Blocks stretch along the data, and the centroid costs more than a random step."""
    slopes = bl.analyze(*captures["model"], [JacobianGain(queries=12)], layers=[8, 15, 24], progress=False)
    assert (slopes.groupby("layer")["jacobian_contrast"].mean() < 0).all()
    moved = bl.analyze(*captures["model"], [CentroidEffect(queries=8)], layers=[15], progress=False)
    assert moved["centroid_divergence"].mean() > 1.2 * moved["displacement_divergence"].mean()
