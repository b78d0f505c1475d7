"""Files of the codec, and what the command line writes."""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from computed.models import FAMILIES, Items, hf_model, model_of, texts, tokenizer

import basin_lens as bl
from basin_lens.texts import reference_passages

ROOT = Path(bl.__file__).parents[1]


def coded(method: str, backend: str, family: str = "llama", length: int = 2000, streams: int = 4) -> dict[str, Any]:
    codec = bl.codec.TextCodec(model_of(family), method, backend, streams, 40)
    text = " ".join(passage.text for passage in reference_passages())[:length]
    blob = codec.encode_text(*codec.prepared(text))
    assert codec.decode(blob).decode() == text
    return {"file": blob, "length": len(blob)}


def parts_of_codec() -> Items:
    for backend in bl.codec.RANK_CODERS:
        yield f"ranks {backend}", partial(coded, "ranks", backend)
    for family in FAMILIES:
        yield f"direct {family}", partial(coded, "direct", "range", family, 700, 1)
    yield "direct of several chunks", partial(coded, "direct", "range", "gpt2", 14_000, 16)
    codec, text = bl.codec.TextCodec(model_of("llama"), context=50), texts(1)[0].text
    yield "stored", lambda: codec.encode(text)
    yield "estimate", lambda: codec.estimate(text, streams=2).bits
    yield "table", lambda: codec.ranks(text, k=3)
    yield "growth", lambda: bl.codec.growth(codec, text, codec.ranks(text).bits.to_numpy(), points=5)
    yield "bench", lambda: bl.codec.bench(model_of("gpt2"), text, streams=1, context=50)


def parts_of_command() -> Items:
    """The command line, on files and a model folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf_model("llama").save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        for i, passage in enumerate(reference_passages()[:20]):
            (folder / f"{i:02}.txt").write_text(passage.text)
        files = sorted(path.name for path in folder.glob("*.txt"))

        def command(*arguments: str) -> None:
            line = [sys.executable, "-m", "basin_lens.cli", *arguments, "--model", "model"]
            done = subprocess.run(
                line, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

        def tables(out: str) -> dict[str, Any]:
            return {path.stem: bl.tables.load(path) for path in sorted((folder / out).rglob("*.parquet"))}

        def analyzed() -> dict[str, Any]:
            command("analyze", *files[:6], "--layers", "0,1", "--k", "5", "--max-length", "40", "--out", "a")
            return tables("a") | {"summary": pd.read_csv(folder / "a" / "summary.csv")}

        def studied() -> dict[str, Any]:
            command("study", "codelength", *files, "--layers", "1,2", "--k", "5", "--max-length", "48", "--out", "s")
            return tables("s")

        def compressed() -> bytes:
            command("compress", files[0], "--no-verify", "--streams", "1", "--out", "file")
            command("decompress", "file", "--out", "again")
            assert (folder / "again").read_bytes() == (folder / files[0]).read_bytes()
            return (folder / "file").read_bytes()

        def merger() -> dict[str, Any]:
            short = ["--steps", "2", "--length", "32", "--projection", "6", "--recent", "4", "--evaluate-every", "1"]
            command("merge", "train", "--data", *files, *short, "--target-rate", "0.3", "--out", "m")
            return {"merger": bl.merging.TokenMerger.load(folder / "m", bl.load_model(folder / "model"))}

        yield "analyze", analyzed
        yield "study", studied
        yield "compress", compressed
        yield "merge train", merger
