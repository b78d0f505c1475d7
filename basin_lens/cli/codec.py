"""The command line of the codec: `basin-lens compress | decompress | codec-info | codec-bench | codec-view`.

What is said goes to the error stream: the output stream may carry the file.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from basin_lens import files as writing
from basin_lens.cli.options import Model
from basin_lens.errors import CodecError, StoreError
from basin_lens.model import HookedModel

if TYPE_CHECKING:  # long to load: help does not wait for it
    import pandas

_SUFFIX = ".blz"

OutFile = Annotated[str | None, typer.Option("--out", help="Where to write; - for the output stream.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output file that is there.")]


def add_commands(app: typer.Typer) -> None:
    """Register the codec's commands."""
    app.command()(compress)
    app.command()(decompress)
    app.command("codec-info")(codec_info)
    app.command("codec-bench")(codec_bench)
    app.command("codec-view")(codec_view)


def compress(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Any file; - for the input stream.")],
    out: OutFile = None,
    model: Model = "smollm2-135m",
    method: Annotated[str, typer.Option("--method", help="direct (smallest) or ranks.")] = "direct",
    backend: Annotated[str | None, typer.Option("--backend", help="ranks: zlib, huffman, adaptive, zipf or entropy.")] = None,
    streams: Annotated[int, typer.Option("--streams", help="Most streams that advance together: faster, a little larger.")] = 16,
    context: Annotated[int, typer.Option("--context", help="Tokens after which a stream starts anew.")] = 512,
    force: Force = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Decode the result and compare before it is written.")
    ] = True,
) -> None:
    """Compress a file with the model's predictions, without loss: FILE.blz. Text gets small; other files are stored by zstd.

    The file can be read again only with the same model, on the same kind of processor, with the same versions of torch and the
    others. The model is not counted in its size. A book takes hours: about 100 tokens per second on two cores.

    Examples: basin-lens compress book.txt
              basin-lens compress book.txt --method ranks --backend huffman --out ranks.blz
              cat book.txt | basin-lens compress - > book.blz
    """
    from basin_lens.codec import TextCodec, read

    target = _target(out or ("-" if file == "-" else file + _SUFFIX), force, file)
    _refuse_terminal(target)
    data = _read(file)
    codec = TextCodec(_load(model), method, backend, streams, context, progress=True)
    blob = codec.encode(data, verify=verify)
    _write(blob, target, force, file)
    made = read(blob)
    share = f", {8 * len(blob) / len(data):.3f} bits per byte" if data else ""
    _say(f"{len(data)} -> {len(blob)} bytes{share} (header {len(made.header())}); method {made.method}, back end {made.backend}")
    if made.setting is None and made.why != "not told":
        _say(f"stored without the model: {made.why}")


def decompress(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What compress wrote; - for the input stream.")],
    out: OutFile = None,
    model: Model = "smollm2-135m",
    force: Force = False,
) -> None:
    """Give back the bytes that were compressed; FILE without .blz, or --out.

    Nothing is written unless the text's SHA-256 is right. Files stored without the model need none.

    Examples: basin-lens decompress book.txt.blz
              basin-lens decompress - < book.blz > book.txt
    """
    from basin_lens.codec import TextCodec, read

    if out is None and file != "-" and not file.endswith(_SUFFIX):
        raise typer.BadParameter(f"expected a name that ends in {_SUFFIX}, or --out, got {file!r}.")
    target = _target(out or ("-" if file == "-" else file.removesuffix(_SUFFIX)), force, file)
    blob = _read(file)
    found = read(blob)
    data = found.restored() if found.setting is None else TextCodec(_load(model), progress=True).decode(blob)
    if not _is_text(data):
        _refuse_terminal(target)
    _write(data, target, force, file)
    _say(f"{len(blob)} -> {len(data)} bytes, SHA-256 as written")


