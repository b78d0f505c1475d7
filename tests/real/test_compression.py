"""The crossed table of the real SmolLM2-135M against loops over a plain transformers model, and where its nulls are."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import basin_lens as bl
from basin_lens.model import loading
from basin_lens.model.dequantized import dequantized_at
from basin_lens.scoring.crossed_pass import CrossedPass
from basin_lens.texts import reference_passages
from tests.scoring.crossed import parts_by_loops, plain_images
from tests.scoring.oracle import variance

pytestmark = pytest.mark.real
LAYERS, K, SIZE = (2, 13, 26), 6, 3


@pytest.fixture(scope="module")
def capture(real_model):
    passages = list(reference_passages())[::3]
    return bl.Capture.from_texts(real_model, passages, layers=LAYERS, max_length=32, progress=False)


def test_thirty_tokens_at_three_layers_agree_with_a_plain_model(real_model, capture, monkeypatch):
    """Neighbors from the states of a plain pass, images by rerunning it with the state put in, variances and means in float64."""
    # As transformers alone loads it from the weights kept in the cache: those of the file, see test_loading.py.
    plain = AutoModelForCausalLM.from_pretrained(dequantized_at(loading._FILE_SHA256), dtype=torch.float32).eval()
    kept = {}

    class Watched(CrossedPass):
        def crossed(self, *given):
            kept[self.layer] = super().crossed(*given), self.own.found.near.rows, self.own.bank.ordinary.numpy()
            return kept[self.layer][0]

    monkeypatch.setattr("basin_lens.scoring.map_scores.CrossedPass", Watched)
    analyzer = bl.analyzers.Compression(k=K, group=SIZE, nulls=False)
    table = bl.analyze(real_model, capture, [analyzer], queries=200, progress=False)
    with torch.no_grad():
        held = [plain(torch.tensor([s.tokens]), output_hidden_states=True).hidden_states for s in capture.sequences]
    for layer in LAYERS:
        crossed, near, ordinary = kept[layer]
        states = torch.cat([h[layer][0] for h in held]).double().numpy()
        here = table[table.layer == layer]
        for group in crossed.rows[:10].tolist():
            clouds = [states[near[row, :K].numpy()] for row in group]
            c = np.empty((SIZE, SIZE))
            for p, row in enumerate(group):
                tokens = torch.tensor(capture.sequences[int(capture.row_seq[row])].tokens)
                moves = [cloud - cloud.mean(0) for cloud in clouds]
                points = clouds[p].mean(0) + np.stack([np.concatenate([each, -each]) for each in moves])
                put = torch.tensor(points, dtype=torch.float32).flatten(0, 1)
                images = plain_images(plain, layer, tokens, int(capture.row_pos[row]), put, 1).reshape(points.shape)
                c[p] = np.log(variance(points[..., ordinary]) / variance(images[..., ordinary]))
            for name, expected in zip(("", "_place", "_directions"), parts_by_loops(c), strict=True):
                assert here[f"compression{name}"].to_numpy()[group] == pytest.approx(expected, abs=1e-5), (layer, name)
