"""Simulated tables of scores."""

import numpy as np
import pandas as pd

import basin_lens as bl

S = bl.stats


TAGS = np.array(["ADJ", "ADV", "NOUN", "PRON", "VERB"])


def simulate(layers=1, columns=("a", "b"), *, sequences=40, tokens=50, icc=0.3, seed=0, per_doc=1):
    """Columns without any relation, each with this share of its variance between sequences."""
    rng = np.random.default_rng(seed)
    rows = layers * sequences * tokens
    seq = np.tile(np.repeat(np.arange(sequences), tokens), layers)
    table = pd.DataFrame({"layer": np.repeat(np.arange(layers), sequences * tokens), "doc": seq // per_doc, "seq": seq})
    table["pos"] = np.tile(np.arange(tokens), layers * sequences)
    for name in columns:
        level = np.repeat(rng.normal(size=layers * sequences), tokens)
        table[name] = np.sqrt(icc) * level + np.sqrt(1 - icc) * rng.normal(size=rows)
    table["member"] = (table["doc"] % 2).astype(bool)
    table["token_id"] = rng.integers(0, 60, rows)
    table["tag"] = TAGS[table["token_id"] % 5]
    return table


def rate(answer):
    """Share of p-values up to 0.05."""
    assert answer.p.notna().all()
    return float((answer.p <= 0.05).mean())


# -- false positives -------------------------------------------------------------------------------------------------------------------


CHEAP = {
    "within_sequence_correlation": lambda t: S.within_sequence_correlation(t, "a", "b"),
    "pearson": lambda t: S.within_sequence_correlation(t, "a", "b", method="pearson"),
    "partial_correlation": lambda t: S.partial_correlation(t, "a", "b", controls=["c", "position"]),
    "rank_regression": lambda t: S.rank_regression(t, "a", "b"),
    "rank_regression_between": lambda t: S.rank_regression(t, "a", "b", controls=["c"], within=False),
    "mixed_model": lambda t: S.mixed_model(t, "a", "b", controls=["c"]),
    "groups_with_controls": lambda t: S.compare_groups(t, "a", "member", controls=["b", "c"], n_resamples=499),
    "groups_paired": lambda t: S.compare_groups(t, "a", "tag", groups=("NOUN", "VERB"), paired=True, n_resamples=499),
    "groups_paired_with_controls": lambda t: S.compare_groups(
        t[t.layer < 200], "a", "tag", groups=("NOUN", "VERB"), paired=True, controls=["b", "position"], n_resamples=499
    ),
    "before_after": lambda t: S.before_after(t, "a", n_resamples=499),
    "quartiles": lambda t: S.quartile_table(t[t.layer < 200], "a", "b").query("quartile == '4 - 1'"),
}


# -- power -----------------------------------------------------------------------------------------------------------------------------


def planted(layers=12, seed=4):
    """b goes with a within sequences; members stand 1 higher in c; nouns 0.4 higher in a."""
    table = simulate(layers, ("a", "b", "c"), seed=seed)
    table["b"] += 0.25 * table["a"]
    table["c"] += 1.0 * table["member"]
    table["a"] += 0.4 * (table["tag"] == "NOUN")
    return table


POWER = {
    "within_sequence_correlation": lambda t: S.within_sequence_correlation(t, "a", "b"),
    "partial_correlation": lambda t: S.partial_correlation(t, "a", "b", controls=["c", "position"]),
    "rank_regression": lambda t: S.rank_regression(t, "a", "b"),
    "mixed_model": lambda t: S.mixed_model(t, "a", "b", controls=["c"]),
    "groups": lambda t: S.compare_groups(t, "c", "member", n_resamples=999),
    "groups_with_controls": lambda t: S.compare_groups(t, "c", "member", controls=["b"], n_resamples=999),
    "groups_paired": lambda t: S.compare_groups(t, "a", "tag", groups=("NOUN", "VERB"), paired=True, n_resamples=999),
    "before_after": lambda t: S.before_after(t.assign(d=t.c + 0.5), "d", n_resamples=999),
    "detect": lambda t: S.detect(t, "c", "member", rates=(), n_resamples=199),
    "better_than": lambda t: S.detect(t, "c", "member", versus="b", rates=(), n_resamples=499).dropna(subset="versus"),
    "added_value": lambda t: S.added_value(t, "c", "member", "b", n_splits=2, n_resamples=99),
    "tags": lambda t: S.tag_effect(t, "a", "tag", n_resamples=99),
    "quartiles": lambda t: S.quartile_table(t, "a", "b").dropna(subset="p"),
}  # fmt: skip


# -- controls, bounds, quartiles -------------------------------------------------------------------------------------------------------


def confounded(layers=1, seed=8):
    """a and b go together through the radius and the norm alone; the table has every standard control."""
    table = simulate(layers, ("a", "b", "log_r", "log_n", "noise"), seed=seed)
    table["a"] += 1.5 * table.log_r + table.log_n
    table["b"] += 1.5 * table.log_r - 0.5 * table.log_n
    table["radius"], table["state_norm"] = np.exp(table.log_r), np.exp(table.log_n)
    table["surprisal"] = np.random.default_rng(0).gamma(2, size=len(table))
    table["same_token_share"] = np.random.default_rng(1).random(len(table))
    return table.drop(columns=["log_r", "log_n"])
