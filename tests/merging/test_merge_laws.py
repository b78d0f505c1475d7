"""Laws of token merging that numbers alone do not show: what training optimizes, what a cache holds, what nothing may depend on."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from basin_lens import merging
from basin_lens import model as door
from basin_lens.capture.passes import token_losses
from basin_lens.merging import Assigned, Clusters, Parachute, TokenMerger, Training, Windows, train_merger, training_run
from basin_lens.merging.merge_pass import MergePass
from basin_lens.merging.parameters import Parameters
from basin_lens.merging.training_run import TrainingRun, contrastive_hinge
from basin_lens.texts import reference_passages
from tests.conftest import make_bridge, random_tokens
from tests.merging.test_merging import LENGTH, loss_of, make_merger, merged_logits


@pytest.fixture(scope="module")
def tiny():
    return make_bridge("llama")


@pytest.fixture(scope="module", params=["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def wide(request):
    return door.in_dtype(make_bridge(request.param), torch.float64)


@pytest.fixture(scope="module")
def llama64():
    return door.in_dtype(make_bridge("llama"), torch.float64)


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


# ---- the contrastive hinge -------------------------------------------------------------------------------------------


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


# ---- steps -----------------------------------------------------------------------------------------------------------


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


# ---- the target of the rate ------------------------------------------------------------------------------------------


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


def test_a_weight_on_the_rate_brings_it_up_to_its_target(tiny):
    """From half of the target; the model's loss alone goes down from there."""
    found = {}
    for weight in (1e-9, 500.0):
        run = a_run(learner(tiny, target_rate=0.2), tiny, steps=16, rate_weight=weight, threshold_rate=0.1)
        run.target = 0.4
        found[weight] = [run.take()["rate"] for _ in range(12)]
        assert found[weight][0] < 0.3
    assert np.mean(found[500.0][-3:]) > 0.35 and np.mean(found[1e-9][-3:]) < 0.2, found


# ---- going on --------------------------------------------------------------------------------------------------------

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


# ---- bytes -----------------------------------------------------------------------------------------------------------


def storages(thing, found=None) -> dict[int, int]:
    """Memory behind every tensor and array that can be reached, each once and whole: address -> bytes. A view holds all it is a view of."""
    found = {} if found is None else found
    if isinstance(thing, np.ndarray):
        while isinstance(thing.base, np.ndarray):
            thing = thing.base
        if isinstance(thing.base, torch.Tensor):
            return storages(thing.base, found)
        assert thing.base is None or not thing.nbytes, "memory of another owner"
        if thing.nbytes:
            found[thing.ctypes.data] = thing.nbytes
    elif isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, dict):
        for value in thing.values():
            storages(value, found)
    elif hasattr(thing, "__dict__") and not isinstance(thing, Parameters):
        storages(vars(thing), found)
    elif not isinstance(thing, str | bytes) and hasattr(thing, "__iter__"):
        for value in thing:
            storages(value, found)
    return found


@pytest.mark.parametrize(
    "kind", ["leader", "mean", "rows", "residual", "adaptive", "projected", "preserved", "dropped", "adjacent", "random"]
)
def test_bytes_are_those_of_every_array_behind_the_cache(llama64, kind):
    """Measured on what streaming really holds: keys, values, places, leaders, sizes, descriptors, residuals, attention rows, what an
    adaptive threshold remembers. Not the few Python numbers beside a token that waits (place, threshold), which are no arrays."""
    merger, tokens = make_merger(llama64, kind), random_tokens(2, LENGTH)
    merger.forget()
    merged_logits(merger, llama64, tokens)
    told = merger.statistics()
    assert (told.merged > 0).all()
    with merging.streaming(merger, llama64, 2) as stream, torch.no_grad():
        for place in range(LENGTH):
            stream.step(tokens[:, place])
        real = [sum(storages(layer).values()) for layer in stream.layers]
        assert real == stream.nbytes() == told.bytes.tolist()


