"""What a study gives back, and how it is kept: tables, figures, one report."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from basin_lens import stats, tables
from basin_lens.errors import StoreError, StudyError, TableError
from basin_lens.files import new_folder
from basin_lens.studies.framework.measurement import FEWEST_DOCUMENTS, Measured
from basin_lens.studies.framework.storage import KIND, records, refuse_folder
from basin_lens.views import Report, Section, study_page
from basin_lens.views.marks import unit_of

Decision = Literal["yes", "yes, with red flags", "in part", "in part, with red flags", "no", "undecided"]
ALPHA = 0.05
# With fewer units, half of them could not reach 0.05 in a family of four tests: sign flips of 8 units give 2 / 2^8 at the least.
FEWEST_TO_SPLIT = FEWEST_DOCUMENTS
# Belongs to every hypothesis that is tested by `declared`.
IF_FEW = (
    f"With fewer than {FEWEST_TO_SPLIT} units, or too few of those that a test can use, none are set aside to choose the layer: every layer is "
    "tested, and the smallest p is corrected for all of them (Holm)."
)
# Effects in the unit of the score; correlations, areas and standardized slopes are pure numbers.
IN_UNITS = ("mean", "mean difference")
LAYER_FREE = ("surprisal", "agreement", "surprisal_change", "agreement_change")
# Columns of one finding, as the summary shows them.
FINDING = (
    "study", "finding", "question", "layer", "score", "unit", "n_units", "n_sequences", "n_documents", "n_tokens", "test", "effect",
        "effect_unit", "estimate", "low", "high", "null", "p", "p_corrected", "correction", "n_tests", "holds", "p_floor", "within_reach",
        "guide_test", "guide_statistic", "guide_r", "guide_p", "guide_reading", "note",
)  # fmt: skip


@runtime_checkable
class Units(Protocol):
    """What a declared test asks of what was measured: a `Measured`, or a design of its own."""

    @property
    def n_units(self) -> int: ...
    @property
    def unit(self) -> str: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Study:
    """A finished study: what was asked, what came out, and everything behind it.

    `decision`: the verdict on the declared hypothesis as one word. `findings`: the declared tests, a row each, with the original guide's test
    beside the sound one. `tables`: results by name. `tokens`: the table measured, or None. `figures`: by file name. `sections`: the report's.
    """

    name: str
    title: str
    about: tuple[str, ...]
    hypothesis: str
    decision: Decision
    verdict: tuple[str, ...]
    findings: pd.DataFrame
    flags: pd.DataFrame | None
    not_tested: tuple[str, ...]
    sections: tuple[Section, ...]
    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, Figure]
    provenance: Mapping[str, Any]
    tokens: pd.DataFrame | None = field(default=None, repr=False)

    def report(self) -> Report:
        """The study as one offline page."""
        return study_page(
            self.title, subtitle=f"basin_lens study: {self.name}", about=self.about, sections=self.sections, hypothesis=self.hypothesis,
            verdict=self.verdict, flags=self.flags, not_tested=self.not_tested, provenance=self.provenance,
        )  # fmt: skip

    def save(self, out: str | os.PathLike[str]) -> Path:
        """Write the study's folder: `report.html`, `results.json`, `tables/*.parquet` and `.csv`, `figures/*.png` and `.pdf`.

        All of it or nothing: a folder of an earlier run of the same study is replaced once the new one is complete.

        Args:
            out: the folder; made if it is not there, refused if it holds anything but an earlier run of this study.

        Raises:
            StoreError: the folder holds something else, or cannot be written.
        """
        target = Path(out).resolve()
        refuse_folder(target, self.name)
        try:
            with new_folder(target, replace=True, check=lambda place: refuse_folder(place, self.name)) as folder:
                self._write(folder)
        except OSError as error:
            raise StoreError(
                f"expected a place that can be written, got {str(target)!r}: {error}. Choose another folder."
            ) from error
        return target

    def _write(self, folder: Path) -> None:
        (folder / "tables").mkdir()
        (folder / "figures").mkdir()
        for name, table in {**self.tables, "findings": self.findings}.items():
            tables.save(table, folder / "tables" / f"{name}.parquet", by_run=self.provenance)
            tables.save_csv(table, folder / "tables" / f"{name}.csv")
        if self.tokens is not None:  # a row per token and layer: too long to be of use as CSV
            tables.save(self.tokens, folder / "tables" / "tokens.parquet")
        for name, figure in self.figures.items():
            figure.savefig(folder / "figures" / f"{name}.png", dpi=200)
            figure.savefig(folder / "figures" / f"{name}.pdf")
        (folder / "results.json").write_bytes(KIND.record(self.as_json(), {}, indent=1, allow_nan=False))
        self.report().save(folder / "report.html")

    def as_json(self) -> dict[str, Any]:
        """What was declared and what came out, as plain JSON (NaN is null)."""
        return {
            "study": self.name, "title": self.title, "about": list(self.about), "hypothesis": self.hypothesis, "decision": self.decision,
            "verdict": list(self.verdict), "findings": records(self.findings),
            "red_flags": None if self.flags is None else records(self.flags), "not_tested": list(self.not_tested),
            "tables": sorted([*self.tables, "findings"]), "figures": sorted(self.figures), "provenance": dict(self.provenance),
        }  # fmt: skip


def about(measured: Measured) -> list[str]:
    """What was measured on what, in sentences."""
    capture, chosen = measured.capture, measured.settings
    model = capture.model
    layers = measured.layers
    which = f"all {len(layers)}" if len(layers) == model["layers"] else f"{', '.join(map(str, layers))} of {model['layers']}"
    passed = f"{chosen['sequences_too_short']} sequences were too short" if chosen["sequences_too_short"] else ""
    left = chosen["sequences_given"] - chosen["sequences_too_short"] - len(capture.sequences)
    rest = ", ".join(x for x in (passed, f"{left} were left unread" if left else "") if x)
    sentences = [
        f"{model['name']}: {model['layers']} layers, width {model['width']}, {model['dtype']}, {model['kind']}.",
        f"{capture.n_rows:,} tokens in {len(capture.sequences)} sequences of {len(set(capture.docs))} documents"
        + (f"; {rest}." if rest else "."),
        f"Layers {which}. Neighbors: k = {chosen['k']}, context {chosen['context']}, from {chosen['bank']}, never of "
        f"the same {chosen['exclude']}.",
        f"Tests and intervals are over {measured.n_units} units ({measured.unit}); tokens of one text are not independent.",
    ]
    if measured.contrast is not None:
        sentences.append(f"Contrast: {measured.contrast.title}.")
    return sentences


def provenance(measured: Measured) -> dict[str, Any]:
    """Of the tokens' run, with the study's own settings in it."""
    return {run: {**facts, "study": measured.settings} for run, facts in tables.provenance(measured.table).items()}


Steps = Callable[[str], None]


@contextmanager
def steps(name: str, count: int, progress: bool) -> Iterator[Steps]:
    """Progress over the named steps of a study: to be called as each begins."""
    with tqdm(total=count, desc=name, unit="step", disable=not progress) as bar:

        def step(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        yield step


def unit_keys(unit: str) -> list[str]:
    """Columns that tell units apart."""
    return {"document": ["doc"], "sequence": ["doc", "seq"]}.get(unit, [unit])


def n_units(table: pd.DataFrame, measured: Measured) -> int:
    """How many units the table's rows belong to, copies of a text counted once."""
    return stats.design.distinct_units(table, measured.unit)


