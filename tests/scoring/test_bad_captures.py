"""Captures and caches that are refused, in memory and on disk."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import tables
from basin_lens.analyzers import Compression, Contraction, StateNorm
from basin_lens.errors import (
    CaptureError,
    NeighborError,
    StoreError,
    TableError,
    TransportError,
)
from tests.conftest import TEXTS, hooked_lane, make_bridge, make_hooked, random_tokens
from tests.scoring.bad import files_below, refusing

# -- captures and caches ---------------------------------------------------------------------------------------------------------------


def test_cache_without_states(llama):
    tokens = random_tokens(2, 6)
    _, cache = llama.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    with refusing(CaptureError, r"missing: blocks\.0\.hook_resid_pre, blocks\.1\.hook_resid_pre.*names_filter", llama):
        bl.Capture.from_cache(llama, tokens, cache)


def test_cache_with_one_border_only(llama):
    """One state is no step through a block: the other end is named."""
    tokens = random_tokens(2, 6)
    _, cache = llama.run_with_cache(tokens, names_filter="blocks.0.hook_resid_pre")
    with refusing(CaptureError, r"missing: blocks\.1\.hook_resid_pre.*blocks\.2\.hook_resid_post", llama):
        bl.Capture.from_cache(llama, tokens, cache)


def test_empty_cache(llama):
    with refusing(CaptureError, r"blocks\.0\.hook_resid_pre", llama):
        bl.Capture.from_cache(llama, random_tokens(2, 6), {})


@pytest.mark.parametrize("shape", [(2, 5), (3, 6), (1, 6)])
def test_cache_of_other_tokens(llama, shape):
    _, cache = llama.run_with_cache(random_tokens(*shape))
    with refusing(CaptureError, r"of shape \(2, 6, 32\).*Are tokens, cache and model of the same run", llama):
        bl.Capture.from_cache(llama, random_tokens(2, 6), cache)


def test_cache_of_a_model_of_another_width(llama):
    tokens = random_tokens(2, 6)
    _, cache = make_bridge("llama", hidden_size=16).run_with_cache(tokens)
    with refusing(CaptureError, r"of shape \(2, 6, 32\) \(batch, pos, d_model\), got \(2, 6, 16\)", llama):
        bl.Capture.from_cache(llama, tokens, cache)


@pytest.mark.parametrize("score", [Compression(k=5), Contraction(k=5, context="native")], ids=["patched", "native"])
def test_cache_of_another_model_of_the_same_shape(llama, other, score):
    """The states look right; the block itself shows that they are not its own."""
    tokens = random_tokens(6, 14)
    _, cache = other.run_with_cache(tokens)
    capture = bl.Capture.from_cache(llama, tokens, cache)
    with refusing(TransportError, "Is this capture .* from the same model"):
        bl.analyze(llama, capture, [score], progress=False)


@hooked_lane
def test_cache_of_another_hooked_transformer():
    tokens = random_tokens(6, 14)
    model = make_hooked()
    _, cache = make_hooked(seed=3).run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, cache)
    with refusing(TransportError, "Is this capture .* from the same model"):
        bl.analyze(model, capture, [Compression(k=5)], progress=False)


def test_capture_of_another_model(llama, other, capture):
    with refusing(CaptureError, "the model that made this capture.*capture again with this model", llama, other):
        bl.analyze(other, capture, progress=False)


def test_neighborhood_with_another_model(other, capture):
    with refusing(CaptureError, "capture again with this model", other):
        bl.neighborhood(other, capture, layer=1, seq=0, pos=3, k=5)


@pytest.mark.parametrize(("seq", "pos"), [(99, 1), (0, 999), (-1, 1)])
def test_neighborhood_of_no_token(llama, capture, seq, pos):
    with refusing(CaptureError, f"got seq={seq}, pos={pos}", llama):
        bl.neighborhood(llama, capture, layer=1, seq=seq, pos=pos, k=5)


def test_neighborhood_of_position_0(llama, capture):
    with refusing(NeighborError, "position from 1 on, got 0", llama):
        bl.neighborhood(llama, capture, layer=1, seq=0, pos=0, k=5)


@pytest.mark.parametrize("layers", [[3], [-4], [0, 99], []])
def test_unknown_layer(llama, layers):
    with refusing(CaptureError, r"layers between 0 and 2", llama):
        bl.analyze(llama, TEXTS, layers=layers, progress=False)


def test_layer_that_the_capture_lacks(llama):
    some = bl.Capture.from_texts(llama, TEXTS, layers=[0], progress=False)
    with refusing(CaptureError, r"layers of the capture \[0\], got \[2\].*Capture again with layers", llama):
        bl.analyze(llama, some, layers=[0, 2], progress=False)


def test_neighborhood_at_a_layer_that_the_capture_lacks(llama):
    some = bl.Capture.from_texts(llama, TEXTS, layers=[0], progress=False)
    with refusing(CaptureError, r"\[0\].*Capture again with layers", llama):
        bl.neighborhood(llama, some, layer=2, seq=0, pos=3, k=5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_no_numbers(tokenizer, tmp_path, value):
    """One bad weight in block 1: the first bad border is named, and no file is left."""
    model = make_bridge("llama", tokenizer=tokenizer)
    with torch.no_grad():
        model.original_model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    where = ".*before block 2, first in sequence \\d, position 0"
    with refusing(CaptureError, rf"NaN or infinity in \d+ of \d+ tokens{where}"):
        bl.Capture.from_texts(model, TEXTS, store=tmp_path / "store", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_cache_with_nan(llama):
    tokens = random_tokens(2, 6)
    _, cache = llama.run_with_cache(tokens)
    cache["blocks.1.hook_resid_pre"][1, 4, 7] = torch.nan
    cache["blocks.0.hook_resid_post"][1, 4, 7] = torch.nan
    with refusing(CaptureError, r"in 1 of 12 tokens.*before block 1, first in sequence 1, position 4", llama):
        bl.Capture.from_cache(llama, tokens, cache)


# -- disk ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(llama, capture):
    return bl.analyze(llama, capture, [StateNorm()], layers=[0], progress=False)


@pytest.fixture(params=["below a file", "below /proc"])
def unwritable(request, tmp_path) -> Path:
    """A place where nobody can write, root included."""
    if request.param == "below /proc":
        return Path("/proc/basin_lens_test/out")
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "out"


def test_store_that_cannot_be_written(llama, unwritable):
    with refusing(StoreError, "folder that can be written", llama):
        bl.Capture.from_texts(llama, TEXTS, store=unwritable, progress=False)


def test_save_that_cannot_be_written(capture, unwritable):
    with refusing(StoreError, "folder that can be written"):
        capture.save(unwritable)


def test_store_that_exists(llama, tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with refusing(StoreError, "a new folder.*which exists.*another name or delete it", llama):
        bl.Capture.from_texts(llama, TEXTS, store=tmp_path, progress=False)
    assert files_below(tmp_path) == ["notes.txt"]


def test_store_that_appears_meanwhile(llama, tmp_path):
    """Another process made the folder during our pass: theirs stays whole, ours goes."""

    def another_process(*_):
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / "store" / "theirs").write_text("keep")

    handle = llama.blocks[2].register_forward_pre_hook(another_process)
    try:
        with refusing(StoreError, "new folder.*(exists|appeared)"):
            bl.Capture.from_texts(llama, TEXTS[:2], store=tmp_path / "store", progress=False)
    finally:
        handle.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert files_below(tmp_path) == ["store/theirs"]


@contextmanager
def full_disk(size: int = 4096):
    """No file can grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_capture_on_a_full_disk(capture, tmp_path):
    with refusing(StoreError, "writ"), full_disk():
        capture.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_store_on_a_full_disk(llama, tmp_path):
    with pytest.raises(StoreError, match=r"writ"), full_disk():
        bl.Capture.from_texts(llama, TEXTS, store=tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_table_on_a_full_disk(table, tmp_path):
    """The table that was there stays as it was."""
    tables.save(table, tmp_path / "table.parquet")
    before = (tmp_path / "table.parquet").read_bytes()
    with refusing(StoreError, "writ"), full_disk():
        tables.save(tables.concat([table] * 3), tmp_path / "table.parquet")
    assert (tmp_path / "table.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


def test_reference_bank_that_cannot_be_written(llama, capture, monkeypatch, unwritable):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(unwritable))
    with refusing(StoreError, "writable cache folder.*BASIN_LENS_CACHE", llama):
        bl.analyze(llama, capture, [Compression(k=5)], bank="reference", progress=False)


def test_table_that_cannot_be_written(table, unwritable):
    with refusing(StoreError, "place that can be written"):
        tables.save(table, unwritable.with_suffix(".parquet"))


def test_table_in_a_missing_folder(table, tmp_path):
    with refusing(StoreError, "place that can be written"):
        tables.save(table, tmp_path / "nowhere" / "table.parquet")
    assert list(tmp_path.iterdir()) == []


def test_table_where_a_folder_is(table, tmp_path):
    (tmp_path / "table.parquet").mkdir()
    with refusing(StoreError, "place that can be written"):
        tables.save(table, tmp_path / "table.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


def test_table_with_another_suffix(table, tmp_path):
    with refusing(StoreError, r"\.parquet, got 'table\.csv'"):
        tables.save(table, tmp_path / "table.csv")
    assert list(tmp_path.iterdir()) == []


def test_table_without_provenance(tmp_path):
    with refusing(TableError, r"table with provenance.*basin_lens\.tables"):
        tables.save(pd.DataFrame({"layer": [0]}), tmp_path / "table.parquet")
    assert list(tmp_path.iterdir()) == []


def test_loading_a_table_that_is_none(tmp_path):
    (tmp_path / "fake.parquet").write_text("no table")
    for name in ("fake.parquet", "nowhere.parquet"):
        with refusing(StoreError, rf"table saved by basin_lens at '.*{name}'"):
            tables.load(tmp_path / name)
