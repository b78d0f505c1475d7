"""Token merging beside its baselines: what is saved, what it costs, and whether training was worth it."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from basin_lens import merging, stats
from basin_lens.errors import MergeError, StudyError
from basin_lens.merging import Setting, TokenMerger, Windows
from basin_lens.model import full_name, kind_of, n_layers, provenance, tokenizer_of
from basin_lens.studies.framework import base
from basin_lens.texts import token_strings
from basin_lens.values import whole_numbers
from basin_lens.views import Section, merge_view, pareto, training_curves

RIVALS = ("random", "stride")
# One window is shown; the map of all would be a book.
_SHOWN_TOKENS = 160
_COPIED = 48  # tokens that the induction probe repeats
_PROBED = ("cosine", "random", "stride")  # beside ours and the recent window

HYPOTHESIS = (
    "Declared before looking: at the same bytes of key/value cache (indices, sizes and descriptors counted), trained causal merging costs "
    "less loss than "
    "random causal merging and than merging at a uniform stride, on documents that it was neither trained nor calibrated on. Tested at "
    "each budget by "
    "flipping the signs of whole documents' differences, as one family (Holm). Intervals that do not overlap are reported beside."
)


@whole_numbers(StudyError)
def study_merging(
    model: Any,
    calibration: Windows,
    held_out: Windows,
    setting: Setting,
    *,
    merger: TokenMerger | None = None,
    history: pd.DataFrame | None = None,
    prompt: int = 32,
    written: int = 48,
    prompts: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> base.Study:
    """Set a merger beside all baselines at equal bytes, and look at what perplexity hides.

    Args:
        model: a hooked model.
        calibration: windows that set every policy to its budget.
        held_out: windows of other documents, to test on; of copies, one is kept.
        setting: policies, layers, budgets.
        merger: a trained merger; without it the untrained one ("cosine") stands in the declared test.
        history: of its training.
        prompt: tokens of each held-out window that generation starts from.
        written: tokens written.
        prompts: how many windows are written from; 0: none.
        seed: of tests and probe.
        progress: show progress.

    Returns:
        a `Study` named "merging" with tables `pareto` (a row per policy and budget), `windows` (per held-out window), `context` (the
        protocol of that
        name), `induction`, `generation`, `map`, `layers` (of every policy and budget), `training`.

    Raises:
        MergeError: windows that do not fit, budgets out of reach, or the policy in the declared test left out.

    Source: Xiao et al. 2024 (StreamingLLM), Bolya et al. 2023 (token merging), Devoto et al. 2024 (key norms).

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=8)
        >>> setting = bl.merging.Setting((20, 21), budgets=(0.97,), seeds=1, policies=("cosine", "random", "stride"))
        >>> study = bl.studies.study_merging(model, *windows.apart(0.3), setting, prompts=0, progress=False)
        >>> study.name
        'merging'
    """
    ours = "trained" if merger is not None else "cosine"
    if ours not in setting.policies:
        raise MergeError(
            f"expected the policy {ours!r}, which the declared test is about, got {', '.join(setting.policies)}. Add it."
        )
    # Copies among what is tested on would count one text several times.
    held_out, copied = held_out.once()
    with base.steps("study merging", 5, progress) as step:
        step("policies at equal bytes")
        compared = merging.compare_policies(model, calibration, held_out, setting, merger=merger, progress=progress)
        found, mergers = compared.windows, compared.mergers
        step("context protocol")
        context = merging.context_protocol(model, calibration, held_out, setting, merger=merger)
        step("induction")
        least = min(setting.budgets)
        probes, reach = [], {}
        for budget in sorted(setting.budgets, reverse=True):  # the smallest last: what follows is looked at there
            made = {policy: mergers[policy, budget] for policy in (ours, *_PROBED) if (policy, budget) in mergers}
            if "recent" in setting.policies:  # a window is a number of tokens: the right one for these sequences
                made["recent"] = merging.recent_window(model, budget, 2 * _COPIED + 1, setting)
                reach[budget] = made["recent"].options.recent
            probes.append(merging.induction_probe(model, made, length=_COPIED, seed=seed).assign(budget=budget))
        induction = pd.concat(probes, ignore_index=True)
        step("generation and map")
        generation = _generated(model, held_out, made[ours], prompt, written, prompts)
        shown = held_out.tokens[:1, :_SHOWN_TOKENS]
        mapped = merging.merge_map(made[ours], model, shown)
        text = token_strings(model, shown.unique().tolist())
        mapped["token"] = [text[int(i)] for i in mapped["token_id"]]
        layers = compared.layers
        step("tests")
        findings = base.settle("merging", [
            _test(found, ours, rival, budget, seed) for budget in setting.budgets for rival in RIVALS if rival in setting.policies
        ])  # fmt: skip
    curve = _curve(found, seed)
    decision = base.decide(findings, None)
    held: dict[str, pd.DataFrame] = {
        "pareto": curve, "windows": found, "context": _context(context, seed), "induction": induction, "map": mapped, "layers": layers,
    }  # fmt: skip
    if generation is not None:
        held["generation"] = generation.assign(tokens=generation["tokens"].map(lambda ids: " ".join(map(str, ids))))
    if history is not None:
        held["training"] = history
    sections, figures = _sections(held, mapped, generation, history, ours, least)
    untold = _untold(model, merger, prompts) if generation is None else []
    facts = {
        "model": provenance(model), "setting": asdict(setting), "merger": None if merger is None else _told(merger),
        "windows": {"length": int(held_out.tokens.shape[1]), "calibration": len(calibration), "held_out": len(held_out), "held_out_copies": copied,
                    "held_out_documents": sorted(set(held_out.doc))}, "seed": seed,
    }  # fmt: skip
    return base.Study(
        name="merging",
        title="Causal token merging: what it saves and what it costs",
        about=(*_about(model, calibration, held_out, setting, merger), *_copies(copied)),
        hypothesis=HYPOTHESIS,
        decision=decision,
        verdict=tuple(_verdict(decision, findings, curve, induction, ours, reach)),
        findings=findings,
        flags=None,
        not_tested=(
            "Other models, languages, lengths and tasks; retrieval over long contexts.",
            "Speed: rows are read by gathering here, a kernel for clusters was not written; bytes are real, seconds are not what they could be.",
            "Quantized caches and per-head eviction, which save bytes in other ways and could be combined.",
            "A second seed of training.",
            *untold,
        ),
        sections=tuple(sections),
        tables=held,
        figures=figures,
        provenance={"merging": facts},
    )


def _generated(model: Any, held_out: Windows, merger: TokenMerger, prompt: int, written: int, prompts: int) -> pd.DataFrame | None:
    """None where the model's cache cannot be rewritten, or nothing was asked for: `_untold` says which."""
    if not prompts or kind_of(model) == "hooked" or merger.options.preserve == "surprisal":
        return None
    begun = held_out.tokens[:prompts, : min(prompt, held_out.tokens.shape[1])]
    made = merging.generation_quality(merger, model, begun, written)
    return made.assign(
        text=[_text(model, ids) for ids in made["tokens"]], begun=[_text(model, begun[i].tolist()) for i in made["prompt"]]
    )


