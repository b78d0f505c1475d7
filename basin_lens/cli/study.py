"""`basin-lens study`: a command for each study of the registry, with its own options only; `all`, `summary`, `list` and `show`.

What studies import is imported when one is run or shown: help and other commands do not wait for it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from basin_lens.cli import options as shared
from basin_lens.cli.dataclass_options import command_of
from basin_lens.cli.options import AgainOptions, MeasureOptions, RunOptions, TextOptions

# Each study's folder in it, so that `all` and the studies by themselves write to the same places.
_OUT = Path("basin-lens-study")
_HELP = f"""Run a study: a declared question, tables, figures, and one offline report with its verdict.

Without files or --dataset, the built-in passages are read (8 documents: few). Without --out, results go to {_OUT}/NAME.
--dry-run says what would be run; study show NAME what a study declares.

Examples: basin-lens study importance --dataset nltk:treebank --max-sequences 100 --out importance/
          basin-lens study layers --dataset wikitext --config wikitext-103-raw-v1 --split test --max-sequences 60
          basin-lens study layers prompts.jsonl --contrast span:IO,S --unit template --exclude template --bank reference
          basin-lens study all --dataset nltk:treebank --max-sequences 60 --out studies/
          basin-lens study memorization --preset quick --out memorization/
          basin-lens study summary studies/importance studies/layers --out summary/
          basin-lens study show robustness
"""


class StudyGroup(TyperGroup):
    """The registry's studies as commands, each built when it is asked for."""

    def list_commands(self, _ctx: object) -> list[str]:
        from basin_lens.studies.framework import registry

        return [*registry.names(), *self.commands]

    def get_command(self, _ctx: object, cmd_name: str) -> TyperCommand | None:
        from basin_lens.studies.framework import registry

        if cmd_name in registry.names():
            return _command(cmd_name)
        if cmd_name == "all":
            return _command_of_all()
        found = self.commands.get(cmd_name)
        if found is None:
            registry.find_spec(cmd_name)  # says which there are
        assert isinstance(found, TyperCommand)
        return found


app = typer.Typer(cls=StudyGroup, help=_HELP, no_args_is_help=True, rich_markup_mode=None)


@app.command("all", short_help="Studies of texts but the slow ones, measured once, and their summary.")
def run_all() -> None:
    """Stands for the command that is built from the registry."""


@app.command("summary", short_help="Studies that were run, side by side, their tests as one family.")
def summarize(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Folders of studies, each study once.")
    ] = None,
    out: shared.Out = _OUT / "summary",
    dry_run: shared.DryRun = False,
) -> None:
    """Put studies that were run side by side: all their declared tests as one family.

    Example: basin-lens study summary studies/importance studies/layers --out summary/
    """
    from basin_lens.cli.study_runs import run_summary

    run_summary(folders or [], RunOptions(out, dry_run))


@app.command("list", short_help="Every study with its question, and its own options.")
def list_studies() -> None:
    """List the studies: question, and options of its own.

    Example: basin-lens study list
    """
    from basin_lens.cli.study_words import listed

    for line in listed():
        typer.echo(line)


@app.command("show", short_help="What a study declares: hypothesis, tests, nulls, options, what is not tested.")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a study, as study list has it; also merging and summary.")],
) -> None:
    """Show what a study declares before looking; reads no text and loads no model.

    Example: basin-lens study show importance
    """
    from basin_lens.cli.study_words import declared
    from basin_lens.studies.framework.registry import find_declaration

    for line in declared(find_declaration(name)):
        typer.echo(line)


# -- commands from the registry -------------------------------------------------------------------------------------------------


def _command(name: str) -> TyperCommand:
    """The command of one study."""
    from basin_lens.cli.study_runs import run_experiment, run_studies
    from basin_lens.studies.framework.registry import find_spec
    from basin_lens.studies.framework.spec import ExperimentSpec

    spec = find_spec(name)
    default: dict[str, object] = {"out": _OUT / name}

    def of_texts(run: RunOptions, texts: TextOptions, how: MeasureOptions, own: object) -> None:
        run_studies({name: own}, texts, how, {name: run.out}, dry_run=run.dry_run)

    def experiment(run: RunOptions, texts: TextOptions, own: object) -> None:
        assert isinstance(spec, ExperimentSpec)
        run_experiment(spec, own, texts, run)

    if isinstance(spec, ExperimentSpec):
        function = command_of(experiment, RunOptions, TextOptions, spec.options, defaults=default)
    else:
        function = command_of(of_texts, RunOptions, TextOptions, MeasureOptions, spec.options, defaults=default)
    help_text = f"{spec.question}\n\n{spec.hypothesis}\n\nExample: basin-lens study {name} --dataset nltk:treebank --out {name}/"
    return _built(name, function, help_text, spec.question)


def _command_of_all() -> TyperCommand:
    """All studies of texts that are not slow; an option of any of them is an option here."""
    from basin_lens.cli.study_runs import run_studies
    from basin_lens.studies.framework.registry import check_names, find_spec

    names = check_names("all")
    specs = [find_spec(name) for name in names]

    def function(run: RunOptions, again: AgainOptions, texts: TextOptions, how: MeasureOptions, *own: object) -> None:
        places = {name: run.out / name for name in (*names, "summary")}
        run_studies(dict(zip(names, own, strict=True)), texts, how, places, dry_run=run.dry_run, fresh=again.fresh)

    kinds = (RunOptions, AgainOptions, TextOptions, MeasureOptions, *(spec.options for spec in specs))
    command = command_of(function, *kinds, defaults={"out": _OUT})
    short = f"{', '.join(names)}: measured once, and their summary."
    kept = "Interrupted, the same command keeps the studies that are finished; of other texts, options or versions, it is refused."
    help_text = (
        f"{short} One folder for each in --out. {kept}\n\nExample: basin-lens study all --dataset nltk:treebank --out studies/"
    )
    return _built("all", command, help_text, short)


def _built(name: str, function: Callable[..., None], help_text: str, short: str) -> TyperCommand:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name, help=help_text, short_help=short)(function)
    made = typer.main.get_command(app)
    assert isinstance(made, TyperCommand)
    return made
