"""The memorization study as figures, sections and sentences."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from basin_lens import tables
from basin_lens.studies.framework.declared_tests import ALPHA, Decision
from basin_lens.studies.framework.display_columns import shown
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.table_parts import above_layer_0, named_rows
from basin_lens.studies.framework.wording import in_words, opening, sentence, why_untested
from basin_lens.studies.memorization.counterfactuals import Forked
from basin_lens.studies.memorization.experiment import Planted
from basin_lens.studies.memorization.extraction import Recited
from basin_lens.studies.memorization.scores import CHANGE, CHANGES, CROSSED, SCORES
from basin_lens.studies.memorization.tests import BASELINES, CALIPER, Tested
from basin_lens.views import Section, distributions, dose_curve, forest, result_curve, roc, token_view

_DETECTORS = ("log_likelihood", "reference", "min_k_plus", "linear_probe", "blind_classifier", HEADLINE, CHANGE)


def sections_of(
    planted: Planted, tested: Tested, forked: Forked, recited: Recited, author: pd.DataFrame | None
) -> tuple[list[Section], dict[str, Figure]]:
    """Findings in the order of their questions."""
    layer = tested.chosen
    at_layer = planted.sequences[planted.sequences["layer"] == layer]
    figures = {
        "effect-by-layer": result_curve(_of(above_layer_0(tested.effects), CHANGES), by="score"),
        "dose": _dose_figure(planted, layer),
        "roc": _roc_figure(planted, tested, layer),
        "distributions": distributions(at_layer.assign(group=_groups(at_layer)), CHANGE, "group", layer),
        "detection": forest(_detected(tested, layer), "score", by="dose", title=f"AUROC by dose, scores at layer {layer}"),
        "negatives": forest(tested.negatives, ["negative", "score"], title=f"Where there is nothing to find, layer {layer}"),
    }
    forks = _of(above_layer_0(forked.forks), (HEADLINE, CHANGE))
    figures |= {"fork-by-layer": result_curve(forks, by="score"), "damaged-prefixes": _damaged_figure(forked, layer)}
    if author is not None:
        figures["author"] = result_curve(_of(above_layer_0(author), (HEADLINE,)), by="contrast")
    return [
        *_planting_sections(planted, tested, figures),
        *_detection_sections(tested, figures),
        *_counterfactual_sections(forked, figures, layer),
        *_recitation_sections(recited),
        *([] if author is None else [_author_section(author, figures)]),
        _negatives_section(planted, tested, figures),
    ], figures


def _planting_sections(planted: Planted, tested: Tested, figures: Mapping[str, Figure]) -> list[Section]:
    layer = tested.chosen
    return [
        Section(
            "Did the planting work?",
            "Members under the tuned model, by dose, and the texts held out. Log likelihoods are means per token; extraction "
            f"prompts with {planted.plan.prompt} tokens and compares the next {planted.plan.target}; guide_memorized is the "
            "original guide's label (prompt of a third, more than 80 % of the greedy tokens match).",
            table=_planting(planted),
        ),
        Section(
            "Do memorized texts change in compression?",
            "Difference in differences of compression less that of random sets, and of contraction: tuned less base, trained "
            f"less held out within each pair, in nats. Compression is the mean over {CROSSED} tokens of each text, evenly spaced "
            "and the same under every model; contraction over all of them.",
            figure=figures["effect-by-layer"],
            caption="Mean difference with 95 % intervals over pairs (layer 0 in the table); filled: corrected p at most 0.05 "
            "(max-|t| over all layers and scores).",
            table=shown(tested.effects, "layer", "score"),
        ),
        Section(
            "By dose",
            f"Change in compression at layer {layer} of the texts of each dose; below, slopes per doubling of the dose of the "
            "difference within pairs.",
            figure=figures["dose"],
            caption="Mean over texts with Student's 95 % interval; single texts behind it; texts held out by the dose of their "
            "pair.",
            table=shown(tested.slopes, "layer", "score", "rho"),
        ),
        Section(
            "The change, text by text", figure=figures["distributions"], caption=f"Mean over tokens of a text at layer {layer}."
        ),
    ]


def _detection_sections(tested: Tested, figures: Mapping[str, Figure]) -> list[Section]:
    layer, top = tested.chosen, tested.design["dose"]
    return [
        Section(
            "Detection by every score and baseline",
            "All are oriented so that higher means memorized, but compression and contraction, whose direction is not known "
            "beforehand: an AUROC below "
            "0.5 separates as well as one above. True positives at 1 % (5 %) false positives need 100 (20) texts held out. "
            "reference, and whatever ends in _change, use the base model, which an outsider may not have.",
            figure=figures["detection"],
            caption="AUROC, members of each dose against all texts held out, with 95 % bootstrap intervals over texts. The "
            "layer was chosen on half of these very texts: exploratory.",
            table=shown(
                tested.detection[tested.detection["layer_choice"] != "every layer"],
                "layer_choice",
                "layer",
                "score",
                "metric",
                "versus",
                "n_positive",
                "n_negative",
            ),
        ),
        Section("Curves", figure=figures["roc"], caption=f"Members of dose {top} against texts held out; scores at layer {layer}."),
        Section(
            "What compression adds",
            "Logistic regression on the baselines, without and with the score, on pairs that were not fitted; labels are "
            "exchanged within pairs. baselines = loss: log likelihood, its change from the base model (reference) and the kind "
            "of text; all: every other baseline, too. Positive: the score helps. The score measured before "
            "the training (_base) is a negative: it can know how hard a text is, not whether it was trained on.",
            table=shown(tested.added, "layer", "score", "baselines", "metric"),
        ),
        Section(
            "Where the loss is equal",
            f"{len(tested.pairs)} pairs of a trained and a held out text of one kind whose log likelihoods under the tuned model "
            f"differ by at most {CALIPER} nats per token{_matched_doses(tested)}. What was memorized well has no match, and what "
            "has one was harder before the training: the scores measured then (_base) show how far that alone goes.",
            table=shown(tested.matched, "layer", "score"),
        ),
    ]


def _counterfactual_sections(forked: Forked, figures: Mapping[str, Figure], layer: int) -> list[Section]:
    return [
        Section(
            "The fork: the same prefix, another continuation",
            "The true continuation less another behind the same prefix of a memorized text: of four that the base model "
            "sampled and four tails of other texts "
            "of the kind, the one that the base model finds as likely. _change: tuned less base.",
            figure=figures["fork-by-layer"],
            caption="Mean difference over prefixes with 95 % intervals.",
            table=shown(forked.forks, "layer", "score"),
            note=_gap(forked),
        ),
        Section(
            "How wide is the path?",
            "Prefixes of memorized texts with more and more tokens replaced at random; width: replacements at which less than "
            "half of the continuation is "
            "recited (infinite: never in this range).",
            figure=figures["damaged-prefixes"],
            caption="Lines: single texts; marks: their mean. Compression (less that of random sets) of "
            f"{CROSSED} of the true continuation's tokens at layer {layer}.",
            table=forked.widths,
        ),
        Section(
            "Does it say where?",
            "Texts of which only the middle was trained on, between parts of held out texts of its kind: tokens of the "
            "memorized part less the others of the "
            f"same text, tuned less base. Compression is of {CROSSED} tokens of either part. The memorized part always stands in "
            "the middle: position is not controlled.",
            view=token_view(
                forked.spliced,
                ["agreement", "contraction", HEADLINE, "surprisal"],
                layer=layer,
                seq=int(forked.spliced["seq"].min()),
            ),
            table=shown(forked.where, "layer", "score"),
        ),
    ]


def _recitation_sections(recited: Recited) -> list[Section]:
    sections = [
        Section(
            "Recitation without planting (exploratory)",
            "The base model on texts that it may know. No coin decided here: openings differ from later passages in style and "
            "topic, too.",
            table=_recitation(recited),
        ),
        Section(
            "Openings against their controls",
            "Opening less the other passage of the same source.",
            table=shown(recited.contrasts, "contrast", "layer", "score"),
        ),
    ]
    if len(recited.matched):
        sections.append(
            Section(
                "Openings and later passages of equal loss",
                "Any source with any other; a source may stand on both sides.",
                table=shown(recited.matched, "layer", "score", "n_first", "n_second"),
            )
        )
    return sections


def _author_section(author: pd.DataFrame, figures: Mapping[str, Figure]) -> Section:
    return Section(
        "The original guide's contrast",
        "Trained passages against unrelated text differ in author, topic and date as well as in training; against "
        "held out passages of the same "
        "author, in training alone.",
        figure=figures["author"],
        table=shown(author, "contrast", "layer", "score", "n_first", "n_second"),
    )


def _negatives_section(planted: Planted, tested: Tested, figures: Mapping[str, Figure]) -> Section:
    return Section(
        "Negatives",
        "Here nothing should be found: every interval should hold 0.5. The model tuned on other texts saw "
        f"{planted.plan.others * planted.plan.other_dose} of them, the tuned one "
        f"{planted.facts['training']['texts_shown']}. Permuted labels: the probe "
        "and the choice of a layer are made anew with labels of other coins.",
        figure=figures["negatives"],
        caption="AUROC with 95 % intervals over texts (permuted labels: of the mean over coin flips).",
        table=shown(tested.negatives, "negative", "layer", "score", "at_half"),
    )


def verdict_of(
    decision: Decision, planted: Planted, tested: Tested, forked: Forked, recited: Recited, author: pd.DataFrame | None
) -> list[str]:
    """Every hypothesis in words, the design's own check first."""
    design = tested.design
    top = planted.texts[planted.texts["member"] & (planted.texts["dose"] == design["dose"])]
    told = [
        opening(
            decision,
            "Compression sees what was memorized, and adds to the loss.",
            "None of the declared tests shows that compression sees what was memorized.",
        ),
        f"The design {'works' if design['estimate'] > 0.9 else 'does not work'}: the log likelihood tells members shown "
        f"{design['dose']} times from texts held "
        f"out with AUROC {design['estimate']:.2f} ({design['low']:.2f} to {design['high']:.2f}); {int(top['extracted'].sum())} "
        f"of {len(top)} are extractable.",
        *(sentence(row, _UNITS[row.question]) for row in named_rows(tested.findings)),
    ]
    told.append(_by_dose(tested))
    halved = tested.detection[tested.detection["layer_choice"].str.startswith("chosen") & (tested.detection["metric"] == "auroc")]
    for one in named_rows(halved[halved["score"].isin([HEADLINE, CHANGE])]):
        told.append(
            f"{one.score} alone: could not be tested ({why_untested(one.note)})."
            if pd.isna(one.estimate)
            else f"{one.score} alone: AUROC {one.estimate:.2f} ({one.low:.2f} to {one.high:.2f}) at layer {int(one.layer)}, "
            "chosen on other texts."
        )
    loss = tested.detection[(tested.detection["score"] == "log_likelihood") & (tested.detection["metric"] == "auroc")].iloc[0]
    told.append(
        f"The log likelihood alone, over all doses: AUROC {loss['estimate']:.2f} ({loss['low']:.2f} to {loss['high']:.2f})."
    )
    known = tested.negatives[tested.negatives["at_half"].notna()]
    told.append(
        f"Negatives: {int(known['at_half'].sum())} of {len(known)} intervals hold 0.5; the smallest corrected p is "
        f"{in_words(float(known['p_corrected'].min()))}."
    )
    told.append(_fork(forked))
    told.append(_widths(forked))
    told.append(_where(forked, tested.chosen))
    told.append(_recited(recited))
    if author is not None:
        rows = author[(author["score"] == CHANGE) & (author["layer"] == tested.chosen)]
        told += [
            f"{r.contrast}: {r.estimate:+.3f} nats ({r.low:+.3f} to {r.high:+.3f}) at layer {tested.chosen}."
            for r in named_rows(rows)
        ]
    return told