def codec_info(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What compress wrote; - for the input stream.")],
) -> None:
    """Show what is written in a compressed file; loads no model.

    Example: basin-lens codec-info book.txt.blz
    """
    from basin_lens.codec import read

    blob = _read(file)
    found = read(blob)
    lines: dict[str, object] = {
        "method": found.method,
        "back end": found.backend,
        "original": f"{found.length} bytes",
        "file": f"{len(blob)} bytes",
        "header": f"{len(found.header())} bytes",
        "chunks": len(found.chunks),
        "SHA-256": found.sha256.hex(),
    }
    if found.length:
        lines["bits per byte"] = f"{8 * len(blob) / found.length:.3f}"
    if found.setting is None:
        lines["why no model"] = found.why
    else:
        setting = found.setting
        lines |= {
            "tokens": setting.tokens,
            "streams": setting.streams,
            "window": setting.window,
            "windows a chunk": setting.windows,
            "threads": setting.threads,
            "dtype": setting.dtype,
            "start token": setting.start,
            "model": setting.model.hex(),
            "tokenizer": setting.tokenizer.hex(),
            "probe": setting.probe.hex(),
            "environment": setting.environment,
        }
    for name, value in lines.items():
        typer.echo(f"{name:<16} {value}")


def codec_bench(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Text files (UTF-8).")],
    out: Annotated[Path, typer.Option("--out", help="Folder for codec-bench.csv and codec-bench.png.")] = Path("basin-lens-bench"),
    models: Annotated[
        list[str] | None, typer.Option("--model", help="As elsewhere (smollm2-135m); once more for another beside it.")
    ] = None,
    streams: Annotated[int, typer.Option("--streams", help="Most streams that advance together.")] = 16,
    context: Annotated[int, typer.Option("--context", help="Tokens after which a stream starts anew.")] = 512,
    force: Force = False,
) -> None:
    """Every back end beside gzip, bzip2, xz, zstd, brotli and PPMd: a table, a CSV file and a figure (of all files together).

    Each file is read by each model four times. The weights are not counted; famous text was probably seen in training. A file that
    cannot be measured is named and left out; the exit code is then 1.

    Examples: basin-lens codec-bench chapter.txt --out bench/
              basin-lens codec-bench chapter.txt --model smollm2-135m --model EleutherAI/pythia-160m
    """
    import pandas as pd

    from basin_lens.tables import csv_text
    from basin_lens.views import size_bars

    names = list(dict.fromkeys(models or ["smollm2-135m"]))
    with writing.lock_folder(out):
        targets = [_target(str(out / f"codec-bench.{kind}"), force, *files) for kind in ("csv", "png")]
        tables, refused = _benches(files, names, streams, context)
        if not tables:
            raise CodecError(f"expected a file that can be measured, got none: {'; '.join(refused)}")
        table = pd.concat(tables, ignore_index=True)
        if len(names) > 1:
            table["coder"] = table["coder"] + table["model"].map(lambda name: f" ({name})" if name else "")
        sizes, count = ["original_bytes", "bytes", "header_bytes"], len(tables) // len(names)
        total = table.groupby(["coder", "kind"], sort=False, as_index=False)[sizes].sum(min_count=count)
        total["bits_per_byte"] = 8 * total["bytes"] / total["original_bytes"]
        drawn = io.BytesIO()
        title = f"Bits per byte, headers counted; {count} file{'s' * (count > 1)}; {', '.join(names)}"
        size_bars(total, title=title).savefig(drawn, format="png", dpi=150)
        _write(drawn.getvalue(), targets[1], force, *files)
        _write(csv_text(table).encode(), targets[0], force, *files)  # last: where it is, all is
    wide = max(18, int(table["coder"].str.len().max()))
    for row in table.to_dict("records"):
        gap = "" if pd.isna(row["gap_to_ideal"]) else f"  {row['gap_to_ideal']:+7.1%} over the ideal"
        size = (
            row["note"] if pd.isna(row["bytes"]) else f"{row['bytes']:>9.0f} bytes  {row['bits_per_byte']:.3f} bits per byte{gap}"
        )
        typer.echo(f"{row['file']}  {row['coder']:<{wide}} {size}")
    if refused:
        raise CodecError(f"expected files that can be measured, got {len(refused)} of {len(files)} left out: {'; '.join(refused)}")


def _benches(files: list[str], names: list[str], streams: int, context: int) -> "tuple[list[pandas.DataFrame], list[str]]":
    """A table for each model and file, and why files are left out: a file is measured by all models or by none."""
    from basin_lens.codec import bench

    texts: dict[int, bytes] = {}
    refused: dict[int, str] = {}
    made: dict[tuple[str, int], pandas.DataFrame] = {}

    def without(index: int, error: Exception) -> None:
        refused[index] = f"{files[index]}: {error}"
        texts.pop(index, None)
        _say(f"left out {refused[index]}")

    for index, file in enumerate(files):
        try:
            texts[index] = _read(file)
        except StoreError as error:
            without(index, error)
    for name in names if texts else []:
        loaded = _load(name)
        for index, data in list(texts.items()):
            try:
                table = bench(loaded, data, streams=streams, context=context, progress=True)
                table["file"] = _shown(files[index])
            except CodecError as error:
                without(index, error)
                continue
            own = table["kind"] == "model"
            # The general compressors know no model: once is enough.
            made[name, index] = table.assign(model=own.map({True: name, False: ""}))[own | (name == names[0])]
    return [table for (_, index), table in made.items() if index in texts], list(refused.values())


