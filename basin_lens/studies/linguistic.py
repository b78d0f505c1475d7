"""Does compression differ between parts of speech, beyond frequency, position and density? And who are the neighbors, by layer?"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from basin_lens import stats, tables
from basin_lens.capture import Capture
from basin_lens.errors import StudyError
from basin_lens.studies.framework import base
from basin_lens.studies.framework.contrasts import contrast_section
from basin_lens.studies.framework.display_columns import shown
from basin_lens.studies.framework.measurement import SCORES, Contrast, Measured, ready
from basin_lens.studies.framework.words import CONTENT, FUNCTION, Part, tagged_tokens, word_table
from basin_lens.studies.neighbor_composition import neighbor_shares
from basin_lens.texts import words_of
from basin_lens.views import Section, distributions, result_curve, tag_intervals, token_view

HYPOTHESIS = (
    "Declared before looking: within a text, compression differs between function words and content words, and between "
    "nouns and verbs (either direction), and parts of speech differ over texts and words at once (so that other words and other "
    "texts would show it), at fixed word frequency, position, norm, neighborhood radius, share of equal tokens and surprisal. "
    "Each is tested at the layer (not 0, where a state is its token alone) chosen on half of the documents, on the other "
    "half; with the share of neighbors of the same tag, among those that are another word, having its center over depth "
    "(layers above 0) before that of the same document, both above chance (syntax early, topic late), they are one family (Holm). "
    + base.IF_FEW
)


def study_linguistic(
    model: Any,
    data: Any,
    *,
    tagger: Literal["auto", "gold", "nltk", "spacy"] = "auto",
    part: Part = "mean",
    sentiment: str | None = None,
    progress: bool = True,
    **options: Any,
) -> base.Study:
    """Compare parts of speech in every score, and look at who the neighbors are.

    Words take the place of tokens: a token belongs to the word it overlaps most, by character offsets. Groups of words are compared over whole
    documents; part-of-speech effects are tested within texts, over texts and words at once, and over word types.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze` (gold tags with `TaggedPassage`, as from `nltk:treebank`), or a `Measured` for the study `"linguistic"`.
        tagger: `"gold"`: the passages' own tags; `"nltk"`: the averaged perceptron; `"spacy"`: en_core_web_sm; `"auto"`: gold where all
            passages have them, else NLTK.
        part: a word's score: the mean over its tokens, or that of its first or last token.
        sentiment: a label of the passages with two values, such as `"positive"` and `"negative"`: sentences are compared between them.
        progress: show progress bars.
        **options: of `basin_lens.studies.measure`, with texts.

    Returns:
        a `Study` with tables `groups` (function - content, noun - verb), `tag_means`, `tag_effect`, `neighbor_shares`, `guide`, and `sentiment`
        and `contrast` where asked for.

    Raises:
        StudyError: too few documents, or other options together with a `Measured`. TextError: no offsets, or tags that are not to be had.

    Source: design of basin_lens, "Parts of speech"; tag set: Petrov et al. 2012.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> texts = bl.texts.read_dataset("nltk:treebank")
        >>> study = bl.studies.study_linguistic(model, texts, layers=[5], max_sequences=12, max_length=48, progress=False)
        >>> "neighbor_shares" in study.tables
        True
    """
    measured = ready(model, data, "linguistic", progress, options, refusals(tagger, part, sentiment))
    with base.steps("study linguistic", 7, progress) as step:
        return _study(measured, tagger, part, sentiment, step)


def refusals(tagger: str, part: str, sentiment: str | None) -> Callable[[Capture], None]:
    """What this study refuses, as a check to be made before the model runs.

    The check raises StudyError for an unknown option, token ids in place of texts, or a label without two values, and TextError for
    tags that are not to be had.
    """

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


def _study(measured: Measured, tagger: Any, part: Part, sentiment: str | None, step: base.Steps) -> base.Study:
    step("tags")
    tokens, facts = tagged_tokens(measured, tagger)
    words = word_table(tokens, part)
    words["kind"] = words["tag"].map({**dict.fromkeys(FUNCTION, "function"), **dict.fromkeys(CONTENT, "content")})
    words["noun_verb"] = words["tag"].map({"NOUN": "noun", "VERB": "verb"})
    shared: dict[str, Any] = {"unit": measured.unit, "seed": measured.seed}

    step("function and content words")
    parts, effects, means = [], [], []
    for wording, controls in (("none", ()), ("standard", stats.CONTROLS)):
        for column, sides in _PAIRS:
            found = base.attempt(
                stats.compare_groups, words, list(SCORES), column, groups=sides, paired=True, controls=controls, n_resamples=1999,
                correction="none", **shared,
            )  # fmt: skip
            parts.append(found.assign(group=" - ".join(sides), control_set=wording))
    groups = stats.correct(pd.concat(parts, ignore_index=True), "bh")

    step("tags by layer")
    for wording, controls in (("none", ()), ("standard", stats.CONTROLS)):
        found = base.attempt(
            stats.tag_effect, words, "compression", "tag", controls=controls, n_resamples=499, correction="none", **shared
        )
        effects.append(found.assign(control_set=wording))
        found = stats.tag_means(words, list(SCORES), "tag", controls=controls, unit=measured.unit, correction="none")
        means.append(found.assign(control_set=wording))
    effect = stats.correct(pd.concat(effects, ignore_index=True), "bh")
    tag_table = stats.correct(pd.concat(means, ignore_index=True), "bh")

    step("neighbors")
    shares, curves = neighbor_shares(tokens, measured)

    step("declared tests")
    rows = []
    for column, sides in _PAIRS:
        test = partial(
            stats.compare_groups, scores="compression", group=column, groups=sides, paired=True, controls=stats.CONTROLS, **shared
        )
        rows.append(
            base.declared(words, test, measured, f"{_PLURALS[column][0]} differ from {_PLURALS[column][1]}", " - ".join(sides))
        )
    by_tag = partial(stats.tag_effect, scores="compression", tag="tag", tests=["mixed"], controls=stats.CONTROLS, **shared)
    rows.append(base.declared(words, by_tag, measured, "parts of speech differ over texts and words", "tag"))
    if shares is not None:
        rows.append(_earlier(shares, measured))
    findings = base.settle("linguistic", rows)
    guide = pd.concat(
        [
            base.guide(words, list(SCORES), group="kind", groups=("function", "content")),
            base.guide(words, list(SCORES), group="noun_verb", groups=("noun", "verb")),
            base.guide(words, list(SCORES), tag="tag"),
        ],
        ignore_index=True,
    )
    findings = base.beside_guide(findings, guide)

    step("red flags")
    asked: list[tuple[str, dict[str, Any]]] = [
        (" - ".join(sides), {"group": column, "groups": sides, "paired": True}) for column, sides in _PAIRS
    ]
    flags = pd.concat(
        [
            base.red_flags(words, "compression", **one, **shared).assign(question=question)
            for question, one in [*asked, ("tag", {"tag": "tag", "n_resamples": 499})]
        ],
        ignore_index=True,
    )

    step("figures")
    layer = int(findings["layer"].iloc[0])
    tables = {"groups": groups, "tag_means": tag_table, "tag_effect": effect, "guide": guide}
    sections, figures = _sections(words, measured, groups, tag_table, effect, layer)
    if curves is not None:
        section = _shares_section(curves)
        sections.append(section)
        tables["neighbor_shares"], figures["neighbor-shares-by-layer"] = curves, section.figure
    if sentiment is not None:
        section, found = _sentiment(words, measured, sentiment)
        sections.append(section)
        tables["sentiment"], figures["sentiment-by-layer"] = found, section.figure
    if measured.contrast is not None:
        section, found, figure = contrast_section(words, list(SCORES), measured)
        sections.append(section)
        tables["contrast"], figures["contrast-by-layer"] = found, figure
    decision = base.decide(findings[findings["question"] != _EARLIER], flags)
    told = (
        *base.about(measured),
        f"Tags: {facts}; {len(words) // len(measured.layers):,} words, a word's score is {_PARTS[part]}.",
    )
    return base.Study(
        name="linguistic",
        title="Does compression differ between parts of speech?",
        about=told,
        hypothesis=HYPOTHESIS,
        decision=decision,
        verdict=tuple(_verdict(decision, findings, groups, effect)),
        findings=findings,
        flags=flags,
        not_tested=_not_tested(measured, sentiment, shares is not None),
        sections=tuple(sections),
        tables=tables,
        figures=figures,
        provenance=base.provenance(measured),
        tokens=tokens,
    )


_PARTS = {"mean": "the mean over its tokens", "first": "that of its first token", "last": "that of its last token"}
_EARLIER = "same tag - same document"
_PLURALS = {"kind": ("function words", "content words"), "noun_verb": ("nouns", "verbs")}
_PAIRS = (("kind", ("function", "content")), ("noun_verb", ("noun", "verb")))


def _earlier(shares: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """Center over depth of the excess shares of each unit: does that of the same tag lie before that of the same document?

    Other words only: a word has its own tag, and the first layers know the word. And no layer 0, as in every declared test. Where a share is
    that of chance, its center is that of noise, the middle of the layers: so both must be above chance, too, and p is the largest of three.
    Above chance is asked of all sequences, also of those that have no center because a share is nowhere above it.
    """
    one, other = "same_tag_other_word_excess", "same_document_excess"
    shares = base.inner(shares)
    keys = ["doc", "seq"] + [name for name in (measured.unit,) if name in shares.columns]
    excess = shares.groupby([*keys, "layer"])[[one, other]].mean()
    by_sequence = excess.clip(lower=0)
    layers = by_sequence.index.get_level_values("layer").to_numpy(float)
    weighted = by_sequence.mul(layers, axis=0).groupby(level=keys).sum() / by_sequence.groupby(level=keys).sum().replace(0, np.nan)
    table = excess.groupby(level=keys).mean().assign(difference=weighted[one] - weighted[other]).reset_index()
    table["run"] = shares["run"].iloc[0]
    table = tables.with_provenance(table, shares)
    known = tables.select(table, table[[one, other]].notna().all(axis=1))
    one_sample = partial(stats.before_after, unit=measured.unit, seed=measured.seed)

    def test(part: pd.DataFrame, *_: Any, **__: Any) -> pd.DataFrame:
        above = base.one_sided(partial(one_sample, on=[one, other]))(part)
        usable = tables.select(part, part["difference"].notna())
        earlier = base.one_sided(partial(one_sample, on="difference"), more=False)(usable)
        without = len(part) - len(usable)
        return earlier.assign(
            p=np.max([*earlier["p"], *above["p"]]), p_floor=[base.p_floor(row) for row in base.rows(earlier)],
            note="the largest p of three: an earlier center, and either share above chance"
            + (f"; {without} sequences have no center: a share is nowhere above chance" if without else ""),
        )  # fmt: skip

    found = base.attempt(test, known, "difference", unit=measured.unit)
    found["effect"] = "center over depth, same tag (of another word) less same document"
    return found.assign(
        finding="same-tag neighbors (other words) come earlier than same-document neighbors", question=_EARLIER, score="neighbors",
        effect_unit="layers",
    )  # fmt: skip


# -- what a reader sees -------------------------------------------------------------------------------------------------------------


def _sections(
    words: pd.DataFrame, measured: Measured, groups: pd.DataFrame, means: pd.DataFrame, effect: pd.DataFrame, layer: int
) -> tuple[list[Section], dict[str, Any]]:
    headline = groups[groups["score"] == "compression"]
    figures: dict[str, Any] = {
        "function-content-by-layer": result_curve(base.inner(headline), by=["group", "control_set"]),
        "tag-means": tag_intervals(
            *(means[(means["score"] == "compression") & (means["control_set"] == wording)] for wording in ("none", "standard")),
            layer=layer,
        ),
        "tag-effect-by-layer": result_curve(effect, by=["test", "control_set"]),
        "compression-by-tag": distributions(words[words["tag"].notna()], "compression", "tag", layer),
    }
    sections = [
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
            "Omega squared by three tests: tags permuted within sequences (these words in these texts), over texts and words "
            "at once (min F'), and over word types (in these texts). Only min F' is a test of tags as such: the others also find words "
            "with scores of their own, or texts with differences of their own. With controls, of what they leave of the score.",
            figure=figures["tag-effect-by-layer"],
            caption="Omega squared with 95 % intervals; 0: none.",
            table=shown(effect, "layer", "test", "control_set", "unit", "n_tags"),
        ),
        Section(
            f"Distributions by tag, layer {layer}",
            "All words of the texts; the spread within a tag is what most of the score is.",
            figure=figures["compression-by-tag"],
            caption="Median and quartiles; the number of words below.",
        ),
    ]
    view = token_view(measured.table, ["compression", "surprisal"], layer, seq=int(measured.table["seq"].min()))
    sections.append(Section("One text", f"The first sequence at layer {layer}.", view=view))
    return sections, figures


def _shares_section(curves: pd.DataFrame) -> Section:
    return Section(
        "Who the neighbors are",
        "Share of a token's neighbors that have its tag, its word, or its document, less what chance gives among all "
        "tokens that may be its neighbors; and of those neighbors that are another word, the share that has its tag. "
        "Neighbors of the same sequence are never counted.",
        figure=result_curve(curves, by="score"),
        caption="Mean over documents with 95 % intervals; filled: p at most 0.05 by max-|t| over all layers and shares.",
        table=shown(curves, "layer", "score", "share", "chance", "n_documents"),
    )


def _sentiment(words: pd.DataFrame, measured: Measured, label: str) -> tuple[Section, pd.DataFrame]:
    values = sorted({str(v) for v in words[label].dropna()})
    table = tables.assign(words, contrast=Contrast(label, values[0], values[1]).values(words))
    as_contrast = replace(measured, table=table, contrast=Contrast(label, values[0], values[1]))
    section, found, figure = contrast_section(table, list(SCORES), as_contrast)
    text = "Sentences by their label: means over a sentence's words, sentences compared as wholes."
    return Section(
        f"Sentiment: {values[0]} - {values[1]}", text, figure=figure, caption=section.caption, table=section.table
    ), found


def _verdict(decision: base.Decision, findings: pd.DataFrame, groups: pd.DataFrame, effect: pd.DataFrame) -> list[str]:
    opening = base.opening(
        decision,
        "Compression differs between parts of speech beyond frequency, position, norm, density and surprisal.",
        "At fixed frequency, position, norm, density and surprisal, compression does not reliably differ between these "
        "parts of speech here.",
    )
    told = [opening, *(base.sentence(row) for row in base.rows(findings))]
    for wording, said in (("none", "without controls"), ("standard", "with controls")):
        for group in groups["group"].unique():
            mine = groups[(groups["control_set"] == wording) & (groups["score"] == "compression") & (groups["group"] == group)]
            kept = mine[mine["p_corrected"] <= base.ALPHA]
            told.append(
                f"Exploration, {group}, {said}: {len(kept)} of {len(mine)} layers below 0.05 after correction; "
                f"differences from {mine['estimate'].min():+.3f} to {mine['estimate'].max():+.3f} nats."
            )
    kept = effect[(effect["control_set"] == "standard") & (effect["p_corrected"] <= base.ALPHA)]
    by_test = [set(kept[kept["test"] == test]["layer"].tolist()) for test in effect["test"].unique()]
    sound = sorted(set(kept[kept["test"].str.startswith("min F'")]["layer"].tolist()))
    told.append(
        f"Tags differ over texts and words at once (min F'), with controls, at {len(sound)} of {effect['layer'].nunique()} layers"
        + (f" ({', '.join(map(str, sound))})" if sound else "")
        + f"; all three tests, which is very conservative, pass at {len(set.intersection(*by_test))}."
    )
    return told


def _not_tested(measured: Measured, sentiment: str | None, shares: bool) -> tuple[str, ...]:
    said = [
        "Finer tags than the universal ones: auxiliaries are verbs here, proper names are nouns.",
        "Other languages, and taggers other than the one named above.",
        f"Layers other than {', '.join(map(str, measured.layers))}; other k, metrics and contexts (study robustness).",
        "Word frequency outside of these texts: log frequency is counted on them.",
    ]
    if sentiment is None:
        said.append("Sentiment: no labelled sentences were given.")
    if not shares:
        said.append("Who the neighbors are: needs the texts as their own bank, and neighbors of the same document allowed.")
    if measured.contrast is None:
        said.append("Any contrast of spans or labels: none was asked for.")
    return tuple(said)
