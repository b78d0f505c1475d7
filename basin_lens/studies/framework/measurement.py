"""Texts measured once, for one study or several."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool

from basin_lens import tables
from basin_lens.analyzers import Analyzer, Compression, Contraction, Neighborhood, RawCompression, StateNorm, Surprisal
from basin_lens.analyzers.control import controls_of
from basin_lens.analyzers.crossed_table import PartnersFrom
from basin_lens.capture import Bank, Capture, check_layers, subset
from basin_lens.errors import StudyError
from basin_lens.model import HookedModel
from basin_lens.scoring import Request, score
from basin_lens.scoring.request import Analyzers, check_analyzers
from basin_lens.studies.framework.contrast import Contrast, contrasted, contrasted_first, refuse_contrast
from basin_lens.studies.framework.integrated import add_integrated_gradients
from basin_lens.studies.framework.measured_texts import NULL_TOKENS, Measured
from basin_lens.studies.framework.registry import STUDIES, specs_of_texts
from basin_lens.studies.framework.sequences import choose_sequences
from basin_lens.studies.framework.spec import ScoreOptions, StudySpec
from basin_lens.studies.framework.units import FEWEST_DOCUMENTS, FEWEST_UNITS, count_units
from basin_lens.texts import Passage, Texts
from basin_lens.transport import CONTEXTS, Context
from basin_lens.values import Facts, Layers, whole_numbers

COMPRESSION_TOKENS = 720  # of a layer: those that studies cross
# Of a sequence, before the next is taken: a level and six slopes in each take their share, and what is left must do for curves.
PER_SEQUENCE = 24


@whole_numbers(StudyError)
def measure(
    model: HookedModel,
    data: Capture | Texts,
    *,
    studies: Sequence[str] = STUDIES,
    analyzers: Analyzers = None,
    layers: Layers | Literal["all"] = None,
    k: int = 15,
    context: Context = "patched",
    bank: Bank = None,
    exclude: str = "sequence",
    unit: str = "document",
    contrast: Contrast | None = None,
    max_sequences: int | None = None,
    per_document: int = 2,
    max_length: int = 128,
    integrated: int = 8,
    compression_tokens: int | None = COMPRESSION_TOKENS,
    seed: int = 0,
    check: Callable[[Capture], None] | None = None,
    progress: bool = True,
) -> Measured:
    """Read texts and measure all that some studies need, once.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: as for `analyze`.
        studies: for which: `"importance", "linguistic", "layers", "codelength", "robustness"`, or `"mergeability"` and
            `"basins"`, which need no scores of their own; `"contrast"`, which needs a contrast.
        analyzers: your own, measured in the same run beside the studies' (with their nulls, as for `analyze`, at 512 tokens per
            layer). Every study shows them over depth and in the contrast asked for, as exploration: no declared test is of them.
        layers: block indices; None: ten, evenly spaced over the model (all if it has no more), eight for `"basins"`
            alone; `"all"`.
        k, context, exclude: of the compression scores; see `Compression`. The context is not `"native"`.
        bank: as for `analyze`; `"reference"` for a few short texts or many prompts of one template.
        unit: what is independent: `"document"`, `"sequence"`, or a label (the template of a prompt).
        contrast: two kinds of tokens or texts to compare in every study.
        max_sequences: at most so many sequences; None: all. Sequences under 12 tokens are passed over.
        per_document: with `max_sequences`, so many sequences of each document before the next is taken, documents in a seeded
            order. More documents make sounder tests; two sequences of one let neighbors be of the same document. Where that would
            leave fewer than 16 documents, one of each.
        max_length: tokens per sequence.
        integrated: so many sequences, of different documents, get integrated gradients (of the states that enter the middle
            block), which cost about a hundred forward passes each.
        compression_tokens: at most so many tokens per layer have compression and its nulls, because each costs dozens of passes of
            the block: 24 of one sequence, then of the next, each of another document first, and of all once more while any are
            left. None: all tokens; few tokens of a span, in long texts, may need it.
        seed: of every random choice.
        check: called with the texts chosen, before the model runs: what a study refuses.
        progress: show progress bars.

    Returns:
        a `Measured`, which every study takes in place of texts.

    Raises:
        StudyError: an unknown study, fewer than 6 units, a contrast that the texts do not have. Others as for `analyze`; all
            before the model runs.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> measured = bl.studies.measure(
        ...     model, list(reference_passages()), studies=["linguistic"], layers=[5], max_sequences=8, max_length=48,
        ...     progress=False)
        >>> measured.layers
        [5]
    """
    specs = specs_of_texts(*studies)
    if analyzers is not None:
        check_analyzers(analyzers)
    refuse_scoring([], context=context, exclude=exclude)
    count = max(spec.layers for spec in specs)
    planned = _planned(model, data, layers, count, max_length)
    if max_sequences is not None and max_sequences < per_document * min(len(set(planned.docs)), FEWEST_DOCUMENTS):
        per_document = 1
    capture, short = chosen_sequences(planned, max_sequences, per_document, seed, unit, max(spec.fewest_tokens for spec in specs))
    asked = _contrasted(specs, capture, contrast, compression_tokens, seed)
    asked, partners = _crossed_with(asked, capture, contrast, bank is not None and bank is not data)
    headline = headline_of(k, context, exclude, compression_tokens if asked is None else None, partners)
    wanted = _layers(model, layers, count) if layers is not None else capture.layers
    if check is not None:
        check(capture)
    every = analyzers_of(specs, headline, own := tuple(analyzers or ()))
    request = Request(every, layers=wanted, bank=bank, queries=asked, seed=seed, max_length=max_length, progress=progress)
    everyone = next((one for one in request.chosen if one == _contraction(headline)), None)  # the headline has looked at some
    run = score(model, capture, request, keep_neighbors_of=everyone)
    table, (facts,), integrated_texts = run.table, tables.provenance(run.table).values(), 0
    if integrated and any(spec.integrated_gradients for spec in specs):
        table, integrated_texts = add_integrated_gradients(model, capture, table, integrated, seed, progress)
    asked_for: Facts = {"k": k, "context": context, "exclude": exclude, "compression_tokens": compression_tokens}
    asked_for |= {"partners": partners, "unit": unit, "seed": seed, "max_sequences": max_sequences, "per_document": per_document}
    settings: Facts = {
        **asked_for,
        "max_length": capture.settings["max_length"],
        "sequences_given": len(planned.sequences),
        "sequences_too_short": short,
        "bank": facts.get("bank", {}).get("source") or ("the texts themselves" if bank is None else "another capture"),
        "integrated_gradients_sequences": integrated_texts,
        "contrast": contrast and contrast.title,
        "own_analyzers": [one.key for one in own],
    }
    if contrast is not None:
        table["contrast"] = contrast.values(table)
    frequency = {token: often / planned.n_rows for token, often in Counter(planned.row_token.tolist()).items()}
    return Measured(capture, planned, table, run.neighbors, bank, frequency, contrast, settings, tuple(studies), own)


def _contrasted(
    specs: Sequence[StudySpec], capture: Capture, contrast: Contrast | None, tokens: int | None, seed: int
) -> Bool[np.ndarray, " rows"] | None:
    """Where all studies are about a contrast, the tokens to measure: those of its two kinds first. None: as other studies choose.

    Raises:
        StudyError: a contrast that the texts do not have, or none where a study is about one.
    """
    if contrast is not None:
        refuse_contrast(capture, contrast)
        return contrasted_first(capture, contrast, tokens, seed) if all(spec.contrasted for spec in specs) else None
    if without := [spec.name for spec in specs if spec.contrasted]:
        raise StudyError(
            f"expected a contrast for the study {without[0]!r}, such as span:IO,S2 or memorized:True,False, got none. Say which "
            "two kinds are to be compared."
        )
    return None


def _crossed_with(
    asked: Bool[np.ndarray, " rows"] | None, capture: Capture, contrast: Contrast | None, outside: bool
) -> tuple[Bool[np.ndarray, " rows"] | None, PartnersFrom]:
    """The tokens to measure, and where their partners come from.

    Spans of prompts have the same neighbors at the same place, and groups of the texts' own tokens leave many of them out: with
    another bank, theirs come from it, and nobody else is crossed, at four times the rows.
    """
    if asked is None or contrast is None or contrast.by != "span" or not outside:
        return asked, "texts"
    return asked & contrasted(capture, contrast), "bank"


def refuse_scoring(passages: Sequence[Passage], *, context: str, exclude: str = "sequence", unit: str = "document") -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        StudyError: an unknown context, an exclude or a unit that no passage has as a label, or too few documents as units.
    """
    passing = [one for one in CONTEXTS if one != "native"]
    if context not in passing:
        raise StudyError(f"expected a context among {passing}, which pass displaced states, got {context!r}.")
    if exclude == "nothing":
        raise StudyError('expected exclude "self", "sequence", "document" or a label, got "nothing", which is for SeedCompression.')
    known = refuse_unit(passages, unit)
    if passages and exclude not in ("self", "sequence", "document", *known):
        raise StudyError(
            f'expected exclude "self", "sequence", "document" or a label of the texts, got {exclude!r}; labels: {known}.'
        )
    documents = len({index if one.doc is None else one.doc for index, one in enumerate(passages)})
    if passages and unit == "document" and documents < FEWEST_UNITS:
        raise StudyError(
            f"expected at least {FEWEST_UNITS} units (document), got {documents}: tokens of one text are not independent. "
            "Add texts, or give each its own document."
        )


