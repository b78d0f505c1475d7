"""A random sample that scores are held against: what it moves with the seed stands in the printed intervals."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as scipy_stats

import basin_lens as bl
from basin_lens import stats
from tests.conftest import make_bridge, make_hf, random_tokens
from tests.scoring.oracle import facts_of, run

A = bl.analyzers
SEEDS = 20
MASSIVE, SIZE = 1, 1000.0  # a token and how far it is out in dimension 0
SEQUENCES, LENGTH = 30, 16
ASKED = (torch.arange(SEQUENCES * LENGTH) % LENGTH)[:, None].eq(torch.tensor([3, 6, 12])).any(1)


def planted():
    """A tiny Llama in which one token enters dimension 0 far out, as attention sinks do, and block 1 takes nearly all of it away.

    No other token and no block writes in that dimension.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = make_hf("llama")
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 0
        embedding[MASSIVE, 0] = SIZE
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        mlp = model.model.layers[1].mlp
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[0] = 0
            weight[0, 0] = 1
        normed = torch.tensor(float(embedding.shape[1])).sqrt()
        mlp.down_proj.weight[:, 0] = 0
        mlp.down_proj.weight[0, 0] = -0.95 * SIZE / (torch.nn.functional.silu(normed) * normed)
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


@cache
def read():
    model, tokens = planted(), random_tokens(SEQUENCES, LENGTH)
    tokens[7, 9] = MASSIVE
    return model, bl.Capture.from_texts(model, tokens, progress=False)


@cache
def table_of(seed: int) -> pd.DataFrame:
    """Both scores on the same texts. The queries are the same with every seed, and none is massive."""
    return run(*read(), A.Compression(k=8), A.RelativeContraction(k=8), queries=ASKED, seed=seed)


def tables_over_seeds() -> list[pd.DataFrame]:
    return [table_of(seed) for seed in range(SEEDS)]


@cache
def over_seeds() -> pd.DataFrame:
    """What is printed of them, by layer and seed."""
    return pd.concat([bl.tables.layer_summary(table).assign(seed=seed) for seed, table in enumerate(tables_over_seeds())])


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_seeds_move_no_mean_by_more_than_its_printed_error(layer):
    """Squares of the means' deviations over their printed errors are at most a chi-squared variable's, and no smaller than its 1e-6."""
    here = over_seeds()[lambda t: t["layer"] == layer]
    means, errors = here["relative_contraction_mean"], here["relative_contraction_reference_error"]
    square = float((((means - means.mean()) / errors) ** 2).sum())
    assert scipy_stats.chi2.ppf(1e-6, SEEDS - 1) < square < scipy_stats.chi2.ppf(0.999, SEEDS - 1)
    wide = (here["relative_contraction_high"] - here["relative_contraction_low"]) / 2
    assert (abs(means - means.mean()) > wide).sum() <= scipy_stats.binom.ppf(0.999, SEEDS, 0.05)


