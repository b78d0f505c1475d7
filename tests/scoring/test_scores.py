"""Scores against known answers, and against slow plain-numpy recomputations from the model's own states."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import NearestNeighbors

import basin_lens as bl
from basin_lens import model as door
from basin_lens.analyzers import CloudAnalyzer, Column, Neighborhoods, TokenBatch
from basin_lens.analyzers.control import controls_of
from basin_lens.capture import future_loss
from basin_lens.errors import NeighborError
from basin_lens.texts import reference_passages
from basin_lens.transport import LayerMaps
from tests.conftest import PACKED, TEXTS, make_bridge, make_hf, make_tokenizer, random_tokens, replace_in_all_rooms

A = bl.analyzers
LAYERS = range(3)


# -- known answers on clouds made by hand ---------------------------------------------------------------------------------------


def variance(points):
    """Total population variance over the second to last axis."""
    points = np.asarray(points, np.float64)
    return ((points - points.mean(-2, keepdims=True)) ** 2).sum(-1).mean(-1)


def make_cloud(f, *, q=7, k=15, d=12, seed=0, **given):
    """Random neighborhoods of different sizes and their images under f(points [q, m, d]); the random points go through f too."""
    g = torch.Generator().manual_seed(seed)
    size = torch.rand(q, 1, 1, generator=g) + 0.1
    neighbors = 3 * torch.randn(q, 1, d, generator=g) + size * torch.randn(q, k, d, generator=g)
    others = 3 * torch.randn(q, 64, d, generator=g)
    where = torch.randint(0, 5, (q, k), generator=g)
    values = {
        "layer": 1,
        "n_layers": 3,
        "query": neighbors.mean(1),
        "query_image": neighbors.mean(1),
        "query_token": torch.arange(q) % 5,
        "query_pos": torch.arange(q) % 4 + 1,
        "rows": torch.arange(q * k).view(q, k),
        "distances": torch.rand(q, k).sort(1).values,
        "neighbors": neighbors,
        "neighbor_token": where,
        "neighbor_pos": where + 1,
        "hubness": torch.zeros(q),
        "spread_in": float(variance(others).mean()),
        "spread_out": float(variance(f(others)).mean()),
        "images": f(neighbors),
        "final_norm": lambda states: states,
    }
    return Neighborhoods(**values | given)


def value(analyzer, cloud):
    (answer,) = analyzer.measure(cloud).values()
    return answer.numpy()


def orthogonal(d=12, seed=4):
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed))).Q


def near(expected, **options):
    return pytest.approx(expected, **{"abs": 2e-4} | options)


def test_isometry_compresses_nothing():
    cloud = make_cloud(lambda x: x @ orthogonal() + 5)
    assert value(A.Contraction(), cloud) == near(np.zeros(7))
    assert value(A.Compression(), cloud) == near(np.zeros(7))


@pytest.mark.parametrize("a", [0.1, 0.5, 3.0, -2.0])
def test_scaling_contracts_but_does_not_compress(a):
    cloud = make_cloud(lambda x: a * x)
    assert value(A.Contraction(), cloud) == near(np.full(7, -2 * math.log(abs(a))))
    assert value(A.Compression(), cloud) == near(np.zeros(7))


def test_a_context_vector_compresses_nothing():
    """Each query adds another vector: through the same context, the random points do not spread either."""
    context = 4 * torch.randn(7, 1, 12, generator=torch.Generator().manual_seed(1))
    cloud = make_cloud(lambda x: x + context)
    assert value(A.Contraction(), cloud) == near(np.zeros(7))
    assert value(A.Compression(), cloud) == near(np.zeros(7))


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_projection_removes_the_variance_across_it(rank):
    basis = orthogonal()[:, :rank]
    projector = basis @ basis.T
    cloud = make_cloud(lambda x: x @ projector)
    p, expected = projector.double().numpy(), []
    for points in cloud.neighbors.double().numpy():
        s = np.cov(points.T, bias=True)
        expected.append(math.log(np.trace(s) / np.trace(p @ s @ p)))
    assert min(expected) > 0
    assert value(A.Contraction(), cloud) == near(np.array(expected))
    everywhere = math.log(cloud.spread_in / cloud.spread_out)
    assert value(A.Compression(), cloud) == near(np.array(expected) - everywhere)


def test_pulling_only_the_neighbors_together_compresses():
    """The sign: positive where the neighborhood shrinks more than unrelated points do."""
    cloud = make_cloud(lambda x: x)
    tight = make_cloud(
        lambda x: x, images=cloud.neighbors.mean(1, keepdim=True) + (cloud.neighbors - cloud.neighbors.mean(1, keepdim=True)) / 2
    )
    assert value(A.Compression(), tight) == near(np.full(7, 2 * math.log(2)))


def test_identity_leaves_the_raw_score_at_the_input_density():
    cloud = make_cloud(lambda x: x)
    assert value(A.RawCompression(), cloud) == near(-np.log(variance(cloud.neighbors)))
    assert value(A.SeedCompression(), cloud) == near(-np.log(variance(cloud.neighbors)))


@pytest.mark.parametrize("constant", [0.5, 0.1, 1234.567], ids=["exact", "rounded", "large"])
@pytest.mark.parametrize("analyzer", [A.Contraction(), A.Compression(), A.RawCompression()], ids=lambda a: a.columns[0].name)
def test_a_constant_map_is_not_a_number(analyzer, constant):
    """Also where the mean of equal numbers is rounded, for a neighborhood and the random points alike."""
    cloud = make_cloud(lambda x: torch.full_like(x, constant))
    assert np.isnan(value(analyzer, cloud)).all()


@pytest.mark.parametrize("analyzer", [A.Contraction(), A.Compression()], ids=lambda a: a.columns[0].name)
def test_equal_neighbors_are_not_a_number(analyzer):
    cloud = make_cloud(lambda x: x)
    neighbors = cloud.neighbors.clone()
    neighbors[2] = neighbors[2, :1]
    answer = value(analyzer, make_cloud(lambda x: x, neighbors=neighbors))
    assert np.isnan(answer).tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize(
    "analyzer", [A.Contraction(), A.Compression(), A.RawCompression(), A.SeedCompression()], ids=lambda a: a.columns[0].name
)
def test_order_of_neighbors_does_not_matter(analyzer):
    cloud = make_cloud(torch.tanh)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    assert value(analyzer, cloud.take(order)) == near(value(analyzer, cloud))


@pytest.mark.parametrize("analyzer", [A.Contraction(), A.Compression()], ids=lambda a: a.columns[0].name)
def test_rotating_and_moving_all_states_changes_nothing(analyzer):
    """Before the block and after it, each in its own way."""
    cloud = make_cloud(torch.tanh)
    moved = make_cloud(torch.tanh, neighbors=cloud.neighbors @ orthogonal(seed=5) - 2, images=cloud.images @ orthogonal(seed=6) + 3)
    assert value(analyzer, moved) == near(value(analyzer, cloud))


def test_compression_is_contraction_beyond_the_random_points():
    cloud = make_cloud(torch.tanh)
    expected = np.log(variance(cloud.neighbors) / variance(cloud.images)) - math.log(cloud.spread_in / cloud.spread_out)
    assert value(A.Compression(), cloud) == near(expected)
    assert value(A.Contraction(), cloud) == near(np.log(variance(cloud.neighbors) / variance(cloud.images)))


def test_seed_score_by_layer():
    """Row 0 has no counterpart in the guide; the last row sees the final norm."""
    norm = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    first, middle, last = (make_cloud(torch.tanh, layer=layer, final_norm=norm) for layer in LAYERS)
    assert np.isnan(value(A.SeedCompression(), first)).all()
    assert value(A.SeedCompression(), middle) == near(-np.log(variance(middle.images)))
    assert value(A.SeedCompression(), last) == near(-np.log(variance(norm(last.images))))


def test_neighborhood_describes_who_is_near():
    cloud = make_cloud(lambda x: x)
    got = {name: column.numpy() for name, column in A.Neighborhood().measure(cloud).items()}
    tokens, positions = cloud.neighbor_token.numpy(), cloud.neighbor_pos.numpy()
    assert got["radius"] == near(cloud.distances.numpy().max(1))
    assert got["nearest"] == near(cloud.distances.numpy().min(1))
    assert got["same_token_share"] == near(
        [np.mean(row == own) for row, own in zip(tokens, cloud.query_token.numpy(), strict=True)]
    )
    assert got["same_position_share"] == near(
        [np.mean(row == own) for row, own in zip(positions, cloud.query_pos.numpy(), strict=True)]
    )
    assert got["distinct_tokens"].tolist() == [len(set(row)) for row in tokens.tolist()]


# -- an oracle in plain numpy ---------------------------------------------------------------------------------------------------


class Oracle:
    """Neighbors and variances by loops over tokens, in float64, from the states and the definitions in scores.md alone."""

    def __init__(self, model, capture, layer, bank=None):
        self.model, self.capture, self.layer, self.bank = model, capture, layer, bank or capture
        self.absolute = model.original_model.config.model_type == "gpt2"
        self.pre, self.post = (np.asarray(s, np.float64) for s in (self.bank.resid_pre(layer), self.bank.resid_post(layer)))
        self.queries = np.asarray(capture.resid_pre(layer), np.float64)
        self.items, self.bank_items = self.list(capture), self.list(self.bank)

    def list(self, capture):
        """What is known of each token: sequence, position, token, document, labels, and what its state is a function of."""
        items = []
        for s, (sequence, doc, labels) in enumerate(zip(capture.sequences, capture.docs, capture.labels, strict=True)):
            for pos, token in enumerate(sequence.tokens):
                prefix = sequence.tokens[: pos + 1]
                key = prefix if self.layer else (token, pos) if self.absolute else token
                items.append({"seq": s, "tokens": sequence.tokens, "pos": pos, "token": token, "doc": doc, **labels, "key": key})
        return items

    def neighbors(self, row, k, *, exclude="sequence", same_token="any", position_0=False, metric="l2"):
        """Bank rows, nearest first, and distances; None if there are fewer than k."""
        own = self.items[row]
        name = {"sequence": "tokens", "document": "doc"}.get(exclude, exclude)
        chosen = {}
        for other, item in enumerate(self.bank_items):
            same = item["token"] == own["token"]
            if (item["pos"] == 0 and not position_0) or item["key"] == own["key"] or (name != "self" and item[name] == own[name]):
                continue
            if {"any": True, "only": same, "exclude": not same}[same_token]:
                chosen.setdefault(item["key"], other)
        rows = np.array(sorted(chosen.values()), int)
        if own["pos"] == 0 or len(rows) < k:
            return None
        if metric == "cosine":
            unit = self.pre[rows] / np.linalg.norm(self.pre[rows], axis=1, keepdims=True)
            distances = 1 - unit @ self.queries[row] / np.linalg.norm(self.queries[row])
        else:
            distances = np.linalg.norm(self.pre[rows] - self.queries[row], axis=1)
        order = np.argsort(distances, kind="stable")[:k]
        return rows[order], distances[order]

    def images(self, row, rows, context):
        """Native: the bank's own output. Patched: the whole model run again with the states put in. Solo: the same on one token."""
        if context == "native":
            return self.post[rows]
        tokens = torch.tensor(self.items[row]["tokens"])
        pos = self.items[row]["pos"]
        if context == "solo":
            tokens, pos = tokens[:1], 0
        states = torch.tensor(self.pre[rows], dtype=torch.float32)
        return np.asarray(door.rerun_with_state(self.model, tokens, self.layer, pos, states), np.float64)


