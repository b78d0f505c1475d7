"""What a study works on, whatever it was given: texts, what was measured on them, or a finished run."""

from collections.abc import Callable, Mapping
from typing import Any

from basin_lens.capture import Capture
from basin_lens.errors import StudyError
from basin_lens.model import HookedModel
from basin_lens.studies.framework.finished_runs import from_run
from basin_lens.studies.framework.measured_texts import Measured, StudyData
from basin_lens.studies.framework.measurement import measure
from basin_lens.studies.framework.run_terms import refuse_other_terms
from basin_lens.tables import RunTable

# Options of `from_run`; the others of `measure` are the run's own.
_OF_RUNS = ("texts", "layers", "unit", "contrast", "integrated")


def ready(
    model: HookedModel,
    data: StudyData,
    study: str,
    progress: bool,
    options: Mapping[str, object],
    check: Callable[[Capture], None] | None = None,
) -> Measured:
    """What a study works on: texts are measured, a finished run is read, what was measured is taken as it is.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        data: see `StudyData`.
        study: its name.
        progress: show progress bars.
        options: of `measure`; with a run of `from_run`, and those of `measure` that are equal to the run's own.
        check: what the study refuses of the texts chosen.

    Raises:
        StudyError: measured for other studies, or options for what is measured already. Others as for `measure` and `from_run`.
    """
    given: dict[str, Any] = dict(options)  # measure and from_run check what each is
    if isinstance(data, RunTable):
        refuse_other_terms(data, {name: value for name, value in given.items() if name not in _OF_RUNS})
        asked = {name: value for name, value in given.items() if name in _OF_RUNS}
        return from_run(model, data, studies=(study,), progress=progress, check=check, **asked)
    if not isinstance(data, Measured):
        return measure(model, data, studies=(study,), progress=progress, check=check, **given)
    data.capture.check_model_is(model)
    if options:
        raise StudyError(
            f"expected no options of measure for texts measured already, got {sorted(options)}. Give them to measure(...)."
        )
    if study not in data.studies:
        raise StudyError(
            f"expected texts measured for the study {study!r}, got {list(data.studies)}. Measure with studies=[{study!r}]."
        )
    if check is not None:
        check(data.capture)
    return data
