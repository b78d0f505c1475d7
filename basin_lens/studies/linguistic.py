"""Does compression differ between parts of speech, beyond frequency, position and density? And who are the neighbors, by layer?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from basin_lens import stats, tables
from basin_lens.capture import Capture
from basin_lens.errors import StudyError
from basin_lens.model import HookedModel
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.framework.contrast import Contrast
from basin_lens.studies.framework.contrast_report import contrast_section
from basin_lens.studies.framework.declared_tests import ALPHA, IF_FEW
from basin_lens.studies.framework.display_columns import shown
from basin_lens.studies.framework.measured_texts import HEADLINE, SCORES, Measured, StudyData
from basin_lens.studies.framework.runner import run_study
from basin_lens.studies.framework.spec import (
    Analysis,
    Check,
    DeclaredTest,
    Presentation,
    Results,
    StudySpec,
    Task,
    option,
    own_options,
)
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import above_layer_0, sequence_shown
from basin_lens.studies.framework.wording import layers_said
from basin_lens.studies.framework.words import CONTENT, FUNCTION, Part, tagged_tokens, word_table
from basin_lens.studies.neighbor_composition import SYNTAX_FINDING, SYNTAX_FIRST, neighbor_shares, syntax_first
from basin_lens.texts import Passage, words_of
from basin_lens.views import Section, distributions, result_curve, tag_intervals, token_view

HYPOTHESIS = (
    "Declared before looking: within a text, compression (less that of random sets) differs between function words and content "
    "words, and between nouns and verbs (either direction), and parts of speech differ over texts and words at once (so that "
    "other words and other texts would show it), at fixed word frequency, position, norm, neighborhood radius, share of equal "
    "tokens and surprisal. Each is tested at the layer (not 0, where a state is its token alone) chosen on half of the documents, "
    "on the other half; with the share of neighbors of the same tag, among those that are another word, having its center over "
    "depth (layers above 0) before that of the same document, both above chance (syntax early, topic late), they are one family "
    "(Holm). " + IF_FEW
)


_PARTS = {"mean": "the mean over its tokens", "first": "that of its first token", "last": "that of its last token"}
_PLURALS = {"kind": ("function words", "content words"), "noun_verb": ("nouns", "verbs")}
_DIFFERENCES = {name: f"{first} differ from {second}" for name, (first, second) in _PLURALS.items()}
_BY_TAG = "parts of speech differ over texts and words"
_PAIRS = (("kind", ("function", "content")), ("noun_verb", ("noun", "verb")))
_CONTROL_SETS = (("none", ()), ("standard", stats.CONTROLS))
TAGGERS = ("auto", "gold", "nltk", "spacy")


@dataclass(frozen=True)
class LinguisticOptions:
    """Of `study_linguistic`."""

    tagger: str = option("auto", "Where tags come from: auto, gold, nltk or spacy.")
    part: Part = option("mean")
    sentiment: str | None = option(None, "A label with two values, one for each sentence.")


def study_linguistic(
    model: HookedModel,
    data: StudyData,
    *,
    tagger: Literal["auto", "gold", "nltk", "spacy"] = "auto",
    part: Part = "mean",
    sentiment: str | None = None,
    progress: bool = True,
    **options: object,
) -> Study:
    """Compare parts of speech in every score, and look at who the neighbors are.

    Words take the place of tokens: a token belongs to the word it overlaps most, by character offsets. Groups of words are
    compared over whole documents; part-of-speech effects are tested within texts, over texts and words at once, and over word
    types.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze` (gold tags with `TaggedPassage`, as from `nltk:treebank`), or a `Measured` for the study
            `"linguistic"`.
        tagger: `"gold"`: the passages' own tags; `"nltk"`: the averaged perceptron; `"spacy"`: en_core_web_sm; `"auto"`: gold
            where all passages have them, else NLTK.
        part: a word's score: the mean over its tokens, or that of its first or last token.
        sentiment: a label of the passages with two values, such as `"positive"` and `"negative"`: sentences are compared between
            them.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`, with texts.

    Returns:
        a `Study` with tables `groups` (function - content, noun - verb), `tag_means`, `tag_effect`, `neighbor_shares`, `guide`,
        and `sentiment` and `contrast` where asked for.

    Raises:
        StudyError: too few documents, or other options together with a `Measured`. TextError: no offsets, or tags that are not to
            be had.

    Source: design of basin_lens, "Parts of speech"; tag set: Petrov et al. 2012.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> texts = bl.texts.read_dataset("nltk:treebank")
        >>> study = bl.studies.study_linguistic(model, texts, layers=[5], max_sequences=12, max_length=48, progress=False)
        >>> "neighbor_shares" in study.tables
        True
    """
    own = LinguisticOptions(tagger, part, sentiment)
    return run_study(SPEC, model, data, own, progress=progress, measure_options=options)


def refuse(given: object, passages: Sequence[Passage]) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        StudyError: an unknown tagger, or a sentiment that is not a label of two values.
    """
    options = own_options(given, LinguisticOptions)
    if options.tagger not in TAGGERS:
        raise StudyError(f"expected a tagger among {list(TAGGERS)}, got {options.tagger!r}.")
    label = options.sentiment
    if label is not None and len({str(p.labels[label]) for p in passages if label in p.labels}) != 2:
        known = sorted({name for passage in passages for name in passage.labels})
        raise StudyError(f"expected a label of the texts with two values as sentiment, got {label!r}; labels: {known}.")


