"""Texts that the model may recite already: openings of licences and of books, beside passages that it should not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from basin_lens import memorize, stats
from basin_lens.analyzers import Agreement, StandardizedLikelihood, Surprisal
from basin_lens.capture import Capture
from basin_lens.errors import StudyError, TextError
from basin_lens.model import HookedModel
from basin_lens.studies.framework.attempts import attempt_each
from basin_lens.studies.memorization.experiment import refuse_built_in
from basin_lens.studies.memorization.scores import SCORES, measure_texts
from basin_lens.texts import Passage, find_licences, read_dataset
from basin_lens.texts.copies import passage_groups

_CORPORA = ("nltk:genesis", "nltk:inaugural")
_MATCHED = 0.25  # nats per token
_CHARACTERS = 5  # per token of running text, about


@dataclass(frozen=True)
class Recited:
    """What came of it.

    `texts`: one row per passage: condition, source, loss baselines, extraction. `contrasts`: opening less each other condition of
    the same source, by layer and score. `matched`: the same for openings and later passages of equal loss, any source. `said`:
    what was read and what was not.
    """

    texts: pd.DataFrame
    contrasts: pd.DataFrame
    matched: pd.DataFrame
    said: tuple[str, ...]


def prepare(
    model: HookedModel,
    *,
    count: int,
    length: int,
    seed: int,
    files: Sequence[Passage] = (),
    paraphrases: Mapping[str, str] | None = None,
) -> tuple[list[Passage], list[str]]:
    """Openings and their controls from the user's texts, NLTK's corpora if installed, and licences found here; and what was read.

    Corpora give a third of `count` each, licences what is left of it.

    Raises:
        TextError: no source is long enough, or one of the user's is not. StudyError: a paraphrase of an unknown source, built-in
            texts.
    """
    refuse_built_in(files, model)
    said, sources = [], []
    for name in _CORPORA:
        try:
            mine = memorize.long_enough(model, list(read_dataset(name)), length)
            # Spread over the corpus: its first files are not its best known ones.
            places = sorted({round(x) for x in np.linspace(0, len(mine) - 1, min(count // 3, len(mine))).tolist()})
            sources += [mine[i] for i in places]
            said.append(f"{len(places)} texts of {name}.")
        except TextError as error:
            said.append(f"{name} not read: {error}")
    every, sources = len(sources), _different(model, sources, length)
    said += [f"{every - len(sources)} of these begin as others do, and are left out."] if len(sources) < every else []
    try:
        found = find_licences()
        mine = _different(model, [*sources, *memorize.long_enough(model, found.passages, length)], length)[len(sources) : count]
        sources += mine
        unread = f"; {len(found.unreadable)} files could not be read" if found.unreadable else ""
        said.append(f"{len(mine)} of {len(found.passages)} different licence texts found on this machine{unread}.")
    except TextError as error:
        said.append(f"No licence texts: {error}")
    said += [f"{len(files)} texts given."] if files else []
    if not (sources or files):
        raise TextError(f"expected texts of at least {3 * length} tokens to look for recitation in, found none. {' '.join(said)}")
    given = dict(paraphrases or {})
    named = {str(source.doc) for source in (*files, *sources)}
    if set(given) - named:
        raise StudyError(
            f"expected paraphrases by document of {sorted(named)[:4]}, ..., got one of {sorted(set(given) - named)[0]!r}."
        )
    made = (
        memorize.recitation_passages(model, list(files), length=length, seed=seed, paraphrases=_of(given, files)) if files else []
    )
    for source in sources:
        try:
            made += memorize.recitation_passages(model, [source], length=length, seed=seed, paraphrases=_of(given, [source]))
        except TextError as error:
            said.append(f"{source.doc} left out: {error}")
    made, copied = _once(model, made)
    said += [f"{copied} sources left out: their openings are copies of others, nearly or in full."] if copied else []
    short = sum(p.labels["condition"] == "opening" for p in made) - sum(p.labels["condition"] == "shuffled" for p in made)
    said += [f"{short} openings could not be shuffled into as many tokens."] if short else []
    return made, said


def _different(model: HookedModel, sources: Sequence[Passage], length: int) -> list[Passage]:
    """The sources whose beginnings are no copies of others' before them: one licence has many owners, and is one text."""
    begun = [Passage(source.text[: _CHARACTERS * length]) for source in sources]
    copied = {index for group in passage_groups(model, begun) for index in group[1:]}
    return [source for index, source in enumerate(sources) if index not in copied]


