"""What a study gives back, and how it is kept: tables, figures, one report."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from basin_lens import stats, tables
from basin_lens.errors import StoreError, StudyError, TableError
from basin_lens.studies.measured import Measured
from basin_lens.views import Report, Section, study_page

Decision = Literal["yes", "yes, with red flags", "in part", "in part, with red flags", "no", "undecided"]
ALPHA = 0.05
# Fewer documents than this cannot be halved into one half that chooses a layer and another that reports it.
FEWEST_TO_SPLIT = 12
# Columns of one finding, as the summary shows them.
FINDING = (
    "study", "finding", "question", "layer", "score", "unit", "n_units", "n_sequences", "n_documents", "n_tokens", "test", "effect",
        "estimate",
    "low", "high", "null", "p", "p_corrected", "correction", "n_tests", "holds", "guide_test", "guide_statistic", "guide_r",
        "guide_p",
    "guide_reading", "note",
)  # fmt: skip


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
        target = Path(out)
        refuse_folder(target, self.name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
                folder = Path(scratch) / "study"
                self._write(folder)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(folder, target)
        except OSError as error:
            raise StoreError(
                f"expected a place that can be written, got {str(target)!r}: {error}. Choose another folder."
            ) from error
        return target

    def _write(self, folder: Path) -> None:
        (folder / "tables").mkdir(parents=True)
        (folder / "figures").mkdir()
        for name, table in {**self.tables, "findings": self.findings}.items():
            whole = table.copy()
            whole.attrs["provenance"] = dict(self.provenance)
            tables.save(whole, folder / "tables" / f"{name}.parquet")
            tables.save_csv(whole, folder / "tables" / f"{name}.csv")
        if self.tokens is not None:  # a row per token and layer: too long to be of use as CSV
            tables.save(self.tokens, folder / "tables" / "tokens.parquet")
        for name, figure in self.figures.items():
            figure.savefig(folder / "figures" / f"{name}.png", dpi=200)
            figure.savefig(folder / "figures" / f"{name}.pdf")
        (folder / "results.json").write_text(json.dumps(self.as_json(), indent=1, allow_nan=False), encoding="utf-8")
        self.report().save(folder / "report.html")

    def as_json(self) -> dict[str, Any]:
        """What was declared and what came out, as plain JSON (NaN is null)."""
        return {
            "study": self.name, "title": self.title, "about": list(self.about), "hypothesis": self.hypothesis, "decision": self.decision,
            "verdict": list(self.verdict), "findings": records(self.findings),
            "red_flags": None if self.flags is None else records(self.flags), "not_tested": list(self.not_tested),
            "tables": sorted([*self.tables, "findings"]), "figures": sorted(self.figures), "provenance": dict(self.provenance),
        }  # fmt: skip


def refuse_folder(target: Path, name: str) -> None:
    """Refuse a folder that holds anything but an earlier run of this study. To be called before any long work, too.

    Raises:
        StoreError: see there.
    """
    if not target.exists():
        return
    try:
        held = [path.name for path in target.iterdir()]
        known = json.loads((target / "results.json").read_text(encoding="utf-8"))["study"] if "results.json" in held else None
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"expected a folder for the study, got {str(target)!r}: {error}. Choose another.") from error
    if held and known != name:
        raise StoreError(
            f"expected an empty folder or an earlier {name} study, got {str(target)!r} with {sorted(held)[0]!r} in it."
        )


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain JSON, every digit kept; what is missing is null."""
    return [{str(name): _plain(value) for name, value in row.items()} for row in table.astype(object).to_dict("records")]


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float | np.floating) and not np.isfinite(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value


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
        f"Layers {which}. Neighbors: k = {chosen['k']}, context {chosen['context']}, from {chosen['bank']}, never of the same "
        f"{chosen['exclude']}.",
        f"Tests and intervals are over {measured.n_units} units ({measured.unit}); tokens of one text are not independent.",
    ]
    if measured.contrast is not None:
        sentences.append(f"Contrast: {measured.contrast.title}.")
    return sentences


