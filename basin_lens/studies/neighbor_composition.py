"""Who the neighbors of a token are: of its tag, its word, its document."""

from functools import partial

import numpy as np
import pandas as pd

from basin_lens import stats, tables
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.framework.declared_tests import one_sided, p_floor
from basin_lens.studies.framework.measured_texts import Measured
from basin_lens.studies.framework.table_parts import above_layer_0, named_rows

# The declared test of the study of parts of speech.
SYNTAX_FIRST = "same tag - same document"
SYNTAX_FINDING = "same-tag neighbors (other words) come earlier than same-document neighbors"
SHARES = ("same_tag", "same_tag_other_word", "same_word", "same_document")


def neighbor_shares(tokens: pd.DataFrame, measured: Measured) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Per token: shares of its neighbors with its tag, its word, its document, less chance; and their means by layer.

    `same_tag_other_word`: of the neighbors that are another word, those of the same tag; a word has its own tag nearly always, so
    the share of the same tag is high wherever that of the same word is. NaN where no neighbor is another word. Chance is the same
    share among all tokens of the bank that may be neighbors of this one. None where the bank's words are not known.
    """
    kept = measured.neighbors
    if kept is None or not kept.own:
        return None, None
    first = tokens[tokens["layer"] == measured.layers[0]]
    group, later = _groups(first, measured.settings["exclude"]), first["pos"].to_numpy() > 0
    tag, word, doc = (pd.factorize(first[name])[0] for name in ("tag", "word_text", "doc"))
    chances = {
        "same_tag": _chance(tag, group, later),
        "same_tag_other_word": _chance_of_other_words(tag, word, group, later),
        "same_word": _chance(word, group, later),
        "same_document": _chance(doc, group, later),
    }
    table = tokens[["run", "layer", "passage", "doc", "seq", "pos", "token_id", "token", "start", "end", "tag"]].copy()
    made: dict[str, list[np.ndarray]] = {name: [] for name in SHARES}
    for rows in kept.rows:
        there = rows[:, -1] >= 0
        other = (word[rows] >= 0) & (word[rows] != word[:, None])
        for name, code, among in (
            ("same_tag", tag, np.ones_like(other)),
            ("same_tag_other_word", np.where(word < 0, -1, tag), other),
            ("same_word", word, np.ones_like(other)),
            ("same_document", doc, np.ones_like(other)),
        ):
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
    curves = attempt(
        stats.before_after, table, excess, unit=measured.unit, correction="max-t", n_resamples=1999, seed=measured.seed
    )
    curves["effect"] = "share above chance"
    plain = table.groupby(["layer", "doc", "seq"])[list(SHARES) + [f"{n}_chance" for n in SHARES]].mean().groupby("layer").mean()
    curves["share"] = [plain.loc[int(row.layer), row.score.removesuffix("_excess")] for row in named_rows(curves)]
    curves["chance"] = [plain.loc[int(row.layer), row.score.replace("_excess", "_chance")] for row in named_rows(curves)]
    return table, curves


def syntax_first(shares: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """Center over depth of the excess shares of each unit: does that of the same tag lie before that of the same document?

    Other words only: a word has its own tag, and the first layers know the word. And no layer 0, as in every declared test. Where
    a share is that of chance, its center is that of noise, the middle of the layers: so both must be above chance, too, and p is
    the largest of three. Above chance is asked of all sequences, also of those that have no center because a share is nowhere
    above it.
    """
    one, other = "same_tag_other_word_excess", "same_document_excess"
    shares = above_layer_0(shares)
    keys = ["doc", "seq"] + [name for name in (measured.unit,) if name in shares.columns]
    excess = shares.groupby([*keys, "layer"])[[one, other]].mean()
    by_sequence = excess.clip(lower=0)
    layers = by_sequence.index.get_level_values("layer").to_numpy(float)
    weighted = by_sequence.mul(layers, axis=0).groupby(level=keys).sum() / by_sequence.groupby(level=keys).sum().replace(0, np.nan)
    table = excess.groupby(level=keys).mean().assign(difference=weighted[one] - weighted[other]).reset_index()
    table["run"] = shares["run"].iloc[0]
    table = tables.with_provenance(table, shares)
    known = tables.select(table, table[[one, other]].notna().all(axis=1))
    one_sample = partial(stats.before_after, unit=measured.unit, seed=measured.seed)

    def test(part: pd.DataFrame, *_: object, **__: object) -> pd.DataFrame:
        above = one_sided(partial(one_sample, on=[one, other]))(part)
        usable = tables.select(part, part["difference"].notna())
        earlier = one_sided(partial(one_sample, on="difference"), more=False)(usable)
        without = len(part) - len(usable)
        lacking = f"; {without} sequences have no center: a share is nowhere above chance" if without else ""
        return earlier.assign(
            p=np.max([*earlier["p"], *above["p"]]),
            p_floor=[p_floor(row) for row in named_rows(earlier)],
            note=f"the largest p of three: an earlier center, and either share above chance{lacking}",
        )

    found = attempt(test, known, "difference", unit=measured.unit)
    found["effect"] = "center over depth, same tag (of another word) less same document"
    return found.assign(
        finding=SYNTAX_FINDING,
        question=SYNTAX_FIRST,
        score="neighbors",
        effect_unit="layers",
    )


def _groups(rows: pd.DataFrame, exclude: str) -> np.ndarray:
    """Code of the group within which no token is another's neighbor; -1: of its own alone."""
    if exclude == "self":
        return np.arange(len(rows))
    return np.asarray(pd.factorize(rows[{"sequence": "seq", "document": "doc"}.get(exclude, exclude)])[0])


def _chance(code: np.ndarray, group: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Share of eligible tokens outside the token's own group that have its code; NaN for a token without one."""
    return _share(code, _outside(code, group, eligible), _outside(np.zeros_like(code), group, eligible))


def _chance_of_other_words(tag: np.ndarray, word: np.ndarray, group: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Share of eligible tokens of another word outside the token's own group that have its tag; NaN without a word or tag."""
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
