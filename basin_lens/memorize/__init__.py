"""Memorized texts: made, found, and told by what is known to tell them.

    make_canaries -> finetune -> extract, likelihood_baselines          recitation_passages: texts that may be memorized already

- `canaries.py`: pairs of fresh texts; a coin decides which is trained (`grammar.py`: our English)
- `finetuning.py`: the training: doses, filler, checkpoints; `load_tuned`
- `extraction.py`: greedy continuations against the truth
- `baselines.py`: loss, zlib, lower case, reference model, Min-K%, Min-K%++, probe, nearest memorized state, blind classifier
- `fork.py`: another continuation of the same prefix; damaged prefixes
- `recitation.py`: openings, later passages, shuffled words, paraphrases

Statistics, figures and verdicts are made by `basin_lens.studies.study_memorization`.
"""

from basin_lens.memorize.baselines import (
    LOSS_BASELINES,
    blind_classifier,
    folds,
    likelihood_baselines,
    linear_probe,
    nearest_memorized,
    sequence_states,
)
from basin_lens.memorize.canaries import DOSES, KINDS, fresh_texts, ids_of, make_canaries, pieces
from basin_lens.memorize.extraction import GUIDE_SHARE, extract, guide_labels
from basin_lens.memorize.finetuning import Recipe, Tuned, estimate, finetune, load_tuned
from basin_lens.memorize.fork import alternatives, recited, substituted, width
from basin_lens.memorize.recitation import CONDITIONS, long_enough, recitation_passages

__all__ = [
    "CONDITIONS",
    "DOSES",
    "GUIDE_SHARE",
    "KINDS",
    "LOSS_BASELINES",
    "Recipe",
    "Tuned",
    "alternatives",
    "blind_classifier",
    "estimate",
    "extract",
    "finetune",
    "folds",
    "fresh_texts",
    "guide_labels",
    "ids_of",
    "likelihood_baselines",
    "linear_probe",
    "load_tuned",
    "long_enough",
    "make_canaries",
    "nearest_memorized",
    "pieces",
    "recitation_passages",
    "recited",
    "sequence_states",
    "substituted",
    "width",
]
