"""Texts measured once, for one study or several."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from basin_lens import stats, tables
from basin_lens.analyzers import (
    Analyzer,
    AngularContraction,
    AttentionReceived,
    AttentionRollout,
    Compression,
    Contraction,
    EffectiveRankChange,
    Erasure,
    GradientNorm,
    GradientTimesActivation,
    IntegratedGradients,
    LocalDimension,
    MatrixEntropy,
    Neighborhood,
    NeighborOverlap,
    RawCompression,
    StateNorm,
    Surprisal,
    SymmetricContraction,
    ValueWeightedAttention,
)
from basin_lens.analyzers.control import controls_of
from basin_lens.capture import Capture, check_layers, subset
from basin_lens.errors import StudyError
from basin_lens.scoring import analyze, score
from basin_lens.scoring.run import KeptNeighbors
from basin_lens.scoring.token_rows import row_facts
from basin_lens.texts import Passage
from basin_lens.transport import CONTEXTS, Context
from basin_lens.values import whole_numbers

# The scores that every study looks at, the headline first.
SCORES = ("compression", "compression_other_token", "contraction", "raw_compression")
STUDIES = ("importance", "linguistic", "layers", "codelength", "robustness")
ALONE = ("mergeability",)  # measured like the others, but too slow to be part of "all"
TAGGERS = ("auto", "gold", "nltk", "spacy")
_CONTROLLED = 2048  # tokens per layer on which the controls of the headline are measured
# Measures of importance that cost no more than the pass that reads the texts and its gradient; and all but integrated gradients.
QUICK_IMPORTANCE: tuple[Analyzer, ...] = (AttentionReceived(), GradientNorm())
IMPORTANCE: tuple[Analyzer, ...] = (
    AttentionReceived(), AttentionReceived(sink=False), AttentionReceived(normalize=False), AttentionRollout(),
    AttentionRollout(sink=False), ValueWeightedAttention(), GradientNorm(), GradientNorm(target="last_logit"),
    GradientTimesActivation(), Erasure(),
)  # fmt: skip
FEWEST_UNITS = 6  # the statistics refuse fewer
FEWEST_DOCUMENTS = 16  # with fewer, documents cannot be halved into some that choose and some that test
FEWEST_TOKENS = 12  # shorter ones have too few scored tokens for a correlation; prompts of a template can be that short


@dataclass(frozen=True)
class Contrast:
    """Two kinds of tokens or texts to be compared: values of a label, or names of spans (`by="span"`).

    Args:
        by: `"span"`, or a label of the passages.
        first, second: two span names, or two values of the label (compared as text, so that `"True"` is True). The difference is first - second.

    Example:
        >>> import basin_lens as bl
        >>> bl.studies.Contrast("span", "IO", "S").title
        'span: IO - S'
    """

    by: str
    first: str
    second: str

    @property
    def title(self) -> str:
        """What is compared, in words."""
        return f"{self.by}: {self.first} - {self.second}"

    def values(self, table: pd.DataFrame) -> "pd.Series[Any]":
        """Each row's side: `first`, `second`, or None (neither, or spans of both).

        Raises:
            StudyError: a label that the table lacks, or a side without tokens.
        """
        if self.by not in table.columns:
            raise StudyError(f"expected a label of the texts or span as contrast, got {self.by!r}. Give the passages that label.")
        held = table[self.by]
        found = _names if self.by == "span" else _spellings
        one, two = (
            held.map(lambda value, side=side: side in found(value, side)).astype(bool) for side in (self.first, self.second)
        )
        side = pd.Series([None] * len(table), index=table.index, dtype=object)
        side[one & ~two], side[two & ~one] = self.first, self.second
        for name in (self.first, self.second):
            if not (side == name).any():
                there = sorted({str(v) for v in held.dropna().unique() if str(v)})[:8]
                raise StudyError(f"expected tokens with {self.by} = {name!r} for the contrast, got none; there are {there}.")
        return side


def _names(found: Any, side: str) -> set[str]:
    """The span asked for, if it is among those of a token, which the table joins by plus signs; a name may hold one itself."""
    return {side} if isinstance(found, str) and f"+{side}+" in f"+{found}+" else set()


def _spellings(found: Any, _side: str) -> set[str]:
    """A label's value as text. pandas makes 1 into 1.0 where another text has no value."""
    if found is None or (isinstance(found, float) and np.isnan(found)):
        return set()
    return {str(found)} | ({str(int(found))} if isinstance(found, float) and found.is_integer() else set())


# Columns that studies put beside the labels, in place of one of that name.
_MADE = frozenset(("contrast", "integrated_gradients", "kind", "noun_verb", "tag", "word", "word_text"))


