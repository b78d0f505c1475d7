"""A model made to memorize some of many fresh texts, and what is measured on all of them before and after."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import pandas as pd
import torch

from basin_lens import memorize, tables
from basin_lens.analyzers import (
    Agreement,
    Analyzer,
    Neighborhood,
    RawCompression,
    StandardizedLikelihood,
    StateNorm,
    Surprisal,
)
from basin_lens.capture import Capture
from basin_lens.controls import random_twin
from basin_lens.errors import StudyError, TextError
from basin_lens.model import HookedModel, full_name, n_context, n_layers, needed_tokenizer, uses_bos
from basin_lens.studies.framework.measurement import spaced_layers
from basin_lens.studies.framework.progress import Steps
from basin_lens.studies.memorization.baseline_columns import add_fitted_baselines, text_baselines
from basin_lens.studies.memorization.scores import (
    BEFORE,
    CHANGES,
    CROSSED,
    GROUP,
    SCORES,
    by_sequence,
    compression_of,
    measure_texts,
    with_changes,
)
from basin_lens.texts import Passage, reference_passages
from basin_lens.texts.copies import copied_passages
from basin_lens.values import Facts, Whole, whole_fields

PROMPT = TARGET = 32  # tokens, of the extraction test
FEWEST_PER_CLASS = 5  # texts, one for each fold
FEWEST_PER_DOSE = 4  # members of a dose against the texts held out
FEWEST_NEIGHBORS = 4  # that compression can be measured with


@dataclass(frozen=True)
class Plan:
    """What is planted and how it is measured.

    Args:
        per_dose: pairs of texts for each dose.
        doses: how often the trained one of a pair is shown.
        kinds: of canaries.
        length: tokens of a text.
        layers: how many, evenly spaced; None: all.
        forks: members of the highest doses whose prefixes are forked and damaged.
        sources: texts for the recitation part, beside the user's own.
        others: fresh texts that the negative control is trained on in place of the members, each `other_dose` times.
        k: neighbors; of compression, at most 8 of them.
        sampled: whether fluent canaries are the model's own continuations.
        recipe: of the training.
        seed: of every random choice; the recipe's own gives way to it.

    Raises:
        StudyError: a plan that could not be tested.
    """

    per_dose: Whole = 4
    doses: tuple[int, ...] = memorize.DOSES
    kinds: tuple[str, ...] = memorize.KINDS
    length: Whole = 64
    layers: Whole | None = 10
    forks: Whole = 6
    sources: Whole = 9
    others: Whole = 6
    other_dose: Whole = 8
    k: Whole = 15
    sampled: bool = False
    recipe: memorize.Recipe = field(default_factory=memorize.Recipe)
    seed: Whole = 0

    def __post_init__(self) -> None:
        whole_fields(self, StudyError)
        counts = (self.forks, self.sources, self.others, self.other_dose, self.k - FEWEST_NEIGHBORS + 1)
        few = self.per_dose < FEWEST_PER_DOSE or self.per_dose * len(self.doses) < FEWEST_PER_CLASS
        if few or min(counts) < 1 or self.length < 8 or min(self.doses, default=0) < 1 or len(set(self.doses)) < len(self.doses):
            raise StudyError(
                f"expected at least {FEWEST_PER_DOSE} pairs per dose and {FEWEST_PER_CLASS} in all, different doses of at "
                "least 1, texts of at least 8 "
                f"tokens, at least one fork, source, other text and show, and {FEWEST_NEIGHBORS} neighbors, got {self}. Plan more."
            )

    @property
    def prompt(self) -> int:
        """Tokens of the prompt in the extraction test: 32, or half of a text that is shorter than 64."""
        return min(PROMPT, self.length // 2)

    @property
    def target(self) -> int:
        """Tokens to be extracted behind it."""
        return min(TARGET, self.length - self.prompt)

    def tokens_trained(self) -> int:
        """Tokens of all training steps, filler and negative control included."""
        shown = self.per_dose * sum(self.doses) + self.others * self.other_dose
        return int(shown * self.length * self.recipe.batch_size / (self.recipe.batch_size - self.recipe.filler))


PRESETS = {
    "quick": Plan(),
    # 100 members and 100 texts held out: the fewest for a true-positive rate at 1 % false positives.
    "full": Plan(per_dose=25, layers=None, forks=24, sources=60, others=24, other_dose=16),
}


@dataclass(frozen=True)
class Planted:
    """All that was measured.

    `texts`: one row per text: labels, baselines under the tuned model (`log_likelihood`, ...), `base_log_likelihood`, extraction,
    probe, nearest memorized state, blind classifier. `tokens`: one row per (layer, token) of the tuned model with `<score>_base`
    and `<score>_change` (tuned less base); compression of some tokens of each text. `sequences`: means of its scores by (layer,
    text), baselines beside them.
    `random_twin`, `other_tuned`: the same texts as `sequences` under a model with random weights, and one tuned on other texts.
    `states`: mean states that enter block `probe_layer` of the tuned model, a row per text.
    """

    plan: Plan
    passages: tuple[Passage, ...]
    base: HookedModel
    tuned: HookedModel
    bank: tuple[Passage, ...]
    banks: dict[str, Capture]
    history: pd.DataFrame
    texts: pd.DataFrame
    tokens: pd.DataFrame
    sequences: pd.DataFrame
    random_twin: pd.DataFrame
    other_tuned: pd.DataFrame
    layers: tuple[int, ...]
    probe_layer: int
    states: np.ndarray
    facts: Facts


class _Reading(TypedDict):
    """Options that every measurement shares."""

    layers: tuple[int, ...]
    seed: int
    progress: bool


class _Training(TypedDict):
    """Options that every training shares."""

    filler: Sequence[Passage]
    recipe: memorize.Recipe
    max_length: int
    progress: bool


def plant(
    model: HookedModel,
    plan: Plan,
    *,
    passages: Sequence[Passage] | None = None,
    folder: Path | None = None,
    progress: bool = True,
    say: Steps | None = None,
) -> Planted:
    """Make the texts, train on the members, and measure.

    Args:
        model: a hooked model.
        plan: what to plant.
        passages: texts in place of canaries, with their labels.
        folder: for checkpoints and the tuned models; a training that was interrupted or done there is taken up.
        progress: show bars.
        say: called with each step's name.

    Raises:
        StudyError: fewer than 5 members or texts held out, or none of either; a context too short for the plan. Others as for
            `finetune`.
    """
    say = say or (lambda _step: None)
    say("texts")
    made = _texts_to_plant(model, plan, passages)
    members = [p for p in made if p.labels["member"]]
    bank, filler = _bank_and_filler()
    longest, layers = plan.length + 1, _layers(model, plan)  # BOS
    _refuse_texts(model, plan, made, longest)
    # Before the training: what cannot be measured is refused before the long work.
    say("before training")
    shared: _Reading = {"layers": layers, "seed": plan.seed, "progress": progress}
    banks = {"base": bank_of(model, bank, layers, longest)}
    planned = Capture.plan(model, made, layers=layers, max_length=longest)
    before = measure_texts(model, planned, _analyzers(plan.k), k=plan.k, bank=banks["base"], **shared)
    del planned  # the states of all layers
    say("training")
    recipe = replace(plan.recipe, seed=plan.seed)
    options: _Training = {"filler": filler, "recipe": recipe, "max_length": longest, "progress": progress}
    begun = time.perf_counter()
    tuned = _tuned(model, members, [int(cast("int", p.labels["dose"])) for p in members], folder, "tuned", options)
    seconds = time.perf_counter() - begun
    say("after training")
    banks["tuned"] = bank_of(tuned.model, bank, layers, longest)
    capture = Capture.from_texts(tuned.model, made, layers=layers, max_length=longest, progress=progress)
    after = measure_texts(tuned.model, capture, _analyzers(plan.k), k=plan.k, bank=banks["tuned"], **shared)
    tokens = with_changes(before, after, SCORES)

    say("baselines and extraction")
    texts = text_baselines(tuned.model, made, before, after, longest, (plan.prompt, plan.target), progress)
    probe_layer = layers[len(layers) // 2]
    states = add_fitted_baselines(texts, made, capture, probe_layer, plan.seed)

    say("negatives")
    untaught, elsewhere = _measured_negatives(model, plan, made, bank, longest, folder, shared, options)
    return Planted(
        plan,
        tuple(made),
        model,
        tuned.model,
        tuple(bank),
        banks,
        pd.DataFrame(tuned.history),
        texts,
        tokens,
        by_sequence(tokens, (*SCORES, *CHANGES, *BEFORE), texts),
        by_sequence(untaught, SCORES, texts),
        by_sequence(with_changes(before, elsewhere, SCORES), (*SCORES, *CHANGES), texts),
        layers,
        probe_layer,
        states,
        _facts(plan, tuned.facts, seconds, bank, filler, folder),
    )


def _layers(model: HookedModel, plan: Plan) -> tuple[int, ...]:
    every = n_layers(model)
    return tuple(range(every) if plan.layers is None else spaced_layers(every, plan.layers))


def _measured_negatives(
    model: HookedModel,
    plan: Plan,
    made: Sequence[Passage],
    bank: Sequence[Passage],
    longest: int,
    folder: Path | None,
    shared: _Reading,
    options: _Training,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The texts under random weights, and under a model that was tuned on other texts."""
    layers = shared["layers"]

    def measured(other: HookedModel) -> pd.DataFrame:
        planned = Capture.plan(other, made, layers=layers, max_length=longest)
        return measure_texts(other, planned, k=plan.k, bank=bank_of(other, bank, layers, longest), **shared)

    twin = random_twin(model, seed=plan.seed)
    untaught = measured(twin)
    del twin  # as large as the model
    others = _others(model, plan, made)
    apart = _tuned(model, others, [plan.other_dose] * len(others), folder, "tuned-on-others", options)
    return untaught, measured(apart.model)


