"""Controls: what they destroy, what they keep, and that they say so."""

import inspect
import json
import random

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.capture import border_states, borders, fill_columns, subset
from basin_lens.errors import CaptureError, ModelError, NeighborError, TableError
from tests.conftest import TEXTS, TINY, hooked_lane, make_bridge, make_hooked, random_tokens

C = bl.controls


@pytest.fixture(scope="module")
def points():
    """Few dimensions and many tokens, so that moments are known well."""
    model = make_bridge("llama", hidden_size=8, intermediate_size=16, head_dim=2)
    return bl.Capture.from_texts(model, random_tokens(120, 26), progress=False)


@pytest.fixture(params=["memory", "disk"])
def held(request, llama, tmp_path):
    """One capture, in memory and on disk."""
    passages = [bl.Passage(text, doc=f"d{i % 3}", labels={"even": i % 2 == 0}) for i, text in enumerate(TEXTS)]
    store = tmp_path / "capture" if request.param == "disk" else None
    return bl.Capture.from_texts(llama, passages, layers=[0, 2], store=store, progress=False)


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


# -- all of them ----------------------------------------------------------------------------------------------------------------


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


# -- shuffled tokens --------------------------------------------------------------------------------------------------------------


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


# -- Gaussian states --------------------------------------------------------------------------------------------------------------


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


# -- permuted layers ---------------------------------------------------------------------------------------------------


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


# -- scores on states that are not the model's -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [MADE["gaussian"], MADE["permuted"]], ids=["gaussian", "permuted"])
def test_native_and_affine_scores_are_measured_and_others_refused(llama, capture, make):
    made = make(llama, capture, 0)
    scores = [bl.analyzers.Contraction(k=5, context=context, name=context) for context in ("native", "affine")]
    table = bl.analyze(llama, made, scores, layers=[1], progress=False)
    assert table.native.notna().any() and table.affine.notna().any()
    for context in ("patched", "solo", "attn", "mlp"):
        with pytest.raises(bl.errors.BasinLensError):
            bl.analyze(llama, made, [bl.analyzers.Contraction(k=5, context=context)], layers=[1], progress=False)


def test_native_contraction_of_layers_that_do_not_correspond_is_that_of_random_points(points):
    """Neighbors before the block are any points after it: V_out is the layer's own variance, on average."""
    model = make_bridge("llama", hidden_size=8, intermediate_size=16, head_dim=2)
    score = [bl.analyzers.RawCompression(k=15, context="native")]
    table = bl.analyze(model, C.permuted_layers(points), score, layers=[1], progress=False)
    after = beyond(points, 2)
    spread = float((after - after.mean(0)).square().sum(1).mean()) * 14 / 15
    assert abs(float(np.exp(-table.raw_compression).mean()) / spread - 1) < 0.05


# -- token analyzers on states that are not the model's ----------------------------------------------------------------------------


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


# -- subsets -----------------------------------------------------------------------------------------------------------------------


def test_subset_is_the_capture_of_those_texts(llama, held):
    fill_columns(llama, held, [bl.analyzers.Surprisal()], progress=False)
    part = subset(held, [4, 1])
    assert part.docs == [held.docs[4], held.docs[1]] and part.labels == [held.labels[4], held.labels[1]]
    rows = torch.cat([torch.nonzero(held.row_seq == seq).squeeze(1) for seq in (4, 1)])
    for border in borders(held):
        assert torch.equal(border_states(part, border), border_states(held, border)[rows])
    key = bl.analyzers.Surprisal().key
    torch.testing.assert_close(part.columns[key]["surprisal"], held.columns[key]["surprisal"][:, rows], equal_nan=True)


def test_subset_keeps_readings_in_place(llama):
    tokens = random_tokens(4, 12)
    _, cache = llama.run_with_cache(tokens)
    mask = torch.ones_like(tokens)
    mask[2, 8:] = 0
    capture = bl.Capture.from_cache(llama, tokens, cache, attention_mask=mask)
    part = subset(capture, [2])
    asked = [bl.analyzers.AttentionReceived(), bl.analyzers.Surprisal()]
    assert fill_columns(llama, capture, asked, progress=False) == fill_columns(llama, part, asked, progress=False) == []
    for key, columns in part.columns.items():
        for name, value in columns.items():
            torch.testing.assert_close(value, capture.columns[key][name][:, capture.row_seq == 2], equal_nan=True)


