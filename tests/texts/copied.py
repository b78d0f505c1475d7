"""Random texts, copies of them, and tables that count them."""

import numpy as np
import pandas as pd

import basin_lens as bl
from tests.conftest import TEXTS

S = bl.stats


def random_texts(count, length=60, seed=0, vocabulary=5000):
    return np.random.default_rng(seed).integers(1, vocabulary, (count, length)).tolist()


def table_of(texts, seed=0, icc=0.3, scores=None):
    """A table made by hand, without provenance: one row per token, `b` and a label; copies have their text's own values if `scores` has them."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, text in enumerate(texts):
        a, b = (icc * rng.normal() + rng.normal(size=len(text)) for _ in "ab") if scores is None else scores[index]
        rows.append(pd.DataFrame({
            "layer": 3, "doc": f"text-{index}", "seq": index, "pos": range(len(text)), "token_id": text, "a": a, "b": b, "member": index % 2 == 0,
        }))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def copied(table, times, rows=None):
    """The table with every text `times` times, the copies as documents of their own."""
    docs = list(dict.fromkeys(table.doc))
    parts = []
    for copy in range(times):
        part = table.copy()
        part["doc"], part["seq"] = part.doc + f" copy {copy}" * (copy > 0), part.seq + copy * len(docs)
        parts.append(part if rows is None else rows(part, copy))
    return pd.concat(parts, ignore_index=True)


def words(seed, count=40):
    """A text of these words in an order of its own."""
    return " ".join(np.random.default_rng(seed).choice(" ".join(TEXTS).split(), count))
