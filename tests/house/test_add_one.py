"""What it costs to add something: one file, and one line in a list.

Each test writes the file into a temporary folder, puts its class on the list, and uses it as a user would.
"""

import importlib.util
import sys
from types import ModuleType

import pytest

import basin_lens as bl
from basin_lens.codec import container, rank_coders
from tests import families
from tests.conftest import TEXTS
from tests.families import LLAMA, Family, bridge

ANALYZER = '''
"""How far each state is from the origin, by its largest coordinate."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basin_lens.analyzers import Column, TokenAnalyzer, TokenBatch


@dataclass(frozen=True)
class LargestCoordinate(TokenAnalyzer):
    """Largest absolute coordinate of the state that enters the block. Unit: state units. Range: [0, inf)."""

    name: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"resid_pre"})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(self.name or "largest_coordinate", "state units", 0),)

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {self.columns[0].name: batch.values["resid_pre"].abs().amax(-1)}
'''

BACK_END = '''
"""Ranks as four bytes each: no compression at all."""

import numpy as np

from basin_lens.codec.rank_coders import RankCoder


class PlainRanks(RankCoder):
    """Four bytes a rank."""

    def encode(self, ranks, uncertainty):
        return ranks.astype("<u4").tobytes()

    def open(self, data, count):
        self._ranks, self._at = np.frombuffer(data, "<u4", count).astype(np.int64), 0

    def next(self, uncertainty):
        self._at += len(uncertainty)
        return self._ranks[self._at - len(uncertainty) : self._at]
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A function that makes a module of a file's text."""

    def add(name: str, text: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return add


def test_an_analyzer_is_one_file_and_one_line(added, monkeypatch, llama, capture):
    cls = added("largest_coordinate", ANALYZER).LargestCoordinate
    monkeypatch.setattr(bl.analyzers, "ANALYZERS", (*bl.analyzers.ANALYZERS, cls))  # the line
    table = bl.analyze(llama, capture, [cls(), cls(name="mine"), bl.analyzers.StateNorm()], progress=False)
    for layer in capture.layers:
        expected = capture.resid_pre(layer).abs().amax(-1).numpy()
        assert table[table.layer == layer].largest_coordinate.to_numpy() == pytest.approx(expected)
    assert table.mine.equals(table.largest_coordinate)
    assert (table.largest_coordinate <= table.state_norm * (1 + 1e-6)).all()
    (facts,) = table.attrs["provenance"].values()
    assert facts["columns"]["mine"]["unit"] == "state units" and facts["columns"]["mine"]["analyzer"] == "LargestCoordinate"
    # What the views, tables and statistics do with a column, they do with this one.
    assert bl.tables.layer_summary(table)["largest_coordinate_mean"].notna().all()
    assert "largest_coordinate" in bl.views.token_view(table, "largest_coordinate", layer=1).html


@pytest.mark.slow
def test_a_back_end_of_the_codec_is_one_file_and_one_line(added, monkeypatch, llama):
    cls = added("plain_ranks", BACK_END).PlainRanks
    monkeypatch.setitem(rank_coders.RANK_CODERS, "plain", cls)  # the line
    monkeypatch.setattr(container, "BACKENDS", ("none", "range", *rank_coders.RANK_CODERS))  # as it is made from the list
    coder = bl.codec.TextCodec(llama, "ranks", "plain", streams=2)
    text = " ".join(TEXTS)
    blob = coder.encode_text(*coder.prepared(text))
    found = bl.codec.read(blob)
    assert (found.method, found.backend) == ("ranks", "plain")
    assert sum(map(len, found.chunks)) == 4 * sum(found.tokens)
    assert coder.decode(blob).decode() == text
    with pytest.raises(bl.errors.CodecError, match=r"entropy, plain for method 'ranks', got 'none'"):
        bl.codec.TextCodec(llama, "ranks", "none")


def test_a_family_is_one_line(monkeypatch):
    row = Family(
        "Llama with one head of keys", "bridge", "multi-query", bridge("LlamaConfig", **LLAMA | {"num_key_value_heads": 1})
    )
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, row))  # the line
    assert row in families.families("bridge")
    assert families.served(row.name, row.kind) == families.Served(("R2",) * 3, ("",) * 3, halves=True)
    monkeypatch.setattr(families, "FAMILIES", (row,))  # the others' rows are made elsewhere
    assert families.table("bridge").splitlines()[-1] == "| Llama with one head of keys | multi-query | R2 | yes |"
