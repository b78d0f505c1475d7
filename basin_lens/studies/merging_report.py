"""What the comparison of mergers says and shows."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from basin_lens import merging
from basin_lens.merging import Setting, TokenMerger, Windows
from basin_lens.model import HookedModel, full_name, n_layers
from basin_lens.studies.framework.declared_tests import Decision
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.framework.wording import opening, sentence
from basin_lens.views import Section, merge_view, pareto, training_curves

RIVALS = ("random", "stride")
COPIED = 48  # tokens that the induction probe repeats


def about_merging(
    model: HookedModel, calibration: Windows, held_out: Windows, setting: Setting, merger: TokenMerger | None
) -> list[str]:
    n = n_layers(model)
    said = "trained" if merger is not None else "not trained"
    training = {} if merger is None else merger.facts.get("training", {})
    base_said = "the base model is as it was"
    if training.get("train_base"):
        drift, where = training.get("drift"), "windows of the same text" if training.get("pieces") else "texts"
        unknown = "its drift was not measured" if "drift" in training else "the merger does not tell its drift"
        told = unknown if drift is None else f"its loss without merging rose by {drift:+.4f} nats per token on {where} held out"
        base_said = f"the base model was trained with it ({told})"
    more = []
    if held_out.pieces:
        more.append(
            "Texts are few: every window counts as a document of its own. Windows of one text are less independent than texts, "
            "so that intervals are too narrow and p-values too small by an amount that these data cannot tell."
            + (" Budgets were set on earlier windows of the same text, not on other documents." if calibration.pieces else "")
        )
    if merger is not None and merger.options.preserve == "surprisal":
        more.append(
            "Tokens are preserved by the plain model's surprisal, which takes its pass and its full cache beside: bytes, memory "
            "and time count the merged pass alone, flops both. This says which tokens matter; it is no cache that can be "
            "deployed."
        )
    tested = f"{len(set(held_out.source)) or 'few'} texts" if held_out.pieces else f"{len(set(held_out.doc))} other documents"
    return [
        f"{full_name(model)}: merging in {len(setting.layers)} of {n} layers, {said}; {base_said}.",
        *more,
        f"Windows of {held_out.tokens.shape[1]} tokens: {len(calibration)} to set budgets, {len(held_out)} of {tested} "
        "to test on. Streaming protocol: every position's loss counts, nothing reads its future.",
        "Bytes are those of the cache at a window's end: keys and values that are left, their places (4 bytes a row), leaders "
        f"and sizes (8 bytes a cluster), descriptors for comparison ({setting.projection} numbers in float16), over the full "
        "cache.",
        "Levels are set on other texts, so the held-out windows leave a little more or less than the budget; policies that do "
        "not look at the text (random, stride, recent) are given the bytes that the merger in question left there, to 0.01 of "
        "the cache.",
        "Intervals: bootstrap over documents.",
    ]


def _overlap(curve: pd.DataFrame, ours: str, rival: str, budget: float) -> bool | None:
    at = curve[np.isclose(curve["budget"], budget)]
    high, low = (at.loc[at["policy"] == name, end].to_numpy(float) for name, end in ((ours, "high"), (rival, "low")))
    least, most = (at.loc[at["policy"] == name, end].to_numpy(float) for name, end in ((ours, "low"), (rival, "high")))
    if not all(np.isfinite(end).any() for end in (high, low, least, most)):
        return None
    return bool(high[0] >= low[0] and most[0] >= least[0])


def verdict_of(
    decision: Decision,
    findings: pd.DataFrame,
    curve: pd.DataFrame,
    induction: pd.DataFrame,
    ours: str,
    reach: Mapping[float, int],
) -> list[str]:
    said = [
        opening(
            decision,
            f"At equal bytes, {ours} merging costs less than random and uniform-stride merging.",
            f"At equal bytes, {ours} merging was not shown to cost less than random and uniform-stride merging.",
        )
    ]
    said += [sentence(row) for row in named_rows(findings)]
    for budget in sorted(curve["budget"].unique(), reverse=True):
        at = curve[curve["budget"] == budget].sort_values("estimate")
        order = ", ".join(
            f"{r.policy} {r.estimate:+.3f} ({r.low:+.3f} to {r.high:+.3f}; {r.bytes_share:.2f})" for r in named_rows(at)
        )
        parts = [
            f"Aimed at {budget:g} of the cache, from the cheapest on, excess nats per token (95 % interval; share of the cache "
            f"left): {order}."
        ]
        for rival in RIVALS:
            met = _overlap(curve, ours, rival, budget)
            if met is not None:
                parts.append(f"The intervals of {ours} and {rival} {'overlap' if met else 'do not overlap'}.")
        if at.iloc[0]["policy"] != ours and ours in set(at["policy"]):
            parts.append(f"{at.iloc[0]['policy']} is cheaper than {ours} here.")
        parts.append(_why(at.set_index("policy"), ours))
        said.append(" ".join(parts))
    for budget in induction["budget"].unique():
        part = induction[induction["budget"] == budget]
        mean = part.groupby("policy", sort=False)[["accuracy", "plain_accuracy", "bytes_share"]].mean().reset_index()
        copied = ", ".join(f"{row.policy} {row.accuracy:.2f} ({row.bytes_share:.2f})" for row in named_rows(mean))
        said.append(
            f"Copying random tokens from {COPIED} places before, levels as for prose at {budget:g}, share right (share of the "
            f"cache left): {copied}; plain model {float(mean['plain_accuracy'].iloc[0]):.2f}."
            + (f" The recent window reaches {reach[budget]} places back." if budget in reach else "")
        )
    return said


def _why(at: pd.DataFrame, ours: str) -> str:
    """What the excess is made of, by which a loss to a baseline can be understood."""
    parts = []
    for name in (ours, *(rival for rival in RIVALS if rival in at.index)):
        row = at.loc[name]
        same: str = "" if pd.isna(row["same_id"]) else f"{100 * row['same_id']:.0f} % of its merges are of equal tokens, "
        parts.append(f"{name}: {same}excess {row['excess_easy']:+.3f} on easy and {row['excess_hard']:+.3f} on hard tokens")
    return f"Where it comes from: {'; '.join(parts)}."


def sections_of(
    held: Mapping[str, pd.DataFrame],
    mapped: pd.DataFrame,
    generation: pd.DataFrame | None,
    history: pd.DataFrame | None,
    ours: str,
    least: float,
) -> tuple[list[Section], dict[str, Figure]]:
    """The report's sections, and figures by file name."""
    figures = {"pareto": pareto(held["pareto"], first=ours)}
    sections = [*_protocol_sections(held, figures["pareto"]), *_layer_sections(held["layers"], mapped, ours, least)]
    if generation is not None:
        sections += _generation_sections(generation)
    if history is not None:
        figures["training"] = training_curves(history)
        sections.append(Section("Training", "", figure=figures["training"], caption="Losses of the batch of each step."))
    return sections, figures


