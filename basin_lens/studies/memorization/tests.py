"""What the planted texts show: effect, dose, detection, added value, matched loss, negatives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from basin_lens import memorize, stats, tables
from basin_lens.errors import StudyError
from basin_lens.studies.framework.attempts import attempt, attempt_each, checked_red_flags, empty_finding
from basin_lens.studies.framework.declared_tests import ALPHA, declared_test, settle
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.spec import UnitAndSeed
from basin_lens.studies.framework.table_parts import above_layer_0, named_rows
from basin_lens.studies.framework.units import FEWEST_UNITS
from basin_lens.studies.memorization.experiment import Planted
from basin_lens.studies.memorization.scores import BEFORE, CHANGE, CHANGES, SCORES

BASELINES = (*memorize.LOSS_BASELINES, "reference", "linear_probe", "nearest_memorized", "blind_classifier")
CALIPER = 0.25  # nats per token
_PERMUTED = 40

QUESTIONS = {
    "difference": "memorized texts change in compression unlike those held out",
    "dose": "that difference depends on the dose",
    "added": "compression adds to the loss, the reference and the kind of text",
    "matched": "compression differs between texts of one kind and equal loss",
}


@dataclass(frozen=True)
class Tested:
    """Result tables, and the declared tests among them.

    `chosen`: layer of the declared difference. `design`: AUROC of the log likelihood at the highest dose.
    """

    findings: pd.DataFrame
    effects: pd.DataFrame
    by_dose: pd.DataFrame
    slopes: pd.DataFrame
    detection: pd.DataFrame
    detection_by_dose: pd.DataFrame
    added: pd.DataFrame
    pairs: pd.DataFrame
    matched: pd.DataFrame
    negatives: pd.DataFrame
    flags: pd.DataFrame
    chosen: int
    design: dict[str, float]


@dataclass(frozen=True)
class _Units:
    """What `declared_test` asks of a measurement."""

    n_units: int
    seed: int
    unit: str = "document"


def examine(planted: Planted) -> Tested:
    """Every test of the planted texts.

    Within each pair a coin decided: differences, slopes and permutations are of pairs. The layer of a declared test is chosen on
    half of the units and tested on the others.
    """
    sequences, seed = planted.sequences, planted.plan.seed
    shared: UnitAndSeed = {"unit": "document", "seed": seed}
    apart = pair_differences(sequences, [*CHANGES, *SCORES])
    effects = attempt(stats.before_after, apart, [*CHANGES, *SCORES], correction="max-t", **shared)
    parts = [
        attempt_each(
            stats.compare_groups, _at_dose(sequences, dose), CHANGES, "member", groups=(True, False), n_resamples=1999, **shared
        ).assign(dose=dose)
        for dose in _doses(planted)
    ]
    by_dose = stats.correct(pd.concat(parts, ignore_index=True), "bh")
    slopes = attempt(stats.unit_slope, apart, [*CHANGES, *SCORES], "log2_dose", n_resamples=1999, **shared)
    pairs = matched_pairs(planted.texts)
    alike = _matched_differences(sequences, pairs)
    matched = attempt_each(stats.before_after, alike, [*SCORES, *BEFORE], **shared) if len(pairs) else _untested("matched", pairs)
    rows = _declared(planted, apart, alike, pairs)
    findings = settle("memorization", rows)
    layer = rows[0]["layer"].iloc[0]
    chosen = int(layer) if pd.notna(layer) else planted.layers[len(planted.layers) // 2]
    detection = _detection(planted, shared)
    detection_by_dose = _detection_by_dose(planted, chosen, shared)
    top = max(_doses(planted))
    found = detection_by_dose[(detection_by_dose["dose"] == top) & (detection_by_dose["metric"] == "auroc")]
    row = found[found["score"] == "log_likelihood"].iloc[0]
    design = {name: float(row[name]) for name in ("estimate", "low", "high")} | {"dose": top}
    negatives = _negatives(planted, chosen, shared)
    flags = _flags(planted, apart, negatives, design, detection, findings, shared)
    return Tested(
        findings,
        effects,
        by_dose,
        slopes,
        detection,
        detection_by_dose,
        _added(planted),
        pairs,
        stats.correct(matched, "bh") if len(pairs) else matched,
        negatives,
        flags,
        chosen,
        design,
    )


def _declared(planted: Planted, apart: pd.DataFrame, alike: pd.DataFrame, pairs: pd.DataFrame) -> list[pd.DataFrame]:
    """The declared tests, a row each: differences within pairs, their slope over doses, added value, pairs of equal loss."""
    seed = planted.plan.seed
    shared: UnitAndSeed = {"unit": "document", "seed": seed}
    by_pair = _Units(apart["doc"].nunique(), seed)
    change = partial(stats.before_after, on=CHANGE, **shared)
    slope = partial(stats.unit_slope, scores=CHANGE, on="log2_dose", **shared)
    gain = partial(_gain, baselines=["log_likelihood", "reference", *_kinds(planted)], seed=seed)
    equal_loss = partial(stats.before_after, on=HEADLINE, **shared)
    asked = QUESTIONS
    rows = [declared_test(apart, change, by_pair, asked["difference"], "difference", CHANGE)]
    if apart["log2_dose"].nunique() > 1:
        rows.append(declared_test(apart, slope, by_pair, asked["dose"], "dose", CHANGE, stratify="log2_dose"))
    else:
        rows.append(_untested("dose", pairs))
    rows.append(declared_test(planted.sequences, gain, replace(by_pair, unit="pair"), asked["added"], "added"))
    if len(pairs) >= FEWEST_UNITS:
        rows.append(declared_test(alike, equal_loss, _Units(len(pairs), seed), asked["matched"], "matched"))
    else:
        rows.append(_untested("matched", pairs))
    return rows


def _untested(question: str, pairs: pd.DataFrame) -> pd.DataFrame:
    """The row of a declared test that these texts cannot have."""
    why = {
        "dose": "one dose only",
        "matched": f"only {len(pairs)} pairs of texts of one kind have equal loss, within "
        f"{CALIPER} nats per token; {FEWEST_UNITS} are needed",
    }
    return empty_finding(HEADLINE, "document").assign(
        finding=QUESTIONS[question], question=question, p_floor=np.nan, note=why[question]
    )


def matched_pairs(texts: pd.DataFrame) -> pd.DataFrame:
    """Trained and held out texts of one kind whose log likelihoods under the tuned model are equal within the caliper.

    Equal after the training means that the trained text was the harder one before it: `first_before`, `second_before`.
    """
    pairs = stats.match_units(texts, "member", "log_likelihood", caliper=CALIPER, within=["kind"])
    known = texts.set_index("doc")
    return pairs.assign(
        kind=known["kind"].reindex(pairs["with_label"]).to_numpy(),
        dose=known["dose"].reindex(pairs["with_label"]).to_numpy(),
        first_before=known["base_log_likelihood"].reindex(pairs["with_label"]).to_numpy(),
        second_before=known["base_log_likelihood"].reindex(pairs["without_label"]).to_numpy(),
    )


def _matched_differences(sequences: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Trained less held out of each matched pair, by layer; the pair is the document."""
    names = [*SCORES, *BEFORE]
    wide = sequences.set_index(["layer", "doc"])[names]
    parts = []
    for number, pair in enumerate(named_rows(pairs)):
        apart = wide.xs(pair.with_label, level="doc") - wide.xs(pair.without_label, level="doc")
        parts.append(apart.reset_index().assign(doc=f"match-{number}", seq=f"match-{number}"))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _kinds(planted: Planted) -> list[str]:
    return [str(name) for name in planted.texts if str(name).startswith("kind_")]