def column(table, name, layer):
    return table.loc[table.layer == layer, name].to_numpy()


def facts_of(table):
    (facts,) = table.attrs["provenance"].values()
    return facts


def run(model, data, *analyzers, **options):
    return bl.analyze(model, data, list(analyzers), progress=False, **options)


@pytest.fixture(scope="module")
def gpt2():
    return make_bridge("gpt2", tokenizer=make_tokenizer())


@pytest.fixture(scope="module")
def gpt2_capture(gpt2):
    return bl.Capture.from_texts(gpt2, TEXTS, progress=False)


@pytest.fixture(params=["llama", "gpt2"])
def world(request):
    """A tiny model and its capture of TEXTS: rotary and learned positions."""
    name = request.param
    held = {"llama": ("llama", "capture"), "gpt2": ("gpt2", "gpt2_capture")}[name]
    return tuple(request.getfixturevalue(fixture) for fixture in held)


def some_rows(capture, count=5, seed=0):
    inner = np.flatnonzero(capture.row_pos.numpy() > 0)
    return np.random.default_rng(seed).choice(inner, count, replace=False)


@pytest.mark.parametrize("context", ["patched", "native", "solo"])
def test_scores_equal_the_oracle(world, context):
    """Variances recomputed for a few tokens; the random points' from another, larger sample (native: from the whole bank)."""
    model, capture = world
    k = 6
    table = run(
        model,
        capture,
        A.Compression(k=k, context=context),
        A.Contraction(k=k, context=context),
        A.RawCompression(k=k, context=context),
    )
    rng = np.random.default_rng(5)
    inner = np.flatnonzero(capture.row_pos.numpy() > 0)
    for layer in LAYERS:
        oracle = Oracle(model, capture, layer)
        beyond = []
        for row in some_rows(capture, 4):
            rows, _ = oracle.neighbors(row, k)
            v_in, v_out = variance(oracle.pre[rows]), variance(oracle.images(row, rows, context))
            assert column(table, "contraction", layer)[row] == near(math.log(v_in / v_out))
            assert column(table, "raw_compression", layer)[row] == near(-math.log(v_out + 1e-10))
            beyond.append(math.log(v_in / v_out) - column(table, "compression", layer)[row])
        assert np.ptp(beyond) < 1e-5
        if context == "native":
            assert beyond[0] == near(math.log(variance(oracle.pre[inner]) / variance(oracle.post[inner])))
            continue
        before, after = [], []
        for row in rng.choice(inner, 25, replace=False):
            rows = rng.choice(inner[capture.row_seq.numpy()[inner] != oracle.items[row]["seq"]], 64, replace=False)
            before.append(variance(oracle.pre[rows]))
            after.append(variance(oracle.images(row, rows, context)))
        assert beyond[0] == near(math.log(np.mean(before) / np.mean(after)), abs=0.2)


