"""What training optimizes: the hinge, its steps, the target of the rate, going on after a stop."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from basin_lens import model as door
from basin_lens.capture.passes import token_losses
from basin_lens.merging import Assigned, Parachute, TokenMerger, Training, Windows, train_merger, training_run
from basin_lens.merging.training_run import TrainingRun, contrastive_hinge
from tests.conftest import make_bridge, random_tokens
from tests.merging.mergers import LENGTH, loss_of


@pytest.fixture(scope="module")
def tiny():
    return make_bridge("llama")


def windows(count: int = 12, seed: int = 3) -> Windows:
    return Windows(random_tokens(count, LENGTH, seed), tuple(f"doc {i // 2}" for i in range(count)))


def learner(model, **changes) -> TokenMerger:
    options = {"target_rate": 0.4, "projection": 6, "recent": 2} | changes
    return TokenMerger([0, 1, 2], **options).calibrate(model, windows(seed=5).tokens)


def a_run(merger, model, **changes):
    return TrainingRun(merger, model, windows(), Training(**{"steps": 8, "batch_size": 2, "evaluate_every": 0} | changes))


def step_gradients(run, monkeypatch) -> dict[str, torch.Tensor]:
    """The gradients of one step, as the optimizer gets them but for the clipping."""
    held = {}
    names = {id(p): name for name, p in run.merger.weights.named_parameters()}
    real = torch.nn.utils.clip_grad_norm_

    def see(parameters, most):
        parameters = list(parameters)
        held.update({names[id(p)]: p.grad.clone() for p in parameters})
        return real(parameters, most)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", see)
        run.take()
    return held


# -- the contrastive hinge -------------------------------------------------------------------------------------------------------------


def assigned(joined, since, leader) -> Assigned:
    return Assigned(torch.tensor(leader), torch.tensor(joined), torch.tensor(since))


def hinge_case(run):
    """Two layers, two sequences of 5 tokens in the plane; position 0 and the last token are in no cluster."""
    t, f = True, False
    at = {name: torch.tensor(xy) for name, xy in {"e": (1.0, 0.0), "s": (0.6, 0.8), "n": (0.0, 1.0), "w": (-1.0, 0.0)}.items()}
    first = torch.stack([torch.stack([at[c] for c in row]) for row in ("eesne", "eeesw")]).requires_grad_()
    second = torch.stack([torch.stack([at[c] for c in row]) for row in ("eewne", "nnwew")]).requires_grad_()
    run.merger.pass_ = SimpleNamespace(
        units={0: first, 1: second},
        assigned={
            # Leaders 1, 2, 3; and 1, 3, for 2 has joined 1.
            0: assigned(
                [[f, f, f, f, f], [f, f, t, f, f]], [[5, 2, 3, 4, 5], [5, 2, 3, 4, 5]], [[-1, -1, 1, 1, -1], [-1, -1, 1, 1, -1]]
            ),
            # Leaders 1, 2; none in the other sequence, where nothing was decided.
            1: assigned([[f, f, f, f, f], [f, f, f, f, f]], [[5, 2, 3, 5, 5], [5, 5, 5, 5, 5]], [[-1, -1, 1, -1, -1], [-1] * 5]),
        },
    )
    return first, second


def test_the_hinge_has_the_value_that_a_hand_computes(tiny):
    run = a_run(learner(tiny, contrastive_weight=0.5, margin=0.2), tiny)
    hinge_case(run)
    # First layer: cosines .6, 0, .8 and .6, above the margin by .4, 0, .6 and .4, over 4 pairs. Second: one pair, -1. Mean over layers.
    assert contrastive_hinge(run.merger).item() == pytest.approx((1.4 / 4 + 0) / 2, abs=1e-6)
    off = a_run(learner(tiny), tiny)
    hinge_case(off)
    assert contrastive_hinge(off.merger).item() == 0


def test_down_the_hinge_clusters_move_apart_and_nothing_else_moves(tiny):
    run = a_run(learner(tiny, contrastive_weight=0.5, margin=0.2), tiny)
    first, second = hinge_case(run)
    contrastive_hinge(run.merger).backward()
    # No leaders (position 0, the last one, the member), and leaders that no pair above the margin has.
    for row, places in ((0, (0, 4)), (1, (0, 2, 4))):
        assert (first.grad[row, list(places)] == 0).all()
    assert (second.grad == 0).all()
    moved = torch.nn.functional.normalize(first.detach() - 0.1 * first.grad, dim=-1)
    for row, one, two in ((0, 1, 2), (0, 2, 3), (1, 1, 3)):
        assert moved[row, one] @ moved[row, two] < first[row, one] @ first[row, two] - 1e-3


@pytest.mark.slow(everywhere=True)
def test_the_contrastive_weight_turns_the_projection_so_that_clusters_lie_apart(tiny):
    """By a plain loop over pairs that do not move: clusters of the untrained merger, states of the plain model, the trained projection."""
    tokens, states = windows().tokens, {}
    readers = {door.point_name("resid_pre", i): lambda t, i=i: states.__setitem__(i, t.clone()) for i in range(3)}
    with door.measuring(tiny):
        door.forward_pass(tiny, tokens, readers)
    first = learner(tiny)
    with first.attached(tiny), torch.no_grad():
        door.forward_pass(tiny, tokens, {})
        clusters = {i: (a.since < LENGTH) & ~a.joined for i, a in first.pass_.assigned.items()}

    def closeness(merger) -> float:
        over = []
        for layer, leads in clusters.items():
            units = merger.weights.describe(layer, states[layer])[0].detach()
            for row, places in zip(units, leads, strict=True):
                at = places.nonzero().ravel().tolist()
                over += [max(0.0, float(row[p] @ row[q])) for p in at for q in at if p < q]
        return float(np.mean(over))

    training = Training(steps=8, batch_size=4, learning_rate=0.02, evaluate_every=0)
    made = {}
    for weight in (0.0, 20.0):
        merger = learner(tiny, contrastive_weight=weight, margin=0.0)
        train_merger(merger, tiny, windows(), training=training, progress=False)
        made[weight] = closeness(merger)
    assert made[20.0] < closeness(first) and made[20.0] < 0.9 * made[0.0], made


# -- steps -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("changes", [{}, {"adaptive": True, "residual": "gated", "residual_width": 3}])
def test_accumulated_passes_are_one_batch_of_all(llama64, monkeypatch, changes):
    """Where the rate is above its target: then the loss is a mean over windows of one length, and no window sees another."""
    runs = []
    for shape in ({"accumulate": 2, "batch_size": 2}, {"accumulate": 1, "batch_size": 4}):
        run = a_run(learner(llama64, **changes), llama64, **shape)
        run.target = 0.0
        runs.append((step_gradients(run, monkeypatch), run.merger))
    (parts, stepped), (whole, at_once) = runs
    assert set(parts) == set(whole) and len(parts) >= 2
    for name in parts:
        assert whole[name].abs().max() > 0
        assert (parts[name] - whole[name]).abs().max() < 1e-4 * whole[name].abs().max(), name
    assert (
        (stepped.weights.raw - at_once.weights.raw).abs().max()
        < 1e-4
        < (stepped.weights.raw - learner(llama64, **changes).weights.raw).abs().min()
    )


def test_accumulation_is_the_mean_over_its_passes_whatever_the_loss_holds(llama64, monkeypatch):
    """The shortfall of the rate is squared pass by pass, so with it two passes are not one batch of both, but still their mean."""
    common = {"rate_weight": 1000.0, "batch_size": 2}

    def gradients(rows, **changes):
        run = a_run(learner(llama64, contrastive_weight=0.5, margin=0.0), llama64, **common | changes)
        run.target = 0.9
        if rows is not None:
            run._rows = lambda _: rows
        return step_gradients(run, monkeypatch)

    both = gradients(None, accumulate=2)
    order = np.random.default_rng((0, 0)).permutation(12).tolist()
    one, two = gradients(order[:2]), gradients(order[2:4])
    assert (one["raw"] - two["raw"]).abs().max() > 1e-3
    for name in both:
        assert torch.allclose(both[name], (one[name] + two[name]) / 2, rtol=1e-4, atol=1e-7), name


# -- the target of the rate ------------------------------------------------------------------------------------------------------------


def language_loss_gradients(run) -> dict[str, torch.Tensor]:
    """Of the model's loss alone, on the windows of the run's next pass."""
    merger, tokens = run.merger, run.windows.tokens[run._rows(0)]
    with merger.attached(run.model):
        loss = token_losses(door.forward_pass(run.model, tokens, {}), tokens).mean()
    names, parameters = zip(*merger.weights.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def with_weight(model, monkeypatch, weight: float, target: float):
    run = a_run(learner(model), model, rate_weight=weight)
    run.target = target
    before = run.merger.weights.raw.detach().clone()
    return step_gradients(run, monkeypatch), (run.merger.weights.raw.detach() - before)


def test_more_merging_than_the_target_is_not_punished(tiny, monkeypatch):
    """The rate is about 0.4. Were the target two-sided, a weight of 1000 would show."""
    alone = language_loss_gradients(a_run(learner(tiny), tiny))
    light, heavy = (with_weight(tiny, monkeypatch, weight, target=0.1)[0] for weight in (1e-9, 1000.0))
    for name, gradient in alone.items():
        assert torch.equal(light[name], heavy[name]), name
        assert gradient.abs().max() > 0 and torch.allclose(heavy[name], gradient, rtol=1e-5, atol=1e-8), name


def test_less_merging_than_the_target_pushes_thresholds_down(tiny, monkeypatch):
    run = a_run(learner(tiny), tiny)
    tokens = run.windows.tokens[run._rows(0)]
    with run.merger.attached(tiny):
        door.forward_pass(tiny, tokens, {})
        rate = torch.stack([share.mean() for share in run.merger.pass_.share.values()]).mean()
    (slope,) = torch.autograd.grad(rate, [run.merger.weights.raw])
    assert (slope < 0).all() and 0.3 < rate.item() < 0.5
    light, _ = with_weight(tiny, monkeypatch, 1e-9, target=0.7)
    heavy, step = with_weight(tiny, monkeypatch, 1000.0, target=0.7)
    # d/d raw of 1000 (0.7 - rate)^2, besides the model's loss.
    expected = 1000 * 2 * (0.7 - rate.detach()) * -slope
    assert torch.allclose(heavy["raw"] - light["raw"], expected, rtol=1e-3) and (expected > 0).all()
    assert (step < 0).all()


@pytest.mark.slow(everywhere=True)
def test_a_weight_on_the_rate_brings_it_up_to_its_target(tiny):
    """From half of the target; the model's loss alone goes down from there."""
    found = {}
    for weight in (1e-9, 500.0):
        run = a_run(learner(tiny, target_rate=0.2), tiny, steps=16, rate_weight=weight, threshold_rate=0.1)
        run.target = 0.4
        found[weight] = [run.take()["rate"] for _ in range(12)]
        assert found[weight][0] < 0.3
    assert np.mean(found[500.0][-3:]) > 0.35 and np.mean(found[1e-9][-3:]) < 0.2, found


