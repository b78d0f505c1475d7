"""The command line: errors of one line, exit codes, whole results or none."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from basin_lens import cli, tables
from tests.conftest import TEXTS, make_hf, make_tokenizer


def call(*arguments: str, capsys=None) -> tuple[int, str, str]:
    sys.argv = ["basin-lens", *arguments]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model on disk, and a text file."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    make_hf("llama", vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path.parent / "text.txt").write_text(" ".join(TEXTS * 2), encoding="utf-8")
    return path


def test_analyze_writes_table_summary_and_report(folder, tmp_path, capsys):
    out = tmp_path / "out"
    text = str(folder.parent / "text.txt")
    code, said, _ = call("analyze", text, "--model", str(folder), "--layers", "0,2", "--k", "5", "--out", str(out), capsys=capsys)
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "summary.csv", "table.parquet"]
    table = tables.load(out / "table.parquet")
    assert table["layer"].unique().tolist() == [0, 2]
    assert table["compression"].notna().any()
    assert pd.read_csv(out / "summary.csv")["layer"].tolist() == [0, 2]
    assert str(out / "report.html") in said
    # A second run into the same folder replaces the results.
    assert call("analyze", text, "--model", str(folder), "--layers", "1", "--k", "5", "--out", str(out), capsys=capsys)[0] == 0
    assert tables.load(out / "table.parquet")["layer"].unique().tolist() == [1]


def test_bad_calls_say_one_line_and_fail(folder, tmp_path, capsys):
    text = str(folder.parent / "text.txt")
    (tmp_path / "taken").write_text("x")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.tex").write_text("x")
    for arguments, expected in [
        (("analyze", str(tmp_path / "no.txt")), "does not exist"),
        (("analyze", text, "--model", str(tmp_path / "no.gguf"), "--out", str(tmp_path / "a")), "does not exist"),
        (("analyze", text, "--out", str(tmp_path / "taken" / "x")), "output folder"),
        (("analyze", text, "--out", str(tmp_path / "others")), "thesis.tex"),
        (("analyze", text, "--model", str(folder), "--k", "100000", "--out", str(tmp_path / "b")), "expected k"),
        (("analyze", text, "--model", str(folder), "--layers", "99", "--out", str(tmp_path / "c")), "layers between 0 and 2"),
        (("analyze", text, "--model", str(folder), "--layers", "x", "--out", str(tmp_path / "d")), "expected layers"),
        (("nonsense",), "No such command"),
    ]:
        code, _, err = call(*arguments, capsys=capsys)
        lines = [line for line in err.splitlines() if line.startswith("basin-lens:")]
        assert code != 0, arguments
        assert len(lines) == 1, err
        assert expected in lines[0], lines
        assert "Traceback" not in err
    assert (tmp_path / "others" / "thesis.tex").exists()
    assert not any((tmp_path / name).exists() and list((tmp_path / name).iterdir()) for name in "abcd")


@pytest.mark.parametrize("command", [(), ("demo",), ("analyze",), ("info",)])
def test_help_has_an_example(command, capsys):
    code, out, _ = call(*command, "--help", capsys=capsys)
    assert code == 0
    assert "basin-lens" in out
    if command:
        assert "Example" in out


def test_info(capsys):
    code, out, _ = call("info", capsys=capsys)
    assert code == 0
    assert "transformer-lens" in out


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "basin_lens.cli", "--help"], capture_output=True, text=True, check=True)
    assert "analyze" in done.stdout
