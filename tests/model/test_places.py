"""What a path or a file holds: a GGUF file, a folder, part of a checkpoint, an adapter."""

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

import basin_lens as bl
from basin_lens import model as door
from tests.conftest import make_tokenizer, random_tokens
from tests.model.checkpoints import WEIGHTS, logits_of, refused, settings

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


@pytest.mark.slow(everywhere=True)
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
