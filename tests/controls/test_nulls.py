"""Controls that destroy structure: shuffled tokens, Gaussian states, permuted layers."""

import inspect
import json

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import total_variance
from basin_lens.capture import border_states, borders, fill_columns, subset
from basin_lens.errors import CaptureError
from basin_lens.model import rerun_with_state
from basin_lens.scoring import Request, score
from tests.conftest import TEXTS, make_bridge, random_tokens
from tests.controls.made import C


@pytest.fixture(scope="module")
def points():
    """Few dimensions and many tokens, so that moments are known well."""
    model = make_bridge("llama", hidden_size=8, intermediate_size=16, head_dim=2)
    return bl.Capture.from_texts(model, random_tokens(120, 26), progress=False)


def bodies(capture):
    """Tokens beyond position 0, sequence by sequence."""
    return [s.tokens[1:] for s in capture.sequences]


def frozen(capture):
    """Everything of a capture that a control could change."""
    states = [border_states(capture, b).clone() for b in borders(capture)]
    rest = [s.tokens for s in capture.sequences], [s.starts for s in capture.sequences], capture.docs, capture.labels
    return states, json.dumps([*rest, capture.settings, capture.model, sorted(capture.columns)])


def beyond(capture, border):
    return border_states(capture, border)[capture.row_pos > 0].double()


MADE = {
    "shuffled": lambda model, capture, seed: C.shuffled_tokens(model, capture, seed=seed, progress=False),
    "gaussian": lambda _model, capture, seed: C.gaussian_states(capture, seed=seed, progress=False),
    "permuted": lambda _model, capture, seed: C.permuted_layers(capture, seed=seed),
}


