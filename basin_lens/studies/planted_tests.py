"""What the planted texts show: effect, dose, detection, added value, matched loss, negatives."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from basin_lens import memorize, stats
from basin_lens.errors import StudyError
from basin_lens.studies import base
from basin_lens.studies.planted import CHANGES, SCORES, Planted

BASELINES = (*memorize.LOSS_BASELINES, "reference", "linear_probe", "nearest_memorized", "blind_classifier")
CALIPER = 0.25  # nats per token
_PERMUTED = 500

QUESTIONS = {
    "difference": "memorized texts change in compression unlike those held out",
    "dose": "the difference grows with the dose",
    "added": "compression adds to the loss",
    "matched": "compression differs where the loss is matched",
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
    design: dict[str, Any]


@dataclass(frozen=True)
class _Units:
    """What `base.declared` asks of a measurement."""

    n_units: int
    seed: int
    unit: str = "document"


def examine(planted: Planted) -> Tested:
    """Every test of the planted texts.

    Within each pair a coin decided: differences and slopes are of pairs. The layer of a declared test is chosen on half of the units and
    tested on the others.
    """
    sequences, seed = planted.sequences, planted.plan.seed
    shared: dict[str, Any] = {"unit": "document", "seed": seed}
    apart = pair_differences(sequences, [*CHANGES, *SCORES])
    effects = base.attempt(stats.before_after, apart, [*CHANGES, *SCORES], correction="max-t", **shared)
    parts = [
        base.attempt_each(
            stats.compare_groups, _at_dose(sequences, dose), CHANGES, "member", groups=(True, False), n_resamples=1999, **shared
        ).assign(dose=dose)
        for dose in _doses(planted)
    ]  # fmt: skip
    by_dose = stats.correct(pd.concat(parts, ignore_index=True), "bh")
    slopes = base.attempt(stats.unit_slope, apart, [*CHANGES, *SCORES], "log2_dose", n_resamples=1999, **shared)
    pairs = stats.match_units(planted.texts, "member", "log_likelihood", caliper=CALIPER)
    alike = sequences[sequences["doc"].isin([*pairs["with_label"], *pairs["without_label"]])]
    matched = (
        base.attempt(stats.compare_groups, alike, [*CHANGES, *SCORES], "member", groups=(True, False), correction="holm", **shared)
        if len(pairs)
        else base.empty_finding("compression", "document").assign(note="not tested: no two texts of equal loss")
    )
    added = _added(planted, shared)
    units = _Units(len(planted.texts), seed)
    by_pair = _Units(apart["doc"].nunique(), seed)
    difference = base.declared(
        apart, partial(stats.before_after, on="compression_change", **shared), by_pair, QUESTIONS["difference"], "difference",
        "compression_change",
    )  # fmt: skip
    findings = base.settle("memorization", [
        difference,
        base.declared(
            apart, partial(stats.unit_slope, scores="compression_change", on="log2_dose", **shared), by_pair, QUESTIONS["dose"], "dose",
            "compression_change", stratify="log2_dose",
        ) if apart["log2_dose"].nunique() > 1 else base.empty_finding("compression_change", "document").assign(
            finding=QUESTIONS["dose"], question="dose", p_floor=np.nan, note="one dose only"),
        base.declared(
            sequences, partial(_gain, baselines=["log_likelihood"], shared=shared), units, QUESTIONS["added"], "added", "compression",
            stratify="member",
        ),
        base.declared(
            alike, partial(stats.compare_groups, scores="compression", group="member", groups=(True, False), **shared),
            _Units(2 * len(pairs), seed), QUESTIONS["matched"], "matched", "compression", stratify="member",
        ) if len(pairs) >= 4 else base.empty_finding("compression", "document").assign(
            finding=QUESTIONS["matched"], question="matched", p_floor=np.nan,
            note=f"only {len(pairs)} pairs of texts have equal loss (within {CALIPER} nats)"),
    ])  # fmt: skip
    layer = difference["layer"].iloc[0]
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
        findings, effects, by_dose, slopes, detection, detection_by_dose, added, pairs, matched, negatives, flags, chosen, design,
    )  # fmt: skip


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


def _gain(table: pd.DataFrame, baselines: Sequence[str], shared: dict[str, Any]) -> pd.DataFrame:
    found = stats.added_value(table, "compression", "member", list(baselines), n_resamples=999, **shared)
    return stats.correct(found[found["metric"] == "delta log-loss"].reset_index(drop=True), "bh")


def _added(planted: Planted, shared: dict[str, Any]) -> pd.DataFrame:
    """Each score added to the loss alone, and to all baselines of the loss (and the reference, for changes)."""
    parts = []
    for scores, more in ((SCORES, ()), (CHANGES, ("reference",))):
        for wording, baselines in (("loss", ("log_likelihood", *more)), ("all", (*memorize.LOSS_BASELINES, *more))):
            part = base.attempt(
                stats.added_value, base.inner(planted.sequences), list(scores), "member", list(baselines), correction="none", n_resamples=299,
                **shared,
            )  # fmt: skip
            parts.append(part.assign(baselines=wording))
    return stats.correct(pd.concat(parts, ignore_index=True), "bh")


def _detection(planted: Planted, shared: dict[str, Any]) -> pd.DataFrame:
    """AUROC and TPR of every baseline and score over all texts, and of scores where the layer was chosen on other texts."""
    own = stats.detect(
        planted.texts.assign(matched_share=planted.texts["matched"]),
        [*BASELINES, "matched_share"],
        "member",
        correction="none",
        **shared,
    )
    every = base.attempt(stats.detect, base.inner(planted.sequences), [*SCORES, *CHANGES], "member", correction="none", **shared)
    parts = [own.assign(layer_choice="no layer"), every.assign(layer_choice="every layer")]
    try:
        halved = stats.best_layer(
            base.inner(planted.sequences), lambda t: stats.detect(t, [*SCORES, *CHANGES], "member", correction="none", **shared), stratify="member",
            correction="none", seed=planted.plan.seed,
        )  # fmt: skip
        parts.append(halved[halved["metric"] == "auroc"].assign(layer_choice="chosen on half, reported on the other"))
    except StudyError:  # too few texts to halve: the layers above are all there is
        pass
    return stats.correct(pd.concat(parts, ignore_index=True), "bh")


def _detection_by_dose(planted: Planted, layer: int, shared: dict[str, Any]) -> pd.DataFrame:
    """The same for the members of each dose, at the layer of the declared difference."""
    scores = [*BASELINES, *SCORES, *CHANGES]
    table = planted.sequences[planted.sequences["layer"] == layer]
    parts = [
        base.attempt_each(stats.detect, _at_dose(table, dose), scores, "member", **shared).assign(dose=dose)
        for dose in _doses(planted)
    ]
    return stats.correct(pd.concat(parts, ignore_index=True), "bh")


def _negatives(planted: Planted, layer: int, shared: dict[str, Any]) -> pd.DataFrame:
    """AUROC where there is nothing to find: intervals must hold 0.5."""
    top = max(_doses(planted))
    cases = [
        ("blind classifier (text only)", planted.texts, ["blind_classifier"]),
        ("before training", planted.texts, ["base_log_likelihood"]),
        ("before training", planted.tokens_base_at(layer), [f"{name}_base" for name in SCORES]),
        ("random weights", planted.random_twin[planted.random_twin["layer"] == layer], ["compression", "compression_native"]),
        ("tuned on other texts", planted.other_tuned[planted.other_tuned["layer"] == layer],
         ["compression", "compression_native", "compression_change", "compression_native_change"]),
    ]  # fmt: skip
    parts = []
    for name, table, scores in cases:
        found = base.attempt_each(stats.detect, table, scores, "member", rates=(), **shared)
        parts.append(found.assign(negative=name))
    every = pd.concat(parts, ignore_index=True)
    sequences = planted.sequences[planted.sequences["layer"] == layer]
    lines = []
    rng = np.random.default_rng(planted.plan.seed)
    truth, pair = sequences["member"].to_numpy(bool), sequences["pair"].to_numpy()
    for score in ("log_likelihood", "compression", "compression_change"):
        values = sequences[score].to_numpy(float)
        drawn = []
        for _ in range(_PERMUTED):
            flip = rng.integers(0, 2, int(pair.max()) + 1).astype(bool)[pair]
            labels = truth ^ flip
            order = pd.Series(values).rank().to_numpy()
            count = labels.sum()
            drawn.append((order[labels].sum() - count * (count + 1) / 2) / (count * (len(order) - count)))
        low, high = np.quantile(drawn, [0.025, 0.975])
        lines.append({
            "negative": "permuted labels", "score": score, "layer": layer, "unit": "document", "n_units": len(truth), "n_sequences": len(truth),
            "n_documents": len(truth), "test": f"mean and middle 95 % of {_PERMUTED} coin flips within pairs", "effect": "auroc", "metric": "auroc",
            "estimate": float(np.mean(drawn)), "low": low, "high": high, "null": 0.5,
        })  # fmt: skip
    answer = pd.concat([every, pd.DataFrame(lines)], ignore_index=True)
    # At the dose that is memorized beyond doubt, too.
    answer["at_half"] = (answer["low"] <= 0.5) & (answer["high"] >= 0.5)
    answer["highest_dose"] = top
    answer["layer"] = answer["layer"].astype("Int64")
    return stats.correct(answer.assign(p=answer["p"].astype(float)), "bh")


def _flags(
    planted: Planted,
    apart: pd.DataFrame,
    negatives: pd.DataFrame,
    design: dict[str, Any],
    detection: pd.DataFrame,
    findings: pd.DataFrame,
    shared: dict[str, Any],
) -> pd.DataFrame:
    """The usual four, and those of a planted design."""
    usual = base.red_flags(base.inner(apart), "compression_change", **shared)
    usual = usual[usual["flag"] != "vanishes under controls"].assign(question="difference")
    lines = []

    def add(flag: str, raised: bool, why: str, question: str = "difference", **numbers: Any) -> None:
        lines.append({"flag": flag, "score": "", "raised": bool(raised), "why": why, "question": question, **numbers})

    add(
        "the design does not work", not design["estimate"] > 0.9,
        f"the log likelihood tells members of the highest dose from texts held out with AUROC {design['estimate']:.2f} (expected above 0.9)",
        value=design["estimate"], limit=0.9,
    )  # fmt: skip
    top = planted.texts[planted.texts["member"] & (planted.texts["dose"] == planted.texts["dose"].max())]
    add(
        "nothing is extractable",
        not top["extracted"].any(),
        f"{int(top['extracted'].sum())} of {len(top)} members of the highest dose are extractable",
    )
    off = negatives[(~negatives["at_half"]) & (negatives["negative"] != "permuted labels")]
    real = off[off["p_corrected"] <= base.ALPHA]
    add(
        "a negative is not at 0.5", len(real) > 0,
        "; ".join(f"{r.negative}, {r.score}: {r.estimate:.2f} (corrected p {r.p_corrected:.2g})" for r in base.rows(real))
        or f"no corrected p at most 0.05 ({len(off)} of {len(negatives)} intervals leave 0.5 out)",
    )  # fmt: skip
    blind = detection[(detection["score"] == "blind_classifier") & (detection["metric"] == "auroc")].iloc[0]
    add(
        "texts can be told apart blindly",
        bool(blind["low"] > 0.5),
        f"AUROC {blind['estimate']:.2f} ({blind['low']:.2f} to {blind['high']:.2f}) from the text alone",
    )
    held = planted.texts[~planted.texts["member"]]
    shift = float((held["log_likelihood"] - held["base_log_likelihood"]).mean())
    own = planted.texts[planted.texts["member"]]
    gain = float((own["log_likelihood"] - own["base_log_likelihood"]).mean())
    add(
        "texts held out became likely, too", shift > 0.5 * gain,
        f"training raised the log likelihood of texts held out by {shift:+.2f} nats per token, of members by {gain:+.2f}", value=shift,
        limit=0.5 * gain,
    )  # fmt: skip
    rest = findings[findings["question"] == "added"].iloc[0]
    found = bool(findings.loc[findings["question"] == "difference", "holds"].any())
    alone = found and not bool(rest["holds"])
    add(
        "vanishes beside the loss",
        alone,
        "the difference holds, but nothing shows that compression adds to the loss"
        if alone
        else "compression adds to the loss"
        if rest["holds"]
        else "there is no difference to vanish",
    )
    return pd.concat([usual, pd.DataFrame(lines)], ignore_index=True).astype({"raised": "boolean", "layer": "Int64"})
