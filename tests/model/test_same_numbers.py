"""Numbers that depend on nothing but model and texts: not on buffers unseen, batch mates, the caller's precision, or a state of no direction."""

import contextlib
import importlib.util

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.capture import read_states, reference_capture
from basin_lens.errors import BasinLensError, CaptureError, MergeError, ModelError, TransportError, WrongModelError
from basin_lens.neighbors import Points, find
from basin_lens.neighbors.choices import reach
from tests.conftest import hooked_lane, make_bridge, make_hooked, make_tokenizer, random_tokens
from tests.families import families, model_of

A = bl.analyzers


# -- identity -------------------------------------------------------------------------------------------------------------------


class Quantized(torch.nn.Module):
    """A linear layer whose weights are held as buffers, as quantization does."""

    def __init__(self, linear, persistent):
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax() / 127, persistent=persistent)
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8), persistent=persistent)

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) * self.scale).T


def quantized(*, persistent=True, change=None, tokenizer=None):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    from tests.conftest import make_hf

    inner = make_hf("llama", **({"vocab_size": len(tokenizer)} if tokenizer else {}))
    layer = inner.model.layers[1].mlp
    layer.down_proj = Quantized(layer.down_proj, persistent)
    if change is not None:
        change(layer.down_proj)
    bridge = build_bridge_from_module(inner, type(inner).__name__, hf_config=inner.config)
    bridge.tokenizer = tokenizer
    return bridge


def other_codes(layer):
    layer.codes[3, 5] += 1


def other_scale(layer):
    layer.scale *= 1.5


@pytest.mark.many
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("change", [other_codes, other_scale])
def test_weights_held_as_buffers_are_part_of_the_fingerprint(persistent, change):
    one, other = quantized(persistent=persistent), quantized(persistent=persistent, change=change)
    tokens = random_tokens(2, 8)
    assert not torch.equal(one(tokens), other(tokens))
    assert door.fingerprint(one) == door.fingerprint(quantized(persistent=persistent))
    assert door.fingerprint(one) != door.fingerprint(other)
    before = door.fingerprint(one)
    change(one.original_model.model.layers[1].mlp.down_proj)  # also in a model whose fingerprint is known
    assert door.fingerprint(one) != before


@pytest.mark.slow(everywhere=True)
def test_another_quantized_model_does_not_use_the_stored_bank(monkeypatch, tmp_path):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path))
    tokenizer = make_tokenizer()
    one, other = quantized(tokenizer=tokenizer), quantized(tokenizer=tokenizer, change=other_scale)
    first, second = reference_capture(one, progress=False), reference_capture(other, progress=False)
    assert len(list((tmp_path / "reference").iterdir())) == 2
    assert not torch.equal(first.resid_post(1), second.resid_post(1))


@pytest.mark.slow(everywhere=True)
def test_what_was_made_with_another_quantized_model_is_refused(tmp_path):
    """Mergers, files of the codec and tuned weights know their model by the same fingerprint."""
    tokenizer = make_tokenizer()
    one, other = quantized(tokenizer=tokenizer), quantized(tokenizer=tokenizer, change=other_scale)
    bl.merging.TokenMerger([0, 1], target_rate=0.3, recent=2).calibrate(one, random_tokens(2, 24)).save(tmp_path / "merger")
    coder = bl.codec.TextCodec(one)
    file = coder.encode_text(*coder.prepared("The lamp had a voice."))
    door.save_tuned(door.copy_of(one), tmp_path / "tuned", one, {})
    assert coder.decode(file) == b"The lamp had a voice."
    for error, read in (
        (MergeError, lambda model: bl.merging.TokenMerger.load(tmp_path / "merger", model)),
        (WrongModelError, lambda model: bl.codec.TextCodec(model).decode(file)),
        (ModelError, lambda model: door.put_tuned(model, tmp_path / "tuned")),
    ):
        read(one)
        with pytest.raises(error):
            read(other)


@pytest.mark.many
@pytest.mark.parametrize("family", [pytest.param(f, id=f"{f.kind}-{f.name}") for f in families() if f.name not in ("Mamba", "T5")])
def test_reading_texts_does_not_make_another_model(family):
    model = model_of(family.name, family.kind)
    before = door.fingerprint(model)
    bl.Capture.from_texts(model, random_tokens(2, 12), progress=False)
    door.identity._fingerprints.pop(model, None)
    assert door.fingerprint(model) == before
    assert door.fingerprint(family.make()) == before


def test_a_changed_rotary_table_is_another_model():
    model = make_bridge("llama")
    before = door.fingerprint(model)
    (table,) = [b for name, b in model.original_model.named_buffers() if name.endswith(".inv_freq")]
    table *= 1 + 1e-7  # the last digit of another device
    same = door.fingerprint(model)
    table *= 0.5
    assert door.fingerprint(model) != before
    assert same == before