def one_sided(test: Callable[[pd.DataFrame], pd.DataFrame], *, more: bool = True) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """The same test of "more than null" alone, or of "less"."""

    def tested(part: pd.DataFrame) -> pd.DataFrame:
        found = test(part)
        found["p"] = np.where((found["estimate"] > found["null"]) == more, found["p"] / 2, 1 - found["p"] / 2)
        found["test"] = found["test"] + ", one-sided"
        return stats.correct(found, "bh")

    return tested


def declared(
    table: pd.DataFrame,
    test: Callable[[pd.DataFrame], pd.DataFrame],
    measured: Units,
    finding: str,
    question: str,
    score: str = "compression",
    *,
    stratify: str | None = None,
) -> pd.DataFrame:
    """A declared test as one row: the layer is chosen on half of the units and tested on the others.

    Too few units to halve them: every layer is tested, and the one with the smallest p is shown with p corrected for all of them (Holm).
    The note says which of both was done, and why. Layer 0 is no choice where there are others: a state that enters it is its token alone, so
    what is found there is of token types.
    `p_floor`: the smallest p that any data of so many units could give; 0 where there is no such bound. `effect_unit`: of the estimate,
    from the table's provenance, if it is in the score's unit; empty if it is a pure number or the unit is not known.
    """
    table = inner(table)
    found, why = None, f"too few units to halve ({measured.n_units})"
    if measured.n_units >= FEWEST_TO_SPLIT:
        # Enough units in all, but perhaps not of those that the test can use.
        try:
            found = stats.best_layer(table, test, unit=measured.unit, stratify=stratify, correction="none", seed=measured.seed)[:1]
        except (StudyError, TableError) as error:  # too few units, or a half without one of the groups
            why = f"{measured.n_units} units not halved, for a half would be too few for the test ({str(error).rstrip('.')})"
        else:
            why = f"{measured.n_units} units not halved, for the layer that one half chose could not be tested on the other"
    if found is not None and len(found):
        (row,) = rows(found)
        said = (
            f"layer chosen on {int(row.chosen_documents)} documents (there {row.chosen_estimate:+.3f}, p "
            f"{row.chosen_p:.2g}), tested on {int(row.n_documents)} others"
        )
        floor = p_floor(row)
    else:
        every = stats.correct(attempt(lambda part, *_, **__: test(part), table, score, unit=measured.unit), "holm")
        found = every.sort_values("p")[:1].copy()
        found["p"] = found["p_corrected"]
        said = f"{why}: the best of {len(every)} tests, p corrected for them (Holm)"
        (row,) = rows(found)
        floor = min(1.0, p_floor(row) * len(every))
    note = "" if pd.isna(row.note) else str(row.note)
    unit = getattr(row, "effect_unit", None)
    if not isinstance(unit, str):
        unit = unit_of(table, score) if getattr(row, "effect", "") in IN_UNITS else ""
    return found.reset_index(drop=True).assign(
        finding=finding,
        question=question,
        score=score,
        p_floor=floor,
        effect_unit=unit,
        note="; ".join(x for x in (said, note) if x),
    )


