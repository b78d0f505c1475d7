"""What every decoder family is owed: an exact route, or a refusal that names the reason. The list is `tests/families.py`.

Everything is held against R0, rerunning the whole model with a hook, within 1e-4 of the states' scale.
"""

from functools import cache, partial
from pathlib import Path

import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import BasinLensError, CaptureError, ModelError, TransportError
from basin_lens.transport import LayerMaps, PatchedBlock, Probe, rows_per_call
from tests.conftest import make_bridge, make_tokenizer, random_tokens
from tests.families import FAMILIES, LENGTHS, capture_of, families, model_of, served, table

A = bl.analyzers
EXACT = 1e-4
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "transport.md"
REFUSED = {"Mamba": "state-space", "T5": "encoder-decoder"}
WHOLE_ONLY = {"Bloom", "MPT", "Falcon", "native", "native, rotary", "shortformer positions"}
HERE = [pytest.param(f, id=f"{f.kind}-{f.name}") for f in families()]
# One of each way to attend and to know positions; the others' numbers are among the slow tests, their routes among the quick.
QUICK = {
    "Llama, SmolLM2",
    "Gemma 2",
    "GPT-2",
    "GPT-Neo",
    "GPT-J",
    "Falcon",
    "Mixtral",
    "OLMo 2",
    "native",
    "rotary, grouped-query",
    "alibi",
}
SERVED = [
    pytest.param(f, id=f"{f.kind}-{f.name}", marks=() if f.name in QUICK else pytest.mark.slow)
    for f in families()
    if f.name not in REFUSED
]

FEW = ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("neox", "gemma2", "bloom"))]


class Held:
    """A family's tiny model, its capture, and the oracle."""

    def __init__(self, name, kind):
        self.model, self.capture = model_of(name, kind), capture_of(name, kind)
        self.probe = Probe(self.model, int(self.capture.lengths.max()))
        at = [(0, 12), (0, 13), (2, 5), (2, 8), (4, 1), (4, 4), (3, 0), (5, 7)]
        self.queries = torch.tensor([self.capture.row_of(*place) for place in at])
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(self.capture.n_rows, (len(at), 3), generator=generator)

    def maps(self, layer):
        return LayerMaps(self.model, self.capture, self.capture, (self.probe, self.probe), layer)

    def rerun(self, layer, points, **options):
        return torch.stack(
            [
                door.rerun_with_state(
                    self.model,
                    torch.tensor(self.capture.sequences[int(self.capture.row_seq[q])].tokens),
                    layer,
                    int(self.capture.row_pos[q]),
                    x,
                    **options,
                )
                for q, x in zip(self.queries.tolist(), points, strict=True)
            ]
        )

    def error(self, layer, got, expected):
        scale = self.capture.resid_post(layer)[self.capture.row_pos > 0].square().mean().sqrt()
        return float((got - expected).square().mean(-1).sqrt().max() / scale)


@cache
def held_of(name, kind):
    return Held(name, kind)


def leaves(value):
    """Tensors and plain values of an argument, in order; caches are slots, and models' own objects are told by their type."""
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in leaves(part)]
    if isinstance(value, dict):
        return [leaf for name in value for leaf in leaves(value[name])]
    return [value if isinstance(value, torch.Tensor | int | float | str | None) else type(value).__name__]


@pytest.mark.many
@pytest.mark.parametrize("family", SERVED)
def test_arguments_are_recorded_without_running_the_blocks(family):
    """Every block is called with what a whole pass calls it with, though the first alone computes: one token, and the sequence only
    where it answers more than states."""
    model, tokens = model_of(family.name, family.kind), random_tokens(1, 9)
    runs = [0] * len(model.blocks)

    def count(layer):
        return lambda *_: runs.__setitem__(layer, runs[layer] + 1)

    handles = [block.attn.register_forward_hook(count(layer)) for layer, block in enumerate(model.blocks)]
    whole, quick = door.record_calls(model, tokens), door.record_calls(model, tokens, only_first=True)
    again = door.record_calls(model, tokens)
    for handle in handles:
        handle.remove()
    once = runs[-1] // 2
    assert runs[1:] == [2 * once] * (len(runs) - 1) and once >= 1
    assert runs[0] in (3 * once, 4 * once)
    for other in (quick, again):
        for call, expected in zip(other, whole, strict=True):
            assert call.kwargs.keys() == expected.kwargs.keys()
            got, wanted = leaves(call.leaves()), leaves(expected.leaves())
            assert len(got) == len(wanted)
            for one, two in zip(got, wanted, strict=True):
                assert torch.equal(one, two) if isinstance(two, torch.Tensor) else one == two


