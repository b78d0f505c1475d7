"""A tiny model in a folder, as a user's own would be, its texts, and mergers trained once for all files."""

from functools import partial

import pytest

from basin_lens import studies
from tests.cli.merge.merges import SMALL, merge, written
from tests.conftest import make_hf, make_tokenizer


@pytest.fixture(scope="package")
def folder(tmp_path_factory) -> str:
    """A model as Hugging Face keeps it. Its context has room for a prompt and what is written, its cache for descriptors beside it."""
    path, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    make_hf("llama", vocab_size=len(tokenizer), num_key_value_heads=4, max_position_embeddings=256).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="package")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    return {
        name: written(path / f"{name}.jsonl", seed, count) for seed, (name, count) in enumerate({"train": 8, "other": 5}.items())
    }


@pytest.fixture(scope="package")
def run(folder, texts, tmp_path_factory):
    """A trained merger, and what was said."""
    out = tmp_path_factory.mktemp("run")
    said = merge("train", "--data", texts["train"], "--model", folder, *SMALL, "--out", str(out)).output
    return out, said


@pytest.fixture(scope="package")
def based(folder, texts, tmp_path_factory):
    """One whose base was trained, too."""
    out = tmp_path_factory.mktemp("based")
    return out, merge("train", texts["train"], "--model", folder, *SMALL, "--train-base", "--out", str(out)).output


@pytest.fixture
def short_report(monkeypatch):
    """Less text written for the report than a user would get, for time."""
    monkeypatch.setattr(studies, "study_merging", partial(studies.study_merging, prompt=8, written=4, prompts=2))
