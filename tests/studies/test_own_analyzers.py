"""Analyzers of the caller's own in a study: in its table, over depth with their nulls, in the contrast, and in no declared test."""

from dataclasses import dataclass, replace

import pandas as pd
import pytest

import basin_lens as bl
from basin_lens.analyzers import CloudScore, Column, TokenAnalyzer
from basin_lens.errors import AnalyzerError, TableError
from basin_lens.studies import Contrast
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.own_analyzers import with_own_analyzers
from basin_lens.studies.framework.spec import Presentation
from tests.studies.planted import QUIET, TEMPLATES, S, prompts, refused, short_texts

OWN = {"studies": ["layers"], "max_length": 64, "unit": "template", "exclude": "template", "bank": "reference"}


@dataclass(frozen=True)
class Shift(CloudScore):
    """A score of the neighbors' images."""

    k: int = 5
    needs = frozenset({"input_neighbors", "images"})
    columns = (Column("shift", "state units", 0),)

    def measure(self, cloud):
        return {"shift": (cloud.images.mean(1) - cloud.neighbors.mean(1)).norm(dim=1)}


@dataclass(frozen=True)
class Even(TokenAnalyzer):
    """A property of tokens, which is known."""

    needs = frozenset({"resid_pre"})
    columns = (Column("even", "share", 0, 1),)

    def measure(self, batch):
        return {"even": (batch.tokens % 2 == 0).float()}


@pytest.fixture(scope="module")
def owned(llama):
    return S.measure(
        llama, prompts(), analyzers=[Shift(), Even()], layers=[1], contrast=Contrast("span", "IO", "S"), **OWN, **QUIET
    )


def test_they_are_in_the_measured_table_and_its_provenance(llama, owned):
    table = owned.table
    assert {"shift", "shift_random", "shift_radius_matched", "even", HEADLINE} <= set(table)
    assert (table.even == (table.token_id % 2 == 0)).all()
    direct = bl.analyze(llama, owned.capture, [Shift(exclude="sequence")], layers=[1], bank="reference", progress=False)
    assert table["shift"].to_numpy() == pytest.approx(direct["shift"].to_numpy(), nan_ok=True, rel=1e-4)
    assert owned.settings["own_analyzers"] == [Shift().key, Even().key]
    (facts,) = table.attrs["provenance"].values()
    assert {Shift().key, Even().key} <= set(facts["analyzers"])
    assert (facts["columns"]["even"]["unit"], facts["columns"]["even"]["high"]) == ("share", 1)


def test_sections_tables_and_figures(owned):
    """What every study adds: units and ranges, curves by unit with their nulls, the contrast; nothing without own analyzers."""
    bare = Presentation((), {}, ())
    assert with_own_analyzers(replace(owned, own=()), bare) is bare
    shown = with_own_analyzers(owned, bare)
    assert [one.title for one in shown.sections] == [
        "Your analyzers",
        "Your analyzers over depth [state units]",
        "Your analyzers over depth [share]",
        "Your analyzers. Contrast: span: IO - S",
    ]
    declared = shown.sections[0].table.set_index("score")
    assert declared.unit.to_dict() == {"shift": "state units", "even": "share"} and declared.high["even"] == 1
    assert set(shown.tables["own_contrast"].score) == {"shift", "even"}
    assert {"shift_random_mean", "even_mean", f"{HEADLINE}_mean"} <= set(shown.tables["own_analyzers"])
    assert set(shown.figures) == {"own-analyzers-1", "own-analyzers-2", "own-contrast-by-layer"}


@pytest.mark.slow
def test_a_study_shows_them_and_decides_nothing_by_them(llama, owned, prompted):
    study, without = S.study_layers(llama, owned, progress=False), S.study_layers(llama, prompted, progress=False)
    assert study.findings.equals(without.findings) and study.decision == without.decision
    # Corrected apart; other analyzers pass other points beside, which moves last digits.
    pd.testing.assert_frame_equal(study.tables["contrast"], without.tables["contrast"], rtol=1e-3, atol=1e-4)
    found = study.tables["own_contrast"]
    assert set(found.score) == {"shift", "even"}
    row = found[(found.score == "even") & (found.control_set == "none")].iloc[0]
    table = owned.table.dropna(subset=["contrast"])
    means = table.groupby(["template", "seq", "contrast"])["even"].mean().unstack()
    apart = (means.IO - means.S).groupby(level="template").mean()
    assert row.estimate == pytest.approx(apart.mean(), abs=1e-6) and row.n_units == len(TEMPLATES)
    summary = study.tables["own_analyzers"]
    assert {f"{name}_mean" for name in ("shift", "shift_random", "shift_radius_matched", "even", HEADLINE)} <= set(summary)
    assert summary.even_mean.iloc[0] == pytest.approx(owned.table.groupby(["doc", "seq"])["even"].mean().mean())
    assert {"own-analyzers-1", "own-analyzers-2", "own-contrast-by-layer"} <= set(study.figures)
    page = study.report().html
    for said in (
        "Your analyzers over depth [state units]",
        "Your analyzers. Contrast: span: IO - S",
        "Exploration: no declared test",
    ):
        assert said in page
    assert not {"own_analyzers", "own_contrast"} & set(without.tables) and "Your analyzers" not in without.report().html


def test_they_are_refused_before_the_model_runs(llama, monkeypatch):
    wrong = Shift()
    object.__setattr__(wrong, "k", None)
    data = short_texts(8)
    refused(llama, monkeypatch, data, "columns of Nameless", AnalyzerError, analyzers=[Nameless()])
    refused(llama, monkeypatch, data, "k of at least 2 for Shift", bl.errors.NeighborError, analyzers=[wrong])
    refused(
        llama, monkeypatch, data, "'contraction' twice", TableError, studies=["layers"], analyzers=[bl.analyzers.Contraction(k=4)]
    )
    refused(llama, monkeypatch, data, "a list of at least one analyzer", TableError, analyzers=Shift())


@dataclass(frozen=True)
class Nameless(CloudScore):
    needs = frozenset({"input_neighbors"})
    columns = ()

    def measure(self, cloud):
        return dict.fromkeys(self.columns, cloud.distances[:, 0])
