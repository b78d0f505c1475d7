"""Any bytes back, sizes near the ideal, ranks; step by step as in one pass."""

import lzma
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

import basin_lens as bl
from basin_lens import codec
from basin_lens import model as door
from basin_lens.codec import entropy, lockstep
from basin_lens.codec.reading import read_pass
from basin_lens.errors import (
    CodecError,
    ModelError,
    WrongEnvironmentError,
)
from tests.codec.coded import METHODS, TEXT, coded, resealed
from tests.conftest import hooked_lane, make_bridge, make_hooked, make_tokenizer, random_tokens

SLOW = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny(request, tokenizer):
    layers = "n_layer" if request.param == "gpt2" else "num_hidden_layers"
    return make_bridge(request.param, tokenizer=tokenizer, **{layers: 1})


def of_each(*ways):
    """Every way with Llama; with GPT-2, whose positions are learned, the first; its others are slow tests."""
    slow = [pytest.param("gpt2", *way, marks=pytest.mark.slow) for way in ways[1:]]
    return [*(("llama", *way) for way in ways), ("gpt2", *ways[0]), *slow]


# -- steps -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "neox", "bloom"])
def test_steps_equal_the_full_pass_and_repeat_to_the_bit(name):
    check_steps(make_bridge(name))


@hooked_lane
@pytest.mark.parametrize("changes", [{}, {"positional_embedding_type": "standard"}, {"n_key_value_heads": 2}], ids=str)
def test_steps_of_a_hooked_transformer(changes):
    check_steps(make_hooked(**changes))


def groups_of(model) -> list[int]:
    """How often each block repeats its keys and values for its query heads."""
    return [getattr(getattr(block.attn, "original_component", None), "num_key_value_groups", 1) for block in model.blocks]


def check_steps(model):
    tokens, groups = random_tokens(3, 20), groups_of(model)
    with door.measuring(model):
        full = door.forward_pass(model, tokens, {})
    with door.stepping(model, 3, 20) as stepper:
        first = torch.stack([stepper.step(tokens[:, place]) for place in range(20)], 1)
        with pytest.raises(ModelError, match="Reset"):
            stepper.step(tokens[:, 0])
        stepper.reset()
        again = torch.stack([stepper.step(tokens[:, place]) for place in range(20)], 1)
        stepper.reset()
        stepper.step(tokens[:, 0])
        stepper.pretend(19)
        assert stepper.step(tokens[:, 1]).isfinite().all() and stepper.position == 20
    assert groups == groups_of(model)
    assert torch.equal(first, again)
    assert (first - full).abs().max() < 1e-3


@pytest.mark.slow
def test_threads_are_those_of_the_file_and_put_back(llama, monkeypatch):
    before, used, step = torch.get_num_threads(), set(), lockstep._step
    with pytest.raises(ZeroDivisionError), door.thread_count(before + 1):
        1 / (torch.get_num_threads() - before - 1)
    assert torch.get_num_threads() == before
    data = coded(codec.TextCodec(llama, threads=2), TEXT[:60])
    assert codec.read(data).setting.threads == 2

    def watched(*given, **how):
        used.add(torch.get_num_threads())
        return step(*given, **how)

    monkeypatch.setattr(lockstep, "_step", watched)
    try:
        for outside in (1, 3):  # neither is the file's
            torch.set_num_threads(outside)
            assert codec.TextCodec(llama).decode(data).decode() == TEXT[:60]
            with pytest.raises(WrongEnvironmentError):
                codec.TextCodec(llama).decode(resealed(data, 76, bytes(8)))
            assert torch.get_num_threads() == outside
    finally:
        torch.set_num_threads(before)
    assert used == {2}


@pytest.mark.parametrize("window", [1, 5, 20, 33])
def test_the_probe_runs_to_the_last_place_and_sees_a_change_there(llama, monkeypatch, window):
    step, places = lockstep._step, []

    def watched(stepper, *given, **how):
        places.append(stepper.position)
        return step(stepper, *given, **how)

    def changed(stepper, *given, **how):
        last = stepper.position == window - 1
        logits = step(stepper, *given, **how)
        return np.nextafter(logits, np.float32(99)) if last else logits

    found = []
    for how in (watched, step, changed):
        monkeypatch.setattr(lockstep, "_step", how)
        with door.stepping(llama, 2, window) as stepper:
            found.append(lockstep.probe(stepper, lockstep.token_coder("ranks", "entropy", stepper.vocab)))
    assert places == sorted(set(places)) and (places[0], places[-1]) == (0, window - 1)
    assert found[0] == found[1] != found[2]


# -- round trips -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize(("tiny", "method", "backend"), of_each(*METHODS), indirect=["tiny"], ids=str)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), streams=st.integers(1, 5))
@SLOW
def test_text_comes_back(tiny, method, backend, text, streams):
    coder = codec.TextCodec(tiny, method, backend, streams, 9)
    tokens = coder._tokens(text.encode())
    if not isinstance(tokens, str):
        assert coder.decode(coded(coder, text)) == text.encode()
    assert coder.decode(coder.encode(text)) == text.encode()


