"""The command line of token merging: `basin-lens merge train | test | generate`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import typer

from basin_lens import files as writing
from basin_lens.cli import options as shared
from basin_lens.cli.dataclass_options import options_of, taking
from basin_lens.errors import MergeError
from basin_lens.merging.options import Options
from basin_lens.merging.training_options import Training
from basin_lens.model import HookedModel
from basin_lens.texts import Passage
from basin_lens.values import Facts

if TYPE_CHECKING:  # long to load: help does not wait for them
    import basin_lens.merging.training
    import basin_lens.merging.windows

app = typer.Typer(
    help="Causal token merging: train where a model may merge, test it beside baselines, write with a compressed cache.",
    no_args_is_help=True,
)

# Steps, window length, windows to train on, held out, to calibrate and to test on.
# With fewer to test on, no sign flips of whole documents could pass Holm over two budgets and two rivals.
_FEW_DOCUMENTS = 8
_MOST_HELD = 0.4  # of the windows, to set budgets or to watch a training by
_ROWS_PER_WINDOW = 20
PRESETS = {"quick": (40, 128, 96, 8, 8, 16), "full": (400, 256, 1000, 24, 24, 64)}

Data = Annotated[
    list[Path] | None,
    typer.Option("--data", help="Text files; .jsonl, .json, .csv, .tsv, .parquet: each row a text (text, doc); more may follow."),
]
More = Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More of --data.")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="In place of files: built-in, nltk:brown, ..., or a data set's name.")
]
Config = Annotated[
    str | None, typer.Option("--config", help="Of the data set, such as wikitext-103-raw-v1, or news of nltk:brown.")
]
Split = Annotated[
    str | None,
    typer.Option("--split", help="Of a data set of the Hub or a local folder; if left out, train to train and test to test."),
]
Preset = Annotated[str, typer.Option("--preset", help="quick (minutes) or full (hours): steps, window length, number of windows.")]
Length = Annotated[int | None, typer.Option("--length", help="Tokens per window; from the preset if left out.")]


# Those of `Training`; the number of steps is the preset's, and one seed is for all.
_TRAINING = options_of(Training, without=("seed",), defaults={"steps": None})
_MERGER = options_of(Options, defaults={"adaptive": True, "projection": 32}, flags={"adaptive": "--adaptive/--fixed"})


@app.command("train")
@taking(_MERGER, _TRAINING)
def train(
    files: More = None,
    data: Data = None,
    dataset: Dataset = None,
    config: Config = None,
    split: Split = None,
    model: shared.Model = "smollm2-135m",
    preset: Preset = "quick",
    layers: shared.Layers = None,
    length: Length = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the merger; an interrupted training goes on from it.")] = Path(
        "merger"
    ),
    seed: shared.Seed = 0,
    **options: object,
) -> None:
    """Train thresholds, what moves them, and the projection by the language model's own loss; the base model is frozen.

    Without files or --dataset, the built-in passages are read: enough to try, not to publish. The number of steps is the preset's,
    if it is left out; without a target or a threshold, half of the tokens are merged.

    Examples: basin-lens merge train --data book.txt --progressive --target-rate 0.5 --out run/
              basin-lens merge train --dataset nltk:brown --target-bytes 0.5 --out run/
    """
    from basin_lens.merging import TokenMerger, surprisal_for, train_merger, windows_of
    from basin_lens.model import device_of
    from basin_lens.views import training_curves

    n_steps, n_length, n_train, n_held, *_ = _preset(preset)
    asked: dict[str, Any] = {one.name: options[one.name] for one in _MERGER}
    if all(asked[name] is None for name in ("target_rate", "target_bytes", "threshold")):
        asked["target_rate"] = 0.5
    texts = _texts(data, files, dataset, config, split, n_train + n_held, own="train")
    chosen: dict[str, Any] = {one.name: options[one.name] for one in _TRAINING}
    if chosen["steps"] is None:
        chosen["steps"] = n_steps
    training = Training(**chosen, seed=seed)
    with writing.lock_folder(out, MergeError):
        _unfinished(out)
        loaded = _load(model)
        merger = TokenMerger(_layers(layers, loaded), **asked, seed=seed)
        windows = windows_of(loaded, texts, length or n_length, most=n_train + n_held)
        held, own = _apart(windows, n_held)
        watched = len(_others(held, own, "to train on"))  # train_merger leaves the same out, and keeps how many
        typer.echo(
            f"{len(own)} windows of {own.tokens.shape[1]} tokens to train on, {watched} held out; {training.steps} steps of "
            f"{training.batch_size}."
        )
        first = own.tokens[: max(4, n_held)].to(device_of(loaded))
        merger.calibrate(loaded, first, surprisal=surprisal_for(merger, loaded, first))

        def also(made: "basin_lens.merging.training.Trained") -> None:
            writing.write_file(out / "training.png", lambda path: training_curves(made.history).savefig(path, dpi=150))

        made = train_merger(merger, loaded, own, held, training=training, folder=out, also=also)
        last = made.history.iloc[-1]
        typer.echo(
            f"last step: excess {last.excess:+.3f} nats per token, {last.rate:.2f} of the tokens merged (target {last.target:.2f})"
        )
        if training.train_base:
            typer.echo(
                f"base model: drift {made.drift:+.4f} nats per token on held-out text without merging; kept in {out / 'base'}"
            )
        typer.echo(f"wrote {out}")


@app.command("test")
def compare(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What train wrote; - for no training: baselines alone.")],
    files: More = None,
    data: Data = None,
    dataset: Dataset = None,
    config: Config = None,
    split: Split = None,
    model: Annotated[str | None, typer.Option("--model", help="smollm2-135m if left out, or RUN's trained base.")] = None,
    preset: Preset = "quick",
    budgets: Annotated[str, typer.Option("--budgets", help="Shares of the full cache to be left.")] = "0.75,0.5",
    seeds: Annotated[int, typer.Option("--seeds", help="Of random merging.")] = 5,
    layers: shared.Layers = None,
    length: Length = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for tables, figures and report.")] = Path("merging"),
    seed: shared.Seed = 0,
) -> None:
    """Set the merger beside all baselines at equal bytes, on texts it has not seen: table, Pareto figure, report.

    What the merger was trained on is left out, and said. Of fewer than 8 documents to test on, every window counts as one, and the
    report says so.

    Examples: basin-lens merge test run/ --data other.txt another.txt --out merging/
              basin-lens merge test run/ --dataset nltk:treebank
    """
    from basin_lens import studies
    from basin_lens.merging import Setting, TokenMerger
    from basin_lens.merging.training_log import read_log
    from basin_lens.studies.framework.storage import refuse_folder

    _, n_length, _, _, n_calibration, n_test = _preset(preset)
    refuse_folder(out, "merging", [*(data or []), *(files or [])])
    shares = _shares(budgets)
    texts = _texts(data, files, dataset, config, split, n_calibration + n_test, own="test")
    if str(run) != "-":
        _trained(run)
    loaded = _load(str(run / "base") if model is None and (run / "base").is_dir() else model or "smollm2-135m")
    merger = None if str(run) == "-" else TokenMerger.load(run, loaded)
    known = {} if merger is None else merger.facts.get("training", {})
    size = length or (int(known["length"]) if known.get("seen") else n_length)
    windows = _unseen_windows(loaded, texts, known, size, n_calibration + n_test)
    calibration, held_out = _apart(windows, n_calibration)
    held_out = _others(held_out, calibration, "that set budgets")
    if (count := len(set(held_out.doc))) < _FEW_DOCUMENTS and not held_out.pieces:
        typer.echo(f"{count} documents to test on are few: every window of {size} tokens counts as one", err=True)
        held_out = held_out.in_pieces()
    chosen = merger.options.layers if merger is not None else tuple(_layers(layers, loaded))
    setting = Setting(chosen, shares, seeds=seeds)
    if merger is not None:
        setting = replace(setting, recent=merger.options.recent, projection=merger.options.projection or 32)
    history = None if merger is None or "steps" not in known else read_log(run, int(known["steps"]))
    made = studies.study_merging(loaded, calibration, held_out, setting, merger=merger, history=history, seed=seed)
    made.save(out)
    typer.echo("\n".join(made.verdict))
    typer.echo(f"wrote {out / 'report.html'}")


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What train wrote.")],
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from.")],
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the most likely token each time.")] = 0.0,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Share of the cache to be left, set on the prompt's model and built-in texts.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="smollm2-135m if left out, or RUN's trained base.")] = None,
    past_end: Annotated[bool, typer.Option("--past-end", help="Go on behind the end of the text.")] = False,
    seed: shared.Seed = 0,
) -> None:
    """Write with a compressed key/value cache, and say how large it is. It stops where the model ends the text.

    Example: basin-lens merge generate run/ --prompt "The lamp hums in the wind, and" --tokens 80
    """
    import torch

    from basin_lens.merging import TokenMerger, fit_budget, windows_of
    from basin_lens.merging import generate as write
    from basin_lens.model import end_tokens, n_context, needed_tokenizer, uses_bos
    from basin_lens.texts import reference_passages

    _trained(run)
    loaded = _load(str(run / "base") if model is None and (run / "base").is_dir() else model or "smollm2-135m")
    merger = TokenMerger.load(run, loaded)
    ids = needed_tokenizer(loaded)(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise MergeError("expected a prompt of one token or more, got none. Give --prompt.")
    first = uses_bos(loaded, None)
    begun = list(ids) if first is None else [first, *ids]
    if budget is not None:
        fit_budget(merger, loaded, windows_of(loaded, list(reference_passages()), min(128, n_context(loaded)), most=8), budget)
    made, table = write(
        merger, loaded, torch.tensor([begun]), tokens, temperature=temperature, seed=seed, past_end=past_end, progress=True
    )
    written = made[0].tolist()
    ended = not past_end and written[-1] in end_tokens(loaded)
    typer.echo(prompt + _behind(needed_tokenizer(loaded), ids, written[:-1] if ended else written))
    if ended:
        typer.echo(f"the text ends after {len(written) - 1} tokens; --past-end goes on", err=True)
    held, full = int(table["bytes"].sum()), int(table["full_bytes"].sum())
    rows, whole = int(table["rows"].sum()), int(table["full_rows"].sum())
    typer.echo(f"\ncache: {held:,} of {full:,} bytes ({held / full:.2f}), {rows:,} of {whole:,} rows in {len(table)} layers")


@runtime_checkable
class _Decodes(Protocol):
    """What `_behind` asks of a tokenizer."""

    def decode(self, token_ids: list[int], **options: bool) -> object: ...


def _behind(tokenizer: _Decodes, prompt: list[int], written: list[int]) -> str:
    """What was written, as it reads behind the prompt: by themselves, tokens lose the space before them, or part of a character."""
    before, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for ids in (prompt, prompt + written)
    )
    # Up to where they differ: a character that the prompt's last token only began is whole now.
    same = next(
        (at for at, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other), min(len(before), len(whole))
    )
    return whole[same:]


def _preset(name: str) -> tuple[int, int, int, int, int, int]:
    if name not in PRESETS:
        raise MergeError(f"expected preset {' or '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise MergeError(f"expected shares such as 0.75,0.5, got {text!r}.") from error


def _texts(
    data: list[Path] | None,
    more: list[Path] | None,
    dataset: str | None,
    config: str | None,
    split: str | None,
    windows: int,
    *,
    own: str,
) -> list[Passage]:
    """Texts from files or a named data set, all of it before a model is loaded; of one that is streamed, enough for so many
    windows.

    `own`: the split of a data set that has some, where none is named.
    """
    from basin_lens.texts import has_splits, read_dataset, read_passages, reference_passages

    files = [*(data or []), *(more or [])]
    if files and dataset is not None:
        raise MergeError("expected files or --dataset, got both.")
    if dataset is None and (split is not None or config is not None):
        raise MergeError("expected --dataset with --split or --config, got none; files have no splits. Leave them out.")
    if files:
        return read_passages(files)
    if dataset is None:
        return list(reference_passages())
    # Such a data set can be endless, and its rows shorter than a window.
    most = None if dataset == "built-in" or dataset.startswith("nltk:") else _ROWS_PER_WINDOW * windows
    chosen = own if split is None and has_splits(dataset) else split
    return list(read_dataset(dataset, config=config, split=chosen, max_passages=most))


def _unseen_windows(
    model: HookedModel, texts: list[Passage], known: Facts, size: int, most: int
) -> "basin_lens.merging.windows.Windows":
    """Windows without those of the merger's training, of which `known` is what the merger keeps; what is left out is said."""
    from basin_lens.merging import windows_of
    from basin_lens.merging.windows import without_seen

    if known.get("seen") and "seen_texts" not in known:
        typer.echo(
            "the merger does not say which texts it was trained on, its windows alone: look to it that these are others", err=True
        )
    windows = windows_of(model, _unseen(texts, set(known.get("seen_texts", []))), size, most=most)
    windows, copied = without_seen(windows, known)
    if not len(windows):
        raise MergeError(
            f"expected texts that the merger was not trained on, got {copied} windows of its training. Give other texts."
        )
    if copied:
        typer.echo(f"left out {copied} windows that are copies of what the merger was trained on", err=True)
    return windows