@pytest.mark.parametrize("sequences", [[], [1, 1], [6], [-1]])
def test_wrong_subsets_are_refused(capture, sequences):
    with pytest.raises(CaptureError, match="different sequences"):
        subset(capture, sequences)


# -- random twins ------------------------------------------------------------------------------------------------------


def make_native(**changes):
    from transformer_lens.model_bridge import TransformerBridge

    settings = {
        "n_layers": 2,
        "d_model": 16,
        "n_ctx": 32,
        "d_head": 4,
        "n_heads": 4,
        "d_mlp": 32,
        "d_vocab": 211,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "seed": 5,
        "device": "cpu",
    }
    return TransformerBridge.boot_native(settings | changes).eval()


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


# Made from another seed than any twin here: a random model and its twin of one seed are the same model.
KINDS = [
    *(pytest.param(lambda name=name: make_bridge(name, seed=7), id=name) for name in TINY),
    pytest.param(make_native, id="native"),
    pytest.param(lambda: make_hooked(seed=7), id="hooked", marks=hooked_lane),
    pytest.param(lambda: make_hooked(seed=7, normalization_type="LNPre"), id="hooked-folded", marks=hooked_lane),
]


@pytest.fixture(params=KINDS)
def original(request):
    return request.param()


def test_twin_is_the_same_architecture_with_other_weights(original):
    before = door.fingerprint(original)
    twin = C.random_twin(original, seed=0)
    assert type(twin) is type(original) and twin is not original
    assert door.fingerprint(original) == before != door.fingerprint(twin)
    tokens = random_tokens(2, 9)
    one, other = original(tokens, return_type="logits"), twin(tokens, return_type="logits")
    assert one.shape == other.shape and not torch.allclose(one, other)
    assert bool(torch.isfinite(other).all())
    assert (door.n_layers(twin), door.width(twin), door.n_context(twin), door.vocabulary_size(twin)) == (
        door.n_layers(original),
        door.width(original),
        door.n_context(original),
        door.vocabulary_size(original),
    )
    # Norm weights are 1 and biases 0 in any fresh model; every matrix is drawn anew.
    own, new = weights(original), weights(twin)
    assert [name for name, p in new.items() if p.ndim > 1 and p.std() > 0 and torch.equal(p, own[name])] == []
    assert not twin.training


def test_twin_has_the_spread_of_a_fresh_model(original):
    """Compared with the original, which is fresh itself: the same standard deviation in every matrix."""
    twin = C.random_twin(original, seed=3)
    own = weights(original)
    for name, parameter in weights(twin).items():
        if parameter.numel() >= 256 and parameter.std() > 0:
            assert 0.8 < float(parameter.std() / own[name].std()) < 1.25, name


def test_twin_by_seed(original):
    one, same, other = (C.random_twin(original, seed=seed) for seed in (0, 0, 1))
    assert door.fingerprint(one) == door.fingerprint(same) != door.fingerprint(other)
    tokens = random_tokens(2, 9)
    assert torch.equal(one(tokens), same(tokens))


def test_twin_leaves_every_random_state_alone(original):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    C.random_twin(original, seed=0)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_twin_is_measured_like_any_model(original):
    twin = C.random_twin(original, seed=0)
    table = bl.analyze(twin, random_tokens(6, 12), [bl.analyzers.Compression(k=4)], layers=[1], progress=False)
    assert table.compression.notna().any()
    (facts,) = table.attrs["provenance"].values()
    assert facts["model"]["name"] == f"random twin of {door.full_name(original)}, seed 0"


def test_twin_keeps_the_tokenizer_and_its_bos(llama, tokenizer):
    twin = C.random_twin(llama)
    assert twin.tokenizer is tokenizer
    assert door.uses_bos(twin, None) == door.uses_bos(llama, None)
    one, other = (bl.Capture.from_texts(m, TEXTS, layers=[0], progress=False) for m in (llama, twin))
    assert [s.tokens for s in one.sequences] == [s.tokens for s in other.sequences]