@given(data=st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=25)
def test_bytes_come_back_and_never_grow_by_more_than_the_header(llama, data):
    coder = codec.TextCodec(llama)
    made = coder.encode(data, verify=False)
    assert len(made) <= len(data) + 72
    assert coder.decode(made) == data


ODD = [
    b"", b"a", b"\0", b"\0" * 50, b"line\r\nline\r\n", b"<|end|> and <|start|>", "\u00e9\U0001f600 \u4e2d".encode(), b"\xff\xfe", b" a", b"a  "
]  # fmt: skip


@pytest.mark.many
@pytest.mark.parametrize(("tiny", "data"), of_each(*((data,) for data in reversed(ODD))), indirect=["tiny"], ids=repr)
def test_odd_bytes_come_back(tiny, data):
    for method in ("direct", "ranks"):
        coder = codec.TextCodec(tiny, method, streams=2, context=7)
        assert coder.decode(coder.encode(data)) == data
        if data and isinstance(coder._tokens(data), np.ndarray):
            assert coder.decode(coded(coder, data.decode())) == data


@pytest.mark.many
@pytest.mark.parametrize("streams", [pytest.param(1, marks=pytest.mark.slow), 16, 64])
def test_one_stream_and_many(llama, streams):
    coder = codec.TextCodec(llama, streams=streams, context=7)
    assert [coder.streams_for(n) for n in (0, 1, 511, 512, 10**9)] == [1, 1, 1, min(2, streams), streams]
    made = coded(coder, TEXT * 2)
    assert codec.read(made).setting.streams == streams
    assert coder.decode(made).decode() == TEXT * 2


@pytest.mark.slow
def test_ten_megabytes_of_noise_are_stored(llama):
    data = random.Random(0).randbytes(10 << 20)
    made = codec.TextCodec(llama).encode(data)
    assert codec.read(made).why == "not UTF-8"
    assert codec.read(made).restored() == data


def test_long_texts_are_tokenized_in_pieces_unless_the_tokenizer_minds(llama, monkeypatch):
    text = "one line\r\nanother, \u00e9\U0001f600\n" + "x" * 70 + "\nend"
    whole = codec.TextCodec(llama)._tokens(text.encode())
    monkeypatch.setattr(codec.text, "_LONGEST_PIECE", 20)
    pieces = codec.text._pieces(text)
    assert "".join(pieces) == text and max(map(len, pieces)) == 20 and pieces[:2] == ["one line\r\n", "another, \u00e9\U0001f600\n"]
    coder, given, tokens_of = codec.TextCodec(llama), [], codec.TextCodec._tokens_of
    monkeypatch.setattr(codec.TextCodec, "_tokens_of", lambda self, piece: given.append(piece) or tokens_of(self, piece))
    assert coder.decode(coded(coder, text)) == text.encode() and given == pieces
    # One that opens every text with a token of its own, which its decoder hides only once.
    monkeypatch.setattr(codec.TextCodec, "_tokens_of", lambda self, piece: tokens_of(self, piece if piece == text else f" {piece}"))
    assert coder._tokens(text.encode()).tolist() == whole.tolist()


def test_a_text_too_long_for_the_model_is_stored(llama, monkeypatch):
    monkeypatch.setattr(codec.text, "_LONGEST", 1000)
    made = codec.TextCodec(llama).encode("word " * 201)
    assert codec.read(made).why == "too long for the model"
    assert codec.read(made).restored() == b"word " * 201


@hooked_lane
def test_a_hooked_transformer_codes_too(tokenizer):
    model = make_hooked(d_vocab=len(tokenizer))
    model.tokenizer = tokenizer
    for method in ("direct", "ranks"):
        coder = codec.TextCodec(model, method, streams=3, context=11)
        assert coder.decode(coded(coder, TEXT[:200])) == TEXT[:200].encode()


def test_a_tokenizer_that_changes_the_text_is_noticed():
    lowering = make_tokenizer()
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    model = make_bridge("llama", tokenizer=lowering)
    coder = codec.TextCodec(model)
    made = coder.encode("Upper and lower. " * 20)
    assert codec.read(made).why == "the tokenizer does not give the text back"
    assert coder.decode(made).decode() == "Upper and lower. " * 20


# -- sizes and ranks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
def test_direct_coding_is_within_one_percent_of_the_ideal(tiny):
    coder = codec.TextCodec(tiny, streams=3, context=50)
    made = codec.read(coded(coder, TEXT))
    ideal = coder.estimate(TEXT, streams=made.setting.streams).total_bits / 8
    size = sum(map(len, made.chunks))
    assert made.setting.streams == 3 and len(made.chunks) == 1
    assert ideal - 1 <= size <= 1.01 * ideal + 8 * len(made.chunks)


