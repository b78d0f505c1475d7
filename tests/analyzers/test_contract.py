"""What every analyzer owes the rest: one test per duty, over the whole list, and over analyzers that someone else wrote."""

import dataclasses
import doctest
import inspect
import math
import sys
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import analyzers as room
from basin_lens import model as door
from basin_lens import neighbors
from basin_lens.analyzers import CloudAnalyzer, Column, TokenAnalyzer
from basin_lens.errors import CaptureError, NeighborError, TableError
from basin_lens.transport import LayerMaps
from tests.conftest import TEXTS, make_bridge, make_tokenizer
from tests.scoring.oracle import Oracle

A = bl.analyzers
LAYERS = range(3)
CLOUDS = [cls for cls in bl.ANALYZERS if issubclass(cls, CloudAnalyzer)]
# Options that change what is measured, beside the defaults.
VARIANTS = [
    A.Contraction(k=4, context="native"),
    A.Compression(k=4, context="solo"),
    A.Compression(k=4, metric="cosine"),
    A.Contraction(k=4, exclude="self"),
    A.RawCompression(k=4, context="patched"),
    A.Neighborhood(k=4, metric="cosine"),
    A.Neighborhood(k=2, same_token="only"),
    A.SeedCompression(k=4),
    A.AttentionReceived(normalize=False),
    A.AttentionReceived(sink=False),
    A.AttentionReceived(normalize=False, sink=False),
    A.SymmetricContraction(k=4, metric="cosine"),
    A.AngularContraction(k=4, context="mlp"),
    A.EffectiveRankChange(k=5),
    A.NeighborOverlap(k=30),
    A.LocalDimension(k=4),
    A.LocalDimension(k=9, metric="cosine", curve=(3, 9)),
    A.JacobianGain(k=4, queries=6, context="attn"),
    A.CentroidEffect(k=4, queries=6, same_token="exclude"),
    A.AttentionReceived(per_head=4, sink=False),
    A.AttentionRollout(sink=False, per_head=4),
    A.ValueWeightedAttention(per_head=(2, 0)),
    A.ValueWeightedAttention(normalize=False, sink=False),
    A.GradientNorm(target="last_logit"),
    A.GradientTimesActivation(target=11),
    A.Compression(k=4, group=3, scale=0.5),
    A.Compression(k=4, context="mlp", queries=30, nulls=False),
    A.RelativeContraction(k=4, context="native"),
    A.DirectionalContraction(k=4, context="attn", seed=2),
    A.IntegratedGradients(steps=6, layer=None, target="last_logit"),
    A.Erasure(positions=3, seed=5),
]


def run(model, data, *analyzers, **options):
    return bl.analyze(model, data, list(analyzers), progress=False, **options)


def facts_of(table):
    (facts,) = table.attrs["provenance"].values()
    return facts


@pytest.fixture(params=bl.ANALYZERS, ids=lambda cls: cls.__name__)
def cls(request):
    return request.param


@pytest.fixture(scope="module")
def default_table(llama, capture):
    """Every analyzer with its defaults, at once."""
    return run(llama, capture, *(cls() for cls in bl.ANALYZERS))


# -- what it is -----------------------------------------------------------------------------------------------------------------


def test_is_a_frozen_dataclass(cls):
    assert dataclasses.is_dataclass(cls)
    first = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), first, getattr(cls(), first))


def test_is_one_of_two_kinds(cls):
    assert issubclass(cls, CloudAnalyzer) != issubclass(cls, TokenAnalyzer)


def test_has_a_file_of_its_own(cls):
    assert [other.__module__ for other in bl.ANALYZERS].count(cls.__module__) == 1


def test_is_public(cls):
    assert getattr(bl.analyzers, cls.__name__) is cls
    assert cls.__name__ in room.__all__


def test_equal_options_are_equal_analyzers(cls):
    assert cls() == cls()
    assert cls().key == cls().key
    assert cls(name="other").key != cls().key


