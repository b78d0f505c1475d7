"""Loading: a checkpoint that is not whole is refused by name, what can be served is served, and nothing is asked or made up."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import ModelError, TextError
from basin_lens.model import places
from basin_lens.model.state_dicts import Found
from tests.conftest import TEXTS, hooked_lane, make_hf, make_tokenizer, random_tokens
from tests.model.checkpoints import WEIGHTS, logits_of, refused, renamed, rewrite, saved, settings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed(lambda n: "_orig_mod." + n), r"'_orig_mod\.', which torch\.compile puts there.*name\.replace"),
        (renamed(lambda n: "module." + n), r"'module\.', which DataParallel"),
        (renamed(lambda n: n.replace(".layers.1.", ".layers.1._orig_mod.")), r"'_orig_mod\.', which torch\.compile"),
        (renamed(lambda n: "net." + n), r"prefix 'net\.': rename the weights with name\.removeprefix"),
        (renamed(lambda n: "wrapped.inner." + n), r"prefix 'wrapped\.inner\.'"),
    ],
    ids=["compiled", "parallel", "one block compiled", "one", "two"],
)
def test_names_with_a_prefix_are_refused_and_the_prefix_named(folder, change, said):
    """Such weights were dropped without a word, and others made up: another model at each load."""
    rewrite(folder, change)
    message = refused(said, folder)
    assert re.search(r"without (lm_head|model\.layers\.1)\.", message) and str(folder) in message


def test_a_prefix_that_transformers_takes_off_itself_is_served(folder):
    before = door.fingerprint(bl.load_model(folder))
    rewrite(folder, renamed(lambda name: "model." + name))
    assert door.fingerprint(bl.load_model(folder)) == before


def test_missing_weights_are_named(folder):
    gone = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    rewrite(folder, lambda held: {name: value for name, value in held.items() if name not in gone})
    refused(f"without {gone[0]}, {gone[1]}[.]", folder)


def test_weights_of_another_shape_are_named_with_both_shapes(folder):
    name = "model.layers.2.mlp.down_proj.weight"
    rewrite(folder, lambda held: held | {name: held[name][:, :48]})
    refused(rf"{name} of shape \[32, 48\] for \[32, 64\]", folder)


def test_settings_of_another_size_are_refused(folder):
    settings(folder, intermediate_size=48)
    refused(r"of shape \[.*\] for \[.*\] and \d more", folder)


def test_weights_without_a_place_are_noted_in_provenance(folder):
    plain = door.fingerprint(bl.load_model(folder))
    rewrite(folder, lambda held: held | {"model.layers.7.extra.weight": torch.ones(2, 2), "value_head.bias": torch.ones(1)})
    model = bl.load_model(folder)
    assert door.fingerprint(model) == plain
    assert door.provenance(model)["unused_weights"] == ["model.layers.7.extra.weight", "value_head.bias"]
    assert door.provenance(door.copy_of(model))["unused_weights"] == door.provenance(model)["unused_weights"]
    table = bl.analyze(model, random_tokens(4, 8), [bl.analyzers.StateNorm()], progress=False)
    (facts,) = table.attrs["provenance"].values()
    assert facts["model"]["unused_weights"][1] == "value_head.bias"


def test_provenance_of_a_whole_checkpoint_says_nothing_of_it_and_names_few_of_many(whole, folder):
    assert "unused_weights" not in door.provenance(bl.load_model(whole))
    rewrite(folder, lambda held: held | {f"extra.{i:02}": torch.ones(1) for i in range(30)})
    listed = door.provenance(bl.load_model(folder))["unused_weights"]
    assert (len(listed), listed[-1]) == (21, "and 10 more")


def test_an_output_layer_that_is_the_embedding_need_not_be_there(tmp_path):
    weights = saved(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(bl.load_model(tmp_path), tokens), weights(tokens).logits)
    settings(tmp_path, tie_word_embeddings=False)
    refused(r"without lm_head\.weight.*tie_word_embeddings", tmp_path)


def test_a_classifier_is_no_language_model(tmp_path):
    from transformers import LlamaForSequenceClassification

    config = make_hf("llama").config
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    refused(r"without lm_head\.weight, but with others: score\.weight", tmp_path)


def sharded(folder: Path) -> list[Path]:
    make_hf("llama", vocab_size=len(make_tokenizer())).save_pretrained(folder, max_shard_size="40KB")
    (folder / WEIGHTS).unlink()
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


def test_shards_load_and_a_missing_one_is_named(folder):
    whole = door.fingerprint(bl.load_model(folder))
    shards = sharded(folder)
    assert door.fingerprint(bl.load_model(folder)) == whole
    shards[1].unlink()
    refused(shards[1].name, folder)


def test_a_shard_without_what_the_index_promises_is_refused(folder):
    shard = sharded(folder)[1]
    held = load_file(shard)
    name = sorted(held)[0]
    save_file({n: v for n, v in held.items() if n != name} or {"x": torch.ones(1)}, shard, metadata={"format": "pt"})
    refused(re.escape(name), folder)


@pytest.mark.parametrize("size", [0, 7, 300, -1])
def test_truncated_weights_are_refused(folder, size):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    refused("Check the file", folder)


def test_the_words_for_what_does_not_fit():
    assert Found().misfit() is None and Found(unexpected=frozenset({"a"})).misfit() is None
    long = Found(missing=frozenset(f"w.{i}" for i in range(9)))
    assert "w.0, w.1, w.2, w.3 and 5 more" in long.misfit()
    lacking = Found(missing=frozenset({"model.a.w", "model.b.w"}), unexpected=frozenset({"a.w", "b.w"}))
    assert "lack the prefix 'model.'" in lacking.misfit()


# -- without a tokenizer ----------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_a_folder_without_a_tokenizer_serves_token_ids(tmp_path, name):
    weights = make_hf(name)
    weights.save_pretrained(tmp_path)
    model, tokens = bl.load_model(tmp_path), random_tokens(6, 14)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, tokens), weights(tokens).logits)
    table = bl.analyze(model, tokens, [bl.analyzers.Contraction(k=5)], progress=False)
    assert table.contraction[table.pos > 0].notna().all()
    with pytest.raises(TextError, match=r"fast tokenizer.*got none\. Pass token ids"):
        bl.analyze(model, TEXTS, progress=False)
    with pytest.raises(ModelError, match=r"fast tokenizer.*Set model\.tokenizer"):
        bl.codec.TextCodec(model)


def test_a_damaged_tokenizer_is_not_taken_for_none(folder):
    (folder / "tokenizer.json").write_text("{")
    refused("expected a tokenizer.*work with token ids", folder)


# -- devices, formats, names ------------------------------------------------------------------------------------------------------

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "name of a device, got 'gpu'.*\"cuda\""),
        ("meta", 'got "meta"'),
        (torch.device("meta"), 'got "meta"'),
        ("", "name of a device, got ''"),
        pytest.param("cuda", "device of this machine, got 'cuda'", marks=no_cuda),
        pytest.param("cuda:99", "device of this machine, got 'cuda:99'"),
    ],
    ids=str,
)
def test_devices_that_are_none_are_refused(whole, device, said):
    refused(said, whole, device=device)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (True, "name of a device, got True"),
        (-1, "name of a device, got -1"),
        (1.5, "name of a device, got 1.5"),
        (b"cpu", "name of a device"),
        pytest.param(0, "device of this machine, got 'cuda:0'", marks=no_cuda),
        pytest.param(np.int64(0), "device of this machine, got 'cuda:0'", marks=no_cuda),
    ],
    ids=str,
)
def test_a_number_is_a_cuda_device_and_never_the_cpu(device, said):
    """0 was taken for none given."""
    with pytest.raises(ModelError, match=said):
        places.chosen_device(device)


def test_devices_that_are_there():
    assert places.chosen_device("cpu") == places.chosen_device(torch.device("cpu")) == torch.device("cpu")
    assert places.chosen_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, "float32", np.float32, None, 32])
def test_formats_that_are_none_are_refused(dtype):
    with pytest.raises(ModelError, match=r"expected dtype torch\.float32, torch\.bfloat16, .*got"):
        places.chosen_dtype(dtype)


@pytest.mark.parametrize("name", [None, 3, b"gpt2", "", ["gpt2"]])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(ModelError, match="name of a model or a path, got"):
        places.chosen_name(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smolm2-135m", "'smollm2-135m'"),
        ("pythia160m", "'pythia-160m'"),
        ("gtp2", "'gpt2'"),
        ("eleutherai/pythia-70", "/pythia-70m'"),
    ],
)
def test_a_name_with_a_typing_error_is_answered_with_what_is_near(name, meant):
    assert meant in refused("Did you mean", name)


def test_a_right_name_is_not_corrected():
    assert "Did you mean" not in refused("network", "gpt2")
    assert "Did you mean" not in refused("network", "nobody/entirely-unlike-anything-8fe1")


# -- what TransformerLens loads by itself -------------------------------------------------------------------------------------------


@pytest.fixture
def by_name(folder, monkeypatch):
    """A folder that load_model takes for a name, so that TransformerLens reads it as it reads a hub's."""
    monkeypatch.setattr("basin_lens.model.loading.is_place", lambda _: False)
    return folder


