"""The battery: false positives and power of every statistic that takes controls, groups, tags or layers, over many kinds of data.

    python -m tests.simulation.battery --draws 400            # all cells; about half an hour on one core
    python -m tests.simulation.battery --only spearman        # statistics whose name holds a word
    python -m tests.simulation.battery --excess               # partial rank correlation by the share that controls leave
    python -m tests.simulation.battery --power                # beside an ordinary joint regression

A cell is a statistic and a kind of data without any effect. Of so many draws, it may reject no more than alpha and three binomial errors, or it
refuses (NaN and a note, or an error of the package). NaN without a note fails.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from basin_lens.errors import BasinLensError
from tests.simulation import data as made
from tests.simulation.data import DISTRIBUTIONS, SHAPES, Data
from tests.simulation.statistics import STATISTICS, Statistic

ALPHA = 0.05
ERRORS = 3  # binomial errors above alpha from which a cell fails
IN_FULL = "in full"  # said where controls explain a column


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

    def add(self, p: np.ndarray, notes: Sequence[str], says: Sequence[str] = ()) -> None:
        """Count draws; `warned`: those tested whose note holds what must be said."""
        there = np.isfinite(p)
        said = [str(note) for note in notes]
        self.tested += int(there.sum())
        self.found += int((p[there] <= ALPHA).sum())
        self.refused += sum(1 for ok, note in zip(there, said, strict=True) if not ok and note)
        self.silent += sum(1 for ok, note in zip(there, said, strict=True) if not ok and not note)
        self.warned += sum(1 for ok, note in zip(there, said, strict=True) if ok and any(words in note for words in says))
        self.why |= {note for ok, note in zip(there, said, strict=True) if not ok}


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
    if statistic.layers > 1:
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
            counts.setdefault(str(key), Count()).add(rows["p"].to_numpy(float), rows["note"].tolist(), statistic.says)
    return counts


def verdict(cell: Cell, count: Count) -> str:
    """`ok`, `refused`, `said` (more than alpha, no more than `Statistic.most`, and every row says why: `Statistic.says`), or what is wrong."""
    if count.silent:
        return "FAILS: NaN without a note"
    wanted = SHAPES[cell.data.shape]
    if wanted == "refused" and cell.statistic.refuses and not (count.tested == 0 and all(IN_FULL in why for why in count.why)):
        return "FAILS: not refused"
    if not count.tested:
        return "refused"
    if count.found / count.tested <= limit(count.tested):
        return "ok"
    if cell.statistic.says and count.warned == count.tested:
        return "said" if count.found / count.tested <= limit(count.tested, cell.statistic.most) else "FAILS: more than is said"
    return "FAILS: too many"


def limit(draws: int, rate: float = ALPHA) -> float:
    """Highest share of false positives that a cell of so many draws may show, whose true one is this rate."""
    return rate + ERRORS * float(np.sqrt(rate * (1 - rate) / draws))


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