def test_needs_are_declared(cls):
    assert isinstance(cls.needs, frozenset)
    assert cls.needs
    if issubclass(cls, CloudAnalyzer):
        known = {"input_neighbors", "output_neighbors", "images", "candidates", "block", "run_on", "bank", "halves", "final_norm"}
        known |= {"random_contraction", "crossed"}
        assert cls.needs <= known


def test_declares_its_role(cls):
    """In the class itself: studies and reports ask for it, and list no names."""
    assert vars(cls)["role"] in get_args(room.Role)
    assert cls.__name__ in room.names_of(cls.role)


def test_each_class_has_one_role():
    named = [name for role in get_args(room.Role) for name in room.names_of(role)]
    assert sorted(named) == sorted([*(cls.__name__ for cls in bl.ANALYZERS), "Control"])


def test_an_analyzer_of_a_third_party_is_a_score_unless_it_says_otherwise():
    assert CloudAnalyzer.role == TokenAnalyzer.role == "score"


def test_the_list_is_complete():
    """Whatever the room exports that measures something is on the list."""
    public = {getattr(room, name) for name in room.__all__}
    measuring = {x for x in public if inspect.isclass(x) and issubclass(x, room.Analyzer) and not inspect.isabstract(x)}
    assert measuring == set(bl.ANALYZERS)


# -- what it says of itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("Unit:", "Units:"), ("Range:",), ("Source:",), ("Example:",), ("Shapes:",)], ids=lambda w: w[0])
def test_docstring_tells(cls, words):
    assert any(word in inspect.getdoc(cls) for word in words)


def test_has_an_example(cls):
    """They are run by tests/house/test_examples.py."""
    assert len(doctest.DocTestParser().get_examples(inspect.getdoc(cls))) >= 2


def test_docstring_names_every_option(cls):
    """Or says where they are described."""
    text = inspect.getdoc(cls)
    if "see `Compression`" in text:
        text += inspect.getdoc(A.Compression)
    missing = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in text]
    assert missing == []


# -- its columns ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("analyzer", [*(cls() for cls in bl.ANALYZERS), *VARIANTS], ids=lambda a: a.key)
def test_columns_have_name_unit_and_range(analyzer):
    assert analyzer.columns
    for column in analyzer.columns:
        assert column.name.isidentifier()
        assert column.unit
        assert column.low < column.high


def test_default_column_names_are_unique():
    names = Counter(column.name for cls in bl.ANALYZERS for column in cls().columns)
    assert max(names.values()) == 1
    default = Counter(column.name for a in room.default_analyzers() for column in a.columns)
    assert max(default.values()) == 1


def test_defaults_work(cls, default_table):
    for column in cls().columns:
        assert default_table[column.name].notna().any(), column.name


@pytest.mark.parametrize("analyzer", [*(cls() for cls in bl.ANALYZERS), *VARIANTS], ids=lambda a: a.key)
def test_values_lie_in_their_range(analyzer, llama, capture, default_table):
    table = default_table if analyzer == type(analyzer)() else run(llama, capture, analyzer)
    for column in analyzer.columns:
        values = table[column.name].dropna()
        assert len(values)
        assert np.isfinite(values).all()
        rounding = 1e-5 * max(1.0, float(values.abs().max()))
        assert values.min() >= column.low - rounding
        assert values.max() <= column.high + rounding
        assert column.unit != "count" or (values == values.round()).all()


def test_units_and_ranges_reach_the_provenance(cls, default_table):
    columns = facts_of(default_table)["columns"]
    for column in cls().columns:
        held = columns[column.name]
        assert held["unit"] == column.unit
        assert held["low"] == (column.low if math.isfinite(column.low) else None)
        assert held["high"] == (column.high if math.isfinite(column.high) else None)
        assert held["rows"] == cls.rows
        assert held["analyzer"] == cls.__name__


