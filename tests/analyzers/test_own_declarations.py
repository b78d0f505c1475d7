"""Analyzers that someone else wrote, and wrote wrongly: refused before any work, by name, with what to do."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import basin_lens as bl
from basin_lens import tables
from basin_lens.analyzers import CloudAnalyzer, CloudScore, Column, TokenAnalyzer
from basin_lens.errors import AnalyzerError, BasinLensError, CaptureError, NeighborError
from tests.analyzers.passes import counting
from tests.conftest import TEXTS

ONE = (Column("one", "share", 0, 1),)


def run(model, data, *analyzers, **options):
    return bl.analyze(model, data, list(analyzers), layers=[1], progress=False, **options)


@dataclass(frozen=True)
class Cloud(CloudScore):
    """Declares and gives whatever it is told to."""

    k: int = 4
    needs: object = frozenset({"input_neighbors"})
    columns: object = ONE
    rows: object = "token"
    role: object = "score"
    gives: object = None

    def measure(self, cloud):
        return {"one": torch.zeros(len(cloud.query))} if self.gives is None else self.gives(cloud)


@dataclass(frozen=True)
class OfTokens(TokenAnalyzer):
    """The same of tokens."""

    needs: object = frozenset({"resid_pre"})
    columns: object = ONE
    rows: object = "token"
    role: object = "score"
    target: object = None
    per_layer: object = True
    gives: object = None

    def measure(self, batch):
        return {"one": torch.zeros(batch.tokens.shape)} if self.gives is None else self.gives(batch)


BOTH = [pytest.param(Cloud(), id="cloud"), pytest.param(OfTokens(), id="tokens")]
WRONG = {
    "needs of text": ({"needs": "images"}, "needs of KIND as a frozenset of names, got 'images'"),
    "a set": ({"needs": {"resid_pre"}}, r"as a frozenset of names, got \{'resid_pre'\}\. Write needs = frozenset"),
    "no columns": ({"columns": ()}, r"columns of KIND as a tuple of at least one Column, got \(\)"),
    "names alone": ({"columns": ("one",)}, "columns of KIND to be Columns, got 'one'"),
    "a table's column": ({"columns": (tables.Column("nats"),)}, r"Column\(unit='nats'.*\(basin_lens\.tables"),
    "twice": ({"columns": ONE * 2}, "different columns of KIND, got 'one' twice"),
    "no unit": ({"columns": (Column("one", ""),)}, "column of KIND to have a name and a unit"),
    "no name": ({"columns": (Column("", "nats"),)}, "column of KIND to have a name and a unit"),
    "empty range": ({"columns": (Column("one", "nats", 1, 1),)}, r"low below high, for column 'one' of KIND, got \(1, 1\)"),
    "a bound of NaN": ({"columns": (Column("one", "nats", float("nan")),)}, "range of numbers"),
    "rows": ({"rows": "word"}, r"rows of KIND in \('token'.*got 'word'"),
    "role": ({"role": "baseline"}, "role of KIND in .*'confound'.* got 'baseline'"),
}


def refused(llama, monkeypatch, analyzer, error, match):
    """Before any token went through the model."""
    with counting(monkeypatch) as (forward, _), pytest.raises(error, match=match):
        run(llama, TEXTS, analyzer)
    assert forward == []


@pytest.mark.many
@pytest.mark.parametrize("right", BOTH)
@pytest.mark.parametrize("case", WRONG)
def test_declarations_are_checked_before_any_work(llama, monkeypatch, right, case):
    changes, match = WRONG[case]
    right.check_all()  # nothing else is wrong with it
    refused(llama, monkeypatch, replace(right, **changes), AnalyzerError, match.replace("KIND", type(right).__name__))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"needs": frozenset({"image"})}, AnalyzerError, "input_neighbors, .*got image. Did you mean images?"),
        ({"needs": frozenset({"crossed"})}, AnalyzerError, "both a crossing and .* or neither, got crossing None"),
        ({"k": 1}, NeighborError, "k of at least 2 for Cloud, got 1"),
        ({"context": "patch"}, NeighborError, "context in .* for Cloud, got 'patch'"),
        ({"metric": "l1"}, NeighborError, "metric in .* for Cloud, got 'l1'"),
        ({"same_token": "never"}, NeighborError, "same_token in .* for Cloud, got 'never'"),
        ({"exclude": None}, NeighborError, "exclude .* for Cloud, got None"),
        ({"rows": "sequence"}, AnalyzerError, r"rows of Cloud in \('token',\), got 'sequence'"),
    ],
)
def test_options_of_a_cloud_analyzer(llama, monkeypatch, changes, error, match):
    refused(llama, monkeypatch, replace(Cloud(), **changes), error, match)


@dataclass(frozen=True)
class NoK(CloudAnalyzer):
    """Forgets k, and has a check of its own that forgets the common one."""

    needs: ClassVar = frozenset({"input_neighbors"})
    columns: ClassVar = ONE
    metric: str = "l2"

    def check(self):
        pass

    def measure(self, cloud):
        return {"one": torch.zeros(len(cloud.query))}


@dataclass(frozen=True)
class WithK(NoK):
    k: int = 4


class Plain(TokenAnalyzer):
    """No dataclass: two of them could not be told apart."""

    columns: ClassVar = ONE

    def measure(self, batch):
        return {"one": torch.zeros(batch.tokens.shape)}


@dataclass(frozen=True)
class Failing(CloudScore):
    @property
    def columns(self):
        return (Column(self.nothing, "nats"),)

    def measure(self, cloud):
        return {self.columns[0].name: cloud.distances[:, 0]}


@pytest.mark.parametrize(
    ("analyzer", "error", "match"),
    [
        (NoK(), AnalyzerError, "expected k in NoK, got a class without it. .* k: int = 15, or subclass CloudScore"),
        (WithK(metric="l1"), NeighborError, "metric in .* for WithK"),
        (Plain(), AnalyzerError, r"Plain to be a frozen dataclass.*@dataclass\(frozen=True\) above class Plain"),
        (Failing(), AnalyzerError, "columns of Failing, got AttributeError: .*nothing"),
        (OfTokens(target="loss"), AnalyzerError, "target of OfTokens as None, .* got 'loss'"),
        (OfTokens(per_layer="no"), AnalyzerError, "per_layer of OfTokens in"),
        (OfTokens(needs=frozenset({"images"})), CaptureError, r"points that OfTokens needs, .* without blocks\.1\.images"),
    ],
)
def test_classes_that_lack_something(llama, monkeypatch, analyzer, error, match):
    refused(llama, monkeypatch, analyzer, error, match)


def test_everything_that_takes_analyzers_checks_them(llama, capture):
    wrong = replace(Cloud(), columns=())
    with pytest.raises(AnalyzerError, match="columns of Cloud"):
        bl.controls.sweep(llama, capture, wrong, k=[4], progress=False)
    with pytest.raises(AnalyzerError, match="columns of Cloud"):
        bl.compare((llama, capture), (llama, capture), on=wrong, progress=False)
    with pytest.raises(AnalyzerError, match="columns of OfTokens"):
        bl.Capture.from_texts(llama, TEXTS, analyzers=[replace(OfTokens(), columns=())], progress=False)


# -- what measure gives ----------------------------------------------------------------------------------------------------------------


RETURNED = {
    "no dict": (lambda _: torch.zeros(3), "measure of KIND to return a dict of tensors by column name, got Tensor at layer 1"),
    "another column": (lambda _: {"other": torch.zeros(3)}, "columns that it declares, one, got other at layer 1"),
    "one too many": (lambda x: {"one": x, "other": x}, "declares, one, got one, other at layer 1"),
    "nothing": (lambda _: {}, "declares, one, got none at layer 1"),
    "no tensor": (lambda _: {"one": [0.0]}, r"column 'one' of KIND as a tensor \[.*, got list at layer 1"),
    "a number for all": (lambda _: {"one": torch.tensor(0.5)}, r"column 'one' of KIND of shape \[.*, got \[\] at layer 1"),
    "one more dimension": (lambda x: {"one": torch.zeros(*x, 7)}, r"of shape \[(q|batch, pos)\] = \[\d.*, got \[\d+.*, 7\]"),
    "complex": (
        lambda x: {"one": torch.zeros(*x, dtype=torch.complex64)},
        "real numbers in column 'one' of KIND, got torch.complex64",
    ),
}


def sized(gives):
    """A function of the shape wanted, as one of what an analyzer is given."""
    return lambda given: gives(given.tokens.shape if hasattr(given, "tokens") else given.query.shape[:1])


@pytest.mark.many
@pytest.mark.parametrize("right", BOTH)
@pytest.mark.parametrize("case", RETURNED)
def test_values_are_checked_where_they_come_from(llama, capture, right, case):
    gives, match = RETURNED[case]
    with pytest.raises(AnalyzerError, match=match.replace("KIND", type(right).__name__)):
        run(llama, capture, replace(right, gives=sized(gives)))


def test_a_number_per_sequence_must_be_declared(llama, capture):
    per_sequence = OfTokens(gives=lambda batch: {"one": torch.zeros(len(batch.tokens))})
    with pytest.raises(AnalyzerError, match=r"of shape \[batch, pos\] = "):
        run(llama, capture, per_sequence)
    assert (run(llama, capture, replace(per_sequence, rows="sequence")).one == 0).all()


@pytest.mark.parametrize("right", BOTH)
def test_an_error_in_their_code_is_theirs_and_is_kept(llama, capture, right):
    """The class, the layer and what it was given; their own error is the cause, with its traceback."""
    with pytest.raises(
        AnalyzerError, match=rf"values of {type(right).__name__} at layer 1, got KeyError in its own measure"
    ) as caught:
        run(llama, capture, replace(right, gives=lambda _: {}["a typo"]))
    assert isinstance(caught.value.__cause__, KeyError)
    assert sorted(right.needs)[0] in str(caught.value)


def test_an_error_of_the_package_keeps_its_class(llama, capture):
    def refuse(_):
        raise NeighborError("expected more.")

    with pytest.raises(NeighborError, match="expected more") as caught:
        run(llama, capture, Cloud(gives=refuse))
    assert str(caught.value) == "expected more."
    assert caught.value.__notes__ == ["In measure of Cloud, at layer 1."]


def test_a_failure_under_a_null_names_the_score(llama, capture):
    seen = []

    def fails_second(cloud):
        seen.append(cloud.layer)
        if len(seen) > 1:
            raise ZeroDivisionError("far out")
        return {"one": torch.zeros(len(cloud.query))}

    score = Cloud(needs=frozenset({"input_neighbors", "images"}), gives=fails_second)
    with pytest.raises(AnalyzerError, match=r"values of Cloud \(its control, choice 'random'\) at layer 1, got ZeroDivisionError"):
        run(llama, capture, score, controls=True)


def test_a_failed_token_analyzer_leaves_no_columns_behind(llama, capture):
    wrong = OfTokens(gives=lambda _: {}["a typo"])
    with pytest.raises(BasinLensError):
        run(llama, capture, wrong)
    assert wrong.key not in capture.columns
