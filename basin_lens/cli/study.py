"""`basin-lens study`: a command for each study of the registry, with its own options only; `all`, `summary` and `list`."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from basin_lens import files as writing
from basin_lens.cli import options as shared
from basin_lens.cli.options import MeasureOptions, TextOptions

_OUT = Path("basin-lens-study")
_MOST_TEXTS = 100  # that an experiment reads of a data set, where no number is given
_HELP = """Run a study: a declared question, tables, figures, and one offline report with its verdict.

Without files or --dataset, the built-in passages are read (8 documents: few).

Examples: basin-lens study importance --dataset nltk:treebank --max-sequences 100 --out importance/
          basin-lens study layers --dataset wikitext --config wikitext-103-raw-v1 --split test --max-sequences 60
          basin-lens study layers prompts.jsonl --contrast span:IO,S --unit template --exclude template --bank reference
          basin-lens study all --dataset nltk:treebank --max-sequences 60 --out studies/
          basin-lens study memorization --preset quick --out memorization/
          basin-lens study summary studies/importance studies/layers --out summary/
"""


class StudyGroup(TyperGroup):
    """The registry's studies as commands, each built when it is asked for: other commands do not wait for what studies import."""

    def list_commands(self, ctx: Any) -> list[str]:
        from basin_lens.studies.framework import registry

        return [*registry.names(), *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from basin_lens.studies.framework import registry

        if cmd_name in registry.names():
            return _command(cmd_name)
        if cmd_name == "all":
            return _command_of_all()
        found = super().get_command(ctx, cmd_name)
        if found is None:
            registry.find_spec(cmd_name)  # says which there are
        return found


app = typer.Typer(cls=StudyGroup, help=_HELP, no_args_is_help=True, rich_markup_mode=None)


@app.command("all", short_help="All studies of texts but the slow ones, measured once, and their summary.")
def run_all() -> None:
    """Stands for the command that is built from the registry."""


@app.command("summary", short_help="Studies that were run, side by side, their tests as one family.")
def summarize(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Folders of studies, each study once.")
    ] = None,
    out: shared.Out = _OUT,
) -> None:
    """Put studies that were run side by side: all their declared tests as one family.

    Example: basin-lens study summary studies/importance studies/layers --out summary/
    """
    from basin_lens import studies
    from basin_lens.studies.framework.storage import refuse_folder

    refuse_folder(out, "summary", folders or [])
    with writing.lock_folder(out):
        say(studies.summarize(list(folders or [])), out)


@app.command("list", short_help="Every study with its question, and its own options.")
def list_studies() -> None:
    """List the studies: question, and options of its own.

    Example: basin-lens study list
    """
    from basin_lens.studies.framework import registry

    for name in registry.names():
        spec = registry.find_spec(name)
        own = [f"--{one.name.replace('_', '-')}" for one in fields(spec.options) if "help" in one.metadata]
        part = "" if name in registry.OF_TEXTS else " Not part of all."
        typer.echo(f"{name:<14}{spec.question}{part}")
        if own:
            typer.echo(f"{'':<14}{' '.join(own)}")


# -- commands from the registry -----------------------------------------------------------------------------------------------------


def _command(name: str) -> Any:
    """The command of one study."""
    from basin_lens.studies.framework.registry import find_spec
    from basin_lens.studies.framework.spec import ExperimentSpec

    spec = find_spec(name)

    def of_texts(texts: TextOptions, how: MeasureOptions, own: Any, out: Path) -> None:
        _run_studies([name], {name: own}, texts, how, [out])

    def experiment(texts: TextOptions, own: Any, out: Path) -> None:
        _run_experiment(spec, own, texts, out)

    is_experiment = isinstance(spec, ExperimentSpec)
    kinds = (TextOptions, spec.options) if is_experiment else (TextOptions, MeasureOptions, spec.options)
    function = shared.command_of(experiment if is_experiment else of_texts, *kinds, out=_OUT)
    help_text = f"{spec.question}\n\n{spec.hypothesis}\n\nExample: basin-lens study {name} --dataset nltk:treebank --out {name}/"
    return _built(name, function, help_text, spec.question)


def _command_of_all() -> Any:
    """All studies of texts that are not slow; an option of any of them is an option here."""
    from basin_lens.studies.framework.registry import check_names, find_spec

    names = check_names("all")
    specs = [find_spec(name) for name in names]

    def function(texts: TextOptions, how: MeasureOptions, *given: Any) -> None:
        *own, out = given
        _run_studies(names, dict(zip(names, own, strict=True)), texts, how, [out / name for name in names], summary=out / "summary")

    command = shared.command_of(function, TextOptions, MeasureOptions, *(spec.options for spec in specs), out=_OUT)
    short = f"{', '.join(names)}: measured once, and their summary."
    help_text = f"{short} One folder for each in --out.\n\nExample: basin-lens study all --dataset nltk:treebank --out studies/"
    return _built("all", command, help_text, short)