# -- going on --------------------------------------------------------------------------------------------------------------------------


WHOLE = Training(steps=6, batch_size=2, evaluate_every=2, checkpoint_every=3)


def interrupted(monkeypatch, folder, go, *, after: int) -> None:
    """The same training, cut short during a step, then begun once more."""
    real, seen = TrainingRun.take, []

    def stop(self):
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(1)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "take", stop)
        with pytest.raises(KeyboardInterrupt):
            go(folder)
    assert (folder / "checkpoint.safetensors").is_file()


def the_same(one, other, folder_one, folder_other) -> None:
    pd.testing.assert_frame_equal(one.history, other.history)
    assert (folder_one / "log.jsonl").read_text() == (folder_other / "log.jsonl").read_text()
    for name, value in one.merger.weights.state_dict().items():
        assert torch.equal(value, other.merger.weights.state_dict()[name]), name
    assert one.drift == other.drift


@pytest.mark.slow(everywhere=True)
def test_a_parachute_that_opened_is_open_after_an_interruption(tiny, tmp_path, monkeypatch):
    # So low a spike that the noise from batch to batch is one; a checkpoint says what it was, so that only a fresh one is made so.
    monkeypatch.setattr(training_run, "Parachute", partial(Parachute, spike=1e-3, wait=1))
    go = lambda folder: train_merger(  # noqa: E731
        learner(tiny, adaptive=True), tiny, windows(), windows(4, seed=8), training=WHOLE, folder=folder, progress=False
    )
    whole = go(tmp_path / "whole")
    history = whole.history
    assert "back off" in history["event"][:3].tolist() and history["offset"][2] > 0  # before the checkpoint, and kept by it
    interrupted(monkeypatch, tmp_path / "cut", go, after=4)
    # What was done is forgotten: a run that begins with a closed parachute would tell.
    again = go(tmp_path / "cut")
    the_same(whole, again, tmp_path / "whole", tmp_path / "cut")
    assert whole.merger.weights.offset.item() == again.merger.weights.offset.item() > 0
    assert history["held_out_excess"].notna().tolist() == [False, True] * 3


