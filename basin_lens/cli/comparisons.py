"""`basin-lens contrast`: two kinds of tokens or texts in one model. `basin-lens compare`: the same texts in two models."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from basin_lens.cli import options as shared
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
    app.command("compare", short_help="What changes between two models or checkpoints on the same texts?")(compare)


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A model, as --model of other commands: a name, a file or a folder.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one of the same tokenizer, such as a fine-tuned checkpoint.")],
    files: shared.Files = None,
    dataset: shared.Dataset = None,
    config: shared.Config = None,
    split: shared.Split = None,
    marked: shared.Marked = False,
    frozen_neighbors: Annotated[
        bool, typer.Option("--frozen-neighbors", help="B measures the neighbors that A found: the change in the map alone.")
    ] = False,
    layers: shared.SomeLayers = None,
    k: shared.K = 15,
    max_length: shared.MaxLength = 128,
    compression_tokens: shared.CompressionTokens = 720,
    unit: shared.Unit = "document",
    seed: shared.Seed = 0,
    out: shared.Out = Path("basin-lens-compare"),
) -> None:
    """Set two models beside one another on the same texts: curves, the difference with its declared test, and where it is.

    Without files or --dataset, the built-in passages are read. Of fewer than 6 texts (one file is one text), windows of
    --max-length tokens are what the test is over, under a red flag: they are not independent.

    Examples: basin-lens compare smollm2-135m memorization-models/tuned texts.txt --out change/
              basin-lens compare smollm2-135m my-checkpoint --dataset nltk:treebank --layers 10,18 --frozen-neighbors
    """
    from basin_lens import files as writing
    from basin_lens import studies
    from basin_lens.cli.study_runs import say
    from basin_lens.studies.framework.measurement import refuse_unit
    from basin_lens.studies.framework.storage import refuse_folder

    if first == second:
        raise typer.BadParameter(f"expected two models, got {first!r} twice. A model beside itself does not change.")
    refuse_folder(out, "compare", files or [])
    wanted: list[int] | Literal["all"] | None = "all" if layers == "all" else shared.layers_of(layers)
    passages = shared.read_texts(files or [], dataset, config, split, None, marked=marked)
    refuse_unit(passages, unit)
    with ExitStack() as held:
        held.enter_context(writing.lock_folder(out))
        a, b = shared.load(first), shared.load(second)
        study = studies.compare_models(
            a,
            b,
            passages,
            names=(first, second),
            frozen_neighbors=frozen_neighbors,
            layers=wanted,
            k=k,
            max_length=max_length,
            compression_tokens=compression_tokens,
            unit=unit,
            seed=seed,
        )
        say(study, out)


def _contrast(run: RunOptions, texts: TextOptions, how: MeasureOptions) -> None:
    if how.contrast is None:
        raise typer.BadParameter("expected --by with what is to be compared, such as span:IO,S2 or LABEL:VALUE,VALUE, got none.")
    from basin_lens.cli.study_runs import run_studies
    from basin_lens.studies.contrast_study import ContrastOptions

    run_studies({"contrast": ContrastOptions()}, texts, how, {"contrast": run.out}, dry_run=run.dry_run)
