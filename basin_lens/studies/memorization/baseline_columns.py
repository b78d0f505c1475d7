"""Baselines of memorization, as columns of the table of texts."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from basin_lens import memorize
from basin_lens.analyzers import Surprisal
from basin_lens.capture import Capture
from basin_lens.model import HookedModel
from basin_lens.scoring import analyze
from basin_lens.texts import Passage


def text_baselines(
    tuned: HookedModel,
    made: list[Passage],
    before: pd.DataFrame,
    after: pd.DataFrame,
    longest: int,
    prompt_and_target: tuple[int, int],
    progress: bool,
) -> pd.DataFrame:
    """One row per text: baselines under the tuned model, and what it recites of `prompt_and_target` tokens."""
    prompt, target = prompt_and_target
    strings = [p.text for p in made]
    # Lower case takes more tokens.
    lowered = [replace(p, text=p.text.lower()) for p in made]
    lower = analyze(tuned, lowered, [Surprisal()], layers=[0], max_length=4 * longest, progress=False)
    reference = memorize.likelihood_baselines(before, strings)
    texts = memorize.likelihood_baselines(after, strings, lowercase=lower, reference=before)
    texts["base_log_likelihood"] = reference["log_likelihood"].to_numpy()
    texts["base_agreement"] = reference["agreement"].to_numpy()
    found = memorize.extract(tuned, made, prompt=prompt, target=target, max_length=longest, progress=progress)
    guide = memorize.guide_labels(tuned, made, max_length=longest, progress=progress)
    for name in ("matched", "longest_run", "extracted"):
        texts[name] = found[name].to_numpy()
    texts["guide_memorized"] = guide["memorized"].to_numpy()
    texts["text"] = strings
    for name in ("member", "dose", "pair"):
        texts[name] = [p.labels[name] for p in made]
    texts["member"] = texts["member"].astype(bool)
    return texts


def add_fitted_baselines(texts: pd.DataFrame, made: Sequence[Passage], capture: Capture, probe_layer: int, seed: int) -> np.ndarray:
    """Baselines that are fitted, each on other pairs than it is used on, as columns of the texts. Answers the states they were
    fitted to.
    """
    for kind in sorted(set(texts["kind"]))[1:]:
        texts[f"kind_{kind}"] = (texts["kind"] == kind).astype(float)
    label, pairs = texts["member"].to_numpy(bool), texts["pair"].to_numpy()
    parts = memorize.folds(label, pairs, seed=seed)
    states = memorize.sequence_states(capture, probe_layer)
    texts["linear_probe"] = memorize.linear_probe(states, label, parts)
    texts["nearest_memorized"] = memorize.nearest_memorized(states, label, parts)
    texts["blind_classifier"] = memorize.blind_classifier([p.text for p in made], label, parts)
    return states