def pair_differences(sequences: pd.DataFrame, scores: Sequence[str]) -> pd.DataFrame:
    """Trained less held out of each pair, by layer: what the coin decided. The pair is the document; `log2_dose` is its own."""
    wide = sequences.pivot(index=["layer", "pair", "dose"], columns="member", values=list(scores))
    apart = pd.DataFrame({name: wide[name][True] - wide[name][False] for name in scores}).reset_index()
    apart["doc"] = "pair-" + apart["pair"].astype(str)
    return apart.assign(seq=apart["doc"], log2_dose=np.log2(apart["dose"].astype(float)))


def _doses(planted: Planted) -> list[int]:
    return sorted(int(d) for d in planted.texts["dose"].unique())


def _at_dose(table: pd.DataFrame, dose: int) -> pd.DataFrame:
    """Members of one dose against every text held out: those were never shown, whatever their pair's dose."""
    return table[(~table["member"]) | (table["dose"] == dose)]


def _gain(table: pd.DataFrame, baselines: Sequence[str], seed: int) -> pd.DataFrame:
    """What compression adds, labels exchanged within pairs."""
    found = stats.added_value(table, HEADLINE, "member", list(baselines), unit="pair", n_resamples=999, seed=seed)
    return stats.correct(found[found["metric"] == "delta log-loss"].reset_index(drop=True), "bh")


