"""Tokens of different kinds, such as parts of speech: does the kind matter, and how does each stand?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.stats.covariates import Frequency, Selection, residuals
from basin_lens.stats.design import (
    FEWEST,
    Rows,
    WhichLayers,
    check_run,
    constant,
    enough,
    names_of,
    refuse_constant,
    without_rounding,
)
from basin_lens.stats.projection import EXPLAINED
from basin_lens.stats.remembering import sharing
from basin_lens.stats.results import Correction, Estimate, Line, Procedure, assemble, interval_and_p, joined, shared_error
from basin_lens.stats.tag_tests import by_sequence, by_type, centered, min_f
from basin_lens.values import whole_numbers

_TESTS = {
    "sequence": "permutation of tags within sequences",
    "mixed": "min F' over units (mixed model) and token types",
    "type": "permutation of tags among token types (Welch F)",
}

_ONLY = {  # what a row of a test that is not sound for tags as such says of itself
    "sequence": "holds for these tokens, not of tags as such",
    "type": "holds in these texts, not of tags as such",
}
_OF_TAG = ("mean", "mean_low", "mean_high")
_MADE_BY = {"sequence": by_sequence, "mixed": min_f, "type": by_type}


@whole_numbers(TableError)
@sharing()
def tag_effect(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    tag: str,
    *,
    tests: Sequence[str] = ("sequence", "mixed", "type"),
    word: str | None = None,
    controls: Sequence[str] = (),
    frequency: Frequency | None = None,
    layers: WhichLayers = None,
    unit: str = "document",
    fewest: int = 20,
    correction: Correction = "bh",
    n_resamples: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Does a score differ between kinds of tokens? Three tests, which ask for three kinds of generality.

    - `sequence`: tags permuted among the tokens (or words) of each sequence. Only says that these tokens differ by tag.
    - `mixed`: that new texts and other words at once would show it. min F' = F1 F2 / (F1 + F2), of F1 of means by unit and tag
      (each token type once; random level for each unit) and F2 of means by token type (Welch). Careful where neither words nor
      texts have differences of their own: there it rejects less often than it may.
    - `type`: means by token type, tags permuted among types: that other words of these tags would show it, in these texts.

    A tag of few words, each with a score of its own, passes `sequence` alone (.50 false positives); where every text has
    differences between tags of its own, which mean nothing in others, `mixed` alone does not find them (the others: .47). Only
    `mixed` is sound for tags as such: go by it, as `red_flags` does (where words and texts both have their own: .025; `sequence`
    .77, `type` .17). `sequence` and `type` say what they say of these tokens, or these texts. To ask for all three is very
    conservative (.015).

    omega squared = (SS_tag - df_tag MS_rest) / (SS_total + MS_rest), the share of the variance that is between tags; of scores less
    their sequence mean, or of type means; for `mixed` as min F' and its degrees of freedom a, b give it: a (F' - 1) / (a F' + b +
    1). At no effect it is about 0, and can be below.

    Args:
        table: from `analyze`, of one run, with a tag for each token.
        scores: columns to test.
        tag: label column; rows without a tag are passed over.
        tests: which; `mixed` and `type` need `token_id`.
        word: column that numbers the words of a sequence; tokens of one word are then averaged, and words take the place of tokens
            (and the first token's id that of a word's type). None: every token by itself, right only if words are single tokens.
        controls: standard controls (those that the table lacks are passed over) or columns of the table, taken out of the score
            within sequences first (`residuals`). Everything then is of what they leave of the score: what tag and controls explain
            alike counts as the controls', so an effect can be lost, and a difference between tags is smaller than at fixed controls
            (`compare_groups` gives that).
        frequency: as for `add_controls`.
        layers, unit, correction: as for `compare_groups`; no max-t.
        fewest: tags with fewer tokens (or words), or in fewer than 6 units, or of fewer than 4 types, are left out; the note names
            them.
        n_resamples: permutations.
        seed: of the permutations.

    Returns:
        one row per (layer, score, test): omega squared with a 95 % interval (jackknife over units, or over types; from the
        noncentral F for `mixed`) and p. For `type`, `unit` is "token type". `n_tags`: tags compared.

    Raises:
        TableError: several runs, missing columns, fewer than two tags left, constant columns. StudyError: fewer than 6 units.

    Source: Clark 1973 (texts and words as random effects); omega squared: Hays 1963.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> doc = np.repeat(range(20), 30)
        >>> table = pd.DataFrame({"doc": doc, "seq": doc, "token_id": rng.integers(0, 40, 600)})
        >>> table["tag"] = np.where(table.token_id < 20, "NOUN", "VERB")
        >>> table["a"] = 1.0 * (table.tag == "NOUN") + rng.normal(size=600)
        >>> bool((bl.stats.tag_effect(table, "a", "tag").p < 0.01).all())
        True
    """
    unknown = [name for name in tests if name not in _TESTS]
    if unknown or not len(tests):
        raise TableError(f"expected tests among {list(_TESTS)}, got {list(tests)}.")
    types = ["token_id"] if "type" in tests or "mixed" in tests else []
    check_run(table)
    tables.require(table, tag, *types, *([] if word is None else [word]))
    tag_tests = _TagTests(tag, tuple(tests), unit, fewest, n_resamples, seed)
    lines: list[Line] = []
    for tagged in _each_layer(table, scores, tag, Selection(controls, frequency, layers, unit), word, types):
        lines += tag_tests.of(tagged)
    refuse_constant(lines, names_of(scores))
    return assemble(table, lines, correction)


