"""Options that several commands share, each defined once, and commands made from dataclasses of options."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from basin_lens.cli.merge import named_layers

TEXTS = (
    "Text files, each a document (UTF-8, or UTF-16 with its mark); .jsonl, .ndjson, .json, .csv, .tsv, .parquet: each row is a "
    "text, with text, doc, labels, spans (not in CSV), and other columns as labels."
)
EMBEDDED = "smollm2-135m"

Files = Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help=TEXTS)]
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
Contrasted = Annotated[str | None, typer.Option("--contrast", help="Compare two kinds everywhere: span:IO,S or LABEL:VALUE,VALUE.")]
MaxLength = Annotated[int, typer.Option("--max-length", help="Tokens per sequence; longer texts become several.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Sequences per pass; chosen by memory if left out.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results; it must not hold others' files.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.")]


@dataclass(frozen=True)
class TextOptions:
    """Where texts come from, and which model reads them."""

    files: Files = None
    model: Model = EMBEDDED
    dataset: Dataset = None
    config: Config = None
    split: Split = None
    max_sequences: MaxSequences = None
    k: K = 15
    seed: Seed = 0

    def passages(self, most: int | None = None) -> list[Any]:
        """The texts; of a streamed data set at most `most`, or `max_sequences`."""
        return read_texts(self.files or [], self.dataset, self.config, self.split, self.max_sequences or most)


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


def load(name: str) -> Any:
    """A model by its name, which is said."""
    from basin_lens.model import load_model

    typer.echo(f"loading {name}")
    return load_model(name)


def read_texts(files: list[Path], dataset: str | None, config: str | None, split: str | None, most: int | None) -> list[Any]:
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
    whole = name == "built-in" or name.startswith("nltk:")
    typer.echo(f"reading {name}")
    return list(read_dataset(name, config=config, split=split, max_passages=None if whole else most))


def layers_of(text: str | None) -> list[int] | None:
    """Layers named as 0,5,10 or 0-9; None for none named."""
    try:
        return None if text is None else named_layers(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected layers such as 0,5,10 or 0-9, got {text!r}.") from error


# -- commands from dataclasses ------------------------------------------------------------------------------------------------------


def command_of(function: Callable[..., None], *kinds: type, out: Path) -> Callable[..., None]:
    """A function that typer makes a command of: its parameters are the fields of dataclasses, and `out`.

    A field is a parameter if its type is an `Annotated` one of typer's, or if its metadata hold a `help`. One that stands
    in several dataclasses is one option and goes to all of them.

    Args:
        function: called with an instance of each dataclass, then the folder.
        kinds: the dataclasses.
        out: default of the folder.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for kind in kinds:
        parameters = {**{parameter.name: parameter for parameter in _parameters(kind)}, **parameters}
    parameters["out"] = inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=out, annotation=Out)

    def command(**given: Any) -> None:
        held = [kind(**{one.name: given[one.name] for one in fields(kind) if one.name in given}) for kind in kinds]
        function(*held, given["out"])

    command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return command


def _parameters(kind: type) -> list[inspect.Parameter]:
    """One for each field that the command line offers."""
    answer = []
    hints = get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        annotation = hints[one.name]
        if not hasattr(annotation, "__metadata__"):
            if "help" not in one.metadata:
                continue
            of_type = str | None if one.metadata.get("model") else annotation
            annotation = Annotated[of_type, typer.Option(f"--{one.name.replace('_', '-')}", help=one.metadata["help"])]
        default = one.default if one.default_factory is MISSING else one.default_factory()
        answer.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return answer