_UNITS = {"difference": "nats", "dose": "nats", "added": "nats per text", "matched": "nats"}


def _of(results: pd.DataFrame, scores: Iterable[str]) -> pd.DataFrame:
    return tables.select(results, results["score"].isin(list(scores)))


def _groups(texts: pd.DataFrame) -> pd.Series:
    return pd.Series(np.where(texts["member"], "shown " + texts["dose"].astype(str), "held out"), index=texts.index)


def _detected(tested: Tested, layer: int) -> pd.DataFrame:
    """AUROC by dose of the detectors worth a place in the figure."""
    found = tested.detection_by_dose
    part = found[(found["metric"] == "auroc") & found["score"].isin(_DETECTORS)].copy()
    part["layer"] = layer
    return (
        part.assign(order=part["score"].map({name: i for i, name in enumerate(_DETECTORS)}))
        .sort_values(["order", "dose"])
        .drop(columns="order")
    )


def _planting(planted: Planted) -> pd.DataFrame:
    texts = planted.texts.assign(group=_groups(planted.texts))
    order = [*(f"shown {dose}" for dose in sorted(planted.texts["dose"].unique())), "held out"]
    rows = texts.groupby("group").agg(
        n_texts=("seq", "size"),
        log_likelihood_base=("base_log_likelihood", "mean"),
        log_likelihood_tuned=("log_likelihood", "mean"),
        agreement_tuned=("agreement", "mean"),
        matched=("matched", "mean"),
        longest_run=("longest_run", "mean"),
        extracted=("extracted", "mean"),
        guide_memorized=("guide_memorized", "mean"),
    )
    return rows.loc[order].reset_index()


