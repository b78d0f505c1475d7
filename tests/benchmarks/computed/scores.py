"""Analyzers on six families, captures, controls, pairs of runs, neighbors."""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from computed.hashes import floats
from computed.models import FAMILIES, QUIET, Items, capture_of, model_of, texts, token_ids

import basin_lens as bl
from basin_lens.errors import BasinLensError
from basin_lens.texts import reference_passages

A = bl.analyzers

VARIANTS = {
    "native": A.Contraction(k=4, context="native"),
    "group": A.Compression(k=4, group=6, nulls=("random_sets",)),
    "scale": A.Compression(k=4, scale=0.1, queries=60, nulls=False, contractions=True),
    "solo": A.Compression(k=4, context="solo"),
    "attn": A.Compression(k=4, context="attn"),
    "mlp": A.Compression(k=4, context="mlp"),
    "blocks": A.Compression(k=4, blocks=2),
    "blocks_native": A.RawCompression(k=4, blocks=2),
    "cosine": A.Compression(k=4, metric="cosine"),
    "same_only": A.Neighborhood(k=2, same_token="only"),
    "same_exclude": A.Compression(k=4, same_token="exclude"),
    "position_0": A.Compression(k=4, position_0=True),
    "self": A.Contraction(k=4, exclude="self"),
    "document": A.Compression(k=4, exclude="document"),
    "label": A.Compression(k=4, exclude="kind"),
    "random": A.Compression(k=4, choice="random"),
    "matched": A.Compression(k=4, choice="radius_matched"),
    "raw_patched": A.RawCompression(k=4, context="patched"),
    "neighborhood_cosine": A.Neighborhood(k=4, metric="cosine"),
    "seed": A.SeedCompression(k=4),
    "symmetric_cosine": A.SymmetricContraction(k=4, metric="cosine"),
    "angular_mlp": A.AngularContraction(k=4, context="mlp"),
    "rank": A.EffectiveRankChange(k=5, context="solo"),
    "overlap": A.NeighborOverlap(k=30),
    "dimension": A.LocalDimension(k=9, metric="cosine", curve=(3, 9)),
    "jacobian_attn": A.JacobianGain(k=4, queries=6, context="attn"),
    "jacobian_solo": A.JacobianGain(k=4, queries=6, context="solo", seed=3),
    "centroid": A.CentroidEffect(k=4, queries=6, same_token="exclude"),
    "received": A.AttentionReceived(normalize=False, sink=False),
    "received_heads": A.AttentionReceived(per_head=4, sink=False),
    "rollout": A.AttentionRollout(sink=False, per_head=4),
    "value_heads": A.ValueWeightedAttention(per_head=(2, 0)),
    "value": A.ValueWeightedAttention(normalize=False, sink=False),
    "gradient_last": A.GradientNorm(target="last_logit"),
    "gradient_token": A.GradientTimesActivation(target=11),
    "integrated_last": A.IntegratedGradients(steps=6, layer=None, target="last_logit"),
    "integrated_zero": A.IntegratedGradients(steps=8, layer=1, baseline="zero"),
    "erasure": A.Erasure(positions=3, seed=5),
}


def scored(model: Any, data: Any, analyzers: list[Any] | None = None, **options: Any) -> dict[str, Any]:
    """A run's table, and the numbers in its provenance."""
    table = bl.analyze(model, data, analyzers, **QUIET | options)
    (facts,) = bl.tables.provenance(table).values()
    return {"table": table, "facts": np.sort(np.array(floats(facts)))}


def by_column(model: Any, data: Any, analyzers: list[Any]) -> dict[str, Any]:
    """The same with a hash for each analyzer's column; where one of them is refused, each is measured alone."""
    try:
        found = scored(model, data, analyzers)
    except BasinLensError as error:
        if len(analyzers) == 1:
            return {f"{analyzers[0].columns[0].name} (refused)": type(error).__name__}
        return {name: part for analyzer in analyzers for name, part in by_column(model, data, [analyzer]).items()}
    names = [column.name for analyzer in analyzers for column in analyzer.columns]
    columns = {name: found["table"][name].to_numpy() for name in names}
    return columns | {"rows": found["table"].drop(columns=names), "facts": found["facts"]}


def parts_of_analyzers() -> Items:
    """Every analyzer and option on six families."""
    variants = {name: replace(analyzer, name=name) for name, analyzer in VARIANTS.items()}
    halves = [name for name, analyzer in VARIANTS.items() if getattr(analyzer, "context", "") in ("attn", "mlp")]
    alone = [make() for make in bl.ANALYZERS]
    for family in FAMILIES:
        yield f"{family} defaults", partial(by_column, model_of(family), capture_of(family), alone)
        together = [analyzer for name, analyzer in variants.items() if name not in halves]
        yield f"{family} options", partial(by_column, model_of(family), capture_of(family), together)
        for name in halves:  # not every family has them
            yield f"{family} {name}", partial(scored, model_of(family), capture_of(family), [variants[name]])
        yield f"{family} cache", partial(from_cache, model_of(family))
        yield f"{family} cache with gradients", partial(from_cache, model_of(family), gradients=True)
        small = [A.Compression(k=4), A.Contraction(k=4, context="native"), A.AngularContraction(k=4, context="solo"), A.Surprisal()]
        yield f"{family} controls", partial(scored, model_of(family), capture_of(family), small, controls=True, seed=2)
        yield f"{family} reference", partial(scored, model_of(family), texts(2, 90), layers=[1], bank="reference", queries=12)
        yield f"{family} summary", partial(summary, model_of(family), capture_of(family))


