"""What a study declares. The framework measures, tests, decides, words and stores; a study states its science.

StudySpec.analysis(task) -> Analysis -> (declared tests, token-level tests, red flags) -> Results -> StudySpec.presentation -> Study
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, TypeVar

import pandas as pd
from matplotlib.figure import Figure

from basin_lens.analyzers import Analyzer
from basin_lens.capture import Capture
from basin_lens.model import HookedModel
from basin_lens.studies.framework.declared_tests import Decision
from basin_lens.studies.framework.measured_texts import HEADLINE, SCORES, Measured
from basin_lens.studies.framework.progress import Steps
from basin_lens.studies.framework.sequences import FEWEST_TOKENS
from basin_lens.studies.framework.study import Study
from basin_lens.texts import Passage
from basin_lens.transport import Context
from basin_lens.views import Section

Value = TypeVar("Value")
Own = TypeVar("Own")


def option(default: Value, help_text: str = "", *, model: bool = False) -> Value:
    """A field of a study's options. The command line offers those with a help text.

    Args:
        default: its value where none is given; a list is made anew each time.
        help_text: for `--help`.
        model: the option is a model; on the command line, its name.
    """
    facts = ({"help": help_text} if help_text else {}) | ({"model": True} if model else {})
    if isinstance(default, list):
        return field(default_factory=lambda: copy(default), metadata=facts)
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class NoOptions:
    """Of a study that has none of its own."""


@dataclass(frozen=True)
class ScoreOptions:
    """How the headline score is measured; a study's own analyzers take the same. `headline`: the analyzer itself."""

    k: int
    context: Context
    exclude: str
    headline: Analyzer


class UnitAndSeed(TypedDict):
    """Options of every test."""

    unit: str
    seed: int


@dataclass(frozen=True)
class Task:
    """What a study works on. `options`: its own, see `own`. `step`: to be called with a few words as each step begins."""

    model: HookedModel
    measured: Measured
    options: object
    step: Steps
    progress: bool

    def own(self, kind: type[Own]) -> Own:
        """The study's own options, as the class that its spec names."""
        return own_options(self.options, kind)

    @property
    def unit_and_seed(self) -> UnitAndSeed:
        """Options of every test."""
        return {"unit": self.measured.unit, "seed": self.measured.seed}


def own_options(given: object, kind: type[Own]) -> Own:
    """Options as the class that a study's spec names: the framework passes them on and knows no more of them."""
    assert isinstance(given, kind), (type(given), kind)
    return given


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
    score: str = HEADLINE


@dataclass(frozen=True)
class Check:
    """One call of a check of a question: red flags, or the original guide's test of single tokens."""

    question: str
    scores: str | list[str]
    against: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)


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
        rows: what a row of the table is, to be counted in the verdict, such as `"tokens"`; empty: not counted.
        details: whatever the study needs again when it presents its results.
    """

    table: pd.DataFrame
    tests: Sequence[DeclaredTest]
    red_flags: Sequence[Check] = ()
    token_level: Sequence[Check] = ()
    contrast: Sequence[str] = SCORES
    tokens: pd.DataFrame | None = None
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    rows: str = ""
    details: object = None


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
    facts: Mapping[str, object] = field(default_factory=dict)


def no_analyzers(_: ScoreOptions) -> Sequence[Analyzer]:
    """Of a study that needs none beyond those that all studies share."""
    return ()


def refuse_nothing(_options: object, _passages: Sequence[Passage]) -> None:
    """Of a study whose options are always possible."""


@dataclass(frozen=True)
class Declaration:
    """What a study of any kind says before looking. `basin-lens study show NAME` prints it.

    As it stands, it is the spec of a study that other functions measure for: `merging` (windows, at equal bytes) and `summary`
    (studies that were run). `StudySpec` and `ExperimentSpec` say how to measure, too.

    Args:
        name: of its command and its folder.
        title: of its report, as a question.
        question: one line for lists and help.
        hypothesis: what was declared before looking.
        tests: what holds if each declared test passes, as clauses.
        nulls: what the tests are made against, or stand beside: random points, chance, a model that has learned nothing.
        not_tested: what a reader might think was tested. `{layers}` and other names in braces are what a run fills in; see `said`.
    """

    name: str
    title: str
    question: str
    hypothesis: str
    tests: tuple[str, ...] = ()
    nulls: tuple[str, ...] = ()
    not_tested: tuple[str, ...] = ()

    def said(self, **run: object) -> list[str]:
        """What is not tested, with what a run fills in."""
        return [line.format(**run) for line in self.not_tested]


@dataclass(frozen=True, kw_only=True)
class StudySpec(Declaration):
    """A study of texts. Fields as of `Declaration`, and:

    Args:
        if_yes, if_no: the first sentence of the verdict, unless `presentation` gives a verdict of its own.
        analysis: computes, and says what is to be tested.
        presentation: sections, figures, sentences.
        analyzers: what it measures beyond the scores that all studies share.
        integrated_gradients: it needs those of some sequences.
        options: its own, a frozen dataclass of `option`s.
        refuse: refuses options before a model is loaded.
        check: from model, options and unit to a check of the texts chosen, made before the model runs.
        judge: corrects what came of the declared tests by what else the study found.
        layers: how many it measures where none are named, evenly spaced over the model.
        shared_scores: it looks at the scores that all studies share; where no study does, they are not measured.
        apart: what its analysis measures by itself, in words, for `--dry-run`.
        steps: how many steps of its own it tells `Task.step`.
        contrasted: it is about the contrast asked for, so one must be; tokens of its two kinds are measured before others.
        fewest_tokens: of a sequence; shorter ones are passed over.
    """

    analysis: Callable[[Task], Analysis]
    presentation: Callable[[Task, Analysis, Results], Presentation]
    if_yes: str = ""
    if_no: str = ""
    analyzers: Callable[[ScoreOptions], Sequence[Analyzer]] = no_analyzers
    integrated_gradients: bool = False
    options: type = NoOptions
    refuse: Callable[[object, Sequence[Passage]], None] = refuse_nothing
    check: Callable[[HookedModel, object, str], Callable[[Capture], None]] | None = None
    judge: Callable[[Task, Analysis, Results], tuple[Analysis, Results]] | None = None
    layers: int = 10
    shared_scores: bool = True
    apart: tuple[str, ...] = ()
    steps: int = 1
    contrasted: bool = False
    fewest_tokens: int = FEWEST_TOKENS


@dataclass(frozen=True)
class ExperimentCall:
    """What the command line hands to an experiment. `options`: its own; `files`: those that `texts` were read from."""

    options: object
    texts: list[Passage]
    files: list[Path]
    k: int
    seed: int
    out: Path


@dataclass(frozen=True)
class Prepared:
    """An experiment of which all was refused that can be without a model, but for its folder.

    `inputs`: files that are read, which the study's folder must not hold. `folders`: written to, besides the study's own. `plan`:
    what will be done, as far as it is known without a model. `describe`: from a model to lines that say all of it. `run`: from a
    model to the study.
    """

    inputs: Sequence[Path]
    folders: Sequence[Path]
    plan: Sequence[str]
    describe: Callable[[HookedModel], Sequence[str]]
    run: Callable[[HookedModel], Study]


@dataclass(frozen=True, kw_only=True)
class ExperimentSpec(Declaration):
    """A study that makes texts and a training of its own. `prepare` begins it from the command line."""

    options: type
    prepare: Callable[[ExperimentCall], Prepared]
