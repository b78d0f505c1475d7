"""Does the geometry of a token's state say whether a language model can do without it, merged into an earlier one?"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from basin_lens import stats, tables
from basin_lens.capture import Capture
from basin_lens.distinct import documents_once
from basin_lens.errors import StudyError
from basin_lens.merging import TokenMerger
from basin_lens.studies.framework import base
from basin_lens.studies.framework.contrasts import contrast_section
from basin_lens.studies.framework.measurement import FEWEST_UNITS, Measured, count_units, ready
from basin_lens.studies.mergeability.forced_merges import (
    CHOICES,
    LATER,
    Costs,
    Setting,
    able_places,
    draw_calibration,
    draw_places,
    forced_costs,
    policy_losses,
)
from basin_lens.studies.mergeability.report import (
    BASELINE,
    CHANGE,
    COST,
    EXCESS,
    HYPOTHESIS,
    SCORES,
    SIMILARITY,
    about_merges,
    not_tested,
    sections_of,
    verdict_of,
)
from basin_lens.values import whole, whole_numbers

CONTROL_SETS = {"standard": stats.CONTROLS, "standard and similarity": (*stats.CONTROLS, SIMILARITY)}
# Six or seven controls take their share of a sequence's tokens; red flags need 16.
FEWEST_PLACES = 16
FEWEST_SCORED = 6
QUARTERS = ("compression", SIMILARITY, "surprisal", "radius")
UNITS = {COST: "nats", CHANGE: "nats", SIMILARITY: "cosine", EXCESS: "nats per token"}


@whole_numbers(StudyError)
def study_mergeability(
    model: Any,
    data: Any,
    *,
    progress: bool = True,
    tokens_per_sequence: int = 16,
    window: int = 8,
    shares: Sequence[float] = (0.25, 0.5),
    n_random: int = 3,
    seed: int = 0,
    **options: Any,
) -> base.Study:
    """Ask whether compression, or anything cheaper, tells which tokens can be merged.

    Token by token: what later tokens lose when one token alone is merged in one layer alone, against the scores of that layer; and, as
    exploration, how much their predictions change, for better or worse. Then all at once: the same share of the tokens merged in all layers,
    chosen by cosine, low surprisal, high compression, or chance. Slow: a copy of the sequence is read for every merge, so 20 sequences of 128
    tokens take 320 such copies for each layer (about 40,000 tokens).

    Args:
        model: a `TransformerBridge` or `HookedTransformer` whose attention obeys its pattern.
        data: texts as for `analyze`, or a `Measured` for the study `"mergeability"`; at least 12 documents, and sequences of `window` + 30
            tokens (shorter ones have too few tokens to merge and are passed over).
        progress: show progress bars.
        tokens_per_sequence: at most so many forced merges per sequence and layer, at least 16: with fewer, nothing is left of a sequence once
            six controls are taken out.
        window: tokens that stay raw, the current one counted.
        shares: of the tokens that can be merged, for the policies.
        n_random: draws of each random policy.
        seed: of the positions, the halves and every other choice here.
        **options: of `basin_lens.studies.measure`, with texts.

    Returns:
        a `Study` with tables `costs` (a row per forced merge), `partial_correlation` (every score and layer against the cost and the change, with
        the standard controls and with the cosine too), `quartiles` (the cost in the quarters of a score), `policies` (excess loss of
        each, and less each of the random ones), and `contrast` if one was asked for.

    Raises:
        StudyError: too few documents with long enough sequences, or settings that do not fit. MergeError: a model in which nothing can be
            merged. Others as for `analyze`; all before the model runs.

    Source: design of basin_lens, "Causal token merging"; Bolya et al. 2023 (size on the logit).

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> study = bl.studies.study_mergeability(
        ...     model, list(reference_passages()), layers=[20], max_sequences=12, max_length=44, unit="sequence", shares=[0.5], n_random=1,
        ...     progress=False)
        >>> sorted(study.tables)
        ['costs', 'partial_correlation', 'policies', 'quartiles']
    """
    known = isinstance(data, Measured)
    check = refusals(
        model, unit=data.unit if known else options.get("unit", "document"), tokens_per_sequence=tokens_per_sequence, window=window,
        shares=shares, n_random=n_random,
    )  # fmt: skip
    measured = ready(model, data, "mergeability", progress, options if known else {"seed": seed, **options}, check=check)
    table = stats.add_controls(measured.table, frequency=measured.frequency)
    scored = table[np.isfinite(table["compression"])].groupby(["seq", "pos"])["layer"].nunique()
    everywhere = scored[scored == len(measured.layers)].reset_index()
    places = draw_places(
        measured.capture, everywhere, most=tokens_per_sequence, fewest=FEWEST_PLACES, window=window, seed=seed
    )  # fmt: skip
    _enough(len(_units(measured.capture, list(places), measured.unit)), measured.unit, "tokens with a score that can be merged")
    calibrating, tested = _halves(measured, sorted(places), seed)
    setting = Setting(
        model, measured.capture, measured.layers, window, seed, draw_calibration(measured.capture, calibrating, seed), progress
    )
    costs = forced_costs(setting, places)
    losses = policy_losses(setting, tested, table, shares=list(shares), n_random=n_random)
    with base.steps("study mergeability", 4, progress) as step:
        return _study(measured, table, setting, costs, losses, step)


@whole_numbers(StudyError)
def check_settings(
    *, tokens_per_sequence: int = 16, window: int = 8, shares: Sequence[float] = (0.25, 0.5), n_random: int = 3
) -> None:
    """Refuse settings of `study_mergeability` that do not fit; needs neither model nor texts.

    Raises:
        StudyError: see there.
    """
    for name, value, least in (
        ("tokens_per_sequence", tokens_per_sequence, FEWEST_PLACES), ("window", window, 1), ("n_random", n_random, 1),
    ):  # fmt: skip
        whole(value, name, least=least, error=StudyError)
    given = [shares] if isinstance(shares, int | float) else list(shares)
    if not given or len(set(given)) < len(given) or not all(0 < share < 1 for share in given):
        raise StudyError(f"expected shares of the tokens to merge, between 0 and 1, each once, got {shares!r}.")


def refusals(model: Any, *, unit: str = "document", window: int = 8, **settings: Any) -> Callable[[Capture], None]:
    """What `study_mergeability` refuses before the model runs, as a check of the texts chosen."""
    check_settings(window=window, **settings)

    def check(capture: Capture) -> None:
        TokenMerger(list(capture.layers), rule="score", threshold=0.5, recent=window).prepare(model)
        count_units(capture, unit)
        long = [
            seq for seq, length in enumerate(capture.lengths.tolist()) if len(able_places(int(length), window)) >= FEWEST_PLACES
        ]
        _enough(len(_units(capture, long, unit)), unit, f"sequences of at least {2 + window + LATER + FEWEST_PLACES} tokens")

    return check


def _enough(count: int, unit: str, what: str) -> None:
    if count < 2 * FEWEST_UNITS:
        raise StudyError(
            f"expected at least {2 * FEWEST_UNITS} units ({unit}) with {what}, got {count}: half of them set the levels of merging, the others "
            "test them. Add texts, use longer ones, or take a smaller window."
        )


def _unit_of(capture: Capture, seq: int, unit: str) -> Any:
    return seq if unit == "sequence" else capture.docs[seq] if unit == "document" else capture.labels[seq][unit]


def _units(capture: Capture, sequences: Sequence[int], unit: str) -> set[Any]:
    return {_unit_of(capture, seq, unit) for seq in sequences}


def _halves(measured: Measured, sequences: list[int], seed: int) -> tuple[list[int], list[int]]:
    """Sequences that set levels, and those that test them; no unit is in both."""
    rows = pd.DataFrame({"seq": sequences, "unit": [_unit_of(measured.capture, seq, measured.unit) for seq in sequences]})
    rows.attrs = dict(measured.table.attrs)  # which texts are copies: none is in both
    first = stats.halves(rows.assign(doc=rows["unit"]), seed=seed).to_numpy(bool)
    return rows["seq"][first].tolist(), rows["seq"][~first].tolist()


def _study(
    measured: Measured, table: pd.DataFrame, setting: Setting, costs: Costs, losses: pd.DataFrame, step: base.Steps
) -> base.Study:
    whole = _with_costs(table, costs.table)
    drawn = whole[whole[COST].notna()].reset_index(drop=True)
    drawn.attrs = dict(whole.attrs)

    step("partial correlations")
    found = _correlations(drawn, measured)

    step("declared tests and red flags")
    policies, last = _policies(losses, measured, whole.attrs)
    findings = base.settle("mergeability", [
        *(
            base.declared(
                drawn, partial(stats.partial_correlation, scores="compression", against=COST, controls=controls, **_options(measured)), measured,
                finding, COST,
            )
            for controls, finding in zip(CONTROL_SETS.values(), (
                "compression goes with the cost of merging the token", "it does so beyond the similarity to the token it is merged into",
            ), strict=True)
        ),
        last,
    ])  # fmt: skip
    findings = base.beside_guide(findings, base.guide(drawn, ["compression"], COST))
    flags = base.red_flags(
        drawn, "compression", COST, frequency=measured.frequency, unit=measured.unit, seed=measured.seed
    ).assign(question=COST)  # fmt: skip

    step("figures")
    layer = int(findings["layer"].iloc[0]) if pd.notna(findings["layer"].iloc[0]) else measured.layers[-1]
    quartiles = stats.correct(pd.concat([
        stats.quartile_table(drawn, COST, by, layers=[layer], unit=measured.unit) for by in QUARTERS
    ], ignore_index=True), "bh")  # fmt: skip
    quartiles.attrs = dict(drawn.attrs)
    sections, figures = sections_of(whole, drawn, found, quartiles, policies, layer)
    held = {"partial_correlation": found, "quartiles": quartiles, "costs": _kept(drawn, measured), "policies": policies}
    step("contrast")
    if measured.contrast is not None:
        section, compared, figure = contrast_section(drawn, [COST, SIMILARITY], measured)
        sections.append(section)
        held["contrast"], figures["contrast-by-layer"] = compared, figure
    decision = base.decide(findings, flags)
    own = {
        "window": setting.window, "seed": setting.seed, "forced_merges": len(drawn), "calibration_sequences": setting.calibration,
        "rounding_nats": costs.rounding, "shares": sorted({float(share) for share in losses["share"]}),
    }  # fmt: skip
    return base.Study(
        name="mergeability",
        title="Does geometry predict which tokens a language model can merge?",
        about=(*base.about(measured), *about_merges(drawn, setting, costs, losses)),
        hypothesis=HYPOTHESIS,
        decision=decision,
        verdict=tuple(verdict_of(decision, findings, found, drawn, policies)),
        findings=findings,
        flags=flags,
        not_tested=not_tested(measured, setting),
        sections=tuple(sections),
        tables=held,
        figures=figures,
        provenance={run: {**facts, "mergeability": own} for run, facts in base.provenance(measured).items()},
        tokens=measured.table,
    )


def _with_costs(table: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """The token table with what was found for each forced merge: row of layer n, merge in layer n. NaN where nothing was merged."""
    answer = table.merge(costs, on=["layer", "seq", "pos"], how="left", validate="one_to_one")
    provenance = {
        run: {
            **facts,
            "columns": {**facts["columns"], **{name: {"unit": unit, "low": None, "high": None} for name, unit in UNITS.items()}},
        }
        for run, facts in tables.provenance(table).items()
    }
    answer.attrs = {**table.attrs, "provenance": provenance}
    return answer


def _kept(drawn: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """Columns of the table `costs`."""
    names = [*tables.KEYS, measured.unit, *SCORES, "compression_other_token", "same_token_share", COST, CHANGE, "losses_behind", "leader_pos",
             "leader_is_same_token"]  # fmt: skip
    return drawn[[name for name in dict.fromkeys(names) if name in drawn]]


def _options(measured: Measured) -> dict[str, Any]:
    """Of `stats.partial_correlation`."""
    return {"frequency": measured.frequency, "unit": measured.unit, "min_tokens": FEWEST_SCORED, "seed": measured.seed}


def _correlations(drawn: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """Every score and layer, with both sets of controls: one family for the cost, one for the change."""
    families = []
    for against in (COST, CHANGE):
        parts = []
        for name, controls in CONTROL_SETS.items():
            for score in SCORES:
                if score != SIMILARITY or SIMILARITY not in controls:
                    one = base.attempt(stats.partial_correlation, drawn, score, against, controls=controls, **_options(measured))
                    parts.append(one.assign(control_set=name, against=against))
        families.append(stats.correct(pd.concat(parts, ignore_index=True), "bh"))
    found = pd.concat(families, ignore_index=True)
    found.attrs = dict(drawn.attrs)
    return found


def _policies(losses: pd.DataFrame, measured: Measured, attrs: Mapping[Any, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Excess loss of each policy, and less that of each random one; and the declared test, as a row."""
    held = losses.groupby(["share", "policy", "seq"], sort=False)[
        [EXCESS, "merged_share", "n_tokens"]
    ].mean()  # draws of chance as one
    capture = measured.capture
    # One text several times counts once, here as in all tests.
    once = documents_once(measured.table)
    document = pd.Series(once.documents[once.keep], index=measured.table["seq"][once.keep])
    document = document[~document.index.duplicated()]
    held = held[held.index.get_level_values("seq").isin(document.index)]
    parts, declared = [], []
    for share in sorted(losses["share"].unique()):
        wide = held.loc[share].unstack("policy")
        facts = pd.DataFrame({"seq": wide.index, "doc": document[wide.index].to_numpy()})
        if measured.unit not in ("sequence", "document"):
            facts[measured.unit] = [_unit_of(capture, seq, measured.unit) for seq in wide.index]
        for policy in CHOICES:
            for versus in (None, BASELINE, "random"):
                if policy == versus or (policy, versus) == (BASELINE, "random"):
                    continue
                values = wide[EXCESS][policy] - (0.0 if versus is None else wide[EXCESS][versus])
                row = _mean(facts.assign(**{EXCESS: values.to_numpy(float)}), measured)
                merged = float(wide["merged_share"][policy].mean())
                effect = "mean" if versus is None else "mean difference"
                row["n_tokens"] = int(wide["n_tokens"][policy].sum())
                parts.append(row.assign(effect=effect, policy=policy, share=share, versus=versus, merged_share=merged))
                if (policy, versus) == ("high compression", BASELINE):
                    declared.append(row.assign(effect="mean difference", share=share))
    found = stats.correct(pd.concat(parts, ignore_index=True), "bh").drop(columns="layer")
    first = ["policy", "share", "versus", "merged_share"]
    found = found[[*first, *(name for name in found if name not in first)]]
    found.attrs = dict(attrs)
    last = base.one_sided(lambda part: part.copy(), more=False)(declared[-1])
    last["p_floor"] = [base.p_floor(row) for row in base.rows(last)]
    return found, last.assign(
        finding="merging the most compressed tokens costs less than merging any", question="policy", score="compression",
        note=f"{last['share'].iloc[0]:g} of the tokens that can be merged, nats per token, on documents that did not set the levels",
    )  # fmt: skip


def _mean(rows: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """Mean over units, by sign flips of whole units; its interval by bootstrap of them."""
    answer = base.attempt(stats.before_after, rows, EXCESS, unit=measured.unit, correction="none", seed=measured.seed)
    column = {"document": "doc", "sequence": "seq"}.get(measured.unit, measured.unit)
    bounds = stats.mean_interval(rows.assign(_all=0), EXCESS, "_all", unit=column, seed=measured.seed)
    return answer.assign(low=bounds["low"].iloc[0], high=bounds["high"].iloc[0])
