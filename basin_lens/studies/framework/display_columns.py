"""Of a result table, the columns that a reader wants, in one order for all studies."""

import pandas as pd

# For figures at the layer of a declared test, which itself was made on the documents that did not choose it, if enough.
ALL_SHOWN = "All documents are shown, those that chose this layer among them."

_ALWAYS = ("estimate", "low", "high", "p", "p_corrected", "hedges_g", "n_units", "n_tokens", "note")
_ORDER = (
    "layer",
    "layer_choice",
    "score",
    "against",
    "contrast",
    "group",
    "negative",
    "tag",
    "test",
    "control_set",
    "dose",
    "baselines",
    "metric",
    "versus",
    "share",
    "chance",
    *_ALWAYS[:6],
    "rho",
    "at_half",
    "mean",
    "mean_low",
    "mean_high",
    "unit",
    "n_first",
    "n_second",
    "n_positive",
    "n_negative",
    "n_tags",
    "n_units",
    "n_documents",
    "n_tokens",
    "note",
)


def shown(results: pd.DataFrame, *more: str) -> pd.DataFrame:
    """The usual columns and `more`, as far as they are there: tests that could not be made lack some."""
    assert set(more) <= set(_ORDER), set(more) - set(_ORDER)
    return results[[name for name in _ORDER if name in results and (name in more or name in _ALWAYS)]]
