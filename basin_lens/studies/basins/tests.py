"""Every cell of the grid tested at once, explored on half of the documents and confirmed on the others."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from basin_lens import stats, tables
from basin_lens.stats.results import constant_values
from basin_lens.studies.basins.grid import (
    CELL,
    HOME,
    HOME_ISOTROPIC,
    HOME_RANDOM,
    SCORE,
    SCORE_RANDOM,
    VALUES,
)
from basin_lens.studies.framework.declared_tests import ALPHA, FEWEST_TO_SPLIT, p_floor
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.framework.units import FEWEST_UNITS

# What is tested: a score less the same of random sets.
ABOVE, GROWTH = HEADLINE, "contraction_growth_above_random_sets"
GROWN, GROWN_ISOTROPIC = "contraction_growth", "contraction_growth_isotropic"
MEASURES = (ABOVE, GROWTH)
_MADE = (ABOVE, GROWN, GROWTH, GROWN_ISOTROPIC)
BASIN, APART = "basin", "tells apart"
LEVEL = ALPHA / len(MEASURES)  # of a cell: there are two measures
_COUNTS = ("n_units", "n_documents", "n_sequences", "n_tokens")
_NUMBERS = ("estimate", "low", "high", "null", "p", "p_corrected", *_COUNTS)
_FAMILY = "max-|t| over the grid"


def with_measures(values: pd.DataFrame) -> pd.DataFrame:
    """The cells' values with what is tested: compression, and growth of the contraction at home, each less that of random sets.

    Growth is contraction at a scale less that at the smallest scale, of the same token, layer and path: what the linear part of the
    map gives is the same at both. NaN at the smallest scale itself.
    """
    first = values["scale"].min()
    keys = ["seq", "pos", "layer", "blocks"]
    homes = [HOME, HOME_RANDOM, HOME_ISOTROPIC]
    linear = values[values["scale"] == first].set_index(keys)[homes]
    there = pd.MultiIndex.from_frame(values[keys])
    grown = values[homes].to_numpy(float) - linear.reindex(there).to_numpy(float)
    grown[(values["scale"] == first).to_numpy()] = np.nan
    answer = tables.assign(
        values,
        **{
            ABOVE: values[SCORE] - values[SCORE_RANDOM],
            GROWN: grown[:, 0],
            GROWTH: grown[:, 0] - grown[:, 1],
            GROWN_ISOTROPIC: grown[:, 2],
        },
    )
    return tables.with_columns(answer, dict.fromkeys(_MADE, tables.Column("nats")))


def cell_tests(values: pd.DataFrame, measure: str, unit: str, seed: int, *, n_resamples: int = 9999) -> pd.DataFrame:
    """A row per cell: the mean over units against 0, corrected for the whole grid, and what two halves of the units say.

    Args:
        values: from `with_measures`.
        measure: the column that is tested.
        unit: what is independent.
        seed: of sign flips and of the halves.
        n_resamples: sign flips.

    Returns:
        as `stats.before_after`, `p_corrected` by max-|t| over all cells, with
        `explored_estimate`, `explored_p`: of the half that explores;
        `confirmed_estimate`, `confirmed_low`, `confirmed_high`, `confirmed_p`: of the other half, for the cells of an explored p of
        at most 0.05 (and the most positive one), p by max-|t| over these. NaN where there are too few units to halve;
        `reads`: `"basin"` (above 0) or `"tells apart"` (below 0) where both corrected p (without halves, the first) are
        at most 0.025 (there are two measures) and the signs agree; else empty.
    """
    wide, cells = _wide(values, measure)
    every = _max_t(wide, list(cells), unit, seed, n_resamples)
    answer = every.merge(pd.DataFrame({"cell": list(cells), **_split(cells)}), on="cell", how="right")
    answer["score"], answer["unit"] = measure, unit
    explored = confirmed = _max_t(wide, [], unit, seed, n_resamples)
    if _units(wide, unit) >= FEWEST_TO_SPLIT:
        choosing = stats.halves(wide, unit=unit, seed=seed)
        explored = _max_t(tables.select(wide, choosing), list(cells), unit, seed, n_resamples)
        chosen = explored[(explored["p"] <= ALPHA) | (explored["estimate"] == explored["estimate"].max())]["cell"].tolist()
        confirmed = _max_t(tables.select(wide, ~choosing), chosen, unit, seed, n_resamples)
    for name, found, columns in (
        ("explored", explored, {"estimate": "estimate", "p": "p"}),
        ("confirmed", confirmed, {"estimate": "estimate", "low": "low", "high": "high", "p_corrected": "p"}),
    ):
        for column, short in {**columns, **{count: count for count in _COUNTS}}.items():
            held = dict(zip(found["cell"], found[column], strict=True))
            answer[f"{name}_{short}"] = [held.get(cell, np.nan) for cell in answer["cell"]]
    answer["reads"] = _reads(answer, halved=bool(len(explored)))
    answer["layer"] = answer["layer"].astype("Int64")
    return tables.with_provenance(answer.drop(columns="cell"), values)


def finding_of(cells: pd.DataFrame) -> pd.DataFrame:
    """The declared test as a row: is there a cell above 0?

    The cell with the smallest corrected p among those explored above 0, as the other half of the units has it; without halves, the
    best cell of all units, p corrected for the grid. An estimate below 0 has p = 1.
    """
    halved = bool(cells["explored_p"].notna().any())
    if halved:
        tested = cells[cells["confirmed_p"].notna() & (cells["explored_estimate"] > 0)]
        names = {f"confirmed_{name}": name for name in ("estimate", "low", "high", "p", *_COUNTS)}
        tested = tested.drop(columns=list(names.values())).rename(columns=names)
        n_chosen = int(cells["confirmed_p"].notna().sum())
    else:
        tested = cells[cells["p_corrected"].notna()]
        tested = tested.assign(p=tested["p_corrected"])
        n_chosen = len(tested)
    if tested.empty:
        return _nothing(cells, halved)
    ordered = tested.assign(_below=tested["estimate"] <= 0).sort_values(["_below", "p", "estimate"], ascending=[True, True, False])
    row = ordered[:1].drop(columns="_below").reset_index(drop=True)
    (one,) = named_rows(row)
    at = f"path of {one.blocks} block{'s' * (one.blocks != 1)}, scale {one.scale:g}"
    if halved:
        how = (
            f"explored on {one.explored_n_units:.0f} units (there {one.explored_estimate:+.3f}, p {one.explored_p:.2g}), tested on "
            f"{one.n_units:.0f} others, p corrected for the {n_chosen} cells explored ({_FAMILY})"
        )
    else:
        how = f"too few units to halve ({one.n_units:.0f}): the best of {n_chosen} cells, p corrected for them ({_FAMILY})"
    p = 1.0 if one.estimate <= 0 else float(one.p)
    return row.assign(p=p, p_floor=p_floor(one), effect_unit="nats", note=f"{at}; {how}")


def _nothing(cells: pd.DataFrame, halved: bool) -> pd.DataFrame:
    """No cell to confirm. Where none is above 0 in the half that explores, that is a test that could have said otherwise."""
    row = cells.sort_values(["explored_estimate", "estimate"], ascending=False)[:1].reset_index(drop=True)
    (one,) = named_rows(row)
    at = f"path of {one.blocks} block{'s' * (one.blocks != 1)}, scale {one.scale:g}"
    if halved and not one.explored_estimate > 0:
        said = f"{at}; no cell is above 0 on the {one.explored_n_units:.0f} units that explore, so none was tested on the others"
        return row.assign(p=1.0, p_floor=0.0, effect_unit="nats", note=said)
    return row.assign(p=np.nan, p_floor=np.nan, effect_unit="nats", note="no cell has values of enough units")


def plain_means(values: pd.DataFrame, columns: Sequence[str], unit: str) -> pd.DataFrame:
    """Mean and 95 % interval over units of other columns, a row per cell and column; no test."""
    lines: list[dict[str, object]] = []
    for column in columns:
        wide, cells = _wide(values, column)
        for name, (_, means, tokens) in _unit_means(wide, list(cells), unit).items():
            low, high = tables.interval(means)
            found = {"score": column, "estimate": float(means.mean()), "low": low, "high": high}
            lines.append({**dict(zip(CELL, cells[name], strict=True)), **found, "n_units": len(means), "n_tokens": tokens})
    names = [*CELL, "score", "estimate", "low", "high", "n_units", "n_tokens"]
    return tables.with_provenance(pd.DataFrame(lines, columns=names), values)


def _unit_means(wide: pd.DataFrame, names: Sequence[str], unit: str) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Units, their means and the number of tokens, at each cell that has any."""
    answer = {}
    for rows in stats.design.split(wide, names, unit=unit) if names else ():
        for name in names:
            there = rows.finite(name)
            if len(there.sequence):
                answer[name] = (*there.unit_means(name), len(there.sequence))
    return answer


