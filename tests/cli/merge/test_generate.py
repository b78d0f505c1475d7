"""`basin-lens merge generate` from end to end."""

import re

import pytest
import torch

from basin_lens import merging
from basin_lens import model as door
from basin_lens.cli import merge as cli_merge
from basin_lens.errors import MergeError
from basin_lens.merging import TokenMerger
from tests.cli.merge.merges import PROMPT, merge
from tests.conftest import replace_in_all_rooms


def cache_of(said: str) -> tuple[int, int, float]:
    held, full, share = re.search(r"cache: ([\d,]+) of ([\d,]+) bytes \(([\d.]+)\)", said).groups()
    return int(held.replace(",", "")), int(full.replace(",", "")), float(share)


def test_generate_writes_what_the_package_writes_and_says_how_large_its_cache_is(run, folder):
    said = merge("generate", str(run[0]), "--prompt", PROMPT, "--tokens", "12", "--model", folder).output
    model = door.load_model(folder)
    tokenizer = door.tokenizer_of(model)
    first = door.uses_bos(model, None)
    begun = [*([] if first is None else [first]), *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    tokens, table = merging.generate(TokenMerger.load(run[0], model), model, torch.tensor([begun]), 12)
    assert PROMPT + tokenizer.decode(tokens[0].tolist()) in said
    held, full, share = cache_of(said)
    assert (
        (held, full) == (table["bytes"].sum(), table["full_bytes"].sum())
        and held < full
        and share == pytest.approx(held / full, abs=0.006)
    )
    assert f"{table.rows.sum():,} of {table.full_rows.sum():,} rows in 3 layers" in said


def test_generate_prints_what_reads_behind_the_prompt():
    """Tokens by themselves lose the space before them: "The red" and "sides" for "The red sides"."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {"\u2581The": 0, "\u2581red": 1, "\u2581sides": 2, "<0xC3>": 3, "<0xA9>": 4, "<unk>": 5}
    pieces = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    assert "The red" + tokenizer.decode([2]) == "The redsides"
    assert "The red" + cli_merge._behind(tokenizer, [0, 1], [2]) == "The red sides"
    assert cli_merge._behind(tokenizer, [0, 1, 3], [4, 2]) == "\u00e9 sides"
    assert cli_merge._behind(tokenizer, [0, 1], []) == ""


@pytest.mark.slow
def test_generate_stops_at_the_end_of_the_text_unless_told_to_go_on(run, folder, monkeypatch):
    words = ("generate", str(run[0]), "--prompt", PROMPT, "--tokens", "12", "--model", folder)
    free = merge(*words, "--past-end").stdout
    model = door.load_model(folder)
    first = door.uses_bos(model, None)
    begun = [*([] if first is None else [first]), *door.tokenizer_of(model)(PROMPT, add_special_tokens=False)["input_ids"]]
    written = merging.generate(TokenMerger.load(run[0], model), model, torch.tensor([begun]), 12, past_end=True)[0][0].tolist()
    last = written.index(written[3])
    replace_in_all_rooms(monkeypatch, "end_tokens", lambda _: frozenset({written[3]}))
    found = merge(*words)
    said = found.stdout  # not .output: how often a progress bar redraws itself depends on the clock
    decoded = door.tokenizer_of(model).decode(written[:last])
    assert PROMPT + decoded in said and f"ends after {last} tokens; --past-end goes on" in found.stderr
    assert len(PROMPT + decoded) < len(free.split("cache:")[0].strip())
    assert cache_of(said)[1] < cache_of(free)[1]


@pytest.mark.slow
def test_generate_keeps_to_a_budget(run, folder):
    before = {path.name: path.read_bytes() for path in run[0].iterdir()}
    words = ("generate", str(run[0]), "--prompt", f"{PROMPT} {PROMPT}", "--tokens", "8", "--model", folder)
    shares = [cache_of(merge(*words, "--budget", budget).output)[2] for budget in ("0.9", "0.6")]
    # It was set on other texts, and longer ones, so the prompt's own share is near it only.
    assert shares[1] < shares[0] - 0.15 and abs(shares[1] - 0.6) < 0.15, shares
    assert {path.name: path.read_bytes() for path in run[0].iterdir()} == before
    with pytest.raises(MergeError, match="at best"):
        merge(*words, "--budget", "0.001")


@pytest.mark.slow
def test_generate_draws_by_its_seed_and_refuses_an_empty_prompt(run, folder):
    def said(seed: str) -> str:
        words = ("--prompt", PROMPT, "--tokens", "8", "--temperature", "1", "--seed", seed, "--model", folder)
        return merge("generate", str(run[0]), *words).stdout

    assert said("1") == said("1") != said("2")
    with pytest.raises(MergeError, match="prompt of one token"):
        merge("generate", str(run[0]), "--prompt", "", "--model", folder)
