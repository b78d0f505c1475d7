"""What the study commands do: refuse before a model is loaded, then say what would be run, or run it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal, cast

import typer
from rich.console import Console

from basin_lens import files as writing
from basin_lens import studies, tables
from basin_lens.analyzers import Analyzer
from basin_lens.capture import Capture
from basin_lens.cli import finished_studies, study_words
from basin_lens.cli import options as shared
from basin_lens.cli.dataclass_options import was_given
from basin_lens.cli.options import MeasureOptions, RunOptions, TextOptions
from basin_lens.errors import StudyError
from basin_lens.model import HookedModel
from basin_lens.scoring import Request
from basin_lens.studies.framework import runner
from basin_lens.studies.framework.contrast import Contrast, refuse_label
from basin_lens.studies.framework.finished_runs import refuse_run
from basin_lens.studies.framework.measurement import analyzers_of, headline_of, refuse_scoring
from basin_lens.studies.framework.registry import specs_of_texts
from basin_lens.studies.framework.run_terms import headline_in, refuse_other_terms
from basin_lens.studies.framework.spec import ExperimentCall, ExperimentSpec, StudySpec
from basin_lens.studies.framework.storage import refuse_folder
from basin_lens.studies.framework.study import Study
from basin_lens.studies.summary import read_studies
from basin_lens.tables import RunTable
from basin_lens.texts import Passage
from basin_lens.transport import Context
from basin_lens.values import Facts

_MOST_TEXTS = 100  # that an experiment reads of a data set, where no number is given
_OF_MEASURING = ("max_sequences", "k", "seed", "context", "bank", "exclude", "max_length", "compression_tokens")


@dataclass(frozen=True)
class _Asked:
    """A call in which all was refused that can be without a model."""

    specs: Sequence[StudySpec]
    passages: list[Passage]
    layers: list[int] | Literal["all"] | None
    context: Context
    bank: Literal["reference"] | None
    contrast: Contrast | None
    analyzers: Sequence[Analyzer]
    run: RunTable | None


def run_studies(
    own: Mapping[str, object],
    texts: TextOptions,
    how: MeasureOptions,
    places: Mapping[str, Path],
    *,
    dry_run: bool = False,
    fresh: bool = False,
) -> None:
    """Measure once, run each study, and sum up.

    Args:
        own: the options of each study, by name.
        texts, how: what all of them share.
        places: the folder of each; with one for "summary", they are summed up, and those that an earlier call finished are kept.
        dry_run: say what would be run in place of running it.
        fresh: run them all again.
    """
    for name, place in places.items():
        refuse_folder(place, name, texts.files or [], heal=not dry_run)
    beside = places["summary"].parent if "summary" in places else None
    if beside is not None:
        finished_studies.refuse_foreign(beside, fresh=fresh)
    if dry_run:
        _say_what_would_be_run(_asked(own, texts, how), texts, how, places)
        return
    with ExitStack() as held:
        for folder in _locked(places):
            held.enter_context(writing.lock_folder(folder))
        asked = _asked(own, texts, how)
        model = shared.load(texts.model)
        given = {spec.name: _with_models(own[spec.name]) for spec in asked.specs}
        plan: Facts = {}
        done: dict[str, str] = {}
        if beside is not None:
            plan = finished_studies.plan_of(model, asked.passages, asked.run, given, texts, how)
            done = finished_studies.begin(beside, plan, places, fresh=fresh)
            _echo(f"{name}: kept, as an earlier call finished it (--fresh runs it again)" for name in done)
        checks = [spec.check(model, given[spec.name], how.unit) for spec in asked.specs if spec.check is not None]

        def check(capture: Capture) -> None:
            for one in checks:
                one(capture)

        left = [spec for spec in asked.specs if spec.name not in done]
        # For all of them, also where some are finished: what is measured depends on who asks.
        measured = _measured(model, asked, list(own), texts, how, check) if left else None
        for spec in left:
            assert measured is not None
            say(runner.run_study(spec, model, measured, given[spec.name]), places[spec.name])
            if beside is not None:
                finished_studies.note(beside, plan, done, spec.name, places[spec.name])
        if "summary" in places:
            say(studies.summarize([places[name] for name in own]), places["summary"])


def _say_what_would_be_run(asked: _Asked, texts: TextOptions, how: MeasureOptions, places: Mapping[str, Path]) -> None:
    columns = [column.name for one in asked.analyzers for column in one.columns]
    if any(spec.integrated_gradients for spec in asked.specs):
        columns.append("integrated_gradients (of some sequences)")
    columns += [what for spec in asked.specs for what in spec.apart]
    _echo(study_words.would_run(asked.specs, asked.passages, texts, how, columns, places))


def _measured(
    model: HookedModel, asked: _Asked, own: list[str], texts: TextOptions, how: MeasureOptions, check: Callable[[Capture], None]
) -> studies.Measured:
    """What the studies need: measured, or of a finished run."""
    if asked.run is not None:
        return studies.from_run(
            model,
            asked.run,
            studies=own,
            texts=asked.passages or None,
            layers=None if asked.layers == "all" else asked.layers,
            unit=how.unit,
            contrast=asked.contrast,
            check=check,
        )
    return studies.measure(
        model,
        asked.passages,
        studies=own,
        layers=asked.layers,
        k=texts.k,
        context=asked.context,
        bank=asked.bank,
        exclude=how.exclude,
        unit=how.unit,
        contrast=asked.contrast,
        max_sequences=texts.max_sequences,
        max_length=how.max_length,
        compression_tokens=how.compression_tokens,
        seed=texts.seed,
        check=check,
    )


def _locked(places: Mapping[str, Path]) -> list[Path]:
    """Folders that nobody else may write to: those of the studies and, of `all`, the one that holds them."""
    return [*([places["summary"].parent] if "summary" in places else []), *places.values()]


def _asked(own: Mapping[str, object], texts: TextOptions, how: MeasureOptions) -> _Asked:
    """Refuse options and texts that do not fit, before a model is loaded."""
    specs = specs_of_texts(*own)
    contrast, bank = _contrast(how.contrast), shared.bank_of(how.bank)
    run = _run_of(specs, contrast, texts, how)
    layers: list[int] | Literal["all"] | None = "all" if how.layers == "all" else shared.layers_of(how.layers)
    passages = texts.passages() if run is None or texts.files or texts.dataset is not None else []
    if run is None or passages:  # a run has its own context, and its own labels
        refuse_scoring(passages, context=how.context, exclude=how.exclude, unit=how.unit)
    if contrast is not None and (run is None or passages):
        refuse_label(passages, contrast)
    for spec in specs:
        spec.refuse(own[spec.name], passages)
    context = cast("Context", how.context)  # refused above if it is none
    headline = headline_of(texts.k, context, how.exclude, how.compression_tokens) if run is None else headline_in(run)
    analyzers = analyzers_of(specs, headline)
    Request(analyzers, seed=texts.seed)  # refuses what analyzers and a seed cannot be
    return _Asked(specs, passages, layers, context, bank, contrast, analyzers, run)


def _run_of(specs: Sequence[StudySpec], contrast: Contrast | None, texts: TextOptions, how: MeasureOptions) -> RunTable | None:
    """The run of --from, with all that the studies need; options of measuring are its own, and others are refused."""
    if how.run is None:
        return None
    run = tables.open(how.run)
    named = {**vars(texts), **vars(how)}
    for name in _OF_MEASURING:
        if was_given(name):
            try:
                refuse_other_terms(run, {name: named[name]})
            except StudyError as error:
                flag = "--" + name.replace("_", "-")
                raise typer.BadParameter(f"{flag} beside --from: {error}") from error
    refuse_run(run, specs, unit=how.unit, contrast=contrast, with_texts=bool(texts.files) or texts.dataset is not None)
    return run


def run_experiment(spec: ExperimentSpec, own: object, texts: TextOptions, run: RunOptions) -> None:
    """Say the plan, then run it."""
    files = texts.files or []
    if texts.dataset is None and (texts.split is not None or texts.config is not None):
        raise typer.BadParameter("expected --dataset with --split or --config, got none. Leave them out.")
    read = texts.passages(_MOST_TEXTS) if files or texts.dataset is not None else []
    prepared = spec.prepare(ExperimentCall(own, read, files, texts.k, texts.seed, run.out))
    refuse_folder(run.out, spec.name, prepared.inputs, heal=not run.dry_run)
    if run.dry_run:
        _echo(study_words.would_experiment(spec, prepared, read, texts, run.out))
        return
    with ExitStack() as held:
        for folder in (run.out, *prepared.folders):
            held.enter_context(writing.lock_folder(folder))
        model = shared.load(texts.model)
        _echo(prepared.describe(model))
        say(prepared.run(model), run.out)


def run_summary(folders: Sequence[Path], run: RunOptions) -> None:
    """Put studies that were run side by side."""
    refuse_folder(run.out, "summary", folders, heal=not run.dry_run)
    if run.dry_run:
        _echo(study_words.would_summarize(read_studies(folders), run.out))
        return
    with writing.lock_folder(run.out):
        say(studies.summarize(list(folders)), run.out)


def _with_models(own: object) -> object:
    """The options with models in place of their names."""
    assert is_dataclass(own) and not isinstance(own, type)
    models = {one.name: getattr(own, one.name) for one in fields(own) if one.metadata.get("model")}
    return replace(own, **{name: shared.load(value) for name, value in models.items() if value is not None})


def _contrast(text: str | None) -> Contrast | None:
    """A contrast from `span:IO,S` or `label:one,other`."""
    if text is None:
        return None
    try:
        return Contrast.named(text)
    except StudyError as error:
        raise typer.BadParameter(str(error)) from error


def _echo(lines: Sequence[str] | Iterator[str]) -> None:
    for line in lines:
        typer.echo(line)


def say(study: Study, out: Path) -> None:
    """Save a study, and say its verdict."""
    folder = study.save(out)
    console = Console(markup=False, highlight=False)
    raised = 0 if study.flags is None else int(study.flags["raised"].fillna(False).astype(bool).sum())  # NA: not checked
    console.print(f"\n{study.title}  [{study.decision}; {raised} red flags]", soft_wrap=True)
    for line in study.verdict:
        console.print(f"  {line}", soft_wrap=True)
    console.print(f"  {folder / 'report.html'}", soft_wrap=True)