def parts_of_calls() -> Items:
    """What a call is given that changes its way, on one model."""
    model, capture = model_of("llama"), capture_of("llama")
    small = [A.Compression(k=4), A.Surprisal(), A.StateNorm()]
    mask = torch.arange(capture.n_rows) % 3 == 0
    for name, queries in {"positions": [1, 3, 5], "mask": mask, "span": "opening", "label": "even", "number": 20}.items():
        yield f"queries {name}", partial(scored, model, capture, small, queries=queries, seed=4)
    for name in ("torch", "faiss", "approximate"):
        yield f"backend {name}", partial(scored, model, capture, small, backend=name)
    yield "a bank of its own", partial(scored, model, texts(2), small, bank=capture, max_length=24)
    yield "no start token", partial(scored, model, texts(4), small, prepend_bos=False, max_length=30, batch_size=2)
    yield "token ids", partial(scored, model, token_ids(6, 14), small, attention_mask=torch.ones(6, 14).triu(-9).flip(1))
    yield "on disk", on_disk
    for family in ("gpt2", "bloom"):
        yield f"states {family}", partial(states, capture_of(family))


def on_disk() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        capture = bl.Capture.from_texts(
            model_of("llama"), texts(8, 110), max_length=40, batch_size=2, store=Path(folder) / "held", **QUIET
        )
        return scored(model_of("llama"), capture) | states(capture)


def states(capture: Any) -> dict[str, Any]:
    return {f"{where} {layer}": getattr(capture, where)(layer) for layer in capture.layers for where in ("resid_pre", "resid_post")}


def summary(model: Any, capture: Any) -> pd.DataFrame:
    return bl.tables.layer_summary(bl.analyze(model, capture, **QUIET))


def from_cache(model: Any, gradients: bool = False) -> dict[str, Any]:
    tokens = token_ids(6, 14)
    mask = torch.arange(14)[None] < torch.tensor([14, 14, 9, 14, 5, 12])[:, None]
    if gradients:
        _, held = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
        return scored(model, bl.Capture.from_cache(model, tokens, held), [A.GradientNorm(target="cache"), A.AttentionReceived()])
    _, held = model.run_with_cache(tokens)
    capture = bl.Capture.from_cache(model, tokens, held, attention_mask=mask)
    return scored(model, capture, [*A.default_analyzers(), A.AttentionReceived(), A.AttentionRollout(), A.SeedCompression(k=4)])


def parts_of_controls() -> Items:
    model, capture = model_of("llama"), capture_of("llama")
    small = [A.Compression(k=4), A.Neighborhood(k=4)]
    for name, block in {"tokens": None, "blocks": 3}.items():
        yield (
            f"shuffled {name}",
            lambda block=block: scored(model, bl.controls.shuffled_tokens(model, capture, block=block, seed=1, **QUIET), small),
        )
    yield "gaussian", lambda: states(bl.controls.gaussian_states(capture, seed=1, **QUIET))
    yield "permuted", lambda: states(bl.controls.permuted_layers(capture, seed=1))
    yield "random model", lambda: scored(bl.controls.random_twin(model, seed=1), texts(8, 110), small)
    yield "sweep of k", lambda: bl.controls.sweep(model, capture, A.Compression(k=5), k=[4, 8], **QUIET)
    yield "sweep of banks", lambda: bl.controls.sweep(model, capture, A.Neighborhood(k=4), bank_sizes=[60, 120], seed=1, **QUIET)


def parts_of_compare() -> Items:
    """Two runs, and who the neighbors are."""
    one, two = (model_of("llama", 0), capture_of("llama", 0)), (model_of("llama", 1), capture_of("llama", 1))
    for frozen in (False, True):
        for score in ("compression", "raw_compression", A.Contraction(k=4, context="native")):
            name = score if isinstance(score, str) else "contraction"
            yield f"frozen {frozen} {name}", partial(bl.compare, one, two, score, frozen_neighbors=frozen, seed=3, **QUIET)
    for context in ("patched", "native", "solo", "attn", "mlp"):
        yield f"neighborhood {context}", partial(bl.neighborhood, *one, 1, 2, 7, k=6, context=context)
    more = {"metric": "cosine", "same_token": "exclude", "position_0": True}
    yield "neighborhood of others", partial(bl.neighborhood, *one, 2, 3, 5, k=6, **more)
    yield "neighborhood in the reference", partial(bl.neighborhood, *one, 0, 1, 4, k=6, bank="reference")


def parts_of_real() -> Items:
    """The demo's passages on SmolLM2-135M."""
    model = bl.load_model()
    yield "analyze", partial(scored, model, list(reference_passages()), layers=[0, 7, 15, 22, 29])
