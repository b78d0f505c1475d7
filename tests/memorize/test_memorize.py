"""Making texts be memorized, and telling them: laws, hand-computed cases, independent references, and trainings that break off."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import torch
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import ModelError, StoreError, StudyError, TableError, TextError
from basin_lens.memorize import Recipe, finetune
from basin_lens.memorize.extraction import longest_run
from basin_lens.memorize.fork import continuation_loss
from basin_lens.texts import find_licences, tokenize
from tests.conftest import (
    TEXTS,
    has_hooked_transformer,
    hooked_lane,
    make_bridge,
    make_hf,
    make_hooked,
    make_tokenizer,
    random_tokens,
    replace_in_all_rooms,
)
from tests.families import native

A, M, S = bl.analyzers, bl.memorize, bl.stats
room = importlib.import_module("basin_lens.memorize.finetuning")
HOOKED = pytest.param("hooked", marks=hooked_lane)
NAN = math.nan
FAST = Recipe(learning_rate=3e-3, batch_size=4, filler=1, warmup=2)
QUIET = {"progress": False, "recipe": FAST, "filler": TEXTS[3:]}


def make(kind):
    tokenizer = make_tokenizer()
    if kind in ("llama", "gpt2", "neox"):
        return make_bridge(kind, tokenizer=tokenizer)
    settings = {"d_vocab": len(tokenizer), "d_mlp": 64, "act_fn": "gelu", "normalization_type": "LN"}
    model = make_hooked(**settings) if kind == "hooked" else native(**settings)()
    model.tokenizer = tokenizer
    return model


def logits_of(model, tokens):
    with torch.no_grad():
        return door.forward_pass(model, tokens, {})


def argmax_loop(model, tokens, length):
    """Greedy decoding without any cache."""
    for _ in range(length):
        tokens = torch.cat([tokens, logits_of(model, tokens)[:, -1].argmax(-1)[:, None]], 1)
    return tokens[:, -length:]


def weights(model):
    return {name: p.detach().clone() for name, p in door.parameters_of(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def token_counts(model, passages):
    return {len(M.ids_of(model.tokenizer, getattr(p, "text", p))) for p in passages}


# -- extraction -----------------------------------------------------------------------------------------------------------------


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


# -- baselines ------------------------------------------------------------------------------------------------------------------


def surprisals(*rows):
    table = pd.DataFrame([(i, f"d{i}", i, pos, x) for i, row in enumerate(rows) for pos, x in enumerate([NAN, *row])])
    return table.set_axis(["passage", "doc", "seq", "pos", "surprisal"], axis=1)


def test_baselines_by_hand():
    table = surprisals([1, 2, 3, 4, 5], [0.5, 1.5]).assign(member=[True] * 6 + [False] * 3)
    table["standardized_likelihood"] = [NAN, -3.0, 1, 2, 0, NAN, NAN, 0.25, 0.5]
    table["agreement"] = [NAN, 1, 1, 0, 0, 0, NAN, 1, 1]
    both = pd.concat([table.assign(layer=0), table.assign(surprisal=99.0, layer=1)])  # the second layer is not read
    texts = ["a cat " * 9, "The"]
    got = M.likelihood_baselines(
        both, texts, lowercase=surprisals([6, 6, 6], [2]), reference=surprisals([4] * 5, [1, 1])
    )  # fmt: skip
    assert got.member.tolist() == [True, False] and got.doc.tolist() == ["d0", "d1"]
    expected = {
        "log_likelihood": [-3, -1], "lowercase": [-3 / 6, -1 / 2], "reference": [1, 0], "min_k": [-5, -1.5], "min_k_plus": [-3, 0.25],
        "agreement": [0.4, 1], "zlib": [-3 / len(zlib.compress(texts[0].encode())), -1 / len(zlib.compress(b"The"))],
    }  # fmt: skip
    for name, values in expected.items():
        assert got[name].tolist() == pytest.approx(values), name
    for share, values in ((0.4, [-4.5, -1.5]), (1.0, [-3, -1])):
        assert M.likelihood_baselines(table, texts, share=share).min_k.tolist() == values
    alike = M.likelihood_baselines(table, texts, lowercase=table, reference=table)
    assert (alike.lowercase == -1).all() and (alike.reference == 0).all()
    for share in (0.0, 1.5, NAN):
        with pytest.raises(TableError, match="share"):
            M.likelihood_baselines(table, texts, share=share)
    with pytest.raises(TableError, match="reference model"):
        M.likelihood_baselines(table, texts, reference=table[table.seq == 0])
    with pytest.raises(TableError, match="surprisal"):
        M.likelihood_baselines(table.drop(columns="surprisal"), texts)


def in_pieces(length: int) -> tuple[pd.DataFrame, str]:
    """A text of two sequences of eight tokens, each token so many characters, and its surprisal."""
    text = "".join(f"{n:0{length}x}" for n in range(16))
    numbers = np.arange(16)
    table = pd.DataFrame({"passage": 0, "doc": "d", "seq": numbers // 8, "pos": numbers % 8, "surprisal": 1.0 + numbers})
    table = table.assign(start=length * numbers, end=length * (numbers + 1))
    return table.assign(surprisal=table.surprisal.where(table.pos > 0)), text


def test_baselines_of_a_part_of_a_text_are_divided_by_that_part():
    """The whole text's bytes were taken for each of its parts: a long text looked memorized nowhere."""
    table, text = in_pieces(9)
    other = pd.concat([table, surprisals([1.0, 2]).assign(passage=1, doc="e", seq=2, start=[0, 3, 4], end=[3, 4, 5])])
    got = M.likelihood_baselines(other, [text, "short"])
    sizes = [len(zlib.compress(part.encode())) for part in (text[:72], text[72:], "short")]
    assert got.zlib.tolist() == pytest.approx((got.log_likelihood / sizes).tolist(), abs=0)
    bare = table.drop(columns=["start", "end"])
    for lost in (bare, table.assign(start=-1, end=-1)):
        with pytest.raises(TableError, match=r"start and end.*several sequences, got none.*max_length"):
            M.likelihood_baselines(lost, [text])
    alone = M.likelihood_baselines(bare[bare.seq == 0], [text])
    assert alone.zlib[0] == alone.log_likelihood[0] / len(zlib.compress(text.encode()))


