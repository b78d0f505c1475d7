"""Which findings of the robustness study survive its settings, and what may be said of that."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from basin_lens import stats
from basin_lens.studies.framework.declared_tests import ALPHA, Decision, p_floor, within_reach
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.table_parts import Row, named_rows
from basin_lens.studies.framework.wording import as_sentence, in_words, opening, why_untested

# Kinds of settings that are no setting of the finding, families of their own: who has learned nothing, a map that is 0 by
# definition, another score.
TWIN, AFFINE, SCORE = "twin", "affine map", "score"


def corrected(settings: pd.DataFrame) -> pd.DataFrame:
    """Holm over the settings of each finding, the twin, the affine map and another score in families of their own.

    `survives`: whether sign and significance stay; NA where that was not tested, or where so few units are left that no data of
    them could have had a p of at most 0.05.
    """
    parts = []
    for _, mine in settings.groupby("finding", sort=False):
        apart = mine["kind"].where(mine["kind"].isin((TWIN, AFFINE, SCORE)), "")
        done = pd.concat([_family(part) for _, part in mine.groupby(apart, sort=False)]).loc[mine.index]
        own = done.loc[done["setting"] == "as run", "estimate"].iloc[0]
        same = np.sign(done["estimate"] - done["null"].fillna(0)) == np.sign(own)
        done["survives"] = (same & (done["p_corrected"] <= ALPHA)).astype("boolean")
        done.loc[~done["within_reach"], "survives"] = pd.NA
        few = done["p"].notna() & ~done["within_reach"]
        said = "not testable: too few units for any p to reach 0.05 (Holm)"
        done["note"] = [
            "; ".join(x for x in (said if out else "", note if isinstance(note, str) else "") if x)
            for out, note in zip(few, done["note"], strict=True)
        ]
        parts.append(done)
    return pd.concat(parts, ignore_index=True)


def _family(settings: pd.DataFrame) -> pd.DataFrame:
    """Corrected by Holm, and what could have passed that."""
    answer = stats.correct(settings, "holm")
    answer["p_floor"] = [p_floor(row) for row in named_rows(answer)]
    return answer.assign(within_reach=within_reach(answer))


def survival_of(settings: pd.DataFrame, settled: pd.DataFrame) -> pd.DataFrame:
    """One row per finding: does it hold, in how many settings does it stay, where does it not, and is it there in the twin.

    `in_random_twin` is None where the twin could not be checked. `not_testable`: settings that left too few units.
    """
    lines = []
    for row in named_rows(settled):
        mine = settings[
            (settings["finding"] == row.finding) & (settings["setting"] != "as run") & ~settings["kind"].isin((AFFINE, SCORE))
        ]
        twin, others = mine[mine["kind"] == TWIN], mine[mine["kind"] != TWIN]
        rest = others[others["survives"].notna()]
        lost = rest[~rest["survives"].astype(bool)]["setting"].tolist()
        few = others[others["p"].notna() & ~others["within_reach"]]["setting"].tolist()
        lines.append(
            {
                "finding": row.finding,
                "layer": row.layer,
                "holds_as_run": bool(row.holds),
                "estimate": row.estimate,
                "p_corrected": row.p_corrected,
                "settings": len(rest),
                "survives": len(rest) - len(lost),
                "lost_under": "; ".join(lost) or "none",
                "not_testable": "; ".join(few) or "none",
                "in_random_twin": bool(twin["survives"].fillna(False).any()) if twin["survives"].notna().any() else None,
                "not_tested": int(mine["survives"].isna().sum()),
                "how": row.note,
            }
        )
    return pd.DataFrame(lines)


def with_survival(settled: pd.DataFrame, survival: pd.DataFrame) -> pd.DataFrame:
    """A finding holds if it holds as run, under every setting that could be tested, and was looked for in the twin in vain."""
    answer = settled.copy()
    whole = survival["survives"] == survival["settings"]
    # Without the twin, or without any other setting, no data could have made it hold.
    could = survival["in_random_twin"].notna() & (survival["settings"] > 0)
    answer["holds"] = answer["holds"].to_numpy(bool) & (whole & could & ~survival["in_random_twin"].eq(True)).to_numpy(bool)
    answer["within_reach"] = answer["within_reach"].to_numpy(bool) & could.to_numpy(bool)
    answer["note"] = [
        "; ".join(
            x for x in (_survived(row) if row.holds_as_run else "nothing to lose under other settings", _in_twin(row), row.how) if x
        )
        for row in named_rows(survival)
    ]
    return answer


def flags_of(survival: pd.DataFrame) -> pd.DataFrame:
    """A flag per finding for settings that lose it, and one if the twin shows it."""
    lines: list[dict[str, object]] = []
    for row in named_rows(survival):
        lost: object = pd.NA
        why = f"not checked: {row.finding} does not hold"
        if row.holds_as_run:
            lost = row.survives < row.settings if row.settings else pd.NA
            why = f"{row.finding}: {_survived(row)}"
        common = {"score": HEADLINE, "layer": row.layer, "question": row.finding}
        lines.append({"flag": "lost under another setting", **common, "raised": lost, "why": why})
        there = row.in_random_twin
        why = "not checked" if there is None else "also in a model that has learned nothing" if there else "absent there"
        raised = pd.NA if there is None else there
        lines.append({"flag": "appears in the random twin", **common, "raised": raised, "why": why})
    return pd.DataFrame(lines).astype({"layer": "Int64", "raised": "boolean"})


def verdict_of(decision: Decision, settled: pd.DataFrame, survival: pd.DataFrame) -> list[str]:
    """The verdict in sentences. "absent from the random twin" is said of what was looked for there only."""
    held, unchecked = int(settled["holds"].sum()), int(survival["in_random_twin"].isna().sum())
    count = f"{held} of {len(settled)} findings hold under every setting that could be tested and are absent from the random twin."
    if unchecked:
        count = (
            f"{held} of {len(settled)} findings count as holding under every setting; {unchecked} could not be checked in the "
            "random twin, and so do not count."
        )
    told = [
        opening(decision, "Every finding survives every setting that could be tested and is absent from the random twin.", count)
    ]
    if decision == "undecided" and unchecked:
        told = [
            f"Undecided: {unchecked} of {len(settled)} findings could not be checked in the random twin, and no other could hold."
        ]
    if decision.startswith("in part"):
        told.append(count)
    for row, last in zip(named_rows(settled), named_rows(survival), strict=True):
        unit = f" {row.effect_unit}" if row.effect_unit else ""
        found = f"{row.effect} {row.estimate:+.3f}{unit}, corrected p {in_words(row.p_corrected)}"
        # What is not there cannot be lost.
        rest = f"{_survived(last)}; {_in_twin(last)}" if last.holds_as_run else f"so there is nothing to lose; {_in_twin(last)}"
        if pd.isna(row.p):
            told.append(f"{row.finding}: could not be tested ({why_untested(last.how)}).")
            continue
        told.append(
            f"{row.finding} (layer {last.layer}): {'holds' if last.holds_as_run else 'does not hold'} as run ({found}); {rest}. "
            f"{as_sentence(last.how)}".rstrip()
        )
    return told


def untestable(survival: pd.DataFrame) -> Sequence[str]:
    """What the twin or the number of units kept from being tested, for the list of what was not tested."""
    said = [
        f"{row.finding}: too few units for any p to reach 0.05 (Holm) under {row.not_testable}."
        for row in named_rows(survival)
        if row.not_testable != "none"
    ]
    without = survival[survival["in_random_twin"].isna()]["finding"].tolist()
    return [
        *said,
        *([f"In the random twin: {'; '.join(without)}. What was not checked there does not count as holding."] if without else []),
    ]


def _survived(row: Row) -> str:
    if not row.settings and row.not_testable != "none":
        return "testable under no other setting, for too few units"
    if not row.settings:
        return "no other setting could be tested"
    few = f", not testable under: {row.not_testable}" if row.not_testable != "none" else ""
    return f"survives {row.survives} of {row.settings} settings (lost under: {row.lost_under}{few})"


def _in_twin(row: Row) -> str:
    if row.in_random_twin is None:
        return "not checked in the random twin"
    return "ALSO IN THE RANDOM TWIN" if row.in_random_twin else "absent from the random twin"