def _wide(values: pd.DataFrame, column: str) -> tuple[pd.DataFrame, dict[str, tuple[int, int, float]]]:
    """A row per token and a column per cell, so that whole units flip their signs at all cells at once; and the cells' names."""
    held = values[values[column].notna()]
    keys = [name for name in values if name not in (*CELL, *VALUES, *_MADE)]
    cells = {f"cell{at}": cell for at, cell in enumerate(sorted(set(held[CELL].itertuples(index=False, name=None))))}
    tokens = values.drop_duplicates(["seq", "pos"])[keys].sort_values(["seq", "pos"]).reset_index(drop=True)
    at = pd.MultiIndex.from_frame(tokens[["seq", "pos"]])
    by_cell = dict(list(held.groupby(CELL)))
    columns = {name: by_cell[cell].set_index(["seq", "pos"])[column].reindex(at).to_numpy(float) for name, cell in cells.items()}
    return tables.with_provenance(pd.concat([tokens, pd.DataFrame(columns)], axis=1), values), cells


def _split(cells: dict[str, tuple[int, int, float]]) -> dict[str, list[int] | list[float]]:
    return {name: [cell[at] for cell in cells.values()] for at, name in enumerate(CELL)}


def _units(wide: pd.DataFrame, unit: str) -> int:
    return stats.design.distinct_units(wide, unit)


def _max_t(wide: pd.DataFrame, names: Sequence[str], unit: str, seed: int, n_resamples: int) -> pd.DataFrame:
    """Means of some cells over units, corrected for the largest |t| of them; cells of too few units, or without spread, are left
    out."""
    means = _unit_means(wide, names, unit)
    able = [name for name, (units, values, _) in means.items() if len(units) >= FEWEST_UNITS and not constant_values(values)]
    if not able:
        return pd.DataFrame({"cell": pd.Series([], dtype=object), **{name: pd.Series([], dtype=float) for name in _NUMBERS}})
    found = stats.before_after(wide, able, unit=unit, correction="max-t", n_resamples=n_resamples, seed=seed)
    return found.rename(columns={"score": "cell"}).drop(columns="layer")


def _reads(cells: pd.DataFrame, halved: bool) -> list[str]:
    said = []
    for row in named_rows(cells):
        sure = row.p_corrected <= LEVEL and (
            not halved or (row.confirmed_p <= LEVEL and np.sign(row.confirmed_estimate) == np.sign(row.estimate))
        )
        said.append("" if not sure else BASIN if row.estimate > 0 else APART)
    return said