@dataclass(frozen=True)
class Measured:
    """Texts, what was measured on them, and how: what a study takes in place of texts.

    `table`: one row per (layer, token), from `analyze`, with a column `contrast` if one was asked for. `neighbors`: those of the headline
    score. `bank`: as for `analyze`. `frequency`: share of each token id among all tokens of the texts given, whether measured or not.
    `settings`: plain JSON. `studies`: those whose scores are there. `planned`: all sequences given, unread unless a capture was given.
    """

    capture: Capture
    planned: Capture
    table: pd.DataFrame
    neighbors: KeptNeighbors | None
    bank: Any
    frequency: Mapping[int, float]
    contrast: Contrast | None
    settings: dict[str, Any]
    studies: tuple[str, ...]

    @property
    def unit(self) -> str:
        """What statistics take as independent: `"document"`, `"sequence"` or a label."""
        return str(self.settings["unit"])

    @property
    def seed(self) -> int:
        """Of every random choice."""
        return int(self.settings["seed"])

    @property
    def layers(self) -> list[int]:
        """Layers measured, ascending."""
        return sorted(int(layer) for layer in self.table["layer"].unique())

    @property
    def n_units(self) -> int:
        """How many independent units there are."""
        return count_units(self.capture, self.unit)


@whole_numbers(StudyError)
def measure(
    model: Any,
    data: Any,
    *,
    studies: Sequence[str] = STUDIES,
    layers: Any = None,
    k: int = 15,
    context: Context = "patched",
    bank: Any = None,
    exclude: str = "sequence",
    unit: str = "document",
    contrast: Contrast | None = None,
    max_sequences: int | None = None,
    per_document: int = 2,
    max_length: int = 128,
    integrated: int = 8,
    seed: int = 0,
    check: Callable[[Capture], None] | None = None,
    progress: bool = True,
) -> Measured:
    """Read texts and measure all that some studies need, once.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: as for `analyze`.
        studies: for which: `"importance", "linguistic", "layers", "codelength", "robustness"`, or `"mergeability"`, which needs no scores of its own.
        layers: block indices; None: ten, evenly spaced over the model (all if it has no more); `"all"`.
        k, context, exclude: of the compression scores; see `Compression`.
        bank: as for `analyze`; `"reference"` for a few short texts or many prompts of one template.
        unit: what is independent: `"document"`, `"sequence"`, or a label (the template of a prompt).
        contrast: two kinds of tokens or texts to compare in every study.
        max_sequences: at most so many sequences; None: all. Sequences under 12 tokens are passed over.
        per_document: with `max_sequences`, so many sequences of each document before the next is taken, documents in a seeded order. More
            documents make sounder tests; two sequences of one let neighbors be of the same document. Where that would leave fewer than 16
            documents, one of each.
        max_length: tokens per sequence.
        integrated: so many sequences, of different documents, get integrated gradients (of the states that enter the middle block), which
            cost about a hundred forward passes each.
        seed: of every random choice.
        check: called with the texts chosen, before the model runs: what a study refuses.
        progress: show progress bars.

    Returns:
        a `Measured`, which every study takes in place of texts.

    Raises:
        StudyError: an unknown study, fewer than 6 units, a contrast that the texts do not have. Others as for `analyze`; all before the model runs.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> measured = bl.studies.measure(
        ...     model, list(reference_passages()), studies=["linguistic"], layers=[5], max_sequences=8, max_length=48, progress=False)
        >>> measured.layers
        [5]
    """
    check_names(*studies)
    refuse_options([], context=context)
    if exclude == "nothing":
        raise StudyError('expected exclude "self", "sequence", "document" or a label, got "nothing", which is for SeedCompression.')
    planned = data if isinstance(data, Capture) else Capture.plan(model, data, layers=_layers(model, layers), max_length=max_length)
    count = Counter(planned.row_token.tolist())
    frequency = {token: times / planned.n_rows for token, times in count.items()}
    if max_sequences is not None and max_sequences < per_document * min(len(set(planned.docs)), FEWEST_DOCUMENTS):
        per_document = 1
    chosen, short = choose_sequences(planned, max_sequences, per_document, seed)
    if not chosen:
        raise StudyError(
            f"expected texts with sequences of {FEWEST_TOKENS} tokens, got 0 of {len(planned.sequences)}. Use longer texts."
        )
    capture = planned if chosen == list(range(len(planned.sequences))) else subset(planned, chosen)
    units = count_units(capture, unit)
    if units < FEWEST_UNITS:
        raise StudyError(
            f"expected at least {FEWEST_UNITS} units ({unit}) with sequences of {FEWEST_TOKENS} tokens, got {units}: "
            "tokens of one text are not independent. Add texts, or give each its own document."
        )
    analyzers = _analyzers(studies, k, context, exclude)
    wanted = _layers(model, layers) if layers is not None else capture.layers
    if contrast is not None:
        _refuse_contrast(capture, contrast)
    if check is not None:
        check(capture)
    run = score(
        model, capture, analyzers, layers=wanted, bank=bank, seed=seed, max_length=max_length, progress=progress,
        keep_neighbors_of=analyzers[0],
    )  # fmt: skip
    table = run.table
    (facts,) = tables.provenance(table).values()
    settings: dict[str, Any] = {
        "k": k, "context": context, "exclude": exclude, "unit": unit, "seed": seed, "max_length": capture.settings["max_length"],
        "max_sequences": max_sequences, "per_document": per_document, "sequences_given": len(planned.sequences),
            "sequences_too_short": short,
        "bank": facts.get("bank", {}).get("source"), "integrated_gradients_sequences": 0, "contrast": contrast and contrast.title,
    }  # fmt: skip
    if "importance" in studies and integrated:
        settings["integrated_gradients_sequences"] = _integrate(model, capture, table, integrated, seed, progress)
    if contrast is not None:
        table["contrast"] = contrast.values(table)
    return Measured(capture, planned, table, run.neighbors, bank, frequency, contrast, settings, tuple(studies))


