"""The merging commands, called in a process of this one's, and what they read."""

import json
import random

from typer.testing import CliRunner

from basin_lens import model as door
from basin_lens.cli.app import app
from basin_lens.merging import TokenMerger
from basin_lens.merging.windows import text_digest
from basin_lens.texts import read_texts
from tests.conftest import TEXTS

SMALL = ("--length", "32", "--projection", "6", "--recent", "4", "--target-rate", "0.3", "--steps", "3")
QUICK = ("--budgets", "0.85", "--seeds", "1")
PROMPT = "The ferry had stopped running in October, and the lamp had a voice of its own, and the lamp had"


def written(path, seed: int, count: int, words: int = 45) -> str:
    """JSON lines of `count` documents, whose words come in another order for each seed."""
    draw, known = random.Random(seed), " ".join(TEXTS).split()
    with path.open("w", encoding="utf-8") as out:
        for i in range(count):
            out.write(json.dumps({"text": " ".join(draw.choices(known, k=words)), "doc": f"{seed}-{i}"}) + "\n")
    return str(path)


def merge(*words: str):
    """The command; what it raised is raised."""
    found = CliRunner().invoke(app, ["merge", *words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found


def forbidden(*_, **__):
    raise AssertionError("ran")


def texts_of_training(run, folder, texts) -> set[str]:
    facts = TokenMerger.load(run[0], door.load_model(folder)).facts["training"]
    return {p.text for p in read_texts(texts["train"]) if text_digest(p.text) in facts["seen_texts"]}
