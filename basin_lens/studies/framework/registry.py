"""The one list of studies. The command line, `study all`, `study list`, `measure` and the summary take them from here.

To add a study: one module that defines `SPEC`, and one line here.
"""

import importlib

from basin_lens.errors import StudyError
from basin_lens.studies.framework.spec import Declaration, ExperimentSpec, StudySpec
from basin_lens.values import did_you_mean

# Studies of texts: measured together, parts of `study all`, in this order. Modules by name, so that a command loads no more than
# its own study.
OF_TEXTS = {
    "importance": "basin_lens.studies.importance",
    "linguistic": "basin_lens.studies.linguistic",
    "layers": "basin_lens.studies.layers",
    "codelength": "basin_lens.studies.codelength",
    "robustness": "basin_lens.studies.robustness.study",
}
# Measured like the others, but no part of `study all`: too slow, or about a contrast that is asked for.
APART = {
    "contrast": "basin_lens.studies.contrast_study",
    "mergeability": "basin_lens.studies.mergeability.study",
    "basins": "basin_lens.studies.basins.study",
}
# With texts and a training of their own.
EXPERIMENTS = {"memorization": "basin_lens.studies.memorization.study"}

# What other commands make: declared like the others, run by functions of their own.
ELSEWHERE = {
    "compare": "basin_lens.studies.model_comparison",
    "merging": "basin_lens.studies.merging_comparison",
    "summary": "basin_lens.studies.summary",
}

STUDIES = tuple(OF_TEXTS)


def names() -> list[str]:
    """All studies, in the order of lists."""
    return [*OF_TEXTS, *APART, *EXPERIMENTS]


def find_spec(name: str) -> StudySpec | ExperimentSpec:
    """What the study declares.

    Raises:
        StudyError: an unknown study.
    """
    modules = OF_TEXTS | APART | EXPERIMENTS
    if name not in modules:
        raise StudyError(f"expected studies among {names()}, or all, got {[name]}. {did_you_mean(name, names())}".rstrip())
    found = _spec_in(modules[name])
    assert isinstance(found, StudySpec | ExperimentSpec) and found.name == name, (found, name)
    return found


def find_declaration(name: str) -> Declaration:
    """What a study of any kind declares.

    Raises:
        StudyError: an unknown study.
    """
    if name not in ELSEWHERE and name not in names():
        raise StudyError(
            f"expected a study among {[*names(), *ELSEWHERE]}, got {name!r}. {did_you_mean(name, [*names(), *ELSEWHERE])}See "
            "basin-lens study list."
        )
    return _spec_in(ELSEWHERE[name]) if name in ELSEWHERE else find_spec(name)


def command_of(name: str) -> str:
    """The command that runs a study."""
    return {"merging": "basin-lens merge test", "compare": "basin-lens compare"}.get(name, f"basin-lens study {name}")


def _spec_in(module: str) -> Declaration:
    found: Declaration = importlib.import_module(module).SPEC
    return found


def specs_of_texts(*chosen: str) -> list[StudySpec]:
    """The specs of studies that measure texts, in the order given.

    Raises:
        StudyError: see `check_names`.
    """
    found = [find_spec(name) for name in check_names(*chosen)]
    return [spec for spec in found if isinstance(spec, StudySpec)]


def check_names(*chosen: str) -> list[str]:
    """Names of studies that measure texts; `"all"` stands for `OF_TEXTS`.

    Raises:
        StudyError: none, or an unknown one.
    """
    if chosen == ("all",):
        return list(OF_TEXTS)
    known = [*OF_TEXTS, *APART]
    if not chosen or any(name not in known for name in chosen):
        meant = "".join(did_you_mean(name, known) for name in chosen)
        raise StudyError(f"expected studies among {known}, or all, got {list(chosen)}. {meant}".rstrip())
    return list(chosen)
