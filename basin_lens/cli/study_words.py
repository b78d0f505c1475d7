"""What the study commands say of a study before it is run: the list, what it declares, what a call would do."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path

from basin_lens.cli.dataclass_options import flag_of
from basin_lens.cli.options import MeasureOptions, TextOptions
from basin_lens.studies.framework import registry
from basin_lens.studies.framework.spec import Declaration, ExperimentSpec, Prepared, StudySpec
from basin_lens.texts import Passage
from basin_lens.values import Facts

_WIDTH = 110
_LABEL = 14  # columns before the text of a line


def listed() -> Iterator[str]:
    """Every study with its question, and its own options."""
    for name in registry.names():
        spec = registry.find_spec(name)
        own = [flag_of(one) for one in fields(spec.options) if "help" in one.metadata]
        part = "" if name in registry.OF_TEXTS else " Not part of all."
        yield f"{name:<{_LABEL}}{spec.question}{part}"
        if own:
            yield f"{'':<{_LABEL}}{' '.join(own)}"


# -- what a study declares --------------------------------------------------------------------------------------------------------


class _Unfilled(dict[str, str]):
    """What only a run knows, in angle brackets."""

    def __missing__(self, name: str) -> str:
        return f"<{name}>"


def declared(spec: Declaration) -> Iterator[str]:
    """What a study declares before looking: question, hypothesis, tests, nulls, options, what is not tested."""
    yield f"{spec.name}: {spec.title}"
    yield ""
    yield from _said("question", [spec.question])
    yield from _said("hypothesis", [spec.hypothesis])
    yield from _said("tests", spec.tests)
    yield from _said("nulls", spec.nulls)
    yield from _said("options", _options(spec))
    lines = [line.format_map(_Unfilled()) for line in spec.not_tested]
    yield from _said("not tested", lines)
    if any("<" in line for line in lines):
        yield from _said("", ["Names in <> are what a run fills in."])
    yield from _said("command", [f"{registry.command_of(spec.name)} --help"])


def _options(spec: Declaration) -> list[str]:
    if not isinstance(spec, StudySpec | ExperimentSpec):
        return ["those of its command"]
    own = fields(spec.options)
    said = [f"{flag_of(one)} [{_default(one)}]: {one.metadata['help']}" for one in own if "help" in one.metadata]
    in_python = [f"{one.name} [{_default(one)}]" for one in own if "help" not in one.metadata and one.name != "seed"]
    if in_python:
        said.append(f"in Python only: {', '.join(in_python)}")
    shared = "of the texts, of the model and the seed" if isinstance(spec, ExperimentSpec) else "that all studies of texts share"
    return [*said, f"and those {shared} (--help)"]


def _default(one: "Field[object]") -> str:
    value = one.default if one.default_factory is MISSING else one.default_factory()
    return "none" if value in (None, [], ()) else ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _said(label: str, lines: Sequence[str]) -> Iterator[str]:
    """A label, and its lines beside it."""
    for number, line in enumerate(lines or ["none"]):
        head, bullet = ("" if number else label), ("- " if len(lines) > 1 else "")
        yield textwrap.fill(
            bullet + line,
            _WIDTH,
            initial_indent=f"{head:<{_LABEL}}",
            subsequent_indent=" " * (_LABEL + len(bullet)),
            break_on_hyphens=False,
            break_long_words=False,
        )


# -- what a call would do ---------------------------------------------------------------------------------------------------------


def would_run(
    specs: Sequence[StudySpec],
    passages: Sequence[Passage],
    texts: TextOptions,
    how: MeasureOptions,
    columns: Sequence[str],
    places: Mapping[str, Path],
) -> Iterator[str]:
    """Of studies of texts, all of which was checked: what would be measured, tested and written."""
    yield from _dry(texts.model)
    if how.run is not None:
        yield from _said(
            "from", [f"the finished run in {how.run}: its tokens, neighbors and seed; layers: {how.layers or 'its own'}"]
        )
    else:
        yield from _measured(specs, passages, texts, how)
    yield from _said("unit", [how.unit])
    yield from _said("contrast", [how.contrast or "none"])
    yield from _said("analyzers", [f"{len(columns)} columns: {', '.join(columns)}"])
    for spec in specs:
        yield from _said(f"{spec.name}", spec.tests)
    yield from _folders(places)


def _measured(specs: Sequence[StudySpec], passages: Sequence[Passage], texts: TextOptions, how: MeasureOptions) -> Iterator[str]:
    """Which texts would be measured, and how."""
    yield from _texts(passages)
    most = "all sequences" if texts.max_sequences is None else f"at most {texts.max_sequences} sequences"
    yield from _said("sequences", [f"{most} of at most {how.max_length} tokens; seed {texts.seed}"])
    count = max(spec.layers for spec in specs)
    yield from _said("layers", [how.layers or f"{count}, evenly spaced over the model (all if it has no more)"])
    source = "the texts themselves" if how.bank is None else "the built-in passages"
    yield from _said("neighbors", [f"k = {texts.k}, context {how.context}, from {source}; left out: the same {how.exclude}"])


def would_experiment(
    spec: ExperimentSpec, prepared: Prepared, passages: Sequence[Passage], texts: TextOptions, out: Path
) -> Iterator[str]:
    """Of an experiment, all of which was checked."""
    yield from _dry(texts.model)
    if passages:
        yield from _texts(passages)
    yield from _said("plan", prepared.plan)
    yield from _said(spec.name, spec.tests)
    yield from _folders({spec.name: out, **{f"{spec.name}: models": folder for folder in prepared.folders}})


def would_summarize(held: Sequence[Facts], out: Path) -> Iterator[str]:
    """Of a summary: the tests of the studies that it would put together."""
    yield "dry run: nothing is written"
    for one in held:
        yield from _said(one["study"], [row["finding"] for row in one["findings"]])
    yield from _folders({"summary": out})


def _dry(model: str) -> Iterator[str]:
    yield "dry run: no model is loaded, nothing is written"
    yield from _said("model", [model])


def _texts(passages: Sequence[Passage]) -> Iterator[str]:
    documents = len({index if one.doc is None else one.doc for index, one in enumerate(passages)})
    characters = sum(len(one.text) for one in passages)
    yield from _said("texts", [f"{len(passages)} passages of {documents} documents, {characters:,} characters"])


def _folders(places: Mapping[str, Path]) -> Iterator[str]:
    """Where each would write; folders that cannot take it were refused before."""
    there = {name: "replaced" if (place / "results.json").is_file() else "new" for name, place in places.items()}
    yield from _said("folders", [f"{place} ({name}, {there[name]})" for name, place in places.items()])
