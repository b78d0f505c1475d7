"""Red flags: what should keep anyone from believing a finding, computed rather than left to the reader."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.errors import StudyError, TableError
from basin_lens.stats.association import NEARLY, partial_correlation, within_sequence_correlation
from basin_lens.stats.choice import best_layer
from basin_lens.stats.covariates import CONTROLS, chosen
from basin_lens.stats.design import Rows, asked_layers, group_means, names_of, split, texts_once
from basin_lens.stats.groups import before_after, compare_groups
from basin_lens.stats.results import Correction
from basin_lens.stats.tags import tag_effect
from basin_lens.values import whole_numbers

_SAME = 0.95  # share of equal values from which a score counts as one that does not vary
_COLUMNS = (
    "flag", "score", "layer", "raised", "value", "limit", "estimate", "p", "compared_estimate", "compared_p", "n_tests", "n_documents", "why",
)  # fmt: skip


@whole_numbers(TableError)
def red_flags(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    against: str | None = None,
    *,
    group: str | None = None,
    groups: Sequence[Any] | None = None,
    paired: bool = False,
    tag: str | None = None,
    controls: Sequence[str] = CONTROLS,
    frequency: Mapping[Any, float] | None = None,
    layers: Any = None,
    unit: str = "document",
    correction: Correction = "bh",
    alpha: float = 0.05,
    n_resamples: int = 1999,
    seed: int = 0,
) -> pd.DataFrame:
    """Five reasons not to believe a finding, each with the numbers that raise it.

    The finding is a correlation (`against`), a difference of groups (`group`), of tags (`tag`), or, with none of these, a change (columns of
    differences, from `compare`).

    - `no variance`: 95 % of the values of a layer are equal, or, where the question is within texts, 95 % of the sequences hold one value only.
    - `nothing survives correction`: no score and layer has a corrected p of at most alpha.
    - `does not replicate`: the layer chosen on one half of the documents has another sign, or a p above alpha in the direction that was found, on
      the other half.
    - `vanishes under controls`: of the scores and layers that survived correction, none does, with the same sign, once token frequency, position,
      norm, density and surprisal are controlled. Where these leave less than a fifth of the variance, ranks have an excess (see
      `partial_correlation`), and a correlation stays only if that of values does too.
    - `copies`: texts that are copies of others, nearly or in full. Each counts once in all tests; the flag says how many there are.

    Args:
        table: from `analyze` (or `compare`), of one run.
        scores: columns.
        against: as for `within_sequence_correlation`.
        group, groups, paired: as for `compare_groups`.
        tag: as for `tag_effect`, by its test `mixed` (min F', over texts and words at once): tags permuted within sequences would pass for a finding
            in half of all cases where words have scores of their own. Needs `token_id`.
        controls, frequency: as for `partial_correlation`.
        layers, unit, correction, n_resamples, seed: as for `compare_groups`; seed also of the halves.
        alpha: the level.

    Returns:
        one row per flag, and per score except for the correction and the copies: `flag, score, layer, raised` (True, False, or NA where it
        could not be checked, and `why` says so), `value` and `limit` (raised where value > limit: share of equal values; smallest corrected p; p on
        the other half, one-sided; share of findings lost; share of texts that are copies), `estimate, p` (of the finding: in the first half, or
        without controls),
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
    asked = [question for question in (against, group, tag) if question is not None]
    if len(asked) > 1:
        raise TableError(f"expected one question, got {asked}. Pass against, group or tag, and ask again for the others.")
    if "layer" not in table.columns:
        table, layers = _with_layer(table), None
    within = against is not None or tag is not None or paired
    if layers is not None:
        table = table[table["layer"].isin(asked_layers(table, layers))]
    options: dict[str, Any] = {"unit": unit, "correction": correction, "n_resamples": n_resamples, "seed": seed}

    def effect(data: pd.DataFrame, held: Sequence[str], given: Sequence[str] = ()) -> pd.DataFrame:
        if against is not None and given:
            return partial_correlation(data, held, against, controls=given, frequency=frequency, **options)
        if against is not None:
            return within_sequence_correlation(data, held, against, **options)
        more: dict[str, Any] = {"controls": given, "frequency": frequency} if given else {}
        if group is not None:
            # Whole units are permuted jointly without controls only.
            fallback = {"correction": "holm"} if given and correction == "max-t" and not paired else {}
            return compare_groups(data, held, group, groups=groups, paired=paired, **options | more | fallback)
        if tag is not None:
            return tag_effect(data, held, tag, tests=("mixed",), **options | more)
        return before_after(data, held, **options)

    flags = []
    varied = []
    for score in names:
        flag, everywhere = _no_variance(table, score, unit, within)
        flags.append(flag)
        if not everywhere:
            varied.append(score)
    tested = effect(table, varied) if varied else None
    flags.append(_nothing_survives(tested, alpha))
    for score in names:
        name = "does not replicate"
        flags.append(
            _replication(name, table, score, effect, alpha, options, group, paired) if score in varied else _not_varied(name, score)
        )
    for score in names:
        name = "vanishes under controls"
        if tested is None or score not in varied:
            flags.append(_not_varied(name, score))
        elif not asked:
            flags.append(_unknown(name, score, "a change between two runs has the same tokens on both sides: nothing to control"))
        else:
            there = chosen(table, controls, [score, *asked], frequency)[1]
            if there:
                after = effect(table, varied, there)
                if against is not None and (after["left"] < NEARLY).any():
                    values = partial_correlation(
                        table, varied, against, controls=there, frequency=frequency, method="pearson", **options
                    )
                    after = _of_both(after, values)
                flags.append(_controlled(name, tested, after, score, there, alpha))
            else:
                flags.append(_unknown(name, score, f"the table has none of the controls {', '.join(controls)}"))
    flags.append(_copies(table, unit, [name for name in (group,) if name is not None]))
    answer = pd.DataFrame(flags, columns=list(_COLUMNS))
    answer["layer"] = answer["layer"].astype("Int64")
    answer["raised"] = answer["raised"].astype("boolean")
    return tables.with_provenance(answer, table)


def _with_layer(table: pd.DataFrame) -> pd.DataFrame:
    answer = table.copy()
    answer["layer"] = 0
    return answer


def _unknown(flag: str, score: str, why: str) -> dict[str, Any]:
    return {"flag": flag, "score": score, "layer": pd.NA, "raised": pd.NA, "why": f"not checked: {why}"}


def _not_varied(flag: str, score: str) -> dict[str, Any]:
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


def _no_variance(table: pd.DataFrame, score: str, unit: str, within: bool) -> tuple[dict[str, Any], bool]:
    shares, spreads, documents = {}, {}, 0
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
    flag = {
        "flag": "no variance", "score": score, "layer": worst, "raised": bool(flat), "value": shares[worst], "limit": _SAME, "n_tests": len(shares),
        "n_documents": documents, "why": why,
    }  # fmt: skip
    return flag, min(shares.values()) == 1


def _copies(table: pd.DataFrame, unit: str, labels: Sequence[str]) -> dict[str, Any]:
    found = texts_once(table, unit, labels)
    share = found.n_copies / found.n_texts
    return {
        "flag": "copies", "score": pd.NA, "layer": pd.NA, "raised": share > 0, "value": share, "limit": 0.0, "n_tests": 0,
        "n_documents": len(np.unique(found.documents[found.keep])),
        "why": found.note or f"none of {found.n_texts} texts is a copy of another, as far as the table tells",
    }  # fmt: skip


def _nothing_survives(tested: pd.DataFrame | None, alpha: float) -> dict[str, Any]:
    flag: dict[str, Any] = {"flag": "nothing survives correction", "score": pd.NA, "layer": pd.NA, "limit": alpha}
    if tested is None or tested["p_corrected"].isna().all():
        return flag | {"raised": True, "n_tests": 0, "why": "no test gave a p-value"}
    best = tested.iloc[int(tested["p_corrected"].argmin())]
    survived = int((tested["p_corrected"] <= alpha).sum())
    return flag | {
        "score": best["score"], "layer": best["layer"], "raised": survived == 0, "value": best["p_corrected"], "estimate": best["estimate"],
        "p": best["p"], "n_tests": int(best["n_tests"]), "n_documents": best["n_documents"],
        "why": f"{survived} of {int(best['n_tests'])} tests survive {best['correction']}; smallest corrected p {best['p_corrected']:.3g}",
    }  # fmt: skip


def _replication(
    name: str, table: pd.DataFrame, score: str, effect: Callable[..., pd.DataFrame], alpha: float, options: Mapping[str, Any],
    group: str | None, paired: bool,
) -> dict[str, Any]:  # fmt: skip
    def alone(part: pd.DataFrame) -> pd.DataFrame:
        return effect(part, [score])

    stratify = group if group is not None and not paired else None
    try:
        found = best_layer(
            table.dropna(subset=[stratify]) if stratify else table, alone, unit=options["unit"], stratify=stratify,
            seed=options["seed"],
        )  # fmt: skip
    except (StudyError, TableError) as error:
        return _unknown(name, score, str(error))
    row = found.iloc[0]
    first, second = row["chosen_estimate"] - row["null"], row["estimate"] - row["null"]
    same = bool(np.sign(first) == np.sign(second))
    # Omega squared has one side only; the other tests have two.
    one_sided = float(row["p"]) if row["effect"] == "omega squared" else float(row["p"]) / 2 if same else 1 - float(row["p"]) / 2
    return {
        "flag": name, "score": score, "layer": row["layer"], "raised": not (same and one_sided <= alpha), "value": one_sided, "limit": alpha,
        "estimate": row["chosen_estimate"], "p": row["chosen_p"], "compared_estimate": row["estimate"], "compared_p": row["p"], "n_tests": 1,
        "n_documents": row["n_documents"],
        "why": f"{row['effect']} {row['chosen_estimate']:.3g} on {row['chosen_documents']} documents, {row['estimate']:.3g} on "
        f"{row['n_documents']} others (one-sided p {one_sided:.3g})",
    }  # fmt: skip


def _of_both(ranks: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Where controls leave little, ranks go together of themselves: there only what values say too stays."""
    little = (ranks["left"] < NEARLY).to_numpy()
    agree = np.sign(ranks["estimate"].to_numpy(float)) == np.sign(values["estimate"].to_numpy(float))
    both = np.where(agree, np.fmax(ranks["p_corrected"], values["p_corrected"].fillna(1.0)), 1.0)
    return ranks.assign(p_corrected=np.where(little & ranks["p_corrected"].notna(), both, ranks["p_corrected"]))


def _controlled(
    name: str, tested: pd.DataFrame, after: pd.DataFrame, score: str, controls: Sequence[str], alpha: float
) -> dict[str, Any]:
    joined = tested.merge(after, on=["score", "layer"], suffixes=("", "_after"), validate="one_to_one")
    raw = joined[(joined["score"] == score) & (joined["p_corrected"] <= alpha)]
    used = ", ".join(controls)
    if raw.empty:
        return {
            "flag": name,
            "score": score,
            "layer": pd.NA,
            "raised": False,
            "n_tests": 0,
            "why": f"nothing survived before control of {used}",
        }
    same = np.sign(raw["estimate"] - raw["null"]) == np.sign(raw["estimate_after"] - raw["null_after"])
    kept = raw[same & (raw["p_corrected_after"] <= alpha)]
    strongest = raw.sort_values(["p", "estimate"], key=lambda column: column if column.name == "p" else -column.abs()).iloc[0]
    return {
        "flag": name, "score": score, "layer": strongest["layer"], "raised": kept.empty, "value": 1 - len(kept) / len(raw),
        "limit": 1 - 1 / len(raw), "estimate": strongest["estimate"], "p": strongest["p_corrected"],
        "compared_estimate": strongest["estimate_after"], "compared_p": strongest["p_corrected_after"], "n_tests": len(raw),
        "n_documents": strongest["n_documents"],
        "why": f"{len(kept)} of {len(raw)} findings stay; strongest: {strongest['effect']} {strongest['estimate']:.3g} -> "
        f"{strongest['estimate_after']:.3g} (corrected p {strongest['p_corrected_after']:.3g}) given {used}",
    }  # fmt: skip
