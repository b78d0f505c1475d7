"""Groups and their tables as analyze gives them, and against loops over a plain transformers model."""

import math

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.errors import NeighborError
from basin_lens.scoring.crossed_pass import CrossedPass
from basin_lens.transport.patched import PatchedBlock
from tests.conftest import make_bridge, make_hf, random_tokens
from tests.scoring.crossed import SIZE, K, Parts, parts_by_loops, plain_images
from tests.scoring.oracle import facts_of, run, variance


@pytest.fixture(scope="module")
def capture(llama):
    return bl.Capture.from_texts(llama, random_tokens(8, 12), progress=False)


@pytest.fixture(scope="module")
def table(llama, capture):
    return run(llama, capture, Parts())


def test_every_layer_says_what_its_groups_were(table, capture):
    analyzer = Parts()
    for layer in capture.layers:
        (facts,) = [facts_of(table)["groups"][str(layer)]["neighbors_inter"]]
        here = table[table.layer == layer]
        scored = int(here.neighbors_inter.notna().sum())
        assert facts["size"] == SIZE and SIZE * facts["groups"] == scored
        assert facts["without_group"] == (here.pos > 0).sum() - scored
        assert facts["dimensions_left_out"] == 0
        assert 0 < facts["local"] < 1
        for kind in ("reliability_over_displacements", "reliability_over_partners"):
            assert set(facts[kind]) == {column.name for column in analyzer.columns}
            assert all(value is None or value <= 1 for value in facts[kind].values())
    assert facts_of(table)["left_out"]["neighbors_inter"]["no group"] == int(table[table.pos > 0].neighbors_inter.isna().sum())


def test_permuting_the_texts_permutes_the_answer(llama):
    tokens = random_tokens(8, 12)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    analyzer = Parts(displaced=("neighbors", "isotropic"))
    plain, mixed = run(llama, tokens, analyzer, layers=[1, 2]), run(llama, tokens[order], analyzer, layers=[1, 2])
    mixed = mixed.assign(seq=order.numpy()[mixed.seq]).sort_values(["layer", "seq", "pos"], kind="stable")
    for column in analyzer.columns:
        assert mixed[column.name].to_numpy() == pytest.approx(plain[column.name].to_numpy(), abs=2e-4, nan_ok=True), column.name
    assert plain.neighbors_inter.notna().mean() > 0.8


@pytest.mark.slow(everywhere=True)
def test_a_seed_decides_who_meets(llama, capture, table):
    again, other = run(llama, capture, Parts()), run(llama, capture, Parts(), seed=1)
    assert again.neighbors_inter.equals(table.neighbors_inter)
    assert not other.neighbors_inter.equals(table.neighbors_inter)
    assert np.corrcoef(*(t.neighbors_inter.fillna(0) for t in (other, table)))[0, 1] > 0.3


def test_a_sample_forms_groups_among_itself(llama, capture):
    table = run(llama, capture, Parts(queries=24), layers=[1])
    assert 8 <= table.neighbors_inter.notna().sum() <= 24
    counts = facts_of(table)["left_out"]["neighbors_inter"]
    assert counts["not sampled"] == (table.pos > 0).sum() - 24
    assert counts["no group"] == 24 - table.neighbors_inter.notna().sum()


def test_other_scores_beside_it_stay_as_they_are(llama, capture, table):
    others = [bl.analyzers.Contraction(k=K), bl.analyzers.Neighborhood(k=K)]
    alone, beside = run(llama, capture, *others), run(llama, capture, Parts(), *others)
    for column in (column.name for a in others for column in a.columns):
        assert beside[column].equals(alone[column])
    assert beside.neighbors_inter.equals(table.neighbors_inter)
    assert "groups" not in facts_of(alone)


def test_an_external_bank_gives_neighbors_and_the_texts_their_partners(llama, capture):
    bank = bl.Capture.from_texts(llama, random_tokens(12, 12, seed=5), progress=False)
    table = run(llama, capture, Parts(), bank=bank, layers=[1])
    assert table.neighbors_inter.notna().sum() > 0.9 * (table.pos > 0).sum()


def test_too_few_documents_are_refused_before_any_work(llama, capture):
    three = bl.Capture.from_texts(llama, random_tokens(3, 12), progress=False)
    with pytest.raises(NeighborError, match=r"at least 4 different values of 'document' for Parts.*got 3"):
        run(llama, three, Parts())
    one = torch.zeros(capture.n_rows, dtype=torch.bool)
    one[1:8] = True
    with pytest.raises(NeighborError, match="got 1"):
        run(llama, capture, Parts(), queries=one)


def test_frozen_neighbors_are_crossed_too(llama, capture):
    pairs = bl.compare(
        (llama, capture), (llama, capture), on=Parts(displaced=("neighbors",)), frozen_neighbors=True, progress=False
    )
    assert pairs.difference.dropna().abs().max() < 1e-4
    assert pairs.difference.notna().mean() > 0.5


