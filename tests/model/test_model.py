"""The model door: what a model is, its fingerprint, and where models come from."""

import re
import sys

import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import ModelError
from tests.conftest import (
    TEXTS,
    TINY,
    has_hooked_transformer,
    hooked_lane,
    make_bridge,
    make_hf,
    make_hooked,
    make_tokenizer,
    random_tokens,
)

# -- memory ---------------------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_tensors_alive():
    before = torch.ones(1000)
    with torch.inference_mode(), door.counting_memory() as memory:
        kept = torch.cat([before, before])  # 8,000 bytes
        before.add_(1)  # nothing new
        kept[:500].view(50, 10).mul_(2)  # views
        assert (memory.now, memory.peak) == (8000, 8000)
        more = [kept * n for n in range(3)]
        assert memory.now == 32000
        del more
        passing = (kept + 1).sum()
    assert (memory.now, memory.peak) == (8004, 32000) and passing > 0
    del kept, passing
    assert memory.now == 0


def test_memory_of_a_pass_is_the_same_each_time_and_grows_with_its_length():
    model = make_bridge("llama")
    peaks = []
    for length in (8, 8, 16):
        with door.measuring(model), door.counting_memory() as memory:
            door.forward_pass(model, random_tokens(2, length), {})
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1] < peaks[2] and memory.now == 0


# -- what it is -----------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("name", TINY)
def test_a_bridge_is_a_bridge(name):
    assert door.kind_of(make_bridge(name)) == "bridge"


@hooked_lane
def test_a_hooked_transformer_is_hooked():
    assert door.kind_of(make_hooked()) == "hooked"


@pytest.mark.parametrize("other", [None, "gpt2", torch.nn.Linear(2, 2), make_hf("llama")], ids=lambda x: type(x).__name__)
def test_anything_else_is_refused_with_its_name(other):
    with pytest.raises(ModelError, match=f"got {type(other).__name__}"):
        door.kind_of(other)


@pytest.mark.parametrize("name", TINY)
def test_sizes(name):
    model = make_bridge(name)
    config = model.original_model.config
    assert door.n_layers(model) == 3
    assert door.width(model) == 32
    assert door.vocabulary_size(model) == config.vocab_size
    assert door.has_absolute_positions(model) == (name == "gpt2")


# -- fingerprint ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return make_bridge("llama")


def weight(model):
    return next(p for name, p in model.original_model.named_parameters() if "down_proj" in name)


def step_of_an_optimizer(model):
    model(random_tokens(2, 6), return_type="loss").backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def replace(model):
    for module in model.original_model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is weight(model):
            module.weight = torch.nn.Parameter(module.weight.detach() * 1.5)
            return
    raise AssertionError("no such weight")


