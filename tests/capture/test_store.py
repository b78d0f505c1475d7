"""Captures on disk, and the reference bank."""

from contextlib import contextmanager

import pytest
import torch

import basin_lens as bl
from basin_lens.capture import fill_columns, read_states, reference_capture, subset
from basin_lens.errors import StoreError
from basin_lens.texts import TaggedPassage, Word, reference_passages
from tests.capture.readers import (
    BrokenError,
    assert_checked_only,
    assert_columns,
    assert_same,
    counting,
    own_states,
    token_analyzers,
)
from tests.conftest import TEXTS, make_bridge, random_tokens


def assert_same_capture(got: bl.Capture, expected: bl.Capture) -> None:
    for name in ("sequences", "passages", "docs", "labels", "layers", "model", "strings", "settings"):
        assert getattr(got, name) == getattr(expected, name)
    for layer in expected.layers:
        assert torch.equal(got.resid_pre(layer), expected.resid_pre(layer))
        assert torch.equal(got.resid_post(layer), expected.resid_post(layer))
    assert got.columns.keys() == expected.columns.keys()
    for key, columns in expected.columns.items():
        assert got.columns[key].keys() == columns.keys()
        for name, values in columns.items():
            assert torch.equal(got.columns[key][name].nan_to_num(-1), values.nan_to_num(-1))


@contextmanager
def breaking(model, at_pass: int, error: type[BaseException] = BrokenError):
    """The last block raises at the given pass, counted from 1."""
    count = [0]

    def fail(*_):
        count[0] += 1
        if count[0] == at_pass:
            raise error("on purpose")

    handle = model.blocks[-1].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


# -- disk ------------------------------------------------------------------------------------------------------------------------------


PASSAGES = [
    bl.Passage(TEXTS[0], doc="ferry", labels={"memorized": True, "group": "a"}, spans={"what": (4, 9)}),
    bl.Passage(TEXTS[1] + " 👩‍👩‍👧 \r\n\x00 </script>", labels={"memorized": False}),
    bl.Passage("short one"),
]


def test_save_and_load(reader, tmp_path):
    capture = bl.Capture.from_texts(reader, PASSAGES, layers=[0, 2], analyzers=token_analyzers(), progress=False)
    capture.save(tmp_path / "one")
    loaded = bl.Capture.load(tmp_path / "one")
    assert_same_capture(loaded, capture)
    assert loaded.row_strings() == capture.row_strings()
    loaded.save(tmp_path / "two")
    assert_same_capture(bl.Capture.load(tmp_path / "two"), capture)
    loaded.check_model_is(reader)


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_store_equals_memory(reader, tmp_path, batch_size):
    capture = bl.Capture.from_texts(reader, PASSAGES, analyzers=token_analyzers(), batch_size=batch_size, progress=False)
    stored = bl.Capture.from_texts(
        reader, PASSAGES, analyzers=token_analyzers(), batch_size=batch_size, store=tmp_path / "deep" / "store", progress=False
    )
    assert_same_capture(stored, capture)
    assert_same_capture(bl.Capture.load(tmp_path / "deep" / "store"), capture)


def test_save_and_load_keep_words(llama, tmp_path):
    words = (Word(0, 3, "The", "DET"), Word(4, 9, "ferry", "NOUN"), Word(10, 17, "stopped", "VERB"))
    passages = [
        TaggedPassage("The ferry stopped in October.", doc="a", labels={"n": 1}, spans={"what": (4, 9)}, words=words),
        TaggedPassage("No words are known of this one."),
        bl.Passage(TEXTS[1]),
    ]
    capture = bl.Capture.from_texts(llama, passages, progress=False)
    capture.save(tmp_path / "one")
    loaded = bl.Capture.load(tmp_path / "one")
    assert_same_capture(loaded, capture)
    assert [type(passage) for passage in loaded.passages] == [TaggedPassage, TaggedPassage, bl.Passage]
    assert loaded.passages[0].words == words
    stored = bl.Capture.from_texts(llama, passages, store=tmp_path / "two", progress=False)
    assert_same_capture(stored, capture)
    assert_same_capture(bl.Capture.load(tmp_path / "two"), capture)


def test_some_of_what_is_planned(llama):
    """Sequences chosen before anything is read: still unread, then the same as chosen after."""
    data = [" ".join(TEXTS)] * 2
    planned = bl.Capture.plan(llama, data, layers=[0, 2], max_length=20)
    chosen = [3, 0, 5]
    with counting(llama) as seen:
        part = subset(planned, chosen)
        assert not part.is_read and not planned.is_read
        assert [part.sequences[i].tokens for i in range(3)] == [planned.sequences[i].tokens for i in chosen]
    assert seen == []
    read_states(llama, part, progress=False)
    assert part.is_read and not planned.is_read
    whole = bl.Capture.from_texts(llama, data, layers=[0, 2], max_length=20, progress=False)
    direct = subset(whole, chosen)
    for name in ("sequences", "passages", "docs", "labels", "layers", "model", "strings"):
        assert getattr(part, name) == getattr(direct, name)
    for layer in (0, 2):
        assert_same(part.resid_pre(layer), direct.resid_pre(layer))
        assert_same(part.resid_post(layer), direct.resid_post(layer))