# -- known answers through analyze() --------------------------------------------------------------------------------------------

_WRITES = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")


def identity_bridge(name):
    """A bridge whose blocks write nothing: each is the identity."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = make_hf(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(part in path for part in _WRITES):
                parameter.zero_()
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


@pytest.mark.parametrize("context", ["native", "patched", "solo"])
@pytest.mark.parametrize("name", PACKED)
def test_a_block_that_writes_nothing_compresses_nothing(name, context):
    model, k = identity_bridge(name), 5
    capture = bl.Capture.from_texts(model, random_tokens(8, 14), progress=False)
    table = run(model, capture, *(kind(k=k, context=context) for kind in (A.Compression, A.Contraction, A.RawCompression)))
    scored = table[table.pos > 0]
    assert scored.contraction.to_numpy() == near(np.zeros(len(scored)))
    assert scored.compression.to_numpy() == near(np.zeros(len(scored)))
    for layer in LAYERS:
        oracle = Oracle(model, capture, layer)
        for row in some_rows(capture):
            rows, _ = oracle.neighbors(row, k)
            assert column(table, "raw_compression", layer)[row] == near(-math.log(variance(oracle.pre[rows])))


def with_output(f):
    """The identity bridge with f on what block 1 puts out."""
    model = identity_bridge("llama")
    model.add_hook("blocks.1.hook_resid_post", lambda states, hook: f(states))  # noqa: ARG005
    return model


@pytest.mark.parametrize("context", ["native", "patched", "solo"])
@pytest.mark.parametrize(
    ("f", "contraction"),
    [
        (lambda x: 3 * x, -2 * math.log(3)),
        (lambda x: x / 4, 2 * math.log(4)),
        (lambda x: x @ orthogonal(32), 0),
        (lambda x: x + 7, 0),
    ],
    ids=["longer", "shorter", "turned", "shifted"],
)
def test_a_block_that_scales_turns_or_shifts(f, contraction, context):
    table = run(
        with_output(f), random_tokens(8, 14), A.Compression(k=5, context=context), A.Contraction(k=5, context=context), layers=[1]
    )
    scored = table[table.pos > 0]
    assert scored.contraction.to_numpy() == near(np.full(len(scored), contraction))
    assert scored.compression.to_numpy() == near(np.zeros(len(scored)))


@pytest.mark.parametrize("context", ["native", "patched"])
@pytest.mark.parametrize("constant", [0.5, 0.1], ids=["exact", "rounded"])
def test_a_block_that_forgets_everything_is_counted_as_degenerate(constant, context):
    tokens = random_tokens(8, 14)
    kinds = (A.Compression, A.Contraction, A.RawCompression)
    model = with_output(lambda x: torch.full_like(x, constant))
    table = run(model, tokens, *[kind(k=5, context=context) for kind in kinds], layers=[1])
    names = ["compression", "contraction", "raw_compression"]
    assert table[names].isna().all().all()
    for name in names:
        counts = facts_of(table)["left_out"][name]
        assert counts["degenerate or undefined"] == int((table.pos > 0).sum())
        assert counts["position 0"] == len(tokens)


# -- the original guide's score -------------------------------------------------------------------------------------------------


def final_norm_of(model):
    """The norm before the unembedding, in numpy."""
    if model.original_model.config.model_type == "gpt2":
        norm = model.original_model.transformer.ln_f

        def normed(x):
            x = x - x.mean(-1, keepdims=True)
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    else:
        norm, eps = model.original_model.model.norm, model.original_model.config.rms_norm_eps

        def normed(x):
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    held = dict(norm.named_parameters())
    weight = next(p for path, p in held.items() if path.endswith("weight")).detach().double().numpy()
    bias = next((p for path, p in held.items() if path.endswith("bias")), torch.zeros(1)).detach().double().numpy()
    return normed


@pytest.mark.parametrize("k", [3, 15])
def test_the_guides_score_from_the_users_cache(world, k):
    """k nearest including the token itself among everything; minus log variance of what the block made of them."""
    model, capture = world
    table = run(model, capture, A.SeedCompression(k=k))
    pre, post = ([] for _ in range(2))
    for sequence in capture.sequences:
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([sequence.tokens]))
        pre.append(np.stack([cache[f"blocks.{layer}.hook_resid_pre"][0].double().numpy() for layer in LAYERS]))
        post.append(np.stack([cache[f"blocks.{layer}.hook_resid_post"][0].double().numpy() for layer in LAYERS]))
    pre, post = np.concatenate(pre, axis=1), np.concatenate(post, axis=1)
    post[2] = final_norm_of(model)(post[2])
    assert np.isnan(column(table, "seed_compression", 0)).all()
    for layer in (1, 2):
        _, rows = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(pre[layer]).kneighbors(pre[layer])
        expected = -np.log(variance(post[layer][rows]) + 1e-10)
        settled = expected < 20  # nearest all the same prefix: the variance is rounding below 1e-10
        assert settled.sum() > 100
        assert column(table, "seed_compression", layer)[settled] == near(expected[settled], abs=1e-3)


def test_the_guides_score_counts_the_first_token():
    tokens = random_tokens(6, 8)
    table = run(make_bridge("llama"), tokens, A.SeedCompression(k=4), A.RawCompression(k=4))
    first = table[(table.pos == 0) & (table.layer > 0)]
    assert first.seed_compression.notna().all()
    assert first.raw_compression.isna().all()


# -- what does not matter, and what does ----------------------------------------------------------------------------------------

ALL_CLOUDS = (
    A.Compression(k=6),
    A.Compression(k=6, same_token="exclude", name="other"),
    A.Contraction(k=6),
    A.RawCompression(k=6),
    A.Neighborhood(k=6),
)


def test_permuting_the_texts_permutes_the_answer(world):
    model, _ = world
    order = [4, 0, 5, 2, 1, 3]
    analyzers = (
        *(a for a in ALL_CLOUDS if a.context == "native" or isinstance(a, A.Contraction)),
        A.Compression(k=6, context="native"),
        A.SeedCompression(k=6),
        A.Surprisal(),
        A.StateNorm(),
        A.MatrixEntropy(),
        A.AttentionReceived(),
        A.GradientNorm(),
    )
    here, there = run(model, TEXTS, *analyzers), run(model, [TEXTS[i] for i in order], *analyzers)
    there["passage"] = [order[i] for i in there.passage]
    both = here.merge(there, on=["layer", "passage", "pos"], suffixes=("", "_permuted"), validate="1:1")
    assert len(both) == len(here)
    assert (both.token == both.token_permuted).all()
    # Which of several equal states stands for all of them is the first in the bank: this shows where other things than the
    # state itself are read (at layer 0, also its native image).
    first_counts = {"hubness": 3, "same_position_share": 1, "raw_compression": 1, "compression": 1}
    for name in (one_column.name for a in analyzers for one_column in a.columns):
        at = both[both.layer >= first_counts.get(name, 0)]
        assert at[name].to_numpy() == near(at[f"{name}_permuted"].to_numpy(), nan_ok=True, abs=1e-3), name


def test_the_seed_acts_only_through_the_random_points(llama, capture):
    a, b, again = (run(llama, capture, *ALL_CLOUDS, seed=seed) for seed in (0, 1, 0))
    for name in ("contraction", "raw_compression", "radius", "nearest", "hubness"):
        assert a[name].equals(b[name]), name
    for name in ("compression", "other"):
        assert a[name].equals(again[name])
        moved = (a[name] - b[name])[a[name].notna()].groupby(a.layer)
        assert (moved.max() - moved.min()).max() < 1e-5
        assert 1e-6 < moved.mean().abs().max() < 0.2


def test_the_headline_beyond_the_random_points_is_one_number_per_layer(llama, capture):
    table = run(llama, capture, A.Compression(k=6), A.Contraction(k=6))
    beyond = (table.contraction - table.compression).dropna().groupby(table.layer)
    assert (beyond.max() - beyond.min()).max() < 1e-5


@pytest.mark.parametrize("size", [1, 3])
def test_batch_size_does_not_matter(llama, size):
    analyzers = (A.Contraction(k=6), A.GradientNorm(), A.Surprisal(), A.AttentionReceived(), A.MatrixEntropy())
    one, other = run(llama, TEXTS, *analyzers), run(llama, TEXTS, *analyzers, batch_size=size)
    for name in (one_column.name for a in analyzers for one_column in a.columns):
        assert other[name].to_numpy() == near(one[name].to_numpy(), nan_ok=True, rel=1e-4), name


# -- reliability ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnRanks(CloudAnalyzer):
    """Contraction over some ranks of the k nearest, computed here."""

    k: int
    ranks: tuple[int, ...]
    name: str
    context: str = "patched"
    metric: str = "l2"
    exclude: str = "sequence"
    same_token: str = "any"
    needs = frozenset({"input_neighbors", "images"})

    @property
    def columns(self):
        return (Column(self.name, "nats"),)

    def measure(self, cloud):
        ranks = list(self.ranks)
        return {self.name: torch.tensor(np.log(variance(cloud.neighbors[:, ranks]) / variance(cloud.images[:, ranks])))}


@pytest.mark.parametrize("k", [4, 8, 15])
def test_reliability_is_the_correlation_of_disjoint_halves(llama, capture, k):
    even, odd = tuple(range(0, k - k % 2, 2)), tuple(range(1, k, 2))
    table = run(llama, capture, A.Contraction(k=k), A.Compression(k=k), OnRanks(k, even, "even"), OnRanks(k, odd, "odd"))
    reliability = facts_of(table)["reliability"]
    for layer in LAYERS:
        at = table[(table.layer == layer) & table.even.notna()]
        expected = stats.spearmanr(at.even, at.odd).statistic
        assert reliability["contraction"][str(layer)] == near(expected, abs=1e-3)
        assert reliability["compression"][str(layer)] == near(expected, abs=1e-3)
    assert "even" not in reliability


# -- options of the search ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labeled(llama):
    """Two documents of three texts each, and a template label on four of the six."""
    passages = [
        bl.Passage(text, doc="ab"[i % 2], labels={"template": i % 3} if i < 4 else {}, spans={"start": (0, 9)})
        for i, text in enumerate(TEXTS)
    ]
    return bl.Capture.from_texts(llama, passages, progress=False)


class LabelOracle(Oracle):
    """A passage without the label is of no group."""

    def list(self, capture):
        return [{"template": object(), **item} for item in super().list(capture)]


@pytest.mark.parametrize(
    "options",
    [
        {"exclude": "self"},
        {"exclude": "sequence"},
        {"exclude": "document"},
        {"exclude": "template"},
        {"same_token": "only"},
        {"same_token": "exclude"},
        {"same_token": "exclude", "exclude": "self"},
        {"metric": "cosine"},
        {"position_0": True},
        {"position_0": True, "exclude": "self", "same_token": "exclude"},
    ],
    ids=str,
)
def test_neighbors_are_the_oracles(llama, labeled, options):
    k = 2 if options.get("same_token") == "only" else 6
    table = run(llama, labeled, A.Neighborhood(k=k, **options), A.Contraction(k=k, context="native", **options))
    for layer in LAYERS:
        oracle = LabelOracle(llama, labeled, layer)
        found = [oracle.neighbors(row, k, **options) for row in range(labeled.n_rows)]
        scored = np.array([f is not None for f in found])
        assert (column(table, "radius", layer) >= 0).tolist() == scored.tolist()
        if layer == 0 and options.get("same_token") == "only":
            assert not scored.any()  # equal tokens have equal states there
            continue
        rows, distances = (np.stack([f[i] for f in found if f is not None]) for i in (0, 1))
        assert column(table, "radius", layer)[scored] == near(distances[:, -1], abs=1e-5, rel=1e-4)
        assert column(table, "nearest", layer)[scored] == near(distances[:, 0], abs=1e-5, rel=1e-4)
        if scored.sum() == labeled.n_rows - len(TEXTS):
            counts = np.bincount(rows.ravel(), minlength=labeled.n_rows)
            assert column(table, "hubness", layer)[scored].tolist() == counts[scored].tolist()
        expected = np.log(variance(oracle.pre[rows]) / variance(oracle.post[rows]))
        assert column(table, "contraction", layer)[scored] == near(expected, abs=1e-3)


@pytest.mark.parametrize("context", ["patched", "native"])
def test_position_0_is_let_in_as_neighbor_and_as_random_point_alone(llama, capture, context):
    """As the oracle has it; G, which is of the layer, stays as it was, and so does what is scored."""
    k = 6
    scores = [A.Compression(k=k, context=context, position_0=p, name=f"c{p}") for p in (False, True)]
    plain = [A.Contraction(k=k, context=context, position_0=p, name=f"r{p}") for p in (False, True)]
    table = run(llama, capture, *scores, *plain, *controls_of(scores))
    assert table.cTrue.notna().tolist() == table.cFalse.notna().tolist() == (table.pos > 0).tolist()
    for layer in LAYERS:
        oracle = Oracle(llama, capture, layer)
        found = {row: oracle.neighbors(row, k, position_0=True)[0] for row in np.flatnonzero(capture.row_pos.numpy() > 0)}
        with_first = [row for row, rows in found.items() if (capture.row_pos.numpy()[rows] == 0).any()]
        assert with_first and len(with_first) < len(found)
        at = table[table.layer == layer].reset_index(drop=True)
        changed = np.flatnonzero((at.rTrue - at.rFalse).abs() > 1e-6).tolist()
        # A first token pushes another neighbor out, so where there is one the score is another; but bare embeddings of one token
        # are equal.
        assert set(changed) <= set(with_first) and (changed == with_first or layer == 0) and changed
        for row in with_first[:3]:
            expected = math.log(variance(oracle.pre[found[row]]) / variance(oracle.images(row, found[row], context)))
            assert at.rTrue[row] == near(expected, abs=1e-3)
        inner = at[at.pos > 0]
        g = [inner[f"r{p}"] - inner[f"c{p}"] for p in (False, True)]
        assert g[1].to_numpy() == near(g[0].to_numpy(), abs=1e-5)
        assert 0 < (inner.cTrue_random - inner.cFalse_random).abs().gt(1e-6).mean() < 1


def test_position_0_is_shown_and_counted_where_it_is_let_in(llama, capture):
    oracle = Oracle(llama, capture, 1)
    inner = np.flatnonzero(capture.row_pos.numpy() > 0).tolist()
    row = next(r for r in inner if (capture.row_pos[oracle.neighbors(r, 6, position_0=True)[0]] == 0).any())
    seq, pos = int(capture.row_seq[row]), int(capture.row_pos[row])
    shown = bl.neighborhood(llama, capture, layer=1, seq=seq, pos=pos, k=6, position_0=True)
    rows = [capture.row_of(s, p) for s, p in zip(shown.seq, shown.pos, strict=True)]
    assert rows == oracle.neighbors(row, 6, position_0=True)[0].tolist()
    assert (shown.pos == 0).any()
    assert (bl.neighborhood(llama, capture, layer=1, seq=seq, pos=pos, k=6).pos > 0).all()
    with pytest.raises(NeighborError, match="never a query"):
        bl.neighborhood(llama, capture, layer=1, seq=seq, pos=0, k=6, position_0=True)
    most = int((capture.row_pos > 0).sum())
    with pytest.raises(NeighborError, match=rf"bank's {most} points \(position 0 left out\)"):
        run(llama, capture, A.Compression(k=most + 1))
    with pytest.raises(NeighborError, match=f"bank's {capture.n_rows} points, got"):
        run(llama, capture, A.Compression(k=capture.n_rows + 1, position_0=True))


def test_cosine_only_chooses(llama, capture):
    """Variances stay Euclidean whatever the neighbors were chosen by."""
    table = run(llama, capture, A.RawCompression(k=6, metric="cosine"))
    oracle = Oracle(llama, capture, 1)
    for row in some_rows(capture):
        rows, _ = oracle.neighbors(row, 6, metric="cosine")
        assert column(table, "raw_compression", 1)[row] == near(-math.log(variance(oracle.post[rows])))


@pytest.mark.parametrize("option", ["self", "sequence", "document", "template"])
def test_no_pair_that_is_passed_breaks_the_exclusion(llama, labeled, option, monkeypatch):
    """Neighbors and random points alike, and never position 0 or a token's own prefix."""
    pairs = []
    make = LayerMaps.map

    def watched(self, *given):
        made = make(self, *given)

        def of_rows(queries, rows):
            pairs.extend(
                (query, row) for query, many in zip(queries.tolist(), rows.tolist(), strict=True) for row in many if row >= 0
            )
            return made.of_rows(queries, rows)

        return dataclasses.replace(made, of_rows=of_rows)

    monkeypatch.setattr(LayerMaps, "map", watched)
    run(llama, labeled, A.Compression(k=5, exclude=option), layers=[1])
    assert len(pairs) > labeled.n_rows * 5
    items = LabelOracle(llama, labeled, 1).items
    for query, row in set(pairs):
        a, b = items[query], items[row]
        assert b["pos"] > 0
        assert a["key"] != b["key"]
        name = {"sequence": "seq", "document": "doc"}.get(option, option)
        assert option == "self" or a[name] != b[name]


