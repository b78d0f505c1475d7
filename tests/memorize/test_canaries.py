"""Canaries."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import basin_lens as bl
from basin_lens.errors import StudyError, TextError
from basin_lens.texts import tokenize
from tests.conftest import (
    TEXTS,
)
from tests.memorize.learners import A, M, token_counts


def test_canaries_are_as_many_as_asked_and_read_back_token_by_token(llama):
    made = M.make_canaries(llama, per_dose=3, doses=(1, 4), length=20)
    assert {len(s.tokens) for s in tokenize(llama, made, max_length=64)} == {21}
    for passage in made:
        ids = M.ids_of(llama.tokenizer, passage.text)
        assert llama.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == passage.text
    assert len({p.text for p in made}) == len({p.doc for p in made}) == len(made) == 12
    assert Counter((p.labels["dose"], p.labels["kind"]) for p in made) == dict.fromkeys(itertools.product((1, 4), M.KINDS), 2)
    for one, other in zip(made[::2], made[1::2], strict=True):
        assert one.labels == other.labels | {"member": not other.labels["member"]}
    # Fewer pairs than kinds.
    for doses, kinds in (((1,), ["fluent"]), ((1, 2, 4, 8), ["fluent", "salad", "random", "fluent"])):
        assert [p.labels["kind"] for p in M.make_canaries(llama, per_dose=1, doses=doses, length=8)[::2]] == kinds


def test_a_fair_coin_decides_for_each_pair(llama):
    made = M.make_canaries(llama, per_dose=100, doses=(1,), kinds=("salad",), length=4)
    first = [p.labels["member"] for p in made[::2]]
    assert 30 < sum(first) < 70 and 30 < sum(a != b for a, b in itertools.pairwise(first)) < 70


@pytest.mark.slow
def test_equal_seed_gives_equal_canaries_in_another_process(llama, tmp_path):
    """In a process that imports no more than it needs."""
    llama.tokenizer.save_pretrained(tmp_path)
    code = (
        "import json, types; from transformers import PreTrainedTokenizerFast; from basin_lens.memorize import make_canaries; "
        f"tokenizer = PreTrainedTokenizerFast.from_pretrained({str(tmp_path)!r}); "
        "made = make_canaries(types.SimpleNamespace(tokenizer=tokenizer), per_dose=3, doses=[2], length=12, seed=5); "
        "print(json.dumps([[p.text, p.labels] for p in made]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    here, other = (
        [[p.text, p.labels] for p in M.make_canaries(llama, per_dose=3, doses=[2], length=12, seed=seed)] for seed in (5, 6)
    )
    assert json.loads(said.splitlines()[-1]) == here != other


@pytest.mark.slow(everywhere=True)
def test_sampled_canaries_are_the_models_own(llama):
    options = {"per_dose": 2, "doses": (1,), "kinds": ("fluent",), "length": 24}
    own, again, grammar = (M.make_canaries(llama, sampled=sampled, **options) for sampled in (True, True, False))
    assert token_counts(llama, own) == {24} and len({p.text for p in own}) == 4 and own == again
    loss = [bl.analyze(llama, made, [A.Surprisal()], layers=[0], progress=False).surprisal.mean() for made in (own, grammar)]
    assert loss[0] < loss[1]


@pytest.mark.parametrize(
    "bad", [{"kinds": ("prose",)}, {"kinds": ()}, {"doses": ()}, {"doses": (0, 1)}, {"per_dose": 0}, {"length": 3}]
)
def test_bad_plans_of_canaries_are_refused(llama, bad):
    with pytest.raises(StudyError, match="kinds among"):
        M.make_canaries(llama, **bad)


def test_texts_without_pairs(llama):
    assert len(set(M.fresh_texts(llama, "fluent", 20, 4, seed=1))) == 20  # of so few tokens, some are drawn twice
    assert M.fresh_texts(llama, "salad", 0, 8, seed=1) == []
    with pytest.raises(StudyError, match="a kind among"):
        M.fresh_texts(llama, "prose", 1, 8, seed=1)
    with pytest.raises(TextError, match="tokenizer"):
        M.make_canaries(SimpleNamespace(tokenizer=None))
    text = " ".join(TEXTS)
    cut = M.pieces(llama, text, 10)
    places = [text.find(piece) for piece in cut]
    assert token_counts(llama, cut) == {10} and len(cut) > 10 and places[0] == 0
    assert all(b >= a + len(piece) for a, b, piece in zip(places, places[1:], cut, strict=False))