def _told(merger: TokenMerger) -> dict[str, Any]:
    """What a merger is and how it came to be, without the numbers by which copies of its training are known again."""
    training = {name: value for name, value in merger.facts.get("training", {}).items() if name != "seen_runs"}
    return merger.options.plain() | merger.facts | ({"training": training} if training else {})


def _copies(count: int) -> list[str]:
    return (
        [f"{count} held-out windows that are copies of others, nearly or in full, are left out: one text counts once."]
        if count
        else []
    )


def _untold(model: Any, merger: TokenMerger | None, prompts: int) -> list[str]:
    """Why no text was written with the compressed cache."""
    why = "none was asked for"
    if prompts and kind_of(model) == "hooked":
        why = "a HookedTransformer's cache cannot be rewritten; use a TransformerBridge"
    elif prompts and merger is not None:
        why = "tokens preserved by surprisal need the plain model's pass, and so its full cache, beside"
    return [f"Text written with the compressed cache: {why}."]


def _text(model: Any, ids: list[int]) -> str:
    return str(tokenizer_of(model).decode(ids, skip_special_tokens=True))


def _curve(found: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row per policy and budget; seeds of one policy are averaged window by window first."""
    keys = ["policy", "budget"]
    numbers = [
        "excess",
        "excess_easy",
        "excess_hard",
        "kl",
        "agreement",
        "bytes_share",
        "rate",
        "same_id",
        "flops",
        "seconds",
        "plain_seconds",
        "peak_bytes",
        "plain_peak_bytes",
    ]
    per_window = found.groupby([*keys, "doc", "window"], sort=False)[numbers].mean().reset_index()
    curve = stats.mean_interval(per_window, "excess", keys, seed=seed)
    rest = per_window.groupby(keys, sort=False)[[n for n in numbers if n != "excess"]].mean().reset_index()
    return (
        curve.merge(rest, on=keys)
        .assign(time=lambda t: t["seconds"] / t["plain_seconds"], memory=lambda t: t["peak_bytes"] / t["plain_peak_bytes"])
        .drop(columns=["seconds", "plain_seconds", "peak_bytes", "plain_peak_bytes"])
        .sort_values(["budget", "estimate"], ascending=[False, True], ignore_index=True)
    )


def _context(found: pd.DataFrame, seed: int) -> pd.DataFrame:
    curve = stats.mean_interval(found, "excess", ["policy", "budget"], seed=seed)
    rest = found.groupby(["policy", "budget"], sort=False)[["bytes_share", "rate"]].mean().reset_index()
    return curve.merge(rest, on=["policy", "budget"])


def _test(found: pd.DataFrame, ours: str, rival: str, budget: float, seed: int) -> pd.DataFrame:
    """Excess of ours less the rival's, document by document."""
    part = found[np.isclose(found["budget"], budget)]
    mean = (
        part[part["policy"].isin([ours, rival])]
        .groupby(["policy", "doc", "window"])["excess"]
        .mean()
        .unstack("policy")
        .reset_index()
    )
    table = pd.DataFrame({"doc": mean["doc"], "seq": mean["window"], "difference": mean[ours] - mean[rival]})
    test = partial(stats.before_after, unit="document", correction="none", seed=seed)
    tested = base.one_sided(lambda t: base.attempt(lambda x, s, **_: test(x, s), t, "difference", unit="document"), more=False)(
        table
    )
    shares = {name: float(part.loc[part["policy"] == name, "bytes_share"].mean()) for name in (ours, rival)}
    (row,) = base.rows(tested)
    note = f"bytes left: {shares[ours]:.3f} and {shares[rival]:.3f} of the full cache; excess in nats per token"
    return tested.assign(
        finding=f"{ours} merging costs less than {rival}, aimed at {budget:g} of the cache", question=f"{ours} against {rival}", score="excess",
        p_floor=base.p_floor(row), effect_unit="nats per token", note=note if pd.isna(row.note) or not row.note else f"{row.note}; {note}",
    )  # fmt: skip


def _about(model: Any, calibration: Windows, held_out: Windows, setting: Setting, merger: TokenMerger | None) -> list[str]:
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
            "Texts are few: every window counts as a document of its own. Windows of one text are less independent than texts, so that intervals "
            "are too narrow and p-values too small by an amount that these data cannot tell."
            + (" Budgets were set on earlier windows of the same text, not on other documents." if calibration.pieces else "")
        )
    if merger is not None and merger.options.preserve == "surprisal":
        more.append(
            "Tokens are preserved by the plain model's surprisal, which takes its pass and its full cache beside: bytes, memory and time count "
            "the merged pass alone, flops both. This says which tokens matter; it is no cache that can be deployed."
        )
    tested = f"{len(set(held_out.source)) or 'few'} texts" if held_out.pieces else f"{len(set(held_out.doc))} other documents"
    return [
        f"{full_name(model)}: merging in {len(setting.layers)} of {n} layers, {said}; {base_said}.",
        *more,
        f"Windows of {held_out.tokens.shape[1]} tokens: {len(calibration)} to set budgets, {len(held_out)} of {tested} "
        "to test on. Streaming protocol: every position's loss counts, nothing reads its future.",
        "Bytes are those of the cache at a window's end: keys and values that are left, their places (4 bytes a row), leaders and sizes "
        "(8 bytes a cluster), "
        f"descriptors for comparison ({setting.projection} numbers in float16), over the full cache.",
        "Levels are set on other texts, so the held-out windows leave a little more or less than the budget; policies that do not look at the "
        "text (random, stride, recent) are given the bytes that the merger in question left there, to 0.01 of the cache.",
        "Intervals: bootstrap over documents.",
    ]