def test_unknown_exclusion_names_the_labels(llama, labeled):
    with pytest.raises(NeighborError, match="template"):
        run(llama, labeled, A.Compression(k=5, exclude="tmplate"))


def test_layer_0_has_no_equal_neighbors(world):
    """Equal tokens (at equal positions, where those are learned) enter block 0 with equal states: they count once."""
    model, capture = world
    absolute = capture.model["architecture"].startswith("GPT2")
    table = run(model, capture, A.Contraction(k=6, exclude="self"), A.Neighborhood(k=6, exclude="self"), layers=[0])
    scored = table[table.pos > 0]
    assert scored.contraction.notna().all()
    assert (scored.nearest > 1e-3).all()
    for row in some_rows(capture):
        seq, pos = int(capture.row_seq[row]), int(capture.row_pos[row])
        who = bl.neighborhood(model, capture, 0, seq, pos, k=20, exclude="self", context="native")
        keys = list(zip(who.token, who.pos if absolute else [0] * 20, strict=True))
        assert len(set(keys)) == 20
        assert (scored.token.loc[row], pos if absolute else 0) not in keys
    assert scored.same_token_share.max() > 0 if absolute else scored.same_token_share.max() == 0


# -- banks ----------------------------------------------------------------------------------------------------------------------


def test_another_bank_is_where_the_neighbors_come_from(llama):
    capture, bank = (bl.Capture.from_texts(llama, texts, progress=False) for texts in (TEXTS[:2], TEXTS[2:]))
    table = run(llama, capture, A.Contraction(k=6), A.Neighborhood(k=6), bank=bank)
    assert table.hubness.isna().all()
    assert facts_of(table)["bank"]["source"] == "another capture"
    assert facts_of(table)["bank"]["points"] == bank.n_rows - len(TEXTS[2:])
    for layer in LAYERS:
        oracle = Oracle(llama, capture, layer, bank)
        for row in some_rows(capture):
            rows, distances = oracle.neighbors(row, 6)
            assert column(table, "radius", layer)[row] == near(distances[-1])
            images = oracle.images(row, rows, "patched")
            assert column(table, "contraction", layer)[row] == near(math.log(variance(oracle.pre[rows]) / variance(images)))


