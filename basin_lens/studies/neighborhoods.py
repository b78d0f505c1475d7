"""Who the neighbors of a token are: of its tag, its word, its document."""

import numpy as np
import pandas as pd

from basin_lens import stats
from basin_lens.studies import base
from basin_lens.studies.measured import Measured

SHARES = ("same_tag", "same_word", "same_document")


def neighbor_shares(tokens: pd.DataFrame, measured: Measured) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Per token: shares of its neighbors with its tag, its word, its document, less chance; and their means by layer.

    Chance is the share among all tokens of the bank outside the token's sequence. None where the bank's words are not known.
    """
    kept = measured.neighbors
    if kept is None or not kept.own:
        return None, None
    first = tokens[tokens["layer"] == measured.layers[0]]
    codes = {
        "same_tag": pd.factorize(first["tag"])[0], "same_word": pd.factorize(first["word_text"])[0], "same_document": pd.factorize(first[
            "doc"])[0],
    }  # fmt: skip
    group, later = _groups(first, measured.settings["exclude"]), first["pos"].to_numpy() > 0
    table = tokens[["run", "layer", "passage", "doc", "seq", "pos", "token_id", "token", "start", "end", "tag"]].copy()
    for name, code in codes.items():
        chance = _chance(code, group, later)
        columns = []
        for rows in kept.rows:
            there = (rows[:, -1] >= 0) & (code >= 0)
            share = np.full(len(first), np.nan)
            share[there] = (code[rows[there]] == code[there, None]).mean(1)
            columns.append(share)
        table[name] = np.concatenate(columns)
        table[f"{name}_chance"] = np.tile(chance, len(columns))
        table[f"{name}_excess"] = table[name] - table[f"{name}_chance"]
    for label in (measured.unit,):
        if label in tokens.columns and label not in table.columns:
            table[label] = tokens[label]
    table.attrs = dict(tokens.attrs)
    excess = [f"{name}_excess" for name in SHARES if table[f"{name}_excess"].abs().max() > 0]
    if not excess:  # no share differs from chance anywhere, as with one tag for all
        return table, None
    curves = base.attempt(
        stats.before_after, table, excess, unit=measured.unit, correction="max-t", n_resamples=1999, seed=measured.seed
    )
    curves["effect"] = "share above chance"
    plain = table.groupby(["layer", "doc", "seq"])[list(SHARES) + [f"{n}_chance" for n in SHARES]].mean().groupby("layer").mean()
    curves["share"] = [plain.loc[int(row.layer), row.score.removesuffix("_excess")] for row in base.rows(curves)]
    curves["chance"] = [plain.loc[int(row.layer), row.score.replace("_excess", "_chance")] for row in base.rows(curves)]
    return table, curves


def _groups(rows: pd.DataFrame, exclude: str) -> np.ndarray:
    """Code of the group within which no token is another's neighbor; -1: of its own alone."""
    if exclude == "self":
        return np.arange(len(rows))
    return np.asarray(pd.factorize(rows[{"sequence": "seq", "document": "doc"}.get(exclude, exclude)])[0])


def _chance(code: np.ndarray, group: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Share of eligible tokens outside the token's own group that have its code; NaN for a token without one."""
    group = np.where(group < 0, group.max() + 1 + np.arange(len(group)), group)
    known = eligible & (code >= 0)
    width, count = int(code.max()) + 1, int(group.max()) + 1
    total = np.bincount(code[known], minlength=width)
    pairs, inverse = np.unique(group * width + np.maximum(code, 0), return_inverse=True)
    inside = np.bincount(inverse, weights=known, minlength=len(pairs))[inverse]
    outside = eligible.sum() - np.bincount(group, weights=eligible, minlength=count)[group]
    answer = np.full(len(code), np.nan)
    there = (code >= 0) & (outside > 0)
    answer[there] = (total[code[there]] - inside[there]) / outside[there]
    return answer
