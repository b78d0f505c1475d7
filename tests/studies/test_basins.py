"""The study of basins: a planted one is found where it is and nowhere else, chance is not, and a no is said."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens.errors import StudyError
from basin_lens.scoring.crossed_pass import CrossedPass
from basin_lens.studies.basins import tests as cell_tests
from basin_lens.studies.basins.grid import HOME, HOME_ISOTROPIC, HOME_RANDOM, SCORE, SCORE_RANDOM, VALUES, Grid, sampled
from basin_lens.studies.basins.report import Seen, cells_of, figures_of, flags_of, sections_of
from basin_lens.studies.basins.tests import ABOVE, APART, BASIN, GROWN, GROWTH, MEASURES, finding_of, plain_means, with_measures
from basin_lens.studies.framework import measurement, registry
from basin_lens.transport import LayerMaps
from tests.studies.planted import made_text

S = bl.studies
SCALES = (0.02, 1.0, 10.0)
QUICK = {"tokens": 72, "neighbors": 4, "scales": SCALES, "paths": (1,), "progress": False}


@pytest.fixture(scope="module")
def held(llama):
    texts = [made_text(36, seed, f"doc-{seed}") for seed in range(18)]
    return S.measure(llama, texts, studies=["basins"], layers=[0, 1, 2], max_length=44, k=4, progress=False)


@pytest.fixture(scope="module")
def plain(llama, held):
    """A tiny model of random weights."""
    return S.study_basins(llama, held, **QUICK)


def of_measure(study, measure):
    cells = study.tables["cells"]
    return cells[cells.score == measure]


def basins(study, measure, reads=BASIN):
    found = of_measure(study, measure)
    return [(row.layer, row.blocks, row.scale) for row in found[found.reads == reads].itertuples()]


# -- the grid -----------------------------------------------------------------------------------------------------------------------


def test_paths_end_in_the_model():
    grid = Grid((4, 25, 29), (0.1, 1.0), (1, 2, 4, 8), 48, 8, 30)
    assert grid.blocks_from(4) == [1, 2, 4, 8, 26] and grid.blocks_from(25) == [1, 2, 4, 5] and grid.blocks_from(29) == [1]
    assert grid.absent == [(25, 8), (29, 2), (29, 4), (29, 8)]
    assert len(grid.cells) == 2 * (5 + 4 + 1)
    assert [grid.path_name(25, blocks) for blocks in (4, 5)] == ["4", "to the end"] and grid.path_name(29, 1) == "1"


def test_the_sample_is_spread_over_documents(held):
    capture = held.capture
    rows = sampled(capture, 40, 0)
    assert len(set(rows.tolist())) == 40 and (capture.row_pos.numpy()[rows] > 0).all()
    docs = [capture.docs[seq] for seq in capture.row_seq.numpy()[rows].tolist()]
    assert len(set(docs[:18])) == 18 and max(map(docs.count, docs)) == 3
    assert sampled(capture, 10, 0).tolist() == rows[:10].tolist() != sampled(capture, 10, 1).tolist()


# -- tests of cells, on made-up values --------------------------------------------------------------------------------------------


def made(seed, *, documents=32, effect=None, size=0.3):
    """Values of cells that go together within a document, and an effect at one cell."""
    rng = np.random.default_rng(seed)
    rows = []
    for doc in range(documents):
        level = rng.normal(0, 0.1)
        for pos in (1, 2):
            for layer in (1, 2, 3):
                for scale in (0.02, 0.5, 1.0, 2.0):
                    values = level + rng.standard_t(4, len(VALUES)) / 10
                    row = {"doc": f"d{doc}", "seq": doc, "pos": pos, "token_id": 9 * doc + pos, "layer": layer, "blocks": 1}
                    row |= {"scale": scale, **dict(zip(VALUES, values, strict=True))}
                    if effect == (layer, scale):
                        row[SCORE] += size
                        row[HOME] += size
                    rows.append(row)
    return with_measures(pd.DataFrame(rows))


def in_cells(values, measure):
    return cell_tests.cell_tests(values, measure, "document", 0, n_resamples=499)


@pytest.mark.many
@pytest.mark.parametrize(("size", "reads"), [(0.3, BASIN), (-0.3, APART)])
def test_an_effect_is_found_at_its_cell_alone(size, reads):
    values = made(3, effect=(2, 1.0), size=size)
    for measure in MEASURES:
        cells = in_cells(values, measure)
        found = cells[cells.reads != ""]
        assert found[["layer", "scale", "reads"]].values.tolist() == [[2, 1.0, reads]], measure
        row = finding_of(cells)
        assert len(cells) == (12 if measure == ABOVE else 9)
        if reads == BASIN:
            assert row[["layer", "n_units"]].values.tolist() == [[2, 16]] and row.p[0] < 0.01
            assert row.estimate[0] == pytest.approx(size, abs=0.1) and "scale 1;" in row.note[0]
        else:
            assert row.p[0] > 0.05


@pytest.mark.slow
def test_chance_is_not_called_a_basin(capsys):
    """Any cell of either measure, in 20 tables in which nothing is."""
    wrong = dict.fromkeys((BASIN, APART), 0)
    for seed in range(20):
        values = made(seed)
        said = {reads for measure in MEASURES for reads in in_cells(values, measure).reads}
        for reads in wrong:
            wrong[reads] += reads in said
    with capsys.disabled():
        print(f"\nof 20 tables of chance: a basin in {wrong[BASIN]}, telling apart in {wrong[APART]}")
    assert sum(wrong.values()) <= 3


def test_growth_is_free_of_the_linear_part():
    """Contraction that is the same at every scale does not grow; the token's own level is no growth."""
    values = made(0)
    for column in (HOME, HOME_RANDOM, HOME_ISOTROPIC):
        values[column] = values["seq"] * 1.0 + (values["scale"] == 2.0) * (column == HOME)
    grown = with_measures(values)
    assert grown[grown.scale == 0.02][[GROWN, GROWTH]].isna().all(axis=None)
    rest = grown[grown.scale > 0.02]
    assert np.allclose(rest[GROWN], rest.scale == 2.0, atol=1e-12) and np.allclose(rest[GROWTH], rest[GROWN])
    assert np.allclose(grown[ABOVE], grown[SCORE] - grown[SCORE_RANDOM])


