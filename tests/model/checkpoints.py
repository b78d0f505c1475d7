"""Checkpoints of a tiny model in folders, rewritten as wanted."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import basin_lens as bl
from basin_lens.errors import ModelError
from tests.conftest import make_hf, make_tokenizer

WEIGHTS = "model.safetensors"


def saved(folder: Path, name: str = "llama", **changes):
    """A tiny model and its tokenizer in a folder; the model."""
    tokenizer = make_tokenizer()
    weights = make_hf(name, **{"vocab_size": len(tokenizer)} | changes)
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return weights


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
