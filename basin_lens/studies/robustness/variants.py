"""The settings under which the robustness study tests its findings again: each changes one thing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Bool

from basin_lens import stats, tables
from basin_lens.analyzers import (
    Analyzer,
    AttentionReceived,
    Compression,
    GradientNorm,
    Neighborhood,
    SeedCompression,
    StateNorm,
    Surprisal,
)
from basin_lens.analyzers.crossed_table import Displaced
from basin_lens.capture import Bank, Capture, read_states, subset
from basin_lens.errors import BasinLensError, TextError
from basin_lens.model import HookedModel, missing_points, n_layers
from basin_lens.scoring import analyze
from basin_lens.studies.framework.declared_tests import FEWEST_TO_SPLIT
from basin_lens.studies.framework.measured_texts import HEADLINE, Measured
from basin_lens.studies.framework.random_twin import compression_of, same_tokens, scored_tokens, taken_over
from basin_lens.studies.framework.sequences import choose_sequences
from basin_lens.studies.framework.words import with_words, words_by_passage
from basin_lens.studies.importance import IMPORTANCE
from basin_lens.studies.robustness.stability import AFFINE, SCORE
from basin_lens.texts import Passage, TaggedPassage
from basin_lens.transport import Context

# Measures of importance that cost no more than the pass that reads the texts, and its gradient.
QUICK_IMPORTANCE: tuple[Analyzer, ...] = (AttentionReceived(), GradientNorm())
KS = (5, 10, 15, 30)
FIRST_POSITIONS = 8
TESTED = 200  # tokens of a layer, about: each costs hundreds of passes of the block under every setting
FEWEST_TESTED = 16  # of a sequence: what a partial correlation within it needs (see `study`), and some without a group
NULLS: tuple[Displaced, ...] = ("random_sets",)  # a finding is of compression less theirs
_SAME_TOKENS = ("twin", "dtype")  # kinds of settings whose model has the run's own tokenizer


@dataclass(frozen=True)
class Setting:
    """A table on which findings about its column `HEADLINE` are tested again.

    `kind`: what was changed. `at`: the layer that stands for each layer of the run, in a model of another depth; None: itself.
    """

    name: str
    kind: str
    table: pd.DataFrame
    at: Mapping[int, int] | None = None


def queries(capture: Capture, seed: int, among: Bool[np.ndarray, " rows"] | None = None) -> Bool[np.ndarray, " rows"]:
    """The tokens tested again: of one sequence of each document, a seeded sample of about `TESTED`. The bank stays whole.

    `among`: the tokens to choose from, those that the run measured, of the sequence of a document with most of them; None: all but
    position 0. Of each sequence as many, at least `FEWEST_TESTED` where there are so many.
    """
    seqs = capture.row_seq.numpy()
    held = np.zeros(len(capture.docs), int) if among is None else np.bincount(seqs[among], minlength=len(capture.docs))
    # The last one put in stands: of as many tokens, the first sequence.
    first = {capture.docs[seq]: seq for seq in sorted(range(len(capture.docs)), key=lambda seq: (held[seq], -seq))}
    able = np.isin(seqs, list(first.values())) & (capture.row_pos.numpy() > 0 if among is None else among)
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(able))
    rows = rows[np.argsort(seqs[rows], kind="stable")]
    place = np.arange(len(rows)) - np.searchsorted(seqs[rows], seqs[rows], side="left")  # within its sequence
    chosen = np.zeros(capture.n_rows, bool)
    chosen[rows[place < max(FEWEST_TESTED, TESTED // len(first))]] = True
    return chosen


def tested_tokens(measured: Measured) -> Bool[np.ndarray, " rows"]:
    """Those of the run's own tokens that are tested, as run and again: measured at one of its layers at least."""
    return queries(measured.capture, measured.seed, scored_tokens(measured, HEADLINE))


