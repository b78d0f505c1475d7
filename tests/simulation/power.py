"""Power: what an ordinary joint regression finds, a statistic must find nearly as often.

    python -m tests.simulation.power --draws 400
    python -m tests.simulation.power --excess --draws 400     # partial rank correlation by the share of variance that controls leave

The reference is ordinary least squares of x on y (or on its group, where the statistic sees groups alone) and the controls: over texts' means where
texts are told apart, and in every text by itself, with Student's t of the slopes, where tokens are. Straight data, so that it is the right model.
Effects are such that it finds them in .5 to .9 of the draws.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from basin_lens.stats import partial_correlation
from tests.simulation import data as made
from tests.simulation.battery import ALPHA, ERRORS
from tests.simulation.data import Data
from tests.simulation.statistics import EXCESS, STATISTICS, Statistic

ENOUGH = 0.9  # of the reference's power


@dataclass(frozen=True)
class Effect:
    """A statistic on data with an effect, and what the reference regresses on: `y`, or the `group` that it was cut into."""

    statistic: str
    effect: float
    on: str = "y"
    within: bool = True
    controls: bool = True
    test: str = ""
    steps: bool = False  # the controls leave x alone, as documented: the reference loses their share of the effect too


EFFECTS = (
    Effect("partial_correlation, pearson", 0.12),
    Effect("partial_correlation, spearman", 0.12),
    Effect("rank_regression", 0.12),
    Effect("mixed_model", 0.12),
    Effect("residuals, then spearman", 0.2, steps=True),
    Effect("compare_groups, paired", 0.25, "group"),
    Effect("compare_groups, unpaired", 0.8, "group", within=False),
    Effect("added_value", 0.8, "group", within=False, test="delta log-loss"),
    Effect("tag_means", 0.3, "tag", test="A", steps=True),
    Effect("within_sequence_correlation, pearson", 0.12, controls=False),
    Effect("within_sequence_correlation, spearman", 0.12, controls=False),
    Effect("compare_groups, paired, no controls", 0.16, "group", controls=False),
    Effect("compare_groups, unpaired, no controls", 0.5, "group", within=False, controls=False),
    Effect("detect", 0.5, "group", within=False, controls=False),
    Effect("unit_slope", 0.45, within=False, controls=False),
)


def reference(table: pd.DataFrame, effect: Effect) -> np.ndarray:
    """P-values of the joint regression, one per layer."""
    names = ["x", effect.on, *([c for c in ("c0",) if effect.controls])]
    numbers = table.assign(group=table["group"] * 1.0) if effect.on == "group" else table
    if effect.on == "tag":
        numbers = table.assign(tag=(table["tag"] == "A") * 1.0)
    draws = numbers["layer"].nunique()
    texts = numbers["doc"].nunique()
    held = numbers[names].to_numpy(float).reshape(draws, texts, -1, len(names))
    if effect.steps:
        held = held - held.mean(2, keepdims=True)
        x, control = held[..., 0], held[..., -1]
        held[..., 0] = x - control * ((x * control).sum((1, 2)) / (control**2).sum((1, 2)))[:, None, None]
        held = held[..., :-1]
    return _slopes_of_texts(held) if effect.within else _slope_of_means(held.mean(2))


def _slopes_of_texts(held: np.ndarray) -> np.ndarray:
    held = held - held.mean(2, keepdims=True)
    x, design = held[..., 0], held[..., 1:]
    among = np.einsum("dtnc,dtne->dtce", design, design)
    across = np.einsum("dtnc,dtn->dtc", design, x)
    return np.asarray(ttest_1samp(np.linalg.solve(among, across[..., None])[..., 0, 0], 0, axis=1).pvalue)


def _slope_of_means(means: np.ndarray) -> np.ndarray:
    means = means - means.mean(1, keepdims=True)
    x, design = means[..., 0], means[..., 1:]
    inverse = np.linalg.inv(np.einsum("dnc,dne->dce", design, design))
    slopes = np.einsum("dce,dne,dn->dc", inverse, design, x)
    rest = x - np.einsum("dnc,dc->dn", design, slopes)
    freedom = x.shape[1] - 1 - design.shape[2]
    t = slopes[:, 0] / np.sqrt((rest**2).sum(1) / freedom * inverse[:, 0, 0])
    return np.asarray(2 * student.sf(np.abs(t), freedom))


def power(effect: Effect, draws: int) -> dict[str, object]:
    """How often the statistic and the reference find the effect in the same draws."""
    statistic = next(one for one in STATISTICS if one.name == effect.statistic)
    draws = max(60, round(draws * statistic.share))
    data = Data("normal", False, "straight", effect.effect)
    table = statistic.make(data, draws, 12345)
    answer = statistic.test(table, ["c0"])
    if effect.test:
        answer = answer[answer[str(statistic.by)] == effect.test]
    assert len(answer) == draws
    found, other = answer["p"].to_numpy(float) <= ALPHA, reference(table, effect) <= ALPHA
    # Of the difference found - ENOUGH * other, draw by draw.
    gap = found - ENOUGH * other
    error = float(gap.std() / np.sqrt(draws))
    return {
        "statistic": effect.statistic + (f", {effect.test}" if effect.test else ""), "effect": effect.effect, "power": float(found.mean()),
        "reference": float(other.mean()), "ratio": float(found.mean() / other.mean()), "error": error, "draws": draws,
        "verdict": "ok" if gap.mean() >= -ERRORS * error else "FAILS: too few",
    }  # fmt: skip


def powers(draws: int = 400, effects: Sequence[Effect] = EFFECTS) -> pd.DataFrame:
    """A row for each statistic."""
    return pd.DataFrame([power(effect, draws) for effect in effects])


def excess(draws: int = 400, noises: Sequence[float] = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1)) -> pd.DataFrame:
    """False positives of partial rank correlation and of rank regression by the share of variance that the control leaves, and the note.

    Text levels (SD 1) in the control, and none.
    """
    lines = []
    for statistic in (one for one in STATISTICS if one.name in ("partial_correlation, spearman", "rank_regression")):
        for levels in (False, True):
            for noise in noises:
                lines.append(_excess(statistic, Data("normal", levels, "straight", noise=noise), draws))
    return pd.DataFrame(lines)


def _excess(statistic: Statistic, data: Data, draws: int) -> dict[str, object]:
    table = made.of_tokens(data, draws, 777)
    answer = statistic.test(table, ["c0"])
    values = partial_correlation(table, "x", "y", controls=["c0"], method="pearson", correction="none")
    rate = float((answer["p"] <= ALPHA).mean())
    return {
        "statistic": statistic.name, "levels": data.levels, "noise": data.noise, "left of values": data.noise**2 / (1 + data.noise**2),
        "left of ranks": float(answer["left"].mean()) if "left" in answer else np.nan, "estimate": float(answer["estimate"].mean()),
        "rate": rate, "error": float(np.sqrt(rate * (1 - rate) / draws)), "rate of pearson": float((values["p"] <= ALPHA).mean()),
        "rows that say so": float(answer["note"].str.contains(EXCESS).mean()), "draws": draws,
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--excess", action="store_true")
    parser.add_argument("--out", type=Path, help="write the table here too")
    given = parser.parse_args()
    text = (excess if given.excess else powers)(given.draws).round(3).to_string(index=False) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
