"""What was accepted can be stored: labels, documents and whole numbers are made plain, or refused before the model runs."""

import datetime
import decimal
import enum
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import tables
from basin_lens.analyzers import (
    Compression,
    Contraction,
    Erasure,
    GradientNorm,
    IntegratedGradients,
    JacobianGain,
    LocalDimension,
    StateNorm,
    Surprisal,
)
from basin_lens.analyzers.attention import AttentionReceived
from basin_lens.errors import BasinLensError, CaptureError, MergeError, NeighborError, StudyError, TableError, TextError
from basin_lens.texts import read_passages
from basin_lens.values import KEYS, document, labels, whole, whole_or_none
from tests.conftest import TEXTS, random_tokens

PLAIN = [
    (np.int64(3), 3),
    (np.uint8(3), 3),
    (np.float32(0.5), 0.5),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    (torch.tensor(3), 3),
    (torch.tensor(True), True),
    (torch.tensor(0.5), 0.5),
    (np.array(3), 3),
    (pd.NA, None),
    (pd.NaT, None),
    (float("nan"), None),
    (np.float64("nan"), None),
    (np.datetime64("NaT"), None),
    (datetime.date(2024, 5, 1), "2024-05-01"),
    (datetime.datetime(2024, 5, 1, 12, 30), "2024-05-01T12:30:00"),
    (pd.Timestamp("2024-05-01"), "2024-05-01T00:00:00"),
    (np.datetime64("2024-05-01"), "2024-05-01"),
    (2**63 - 1, 2**63 - 1),
    (-(2**63), -(2**63)),
    (float("inf"), float("inf")),
    (None, None),
    (True, True),
]


@pytest.mark.parametrize(("given", "wanted"), PLAIN, ids=[f"{type(given).__name__} {given}" for given, _ in PLAIN])
def test_labels_are_made_plain(given, wanted):
    found = bl.Passage("a b", labels={"x": given}).labels["x"]
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    "given",
    [
        {"a": 1},
        [1],
        (1,),
        {1},
        b"x",
        2**63,
        -(2**63) - 1,
        decimal.Decimal("0.1"),
        pytest.param(object(), id="object"),
        np.array([1, 2]),
        torch.ones(2),
        1j,
        "a\ud800",
    ],
    ids=str,
)
def test_labels_that_cannot_be_stored_are_refused(given):
    with pytest.raises(TextError, match="label 'x'"):
        bl.Passage("a b", labels={"x": given})


@pytest.mark.parametrize("name", [*KEYS, "span", "", 3, None, "a\udcff"])
def test_names_of_labels(name):
    with pytest.raises(TextError, match=r"label|names of labels"):
        labels({name: 1})


def test_the_names_taken_are_the_columns_of_a_table(llama, capture):
    table = bl.analyze(llama, capture, [StateNorm()], layers=[0], progress=False)
    assert list(table.columns) == [*KEYS, "span", "state_norm"]


@pytest.mark.parametrize("given", [[("a", 1)], "a", 3])
def test_labels_are_a_mapping(given):
    with pytest.raises(TextError, match="labels by name"):
        labels(given)


@pytest.mark.parametrize(("given", "wanted"), [("001", "001"), (1, "1"), (np.int64(1), "1"), (np.str_("x"), "x"), (pd.NA, None)])
def test_documents(given, wanted):
    assert document(given) == wanted


@pytest.mark.parametrize("given", ["", "a\ud800", 1.0, True, ["x"]])
def test_documents_that_are_none(given):
    with pytest.raises(TextError, match=r"document names|to be a name"):
        document(given)


@pytest.mark.parametrize("place", ["text", "doc", "label", "name", "span"])
def test_lone_surrogates(place):
    parts = {
        "text": lambda: bl.Passage("a \ud800"),
        "doc": lambda: bl.Passage("a b", doc="\ud800"),
        "label": lambda: bl.Passage("a b", labels={"x": "\ud800"}),
        "name": lambda: bl.Passage("a b", labels={"\ud800": "x"}),
        "span": lambda: bl.Passage("a b", spans={"\ud800": (0, 1)}),
    }
    with pytest.raises(TextError, match="lone surrogate"):
        parts[place]()


def test_spans_are_whole_numbers():
    assert bl.Passage("a b", spans={"x": (np.int64(0), torch.tensor(1))}).spans == {"x": (0, 1)}
    with pytest.raises(TextError, match="ends of span 'x' as a whole number, got True"):
        bl.Passage("a b", spans={"x": (True, 2)})