def _overlap(curve: pd.DataFrame, ours: str, rival: str, budget: float) -> bool | None:
    at = curve[np.isclose(curve["budget"], budget)]
    high, low = (at.loc[at["policy"] == name, end].to_numpy(float) for name, end in ((ours, "high"), (rival, "low")))
    least, most = (at.loc[at["policy"] == name, end].to_numpy(float) for name, end in ((ours, "low"), (rival, "high")))
    if not all(np.isfinite(end).any() for end in (high, low, least, most)):
        return None
    return bool(high[0] >= low[0] and most[0] >= least[0])


def _verdict(
    decision: base.Decision, findings: pd.DataFrame, curve: pd.DataFrame, induction: pd.DataFrame, ours: str,
    reach: Mapping[float, int],
) -> list[str]:  # fmt: skip
    said = [base.opening(
        decision, f"At equal bytes, {ours} merging costs less than random and uniform-stride merging.",
        f"At equal bytes, {ours} merging was not shown to cost less than random and uniform-stride merging.",
    )]  # fmt: skip
    said += [base.sentence(row) for row in base.rows(findings)]
    for budget in sorted(curve["budget"].unique(), reverse=True):
        at = curve[curve["budget"] == budget].sort_values("estimate")
        order = ", ".join(
            f"{r.policy} {r.estimate:+.3f} ({r.low:+.3f} to {r.high:+.3f}; {r.bytes_share:.2f})" for r in base.rows(at)
        )
        parts = [
            f"Aimed at {budget:g} of the cache, from the cheapest on, excess nats per token (95 % interval; share of the cache left): {order}."
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
        copied = ", ".join(f"{row.policy} {row.accuracy:.2f} ({row.bytes_share:.2f})" for row in base.rows(mean))
        said.append(
            f"Copying random tokens from {_COPIED} places before, levels as for prose at {budget:g}, share right (share of the cache left): "
            f"{copied}; plain model {float(mean['plain_accuracy'].iloc[0]):.2f}."
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


def _sections(
    held: Mapping[str, pd.DataFrame], mapped: pd.DataFrame, generation: pd.DataFrame | None, history: pd.DataFrame | None, ours: str,
    least: float,
) -> tuple[list[Section], dict[str, Figure]]:  # fmt: skip
    curve, layers = held["pareto"], held["layers"]
    at = layers[(layers["policy"] == ours) & np.isclose(layers["budget"], least) & (layers["seed"] == layers["seed"].min())]
    figures = {"pareto": pareto(curve, first=ours)}
    sections = [
        Section(
            "Excess loss against bytes",
            [f"{name}: {policy.description}." for name, policy in merging.POLICIES.items() if name in set(curve["policy"])],
            figure=figures["pareto"],
            caption="Mean over held-out documents of the paired excess loss (merged less plain, same tokens), 95 % bootstrap interval "
            "over documents. Points at equal bytes are drawn side by side, at most 0.012 away from their place.",
            table=curve,
            note="excess_easy and excess_hard: tokens below and above the window's median surprisal. kl: plain to merged, nats per token. "
            "agreement: share of equal "
            "most likely tokens. flops: of one more token at the window's end, over the plain model. time and memory: of whole passes (in which "
            "clusters are read by weights on the full pattern, so nothing is saved) over the plain model's, here; memory at its peak, weights "
            "apart. What generation holds is further down.",
        ),
        Section(
            "Protocol 'context'",
            "The first half of each window is merged at once, only the second half is scored. Bipartite token merging sees the whole "
            "context before it "
            "decides; it has no place in the streaming protocol.",
            table=held["context"],
            note="budget: share of the first half's rows that is left, at least 0.52: bipartite merging can merge half of them at most. "
            "trained: moved to the bytes of random; missing where it cannot be.",
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
            f"What is copied stands {_COPIED} places before: a recent window that reaches it copies, a shorter one cannot.",
        ),
        Section(
            "By layer", f"The {ours} merger at {least:g} of the cache, on the held-out windows; every policy and budget in tables/layers.csv.",
            table=at.drop(columns=["policy", "budget", "seed"]),
            note="tokens_kept: rows left over tokens. state_error: squared distance of merged tokens' states from what stands for them, over "
            "that from the mean of all mergeable tokens.",
        ),
    ]  # fmt: skip
    layer = int(at.sort_values("merged")["layer"].iloc[-1])
    sections.append(Section(
        "Who merged into whom", f"The layer that merges most ({layer}), the first held-out window.", view=merge_view(mapped, layer),
    ))  # fmt: skip
    if generation is not None:
        numbers = (
            generation.groupby("cache", sort=False)[["base_loss", "repetition", "bytes_share", "peak_bytes"]].mean().reset_index()
        )
        samples = generation[["prompt", "cache", "begun", "text"]]
        sections += [
            Section(
                "Text written with the compressed cache", "Greedy continuations of held-out texts, with the full and with the compressed cache.",
                table=numbers,
                note="base_loss: the plain model's loss on what was written, nats per token. repetition: share of 4-token runs that came before. "
                "peak_bytes: tensors made while writing, at most at one time, all prompts together, weights apart.",
            ),
            Section("Side by side", "", table=samples),
        ]  # fmt: skip
    if history is not None:
        figures["training"] = training_curves(history)
        sections.append(Section("Training", "", figure=figures["training"], caption="Losses of the batch of each step."))
    return sections, figures
