"""A finished study: tables, figures and one report, and the folder they are written to."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from basin_lens import tables
from basin_lens.errors import StoreError
from basin_lens.files import new_folder
from basin_lens.records import Unfinished
from basin_lens.studies.framework.declared_tests import Decision
from basin_lens.studies.framework.storage import KIND, records, refuse_folder
from basin_lens.values import Facts
from basin_lens.views import Report, Section, flags_said, study_card, study_page


@dataclass(frozen=True, repr=False)
class Study:
    """A finished study: what was asked, what came out, and everything behind it.

    `decision`: the verdict on the declared hypothesis as one word. `findings`: the declared tests, a row each, with the original
    guide's test beside the sound one. `tables`: results by name. `tokens`: the table measured, or None. `figures`: by file name.
    `sections`: the report's.
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
    provenance: Facts
    tokens: pd.DataFrame | None = None

    def __repr__(self) -> str:
        """Three lines: what was asked, what came out, where the rest is."""
        said = next(iter(self.verdict), "")
        return f"Study {self.name}: {self.title}\n{self.decision} ({flags_said(self.flags)}). {said}\n{self._held()}"

    def _repr_html_(self) -> str:
        """Verdict, red flags and first figure, at a notebook cell's end."""
        return study_card(
            self.title,
            subtitle=f"study {self.name}",
            decision=self.decision,
            verdict=self.verdict,
            flags=self.flags,
            figure=next(iter(self.figures.values()), None),
            last=self._held(),
        )

    def _held(self) -> str:
        return f"Tables: {', '.join([*self.tables, 'findings'])}. study.save(folder) writes all of it with its report."

    def report(self) -> Report:
        """The study as one offline page."""
        return study_page(
            self.title,
            subtitle=f"basin_lens study: {self.name}",
            about=self.about,
            sections=self.sections,
            hypothesis=self.hypothesis,
            verdict=self.verdict,
            flags=self.flags,
            not_tested=self.not_tested,
            provenance=self.provenance,
        )

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

    def _write(self, folder: Unfinished) -> None:
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

    def as_json(self) -> Facts:
        """What was declared and what came out, as plain JSON (NaN is null)."""
        return {
            "study": self.name,
            "title": self.title,
            "about": list(self.about),
            "hypothesis": self.hypothesis,
            "decision": self.decision,
            "verdict": list(self.verdict),
            "findings": records(self.findings),
            "red_flags": None if self.flags is None else records(self.flags),
            "not_tested": list(self.not_tested),
            "tables": sorted([*self.tables, "findings"]),
            "figures": sorted(self.figures),
            "provenance": dict(self.provenance),
        }
