"""The real SmolLM2-135M: what needs a trained model."""

from pathlib import Path

import numpy as np
import pytest

import basin_lens as bl
from basin_lens.texts import reference_passages
from tests.house.test_documents import python_blocks

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
LAYERS = [1, 8, 15, 22]


@pytest.fixture(scope="module")
def table(real_model):
    scores = [bl.analyzers.Compression(queries=120), *bl.analyzers.default_analyzers()[1:]]
    return bl.analyze(real_model, list(reference_passages()), scores, layers=LAYERS, max_length=256, queries=900, progress=False)


def test_measured_figures_of_the_design_come_out(table):
    """Blocks expand neighborhoods a little: measured -0.46 at layer 1, -0.04 at 15, -0.24 at 22 on other texts."""
    mean = table.groupby("layer")["contraction"].mean()
    assert -0.65 < mean[1] < -0.3
    assert -0.15 < mean[15] < 0.05
    assert -0.35 < mean[22] < -0.12


def test_patched_scores_are_reliable_and_not_density(table):
    (facts,) = table.attrs["provenance"].values()
    for layer in LAYERS:
        assert facts["reliability"]["contraction"][str(layer)] > 0.4
        assert facts["routes"][str(layer)] == "R2"
        assert facts["check_error"][str(layer)] < 1e-5
        rows = table[table["layer"] == layer]
        density = rows["contraction"].corr(np.log(rows["radius"]), method="spearman")
        raw = rows["raw_compression"].corr(np.log(rows["radius"]), method="spearman")
        assert abs(raw) > 0.8
        assert abs(density) < abs(raw)


def test_compression_goes_with_surprisal_at_layer_8(table):
    rows = table[table["layer"] == 8]
    assert -0.7 < rows["contraction"].corr(rows["surprisal"], method="spearman") < -0.2


def test_first_token_is_massive(table):
    rows = table[table["layer"] == 15]
    assert rows[rows.pos == 0]["state_norm"].median() > 10 * rows[rows.pos > 0]["state_norm"].median()


PAGES = ("docs/scores.md", "docs/memorization.md", "docs/codec.md", "docs/merging.md")


def test_code_of_the_readme_runs_and_prints_what_it_shows(real_model, tmp_path, monkeypatch, capsys):
    """Every Python block, in order, in one namespace; what the first block prints is what stands below it."""
    monkeypatch.chdir(tmp_path)
    space = run_blocks(real_model, monkeypatch, "README.md", lambda block: check_printed(block, capsys.readouterr().out))
    assert space["table"]["centroid_shift"].notna().any()
    assert (tmp_path / "first_look.html").stat().st_size > 0


def test_code_of_the_pages_runs_after_that_of_the_readme(stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = run_blocks(stand_in, monkeypatch, "README.md")
    for page in PAGES:
        run_blocks(stand_in, monkeypatch, page, space=space)


def run_blocks(model, monkeypatch, page: str, check=None, space: dict | None = None) -> dict:
    """The page's Python blocks, each followed by the check, with `model` as what is loaded; the namespace they ran in."""
    monkeypatch.setattr("basin_lens.model.load_model", lambda *_, **__: model)
    space = {"__name__": "page"} if space is None else space
    blocks = python_blocks(ROOT / page)
    assert blocks, page
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), space)
        if check is not None:
            check(block)
    return space


def check_printed(block: str, printed: str) -> None:
    """Words are the same; numbers too, to the last digit shown: processors round differently."""
    shown = [line.removeprefix("#") for line in block.splitlines() if line.startswith("#")]
    for ours, theirs in zip(" ".join(shown).split(), printed.split(), strict=True):
        try:
            assert float(theirs) == pytest.approx(float(ours), abs=0.011), (ours, theirs)
        except ValueError:
            assert theirs == ours