CHANGES = {
    "added to": lambda model: weight(model).add_(0.01),
    "one number set": lambda model: weight(model)[3, 4].fill_(7.0),
    "through data": lambda model: weight(model).data.mul_(1.5),
    "one number through data": lambda model: weight(model).data[3, 4].add_(1e-3),
    "data replaced": lambda model: setattr(weight(model), "data", weight(model).data * 1.5),
    "replaced": replace,
    "embedding": lambda model: model.original_model.get_input_embeddings().weight.mul_(1.01),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_changes_with_a_weight(model, change):
    before = door.fingerprint(model)
    with torch.no_grad():
        CHANGES[change](model)
    assert door.fingerprint(model) != before


def test_fingerprint_sees_neurons_swapped_through_data(model):
    """Whole numbers, so that no sum over the weights is rounded differently in another order."""
    whole = torch.randint(-4, 5, weight(model).shape, generator=torch.Generator().manual_seed(0)).float()
    weight(model).data.copy_(whole)
    before = door.fingerprint(model)
    weight(model).data.copy_(whole.flip(0))
    assert door.fingerprint(model) != before


def test_fingerprint_changes_with_training(model):
    before = door.fingerprint(model)
    step_of_an_optimizer(model)
    assert door.fingerprint(model) != before


def test_fingerprint_comes_back_with_the_weights(model):
    before, held = door.fingerprint(model), weight(model).detach().clone()
    with torch.no_grad():
        weight(model).zero_()
        zeroed = door.fingerprint(model)
        weight(model).copy_(held)
    assert door.fingerprint(model) == before != zeroed


@pytest.mark.many
@pytest.mark.parametrize("name", TINY)
def test_equal_models_have_equal_fingerprints(name):
    one, same, other = (make_bridge(name, seed) for seed in (0, 0, 1))
    assert door.fingerprint(one) == door.fingerprint(same) != door.fingerprint(other)


def test_fingerprint_is_32_hexadecimal_digits(model):
    assert len(door.fingerprint(model)) == 32
    assert int(door.fingerprint(model), 16) >= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fingerprint_differs_by_dtype(model, dtype):
    before = door.fingerprint(model)
    assert door.fingerprint(model.to(dtype)) != before


def test_fingerprint_differs_by_weight_processing():
    """Folding changes residual variances, although the logits stay."""
    raw, processed = (make_bridge("llama", tokenizer=make_tokenizer()) for _ in range(2))
    processed.enable_compatibility_mode(disable_warnings=True)
    assert door.fingerprint(processed) != door.fingerprint(raw)
    assert door.provenance(processed)["weight_processing"] != door.provenance(raw)["weight_processing"]


@pytest.mark.many
@pytest.mark.parametrize(
    ("name", "setting"),
    [("gemma2", {"sliding_window": 9}), ("llama", {"rms_norm_eps": 1e-3}), ("llama", {"hidden_act": "gelu"})],
    ids=["window", "epsilon", "activation"],
)
def test_fingerprint_differs_by_setting(name, setting):
    """Equal weights, another function."""
    assert door.fingerprint(make_bridge(name, **setting)) != door.fingerprint(make_bridge(name))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.train(),
        lambda model: model.requires_grad_(False),
        lambda model: model.original_model.set_attn_implementation("sdpa"),
        lambda model: model(random_tokens(2, 6), return_type="loss").backward(),
        lambda model: bl.analyze(model, random_tokens(4, 8), [bl.analyzers.Contraction(k=4)], progress=False),
    ],
    ids=["train", "freeze", "sdpa", "gradients", "analyze"],
)
def test_use_does_not_change_the_fingerprint(model, use):
    before = door.fingerprint(model)
    use(model)
    assert door.fingerprint(model) == before


def test_a_capture_is_refused_after_its_model_changed(model):
    capture = bl.Capture.from_texts(model, random_tokens(4, 8), progress=False)
    with torch.no_grad():
        weight(model).mul_(1.5)
    with pytest.raises(bl.errors.CaptureError, match="capture again"):
        bl.analyze(model, capture, progress=False)


# -- folders --------------------------------------------------------------------------------------------------------------------


def saved(folder, name="llama"):
    tokenizer = make_tokenizer()
    weights = make_hf(name, vocab_size=len(tokenizer))
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-llama")
    saved(path)
    return path


def logits_of(model, tokens, **options):
    with torch.no_grad():
        output = model(tokens, **options)
    return getattr(output, "logits", output)


@pytest.mark.many
@pytest.mark.parametrize("name", TINY)
def test_a_folder_gives_the_models_own_logits(tmp_path, name):
    weights = saved(tmp_path, name)
    model = bl.load_model(tmp_path)
    tokens = random_tokens(3, 12)
    assert door.kind_of(model) == "bridge"
    assert not model.training
    torch.testing.assert_close(logits_of(model, tokens, return_type="logits"), logits_of(weights, tokens))