@dataclass(frozen=True)
class _Tagged:
    """A score at one layer, less what controls explain of it: its tagged rows, the controls, and a note on those not there."""

    score: str
    rows: Rows
    varies: bool  # over all rows, tagged or not
    controls: list[str]
    note: str

    def explained(self, rows: Rows) -> bool:
        """Whether the controls have left nothing of the score within sequences but rounding (see `residuals`)."""
        if not self.controls or not len(rows.sequence):
            return False
        return bool(np.ptp(centered(rows, self.score)) <= 1e-12 * np.abs(rows.values[self.score]).max())


def _each_layer(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    tag: str,
    selection: Selection,
    word: str | None = None,
    types: Sequence[str] = (),
) -> Iterator[_Tagged]:
    """Each score at each layer."""
    for score in names_of(scores):
        held, given = table, selection.given(table, [score])
        if len(selection.controls):
            held = residuals(table, score, controls=given.names, frequency=selection.frequency)
        if word is not None:
            held = _words(held, score, tag, word)
        for every in selection.split(held, [score, *types], [tag]):
            rows = every.where(~pd.isna(every.labels[tag])).finite(score)
            varies = not constant(every.finite(score).values[score])
            yield _Tagged(score, rows, varies, given.names, given.note)


@dataclass(frozen=True)
class _TagTests:
    """How tags are tested."""

    tag: str
    tests: tuple[str, ...]
    unit: str
    fewest: int
    n_resamples: int
    seed: int

    def of(self, tagged: _Tagged) -> list[Line]:
        """The rows of results of a score at one layer, one for each test."""
        score = tagged.score
        procedures = {name: Procedure(self.unit, _TESTS[name], "omega squared") for name in self.tests}
        enough(tagged.rows.counts()["n_units"], FEWEST, f"units ({self.unit})")
        by_type = "type" in self.tests or "mixed" in self.tests
        rows, dropped = _frequent(tagged.rows, self.tag, self.fewest, by_type)
        given: Line = {"tag": self.tag, "controls": ", ".join(tagged.controls), "n_tags": 0}
        if not tagged.varies:
            return [procedure.constant_line(rows, score, score, **given) for procedure in procedures.values()]
        if why := self._nothing(tagged, rows):
            given["note"] = joined(tagged.note, why)
            return [procedure.line(rows, score, **given) for procedure in procedures.values()]
        kinds, codes = np.unique(rows.labels[self.tag].astype(str), return_inverse=True)
        if len(kinds) < 2:
            raise TableError(
                f"expected at least two tags with {self.fewest} tokens each, got {kinds.tolist()} at layer {rows.layer}. Add "
                "texts, or pass fewest=."
            )
        given["n_tags"] = len(kinds)
        lines = []
        for name, procedure in procedures.items():
            found = _MADE_BY[name](rows, score, codes, self.n_resamples, self.seed)
            rare = f"too rare: {', '.join(dropped)}" if dropped else ""
            given["note"] = joined(tagged.note, rare, _ONLY.get(name, ""))
            lines.append(procedure.line(rows, score, **given) | found)
        return lines

    def _nothing(self, tagged: _Tagged, rows: Rows) -> str:
        """Why there is nothing to test, where there is nothing."""
        if tagged.explained(rows):
            return EXPLAINED
        if len(rows.sequence) and not centered(rows, tagged.score).any():
            return f"{tagged.score} does not vary within any text"
        return ""


