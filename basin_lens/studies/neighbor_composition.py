"""Who the neighbors of a token are: of its tag, its word, its document."""

import numpy as np
import pandas as pd

from basin_lens import stats, tables
from basin_lens.studies.framework import base
from basin_lens.studies.framework.measurement import Measured

SHARES = ("same_tag", "same_tag_other_word", "same_word", "same_document")


def neighbor_shares(tokens: pd.DataFrame, measured: Measured) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Per token: shares of its neighbors with its tag, its word, its document, less chance; and their means by layer.

    `same_tag_other_word`: of the neighbors that are another word, those of the same tag; a word has its own tag nearly always, so the share of
    the same tag is high wherever that of the same word is. NaN where no neighbor is another word. Chance is the same share among all tokens
    of the bank that may be neighbors of this one. None where the bank's words are not known.
    """
    kept = measured.neighbors
    if kept is None or not kept.own:
        return None, None
    first = tokens[tokens["layer"] == measured.layers[0]]
    group, later = _groups(first, measured.settings["exclude"]), first["pos"].to_numpy() > 0
    tag, word, doc = (pd.factorize(first[name])[0] for name in ("tag", "word_text", "doc"))
    chances = {
        "same_tag": _chance(tag, group, later), "same_tag_other_word": _chance_of_other_words(tag, word, group, later),
        "same_word": _chance(word, group, later), "same_document": _chance(doc, group, later),
    }  # fmt: skip
    table = tokens[["run", "layer", "passage", "doc", "seq", "pos", "token_id", "token", "start", "end", "tag"]].copy()
    made: dict[str, list[np.ndarray]] = {name: [] for name in SHARES}
    for rows in kept.rows:
        there = rows[:, -1] >= 0
        other = (word[rows] >= 0) & (word[rows] != word[:, None])
        for name, code, among in (
            ("same_tag", tag, np.ones_like(other)), ("same_tag_other_word", np.where(word < 0, -1, tag), other),
            ("same_word", word, np.ones_like(other)), ("same_document", doc, np.ones_like(other)),
        ):  # fmt: skip
            usable = there & (code >= 0) & among.any(1)
            share = np.full(len(first), np.nan)
            share[usable] = ((code[rows] == code[:, None]) & among)[usable].sum(1) / among[usable].sum(1)
            made[name].append(share)
    for name in SHARES:
        table[name] = np.concatenate(made[name])
        # Beside a share only, so that their means are over the same tokens.
        table[f"{name}_chance"] = np.where(table[name].notna(), np.tile(chances[name], len(kept.rows)), np.nan)
        table[f"{name}_excess"] = table[name] - table[f"{name}_chance"]
    for label in (measured.unit,):
        if label in tokens.columns and label not in table.columns:
            table[label] = tokens[label]
    table = tables.with_provenance(table, tokens)
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
    return _share(code, _outside(code, group, eligible), _outside(np.zeros_like(code), group, eligible))


def _chance_of_other_words(tag: np.ndarray, word: np.ndarray, group: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Share of eligible tokens of another word outside the token's own group that have its tag; NaN for a token without a word or tag."""
    named = eligible & (word >= 0)
    same_of_both = np.where((tag < 0) | (word < 0), -1, tag * (int(word.max()) + 1) + word)
    of_tag = _outside(tag, group, named) - _outside(same_of_both, group, named)
    return _share(same_of_both, of_tag, _outside(np.zeros_like(tag), group, named) - _outside(word, group, named))


def _share(code: np.ndarray, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    answer = np.full(len(code), np.nan)
    there = (code >= 0) & (whole > 0)
    answer[there] = part[there] / whole[there]
    return answer


def _outside(code: np.ndarray, group: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """How many eligible tokens outside the token's own group have its code; 0 for a token without one (-1)."""
    group = np.where(group < 0, group.max() + 1 + np.arange(len(group)), group)
    counted = (eligible & (code >= 0)).astype(float)
    _, by_code = np.unique(code, return_inverse=True)
    _, by_both = np.unique(np.stack([code, group]), axis=1, return_inverse=True)
    found = np.bincount(by_code, weights=counted)[by_code] - np.bincount(by_both.ravel(), weights=counted)[by_both.ravel()]
    return np.asarray(found)