def test_a_folder_brings_its_tokenizer_and_name(folder):
    model = bl.load_model(str(folder))
    ids = [tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"] for tokenizer in (model.tokenizer, make_tokenizer())]
    assert ids[0] == ids[1]
    assert door.provenance(model)["name"] == str(folder.resolve())
    table = bl.analyze(model, TEXTS, [bl.analyzers.Contraction(k=5)], progress=False)
    assert table.contraction[table.pos > 0].notna().all()


def test_loaded_twice_is_the_same_model(folder):
    assert door.fingerprint(bl.load_model(folder)) == door.fingerprint(bl.load_model(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_device_are_the_ones_asked_for(folder, dtype):
    model = bl.load_model(folder, device="cpu", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert door.provenance(model)["dtype"] == str(dtype).removeprefix("torch.")
    assert door.device_of(model) == torch.device("cpu")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        bl.load_model(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path, folder):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match="expected a causal language model"):
        bl.load_model(tmp_path)


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model-8fe1"])
def test_an_unknown_name_is_refused_without_a_network(name):
    with pytest.raises(ModelError, match=name) as caught:
        bl.load_model(name)
    assert "network" in str(caught.value)
    assert "smollm2-135m" in str(caught.value)


def test_a_missing_gguf_file_is_refused():
    with pytest.raises(ModelError, match="does not exist"):
        bl.load_model("no/such/file.gguf")


def test_a_gguf_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(ModelError, match="expected a causal language model"):
        bl.load_model(tmp_path / "broken.gguf")


# -- kind="hooked" --------------------------------------------------------------------------------------------------------------


def test_hooked_is_refused_where_there_is_none(folder, monkeypatch):
    if has_hooked_transformer():
        monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(ModelError, match=r'TransformerLens 3\.9 for kind="hooked".*Use kind="bridge"'):
        bl.load_model(folder, kind="hooked")


@hooked_lane
def test_a_hooked_folder_gives_the_models_own_logits(tmp_path):
    weights = saved(tmp_path)
    model = bl.load_model(tmp_path, kind="hooked")
    tokens = random_tokens(3, 12)
    assert door.kind_of(model) == "hooked"
    torch.testing.assert_close(logits_of(model, tokens), logits_of(weights, tokens), atol=1e-4, rtol=1e-4)


@hooked_lane
def test_both_kinds_of_one_folder_give_the_same_scores(folder):
    """Two implementations of the model, two routes through the block."""
    models = [bl.load_model(folder, kind=kind) for kind in ("bridge", "hooked")]
    tables = [bl.analyze(model, TEXTS, progress=False) for model in models]
    # Who is grouped with whom can turn on the last digits of a state: compression is compared in the same groups.
    for name in (name for name in bl.tables.scores(tables[0]) if not name.startswith("compression")):
        expected = pytest.approx(tables[0][name].to_numpy(), nan_ok=True, abs=2e-3, rel=1e-3)
        assert tables[1][name].to_numpy() == expected, name
    pairs = [(model, bl.Capture.from_texts(model, TEXTS, progress=False)) for model in models]
    crossed = bl.compare(*pairs, on=bl.analyzers.Compression(k=4, group=3), frozen_neighbors=True, progress=False)
    assert crossed["difference"].notna().any() and crossed["difference"].abs().max() < 2e-3


@hooked_lane
def test_hooked_from_another_family_is_refused(tmp_path):
    saved(tmp_path, "gpt2")
    with pytest.raises(ModelError, match="Llama-like"):
        bl.load_model(tmp_path, kind="hooked")


# -- versions that do not go together -----------------------------------------------------------------------------------------------


def test_blocks_that_drop_their_cache_say_what_to_install(model, monkeypatch):
    """TransformerLens 4.3 with transformers 5.24: all cached work is refused with the command that mends it."""
    for block in model.blocks:
        monkeypatch.setattr(block.attn, "_update_kv_cache", lambda k, v, **_: (k, v))
    mends = re.escape("TransformerLens up to 4.3 needs transformers below 5.24: pip install 'transformers<5.24'.")
    for open_steps in (lambda: door.stepping(model, 1, 8), lambda: door.own_rows(model, [])):
        with pytest.raises(ModelError, match=mends), open_steps():
            pass
    with pytest.raises(bl.errors.TransportError, match=mends):
        bl.analyze(model, random_tokens(6, 8), [bl.analyzers.Contraction(k=4)], progress=False)


# -- the real model -------------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_embedded_model_speaks(real_model):
    tokens = real_model.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    for _ in range(12):
        tokens = torch.cat([tokens, logits_of(real_model, tokens, return_type="logits")[:, -1:].argmax(-1)], dim=1)
    text = real_model.tokenizer.decode(tokens[0])
    assert "Paris" in text
    words = text.split()
    assert len(set(words)) > len(words) / 2
    assert all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.real
def test_the_embedded_model_says_what_it_is(real_model):
    assert "SmolLM2-135M-Instruct, Q4_1 dequantized" in door.provenance(real_model)["name"]
    table = bl.analyze(real_model, TEXTS[:2], [bl.analyzers.StateNorm()], layers=[0], progress=False)
    (facts,) = table.attrs["provenance"].values()
    assert facts["model"]["name"] == door.full_name(real_model)


@pytest.mark.real
@hooked_lane
def test_hooked_and_bridge_agree_on_the_embedded_model(real_model):
    hooked = bl.load_model(kind="hooked")
    tokens = real_model.tokenizer(TEXTS[0] + TEXTS[4], return_tensors="pt")["input_ids"]
    both = [logits_of(model, tokens, **options) for model, options in ((real_model, {"return_type": "logits"}), (hooked, {}))]
    torch.testing.assert_close(*both, atol=1e-3, rtol=0)
