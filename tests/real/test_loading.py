"""The embedded model from its dequantized weights: in every respect what the GGUF file gives."""

import shutil

import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.model import loading

pytestmark = pytest.mark.real

TEXT = "The ferry had stopped running in October,\n  and the lamp had a voice of its own. <|im_start|>\u00fc"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What load_model gives from an empty cache, what it gives then, and the model of the GGUF file itself, read once for all."""
    file, folder = door.embedded_file(progress=False), tmp_path_factory.mktemp("cache")
    (folder / "models").mkdir()
    shutil.copy2(file, folder / "models")
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASIN_LENS_CACHE", str(folder))
        actual = loading._read_both
        patch.setattr(loading, "_read_both", lambda path: read.append(actual(path)) or read[0])
        first = bl.load_model(device="cpu")
        assert len(read) == 1
        patch.setattr(loading, "embedded_file", lambda: pytest.fail("the GGUF file was asked for"))
        later = bl.load_model(device="cpu")
        half = bl.load_model(device="cpu", dtype=torch.bfloat16)
    weights, tokenizer = read[0]
    of_file = loading._bridge_over(weights, tokenizer, torch.device("cpu"), torch.float32, loading.EMBEDDED_NAME).eval()
    return {"first": first, "later": later, "half": half, "file": of_file, "folder": folder}


@pytest.mark.parametrize("which", ["first", "later"])
def test_the_model_is_that_of_the_file(both, which):
    ours, theirs = both[which], both["file"]
    assert door.fingerprint(ours) == door.fingerprint(theirs)
    assert door.tokenizer_fingerprint(ours) == door.tokenizer_fingerprint(theirs)
    tokens = ours.to_tokens(TEXT)
    assert torch.equal(tokens, theirs.to_tokens(TEXT))
    with torch.inference_mode():
        assert torch.equal(ours(tokens), theirs(tokens))
    facts = door.provenance(ours)
    assert facts["name"].startswith("SmolLM2-135M-Instruct, Q4_1 dequantized")
    assert {**facts, "name": ""} == {**door.provenance(theirs), "name": ""}
    assert door.source_of(ours) == {"name_or_path": "smollm2-135m", "kind": "bridge"}
    same = ("default_prepend_bos", "tokenizer_prepends_bos", "tokenizer_appends_eos", "n_ctx", "d_vocab", "dtype", "model_name")
    assert {name: getattr(ours.cfg, name, None) for name in same} == {name: getattr(theirs.cfg, name, None) for name in same}
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert ours.tokenizer.special_tokens_map == theirs.tokenizer.special_tokens_map
    assert ours.tokenizer.init_kwargs["add_bos_token"] == theirs.tokenizer.init_kwargs["add_bos_token"]
    assert ours.original_model.generation_config.to_dict() == theirs.original_model.generation_config.to_dict()


def test_another_number_format_is_of_the_same_weights(both):
    of_file = door.parameters_of(both["file"])
    for name, value in door.parameters_of(both["half"]).items():
        assert torch.equal(value, of_file[name].bfloat16()), name