def check_names(*names: str) -> list[str]:
    """Names of studies that measure something; `"all"` stands for all of them but the slow ones.

    Raises:
        StudyError: none, or an unknown one.
    """
    if names == ("all",):
        return list(STUDIES)
    known = [*STUDIES, *ALONE]
    if not names or any(name not in known for name in names):
        raise StudyError(f"expected studies among {known}, or all, got {list(names)}.")
    return list(names)


def refuse_options(
    passages: Sequence[Passage], *, context: str, unit: str = "document", sentiment: str | None = None, tagger: str = "auto"
) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        StudyError: an unknown context or tagger, a unit that no passage has as a label, a sentiment that is not a label of two values.
    """
    if context not in CONTEXTS:
        raise StudyError(f"expected a context among {list(CONTEXTS)}, got {context!r}.")
    if tagger not in TAGGERS:
        raise StudyError(f"expected a tagger among {list(TAGGERS)}, got {tagger!r}.")
    known = sorted({name for passage in passages for name in passage.labels})
    if unit not in ("document", "sequence", *known):
        raise StudyError(f'expected unit "document", "sequence" or a label of the texts, got {unit!r}; labels: {known}.')
    if sentiment is not None and len({str(p.labels[sentiment]) for p in passages if sentiment in p.labels}) != 2:
        raise StudyError(f"expected a label of the texts with two values as sentiment, got {sentiment!r}; labels: {known}.")


def ready(
    model: Any, data: Any, study: str, progress: bool, options: Mapping[str, Any], check: Callable[[Capture], None] | None = None
) -> Measured:
    """What a study works on: texts are measured, what was measured is taken as it is.

    Raises:
        StudyError: measured for other studies, or options for what is measured already.
    """
    if not isinstance(data, Measured):
        return measure(model, data, studies=(study,), progress=progress, check=check, **options)
    data.capture.check_model_is(model)
    if options:
        raise StudyError(
            f"expected no options of measure for texts measured already, got {sorted(options)}. Give them to measure(...)."
        )
    if study not in data.studies:
        raise StudyError(
            f"expected texts measured for the study {study!r}, got {list(data.studies)}. Measure with studies=[{study!r}]."
        )
    if check is not None:
        check(data.capture)
    return data


def count_units(capture: Capture, unit: str) -> int:
    """How many units the capture's sequences belong to, copies of a text counted once.

    Raises:
        StudyError: a label that not all of them have.
    """
    if unit in _MADE:
        raise StudyError(
            f"expected a label as unit with a name of its own, got {unit!r}, a column that studies make. Rename the label."
        )
    if unit not in ("sequence", "document") and any(unit not in label for label in capture.labels):
        known = sorted({name for label in capture.labels for name in label})
        raise StudyError(f'expected unit "sequence", "document" or a label that every text has, got {unit!r}; labels: {known}.')
    seqs = np.repeat(np.arange(len(capture.sequences)), capture.lengths.numpy())
    rows = pd.DataFrame({"doc": np.array(capture.docs, object)[seqs], "seq": seqs})
    if unit not in ("sequence", "document"):
        rows[unit] = np.array([str(label[unit]) for label in capture.labels], object)[seqs]
    return stats.design.distinct_units(tables.described(rows, {"": tables.Provenance(copies=capture.copies)}), unit)


def spaced_layers(n_layers: int, count: int = 10) -> list[int]:
    """So many layers, evenly spaced from the first to the last; all if there are no more."""
    return sorted({round(place) for place in np.linspace(0, n_layers - 1, min(count, n_layers)).tolist()})


def _layers(model: Any, layers: Any) -> tuple[int, ...]:
    every = check_layers(model, None)
    if layers is None:
        return tuple(spaced_layers(len(every)))
    return every if isinstance(layers, str) and layers == "all" else check_layers(model, layers)


def choose_sequences(planned: Capture, most: int | None, per_document: int, seed: int) -> tuple[list[int], int]:
    """Sequences to measure, in their own order, and how many were too short."""
    if (most is not None and most < 1) or per_document < 1:
        raise StudyError(f"expected max_sequences and per_document of at least 1, got {most} and {per_document}.")
    long = [seq for seq, length in enumerate(planned.lengths.tolist()) if length >= FEWEST_TOKENS]
    short = len(planned.sequences) - len(long)
    if most is None or len(long) <= most:
        return long, short
    docs = list(dict.fromkeys(planned.docs[seq] for seq in long))
    order = {docs[place]: rank for rank, place in enumerate(np.random.default_rng(seed).permutation(len(docs)).tolist())}
    seen: Counter[str] = Counter()
    ranked = []
    for seq in long:
        doc = planned.docs[seq]
        ranked.append((seen[doc] // per_document, order[doc], seq))
        seen[doc] += 1
    return sorted(seq for _, _, seq in sorted(ranked)[:most]), short


def _analyzers(studies: Sequence[str], k: int, context: Context, exclude: str) -> list[Any]:
    common: dict[str, Any] = {"k": k, "exclude": exclude}
    passed: dict[str, Any] = {**common, "context": context}
    headline = Compression(**passed)
    answer: list[Analyzer] = [
        headline, Compression(same_token="exclude", name="compression_other_token", **passed), Contraction(**passed),
        RawCompression(**common), Neighborhood(**common), Surprisal(), StateNorm(),
    ]  # fmt: skip
    if "importance" in studies:
        answer += IMPORTANCE
    elif "robustness" in studies:
        answer += QUICK_IMPORTANCE
    if "layers" in studies or "robustness" in studies:
        # A sample is enough for means over documents, and each control costs as much as the score.
        answer += controls_of([headline], queries=_CONTROLLED)
    if "layers" in studies:
        answer += [
            SymmetricContraction(**common), AngularContraction(**passed), NeighborOverlap(**common), MatrixEntropy(),
            EffectiveRankChange(k=3 * k, exclude=exclude, context="native"), LocalDimension(k=2 * k, exclude=exclude),
        ]  # fmt: skip
    return answer


def _refuse_contrast(capture: Capture, contrast: Contrast) -> None:
    """Before the model runs: both sides must be among the tokens chosen."""
    if contrast.first == contrast.second or contrast.by in tables.KEYS:
        raise StudyError(f"expected two different values of a label, or two spans, to contrast, got {contrast.title!r}.")
    rows, labels = row_facts(capture)
    contrast.values(pd.DataFrame({"span": rows["span"], **labels}))


def _integrate(model: Any, capture: Capture, table: pd.DataFrame, most: int, seed: int, progress: bool) -> int:
    """Integrated gradients of some sequences, each of another document where there are enough, written into the table."""
    order = np.random.default_rng(seed).permutation(len(capture.sequences)).tolist()
    first_of_doc = {capture.docs[seq]: seq for seq in reversed(order)}
    chosen = sorted(sorted(order, key=lambda seq: (first_of_doc[capture.docs[seq]] != seq, order.index(seq)))[:most])
    part = subset(capture, chosen)
    # From the middle block on: the way from the embeddings is too rough to integrate on a trained model.
    analyzer = IntegratedGradients(layer=capture.model["layers"] // 2, steps=24)
    found = analyze(model, part, [analyzer], layers=[capture.layers[0]], progress=progress)
    (facts,), (mine,) = tables.provenance(found).values(), tables.provenance(table).values()
    column = "integrated_gradients"
    values = np.full(capture.n_rows, np.nan)
    values[np.isin(capture.row_seq.numpy(), chosen)] = found[column].to_numpy()
    table[column] = np.tile(values, table["layer"].nunique())
    mine["columns"][column] = facts["columns"][column]
    mine["analyzers"] += facts["analyzers"]
    return len(chosen)