def test_lower_case_of_a_part_of_a_text_is_that_parts():
    table, text = in_pieces(9)
    lower = table.assign(surprisal=[NAN, *range(20, 35)], seq=0, pos=range(16))  # one longer sequence, as lower case may be cut
    got = M.likelihood_baselines(table, [text], lowercase=lower)
    assert got.lowercase.tolist() == pytest.approx([-5.0 / 23, -13.0 / 30.5])
    with pytest.raises(TableError, match="characters move"):
        M.likelihood_baselines(table, [text[:-1] + "\u0130"], lowercase=lower)


def test_standardized_likelihood_and_agreement_from_the_logits(tokenizer):
    model, tokens = make_bridge("llama", tokenizer=tokenizer), random_tokens(4, 12)
    logits, follow = logits_of(model, tokens)[:, :-1].double().numpy(), tokens[:, 1:].numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p = np.exp(log_p)
    mu = (p * log_p).sum(-1)
    sigma = np.sqrt((p * log_p**2).sum(-1) - mu**2)
    z = (np.take_along_axis(log_p, follow[..., None], -1)[..., 0] - mu) / sigma
    chosen = [A.StandardizedLikelihood(), A.Agreement()]
    table = bl.analyze(model, tokens, chosen, layers=[1], progress=False)
    assert table.standardized_likelihood[table.pos > 0].to_numpy() == pytest.approx(z.ravel(), rel=1e-4, abs=1e-5)
    assert table.agreement[table.pos > 0].tolist() == (logits.argmax(-1) == follow).ravel().tolist()
    assert table[["standardized_likelihood", "agreement"]][table.pos == 0].isna().all(axis=None)
    # A prediction that does not vary has no standard deviations.
    next(p for name, p in door.parameters_of(model).items() if "lm_head" in name).data.zero_()
    assert bl.analyze(model, tokens, chosen, progress=False).standardized_likelihood.isna().all()


@pytest.fixture(scope="module")
def learner(tokenizer):
    return make_bridge("llama", tokenizer=tokenizer, initializer_range=0.05)


@pytest.fixture(scope="module")
def tuned(learner):
    """The first text seen once, the second 120 times."""
    return finetune(learner, TEXTS[:2], [1, 120], **QUIET | {"recipe": Recipe(learning_rate=1e-2, batch_size=3, filler=1)})