def _once(model: HookedModel, made: Sequence[Passage]) -> tuple[list[Passage], int]:
    """Without the sources whose openings are copies of others, and how many those were."""
    begins = [index for index, p in enumerate(made) if p.labels["condition"] == "opening"]
    copied = {index for group in passage_groups(model, [made[index] for index in begins]) for index in group[1:]}
    ends = [*begins[1:], len(made)]
    kept = [made[first:last] for index, (first, last) in enumerate(zip(begins, ends, strict=True)) if index not in copied]
    return [p for source in kept for p in source], len(copied)


def _of(paraphrases: Mapping[str, str], sources: Sequence[Passage]) -> dict[str, str]:
    return {doc: text for doc, text in paraphrases.items() if doc in {str(s.doc) for s in sources}}


def recite(
    model: HookedModel,
    bank: Capture,
    layers: Sequence[int],
    made: Sequence[Passage],
    said: Sequence[str],
    *,
    k: int,
    length: int,
    seed: int,
    progress: bool = True,
) -> Recited:
    """Measure openings and their controls (from `prepare`) under a model as it is."""
    capture = Capture.plan(model, list(made), layers=layers, max_length=length + 1)
    own = [Surprisal(), Agreement(), StandardizedLikelihood()]
    table = measure_texts(model, capture, own, k=k, layers=layers, bank=bank, seed=seed, progress=progress)
    texts = memorize.likelihood_baselines(table, [p.text for p in made])
    found = memorize.extract(
        model, list(made), prompt=length // 2, target=length - length // 2, max_length=length + 1, progress=progress
    )
    guide = memorize.guide_labels(model, list(made), max_length=length + 1, progress=progress)
    texts["matched"], texts["longest_run"] = found["matched"].to_numpy(), found["longest_run"].to_numpy()
    texts["extracted"], texts["guide_memorized"] = found["extracted"].to_numpy(), guide["memorized"].to_numpy()
    scores = [*SCORES, "surprisal", "agreement"]
    means = table.groupby(["layer", "doc", "condition"])[scores].mean()
    parts = []
    for other in [c for c in memorize.CONDITIONS[1:] if c in set(table["condition"])]:
        opening, compared = means.xs("opening", level="condition"), means.xs(other, level="condition")
        apart = (opening - compared).dropna(how="all").reset_index()
        apart["seq"] = apart["doc"]
        part = attempt_each(stats.before_after, apart, scores, seed=seed, unit="document")
        parts.append(part.assign(contrast=f"opening - {other}"))
    contrasts = stats.correct(pd.concat(parts, ignore_index=True), "bh")
    return Recited(texts, contrasts, _matched(means, texts, seed), tuple(said))


def _matched(means: pd.DataFrame, texts: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Openings and later passages, any source, of equal loss."""
    units = texts[texts["condition"].isin(["opening", "later"])].copy()
    units["case"] = units["doc"] + "/" + units["condition"]
    units["opens"] = units["condition"] == "opening"
    pairs = stats.match_units(units, "opens", "log_likelihood", caliper=_MATCHED, unit="case")
    rows = means.reset_index()
    rows["case"] = rows["doc"] + "/" + rows["condition"]
    rows = rows[rows["case"].isin([*pairs["with_label"], *pairs["without_label"]])]
    # Each passage is a unit of its own, though a source may give two.
    rows = rows.assign(doc=rows["case"], seq=rows["case"], opens=rows["condition"] == "opening")
    if rows.empty:
        return pd.DataFrame()
    found = attempt_each(stats.compare_groups, rows, SCORES, "opens", groups=(True, False), seed=seed, unit="document")
    return stats.correct(found, "bh").assign(n_matched=len(pairs), caliper=_MATCHED)