def parts(table: pd.DataFrame, measured: Measured) -> Iterator[Setting]:
    """Some of the tokens: without the first positions, and each half of the units."""
    # Of the tokens tested only: all stay neighbors of others.
    yield Setting(
        f"tested tokens from position {FIRST_POSITIONS} on", "positions", tables.select(table, table["pos"] >= FIRST_POSITIONS)
    )
    if measured.n_units >= FEWEST_TO_SPLIT:
        half = stats.halves(table, unit=measured.unit, seed=measured.seed + 1)
        yield Setting("one half of the documents", "halves", tables.select(table, half))
        yield Setting("the other half", "halves", tables.select(table, ~half))


def scores(
    model: HookedModel, measured: Measured, table: pd.DataFrame, layers: list[int], untested: list[str]
) -> Iterator[Setting]:
    """Another compression in place of the run's own: other k, metric, neighbors, context, groups, scale."""
    own = measured.settings
    plain = headline_of(measured)
    points = int((measured.capture.row_pos > 0).sum())
    wanted: list[tuple[str, str, Compression]] = []
    for k in KS:
        if k == own["k"]:
            continue
        if k > points // 4:
            untested.append(f"k = {k}: the bank has {points} points.")
            continue
        wanted.append((f"k = {k}", "k", replace(plain, k=k, name=f"k{k}")))
    wanted.append(("cosine neighbors", "metric", replace(plain, metric="cosine", name="cosine")))
    wanted.append(("neighbors of other tokens", "neighbors", replace(plain, same_token="exclude", name="other_token")))
    if own["exclude"] != "document":
        wanted.append(("no neighbors of the document", "neighbors", replace(plain, exclude="document", name="outside")))
    wanted.append(("position 0 among the neighbors", "position 0", replace(plain, position_0=True, name="first_too")))
    wanted.append(("groups of 3 tokens", "groups", replace(plain, group=3, name="group3")))
    wanted.append(("displacements half as long", "scale", replace(plain, scale=0.5, name="half_scale")))
    halves = not missing_points(model, {"resid_mid"}, layers)
    if not halves:
        untested.append("Contexts attn and mlp: parallel blocks have no state between their halves.")
    contexts: tuple[Context, ...] = ("patched", "solo", *(("attn", "mlp") if halves else ()), "affine")
    for context in contexts:
        if context != own["context"]:
            kind = AFFINE if context == "affine" else "context"
            wanted.append((f"context {context}", kind, replace(plain, context=context, name=context)))
    analyzers: list[Analyzer] = [analyzer for _, _, analyzer in wanted]
    if measured.bank is None:
        analyzers.append(SeedCompression(k=own["k"]))
    else:
        untested.append("seed_compression: needs the texts as their own bank.")
    made = analyze(
        model,
        measured.capture,
        analyzers,
        layers=layers,
        bank=measured.bank,
        queries=tested_tokens(measured),
        seed=measured.seed,
        progress=False,
    )
    for name, kind, analyzer in wanted:
        yield Setting(name, kind, taken_over(table, made, {HEADLINE: f"{analyzer.name}_above_random_sets"}))
    if measured.bank is None:
        # Not a setting of the finding, which changes one thing: the original guide's score, for comparison.
        yield Setting("seed_compression, another score", SCORE, taken_over(table, made, {HEADLINE: "seed_compression"}))


def headline_of(measured: Measured) -> Compression:
    """The run's own score, of all tokens asked for, beside random sets alone."""
    return compression_of(measured, NULLS)