def test_the_merger_is_left_with_the_offset_that_the_history_ends_with(tiny, monkeypatch):
    """Also where the last step's batch was the spike."""
    monkeypatch.setattr(training_run, "Parachute", partial(Parachute, spike=1e-3, wait=1))
    training = Training(steps=2, batch_size=2, evaluate_every=0)
    made = train_merger(learner(tiny, adaptive=True), tiny, windows(), training=training, progress=False)
    assert made.history["event"].tolist()[-1] == "back off"
    assert made.merger.weights.offset.item() == pytest.approx(made.history["offset"].iloc[-1])


@pytest.mark.slow(everywhere=True)
def test_a_trained_base_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    training = Training(**{**vars(WHOLE), "train_base": True, "base_rate": 1e-3})
    go = lambda folder: train_merger(  # noqa: E731
        learner(tiny), tiny, windows(), windows(4, seed=8), training=training, folder=folder, progress=False
    )
    whole = go(tmp_path / "whole")
    interrupted(monkeypatch, tmp_path / "cut", go, after=4)
    again = go(tmp_path / "cut")
    the_same(whole, again, tmp_path / "whole", tmp_path / "cut")
    assert whole.drift != 0
    plain, tuned = (door.parameters_of(model) for model in (tiny, whole.model))
    assert any(not torch.equal(value, plain[name]) for name, value in tuned.items())
    assert all(torch.equal(value, door.parameters_of(again.model)[name]) for name, value in tuned.items())
    assert door.fingerprint(door.put_tuned(tiny, tmp_path / "cut" / "base")) == door.fingerprint(whole.model)