def codec_view(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A text file (UTF-8).")],
    out: Annotated[str, typer.Option("--out", help="The page.")] = "codec-view.html",
    model: Model = "smollm2-135m",
    context: Annotated[int, typer.Option("--context", help="Tokens after which the model starts anew.")] = 512,
    k: Annotated[int, typer.Option("--k", help="The model's first choices to show for each token.")] = 5,
    force: Force = False,
) -> None:
    """A page that works offline: each token by its bits and its rank, what the model expected, sizes along the text, ranks.

    Example: basin-lens codec-view chapter.txt --out page.html
    """
    from basin_lens.codec import TextCodec, growth
    from basin_lens.codec.rank_coders import fit_zipf, zipf
    from basin_lens.model import full_name, vocabulary_size
    from basin_lens.views import code_page

    target, data = _target(out, force, file), _read(file)
    loaded = _load(model)
    codec = TextCodec(loaded, context=context)
    table = codec.ranks(data, k=k)
    if table.empty:
        raise CodecError("expected a text, got an empty file.")
    ranks, vocab = table["rank"].to_numpy(), vocabulary_size(loaded)
    law = fit_zipf(ranks, vocab)
    shares = zipf(law, vocab)
    total = float(table["bits"].sum())
    facts = {
        "file": _shown(file),
        "model": full_name(loaded),
        "bytes": str(len(data)),
        "tokens": str(len(table)),
        "ideal size": f"{total / 8:.0f} bytes, {total / len(data):.3f} bits per byte",
        "bits per token": f"{total / len(table):.2f}",
        "first choice right": f"{(ranks == 0).mean():.1%}",
        "fitted law": f"(rank + 1 + {law[1]:.2f})^-{law[0]:.2f}",
    }
    sizes, title = growth(codec, data, table["bits"].to_numpy()), f"What does each token of {_shown(file)} cost?"
    page = code_page(table, title=title, facts=facts, growth=sizes, zipf=shares / shares.sum())
    _write(page.html.encode("utf-8"), target, force, file)
    _say(f"{out}: {total / len(data):.3f} bits per byte, first choice right {(ranks == 0).mean():.1%}")


def _load(name: str) -> HookedModel:
    from basin_lens.model import load_model

    _say(f"loading {name}")
    return load_model(name)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _shown(file: str) -> str:
    """A file's name as text, also where it is none."""
    return os.fsencode(file).decode("utf-8", "replace")


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise StoreError(f"expected a file that can be read, got {file!r}: {error.strerror}. Check the path.") from error


def _target(out: str, force: bool, *inputs: str) -> Path | None:
    """Where to write, refused before any long work if it is an input, or there without --force; None for the output stream."""
    target = Path("/dev/stdout" if out == "-" else out)
    if not force and target.exists() and not writing.is_stream(target):
        raise StoreError(f"expected an output that is not there yet, got {out!r}. Choose --out, or --force to replace a file.")
    writing.check_file(target, inputs=_opened(inputs))
    return None if out == "-" else target


def _opened(inputs: Sequence[str]) -> list[str | int]:
    """What is read: names, and the number of the input stream."""
    return [0 if name == "-" else name for name in inputs]


def _refuse_terminal(target: Path | None) -> None:
    if sys.stdout.isatty() if target is None else writing.is_terminal(target):
        raise StoreError("expected a file or a pipe for bytes that are no text, got a terminal. Choose --out, or pipe them on.")


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _write(data: bytes, target: Path | None, force: bool, *inputs: str) -> None:
    """The whole file or none, with the mode of what was read."""
    if target is None:
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # who reads has enough
            raise
        except OSError as error:
            raise StoreError(f"expected an output stream that can be written, got: {error.strerror}. Choose --out.") from error
        return
    _target(str(target), force, *inputs)
    writing.write_file(target, data, inputs=_opened(inputs), like=_opened(inputs)[0])