def _unseen(texts: list[Passage], seen: set[str]) -> list[Passage]:
    """Without the texts of the merger's training, which is said."""
    from basin_lens.merging.windows import text_digest

    rest = [passage for passage in texts if text_digest(passage.text) not in seen]
    if not rest:
        raise MergeError(f"expected texts that the merger was not trained on, got {len(texts)} of its training. Give other texts.")
    if len(rest) < len(texts):
        typer.echo(f"left out {len(texts) - len(rest)} texts that the merger was trained on", err=True)
    return rest


def _apart(
    windows: "basin_lens.merging.windows.Windows", wanted: int
) -> "tuple[basin_lens.merging.windows.Windows, basin_lens.merging.windows.Windows]":
    """About so many windows, of whole documents, and those of the others; of one document, its first windows and the others,
    which is said.
    """
    if len(set(windows.doc)) < 2:
        typer.echo("one text: its first windows are set apart from the others", err=True)
        windows = windows.in_pieces()
    return windows.apart(min(wanted / len(windows), _MOST_HELD))


def _others(
    held: "basin_lens.merging.windows.Windows", own: "basin_lens.merging.windows.Windows", what: str
) -> "basin_lens.merging.windows.Windows":
    """Held-out windows that are no copies of those beside them; what is left out is said."""
    rest, copied = held.without_copies_of(own)
    if not len(rest):
        raise MergeError(
            f"expected other texts to hold out, got {copied} windows that are copies of windows {what}. Give other texts."
        )
    if copied:
        typer.echo(f"left out {copied} of {len(held)} held-out windows: copies of windows {what}", err=True)
    return rest


def _layers(text: str | None, model: HookedModel) -> list[int]:
    from basin_lens.model import n_layers

    try:
        return list(range(n_layers(model))) if text is None else shared.named_layers(text)
    except ValueError as error:
        raise MergeError(f"expected layers such as 0,5,10 or 0-9, got {text!r}.") from error


def _trained(run: Path) -> None:
    """Before any long work."""
    if not (run / "merger.json").is_file():
        raise MergeError(
            f"expected a folder that merge train wrote, with merger.json, got {str(run)!r}. Train first, or name another."
        )


def _unfinished(folder: Path) -> None:
    """Before any long work: a folder that holds no finished merger."""
    from basin_lens.merging.training_log import clear_checkpoint, refuse_foreign_log

    refuse_foreign_log(folder)
    if (folder / "merger.json").exists():
        clear_checkpoint(folder)
        raise MergeError(
            f"expected a new folder or one of an interrupted training, got {str(folder)!r} with a finished merger. Choose "
            "another, or delete it."
        )


def _load(name: str) -> HookedModel:
    from basin_lens.model import load_model

    typer.echo(f"loading {name}", err=True)
    return load_model(name)