def test_few_documents_are_not_halved():
    cells = in_cells(made(1, documents=10, effect=(1, 0.5)), ABOVE)
    assert cells.explored_p.isna().all() and cells.confirmed_p.isna().all()
    assert cells[cells.reads == BASIN][["layer", "scale"]].values.tolist() == [[1, 0.5]]
    row = finding_of(cells)
    assert "too few units to halve (10): the best of 12 cells" in row.note[0] and row.p[0] <= 0.05
    assert row.p[0] == cells.p_corrected.min()


def test_fewer_than_six_documents_are_no_test():
    cells = in_cells(made(1, documents=5), ABOVE)
    assert len(cells) == 12 and cells.p.isna().all() and (cells.reads == "").all()
    row = finding_of(cells)
    assert np.isnan(row.p[0]) and "no cell has values of enough units" in row.note[0]


def test_red_flags_ask_who_else_has_the_basin():
    cells = in_cells(made(3, effect=(2, 1.0)), ABOVE)
    cells = cells.assign(random_twin=0.3, random_twin_low=0.2, isotropic=0.1, isotropic_low=0.05, score_mean=0.3)
    assert flags_of(cells).raised.tolist() == [True, False]
    none = flags_of(cells.assign(reads=""))
    assert none.raised.tolist() == [False, False] and none.why.str.contains("no basin was found").all()


