"""Where the nulls of compression lie: random sets, isotropic displacements, random initialization, Gaussian states.

    NLTK_DATA=... python tests/benchmarks/nulls.py [QUERIES] [LAYER ...]

50 files of the Penn Treebank sample (up to 128 tokens of each), 600 tokens, groups of 4, k = 15, patched: SmolLM2-135M, and a twin of it with
weights drawn anew. The first two nulls share the neighbors' groups. Of each: mean over documents +- its standard error, SD over tokens,
reliability over halves of the displacements and of the partners; and how local the neighborhoods are (median V_in over that of random
sets). Gaussian states are neighbors drawn from the layer's own moments, at the tokens' own places and in their own contexts: the same
tokens with `gaussian_states` of the capture as their bank. The last line is JSON.
"""

import json
import platform
import sys
import time

import numpy as np
import torch

import basin_lens as bl
from basin_lens import tables
from basin_lens.texts import read_dataset

LAYERS, QUERIES, DOCUMENTS, LENGTH = (2, 8, 11, 13, 18, 23, 26), 600, 50, 128
OF_ONE = ("compression", "compression_random_sets", "compression_isotropic")


def described(table, column, layer):
    """Mean over documents and its standard error, SD over tokens, and how many tokens and documents."""
    here = table[table["layer"] == layer].dropna(subset=[column])
    means = here.groupby("doc")[column].mean()
    return {
        "mean": float(means.mean()),
        "error": float(means.std(ddof=1) / np.sqrt(len(means))),
        "sd": float(here[column].std()),
        "below_0": float((here[column] < 0).mean()),
        "tokens": len(here),
        "documents": len(means),
    }


def measured(model, capture, layers, queries, *, nulls, bank=None):
    """Rows of one capture, by layer and column."""
    score = bl.analyzers.Compression(queries=queries, nulls=nulls)
    begun = time.process_time()
    table = bl.analyze(model, capture, [score], layers=layers, bank=bank, progress=False)
    seconds = time.process_time() - begun
    (facts,) = tables.provenance(table).values()
    rows = []
    for layer in layers:
        groups = facts["groups"][str(layer)]["compression"]
        for column in OF_ONE if nulls else OF_ONE[:1]:
            rows.append(
                {
                    "layer": layer,
                    "column": column,
                    **described(table, column, layer),
                    "halves": groups["reliability_over_displacements"][column],
                    "partners": groups["reliability_over_partners"][column],
                    "local": groups.get("local"),
                    "without_group": groups["without_group"],
                }
            )
    return rows, seconds


def show(states, rows):
    for row in rows:
        told = row["column"].removeprefix("compression").strip("_").replace("_", " ") or "neighbors"
        reliable = [f"{row[name]:.2f}" if row[name] is not None else "-" for name in ("halves", "partners")]
        local = f"{row['local']:.2f}" if row["local"] is not None else "-"
        print(
            f"| {row['layer']} | {states} | {told} | {row['mean']:+.4f} +- {row['error']:.4f} | {row['sd']:.4f} | {row['below_0']:.0%} | "
            f"{reliable[0]} | {reliable[1]} | {row['tokens']} | {row['documents']} | {row['without_group']} | {local} |",
            flush=True,
        )


def main(queries, layers):
    torch.set_num_threads(1)
    model = bl.load_model()
    texts = read_dataset("nltk:treebank", max_passages=DOCUMENTS)
    around = sorted({layer + step for layer in layers for step in (0, 1)} & set(range(30)))
    capture = bl.Capture.from_texts(model, texts, layers=around, max_length=LENGTH, progress=False)
    print(
        "| layer | states | displacements | mean +- error | SD | below 0 | halves | partners | tokens | documents | no group | local |"
    )
    print("| --- " * 12 + "|")
    found = {}

    def add(states, *given, **options):
        found[states] = rows, _ = measured(*given, layers, queries, **options)
        show(states, rows)

    add("trained", model, capture, nulls=True)
    drawn = bl.controls.gaussian_states(capture, seed=0, progress=False)
    add("Gaussian", model, capture, nulls=False, bank=drawn)
    twin = bl.controls.random_twin(model, seed=0)
    read = bl.Capture.from_texts(twin, texts, layers=around, max_length=LENGTH, progress=False)
    add("random initialization", twin, read, nulls=True)
    print(
        json.dumps(
            {
                "machine": platform.platform(),
                "torch": torch.__version__,
                "queries": queries,
                "processor_seconds": {states: round(seconds, 1) for states, (_, seconds) in found.items()},
                "rows": {states: rows for states, (rows, _) in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else QUERIES, tuple(map(int, sys.argv[2:])) or LAYERS)