# -- routes ---------------------------------------------------------------------------------------------------------------------


def test_the_issue_is_covered():
    wanted = {
        "Llama, SmolLM2",
        "Mistral",
        "Qwen2",
        "Qwen3",
        "Gemma 2",
        "Gemma 3 text",
        "GPT-2",
        "GPT-Neo",
        "GPT-J",
        "GPT-NeoX, Pythia",
        "Phi",
        "Falcon",
        "Bloom",
        "OPT",
        "OLMo 2",
        "Mixtral",
        "native",
        "learned positions",
        "rotary",
        "alibi",
    }
    assert wanted <= {f.name for f in FAMILIES}


@pytest.mark.many
@pytest.mark.parametrize("family", HERE)
def test_the_expected_route_is_taken(family):
    got = served(family.name, family.kind)
    if family.name in REFUSED:
        assert REFUSED[family.name] in got.refused
        return
    assert got.refused == ""
    if family.name == "GPT-Neo":  # global and local layers alternate
        assert got.routes == ("R2", "R1", "R2", "R1")
    else:
        assert set(got.routes) == {"R1" if family.name in WHOLE_ONLY else "R2"}
    assert all(bool(reason) == (route == "R1") for route, reason in zip(got.routes, got.reasons, strict=True))


@pytest.mark.many
@pytest.mark.parametrize("family", SERVED)
def test_the_route_agrees_with_the_rerun(family):
    held = held_of(family.name, family.kind)
    for layer in held.capture.layers:
        states = held.capture.resid_pre(layer)
        got = held.maps(layer).map("patched").of_rows(held.queries, held.rows)
        expected = held.rerun(layer, states[held.rows])
        assert held.error(layer, got, expected) < EXACT
        # The blocks move states: agreement is not agreement on nothing.
        assert held.error(layer, states[held.rows], expected) > 0.05
        whole = PatchedBlock(held.model, held.capture, layer, held.probe, states, "R1")
        assert held.error(layer, whole.of_rows(states, held.queries, held.rows), expected) < EXACT


@pytest.mark.many
@pytest.mark.parametrize("family", SERVED)
def test_the_self_pass_is_exact(family):
    held = held_of(family.name, family.kind)
    rows = torch.arange(held.capture.n_rows)
    for layer in held.capture.layers:
        images = held.maps(layer).map("patched").of_rows(rows, rows[:, None])[:, 0]
        assert held.error(layer, images, held.capture.resid_post(layer)) < 1e-5


@pytest.mark.many
@pytest.mark.parametrize("family", SERVED)
def test_several_blocks_are_a_path_in_one_context(family):
    """Against the whole model, rerun from the first block and read after the second."""
    held = held_of(family.name, family.kind)
    points = held.capture.resid_pre(0)[held.rows]
    read = []
    for q, x in zip(held.queries.tolist(), points, strict=True):
        tokens = torch.tensor(held.capture.sequences[int(held.capture.row_seq[q])].tokens)
        pos = int(held.capture.row_pos[q])
        seen = []

        def put(state, x=x, pos=pos):
            return torch.cat([state[:, :pos], x[:, None].to(state.dtype), state[:, pos + 1 :]], dim=1)

        readers = {door.point_name("resid_pre", 0): put, door.point_name("resid_post", 1): lambda t, s=seen: s.append(t.detach())}
        with door.measuring(held.model):
            door.forward_pass(held.model, tokens.expand(len(x), -1), readers)
        read.append(seen[0][:, pos])
    got = held.maps(0).map("patched", 2).of_rows(held.queries, held.rows)
    assert held.error(1, got, torch.stack(read).float()) < EXACT


