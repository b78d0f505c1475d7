"""Does the model have basins at any layer, scale or path length?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Int

from basin_lens.analyzers import Analyzer
from basin_lens.capture import Capture
from basin_lens.errors import BasinLensError, StudyError
from basin_lens.model import HookedModel, n_layers, random_twin
from basin_lens.studies.basins.grid import (
    GROUP,
    HOME,
    HOME_RANDOM,
    SCORE,
    SCORE_ISOTROPIC,
    SCORE_RANDOM,
    Grid,
    measure_cells,
    sampled,
    subject_of,
)
from basin_lens.studies.basins.report import Seen, about_cells, cells_of, figures_of, flags_of, remarks_of, sections_of
from basin_lens.studies.basins.tests import (
    ABOVE,
    GROWN,
    GROWN_ISOTROPIC,
    GROWTH,
    MEASURES,
    cell_tests,
    finding_of,
    plain_means,
    with_measures,
)
from basin_lens.studies.framework.declared_tests import FEWEST_TO_SPLIT
from basin_lens.studies.framework.measured_texts import StudyData
from basin_lens.studies.framework.runner import run_study
from basin_lens.studies.framework.spec import (
    Analysis,
    DeclaredTest,
    Presentation,
    Results,
    ScoreOptions,
    StudySpec,
    Task,
    option,
    own_options,
)
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.wording import layers_said
from basin_lens.values import whole, whole_numbers

FINDINGS = {
    ABOVE: "differences between neighbors are drawn together more at home than elsewhere, at some cell",
    GROWTH: "contraction at home grows with scale beyond its linear part, at some cell",
}
FEWEST_TOKENS = 24  # of six groups
_THROUGH = ("patched", "solo", "affine")  # contexts in which displaced states pass whole blocks

HYPOTHESIS = (
    "Declared before looking: at some cell of a grid of layers, scales and path lengths, (1) compression (contraction at "
    "home that neither the place nor the directions explain) is above that of random sets, (2) contraction at home grows with "
    "scale beyond what the linear part gives (its value at the smallest scale) more than that of random sets. Tested over "
    "documents: cells are explored on half of them and confirmed on the others, corrected by max-|t| over the cells explored; "
    "the two measures are one family (Holm). A cell is called a basin where it is also significant over the whole grid in all "
    f"documents (max-|t|). Below 0, the blocks tell apart what is near home. With fewer than {FEWEST_TO_SPLIT} units none are "
    "set aside: the best cell is shown, p corrected for the whole grid."
)


@dataclass(frozen=True)
class BasinOptions:
    """Of `study_basins`."""

    tokens: int = option(32, "Tokens measured at each cell.")
    neighbors: int = option(6, "Neighbors of a token whose displacements pass; at most --k.")
    scales: tuple[float, ...] = option((0.02, 0.1, 0.5, 1.0, 2.0))
    paths: tuple[int, ...] = option((1, 2, 4, 8))

    def check(self) -> None:
        """Refuse values that do not fit; needs neither model nor texts.

        Raises:
            StudyError: see there.
        """
        whole(self.tokens, "tokens", least=FEWEST_TOKENS, error=StudyError)
        whole(self.neighbors, "neighbors", least=4, error=StudyError)
        for path in self.paths:
            whole(path, "paths", least=1, error=StudyError)
        if not self.paths or len(set(self.paths)) < len(self.paths):
            raise StudyError(f"expected paths of at least 1 block, each once, got {self.paths!r}.")
        if len(set(self.scales)) < max(2, len(self.scales)) or not all(0 < scale < np.inf for scale in self.scales):
            raise StudyError(
                f"expected at least two scales above 0, each once, got {self.scales!r}. The smallest is the linear part."
            )


@whole_numbers(StudyError)
def study_basins(
    model: HookedModel,
    data: StudyData,
    *,
    progress: bool = True,
    tokens: int = 32,
    neighbors: int = 6,
    scales: Sequence[float] = (0.02, 0.1, 0.5, 1.0, 2.0),
    paths: Sequence[int] = (1, 2, 4, 8),
    **options: object,
) -> Study:
    """Ask whether blocks draw a token's neighbors together at home, at any layer, scale or path length.

    At each cell (a layer, a factor on the displacements, a number of blocks), on a sample of the tokens: compression, and the
    contraction at home at that scale less that at the smallest, each less the same of random sets. Isotropic displacements and
    a random-initialization twin stand beside every cell. Slow: a token costs 8 `neighbors` passes through each block of a
    cell's path, and as many for random sets.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: texts as for `analyze`, or a `Measured` for the study `"basins"`.
        progress: show progress bars.
        tokens: measured at each cell, spread over the documents; at least 24.
        neighbors: of a token, the nearest, whose displacements pass; at least 4, at most the run's k.
        scales: factors on the displacements; the smallest stands for the linear part.
        paths: blocks of a path; each layer has the path to the end of the model, too. Those beyond the last block are absent.
        **options: of `basin_lens.studies.measure`, with texts; `layers=None`: eight, evenly spaced, less layer 0.

    Returns:
        a `Study` with tables `cells` (a row per cell and measure: nats, tests, nulls, the twin), `cell_values` (a row per cell and
        token), and `contrast` if one was asked for.

    Raises:
        StudyError: too few documents, options that do not fit, or a context through which no path leads. Others as for `analyze`.

    Source: design of basin_lens, "Scale and path"; arXiv 2409.17113, 2601.11575, 2510.06477.

    Example:
        >>> import basin_lens as bl
        >>> bl.studies.study_basins(None, [], scales=[1.0])
        Traceback (most recent call last):
        ...
        basin_lens.errors.StudyError: expected at least two scales above 0, each once, got (1.0,). The smallest is the linear part.
    """
    own = BasinOptions(tokens, neighbors, tuple(scales), tuple(paths))
    own.check()
    return run_study(SPEC, model, data, own, progress=progress, measure_options=options)


def _analyzers(scoring: ScoreOptions) -> list[Analyzer]:
    """None of its own while texts are measured: the cells are measured apart, on a sample. What they cannot be is refused here."""
    if scoring.context not in _THROUGH:
        raise StudyError(
            f"expected a context among {_THROUGH} for the study basins, got {scoring.context!r}: displaced states must pass whole "
            "blocks."
        )
    return []


def _check(_model: HookedModel, given: object, _unit: str) -> Callable[[Capture], None]:
    """What is refused once the texts are chosen, before the model runs."""
    own_options(given, BasinOptions).check()

    def check(capture: Capture) -> None:
        documents = len(set(capture.docs))
        if documents < GROUP:
            raise StudyError(
                f"expected texts of at least {GROUP} documents, one for each token of a group, got {documents}. Add texts."
            )

    return check


def _grid(task: Task) -> Grid:
    options, measured = task.own(BasinOptions), task.measured
    layers = tuple(layer for layer in measured.layers if layer > 0) or tuple(measured.layers)
    k = int(measured.settings["k"])
    scales = tuple(sorted(float(scale) for scale in options.scales))
    return Grid(layers, scales, tuple(sorted(options.paths)), options.tokens, min(options.neighbors, k), n_layers(task.model))


@dataclass(frozen=True)
class _Details:
    """What the report needs again."""

    seen: Seen
    cells: pd.DataFrame
    tokens: int
    twin_tokens: int
    twin: str


def _analysis(task: Task) -> Analysis:
    measured, grid = task.measured, _grid(task)
    tokens = sampled(measured.capture, grid.tokens, measured.seed)
    task.step("every cell of the grid")
    subject = subject_of(task.model, measured, grid)
    found = measure_cells(
        subject, grid, tokens, measured, isotropic=max(GROUP, len(tokens) // 3), progress=task.progress, what="cells of the grid"
    )
    values = with_measures(found)
    del subject  # the states of many layers
    task.step("the random twin")
    of_twin = tokens[: max(4 * GROUP, len(tokens) // 2)]
    twin, why = _twin(task, grid, of_twin)
    task.step("tests of every cell")
    tests = {measure: cell_tests(values, measure, **task.unit_and_seed) for measure in MEASURES}
    unit = measured.unit
    means = plain_means(values, (SCORE, SCORE_RANDOM, SCORE_ISOTROPIC, GROWN, GROWN_ISOTROPIC, HOME, HOME_RANDOM), unit)
    twin_means = plain_means(values[:0] if twin is None else twin, MEASURES, unit)
    seen = Seen(grid, values, tests, means, twin_means)
    cells = cells_of(seen)
    return Analysis(
        table=cells,
        tests=[
            DeclaredTest(finding, measure, _finding(measure, finding), over_layers=True, score=measure)
            for measure, finding in FINDINGS.items()
        ],
        contrast=(),
        tables={"cells": cells, "cell_values": values},
        details=_Details(seen, cells, len(tokens), len(of_twin), why),
    )


def _finding(measure: str, finding: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda cells: finding_of(cells[cells["score"] == measure]).assign(finding=finding, question=measure, score=measure)


def _twin(task: Task, grid: Grid, tokens: Int[np.ndarray, " tokens"]) -> tuple[pd.DataFrame | None, str]:
    """The same cells of a model that has learned nothing, on some of the tokens; or why there are none."""
    try:
        model = random_twin(task.model, seed=task.measured.seed)
        subject = subject_of(model, task.measured, grid)
        found = measure_cells(subject, grid, tokens, task.measured, progress=task.progress, what="cells of the random twin")
    except BasinLensError as error:
        return None, f"The random twin: {error}"
    return with_measures(found), ""


def _judge(_task: Task, analysis: Analysis, results: Results) -> tuple[Analysis, Results]:
    """With the red flags of this study: who else has what was found."""
    details = analysis.details
    assert isinstance(details, _Details)
    return analysis, replace(results, flags=flags_of(details.cells))


def _presentation(task: Task, analysis: Analysis, _results: Results) -> Presentation:
    details, measured = analysis.details, task.measured
    assert isinstance(details, _Details)
    seen, cells = details.seen, details.cells
    figures = figures_of(cells, seen)
    grid = seen.grid
    facts = {
        "layers": list(grid.layers),
        "scales": list(grid.scales),
        "paths": list(grid.paths),
        "tokens": details.tokens,
        "twin_tokens": details.twin_tokens,
        "neighbors": grid.neighbors,
        "group": GROUP,
        "cells": len(grid.cells),
    }
    told = SPEC.said(layers=layers_said(measured), neighbors=grid.neighbors, tokens=details.tokens)
    return Presentation(
        sections=sections_of(cells, seen, figures),
        figures=figures,
        remarks=remarks_of(cells),
        not_tested=[*([details.twin] if details.twin else []), *told],
        about=about_cells(seen, measured, details.tokens, details.twin_tokens),
        facts={"basins": facts},
    )


SPEC = StudySpec(
    name="basins",
    title="Does the model have basins at any layer, scale or path length?",
    question="Does the model have basins at any layer, scale or path length? Slow.",
    hypothesis=HYPOTHESIS,
    tests=tuple(FINDINGS.values()),
    nulls=(
        "random sets of the bank in place of the neighbors, each around its own centroid",
        "isotropic displacements with the neighbors' lengths (beside every cell, not tested)",
        "a random-initialization twin of the model (beside every cell, and a red flag)",
    ),
    not_tested=(
        "Basins of single tokens or of kinds of tokens: cells are means over tokens.",
        "Layers other than {layers}; more than the {neighbors} nearest neighbors; texts other than these.",
        "Displacements that are no differences between neighbors, random sets or isotropic.",
        "Stable regions, attractors and valleys as others define them: see the literature in the report.",
        "Any contrast of spans or labels: cells are measured on {tokens} tokens, too few for one.",
    ),
    if_yes="At some layer, scale and path length, neighbors are drawn together at home, more than elsewhere and more "
    "than those of random sets, and contraction at home grows with scale.",
    if_no="No layer, scale or path length shows a basin here: nowhere are neighbors drawn together more at home "
    "than elsewhere, nor does contraction at home grow with scale, beyond what random sets show.",
    options=BasinOptions,
    analyzers=_analyzers,
    refuse=lambda given, _: own_options(given, BasinOptions).check(),
    check=_check,
    analysis=_analysis,
    judge=_judge,
    presentation=_presentation,
    layers=8,
    shared_scores=False,
    apart=(f"{SCORE} and {HOME} of neighbors, random sets and isotropic displacements (at every cell, of a sample of tokens)",),
    steps=3,
)
