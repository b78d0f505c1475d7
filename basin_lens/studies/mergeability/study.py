"""Does the geometry of a token's state say whether a language model can do without it, merged into an earlier one?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from basin_lens import stats, tables
from basin_lens.capture import Capture
from basin_lens.errors import StudyError
from basin_lens.merging import TokenMerger
from basin_lens.model import HookedModel
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.framework.declared_tests import one_sided, p_floor
from basin_lens.studies.framework.measured_texts import HEADLINE, Measured, StudyData
from basin_lens.studies.framework.runner import run_study
from basin_lens.studies.framework.spec import (
    Analysis,
    Check,
    DeclaredTest,
    Presentation,
    Results,
    StudySpec,
    Task,
    UnitAndSeed,
    option,
    own_options,
)
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.framework.units import FEWEST_UNITS, count_units
from basin_lens.studies.framework.wording import layers_said
from basin_lens.studies.mergeability.all_tokens import GROUP, is_sampled, with_all_compressed
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
    NOT_TESTED,
    SCORES,
    SIMILARITY,
    about_merges,
    remarks_of,
    sections_of,
)
from basin_lens.tables.distinct import documents_once
from basin_lens.values import Plain, whole, whole_numbers

CONTROL_SETS = {"standard": stats.CONTROLS, "standard and similarity": (*stats.CONTROLS, SIMILARITY)}
# Six or seven controls take their share of a sequence's tokens; red flags need 16.
FEWEST_PLACES = 16
FEWEST_SCORED = 6
COST_FINDINGS = (
    "compression goes with the cost of merging the token",
    "it does so beyond the similarity to the token it is merged into",
)
POLICY_FINDING = "merging the most compressed tokens costs less than merging any"
QUARTERS = (HEADLINE, SIMILARITY, "surprisal", "radius")
UNITS = {COST: "nats", CHANGE: "nats", SIMILARITY: "cosine", EXCESS: "nats per token"}


@dataclass(frozen=True)
class MergeabilityOptions:
    """Of `study_mergeability`."""

    tokens_per_sequence: int = option(16, "Forced merges per sequence and layer.")
    window: int = option(8, "Tokens that stay raw.")
    shares: tuple[float, ...] = option((0.25, 0.5))
    n_random: int = option(3)
    seed: int | None = option(None)

    def check(self) -> None:
        """Refuse values that do not fit; needs neither model nor texts.

        Raises:
            StudyError: see there.
        """
        check_settings(tokens_per_sequence=self.tokens_per_sequence, window=self.window, shares=self.shares, n_random=self.n_random)


@whole_numbers(StudyError)
def study_mergeability(
    model: HookedModel,
    data: StudyData,
    *,
    progress: bool = True,
    tokens_per_sequence: int = 16,
    window: int = 8,
    shares: Sequence[float] = (0.25, 0.5),
    n_random: int = 3,
    seed: int | None = None,
    **options: object,
) -> Study:
    """Ask whether compression, or anything cheaper, tells which tokens can be merged.

    Token by token: what later tokens lose when one token alone is merged in one layer alone, against the scores of that layer;
    and, as exploration, how much their predictions change, for better or worse. Then all at once: the same share of the tokens
    merged in all layers, chosen by cosine, low surprisal, high compression, or chance. Compression is that of all tokens that can
    be merged: measured again, in groups of 3, where the run has it of a sample (`compression_tokens`). Slow: a copy of the
    sequence is read for every merge, so 20 sequences of 128 tokens take 320 such copies for each layer (about 40,000 tokens).

    Args:
        model: a `TransformerBridge` or `HookedTransformer` whose attention obeys its pattern.
        data: texts as for `analyze`, or a `Measured` for the study `"mergeability"`; at least 12 documents, and sequences of
            `window` + 30 tokens (shorter ones have too few tokens to merge and are passed over).
        progress: show progress bars.
        tokens_per_sequence: at most so many forced merges per sequence and layer, at least 16: with fewer, nothing is left of a
            sequence once six controls are taken out.
        window: tokens that stay raw, the current one counted.
        shares: of the tokens that can be merged, for the policies.
        n_random: draws of each random policy.
        seed: of the positions, the halves and every other choice here; None: that of what was measured (0 with texts). With a
            finished run it is the run's own.
        **options: of `basin_lens.studies.measure`, with texts.

    Returns:
        a `Study` with tables `costs` (a row per forced merge), `partial_correlation` (every score and layer against the cost and
        the change, with the standard controls and with the cosine too), `quartiles` (the cost in the quarters of a score),
        `policies` (excess loss of each, and less each of the random ones), and `contrast` if one was asked for.

    Raises:
        StudyError: too few documents with long enough sequences, or settings that do not fit. MergeError: a model in which nothing
            can be merged. Others as for `analyze`; all before the model runs.

    Source: design of basin_lens, "Causal token merging"; Bolya et al. 2023 (size on the logit).

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> study = bl.studies.study_mergeability(
        ...     model, list(reference_passages()), layers=[20], max_sequences=12, max_length=44, unit="sequence", shares=[0.5],
        ...     n_random=1, progress=False)
        >>> sorted(study.tables)
        ['costs', 'partial_correlation', 'policies', 'quartiles']
    """
    check_settings(tokens_per_sequence=tokens_per_sequence, window=window, shares=shares, n_random=n_random)
    own = MergeabilityOptions(tokens_per_sequence, window, tuple(shares), n_random, seed)
    chosen = options if seed is None or isinstance(data, Measured) else {"seed": seed, **options}
    return run_study(SPEC, model, data, own, progress=progress, measure_options=chosen)


@whole_numbers(StudyError)
def check_settings(
    *, tokens_per_sequence: int = 16, window: int = 8, shares: Sequence[float] = (0.25, 0.5), n_random: int = 3
) -> None:
    """Refuse settings of `study_mergeability` that do not fit; needs neither model nor texts.

    Raises:
        StudyError: see there.
    """
    for name, value, least in (
        ("tokens_per_sequence", tokens_per_sequence, FEWEST_PLACES),
        ("window", window, 1),
        ("n_random", n_random, 1),
    ):
        whole(value, name, least=least, error=StudyError)
    given = [shares] if isinstance(shares, int | float) else list(shares)
    if not given or len(set(given)) < len(given) or not all(0 < share < 1 for share in given):
        raise StudyError(f"expected shares of the tokens to merge, between 0 and 1, each once, got {shares!r}.")


def check_texts(model: HookedModel, given: object, unit: str) -> Callable[[Capture], None]:
    """What `study_mergeability` refuses before the model runs, as a check of the texts chosen."""
    options = own_options(given, MergeabilityOptions)
    options.check()
    window = options.window

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
            f"expected at least {2 * FEWEST_UNITS} units ({unit}) with {what}, got {count}: half of them set the levels of "
            "merging, the others test them. Add texts, use longer ones, or take a smaller window."
        )


def _unit_of(capture: Capture, seq: int, unit: str) -> Plain:
    return seq if unit == "sequence" else capture.docs[seq] if unit == "document" else capture.labels[seq][unit]


def _units(capture: Capture, sequences: Sequence[int], unit: str) -> set[Plain]:
    return {_unit_of(capture, seq, unit) for seq in sequences}


def _halves(measured: Measured, sequences: list[int], seed: int) -> tuple[list[int], list[int]]:
    """Sequences that set levels, and those that test them; no unit is in both."""
    rows = pd.DataFrame({"seq": sequences, "unit": [_unit_of(measured.capture, seq, measured.unit) for seq in sequences]})
    rows = tables.with_provenance(rows, measured.table)  # which texts are copies: none is in both
    first = stats.halves(tables.assign(rows, doc=rows["unit"]), seed=seed).to_numpy(bool)
    return rows["seq"][first].tolist(), rows["seq"][~first].tolist()


@dataclass(frozen=True)
class _Details:
    """What the report needs again. `policies`: the excess loss of each; `whole`: all tokens, merged or not."""

    setting: Setting
    costs: Costs
    losses: pd.DataFrame
    policies: pd.DataFrame
    whole: pd.DataFrame


def _analysis(task: Task) -> Analysis:
    measured, options = task.measured, task.own(MergeabilityOptions)
    seed = measured.seed if options.seed is None else options.seed
    every = with_all_compressed(task, options.window)
    table = stats.add_controls(every, frequency=measured.frequency)
    scored = table[np.isfinite(table[HEADLINE])].groupby(["seq", "pos"])["layer"].nunique()
    everywhere = scored[scored == len(measured.layers)].reset_index()
    places = draw_places(
        measured.capture,
        everywhere,
        most=options.tokens_per_sequence,
        fewest=FEWEST_PLACES,
        window=options.window,
        seed=seed,
    )
    _enough(len(_units(measured.capture, list(places), measured.unit)), measured.unit, "tokens with a score that can be merged")
    calibrating, tested = _halves(measured, sorted(places), seed)
    drawn_calibration = draw_calibration(measured.capture, calibrating, seed)
    setting = Setting(task.model, measured.capture, measured.layers, options.window, seed, drawn_calibration, task.progress)
    task.step("one merge at a time")
    costs = forced_costs(setting, places)
    task.step("many merges at once")
    losses = policy_losses(setting, tested, table, shares=list(options.shares), n_random=options.n_random)
    whole = _with_costs(table, costs.table)
    drawn = tables.with_provenance(whole[whole[COST].notna()].reset_index(drop=True), whole)

    task.step("partial correlations")
    found = _correlations(drawn, measured)
    policies, policy_test = _policies(losses, measured, whole)
    return Analysis(
        table=drawn,
        tests=[
            *(
                DeclaredTest(finding, COST, partial(_against_cost, controls=controls, measured=measured))
                for controls, finding in zip(CONTROL_SETS.values(), COST_FINDINGS, strict=True)
            ),
            DeclaredTest(POLICY_FINDING, "policy", lambda _: policy_test, over_layers=True, unit="nats/token"),
        ],
        token_level=[Check(COST, [HEADLINE], (COST,))],
        red_flags=[Check(COST, HEADLINE, (COST,), {"frequency": measured.frequency})],
        contrast=[COST, SIMILARITY],
        tokens=every,
        tables={"partial_correlation": found, "costs": _kept(drawn, measured), "policies": policies},
        details=_Details(setting, costs, losses, policies, whole),
    )


def _against_cost(table: pd.DataFrame, controls: Sequence[str], measured: Measured) -> pd.DataFrame:
    return stats.partial_correlation(table, scores=HEADLINE, against=COST, controls=controls, **_options(measured))


def _presentation(task: Task, analysis: Analysis, results: Results) -> Presentation:
    measured, drawn, details = task.measured, analysis.table, analysis.details
    assert isinstance(details, _Details)
    setting, found = details.setting, analysis.tables["partial_correlation"]
    chosen = results.findings["layer"].iloc[0]
    layer = int(chosen) if pd.notna(chosen) else measured.layers[-1]
    by_quarter = [stats.quartile_table(drawn, COST, by, layers=[layer], unit=measured.unit) for by in QUARTERS]
    quartiles = stats.correct(pd.concat(by_quarter, ignore_index=True), "bh")
    quartiles = tables.with_provenance(quartiles, drawn)
    sections, figures = sections_of(details.whole, drawn, found, quartiles, details.policies, layer)
    facts = {
        "window": setting.window,
        "seed": setting.seed,
        "forced_merges": len(drawn),
        "calibration_sequences": setting.calibration,
        "rounding_nats": details.costs.rounding,
        "shares": sorted({float(share) for share in details.losses["share"]}),
    }
    return Presentation(
        sections=sections,
        figures=figures,
        tables={"quartiles": quartiles},
        remarks=remarks_of(found, drawn, details.policies),
        not_tested=SPEC.said(layers=layers_said(measured), window=setting.window),
        about=[*about_merges(drawn, setting, details.costs, details.losses), *_compressed(measured)],
        facts={"mergeability": facts},
    )


def _compressed(measured: Measured) -> list[str]:
    if not is_sampled(measured):
        return []
    return [
        f"Compression is of every token that can be merged, measured anew in groups of {GROUP} (the run has it of a sample); "
        "tokens that found no group are neither drawn nor merged by it."
    ]


def _with_costs(table: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """The token table with what was found for each forced merge: row of layer n, merge in layer n. NaN where nothing was merged."""
    answer = tables.merge(table, costs, on=["layer", "seq", "pos"], how="left", validate="one_to_one")
    return tables.with_columns(answer, {name: tables.Column(unit) for name, unit in UNITS.items()})


def _kept(drawn: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """Columns of the table `costs`."""
    names = [
        *tables.KEYS,
        measured.unit,
        *SCORES,
        "same_token_share",
        COST,
        CHANGE,
        "losses_behind",
        "leader_pos",
        "leader_is_same_token",
    ]
    return drawn[[name for name in dict.fromkeys(names) if name in drawn]]


class _TestOptions(UnitAndSeed):
    """Of `stats.partial_correlation`."""

    frequency: Mapping[int, float]
    min_tokens: int


def _options(measured: Measured) -> _TestOptions:
    return {"frequency": measured.frequency, "unit": measured.unit, "min_tokens": FEWEST_SCORED, "seed": measured.seed}


def _correlations(drawn: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """Every score and layer, with both sets of controls: one family for the cost, one for the change."""
    families = []
    for against in (COST, CHANGE):
        parts = []
        for name, controls in CONTROL_SETS.items():
            for score in SCORES:
                if score != SIMILARITY or SIMILARITY not in controls:
                    one = attempt(stats.partial_correlation, drawn, score, against, controls=controls, **_options(measured))
                    parts.append(one.assign(control_set=name, against=against))
        families.append(stats.correct(pd.concat(parts, ignore_index=True), "bh"))
    found = pd.concat(families, ignore_index=True)
    return tables.with_provenance(found, drawn)


def _policies(losses: pd.DataFrame, measured: Measured, tokens: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
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
    found = tables.with_provenance(found, tokens)
    last = one_sided(lambda part: part.copy(), more=False)(declared[-1])
    last["p_floor"] = [p_floor(row) for row in named_rows(last)]
    return found, last.assign(
        finding=POLICY_FINDING,
        question="policy",
        score=HEADLINE,
        note=f"{last['share'].iloc[0]:g} of the tokens that can be merged, nats per token, on documents that did not set the "
        "levels",
    )


def _mean(rows: pd.DataFrame, measured: Measured) -> pd.DataFrame:
    """Mean over units, by sign flips of whole units; its interval by bootstrap of them."""
    answer = attempt(stats.before_after, rows, EXCESS, unit=measured.unit, correction="none", seed=measured.seed)
    column = {"document": "doc", "sequence": "seq"}.get(measured.unit, measured.unit)
    bounds = stats.mean_interval(rows.assign(_all=0), EXCESS, "_all", unit=column, seed=measured.seed)
    return answer.assign(low=bounds["low"].iloc[0], high=bounds["high"].iloc[0])


SPEC = StudySpec(
    name="mergeability",
    title="Does geometry predict which tokens a language model can merge?",
    question="Does geometry predict which tokens the model can merge? Slow.",
    hypothesis=HYPOTHESIS,
    tests=(*COST_FINDINGS, POLICY_FINDING),
    nulls=(
        "no correlation within sequences at fixed controls: signs of whole documents are flipped",
        "as many tokens merged, chosen at random (random choice)",
        "as many tokens, each merged into any earlier cluster (random)",
    ),
    not_tested=NOT_TESTED,
    if_yes="Compression goes with what it costs to merge a token, beyond frequency, position, norm, density, surprisal and "
    "similarity, and choosing by it costs less than chance.",
    if_no="At fixed frequency, position, norm, density and surprisal, compression says nothing reliable about what it costs to "
    "merge a token, and choosing by it is not shown to be better than chance.",
    options=MergeabilityOptions,
    refuse=lambda given, _: own_options(given, MergeabilityOptions).check(),
    check=check_texts,
    analysis=_analysis,
    presentation=_presentation,
    steps=4,
)