def _added(planted: Planted) -> pd.DataFrame:
    """Each score added to the loss, and to all baselines, always with the reference and the kind of text.

    Compression before the training (`_base`) is among the scores as a negative: it knows how hard a text is, but not whether it
    was trained on.
    """
    parts = []
    always = ("reference", *_kinds(planted))
    everything = (*memorize.LOSS_BASELINES, "linear_probe", "nearest_memorized", *always)
    for wording, baselines in (("loss", ("log_likelihood", *always)), ("all", everything)):
        for score in (*SCORES, *CHANGES, BEFORE[0]):
            table, shared = above_layer_0(planted.sequences), {"unit": "pair", "seed": planted.plan.seed, "correction": "none"}
            part = attempt(stats.added_value, table, score, "member", list(baselines), n_resamples=999, **shared)
            # Too few pairs to test: the row says so, and of what.
            parts.append(part.assign(baselines=wording, metric=part.get("metric", "delta log-loss")))
    every = pd.concat(parts, ignore_index=True)
    # Two measures of one gain: each is a family of its own.
    first = every["metric"] == "delta log-loss"
    return pd.concat(
        [stats.correct(part.reset_index(drop=True), "bh") for part in (every[first], every[~first]) if len(part)], ignore_index=True
    )


def _detection(planted: Planted, shared: UnitAndSeed) -> pd.DataFrame:
    """AUROC and TPR of every baseline and score over all texts, less those of the loss; and with layers chosen on other texts."""
    scores = [*SCORES, *CHANGES]
    versus = "log_likelihood"
    own = stats.detect(planted.texts, [*BASELINES, "matched"], "member", versus=versus, correction="none", **shared)
    every = attempt_each(stats.detect, above_layer_0(planted.sequences), scores, "member", versus=versus, **shared)
    parts = [own.assign(layer_choice="no layer"), every.assign(layer_choice="every layer")]
    try:
        halved = stats.best_layer(
            above_layer_0(planted.sequences),
            lambda t: stats.detect(t, scores, "member", correction="none", **shared),
            stratify="member",
            correction="none",
            seed=planted.plan.seed,
        )
        # One layer for a score: that of its AUROC.
        layers = halved[halved["metric"] == "auroc"].set_index("score")["layer"]
        halved = halved[halved["layer"] == halved["score"].map(layers)]
        parts.append(halved.assign(layer_choice="chosen on half, reported on the other"))
    except StudyError:
        empty = empty_finding(HEADLINE, "document").assign(metric="auroc", note="too few texts to choose a layer on half of them")
        parts.append(empty.assign(layer_choice="chosen on half, reported on the other"))
    return stats.correct(pd.concat(parts, ignore_index=True), "bh")


def _detection_by_dose(planted: Planted, layer: int, shared: UnitAndSeed) -> pd.DataFrame:
    """The same for the members of each dose, at the layer of the declared difference."""
    scores = [*BASELINES, *SCORES, *CHANGES]
    table = planted.sequences[planted.sequences["layer"] == layer]
    parts = [
        attempt_each(stats.detect, _at_dose(table, dose), scores, "member", **shared).assign(dose=dose) for dose in _doses(planted)
    ]
    return stats.correct(pd.concat(parts, ignore_index=True), "bh")


