"""Token merging beside its baselines: what is saved, what it costs, and whether training was worth it."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd

from basin_lens import merging, stats
from basin_lens.errors import MergeError, StudyError
from basin_lens.merging import Setting, TokenMerger, Windows
from basin_lens.model import HookedModel, kind_of, needed_tokenizer, provenance
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.framework.declared_tests import decide, one_sided, p_floor, settle
from basin_lens.studies.framework.progress import progress_steps
from basin_lens.studies.framework.runner import make_study
from basin_lens.studies.framework.spec import Declaration, Presentation, Results
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.merging_report import COPIED, RIVALS, about_merging, sections_of, verdict_of
from basin_lens.texts import token_strings
from basin_lens.values import Facts, whole_numbers

# One window is shown; the map of all would be a book.
_SHOWN_TOKENS = 160
_PROBED = ("cosine", "random", "stride")  # beside ours and the recent window

HYPOTHESIS = (
    "Declared before looking: at the same bytes of key/value cache (indices, sizes and descriptors counted), trained causal "
    "merging costs less loss than random causal merging and than merging at a uniform stride, on documents that it was neither "
    "trained nor calibrated on. Tested at each budget by flipping the signs of whole documents' differences, as one family "
    "(Holm). Intervals that do not overlap are reported beside."
)

SPEC = Declaration(
    name="merging",
    title="Causal token merging: what it saves and what it costs",
    question="What does causal token merging cost at equal bytes of cache, trained and not?",
    hypothesis=HYPOTHESIS,
    tests=tuple(f"merging, trained if it was, costs less than {rival}, at each budget of the cache" for rival in RIVALS),
    nulls=("random causal merging at the same bytes", "merging at a uniform stride at the same bytes"),
    not_tested=(
        "Other models, languages, lengths and tasks; retrieval over long contexts.",
        "Speed: rows are read by gathering here, a kernel for clusters was not written; bytes are real, seconds are not what "
        "they could be.",
        "Quantized caches and per-head eviction, which save bytes in other ways and could be combined.",
        "A second seed of training.",
    ),
)


@whole_numbers(StudyError)
def study_merging(
    model: HookedModel,
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
) -> Study:
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
        a `Study` named "merging" with tables `pareto` (a row per policy and budget), `windows` (per held-out window), `context`
        (the protocol of that
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
    with progress_steps("study merging", 5, progress) as step:
        step("policies at equal bytes")
        compared = merging.compare_policies(model, calibration, held_out, setting, merger=merger, progress=progress)
        step("context protocol")
        context = merging.context_protocol(model, calibration, held_out, setting, merger=merger)
        step("induction")
        induction, reach = _induction(model, compared.mergers, setting, ours, seed)
        made = compared.mergers[ours, min(setting.budgets)]
        step("generation and map")
        generation = _generated(model, held_out, made, prompt, written, prompts)
        mapped = _named_map(model, made, held_out)
        step("tests")
        pairs = [(rival, budget) for budget in setting.budgets for rival in RIVALS if rival in setting.policies]
        findings = settle("merging", [_test(compared.windows, ours, *pair, seed) for pair in pairs])
    curve = _curve(compared.windows, seed)
    decision = decide(findings, None)
    held: dict[str, pd.DataFrame] = {"pareto": curve, "windows": compared.windows, "context": _context(context, seed)}
    held |= {"induction": induction, "map": mapped, "layers": compared.layers}
    if generation is not None:
        held["generation"] = generation.assign(tokens=generation["tokens"].map(lambda ids: " ".join(map(str, ids))))
    if history is not None:
        held["training"] = history
    sections, figures = sections_of(held, mapped, generation, history, ours, min(setting.budgets))
    untold = _untold(model, merger, prompts) if generation is None else []
    verdict = verdict_of(decision, findings, curve, induction, ours, reach)
    return make_study(
        SPEC,
        Results(findings, None, decision),
        Presentation(sections, figures, [*SPEC.said(), *untold], tables=held, verdict=verdict),
        about=(*about_merging(model, calibration, held_out, setting, merger), *_copies(copied)),
        provenance={"merging": _facts(model, calibration, held_out, setting, merger, copied) | {"seed": seed}},
        tokens=None,
    )


def _induction(
    model: HookedModel, mergers: Mapping[tuple[str, float], TokenMerger], setting: Setting, ours: str, seed: int
) -> tuple[pd.DataFrame, dict[float, int]]:
    """How well random tokens are copied under each budget, and how many tokens the recent window holds there."""
    probes, reach = [], {}
    for budget in sorted(setting.budgets, reverse=True):
        made = {policy: mergers[policy, budget] for policy in (ours, *_PROBED) if (policy, budget) in mergers}
        if "recent" in setting.policies:  # a window is a number of tokens: the right one for these sequences
            made["recent"] = merging.recent_window(model, budget, 2 * COPIED + 1, setting)
            reach[budget] = made["recent"].options.recent
        probes.append(merging.induction_probe(model, made, length=COPIED, seed=seed).assign(budget=budget))
    return pd.concat(probes, ignore_index=True), reach


def _named_map(model: HookedModel, merger: TokenMerger, held_out: Windows) -> pd.DataFrame:
    """Who merged into whom in the first window, with the tokens' text."""
    shown = held_out.tokens[:1, :_SHOWN_TOKENS]
    mapped = merging.merge_map(merger, model, shown)
    text = token_strings(model, shown.unique().tolist())
    mapped["token"] = [text[int(i)] for i in mapped["token_id"]]
    return mapped