@pytest.mark.parametrize("make", [lambda: make_bridge("llama"), make_native], ids=["llama", "native"])
def test_twin_has_the_dtype(make):
    twin = C.random_twin(make().to(torch.bfloat16))
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}


def test_twin_has_no_hooks_of_the_user():
    model, fired = make_bridge("llama"), []
    model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: fired.append(hook))  # noqa: ARG005
    C.random_twin(model)(random_tokens(1, 5))
    assert fired == []


def test_twin_of_a_model_in_train_mode_under_inference_mode():
    model = make_bridge("llama").train()
    with torch.inference_mode():
        twin = C.random_twin(model)
    assert not any(p.is_inference() for p in twin.parameters()) and model.training
    twin(random_tokens(1, 5)).sum().backward()


@pytest.mark.parametrize("no_processing", [False, True])
def test_twin_of_a_processed_model_is_processed(tokenizer, no_processing):
    model = make_bridge("llama", tokenizer=tokenizer)
    model.enable_compatibility_mode(disable_warnings=True, no_processing=no_processing)
    twin = C.random_twin(model)
    assert door.provenance(twin)["weight_processing"] == door.provenance(model)["weight_processing"]
    assert twin(random_tokens(2, 9)).shape == model(random_tokens(2, 9)).shape


def test_a_model_that_its_settings_do_not_give_is_refused(monkeypatch):
    model = make_bridge("llama")
    model.original_model.config.hidden_size = 64
    with pytest.raises(ModelError, match="rebuild"):
        C.random_twin(model)
    model.original_model.config.model_type = "nothing"
    model.original_model.config.__class__.model_type = "llama"
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match="settings alone"):
        C.random_twin(model)


def test_twin_of_something_else_is_refused():
    with pytest.raises(ModelError):
        C.random_twin(torch.nn.Linear(2, 2))


# -- sweep -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(llama):
    tokens = random_tokens(14, 20, seed=3)
    capture = bl.Capture.from_texts(llama, tokens, progress=False)
    capture.docs = [f"doc-{i % 7}" for i in range(14)]
    return capture


def test_sweep_gives_what_direct_calls_give(llama, texts):
    score = bl.analyzers.Compression(k=6)
    table = C.sweep(llama, texts, score, k=[4, 9], bank_sizes=[100, 180], layers=[0, 2], progress=False)
    assert list(table.columns) == [
        "run",
        "score",
        "layer",
        "k",
        "bank_size",
        "mean",
        "low",
        "high",
        "nan_share",
        "reliability",
        "spearman",
    ]
    # Banks are whole sequences of 19 points; the score as it stands is always among the settings.
    assert sorted(table.bank_size.unique()) == [114, 190, 266] and sorted(table.k.unique()) == [4, 6, 9]
    assert len(table) == 2 * 3 * 3 and not table.duplicated(["layer", "k", "bank_size"]).any()
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0)).tolist()
    banks = {266: None, 190: subset(texts, sorted(order[:10])), 114: subset(texts, sorted(order[:6]))}
    standing = bl.analyze(llama, texts, [score], layers=[0, 2], progress=False)
    for (size, k), part in table.groupby(["bank_size", "k"]):
        direct = bl.analyze(llama, texts, [bl.analyzers.Compression(k=k)], layers=[0, 2], bank=banks[size], progress=False)
        summary = bl.tables.layer_summary(direct, ["compression"])
        for short, long in (
            ("mean", "mean"),
            ("low", "low"),
            ("high", "high"),
            ("nan_share", "nan"),
            ("reliability", "reliability"),
        ):
            np.testing.assert_allclose(
                part[short].astype(float), summary[f"compression_{long}"].astype(float), rtol=1e-4, atol=1e-5
            )
        for layer, value in zip(part.layer, part.spearman, strict=True):
            both = [t[t.layer == layer].compression for t in (standing.reset_index(), direct.reset_index())]
            np.testing.assert_allclose(value, both[0].corr(both[1], method="spearman"), atol=1e-3)