def _facts(
    plan: Plan, training: Facts, seconds: float, bank: Sequence[Passage], filler: Sequence[Passage], folder: Path | None
) -> Facts:
    return {
        "plan": _plain(plan),
        "training": training,
        "training_seconds": seconds,
        "bank_documents": sorted({str(p.doc) for p in bank}),
        "filler_documents": sorted({str(p.doc) for p in filler}),
        "tuned_folder": None if folder is None else str((folder / "tuned").resolve()),
    }


def _texts_to_plant(model: HookedModel, plan: Plan, passages: Sequence[Passage] | None) -> list[Passage]:
    """The passages given, or canaries."""
    made = (
        list(passages)
        if passages is not None
        else memorize.make_canaries(
            model,
            per_dose=plan.per_dose,
            doses=plan.doses,
            kinds=plan.kinds,
            length=plan.length,
            sampled=plan.sampled,
            seed=plan.seed,
        )
    )
    check_classes([bool(p.labels["member"]) for p in made])
    return made


def _bank_and_filler() -> tuple[list[Passage], list[Passage]]:
    """Built-in passages that neighbors come from, which are never trained on, and passages that training mixes in."""
    docs = sorted({str(p.doc) for p in reference_passages()})
    halves: tuple[list[Passage], list[Passage]] = ([], [])
    for passage in reference_passages():
        halves[docs.index(str(passage.doc)) % 2].append(passage)
    return halves