def test_rows(cls, default_table):
    assert cls.rows in ("token", "sequence")
    for column in cls().columns:
        # Position 0 counts: the guesses of a model that learned nothing may all be wrong.
        different = default_table.groupby(["layer", "seq"])[column.name].nunique(dropna=False)
        assert (different <= 1).all() == (cls.rows == "sequence")


# -- its name -------------------------------------------------------------------------------------------------------------------


def test_name_renames_one_column_and_prefixes_several(cls):
    plain, named = cls().columns, cls(name="mine").columns
    if len(plain) == 1:
        assert [column.name for column in named] == ["mine"]
    elif cls is A.Compression:  # a score and its parts, all named after it
        assert [column.name for column in named] == [column.name.replace("compression", "mine") for column in plain]
    else:
        assert [column.name for column in named] == [f"mine_{column.name}" for column in plain]
    assert [(c.unit, c.low, c.high) for c in named] == [(c.unit, c.low, c.high) for c in plain]


def test_two_names_coexist(cls, llama, capture):
    fewer = {"steps": 4} if "steps" in {f.name for f in dataclasses.fields(cls)} else {}  # for time
    one, other = cls(name="one", **fewer), cls(name="other", **fewer)
    table = run(llama, capture, one, other, layers=[1])
    for a, b in zip(one.columns, other.columns, strict=True):
        assert a.name != b.name
        assert table[a.name].notna().any()
        assert table[a.name].to_numpy() == pytest.approx(table[b.name].to_numpy(), nan_ok=True)


def test_one_name_twice_is_refused(cls, llama, capture):
    with pytest.raises(TableError, match="|".join(f"'{column.name}' twice" for column in cls().columns)):
        run(llama, capture, cls(), cls())


@pytest.mark.parametrize("name", ["layer", "token", "span"])
def test_a_name_of_the_table_is_refused(llama, capture, name):
    with pytest.raises(TableError, match=name):
        run(llama, capture, A.StateNorm(name=name))