def provenance(measured: Measured) -> dict[str, Any]:
    """Of the tokens' run, with the study's own settings in it."""
    return {run: {**facts, "study": measured.settings} for run, facts in tables.provenance(measured.table).items()}


class Steps:
    """Progress over the named steps of a study."""

    def __init__(self, name: str, count: int, progress: bool) -> None:
        self.bar = tqdm(total=count, desc=name, unit="step", disable=not progress)

    def __call__(self, what: str) -> None:
        self.bar.set_postfix_str(what)
        self.bar.update()


@contextmanager
def steps(name: str, count: int, progress: bool) -> Iterator[Steps]:
    """Steps to be called as they begin."""
    made = Steps(name, count, progress)
    try:
        yield made
    finally:
        made.bar.close()


def unit_keys(unit: str) -> list[str]:
    """Columns that tell units apart."""
    return {"document": ["doc"], "sequence": ["doc", "seq"]}.get(unit, [unit])


def n_units(table: pd.DataFrame, measured: Measured) -> int:
    """How many units the table's rows belong to."""
    return int(table.groupby(unit_keys(measured.unit)).ngroups)


def one_sided(test: Callable[[pd.DataFrame], pd.DataFrame], *, more: bool = True) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """The same test of "more than null" alone, or of "less"."""

    def tested(part: pd.DataFrame) -> pd.DataFrame:
        found = test(part)
        found["p"] = np.where((found["estimate"] > found["null"]) == more, found["p"] / 2, 1 - found["p"] / 2)
        found["test"] = found["test"] + ", one-sided"
        return stats.correct(found, "bh")

    return tested


def declared(
    table: pd.DataFrame, test: Callable[[pd.DataFrame], pd.DataFrame], measured: Measured, finding: str, question: str
) -> pd.DataFrame:
    """A declared test, one row per score: the layer is chosen on half of the units and tested on the others.

    Too few units to halve them: every layer is tested, and the one with the smallest p is shown with p corrected for all of them (Holm).
    """
    halved = measured.n_units >= FEWEST_TO_SPLIT
    said: list[str] = []
    if halved:
        try:
            found = stats.best_layer(table, test, unit=measured.unit, correction="none", seed=measured.seed)
            said = [
                f"layer chosen on {int(row.chosen_documents)} documents (there {row.chosen_estimate:+.3f}, p "
                f"{row.chosen_p:.2g}), tested on "
                f"{int(row.n_documents)} others"
                for row in rows(found)
            ]
        except StudyError:  # enough units in all, but not of those that the test can use: as below
            halved = False
    if not halved:
        every = stats.correct(attempt(lambda part, *_, **__: test(part), table, question, unit=measured.unit), "holm")
        found = every.sort_values("p").groupby("score", sort=False, as_index=False).first()
        found["p"] = found["p_corrected"]
        said = [f"too few units to halve ({measured.n_units}): the best of {len(every)} tests, p corrected for them (Holm)"] * len(
            found
        )
    found = found.assign(finding=finding, question=question)
    found["note"] = [
        "; ".join(x for x in (one, str(old)) if x and x != "nan") for one, old in zip(said, found["note"], strict=True)
    ]
    return found


def attempt(
    test: Callable[..., pd.DataFrame], table: pd.DataFrame, score: str | list[str], *args: Any, **options: Any
) -> pd.DataFrame:
    """`test(table, score, ...)`; where these texts are too few for it, or a column does not vary, one row without numbers that says so."""
    try:
        return test(table, score, *args, **options)
    except (StudyError, TableError) as error:
        name = score if isinstance(score, str) else score[0]
        return empty_finding(name, str(options.get("unit", "")), "not tested").assign(note=f"not tested: {error}")