def _negatives(planted: Planted, layer: int, shared: UnitAndSeed) -> pd.DataFrame:
    """AUROC where there is nothing to find: intervals must hold 0.5."""
    at = planted.sequences[planted.sequences["layer"] == layer]
    cases = [
        ("blind classifier (text only)", planted.texts, ["blind_classifier"]),
        ("before training", planted.texts, ["base_log_likelihood"]),
        ("before training", at, [*BEFORE]),
        ("random weights", planted.random_twin[planted.random_twin["layer"] == layer], [*SCORES]),
        ("tuned on other texts", planted.other_tuned[planted.other_tuned["layer"] == layer], [*SCORES, *CHANGES]),
    ]
    parts = []
    for name, table, scores in cases:
        found = attempt_each(stats.detect, table, scores, "member", rates=(), **shared)
        parts.append(found.assign(negative=name))
    answer = pd.concat([*parts, _permuted(planted)], ignore_index=True)
    holds = (answer["low"] <= 0.5) & (answer["high"] >= 0.5)
    answer["at_half"] = holds.astype("boolean").mask(answer["low"].isna())
    answer["layer"] = answer["layer"].astype("Int64")
    return stats.correct(answer.assign(p=answer["p"].astype(float)), "bh")


def _permuted(planted: Planted) -> pd.DataFrame:
    """What depends on labels, made again with labels of new coins within the pairs: the probe, and a layer's choice on half."""
    texts, plan = planted.texts, planted.plan
    rng = np.random.default_rng(plan.seed)
    truth, pair = texts["member"].to_numpy(bool), texts["pair"].to_numpy()
    wide = above_layer_0(planted.sequences).pivot(index="layer", columns="seq", values=HEADLINE).loc[:, texts["seq"]].to_numpy()
    # A text of which no token found a group tells nothing: the layer's mean. A layer without any is none to choose.
    wide = wide[np.isfinite(wide).any(axis=1)]
    wide = np.where(np.isfinite(wide), wide, np.nanmean(wide, axis=1, keepdims=True))
    drawn: dict[str, list[float]] = {"linear_probe": [], HEADLINE: []}
    for turn in range(_PERMUTED):
        labels = truth ^ rng.integers(0, 2, int(pair.max()) + 1).astype(bool)[pair]
        parts = memorize.folds(labels, pair, seed=turn)
        drawn["linear_probe"].append(float(roc_auc_score(labels, memorize.linear_probe(planted.states, labels, parts))))
        first = np.isin(pair, rng.permutation(np.unique(pair))[: len(np.unique(pair)) // 2])
        chosen = [float(roc_auc_score(labels[first], row[first])) for row in wide]
        best = int(np.argmax(np.abs(np.array(chosen) - 0.5)))
        # As an analyst would: turned so that it found what it was chosen for.
        turned = np.sign(chosen[best] - 0.5) or 1.0
        drawn[HEADLINE].append(float(roc_auc_score(labels[~first], turned * wide[best][~first])))
    lines = []
    for score, what in (("linear_probe", "fitted"), (HEADLINE, "layer and direction chosen on half of the pairs")):
        low, high = tables.interval(np.array(drawn[score]))
        lines.append(
            {
                "negative": "permuted labels",
                "score": score,
                "layer": pd.NA if score == HEADLINE else planted.probe_layer,
                "unit": "document",
                "n_units": len(truth),
                "n_sequences": len(truth),
                "n_documents": len(truth),
                "effect": "auroc",
                "metric": "auroc",
                "test": f"mean of {_PERMUTED} coin flips within pairs, {what} anew, with its 95 % interval",
                "null": 0.5,
                "estimate": float(np.mean(drawn[score])),
                "low": low,
                "high": high,
            }
        )
    return pd.DataFrame(lines)


def _flags(
    planted: Planted,
    apart: pd.DataFrame,
    negatives: pd.DataFrame,
    design: dict[str, float],
    detection: pd.DataFrame,
    findings: pd.DataFrame,
    shared: UnitAndSeed,
) -> pd.DataFrame:
    """The usual ones, of the difference, and those of a planted design, which count for every question."""
    usual = checked_red_flags(above_layer_0(apart), CHANGE, **shared)
    usual = usual[usual["flag"] != "vanishes under controls"].assign(question="difference")
    lines = [
        *_design_flags(planted, design),
        *_negative_flags(negatives, detection),
        *_training_flags(planted, findings),
    ]
    return pd.concat([usual, pd.DataFrame(lines)], ignore_index=True).astype({"raised": "boolean", "layer": "Int64"})


def _flag(flag: str, raised: bool, why: str, question: str = "every", **numbers: float) -> dict[str, object]:
    return {"flag": flag, "score": "", "raised": bool(raised), "why": why, "question": question, **numbers}


def _design_flags(planted: Planted, design: dict[str, float]) -> list[dict[str, object]]:
    """Whether anything was memorized."""
    lines = []
    lines.append(
        _flag(
            "the design does not work",
            not design["estimate"] > 0.9,
            "the log likelihood tells members of the highest dose from texts held out with AUROC "
            f"{design['estimate']:.2f} (expected above 0.9)",
            value=design["estimate"],
            limit=0.9,
        )
    )
    top = planted.texts[planted.texts["member"] & (planted.texts["dose"] == planted.texts["dose"].max())]
    lines.append(
        _flag(
            "nothing is extractable",
            not top["extracted"].any(),
            f"{int(top['extracted'].sum())} of {len(top)} members of the highest dose are extractable",
        )
    )
    return lines


def _negative_flags(negatives: pd.DataFrame, detection: pd.DataFrame) -> list[dict[str, object]]:
    """Whether something is found where there is nothing."""
    lines = []
    real = negatives[negatives["p_corrected"] <= ALPHA]
    off = int((~negatives["at_half"].fillna(True)).sum())
    lines.append(
        _flag(
            "a negative is not at 0.5",
            len(real) > 0,
            "; ".join(f"{r.negative}, {r.score}: {r.estimate:.2f} (corrected p {r.p_corrected:.2g})" for r in named_rows(real))
            or f"no corrected p at most 0.05; {off} of {len(negatives)} intervals leave 0.5 out, "
            f"{int(negatives['at_half'].isna().sum())} could not be had",
        )
    )
    blind = detection[
        (detection["score"] == "blind_classifier") & (detection["metric"] == "auroc") & detection["versus"].isna()
    ].iloc[0]
    lines.append(
        _flag(
            "texts can be told apart blindly",
            bool(blind["low"] > 0.5),
            f"AUROC {blind['estimate']:.2f} ({blind['low']:.2f} to {blind['high']:.2f}) from the text alone",
        )
    )
    return lines


def _training_flags(planted: Planted, findings: pd.DataFrame) -> list[dict[str, object]]:
    """Whether the training reached texts held out, and whether the loss says it all."""
    lines = []
    held, own = planted.texts[~planted.texts["member"]], planted.texts[planted.texts["member"]]
    shift, gain = (float(part["reference"].mean()) for part in (held, own))
    lines.append(
        _flag(
            "texts held out became likely, too",
            shift > 0.5 * gain,
            f"training raised the log likelihood of texts held out by {shift:+.2f} nats per token, of members by {gain:+.2f}",
            value=shift,
            limit=0.5 * gain,
        )
    )
    holds = findings.set_index("question")["holds"]
    alone = bool(holds["difference"]) and not bool(holds["added"])
    lines.append(
        _flag(
            "vanishes beside the loss",
            alone,
            "the difference holds, but nothing shows that compression adds to the loss"
            if alone
            else "compression adds to the loss"
            if holds["added"]
            else "there is no difference to vanish",
            question="difference",
        )
    )
    return lines