def check_texts(_model: HookedModel, given: object, _unit: str) -> Callable[[Capture], None]:
    """What this study refuses, as a check to be made before the model runs.

    The check raises StudyError for an unknown option, token ids in place of texts, or a label without two values, and TextError for
    tags that are not to be had.
    """
    options = own_options(given, LinguisticOptions)
    tagger, part, sentiment = options.tagger, options.part, options.sentiment

    def check(capture: Capture) -> None:
        if part not in ("mean", "first", "last"):
            raise StudyError(f'expected part "mean", "first" or "last", got {part!r}.')
        if capture.passages is None:
            raise StudyError("expected texts with character offsets, got token ids: words cannot be found in them. Pass texts.")
        if all(end < 0 for s in capture.sequences for end in s.ends):
            raise StudyError(
                "expected texts with character offsets, got a tokenizer without any. Use a model with another tokenizer."
            )
        # Gold tags must be there for all; for a tagger, one text shows whether it can be had.
        used = sorted({s.passage for s in capture.sequences})
        words_of([capture.passages[index] for index in (used if tagger == "gold" else used[:1])], tagger)
        if sentiment is not None:
            values = {label.get(sentiment) for label in capture.labels} - {None}
            if len(values) != 2:
                known = sorted(map(str, values))
                raise StudyError(f"expected a label {sentiment!r} with two values, got {known}. Label the passages with it.")

    return check


@dataclass(frozen=True)
class _Details:
    """What is shown beside the declared tests. `source`: where the tags come from."""

    source: str
    has_shares: bool
    curves: pd.DataFrame | None


def _analysis(task: Task) -> Analysis:
    measured, options = task.measured, task.own(LinguisticOptions)
    task.step("tags")
    tokens, source = tagged_tokens(measured, options.tagger)
    words = word_table(tokens, options.part)
    words["kind"] = words["tag"].map({**dict.fromkeys(FUNCTION, "function"), **dict.fromkeys(CONTENT, "content")})
    words["noun_verb"] = words["tag"].map({"NOUN": "noun", "VERB": "verb"})

    task.step("function and content words")
    groups = _groups(words, task)

    task.step("tags by layer")
    effect, means = _tag_effects(words, task)

    task.step("neighbors")
    shares, curves = neighbor_shares(tokens, measured)
    held = {"groups": groups, "tag_means": means, "tag_effect": effect}
    pairs: list[tuple[str, dict[str, object]]] = [
        (" - ".join(sides), {"group": column, "groups": sides, "paired": True}) for column, sides in _PAIRS
    ]
    return Analysis(
        table=words,
        tests=_tests(task, shares),
        red_flags=[
            Check(question, HEADLINE, options=one) for question, one in [*pairs, ("tag", {"tag": "tag", "n_resamples": 499})]
        ],
        token_level=[
            *(Check(" - ".join(sides), list(SCORES), options={"group": column, "groups": sides}) for column, sides in _PAIRS),
            Check("tag", list(SCORES), options={"tag": "tag"}),
        ],
        tokens=tokens,
        rows="words",
        tables=held if curves is None else {**held, "neighbor_shares": curves},
        details=_Details(source, shares is not None, curves),
    )


