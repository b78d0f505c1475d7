"""Training, broken off and gone on with; tuned models on disk."""

import importlib
import itertools
import os
from collections import Counter
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from safetensors import safe_open

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import ModelError, StoreError, StudyError
from basin_lens.memorize import Recipe, finetune
from basin_lens.texts import tokenize
from tests.conftest import (
    TEXTS,
    has_hooked_transformer,
    make_bridge,
    make_hf,
    random_tokens,
)
from tests.memorize.learners import HOOKED, NAN, QUIET, M, logits_of, make

room = importlib.import_module("basin_lens.memorize.finetuning")


def weights(model):
    return {name: p.detach().clone() for name, p in door.parameters_of(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- training --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
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


@pytest.mark.many
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


@pytest.mark.many
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


@pytest.mark.slow(everywhere=True)
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


@pytest.mark.many
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


@pytest.mark.many
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


# -- tuned models on disk --------------------------------------------------------------------------------------------------------------


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


@pytest.mark.many
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