OF_THE_HEADLINE = [(column, layer) for column in ("compression", "compression_above_random_sets") for layer in (0, 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("column", "layer"), OF_THE_HEADLINE)
def test_seeds_move_no_mean_of_the_headline_by_more_than_its_printed_error(column, layer):
    """The documents are the same, so that seeds (who meets whom, the displacements of the nulls) move less than the error says; at
    layer 1, where the block takes a massive state away, too."""
    here = over_seeds()[lambda t: t["layer"] == layer]
    means, half = here[f"{column}_mean"], (here[f"{column}_high"] - here[f"{column}_low"]) / 2
    errors = half / scipy_stats.t.ppf(0.975, here["n_documents"] - 1)
    square = float((((means - means.mean()) / errors) ** 2).sum())
    assert 0 < square < scipy_stats.chi2.ppf(0.999, SEEDS - 1)
    assert (abs(means - means.mean()) > half).sum() <= scipy_stats.binom.ppf(0.999, SEEDS, 0.05)


@pytest.mark.slow(everywhere=True)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_no_random_set_holds_a_state_that_is_far_out(layer):
    """There is one massive token among 450; where it is in a set, that set's interaction is beyond 1 nat."""
    for table in tables_over_seeds():
        facts = facts_of(table)["groups"][str(layer)]["compression"]
        assert facts["far_out"] == 1
        assert table[table["layer"] == layer]["compression_random_sets"].abs().max() < 1


@pytest.mark.slow(everywhere=True)
def test_where_too_few_rows_are_left_the_random_sets_are_missing_and_nothing_else(llama, capture):
    """Far-out rows make up most of a bank's eligible rows only if somebody puts them there: the null is missing then, not wrong."""
    table = run(llama, capture, A.Compression(k=8), layers=[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("basin_lens.scoring.clouds.MASSIVE", 0.0)
        none = run(llama, capture, A.Compression(k=8), layers=[1])
    assert none["compression"].equals(table["compression"]) and table["compression"].notna().any()
    assert none[["compression_random_sets", "compression_above_random_sets"]].isna().all(axis=None)
    assert none["compression_isotropic"].equals(table["compression_isotropic"])


def misses(pairs):
    """Layers whose interval of the mean difference does not hold 0."""
    tested = stats.before_after(pairs, n_resamples=99)
    return int(((tested["low"] > 0) | (tested["high"] < 0)).sum())


@pytest.mark.slow
def test_runs_that_differ_in_the_seed_alone_do_not_differ():
    """0 is in the intervals of 95 of 100 differences, or more. Without the references' errors the difference of every token is the same
    number, not 0 and with no error at all."""
    missed, layers = 0, 0
    for first, second in zip(tables_over_seeds()[::2], tables_over_seeds()[1::2], strict=True):
        pairs = bl.compare(first, second, on="relative_contraction")
        missed, layers = missed + misses(pairs), layers + 3
        assert (pairs.groupby("layer")["difference"].mean().abs() > 1e-4).any()
        with pytest.raises(bl.errors.TableError, match="constant"):
            misses(bl.tables.without_provenance(pairs))
    assert missed <= scipy_stats.binom.ppf(0.999, layers, 0.05)


def test_a_difference_has_both_errors_in_provenance():
    first, second = table_of(0), table_of(1)
    errors = [facts_of(table)["reference_error"]["relative_contraction"] for table in (first, second)]
    assert all(0 < error < 0.2 for by_layer in errors for error in by_layer.values())
    pairs = bl.compare(first, second, on="relative_contraction")
    for name, expected in (
        ("difference", {layer: np.hypot(errors[0][layer], errors[1][layer]) for layer in "012"}),
        ("relative_contraction_a", errors[0]),
        ("relative_contraction_b", errors[1]),
    ):
        assert dict(zip(pairs["layer"].astype(str), bl.tables.reference_error(pairs, name), strict=True)) == pytest.approx(expected)
    layers = bl.compare(*(bl.tables.at_layer(first, layer) for layer in (0, 2)), on="relative_contraction")
    assert set(bl.tables.reference_error(layers, "difference")) == {np.hypot(errors[0]["0"], errors[0]["2"])}
    assert not bl.tables.reference_error(bl.compare(first, first, on="relative_contraction"), "difference").any()
    # The headline is held against nothing drawn for the whole layer.
    assert not bl.tables.reference_error(bl.compare(first, second, on="compression"), "difference").any()


@pytest.mark.slow(everywhere=True)
def test_frozen_neighbors_have_references_of_their_own(llama, capture):
    """One model and the same neighbors: the references are drawn twice all the same, and from one seed alike."""
    pairs = bl.compare((llama, capture), (llama, capture), on=A.RelativeContraction(k=5), frozen_neighbors=True, progress=False)
    assert pairs["difference"].abs().max() < 1e-5
    a, b = (bl.tables.reference_error(pairs, f"relative_contraction_{side}") for side in "ab")
    assert (a > 0).all() and bl.tables.reference_error(pairs, "difference") == pytest.approx(np.hypot(a, b))


# -- where nothing is to be found -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_random_sets_in_place_of_neighbors_are_within_the_printed_error_of_0(name):
    model = make_bridge(name)
    capture = bl.Capture.from_texts(model, random_tokens(SEQUENCES, LENGTH), progress=False)
    analyzer, outside, seeds = A.RelativeContraction(choice="random"), 0, 8
    for seed in range(seeds):
        summary = bl.tables.layer_summary(run(model, capture, analyzer, queries=ASKED, seed=seed))
        outside += int(((summary["relative_contraction_low"] > 0) | (summary["relative_contraction_high"] < 0)).sum())
    assert outside <= scipy_stats.binom.ppf(0.999, 3 * seeds, 0.05)
