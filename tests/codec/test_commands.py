"""The codec's commands."""

import hashlib
import io
import os
import re
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from basin_lens import codec
from basin_lens.cli import app as cli
from basin_lens.cli import codec as cli_codec
from basin_lens.codec import container, lockstep
from tests.codec.coded import TEXT, weaken_xz
from tests.conftest import make_bridge

# -- commands --------------------------------------------------------------------------------------------------------------------------


class _Stream:
    def __init__(self, data: bytes = b""):
        self.buffer = io.BytesIO(data)

    def write(self, text: str) -> int:
        return self.buffer.write(text.encode())

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def call(monkeypatch, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, str]:
    out, err = _Stream(), io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["basin-lens", *arguments])
        patched.setattr(sys, "stdin", _Stream(stdin))
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", err)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.buffer.getvalue(), err.getvalue()


@pytest.fixture
def loaded(llama, monkeypatch):
    weaken_xz(monkeypatch)
    monkeypatch.setattr(cli_codec, "_load", lambda _: llama)


@pytest.mark.usefixtures("loaded")
def test_commands_go_there_and_back(tmp_path, monkeypatch):
    book, packed = tmp_path / "book.txt", tmp_path / "book.txt.blz"
    book.write_bytes(TEXT.encode())
    how = ("--streams", "2", "--context", "32", "--method", "ranks")
    assert call(monkeypatch, "compress", str(book), *how)[0] == 0
    book.rename(tmp_path / "kept")
    assert call(monkeypatch, "decompress", str(packed))[0] == 0
    assert book.read_bytes() == TEXT.encode()
    code, said, _ = call(monkeypatch, "codec-info", str(packed))
    assert code == 0 and b"bits per byte" in said and hashlib.sha256(TEXT.encode()).hexdigest().encode() in said
    # Through the streams, which carry nothing but the file.
    code, piped, err = call(monkeypatch, "compress", "-", "--no-verify", stdin=TEXT.encode())
    assert code == 0 and "bits per byte" in err
    assert call(monkeypatch, "decompress", "-", stdin=piped)[1] == TEXT.encode()


@pytest.mark.usefixtures("loaded")
def test_decompress_writes_nothing_under_another_model(tmp_path, monkeypatch, tokenizer, blob):
    packed, out = tmp_path / "book.blz", tmp_path / "book"
    packed.write_bytes(blob)
    with monkeypatch.context() as patched:
        patched.setattr(cli_codec, "_load", lambda _: make_bridge("llama", seed=1, tokenizer=tokenizer))
        code, _, err = call(patched, "decompress", str(packed))
        assert code == 1 and "expected the model that wrote the file" in err and not out.exists()
    assert call(monkeypatch, "decompress", str(packed))[0] == 0
    assert out.read_bytes() == TEXT[:330].encode()


@pytest.mark.usefixtures("loaded")
def test_commands_never_overwrite_and_fail_in_one_line(tmp_path, monkeypatch):
    book, packed = tmp_path / "book.txt", tmp_path / "book.txt.blz"
    book.write_bytes(b"text")
    packed.write_bytes(b"mine")
    for arguments, words in [
        (("compress", str(book)), "--force"),
        (("compress", str(tmp_path / "none")), "can be read"),
        (("compress", str(book), "--out", str(tmp_path / "no" / "x")), "folder"),
        (("compress", str(book), "--method", "magic", "--out", str(tmp_path / "y")), "expected method"),
        (("decompress", str(packed), "--force"), "begins with"),
        (("decompress", str(book)), "--out"),
        (("codec-info", str(book)), "begins with"),
    ]:
        code, out, err = call(monkeypatch, *arguments)
        lines = [line for line in err.splitlines() if line.startswith("basin-lens:")]
        assert code in (1, 2) and not out and len(lines) == 1 and words in lines[0], err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "book.txt.blz"]
    assert packed.read_bytes() == b"mine" and book.read_bytes() == b"text"
    assert call(monkeypatch, "compress", str(book), "--force")[0] == 0
    assert codec.read(packed.read_bytes()).restored() == b"text"