def test_the_same_texts_as_another_bank_change_nothing(llama, capture):
    """The same text is the same sequence, also in another capture: its tokens are no neighbors of theirs."""
    twin = bl.Capture.from_texts(llama, TEXTS, progress=False)
    inside, outside = (run(llama, capture, *ALL_CLOUDS, bank=bank) for bank in (None, twin))
    for name in ("compression", "other", "contraction", "raw_compression", "radius", "nearest", "same_token_share"):
        assert outside[name].to_numpy() == near(inside[name].to_numpy(), nan_ok=True), name


def test_the_guides_score_refuses_another_bank(llama, capture):
    twin = bl.Capture.from_texts(llama, TEXTS[:3], progress=False)
    with pytest.raises(NeighborError, match="SeedCompression"):
        run(llama, capture, A.SeedCompression(k=4), bank=twin)


def test_one_text_needs_a_bank(llama):
    with pytest.raises(NeighborError, match="reference"):
        run(llama, TEXTS[0], A.Compression(k=5))


@pytest.mark.slow
def test_the_reference_bank_is_read_once(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path))
    passes = []
    forward = door.forward_pass
    replace_in_all_rooms(monkeypatch, "forward_pass", lambda *given, **options: (passes.append(1), forward(*given, **options))[1])
    first = run(llama, TEXTS[0], A.Contraction(k=15, context="native"), A.Neighborhood(), bank="reference", layers=[1])
    assert len(list((tmp_path / "reference").iterdir())) == 1
    reading = len(passes)
    again = run(llama, TEXTS[0], A.Contraction(k=15, context="native"), A.Neighborhood(), bank="reference", layers=[1])
    assert len(passes) - reading < reading
    assert len(passes) - reading == 1  # the text itself
    assert first.contraction.equals(again.contraction)
    assert first.contraction[1:].notna().all()
    bank = bl.Capture.from_texts(llama, list(reference_passages()), layers=[1], progress=False)
    given = run(llama, TEXTS[0], A.Contraction(k=15, context="native"), A.Neighborhood(), bank=bank, layers=[1])
    for name in ("contraction", "radius"):
        assert given[name].to_numpy() == near(first[name].to_numpy(), nan_ok=True)