def _groups(words: pd.DataFrame, task: Task) -> pd.DataFrame:
    """Function against content words and nouns against verbs, in every score, without and with controls."""
    parts = []
    for wording, controls in _CONTROL_SETS:
        for column, sides in _PAIRS:
            found = attempt(
                stats.compare_groups,
                words,
                list(SCORES),
                column,
                groups=sides,
                paired=True,
                controls=controls,
                n_resamples=1999,
                correction="none",
                **task.unit_and_seed,
            )
            parts.append(found.assign(group=" - ".join(sides), control_set=wording))
    return stats.correct(pd.concat(parts, ignore_index=True), "bh")


def _tag_effects(words: pd.DataFrame, task: Task) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How much of the score is between tags, and the mean of each tag, without and with controls."""
    effects, means = [], []
    for wording, controls in _CONTROL_SETS:
        found = attempt(
            stats.tag_effect,
            words,
            HEADLINE,
            "tag",
            controls=controls,
            n_resamples=499,
            correction="none",
            **task.unit_and_seed,
        )
        effects.append(found.assign(control_set=wording))
        found = stats.tag_means(words, list(SCORES), "tag", controls=controls, unit=task.measured.unit, correction="none")
        means.append(found.assign(control_set=wording))
    effect, mean = (stats.correct(pd.concat(parts, ignore_index=True), "bh") for parts in (effects, means))
    return effect, mean


def _tests(task: Task, shares: pd.DataFrame | None) -> list[DeclaredTest]:
    shared = task.unit_and_seed
    tests = [
        DeclaredTest(
            _DIFFERENCES[column],
            " - ".join(sides),
            partial(
                stats.compare_groups,
                scores=HEADLINE,
                group=column,
                groups=sides,
                paired=True,
                controls=stats.CONTROLS,
                **shared,
            ),
        )
        for column, sides in _PAIRS
    ]
    by_tag = partial(stats.tag_effect, scores=HEADLINE, tag="tag", tests=["mixed"], controls=stats.CONTROLS, **shared)
    tests.append(DeclaredTest(_BY_TAG, "tag", by_tag))
    if shares is not None:
        held = shares
        tests.append(
            DeclaredTest(
                SYNTAX_FINDING,
                SYNTAX_FIRST,
                lambda _: syntax_first(held, task.measured),
                over_layers=True,
                decides=False,
            )
        )
    return tests


# -- what a reader sees ---------------------------------------------------------------------------------------------------------


def _presentation(task: Task, analysis: Analysis, results: Results) -> Presentation:
    measured, words, options, details = task.measured, analysis.table, task.own(LinguisticOptions), analysis.details
    assert isinstance(details, _Details)
    layer = int(results.findings["layer"].iloc[0])
    figures = _figures(words, analysis.tables, layer)
    assert results.token_level is not None
    sections, more = _sections(measured, analysis.tables, figures, layer), {"guide": results.token_level}
    if details.curves is not None:
        figures["neighbor-shares-by-layer"] = result_curve(details.curves, by="score")
        sections.append(_shares_section(details.curves, figures["neighbor-shares-by-layer"]))
    if options.sentiment is not None:
        section, more["sentiment"], figures["sentiment-by-layer"] = _sentiment(words, measured, options.sentiment)
        sections.append(section)
    return Presentation(
        sections=sections,
        figures=figures,
        tables=more,
        remarks=_remarks(analysis.tables["groups"], analysis.tables["tag_effect"]),
        not_tested=_not_tested(measured, options.sentiment, details.has_shares),
        about=[f"Tags: {details.source}; {len(words) // len(measured.layers):,} words, a word's score is {_PARTS[options.part]}."],
    )


def _figures(words: pd.DataFrame, held: Mapping[str, pd.DataFrame], layer: int) -> dict[str, Figure]:
    groups, means, effect = held["groups"], held["tag_means"], held["tag_effect"]
    headline, mine = groups[groups["score"] == HEADLINE], means[means["score"] == HEADLINE]
    scored = words[words["tag"].notna() & words[HEADLINE].notna()]
    by_controls = [mine[mine["control_set"] == wording] for wording, _ in _CONTROL_SETS]
    return {
        "function-content-by-layer": result_curve(above_layer_0(headline), by=["group", "control_set"]),
        "tag-means": tag_intervals(*by_controls, layer=layer),
        "tag-effect-by-layer": result_curve(effect, by=["test", "control_set"]),
        "compression-by-tag": distributions(scored, HEADLINE, "tag", layer),
    }


def _sections(measured: Measured, held: Mapping[str, pd.DataFrame], figures: Mapping[str, Figure], layer: int) -> list[Section]:
    groups, means, effect = held["groups"], held["tag_means"], held["tag_effect"]
    view = token_view(measured.table, [HEADLINE, "contraction", "surprisal"], layer, seq=sequence_shown(measured.table, HEADLINE))
    return [
        Section(
            "Function and content words, nouns and verbs",
            "Differences within sequences, without controls and at fixed frequency, position, norm, radius, share of "
            "equal tokens and surprisal (regression on group, controls and sequences at once).",
            figure=figures["function-content-by-layer"],
            caption="Mean difference in compression with 95 % intervals over documents (layer 0 in the table); filled: p "
            "at most 0.05 after Benjamini-Hochberg over all scores, layers, both comparisons and both control sets.",
            table=shown(groups, "layer", "score", "group", "control_set"),
        ),
        Section(
            f"Each tag, layer {layer}",
            "How far each part of speech stands from the mean of its own text, in the score and in what the controls leave of it. "
            "The second is a careful reading: what tag and controls explain alike counts as the controls'.",
            figure=figures["tag-means"],
            caption="Mean over documents with 95 % intervals.",
            table=shown(means[means["layer"] == layer], "score", "tag", "control_set", "mean", "mean_low", "mean_high"),
        ),
        Section(
            "How much of the score is between tags",
            "Omega squared by three tests: tags permuted within sequences (these words in these texts), over texts and words at "
            "once (min F'), and over word types (in these texts). Only min F' is a test of tags as such: the others also find "
            "words with scores of their own, or texts with differences of their own. With controls, of what they leave of the "
            "score.",
            figure=figures["tag-effect-by-layer"],
            caption="Omega squared with 95 % intervals; 0: none.",
            table=shown(effect, "layer", "test", "control_set", "unit", "n_tags"),
        ),
        Section(
            f"Distributions by tag, layer {layer}",
            "All words with compression; the spread within a tag is what most of the score is.",
            figure=figures["compression-by-tag"],
            caption="Median and quartiles; the number of words below.",
        ),
        Section("One text", f"A sequence at layer {layer}; tokens without compression were not in its sample.", view=view),
    ]


def _shares_section(curves: pd.DataFrame, figure: Figure) -> Section:
    return Section(
        "Who the neighbors are",
        "Share of a token's neighbors that have its tag, its word, or its document, less what chance gives among all "
        "tokens that may be its neighbors; and of those neighbors that are another word, the share that has its tag. "
        "Neighbors of the same sequence are never counted.",
        figure=figure,
        caption="Mean over documents with 95 % intervals; filled: p at most 0.05 by max-|t| over all layers and shares.",
        table=shown(curves, "layer", "score", "share", "chance", "n_documents"),
    )


def _sentiment(words: pd.DataFrame, measured: Measured, label: str) -> tuple[Section, pd.DataFrame, Figure]:
    values = sorted({str(v) for v in words[label].dropna()})
    table = tables.assign(words, contrast=Contrast(label, values[0], values[1]).values(words))
    as_contrast = replace(measured, table=table, contrast=Contrast(label, values[0], values[1]))
    section, found, figure = contrast_section(table, list(SCORES), as_contrast)
    text = "Sentences by their label: means over a sentence's words, sentences compared as wholes."
    title = f"Sentiment: {values[0]} - {values[1]}"
    return Section(title, text, figure=figure, caption=section.caption, table=section.table), found, figure


def _remarks(groups: pd.DataFrame, effect: pd.DataFrame) -> list[str]:
    told = []
    for wording, said in (("none", "without controls"), ("standard", "with controls")):
        for group in groups["group"].unique():
            mine = groups[(groups["control_set"] == wording) & (groups["score"] == HEADLINE) & (groups["group"] == group)]
            kept = mine[mine["p_corrected"] <= ALPHA]
            told.append(
                f"Exploration, {group}, {said}: {len(kept)} of {len(mine)} layers below 0.05 after correction; "
                f"differences from {mine['estimate'].min():+.3f} to {mine['estimate'].max():+.3f} nats."
            )
    kept = effect[(effect["control_set"] == "standard") & (effect["p_corrected"] <= ALPHA)]
    by_test = [set(kept[kept["test"] == test]["layer"].tolist()) for test in effect["test"].unique()]
    sound = sorted(set(kept[kept["test"].str.startswith("min F'")]["layer"].tolist()))
    told.append(
        f"Tags differ over texts and words at once (min F'), with controls, at {len(sound)} of {effect['layer'].nunique()} layers"
        + (f" ({', '.join(map(str, sound))})" if sound else "")
        + f"; all three tests, which is very conservative, pass at {len(set.intersection(*by_test))}."
    )
    return told


def _not_tested(measured: Measured, sentiment: str | None, shares: bool) -> tuple[str, ...]:
    said = SPEC.said(layers=layers_said(measured))
    if sentiment is None:
        said.append("Sentiment: no labelled sentences were given.")
    if not shares:
        said.append("Who the neighbors are: needs the texts as their own bank, and neighbors of the same document allowed.")
    return tuple(said)


SPEC = StudySpec(
    name="linguistic",
    title="Does compression differ between parts of speech?",
    question="Does compression differ between parts of speech? Who are the neighbors, by layer?",
    hypothesis=HYPOTHESIS,
    tests=(*_DIFFERENCES.values(), _BY_TAG, f"{SYNTAX_FINDING} (in the family, not in the verdict)"),
    nulls=(
        "no difference between the two kinds of words: whole documents are flipped or permuted",
        "no difference between tags over texts and words at once (min F'); beside it, tags permuted within texts and over words",
        "the share of such neighbors that chance gives among all tokens that may be a token's neighbors",
    ),
    not_tested=(
        "Finer tags than the universal ones: auxiliaries are verbs here, proper names are nouns.",
        "Other languages, and taggers other than the one named above.",
        "Layers other than {layers}; other k, metrics and contexts (study robustness).",
        "Word frequency outside of these texts: log frequency is counted on them.",
    ),
    if_yes="Compression differs between parts of speech beyond frequency, position, norm, density and surprisal.",
    if_no="At fixed frequency, position, norm, density and surprisal, compression does not reliably differ between these "
    "parts of speech here.",
    options=LinguisticOptions,
    refuse=refuse,
    check=check_texts,
    analysis=_analysis,
    presentation=_presentation,
    steps=4,
)
