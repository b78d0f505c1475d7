"""Statistics of a table of scores."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
from computed.models import QUIET, Items, capture_of, either, model_of, texts

import basin_lens as bl

A, S = bl.analyzers, bl.stats


@cache
def statistics_table() -> pd.DataFrame:
    table = bl.analyze(
        model_of("gpt2"), texts(26, 130), [*A.default_analyzers(), A.GradientNorm()], layers=[0, 2], max_length=48, **QUIET
    )
    table["tag"] = np.array(["NOUN", "VERB", "DET", "ADP"])[table.token_id.to_numpy() * 7 % 11 % 4]
    return table


def parts_of_stats() -> Items:
    table, tokens = statistics_table(), {"frequency": statistics_table().token_id.value_counts(normalize=True).to_dict()}
    score = "compression_above_random_sets"
    both, quick = [score, "contraction"], {"n_resamples": 199, "seed": 1}
    against, test = "surprisal", partial(S.within_sequence_correlation, scores=score, against="surprisal")
    per_text = table.groupby(["layer", "doc", "seq"])[[*both, against, "dose", "even"]].mean().reset_index()
    per_text["even"] = per_text["even"] > 0.5
    pairs = bl.compare((model_of("gpt2"), capture_of("gpt2")), (model_of("gpt2", 1), capture_of("gpt2", 1)), **QUIET)
    calls: dict[str, Callable[[], Any]] = {
        "correlation": lambda: S.within_sequence_correlation(table, both, against),
        "best layer": lambda: S.best_layer(table, test, seed=1),
        "pearson": lambda: S.within_sequence_correlation(
            table, both, against, method="pearson", unit="sequence", correction="max-t"
        ),
        "partial": lambda: S.partial_correlation(table, both, against, **tokens),
        "residuals": lambda: S.residuals(table, both, **tokens),
        "partial straight": lambda: S.partial_correlation(table, score, "gradient_norm", smooth=False, correction="holm"),
        "ranks": lambda: S.rank_regression(table, both, against, controls=["position"], **tokens),
        "ranks between": lambda: S.rank_regression(table, score, against, within=False),
        "controls": lambda: S.add_controls(table, **tokens),
        "mixed": lambda: S.mixed_model(table, score, against, all_terms=True, **tokens),
        "quartiles": lambda: S.quartile_table(table, both, against),
        "groups": lambda: S.compare_groups(table, both, "even", **quick),
        "halves": lambda: S.halves(table, seed=1).to_numpy(),
        "pairs": lambda: S.compare_groups(table, both, "tag", groups=("NOUN", "VERB"), paired=True, controls=["position"], **quick),
        "max t": lambda: S.compare_groups(table, both, "even", correction="max-t", **quick),
        "before after": lambda: S.before_after(pairs, **quick),
        "slope": lambda: S.unit_slope(table, both, "dose", **quick),
        "means": lambda: S.mean_interval(per_text, score, "layer", **quick),
        "matched": lambda: S.match_units(per_text[per_text.layer == 2], "even", against, caliper=2.0),
        "detect": lambda: S.detect(table, both, "even", versus=[against], **quick),
        "tags": lambda: S.tag_means(table, both, "tag"),
        "added": lambda: S.added_value(table, score, "even", [against], n_splits=3, n_resamples=49, seed=1),
        "tag effect": lambda: S.tag_effect(table, score, "tag", word="token", fewest=5, n_resamples=199, seed=1),
        "flags": lambda: S.red_flags(table, score, against, n_resamples=199, **tokens),
        "bound": lambda: S.reliability_bound(table, both, against),
        "flags of groups": lambda: S.red_flags(table, score, group="even", n_resamples=199),
        "correct": lambda: S.correct(test(table), "holm"),
    }
    token_level = either(S, "guide_tests", "token_level_tests")
    for name, given in {"against": {"against": against}, "group": {"group": "even"}, "tag": {"tag": "tag"}}.items():
        calls[f"token level {name}"] = partial(token_level, table, both, **given)
    yield from calls.items()
