"""Folders of tuned models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import basin_lens as bl
from basin_lens import model as door
from basin_lens import records
from basin_lens.errors import ModelError
from basin_lens.model import checkpoints
from tests.model.checkpoints import refused

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
