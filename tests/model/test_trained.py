"""The tiny model of tests/fixtures/trained: it has learned what its log says, and a codec packs text with it."""

import json
import zlib

import pytest

import basin_lens as bl
from tests.conftest import TRAINED

TEXT = (
    "We the people of the United States, in order to form a more perfect union, establish justice, insure domestic tranquility, provide "
    "for the common defense, promote the general welfare, and secure the blessings of liberty to ourselves and our posterity, do ordain "
    "and establish this Constitution for the United States of America."
)


@pytest.fixture(scope="module")
def log() -> dict:
    return json.loads((TRAINED / "training.json").read_text(encoding="utf-8"))


def test_it_is_small_and_its_log_says_how_it_was_trained(log, trained):
    assert sum(path.stat().st_size for path in TRAINED.iterdir()) < 3_000_000
    assert (trained.cfg.n_layers, trained.cfg.d_model, trained.cfg.d_vocab) == (4, 64, 1000)
    steps = [row["held_out_loss"] for row in log["log"]]
    assert steps == sorted(steps, reverse=True) and log["steps"] == log["log"][-1]["step"]
    assert steps[-1] < log["held_out_loss_by_frequency_alone"] - 1.5


def test_it_predicts_text_of_its_kind(log, trained):
    table = bl.analyze(trained, TEXT, [bl.analyzers.Surprisal()], layers=[0], progress=False)
    assert table.surprisal.mean() < log["held_out_loss_by_frequency_alone"] - 1
    turned = bl.analyze(trained, " ".join(reversed(TEXT.split())), [bl.analyzers.Surprisal()], layers=[0], progress=False)
    assert turned.surprisal.mean() > table.surprisal.mean() + 0.5


@pytest.mark.slow(everywhere=True)
def test_its_codec_halves_what_zlib_makes(trained):
    coder = bl.codec.TextCodec(trained)
    blob = coder.encode(TEXT)
    assert coder.decode(blob).decode() == TEXT
    assert 2 * sum(map(len, bl.codec.read(blob).chunks)) < len(zlib.compress(TEXT.encode(), 9))
