"""Analyzers that someone else wrote: what they are given, and what they may not do."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.analyzers import CloudAnalyzer, Column, TokenAnalyzer
from basin_lens.errors import AnalyzerError, CaptureError, TableError
from tests.conftest import TEXTS, make_bridge, make_tokenizer
from tests.scoring.oracle import Oracle

LAYERS = range(3)


def run(model, data, *analyzers, **options):
    return bl.analyze(model, data, list(analyzers), progress=False, **options)


@dataclass(frozen=True)
class Kept(CloudAnalyzer):
    """Share of the input neighbors that are neighbors at the output too."""

    k: int = 6
    context: ClassVar = "native"
    metric: ClassVar = "l2"
    exclude: ClassVar = "sequence"
    same_token: ClassVar = "any"
    needs: ClassVar = frozenset({"input_neighbors", "output_neighbors"})

    @property
    def columns(self):
        return (Column("kept", "share", 0, 1), Column("output_radius", "state units", 0))

    def measure(self, cloud):
        kept = (cloud.rows[:, :, None] == cloud.output_rows[:, None, :]).any(2).float().mean(1)
        return {"kept": kept, "output_radius": cloud.output_distances[:, -1]}


def test_output_neighbors(llama, capture):
    """What leaves a block enters the next: the output neighbors are the next layer's input neighbors."""
    table = run(llama, capture, Kept())
    inner = np.flatnonzero(capture.row_pos.numpy() > 0)
    for layer in (0, 1):
        before, after = Oracle(llama, capture, layer), Oracle(llama, capture, layer + 1)
        here = table[table.layer == layer]
        for row in inner[::7]:
            into, (out, distances) = before.neighbors(row, 6)[0], after.neighbors(row, 6)
            assert here.kept.iloc[row] == pytest.approx(len(set(into) & set(out)) / 6)
            assert here.output_radius.iloc[row] == pytest.approx(distances[-1], rel=1e-4)
        assert here.kept.nunique() > 2


@dataclass(frozen=True)
class Push(CloudAnalyzer):
    """How far the block carries a small step away from the query; and the query itself, for the record."""

    context: str = "patched"
    eps: float = 0.05
    k: ClassVar = 4
    metric: ClassVar = "l2"
    exclude: ClassVar = "sequence"
    same_token: ClassVar = "any"
    needs: ClassVar = frozenset({"input_neighbors", "block"})

    @property
    def columns(self):
        return (Column("push", "state units", 0), Column("own_error", "state units", 0))

    def points(self, queries):
        return torch.stack([queries + self.eps * step(queries.shape[-1]), queries], dim=1)

    def measure(self, cloud):
        moved, own = cloud.block(self.points(cloud.query)).unbind(1)
        return {"push": (moved - own).norm(dim=1), "own_error": (own - cloud.query_image).norm(dim=1)}


def step(d):
    return torch.nn.functional.normalize(torch.randn(d, generator=torch.Generator().manual_seed(9)), dim=0)


@pytest.mark.many
@pytest.mark.parametrize("context", ["patched", "native"])
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_block_as_a_function(name, context):
    """Any states through the block in the queries' contexts, packed (llama) or whole (bloom)."""
    model = make_bridge(name, tokenizer=make_tokenizer())
    capture = bl.Capture.from_texts(model, TEXTS[:3], progress=False)
    analyzer = Push(context)
    table = run(model, capture, analyzer, layers=[1])
    scored = table[table.pos > 0]
    assert scored.push.notna().all()
    assert scored.own_error.max() < 1e-4
    for row in (5, 40, 77):
        tokens = torch.tensor(capture.sequences[int(capture.row_seq[row])].tokens)
        points = analyzer.points(capture.resid_pre(1)[[row]])[0]
        moved, own = door.rerun_with_state(model, tokens, 1, int(capture.row_pos[row]), points)
        assert table.push[row] == pytest.approx(float((moved - own).norm()), rel=1e-3)


@dataclass(frozen=True)
class ActiveNeurons(TokenAnalyzer):
    """Share of positive activations in the feed-forward layer: reads a raw hook point."""

    name: str | None = None
    point: str = "mlp.hook_post"

    @property
    def needs(self):
        return frozenset({self.point})

    @property
    def columns(self):
        return (Column(self.name or "active_neurons", "share", 0, 1),)

    def measure(self, batch):
        return {self.columns[0].name: (batch.values[self.point] > 0).float().mean(-1)}