@pytest.mark.many
@pytest.mark.parametrize("frozen", [True, False])
def test_another_model_crosses_the_same_groups_if_they_are_frozen(monkeypatch, frozen):
    kept = []

    class Watched(CrossedPass):
        def crossed(self, *given):
            found = super().crossed(*given)
            kept.append(found.rows.tolist())
            return found

    monkeypatch.setattr("basin_lens.scoring.map_scores.CrossedPass", Watched)
    models = [make_bridge("llama", seed=seed) for seed in (0, 1)]
    pairs = [(model, bl.Capture.from_texts(model, random_tokens(8, 12), progress=False)) for model in models]
    bl.compare(*pairs, on=Parts(displaced=("neighbors",)), frozen_neighbors=frozen, layers=[1, 2], progress=False)
    assert len(kept) == 4 and len(kept[0]) > 10
    assert (kept[:2] == kept[2:]) == frozen


@pytest.mark.slow(everywhere=True)
def test_a_longer_path_goes_on_from_a_shorter_one(llama, capture, monkeypatch):
    """Paths measured together have the numbers of each by itself, and pass every block once."""
    passed = []
    real = PatchedBlock.__call__

    def counted(block, queries, points):
        if points.shape[1] == 2 * K * SIZE:  # not the calls by which a block is checked
            passed.append(block.layer)
        return real(block, queries, points)

    monkeypatch.setattr(PatchedBlock, "__call__", counted)
    paths = [Parts(blocks=blocks, displaced=("neighbors", "isotropic"), name=f"path{blocks}_") for blocks in (1, 2, 3)]
    together = run(llama, capture, *paths, layers=[0])
    shared = [passed.count(layer) for layer in range(3)]
    passed.clear()
    for one in paths:
        alone = run(llama, capture, one, layers=[0])
        for column in one.columns:
            assert together[column.name].equals(alone[column.name]), column.name
    assert [passed.count(layer) for layer in range(3)] == [3 * shared[0], 2 * shared[1], shared[2]]
    assert shared[0] == shared[1] == shared[2] > 0


# -- an independent computation -------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("blocks", [1, 2])
def test_loops_over_a_plain_transformers_model_agree(blocks):
    """30 tokens at every layer: neighbors by sorting, images by rerunning the plain model, variances and means in float64."""
    tokens, scale, k = random_tokens(8, 12), 0.7, 5
    model, bridge = make_hf("llama"), make_bridge("llama")
    analyzer = Parts(k=k, scale=scale, blocks=blocks, displaced=("neighbors",))
    capture = bl.Capture.from_texts(bridge, tokens, progress=False)
    kept = {}

    class Watched(CrossedPass):
        def crossed(self, *given):
            kept[self.layer] = super().crossed(*given)
            return kept[self.layer]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("basin_lens.scoring.map_scores.CrossedPass", Watched)
        table = run(bridge, capture, analyzer)
    with torch.no_grad():
        held = model(tokens, output_hidden_states=True).hidden_states
    states = [h.reshape(-1, h.shape[-1]).double().numpy() for h in held]
    seq, pos = (each.flatten().numpy() for each in torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij"))
    checked = 0
    for layer in range(3 - blocks + 1):
        here = table[table.layer == layer]
        for group in kept[layer].rows[:8].tolist():
            clouds = []
            for row in group:
                # At layer 0, equal tokens are one point.
                seen, near = set(), []
                for other in np.argsort(np.linalg.norm(states[layer] - states[layer][row], axis=1), kind="stable"):
                    key = int(tokens[seq[other], pos[other]]) if layer == 0 else int(other)
                    own = int(tokens[seq[row], pos[row]]) if layer == 0 else row
                    if pos[other] > 0 and seq[other] != seq[row] and key != own and key not in seen:
                        seen.add(key)
                        near.append(other)
                near = states[layer][near[:k]]
                clouds.append((near.mean(0), near - near.mean(0)))
            c = np.empty((SIZE, SIZE))
            for p, row in enumerate(group):
                for q in range(SIZE):
                    points = clouds[p][0] + scale * np.concatenate([clouds[q][1], -clouds[q][1]])
                    images = plain_images(
                        model, layer, tokens[seq[row]], int(pos[row]), torch.tensor(points, dtype=torch.float32), blocks
                    )
                    c[p, q] = math.log(variance(points) / variance(images))
            for name, expected in zip(("inter", "place", "dirs"), parts_by_loops(c), strict=True):
                got = here[f"neighbors_{name}"].to_numpy()[group]
                assert got == pytest.approx(expected, abs=1e-4), (layer, name)
            checked += SIZE
    assert checked >= 60
