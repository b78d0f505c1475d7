"""The battery: false positives and power of every statistic that takes controls, groups, tags or layers, over many kinds of data.

    python -m tests.simulation.battery --draws 400            # all cells; about half an hour on one core
    python -m tests.simulation.battery --only spearman        # statistics whose name holds a word
    python -m tests.simulation.battery --excess               # partial rank correlation by the share that controls leave
    python -m tests.simulation.battery --power                # beside an ordinary joint regression

A cell is a statistic and a kind of data without any effect. Of so many draws, it may reject no more than alpha and three binomial errors, or it refuses
(NaN and a note, or an error of the package). NaN without a note fails.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from basin_lens import stats as S
from basin_lens.errors import BasinLensError
from tests.simulation import data as made
from tests.simulation.data import DISTRIBUTIONS, SHAPES, Data, Maker

ALPHA = 0.05
ERRORS = 3  # binomial errors above alpha from which a cell fails
RESAMPLES = 199
IN_FULL = "in full"  # said where controls explain a column
EXCESS = "excess of its own"  # said where partial rank correlation has one
LAYERS = 4  # of a draw, where a statistic is about many layers

Test = Callable[[pd.DataFrame, list[str]], pd.DataFrame]


@dataclass(frozen=True)
class Statistic:
    """A statistic as it is called.

    Attributes:
        name: in the table.
        make: the kind of tables it takes.
        test: from a table and its control columns to rows with `layer, p, note`.
        shapes: of data (see `SHAPES`).
        by: column that tells several tests of one answer apart.
        layers: of one draw; 1: every layer is a draw of its own, and one call tests all.
        share: of the draws asked for: less than 1 where a call takes long.
        refuses: whether a score within the span of the controls must be refused by name.
        excess: whether an excess of its own is known, and then said in the row.
    """

    name: str
    make: Maker
    test: Test
    shapes: Sequence[str] = tuple(SHAPES)
    by: str | None = None
    layers: int = 1
    share: float = 1.0
    refuses: bool = True
    excess: bool = False


@dataclass(frozen=True)
class Cell:
    """A statistic on one kind of data."""

    statistic: Statistic
    data: Data

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.statistic.name}: {self.data.name}"


@dataclass
class Count:
    """What came out of the draws of a cell."""

    tested: int = 0
    found: int = 0
    refused: int = 0
    silent: int = 0
    warned: int = 0
    why: set[str] = field(default_factory=set)

    def add(self, p: np.ndarray, notes: Sequence[str]) -> None:
        """Count draws."""
        there = np.isfinite(p)
        said = [str(note) for note in notes]
        self.tested += int(there.sum())
        self.found += int((p[there] <= ALPHA).sum())
        self.refused += sum(1 for ok, note in zip(there, said, strict=True) if not ok and note)
        self.silent += sum(1 for ok, note in zip(there, said, strict=True) if not ok and not note)
        self.warned += sum(1 for ok, note in zip(there, said, strict=True) if ok and EXCESS in note)
        self.why |= {note for ok, note in zip(there, said, strict=True) if not ok}


def _no_correction(call: Callable[..., pd.DataFrame], **options: object) -> Test:
    return lambda t, c: call(t, "x", "y", controls=c, correction="none", **options)


def _freed_then(call: Callable[[pd.DataFrame], pd.DataFrame]) -> Test:
    return lambda t, c: call(S.residuals(t, "x", controls=c))


def _family(call: Callable[..., pd.DataFrame]) -> Test:
    """The smallest corrected p of a family of layers."""

    def test(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
        answer = call(t, c)
        joint = answer["p_corrected"] if answer["p"].notna().any() else answer["p"]
        return pd.DataFrame({"p": [joint.min()], "note": ["; ".join(sorted(set(answer["note"]) - {""}))]})

    return test


def _unflagged(**question: object) -> Test:
    """p 0 where a finding is there and no red flag is raised, else 1."""

    def test(t: pd.DataFrame, c: list[str]) -> pd.DataFrame:
        flags = S.red_flags(t, "x", controls=c, n_resamples=RESAMPLES, **question)
        return pd.DataFrame({"p": [float(flags["raised"].fillna(False).any())], "note": [""]})

    return test


_N = {"correction": "none", "n_resamples": RESAMPLES}
_GROUPS = {"group": "group", **_N}
_BARE = ("straight", "same text four times")  # nothing in common: the shape tells copies only
_TAG_TESTS = ("sequence", "mixed", "type")

STATISTICS = (
    Statistic("partial_correlation, pearson", made.of_tokens, _no_correction(S.partial_correlation, method="pearson")),
    Statistic("partial_correlation, spearman", made.of_tokens, _no_correction(S.partial_correlation), excess=True),
    Statistic("rank_regression", made.of_tokens, _no_correction(S.rank_regression), excess=True),
    Statistic("rank_regression, between texts", made.of_units, _no_correction(S.rank_regression, within=False), share=0.5, excess=True),
    Statistic("mixed_model", made.of_tokens, _no_correction(S.mixed_model)),
    Statistic(
        "residuals, then spearman", made.of_tokens,
        _freed_then(lambda t: S.within_sequence_correlation(t, "x", "y", correction="none")), refuses=False,
    ),
    Statistic(
        "residuals, then quartile_table", made.of_tokens,
        _freed_then(lambda t: S.quartile_table(t, "x", "y", correction="none").query("quartile == '4 - 1'")), refuses=False,
    ),
    Statistic("compare_groups, paired", made.grouped_tokens, lambda t, c: S.compare_groups(t, "x", paired=True, controls=c, **_GROUPS)),
    Statistic("compare_groups, unpaired", made.of_units, lambda t, c: S.compare_groups(t, "x", controls=c, **_GROUPS)),
    Statistic(
        "tag_effect", made.grouped_tokens, lambda t, c: S.tag_effect(t, "x", "tag", controls=c, **_N), by="test", share=0.25,
    ),
    Statistic(
        "tag_effect, types with scores of their own", made.of_types, lambda t, c: S.tag_effect(t, "x", "tag", controls=c, **_N),
        ("straight", "constant control"), by="test", share=0.5,
    ),
    Statistic("tag_means", made.grouped_tokens, lambda t, c: S.tag_means(t, "x", "tag", controls=c, correction="none"), by="tag", share=0.5),
    Statistic(
        "added_value", made.of_units, lambda t, c: S.added_value(t, "x", "group", c, n_splits=3, **_N | {"n_resamples": 99}), by="metric",
        share=0.25,
    ),
    Statistic(
        "partial_correlation, max-t over layers", made.of_tokens,
        _family(lambda t, c: S.partial_correlation(t, "x", "y", controls=c, correction="max-t", n_resamples=RESAMPLES)),
        layers=LAYERS, share=0.25, excess=True,
    ),
    Statistic(
        "compare_groups, paired, max-t over layers", made.grouped_tokens,
        _family(lambda t, c: S.compare_groups(t, "x", "group", paired=True, controls=c, correction="max-t", n_resamples=RESAMPLES)),
        layers=LAYERS, share=0.25,
    ),
    Statistic(
        "best_layer of partial_correlation, pearson", made.of_tokens,
        lambda t, c: S.best_layer(t, lambda part: S.partial_correlation(part, "x", "y", controls=c, method="pearson"), correction="none"),
        layers=LAYERS, share=0.25, refuses=False,
    ),
    Statistic("red_flags against", made.of_tokens, _unflagged(against="y"), layers=LAYERS, share=0.25, refuses=False),
    Statistic("red_flags of groups, paired", made.grouped_tokens, _unflagged(group="group", paired=True), layers=LAYERS, share=0.125, refuses=False),
    Statistic("red_flags of groups, unpaired", made.of_units, _unflagged(group="group"), layers=LAYERS, share=0.125, refuses=False),
    Statistic(
        "red_flags of tags, types with scores of their own", made.of_types, _unflagged(tag="tag"), ("straight", "constant control"),
        layers=1, share=0.25, refuses=False,
    ),
    # Without controls: nothing in common.
    Statistic("within_sequence_correlation, spearman", made.bare_tokens, lambda t, c: S.within_sequence_correlation(t, "x", "y", correction="none"), _BARE),
    Statistic(
        "within_sequence_correlation, pearson", made.bare_tokens,
        lambda t, c: S.within_sequence_correlation(t, "x", "y", method="pearson", correction="none"), _BARE,
    ),
    Statistic("quartile_table", made.bare_tokens, lambda t, c: S.quartile_table(t, "x", "y", correction="none").query("quartile == '4 - 1'"), _BARE),
    Statistic("compare_groups, paired, no controls", made.bare_tokens, lambda t, c: S.compare_groups(t, "x", paired=True, **_GROUPS), _BARE),
    Statistic("compare_groups, unpaired, no controls", made.bare_units, lambda t, c: S.compare_groups(t, "x", **_GROUPS), _BARE),
    Statistic("tag_effect, no controls", made.bare_tokens, lambda t, c: S.tag_effect(t, "x", "tag", **_N), _BARE, by="test", share=0.25),
    Statistic("tag_means, no controls", made.bare_tokens, lambda t, c: S.tag_means(t, "x", "tag", correction="none"), _BARE, by="tag", share=0.5),
    Statistic("before_after", made.bare_tokens, lambda t, c: S.before_after(t, **_N), _BARE),
    Statistic("before_after, max-t over layers", made.bare_tokens, _family(lambda t, c: S.before_after(t, correction="max-t", n_resamples=RESAMPLES)), _BARE, layers=LAYERS),
    Statistic(
        "compare_groups, unpaired, max-t over layers", made.bare_units,
        _family(lambda t, c: S.compare_groups(t.assign(group=t["doc"] % 24 < 12), "x", "group", correction="max-t", n_resamples=RESAMPLES)),
        ("straight",), layers=LAYERS,
    ),
    Statistic("best_layer of before_after", made.bare_tokens, lambda t, c: S.best_layer(t, lambda part: S.before_after(part, n_resamples=RESAMPLES), correction="none"), _BARE, layers=LAYERS, share=0.5),
    Statistic("unit_slope", made.bare_units, lambda t, c: S.unit_slope(t, "x", "y", **_N), _BARE),
    Statistic("detect", made.bare_units, lambda t, c: S.detect(t, "x", "group", rates=(), **_N), _BARE),
    Statistic(
        "detect, better than another", made.bare_units,
        lambda t, c: S.detect(t, "x", "group", versus="z", rates=(), **_N).query("versus == 'z'"), _BARE,
    ),
    Statistic("red_flags of a change", made.bare_tokens, lambda t, c: _unflagged()(t.drop(columns=["x"]).rename(columns={"difference": "x"}), []), _BARE, layers=LAYERS, share=0.25),
)  # fmt: skip


def cells(statistics: Sequence[Statistic] = STATISTICS) -> Iterator[Cell]:
    """Every cell."""
    for statistic in statistics:
        for shape in statistic.shapes:
            for distribution in DISTRIBUTIONS:
                for levels in (False, True):
                    yield Cell(statistic, Data(distribution, levels, shape))


# The cells that mattered: each was wrong in an earlier version.
NAMED = (
    ("partial_correlation, pearson", Data("lognormal", False, "straight")),
    ("partial_correlation, spearman", Data("normal", True, "straight")),
    ("rank_regression", Data("normal", False, "copy")),
    ("rank_regression", Data("lognormal", False, "monotone copy")),
    ("mixed_model", Data("normal", False, "copy")),
    ("within_sequence_correlation, spearman", Data("normal", False, "same text four times")),
    ("tag_effect, types with scores of their own", Data("normal", True, "constant control")),
    ("red_flags of tags, types with scores of their own", Data("normal", True, "constant control")),
    ("before_after, max-t over layers", Data("lognormal", False, "straight")),
)


def named(cell: Cell) -> bool:
    """Whether the cell is one of those that mattered."""
    return (cell.statistic.name, cell.data) in NAMED


def rotated(cell: Cell) -> bool:
    """A sixth of the cells, every statistic with every shape: distribution and levels change from one to the next."""
    turn = STATISTICS.index(cell.statistic) + list(SHAPES).index(cell.data.shape)
    return (cell.data.distribution, cell.data.levels) == (DISTRIBUTIONS[turn % 3], turn // 3 % 2 == 1)


def seed_of(cell: Cell) -> int:
    """Of its data: different in every cell, the same in every run."""
    return int.from_bytes(cell.name.encode(), "little") % (2**32 - 5)


def run(cell: Cell, draws: int) -> dict[str, Count]:
    """The draws of a cell, by test where the statistic has several."""
    statistic, counts = cell.statistic, {}
    draws = max(20, round(draws * statistic.share))
    table = statistic.make(cell.data, draws * statistic.layers, seed_of(cell))
    controls = made.controls_of(cell.data)
    parts = [table]
    if statistic.layers > 1 or statistic.name.startswith("red_flags"):
        parts = [
            part.assign(layer=part["layer"] % statistic.layers) for _, part in table.groupby(table["layer"] // statistic.layers)
        ]
    for part in parts:
        try:
            answer = statistic.test(part, controls)
        except BasinLensError as error:
            count = counts.setdefault("", Count())
            count.refused += draws if len(parts) == 1 else 1
            count.why.add(str(error))
            continue
        for key, rows in answer.groupby(statistic.by) if statistic.by else [("", answer)]:
            counts.setdefault(str(key), Count()).add(
                rows["p"].to_numpy(float), rows["note"].tolist() if "note" in rows else [""] * len(rows)
            )
    return counts


def verdict(cell: Cell, count: Count) -> str:
    """`ok`, `refused`, `said` (an excess of its own, with a note in the rows), or what is wrong."""
    if count.silent:
        return "FAILS: NaN without a note"
    wanted = SHAPES[cell.data.shape]
    if wanted == "refused" and cell.statistic.refuses and not (count.tested == 0 and all(IN_FULL in why for why in count.why)):
        return "FAILS: not refused"
    if not count.tested:
        return "refused"
    if count.found / count.tested <= limit(count.tested):
        return "ok"
    if cell.statistic.excess and count.warned == count.tested:
        return "said"
    return "FAILS: too many"


def limit(draws: int) -> float:
    """Highest share of false positives that a cell of so many draws may show."""
    return ALPHA + ERRORS * float(np.sqrt(ALPHA * (1 - ALPHA) / draws))


def battery(
    statistics: Sequence[Statistic] = STATISTICS, draws: int = 400, keep: Callable[[Cell], bool] = lambda _: True
) -> pd.DataFrame:
    """The table: a row for each cell and test."""
    lines = []
    for cell in filter(keep, cells(statistics)):
        start = time.process_time()
        for test, count in run(cell, draws).items():
            rate = count.found / count.tested if count.tested else np.nan
            lines.append({
                "statistic": cell.statistic.name + (f", {test}" if test else ""), "data": cell.data.name, "rate": rate,
                "error": float(np.sqrt(rate * (1 - rate) / count.tested)) if count.tested else np.nan,
                "limit": limit(count.tested) if count.tested else np.nan, "tested": count.tested, "refused": count.refused,
                "verdict": verdict(cell, count), "seconds": time.process_time() - start, "why": "; ".join(sorted(count.why))[:90],
            })  # fmt: skip
    return pd.DataFrame(lines)


def written(table: pd.DataFrame) -> str:
    """The table as text, with a count of verdicts."""
    shown = table.copy()
    for name in ("rate", "error", "limit"):
        shown[name] = shown[name].map(lambda v: "" if np.isnan(v) else f"{v:.3f}")
    shown["seconds"] = shown["seconds"].map("{:.1f}".format)
    counts = shown["verdict"].value_counts()
    return shown.to_string(index=False, justify="left") + "\n\n" + "\n".join(f"{n:5d} {what}" for what, n in counts.items()) + "\n"


def main() -> None:
    """Run cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--only", default="", help="statistics whose name holds this")
    parser.add_argument("--data", default="", help="data whose name holds this")
    parser.add_argument("--named", action="store_true", help="the cells that mattered alone")
    parser.add_argument("--rotated", action="store_true", help="a sixth of the cells, every statistic with every shape")
    parser.add_argument("--out", type=Path, help="write the table here too")
    given = parser.parse_args()
    statistics = [one for one in STATISTICS if given.only in one.name]

    def keep(cell: Cell) -> bool:
        return given.data in cell.data.name and (not given.named or named(cell)) and (not given.rotated or rotated(cell))

    text = written(battery(statistics, given.draws, keep))
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
