"""A policy that ranks tokens needs the score of each: the study of mergeability measures what the run has of a sample."""

import pytest

import basin_lens as bl
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.spec import Task
from basin_lens.studies.mergeability.all_tokens import GROUP, with_all_compressed
from tests.studies.planted import made_text

LENGTH, WINDOW = 40, 4


def measured(model, tokens):
    texts = [made_text(36, seed, f"doc-{seed}") for seed in range(8)]
    return bl.studies.measure(
        model, texts, studies=["mergeability"], layers=[1, 2], max_length=LENGTH, k=5, compression_tokens=tokens, progress=False
    )


@pytest.mark.slow
def test_all_tokens_are_crossed_where_the_run_has_a_sample(llama):
    few, steps = measured(llama, 40), []
    made = with_all_compressed(Task(llama, few, None, steps.append, False), WINDOW)
    assert len(steps) == 1 and bl.tables.provenance(made) == bl.tables.provenance(few.table)
    lengths = few.capture.lengths[few.capture.row_seq].numpy()
    able = (made.pos > 0) & (made.pos < [*lengths - WINDOW, *lengths - WINDOW])
    assert few.table[HEADLINE].notna().sum() <= 2 * 40
    assert made[HEADLINE][able].notna().mean() > 0.8 and made[HEADLINE][~able].isna().all()
    assert "compression_isotropic" not in made and made.contraction.equals(few.table.contraction)
    own = bl.analyzers.Compression(k=5, group=GROUP, nulls=("random_sets",))
    mask = able[made.layer == 1].to_numpy().copy()
    again = bl.analyze(llama, few.capture, [own], layers=[1, 2], queries=mask, progress=False)
    assert made[HEADLINE].equals(again[HEADLINE])


@pytest.mark.slow
def test_what_the_run_has_of_all_tokens_is_taken_as_it_is(llama):
    every, steps = measured(llama, None), []
    assert with_all_compressed(Task(llama, every, None, steps.append, False), WINDOW) is every.table and steps == []