def test_memory_set_aside_for_speed_is_in_no_cache():
    """`room` is for whole passes; a cache is made without, and holds what its formula says. With room there is more, and it is seen here."""
    draw = np.random.default_rng(0)
    for rule in ("cosine", "adjacent", "random"):
        exact, roomy = Clusters(rule, 5), Clusters(rule, 5, room=40)
        for place in range(1, 20):
            descriptor = draw.normal(size=5).astype(np.float16)
            assert exact.offer(place, descriptor, 0.5) == roomy.offer(place, descriptor, 0.5)
        assert sum(storages(exact).values()) == exact.nbytes == roomy.nbytes < sum(storages(roomy).values())


# ---- causality of rules by score -------------------------------------------------------------------------------------

SCORED = {
    "key norm": {"rule": "key_norm", "drop": True, "threshold": 0.0}, "score": {"rule": "score", "threshold": 0.4},
    "score, dropped": {"rule": "score", "threshold": 0.6, "drop": True}, "score, mean": {"rule": "score", "threshold": 0.4, "representative": "mean"},
    "score, rows": {"rule": "score", "threshold": 0.4, "attention_weight": 0.5},
    "score, residual": {"rule": "score", "threshold": 0.4, "residual": "gated", "residual_width": 3},
}  # fmt: skip


def causal_scores(tokens):
    """Of the tokens themselves."""
    return {layer: ((tokens * (37 + layer)) % 101).double() / 101 for layer in range(3)}


def of_the_whole(tokens):
    """Above the mean of the whole sequence: a sum over the future is in it."""
    return {layer: made - made.mean(1, keepdim=True) + 0.5 for layer, made in causal_scores(tokens).items()}


def scored_merger(model, kind: str) -> TokenMerger:
    options = dict(SCORED[kind])
    if kind == "key norm":  # norms are what they are: the level is found
        del options["threshold"]
        options["target_rate"] = 0.4
    return TokenMerger([0, 1, 2], recent=2, **options).calibrate(model, random_tokens(4, LENGTH, seed=9))


def scored_leaks(merger, model, tokens, scores) -> dict[str, float]:
    """As `tests.merging.test_merging.leaks`, with scores of the tokens at hand."""

    def run(some):
        return merged_logits(merger, model, some, **({} if scores is None else {"scores": scores(some)}))

    full, held, found = run(tokens), [], {"prefix": 0.0, "changed": 0.0, "gradient": 0.0}
    with merger.attached(model, scores=None if scores is None else scores(tokens)):
        logits = door.forward_pass(model, tokens, {"hook_embed": held.append}, gradients=True)
    for t in (5, 13):
        found["prefix"] = max(found["prefix"], float((run(tokens[:, : t + 1])[:, t] - full[:, t]).abs().max()))
        other = torch.cat([tokens[:, : t + 1], random_tokens(len(tokens), LENGTH - t - 1, seed=t)], 1)
        found["changed"] = max(found["changed"], float((run(other) - full)[:, : t + 1].abs().max()))
        (slope,) = torch.autograd.grad(logits[:, t].sin().sum(), held[0], retain_graph=True)
        assert slope[:, t].abs().max() > 0
        found["gradient"] = max(found["gradient"], float(slope[:, t + 1 :].abs().max()))
    return found


@pytest.mark.parametrize("kind", SCORED)
def test_rules_by_score_know_nothing_of_the_future(wide, kind, monkeypatch):
    merger, tokens = scored_merger(wide, kind), random_tokens(2, LENGTH)
    scores = None if kind == "key norm" else causal_scores
    found = scored_leaks(merger, wide, tokens, scores)
    assert merger.statistics().merged.sum() > 0
    assert found["prefix"] < 1e-5 and found["changed"] == 0 and found["gradient"] == 0, found
    # The same with scores that hold the future, which must be seen.
    if scores is None:
        real = MergePass._scores
        monkeypatch.setattr(
            MergePass,
            "_scores",
            lambda self, layer: (lambda made: made + 3 * np.sin(40 * made.mean(1, keepdims=True)))(real(self, layer)),
        )
    leaky = scored_leaks(merger, wide, tokens, scores and of_the_whole)
    assert leaky["prefix"] > 1e-3 and leaky["changed"] > 1e-3, leaky