# -- which tokens are scored ----------------------------------------------------------------------------------------------------


def queries_cases(capture):
    pos, seq = capture.row_pos.numpy(), capture.row_seq.numpy()
    mask = np.random.default_rng(0).random(capture.n_rows) < 0.3
    grid = torch.zeros(capture.valid.shape, dtype=torch.bool)
    grid[capture.valid] = torch.tensor(mask)
    start = np.array([[0 <= a < 9 for a in s.starts] for s in capture.sequences], dtype=object)
    return {
        "positions": ([3, 7], np.isin(pos, [3, 7])),
        "rows mask": (mask, mask),
        "grid mask": (grid, mask),
        "label": ("template", np.isin(seq, [1, 2])),  # template 0 is no
        "span": ("start", np.array([inside for row in start for inside in row])),
    }


@pytest.mark.parametrize("case", ["positions", "rows mask", "grid mask", "label", "span"])
def test_queries_choose_what_is_scored_and_nothing_else(llama, labeled, case):
    queries, expected = queries_cases(labeled)[case]
    analyzers = (A.Contraction(k=6), A.Compression(k=6, context="native"), A.RawCompression(k=6), A.Neighborhood(k=6))
    full, some = run(llama, labeled, *analyzers), run(llama, labeled, *analyzers, queries=queries)
    inner = labeled.row_pos.numpy() > 0
    for layer in LAYERS:
        for name in ("contraction", "compression", "raw_compression", "radius", "nearest"):
            got, whole = column(some, name, layer), column(full, name, layer)
            assert np.isnan(got).tolist() == (~(expected & inner)).tolist(), name
            assert got[expected & inner] == near(whole[expected & inner]), name
    counts = facts_of(some)["left_out"]["contraction"]
    assert counts["not asked for"] == 3 * int((~expected & inner).sum())
    assert facts_of(some)["queries"] == f"{expected.sum()} of {labeled.n_rows} tokens"
    assert facts_of(some)["bank"] == facts_of(full)["bank"]


@pytest.mark.parametrize("context", ["patched", "solo"])
@pytest.mark.parametrize("queries", ["start", [3, 7], 4], ids=str)
def test_the_headline_of_some_tokens_is_that_of_all(llama, labeled, queries, context):
    """What the layer does to unrelated points (G) is a fact about the layer, not about the tokens asked for."""
    full, some = (run(llama, labeled, A.Compression(k=6, context=context), layers=[1], queries=q) for q in (None, queries))
    asked = some.compression.notna()
    assert asked.sum() > 3
    assert some.compression[asked].to_numpy() == near(full.compression[asked].to_numpy())