# -- the straight-through gradient -----------------------------------------------------------------------------------------------------


def last_loss(merger, model, tokens, *, soft: bool):
    with merger.attached(model, soft=soft):
        return torch.nn.functional.cross_entropy(door.forward_pass(model, tokens[:, :-1], {})[:, -1], tokens[:, -1])


@pytest.mark.slow(everywhere=True)
def test_hard_gradients_point_where_a_monotone_soft_loss_goes():
    """One layer, one token that may join one cluster: the soft loss is a curve over one share, 0 to 1. Where it rises or falls all the way,
    the hard pass, which stands at one end of it, has the sign of the soft finite difference, on either side of the decision. Claimed for
    every such case; where the curve turns, an end's slope need not be that of a point between."""
    monotone = 0
    for seed in range(6):
        model = door.in_dtype(make_bridge("llama", seed=seed, num_hidden_layers=1), torch.float64)
        tokens = random_tokens(1, 6, seed=seed)  # queries 0 to 4: tokens 1 and 2 are offered, token 2 may join token 1
        merger = TokenMerger([0], threshold=0.0, floor=-1.0, recent=2, temperature=0.1).prepare(model)
        with merger.attached(model), torch.no_grad():
            door.forward_pass(model, tokens[:, :-1], {})
            units = merger.pass_.units[0][0]
            assert merger.pass_.assigned[0].leader[0].tolist() == [-1, -1, 1, -1, -1]
        similarity = float(units[1] @ units[2])

        def at(level: float, *, soft: bool, merger=merger, model=model, tokens=tokens):
            merger.weights.set_level(0, level)
            return last_loss(merger, model, tokens, soft=soft)

        with torch.no_grad():
            curve = [at(similarity + away, soft=True).item() for away in np.linspace(-0.5, 0.5, 11)]
        rises = np.diff(curve) > 0
        if rises.any() and not rises.all():
            continue
        monotone += 1
        for away in (-0.1, 0.1):
            merger.weights.raw.grad = None
            at(similarity + away, soft=False).backward()
            assert bool(merger.statistics()["merged"].iloc[-1]) is (away < 0)
            with torch.no_grad():
                difference = at(similarity + away + 0.01, soft=True) - at(similarity + away - 0.01, soft=True)
            assert merger.weights.raw.grad.sign().item() == difference.sign().item() != 0, (seed, away)
    assert monotone >= 3


@pytest.mark.slow(everywhere=True)
def test_hard_gradients_mostly_point_where_the_soft_loss_goes(llama64):
    """On whole sequences the soft loss need not be monotone. Claimed: of the thresholds of mergers in one layer, on eight random batches for
    each of three layers, the hard gradient has the sign of the soft finite difference in three of four or more (a coin: one time in 90).
    Of mergers in several layers less was seen, about two of three, and nothing is claimed."""
    agree = []
    for layer in range(3):
        merger = TokenMerger([layer], threshold=0.4, recent=2).calibrate(llama64, random_tokens(4, LENGTH, seed=9)).double()
        for seed in range(8):
            tokens, ends, merger.weights.raw.grad = random_tokens(2, LENGTH, seed=20 + seed), [], None
            loss_of(merger, llama64, tokens, soft=False)[0].backward()
            for step in (0.01, -0.01):
                with torch.no_grad():
                    merger.weights.raw += step
                    ends.append(loss_of(merger, llama64, tokens, soft=True)[0].item())
                    merger.weights.raw -= step
            agree.append(np.sign(ends[0] - ends[1]) == np.sign(merger.weights.raw.grad.item()))
    assert np.mean(agree) >= 0.75, agree
