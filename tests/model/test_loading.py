"""Loading: a checkpoint that is not whole is refused by name, what can be served is served, and nothing is asked or made up."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import basin_lens as bl
from basin_lens import model as door
from basin_lens import records
from basin_lens.errors import ModelError, TextError
from basin_lens.model import checkpoints, places
from basin_lens.model.state_dicts import Found
from tests.conftest import TEXTS, hooked_lane, make_hf, make_tokenizer, random_tokens

WEIGHTS = "model.safetensors"


def saved(folder: Path, name: str = "llama", **changes):
    """A tiny model and its tokenizer in a folder; the model."""
    tokenizer = make_tokenizer()
    weights = make_hf(name, **{"vocab_size": len(tokenizer)} | changes)
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    saved(path)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
    """The folder's weights with other names or others altogether: `change` takes and gives a dict."""
    held = change(load_file(folder / WEIGHTS))
    save_file({name: value.clone() for name, value in held.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def settings(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens, return_type="logits")


def refused(said: str, *asked, **how) -> str:
    """The message of a refusal, with these words in it (a regex), in the form that all of them have."""
    with pytest.raises(ModelError) as caught:
        bl.load_model(*asked, **how)
    message = str(caught.value)
    assert re.search(said, message, re.DOTALL), message
    assert message.startswith("expected ") and re.search(r"\bgot\b", message), message
    return message


# -- checkpoints that do not hold the model ---------------------------------------------------------------------------------------


def renamed(change):
    return lambda held: {change(name): value for name, value in held.items()}


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


# -- GGUF -------------------------------------------------------------------------------------------------------------------------


def gguf_file(path: Path, *, without: str = "") -> dict[str, np.ndarray]:
    """A tiny Llama with a byte-level tokenizer, as GGUF; its tensors."""
    import gguf

    rng = np.random.default_rng(0)
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(300)))
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    merges = [" ".join(rule) for rule in rules if "".join(rule) in vocabulary]
    shapes = {"token_embd": (300, 32), "output": (300, 32), "output_norm": (32,)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{block}.ffn_gate": (64, 32), f"blk.{block}.ffn_up": (64, 32), f"blk.{block}.ffn_down": (32, 64)}
    tensors = {f"{name}.weight": rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, 32), (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 64), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
        (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_vocab_size, 300), (writer.add_rope_freq_base, 10000.0),
        (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, vocabulary), (writer.add_token_types, [1] * 300),
        (writer.add_token_merges, merges), (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1),
    ):  # fmt: skip
        add(value)
    for name, value in tensors.items():
        if name != without:
            writer.add_tensor(name, value)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return tensors


def test_a_gguf_file_its_folder_and_a_name_without_ending_are_one_model(tmp_path):
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "tiny.gguf"
    tensors = gguf_file(path)
    model = bl.load_model(path)
    assert torch.equal(model.original_model.get_output_embeddings().weight, torch.from_numpy(tensors["output.weight"]))
    shutil.copy(path, tmp_path / "blob")
    tokens = random_tokens(2, 9)
    for other in (path.parent, tmp_path / "blob"):
        same = bl.load_model(other)
        assert torch.equal(logits_of(same, tokens), logits_of(model, tokens))
        assert door.fingerprint(same) == door.fingerprint(model)  # also of a renamed file
    shutil.copy(path, path.with_name("second.gguf"))
    refused(r"second\.gguf, tiny\.gguf\. Give one", path.parent)


def test_a_gguf_file_without_one_tensor_is_refused_by_its_name(tmp_path):
    gguf_file(tmp_path / "tiny.gguf", without="blk.1.ffn_up.weight")
    refused(r"without model\.layers\.1\.mlp\.up_proj\.weight", tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04 a zip file", r"begins with b'PK"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"", "begins with b''"),
    ],
)
def test_what_is_no_gguf_file_is_told_by_its_first_bytes(tmp_path, content, said):
    (tmp_path / "model.gguf").write_bytes(content)
    refused(said, tmp_path / "model.gguf")


# -- places -----------------------------------------------------------------------------------------------------------------------


def test_the_users_folder_is_found_by_its_sign(whole, monkeypatch):
    monkeypatch.setenv("HOME", str(whole.parent))
    model = bl.load_model(f"~/{whole.name}")
    assert door.provenance(model)["name"] == str(whole.resolve())
    refused("does not exist", "~/no-such-folder-here")


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere/model", "/nowhere/model", Path("/nowhere/model")])
def test_a_path_that_is_not_there_is_not_asked_of_a_hub(name):
    assert "network" not in refused("does not exist. Check the path", name)


def test_an_adapter_is_named_and_how_to_merge_it(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}))
    refused("PEFT adapter.*made for 'org/base'.*merge_and_unload", folder)
    for name in ("config.json", WEIGHTS):
        (folder / name).unlink()
    refused("PEFT adapter.*made for 'org/base'.*merge_and_unload", folder)


