"""All studies side by side: what was declared, what came out, and what the original guide would have said."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from basin_lens import stats
from basin_lens.errors import StudyError
from basin_lens.studies.framework.declared_tests import ALPHA, FINDING, decide, p_floor, within_reach
from basin_lens.studies.framework.runner import make_study
from basin_lens.studies.framework.spec import Declaration, Presentation, Results
from basin_lens.studies.framework.storage import read_results
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.studies.framework.wording import sentence
from basin_lens.values import Facts
from basin_lens.views import Section, forest
from basin_lens.views.marks import plain

HYPOTHESIS = (
    "Declared before looking: what each study declared. Here all declared tests of all studies are one family (Holm), "
    "which is stricter than each study's own."
)
SPEC = Declaration(
    name="summary",
    title="What the studies found",
    question="What do the studies say together, their tests as one family?",
    hypothesis=HYPOTHESIS,
    tests=("every declared test of every study given, corrected over all of them (Holm)",),
    nulls=("those of each study",),
    not_tested=("What each study did not test: its own list, named by the study.",),
)
_SHOWN = (
    "study",
    "finding",
    "layer",
    "effect",
    "effect_unit",
    "estimate",
    "low",
    "high",
    "p",
    "p_corrected",
    "holds",
    "within_reach",
    "n_units",
    "n_documents",
    "n_tokens",
    "test",
    "guide_test",
    "guide_statistic",
    "guide_r",
    "guide_p",
    "guide_reading",
)


def summarize(studies: Sequence[Study | str | os.PathLike[str]]) -> Study:
    """One table and figure over all studies run.

    Args:
        studies: studies, or folders that `Study.save` wrote, each study once.

    Returns:
        a `Study` named `"summary"` with tables `findings` (every declared test, corrected over all of them, beside the original
        guide's test of the same question: t, point-biserial, ANOVA, Pearson, and its reading of |r| > 0.4 and > 0.2) and `studies`
        (a row per study).

    Raises:
        StudyError: none, or a study twice. StoreError: a folder without a study's results.

    Source: design of basin_lens; the guide's tests as in `basin_lens.stats.guide_tests`.

    Example:
        >>> import basin_lens as bl
        >>> bl.studies.summarize([])
        Traceback (most recent call last):
        ...
        basin_lens.errors.StudyError: expected at least one study, got none. Run one first.
    """
    held = read_studies(studies)
    findings = _one_family(held)
    about = pd.DataFrame([_overview(one) for one in held])
    sections, figures = _sections(findings, about)
    flags = _flags(held)
    not_tested = [f"{one['study']}: {line}" for one in held for line in one["not_tested"]]
    return make_study(
        SPEC,
        Results(findings, flags, decide(findings, flags)),
        Presentation(sections, figures, not_tested, tables={"studies": about}, verdict=_verdict(findings, about)),
        about=[f"{one['study']}: {' '.join(one['about'])}" for one in held],
        provenance={one["study"]: one["provenance"] for one in held},
        tokens=None,
    )


def read_studies(studies: Sequence[Study | str | os.PathLike[str]]) -> list[Facts]:
    """What each study found, as its folder has it.

    Raises:
        StudyError: none, a study twice, or a summary. StoreError: a folder without a study's results.
    """
    if not studies:
        raise StudyError("expected at least one study, got none. Run one first.")
    held = [study.as_json() if isinstance(study, Study) else read_results(Path(study)) for study in studies]
    names = [one["study"] for one in held]
    if len(set(names)) < len(names) or "summary" in names:
        raise StudyError(f"expected different studies, and no summary among them, got {names}.")
    return held


def _one_family(held: Sequence[Facts]) -> pd.DataFrame:
    """The declared tests of all studies, corrected as one family (Holm)."""
    rows = pd.DataFrame([row for one in held for row in one["findings"]], columns=list(FINDING))
    for name in ("estimate", "low", "high", "null", "p", "p_corrected", "p_floor", "guide_statistic", "guide_r", "guide_p"):
        rows[name] = rows[name].astype(float)
    rows["layer"] = rows["layer"].astype("Int64")
    # Studies of earlier versions do not tell it; tests of the best of several layers then look within easier reach than they were.
    floors = [p_floor(row) if isinstance(row.test, str) else float("nan") for row in named_rows(rows)]
    rows["p_floor"] = rows["p_floor"].fillna(pd.Series(floors, rows.index, dtype=float))
    own = rows["holds"].fillna(False).astype(bool)
    reachable = rows["within_reach"].fillna(False).astype(bool)
    findings = stats.correct(rows, "holm")
    # The larger family has its price here too.
    findings["within_reach"] = reachable & within_reach(findings)
    # A study may ask for more than significance (a direction, survival under every setting).
    findings["holds"] = own & (findings["p_corrected"] <= ALPHA)
    return findings


def _overview(one: Facts) -> Facts:
    """A study as one row."""
    row = {name: one[name] for name in ("study", "title", "decision")}
    return row | {"red_flags": _raised(one), "verdict": one["verdict"][0]}


def _flags(held: Sequence[Facts]) -> pd.DataFrame | None:
    """The red flags of all studies; None if there are none."""
    flags = pd.DataFrame([{**flag, "study": one["study"]} for one in held for flag in one["red_flags"] or []])
    if not len(flags):
        return None
    flags = flags.astype({"raised": "boolean", "layer": "Int64"})
    flags.insert(0, "study", flags.pop("study"))
    return flags


def _sections(findings: pd.DataFrame, about: pd.DataFrame) -> tuple[list[Section], dict[str, Figure]]:
    figures = {}
    sections = [
        Section(
            "The studies", "The decision of each on its own declared hypothesis, and how many red flags it raised.", table=about
        ),
        Section(
            "Every declared test",
            "Sound tests first: over documents, corrected by Holm over all studies. The columns that begin with guide_ "
            "are the original guide's tests, which count every token as independent: shown so that older figures can "
            "be compared, not to be believed. Its readings: |r| > 0.4 strong, > 0.2 moderate.",
            table=findings[list(_SHOWN)],
        ),
    ]
    for name, title, part in _kinds(findings):
        label = part["study"] + ": " + part["finding"]
        figures[name] = figure = forest(part.assign(case=label), "case", by="study", title=title)
        figure.axes[0].set_xlabel(_axis(part))
        caption = "95 % intervals over units; filled: p at most 0.05, Holm over all studies."
        sections.append(Section(title, figure=figure, caption=caption))
    return sections, figures


def _kinds(findings: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Findings that can share an axis: correlations, and all others by their unit; by their effect where no unit is known."""
    effect = findings["effect"].fillna("").astype(str)
    rho, there = effect.str.contains("rho"), findings["estimate"].notna()
    if (rho & there).any():
        yield "summary-correlations", "Correlations", findings[rho & there]
    unit = findings["effect_unit"].fillna("").astype(str)
    kind = unit.where(unit != "", effect)
    for one in dict.fromkeys(kind[~rho & there]):
        chosen = there & ~rho & (kind == one)
        title = f"Differences in {one}" if (unit[chosen] != "").all() else f"{one[:1].upper()}{one[1:]}"
        short = "-".join(re.findall(r"[a-z0-9]+", one.lower()))[:60]
        yield f"summary-differences-{short}", title, findings[chosen]


def _axis(part: pd.DataFrame) -> str:
    """What the estimates of one figure are, with their unit."""
    effects = list(dict.fromkeys(part["effect"]))
    units = [unit for unit in dict.fromkeys(part["effect_unit"].dropna()) if unit]
    label = " / ".join(effects) if len(effects) <= 2 else "estimate"
    # An effect may spell its unit itself.
    return plain(label + "".join(f" [{unit}]" for unit in units if f"[{unit}]" not in label), 110)


def _raised(one: Facts) -> int:
    return sum(flag.get("raised") is True for flag in one["red_flags"] or [])


def _verdict(findings: pd.DataFrame, about: pd.DataFrame) -> list[str]:
    kept = findings[findings["holds"]]
    told = [f"{len(kept)} of {len(findings)} declared findings hold when all studies are one family (Holm)."]
    told += [f"{row.study}: {row.decision}; {row.red_flags} red flags raised. {row.verdict}" for row in named_rows(about)]
    told += [sentence(row) for row in named_rows(findings) if pd.notna(row.estimate)]
    apart = findings[(findings["guide_p"] <= ALPHA) & ~findings["holds"]]
    if len(apart):
        told.append(
            f"By the original guide's tests, which count tokens as independent, {len(apart)} more would have passed: "
            f"{', '.join(apart['finding'])}."
        )
    strong = findings[findings["guide_reading"].isin(["strong", "moderate"])]
    told.append(
        f"By the guide's thresholds {len(strong)} of {int(findings['guide_r'].notna().sum())} correlations are strong "
        "or moderate (|r| > 0.2)."
    )
    return told