def _dose_figure(planted: Planted, layer: int) -> Figure:
    """Change in compression against the dose; texts held out by the dose of their pair."""
    rows = planted.sequences[planted.sequences["layer"] == layer]
    rows = rows.assign(group=np.where(rows["member"], "trained", "held out"), times_shown_of_the_pair=rows["dose"])
    return dose_curve(rows, CHANGE, "times_shown_of_the_pair", by="group", title=f"Change in compression [nats], layer {layer}")


def _roc_figure(planted: Planted, tested: Tested, layer: int) -> Figure:
    rows = planted.sequences[planted.sequences["layer"] == layer]
    rows = rows[(~rows["member"]) | (rows["dose"] == tested.design["dose"])]
    return roc(rows, [name for name in _DETECTORS if name in rows], "member")


def _damaged_figure(forked: Forked, layer: int) -> Figure:
    """Share recited, and compression of the true continuation, against the number of tokens replaced."""
    rows = forked.path[forked.path["layer"] == layer].rename(columns={"edits": "tokens_of_the_prefix_replaced"})
    return dose_curve(
        rows,
        ["recited", HEADLINE],
        "tokens_of_the_prefix_replaced",
        lines=True,
        title=f"Damaged prefixes, compression at layer {layer} [nats]",
    )


def _recitation(recited: Recited) -> pd.DataFrame:
    return (
        recited.texts.groupby("condition", sort=False)
        .agg(
            n_texts=("seq", "size"),
            n_sources=("doc", "nunique"),
            log_likelihood=("log_likelihood", "mean"),
            agreement=("agreement", "mean"),
            matched=("matched", "mean"),
            longest_run=("longest_run", "max"),
            extracted=("extracted", "sum"),
            guide_memorized=("guide_memorized", "sum"),
        )
        .reset_index()
    )