@pytest.mark.slow
def test_figures_say_which_paths_and_layers_they_show():
    """No path of one block but the last layer's, and more layers than a figure has panels."""
    grid = Grid(tuple(range(1, 21)), (0.02, 1.0), (2,), 24, 4, 21)
    rng = np.random.default_rng(0)
    rows = [
        {"doc": f"d{doc}", "seq": doc, "pos": 1, "token_id": doc, "layer": layer, "blocks": blocks, "scale": scale}
        | dict(zip(VALUES, rng.normal(size=len(VALUES)), strict=True))
        for doc in range(3)
        for layer, blocks, scale in grid.cells
    ]
    values = with_measures(pd.DataFrame(rows))
    means = plain_means(values, (*VALUES, GROWN), "document")
    tests = {measure: in_cells(values, measure) for measure in MEASURES}
    seen = Seen(grid, values, tests, means, plain_means(values[:0], MEASURES, "document"))
    cells = cells_of(seen)
    figures = figures_of(cells, seen)
    first = figures["compression-by-layer-and-scale"]
    assert first.get_suptitle() == "2 blocks"
    assert [label.get_text() for label in first.axes[0].get_yticklabels()] == [str(layer) for layer in range(1, 20)]
    said = {section.title: str(section) for section in sections_of(cells, seen, figures)}
    assert "Layer by scale, 2 blocks" in said and "Contraction at home against scale, 2 blocks" in said
    assert len(figures["compression-by-path"].axes) == 16 and "16 of the 20 layers are shown" in said["By path length"]


# -- on a tiny model ----------------------------------------------------------------------------------------------------------------


def plant_basin(monkeypatch, model, layer, blocks):
    """Before one block of one model, displacements along a token's own cloud shrink in a shell around its centroid.

    The shell holds the neighbors where they are, and neither a 50th nor ten times their distance.
    """
    paths = {}
    real = LayerMaps.map

    def remembered(maps, context, count=1):
        passage = real(maps, context, count)
        paths[id(passage)] = passage, count
        return passage

    class Planted(CrossedPass):
        def __init__(self, own, *given):
            if (own.layer, paths[id(own.passage)][1]) == (layer, blocks) and own.searches.model is model:
                shrinking = self.shrinking(own, own.passage.of_points)
                own = replace(own, passage=replace(own.passage, of_points=shrinking))
            super().__init__(own, *given)

        @staticmethod
        def shrinking(own, block):
            def through(rows, points):
                center, moves = own.of("neighbors", rows)
                basis = torch.linalg.qr(moves[:, :-1].transpose(1, 2)).Q
                steps = points - center[:, None]
                far, sizes = steps.norm(dim=2, keepdim=True), moves.norm(dim=2)[:, :, None]
                inside = (far > 0.5 * sizes.amin(1, keepdim=True)) & (far < 2 * sizes.amax(1, keepdim=True))
                return block(rows, points - 0.9 * inside * (steps @ basis) @ basis.transpose(1, 2))

            return through

    monkeypatch.setattr(LayerMaps, "map", remembered)
    monkeypatch.setattr("basin_lens.scoring.map_scores.CrossedPass", Planted)


@pytest.mark.slow
def test_a_planted_basin_is_found_at_its_layer_and_scale_and_nowhere_else(llama, held, monkeypatch):
    plant_basin(monkeypatch, llama, layer=1, blocks=1)
    study = S.study_basins(llama, held, **QUICK)
    assert basins(study, ABOVE) == [(1, 1, 1.0)]
    assert basins(study, GROWTH) == [(1, 1, 1.0)]
    assert study.decision == "yes" and study.verdict[0].startswith("Yes.")
    assert study.findings.holds.all() and study.findings.layer.tolist() == [1, 1]
    assert (study.findings.estimate > 0.3).all()
    assert study.flags.raised.tolist() == [False] * 4
    assert "1 basin (layer 1: 1)" in study.verdict[3]


