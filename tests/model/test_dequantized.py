"""The dequantized weights in the cache: made once, proven whenever they are loaded, never loaded wrong. A tiny model stands for the file."""

import json
import os
import shutil
import subprocess
import sys
from subprocess import PIPE

import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import ModelError, StoreError
from basin_lens.model import dequantized, loading
from tests.conftest import make_hf, make_tokenizer, random_tokens

RECORD = "dequantized.json"


class Made:
    """What stands for the GGUF file, and how often it was read."""

    def __init__(self):
        self.tokenizer = make_tokenizer()
        self.count = 0

    def weights(self):
        return make_hf("llama", seed=3, vocab_size=len(self.tokenizer), tie_word_embeddings=True)

    def __call__(self, _file):
        self.count += 1
        weights = self.weights()
        weights.config.quantization_config = {"quant_method": "gguf", "gguf_file": "a.gguf", "dequantize": False}
        return weights, self.tokenizer


@pytest.fixture
def made(monkeypatch, tmp_path):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / "cache"))
    file = Made()
    monkeypatch.setattr(loading, "embedded_file", lambda: tmp_path / "a.gguf")
    monkeypatch.setattr(loading, "_read_both", file)
    return file


def folder():
    return dequantized.dequantized_at(loading._FILE_SHA256)


def load(**how):
    return bl.load_model(device="cpu", **how)


def assert_is(model, made):
    tokens = random_tokens(2, 9)
    with torch.inference_mode():
        assert torch.equal(model(tokens), made.weights()(tokens).logits)
    assert door.full_name(model).startswith("SmolLM2-135M-Instruct, Q4_1 dequantized")
    assert model.tokenizer.get_vocab() == made.tokenizer.get_vocab()


def test_the_file_is_read_once(made):
    first = load()
    assert_is(first, made)
    later, half = load(), load(dtype=torch.bfloat16)
    assert made.count == 1
    assert_is(later, made)
    assert door.fingerprint(later) == door.fingerprint(first)
    # The settings of the file's quantization are part of the model, the name of the file is not.
    assert later.original_model.config.to_dict()["quantization_config"]["quant_method"] == "gguf"
    assert {value.dtype for value in door.parameters_of(half).values()} == {torch.bfloat16}
    assert [path.name for path in folder().parent.iterdir()] == [folder().name]


_LOAD = """
import sys, time
from pathlib import Path
import torch
import tests.model.test_dequantized as own
from basin_lens.model import loading

class Slow(own.Made):
    def __call__(self, file):
        read = super().__call__(file)
        Path(sys.argv[1]).touch()
        while len(list(Path(sys.argv[2]).glob("ready-*"))) < 2:  # both hold the weights before either keeps them
            time.sleep(0.01)
        return read

made = Slow()
loading.embedded_file, loading._read_both = (lambda: Path("a.gguf")), made
own.assert_is(own.load(), made)
print(made.count)
"""


@pytest.mark.slow(everywhere=True)
def test_two_processes_make_it_at_once(tmp_path):
    """Both read the file before either writes; both have the model, one folder stands, and nothing is left beside it."""
    wanted = {**os.environ, "BASIN_LENS_CACHE": str(tmp_path / "cache"), "BASIN_LENS_TYPECHECKS": "0"}
    ready = [tmp_path / f"ready-{at}" for at in range(2)]
    running = [
        subprocess.Popen([sys.executable, "-c", _LOAD, str(one), str(tmp_path)], env=wanted, stdout=PIPE, stderr=PIPE, text=True)
        for one in ready
    ]
    said = [one.communicate(timeout=600) for one in running]
    assert [one.returncode for one in running] == [0, 0], said
    assert [out.strip() for out, _ in said] == ["1", "1"]
    (kept,) = (tmp_path / "cache" / "models").iterdir()
    assert dequantized._proven(kept, loading._FILE_SHA256).folder == kept


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def resealed(path):
    """Another file's weights, with a record that is whole."""
    record = json.loads(path.read_text())
    facts = {name: record[name] for name in dequantized._FIELDS} | {"gguf": "0" * 64}
    path.write_bytes(dequantized._KIND.record(facts, record["files"]))


DAMAGES = {
    "weights": lambda place: flip(place / "model.safetensors"),
    "settings": lambda place: flip(place / "config.json"),
    "tokenizer": lambda place: flip(place / "tokenizer.json"),
    "record": lambda place: flip(place / RECORD),
    "cut": lambda place: os.truncate(place / "model.safetensors", 1000),
    "no weights": lambda place: (place / "model.safetensors").unlink(),
    "no record": lambda place: (place / RECORD).unlink(),
    "empty": lambda place: [path.unlink() for path in place.iterdir()],
    "a file more": lambda place: (place / "adapter_config.json").write_text("{}"),
    "another file's": lambda place: resealed(place / RECORD),
}


@pytest.mark.many
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_and_mended(made, damage, monkeypatch):
    load()
    monkeypatch.setattr(loading, "_from_files", lambda path, *_: path)  # what is loaded is proven above
    monkeypatch.setattr(loading, "remember_name", lambda *_: None)
    monkeypatch.setattr(loading, "check_model", lambda _: None)
    DAMAGES[damage](folder())
    with pytest.warns(UserWarning, match="dequantized model in the cache is damaged, and is made again"):
        kept = dequantized.find_dequantized(loading._FILE_SHA256)
    assert kept is None and not folder().exists()
    assert dequantized.keep_dequantized(loading._FILE_SHA256, lambda: made(None)).folder == folder()
    assert made.count == 2
    assert dequantized.find_dequantized(loading._FILE_SHA256) is not None


def test_of_two_processes_the_second_loads_what_the_first_made(made, tmp_path):
    load()
    first = tmp_path / "first"
    folder().rename(first)

    def while_another_writes():
        shutil.copytree(first, folder())
        return made(None)

    before = (first / RECORD).read_bytes()
    kept = dequantized.keep_dequantized(loading._FILE_SHA256, while_another_writes)
    assert kept.folder == folder() and (folder() / RECORD).read_bytes() == before
    assert [path.name for path in folder().parent.iterdir()] == [folder().name]


@pytest.mark.usefixtures("made")
def test_a_death_while_writing_leaves_nothing_that_is_loaded():
    def dies():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dequantized.keep_dequantized(loading._FILE_SHA256, dies)
    assert not folder().exists()
    assert dequantized.find_dequantized(loading._FILE_SHA256) is None


def test_without_a_place_for_it_the_file_is_read_each_time(made, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setattr(loading, "_from_files", lambda path, *_: path)
    with pytest.warns(UserWarning, match="not kept"):
        assert loading._embedded("bridge", torch.device("cpu"), torch.float32) == tmp_path / "a.gguf"
    assert made.count == 0
    with pytest.raises(StoreError):
        dequantized.keep_dequantized(loading._FILE_SHA256, lambda: made(None))


def test_weights_that_are_not_in_full_are_not_kept(made):
    weights = made.weights().bfloat16()
    with pytest.raises(ModelError, match="float32"):
        dequantized.keep_dequantized(loading._FILE_SHA256, lambda: (weights, made.tokenizer))
    assert not folder().exists()