def _matched_doses(tested: Tested) -> str:
    counts = tested.pairs["dose"].value_counts().sort_index() if len(tested.pairs) else pd.Series(dtype=int)
    return "".join(f"; {count} of dose {dose}" for dose, count in counts.items())


def _gap(forked: Forked) -> str:
    apart = forked.likely["true_loss"] - forked.likely["other_loss"]
    return (
        f"Base model's loss of the true continuation less the other: {apart.mean():+.2f} nats per token on average, from "
        f"{apart.min():+.2f} to {apart.max():+.2f}."
    )


def _fork(forked: Forked) -> str:
    rows = above_layer_0(forked.forks[forked.forks["score"] == CHANGE])
    if not rows["p"].notna().any():
        return f"Fork: could not be tested ({why_untested(rows['note'].iloc[0] if len(rows) else 'no prefixes')})."
    best = rows.sort_values("p").iloc[0]
    return (
        "Fork (exploratory): the true continuation changes in compression unlike another as likely at "
        f"{int((rows['p_corrected'] <= ALPHA).sum())} of {len(rows)} layers after correction; smallest p at layer "
        f"{int(best['layer'])}, {best['estimate']:+.3f} nats ({best['low']:+.3f} to {best['high']:+.3f}), corrected "
        f"{in_words(best['p_corrected'])}, {int(best['n_units'])} prefixes."
    )