@pytest.mark.parametrize("cloud", CLOUDS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("k", [1, 0, -3])
def test_a_neighborhood_of_one_is_refused(cloud, k, llama, capture):
    with pytest.raises(NeighborError, match="k"):
        run(llama, capture, cloud(k=k))


# -- what it shares -------------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What a run did: searches, block calls, and pairs of query and point passed."""

    searches: int = 0
    block_calls: int = 0
    block_rows: int = 0
    passes: list = dataclasses.field(default_factory=list)


def everywhere(monkeypatch, original, replacement):
    """Replace a function in every module of basin_lens that took it by name."""
    for name, module in list(sys.modules.items()):
        if name == "basin_lens" or name.startswith("basin_lens."):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    monkeypatch.setattr(module, attribute, replacement)


@pytest.fixture
def work(monkeypatch, llama, capture):
    """A function that runs analyzers and says what it took."""
    find, call_block, make = neighbors.find, door.call_block, LayerMaps.map
    current = []

    def counted_find(*given, **options):
        current[-1].searches += 1
        return find(*given, **options)

    def counted_call(model, layer, call, states, *rest, **options):
        current[-1].block_calls += 1
        current[-1].block_rows += states.shape[0] * states.shape[1]
        return call_block(model, layer, call, states, *rest, **options)

    def counted_map(self, *given):
        made = make(self, *given)

        def of_rows(queries, rows):
            pairs = ((q, row) for q, many in zip(queries.tolist(), rows.tolist(), strict=True) for row in many if row >= 0)
            current[-1].passes += pairs
            return made.of_rows(queries, rows)

        return dataclasses.replace(made, of_rows=of_rows)

    everywhere(monkeypatch, find, counted_find)
    everywhere(monkeypatch, call_block, counted_call)
    monkeypatch.setattr(LayerMaps, "map", counted_map)

    def measure(*analyzers):
        current.append(Work())
        table = run(llama, capture, *analyzers, layers=[1])
        return current[-1], table

    return measure


def test_equal_options_share_one_search(work):
    crossed = A.Compression(k=6, nulls=False)
    alone, _ = work(crossed)
    together, _ = work(crossed, A.Contraction(k=6), A.RawCompression(k=6), A.Neighborhood(k=6), A.Contraction(k=3, name="c3"))
    assert alone.searches == together.searches == 1
    with_nulls, _ = work(A.Compression(k=6))
    assert with_nulls.searches == 2  # the random sets are drawn as one more


def test_other_options_are_another_search(work):
    crossed = A.Compression(k=6, nulls=False)
    done, _ = work(crossed, A.Contraction(k=6, same_token="exclude", name="b"), A.Contraction(k=6, metric="cosine", name="c"))
    assert done.searches == 3


def test_equal_contexts_share_one_transport(work):
    """The neighbors and the random sets are passed once, however many scores look at them; so are the clouds of groups."""
    crossed, held = A.Compression(k=6, nulls=False), A.RelativeContraction(k=6)
    for first, others in (
        (held, [A.Contraction(k=6), A.RawCompression(k=6, context="patched"), A.RelativeContraction(k=3, name="r3")]),
        (crossed, [A.Compression(k=6, nulls=False, contractions=True, name="b")]),
    ):
        alone, _ = work(first)
        together, _ = work(first, *others)
        assert alone.block_rows > 0
        assert (together.block_calls, together.block_rows) == (alone.block_calls, alone.block_rows)


def test_overlapping_neighborhoods_are_passed_once(work):
    """Two searches, one context: their common pairs go through the block once."""
    any_, exclude = A.Contraction(k=6), A.Contraction(k=6, same_token="exclude", name="b")
    apart = [set(neighbor_pairs(work(a)[0])) for a in (any_, exclude)]
    together = neighbor_pairs(work(any_, exclude)[0])
    assert len(together) == len(set(together))
    assert set(together) == apart[0] | apart[1]
    assert apart[0] & apart[1]
    assert apart[0] != apart[1]


def neighbor_pairs(done):
    """Pairs passed for the scores: those of a query with few points; the random points are many to a query."""
    counts = Counter(query for query, _ in done.passes)
    few = [pair for pair in done.passes if counts[pair[0]] <= 12]
    assert few
    return few


def test_sharing_changes_nothing(work):
    every = [
        A.Compression(k=6),
        A.Contraction(k=3),
        A.RawCompression(k=6),
        A.Neighborhood(k=4),
        A.Compression(k=5, context="solo", name="s"),
    ]
    _, together = work(*every)
    for a in every:
        _, alone = work(a)
        for column in a.columns:
            assert together[column.name].to_numpy() == pytest.approx(alone[column.name].to_numpy(), nan_ok=True, abs=2e-5)


def test_native_scores_pass_nothing(work):
    done, _ = work(A.RawCompression(k=6), A.Neighborhood(k=6), A.Contraction(k=6, context="native"))
    assert done.block_calls == 1  # the check that the capture is this model's


# -- analyzers that someone else wrote ------------------------------------------------------------------------------------------


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
    with pytest.raises(CaptureError, match="misshapen"):
        run(llama, TEXTS, Misshapen())


def test_a_class_in_place_of_an_instance_is_refused(cls, llama, capture):
    with pytest.raises(TableError, match="instances"):
        run(llama, capture, cls)


def test_all_of_them_beside_the_built_in_ones(llama, capture, default_table):
    """Foreign and own analyzers in one run do not disturb one another."""
    foreign = [Kept(), Push(), ActiveNeurons(), PathLength(), Reach()]
    table = run(llama, capture, *(cls() for cls in bl.ANALYZERS), *foreign)
    for column in (column for cls in bl.ANALYZERS for column in cls().columns):
        assert table[column.name].to_numpy() == pytest.approx(default_table[column.name].to_numpy(), nan_ok=True, abs=2e-5)
    assert {column.name for a in foreign for column in a.columns} <= set(table.columns)
