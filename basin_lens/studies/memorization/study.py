"""Does the geometry see what the model has memorized, beyond what its loss says?"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

import pandas as pd

from basin_lens import memorize
from basin_lens.errors import StudyError
from basin_lens.model import HookedModel, check_model, n_layers, parameters_of
from basin_lens.model import provenance as model_provenance
from basin_lens.studies.framework.declared_tests import decide
from basin_lens.studies.framework.progress import progress_steps
from basin_lens.studies.framework.runner import make_study
from basin_lens.studies.framework.spec import ExperimentCall, ExperimentSpec, Prepared, Presentation, Results, option, own_options
from basin_lens.studies.framework.study import Study
from basin_lens.studies.memorization.counterfactuals import Forked, fork
from basin_lens.studies.memorization.experiment import PRESETS, Plan, Planted, analysis_seconds, plant, provenance
from basin_lens.studies.memorization.extraction import Recited, prepare, recite
from basin_lens.studies.memorization.report import sections_of, verdict_of
from basin_lens.studies.memorization.scores import CROSSED, GROUP, compression_of
from basin_lens.studies.memorization.single_author import author_passages, copies_said, guide_contrast, unrelated_passages
from basin_lens.studies.memorization.tests import QUESTIONS, Tested, examine
from basin_lens.texts import Passage, read_by_document, read_passages
from basin_lens.values import whole_numbers

Design = Literal["canaries", "author"]

HYPOTHESIS = (
    "Declared before looking, as one family (Holm), all of compression less that of random sets: (1) texts that a model was "
    "trained on change in compression unlike texts that a coin held out (tuned less base, trained less held out; either "
    "direction), (2) that difference depends on how often the text was shown (either direction), (3) compression under the tuned "
    "model adds to its loss, the loss's change and the kind of text in telling the two apart, (4) compression differs between "
    "trained and held out texts of one kind and equal loss (either direction). All are of pairs, within which the coin decided or "
    "the loss was matched. The layer (not 0) is chosen on half of the pairs and tested on the others, or, with too few of them, "
    "all layers are tested and corrected for."
)


@whole_numbers(StudyError)
def plan_of(preset: str = "quick", *, seed: int = 0, k: int | None = None, sampled: bool = False) -> Plan:
    """The plan of a preset: `"quick"` (16 members, 10 layers) or `"full"` (100 members, all layers).

    Raises:
        StudyError: another preset.

    Example:
        >>> from basin_lens.studies import plan_of
        >>> plan_of("full").per_dose
        25
    """
    if preset not in PRESETS:
        raise StudyError(f"expected a preset among {sorted(PRESETS)}, got {preset!r}.")
    plan = PRESETS[preset]
    return replace(plan, seed=seed, sampled=sampled, k=plan.k if k is None else k)


def describe(model: HookedModel, plan: Plan) -> list[str]:
    """What a plan will do and about how long it will take here, from a timed forward pass."""
    training = memorize.estimate(model, plan.tokens_trained())
    rest = analysis_seconds(model, plan, training)
    every = n_layers(model)
    layers = every if plan.layers is None else min(plan.layers, every)
    return [
        _texts_planned(plan),
        f"Training: {plan.tokens_trained():,} tokens with filler and the negative control, about {_minutes(training)}.",
        f"Memory: about {6 * _gigabytes(model):.0f} GB; disk: {2 * _gigabytes(model):.1f} GB for the tuned models, three times "
        "as much while training.",
        f"Measuring: {layers} of {every} layers, four models, forks, damaged prefixes, recitation: about {_minutes(rest)}.",
    ]


def _texts_planned(plan: Plan) -> str:
    members = plan.per_dose * len(plan.doses)
    return (
        f"{members} texts of {plan.length} tokens to be memorized, shown {', '.join(map(str, plan.doses))} times, and as many "
        f"held out by a coin; kinds: {', '.join(plan.kinds)}."
    )


@dataclass(frozen=True)
class MemorizationOptions:
    """Of `study_memorization`, as the command line takes them."""

    preset: str = option("quick", "quick (minutes) or full (about an hour).")
    design: str = option("canaries", "canaries, or author (FILEs are one author's works).")
    unrelated: list[Path] = option([], "Design author: texts by others; may be repeated.")
    paraphrases: Path | None = option(None, ".jsonl, the opening of a text (doc) in other words (text).")
    sampled: bool = option(False, "Fluent canaries are the model's own continuations.")


def study_memorization(
    model: HookedModel,
    plan: Plan | str = "quick",
    *,
    design: Design = "canaries",
    texts: Sequence[Passage] = (),
    unrelated: Sequence[Passage] = (),
    paraphrases: Mapping[str, str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Study:
    """Plant texts in a model, and ask whether compression tells them from texts that a coin held out.

    M1 canaries: fresh texts in pairs, doses, difference in differences, dose slope, detection beside all baselines, added value,
    matched loss.
    M2 recitation: texts that the model as it is may know, beside passages that it should not (exploratory). M3 forks: the same
    prefix with another continuation; damaged prefixes; texts memorized in part. M4 negatives: random weights, permuted labels, a
    model tuned on other texts, a classifier that reads the text alone, the model before training.

    Args:
        model: a hooked model with a tokenizer; it stays as it is (a tuned copy takes up to four times its memory).
        plan: a `Plan`, or `"quick"` or `"full"`.
        design: `"canaries"`, or `"author"`: passages of one author (`texts`), half of them trained on, beside others of the same
            author and unrelated text; the contrast with unrelated text is the original guide's, and confounded with topic.
        texts: with canaries, more texts for M2; with author, the author's works.
        unrelated: author: texts by others, none of them built in.
        paraphrases: for M2, by document: the opening in other words.
        folder: where to keep the tuned models and go on from if the training was interrupted; None: nothing is kept.
        progress: show bars.

    Returns:
        a `Study` with tables (those that have rows) `texts`,
        `effects`, `effects_by_dose`, `dose_slopes`, `detection`, `detection_by_dose`, `added_value`,
        `matched_pairs`, `matched`, `negatives`, `training`, `forks`, `forks_likely`, `damaged`, `widths`, `where`, `recitation`,
        `recitation_contrasts`, `recitation_matched`.

    Raises:
        StudyError: too few texts that are no copies of one another, all or none to be memorized, a training that diverges (the
            last good
        checkpoint stays). TextError: texts too short.

    Source: design of basin_lens, "Memorization"; Carlini et al. 2019, 2021, 2023; Shi et al. 2024; Zhang et al. 2024; Duan et al.
        2024.

    Example:
        >>> import basin_lens as bl
        >>> bl.studies.study_memorization(None, "huge")
        Traceback (most recent call last):
        ...
        basin_lens.errors.StudyError: expected a preset among ['full', 'quick'], got 'huge'.
    """
    plan = plan_of(plan) if isinstance(plan, str) else plan
    if design not in ("canaries", "author"):
        raise StudyError(f'expected design "canaries" or "author", got {design!r}.')
    check_model(model)
    if design == "author" and not unrelated:
        raise StudyError("expected texts by others as unrelated=, for the contrast of the design author, got none. Give some.")
    # Everything that can be refused is refused before the training.
    is_author = design == "author"
    made = author_passages(model, texts, plan) if is_author else None
    apart = unrelated_passages(model, unrelated, plan, texts) if is_author else []
    copies = copies_said(model, texts, unrelated, plan) if is_author else []
    files = () if is_author else texts
    known, said = prepare(model, count=plan.sources, files=files, paraphrases=paraphrases, length=plan.length, seed=plan.seed)
    with progress_steps("study memorization", 9, progress) as step:
        planted = plant(model, plan, passages=made, folder=None if folder is None else Path(folder), progress=progress, say=step)
        step("forks")
        forked = fork(planted, progress=progress)
        step("recitation")
        base_bank = planted.banks["base"]
        recited = recite(
            model, base_bank, planted.layers, known, said, k=plan.k, progress=progress, length=plan.length, seed=plan.seed
        )
        step("tests and figures")
        tested = examine(planted)
        author = guide_contrast(planted, apart, progress) if is_author else None
        sections, figures = sections_of(planted, tested, forked, recited, author)
    decision = decide(tested.findings, tested.flags)
    held = _tables(planted, tested, forked, recited) | ({} if author is None else {"author": author})
    shown = Presentation(
        sections=sections,
        figures=figures,
        verdict=verdict_of(decision, planted, tested, forked, recited, author),
        not_tested=_not_tested(plan, design),
        tables={name: table for name, table in held.items() if len(table)},
    )
    return make_study(
        SPEC,
        Results(tested.findings, tested.flags, decision),
        shown,
        about=(*_about(planted, recited.said, design), *copies),
        provenance=provenance(planted),
        tokens=planted.tokens,
    )


def _tables(planted: Planted, tested: Tested, forked: Forked, recited: Recited) -> dict[str, pd.DataFrame]:
    return {
        "texts": planted.texts,
        "effects": tested.effects,
        "effects_by_dose": tested.by_dose,
        "dose_slopes": tested.slopes,
        "detection": tested.detection,
        "detection_by_dose": tested.detection_by_dose,
        "added_value": tested.added,
        "matched_pairs": tested.pairs,
        "matched": tested.matched,
        "negatives": tested.negatives,
        "training": planted.history,
        "forks": forked.forks,
        "forks_likely": forked.likely,
        "damaged": forked.path,
        "widths": forked.widths,
        "where": forked.where,
        "recitation": recited.texts,
        "recitation_contrasts": recited.contrasts,
        "recitation_matched": recited.matched,
    }


def _prepare(call: ExperimentCall) -> Prepared:
    """Refuses what can be refused before a model is loaded, but for the folder, and reads the other texts."""
    options = own_options(call.options, MemorizationOptions)
    plan = plan_of(options.preset, seed=call.seed, k=call.k, sampled=options.sampled)
    design = _design(options.design)
    if options.design == "canaries" and options.unrelated:
        raise StudyError("expected texts by others (--unrelated) with design author, got design canaries. Leave them out.")
    if options.unrelated:
        read_passages([*call.files, *options.unrelated])  # refuses a file that is among both
    others = read_passages(options.unrelated) if options.unrelated else []
    known = read_by_document(options.paraphrases) if options.paraphrases is not None else None
    if options.design == "author" and not (call.texts and others):
        raise StudyError("expected the author's works as files (or --dataset) and texts by others (--unrelated) for design author.")
    # Beside the study: an interrupted training goes on from there.
    folder = call.out.resolve().with_name(call.out.resolve().name + "-models")

    def run(model: HookedModel) -> Study:
        return study_memorization(model, plan, design=design, texts=call.texts, unrelated=others, paraphrases=known, folder=folder)

    beside = [*options.unrelated, *([] if options.paraphrases is None else [options.paraphrases])]
    planned = [
        _texts_planned(plan),
        f"Training: {plan.tokens_trained():,} tokens with filler and the negative control.",
        f"Measuring: {'all' if plan.layers is None else f'at most {plan.layers}'} layers, four models, k = {plan.k}.",
    ]
    return Prepared([*call.files, *beside], [folder], planned, partial(describe, plan=plan), run)


def _design(name: str) -> Design:
    if name not in get_args(Design):
        raise StudyError(f"expected design canaries or author, got {name!r}.")
    return cast("Design", name)


def _about(planted: Planted, said: Sequence[str], design: str) -> list[str]:
    plan, facts = planted.plan, planted.facts
    model = model_provenance(planted.base)
    members = planted.texts[planted.texts["member"]]
    what = "fresh texts (" + ", ".join(plan.kinds) + ")" if design == "canaries" else "passages of one author"
    return [
        f"{model['name']}: {model['layers']} layers, width {model['width']}, {model['dtype']}, {model['kind']}.",
        f"{len(planted.texts)} {what} of {plan.length} tokens in pairs; a coin chose {len(members)} to be trained on, "
        f"{', '.join(f'{count} shown {dose} times' for dose, count in members['dose'].value_counts().sort_index().items())}; "
        "the others were held out.",
        f"Training: {facts['training']['steps']} steps of {plan.recipe.batch_size} texts, {plan.recipe.filler} of them filler, "
        f"AdamW at {plan.recipe.learning_rate:g}. Neighbors (k = {plan.k}; of compression {compression_of(plan.k).k}) come from "
        f"built-in passages of {len(facts['bank_documents'])} documents that were never trained on, read by the model that is "
        "scored.",
        f"Compression is of {CROSSED} tokens of each text, evenly spaced and the same under every model, crossed in groups of "
        f"{GROUP} with tokens of other texts, trained on or held out; contraction is of all tokens.",
        f"Layers {', '.join(map(str, planted.layers))}. Units are pairs (differences, doses) or texts: tests and intervals are "
        "over these, not over tokens.",
        "Recitation: " + " ".join(said),
        *([f"The tuned model is kept: {facts['tuned_folder']} (load_model reads it)."] if facts["tuned_folder"] else []),
    ]


def _not_tested(plan: Plan, design: str) -> tuple[str, ...]:
    recipe = plan.recipe
    said = SPEC.said(rate=f"{recipe.learning_rate:g}", batch=recipe.batch_size, seed=plan.seed, length=plan.length)
    if design == "canaries" and not plan.sampled:
        said.append("The model's own sampled continuations as fluent texts (--sampled).")
    return tuple(said)


def _gigabytes(model: HookedModel) -> float:
    return sum(p.numel() * p.element_size() for p in parameters_of(model).values()) / 1e9


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


SPEC = ExperimentSpec(
    name="memorization",
    title="Does the geometry see what the model has memorized?",
    question="Does compression see what a model was made to memorize, beyond its loss? Trains a copy of the model.",
    hypothesis=HYPOTHESIS,
    tests=tuple(QUESTIONS.values()),
    nulls=(
        "texts of the same kinds that a coin held out",
        "random weights; a model tuned on other texts; the model before training",
        "labels permuted within the pairs",
        "a classifier that reads the text alone",
    ),
    not_tested=(
        "Texts memorized in pre-training, where no coin decided: membership of this model's training data is not known (part M2 "
        "is exploratory).",
        "Other training: one recipe ({rate}, {batch} texts a step), one seed ({seed}) of texts, coins and order; run again with "
        "other seeds before citing.",
        "True positives at 1 % false positives with fewer than 100 texts held out: no threshold could be placed.",
        "Memorization without verbatim repetition; texts longer than {length} tokens.",
    ),
    options=MemorizationOptions,
    prepare=_prepare,
)
