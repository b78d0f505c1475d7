"""Generation with a merged cache."""

import math

import pytest
import torch
from tokenizers import AddedToken

from basin_lens import merging
from basin_lens import model as door
from basin_lens.errors import MergeError
from basin_lens.merging import TokenMerger, cache
from tests.conftest import VOCAB, make_bridge, random_tokens
from tests.merging.mergers import make_merger, merged_logits


@pytest.mark.many
@pytest.mark.parametrize("kind", ["leader", "rows", "residual"])
def test_generation_equals_a_rollout_over_whole_sequences(tiny, kind):
    merger, prompts = make_merger(tiny, kind), random_tokens(2, 9)
    written, table = merging.generate(merger, tiny, prompts, 8)
    text = prompts
    for _ in range(8):
        text = torch.cat([text, merged_logits(merger, tiny, text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, text[:, 9:])
    each = [merging.generate(merger, tiny, prompts[i : i + 1], 8) for i in range(2)]
    assert torch.equal(written, torch.cat([e[0] for e in each]))
    assert (table["bytes"] == each[0][1]["bytes"] + each[1][1]["bytes"]).all() and (
        table.rows == each[0][1].rows + each[1][1].rows
    ).all()
    merger.forget()
    merged_logits(merger, tiny, text[:1, :16])
    assert each[0][1]["bytes"].tolist() == merger.statistics().bytes.tolist()
    assert (table.full_bytes == 2 * 16 * merger.weights.shape.row_bytes).all() and (table.full_rows == 32).all()


def test_layers_that_do_not_merge_keep_the_full_cache(tiny):
    merger = TokenMerger([1], threshold=0.5, rule="stride", recent=2)
    _, table = merging.generate(merger, tiny, random_tokens(1, 9), 4)
    assert table.rows[0] == table.rows[2] == 12 > table.rows[1]
    assert table["bytes"][0] == table.full_bytes[0] > table["bytes"][1]


def test_sampling_is_reproducible_and_bad_requests_are_refused(tiny):
    merger, prompts = make_merger(tiny, "leader"), random_tokens(2, 5)
    one, two, three = (merging.generate(merger, tiny, prompts, 6, temperature=1.0, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    for length, changes in ((60, {}), (0, {}), (3, {"temperature": -1.0}), (3, {"temperature": math.nan})):
        with pytest.raises(MergeError, match="expected"):
            merging.generate(merger, tiny, prompts, length, **changes)
    with merging.streaming(merger, tiny, 2) as stream, pytest.raises(MergeError, match="each of 2 sequences"):
        stream.step(prompts[:1, 0])


class Tokens:
    """As much of a tokenizer as says where a text ends."""

    def __init__(self, eos: int | None, **special: int) -> None:
        self.eos_token_id = eos
        self.added_tokens_decoder = {
            number: AddedToken({"endoftext": "<|endoftext|>"}.get(name, f"<{name}>"), special=name != "word")
            for name, number in special.items()
        }


@pytest.mark.slow(everywhere=True)
def test_generation_stops_at_the_end_of_the_text_unless_told_to_go_on():
    model, prompts = make_bridge("llama"), random_tokens(2, 9)
    merger = make_merger(model, "leader")
    free, table = merging.generate(merger, model, prompts, 12)  # no tokenizer: nobody says where it ends
    ends = [int(row[4]) for row in free]
    first = [row.tolist().index(end) for row, end in zip(free, ends, strict=True)]
    assert free.shape == (2, 12) and max(first) < 11
    model.tokenizer = Tokens(ends[0], endoftext=ends[1])
    stopped, less = merging.generate(merger, model, prompts, 12)
    whole = [min(row.tolist().index(end) for end in ends if end in row) for row in free]
    assert stopped.shape[1] == max(whole) + 1
    for row, plain, last in zip(stopped, free, whole, strict=True):
        assert torch.equal(row[: last + 1], plain[: last + 1]) and set(row[last:].tolist()) == {int(plain[last])}
    assert (less.full_rows == 2 * (9 + max(whole))).all() and (less.rows <= less.full_rows).all() and (less.rows < table.rows).all()
    on, same = merging.generate(merger, model, prompts, 12, past_end=True)
    assert torch.equal(on, free) and same.equals(table)


def test_which_tokens_end_a_text(monkeypatch):
    model = make_bridge("llama")
    assert door.end_tokens(model) == frozenset()
    model.tokenizer = Tokens(None)
    assert door.end_tokens(model) == frozenset()
    model = make_bridge("llama")
    model.tokenizer = Tokens(7, endoftext=9, other=11, word=13)
    monkeypatch.setattr(model.original_model.config, "eos_token_id", 2)  # nobody chose it: a common token
    assert door.end_tokens(model) == {7, 9}
    monkeypatch.setattr(model.original_model.config, "eos_token_id", [11, 13])
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", 9)
    assert door.end_tokens(model) == {7, 9, 11}


@pytest.mark.slow(everywhere=True)
def test_one_prompt_is_a_batch_of_one(tiny):
    merger, prompts = make_merger(tiny, "leader"), random_tokens(1, 9)
    for form in (prompts[0], prompts.int(), prompts[0].int()):
        assert torch.equal(merging.generate(merger, tiny, form, 5)[0], merging.generate(merger, tiny, prompts, 5)[0])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (torch.rand(1, 4), "LongTensor of token ids"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\)"),
        (torch.zeros(1, 0, dtype=torch.long), "one token or more"),
        (torch.tensor([[3, VOCAB]]), rf"ids in \[0, {VOCAB}\), got 3 to {VOCAB}"),
        (torch.tensor([[3, -1]]), "got -1 to 3"),
        ([[3, 4]], "got list"),
        ("text", "got str"),
    ],
    ids=["fractions", "three axes", "none", "beyond", "below", "list", "text"],
)
def test_prompts_that_are_none_are_refused(tiny, prompts, said):
    with pytest.raises(MergeError, match=said):
        cache.checked_prompts(tiny, prompts)


@pytest.mark.many
@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-12])
def test_a_tiny_temperature_takes_the_most_likely_token(tiny, temperature):
    merger, prompts = make_merger(tiny, "leader"), random_tokens(2, 6)
    greedy, drawn = (merging.generate(merger, tiny, prompts, 5, temperature=t)[0] for t in (0.0, temperature))
    assert torch.equal(greedy, drawn)


def test_logits_that_are_no_numbers_are_refused_and_no_token_is_made_of_them():
    draw = torch.Generator()
    for temperature in (0.0, 1.0):
        with pytest.raises(MergeError, match="NaN"):
            cache._next(torch.tensor([[0.0, math.nan]]), temperature, draw)
