"""What every analyzer owes the rest: one test per duty, over the whole list."""

import dataclasses
import doctest
import inspect
import math
from collections import Counter
from typing import get_args

import numpy as np
import pytest

import basin_lens as bl
from basin_lens import analyzers as room
from basin_lens.analyzers import CloudAnalyzer, TokenAnalyzer
from basin_lens.errors import NeighborError, TableError

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


@pytest.mark.many
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


@pytest.mark.many
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
