"""Extraction, forks, and texts that may be recited."""

import itertools
import math
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import ModelError, StudyError, TextError
from basin_lens.memorize.extraction import longest_run
from basin_lens.memorize.fork import continuation_loss
from basin_lens.texts import find_licences, tokenize
from tests.conftest import (
    TEXTS,
    random_tokens,
    replace_in_all_rooms,
)
from tests.memorize.learners import HOOKED, A, M, logits_of, make, token_counts


def argmax_loop(model, tokens, length):
    """Greedy decoding without any cache."""
    for _ in range(length):
        tokens = torch.cat([tokens, logits_of(model, tokens)[:, -1].argmax(-1)[:, None]], 1)
    return tokens[:, -length:]


# -- extraction ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "native", HOOKED])
@pytest.mark.parametrize("side", ["right", "left"])
def test_greedy_continuations_are_a_plain_argmax_loop(kind, side):
    model, prompts = make(kind), random_tokens(6, 9)
    model.tokenizer.padding_side = side
    # The pad token is the end of text: at an edge of a prompt it is a token as any other.
    prompts[0, -1] = prompts[1, 0] = prompts[2, :2] = prompts[3, -2:] = model.tokenizer.pad_token_id
    assert torch.equal(door.continuations(model, prompts, 20), argmax_loop(model, prompts, 20))


def test_sampled_continuations_follow_the_softmax_and_the_seed(llama, monkeypatch):
    # A model on the CPU draws from no accelerator.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda *_: pytest.fail("seeded an accelerator"))
    prompts, state = random_tokens(1, 3).repeat(3000, 1), torch.get_rng_state()
    for temperature in (1.0, 0.5):
        drawn, again, other = (door.continuations(llama, prompts, 1, temperature=temperature, seed=s) for s in (3, 3, 4))
        log_p = torch.log_softmax(logits_of(llama, prompts[:1])[0, -1] / temperature, -1)
        entropy, found = -(log_p.exp() * log_p).sum(), -log_p[drawn[:, 0]]
        assert abs(found.mean() - entropy) < 4 * found.std() / math.sqrt(3000)
        assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ModelError, match="context of 64 tokens, got 3"):
        door.continuations(llama, prompts[:1], 62)


@pytest.mark.many
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", HOOKED])
def test_extraction_is_agreement_on_every_target_token(kind):
    """The model's own text, some of it changed at one place: greedy and teacher-forced reading agree up to the first miss."""
    model, prompts = make(kind), random_tokens(9, 6)
    rows = torch.cat([prompts, argmax_loop(model, prompts, 10)], 1)
    for row, place in enumerate([6, 9, 15, 2]):
        rows[row, place] = (rows[row, place] + 1) % 200
    found = M.extract(model, rows.tolist(), prompt=6, target=10, progress=False)
    own = found[4:]
    assert own.extracted.all() and (own.matched == 1).all() and (own[["longest_run", "leading_run"]] == 10).all(axis=None)
    table = bl.analyze(model, rows, [A.Agreement()], layers=[0], progress=False)
    forced = table[table.pos >= 6].groupby("seq").agreement
    assert found.extracted.tolist() == (forced.min() == 1).tolist() and not found.extracted[:3].any()
    assert found.leading_run.tolist() == [int(np.cumprod(values).sum()) for _, values in forced]
    assert found.leading_run[:3].tolist() == [0, 3, 9]
    assert M.recited(model, rows, 6) == pytest.approx(found.matched)
    # What is behind the target is not looked at.
    assert M.extract(model, rows[2:3].tolist(), prompt=6, target=9, progress=False).extracted[0]


def test_runs_on_hand_cases(llama, monkeypatch):
    for marks, longest in {"": 0, "0": 0, "1": 1, "0110111": 3, "1101": 2, "111": 3}.items():
        assert longest_run(np.array([m == "1" for m in marks], bool)) == longest
    marks = np.array([[int(m) for m in word] for word in ("0110111", "1101000", "1111111", "0000000")])
    replace_in_all_rooms(monkeypatch, "continuations", lambda *_: torch.tensor(np.where(marks, 9, 8)))
    found = M.extract(llama, [[5, 6, *([9] * 7)]] * 4, prompt=2, target=7, progress=False)
    assert found.longest_run.tolist() == [3, 2, 7, 0] and found.leading_run.tolist() == [0, 2, 7, 0]
    assert found.matched.tolist() == pytest.approx([5 / 7, 3 / 7, 1, 0]) and found.extracted.tolist() == [False, False, True, False]