@pytest.mark.slow(everywhere=True)
@pytest.mark.usefixtures("loaded")
def test_an_interrupted_compression_leaves_no_file(tmp_path, monkeypatch):
    book = tmp_path / "book.txt"
    book.write_bytes(TEXT.encode())

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for where in ((lockstep, "_step"), (os, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(*where, interrupt)
            assert call(patched, "compress", str(book))[0] == 130
        assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def bits(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("there", [False, True])
def test_a_secret_file_stays_one_there_and_back(tmp_path, monkeypatch, there):
    book, packed = tmp_path / "book.txt", tmp_path / "book.txt.blz"
    book.write_bytes(b"for my eyes alone")
    book.chmod(0o600)
    for made in (packed, book):
        if there:
            made.touch()
            made.chmod(0o644 if made is packed else 0o666)
        assert (
            call(monkeypatch, "compress" if made is packed else "decompress", str(book if made is packed else packed), "--force")[0]
            == 0
        )
        assert bits(made) == 0o600
        if made is packed and not there:
            book.unlink()
    assert book.read_bytes() == b"for my eyes alone"


@pytest.mark.parametrize("command", ["compress", "decompress", "codec-view"])
def test_the_output_is_never_the_input(tmp_path, monkeypatch, command):
    """By whatever name, with --force, and before a model is loaded."""
    monkeypatch.setattr(cli_codec, "_load", lambda _: pytest.fail("loaded"))
    book = tmp_path / "book.blz"
    book.write_bytes(container.store(b"text", "not told").to_bytes())
    os.link(book, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(book)
    (tmp_path / "to").symlink_to(tmp_path)
    before = book.read_bytes()
    for name in ("book.blz", "hard", "soft", "to/book.blz", "to/to/hard"):
        code, out, err = call(monkeypatch, command, str(book), "--out", str(tmp_path / name), "--force")
        assert code == 1 and not out and "other than the input" in err and err.count("\n") == 1
    assert book.read_bytes() == before and (tmp_path / "soft").is_symlink()


@pytest.mark.usefixtures("loaded")
def test_output_goes_through_pipes_and_devices_and_never_through_links(tmp_path, monkeypatch):
    book, pipe, link, got = tmp_path / "book.txt", tmp_path / "pipe", tmp_path / "link", []
    book.write_bytes(b"text")
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    assert call(monkeypatch, "compress", str(book), "--out", str(pipe))[0] == 0
    reader.join(10)
    assert codec.read(got[0]).restored() == b"text" and pipe.is_fifo()
    with (tmp_path / "log").open("ab+") as log:  # as the shell's >>
        log.write(b"first")
        log.flush()
        assert call(monkeypatch, "compress", str(book), "--out", f"/dev/fd/{log.fileno()}")[0] == 0
    assert (tmp_path / "log").read_bytes() == b"first" + got[0]
    assert call(monkeypatch, "compress", str(book), "--out", "/dev/null")[0] == 0 and Path("/dev/null").is_char_device()
    (tmp_path / "theirs").write_bytes(b"theirs")
    for to in ("theirs", "nowhere"):
        link.symlink_to(to)
        code, _, err = call(monkeypatch, "compress", str(book), "--out", str(link), "--force")
        assert code == 1 and "a link to" in err and link.is_symlink()
        link.unlink()
    assert (tmp_path / "theirs").read_bytes() == b"theirs" and not (tmp_path / "nowhere").exists()


@pytest.mark.usefixtures("loaded")
def test_a_terminal_gets_text_alone(tmp_path, monkeypatch):
    main, side = os.openpty()
    name = os.ttyname(side)
    (tmp_path / "text.txt").write_bytes(b"text")
    for kind, content in {"text": b"text", "bytes": b"\0\xff"}.items():
        (tmp_path / f"{kind}.blz").write_bytes(container.store(content, "not told").to_bytes())
    try:
        for command, file in [("compress", "text.txt"), ("decompress", "bytes.blz")]:
            code, _, err = call(monkeypatch, command, str(tmp_path / file), "--out", name)
            assert code == 1 and "got a terminal" in err
            with monkeypatch.context() as patched:
                patched.setattr(_Stream, "isatty", lambda _: True)
                code, out, err = call(patched, command, str(tmp_path / file), "--out", "-")
            assert code == 1 and "got a terminal" in err and not out
        assert call(monkeypatch, "decompress", str(tmp_path / "text.blz"), "--out", name)[0] == 0
        assert os.read(main, 100) == b"text"
    finally:
        os.close(main)
        os.close(side)


@pytest.mark.usefixtures("loaded")
def test_a_benchmark_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"\xff")
    assert call(monkeypatch, "codec-bench", str(tmp_path / "file"), "--out", str(tmp_path / "to" / "bench"))[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- benchmark and page ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_bench_and_view_commands_write_their_files(tmp_path, monkeypatch):
    text = tmp_path / "<b>.txt"
    text.write_text("<script>alert('\u00e9')</script>\r\n\0 & \"quoted\" text. " * 2, encoding="utf-8")
    page, folder = tmp_path / "page.html", tmp_path / "bench"
    assert call(monkeypatch, "codec-view", str(text), "--out", str(page))[0] == 0
    made = page.read_text(encoding="utf-8")
    assert "<script" not in made and not re.search("https?:", made) and "\0" not in made
    assert re.findall(r'(?:src|href)="(.{22})', made) == ["data:image/png;base64,"] * 2
    assert made.count('<span class="b') == len(codec.TextCodec(cli_codec._load("")).ranks(text.read_bytes()))
    code, said, _ = call(monkeypatch, "codec-bench", str(text), str(text), "--out", str(folder))
    assert code == 0 and said.count(b"xz -9e") == 2
    assert sorted(path.name for path in folder.iterdir()) == ["codec-bench.csv", "codec-bench.png"]
    several = ("--model", "one", "--model", "other", "--out", str(tmp_path / "both"))
    assert call(monkeypatch, "codec-bench", str(text), *several)[0] == 0
    both = pd.read_csv(tmp_path / "both" / "codec-bench.csv").set_index("coder")
    assert both.model["direct (one)"] == "one" and both.model["direct (other)"] == "other"
    assert both.bytes["direct (one)"] == both.bytes["direct (other)"]  # the same model here
    assert both.index.is_unique and pd.isna(both.model["xz -9e"])
    for again in (("codec-view", str(text), "--out", str(page)), ("codec-bench", str(text), "--out", str(folder))):
        code, _, err = call(monkeypatch, *again)
        assert code == 1 and "--force" in err


@pytest.mark.slow(everywhere=True)
@pytest.mark.usefixtures("loaded")
def test_bench_goes_on_behind_a_file_that_it_cannot_measure(tmp_path, monkeypatch):
    good, bad, out = tmp_path / "good.txt", tmp_path / "bad.bin", tmp_path / "deep" / "bench"
    good.write_text(TEXT[:200], encoding="utf-8")
    bad.write_bytes(b"\xff\xfe\x00")
    code, said, err = call(monkeypatch, "codec-bench", str(bad), str(good), str(tmp_path / "none"), "--out", str(out))
    assert code == 1 and said.count(b"xz -9e") == 1
    last = next(line for line in err.splitlines() if line.startswith("basin-lens:"))
    assert "2 of 3 left out" in last and "bad.bin: " in last and "not UTF-8" in last and "none: " in last
    assert sorted(path.name for path in out.iterdir()) == ["codec-bench.csv", "codec-bench.png"]
    table = pd.read_csv(out / "codec-bench.csv")
    assert set(table.file) == {str(good)} and table.bytes.notna().any()


@pytest.mark.usefixtures("loaded")
def test_bench_leaves_no_folder_behind_where_nothing_was_measured(tmp_path, monkeypatch):
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"\xff\xfe\x00")
    for file in (bad, tmp_path / "none"):
        code, _, err = call(monkeypatch, "codec-bench", str(file), "--out", str(tmp_path / "deep" / "bench"))
        assert code == 1 and "can be measured, got none" in err
        assert [path.name for path in tmp_path.iterdir()] == ["bad.bin"]
    (tmp_path / "kept").mkdir()
    assert call(monkeypatch, "codec-bench", str(bad), "--out", str(tmp_path / "kept"))[0] == 1
    assert (tmp_path / "kept").is_dir()
    assert call(monkeypatch, "codec-bench", str(bad), "--out", str(bad / "x"))[0] == 1