@pytest.mark.slow
def test_a_model_of_random_weights_has_none_and_the_report_says_so(plain, tmp_path):
    assert not basins(plain, ABOVE) and not basins(plain, GROWTH)
    assert plain.decision == "no" and plain.verdict[0].startswith("No. No layer, scale or path length shows a basin here")
    page = plain.report().html
    for said in ("No layer, scale or path length shows a basin here", "2409.17113", "2601.11575", "2510.06477", "nats"):
        assert said in page
    out = plain.save(tmp_path / "basins")
    kept = json.loads((out / "results.json").read_text())
    assert kept["tables"] == ["cell_values", "cells", "findings"] and len(kept["figures"]) == 6
    (facts,) = kept["provenance"].values()
    assert facts["basins"]["neighbors"] == 4 and facts["basins"]["cells"] == 9


def test_every_cell_has_its_nulls_and_the_twin(plain):
    cells = of_measure(plain, ABOVE)
    assert [*cells[["layer", "blocks", "scale"]].itertuples(index=False, name=None)] == [
        (layer, blocks, scale) for layer, blocks in ((1, 1), (1, 2), (2, 1)) for scale in SCALES
    ]
    assert cells.path.tolist() == ["1"] * 3 + ["to the end"] * 3 + ["1"] * 3
    for column in (
        "estimate",
        "p_corrected",
        "score_mean",
        "random_sets",
        "isotropic",
        "isotropic_low",
        "random_twin",
        "random_twin_high",
    ):
        assert cells[column].notna().all(), column
    assert np.allclose(cells.estimate, cells.score_mean - cells.random_sets, atol=1e-6)
    assert (cells.n_units == cells.n_units.max()).all() and cells.n_units.max() > 12
    said = " ".join(plain.about)
    assert "Layer 0 is no part of the grid" in said and "9 cells" in said and "Absent" not in said
    values = plain.tables["cell_values"]
    assert values.groupby(["layer", "blocks", "scale"]).size().eq(72).all()
    assert 0 < values[HOME_ISOTROPIC].notna().sum() <= len(values) / 3


# -- refusals -----------------------------------------------------------------------------------------------------------------------


def forbidden(*_, **__):
    raise AssertionError("ran")


def test_refused_before_the_model_runs(llama, held, monkeypatch):
    monkeypatch.setattr(measurement, "score", forbidden)
    texts = [made_text(36, seed, f"doc-{seed}") for seed in range(14)]
    for wrong, match in (
        ({"tokens": 20}, "tokens of at least 24"),
        ({"neighbors": 3}, "neighbors of at least 4"),
        ({"scales": (1.0,)}, "at least two scales"),
        ({"scales": (0.0, 1.0)}, "scales above 0"),
        ({"scales": (1.0, 1.0)}, "each once"),
        ({"paths": ()}, "paths of at least 1"),
        ({"paths": (0,)}, "paths of at least 1"),
        ({"paths": (2, 2)}, "each once"),
        ({"context": "native"}, "pass displaced states"),
        ({"context": "mlp"}, "expected a context among"),
    ):
        with pytest.raises(StudyError, match=match):
            S.study_basins(llama, texts, **{"max_length": 44, "k": 4, "progress": False} | wrong)
    with pytest.raises(StudyError, match="at least 4 documents"):
        S.study_basins(
            llama, [made_text(600, 0, "one"), made_text(600, 1, "two")], max_length=44, unit="sequence", k=4, progress=False
        )
    with pytest.raises(StudyError, match="no options of measure"):
        S.study_basins(llama, held, k=4, progress=False)
    with pytest.raises(StudyError, match="for the study 'basins'"):
        S.study_basins(llama, replace(held, studies=("layers",)), progress=False)


def test_default_layers_are_seven():
    assert [layer for layer in measurement.spaced_layers(30, registry.find_spec("basins").layers) if layer] == [
        4, 8, 12, 17, 21, 25, 29,
    ]  # fmt: skip