def banks(model: HookedModel, measured: Measured, table: pd.DataFrame, layers: list[int], untested: list[str]) -> Iterator[Setting]:
    """Half of the bank, twice the bank if there are texts left, and the built-in passages."""
    own, capture = measured.settings, measured.capture
    analyzers: list[Analyzer] = [headline_of(measured), Neighborhood(k=own["k"], exclude=own["exclude"])]
    asked = tested_tokens(measured)
    others: list[tuple[str, Bank]] = []
    if measured.bank is None:
        order = np.random.default_rng(measured.seed).permutation(len(capture.sequences)).tolist()
        others.append(("half of the bank", subset(capture, sorted(order[: max(2, len(order) // 2)]))))
        more, _ = choose_sequences(measured.planned, 2 * len(capture.sequences), own["per_document"], measured.seed)
        if len(more) >= 1.5 * len(capture.sequences):
            larger = subset(measured.planned, more)
            if not larger.is_read:
                read_states(model, larger, progress=False)
            others.append((f"{len(more) / len(capture.sequences):.1f} times the bank", larger))
        else:
            untested.append("Twice the bank: no more texts were given.")
    others.append(("built-in passages as bank", "reference"))
    for name, bank in others:
        try:
            made = analyze(model, capture, analyzers, layers=layers, bank=bank, queries=asked, seed=measured.seed, progress=False)
        except BasinLensError as error:
            untested.append(f"{name}: {error}")
            continue
        other = taken_over(table, made, {name: name for name in (HEADLINE, "radius", "same_token_share")})
        yield Setting(name, "bank", other)


def other_model(
    build: Callable[[], HookedModel],
    name: str,
    kind: str,
    measured: Measured,
    layers: list[int],
    importance: Sequence[str],
    untested: list[str],
) -> Iterator[Setting]:
    """The same texts read by another model, which finds its own neighbors; layers at the same relative depth.

    A model of the same tokenizer (the random twin, another number format) reads the very tokens of the run, so token ids will do.
    Another one reads the texts.
    """
    own, chosen = measured.capture, measured.settings
    same = kind in _SAME_TOKENS
    near = Neighborhood(k=chosen["k"], exclude=chosen["exclude"])
    analyzers: list[Analyzer] = [headline_of(measured), near, Surprisal(), StateNorm()]
    analyzers += [a for a in IMPORTANCE if any(column.name in importance for column in a.columns)]
    # Another tokenizer may need more tokens for a text; cut again, it would no longer be one sequence.
    length = 4 * chosen["max_length"]

    def planned(capture: Capture) -> Capture:
        if same:
            return same_tokens(capture, model, wanted)
        passages = passages_of(capture)
        if passages is None:
            raise TextError("token ids were given, not texts.")
        return Capture.plan(model, passages, layers=wanted, max_length=length)

    try:
        model = build()
        count, depth = n_layers(model), own.model["layers"]
        at = {layer: layer if count == depth else round(layer / max(1, depth - 1) * (count - 1)) for layer in layers}
        wanted = tuple(sorted(set(at.values())))
        bank = measured.bank
        if isinstance(bank, Capture):
            bank = read_states(model, planned(bank), progress=False)
        capture = planned(own)
        asked = tested_tokens(measured) if same else queries(capture, measured.seed)
        made = analyze(model, capture, analyzers, bank=bank, queries=asked, seed=measured.seed, progress=False)
        if measured.contrast is not None:
            made["contrast"] = measured.contrast.values(made)
    except BasinLensError as error:
        untested.append(f"{name}: {error}")
        return
    if same:
        made = with_frequency(made, measured)
    if capture.passages is not None:
        try:
            made = with_words(made, words_by_passage(capture, "auto")[0])
        except TextError as error:
            untested.append(f"{name}, kinds of words: {error}")
    yield Setting(name, kind, made, at)


def with_frequency(table: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """The table with the run's token frequencies, by token id. Tables of another tokenizer count their own tokens."""
    return table.assign(log_frequency=np.log(table["token_id"].map(dict(measured.frequency)).to_numpy(float)))


def passages_of(capture: Capture) -> list[Passage] | None:
    """The captured pieces of text as passages with their documents, labels, spans and gold words; None without texts."""
    if capture.passages is None:
        return None
    answer = []
    for index, sequence in enumerate(capture.sequences):
        whole = capture.passages[sequence.passage]
        start, end = min(s for s in sequence.starts if s >= 0), max(sequence.ends)
        inside = {n: (max(a, start) - start, min(b, end) - start) for n, (a, b) in whole.spans.items() if a < end and b > start}
        held = {"doc": capture.docs[index], "labels": capture.labels[index], "spans": inside}
        cut = partial(replace, whole, text=whole.text[start:end], **held)
        if isinstance(whole, TaggedPassage):
            within = [w for w in whole.words if w.start >= start and w.end <= end]
            cut = partial(cut, words=tuple(replace(w, start=w.start - start, end=w.end - start) for w in within))
        answer.append(cut())
    return answer