@hooked_lane
def test_a_changed_buffer_of_a_hooked_transformer_is_another_model():
    model = make_hooked()
    before = door.fingerprint(model)
    model.blocks[0].attn.rotary_sin *= 0.5
    assert door.fingerprint(model) != before


# -- batch mates ----------------------------------------------------------------------------------------------------------------


def longrope():
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoModelForCausalLM, Phi3Config

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=211, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, pad_token_id=0,
        initializer_range=0.2, max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 8.0, 16.0],
                         "original_max_position_embeddings": 16},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def dynamic():
    return make_bridge(
        "llama", max_position_embeddings=16, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    )


def of_lengths(model, lengths):
    """A planned capture of sequences of these lengths."""
    tokens = random_tokens(len(lengths), max(lengths))
    planned = [bl.Capture.plan(model, tokens[i : i + 1, :length]) for i, length in enumerate(lengths)]
    whole = planned[0]
    whole.sequences = [p.sequences[0] for p in planned]
    whole.docs, whole.labels = [str(i) for i in range(len(lengths))], [{} for _ in lengths]
    for p in planned:
        whole.strings.update(p.strings)
    for name in ("lengths", "offsets", "row_seq", "row_pos", "row_token", "valid"):
        whole.__dict__.pop(name, None)
    return whole, tokens


def test_a_short_text_beside_a_long_one_keeps_its_numbers_longrope():
    model, lengths = longrope(), [10, 30, 16, 17, 8]
    capture, tokens = of_lengths(model, lengths)
    read_states(model, capture, [A.Surprisal(), A.AttentionReceived()], progress=False)
    differs = False
    for seq, length in enumerate(lengths):
        alone = bl.Capture.from_texts(model, tokens[seq : seq + 1, :length], analyzers=[A.Surprisal()], progress=False)
        rows = slice(int(capture.offsets[seq]), int(capture.offsets[seq]) + length)
        got, expected = (c.columns[A.Surprisal().key]["surprisal"][0] for c in (capture, alone))
        torch.testing.assert_close(got[rows], expected, atol=1e-4, rtol=1e-4, equal_nan=True)
        with torch.no_grad():
            logits = model(torch.nn.functional.pad(tokens[seq : seq + 1, :length], (0, 30 - length)))[:, : length - 1]
        beside = torch.nn.functional.cross_entropy(logits[0], tokens[seq, 1:length], reduction="none")
        differs |= float((beside - expected[1:]).abs().max()) > 0.01
    assert differs  # batch mates would have mattered


@pytest.mark.slow(everywhere=True)
def test_texts_on_both_sides_of_a_longrope_boundary_are_refused_where_blocks_are_called():
    model = longrope()
    capture, _ = of_lengths(model, [10, 30, 16, 17, 8, 20])
    with pytest.raises(TransportError, match=r'one side of 16 tokens .*rope_type "longrope"'):
        bl.analyze(model, read_states(model, capture, progress=False), [A.Compression(k=5)], progress=False)
    for lengths in ([10, 16, 8, 16], [30, 17, 20, 25]):
        capture, _ = of_lengths(model, lengths)
        table = bl.analyze(model, read_states(model, capture, progress=False), [A.Compression(k=5)], progress=False)
        assert table.compression.notna().any()


def test_a_longrope_cache_of_batch_mates_is_refused():
    model, tokens = longrope(), random_tokens(3, 30)
    mask = torch.arange(30)[None] < torch.tensor([30, 10, 30])[:, None]
    _, cache = model.run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, cache, attention_mask=mask)
    with pytest.raises(TransportError, match="sequence 1"):
        bl.analyze(model, capture, [A.StateNorm()], progress=False)


def test_a_dynamic_table_serves_its_original_context_only():
    model = dynamic()
    model.cfg.n_ctx = 64
    tokens = random_tokens(4, 16)
    expected = bl.Capture.from_texts(model, tokens, analyzers=[A.Surprisal()], progress=False)
    print_before = door.fingerprint(model)
    with torch.no_grad():
        model(random_tokens(2, 40))  # leaves its table behind
    assert door.fingerprint(model) == print_before
    got = bl.Capture.from_texts(model, tokens, analyzers=[A.Surprisal()], progress=False)
    torch.testing.assert_close(got.resid_post(2), expected.resid_post(2))
    with pytest.raises(CaptureError, match=r'at most 16 tokens .*rope_type "dynamic".*got 17'):
        bl.Capture.from_texts(model, random_tokens(2, 17), progress=False)
    _, cache = model.run_with_cache(random_tokens(2, 20))
    with pytest.raises(CaptureError, match="dynamic"):
        bl.Capture.from_cache(model, random_tokens(2, 20), cache)


# -- the caller's precision -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def matmul(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