def test_estimate_is_surprisal_in_bits(llama):
    coder = codec.TextCodec(llama, context=30)
    table = bl.analyze(llama, TEXT, [bl.analyzers.Surprisal()], layers=[0], max_length=31, progress=False)
    expected = table.surprisal.dropna().to_numpy() / np.log(2)
    found = coder.estimate(TEXT)
    assert np.abs(found.bits - expected).max() < 1e-3
    assert found.bits_per_token == pytest.approx(expected.mean(), abs=1e-3)
    assert found.bits_per_byte == pytest.approx(expected.sum() / len(TEXT.encode()), abs=1e-3)
    assert coder.estimate("").n_tokens == 0
    with pytest.raises(CodecError, match="not UTF-8"):
        coder.estimate(b"\xff")


def test_a_cache_that_the_model_drops_is_refused_and_not_generated_with(llama, monkeypatch):
    start, groups = torch.full((1, 1), door.start_token(llama)), groups_of(llama)
    written = door.continuations(llama, start, 8)
    for block in llama.blocks:  # what TransformerLens 4.3 does with transformers 5.24
        monkeypatch.setattr(block.attn, "_update_kv_cache", lambda k, v, **_: (k, v))
    with pytest.raises(ModelError, match=r"transformers<5\.24"), door.stepping(llama, 1, 8):
        pass
    assert groups == groups_of(llama)
    assert torch.equal(door.continuations(llama, start, 8), written)


def test_what_the_model_wrote_greedily_has_rank_zero_everywhere(tiny):
    start = door.start_token(tiny)
    written = door.continuations(tiny, torch.full((2, 1), start), 30)
    for row in written:
        reading = read_pass(tiny, row.numpy(), streams=1, window=40)
        assert (reading.rank == 0).all()
    writer = lockstep.RanksCoder("huffman", door.vocabulary_size(tiny))
    with door.stepping(tiny, 2, 30) as stepper:
        chunks = list(lockstep.encode_tokens(stepper, written.flatten().numpy(), start, 30, writer))
    assert chunks == [(entropy.huffman_encode(np.zeros(60, np.int64)), 60)]


def test_ranks_table_agrees_with_its_parts(tokenizer):
    coder = codec.TextCodec(make_bridge("llama", tokenizer=tokenizer), context=30)  # three blocks guess some token right
    table = coder.ranks(TEXT, k=3)
    assert table.columns.tolist() == ["token_id", "token", "rank", "probability", "bits", "entropy", "top", "top_probability"]
    assert "".join(table.token) == TEXT
    assert np.allclose(table.bits, coder.estimate(TEXT).bits)
    assert np.allclose(-np.log2(table.probability), table.bits)
    first = table[table["rank"] == 0]
    assert len(first) and all(row.top[0] == row.token for row in first.itertuples())
    assert all(row.top_probability[0] >= row.probability - 1e-12 for row in table.itertuples())
    with pytest.raises(CodecError, match="expected k"):
        coder.ranks(TEXT, k=0)


# -- benchmark and page ----------------------------------------------------------------------------------------------------------------


def test_growth_ends_at_the_whole_text(llama):
    coder = codec.TextCodec(llama)
    bits = coder.ranks(TEXT)["bits"].to_numpy()
    table = codec.growth(coder, TEXT, bits, points=5)
    assert table.original.tolist()[0] == 0 and table.original.tolist()[-1] == len(TEXT.encode())
    assert table.model.iloc[-1] == pytest.approx(bits.sum() / 8)
    assert table.original.is_monotonic_increasing and table.model.is_monotonic_increasing


def test_public_docstrings_have_their_parts():
    for thing, parts in [
        (codec.TextCodec, ("Args:", "Raises:", "Source:", "Example:")), (codec.TextCodec.encode, ("Args:", "Returns:", "Raises:")),
        (codec.TextCodec.decode, ("Raises:",)), (codec.TextCodec.estimate, ("Args:", "Returns:", "Example:")),
        (codec.TextCodec.ranks, ("Args:", "Returns:", "Example:")), (codec.bench, ("Args:", "Returns:", "Raises:", "Example:")),
        (bl.views.code_page, ("Args:", "Returns:", "Raises:", "Example:")), (bl.views.size_bars, ("Args:", "Raises:", "Example:")),
        (door.stepping, ("Args:", "Raises:", "Example:")),
    ]:  # fmt: skip
        for part in parts:
            assert part in thing.__doc__, (thing, part)


@pytest.mark.real
def test_the_real_model_halves_what_xz_makes(real_model):
    text = (Path(bl.__file__).parent / "data" / "passages" / "fiction.txt").read_text(encoding="utf-8")[:600]
    coder = codec.TextCodec(real_model)
    made = coder.encode(text)
    assert coder.decode(made).decode() == text
    assert 2 * sum(map(len, codec.read(made).chunks)) < len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