@sharing()
def tag_means(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    tag: str,
    *,
    controls: Sequence[str] = (),
    frequency: Frequency | None = None,
    layers: WhichLayers = None,
    unit: str = "document",
    correction: Correction = "bh",
) -> pd.DataFrame:
    """How each kind of token stands: its mean, and how far it is from the mean of its own text.

    Args:
        table, scores, tag, controls, frequency, layers, unit, correction: as for `tag_effect`. With controls, means and deviations
            are of what they leave of the score, as there.

    Returns:
        one row per (layer, score, tag): `estimate` is the mean over units of (tag mean - sequence mean), in the score's unit, with
        Student's 95 % interval and p; `mean`, `mean_low`, `mean_high` the same of the tag's means themselves. NaN intervals with
        fewer than 6 units.

    Raises:
        TableError: several runs, missing columns.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"doc": [0, 0, 1, 1], "seq": [0, 0, 1, 1], "tag": ["A", "B"] * 2, "a": [1.0, 0.0, 3.0, 2.0]})
        >>> bl.stats.tag_means(table, "a", "tag").estimate.tolist()
        [0.5, -0.5]
    """
    lines = []
    for tagged in _each_layer(table, scores, tag, Selection(controls, frequency, layers, unit)):
        score, given = tagged.score, ", ".join(tagged.controls)
        rows = tagged.rows.with_values(_off=centered(tagged.rows, tagged.score))
        explained = tagged.explained(rows)
        procedure = Procedure(unit, "one-sample t-test of unit means", "deviation from the sequence mean")
        if not len(rows.sequence):
            also: Line = {"tag": pd.NA, "controls": given, **dict.fromkeys(_OF_TAG, np.nan)}
            lines.append(procedure.constant_line(rows, score, score, **also))
        for kind in sorted(set(rows.labels[tag].tolist()), key=str):
            part = rows.where(np.array(rows.labels[tag] == kind, bool))
            answer = {"tag": kind, "controls": given} | _mean_of_tag(part, score, rows.values[score], explained)
            lines.append(procedure.line(part, score, **answer))
    return assemble(table, lines, correction)


def _mean_of_tag(part: Rows, score: str, values: np.ndarray, explained: bool) -> Line:
    """The mean of one tag and its deviation, `_off`; `values`: of all tags."""
    off, whole = (part.unit_means(name)[1] for name in ("_off", score))
    # A reference is in the tag's mean, and cancels in its deviation.
    inflation = shared_error(whole, part.reference_error.get(score, 0.0))
    found, mean = interval_and_p(without_rounding(off, values)), interval_and_p(whole, inflation)
    own: Line = {"mean": mean.estimate, "mean_low": mean.low, "mean_high": mean.high}
    if explained:
        return Estimate(note=EXPLAINED).columns() | dict.fromkeys(own, np.nan)
    if part.counts()["n_units"] < FEWEST:
        bare = Estimate(found.estimate, note=f"fewer than {FEWEST} units")
        return bare.columns() | own | {"mean_low": np.nan, "mean_high": np.nan}
    note = mean.note if mean.low != mean.low and not found.note else found.note
    return found.columns() | own | {"note": note}


def _words(table: pd.DataFrame, score: str, tag: str, word: str) -> pd.DataFrame:
    """One row per word instead of per token."""
    keys = [*(["layer"] if "layer" in table.columns else []), "doc", "seq", word]
    others = [c for c in table.columns if c not in (*keys, score)]
    kept = table[table[word].notna()]
    grouped = kept.groupby(keys, sort=False, dropna=False)
    if (grouped[tag].nunique() > 1).any():
        raise TableError(f"expected one tag per word, got words in {word!r} with several. Number words anew in every sequence.")
    answer = grouped[others].first().join(grouped[score].mean()).reset_index()
    return tables.with_provenance(answer, table)


def _frequent(rows: Rows, tag: str, fewest: int, by_type: bool) -> tuple[Rows, list[str]]:
    """The rows of tags that are frequent enough, and the other tags."""
    names = rows.labels[tag].astype(str)
    facts = pd.DataFrame({"tag": names, "unit": rows.unit, "type": rows.values.get("token_id", rows.unit)}).groupby("tag")
    good = (facts.size() >= fewest) & (facts["unit"].nunique() >= FEWEST)
    if by_type:
        good &= facts["type"].nunique() >= 4
    kept = rows.where(np.isin(names, good.index[good].to_numpy(dtype=object).astype(str)))
    return kept, [str(name) for name in good.index[~good]]