AROUND = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "matmul medium": lambda: matmul("medium"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.many
@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("kind", [None, pytest.param(make_hooked, marks=hooked_lane)])
def test_what_the_caller_has_switched_on_changes_no_number(kind, name):
    model, tokens = kind() if kind else make_bridge("llama"), random_tokens(6, 14)
    chosen = [
        *A.default_analyzers(),
        A.AttentionReceived(),
        A.GradientNorm(),
        A.Erasure(),
        A.Compression(k=5, metric="cosine", name="c"),
    ]
    expected = bl.analyze(model, tokens, chosen, progress=False)
    with AROUND[name]():
        before = torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.get_float32_matmul_precision()
        got = bl.analyze(model, tokens, chosen, progress=False)
        assert before == (torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.get_float32_matmul_precision())
    (facts,) = got.attrs["provenance"].values()
    for column in facts["columns"]:
        np.testing.assert_array_equal(got[column].to_numpy(), expected[column].to_numpy(), err_msg=column)
    assert facts["precision"].startswith("full")
    assert facts["model"]["dtype"] == "float32"


def test_a_cache_made_under_autocast_is_refused():
    model, tokens = make_bridge("llama"), random_tokens(6, 14)
    with torch.autocast("cpu", torch.bfloat16):
        _, cache = model.run_with_cache(tokens)
    held = {name: value.float() for name, value in cache.items()}
    with pytest.raises(BasinLensError, match=r"model in float32"):
        bl.analyze(model, bl.Capture.from_cache(model, tokens, held), [A.StateNorm()], progress=False)


# -- a state of no direction ----------------------------------------------------------------------------------------------------


def some_points(zero=(), n=40, seed=0):
    states = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    states[list(zero)] = 0
    return Points(states, torch.arange(n), torch.zeros(n).long(), torch.full((n,), -1), torch.ones(n, dtype=torch.bool))


BACKENDS = ["auto", "torch", "approximate"] + (["faiss"] if importlib.util.find_spec("faiss") else [])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("same_token", ["any", "only"])
@pytest.mark.parametrize("distinct", [True, False])
def test_a_zero_state_has_no_neighbors_and_is_nobodys(backend, same_token, distinct):
    points = some_points(zero=(3, 17))
    found = find(points, points, 5, metric="cosine", backend=backend, same_token=same_token, distinct=distinct)
    assert not bool(torch.isin(found.rows, torch.tensor([3, 17])).any())
    assert bool((found.rows[[3, 17]] == -1).all()) and bool(found.distances[[3, 17]].isnan().all())
    others = [i for i in range(40) if i not in (3, 17)]
    unit = torch.nn.functional.normalize(points.states[others], dim=1)
    distance = 1 - unit @ unit.T
    if distinct:
        distance.fill_diagonal_(torch.inf)
    expected = torch.tensor(others)[distance.argsort(dim=1)[:, :5]]
    assert torch.equal(found.rows[others], expected)
    # By length, a zero state is a point like any other.
    assert bool((find(points, points, 5, metric="l2", backend=backend, same_token=same_token).rows >= 0).all())


def test_too_few_states_with_a_direction():
    points = some_points(zero=range(37))
    found = find(points, points, 5, metric="cosine")
    assert not bool(found.complete.any())
    assert not bool(find(some_points(zero=range(40)), some_points(zero=range(40)), 5, metric="cosine").complete.any())


def test_small_states_keep_their_direction():
    points = some_points()
    small = Points(points.states * 1e-13, points.key, points.token, points.group, points.pool)
    one, two = (find(p, p, 5, metric="cosine") for p in (points, small))
    assert torch.equal(one.rows, two.rows)
    torch.testing.assert_close(one.distances, two.distances)


def test_chosen_rows_of_no_direction_are_no_neighbors():
    points = some_points(zero=(3,))
    found = reach(points, points, torch.tensor([[3, 4], [5, 6], [1, 2], [7, 8]] + [[0, 1]] * 36), "cosine")
    assert found.rows[0].tolist() == [4, -1]
    assert found.rows[3].tolist() == [-1, -1]
    assert bool(found.distances[3].isnan().all())


@pytest.mark.parametrize("choice", ["nearest", "random"])
def test_a_zero_embedding_row_is_counted_under_its_own_reason(choice):
    model, tokens = make_bridge("llama"), random_tokens(8, 14)
    tokens[2, 5] = tokens[4, 7] = 100
    with torch.no_grad():
        model.original_model.model.embed_tokens.weight[100] = 0
    assert int((tokens == 100).sum()) >= 2
    score = A.Neighborhood(k=5, metric="cosine", choice=choice) if choice == "nearest" else A.Contraction(
        k=5, metric="cosine", context="native", choice=choice
    )  # fmt: skip
    table = bl.analyze(model, tokens, [score], progress=False)
    (facts,) = table.attrs["provenance"].values()
    first = table[(table.layer == 0) & (table.pos > 0)]
    for name in facts["columns"]:
        assert facts["left_out"][name]["zero state, which has no cosine"] == int((first.token_id == 100).sum())
        assert first[first.token_id == 100][name].isna().all()
        assert first[first.token_id != 100][name].notna().all()