def _refuse_texts(model: HookedModel, plan: Plan, made: Sequence[Passage], longest: int) -> None:
    # Spliced texts hold a whole text and a third of two others, whose tokens may split anew where they are cut.
    if n_context(model) < 2 * longest:
        raise StudyError(
            f"expected a context of at least {2 * longest} tokens for texts of {plan.length}, got "
            f"{n_context(model)}. Plan shorter ones."
        )
    refuse_built_in(made, model)
    refuse_copies(made, model)


def _analyzers(k: int) -> list[Analyzer]:
    """Beside compression and contraction."""
    return [
        RawCompression(k=k),
        Neighborhood(k=k),
        Surprisal(),
        Agreement(),
        StandardizedLikelihood(),
        StateNorm(),
    ]


def refuse_built_in(texts: Sequence[Passage], model: HookedModel) -> None:
    """Refuse texts that neighbors or filler come from, and copies of them.

    Raises:
        StudyError: one is among them.
    """
    if copied := copied_passages(model, list(texts), reference_passages()):
        raise StudyError(
            f"expected texts other than the built-in ones, which neighbors and filler come from, got {len(copied)} of them or "
            f"copies, nearly or in full: {texts[copied[0]].text[:40]!r}. Give others."
        )


def refuse_copies(texts: Sequence[Passage], model: HookedModel) -> None:
    """Refuse texts held out that are copies of texts to be trained on.

    Raises:
        StudyError: there are some.
    """
    members, held = ([p for p in texts if bool(p.labels["member"]) == side] for side in (True, False))
    if copied := copied_passages(model, held, members):
        raise StudyError(
            f"expected texts held out that are not trained on, got {len(copied)} of {len(held)} that are copies of texts to be "
            f"memorized, nearly or in full: {held[copied[0]].text[:40]!r}. Leave them out."
        )


