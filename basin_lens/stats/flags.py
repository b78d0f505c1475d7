"""Red flags: what should keep anyone from believing a finding, computed rather than left to the reader."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypedDict

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.errors import StudyError, TableError
from basin_lens.stats.association import NEARLY, partial_correlation, within_sequence_correlation
from basin_lens.stats.choice import best_layer
from basin_lens.stats.covariates import CONTROLS, Frequency, chosen
from basin_lens.stats.design import Rows, WhichLayers, asked_layers, group_means, names_of, split, texts_once
from basin_lens.stats.groups import before_after, compare_groups
from basin_lens.stats.remembering import sharing
from basin_lens.stats.results import Correction
from basin_lens.stats.tags import tag_effect
from basin_lens.values import whole_numbers

_SAME = 0.95  # share of equal values from which a score counts as one that does not vary
_NAN = float("nan")


@dataclass(frozen=True)
class _Flag:
    """A row of the answer; NaN and NA what is not known."""

    flag: str
    score: object
    layer: object = pd.NA
    raised: object = pd.NA
    value: float = _NAN
    limit: float = _NAN
    estimate: float = _NAN
    p: float = _NAN
    compared_estimate: float = _NAN
    compared_p: float = _NAN
    n_tests: int | float = _NAN
    n_documents: int | float = _NAN
    why: str = ""


@whole_numbers(TableError)
@sharing()
def red_flags(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    against: str | None = None,
    *,
    group: str | None = None,
    groups: Sequence[object] | None = None,
    paired: bool = False,
    tag: str | None = None,
    controls: Sequence[str] = CONTROLS,
    frequency: Frequency | None = None,
    layers: WhichLayers = None,
    unit: str = "document",
    correction: Correction = "bh",
    alpha: float = 0.05,
    n_resamples: int = 1999,
    seed: int = 0,
    min_tokens: int = 10,
) -> pd.DataFrame:
    """Five reasons not to believe a finding, each with the numbers that raise it.

    The finding is a correlation (`against`), a difference of groups (`group`), of tags (`tag`), or, with none of these, a change
    (columns of differences, from `compare`).

    - `no variance`: 95 % of the values of a layer are equal, or, where the question is within texts, 95 % of the sequences hold one
    value only.
    - `nothing survives correction`: no score and layer has a corrected p of at most alpha.
    - `does not replicate`: the layer chosen on one half of the documents has another sign, or a p above alpha in the direction that
    was found, on
      the other half.
    - `vanishes under controls`: of the scores and layers that survived correction, none does, with the same sign, once token
    frequency, position,
      norm, density and surprisal are controlled. Where these leave less than a fifth of the variance, ranks have an excess (see
      `partial_correlation`), and a correlation stays only if that of values does too.
    - `copies`: texts that are copies of others, nearly or in full. Each counts once in all tests; the flag says how many there are.

    Args:
        table: from `analyze` (or `compare`), of one run.
        scores: columns.
        against: as for `within_sequence_correlation`.
        group, groups, paired: as for `compare_groups`.
        tag: as for `tag_effect`, by its test `mixed` (min F', over texts and words at once): tags permuted within sequences would
            pass for a finding in half of all cases where words have scores of their own. Needs `token_id`.
        controls, frequency: as for `partial_correlation`.
        layers, unit, correction, n_resamples, seed: as for `compare_groups`; seed also of the halves.
        alpha: the level.
        min_tokens: with `against`, as for `within_sequence_correlation`.

    Returns:
        one row per flag, and per score except for the correction and the copies: `flag, score, layer, raised` (True, False, or NA
        where it could not be checked, and `why` says so), `value` and `limit` (raised where value > limit: share of equal values;
        smallest corrected p; p on the other half, one-sided; share of findings lost; share of texts that are copies), `estimate, p`
        (of the finding: in the first half, or without controls),
        `compared_estimate, compared_p` (on the other half, or with controls), `n_tests, n_documents, why` (in words).

    Raises:
        TableError: several runs, missing columns, several questions at once. StudyError: fewer than 6 units.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> doc = np.repeat(range(20), 30)
        >>> table = pd.DataFrame({"layer": 5, "doc": doc, "seq": doc, "pos": np.tile(range(30), 20), "a": rng.normal(size=600)})
        >>> table["b"] = table.a + rng.normal(size=600)
        >>> bl.stats.red_flags(table, "a", "b").raised.tolist()
        [False, False, False, False, False]
    """
    names = names_of(scores)
    finding = _Finding(against, group, groups, paired, tag, frequency, unit, correction, n_resamples, seed, min_tokens)
    if len(finding.asked) > 1:
        raise TableError(f"expected one question, got {finding.asked}. Pass against, group or tag, and ask again for the others.")
    if "layer" not in table.columns:
        table, layers = _with_layer(table, names), None
    if layers is not None:
        table = table[table["layer"].isin(asked_layers(table, layers))]
    flags, varied = [], []
    for score in names:
        flag, everywhere = _no_variance(table, score, unit, finding.within)
        flags.append(flag)
        varied += [] if everywhere else [score]
    tested = finding.effect(table, varied) if varied else None
    flags.append(_nothing_survives(tested, alpha))
    for score in names:
        name = "does not replicate"
        flags.append(_replication(name, table, score, finding, alpha) if score in varied else _not_varied(name, score))
    for score in names:
        name = "vanishes under controls"
        if tested is None or score not in varied:
            flags.append(_not_varied(name, score))
        else:
            flags.append(_vanishing(name, table, tested, score, varied, finding, controls, alpha))
    flags.append(_copies(table, unit, [] if group is None else [group]))
    answer = pd.DataFrame([vars(flag) for flag in flags], columns=[field.name for field in fields(_Flag)])
    answer["layer"] = answer["layer"].astype("Int64")
    answer["raised"] = answer["raised"].astype("boolean")
    return tables.with_provenance(answer, table)


@dataclass(frozen=True)
class _Finding:
    """The question that a finding answers, and how it is tested."""

    against: str | None
    group: str | None
    groups: Sequence[object] | None
    paired: bool
    tag: str | None
    frequency: Frequency | None
    unit: str
    correction: Correction
    n_resamples: int
    seed: int
    min_tokens: int

    @property
    def asked(self) -> list[str]:
        """The columns asked about."""
        return [question for question in (self.against, self.group, self.tag) if question is not None]

    @property
    def within(self) -> bool:
        """Whether tokens of one text are compared."""
        return self.against is not None or self.tag is not None or self.paired

    def effect(
        self,
        data: pd.DataFrame,
        scores: Sequence[str],
        controls: Sequence[str] = (),
        method: Literal["spearman", "pearson"] = "spearman",
    ) -> pd.DataFrame:
        """The test of the finding, also given controls."""
        correction = self.correction
        if self.group is not None and controls and correction == "max-t" and not self.paired:
            correction = "holm"  # whole units are permuted jointly without controls only
        options = _Options(unit=self.unit, correction=correction, n_resamples=self.n_resamples, seed=self.seed)
        if self.against is not None and controls:
            return partial_correlation(
                data,
                scores,
                self.against,
                controls=controls,
                frequency=self.frequency,
                method=method,
                min_tokens=self.min_tokens,
                **options,
            )
        if self.against is not None:
            return within_sequence_correlation(data, scores, self.against, min_tokens=self.min_tokens, **options)
        if self.group is not None:
            return compare_groups(
                data,
                scores,
                self.group,
                groups=self.groups,
                paired=self.paired,
                controls=controls,
                frequency=self.frequency,
                **options,
            )
        if self.tag is not None:
            return tag_effect(data, scores, self.tag, tests=("mixed",), controls=controls, frequency=self.frequency, **options)
        return before_after(data, scores, **options)


class _Options(TypedDict):
    unit: str
    correction: Correction
    n_resamples: int
    seed: int


def _with_layer(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """A table without layers as one of layer 0, with the errors of the scores' references there."""
    errors = {name: tables.reference_error(table, name) for name in names}
    held = {name: {"0": float(error.max())} for name, error in errors.items() if error.any()}
    answer = tables.assign(table, layer=0)
    return tables.with_reference_error(answer, held) if held else answer


def _unknown(flag: str, score: str, why: str) -> _Flag:
    return _Flag(flag, score, why=f"not checked: {why}")


def _not_varied(flag: str, score: str) -> _Flag:
    return _unknown(flag, score, "the score does not vary")


def _equal_share(rows: Rows, score: str, within: bool) -> float:
    """Share of the most frequent value or, within texts, of sequences with one value only, whichever is larger."""
    values = rows.values[score]
    if not len(values):
        return 1.0
    # Rounded to 9 digits of the largest: what differs less is rounding.
    size = np.abs(values).max() or 1.0
    _, counts = np.unique(np.round(values / size, 9), return_counts=True)
    share = float(counts.max() / len(values)) if len(values) > 1 else 1.0
    if not within:
        return share
    frame = pd.Series(np.round(values / size, 9)).groupby(rows.sequence)
    return max(share, float((frame.nunique() == 1).mean()))


def _no_variance(table: pd.DataFrame, score: str, unit: str, within: bool) -> tuple[_Flag, bool]:
    """The flag, and whether the score varies at no layer."""
    shares: dict[object, float] = {}
    spreads: dict[object, float] = {}
    documents = 0
    for every in split(table, [score], unit=unit):
        rows = every.finite(score)
        shares[rows.layer] = _equal_share(rows, score, within)
        spreads[rows.layer] = float(rows.unit_means(score)[1].std()) if len(rows.sequence) else float("nan")
        if within and len(rows.sequence):
            codes, means = group_means(rows.sequence, rows.values[score])
            spreads[rows.layer] = float((rows.values[score] - means[np.searchsorted(codes, rows.sequence)]).std())
        documents = max(documents, rows.counts()["n_documents"])
    worst = max(shares, key=lambda layer: shares[layer])
    flat = [layer for layer, share in shares.items() if share >= _SAME]
    kind = "within sequences" if within else "of unit means"
    equal = f"{100 * shares[worst]:.3g} % equal, deviation {kind} {spreads[worst]:.3g}"
    why = f"{len(flat)} of {len(shares)} layers; most equal at layer {worst}: {equal}"
    flag = _Flag(
        "no variance",
        score,
        worst,
        bool(flat),
        value=shares[worst],
        limit=_SAME,
        n_tests=len(shares),
        n_documents=documents,
        why=why,
    )
    return flag, min(shares.values()) == 1


def _copies(table: pd.DataFrame, unit: str, labels: Sequence[str]) -> _Flag:
    found = texts_once(table, unit, labels)
    share = found.n_copies / found.n_texts
    documents = len(np.unique(found.documents[found.keep]))
    why = found.note or f"none of {found.n_texts} texts is a copy of another, as far as the table tells"
    return _Flag("copies", pd.NA, raised=share > 0, value=share, limit=0.0, n_tests=0, n_documents=documents, why=why)


def _nothing_survives(tested: pd.DataFrame | None, alpha: float) -> _Flag:
    name = "nothing survives correction"
    if tested is None or tested["p_corrected"].isna().all():
        return _Flag(name, pd.NA, raised=True, limit=alpha, n_tests=0, why="no test gave a p-value")
    best = tested.iloc[int(tested["p_corrected"].argmin())]
    survived, tests, smallest = int((tested["p_corrected"] <= alpha).sum()), int(best["n_tests"]), best["p_corrected"]
    return _Flag(
        name,
        best["score"],
        best["layer"],
        survived == 0,
        value=smallest,
        limit=alpha,
        estimate=best["estimate"],
        p=best["p"],
        n_tests=tests,
        n_documents=int(best["n_documents"]),
        why=f"{survived} of {tests} tests survive {best['correction']}; smallest corrected p {smallest:.3g}",
    )


def _replication(name: str, table: pd.DataFrame, score: str, finding: _Finding, alpha: float) -> _Flag:
    stratify = None if finding.paired else finding.group
    held = table.dropna(subset=[stratify]) if stratify else table
    try:
        found = best_layer(
            held, lambda part: finding.effect(part, [score]), unit=finding.unit, stratify=stratify, seed=finding.seed
        )
    except (StudyError, TableError) as error:
        return _unknown(name, score, str(error))
    row = found.iloc[0]
    first, second = row["chosen_estimate"] - row["null"], row["estimate"] - row["null"]
    same = bool(np.sign(first) == np.sign(second))
    # Omega squared has one side only; the other tests have two.
    one_sided = float(row["p"]) if row["effect"] == "omega squared" else float(row["p"]) / 2 if same else 1 - float(row["p"]) / 2
    return _Flag(
        name,
        score,
        row["layer"],
        not (same and one_sided <= alpha),
        value=one_sided,
        limit=alpha,
        estimate=row["chosen_estimate"],
        p=row["chosen_p"],
        compared_estimate=row["estimate"],
        compared_p=row["p"],
        n_tests=1,
        n_documents=int(row["n_documents"]),
        why=f"{row['effect']} {row['chosen_estimate']:.3g} on {row['chosen_documents']} documents, {row['estimate']:.3g} on "
        f"{row['n_documents']} others (one-sided p {one_sided:.3g})",
    )


def _vanishing(
    name: str,
    table: pd.DataFrame,
    tested: pd.DataFrame,
    score: str,
    varied: Sequence[str],
    finding: _Finding,
    controls: Sequence[str],
    alpha: float,
) -> _Flag:
    if not finding.asked:
        return _unknown(name, score, "a change between two runs has the same tokens on both sides: nothing to control")
    there = chosen(table, controls, [score, *finding.asked], finding.frequency).names
    if not there:
        return _unknown(name, score, f"the table has none of the controls {', '.join(controls)}")
    after = finding.effect(table, varied, there)
    if finding.against is not None and (after["left"] < NEARLY).any():
        after = _of_both(after, finding.effect(table, varied, there, "pearson"))
    return _controlled(name, tested, after, score, there, alpha)


def _of_both(ranks: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Where controls leave little, ranks go together of themselves: there only what values say too stays."""
    little = (ranks["left"] < NEARLY).to_numpy()
    agree = np.sign(ranks["estimate"].to_numpy(float)) == np.sign(values["estimate"].to_numpy(float))
    both = np.where(agree, np.fmax(ranks["p_corrected"], values["p_corrected"].fillna(1.0)), 1.0)
    return ranks.assign(p_corrected=np.where(little & ranks["p_corrected"].notna(), both, ranks["p_corrected"]))


def _controlled(name: str, tested: pd.DataFrame, after: pd.DataFrame, score: str, controls: Sequence[str], alpha: float) -> _Flag:
    joined = tested.merge(after, on=["score", "layer"], suffixes=("", "_after"), validate="one_to_one")
    raw = joined[(joined["score"] == score) & (joined["p_corrected"] <= alpha)]
    used = ", ".join(controls)
    if raw.empty:
        return _Flag(name, score, raised=False, n_tests=0, why=f"nothing survived before control of {used}")
    same = np.sign(raw["estimate"] - raw["null"]) == np.sign(raw["estimate_after"] - raw["null_after"])
    kept = raw[same & (raw["p_corrected_after"] <= alpha)]
    strongest = raw.sort_values(["p", "estimate"], key=lambda column: column if column.name == "p" else -column.abs()).iloc[0]
    return _Flag(
        name,
        score,
        strongest["layer"],
        kept.empty,
        value=1 - len(kept) / len(raw),
        limit=1 - 1 / len(raw),
        estimate=strongest["estimate"],
        p=strongest["p_corrected"],
        compared_estimate=strongest["estimate_after"],
        compared_p=strongest["p_corrected_after"],
        n_tests=len(raw),
        n_documents=int(strongest["n_documents"]),
        why=f"{len(kept)} of {len(raw)} findings stay; strongest: {strongest['effect']} {strongest['estimate']:.3g} -> "
        f"{strongest['estimate_after']:.3g} (corrected p {strongest['p_corrected_after']:.3g}) given {used}",
    )