def inner(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of layers above 0, if there are any."""
    if "layer" not in table.columns or not (table["layer"] > 0).any():
        return table
    return tables.select(table, table["layer"] > 0)


def p_floor(row: Any) -> float:
    """The smallest p of a permutation of so many units; 0 for tests without such a bound."""
    sides = 1 if "one-sided" in row.test else 2
    if "sign-flip" in row.test and row.n_units:
        return sides / 2.0 ** int(row.n_units)
    first, second = (getattr(row, name, float("nan")) for name in ("n_first", "n_second"))
    if "permutation of labels" in row.test and first > 0 and second > 0:
        return min(1.0, sides / math.comb(int(first) + int(second), int(first)))
    return 0.0


def attempt(
    test: Callable[..., pd.DataFrame], table: pd.DataFrame, score: str | list[str], *args: Any, **options: Any
) -> pd.DataFrame:
    """`test(table, score, ...)`; where these texts are too few for it, or a column does not vary, rows without numbers that say so."""
    try:
        return test(table, score, *args, **options)
    except (StudyError, TableError) as error:
        names = [score] if isinstance(score, str) else score
        layers: list[Any] = sorted(table["layer"].unique().tolist()) if "layer" in table.columns else [pd.NA]
        empty = [empty_finding(name, str(options.get("unit", ""))).to_dict("records")[0] for name in names]
        blank = pd.DataFrame([{**line, "layer": layer} for line in empty for layer in layers])
        return blank.astype({"layer": "Int64"}).assign(note=f"not tested: {error}")


def attempt_each(
    test: Callable[..., pd.DataFrame], table: pd.DataFrame, scores: Sequence[str], *args: Any, **options: Any
) -> pd.DataFrame:
    """`attempt` score by score, uncorrected: one that cannot be tested does not take the others with it."""
    parts = []
    for score in scores:
        # What is the same at every layer is one test, not one for each.
        free = "layer" in table and score in LAYER_FREE
        part = table[table["layer"] == table["layer"].iloc[0]] if free else table
        found = attempt(test, part, score, *args, correction="none", **options)
        parts.append(found.assign(layer=pd.Series(pd.NA, found.index, "Int64")) if free else found)
    return pd.concat(parts, ignore_index=True)


def settle(study: str, tests: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Declared tests as one family (Holm), in the columns of `FINDING`; `holds`: corrected p at most 0.05. `within_reach`: see there."""
    family = pd.DataFrame([row for test in tests for row in test.to_dict("records")])
    for name in (*_NUMBERS, "p_floor"):
        family[name] = family[name].astype(float) if name in family else float("nan")
    family["layer"] = family["layer"].astype("Int64")
    family = stats.correct(family, "holm")
    family["study"], family["holds"] = study, family["p_corrected"] <= ALPHA
    family["within_reach"] = within_reach(family)
    for name in FINDING:
        if name not in family:
            family[name] = pd.Series([None] * len(family), dtype=object)
    return family[list(FINDING)]


def within_reach(family: pd.DataFrame) -> "pd.Series[bool]":
    """Whether some data of a test's units would have had a corrected p (Holm) of at most 0.05, the other tests as they are.

    What is out of reach is no evidence of absence. `p_floor`: the smallest p of each test; NaN: no bound.
    """
    p, floor = family["p"].to_numpy(float), family["p_floor"].fillna(0.0).to_numpy(float)
    reached = np.isfinite(p)
    for at in np.flatnonzero(reached):
        others = np.delete(p, at)
        first = np.append(np.sort(others[others <= floor[at]]), floor[at])
        reached[at] = (first * (reached.size - np.isnan(p).sum() - np.arange(len(first)))).max() <= ALPHA
    return pd.Series(reached, index=family.index)


_GUIDE = ("guide_test", "guide_statistic", "guide_r", "guide_p", "guide_reading")
_NUMBERS = ("estimate", "low", "high", "null", "p", "p_corrected")


def beside_guide(findings: pd.DataFrame, guide: pd.DataFrame) -> pd.DataFrame:
    """The findings with the original guide's test of the same question, score and layer, where there is one."""
    answer = findings.copy()
    for at, row in findings.iterrows():
        mine = guide[(guide["score"] == row["score"]) & (guide["layer"] == row["layer"]) & (guide["question"] == row["question"])]
        for name in _GUIDE:
            answer.loc[at, name] = mine[name].iloc[0] if len(mine) else None
    return answer


def empty_finding(score: str, unit: str) -> pd.DataFrame:
    """A test that could not be made, as a row; its note is to say why."""
    blank = dict.fromkeys(("estimate", "low", "high", "p", "p_corrected", "hedges_g"), float("nan"))
    counts = dict.fromkeys(("n_units", "n_sequences", "n_documents", "n_tokens"), 0)
    row = {"layer": pd.NA, "score": score, "unit": unit} | counts | {"test": "", "effect": "not tested"} | blank
    return pd.DataFrame([row | {"null": 0.0, "note": ""}]).astype({"layer": "Int64"})


def decide(findings: pd.DataFrame, flags: pd.DataFrame | None) -> Decision:
    """The verdict on a hypothesis that says: these hold. Red flags do not turn a yes into a no, but stay beside it.

    Only flags of questions that hold count. "no" needs tests that could have said yes; where none could, it is "undecided".
    """
    if not findings["holds"].any():
        return "no" if findings["within_reach"].any() else "undecided"
    raised = False
    if flags is not None:
        up = flags["raised"].fillna(False).astype(bool)
        if "question" in flags:
            up &= flags["question"].isin([*findings[findings["holds"]]["question"], "every"])
        raised = bool(up.any())
    if findings["holds"].all():
        return "yes, with red flags" if raised else "yes"
    return "in part, with red flags" if raised else "in part"


def opening(decision: Decision, yes: str, no: str) -> str:
    """The first sentence of a verdict."""
    if decision == "undecided":
        return "Undecided: with these texts no data could have passed the declared tests. More documents are needed."
    if decision == "no":
        return f"No. {no}"
    said = f"Yes. {yes}" if decision.startswith("yes") else "In part: some of the declared tests hold, others do not."
    return said + (" But red flags are raised (below): do not cite this as it stands." if decision.endswith("flags") else "")


def sentence(row: Any, unit: str = "") -> str:
    """One finding in words, with its figures and its note. `unit`: of the estimate; if not given, what the column `effect_unit` says."""
    told = unit or getattr(row, "effect_unit", None)
    measure = f" {told}" if isinstance(told, str) and told else ""
    layer = "" if pd.isna(row.layer) else f" at layer {int(row.layer)}"
    if pd.isna(row.p):
        return f"{row.finding}: could not be tested ({row.note})."
    p = f"corrected p {in_words(row.p_corrected)}"
    interval = "" if pd.isna(row.low) else f" (95 % interval {row.low:+.3f} to {row.high:+.3f})"
    out = "undecided, too few units for any p to reach 0.05" if row.p_floor * row.n_tests > ALPHA else "undecided"
    holds = "holds" if row.holds else "does not hold" if row.within_reach else out
    # A study may ask for more than significance; then the note begins with what is lacking.
    denied = bool(row.p_corrected <= ALPHA and not row.holds)
    note = as_sentence(row.note, "Significant, but " if denied else "")
    return (
        f"{row.finding}: {holds}. {row.effect} {row.estimate:+.3f}{measure}{interval}{layer}, {p}, {int(row.n_units)} "
        f"units, {int(row.n_documents)} documents.{note and ' '}{note}"
    )


def as_sentence(note: Any, opening: str = "") -> str:
    """A note as a sentence of its own; nothing if there is none."""
    if not isinstance(note, str) or not note:
        return ""
    said = f"{opening}{note.rstrip('.')}."
    return said[0].upper() + said[1:]


def in_words(p: float) -> str:
    """A p-value as a reader wants it."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def red_flags(table: pd.DataFrame, score: str, *args: Any, **options: Any) -> pd.DataFrame:
    """`stats.red_flags` at the layers that a declared test may choose; where they cannot be computed, one row that says why."""
    try:
        return stats.red_flags(inner(table), score, *args, **options)
    except (StudyError, TableError) as error:
        line = {"flag": "could not be checked", "score": score, "layer": pd.NA, "raised": pd.NA, "why": f"not checked: {error}"}
        return pd.DataFrame([line]).astype({"layer": "Int64", "raised": "boolean"})


def guide(table: pd.DataFrame, scores: list[str], *args: Any, **options: Any) -> pd.DataFrame:
    """`stats.guide_tests`; no rows where the question cannot be asked of this table."""
    try:
        return stats.guide_tests(table, scores, *args, **options)
    except TableError:
        return pd.DataFrame(columns=["layer", "score", "question", *_GUIDE])


def rows(table: pd.DataFrame) -> list[Any]:
    """The rows as named tuples."""
    return list(table.itertuples())