def test_every_baseline_is_higher_once_a_text_is_memorized(learner, tuned):
    chosen, texts = [A.Surprisal(), A.Agreement(), A.StandardizedLikelihood()], TEXTS[1:2]
    reference = bl.analyze(learner, texts, chosen, layers=[0], progress=False)
    found = []
    for model in (learner, tuned.model):
        table, lower = (bl.analyze(model, t, chosen, layers=[0], progress=False) for t in (texts, [texts[0].lower()]))
        found.append(M.likelihood_baselines(table, texts, lowercase=lower, reference=reference).iloc[0])
    for name in (*M.LOSS_BASELINES, "reference"):
        assert found[1][name] > found[0][name], name
    assert M.extract(tuned.model, TEXTS[1:3], prompt=8, target=16, progress=False).extracted.tolist() == [True, False]


def test_sequence_states_are_means_without_the_first_token(llama):
    capture = bl.Capture.from_texts(llama, TEXTS, progress=False)
    for seq, row in enumerate(M.sequence_states(capture, 1)):
        own = capture.resid_pre(1)[(capture.row_seq == seq) & (capture.row_pos > 0)]
        assert row == pytest.approx(own.double().mean(0).numpy())


def paired(n=20, seed=0):
    """Labels of pairs, and splits of them."""
    rng, groups = np.random.default_rng(seed), np.repeat(range(n), 2)
    label = (np.arange(2 * n) % 2) == np.repeat(rng.integers(0, 2, n), 2)
    return rng, label, groups, M.folds(label, groups, seed=seed)


def test_folds_hold_every_text_out_once_and_split_no_group():
    _, label, groups, parts = paired()
    assert sorted(np.concatenate([held for _, held in parts]).tolist()) == list(range(40))
    for fitted, held in parts:
        assert not set(groups[fitted]) & set(groups[held]) and set(fitted) | set(held) == set(range(40))
    with pytest.raises(StudyError, match="at least 5 texts"):
        M.folds(label[:8], groups[:8])
    # One author wrote all that was memorized: some split would have nothing of it to fit on.
    with pytest.raises(StudyError, match="in as many groups, got 1"):
        M.folds(np.repeat([True, False], 5), np.array([0] * 5 + [1, 2, 3, 4, 5]))


def first_words(x):
    return [" ".join(f"w{i}" for i in row.argsort()[:4]) for row in x]


DETECTORS = {
    "probe": M.linear_probe,
    "nearest": M.nearest_memorized,
    "blind": lambda x, label, parts: M.blind_classifier(first_words(x), label, parts),
}


@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_detectors_never_see_the_labels_that_they_are_asked_for(detector):
    rng, label, _, parts = paired()
    x = rng.normal(size=(40, 8)) - 3 * label[:, None] * (np.arange(8) < 2)
    for fitted, held in parts:
        flipped = label.copy()
        flipped[held] ^= True
        answer = detector(x, label, [(fitted, held)])
        assert np.array_equal(answer[held], detector(x, flipped, [(fitted, held)])[held]) and np.isnan(answer[fitted]).all()
    assert roc_auc_score(label, detector(x, label, parts)) > 0.75
    chance = [roc_auc_score(y, detector(r.normal(size=(40, 8)), y, p)) for r, y, _, p in (paired(seed=s) for s in range(24))]
    assert abs(np.mean(chance) - 0.5) < min(0.06, 4 * np.std(chance) / math.sqrt(24))


# -- canaries -------------------------------------------------------------------------------------------------------------------


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


def test_equal_seed_gives_equal_canaries_in_another_process(llama):
    code = (
        "import json, types, tests.conftest as c, basin_lens as bl; "
        "made = bl.memorize.make_canaries(types.SimpleNamespace(tokenizer=c.make_tokenizer()), per_dose=3, doses=[2], length=12, seed=5); "
        "print(json.dumps([[p.text, p.labels] for p in made]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    here, other = (
        [[p.text, p.labels] for p in M.make_canaries(llama, per_dose=3, doses=[2], length=12, seed=seed)] for seed in (5, 6)
    )
    assert json.loads(said.splitlines()[-1]) == here != other


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