# -- the halves of a block ------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("family", SERVED)
def test_attention_and_feed_forward_are_the_block(family):
    """`attn` agrees with the rerun, and `mlp` after `attn` is `patched`; or both are refused."""
    held = held_of(family.name, family.kind)
    maps = held.maps(1)
    if not served(family.name, family.kind).halves:
        with pytest.raises(TransportError, match=r"parallel|hook_mlp_out"):
            maps.map("mlp")
        with pytest.raises(TransportError, match=r"parallel|hook_mlp_out"):
            maps.map("attn")
        return
    points = held.capture.resid_pre(1)[held.rows]
    mids = maps.map("attn").of_rows(held.queries, held.rows)
    assert held.error(1, mids, held.rerun(1, points, until_mid=True)) < EXACT
    patched = maps.map("patched").of_rows(held.queries, held.rows)
    assert held.error(1, mids, patched) > 1e-3
    assert held.error(1, maps.map("mlp").of_points(held.queries, mids), patched) < EXACT
    # A token's own state between the halves leaves the block as its own resid_post.
    own = maps.map("mlp")
    rows = torch.arange(held.capture.n_rows)
    assert held.error(1, own.of_points(rows, own.before[:, None])[:, 0], held.capture.resid_post(1)) < 1e-5


# -- the whole way --------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("family", SERVED)
def test_analyze_gives_numbers(family):
    held = held_of(family.name, family.kind)
    crossed = A.Compression(k=4, group=3, nulls=False)
    scores = bl.analyze(held.model, held.capture, [crossed, A.Contraction(k=5)], progress=False)
    assert scores[scores.pos > 0].contraction.notna().all()
    assert scores.compression.notna().groupby(scores.layer).any().all()
    (facts,) = scores.attrs["provenance"].values()
    assert tuple(facts["routes"].values()) == served(family.name, family.kind).routes
    assert max(facts["check_error"].values()) < 1e-5


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in families() if f.name in REFUSED])
def test_what_cannot_be_served_is_refused_before_it_runs(family, monkeypatch):
    model = model_of(family.name, family.kind)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ModelError, match=REFUSED[family.name]):
        bl.analyze(model, random_tokens(3, 8), [A.Contraction(k=3)], progress=False)


@pytest.mark.slow(everywhere=True)
@pytest.mark.parametrize("kinds", [("bridge", "native"), ("hooked",)], ids=["bridge", "hooked"])
def test_the_page_of_transport_has_the_table(kinds):
    if not families(*kinds):
        pytest.skip("needs TransformerLens 3.9")
    assert table(*kinds) in PAGE.read_text(encoding="utf-8"), "python -m tests.families prints it"


def test_hooked_transformer_is_ten_times_cheaper_than_the_rerun():
    """In work and not in seconds: tokens through blocks. One per pair, against every token of k sequences at every layer."""
    names = [f for f in families("hooked") if f.name == "rotary"]
    if not names:
        pytest.skip("needs TransformerLens 3.9")
    held = Held(names[0].name, names[0].kind)
    passed = []
    for block in held.model.blocks:
        block.register_forward_pre_hook(lambda _module, args: passed.append(args[0].shape[0] * args[0].shape[1]))
    held.maps(1).block(1)
    passed.clear()
    rows = torch.randint(held.capture.n_rows, (len(held.queries), 15))
    held.maps(1)._blocks[1] = None
    block = PatchedBlock(held.model, held.capture, 1, held.probe, held.capture.resid_pre(1), "R2")
    block.of_rows(held.capture.resid_pre(1), held.queries, rows)
    batched = sum(passed)
    passed.clear()
    held.rerun(1, held.capture.resid_pre(1)[rows])
    assert sum(passed) > 10 * batched


# -- every state a user's model may be in ---------------------------------------------------------------------------------------


@cache
def in_full_precision(name):
    model = make_bridge(name, tokenizer=make_tokenizer())
    return bl.analyze(model, random_tokens(8, 14), [A.Contraction(k=5)], progress=False)