def refuse_unit(passages: Sequence[Passage], unit: str) -> list[str]:
    """Labels of the texts, of which the unit is one if it is neither the document nor the sequence.

    Raises:
        StudyError: it is not.
    """
    known = sorted({name for passage in passages for name in passage.labels})
    if unit not in ("document", "sequence", *known):
        raise StudyError(f'expected unit "document", "sequence" or a label of the texts, got {unit!r}; labels: {known}.')
    return known


def spaced_layers(n_layers: int, count: int = 10) -> list[int]:
    """So many layers, evenly spaced from the first to the last; all if there are no more."""
    return sorted({round(place) for place in np.linspace(0, n_layers - 1, min(count, n_layers)).tolist()})


def _layers(model: HookedModel, layers: Layers | Literal["all"], count: int) -> tuple[int, ...]:
    every = check_layers(model, None)
    if layers is None:
        return tuple(spaced_layers(len(every), count))
    return every if isinstance(layers, str) and layers == "all" else check_layers(model, layers)


def _planned(model: HookedModel, data: Capture | Texts, layers: Layers | Literal["all"], count: int, max_length: int) -> Capture:
    """All sequences given, unread unless a capture was given."""
    if isinstance(data, Capture):
        return data
    return Capture.plan(model, data, layers=_layers(model, layers, count), max_length=max_length)


