"""Compression of all tokens that can be merged, where the run has it of a sample."""

import pandas as pd

from basin_lens import tables
from basin_lens.analyzers import Compression
from basin_lens.scoring import analyze
from basin_lens.studies.framework.measured_texts import Measured
from basin_lens.studies.framework.spec import Task

GROUP = 3  # tokens crossed with one another: the cheapest there is, for all tokens are crossed


def is_sampled(measured: Measured) -> bool:
    """Whether the run has compression of a sample of its tokens alone."""
    return measured.settings["compression_tokens"] is not None


def with_all_compressed(task: Task, window: int) -> pd.DataFrame:
    """The measured tokens, all that can be merged with compression: a policy that ranks tokens needs each of them.

    Where the run measured a sample, compression is measured again, in groups of `GROUP` and beside random sets alone.
    """
    measured = task.measured
    if not is_sampled(measured):
        return measured.table
    task.step("compression of all tokens that can be merged")
    own, capture = measured.settings, measured.capture
    able = (capture.row_pos > 0) & (capture.row_pos < capture.lengths[capture.row_seq] - window)
    score = Compression(k=own["k"], context=own["context"], exclude=own["exclude"], group=GROUP, nulls=("random_sets",))
    found = analyze(
        task.model,
        capture,
        [score],
        layers=measured.layers,
        bank=measured.bank,
        queries=able,
        seed=measured.seed,
        progress=task.progress,
    )
    # Of the sample, and so beside another score than the one that is now in its place.
    rest = measured.table.drop(columns="compression_isotropic", errors="ignore")
    answer = tables.assign(rest, **{column.name: found[column.name].to_numpy() for column in score.columns})
    return tables.with_provenance(answer, measured.table)