def _where(forked: Forked, layer: int) -> str:
    rows = forked.where[(forked.where["score"] == CHANGE) & (forked.where["layer"] == layer)]
    if rows.empty or pd.isna(rows["p"].iloc[0]):
        return f"Where in a text: could not be tested ({rows['note'].iloc[0] if len(rows) else 'no such layer'})."
    (one,) = named_rows(rows)
    few = f"; with {int(one.n_units)} texts no p could survive correction" if 2.0 ** (1 - one.n_units) * one.n_tests > ALPHA else ""
    return (
        f"Where in a text (exploratory): change in compression of memorized tokens less others {one.estimate:+.3f} nats "
        f"({one.low:+.3f} to {one.high:+.3f}) at layer {layer}, p {in_words(one.p)}, corrected {in_words(one.p_corrected)}{few}."
    )


def _by_dose(tested: Tested) -> str:
    rows = above_layer_0(tested.by_dose[tested.by_dose["score"] == CHANGE])
    best = rows.sort_values("p").iloc[0]
    return (
        f"By dose (exploratory): the smallest p is that of texts shown {best['dose']} times at "
        f"layer {int(best['layer'])}, "
        f"{best['estimate']:+.3f} nats ({best['low']:+.3f} to {best['high']:+.3f}), p {in_words(best['p'])}, corrected "
        "for all doses, layers and scores "
        f"{in_words(best['p_corrected'])}."
    )


def _recited(recited: Recited) -> str:
    texts = recited.texts[recited.texts["condition"] == "opening"]
    count = int(texts["guide_memorized"].sum())
    best = recited.contrasts[recited.contrasts["score"].isin(SCORES) & (recited.contrasts["contrast"] == "opening - later")]
    passed = int((above_layer_0(best)["p_corrected"] <= ALPHA).sum())
    return (
        f"Without planting: {count} of {len(texts)} openings are memorized by the guide's rule, teacher-forced agreement "
        f"{texts['agreement'].mean():.2f}; openings differ from later passages in compression or contraction at {passed} of "
        f"{len(above_layer_0(best))} layers and scores after correction (exploratory)."
    )


def _widths(forked: Forked) -> str:
    reciting = forked.widths[forked.widths["recited_undamaged"] >= 0.5]
    if reciting.empty:
        return "No prefix was recited to begin with, so none has a width."
    beyond = int(np.isinf(reciting["width"]).sum())
    return (
        f"Of {len(forked.widths)} forked prefixes {len(reciting)} are recited; the path is left at "
        f"{reciting['width'].median():.1f} replaced tokens (median; "
        f"{beyond} are never left in the range tried)."
    )


assert set(_DETECTORS) <= {*BASELINES, *SCORES, *CHANGES}