# -- all of them -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_seeds_reproduce_and_differ(llama, held, make):
    one, same, other = (make(llama, held, seed) for seed in (0, 0, 1))
    for border in borders(held):
        assert torch.equal(border_states(one, border), border_states(same, border))
        assert not torch.equal(border_states(one, border), border_states(other, border))
        assert not torch.equal(border_states(one, border), border_states(held, border))


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_capture_given_is_unchanged_and_shares_nothing(llama, held, make):
    states, rest = frozen(held)
    made = make(llama, held, 0)
    for border in borders(made):
        border_states(made, border).zero_()
    made.labels[0]["even"] = "changed"
    made.settings["controls"].append("changed")
    again, rest_again = frozen(held)
    assert rest == rest_again
    assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_rows_documents_labels_and_first_states_stay(llama, held, make):
    made = make(llama, held, 0)
    assert made.layers == held.layers and made.docs == held.docs and made.labels == held.labels
    assert torch.equal(made.row_seq, held.row_seq) and torch.equal(made.row_pos, held.row_pos)
    first = held.row_pos == 0
    assert torch.equal(made.row_token[first], held.row_token[first])
    for border in borders(held):
        torch.testing.assert_close(border_states(made, border)[first], border_states(held, border)[first], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_control_says_what_it_is_also_after_saving(llama, held, make, tmp_path, request):
    made = make(llama, held, 3)
    (record,) = made.settings["controls"]
    assert record["seed"] == 3 and record["name"].startswith(request.node.callspec.id.split("-")[-1])
    assert made.settings.get("states_of_model", True) is (record["name"] == "shuffled_tokens")
    assert "controls" not in held.settings and "states_of_model" not in held.settings
    made.save(tmp_path / "saved")
    loaded = bl.Capture.load(tmp_path / "saved")
    assert loaded.settings == made.settings
    assert all(torch.equal(border_states(loaded, b), border_states(made, b)) for b in borders(made))


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_what_was_measured_is_left_behind(llama, make):
    capture = bl.Capture.from_texts(llama, TEXTS, analyzers=[bl.analyzers.StateNorm(), bl.analyzers.Surprisal()], progress=False)
    made = make(llama, capture, 0)
    assert made.columns == {}
    fill_columns(llama, made, [bl.analyzers.StateNorm()], progress=False)
    norms = made.columns[bl.analyzers.StateNorm().key]["state_norm"]
    torch.testing.assert_close(norms[1], made.resid_pre(1).norm(dim=1))


@pytest.mark.parametrize("name", C.__all__)
def test_docstring_has_its_parts(name):
    text = inspect.getdoc(getattr(C, name))
    assert all(part in text for part in ("Args:", "Raises:", "Example:"))
    for option in inspect.signature(getattr(C, name)).parameters:
        assert f"{option}:" in text or f"**{option}" in text or f"{option}," in text, option


def test_the_users_default_device_and_type_change_nothing(llama, capture):
    def everything():
        made = [make(llama, capture, 0) for make in MADE.values()]
        states = [border_states(c, 2) for c in made]
        return [*states, *C.random_twin(llama).parameters(), border_states(subset(capture, [3, 0]), 1)]

    expected = everything()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        got = everything()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


# -- shuffled tokens -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 1, 2, 3, 7])
def test_shuffling_keeps_the_multiset_of_tokens(llama, capture, block):
    made = C.shuffled_tokens(llama, capture, block=block, progress=False)
    assert [sorted(tokens) for tokens in bodies(made)] == [sorted(tokens) for tokens in bodies(capture)]
    assert bodies(made) != bodies(capture)
    assert made.row_strings() == [capture.strings[token] for token in made.row_token.tolist()]


@pytest.mark.parametrize("block", [2, 3, 7])
def test_blocks_keep_the_order_within(llama, block):
    tokens = torch.arange(60).reshape(2, 30)
    capture = bl.Capture.from_texts(llama, tokens, layers=[0], progress=False)
    made = C.shuffled_tokens(llama, capture, block=block, progress=False)
    for old, new in zip(bodies(capture), bodies(made), strict=True):
        pieces = {old[first : first + block] for first in range(0, len(old), block)}
        at = 0
        while at < len(new):
            piece = next(p for p in pieces if p[0] == new[at])
            assert new[at : at + len(piece)] == piece
            pieces.remove(piece)
            at += len(piece)
        assert not pieces


def test_every_place_is_as_likely():
    """Over many seeds, the token from position 1 lands everywhere."""
    model = make_bridge("llama", num_hidden_layers=1)
    capture = bl.Capture.from_texts(model, torch.arange(400 * 6).reshape(400, 6) % 200, progress=False)
    made = C.shuffled_tokens(model, capture, progress=False)
    pairs = zip(capture.sequences, made.sequences, strict=True)
    counts = np.bincount([new.tokens.index(old.tokens[1]) for old, new in pairs], minlength=6)
    assert counts[0] == 0 and (abs(counts[1:] - 80) < 32).all()  # four standard errors


def test_shuffled_states_are_the_models_own(llama, held):
    made = C.shuffled_tokens(llama, held, progress=False)
    for seq, sequence in enumerate(made.sequences):
        fresh = bl.Capture.from_texts(llama, torch.tensor([sequence.tokens]), layers=[0, 2], progress=False)
        torch.testing.assert_close(fresh.resid_post(2), made.resid_post(2)[made.row_seq == seq], rtol=1e-4, atol=1e-4)
    assert made.passages is None and {start for s in made.sequences for start in s.starts} == {-1}
    fill_columns(llama, made, [bl.analyzers.Surprisal()], progress=False)


def test_shuffled_texts_are_measured_like_any_other(llama, capture):
    made = C.shuffled_tokens(llama, capture, progress=False)
    table = bl.analyze(llama, made, [bl.analyzers.Compression(k=5)], layers=[1], progress=False)
    assert table.compression.notna().any()
    (facts,) = table.attrs["provenance"].values()
    assert facts["capture"]["controls"] == [{"name": "shuffled_tokens", "seed": 0, "block": 1}]


@pytest.mark.parametrize("block", [0, -2, 1000])
def test_hopeless_blocks_are_refused(llama, capture, block):
    with pytest.raises(CaptureError, match="block"):
        C.shuffled_tokens(llama, capture, block=block, progress=False)


def test_another_model_is_refused(capture, tokenizer):
    with pytest.raises(CaptureError, match="model that made this capture"):
        C.shuffled_tokens(make_bridge("llama", seed=1, tokenizer=tokenizer), capture, progress=False)


def test_states_that_are_not_the_models_cannot_be_read_again(llama, capture):
    with pytest.raises(CaptureError, match="gaussian_states"):
        C.shuffled_tokens(llama, C.gaussian_states(capture, progress=False), progress=False)


# -- Gaussian states -------------------------------------------------------------------------------------------------------------------


def test_gaussian_moments_match_within_and_between_all_borders(points):
    """To sampling error: the standard error of a covariance under normality is sqrt((s_ii s_jj + s_ij^2) / N)."""
    made = C.gaussian_states(points, progress=False)
    real = torch.cat([beyond(points, b) for b in borders(points)], dim=1)
    drawn = torch.cat([beyond(made, b) for b in borders(made)], dim=1)
    count = len(real)
    covariance, other = real.T.cov(correction=0), drawn.T.cov(correction=0)
    variances = covariance.diagonal()
    error = ((variances[:, None] * variances + covariance.square()) / count).sqrt()
    z = (other - covariance) / error
    assert float(z.abs().max()) < 5 and abs(float(z.square().mean()) - 1) < 0.5
    shift = (drawn.mean(0) - real.mean(0)) / (variances / count).sqrt()
    assert float(shift.abs().max()) < 4.5


@pytest.mark.slow
def test_average_over_seeds_converges_to_the_moments(points):
    """The expectation is exact, not only near: the error falls as more draws are averaged."""
    real = torch.cat([beyond(points, b) for b in (1, 2)], dim=1).T.cov(correction=0)
    draws = []
    for seed in range(8):
        made = C.gaussian_states(points, seed=seed, progress=False)
        draws.append(torch.cat([beyond(made, b) for b in (1, 2)], dim=1).T.cov(correction=0))
    one = float((draws[0] - real).norm() / real.norm())
    many = float((torch.stack(draws).mean(0) - real).norm() / real.norm())
    assert many < 0.5 * one


def test_gaussian_states_are_gaussian(points):
    """Kurtosis of every direction is 3; that of the model's own states is not."""
    made = C.gaussian_states(points, progress=False)
    states = beyond(made, 2)
    z = (states - states.mean(0)) / states.std(0)
    assert float((z.pow(4).mean(0) - 3).abs().max()) < 5 * (24 / len(z)) ** 0.5
    # Mahalanobis distances follow chi-square with d degrees of freedom: mean d, variance 2 d.
    d = states.shape[1]
    centered = states - states.mean(0)
    squares = (centered @ torch.linalg.inv(states.T.cov()) * centered).sum(1)
    assert abs(float(squares.var()) / (2 * d) - 1) < 0.2


def test_fewer_tokens_than_dimensions(llama):
    """The low-rank sample covariance: draws stay in the span of the states."""
    capture = bl.Capture.from_texts(llama, random_tokens(2, 8), layers=[1], progress=False)
    made = C.gaussian_states(capture, progress=False)
    real, drawn = beyond(capture, 1), beyond(made, 1)
    assert len(real) < real.shape[1]
    basis = torch.linalg.qr((real - real.mean(0)).T).Q
    off = drawn - real.mean(0)
    assert float((off - off @ basis @ basis.T).norm() / off.norm()) < 1e-3


def test_draw_in_chunks_is_a_draw_in_one(points, monkeypatch):
    whole = C.gaussian_states(points, progress=False)
    from basin_lens.controls import nulls

    monkeypatch.setattr(nulls, "_CHUNK_VALUES", 40_000)
    parts = C.gaussian_states(points, progress=False)
    # randn fills blocks of 16 from one stream, so chunks of another length are another draw, equally right: same moments.
    one, other = beyond(whole, 1).T.cov(), beyond(parts, 1).T.cov()
    assert float((one - other).norm() / one.norm()) < 0.2


def test_gaussian_layers_still_correspond_and_permuted_ones_do_not(points):
    """Share of a layer's output that its input tells linearly: kept by the Gaussian, lost by the permutation."""

    def explained(capture):
        before, after = beyond(capture, 1), beyond(capture, 2)
        before, after = before - before.mean(0), after - after.mean(0)
        rest = after - before @ torch.linalg.lstsq(before, after).solution
        return 1 - float(rest.square().sum() / after.square().sum())

    own = explained(points)
    assert own > 0.3
    assert abs(explained(C.gaussian_states(points, progress=False)) - own) < 0.05
    assert explained(C.permuted_layers(points)) < 0.02
    assert explained(C.permuted_layers(C.gaussian_states(points, progress=False))) < 0.02


def test_one_token_is_too_few(llama):
    capture = bl.Capture.from_texts(llama, torch.tensor([[3, 4]]), layers=[0], progress=False)
    for make in (lambda: C.gaussian_states(capture, progress=False), lambda: C.permuted_layers(capture)):
        with pytest.raises(CaptureError, match="two tokens"):
            make()


# -- permuted layers -------------------------------------------------------------------------------------------------------------------


def test_permuted_layers_keep_each_cloud(held):
    made = C.permuted_layers(held)
    for border in borders(held):
        one, other = beyond(held, border), beyond(made, border)
        assert sorted(map(tuple, one.tolist())) == sorted(map(tuple, other.tolist()))


def test_each_border_has_its_own_permutation_whatever_else_is_captured(llama, capture):
    made = C.permuted_layers(capture, seed=2)
    alone = C.permuted_layers(bl.Capture.from_texts(llama, TEXTS, layers=[2], progress=False), seed=2)
    assert torch.equal(alone.resid_post(2), made.resid_post(2))
    orders = [torch.cdist(beyond(made, b), beyond(capture, b)).argmin(1) for b in (1, 2)]
    assert not torch.equal(*orders)


def test_controls_of_controls_are_listed_in_order(capture):
    made = C.permuted_layers(C.gaussian_states(capture, seed=4, progress=False), seed=5)
    assert made.settings["controls"] == [{"name": "gaussian_states", "seed": 4}, {"name": "permuted_layers", "seed": 5}]


# -- scores on states that are not the model's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [MADE["gaussian"], MADE["permuted"]], ids=["gaussian", "permuted"])
def test_native_and_affine_scores_are_measured_and_others_refused(llama, capture, make):
    made = make(llama, capture, 0)
    scores = [bl.analyzers.Contraction(k=5, context=context, name=context) for context in ("native", "affine")]
    table = bl.analyze(llama, made, scores, layers=[1], progress=False)
    assert table.native.notna().any() and table.affine.notna().any()
    for context in ("patched", "solo", "attn", "mlp"):
        with pytest.raises(bl.errors.BasinLensError):
            bl.analyze(llama, made, [bl.analyzers.Contraction(k=5, context=context)], layers=[1], progress=False)


@pytest.mark.many
@pytest.mark.parametrize("make", [MADE["gaussian"], MADE["permuted"]], ids=["gaussian", "permuted"])
def test_states_of_a_control_may_be_neighbors_in_the_texts_own_contexts(llama, capture, make):
    """Patched alone: a control has no context of its own. What comes out is what the model itself makes of such states there."""
    bank = make(llama, capture, 0)
    neighbors = score(llama, capture, Request([one := bl.analyzers.Contraction(k=5)], layers=[1], bank=bank, progress=False),
                      keep_neighbors_of=one)  # fmt: skip
    row = int(np.flatnonzero(neighbors.table.contraction.notna())[3])
    near = bank.resid_pre(1)[neighbors.neighbors.rows[0][row]]
    sequence, pos = capture.sequences[int(capture.row_seq[row])], int(capture.row_pos[row])
    images = rerun_with_state(llama, torch.tensor(sequence.tokens), 1, pos, near)
    expected = float((total_variance(near) / total_variance(images)).log())
    assert neighbors.table.contraction[row] == pytest.approx(expected, abs=1e-4)
    assert (
        bl.analyze(llama, capture, [bl.analyzers.Compression(k=5)], layers=[1], bank=bank, progress=False).compression.notna().any()
    )
    for context in ("solo", "attn", "mlp"):
        with pytest.raises(CaptureError, match="as a bank, its states can be patched"):
            bl.analyze(llama, capture, [bl.analyzers.Contraction(k=5, context=context)], layers=[1], bank=bank, progress=False)
    with pytest.raises(CaptureError, match="no context to patch into"):
        bl.analyze(llama, bank, [bl.analyzers.Contraction(k=5)], layers=[1], bank=capture, progress=False)


def test_native_contraction_of_layers_that_do_not_correspond_is_that_of_random_points(points):
    """Neighbors before the block are any points after it: V_out is the layer's own variance, on average."""
    model = make_bridge("llama", hidden_size=8, intermediate_size=16, head_dim=2)
    score = [bl.analyzers.RawCompression(k=15, context="native")]
    table = bl.analyze(model, C.permuted_layers(points), score, layers=[1], progress=False)
    after = beyond(points, 2)
    spread = float((after - after.mean(0)).square().sum(1).mean()) * 14 / 15
    assert abs(float(np.exp(-table.raw_compression).mean()) / spread - 1) < 0.05


# -- token analyzers on states that are not the model's --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [MADE["gaussian"], MADE["permuted"]], ids=["gaussian", "permuted"])
@pytest.mark.parametrize(
    "analyzer",
    [bl.analyzers.Surprisal(), bl.analyzers.AttentionReceived(), bl.analyzers.GradientNorm()],
    ids=lambda a: type(a).__name__,
)
def test_analyzers_that_need_the_pass_are_refused(llama, capture, make, analyzer):
    made = make(llama, capture, 0)
    with pytest.raises(CaptureError, match="not the model's own"):
        fill_columns(llama, made, [bl.analyzers.StateNorm(), analyzer], progress=False)


def test_readings_of_a_cache_are_not_carried_over(llama):
    tokens = random_tokens(3, 12)
    logits, cache = llama.run_with_cache(tokens)
    capture = bl.Capture.from_cache(llama, tokens, {**cache, "unembed.hook_out": logits})
    fill_columns(llama, capture, [bl.analyzers.Surprisal()], progress=False)
    with pytest.raises(CaptureError, match="permuted_layers"):
        fill_columns(llama, C.permuted_layers(capture), [bl.analyzers.Surprisal()], progress=False)