def _facts(
    model: HookedModel, calibration: Windows, held_out: Windows, setting: Setting, merger: TokenMerger | None, copied: int
) -> Facts:
    windows = {
        "length": int(held_out.tokens.shape[1]),
        "calibration": len(calibration),
        "held_out": len(held_out),
        "held_out_copies": copied,
        "held_out_documents": sorted(set(held_out.doc)),
    }
    return {
        "model": provenance(model),
        "setting": asdict(setting),
        "merger": None if merger is None else _told(merger),
        "windows": windows,
    }


def _generated(
    model: HookedModel, held_out: Windows, merger: TokenMerger, prompt: int, written: int, prompts: int
) -> pd.DataFrame | None:
    """None where the model's cache cannot be rewritten, or nothing was asked for: `_untold` says which."""
    if not prompts or kind_of(model) == "hooked" or merger.options.preserve == "surprisal":
        return None
    begun = held_out.tokens[:prompts, : min(prompt, held_out.tokens.shape[1])]
    made = merging.generation_quality(merger, model, begun, written)
    return made.assign(
        text=[_text(model, ids) for ids in made["tokens"]], begun=[_text(model, begun[i].tolist()) for i in made["prompt"]]
    )


def _told(merger: TokenMerger) -> Facts:
    """What a merger is and how it came to be, without the numbers by which copies of its training are known again."""
    training = {name: value for name, value in merger.facts.get("training", {}).items() if name != "seen_runs"}
    return merger.options.plain() | merger.facts | ({"training": training} if training else {})


def _copies(count: int) -> list[str]:
    return (
        [f"{count} held-out windows that are copies of others, nearly or in full, are left out: one text counts once."]
        if count
        else []
    )


def _untold(model: HookedModel, merger: TokenMerger | None, prompts: int) -> list[str]:
    """Why no text was written with the compressed cache."""
    why = "none was asked for"
    if prompts and kind_of(model) == "hooked":
        why = "a HookedTransformer's cache cannot be rewritten; use a TransformerBridge"
    elif prompts and merger is not None:
        why = "tokens preserved by surprisal need the plain model's pass, and so its full cache, beside"
    return [f"Text written with the compressed cache: {why}."]


def _text(model: HookedModel, ids: list[int]) -> str:
    return str(needed_tokenizer(model).decode(ids, skip_special_tokens=True))


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
    tested = one_sided(lambda t: attempt(lambda x, s, **_: test(x, s), t, "difference", unit="document"), more=False)(table)
    shares = {name: float(part.loc[part["policy"] == name, "bytes_share"].mean()) for name in (ours, rival)}
    (row,) = named_rows(tested)
    note = f"bytes left: {shares[ours]:.3f} and {shares[rival]:.3f} of the full cache; excess in nats per token"
    return tested.assign(
        finding=f"{ours} merging costs less than {rival}, aimed at {budget:g} of the cache",
        question=f"{ours} against {rival}",
        score="excess",
        p_floor=p_floor(row),
        effect_unit="nats per token",
        note=note if pd.isna(row.note) or not row.note else f"{row.note}; {note}",
    )
