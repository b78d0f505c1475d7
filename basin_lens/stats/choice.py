"""Choosing a layer on some documents and reporting it on others."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from basin_lens import tables
from basin_lens.errors import StudyError, TableError
from basin_lens.stats.design import FEWEST, check_run, enough, folds
from basin_lens.stats.results import correct
from basin_lens.values import whole_numbers

_CASE = ("score", "against", "group", "tag", "quartile", "metric", "versus", "term", "test")


@whole_numbers(TableError)
def halves(
    table: pd.DataFrame, *, share: float = 0.5, unit: str = "document", stratify: str | None = None, seed: int = 0
) -> "pd.Series[bool]":
    """Which rows are for choosing (True); the others are for reporting. Units are never split, and copies of a text stay together.

    Args:
        table: from `analyze` or `compare`.
        share: of units for choosing, between 0 and 1.
        unit: `"sequence"`, `"document"` or a label.
        stratify: label column, the same throughout a unit: each side gets its share of every value.
        seed: of the draw.

    Raises:
        TableError: missing columns, or a label that changes within a unit. StudyError: fewer than 6 units on a side.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"doc": range(20), "seq": range(20)})
        >>> int(bl.stats.halves(table).sum())
        10
    """
    keys = {"document": ["doc"], "sequence": ["doc", "seq"]}.get(unit, [unit])
    tables.require(table, *keys)
    given = table.groupby(keys, sort=True, dropna=False).ngroup().to_numpy()
    codes = folds(table, given, unit)
    every, first = np.unique(codes, return_index=True)
    strata = None
    if stratify is not None:
        tables.require(table, stratify)
        if (table.groupby(given)[stratify].nunique(dropna=False) > 1).any():
            raise TableError(f"expected a label that is the same throughout a unit, got {stratify!r}, which changes within one.")
        strata = table[stratify].astype(str).to_numpy()[first]
    enough(int(min(share, 1 - share) * len(every) + 1e-9), FEWEST, f"units ({unit}) on each side of the split")
    kept, _ = train_test_split(every, train_size=share, random_state=seed, stratify=strata)
    return pd.Series(np.isin(codes, kept), index=table.index)


@whole_numbers(TableError)
def best_layer(
    table: pd.DataFrame,
    test: Callable[[pd.DataFrame], pd.DataFrame],
    *,
    share: float = 0.5,
    unit: str = "document",
    stratify: str | None = None,
    correction: Literal["bh", "holm", "none"] = "holm",
    seed: int = 0,
) -> pd.DataFrame:
    """Choose the layer where a test finds most on some documents, and report that layer on the others.

    The best of many layers looks good by chance; on documents that did not choose it, it does not.

    Args:
        table: what the test takes, with a column `layer`.
        test: from a table to its results, such as `lambda t: bl.stats.compare_groups(t, "compression", "member")`.
        share: of units for choosing.
        unit, stratify, seed: as for `halves`.
        correction: over the rows of the answer.

    Returns:
        for every score (and everything else that the test tells apart, but layers), the row of the chosen layer on the documents
        that did not choose, with `chosen_estimate`, `chosen_p`, `chosen_documents`, `chosen_units`: what chose it. Chosen by p, and
        by the distance from `null` where p is equal or missing.

    Raises:
        TableError: no column `layer`, results without a layer. StudyError: fewer than 6 units on a side, or what the test raises.

    Source: Kriegeskorte et al. 2009 (circular analysis).

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rng = np.random.default_rng(0)
        >>> doc = np.tile(np.arange(40), 3)
        >>> table = pd.DataFrame({"layer": np.repeat([4, 5, 6], 40), "doc": doc, "seq": doc, "difference": rng.normal(size=120)})
        >>> table.loc[table.layer == 5, "difference"] += 1.5
        >>> bl.stats.best_layer(table, bl.stats.before_after).layer.tolist()
        [5]
    """
    check_run(table)
    tables.require(table, "layer")
    choosing = halves(table, share=share, unit=unit, stratify=stratify, seed=seed)
    first = test(table[choosing])
    tables.require(first, "layer", "estimate", "p")
    first = first[first["layer"].notna() & first["estimate"].notna()].reset_index(drop=True)
    if first.empty:
        raise StudyError("expected results with a layer and an estimate on the documents that choose, got none. Add texts.")
    keys = [name for name in _CASE if name in first.columns]
    null = first["null"].fillna(0.0) if "null" in first.columns else 0.0
    ordered = first.assign(_p=first["p"].fillna(np.inf), _far=-(first["estimate"] - null).abs()).sort_values(
        ["_p", "_far", "layer"]
    )
    counts = [name for name in ("n_documents", "n_units") if name in ordered.columns]
    picked = (ordered.drop_duplicates(keys) if keys else ordered[:1])[[*keys, "layer", "estimate", "p", *counts]]
    names = {"estimate": "chosen_estimate", "p": "chosen_p", "n_documents": "chosen_documents", "n_units": "chosen_units"}
    picked = picked.rename(columns=names)
    wanted = [int(layer) for layer in sorted(picked["layer"].unique())]
    second = test(table[~choosing & table["layer"].isin(wanted)])
    answer = second.reset_index(drop=True).merge(picked, on=[*keys, "layer"], how="inner", sort=False, validate="one_to_one")
    return tables.with_provenance(correct(answer, correction), second)
