"""`basin-lens contrast`: two kinds of tokens or texts in one model. `basin-lens compare`: the same texts in two models."""

from pathlib import Path

import typer

from basin_lens.cli.dataclass_options import command_of
from basin_lens.cli.options import MeasureOptions, RunOptions, TextOptions

_CONTRAST = """Ask whether two kinds of tokens differ in compression: two spans of prompts, or texts with two values of a label.

Writes a folder with tables, figures and one report: declared test, verdict, red flags, and the difference under another bank.
A prompt, as a line of prompts.txt with --marked:
    When [IO:Mary] and [S1:John] went to the store, [S2:John] gave a drink to

Examples: basin-lens contrast prompts.txt --marked --by span:IO,S2 --out io/
          basin-lens contrast prompts.txt --marked --by span:IO,S2 --unit template --exclude template
          basin-lens contrast texts.jsonl --by memorized:True,False --out memorized/
"""


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    command = command_of(_contrast, RunOptions, TextOptions, MeasureOptions, defaults={"out": Path("basin-lens-contrast")})
    app.command("contrast", help=_CONTRAST, short_help="Do two kinds of tokens or texts differ? Declared test, verdict, figure.")(
        command
    )


def _contrast(run: RunOptions, texts: TextOptions, how: MeasureOptions) -> None:
    if how.contrast is None:
        raise typer.BadParameter("expected --by with what is to be compared, such as span:IO,S2 or LABEL:VALUE,VALUE, got none.")
    from basin_lens.cli.study_runs import run_studies
    from basin_lens.studies.contrast_study import ContrastOptions

    run_studies({"contrast": ContrastOptions()}, texts, how, {"contrast": run.out}, dry_run=run.dry_run)