@pytest.mark.many
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_a_raw_hook_point(name):
    model = make_bridge(name, tokenizer=make_tokenizer())
    table = run(model, TEXTS, ActiveNeurons(), batch_size=4)
    capture = bl.Capture.from_texts(model, TEXTS, progress=False)
    expected = []
    for layer in LAYERS:
        for sequence in capture.sequences:
            with torch.no_grad():
                _, cache = model.run_with_cache(torch.tensor([sequence.tokens]))
            expected.append((cache[f"blocks.{layer}.mlp.hook_post"][0] > 0).float().mean(-1).numpy())
    expected = np.concatenate(expected)
    assert np.ptp(expected) > 0.1
    assert table.active_neurons.to_numpy() == pytest.approx(expected)


def test_a_hook_point_that_is_not_there_is_named(llama, capture):
    with pytest.raises(CaptureError, match=r"blocks\.0\.mlp\.hook_nothing"):
        run(llama, capture, ActiveNeurons(point="mlp.hook_nothing"))


@dataclass(frozen=True)
class PathLength(TokenAnalyzer):
    """Length of the way a state has gone so far: remembers the layers before."""

    needs: ClassVar = frozenset({"resid_pre", "resid_post"})

    @property
    def columns(self):
        return (Column("path_length", "state units", 0), Column("layers_before", "count", 0))

    def measure(self, batch):
        far = (batch.values["resid_post"] - batch.values["resid_pre"]).norm(dim=-1)
        batch.memory["far"] = batch.memory.get("far", 0) + far
        batch.memory.setdefault("layers", []).append(batch.layer)
        return {"path_length": batch.memory["far"], "layers_before": torch.full_like(far, len(batch.memory["layers"]) - 1)}


@pytest.mark.parametrize("source", ["texts", "capture"])
@pytest.mark.parametrize("size", [1, 4])
def test_memory_goes_from_layer_to_layer_of_one_batch(llama, capture, source, size):
    table = run(llama, {"texts": TEXTS, "capture": capture}[source], PathLength(), batch_size=size)
    steps = [np.linalg.norm((capture.resid_post(layer) - capture.resid_pre(layer)).numpy(), axis=1) for layer in LAYERS]
    for layer in LAYERS:
        here = table[table.layer == layer]
        assert here.path_length.to_numpy() == pytest.approx(np.sum(steps[: layer + 1], axis=0), rel=1e-4)
        assert (here.layers_before == layer).all()


@dataclass(frozen=True)
class Reach(TokenAnalyzer):
    """One number per sequence and model: needs the logits, is measured once."""

    needs: ClassVar = frozenset({"logits"})
    per_layer: ClassVar = False
    rows: ClassVar = "sequence"

    @property
    def columns(self):
        return (Column("reach", "logit"),)

    def measure(self, batch):
        return {"reach": batch.values["logits"].masked_fill(~batch.valid[..., None], -torch.inf).amax((1, 2))}


def test_one_number_per_sequence(llama, capture):
    table = run(llama, TEXTS, Reach())
    for seq, sequence in enumerate(capture.sequences):
        with torch.no_grad():
            expected = float(llama(torch.tensor([sequence.tokens]), return_type="logits").max())
        assert table.reach[table.seq == seq].to_numpy() == pytest.approx(expected, abs=1e-4)


@dataclass(frozen=True)
class Misshapen(TokenAnalyzer):
    """Gives a number per dimension where one per token is asked for."""

    needs: ClassVar = frozenset({"resid_pre"})

    @property
    def columns(self):
        return (Column("misshapen", "state units"),)

    def measure(self, batch):
        return {"misshapen": batch.values["resid_pre"]}


def test_a_wrong_shape_is_refused(llama):
    with pytest.raises(AnalyzerError, match="misshapen"):
        run(llama, TEXTS, Misshapen())


@pytest.mark.parametrize("cls", bl.ANALYZERS, ids=lambda cls: cls.__name__)
def test_a_class_in_place_of_an_instance_is_refused(cls, llama, capture):
    with pytest.raises(TableError, match="instances"):
        run(llama, capture, cls)


@pytest.mark.slow(everywhere=True)
def test_all_of_them_beside_the_built_in_ones(llama, capture):
    """Foreign and own analyzers in one run do not disturb one another."""
    own = [cls() for cls in bl.ANALYZERS]
    alone = run(llama, capture, *own)
    foreign = [Kept(), Push(), ActiveNeurons(), PathLength(), Reach()]
    table = run(llama, capture, *own, *foreign)
    for column in (column for a in own for column in a.columns):
        assert table[column.name].to_numpy() == pytest.approx(alone[column.name].to_numpy(), nan_ok=True, abs=2e-5)
    assert {column.name for a in foreign for column in a.columns} <= set(table.columns)