# -- one label in several texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, "unknown"], r"one kind of value for label 'x'.*1 \(number\) in text 0 and 'unknown' \(text\) in text 1"),
        (["1", 1], "one kind"),
        ([True, "True"], "one kind"),
        ([True, 1], r"True \(truth value\) in text 0 and 1 \(number\)"),
        ([None, 0.5, False], "in text 1 and False .truth value. in text 2"),
        ([2**53 + 1, None], "beyond 2.53.*got 9007199254740993 in text 0 and None in text 1"),
        ([0.5, 2**53 + 1], "beyond 2.53"),
    ],
)
def test_one_label_of_several_kinds(llama, values, said):
    data = [bl.Passage(TEXTS[i], labels={"x": value}) for i, value in enumerate(values)]
    with pytest.raises(TextError, match=said):
        read_passages(data)
    tokens = random_tokens(len(values), 5)
    with torch.no_grad():
        _, cache = llama.run_with_cache(tokens)
    with pytest.raises(TextError, match=said):
        bl.Capture.from_cache(llama, tokens, cache, labels=[{"x": value} for value in values])


LABELS = [
    {"n": 2**53 + 1, "mixed": 1, "gap": 3, "flag": True, "kind": "NA", "day": pd.Timestamp("2024-05-01")},
    {"n": 2**63 - 1, "mixed": 0.5, "flag": np.bool_(False), "kind": np.str_("null"), "day": pd.NaT},
    {"n": -(2**63), "mixed": np.float32(2), "gap": pd.NA, "kind": None, "day": None},
]


def test_what_is_accepted_comes_back_from_the_disk(llama, tmp_path):
    data = [bl.Passage(text, doc=f"d{i}", labels=LABELS[i]) for i, text in enumerate(TEXTS[:3])]
    table = bl.analyze(llama, data, [StateNorm()], layers=[0], progress=False)
    tables.save(table, tmp_path / "table.parquet")
    back = tables.load(tmp_path / "table.parquet")
    by_text = back.groupby("passage").first()
    assert by_text["n"].tolist() == [2**53 + 1, 2**63 - 1, -(2**63)]
    assert by_text["mixed"].tolist() == [1, 0.5, 2]
    assert [None if pd.isna(v) else v for v in back.drop_duplicates("passage")["flag"]] == [True, False, None]
    assert [None if pd.isna(v) else v for v in back.drop_duplicates("passage")["kind"]] == ["NA", "null", None]
    assert back["day"].iloc[0] == "2024-05-01T00:00:00"


def test_numpy_scalars_in_a_saved_capture(llama, tmp_path):
    tokens = random_tokens(2, 5)
    with torch.no_grad():
        _, cache = llama.run_with_cache(tokens)
    labels = [{"dose": np.int64(4), "memorized": np.bool_(True)}, {"dose": torch.tensor(2), "memorized": pd.NA}]
    capture = bl.Capture.from_cache(llama, tokens, cache, labels=labels, docs=[np.int64(1), "001"])
    capture.save(tmp_path / "capture")
    back = bl.Capture.load(tmp_path / "capture")
    assert back.labels == [{"dose": 4, "memorized": True}, {"dose": 2, "memorized": None}]
    assert back.docs == ["1", "001"]


def test_a_column_added_by_hand_that_parquet_cannot_hold(llama, capture, tmp_path):
    table = bl.analyze(llama, capture, [StateNorm()], layers=[0], progress=False)
    for values in ([1, "unknown"], ["\ud800", "x"], [2**70, 1]):
        table["mine"] = pd.Series([values[i % 2] for i in range(len(table))], dtype=object)
        with pytest.raises(TableError, match="columns of one kind"):
            tables.save(table, tmp_path / "table.parquet")
    assert not list(tmp_path.iterdir())


def test_csv_comes_back_as_it_was(tmp_path):
    tokens = ["\r", "\n", "\r\n", "null", "NA", "None", "nan", "", '"', ",", " ", "1", "001", "é", "\u2028", "True"]
    numbers = np.linspace(0, 1, len(tokens))
    numbers[3] = np.nan
    table = pd.DataFrame({"token": tokens, "span": [""] * len(tokens), "n": range(len(tokens)), "score": numbers})
    tables.save_csv(table, tmp_path / "table.csv")
    back = pd.read_csv(tmp_path / "table.csv", keep_default_na=False, na_values={"score": [""]})
    assert back["token"].tolist() == tokens
    assert back["span"].tolist() == table["span"].tolist()
    np.testing.assert_array_equal(back["score"], numbers)
    assert back["n"].dtype == np.int64