def _protocol_sections(held: Mapping[str, pd.DataFrame], figure: Figure) -> list[Section]:
    """Streaming, context, induction."""
    curve = held["pareto"]
    return [
        Section(
            "Excess loss against bytes",
            [f"{name}: {policy.description}." for name, policy in merging.POLICIES.items() if name in set(curve["policy"])],
            figure=figure,
            caption="Mean over held-out documents of the paired excess loss (merged less plain, same tokens), 95 % bootstrap "
            "interval over documents. Points at equal bytes are drawn side by side, at most 0.012 away from their place.",
            table=curve,
            note="excess_easy and excess_hard: tokens below and above the window's median surprisal. kl: plain to merged, nats "
            "per token. agreement: share of equal most likely tokens. flops: of one more token at the window's end, over "
            "the plain model. time and memory: of whole passes (in which clusters are read by weights on the full pattern, "
            "so nothing is saved) over the plain model's, here; memory at its peak, weights apart. What generation holds "
            "is further down.",
        ),
        Section(
            "Protocol 'context'",
            "The first half of each window is merged at once, only the second half is scored. Bipartite token merging sees the "
            "whole context before it decides; it has no place in the streaming protocol.",
            table=held["context"],
            note="budget: share of the first half's rows that is left, at least 0.52: bipartite merging can merge half of them "
            "at most. trained: moved to the bytes of random; missing where it cannot be.",
        ),
        Section(
            "Copying (induction)",
            "Random tokens, then the same again. Perplexity on prose hardly notices when this is lost.",
            table=held["induction"]
            .groupby(["budget", "policy"], sort=False)[
                ["loss", "plain_loss", "excess", "accuracy", "plain_accuracy", "bytes_share"]
            ]
            .mean()
            .reset_index(),
            note="bytes_share: on these sequences, which merge otherwise than prose, on which levels were set. "
            f"What is copied stands {COPIED} places before: a recent window that reaches it copies, a shorter one cannot.",
        ),
    ]


def _layer_sections(layers: pd.DataFrame, mapped: pd.DataFrame, ours: str, least: float) -> list[Section]:
    """What was merged in each layer, and which tokens in the layer that merges most."""
    at = layers[(layers["policy"] == ours) & np.isclose(layers["budget"], least) & (layers["seed"] == layers["seed"].min())]
    layer = int(at.sort_values("merged")["layer"].iloc[-1])
    return [
        Section(
            "By layer",
            f"The {ours} merger at {least:g} of the cache, on the held-out windows; every policy and budget in tables/layers.csv.",
            table=at.drop(columns=["policy", "budget", "seed"]),
            note="tokens_kept: rows left over tokens. state_error: squared distance of merged tokens' states from what stands "
            "for them, over that from the mean of all mergeable tokens.",
        ),
        Section(
            "Who merged into whom",
            f"The layer that merges most ({layer}), the first held-out window.",
            view=merge_view(mapped, layer),
        ),
    ]


def _generation_sections(generation: pd.DataFrame) -> list[Section]:
    """What was written, in numbers and side by side."""
    numbers = generation.groupby("cache", sort=False)[["base_loss", "repetition", "bytes_share", "peak_bytes"]].mean().reset_index()
    samples = generation[["prompt", "cache", "begun", "text"]]
    return [
        Section(
            "Text written with the compressed cache",
            "Greedy continuations of held-out texts, with the full and with the compressed cache.",
            table=numbers,
            note="base_loss: the plain model's loss on what was written, nats per token. repetition: share of 4-token runs "
            "that came before. peak_bytes: tensors made while writing, at most at one time, all prompts together, "
            "weights apart.",
        ),
        Section("Side by side", "", table=samples),
    ]
