"""Training a merger, from its windows to its log, and the commands' refusals."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import basin_lens as bl
from basin_lens import merging
from basin_lens import model as door
from basin_lens.cli.app import app
from basin_lens.errors import MergeError, StoreError
from basin_lens.merging import Parachute, Setting, TokenMerger, Training, Windows, train_merger, training_run
from tests.conftest import TEXTS, hooked_lane, make_bridge, make_hooked
from tests.merging.mergers import SHORT, different, made_merger, windows


@pytest.fixture(scope="module")
def tiny():
    return make_bridge("llama")


def parameters(merger) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in merger.weights.named_parameters()}


@pytest.mark.many
@pytest.mark.parametrize(
    "changes", [{}, {"residual": "gated", "residual_width": 3}, {"contrastive_weight": 0.5, "margin": 0.0}, {"progressive": True}]
)
def test_training_changes_what_it_should_and_nothing_else(tiny, changes):
    merger = made_merger(tiny, **changes)
    before, weights = parameters(merger), {n: p.detach().clone() for n, p in door.parameters_of(tiny).items()}
    needed = {n: p.requires_grad for n, p in door.parameters_of(tiny).items()}
    made = train_merger(merger, tiny, windows(), windows(6, seed=8), training=Training(**SHORT), progress=False)
    assert all(not torch.equal(value, before[name]) for name, value in merger.weights.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in door.parameters_of(tiny).items())
    assert needed == {n: p.requires_grad for n, p in door.parameters_of(tiny).items()}
    assert made.history["step"].tolist() == [1, 2, 3, 4] and made.history["held_out_excess"].notna().tolist() == [
        False,
        True,
        False,
        True,
    ]
    assert np.allclose(made.history["excess"], made.history["loss"] - made.history["plain_loss"])
    assert made.drift == 0.0 and made.model is tiny


def test_resumed_equals_uninterrupted(tiny, tmp_path, monkeypatch):
    whole = train_merger(made_merger(tiny), tiny, windows(), training=Training(**SHORT), folder=tmp_path / "whole", progress=False)
    real, seen = training_run.TrainingRun.take, []

    def stop(self):
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(training_run.TrainingRun, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        train_merger(made_merger(tiny), tiny, windows(), training=Training(**SHORT), folder=tmp_path / "cut", progress=False)
    monkeypatch.undo()
    assert (tmp_path / "cut" / "checkpoint.safetensors").is_file()
    again = train_merger(made_merger(tiny), tiny, windows(), training=Training(**SHORT), folder=tmp_path / "cut", progress=False)
    for name, value in whole.merger.weights.named_parameters():
        assert torch.equal(value, dict(again.merger.weights.named_parameters())[name]), name
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 4
    loaded = TokenMerger.load(tmp_path / "cut", tiny)
    assert torch.equal(loaded.weights.raw, whole.merger.weights.raw) and loaded.facts["training"]["seen"] == windows().digests()


def test_a_checkpoint_of_another_training_is_refused(tiny, tmp_path):
    run = training_run.TrainingRun(made_merger(tiny), tiny, windows(), Training(**SHORT))
    run.keep(tmp_path)
    with pytest.raises(StoreError, match="another"):
        train_merger(made_merger(tiny), tiny, windows(), training=Training(**SHORT | {"seed": 1}), folder=tmp_path, progress=False)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"no")
    with pytest.raises(StoreError, match="Delete"):
        train_merger(made_merger(tiny), tiny, windows(), training=Training(**SHORT), folder=tmp_path, progress=False)


def test_a_loss_that_is_not_finite_stops_the_training(tiny, monkeypatch):
    monkeypatch.setattr(training_run, "token_losses", lambda logits, _: logits[:, 1:, 0] * float("nan"))
    with pytest.raises(MergeError, match="finite"):
        train_merger(made_merger(tiny), tiny, windows(), training=Training(**SHORT), progress=False)
    assert all(p.requires_grad for p in door.parameters_of(tiny).values())


def test_training_the_base_reports_its_drift_and_leaves_the_base(tiny, tmp_path):
    weights = {n: p.detach().clone() for n, p in door.parameters_of(tiny).items()}
    training = Training(**SHORT, train_base=True, base_rate=1e-3)
    made = train_merger(made_merger(tiny), tiny, windows(), windows(6, seed=8), training=training, folder=tmp_path, progress=False)
    assert made.drift != 0 and all(torch.equal(p, weights[n]) for n, p in door.parameters_of(tiny).items())
    assert made.merger.base == door.fingerprint(made.model) != door.fingerprint(tiny)
    again = door.put_tuned(tiny, tmp_path / "base")
    assert TokenMerger.load(tmp_path, again).base == door.fingerprint(again)
    with pytest.raises(MergeError, match="made for"):
        TokenMerger.load(tmp_path, tiny)


def test_parachute():
    chute = Parachute(spike=0.5, part=0.2, wait=1)
    assert [chute.see(0.1) for _ in range(3)] == [None] * 3
    assert chute.see(1.0) == "back off" and chute.offset == pytest.approx(0.2)
    assert chute.see(1.0) is None  # rests
    assert chute.see(1.0) == "back off" and chute.offset == pytest.approx(0.36)
    chute.see(0.1)
    assert chute.see(0.1) == "relax" and chute.offset == pytest.approx(0.26)
    for _ in range(20):
        chute.see(0.1)
    assert chute.offset == 0 and chute.mean < 0.3
    # An offset moves thresholds towards 1, and so merges less.
    model = make_bridge("llama")
    merger = made_merger(model)
    rates = []
    for offset in (0.0, 0.5, 0.9):
        merger.weights.offset.fill_(offset)
        merger.forget()
        with merger.attached(model), torch.no_grad():
            door.forward_pass(model, windows().tokens, {})
        rates.append(merger.statistics()["rate"].mean())
    assert rates[0] > rates[1] > rates[2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: TokenMerger([0], target_rate=0.3), "calibrated"),
        (lambda m: TokenMerger([0], target_rate=0.3, rule="random").calibrate(m, windows().tokens), "learned"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny, change, words):
    with pytest.raises(MergeError, match=words):
        train_merger(change(tiny), tiny, windows(), progress=False)
    with pytest.raises(MergeError, match="batch"):
        train_merger(made_merger(tiny), tiny, windows(2), progress=False)
    with pytest.raises(MergeError, match="rates above 0"):
        Training(learning_rate=0.0)


def test_windows(llama):
    made = merging.windows_of(llama, [bl.Passage(t * 3, doc=str(i)) for i, t in enumerate(TEXTS)], 16, most=8)
    assert made.tokens.shape == (8, 16) and len(set(made.doc)) == 6
    first, rest = made.apart(0.4)
    assert not set(first.doc) & set(rest.doc) and len(first) + len(rest) == 8
    assert len(set(made.digests())) == 8
    with pytest.raises(MergeError, match="longer texts"):
        merging.windows_of(llama, ["The ferry."], 32)
    with pytest.raises(MergeError, match="context"):
        merging.windows_of(llama, TEXTS, 1000)
    with pytest.raises(MergeError, match="two documents"):
        made.take([0]).apart(0.5)


@pytest.mark.slow
def test_surprising_tokens_are_preserved_from_training_to_report(llama):
    data = merging.windows_of(llama, different(12), 32, most=20)
    calibration, held_out = data.apart(0.3)
    merger = TokenMerger([0, 1, 2], target_rate=0.3, projection=6, recent=4, preserve="surprisal", preserve_share=0.2)
    given = merging.surprisal_for(merger, llama, calibration.tokens)
    assert given.shape == calibration.tokens.shape and (given[:, 0] == 0).all() and (given[:, 1:] > 0).all()
    merger.calibrate(llama, calibration.tokens, surprisal=given)
    trained = train_merger(merger, llama, calibration, held_out, training=Training(**SHORT), progress=False)
    setting = Setting((0, 1, 2), budgets=(0.85,), projection=6, recent=4, seeds=1, policies=("trained", "random"))
    study = bl.studies.study_merging(llama, calibration, held_out, setting, merger=merger, history=trained.history, progress=False)
    # Generation goes token by token and has no plain model's pass beside it.
    assert "generation" not in study.tables and set(study.tables["induction"]["policy"]) == {"trained", "random"}
    taken = study.tables["map"]
    surprisal = merging.surprisal_for(merger, llama, held_out.tokens[:1])[0].numpy()
    assert taken["merged"].any()
    assert (surprisal[taken.loc[taken["merged"], "pos"]] <= float(merger.weights.surprisal_cutoff)).all()


def test_a_trained_base_is_watched_against_itself(tiny):
    """A base that learns must not hide what merging costs, and an unmeasured drift is no drift of 0."""
    merger = TokenMerger([0, 1, 2], threshold=1.0, projection=6, recent=2).calibrate(tiny, windows(seed=5).tokens)
    training = Training(**SHORT | {"train_base": True, "base_rate": 1e-2, "rate_weight": 1e-9})
    made = train_merger(merger, tiny, windows(), windows(6, seed=8), training=training, progress=False)
    assert abs(made.drift) > 1e-3 and made.merger.facts["training"]["drift"] == made.drift
    seen = made.history["held_out_excess"].dropna()
    assert len(seen) == 2 and (seen.abs() < 1e-5).all()  # nothing merges: whatever the base learned, merging costs nothing
    untold = train_merger(made_merger(tiny), tiny, windows(), training=Training(**SHORT | {"train_base": True}), progress=False)
    assert np.isnan(untold.drift) and untold.merger.facts["training"]["drift"] is None


def test_an_interrupted_training_of_the_base_leaves_a_merger_of_its_model(tiny, monkeypatch):
    merger = made_merger(tiny)

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run.TrainingRun, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        train_merger(merger, tiny, windows(), training=Training(**SHORT | {"train_base": True}), progress=False)
    with pytest.raises(MergeError, match="made for"):
        merger.prepare(make_bridge("llama", seed=9))


@hooked_lane
def test_hooked_transformer_trains_and_compares():
    model = make_hooked()
    merger = made_merger(model)
    train_merger(merger, model, windows(), training=Training(**SHORT), progress=False)
    setting = Setting((0, 1, 2), budgets=(0.8,), projection=6, recent=2, seeds=1, policies=("trained", "random", "key norm"))
    found = merging.compare_policies(
        model, windows(8, seed=5), Windows(windows(8).tokens, tuple("abcdefgh")), setting,
        merger=merger, progress=False,
    ).windows  # fmt: skip
    assert found["excess"].notna().all()


def test_commands_refuse_before_any_work(tmp_path):
    run = CliRunner()
    for words, said in (
        (["merge", "train", "--preset", "huge"], "preset"),
        (["merge", "test", "-", "--budgets", "half"], "shares"),
        (["merge", "train", "--data", str(tmp_path / "none.txt"), "--dataset", "built-in"], "both"),
    ):
        found = run.invoke(app, words)
        assert found.exit_code != 0 and isinstance(found.exception, MergeError) and said in str(found.exception)


def test_the_log_is_json_lines(tiny, tmp_path):
    train_merger(made_merger(tiny), tiny, windows(), training=Training(**SHORT), folder=tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(
        {"loss", "rate", "level", "offset", "event"} <= set(line) for line in lines
    )
    assert not (tmp_path / "checkpoint.safetensors").exists()