def settle(study: str, tests: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Declared tests as one family (Holm), in the columns of `FINDING`; `holds`: corrected p at most 0.05."""
    family = stats.correct(pd.concat([test.dropna(axis=1, how="all") for test in tests], ignore_index=True), "holm")
    family["study"], family["holds"] = study, family["p_corrected"] <= ALPHA
    for name in FINDING:
        if name not in family:
            family[name] = pd.Series([None] * len(family), dtype=object)
    return family[list(FINDING)]


def beside_guide(findings: pd.DataFrame, guide: pd.DataFrame) -> pd.DataFrame:
    """The findings with the original guide's test of the same question, score and layer, where there is one."""
    answer = findings.copy()
    for at, row in findings.iterrows():
        mine = guide[(guide["score"] == row["score"]) & (guide["layer"] == row["layer"]) & (guide["question"] == row["question"])]
        for name in ("guide_test", "guide_statistic", "guide_r", "guide_p", "guide_reading"):
            answer.loc[at, name] = mine[name].iloc[0] if len(mine) else None
    return answer


def empty_finding(score: str, unit: str, effect: str) -> pd.DataFrame:
    """A test that could not be made, as a row; its note says why."""
    blank = dict.fromkeys(("estimate", "low", "high", "p", "p_corrected"), float("nan"))
    counts = dict.fromkeys(("n_units", "n_sequences", "n_documents", "n_tokens"), 0)
    row = {"layer": pd.NA, "score": score, "unit": unit, **counts, "test": "", "effect": effect, **blank, "null": 0.0, "note": ""}
    return pd.DataFrame([row]).astype({"layer": "Int64"})


def decide(findings: pd.DataFrame, flags: pd.DataFrame | None) -> Decision:
    """The verdict on a hypothesis that says: these hold. Red flags do not turn a yes into a no, but stay beside it."""
    if findings["p_corrected"].isna().all():
        return "undecided"
    if not findings["holds"].any():
        return "no"
    raised = flags is not None and bool((flags["raised"] == True).fillna(False).any())  # noqa: E712  (NA: not checked)
    if findings["holds"].all():
        return "yes, with red flags" if raised else "yes"
    return "in part, with red flags" if raised else "in part"


def opening(decision: Decision, yes: str, no: str) -> str:
    """The first sentence of a verdict."""
    if decision == "undecided":
        return "Undecided: the declared tests gave no p-value."
    if decision == "no":
        return f"No. {no}"
    said = f"Yes. {yes}" if decision.startswith("yes") else "In part: some of the declared tests hold, others do not."
    return said + (" But red flags are raised (below): do not cite this as it stands." if decision.endswith("flags") else "")


def sentence(row: Any, unit: str = "") -> str:
    """One finding in words, with its figures."""
    measure = f" {unit}" if unit else ""
    layer = "" if pd.isna(row.layer) else f" at layer {int(row.layer)}"
    p = "p not defined" if pd.isna(row.p_corrected) else f"corrected p {in_words(row.p_corrected)}"
    interval = "" if pd.isna(row.low) else f" (95 % interval {row.low:+.3f} to {row.high:+.3f})"
    holds = "holds" if row.holds else "does not hold"
    return (
        f"{row.finding}: {holds}. {row.effect} {row.estimate:+.3f}{measure}{interval}{layer}, {p}, {int(row.n_units)} units, "
        f"{int(row.n_documents)} documents."
    )


def in_words(p: float) -> str:
    """A p-value as a reader wants it."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def red_flags(table: pd.DataFrame, score: str, *args: Any, **options: Any) -> pd.DataFrame:
    """`stats.red_flags`; where they cannot be computed on this table, one row that says why."""
    try:
        return stats.red_flags(table, score, *args, **options)
    except (StudyError, TableError) as error:
        line = {"flag": "could not be checked", "score": score, "layer": pd.NA, "raised": pd.NA, "why": f"not checked: {error}"}
        return pd.DataFrame([line]).astype({"layer": "Int64", "raised": "boolean"})


def rows(table: pd.DataFrame) -> list[Any]:
    """The rows as named tuples."""
    return list(table.itertuples())