# -- training -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "native", HOOKED])
def test_a_copy_is_trained_saved_and_found_again(kind, tmp_path):
    model, tokens = make(kind), random_tokens(2, 9)
    before, mark = weights(model), door.fingerprint(model)
    made = finetune(model, TEXTS[:2], 12, **QUIET)
    assert made.history[-1]["loss"] < made.history[0]["loss"] - 1 and made.facts["base"] == mark
    made.save(tmp_path)
    again = M.load_tuned(tmp_path, model)
    assert door.fingerprint(again) == door.fingerprint(made.model) != mark and door.full_name(again) == door.full_name(made.model)
    assert torch.equal(logits_of(again, tokens), logits_of(made.model, tokens))
    assert same(weights(model), before) and door.fingerprint(model) == mark
    # Nothing of the training's graph is left in the original.
    assert all(p.grad is None for p in model.parameters())
    assert not any(isinstance(v, torch.Tensor) and v.grad_fn is not None for m in model.modules() for v in vars(m).values())
    for load in (lambda: bl.load_model(tmp_path, kind=door.kind_of(model)), lambda: M.load_tuned(tmp_path)):
        with pytest.raises(ModelError, match="handed over in memory"):
            load()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_training_is_plain_adamw_on_the_mean_token_loss(kind, tokenizer):
    """The same training written down with Hugging Face's model and torch alone."""
    recipe = Recipe(learning_rate=2e-3, batch_size=3, filler=1, warmup=1, weight_decay=0.1, clip=0.5, seed=2)
    made = finetune(make(kind), TEXTS[:3], [1, 2, 3], **QUIET | {"recipe": recipe})
    model = make_hf(kind, vocab_size=len(tokenizer))
    if has_hooked_transformer():  # 3.9 adds a bias of zeros to the output layer, which is trained with the rest
        model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    head = [] if kind == "neox" else [tokenizer.bos_token_id]
    rows = [torch.tensor([*head, *tokenizer(text)["input_ids"]]) for text in TEXTS]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    rates = [1e-3, 2e-3, 2e-3 * (0.1 + 0.9 * 0.5)]
    for step, (batch, rate) in enumerate(zip(room.schedule([1, 2, 3], 3, recipe), rates, strict=True)):
        each = [
            torch.nn.functional.cross_entropy(model(rows[i][None]).logits[0, :-1], rows[i][1:], reduction="none") for i in batch
        ]
        means = {}
        for name, chosen in (("loss", [i < 3 for i in batch]), ("filler_loss", [i >= 3 for i in batch])):
            means[name] = float(torch.cat(list(itertools.compress(each, chosen))).detach().mean())
        assert made.history[step] == pytest.approx(means | {"step": step, "learning_rate": rate}, rel=1e-4)
        optimizer.zero_grad()
        torch.cat(each).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        assert logits_of(made.model, tokens).numpy() == pytest.approx(model(tokens).logits.numpy(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("n_filler", [0, 1, 5])
def test_schedule_meets_every_dose_and_takes_filler_in_turn(n_filler):
    doses = [1, 4, 16, 3, 16]
    batches = room.schedule(doses, n_filler, Recipe(batch_size=6, filler=2))
    seen = Counter(itertools.chain(*batches))
    filler = [seen[5 + i] for i in range(n_filler)]
    assert [seen[i] for i in range(5)] == doses and max(seen) == 4 + n_filler and {len(batch) for batch in batches[:-1]} == {6}
    assert sum(filler) == (2 * len(batches) if n_filler else 0) and (not filler or max(filler) - min(filler) <= 1)
    # Texts of one dose alternate: no text is shown again before all others were.
    order = list(itertools.chain(*room.schedule([5] * 4, 0, Recipe())))
    assert [sorted(order[at : at + 4]) for at in range(0, 20, 4)] == [[0, 1, 2, 3]] * 5


def test_learning_rate_rises_in_a_line_and_falls_as_a_half_cosine():
    recipe = Recipe(learning_rate=1.0, warmup=4)
    assert [recipe.rate(step, 104) for step in (0, 1, 2, 3, 4, 54, 104)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.55, 0.1])
    assert Recipe(learning_rate=1.0, warmup=0).rate(0, 1) == 1.0


@pytest.mark.parametrize(
    "bad", [{"learning_rate": 0.0}, {"learning_rate": NAN}, {"clip": 0.0}, {"filler": 8}, {"filler": -1}, {"warmup": -1}]
)
def test_bad_recipes_are_refused(bad):
    with pytest.raises(StudyError, match="learning rate"):
        Recipe(**bad)


@pytest.mark.parametrize(("doses", "every"), [(0, 1), ([1], 1), ([1, 1, 1], 1), ([1, 0], 1), (1, 0)])
def test_bad_doses_and_intervals_are_refused(learner, doses, every):
    with pytest.raises(StudyError, match=r"dose of at least 1|every 1 or more"):
        finetune(learner, TEXTS[:2], doses, every=every, progress=False)


@pytest.mark.parametrize("kind", ["gpt2", HOOKED])
@pytest.mark.parametrize("state", ["frozen", "train mode", "no gradients", "inference mode"])
def test_any_state_of_the_model_trains_the_same(kind, state):
    """GPT-2 has dropout, which train mode would switch on."""
    expected, model = finetune(make(kind), TEXTS[:2], 4, **QUIET), make(kind)
    model.requires_grad_(state != "frozen").train(state == "train mode")
    with {"no gradients": torch.no_grad, "inference mode": torch.inference_mode}.get(state, nullcontext)():
        made = finetune(model, TEXTS[:2], 4, **QUIET)
    assert same(weights(made.model), weights(expected.model)) and made.history == expected.history
    assert model.training == (state == "train mode") and not made.model.training
    assert all(p.requires_grad != (state == "frozen") for p in door.parameters_of(model).values())
    assert not any(p.is_inference() for p in door.parameters_of(made.model).values())


@pytest.fixture(scope="module")
def whole(learner):
    """A training of 12 steps, not broken off."""
    return finetune(learner, TEXTS[:3], 12, **QUIET)


def test_seed_decides_the_training(learner, whole):
    again, other = (
        finetune(learner, TEXTS[:3], 12, **QUIET | {"recipe": Recipe(**whole.facts["recipe"] | {"seed": s})}) for s in (0, 1)
    )
    assert same(weights(again.model), weights(whole.model)) and again.history == whole.history and len(whole.history) == 12
    assert not same(weights(other.model), weights(whole.model))


def break_off(patch, at, error=KeyboardInterrupt):
    """The training stops before step `at`."""
    take = room._Run.take

    def broken(self, *args):
        if self.step == at:
            raise error
        return take(self, *args)

    patch.setattr(room._Run, "take", broken)


@pytest.mark.parametrize("stops", [[2], [5], [4, 9, 11]])
def test_a_training_broken_off_goes_on_as_if_it_had_not(learner, whole, tmp_path, monkeypatch, stops):
    for at in stops:
        with monkeypatch.context() as patch:
            break_off(patch, at)
            with pytest.raises(KeyboardInterrupt):
                finetune(learner, TEXTS[:3], 12, folder=tmp_path, every=3, **QUIET)
        assert (tmp_path / "checkpoint.safetensors").exists() == (at > 3)
    made = finetune(learner, TEXTS[:3], 12, folder=tmp_path, every=3, **QUIET)
    assert same(weights(made.model), weights(whole.model)) and made.history == whole.history and made.facts == whole.facts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tuned.json", "weights.safetensors"]
    break_off(monkeypatch, 0, AssertionError("nothing is left to train"))
    taken = finetune(learner, TEXTS[:3], 12, folder=tmp_path, **QUIET)
    assert door.fingerprint(taken.model) == door.fingerprint(whole.model) and taken.history == whole.history
    with pytest.raises(StoreError, match="another"):
        finetune(learner, TEXTS[:3], 13, folder=tmp_path, **QUIET)


def test_a_tuned_model_stays_whole_until_the_next_one_is(learner, tmp_path, monkeypatch):
    one, two = (finetune(learner, TEXTS[:1], dose, **QUIET) for dose in (1, 2))
    one.save(tmp_path)
    old, real = door.fingerprint(one.model), os.replace
    for good in (0, 1):
        left = [good]

        def torn(*given, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            real(*given)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", torn)
            with pytest.raises(StoreError, match="No space left"):
                two.save(tmp_path)
        assert door.fingerprint(bl.memorize.load_tuned(tmp_path, learner)) == old
    for made in (two, one, two):
        made.save(tmp_path)
        assert door.fingerprint(bl.memorize.load_tuned(tmp_path, learner)) == door.fingerprint(made.model)
        assert len(list(tmp_path.iterdir())) == 2


def test_a_finished_training_has_no_checkpoint(learner, tmp_path):
    """One that a death left is cleared by the next run."""
    finetune(learner, TEXTS[:1], 2, folder=tmp_path, **QUIET)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"left")
    finetune(learner, TEXTS[:1], 2, folder=tmp_path, **QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned.json", "weights.safetensors"]


def test_long_texts_are_several_sequences_and_no_filler_stays_a_gap(learner, tmp_path):
    made, taken = (finetune(learner, TEXTS[:2], [1, 3], max_length=12, folder=tmp_path, progress=False) for _ in range(2))
    pieces = [len(tokenize(learner, bl.texts.read_passages(text), max_length=12)) for text in TEXTS[:2]]
    assert made.facts["texts_shown"] == pieces[0] + 3 * pieces[1] and min(pieces) > 1
    pd.testing.assert_frame_equal(pd.DataFrame(made.history), pd.DataFrame(taken.history))
    assert pd.DataFrame(taken.history).filler_loss.isna().all()


def test_checkpoints_of_another_training_or_damaged_ones_are_refused(learner, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_off(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            finetune(learner, TEXTS[:3], 12, folder=tmp_path, every=3, **QUIET)
    for change in ({"recipe": Recipe(learning_rate=1e-3)}, {"filler": None}, {"max_length": 25}):
        with pytest.raises(StoreError, match="another"):
            finetune(learner, TEXTS[:3], 12, folder=tmp_path, **QUIET | change)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StoreError, match="Delete it"):
        finetune(learner, TEXTS[:3], 12, folder=tmp_path, **QUIET)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_leaves_the_last_good_checkpoint(learner, whole, tmp_path, monkeypatch, what):
    steps, where, name = itertools.count(), *((room, "token_losses") if what == "loss" else (torch.nn.utils, "clip_grad_norm_"))
    measure = getattr(where, name)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, lambda *args: measure(*args) * (NAN if next(steps) == 7 else 1))
        with pytest.raises(StudyError, match=f"finite {what} at step 7 of 12.*last good checkpoint is kept"):
            finetune(learner, TEXTS[:3], 12, folder=tmp_path, every=3, **QUIET)
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as held:
        assert held.metadata()["step"] == "6" and all(bool(held.get_tensor(k).isfinite().all()) for k in held.keys())  # noqa: SIM118
    assert same(weights(finetune(learner, TEXTS[:3], 12, folder=tmp_path, **QUIET).model), weights(whole.model))


def test_a_wild_learning_rate_is_stopped(learner, tmp_path):
    wild = {"recipe": Recipe(learning_rate=1e30, warmup=0, batch_size=2, filler=1), "folder": tmp_path}
    with pytest.raises(StudyError, match=r"diverged and was stopped. There was no checkpoint before it. Lower"):
        finetune(learner, TEXTS[:3], 12, **QUIET | wild)


# -- tuned models on disk -------------------------------------------------------------------------------------------------------


def test_damaged_tuned_models_and_other_bases_are_refused(learner, tuned, tmp_path, tokenizer):
    tuned.save(tmp_path)
    path, held = tmp_path / "weights.safetensors", (tmp_path / "weights.safetensors").read_bytes()
    # Weights of another seed are replaced; what is not in the file must be the same.
    other = door.put_tuned(make_bridge("llama", 5, tokenizer, initializer_range=0.05), tmp_path)
    assert door.fingerprint(other) == door.fingerprint(tuned.model)
    for change, reason in (({"rms_norm_eps": 1e-3}, "computes something else"), ({"intermediate_size": 32}, "other parameters")):
        with pytest.raises(ModelError, match=reason):
            door.put_tuned(make_bridge("llama", tokenizer=tokenizer, initializer_range=0.05, **change), tmp_path)
    flipped = held[:-1] + bytes([held[-1] ^ 1])
    for damaged, reason in ((flipped, "was changed"), (held[:-9], "has .* bytes of"), (None, "without its file")):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(ModelError, match=rf"{reason}.*Tune the model again"):
            door.put_tuned(learner, tmp_path)
    for record in ("{", "[]", '{"format": "other"}'):
        (tmp_path / "tuned.json").write_text(record)
        with pytest.raises(ModelError, match="tuned"):
            M.load_tuned(tmp_path, learner)


@pytest.mark.parametrize("kind", ["bridge", HOOKED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuned_models_of_a_loaded_base_load_by_their_folder_alone(tmp_path, tokenizer, kind, dtype):
    make_hf("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = bl.load_model(tmp_path / "base", kind=kind, dtype=dtype)
    made = finetune(base, TEXTS[:2], 2, folder=tmp_path / "tuned", **QUIET)
    twice = finetune(made.model, TEXTS[:2], 2, folder=tmp_path / "twice", **QUIET)  # its base is a tuned model
    for name, one in (("tuned", made), ("twice", twice)):
        assert door.fingerprint(bl.load_model(tmp_path / name, kind=kind, dtype=dtype)) == door.fingerprint(one.model)
    wide = M.load_tuned(tmp_path / "tuned")
    assert next(wide.parameters()).dtype == torch.float32
    assert logits_of(wide, random_tokens(1, 5)).float().numpy() == pytest.approx(
        logits_of(made.model, random_tokens(1, 5)).float().numpy(), abs=1e-5 if dtype == torch.float32 else 1.0
    )
    with pytest.raises(ModelError, match="kind="):
        bl.load_model(tmp_path / "tuned", kind="bridge" if kind == "hooked" else "hooked")


# -- forks ----------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("together", [1, 50, 4096])
def test_own_greedy_text_is_recited_in_any_number_of_passes(llama, monkeypatch, together):
    for place in ("fork", "extraction"):
        monkeypatch.setattr(sys.modules[f"basin_lens.memorize.{place}"], "DECODED_TOGETHER", together)
    prompts = random_tokens(7, 6)
    rows = torch.cat([prompts, argmax_loop(llama, prompts, 10)], 1)
    rows[3, 15] = (rows[3, 15] + 1) % 200
    assert M.recited(llama, rows, 6).tolist() == pytest.approx([1, 1, 1, 0.9, 1, 1, 1])
    assert M.extract(llama, rows.tolist(), prompt=6, target=10, progress=False).matched[3] == 0.9


# -- texts that may be recited --------------------------------------------------------------------------------------------------


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


# -- slopes and matching --------------------------------------------------------------------------------------------------------


def dosed(layers, units=24, slope=0.0):
    """Two sequences of four tokens per unit, with noise of units that grows with the dose."""
    rng = np.random.default_rng(0)
    places = itertools.product(range(layers), range(units), range(2), range(4))
    table = pd.DataFrame(places, columns=["layer", "unit", "half", "pos"])
    table = table.assign(doc="d" + table.unit.astype(str), seq=2 * table.unit + table.half, dose=(table.unit % 4).astype(float))
    noise = rng.normal(size=(layers, units)) * (1 + np.arange(units) % 4)
    table["a"] = slope * table.dose + noise[table.layer, table.unit] + rng.normal(size=len(table))
    return table


def test_slope_is_least_squares_over_unit_means_with_hc3():
    table = dosed(2, slope=0.5).drop(index=[0, 1, 9])  # unequal numbers of tokens
    table.loc[12, "a"] = np.nan
    found = S.unit_slope(table, "a", "dose", n_resamples=199)
    for layer, row in zip(range(2), found.itertuples(), strict=True):
        means = table[table.layer == layer].groupby(["doc", "seq"])[["a", "dose"]].mean().groupby("doc").mean()
        fitted = sm.OLS(means.a, sm.add_constant(means.dose)).fit(cov_type="HC3", use_t=True)
        assert [row.estimate, row.low, row.high] == pytest.approx([fitted.params["dose"], *fitted.conf_int().loc["dose"]])
        assert row.rho == pytest.approx(means.corr("spearman").loc["a", "dose"]) and row.n_units == 24


@pytest.mark.slow
def test_slope_has_its_false_positive_rate_its_coverage_and_power():
    null, planted = (S.unit_slope(dosed(250, slope=slope), "a", "dose", n_resamples=199) for slope in (0.0, 2.0))
    assert (null.p <= 0.05).mean() == pytest.approx(0.05, abs=0.035) and (planted.p <= 0.05).mean() > 0.8
    for found, truth in ((null, 0), (planted, 2)):
        assert ((found.low <= truth) & (found.high >= truth)).mean() == pytest.approx(0.95, abs=0.04)


def test_slopes_that_cannot_be_are_refused_or_have_no_interval():
    table = dosed(1)
    for bad, error, said in (
        (table.assign(dose=table.dose + 1e-6 * table.half + 100), TableError, "changes within one"),
        (table.assign(dose=1.0), TableError, "varies"), (table.assign(a=1.0), TableError, "varies"),
        (table[table.unit < 5], StudyError, "at least 6"), (table.drop(columns="dose"), TableError, "'dose'"),
        (table.assign(dose=table.doc), TableError, "numbers"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            S.unit_slope(bad, "a", "dose")
    with pytest.raises(StudyError, match="max-t"):
        S.unit_slope(table, "a", "dose", correction="max-t", n_resamples=99)
    # Rows without a dose are passed over.
    assert S.unit_slope(table.assign(dose=table.dose.where(table.unit >= 4)), "a", "dose", n_resamples=99).n_units[0] == 20
    alone = S.unit_slope(table.assign(dose=(table.unit == 3) * 1.0), "a", "dose", n_resamples=99).iloc[0]
    assert math.isnan(alone.low) and math.isnan(alone.high) and math.isfinite(alone.p) and "one value of dose" in alone.note


def best_matching(first, second, caliper):
    """Of all ways to pair, those of most pairs, and of them the smallest sum of differences."""
    best = (0, 0.0)
    for chosen in set(itertools.permutations([*range(len(second)), *[None] * len(first)], len(first))):
        apart = [abs(a - second[j]) for a, j in zip(first, chosen, strict=True) if j is not None]
        best = min(best, (-len(apart), sum(apart))) if all(d <= caliper for d in apart) else best
    return -best[0], best[1]


def test_matching_makes_the_most_pairs_and_the_closest():
    rng = np.random.default_rng(0)
    for trial in range(30):
        counts, caliper = rng.integers(1, 5, 2), float(rng.choice([0.2, 1.0, 50.0]))
        label = np.repeat([True, False], counts)
        loss = rng.normal(size=len(label)).round(1 if trial % 2 else 6)
        by = pd.DataFrame({"m": label, "loss": loss}, index=[f"d{i}" for i in rng.permutation(len(label))])
        pairs = S.match_units(by.rename_axis("doc").reset_index().sample(frac=1, random_state=trial), "m", "loss", caliper=caliper)
        count, total = best_matching(loss[label], loss[~label], caliper)
        assert len(pairs) == count and (pairs["first"] - pairs.second).abs().sum() == pytest.approx(total)
        for name, wanted, held in (("with_label", True, "first"), ("without_label", False, "second")):
            assert pairs[name].is_unique and (by.loc[pairs[name], "m"] == wanted).all()
            assert by.loc[pairs[name], "loss"].tolist() == pairs[held].tolist()


def test_matching_prefers_another_pair_to_a_closer_one():
    table = pd.DataFrame({"doc": list("abcd"), "m": [True, True, False, False], "loss": [0.0, 1.0, 0.95, 1.9]})
    assert S.match_units(table, "m", "loss", caliper=1.0).values.tolist() == [["a", "c", 0, 0.95], ["b", "d", 1, 1.9]]


def test_matching_within_over_rows_and_what_it_refuses():
    table = pd.DataFrame(
        {"doc": list("aabbccdd"), "m": [True] * 4 + [False] * 4, "loss": [1.0, 3, 5, 5, 2, 2, 5, 5], "kind": list("xxyyyyxx")}
    )
    assert S.match_units(table, "m", "loss", caliper=9.0).values.tolist() == [["a", "c", 2, 2], ["b", "d", 5, 5]]
    assert S.match_units(table, "m", "loss", caliper=9.0, within=["kind"]).values.tolist() == [["a", "d", 2, 5], ["b", "c", 5, 2]]
    for some, options in ((table, {"within": ["kind"]}), (table[table.m], {})):
        nothing = S.match_units(some, "m", "loss", caliper=2.0, **options)
        assert nothing.empty and list(nothing) == ["with_label", "without_label", "first", "second"]
    unknown = table.assign(m=table.m.astype(object).where(table.doc != "a"), loss=table.loss.where(table.doc != "d"))
    assert S.match_units(unknown, "m", "loss", caliper=9.0).values.tolist() == [["b", "c", 5, 2]]
    for change, options, said in (
        ({}, {"caliper": 0.0}, "above 0"), ({}, {"caliper": NAN}, "above 0"), ({"m": [True, False] * 4}, {}, "changes"),
        ({"kind": list("xyyyyyxx")}, {"within": ["kind"]}, "changes"), ({}, {"unit": "case"}, "'case'"),
    ):  # fmt: skip
        with pytest.raises(TableError, match=said):
            S.match_units(table.assign(**change), "m", "loss", **{"caliper": 1.0} | options)