def test_store_is_on_disk(llama, tmp_path):
    """The states are in the folder, one file per batch, and not in memory."""
    stored = bl.Capture.from_texts(llama, TEXTS, batch_size=2, store=tmp_path / "store", progress=False)
    files = list((tmp_path / "store").glob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) >= 4 * stored.n_rows * 32 * 4
    stored.save(tmp_path / "copy")
    for file in files:
        file.unlink()
    with pytest.raises(StoreError, match="without its file states-00000"):
        stored.resid_pre(0)
    assert bool(bl.Capture.load(tmp_path / "copy").resid_pre(0).isfinite().all())


def test_measuring_later_leaves_the_store_alone(llama, tmp_path):
    """A pass for analyzers only writes no states again."""
    stored = bl.Capture.from_texts(llama, TEXTS, batch_size=2, store=tmp_path / "store", progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    fill_columns(llama, stored, token_analyzers(), progress=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    assert_columns(stored, bl.Capture.from_texts(llama, TEXTS, analyzers=token_analyzers(), progress=False))


def test_loaded_readings_need_no_pass(tmp_path):
    model, tokens = make_bridge("llama"), random_tokens(3, 9)
    _, cache = model.run_with_cache(tokens)
    bl.Capture.from_cache(model, tokens, cache).save(tmp_path / "one")
    loaded = bl.Capture.load(tmp_path / "one")
    analyzers = [bl.analyzers.Surprisal(), bl.analyzers.AttentionReceived()]
    with counting(model) as seen:
        assert fill_columns(model, loaded, analyzers, progress=False) == []
    assert_checked_only(seen, tokens)
    assert_columns(loaded, bl.Capture.from_texts(model, tokens, analyzers=analyzers, progress=False))


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize("at_pass", [1, 3])
def test_interrupted_store_leaves_nothing(llama, tmp_path, at_pass, error):
    with pytest.raises(error), breaking(llama, at_pass, error):
        bl.Capture.from_texts(llama, TEXTS, batch_size=1, store=tmp_path / "store", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_cannot_be_written_leave_nothing(llama, tmp_path):
    capture = bl.Capture.from_texts(llama, TEXTS[:1], progress=False)
    capture.labels = [{"what": object()}]
    with pytest.raises(StoreError, match="labels that JSON can hold"):
        capture.save(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_saving_never_overwrites(capture, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(StoreError, match="which exists"):
        capture.save(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("content", [None, "{}", "no json", '{"format": 99}'])
def test_loading_something_else(tmp_path, content):
    if content is not None:
        (tmp_path / "capture.json").write_text(content)
    with pytest.raises(StoreError, match="expected"):
        bl.Capture.load(tmp_path)


def test_a_loaded_capture_can_be_analyzed(llama, capture, tmp_path):
    capture.save(tmp_path / "one")
    analyzers = [bl.analyzers.Compression(k=5)]
    captures = bl.Capture.load(tmp_path / "one"), capture
    got, expected = (bl.analyze(llama, c, analyzers, layers=[1], progress=False) for c in captures)
    assert got.compression.notna().any()
    assert got.compression.equals(expected.compression)


# -- the reference bank ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def few_passages(monkeypatch):
    """What is kept of the bank, and when, is the same for twelve passages as for all."""
    monkeypatch.setattr("basin_lens.capture.reference.reference_passages", lambda: reference_passages()[:12])


def test_reference_is_made_once(reader, folder):
    first = reference_capture(reader, progress=False)
    with counting(reader) as seen:
        second = reference_capture(reader, progress=False)
    assert seen == []
    assert len(list(folder.iterdir())) == 1
    assert_same_capture(second, first)
    assert second.passages == list(reference_passages())


@pytest.mark.slow
def test_reference_holds_the_models_states(llama, folder):  # noqa: ARG001 - sets the cache folder
    bank = reference_capture(llama, progress=False)
    sequences = [s.tokens for s in bank.sequences]
    expected = own_states(llama, sequences[:3])
    rows = sum(map(len, sequences[:3]))
    assert_same(bank.resid_pre(1)[:rows], expected[1])


@pytest.mark.usefixtures("few_passages")
def test_the_slower_of_two_that_make_the_reference_takes_the_others(llama, folder, monkeypatch):
    real, made = bl.Capture.from_texts, []

    def twice(*given, **options):
        made.append(real(*given, **options))
        return real(*given, **options)

    monkeypatch.setattr(bl.Capture, "from_texts", twice)
    assert_same_capture(reference_capture(llama, progress=False), made[0])
    assert len(list(folder.iterdir())) == 1


@pytest.mark.usefixtures("few_passages")
def test_another_model_has_another_reference(llama, tokenizer, folder):
    reference_capture(llama, progress=False)
    other = make_bridge("llama", seed=5, tokenizer=tokenizer)
    bank = reference_capture(other, progress=False)
    assert len(list(folder.iterdir())) == 2
    bank.check_model_is(other)


@pytest.mark.usefixtures("few_passages")
def test_reference_with_and_without_bos_are_two(llama, folder):
    banks = [reference_capture(llama, prepend_bos=bos, progress=False) for bos in (True, False)]
    assert len(list(folder.iterdir())) == 2
    assert [bank.sequences[0].tokens[0] == llama.tokenizer.bos_token_id for bank in banks] == [True, False]


@pytest.mark.usefixtures("few_passages")
def test_interrupted_reference_leaves_nothing(llama, folder):
    with pytest.raises(BrokenError), breaking(llama, 2):
        reference_capture(llama, progress=False)
    assert list(folder.iterdir()) == []
    assert reference_capture(llama, progress=False).n_rows > 0