def test_a_number_of_queries_is_a_seeded_sample(llama, labeled):
    tables = [run(llama, labeled, A.Contraction(k=6), queries=17, seed=seed) for seed in (0, 0, 1)]
    chosen = [tuple(np.flatnonzero(table.contraction.notna() & (table.layer == 1))) for table in tables]
    assert [len(rows) for rows in chosen] == [17] * 3
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("queries", ["no such label", 0, [999], np.zeros(3, bool), [0.5]], ids=str)
def test_queries_that_choose_nothing_are_refused(llama, labeled, queries):
    with pytest.raises(NeighborError):
        run(llama, labeled, A.Contraction(k=6), queries=queries)


# -- what is left out -----------------------------------------------------------------------------------------------------------


def test_position_0_has_no_cloud_score(world):
    model, capture = world
    table = run(model, capture, *ALL_CLOUDS)
    names = [c.name for a in ALL_CLOUDS for c in a.columns]
    assert table.loc[table.pos == 0, names].isna().all().all()
    assert table.loc[table.pos > 0, names].notna().all().all()


@pytest.mark.parametrize("queries", [None, [2, 3], 20])
def test_counts_add_up_to_what_is_missing(llama, labeled, queries):
    analyzers = (*ALL_CLOUDS, A.Contraction(k=3, same_token="only", name="same"), A.SeedCompression(k=5))
    table = run(llama, labeled, *analyzers, queries=queries)
    left_out = facts_of(table)["left_out"]
    assert set(left_out) == {c.name for a in analyzers for c in a.columns}
    for name, counts in left_out.items():
        assert sum(counts.values()) == int(table[name].isna().sum()), name
    assert left_out["same"]["too few neighbors"] > 0
    assert left_out["seed_compression"]["position 0"] == 0


# -- neighborhood() -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["patched", "native", "solo"])
def test_neighborhood_shows_the_neighbors_behind_the_scores(world, context):
    model, capture = world
    k = 7
    table = run(model, capture, A.Neighborhood(k=k))
    for layer in LAYERS:
        oracle = Oracle(model, capture, layer)
        for row in some_rows(capture, 3):
            seq, pos = int(capture.row_seq[row]), int(capture.row_pos[row])
            who = bl.neighborhood(model, capture, layer, seq, pos, k=k, context=context)
            rows, distances = oracle.neighbors(row, k)
            assert who["rank"].tolist() == list(range(1, k + 1))
            assert [capture.row_of(s, p) for s, p in zip(who.seq, who.pos, strict=True)] == rows.tolist()
            assert who.distance_before.to_numpy() == near(distances)
            after = np.linalg.norm(oracle.images(row, rows, context) - oracle.post[row], axis=1)
            assert who.distance_after.to_numpy() == near(after)
            here = table[table.layer == layer].iloc[row]
            assert who.distance_before.iloc[-1] == near(here.radius)
            assert who.distance_before.iloc[0] == near(here.nearest)
            assert (who.token == here.token).mean() == near(here.same_token_share)
            assert (who.pos == pos).mean() == near(here.same_position_share)
            assert who.token.nunique() == here.distinct_tokens
            assert who.doc.tolist() == [capture.docs[s] for s in who.seq]
            strings = capture.row_strings()
            assert who.token.tolist() == [strings[r] for r in rows]
            assert all(f"[{token}]" in text for token, text in zip(who.token, who.text, strict=True))


def test_neighborhood_refuses_the_first_token(llama, capture):
    with pytest.raises(NeighborError, match="position"):
        bl.neighborhood(llama, capture, 1, 0, 0)


# -- token analyzers ------------------------------------------------------------------------------------------------------------


def batch_of(tokens=None, valid=None, layer=1, **values):
    first = next(iter(values.values()))
    size = (first.shape[0], first.shape[-2])
    tokens = torch.zeros(size, dtype=torch.int64) if tokens is None else tokens
    valid = torch.ones(size, dtype=torch.bool) if valid is None else valid
    return TokenBatch(layer, 3, tokens, valid, values, {})


def entropy(states):
    """-sum l log l / log min(T, d) and max l / sum l of K = Z Z^T / trace, for one sequence, by eigenvalues."""
    z = states - states.mean(0)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    gram = z @ z.T
    values = np.linalg.eigvalsh(gram / np.trace(gram)).clip(0)
    kept = values[values > 0]
    return -(kept * np.log(kept)).sum() / math.log(min(states.shape)), values.max() / values.sum()


def test_matrix_entropy_is_the_formula(llama, capture):
    table = run(llama, capture, A.MatrixEntropy())
    for layer in LAYERS:
        states = capture.resid_pre(layer).double().numpy()
        for seq, (first, length) in enumerate(zip(capture.offsets.tolist(), capture.lengths.tolist(), strict=True)):
            rows = table[(table.layer == layer) & (table.seq == seq)]
            for suffix, start in (("", first), ("_without_first", first + 1)):
                expected = entropy(states[start : first + length])
                assert rows["matrix_entropy" + suffix].to_numpy() == near(np.full(length, expected[0]))
                assert rows["anisotropy" + suffix].to_numpy() == near(np.full(length, expected[1]))


def test_matrix_entropy_of_known_spectra():
    """All on one line: 0 and 1. All directions alike: nearly 1 and nearly 1 / d."""
    line = torch.linspace(-3, 5, 9)[:, None] * torch.ones(4)
    corners = torch.cat([torch.eye(4), -torch.eye(4)])
    got = [A.MatrixEntropy().measure(batch_of(resid_pre=states[None])) for states in (line, corners)]
    assert [float(g["matrix_entropy"]) for g in got] == near([0, 1])
    assert [float(g["anisotropy"]) for g in got] == near([1, 0.25])


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_matrix_entropy_of_short_and_padded_sequences(length):
    """Under 3 states there is nothing to measure: two centered rows are one direction, whatever they are."""
    states = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    got = A.MatrixEntropy().measure(batch_of(resid_pre=states, valid=torch.arange(6)[None] < length))
    for suffix, first in (("", 0), ("_without_first", 1)):
        left = states[0, first:length].double().numpy()
        expected = entropy(left) if len(left) >= 3 else (math.nan, math.nan)
        assert float(got["matrix_entropy" + suffix]) == near(expected[0], nan_ok=True)
        assert float(got["anisotropy" + suffix]) == near(expected[1], nan_ok=True)