def test_queries_by_a_label_of_text_are_refused(llama):
    data = [bl.Passage(text, labels={"memorized": str(i == 0)}) for i, text in enumerate(TEXTS)]
    with pytest.raises(NeighborError, match=r"label of True and False.*text such as 'True'"):
        bl.analyze(llama, data, [StateNorm()], queries="memorized", progress=False)


# -- whole numbers ----------------------------------------------------------------------------------------------------

WHOLE = [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)]


@pytest.mark.parametrize("value", WHOLE)
def test_whole_numbers(value):
    assert whole_or_none(value) == 3 and type(whole_or_none(value)) is int
    assert whole(value, "seed", least=3) == 3
    with pytest.raises(BasinLensError, match="seed of at least 4, got"):
        whole(value, "seed", least=4)


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.bool_(True),
        torch.tensor(True),
        3.0,
        np.float64(3),
        torch.tensor(3.0),
        "3",
        None,
        [3],
        np.array([3]),
        torch.tensor([3]),
    ],
)
def test_what_is_no_whole_number(value):
    assert whole_or_none(value) is None
    with pytest.raises(StudyError, match="seed as a whole number, got"):
        whole(value, "seed", error=StudyError)


@pytest.mark.slow
def test_analyze_takes_whole_numbers_of_any_kind(llama, tmp_path):
    """The same table, with the same name and provenance, as with ints."""

    def run(three, five):
        analyzers = [
            Contraction(k=five), Compression(k=five, group=three, queries=five),
            LocalDimension(k=five, curve=(three, five)), JacobianGain(k=five, directions=three, queries=three, seed=three),
            Erasure(positions=three, seed=three), IntegratedGradients(steps=three, layer=1), GradientNorm(target=three), Surprisal(),
            AttentionReceived(per_head=(three - 1,)),
        ]  # fmt: skip
        return bl.analyze(
            llama, TEXTS[:4], analyzers, layers=[three - 2], queries=five, seed=three, max_length=five * 4, batch_size=three, progress=False,
        )  # fmt: skip

    wanted, found = run(3, 5), run(np.int64(3), torch.tensor(5))
    pd.testing.assert_frame_equal(found, wanted)
    said = [{r: {**facts, "made": None} for r, facts in each.attrs["provenance"].items()} for each in (found, wanted)]
    assert json.dumps(said[0], sort_keys=True) == json.dumps(said[1], sort_keys=True)
    tables.save(found, tmp_path / "table.parquet")


def test_other_doors_take_whole_numbers_of_any_kind(llama, capture):
    value, two = np.int64(3), torch.tensor(2)
    found = bl.neighborhood(llama, capture, two, two, value, k=value)
    pd.testing.assert_frame_equal(found, bl.neighborhood(llama, capture, 2, 2, 3, k=3))
    assert torch.equal(capture.resid_pre(two), capture.resid_pre(2))
    table = bl.analyze(llama, capture, [StateNorm(), Surprisal()], progress=False)
    assert len(tables.at_layer(table, two)) == capture.n_rows
    pair = ["state_norm", "surprisal"]
    by = [bl.stats.within_sequence_correlation(table, *pair, layers=n, n_resamples=99, seed=n) for n in (two, 2)]
    pd.testing.assert_frame_equal(*by)
    shuffled = [bl.controls.shuffled_tokens(llama, capture, block=n, seed=n) for n in (value, 3)]
    assert torch.equal(shuffled[0].row_token, shuffled[1].row_token)
    windows = bl.merging.windows_of(llama, TEXTS, value + 5, most=value)
    assert tuple(windows.tokens.shape) == (3, 8)
    merger = bl.merging.TokenMerger([two - 1, two], threshold=0.5, recent=value, seed=value)
    assert repr(merger.options) == repr(bl.merging.TokenMerger([1, 2], threshold=0.5, recent=3, seed=3).options)
    assert repr(bl.memorize.Recipe(batch_size=value + 5, filler=two)) == repr(bl.memorize.Recipe(batch_size=8, filler=2))