def check_classes(member: Sequence[bool]) -> None:
    """Refuse texts that are all memorized, none of them, or too few.

    Raises:
        StudyError: see there.
    """
    count = sum(member)
    if count in (0, len(member)):
        raise StudyError(
            f"expected texts to be memorized and texts held out, got {count} and {len(member) - count}. Nothing could be "
            "compared: label both."
        )
    if min(count, len(member) - count) < FEWEST_PER_CLASS:
        raise StudyError(
            f"expected at least {FEWEST_PER_CLASS} texts to be memorized and as many held out, got {count} and "
            f"{len(member) - count}. Plant more (per_dose), or give "
            "more texts."
        )


def analysis_seconds(model: HookedModel, plan: Plan, training: float) -> float:
    """Seconds of everything but the training: about as much as a pass of all neighbors and of all crossed clouds."""
    every = n_layers(model)
    layers = every if plan.layers is None else min(plan.layers, every)
    texts = 2 * plan.per_dose * len(plan.doses)
    # Four models; damaged prefixes, spliced texts and recitation behind them.
    scored = 4 * texts + 6 * plan.forks + 3 * plan.forks + 6 * plan.sources
    rows = plan.length * (plan.k + 1) + CROSSED * 4 * GROUP * compression_of(plan.k).k  # of a text: neighbors, and what is crossed
    per_token = training / plan.tokens_trained() / 3.5
    return 60 + per_token * scored * rows * layers / every


def _tuned(
    model: HookedModel, passages: Sequence[Passage], doses: Sequence[int], folder: Path | None, name: str, options: _Training
) -> memorize.Tuned:
    """Train, or take up a training of the very same plan in the folder."""
    place = None if folder is None else folder / name
    return memorize.finetune(model, list(passages), list(doses), folder=place, name=f"{full_name(model)}, {name}", **options)


def bank_of(model: HookedModel, passages: Sequence[Passage], layers: Sequence[int], length: int) -> Capture:
    """Where neighbors come from: passages that are never trained on, cut as long as the texts."""
    # As long as the texts: position goes into every state.
    return Capture.from_texts(model, list(passages), layers=layers, max_length=length, progress=False)


def _others(model: HookedModel, plan: Plan, made: Sequence[Passage]) -> list[Passage]:
    """Fresh texts, none of them among those made."""
    known = {p.text for p in made}
    texts: list[str] = []
    for place, kind in enumerate(plan.kinds):
        count = len(range(place, plan.others, len(plan.kinds)))
        texts += [t for t in memorize.fresh_texts(model, kind, count, plan.length, seed=plan.seed + 1_000_003) if t not in known]
    if not texts:
        raise TextError("expected fresh texts for the negative control, got none. Plant more of them (others).")
    return [Passage(text, doc=f"other-{i}") for i, text in enumerate(texts)]


def _plain(plan: Plan) -> Facts:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(plan).items()}


def provenance(planted: Planted) -> Facts:
    """Of the tuned model's run, with the plan and the training in it."""
    return {run: {**facts, "study": planted.facts} for run, facts in tables.provenance(planted.tokens).items()}


def tensor_of(planted: Planted, texts: Sequence[int]) -> torch.Tensor:
    """Token ids of some texts, BOS included."""
    bos = uses_bos(planted.base, None)
    tokenizer = needed_tokenizer(planted.base)
    head = [] if bos is None else [bos]
    return torch.tensor(np.array([[*head, *memorize.ids_of(tokenizer, planted.passages[i].text)] for i in texts]))
