"""Token merging: every kind of merger, its training, its study."""

from functools import partial
from typing import Any

import torch
from computed.models import FAMILIES, QUIET, Items, mixed_texts, model_of, option, token_ids

import basin_lens as bl

MERGERS: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.3},
    "rate": {"target_rate": 0.3, "projection": 8},
    "bytes": {"target_bytes": 0.8, "projection": 4},
    "adaptive": {"target_rate": 0.3, "adaptive": True, "projection": 6},
    "progressive": {"target_rate": 0.2, "progressive": True},
    "mean": {"target_rate": 0.3, "representative": "mean"},
    "adjacent": {"target_rate": 0.1, "rule": "adjacent"},
    "random": {"target_rate": 0.3, "rule": "random", "seed": 4},
    "stride": {"threshold": 0.5, "rule": "stride"},
    "drop": {"target_rate": 0.3, "drop": True},
    "all": {"rule": "all", "drop": True},
    "key norm": {"target_rate": 0.3, "rule": "key_norm", "drop": True},
    "score": {"target_rate": 0.3, "rule": "score"},
    "bipartite": {"target_rate": 0.2, "rule": "bipartite"},
    "attention": {"target_rate": 0.3, "attention_weight": 0.5},
    "gated": {"target_rate": 0.3, "residual": "gated", "residual_width": 3},
    "norm": {"target_rate": 0.3, "preserve": "norm", "preserve_share": 0.2},
    "simulate": {"target_rate": 0.3, "simulate": True},
    "surprisal": {"target_rate": 0.3, "preserve": "surprisal", "preserve_share": 0.2},
    "contrastive": {"target_rate": 0.3, "projection": 6, "contrastive_weight": 0.5, "margin": 0.0},
}


def calibrated(model: Any, name: str, layers: tuple[int, ...] = (0, 1, 2)) -> tuple[Any, dict[str, Any]]:
    """A merger, and what it has to be given with each pass."""
    merger, tokens = bl.merging.TokenMerger(layers, recent=3, **MERGERS[name]), token_ids(8, 24, 5)
    given: dict[str, Any] = {}
    if name == "surprisal":
        given["surprisal"] = bl.merging.surprisal_for(merger, model, tokens)
    if name == "score":
        given["scores"] = {layer: token_ids(8, 24, layer).float() for layer in layers}
    if name == "bipartite":
        given |= option(merger.calibrate, 16, "protocol", "context")
    return merger.calibrate(model, tokens, **given), given


def merged(family: str, name: str) -> dict[str, Any]:
    """Parameters, logits (hard and soft), decisions, statistics, and the compressed cache step by step."""
    model, tokens = model_of(family), token_ids(8, 24, 6)
    merger, given = calibrated(model, name)
    found: dict[str, Any] = {"parameters": merger, "levels": merger.levels}
    for soft in (False, True):
        try:
            with merger.attached(model, soft=soft, **given), torch.no_grad():
                found[f"logits soft {soft}"] = model(tokens)
        except bl.errors.BasinLensError as error:
            found[f"logits soft {soft}"] = type(error).__name__
    found |= {"statistics": merger.statistics(), "by layer": bl.merging.by_layer(merger.statistics())}
    if not given:
        found["map"] = bl.merging.merge_map(merger, model, tokens)
    try:
        with bl.merging.streaming(merger, model, 2) as stream, torch.no_grad():
            found["steps"] = torch.stack([stream.step(column) for column in tokens[:2].T])
            found |= {"bytes": stream.nbytes(), "rows": stream.rows()}
        for heat in (0.0, 1.0):
            written, table = bl.merging.generate(merger, model, tokens[:2, :9], 12, temperature=heat, seed=2)
            found |= {f"written {heat}": written, f"cache {heat}": table}
    except bl.errors.BasinLensError as error:
        found["steps"] = type(error).__name__
    return found


def trained(name: str, **changes: Any) -> dict[str, Any]:
    merger, _ = calibrated(model_of("llama"), name)
    many = bl.merging.Windows(token_ids(8, 24, 7), tuple("aabbccdd"))
    held = bl.merging.Windows(token_ids(4, 24, 8), tuple("eeff"))
    training = bl.merging.Training(steps=2, batch_size=2, evaluate_every=1, **changes)
    made = bl.merging.train_merger(merger, model_of("llama"), many, held, training=training, **QUIET)
    with merger.attached(made.model), torch.no_grad():
        logits = made.model(held.tokens)
    return {"history": made.history, "drift": made.drift, "parameters": merger, "logits": logits}


def merging_study(all_policies: bool) -> Any:
    model, m = model_of("llama"), bl.merging
    calibration, held_out = m.windows_of(model, mixed_texts(12, 60), 32, most=20).apart(0.3)
    setting = next(
        v
        for v in (getattr(m, n) for n in m.__all__)
        if {"budgets", "policies", "projection"} <= set(getattr(v, "__dataclass_fields__", ()))
    )
    options = {"budgets": (0.85,), "projection": 6, "recent": 4, "seeds": 2}
    if all_policies:
        return bl.studies.study_merging(model, calibration, held_out, setting((0, 1, 2), **options), prompts=0, **QUIET)
    merger = m.TokenMerger([0, 1, 2], target_rate=0.3, projection=6, recent=4).calibrate(model, calibration.tokens)
    made = m.train_merger(merger, model, calibration, training=m.Training(steps=2, batch_size=2), **QUIET)
    setting = setting((0, 1, 2), **options, policies=("trained", "random", "stride", "recent"))
    more = {"merger": merger, "history": made.history, "prompt": 8, "written": 6, "prompts": 2}
    return bl.studies.study_merging(model, calibration, held_out, setting, **more, **QUIET)


def parts_of_merging() -> Items:
    for name in MERGERS:
        yield name, partial(merged, "llama", name)
    for family in list(FAMILIES)[1:]:
        yield f"{family} adaptive", partial(merged, family, "adaptive")
    for name in ("adaptive", "gated", "contrastive", "progressive", "attention"):
        yield f"training {name}", partial(trained, name)
    yield "training of the base", partial(trained, "adaptive", train_base=True, accumulate=2)
    yield "study of all policies", partial(merging_study, True)
    yield "study of a trained merger", partial(merging_study, False)