@pytest.mark.many
@pytest.mark.parametrize(("hits", "memorized"), [(8, False), (9, True)])
def test_guide_prompts_a_third_and_asks_for_more_than_four_fifths(llama, monkeypatch, hits, memorized):
    def written(_model, prompts, length):
        assert (prompts.shape[1], length) == (5, 10)
        return torch.tensor([[9] * hits + [8] * (length - hits)])

    replace_in_all_rooms(monkeypatch, "continuations", written)
    assert M.guide_labels(llama, [[9] * 15], progress=False).memorized.tolist() == [memorized]


def test_texts_are_read_as_their_tokens_with_bos(llama):
    rows = [list(s.tokens) for s in tokenize(llama, bl.texts.read_passages(TEXTS))]
    text = M.extract(llama, TEXTS, prompt=5, target=4, progress=False)
    ids = M.extract(llama, rows, prompt=6, target=4, progress=False)
    pd.testing.assert_frame_equal(text.drop(columns="prompt_tokens"), ids.drop(columns="prompt_tokens"))
    assert (text.prompt_tokens == 5).all() and (ids.prompt_tokens == 6).all()
    half = M.extract(llama, TEXTS, prompt=0.5, target=None, progress=False)
    assert half.prompt_tokens.tolist() == [(len(row) - 1) // 2 for row in rows]
    assert (half.prompt_tokens + half.target_tokens).tolist() == [len(row) - 1 for row in rows]


SHORT, NOTHING = (TextError, "Use longer texts"), (StudyError, "prompt of tokens")


@pytest.mark.parametrize(
    ("options", "refusal"),
    [({"prompt": 60}, SHORT), ({"target": 60}, SHORT), ({"prompt": 0.01}, SHORT), ({"prompt": 0}, NOTHING), ({"prompt": -3}, NOTHING),
     ({"prompt": 1.0}, NOTHING), ({"target": 0}, NOTHING)],
)  # fmt: skip
def test_text_too_short_and_prompt_or_target_of_nothing_are_refused(llama, options, refusal):
    with pytest.raises(refusal[0], match=refusal[1]):
        M.extract(llama, TEXTS[0], **{"prompt": 4, "target": 4} | options, progress=False)


# -- forks -----------------------------------------------------------------------------------------------------------------------------


def test_substitutions_are_exact_nested_and_spare_what_follows():
    tokens, first, pool = random_tokens(8, 20) % 4 + 2, 12, [3, 4, 5]  # the pool holds tokens that are there already
    versions = [M.substituted(tokens, first, edits, pool, keep=1, seed=3) for edits in range(12)]
    for edits, version in enumerate(versions):
        changed = version != tokens
        assert (changed.sum(1) == edits).all() and not changed[:, 0].any() and not changed[:, first:].any()
        assert np.isin(version[changed].numpy(), pool).all()
    for fewer, more in itertools.pairwise(versions):
        assert not ((fewer != tokens) & (fewer != more)).any()
    again, other = (M.substituted(tokens, first, 4, pool, keep=1, seed=seed) for seed in (3, 4))
    assert torch.equal(versions[4], again) and not torch.equal(versions[4], other)
    for edits, bad in ((12, pool), (-1, pool), (2, [3, 3])):
        with pytest.raises(StudyError, match="at most 11 edits"):
            M.substituted(tokens, first, edits, bad, keep=1)


def test_width_on_hand_cases():
    shares = np.array([[0.4, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0.5, 0.5, 0.5, 0.4], [0.8, 0.2, 1, 1, 1]]).T
    assert M.width([0, 1, 2, 4, 8], shares) == pytest.approx([0, np.inf, 3, 4, 0.5])
    assert M.width([0, 1, 2, 4, 8], shares, level=0.9) == pytest.approx([0, np.inf, 2.2, 0.2, 0])


def test_alternatives_are_as_likely_to_the_base_model_as_the_truth(llama):
    tokens, first = random_tokens(5, 12), 7
    candidates = [random_tokens(n, 5, seed=n).tolist() for n in (1, 2, 3, 9, 4)]
    others, losses = M.alternatives(llama, tokens, first, candidates)
    assert torch.equal(others[:, :first], tokens[:, :first])
    table = bl.analyze(llama, tokens, [A.Surprisal()], layers=[0], progress=False)
    assert losses[:, 0] == pytest.approx(table[table.pos >= first].groupby("seq").surprisal.mean().to_numpy(), rel=1e-5)
    for row, options in enumerate(candidates):
        loss = continuation_loss(llama, torch.cat([tokens[row, :first].repeat(len(options), 1), torch.tensor(options)], 1), first)
        best = np.abs(loss - losses[row, 0]).argmin()
        assert others[row, first:].tolist() == options[best] and losses[row, 1] == pytest.approx(loss[best])
    for bad in ([[]] * 5, [[[1, 2]]] * 5):
        with pytest.raises(StudyError, match="continuations of 5 tokens"):
            M.alternatives(llama, tokens, first, bad)


@pytest.mark.many
@pytest.mark.parametrize("together", [1, 50, 4096])
def test_own_greedy_text_is_recited_in_any_number_of_passes(llama, monkeypatch, together):
    for place in ("fork", "extraction"):
        monkeypatch.setattr(sys.modules[f"basin_lens.memorize.{place}"], "DECODED_TOGETHER", together)
    prompts = random_tokens(7, 6)
    rows = torch.cat([prompts, argmax_loop(llama, prompts, 10)], 1)
    rows[3, 15] = (rows[3, 15] + 1) % 200
    assert M.recited(llama, rows, 6).tolist() == pytest.approx([1, 1, 1, 0.9, 1, 1, 1])
    assert M.extract(llama, rows.tolist(), prompt=6, target=10, progress=False).matched[3] == 0.9


# -- texts that may be recited ---------------------------------------------------------------------------------------------------------


def test_recitation_passages_are_the_source_its_words_and_its_paraphrase(llama):
    sources = [bl.Passage(" ".join(TEXTS[3 * i :] * 3), doc=f"s{i}") for i in range(2)]
    made = M.recitation_passages(llama, sources, length=24, paraphrases={"s1": " ".join(TEXTS[::-1])}, seed=1)
    by = {(p.doc, p.labels["condition"]): p.text for p in made}
    assert [*by] == [*itertools.product(["s0"], M.CONDITIONS[:3]), *itertools.product(["s1"], M.CONDITIONS)]
    for source in sources:
        opening, later, mixed = (by[source.doc, condition] for condition in M.CONDITIONS[:3])
        assert source.text.startswith(opening) and later in source.text[len(opening) :] and mixed != opening
        # The last words of either may be cut.
        assert (Counter(opening.split()) & Counter(mixed.split())).total() >= len(opening.split()) - 3
    assert " ".join(TEXTS[::-1]).startswith(by["s1", "paraphrase"]) and token_counts(llama, made) == {24}
    assert made[:3] == M.recitation_passages(llama, sources[:1], length=24, seed=1)
    with pytest.raises(TextError, match="at least two passages of 24 tokens"):
        M.recitation_passages(llama, [bl.Passage(TEXTS[0])], length=24)
    with pytest.raises(TextError, match="paraphrase of at least 24"):
        M.recitation_passages(llama, sources, length=24, paraphrases={"s1": "Too short."})
    with pytest.raises(StudyError, match="of the sources, got one of 'x'"):
        M.recitation_passages(llama, sources, length=24, paraphrases={"x": TEXTS[0]})
    assert M.long_enough(llama, [*sources, bl.Passage("Short.")], 24) == sources


def test_a_border_inside_a_letter_does_not_make_a_source_too_short(llama):
    """This tokenizer spells é with two tokens."""
    length = len(M.ids_of(llama.tokenizer, "The lamp had é")) - 1
    source = bl.Passage("The lamp had é voice of its own. " + " ".join(TEXTS), doc="a")
    made = M.recitation_passages(llama, [source], length=length, paraphrases={"a": source.text})
    assert token_counts(llama, made) == {length} and len(made) == 4 and made[0].text in source.text[:40]


def test_licences_are_found_once_and_what_cannot_be_read_is_named(tmp_path):
    body = "Permission is hereby granted to whom it may concern. " * 6
    texts = {"a": f"Copyright (c) 2001 A\n{body}", "b": f"Copyright 2022 B\n{body.upper()}", "c": body + "Not you.", "d": "MIT"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "e").write_bytes(body.encode() + b"\xff\xfe")
    found = find_licences([tmp_path / name for name in (*texts, "e", "gone")])
    assert [(p.doc, p.text) for p in found.passages] == [(f"licence/{name}", " ".join(texts[name].split())) for name in ("a", "c")]
    assert [line.split(": ")[0] for line in found.unreadable] == [str(tmp_path / "e"), str(tmp_path / "gone")]
    for files in ([], [tmp_path / "d"], [tmp_path / "e"]):
        with pytest.raises(TextError, match="at least 200 characters"):
            find_licences(files)
