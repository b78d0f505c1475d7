"""What designs of the crossed table cost and how reliable they are: tokens in a group, neighbors, and where the scores come from.

    NLTK_DATA=... python tests/benchmarks/crossed_costs.py [QUERIES] [LAYER ...]

50 files of the Penn Treebank sample (up to 128 tokens of each), SmolLM2-135M, patched. Of each design (group, k) and layer: processor
seconds for each token (without its nulls), reliability over halves of the displacements and of the partners, SD over tokens beside the
SD of isotropic displacements of the same groups. Wanted: the cheapest design whose reliability reaches .7 where the SD is at least
three times that of the isotropic null. Times are ratios to the first design, in the same run. The last line is JSON.
"""

import json
import platform
import sys
import time

import torch

import basin_lens as bl
from basin_lens import tables

LAYERS, QUERIES, DOCUMENTS, LENGTH = (2, 8, 13, 18, 26), 200, 50, 128
DESIGNS = ((3, 8), (3, 15), (4, 8), (4, 15), (6, 8))  # tokens in a group, neighbors (each with both signs)


def measured(model, capture, layers, queries, group, k):
    """Rows of one design, by layer, and processor seconds for each token without the nulls."""

    def run(*, nulls):
        score = bl.analyzers.Compression(group=group, k=k, queries=queries, nulls=nulls)
        return bl.analyze(model, capture, [score], layers=layers, progress=False)

    begun = time.process_time()
    run(nulls=False)
    seconds = time.process_time() - begun
    table = run(nulls=("isotropic",))
    (facts,) = tables.provenance(table).values()
    rows = []
    for layer in layers:
        here = table[table["layer"] == layer]
        about = facts["groups"][str(layer)]["compression"]
        rows.append(
            {
                "group": group,
                "k": k,
                "layer": layer,
                "tokens": int(here["compression"].notna().sum()),
                "halves": about["reliability_over_displacements"]["compression"],
                "partners": about["reliability_over_partners"]["compression"],
                "sd": float(here["compression"].std()),
                "sd_isotropic": float(here["compression_isotropic"].std()),
            }
        )
    return rows, seconds / sum(row["tokens"] for row in rows)


def main(queries, layers):
    torch.set_num_threads(1)
    model = bl.load_model()
    texts = bl.texts.read_dataset("nltk:treebank", max_passages=DOCUMENTS)
    around = sorted({layer + step for layer in layers for step in (0, 1)} & set(range(30)))
    capture = bl.Capture.from_texts(model, texts, layers=around, max_length=LENGTH, progress=False)
    measured(model, capture, layers[:1], 24, *DESIGNS[0])  # whatever is made once
    print("| group | k | rows a token | seconds a token, ratio | layer | halves | partners | SD | SD / SD isotropic | tokens |")
    print("| --- " * 10 + "|")
    found, first = [], None
    for group, k in DESIGNS:
        rows, seconds = measured(model, capture, layers, queries, group, k)
        first = first or seconds
        for row in rows:
            row["seconds_a_token"] = seconds
            reliable = [f"{row[name]:.2f}" if row[name] is not None else "-" for name in ("halves", "partners")]
            print(
                f"| {group} | {k} | {2 * k * group} | {seconds / first:.2f} | {row['layer']} | {reliable[0]} | {reliable[1]} | "
                f"{row['sd']:.4f} | {row['sd'] / row['sd_isotropic']:.1f} | {row['tokens']} |",
                flush=True,
            )
        found += rows
    print(json.dumps({"machine": platform.platform(), "torch": torch.__version__, "queries": queries, "rows": found}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else QUERIES, tuple(map(int, sys.argv[2:])) or LAYERS)