def test_the_score_as_it_stands_agrees_with_itself(llama, texts):
    table = C.sweep(llama, texts, bl.analyzers.Contraction(k=5), k=[8], bank_sizes=[100], layers=[1], progress=False)
    own = table[(table.k == 5) & (table.bank_size == 266)]
    np.testing.assert_allclose(own.spearman, 1)
    assert (table.spearman <= 1).all() and set(table.run) == set(table.attrs["provenance"])


def test_default_settings(llama, texts):
    ks = C.sweep(llama, texts, bl.analyzers.RawCompression(k=7), layers=[1], progress=False)
    assert ks.k.tolist() == [5, 7, 10, 15, 30, 50] and set(ks.bank_size) == {266}
    banks = C.sweep(llama, texts, bl.analyzers.RawCompression(k=7), bank_sizes=[133, 266], layers=[1], progress=False)
    assert banks.k.tolist() == [7, 7] and banks.bank_size.tolist() == [133, 266]


def test_several_columns_and_a_name(llama, texts):
    table = C.sweep(llama, texts, bl.analyzers.Neighborhood(k=5, name="near"), k=[3], layers=[1], progress=False)
    assert set(table.score) == {c.name for c in bl.analyzers.Neighborhood(k=5, name="near").columns}
    radius = table[table.score == "near_radius"]
    assert radius["mean"].is_monotonic_increasing
    assert radius.reliability.isna().all()


def test_parts_of_another_bank_and_queries(llama, texts):
    bank = bl.Capture.from_texts(llama, random_tokens(9, 20, seed=4), progress=False)
    score = bl.analyzers.RawCompression(k=5)
    table = C.sweep(llama, texts, score, bank_sizes=[80], bank=bank, queries=40, layers=[1], progress=False)
    assert table.bank_size.tolist() == [95, 171]
    np.testing.assert_allclose(table.nan_share, 1 - 40 / texts.n_rows, atol=1e-6)


def test_sweep_refuses(llama, texts):
    score = bl.analyzers.Compression(k=5)
    with pytest.raises(CaptureError, match="expected a Capture"):
        C.sweep(llama, TEXTS, score, progress=False)
    with pytest.raises(TableError, match="cloud analyzer"):
        C.sweep(llama, texts, bl.analyzers.Surprisal(), progress=False)
    with pytest.raises(NeighborError, match="bank sizes between 1 and the bank's 266"):
        C.sweep(llama, texts, score, bank_sizes=[267], progress=False)
    with pytest.raises(NeighborError, match="bank_sizes"):
        C.sweep(llama, texts, score, bank_sizes=[100], bank="reference", progress=False)
    with pytest.raises(NeighborError):
        C.sweep(llama, texts, score, k=[400], progress=False)


def test_a_control_on_a_sample_has_the_values_of_the_whole(llama, capture):
    """Fewer pairs go through the block; those that do, and everything beside them, come out the same."""
    from basin_lens.analyzers.control import controls_of

    score, beside = bl.analyzers.Compression(k=5), bl.analyzers.Neighborhood(k=5, context="patched")
    whole = bl.analyze(llama, capture, [score, beside, *controls_of([score])], layers=[1], progress=False)
    some = bl.analyze(llama, capture, [score, beside, *controls_of([score], queries=20)], layers=[1], progress=False)
    alone = bl.analyze(llama, capture, [beside, *controls_of([score], queries=20)], layers=[1], progress=False)
    for name in ("compression_random", "compression_radius_matched"):
        there = some[name].notna()
        assert there.sum() == 20
        np.testing.assert_allclose(some[name][there], whole[name][there], atol=1e-5)
        np.testing.assert_allclose(alone[name][there], whole[name][there], atol=1e-5)
    for name in ("compression", "radius", "hubness"):
        np.testing.assert_allclose(some[name], whole[name], atol=1e-5)
    np.testing.assert_allclose(alone["radius"], whole["radius"], atol=1e-5)
    (facts,) = bl.tables.provenance(some).values()
    assert facts["left_out"]["compression_random"]["not sampled"] > 0