def _built(name: str, function: Any, help_text: str, short: str) -> Any:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name, help=help_text, short_help=short)(function)
    return typer.main.get_command(app)


# -- runs ---------------------------------------------------------------------------------------------------------------------------


def _run_studies(
    names: Sequence[str],
    own: dict[str, Any],
    texts: TextOptions,
    how: MeasureOptions,
    outs: Sequence[Path],
    summary: Path | None = None,
) -> None:
    """Measure once, run each study, and sum up. What can be refused is refused before a model is loaded."""
    from basin_lens import studies
    from basin_lens.studies.framework import runner
    from basin_lens.studies.framework.measurement import refuse_scoring
    from basin_lens.studies.framework.registry import specs_of_texts
    from basin_lens.studies.framework.storage import refuse_folder

    specs = specs_of_texts(*names)
    places = dict(zip(names, outs, strict=True)) | ({} if summary is None else {"summary": summary})
    for name, place in places.items():
        refuse_folder(place, name, texts.files or [])
    with writing.lock_folder(outs[0] if summary is None else summary.parent):
        contrast, layers = _contrast(how.contrast), "all" if how.layers == "all" else shared.layers_of(how.layers)
        passages = texts.passages()
        refuse_scoring(passages, context=how.context, unit=how.unit)
        for spec in specs:
            spec.refuse(own[spec.name], passages)
        model = shared.load(texts.model)
        given = {spec.name: _with_models(own[spec.name], texts.seed) for spec in specs}
        checks = [spec.check(model, given[spec.name], how.unit) for spec in specs if spec.check is not None]

        def check(capture: Any) -> None:
            for one in checks:
                one(capture)

        context: Any = how.context  # refused above if it is none
        measured = studies.measure(
            model,
            passages,
            studies=names,
            layers=layers,
            k=texts.k,
            context=context,
            bank=how.bank,
            exclude=how.exclude,
            unit=how.unit,
            contrast=contrast,
            max_sequences=texts.max_sequences,
            max_length=how.max_length,
            seed=texts.seed,
            check=check,
        )
        for spec in specs:
            say(runner.run_study(spec, model, measured, given[spec.name]), places[spec.name])
        if summary is not None:
            say(studies.summarize([places[name] for name in names]), summary)


def _run_experiment(spec: Any, own: Any, texts: TextOptions, out: Path) -> None:
    """Say the plan, then run it."""
    from basin_lens.studies.framework.spec import ExperimentCall

    files = texts.files or []
    if texts.dataset is None and (texts.split is not None or texts.config is not None):
        raise typer.BadParameter("expected --dataset with --split or --config, got none. Leave them out.")
    read = texts.passages(_MOST_TEXTS) if files or texts.dataset is not None else []
    prepared = spec.prepare(ExperimentCall(own, read, files, texts.k, texts.seed, out))
    with ExitStack() as held:
        for folder in (out, *prepared.folders):
            held.enter_context(writing.lock_folder(folder))
        model = shared.load(texts.model)
        for line in prepared.describe(model):
            typer.echo(line)
        say(prepared.run(model), out)


def _with_models(own: Any, seed: int) -> Any:
    """The options with models in place of their names, and with the seed that all share."""
    changes: dict[str, Any] = {}
    for one in fields(own):
        value = getattr(own, one.name)
        if one.metadata.get("model") and value is not None:
            changes[one.name] = shared.load(value)
        if one.name == "seed":
            changes["seed"] = seed
    return replace(own, **changes)


def _contrast(text: str | None) -> Any:
    """A contrast from `span:IO,S` or `label:one,other`."""
    from basin_lens.studies import Contrast

    if text is None:
        return None
    by, _, sides = text.partition(":")
    first, _, second = sides.partition(",")
    if not (by and first and second):
        raise typer.BadParameter(f"expected a contrast such as span:IO,S or memorized:True,False, got {text!r}.")
    return Contrast(by, first, second)


def say(study: Any, out: Path) -> None:
    """Save a study, and say its verdict."""
    from rich.console import Console

    folder = study.save(out)
    console = Console(markup=False, highlight=False)
    raised = 0 if study.flags is None else int(study.flags["raised"].fillna(False).astype(bool).sum())  # NA: not checked
    console.print(f"\n{study.title}  [{study.decision}; {raised} red flags]", soft_wrap=True)
    for line in study.verdict:
        console.print(f"  {line}", soft_wrap=True)
    console.print(f"  {folder / 'report.html'}", soft_wrap=True)