def test_code_in_a_folder_is_not_run_and_nobody_is_asked(folder):
    """In a process of its own whose input would say yes: it was read as the answer."""
    settings(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    command = [sys.executable, "-c", f"import basin_lens as bl; bl.load_model({str(folder)!r})"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, input="y\n" * 4, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "[y/N]" not in done.stdout + done.stderr
    assert "code of its own (own.Config, own.Model), which is not run" in done.stderr.splitlines()[-1]
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin", "model.pt", "config.json"])
def test_one_file_of_a_checkpoint_is_answered_with_its_folder(folder, name, monkeypatch):
    (folder / name).touch()
    refused(re.escape(f"Give its folder: {str(folder)!r}."), folder / name)
    monkeypatch.chdir(folder)
    refused(r"Give its folder: '\.'\.", name)
    (folder / "config.json").rename(folder.parent / "config")
    if name != "config.json":
        refused(r"needs config\.json beside", folder / name)


def test_a_folder_without_settings_says_what_is_there(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    refused(r"config\.json, got .*an empty folder", tmp_path / "empty")
    refused(re.escape(f"Give {str(folder)!r}."), tmp_path)
    for content in ("{", "[]", "[" * 100_000):
        (folder / "config.json").write_text(content)
        refused("Get the file again", folder)


def test_an_architecture_without_hooks_is_named(tmp_path):
    from transformers import BioGptConfig, BioGptForCausalLM

    config = BioGptConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    BioGptForCausalLM(config).save_pretrained(tmp_path)
    refused("architecture that TransformerLens can put hooks into, got BioGptForCausalLM.*Use a decoder-only", tmp_path)


def test_an_encoder_decoder_folder_is_refused_in_words(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(vocab_size=99, **shape)).save_pretrained(tmp_path)
    refused("T5Config.*decoder-only", tmp_path)


# -- without a tokenizer ----------------------------------------------------------------------------------------------------------


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


# -- tuned folders ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(whole, tmp_path_factory):
    """A tuned model of the folder `whole`, on disk."""
    base = bl.load_model(whole)
    made = door.copy_of(base)
    with torch.no_grad():
        made.original_model.model.norm.weight.mul_(1.1)
    door.remember_name(made, "a tuned one")
    return checkpoints.save_tuned(made, tmp_path_factory.mktemp("tuned"), base, {"doses": [1]})


@pytest.fixture
def learned_copy(learned, tmp_path):
    return Path(shutil.copytree(learned, tmp_path / "tuned"))


def record_of(folder: Path, **changes) -> None:
    """Change a tuned model's record, and seal it and its weights as if they had been written so."""
    path = folder / "tuned.json"
    record = json.loads(path.read_text()) | changes
    files = {name: records.digest(folder / name) for name in record["files"]}
    path.write_bytes(records.seal(json.dumps(record | {"files": files, "seal": records.OPEN_SEAL}).encode()))


def test_a_tuned_folder_loads(learned):
    assert door.fingerprint(bl.load_model(learned)) == door.tuned_facts(learned)["fingerprint"]


def test_tuned_weights_that_do_not_fit_are_named(learned_copy, whole):
    held = load_file(learned_copy / "weights.safetensors")
    base = bl.load_model(whole)
    for change, said in (
        (lambda name: "_orig_mod." + name, r"one without .*'_orig_mod\.'"),
        (lambda name: name.replace("embed_tokens", "other"), r"one without .*embed_tokens.*, but with others: .*other"),
    ):
        save_file({change(name): value for name, value in held.items()}, learned_copy / "weights.safetensors")
        record_of(learned_copy)
        with pytest.raises(ModelError, match=f"which has other parameters: {said}.*Load its base model, {whole}"):
            door.put_tuned(base, learned_copy)
    save_file(held | {"more.weight": torch.ones(1)}, learned_copy / "weights.safetensors")
    record_of(learned_copy)
    with pytest.raises(ModelError, match=r"one with others: more\.weight"):
        door.put_tuned(base, learned_copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 3}, {"fingerprint": None}, {"kind": "other"}, {"dtype": "load"}, {"dtype": ["float32"]}, {"facts": []}, {"base": {}},
        {"base": {"name": "b", "fingerprint": "f"}}, {"base": {"name": "b", "fingerprint": "f", "source": {"path": "p"}}}, {"kind": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_changed_record_is_refused(learned_copy, changes):
    record_of(learned_copy, **changes)
    refused("field|number format.*Tune the model again", learned_copy)


def test_a_tuned_model_that_is_its_own_base_is_refused(learned_copy, tmp_path):
    base = json.loads((learned_copy / "tuned.json").read_text())["base"]
    record_of(learned_copy, base=base | {"source": {"name_or_path": str(learned_copy), "kind": "bridge"}})
    refused("its own base", learned_copy)
    other = Path(shutil.copytree(learned_copy, tmp_path / "other"))
    record_of(other, base=base | {"source": {"name_or_path": str(learned_copy), "kind": "bridge"}})
    record_of(learned_copy, base=base | {"source": {"name_or_path": str(other), "kind": "bridge"}})
    refused("its own base", other)


def test_damaged_tuned_folders_give_errors_and_no_other_model(learned, tmp_path):
    """Bytes flipped, cut and put in, with a fixed seed: a ModelError or the very same model, nothing bare."""
    rng = np.random.default_rng(0)
    base, right = (
        bl.load_model(door.tuned_facts(learned)["base"]["source"]["name_or_path"]),
        door.tuned_facts(learned)["fingerprint"],
    )
    raised = 0
    for turn in range(60):
        folder = Path(shutil.copytree(learned, tmp_path / str(turn)))
        path = folder / ("tuned.json" if turn % 2 else "weights.safetensors")
        content = bytearray(path.read_bytes())
        at = int(rng.integers(min(len(content), 2000 if turn % 4 else len(content))))
        if turn % 3 == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif turn % 3 == 1:
            del content[at:]
        else:
            content[at:at] = rng.bytes(3)
        path.write_bytes(bytes(content))
        try:
            assert door.fingerprint(door.put_tuned(base, folder)) == right
        except ModelError:
            raised += 1
    assert raised > 40


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 4000])
def test_names_that_no_system_takes(name):
    with pytest.raises(ModelError, match="expected the name of a model or a path, got "):
        bl.load_model(name)