def test_surprisal_is_log_softmax(world):
    model, capture = world
    table = run(model, capture, A.Surprisal())
    expected = []
    for sequence in capture.sequences:
        with torch.no_grad():
            logits = model(torch.tensor([sequence.tokens]), return_type="logits")[0].double()
        predicted = -torch.log_softmax(logits, -1)
        expected += [math.nan] + [float(predicted[t - 1, token]) for t, token in enumerate(sequence.tokens) if t]
    for layer in LAYERS:
        assert column(table, "surprisal", layer) == near(np.array(expected), nan_ok=True)


def test_surprisal_of_a_uniform_guess():
    tokens = torch.tensor([[1, 2, 0, 4]])
    got = A.Surprisal().measure(batch_of(tokens, logits=torch.zeros(1, 4, 7)))["surprisal"]
    assert got.numpy() == near(np.array([[math.nan] + [math.log(7)] * 3]), nan_ok=True)


def test_state_norm(world):
    model, capture = world
    table = run(model, capture, A.StateNorm())
    for layer in LAYERS:
        assert column(table, "state_norm", layer) == near(
            np.linalg.norm(capture.resid_pre(layer).double().numpy(), axis=1), rel=1e-5
        )


def patterns_of(model, tokens, layer):
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([tokens]))
    return cache[f"blocks.{layer}.attn.hook_pattern"][0].double().numpy()


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_attention_received_by_a_loop(llama, capture, normalize, sink):
    """Grouped-query attention: four heads read two key heads."""
    analyzer = A.AttentionReceived(normalize=normalize, sink=sink, name="received")
    table = run(llama, capture, analyzer)
    for layer in LAYERS:
        expected = []
        for sequence in capture.sequences:
            heads = patterns_of(llama, sequence.tokens, layer)
            assert heads.shape[0] == 4
            count = len(sequence.tokens)
            for i in range(count):
                if count - 1 - i < 5 or (i == 0 and not sink):
                    expected.append(math.nan)
                    continue
                total = uniform = 0.0
                for t in range(i + 1, count):
                    rows = heads.mean(0)[t]
                    total += rows[i] if sink else rows[i] / rows[1:].sum()
                    uniform += 1 / (t + 1) if sink else 1 / t
                expected.append(total / uniform if normalize else total)
        assert column(table, "received", layer) == near(np.array(expected), nan_ok=True)


@pytest.mark.parametrize("sink", [True, False])
def test_uniform_attention_receives_1(sink):
    """With padding, whose rows must count nowhere."""
    count, length = 14, 11
    uniform = (torch.ones(count, count).tril() / torch.arange(1, count + 1)[:, None]).expand(1, 3, -1, -1)
    valid = torch.arange(count)[None] < length
    (got,) = A.AttentionReceived(sink=sink).measure(batch_of(pattern=uniform, valid=valid)).values()
    scored = got[0, (0 if sink else 1) : length - 5]
    assert scored.numpy() == near(np.ones(len(scored)))
    assert bool(got[0, length - 5 :].isnan().all())
    assert sink or bool(got[0, 0].isnan())


def loss_after(model, tokens, layer, pos, moves):
    """Summed loss of the tokens after `pos` with each of `moves` added to the state there, through public hooks alone."""

    def move(states, hook):  # noqa: ARG001
        states = states.clone()
        states[:, pos] += moves
        return states

    with torch.no_grad():
        batch = tokens.expand(len(moves), -1)
        logits = model.run_with_hooks(batch, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", move)], return_type="logits")
    predicted = -torch.log_softmax(logits[:, pos:-1], -1)
    return predicted.gather(2, batch[:, pos + 1 :, None]).sum((1, 2))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_norm_is_the_slope(name):
    """Central differences in every direction of the state (norms inside a Llama compute in float32: no tiny steps)."""
    model = make_bridge(name).double()
    tokens = random_tokens(3, 9)
    capture = bl.Capture.from_texts(model, tokens, progress=False)
    table = run(model, capture, A.GradientNorm())
    step = 3e-3 * torch.eye(32, dtype=torch.float64)
    for layer in LAYERS:
        for seq, pos in ((0, 0), (1, 4), (2, 7)):
            rise = loss_after(model, tokens[seq], layer, pos, torch.cat([step, -step]))
            slope = float((rise[:32] - rise[32:]).norm() / 6e-3)
            row = capture.row_of(seq, pos)
            assert column(table, "gradient_norm", layer)[row] == near(slope, rel=5e-3)
            norm = float(capture.resid_pre(layer)[row].norm())
            assert column(table, "gradient_norm_scaled", layer)[row] == near(slope * norm, rel=5e-3)
        last = column(table, "gradient_norm", layer).reshape(3, 9)[:, -1]
        assert np.isnan(last).all()


def test_padding_has_no_slope(llama):
    """Sequences of unequal length in one batch: each as if alone."""
    together = run(llama, TEXTS, A.GradientNorm(), batch_size=6)
    alone = [run(llama, text, A.GradientNorm()) for text in TEXTS]
    for passage, table in enumerate(alone):
        at = together[together.passage == passage]
        assert at.gradient_norm.to_numpy() == near(table.gradient_norm.to_numpy(), rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("state", ["as loaded", "frozen", "no gradients", "inference mode"])
def test_gradients_in_any_state_of_the_model(state):
    model = make_bridge("llama")
    tokens = random_tokens(2, 8)
    expected = run(make_bridge("llama"), tokens, A.GradientNorm())
    if state == "frozen":
        model.requires_grad_(False)
    modes = {"no gradients": torch.no_grad, "inference mode": torch.inference_mode}
    with modes.get(state, torch.enable_grad)():
        table = run(model, tokens, A.GradientNorm())
    assert table.gradient_norm.to_numpy() == near(expected.gradient_norm.to_numpy(), nan_ok=True, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {parameter.requires_grad for parameter in model.parameters()} == {state != "frozen"}


def test_future_loss_is_the_sum_over_real_tokens():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    tokens = random_tokens(2, 5) % 7
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    predicted = -torch.log_softmax(logits.double(), -1)
    expected = sum(float(predicted[b, t - 1, tokens[b, t]]) for b, n in ((0, 5), (1, 3)) for t in range(1, n))
    assert float(future_loss(logits, tokens, valid)) == near(expected)
