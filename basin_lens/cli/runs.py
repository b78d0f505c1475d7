"""`basin-lens analyze`: a run in a folder, which goes on where it was interrupted. `basin-lens status`: how far one is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from basin_lens import files as writing
from basin_lens.cli import options as shared
from basin_lens.errors import StoreError
from basin_lens.locks import is_own
from basin_lens.values import Facts

if TYPE_CHECKING:  # long to load: help does not wait for it
    import pandas

    from basin_lens.analyzers import Analyzer, Contraction
    from basin_lens.model import HookedModel
    from basin_lens.scoring.folder_run import FolderRequest, FolderRun
    from basin_lens.texts import Passage

_FILES = ("table", "summary.csv", "report.html")
_OURS = {"pieces", *_FILES}
Part = Annotated[str | None, typer.Option("--part", help="Only this share of the pieces, such as 3/16: a part of a Slurm array.")]
StoreDtype = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--store-dtype", help="Number format of states on disk.")
]
ShardTokens = Annotated[
    int | None,
    typer.Option(
        "--shard-tokens", min=1, help="Of more tokens, the work at a layer is cut into shards of about so many; 16384 if left out."
    ),
]
Studies = Annotated[
    str | None,
    typer.Option("--for", metavar="STUDIES", help="Also what these need, such as layers,codelength: study ... --from takes it."),
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Run blocks through torch.compile: half a minute first, then four fifths of the time.")
]
# Rows of a table (tokens times layers) up to which a report is made: it holds them all in memory.
MOST_REPORTED = 1_000_000


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command("analyze")(analyze)
    app.command("status")(status)


def analyze(
    files: shared.Files = None,
    model: shared.Model = shared.EMBEDDED,
    dataset: shared.Dataset = None,
    config: shared.Config = None,
    split: shared.Split = None,
    layers: shared.Layers = None,
    k: shared.K = 15,
    out: shared.Out = Path("basin-lens-out"),
    bank: shared.Bank = None,
    max_length: shared.MaxLength = 128,
    batch_size: shared.BatchSize = None,
    seed: shared.Seed = 0,
    marked: shared.Marked = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="Who does the pieces: this process, or actors of a Ray cluster (RAY_ADDRESS, or one here)."),
    ] = "local",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Ray actors; one for each core or GPU if left out.")
    ] = None,
    part: Part = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: delete what an earlier run left in the folder.")] = False,
    studies: Studies = None,
    keep_states: Annotated[bool, typer.Option("--keep-states", help="Leave the states of all layers in the folder.")] = False,
    store_dtype: StoreDtype = "float32",
    compiled: Compiled = False,
    shard_tokens: ShardTokens = None,
) -> None:
    """Score every token of text files or of a data set: a table in parts, a summary and a report.

    Interrupted or killed, the same command goes on where it was. A folder with another run in it is refused, unless --fresh.

    Examples: basin-lens analyze book.txt --layers 0-9 --out book/
              basin-lens analyze note.txt --bank reference
              basin-lens analyze --dataset nltk:treebank --engine ray --out run/
              basin-lens analyze corpus/*.txt --for layers,codelength --out run/
              basin-lens analyze corpus/*.txt --out run/ --part 3/16
    """
    _refuse_options(named=bool(files) or dataset is not None, engine=engine, workers=workers, part=part, fresh=fresh)
    from basin_lens.scoring.folder_run import FolderRequest, part_of
    from basin_lens.scoring.job import SHARD_TOKENS

    share, needed = None if part is None else part_of(part), _analyzers_for(studies, k)
    chosen, own_bank, size = shared.layers_of(layers), shared.bank_of(bank), shared.batch_size_of(batch_size)
    passages = shared.read_texts(files or [], dataset, config, split, None, marked=marked)
    with _prepared(out, files or [], together=share is not None):
        loaded = shared.load(model)
        analyzers, contraction = analyzers_of(k, needed)
        request = FolderRequest(
            analyzers,
            layers=chosen,
            bank=own_bank,
            max_length=max_length,
            batch_size=size,
            seed=seed,
            out=out,
            engine=engine,
            engine_options=None if workers is None else {"workers": workers},
            fresh=fresh,
            keep_states=keep_states,
            store_dtype=store_dtype,
            compile=compiled,
            shard_tokens=shard_tokens or SHARD_TOKENS,
        )
        _work(loaded, passages, request, contraction, out.resolve(), share)


def _refuse_options(*, named: bool, engine: str, workers: int | None, part: str | None, fresh: bool) -> None:
    if not named:
        raise typer.BadParameter("expected files or --dataset, got neither. Name some.")
    if workers is not None and engine != "ray":
        raise typer.BadParameter("expected --workers with --engine ray, got them without. Leave them out.")
    if part is not None and (fresh or engine == "ray"):
        raise typer.BadParameter("expected --part without --fresh and --engine ray: other parts work on the same folder.")


def _work(
    model: "HookedModel",
    passages: "list[Passage]",
    request: "FolderRequest",
    contraction: "Contraction",
    out: Path,
    share: tuple[int, int] | None,
) -> None:
    from basin_lens.scoring.folder_run import work, work_on_part
    from basin_lens.scoring.run_folder import RunFolder

    folder = RunFolder(out)
    if share is None:
        _show(work(folder, model, passages, request, keep=contraction), out)
        return
    done = work_on_part(folder, model, passages, request, share, lambda done: _show(done, out), keep=contraction)
    if isinstance(done, str):
        typer.echo(done)


def _show(done: "FolderRun", out: Path) -> None:
    """Write summary and report beside the table, delete the pieces, and print what came out."""
    from basin_lens import tables
    from basin_lens.views import make_report

    run = done.table
    summary = tables.layer_summary(run)
    tables.save_csv(summary, out / "summary.csv")
    rows = run.n_rows * len(run.layers)
    if rows > MOST_REPORTED:
        typer.echo(f"No report: {rows:,} rows, and it is for at most {MOST_REPORTED:,}. Load a part: bl.tables.open({str(out)!r}).")
    elif (neighbors := done.neighbors()) is not None or not (out / "report.html").exists():
        title = f"Where does {run.provenance['model']['name']} compress?"
        make_report(run.load(), neighbors=neighbors, title=title).save(out / "report.html")
    done.store.clear()
    print_summary(summary, run.provenance, [out / name for name in _FILES if (out / name).exists()])


def status(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="That analyze --out writes to.")]) -> None:
    """How far a run is: pieces done, and the time that is left at their pace.

    Example: basin-lens status run/
    """
    from basin_lens.scoring.run_folder import RunFolder

    told = RunFolder(folder.resolve()).status()
    typer.echo(f"tokens    {told.tokens:,}")
    typer.echo(f"reading   {told.read} of {told.read_of} pieces")
    shards = f", {told.shards} of {told.shards_of} pieces" if told.shards_of > told.scored_of else ""
    typer.echo(f"scoring   {told.scored} of {told.scored_of} layers{shards}")
    if told.finished:
        typer.echo("finished  the table is there: bl.tables.open(folder)")
    else:
        left = "not known yet" if told.seconds_left is None else f"about {_duration(told.seconds_left)} at the pace so far"
        typer.echo(f"left      {left}; {told.holder or 'nobody'} works on it")


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{hours:.1f} h"


@contextmanager
def _prepared(out: Path, inputs: list[Path], *, together: bool) -> Iterator[None]:
    """Hold the folder of a run, alone or together with other parts; one that cannot take it is refused before any long work."""
    writing.check_name(out)
    if out.resolve() == Path.cwd():
        raise StoreError(f"expected a folder for the results, got {str(out)!r}, in which you stand. Name one in it with --out.")
    writing.check_folder(out.resolve())
    with writing.lock_folder(out, shared=together):
        writing.check_no_inputs(out, inputs)
        # Without a plan, results under our names are somebody else's; of pieces, an interrupted run may have begun some.
        ours = _OURS if (out / "pieces" / "plan.json").is_file() else {"pieces"}
        if others := sorted(path.name for path in out.glob("*") if path.name not in ours and not is_own(path.name)):
            raise StoreError(
                f"expected an empty folder or an earlier run's, got {str(out)!r} with {others[0]!r} in it. Choose --out."
            )
        yield


def analyzers_of(k: int, needed: "Sequence[Analyzer]" = ()) -> "tuple[list[Analyzer], Contraction]":
    """What the command measures; contraction is of every token, for the neighbors in the page. `needed`: by studies."""
    from basin_lens.analyzers import SAMPLED, Compression, Contraction, Neighborhood, RawCompression, StateNorm, Surprisal

    contraction = Contraction(k=k)
    headline = next((one for one in needed if isinstance(one, Compression)), Compression(k=k, queries=SAMPLED))
    usual = [headline, contraction, RawCompression(k=k), Neighborhood(k=k), Surprisal(), StateNorm()]
    return [*usual, *(one for one in needed if one not in usual)], contraction


def _analyzers_for(studies: str | None, k: int) -> "list[Analyzer]":
    """The analyzers of studies named as one,other."""
    if studies is None:
        return []
    from basin_lens.studies import analyzers_for

    return analyzers_for(*(name.strip() for name in studies.split(",")), k=k)


def print_summary(summary: "pandas.DataFrame", facts: Facts, files: list[Path]) -> None:
    """Print the curve of the headline score, what it was measured on, and where the files are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def shown(*values: float) -> str:
        return " ".join(f"{value:+.3f}" for value in values).replace("+nan +nan", "none (1 document)")

    console = Console(markup=False, highlight=False)
    lines = Table(title="compression by layer, means over documents [nats]", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("layer", "mean", "95 % interval", "random sets", "isotropic", "halves", "local"):
        lines.add_column(name, justify="right", no_wrap=True)
    for row in summary.to_dict("records"):
        lines.add_row(
            str(row["layer"]),
            shown(row["compression_mean"]),
            shown(row["compression_low"], row["compression_high"]),
            shown(row["compression_random_sets_mean"]),
            shown(row["compression_isotropic_mean"]),
            f"{row['compression_reliability']:.2f}",
            f"{row['compression_local']:.2f}" if "compression_local" in row else "-",
        )
    console.print(lines)
    first = summary.iloc[0]
    console.print(
        f"{int(first['n_tokens'])} tokens, {int(first['n_sequences'])} sequences, {int(first['n_documents'])} documents; model: "
        f"{facts['model']['name']}; transport and slower routes agree to {max(facts['check_error'].values()):.0e} of the states' "
        "scale."
    )
    measured = round((1 - summary["compression_nan"].min()) * int(first["n_tokens"]))
    console.print(
        f"Compression is of at most {measured} tokens per layer, in groups of 4 from different documents. Positive: differences "
        "between a token's neighbors are drawn together more at its own place than at others (a basin). Negative: the block tells "
        "apart what is near. Beside it the same for random sets and for random directions; halves: reliability over halves of the "
        "neighbors; local: the neighborhoods' median variance over that of random sets. No test was made."
    )
    for file in files:
        console.print(f"  {file}", soft_wrap=True)