def test_transformerlens_is_asked_what_its_loader_found(by_name):
    from transformers import PreTrainedModel

    plain = PreTrainedModel.__dict__["from_pretrained"]
    weights = load_file(by_name / WEIGHTS)
    model = bl.load_model(str(by_name))
    assert "unused_weights" not in door.provenance(model)
    rewrite(by_name, lambda held: held | {"value_head.bias": torch.ones(1)})
    assert door.provenance(bl.load_model(str(by_name)))["unused_weights"] == ["value_head.bias"]
    rewrite(by_name, lambda _: {"_orig_mod." + name: value for name, value in weights.items()})
    refused(r"without .*'_orig_mod\.'", str(by_name))
    name = "model.layers.2.mlp.down_proj.weight"
    rewrite(by_name, lambda _: weights | {name: weights[name][:, :48]})
    refused(rf"{name} of shape \[32, 48\] for \[32, 64\]", str(by_name))
    assert PreTrainedModel.__dict__["from_pretrained"] is plain


# -- kind="hooked" ----------------------------------------------------------------------------------------------------------------


@hooked_lane
def test_hooked_folders_are_checked_too(folder, tmp_path):
    plain = bl.load_model(folder, kind="hooked")
    shutil.copytree(folder, tmp_path / "ids")
    for found in (tmp_path / "ids").glob("tokenizer*"):
        found.unlink()
    tokens = random_tokens(2, 9)
    assert torch.equal(logits_of(bl.load_model(tmp_path / "ids", kind="hooked"), tokens), logits_of(plain, tokens))
    rewrite(folder, renamed(lambda name: "_orig_mod." + name))
    refused(r"'_orig_mod\.'", folder, kind="hooked")


@hooked_lane
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_conversion_to_hooked_drops_is_refused(tmp_path, dtype):
    """TransformerLens sets Llama's biases to zero."""
    weights = saved(tmp_path, attention_bias=True)
    bl.load_model(tmp_path, kind="hooked", dtype=dtype)  # untrained biases are zero
    with torch.no_grad():
        for block in weights.model.layers:
            block.self_attn.v_proj.bias.normal_()
    weights.save_pretrained(tmp_path)
    refused('logits it changes by.*kind="bridge"', tmp_path, kind="hooked", dtype=dtype)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 4000])
def test_names_that_no_system_takes(name):
    with pytest.raises(ModelError, match="expected the name of a model or a path, got "):
        bl.load_model(name)