def chosen_sequences(
    planned: Capture, most: int | None, per_document: int, seed: int, unit: str, fewest: int
) -> tuple[Capture, int]:
    """The sequences to measure, and how many were too short.

    Args:
        planned: all of them.
        most: at most so many; None: all.
        per_document, seed: as for `measure`.
        unit: of which there must be enough.
        fewest: tokens of a sequence.

    Raises:
        StudyError: none that is long enough, or too few units.
    """
    chosen, short = choose_sequences(planned, most, per_document, seed, fewest)
    if not chosen:
        raise StudyError(f"expected texts with sequences of {fewest} tokens, got 0 of {len(planned.sequences)}. Use longer texts.")
    capture = planned if chosen == list(range(len(planned.sequences))) else subset(planned, chosen)
    units = count_units(capture, unit)
    if units < FEWEST_UNITS:
        raise StudyError(
            f"expected at least {FEWEST_UNITS} units ({unit}) with sequences of {fewest} tokens, got {units}: "
            "tokens of one text are not independent. Add texts, or give each its own document."
        )
    return capture, short


def headline_of(
    k: int, context: Context, exclude: str, tokens: int | None = COMPRESSION_TOKENS, partners: PartnersFrom = "texts"
) -> Compression:
    """The headline score, of at most so many tokens per layer."""
    per_sequence = None if tokens is None else PER_SEQUENCE
    return Compression(k=k, context=context, exclude=exclude, queries=tokens, per_sequence=per_sequence, partners=partners)


def _contraction(headline: Compression) -> Contraction:
    return Contraction(k=headline.k, exclude=headline.exclude, context=headline.context)


def analyzers_of(specs: Sequence[StudySpec], headline: Compression, own: Sequence[Analyzer] = ()) -> list[Analyzer]:
    """Those of every study, the headline first, what the studies want besides, and the caller's own with their nulls, each once."""
    k, context, exclude = headline.k, headline.context, headline.exclude
    answer: list[Analyzer] = [Surprisal(), StateNorm()]
    if any(spec.shared_scores for spec in specs):
        answer = [
            headline,
            _contraction(headline),
            RawCompression(k=k, exclude=exclude),
            Neighborhood(k=k, exclude=exclude),
            *answer,
        ]
    for spec in specs:
        answer += [one for one in spec.analyzers(ScoreOptions(k, context, exclude, headline)) if one not in answer]
    return [*answer, *(one for one in (*own, *controls_of(own, queries=NULL_TOKENS)) if one not in answer)]