@pytest.mark.many
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", FEW)
def test_half_precision(name, dtype, tolerance):
    """States are pooled in float32; the routes agree within the stated tolerance of the type."""
    full = in_full_precision(name)
    half = make_bridge(name, tokenizer=make_tokenizer()).to(dtype)
    capture = bl.Capture.from_texts(half, random_tokens(8, 14), progress=False)
    assert capture.resid_pre(1).dtype == torch.float32
    scores = bl.analyze(half, capture, [A.Contraction(k=5), A.Contraction(k=5, context="native", name="native")], progress=False)
    (facts,) = scores.attrs["provenance"].values()
    assert facts["model"]["dtype"] == str(dtype).removeprefix("torch.")
    assert 0 <= max(facts["check_error"].values()) <= tolerance
    there = scores.contraction.notna()
    assert (there == full.contraction.notna()).all()
    # Neighbors of nearly equal distance may change places; most scores hardly move.
    assert (scores.contraction - full.contraction)[there].abs().median() < 10 * tolerance


def test_a_route_beyond_the_tolerance_of_half_precision_is_refused():
    model = make_bridge("llama", tokenizer=make_tokenizer()).to(torch.bfloat16)
    capture = bl.Capture.from_texts(model, random_tokens(8, 14), progress=False)
    capture._states = {border: states * (1 + 0.1 * (border == 2)) for border, states in capture._states.items()}
    with pytest.raises(TransportError, match="bfloat16"):
        bl.analyze(model, capture, [A.Contraction(k=5)], layers=[1], progress=False)


STATES = {
    "train mode": lambda model: model.train(),
    "frozen": lambda model: model.requires_grad_(False),
    "gradients off": lambda _: torch.set_grad_enabled(False),
    "inference mode": None,
    "default type": lambda _: torch.set_default_dtype(torch.float64),
    "default device": lambda _: torch.set_default_device("meta"),
}


@cache
def as_loaded(name):
    """How the model is made, what is measured, and the numbers of a model that nothing was done to."""
    chosen = [A.Compression(k=5), A.GradientNorm(), A.Surprisal()]
    if name != "bloom":  # its activation function has no forward-mode derivative
        chosen.append(A.JacobianGain(k=5))
    dropout = {"gpt2": {"resid_pdrop": 0.5}, "bloom": {"hidden_dropout": 0.5}}.get(name, {"attention_dropout": 0.5})
    make = partial(make_bridge, name, **dropout)
    return make, chosen, bl.analyze(make(), random_tokens(8, 14), chosen, layers=[1], progress=False)


@pytest.mark.many
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FEW)
def test_the_state_of_the_model_changes_nothing(name, state):
    """Dropout, frozen parameters, global switches: the same numbers, gradients too."""
    tokens, (make, chosen, expected) = random_tokens(8, 14), as_loaded(name)
    model = make()
    try:
        if state == "inference mode":
            with torch.inference_mode():
                got = bl.analyze(model, tokens, chosen, layers=[1], progress=False)
        else:
            STATES[state](model)
            got = bl.analyze(model, tokens, chosen, layers=[1], progress=False)
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for column in (column.name for a in chosen for column in a.columns):
        assert got[column].notna().any()
        assert got[column].to_numpy() == pytest.approx(expected[column].to_numpy(), nan_ok=True, rel=1e-4, abs=1e-5)
    assert model.training == (state == "train mode")


def test_a_capture_of_fewer_layers_than_the_path_is_refused():
    family = FAMILIES[0]
    model, tokens = model_of(family.name, family.kind), random_tokens(len(LENGTHS), 14)
    capture = bl.Capture.from_texts(model, tokens, layers=[0, 2], progress=False)
    with pytest.raises(CaptureError, match=r"holds layers \[1\] too"):
        bl.analyze(model, capture, [A.Compression(k=5, blocks=2)], layers=[0], progress=False)


@pytest.mark.parametrize("options", [{"context": "attn"}, {"context": "mlp"}], ids=["attn", "mlp"])
def test_half_a_block_is_not_several(options):
    with pytest.raises(BasinLensError, match="blocks=1"):
        A.Compression(blocks=2, **options).check()


def test_narrow_states_pass_more_rows_only_while_what_they_attend_to_is_short():
    """Memory of a call: rows times columns times heads."""
    narrow, wide = torch.zeros(1, 32), torch.zeros(1, 1024)
    assert rows_per_call(narrow, 32) > rows_per_call(wide, 32) == rows_per_call(wide, 2048)
    assert rows_per_call(narrow, 2048) == rows_per_call(wide, 2048)
