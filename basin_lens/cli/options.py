"""Options that several commands share, each defined once, and the texts, layers and models that they name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from basin_lens.model import HookedModel
from basin_lens.texts import Passage

TEXTS = (
    "Text files, each a document (UTF-8, or UTF-16 with its mark); .jsonl, .ndjson, .json, .csv, .tsv, .parquet: each row is a "
    "text, with text, doc, labels, spans (not in CSV), and other columns as labels."
)
EMBEDDED = "smollm2-135m"
# Sequences per pass. Of 128 tokens each, that many hold half a million: no machine that this runs on takes more at once.
MOST_PER_PASS = 4096

Files = Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help=TEXTS)]
Marked = Annotated[
    bool, typer.Option("--marked", help="Spans are marked in the texts, [IO:Mary]; each line of a text file is a prompt.")
]
Model = Annotated[str, typer.Option("--model", help="smollm2-135m, a .gguf file, a model folder, or a name TransformerLens loads.")]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset", help="In place of files: built-in, nltk:treebank, nltk:brown, ..., or a data set's name, as wikitext."
    ),
]
Config = Annotated[str | None, typer.Option("--config", help="Of the data set, such as wikitext-103-raw-v1.")]
Split = Annotated[str | None, typer.Option("--split", help="Of a data set of the Hub or a local folder; test if left out.")]
MaxSequences = Annotated[
    int | None, typer.Option("--max-sequences", help="At most so many sequences, spread over the documents; all if left out.")
]
Layers = Annotated[str | None, typer.Option("--layers", help="Layers, such as 0,5,10 or 0-9; all if left out.")]
SomeLayers = Annotated[str | None, typer.Option("--layers", help="Layers, such as 0,5,10 or 0-9, or all; ten if left out.")]
K = Annotated[int, typer.Option("--k", help="Neighbors per token.")]
Context = Annotated[str, typer.Option("--context", help="How neighbors pass the block: patched, native, ...")]
Bank = Annotated[
    str | None,
    typer.Option("--bank", help='"reference": neighbors from the built-in passages, for short files or prompts of one template.'),
]
Exclude = Annotated[str, typer.Option("--exclude", help="Never neighbors: those of the same sequence, document, or a label.")]
Unit = Annotated[str, typer.Option("--unit", help="What is independent: document, sequence, or a label such as template.")]
Contrasted = Annotated[
    str | None, typer.Option("--contrast", "--by", help="Compare two kinds everywhere: span:IO,S or LABEL:VALUE,VALUE.")
]
CompressionTokens = Annotated[
    int,
    typer.Option(
        "--compression-tokens", min=4, help="At most so many tokens per layer have compression and its nulls, a seeded sample."
    ),
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="RUN",
        help="In place of measuring: a finished run of analyze --for. Its texts need not be named, but for words and spans.",
    ),
]
MaxLength = Annotated[int, typer.Option("--max-length", help="Tokens per sequence; longer texts become several.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Sequences per pass; chosen by memory if left out.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results; it must not hold others' files.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over, also where an earlier call has finished studies.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check texts, options and folder, and say what would be run; load no model, write nothing."),
]


@dataclass(frozen=True)
class TextOptions:
    """Where texts come from, and which model reads them."""

    files: Files = None
    marked: Marked = False
    model: Model = EMBEDDED
    dataset: Dataset = None
    config: Config = None
    split: Split = None
    max_sequences: MaxSequences = None
    k: K = 15
    seed: Seed = 0

    def passages(self, most: int | None = None) -> list[Passage]:
        """The texts; of a streamed data set at most `most`, or `max_sequences`."""
        most = self.max_sequences or most
        return read_texts(self.files or [], self.dataset, self.config, self.split, most, marked=self.marked)


@dataclass(frozen=True)
class MeasureOptions:
    """Of `basin_lens.studies.measure`, besides those of the texts."""

    layers: SomeLayers = None
    context: Context = "patched"
    bank: Bank = None
    exclude: Exclude = "sequence"
    unit: Unit = "document"
    contrast: Contrasted = None
    max_length: MaxLength = 128
    compression_tokens: CompressionTokens = 720
    run: From = None


@dataclass(frozen=True)
class RunOptions:
    """Where results go, and whether there are to be any."""

    out: Out = Path("basin-lens-out")
    dry_run: DryRun = False


@dataclass(frozen=True)
class AgainOptions:
    """What becomes of what an earlier call finished."""

    fresh: Fresh = False


def load(name: str) -> HookedModel:
    """A model by its name, which is said."""
    from basin_lens.model import load_model

    typer.echo(f"loading {name}")
    return load_model(name)


def read_texts(
    files: list[Path], dataset: str | None, config: str | None, split: str | None, most: int | None, *, marked: bool = False
) -> list[Passage]:
    """Texts from files or a named data set, all of it before a model is loaded. `marked`: see `texts.read_marked`."""
    from basin_lens.texts import read_dataset, read_marked, read_passages

    if files and dataset is not None:
        raise typer.BadParameter("expected files or --dataset, got both. Leave one of them out.")
    if dataset is None and (split is not None or config is not None):
        raise typer.BadParameter("expected --dataset with --split or --config, got none; files have no splits. Leave them out.")
    if marked and not files:
        raise typer.BadParameter("expected files with --marked, got none: spans are marked in texts of one's own. Name some.")
    if files:
        return read_marked(files) if marked else read_passages(files)
    name = "built-in" if dataset is None else dataset
    # A streamed data set can be endless; corpora and the built-in passages are read whole, so that sequences can be spread over
    # them.
    whole = name == "built-in" or name.startswith("nltk:")
    typer.echo(f"reading {name}")
    return list(read_dataset(name, config=config, split=split, max_passages=None if whole else most))


def batch_size_of(given: int | None) -> int | None:
    """Sequences per pass, refused before a model is loaded where they are none or too many."""
    if given is not None and not 1 <= given <= MOST_PER_PASS:
        raise typer.BadParameter(
            f"expected --batch-size from 1 to {MOST_PER_PASS}, got {given}. Leave it out: it is then chosen by memory."
        )
    return given


def bank_of(given: str | None) -> Literal["reference"] | None:
    """Where neighbors come from, as the command line has it."""
    if given is None or given == "reference":
        return None if given is None else "reference"
    raise typer.BadParameter(f"expected --bank reference, got {given!r}. Leave it out: the texts are then their own bank.")


def named_layers(text: str) -> list[int]:
    """Layers named as 0,5,10 or 0-9.

    Raises:
        ValueError: named otherwise.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        some = range(int(first), int(last if dash else first) + 1)
        if not some:
            raise ValueError(f"no layer from {first} to {last}")
        found += some
    return found


def layers_of(text: str | None) -> list[int] | None:
    """Layers named as 0,5,10 or 0-9; None for none named."""
    try:
        return None if text is None else named_layers(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected layers such as 0,5,10 or 0-9, got {text!r}.") from error