# ---- padding and company ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "residual", "adaptive", "projected"])
def test_padding_and_company_do_not_matter_to_any_representative(wide, kind):
    """A batch padded on the right, whatever the padding is, gives each sequence what it gets alone, and the same counts and bytes."""
    merger, tokens = make_merger(wide, kind), random_tokens(3, LENGTH)
    ends = torch.tensor([LENGTH, 15, 9])
    valid = torch.arange(LENGTH) < ends[:, None]
    counts = ["tokens", "eligible", "merged", "clusters", "rows", "bytes"]
    merger.forget()
    together = merged_logits(merger, wide, tokens, valid=valid)
    told = merger.statistics()[counts]
    assert (told.merged > 0).all()
    padded = merged_logits(merger, wide, torch.where(valid, tokens, 7), valid=valid)
    plain = merged_logits(TokenMerger([0], threshold=1.0, recent=2), wide, tokens)
    for i, end in enumerate(ends.tolist()):
        merger.forget()
        alone = merged_logits(merger, wide, tokens[i : i + 1, :end])
        assert merger.statistics().merged.sum() > 0 and (alone[0] - plain[i, :end]).abs().max() > 1e-3  # something to go wrong
        # Models take their softmax in float32.
        assert (together[i, :end] - alone[0]).abs().max() < 1e-5
        assert (padded[i, :end] - alone[0]).abs().max() < 1e-5
        told = told - merger.statistics()[counts]
    assert (told == 0).all(axis=None)


# ---- the straight-through gradient -----------------------------------------------------------------------------------


def last_loss(merger, model, tokens, *, soft: bool):
    with merger.attached(model, soft=soft):
        return torch.nn.functional.cross_entropy(door.forward_pass(model, tokens[:, :-1], {})[:, -1], tokens[:, -1])


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


# ---- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.usefixtures("all_threads")
def test_the_real_model_merges_in_steps_what_it_merges_in_one_pass(real_model, monkeypatch):
    """In float32, where sums in another order differ in their last digits. Claimed: of the decisions on 100 tokens in 30 layers, 99 % or
    more are the same (leader and joined), and so are the rows left but for as many; log-probabilities differ by under 0.001 nats in the
    mean, and the most likely token is the same at 98 % of the places or more. Measured once: all 2,730 decisions, 4e-6 nats, all places."""
    held = merging.windows_of(real_model, list(reference_passages()), 100, most=4)
    merger = TokenMerger(list(range(30)), target_rate=0.4, projection=32, recent=8).calibrate(real_model, held.tokens[1:])
    tokens = held.tokens[:1]
    with merger.attached(real_model), torch.no_grad():
        full = door.forward_pass(real_model, tokens, {})[0]
        found = dict(merger.pass_.assigned)
    decided = {}
    real = Clusters.offer

    def offer(self, place, *given, **more):
        decided.setdefault(id(self), {})[place] = made = real(self, place, *given, **more)
        return made

    monkeypatch.setattr(Clusters, "offer", offer)
    with merging.streaming(merger, real_model, 1) as stream, torch.no_grad():
        steps = torch.stack([stream.step(tokens[:, place])[0] for place in range(100)])
        by_layer = [decided[id(layer.sequences[0].clusters)] for layer in stream.layers]
        rows = np.array(stream.rows())
    same = []
    for layer, made in enumerate(by_layer):
        a = found[layer]
        assert sorted(made) == [p for p in range(1, 100) if a.since[0, p] < 100]
        same += [(int(a.leader[0, p]), bool(a.joined[0, p])) == made[p] for p in made]
    merged = sum(joined for made in by_layer for _, joined in made.values())
    assert len(same) == 30 * (99 - 8) and merged > 0.3 * 3000
    assert np.mean(same) >= 0.99
    assert np.abs(rows - merger.statistics()["rows"].to_numpy()).sum() <= 0.01 * len(same)
    change = (steps.log_softmax(-1) - full.log_softmax(-1)).abs()
    # By the full pass's own chances: what no one would say is no matter.
    assert (full.softmax(-1) * change).sum(-1).mean() < 0.001
    assert (steps.argmax(-1) == full.argmax(-1)).float().mean() >= 0.98