@pytest.mark.parametrize(
    ("error", "door"),
    [
        (NeighborError, lambda m, c: bl.analyze(m, c, [Compression(k=True)], progress=False)),
        (NeighborError, lambda m, c: bl.analyze(m, c, [Compression(k=5, blocks=True)], progress=False)),
        (NeighborError, lambda m, c: bl.analyze(m, c, [LocalDimension(k=5, curve=(True, 5))], progress=False)),
        (CaptureError, lambda m, c: bl.analyze(m, c, [Erasure(positions=True)], progress=False)),
        (CaptureError, lambda m, c: bl.analyze(m, c, [GradientNorm(target=True)], progress=False)),
        (CaptureError, lambda m, c: bl.analyze(m, c, [IntegratedGradients(layer=True)], progress=False)),
        (CaptureError, lambda m, c: bl.analyze(m, c, [StateNorm()], layers=[True], progress=False)),
        (BasinLensError, lambda m, c: bl.analyze(m, c, [StateNorm()], layers=[1], seed=True, progress=False)),
        (TextError, lambda m, _: bl.Capture.plan(m, TEXTS, max_length=True)),
        (CaptureError, lambda m, _: bl.Capture.from_texts(m, TEXTS, batch_size=True, progress=False)),
        (CaptureError, lambda m, c: bl.neighborhood(m, c, True, 0, 3, k=5)),
        (CaptureError, lambda _, c: c.resid_pre(True)),
        (
            TableError,
            lambda m, c: bl.stats.mean_interval(bl.analyze(m, c, [StateNorm()], progress=False), "state_norm", "layer", seed=True),
        ),
        (MergeError, lambda *_: bl.merging.TokenMerger([1], threshold=0.5, recent=True)),
        (MergeError, lambda *_: bl.merging.TokenMerger([True], threshold=0.5)),
        (StudyError, lambda *_: bl.memorize.Recipe(batch_size=True)),
        (StudyError, lambda m, _: bl.studies.measure(m, TEXTS, k=True)),
    ],
)
def test_truth_values_are_no_whole_numbers(llama, capture, error, door):
    with pytest.raises(error, match=r"expected .*True"):
        door(llama, capture)


class Kind(str, enum.Enum):  # noqa: UP042 - StrEnum says its text anyway
    """What people name their conditions with."""

    PLAIN = "plain"


def test_text_that_is_also_a_name_is_the_text():
    passage = bl.Passage(Kind.PLAIN, doc=Kind.PLAIN, labels={"kind": Kind.PLAIN})
    assert (passage.text, passage.doc, passage.labels) == ("plain", "plain", {"kind": "plain"})


@pytest.mark.parametrize("spans", [{"x": 3}, {"x": (0, 1, 2)}, {"x": "ab"}, {"x": (0,)}, {"x": None}], ids=str)
def test_spans_that_are_none(spans):
    with pytest.raises(TextError, match=r"expected a span as a name with \(start, end\), got 'x'"):
        bl.Passage("Paris.", spans=spans)


def test_positions_to_score(llama, capture):
    for queries, said in (([3, -1], "positions from 0 on, got -1"), ([[1], [2, 3]], "positions, a boolean mask")):
        with pytest.raises(NeighborError, match=said):
            bl.analyze(llama, capture, [StateNorm()], queries=queries, progress=False)


def test_a_seed_of_any_size(llama, capture):
    """Such as time.time_ns()."""
    for seed in (1_764_402_193_000_000_000, 2**64):
        table = bl.analyze(llama, capture, [Contraction(k=3)], layers=[0], queries=5, seed=seed, controls=True, progress=False)
        assert table.contraction_random.notna().sum() == 5
        table = bl.analyze(llama, capture, [Compression(k=4, queries=40)], layers=[0], seed=seed, progress=False)
        assert table.compression_above_random_sets.notna().any()


@pytest.mark.slow
def test_tokens_of_a_capture_by_whole_numbers():
    """As users have it, without the checks of types that tests run with."""
    code = """if True:
        from basin_lens.capture.layout import TokenRows
        from basin_lens.errors import CaptureError
        from basin_lens.texts import TokenSequence
        rows = TokenRows([TokenSequence((1, 2), 0, (-1, -1), (-1, -1))], None, ["a"], [{}], {1: "a", 2: "b"})
        for pos in (1.0, "1", None):
            try:
                rows.row_of(0, pos)
            except CaptureError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("expected pos as a whole number") == 3
