"""Studies, and what the room `memorize` offers beside its study."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from computed.hashes import of_arrays
from computed.models import QUIET, Items, either, mixed_texts, model_of, texts, token_ids
from computed.scores import scored

import basin_lens as bl

A = bl.analyzers


@cache
def measured(studies: tuple[str, ...], **options: Any) -> Any:
    contrast = bl.studies.Contrast(*options.pop("contrast"))
    common = {"k": 5, "max_length": 56, "max_sequences": 32, "integrated": 2}
    return bl.studies.measure(model_of("llama"), texts(32), studies=studies, contrast=contrast, **common | options, **QUIET)


def parts_of_studies() -> Items:
    """Every study of texts measured once, on the built-in passages."""
    studies, model = bl.studies, model_of("llama")
    every = partial(
        measured, ("importance", "linguistic", "layers", "codelength", "robustness"), contrast=("span", "opening", "middle")
    )
    yield "measured", lambda: every().table
    made: dict[str, Any] = {}

    def kept(name: str, function: Callable[..., Any], **options: Any) -> Any:
        made[name] = function(model, every(), **options, **QUIET)
        return made[name]

    yield "importance", partial(kept, "importance", studies.study_importance)
    yield "linguistic", partial(kept, "linguistic", studies.study_linguistic, tagger="nltk", sentiment="mood")
    yield "layers", partial(kept, "layers", studies.study_layers)
    yield "codelength", partial(kept, "codelength", studies.study_codelength)
    yield "robustness", partial(kept, "robustness", studies.study_robustness, second_model=model_of("gpt2"))
    yield "summary", lambda: studies.summarize(list(made.values()))
    yield "results.json", lambda: saved(made["codelength"])
    other = partial(
        measured, ("linguistic", "codelength"), contrast=("even", "True", "False"), context="solo", unit="kind", layers=(1, 2)
    )
    yield "codelength by label", lambda: studies.study_codelength(model, other(), **QUIET)
    yield "linguistic by first token", lambda: studies.study_linguistic(model, other(), tagger="nltk", part="first", **QUIET)
    forced = {"studies": ("mergeability",), "layers": [1], "max_length": 44, "max_sequences": 16, "k": 5}
    yield (
        "mergeability",
        lambda: studies.study_mergeability(
            model, studies.measure(model, texts(32), **forced, **QUIET), window=4, shares=(0.3,), n_random=1, **QUIET
        ),
    )


def saved(study: Any) -> dict[str, Any]:
    """What a saved study holds, but versions, paths and digests."""
    with tempfile.TemporaryDirectory() as folder:
        out = study.save(Path(folder) / "study")
        results = json.loads((out / "results.json").read_text())
        tables = {path.stem: bl.tables.load(path) for path in sorted((out / "tables").glob("*.parquet"))}
    rest = {
        name: json.dumps(results[name])
        for name in ("study", "decision", "verdict", "tables", "figures", "hypothesis", "not_tested")
    }
    return {
        "findings": pd.DataFrame(results["findings"]),
        "flags": pd.DataFrame(results["red_flags"]),
        "texts": rest,
        "tables": tables,
    }


def parts_of_memorization() -> Items:
    """The study at its smallest, and what the room offers beside."""
    m, model = bl.memorize, model_of("llama", max_position_embeddings=512, initializer_range=0.05)
    recipe = m.Recipe(learning_rate=3e-3, batch_size=4, filler=1, warmup=2)
    plan = bl.studies.Plan(
        per_dose=4, doses=(1, 6), length=16, layers=2, forks=4, sources=4, others=4, other_dose=2, k=5, recipe=recipe
    )
    yield "study", lambda: bl.studies.study_memorization(model, plan, **QUIET)
    works, unrelated = mixed_texts(8, 60), mixed_texts(8, 60, first=20)
    yield (
        "study of an author",
        lambda: bl.studies.study_memorization(model, plan, design="author", texts=works, unrelated=unrelated, **QUIET),
    )
    for sampled in (False, True):
        canaries = m.make_canaries(model, per_dose=4, doses=(1, 4), length=16, sampled=sampled, seed=3)
        yield f"canaries sampled {sampled}", lambda canaries=canaries: [repr((p.text, p.doc, p.labels)) for p in canaries]
    passages = texts(12, 60)
    tuned = m.finetune(model, passages[:6], [1, 2, 3, 4, 5, 6], filler=texts(16, 60)[12:], recipe=recipe, max_length=32, **QUIET)
    yield "history", lambda: pd.DataFrame(tuned.history)
    yield "tuned", lambda: scored(tuned.model, passages, [A.Surprisal(), A.Compression(k=4)], max_length=32)
    yield "weights", lambda: of_arrays(p for p in tuned.model.parameters())
    yield "extract", lambda: m.extract(tuned.model, passages, prompt=6, target=8, max_length=32, **QUIET)
    yield (
        "token-level labels",
        lambda: either(m, "guide_labels", "token_level_labels")(tuned.model, passages, max_length=32, **QUIET),
    )
    own = [A.Surprisal(), A.Agreement(), A.StandardizedLikelihood()]
    lower = [replace(p, text=p.text.lower()) for p in passages]
    runs = {
        n: bl.analyze(w, p, own, layers=[0], max_length=64, **QUIET)
        for n, (w, p) in {"own": (tuned.model, passages), "lower": (tuned.model, lower), "base": (model, passages)}.items()
    }
    said = [p.text for p in passages]
    yield "baselines", lambda: m.likelihood_baselines(runs["own"], said, lowercase=runs["lower"], reference=runs["base"])
    label = np.arange(12) < 6
    parts = m.folds(label, np.arange(12) // 2 % 3, 3, 1)
    inner = m.sequence_states(bl.Capture.from_texts(tuned.model, passages, max_length=64, **QUIET), 1)
    for name, given in {"linear_probe": inner, "nearest_memorized": inner, "blind_classifier": said}.items():
        yield name, partial(getattr(m, name), given, label, parts)
    tokens = token_ids(4, 12)
    yield "substituted", lambda: m.substituted(tokens, 8, 3, range(5, 50), keep=1, seed=2)
    yield "recited", lambda: m.recited(tuned.model, tokens, 6)
    yield "recitation", lambda: [repr((p.text, p.doc, p.labels)) for p in m.recitation_passages(model, texts(6), length=24, seed=1)]
