"""What a study declares. The framework measures, tests, decides, words and stores; a study states its science.

StudySpec.analysis(task) -> Analysis -> (declared tests, token-level tests, red flags) -> Results -> StudySpec.presentation -> Study
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from basin_lens.analyzers import Analyzer
from basin_lens.capture import Capture
from basin_lens.model import HookedModel
from basin_lens.studies.framework.declared_tests import Decision
from basin_lens.studies.framework.measured_texts import SCORES, Measured
from basin_lens.studies.framework.progress import Steps
from basin_lens.studies.framework.study import Study
from basin_lens.texts import Passage
from basin_lens.transport import Context
from basin_lens.views import Section


def option(default: Any, help_text: str = "", *, model: bool = False) -> Any:
    """A field of a study's options. The command line offers those with a help text.

    Args:
        default: its value where none is given; a list is made anew each time.
        help_text: for `--help`.
        model: the option is a model; on the command line, its name.
    """
    facts = ({"help": help_text} if help_text else {}) | ({"model": True} if model else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=facts)
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class NoOptions:
    """Of a study that has none of its own."""


@dataclass(frozen=True)
class ScoreOptions:
    """How the headline score is measured. `headline`: the analyzer itself. A study's own analyzers take the same `k`, `context` and `exclude`."""

    k: int
    context: Context
    exclude: str
    headline: Analyzer


@dataclass(frozen=True)
class Task:
    """What a study works on. `step`: to be called with a few words as each step begins."""

    model: HookedModel
    measured: Measured
    options: Any
    step: Steps
    progress: bool

    @property
    def unit_and_seed(self) -> dict[str, Any]:
        """Options of every test."""
        return {"unit": self.measured.unit, "seed": self.measured.seed}


@dataclass(frozen=True)
class DeclaredTest:
    """A test that was declared before looking.

    Args:
        finding: what holds if the test passes, as a clause.
        question: one word or column, by which token-level tests and red flags find the finding.
        test: from rows of a table to a row per layer. The framework chooses the layer on half of the units and tests it on the
            others.
        over_layers: `test` looks at all layers at once and gives the finished row; there is no layer to choose.
        decides: the verdict of the study depends on it.
        unit: of the estimate in the verdict, if the row itself does not say it.
        score: the column that the estimate is of.
    """

    finding: str
    question: str
    test: Callable[[pd.DataFrame], pd.DataFrame]
    over_layers: bool = False
    decides: bool = True
    unit: str = ""
    score: str = "compression"


@dataclass(frozen=True)
class Check:
    """One call of a check of a question: red flags, or the original guide's test of single tokens."""

    question: str
    scores: str | list[str]
    against: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """What a study computed, and what is to be tested.

    Args:
        table: what the tests are made on.
        tests: declared tests.
        red_flags: a check for each question.
        token_level: the original guide's tests, shown beside the declared ones.
        contrast: scores to compare where a contrast was asked for; none: the study has no such section.
        tokens: the table that the study's folder keeps, a row per token and layer; None: none.
        tables: results by name.
        details: whatever the study needs again when it presents its results.
    """

    table: pd.DataFrame
    tests: Sequence[DeclaredTest]
    red_flags: Sequence[Check] = ()
    token_level: Sequence[Check] = ()
    contrast: Sequence[str] = SCORES
    tokens: pd.DataFrame | None = None
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    details: Any = None


@dataclass(frozen=True)
class Results:
    """What came of the declared tests. `token_level`: the original guide's tests, or None if the study has none."""

    findings: pd.DataFrame
    flags: pd.DataFrame | None
    decision: Decision
    token_level: pd.DataFrame | None = None


@dataclass(frozen=True)
class Presentation:
    """What a reader sees.

    Args:
        sections: of the report.
        figures: by file name.
        remarks: sentences of the verdict after those of the declared tests.
        not_tested: what a reader might think was tested.
        about: sentences on what was measured, after those that all studies have.
        tables: more results by name.
        verdict: all of its sentences, in place of the usual ones and `remarks`.
        facts: more provenance, by name.
    """

    sections: Sequence[Section]
    figures: Mapping[str, Figure]
    not_tested: Sequence[str]
    remarks: Sequence[str] = ()
    about: Sequence[str] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    verdict: Sequence[str] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def no_analyzers(_: ScoreOptions) -> Sequence[Analyzer]:
    """Of a study that needs none beyond those that all studies share."""
    return ()


def refuse_nothing(_options: Any, _passages: Sequence[Passage]) -> None:
    """Of a study whose options are always possible."""


@dataclass(frozen=True)
class StudySpec:
    """A study of texts.

    Args:
        name: of its command and its folder.
        title: of its report, as a question.
        question: one line for lists and help.
        hypothesis: what was declared before looking.
        if_yes, if_no: the first sentence of the verdict, unless `presentation` gives a verdict of its own.
        analysis: computes, and says what is to be tested.
        presentation: sections, figures, sentences.
        analyzers: what it measures beyond the scores that all studies share.
        integrated_gradients: it needs those of some sequences.
        options: its own, a frozen dataclass of `option`s.
        refuse: refuses options before a model is loaded.
        check: from model, options and unit to a check of the texts chosen, made before the model runs.
        judge: corrects what came of the declared tests by what else the study found.
        steps: how many steps of its own it tells `Task.step`.
    """

    name: str
    title: str
    question: str
    hypothesis: str
    analysis: Callable[[Task], Analysis]
    presentation: Callable[[Task, Analysis, Results], Presentation]
    if_yes: str = ""
    if_no: str = ""
    analyzers: Callable[[ScoreOptions], Sequence[Analyzer]] = no_analyzers
    integrated_gradients: bool = False
    options: type = NoOptions
    refuse: Callable[[Any, Sequence[Passage]], None] = refuse_nothing
    check: Callable[[Any, Any, str], Callable[[Capture], None]] | None = None
    judge: Callable[[Task, Analysis, Results], tuple[Analysis, Results]] | None = None
    steps: int = 1


@dataclass(frozen=True)
class ExperimentCall:
    """What the command line hands to an experiment. `options`: its own; `files`: those that `texts` were read from."""

    options: Any
    texts: list[Passage]
    files: list[Path]
    k: int
    seed: int
    out: Path


@dataclass(frozen=True)
class Prepared:
    """An experiment of which all was refused that can be without a model.

    `folders`: written to, besides the study's own. `describe`: from a model to lines that say what will be done. `run`: from a
    model to the study.
    """

    folders: Sequence[Path]
    describe: Callable[[Any], Sequence[str]]
    run: Callable[[Any], Study]


@dataclass(frozen=True)
class ExperimentSpec:
    """A study that makes texts and a training of its own. Fields as of `StudySpec`; `prepare` begins it from the command line."""

    name: str
    title: str
    question: str
    hypothesis: str
    options: type
    prepare: Callable[[ExperimentCall], Prepared]
